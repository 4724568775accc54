"""The Spark adapter of a search by cells: `shoal_cells(build, vectors, probes)` in SQL, the cells to look in.

Axes: C cells, Q vectors of one query, D vector elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd


def cells_udf(builds: Mapping[str, NDArray[np.float32]]) -> Callable[..., Any]:
    """A pandas UDF (build string, vectors array<array<float>>, probes int) -> array<int> for these centroids (C, D).

    The `probes` cells nearest to any of the vectors, nearest first; none for NULL and without a vector. KeyError for a
    build that is not among them.
    """
    import pandas as pd
    from pyspark.sql.functions import pandas_udf
    from pyspark.sql.types import ArrayType, IntegerType

    known = dict(builds)

    def shoal_cells(names: pd.Series, vectors: pd.Series, probes: pd.Series) -> pd.Series:
        rows = zip(names, vectors, probes, strict=True)
        return pd.Series([cells_to_look_in(known[name], each, number) for name, each, number in rows], dtype=object)

    # Annotations are text here, and Spark wants types to tell the kind of UDF from.
    shoal_cells.__annotations__ = dict.fromkeys(("names", "vectors", "probes", "return"), pd.Series)
    return pandas_udf(ArrayType(IntegerType()))(shoal_cells)  # type: ignore[call-overload]


def cells_to_look_in(centroids_CD: NDArray[np.float32], vectors_QD: Any, probes: int) -> NDArray[np.int32]:
    """int32 (probes,), at most C: the cells by the greatest product of their centroid with a vector, ties by number."""
    given = [] if vectors_QD is None else [vector_D for vector_D in vectors_QD if vector_D is not None]
    if not given:
        return np.empty(0, dtype=np.int32)
    products_C = (centroids_CD @ np.stack(given).T).max(axis=1)
    return np.argsort(-products_C, kind="stable")[:probes].astype(np.int32)
