"""Spark adapters of terms: `shoal_terms` of SQL for queries, and the column of what is published."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shoal.udfs.terms import term_finder

if TYPE_CHECKING:
    import pandas as pd


def query_terms_udf() -> Callable[..., Any]:
    """A pandas UDF (description of `describe_terms` string, text string) -> array<string>; NULL for a NULL text."""
    import pandas as pd

    def shoal_terms(described: pd.Series, texts: pd.Series) -> pd.Series:
        found = [_terms(how, text) for how, text in zip(described, texts, strict=True)]
        return pd.Series(found, index=texts.index, dtype=object)

    return _adapter(shoal_terms, "described", "texts")


def terms_udf(described: str) -> Callable[..., Any]:
    """A pandas UDF (text string) -> array<string> by one description; NULL for a NULL text."""
    import pandas as pd

    def terms(texts: pd.Series) -> pd.Series:
        return pd.Series([_terms(described, text) for text in texts], index=texts.index, dtype=object)

    return _adapter(terms, "texts")


def _terms(described: str, text: str | None) -> list[str] | None:
    return None if text is None else term_finder(described)(text)


def _adapter(function: Callable[..., Any], *parameters: str) -> Callable[..., Any]:
    import pandas as pd
    from pyspark.sql.functions import pandas_udf
    from pyspark.sql.types import ArrayType, StringType

    # Annotations are text here, and Spark wants types to tell the kind of UDF from.
    function.__annotations__ = dict.fromkeys((*parameters, "return"), pd.Series)
    return pandas_udf(ArrayType(StringType()))(function)  # type: ignore[call-overload]
