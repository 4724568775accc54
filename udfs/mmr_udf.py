"""Maximal marginal relevance: of the best answers those that say something new; `shoal_mmr` of SQL is its adapter.

Axes: N candidates, D vector elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd


def mmr_udf() -> Callable[..., Any]:
    """A pandas UDF (vectors array<array<float>>, scores array<float>, k int, relevance double) -> array<int>.

    What it gives are the places of the chosen ones, counted from 0, in the order in which they were chosen.
    """
    import pandas as pd
    from pyspark.sql.functions import pandas_udf
    from pyspark.sql.types import ArrayType, IntegerType

    def shoal_mmr(vectors: pd.Series, scores: pd.Series, ks: pd.Series, relevances: pd.Series) -> pd.Series:
        rows = zip(vectors, scores, ks, relevances, strict=True)
        chosen = [
            maximal_marginal_relevance(_matrix(each), np.asarray(score), k, share) for each, score, k, share in rows
        ]
        return pd.Series(chosen, index=scores.index, dtype=object)

    # Annotations are text here, and Spark wants types to tell the kind of UDF from.
    shoal_mmr.__annotations__ = dict.fromkeys(("vectors", "scores", "ks", "relevances", "return"), pd.Series)
    return pandas_udf(ArrayType(IntegerType()))(shoal_mmr)  # type: ignore[call-overload]


def maximal_marginal_relevance(
    vectors_ND: NDArray[np.floating], scores_N: NDArray[np.floating], k: int, relevance: float
) -> list[int]:
    """The rows of k candidates, each the best of those left by relevance * score - (1 - relevance) * likeness.

    Likeness is the largest inner product with a candidate that was chosen before; before the first it is 0. Ties go to
    the lower row. Carbonell and Goldstein, SIGIR 1998.
    """
    num_rows = len(scores_N)
    scores_N, vectors_ND = scores_N.astype(np.float64), vectors_ND.astype(np.float64)
    chosen: list[int] = []
    left_N = np.ones(num_rows, dtype=np.bool_)
    likeness_N = np.full(num_rows, -np.inf, dtype=np.float64)
    while len(chosen) < min(k, num_rows):
        penalty_N = likeness_N if chosen else np.zeros(num_rows)
        worth_N = relevance * scores_N - (1 - relevance) * penalty_N
        best = int(np.argmax(np.where(left_N, worth_N, -np.inf)))
        chosen.append(best)
        left_N[best] = False
        likeness_N = np.maximum(likeness_N, vectors_ND @ vectors_ND[best])
    return chosen


def _matrix(vectors: Any) -> NDArray[np.float32]:
    """Vectors (N, D) of an array of arrays; (0, 0) of an empty one."""
    if not len(vectors):
        return np.empty((0, 0), dtype=np.float32)
    return np.stack([np.asarray(vector, dtype=np.float32) for vector in vectors])
