"""Spark adapter of terms: `shoal_terms(described, text)`, for the texts that are published and for queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shoal.udfs.terms import term_finder

if TYPE_CHECKING:
    import pandas as pd


def terms_udf() -> Callable[..., Any]:
    """A pandas UDF (description of `describe_terms` string, text string) -> array<string>; NULL for a NULL text."""
    import pandas as pd
    from pyspark.sql.functions import pandas_udf
    from pyspark.sql.types import ArrayType, StringType

    def shoal_terms(described: pd.Series, texts: pd.Series) -> pd.Series:
        return terms_of(described, texts)

    # Annotations are text here, and Spark wants types to tell the kind of UDF from.
    shoal_terms.__annotations__ = {"described": pd.Series, "texts": pd.Series, "return": pd.Series}
    return pandas_udf(ArrayType(StringType()))(shoal_terms)  # type: ignore[call-overload]


def terms_of(described: pd.Series, texts: pd.Series) -> pd.Series:
    """Series of lists of terms, None for a text that is None, for series of descriptions and texts."""
    import pandas as pd

    found = [None if text is None else term_finder(how)(text) for how, text in zip(described, texts, strict=True)]
    return pd.Series(found, index=texts.index, dtype=object)
