"""Joins of random and of awkward vectors against all pairs scored one by one."""

from operator import itemgetter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.udfs import knn_join
from shoal.udfs.knn_join import (
    RESIDENT,
    STREAMED,
    TILE,
    JoinOptions,
    Tile,
    join_tiles,
    make_pack,
    make_row_join,
    make_tile_join,
    pair_scores,
    tiles_of,
    unpack,
)

KEYS = ["id", "chunk_index"]
PAIRS = pa.schema(
    [
        ("l0", pa.string()), ("l1", pa.int32()), ("r0", pa.string()), ("r1", pa.int32()), ("score", pa.float32()),
    ]
)  # fmt: skip
INPUT = pa.schema([("task", pa.int32()), ("side", pa.int32()), ("tile", pa.binary())])

Pair = tuple[int, int, float]


def unit_vectors(num_rows: int, dim: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num_rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def table(vectors: np.ndarray, order: np.ndarray | None = None) -> pa.Table:
    """Rows whose number says their place in key order; `order` is the one in which they come."""
    numbers = np.arange(len(vectors)) if order is None else order
    return pa.table(
        {
            "id": pa.array([f"row-{number // 2:05d}" for number in numbers], pa.string()),
            "chunk_index": pa.array(numbers % 2, pa.int32()),
            "embedding": pa.array(list(vectors[numbers]), pa.list_(pa.float32())),
        }
    )


def tiles(vectors: np.ndarray, rows_each: int = 100, seed: int | None = None) -> list[Tile]:
    """Tiles in chance order of their rows, so that no tile comes before another by its keys."""
    order = np.arange(len(vectors)) if seed is None else np.random.default_rng(seed).permutation(len(vectors))
    rows = table(vectors, order)
    dim = vectors.shape[1]
    return [
        tile for start in range(0, len(rows), rows_each) for tile in tiles_of(rows.slice(start, rows_each), KEYS, dim)
    ]


def found(batches: list[pa.RecordBatch]) -> list[Pair]:
    """Pairs as row numbers and score, by left row, score and right row."""
    rows = pa.Table.from_batches(batches, PAIRS).to_pylist()
    numbered = [(int(row["l0"][4:]) * 2 + row["l1"], int(row["r0"][4:]) * 2 + row["r1"], row["score"]) for row in rows]
    return sorted(numbered, key=lambda pair: (pair[0], -pair[2], pair[1]))


def brute(left: np.ndarray, right: np.ndarray, options: JoinOptions) -> list[Pair]:
    """Every pair scored, sorted by score and then by key, and cut."""
    pairs = []
    for row, vector in enumerate(left):
        scores = pair_scores(vector[None, :], right, np.zeros(len(right), np.int64), np.arange(len(right)))
        best = np.argsort(-scores, kind="stable")[: options.k]
        pairs += [(row, int(place), float(scores[place])) for place in best]
    least = -np.inf if options.threshold is None else np.float32(options.threshold)
    return [pair for pair in pairs if pair[2] >= least]


def joined(left: list[Tile], right: list[Tile], options: JoinOptions, *, left_is_resident: bool) -> list[Pair]:
    resident, streamed = (left, right) if left_is_resident else (right, left)
    batches = list(join_tiles(resident, iter(streamed), options, PAIRS, left_is_resident=left_is_resident))
    assert all(batch.schema == PAIRS and batch.num_rows <= knn_join.OUTPUT_ROWS for batch in batches)
    return found(batches)


@pytest.mark.parametrize("left_is_resident", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        JoinOptions(1, None),
        JoinOptions(10, None),
        JoinOptions(5000, None),
        JoinOptions(10, 0.3),
        JoinOptions(None, 0.3),
    ],
    ids=str,
)
def test_every_wanted_pair_of_random_vectors_is_found_and_no_other(options, left_is_resident):
    left, right = unit_vectors(150, 24, 1), unit_vectors(1100, 24, 2)

    pairs = joined(tiles(left, 64, 3), tiles(right, 130, 4), options, left_is_resident=left_is_resident)

    assert pairs == brute(left, right, options)
    assert len(pairs) > 100


@settings(max_examples=40, deadline=None)
@given(
    picks=st.lists(st.integers(0, 3), min_size=60, max_size=60),
    rows_each=st.integers(1, 60),
    k=st.integers(1, 12),
    seed=st.integers(0, 99),
    left_is_resident=st.booleans(),
)
def test_equal_vectors_are_told_apart_by_key_however_they_come(picks, rows_each, k, seed, left_is_resident):
    right, left = unit_vectors(4, 8, 5)[picks], unit_vectors(7, 8, 6)
    options = JoinOptions(k, None)

    pairs = joined(tiles(left, 3), tiles(right, rows_each, seed), options, left_is_resident=left_is_resident)

    assert pairs == brute(left, right, options)


