"""Joins of DataFrames, small sides and blocks alike, against all pairs scored by numpy; what a grid moves."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.jobs import knn
from shoal.jobs.cells import FRESH
from shoal.jobs.knn import BLOCK_BYTES, STREAM_BLOCKS, Cells, Grid, Side, join_self, join_sides, plan_grid
from shoal.udfs.cells import nearest_cells
from shoal.udfs.knn_join import JoinOptions

pytestmark = pytest.mark.spark

DIM = 8
Vectors = np.ndarray
Pair = tuple[int, int, float, int]
BLOCKS = Grid(left_is_resident=True, blocks=2, groups=2)


def unit_vectors(num_rows: int, seed: int) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(num_rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def side(spark: SparkSession, vectors: Vectors, num_partitions: int = 2) -> Side:
    """Rows in chance order with one without a vector; a key with a dot, and one that is called as a result is."""
    rows = [(f"row {number:04d}", number % 7, vectors[number].tolist()) for number in range(len(vectors))]
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    rows = [rows[number] for number in order] + [("no vector", 0, None)]
    made = spark.createDataFrame(rows, "`a.b` string, score int, embedding array<float>")
    return Side(made.repartition(num_partitions, "score"), ("a.b", "score"), len(vectors))


def pairs_of(found: DataFrame) -> list[Pair]:
    assert found.columns == ["left_a.b", "left_score", "right_a.b", "right_score", "score", "rank"]
    assert [kind for _, kind in found.dtypes] == ["string", "int", "string", "int", "float", "int"]
    rows = [(int(row[0][4:]), int(row[2][4:]), row["score"], row["rank"]) for row in found.collect()]
    assert all(row[1] == int(row[0][4:]) % 7 for row in found.collect())
    return sorted(rows, key=lambda pair: (pair[0], pair[3]))


def scores_of(left: Vectors, right: Vectors) -> Vectors:
    """float32 (left, right) of float64 sums, equal for equal vectors."""
    return np.einsum("ld,rd->lr", left.astype(np.float64), right.astype(np.float64)).astype(np.float32)


def brute(left: Vectors, right: Vectors, options: JoinOptions) -> list[Pair]:
    least = -np.inf if options.threshold is None else np.float32(options.threshold)
    scores_LR = scores_of(left, right)
    best_LK = np.argsort(-scores_LR, axis=1, kind="stable")[:, : options.k]
    return [
        (row, int(place), float(scores_LR[row, place]), nth)
        for row, places in enumerate(best_LK)
        for nth, place in enumerate(places, start=1)
        if scores_LR[row, place] >= least
    ]


def brute_self(vectors: Vectors, options: JoinOptions) -> list[Pair]:
    """Each pair that either row has among its k others, once, ranked among those of the row that comes first."""
    scores_NN = scores_of(vectors, vectors)
    once = set()
    for row in range(len(vectors)):
        others = [place for place in np.argsort(-scores_NN[row], kind="stable") if place != row][: options.k]
        once |= {(min(row, place), max(row, place)) for place in others}
    least = -np.inf if options.threshold is None else np.float32(options.threshold)
    kept = sorted((one, -scores_NN[one, other], other) for one, other in once if scores_NN[one, other] >= least)
    nth: dict[int, int] = {}
    pairs = []
    for one, score, other in kept:
        nth[one] = nth.get(one, 0) + 1
        pairs.append((one, int(other), float(-score), nth[one]))
    return pairs


def assert_same(found: list[Pair], expected: list[Pair]) -> None:
    assert [(row, place, nth) for row, place, _, nth in found] == [(row, place, nth) for row, place, _, nth in expected]
    np.testing.assert_array_equal([pair[2] for pair in found], [pair[2] for pair in expected])


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Grid], None]:
    """No side counts as small, and the grid is the one given."""

    def settle(grid: Grid) -> None:
        monkeypatch.setattr(knn, "SMALL_BYTES", -1)
        monkeypatch.setattr(knn, "plan_grid", lambda *_, **__: grid)

    return settle


@pytest.mark.parametrize(("num_left", "num_right"), [(6, 90), (90, 6)])
def test_a_small_side_meets_the_other_where_it_is_read(spark: SparkSession, num_left: int, num_right: int) -> None:
    left, right = unit_vectors(num_left, 1), unit_vectors(num_right, 2)
    right[3] = right[1]
    options = JoinOptions(5, None)

    found = join_sides(spark, side(spark, left), side(spark, right), DIM, options)

    assert "Exchange hashpartitioning(slot" not in found._jdf.queryExecution().toString()
    assert_same(pairs_of(found), brute(left, right, options))


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        (JoinOptions(4, None), BLOCKS),
        (JoinOptions(300, -0.1), Grid(left_is_resident=False, blocks=3, groups=1)),
        (JoinOptions(None, 0.3), Grid(left_is_resident=False, blocks=2, groups=3)),
    ],
    ids=str,
)
def test_blocks_give_what_all_pairs_at_once_would(
    spark: SparkSession, in_blocks: Callable[[Grid], None], options: JoinOptions, grid: Grid
) -> None:
    left, right = unit_vectors(50, 3), unit_vectors(120, 4)
    right[10::10] = right[0]
    in_blocks(grid)

    assert_same(
        pairs_of(join_sides(spark, side(spark, left), side(spark, right), DIM, options)), brute(left, right, options)
    )


@pytest.mark.parametrize("num_blocks", [0, 3, 4])
def test_pairs_alike_within_one_table_are_there_once(
    spark: SparkSession, in_blocks: Callable[[Grid], None], num_blocks: int
) -> None:
    vectors = unit_vectors(90, 5)
    vectors[40:44] = vectors[7]
    options = JoinOptions(None, 0.6)
    if num_blocks:
        in_blocks(Grid(left_is_resident=True, blocks=num_blocks, groups=num_blocks, is_half=True))

    found = pairs_of(join_self(spark, side(spark, vectors), DIM, options))

    assert {(7, 40), (7, 43), (40, 41), (42, 43)} <= {pair[:2] for pair in found}
    assert_same(found, brute_self(vectors, options))


@pytest.mark.parametrize("is_small", [True, False])
def test_neighbours_within_one_table_leave_the_row_itself_out(
    spark: SparkSession, in_blocks: Callable[[Grid], None], *, is_small: bool
) -> None:
    vectors = unit_vectors(60, 6)
    vectors[20:30] = vectors[20]
    options = JoinOptions(3, 0.2)
    if not is_small:
        in_blocks(BLOCKS)

    assert_same(pairs_of(join_self(spark, side(spark, vectors), DIM, options)), brute_self(vectors, options))


def test_a_side_without_vectors_gives_no_pairs(spark: SparkSession, in_blocks: Callable[[Grid], None]) -> None:
    some, none = side(spark, unit_vectors(5, 7)), side(spark, unit_vectors(0, 8))
    assert pairs_of(join_sides(spark, some, none, DIM, JoinOptions(2, None))) == []
    in_blocks(BLOCKS)
    assert pairs_of(join_sides(spark, none, some, DIM, JoinOptions(2, None))) == []


def in_cells(cells: Cells, right: Vectors, fresh: set[int], options: JoinOptions, left: Vectors) -> list[Pair]:
    """Each left row compared with its nearest cells and with what is fresh."""
    pairs = []
    cell_of = nearest_cells(right, cells.centroids_CD)
    for row in range(len(left)):
        near = np.argsort(-(cells.centroids_CD @ left[row]), kind="stable")[: cells.probes]
        seen = [place for place in range(len(right)) if cell_of[place] in near or place in fresh]
        found = brute(left[row : row + 1], right[seen], options)
        pairs += [(row, seen[place], score, nth) for _, place, score, nth in found]
    return pairs


@pytest.mark.parametrize("options", [JoinOptions(3, None), JoinOptions(None, 0.2), JoinOptions(200, -1)], ids=str)
@pytest.mark.parametrize("probes", [1, 2, 4])
def test_a_row_meets_the_cells_nearest_to_it_and_what_is_in_none(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, probes: int, options: JoinOptions
) -> None:
    """Cells of one block and of several, one without rows, rows that are fresh, and one in a cell that there is not."""
    monkeypatch.setattr(knn, "BLOCK_BYTES", 20 * (4 * DIM + knn.KEY_BYTES))
    left, right, centroids, fresh = unit_vectors(40, 9), unit_vectors(200, 10), unit_vectors(5, 11), {3, 30, 99}
    right = right[nearest_cells(right, centroids) != 4]
    cell_of = nearest_cells(right, centroids)
    cells = cells_with(centroids, cell_of, fresh, probes)
    indexed = placed(spark, side(spark, right), cell_of, fresh)

    found = pairs_of(join_sides(spark, side(spark, left), indexed, DIM, options, cells))

    assert_same(found, in_cells(cells, right, fresh, options, left))
    if probes == 4:
        assert (cells.blocks(4 * DIM + knn.KEY_BYTES).blocks_C > 1).any()


@pytest.mark.parametrize("options", [JoinOptions(3, None), JoinOptions(None, 0.4)], ids=str)
def test_within_one_table_all_cells_find_what_all_pairs_do(spark: SparkSession, options: JoinOptions) -> None:
    vectors, fresh = unit_vectors(80, 12), {0, 79}
    vectors[20:24] = vectors[20]
    centroids = unit_vectors(3, 13)
    cell_of = nearest_cells(vectors, centroids)
    indexed = placed(spark, side(spark, vectors), cell_of, fresh)

    every = pairs_of(join_self(spark, indexed, DIM, options, cells_with(centroids, cell_of, fresh, 3)))
    cells = cells_with(centroids, cell_of, fresh, 1)
    some = pairs_of(join_self(spark, indexed, DIM, options, cells))

    assert_same(every, brute_self(vectors, options))
    wanted = options if options.k is None else replace(options, k=options.k + 1)
    met = [pair for pair in in_cells(cells, vectors, fresh, wanted, vectors) if pair[0] != pair[1]]
    if options.k is not None:
        nearest = {row: [pair[1] for pair in met if pair[0] == row][: options.k] for row in range(len(vectors))}
        met = [pair for pair in met if pair[1] in nearest[pair[0]]]
    assert {pair[:2] for pair in some} == {(min(pair[:2]), max(pair[:2])) for pair in met}
    scores = scores_of(vectors, vectors)
    assert all(score == scores[one, other] for one, other, score, _ in some)


def cells_with(centroids: Vectors, cell_of: Vectors, fresh: set[int], probes: int) -> Cells:
    indexed = [cell for place, cell in enumerate(cell_of) if place not in fresh]
    return Cells(centroids, np.bincount(indexed, minlength=len(centroids)), len(fresh), probes)


def placed(spark: SparkSession, of: Side, cell_of: Vectors, fresh: set[int]) -> Side:
    """The side with its cells; the last fresh row in one that the index does not have."""
    cells = {place: FRESH if place in fresh else int(cell) for place, cell in enumerate(cell_of)}
    cells[max(fresh)] = 99
    rows = spark.createDataFrame([(f"row {place:04d}", cell) for place, cell in cells.items()], "name string, cell int")
    return replace(of, rows=of.rows.join(rows, F.col("`a.b`") == F.col("name"), "left").drop("name"))


def test_the_side_is_held_that_makes_less_travel() -> None:
    assert plan_grid(10 * BLOCK_BYTES, BLOCK_BYTES // 2, 2) == Grid(left_is_resident=False, blocks=1, groups=2)
    assert plan_grid(BLOCK_BYTES // 2, 10 * BLOCK_BYTES, 2) == Grid(left_is_resident=True, blocks=1, groups=2)
    assert plan_grid(5 * BLOCK_BYTES, 5 * BLOCK_BYTES, 2) == Grid(left_is_resident=True, blocks=6, groups=1)


@pytest.mark.parametrize("num_slots", [1, 2, 16, 1000])
@pytest.mark.parametrize("sizes", [(0, 0), (1, 10**12), (10**12, 10**9), (10**8, 10**8), (10**11, 3 * 10**11)])
def test_blocks_are_bounded_and_there_is_work_for_all_slots(sizes: tuple[int, int], num_slots: int) -> None:
    grid = plan_grid(*sizes, num_slots)
    held, streamed = sizes if grid.left_is_resident else sizes[::-1]
    assert grid.num_slots >= num_slots
    assert held / grid.blocks <= BLOCK_BYTES
    assert streamed / grid.groups <= STREAM_BLOCKS * BLOCK_BYTES
    half = plan_grid(sizes[0], sizes[0], num_slots, is_half=True)
    assert half.num_slots % num_slots == 0
    assert sizes[0] / half.blocks <= BLOCK_BYTES


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 7, 8])
def test_of_two_blocks_one_meets_the_other_and_all_do_as_much(spark: SparkSession, num_blocks: int) -> None:
    rows = spark.range(num_blocks).selectExpr("cast(id as int) AS block")
    met = [tuple(row) for row in rows.select("block", knn._blocks_met(num_blocks).alias("held")).collect()]
    assert sorted(tuple(sorted(pair)) for pair in met) == [
        (one, other) for one in range(num_blocks) for other in range(one, num_blocks)
    ]
    shares = [sum(held == block for _, held in met) for block in range(num_blocks)]
    assert max(shares) - min(shares) <= 1
