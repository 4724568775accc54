"""k-means cells of vectors: centroids from a sample, the cell of each vector, and how many cells a query must look in.

Spherical: a vector belongs to the centroid of length 1 with the greatest inner product, and cells are ranked for a
query in the same way (an inverted file index; Sivic and Zisserman 2003, Jegou et al. 2011). Balanced by where k-means
starts: the largest cell is cut in two until there are enough (Steinbach et al. 2000).

Axes: N vectors, Q queries, C cells, D elements, K neighbours.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

ROUNDS = 12
"""Of k-means after the cutting: more move the centroids by little."""

BLOCK_ROWS = 8192
"""Vectors whose products with all centroids are held at a time."""


def train_cells(sample_ND: npt.NDArray[np.float32], num_cells: int, *, seed: int = 0) -> npt.NDArray[np.float32]:
    """Centroids float32 (C, D) of length 1, C at most `num_cells`: fewer where the sample has fewer different vectors.

    ValueError for a sample without rows, or fewer than one cell.
    """
    if num_cells < 1:
        raise ValueError(f"num_cells is {num_cells}; ask for at least 1.")
    if len(sample_ND) == 0:
        raise ValueError("the sample has no vectors; give at least one.")
    unit_ND = _unit(sample_ND)
    if len({hash(vector_D.tobytes()) for vector_D in unit_ND}) <= num_cells:
        return np.unique(unit_ND, axis=0)
    from sklearn.cluster import BisectingKMeans, KMeans

    cut = BisectingKMeans(num_cells, bisecting_strategy="largest_cluster", max_iter=20, random_state=seed)
    start_CD = cut.fit(unit_ND).cluster_centers_
    found = KMeans(num_cells, init=start_CD, n_init=1, max_iter=ROUNDS, random_state=seed).fit(unit_ND)
    centroids_CD = _unit(found.cluster_centers_.astype(np.float32))
    return np.unique(centroids_CD[np.linalg.norm(centroids_CD, axis=1) > 0], axis=0)


def nearest_cells(vectors_ND: npt.NDArray[np.float32], centroids_CD: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """The cell of each vector, int32 (N,); of equally near ones the first."""
    blocks = [
        np.argmax(vectors_ND[start : start + BLOCK_ROWS] @ centroids_CD.T, axis=1)
        for start in range(0, len(vectors_ND), BLOCK_ROWS)
    ]
    return np.concatenate(blocks).astype(np.int32) if blocks else np.empty(0, dtype=np.int32)


def make_assign(centroids_CD: npt.NDArray[np.float32]) -> Callable[[Iterator[pd.Series]], Iterator[pd.Series]]:
    """A pandas UDF from `embedding` array<float> to its cell int; NULL for a row without a vector."""

    def assign(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        for embeddings in batches:
            cells = pd.Series(pd.NA, index=embeddings.index, dtype="Int32")
            there_N = embeddings.notna().to_numpy()
            if there_N.any():
                vectors_ND = np.stack(list(embeddings[there_N])).astype(np.float32, copy=False)
                cells[there_N] = nearest_cells(vectors_ND, centroids_CD)
            yield cells

    return assign


def ranks_of_cells(queries_QD: npt.NDArray[np.float32], centroids_CD: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The place of every cell in the order in which each query looks in them, int64 (Q, C), 0 for the nearest."""
    order_QC = np.argsort(-(queries_QD @ centroids_CD.T), axis=1, kind="stable")
    ranks_QC = np.empty_like(order_QC)
    np.put_along_axis(ranks_QC, order_QC, np.broadcast_to(np.arange(len(centroids_CD)), order_QC.shape), axis=1)
    return ranks_QC


def recall_by_probes(ranks_M: npt.NDArray[np.int64], num_cells: int) -> npt.NDArray[np.float64]:
    """Share of true neighbours found with 1, 2, .. C cells looked in, float64 (C,).

    `ranks_M`: for every true neighbour of every query, the rank of its cell for that query. ValueError where there are
    none.
    """
    if len(ranks_M) == 0:
        raise ValueError("there are no neighbours to measure recall on; give at least one.")
    return np.cumsum(np.bincount(ranks_M, minlength=num_cells)) / len(ranks_M)


def probes_for(recall_C: npt.NDArray[np.float64], target: float, num_queries: int) -> int:
    """The fewest cells whose recall is the target or more, also by one standard error less; all of them where none is.

    The error is that of a share measured on so many queries, as if the neighbours of a query were found together or
    not at all: recall measured on others will then seldom be below the target.
    """
    error_C = np.sqrt(recall_C * (1 - recall_C) / max(num_queries, 1))
    enough_C = recall_C - error_C >= target - 1e-12
    return int(np.argmax(enough_C)) + 1 if enough_C.any() else len(recall_C)


def _unit(vectors_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The vectors at length 1; zero vectors stay."""
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.divide(vectors_ND, norms_N1, out=np.zeros_like(vectors_ND), where=norms_N1 > 0)