@pytest.mark.parametrize("left_is_resident", [True, False])
def test_nothing_but_duplicates_is_bounded_and_decided_by_key(monkeypatch, left_is_resident):
    largest = []
    settle = knn_join._Strip.settle
    monkeypatch.setattr(
        knn_join._Strip, "settle", lambda strip, ranks: (largest.append(len(ranks)), settle(strip, ranks))[1]
    )
    left, right = np.tile(unit_vectors(1, 8, 7), (20, 1)), np.tile(unit_vectors(1, 8, 7), (3000, 1))
    options = JoinOptions(3, None)

    pairs = joined(tiles(left), tiles(right, 10, 8), options, left_is_resident=left_is_resident)

    assert [pair[:2] for pair in pairs] == [(row, place) for row in range(20) for place in range(3)]
    assert max(largest) <= (knn_join.SPARE_TIES + 1) * 20 * 3


def test_keys_that_no_row_needs_any_longer_are_dropped_on_the_way(monkeypatch):
    monkeypatch.setattr(knn_join, "COMPACT_ROWS", 64)
    held = []
    compact = knn_join._LeftBlock._compact
    monkeypatch.setattr(
        knn_join._LeftBlock,
        "_compact",
        lambda block: (compact(block), held.append(sum(keys.num_rows for keys in block._right_keys)))[0],
    )
    left, right = unit_vectors(8, 16, 9), unit_vectors(2000, 16, 10)
    options = JoinOptions(4, None)

    assert joined(tiles(left), tiles(right, 16, 11), options, left_is_resident=True) == brute(left, right, options)
    assert len(held) > 5
    assert max(held) <= 8 * 4


def test_more_left_rows_than_a_strip_and_more_pairs_than_a_batch(monkeypatch):
    monkeypatch.setattr(knn_join, "STRIP_ROWS", 7)
    monkeypatch.setattr(knn_join, "OUTPUT_ROWS", 11)
    monkeypatch.setattr(knn_join, "PAIRS", 5)
    left, right = unit_vectors(40, 12, 12), unit_vectors(90, 12, 13)
    for options in (JoinOptions(6, None), JoinOptions(None, 0.1)):
        assert joined(tiles(left, 18), tiles(right, 30), options, left_is_resident=True) == brute(left, right, options)


@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1e3, 1e12])
def test_vectors_that_are_not_normalised_are_joined_as_exactly(scale):
    rng = np.random.default_rng(14)
    left = (unit_vectors(30, 96, 15) * rng.uniform(0.1, 10, (30, 1)) * scale).astype(np.float32)
    right = (unit_vectors(400, 96, 16) * rng.uniform(0.1, 10, (400, 1))).astype(np.float32)
    right[::3] = right[0]
    right[1::3] = np.nextafter(right[0], np.float32(9))
    options = JoinOptions(7, None)

    assert joined(tiles(left), tiles(right, 50, 17), options, left_is_resident=True) == brute(left, right, options)


@pytest.mark.parametrize("left_is_resident", [True, False])
@pytest.mark.parametrize("options", [JoinOptions(3, None), JoinOptions(None, 0.0)], ids=str)
def test_an_empty_side_gives_no_pairs(options, left_is_resident):
    some = tiles(unit_vectors(5, 8, 18))
    assert joined(some, [], options, left_is_resident=left_is_resident) == []
    assert joined([], some, options, left_is_resident=left_is_resident) == []


def test_packed_rows_come_back_in_key_order_tile_by_tile_and_block_by_block(monkeypatch):
    monkeypatch.setattr(knn_join, "TILE_ROWS", 8)
    vectors = unit_vectors(100, 6, 19)
    order = np.random.default_rng(20).permutation(100)
    rows = table(vectors, order).add_column(0, "block", pa.array(order % 3, pa.int32()))

    batches = list(make_pack(KEYS, 6)(iter(rows.to_batches(13))))

    assert all(batch.schema == TILE for batch in batches)
    seen = []
    for batch in batches:
        for row in batch.to_pylist():
            tile = unpack(row["tile"])
            numbers = [int(key["id"][4:]) * 2 + key["chunk_index"] for key in tile.keys.to_pylist()]
            assert {number % 3 for number in numbers} == {row["block"]}
            assert numbers == sorted(numbers)
            assert 1 <= tile.num_rows <= 8
            np.testing.assert_array_equal(tile.vectors_ND, vectors[numbers])
            seen += numbers
    assert sorted(seen) == list(range(100))


