from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.udfs import topk
from shoal.udfs.topk import exact_scores, make_topk, top_k, topk_schema, vectors_of

COLUMNS = pa.schema([("id", pa.string()), ("chunk_index", pa.int32())])
IDS = ["id", "chunk_index"]


def table(vectors: np.ndarray) -> pa.Table:
    embedding = pa.array([None if row is None else list(row) for row in vectors], pa.list_(pa.float32()))
    names = [f"row-{number // 2:04d}" for number in range(len(vectors))]
    indexes = pa.array([number % 2 for number in range(len(vectors))], pa.int32())
    return pa.table({"embedding": embedding, "id": names, "chunk_index": indexes})


def run(queries: np.ndarray, k: int, parts: list[pa.Table], batch_rows: int = 100) -> list[pa.Table]:
    search = make_topk(queries, k, IDS, COLUMNS)
    return [
        pa.Table.from_batches(list(search(iter(part.to_batches(batch_rows)))), topk_schema(COLUMNS)) for part in parts
    ]


def merged(parts: list[pa.Table], k: int) -> list[tuple[int, str, int]]:
    rows = sorted(
        (row["query"], -row["score"], row["id"], row["chunk_index"]) for part in parts for row in part.to_pylist()
    )
    best: dict[int, list] = {}
    for row in rows:
        best.setdefault(row[0], []).append((row[0], row[2], row[3]))
    return [row for found in best.values() for row in found[:k]]


def by_sorting(queries: np.ndarray, vectors: np.ndarray, k: int) -> list[tuple[int, str, int]]:
    """All scores, sorted by score and then by id: row order is id order in `table`."""
    scores = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [(query, f"row-{row // 2:04d}", int(row % 2)) for query, found in enumerate(order) for row in found]


def random_vectors(num_rows: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float32)


@pytest.mark.parametrize(("k", "num_rows"), [(1, 300), (10, 300), (400, 300), (5, 1)])
def test_it_finds_what_sorting_all_scores_finds(k, num_rows):
    queries, vectors = random_vectors(7, 16, 1), random_vectors(num_rows, 16, 2)
    found = run(queries, k, [table(vectors)], batch_rows=64)
    assert merged(found, k) == by_sorting(queries, vectors, k)
    assert found[0].num_rows == 7 * min(k, num_rows)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=4), rows=st.integers(1, 60), k=st.integers(1, 12), data=st.data())
def test_ties_do_not_depend_on_partitions_batches_or_order(cuts, rows, k, data):
    few = random_vectors(4, 8, 3)
    vectors = few[data.draw(st.lists(st.integers(0, 3), min_size=60, max_size=60))]
    whole = table(vectors)
    shuffled = whole.take(pa.array(data.draw(st.permutations(range(60)))))
    edges = sorted({0, 60, *cuts})
    parts = [shuffled.slice(start, end - start) for start, end in pairwise(edges)]
    queries = random_vectors(3, 8, 4)
    assert merged(run(queries, k, parts, rows), k) == by_sorting(queries, vectors, k)


def test_blocks_smaller_than_a_batch_give_the_same(monkeypatch):
    queries, vectors = random_vectors(5, 16, 1), random_vectors(200, 16, 2)
    whole = merged(run(queries, 6, [table(vectors)], 200), 6)
    monkeypatch.setattr(topk, "MAX_SCORES", 5 * 7)
    assert merged(run(queries, 6, [table(vectors)], 200), 6) == whole


def test_null_embeddings_are_skipped():
    found = run(np.ones((1, 2)), 5, [table([None, [1, 2], None, [3, 4]])])[0]
    assert found.column("id").to_pylist() == ["row-0001", "row-0000"]
    assert found.column("score").to_pylist() == [7.0, 3.0]
    assert found.schema == topk_schema(COLUMNS)


def test_only_nulls_or_no_rows_give_no_batches():
    search = make_topk(np.ones((1, 2)), 5, IDS, COLUMNS)
    assert list(search(iter([]))) == []
    assert list(search(iter(table([None, None]).to_batches()))) == []
    assert list(search(iter(table([[1, 2]]).slice(0, 0).to_batches()))) == []


def test_no_id_columns_leave_ties_to_the_order_of_rows():
    search = make_topk(np.ones((1, 2)), 2, [], COLUMNS)
    batches = list(search(iter(table([[1, 1], [1, 1], [1, 1]]).to_batches())))
    assert pa.Table.from_batches(batches).column("chunk_index").to_pylist() == [0, 1]


def test_another_width_is_an_error_that_shows_both():
    with pytest.raises(ValueError, match=r"widths \[3\], the queries have 2"):
        run(np.ones((1, 2)), 5, [table([[1, 2, 3]])])


def test_a_null_element_is_an_error():
    with pytest.raises(ValueError, match="NULL elements"):
        vectors_of(pa.array([[1.0, None]], pa.list_(pa.float32())), 2)


def test_vectors_of_a_slice_are_those_of_the_slice():
    column = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32())).slice(1)
    np.testing.assert_array_equal(vectors_of(column, 2), [[3, 4], [5, 6]])


@pytest.mark.parametrize(
    ("queries", "k", "ids", "message"),
    [
        (np.ones((1, 2)), 0, IDS, "k is 0"),
        (np.ones(2), 1, IDS, "1 axes"),
        (np.ones((1, 2)), 1, ["key"], r"\['key'\] are not among .*'id', 'chunk_index'"),
    ],
)
def test_wrong_arguments_are_refused_on_the_driver(queries, k, ids, message):
    with pytest.raises(ValueError, match=message):
        make_topk(queries, k, ids, COLUMNS)


def test_top_k_puts_the_best_first_and_ties_by_column():
    scores = np.array([[1, 3, 3, 2, 3], [0, 0, 0, 0, 0]], dtype=np.float32)
    assert top_k(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert top_k(scores, 4).tolist() == [[1, 2, 4, 3], [0, 1, 2, 3]]
    assert top_k(scores, 9).tolist() == [[1, 2, 4, 3, 0], [0, 1, 2, 3, 4]]


def test_top_k_puts_nan_last():
    assert top_k(np.array([[np.nan, -5, 1]], dtype=np.float32), 2).tolist() == [[2, 1]]


def test_top_k_below_1_is_refused():
    with pytest.raises(ValueError, match="k is 0"):
        top_k(np.ones((1, 1), dtype=np.float32), 0)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 45))
def test_top_k_is_a_stable_sort_cut_at_k(scores, k):
    row = np.array([scores], dtype=np.float32)
    assert top_k(row, k)[0].tolist() == np.argsort(-row[0], kind="stable")[:k].tolist()


def test_equal_vectors_score_the_same_wherever_they_stand():
    vectors = random_vectors(101, 384, 5)
    vectors[::10] = vectors[0]
    scores = exact_scores(random_vectors(1, 384, 6)[0], vectors)
    assert len(set(scores[::10].tolist())) == 1
