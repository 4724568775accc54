"""Cells by hand-made vectors: what k-means finds, where vectors go, what recall costs."""

import numpy as np
import pandas as pd
import pytest

from shoal.udfs.cells import (
    make_assign,
    nearest_cells,
    probes_for,
    ranks_of_cells,
    recall_by_probes,
    train_cells,
)

RNG = np.random.default_rng(3)


def clustered(num_rows: int, centers_CD: np.ndarray, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around the centers, and which center each is around."""
    of_N = RNG.integers(0, len(centers_CD), num_rows)
    vectors_ND = centers_CD[of_N] + noise * RNG.normal(size=(num_rows, centers_CD.shape[1]))
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32), of_N


def test_cells_are_the_clusters_of_clustered_vectors() -> None:
    centers_CD = np.eye(8, dtype=np.float32)
    vectors_ND, of_N = clustered(800, centers_CD)
    centroids_CD = train_cells(vectors_ND, 8)
    assert centroids_CD.shape == (8, 8)
    assert centroids_CD.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids_CD, axis=1), 1, atol=1e-6)
    cells_N = nearest_cells(vectors_ND, centroids_CD)
    # Each cluster is one cell, and each cell one cluster.
    assert len({(center, cell) for center, cell in zip(of_N, cells_N, strict=True)}) == 8


def test_the_same_sample_and_seed_give_the_same_cells() -> None:
    sample_ND = RNG.normal(size=(500, 16)).astype(np.float32)
    np.testing.assert_array_equal(train_cells(sample_ND, 12, seed=5), train_cells(sample_ND, 12, seed=5))


def test_vectors_without_clusters_are_cut_into_cells_of_like_size() -> None:
    sample_ND = RNG.normal(size=(6400, 32)).astype(np.float32)
    sizes_C = np.bincount(nearest_cells(sample_ND, train_cells(sample_ND, 32)), minlength=32)
    assert sizes_C.max() < 2 * sizes_C.mean()
    assert sizes_C.min() > 0


@pytest.mark.parametrize("num_cells", [3, 50])
def test_no_more_cells_than_different_vectors(num_cells: int) -> None:
    sample_ND = np.repeat(np.eye(3, dtype=np.float32), 40, axis=0)
    assert len(train_cells(sample_ND, num_cells)) == 3


@pytest.mark.parametrize(
    ("sample_ND", "num_cells", "told"),
    [(np.ones((4, 2), dtype=np.float32), 0, "at least 1"), (np.empty((0, 2), dtype=np.float32), 2, "no vectors")],
)
def test_nothing_to_train_on_is_an_error(sample_ND: np.ndarray, num_cells: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        train_cells(sample_ND, num_cells)


def test_rows_without_a_vector_have_no_cell() -> None:
    assign = make_assign(np.eye(2, dtype=np.float32))
    given = pd.Series([np.array([0, 2], dtype=np.float32), None, np.array([3, 1], dtype=np.float32)])
    (cells,) = assign(iter([given]))
    assert [None if pd.isna(cell) else int(cell) for cell in cells] == [1, None, 0]
    (none,) = assign(iter([pd.Series([None, None])]))
    assert none.isna().all()


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors_ND = RNG.normal(size=(100, 8)).astype(np.float32)
    centroids_CD = RNG.normal(size=(7, 8)).astype(np.float32)
    whole_N = nearest_cells(vectors_ND, centroids_CD)
    monkeypatch.setattr("shoal.udfs.cells.BLOCK_ROWS", 9)
    np.testing.assert_array_equal(nearest_cells(vectors_ND, centroids_CD), whole_N)
    assert nearest_cells(vectors_ND[:0], centroids_CD).tolist() == []


def test_cells_are_ranked_by_their_centroids_product_with_the_query() -> None:
    centroids_CD = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    queries_QD = np.array([[1, 0], [0, 1]], dtype=np.float32)
    assert ranks_of_cells(queries_QD, centroids_CD).tolist() == [[0, 2, 1], [2, 0, 1]]


def test_recall_grows_with_the_cells_looked_in_and_names_the_fewest() -> None:
    recall_C = recall_by_probes(np.array([0, 0, 0, 0, 0, 0, 1, 1, 2, 3]), 4)
    assert recall_C.tolist() == pytest.approx([0.6, 0.8, 0.9, 1.0])
    many = 10**9
    assert [probes_for(recall_C, target, many) for target in (0.1, 0.59, 0.7, 0.89, 0.95, 1.0)] == [1, 1, 2, 3, 4, 4]
    with pytest.raises(ValueError, match="no neighbours"):
        recall_by_probes(np.array([], dtype=np.int64), 4)


def test_a_recall_that_few_queries_measured_has_to_be_above_the_target_by_its_error() -> None:
    recall_C = np.array([0.96, 0.98, 0.99, 1.0])
    assert [probes_for(recall_C, 0.95, queries) for queries in (1000, 200, 50, 10, 5)] == [1, 2, 2, 3, 4]
    assert probes_for(recall_C[:2], 0.99, 100) == 2