def test_packing_takes_one_window_at_a_time(monkeypatch):
    monkeypatch.setattr(knn_join, "PACK_BYTES", 10 * 6 * 4)
    rows = table(unit_vectors(10, 6, 21)).add_column(0, "block", pa.array([0] * 10, pa.int32()))
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield from rows.to_batches()

    next(make_pack(KEYS, 6)(endless()))

    assert len(taken) == 1


@pytest.mark.parametrize("left_is_resident", [True, False])
def test_tasks_that_share_a_partition_are_joined_one_after_another(left_is_resident):
    """Two left halves against three right thirds, as six tasks in one stream of small Arrow batches."""
    left, right = unit_vectors(40, 8, 22), unit_vectors(90, 8, 23)
    halves = dict(enumerate(tiles(left, 20)))
    rows_of_right = table(right)
    thirds = {third: [tile_at(rows_of_right, third * 30 + start, 15) for start in (0, 15)] for third in range(3)}
    sides = (RESIDENT, STREAMED) if left_is_resident else (STREAMED, RESIDENT)
    rows = []
    for half, tile in halves.items():
        for third, small in thirds.items():
            task = half * 3 + third
            rows += [(task, sides[0], tile.packed()), *[(task, sides[1], each.packed()) for each in small]]
    rows.sort(key=itemgetter(0, 1))
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), INPUT.types, strict=True)]
    options = JoinOptions(None, 0.2)

    join = make_tile_join(options, PAIRS, left_is_resident=left_is_resident)
    batches = list(join(iter(pa.Table.from_arrays(columns, schema=INPUT).to_batches(4))))

    assert found(batches) == sorted(brute(left, right, options), key=lambda pair: (pair[0], -pair[2], pair[1]))


def tile_at(rows: pa.Table, start: int, num_rows: int) -> Tile:
    return next(tiles_of(rows.slice(start, num_rows), KEYS, 8))


def test_a_task_whose_block_is_empty_gives_no_pairs():
    packed = tiles(unit_vectors(3, 8, 24))[0].packed()
    columns = [pa.array([value], kind) for value, kind in zip((0, STREAMED, packed), INPUT.types, strict=True)]
    batch = pa.RecordBatch.from_arrays(columns, schema=INPUT)
    for options in (JoinOptions(2, None), JoinOptions(None, -1.0)):
        for left_is_resident in (True, False):
            assert list(make_tile_join(options, PAIRS, left_is_resident=left_is_resident)(iter([batch]))) == []


@pytest.mark.parametrize("left_is_resident", [True, False])
def test_rows_are_joined_with_a_small_side_as_they_come(left_is_resident):
    left, right = unit_vectors(30, 8, 25), unit_vectors(200, 8, 26)
    options = JoinOptions(200, 0.1)
    small, large = (left, right) if left_is_resident else (right, left)

    join = make_row_join(
        [tile.packed() for tile in tiles(small, 64, 27)], KEYS, 8, options, PAIRS, left_is_resident=left_is_resident
    )
    batches = list(join(iter(table(large).to_batches(7))))

    assert found(batches) == brute(left, right, options)


@pytest.mark.parametrize(
    ("k", "threshold", "message"),
    [(None, None, "neither k nor threshold"), (0, None, "k is 0"), (1, float("nan"), "threshold is nan")],
)
def test_options_that_ask_for_nothing_sensible_are_refused(k, threshold, message):
    with pytest.raises(ValueError, match=message):
        JoinOptions(k, threshold)


@pytest.mark.parametrize(
    ("value", "message"),
    [([1.0, 2.0, 3.0], r"widths \[3\]"), ([1.0, None], "NULL elements"), ([1.0, np.nan], "NaN or infinite")],
)
def test_damaged_vectors_are_an_error(value, message):
    rows = pa.table({"id": ["a"], "chunk_index": pa.array([0], pa.int32())})
    rows = rows.append_column("embedding", pa.array([value], pa.list_(pa.float32())))
    right = tiles(unit_vectors(3, 2, 28))
    with pytest.raises(ValueError, match=message):
        joined(list(tiles_of(rows, KEYS, 2)), right, JoinOptions(1, None), left_is_resident=True)


def test_a_pair_scores_the_same_from_both_sides_and_wherever_it_stands():
    vectors = unit_vectors(101, 384, 29)
    vectors[::10] = vectors[0]
    rows, places = (axis.ravel() for axis in np.indices((101, 101)))
    scores = pair_scores(vectors, vectors, rows, places).reshape(101, 101)
    np.testing.assert_allclose(scores, vectors.astype(np.float64) @ vectors.T.astype(np.float64), atol=1e-7)
    np.testing.assert_array_equal(scores, scores.T)
    assert len(set(scores[::10, 1].tolist())) == 1
