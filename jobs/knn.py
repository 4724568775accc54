"""Exact neighbours of every row of one DataFrame among those of another, in blocks; what `shoal join` is made of.

One side is cut into blocks of at most about BLOCK_BYTES of vectors and keys, which tasks hold; the other is cut into
groups and streams past. There is a task for each block and group, so a held row travels `groups` times and a streamed
one `blocks` times; the side is held that makes this the smaller volume, about |left| * |right| / BLOCK_BYTES plus one
or a few times the held side. Each task sends at most k pairs for each of its left rows on to the window that merges
them. A join of a table with itself by threshold alone moves and scores only half: each pair of blocks meets once.

With the cells of an index the right side is cut by them instead, cells larger than a block into several, and a left row
travels to those that it looks in: some thousandth parts of all pairs are scored, and some neighbours may be missed.

A side of at most SMALL_BYTES is not cut: the driver takes it, packs it, and ships it with the function, and the other
side is read in place. Nothing else is ever collected, and nothing else is broadcast. Blocks are chosen by a hash of the
keys, so a block may be some square roots of its rows larger than planned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema

from shoal.conf.errors import ConfigError
from shoal.jobs.cells import CELL, damaged, read_build
from shoal.jobs.encode_stage import in_slots
from shoal.jobs.hashing import quoted
from shoal.jobs.published import Published
from shoal.jobs.session import slots
from shoal.udfs.cell_blocks import SPREAD, CellBlocks
from shoal.udfs.knn_join import (
    RESIDENT,
    STREAMED,
    TILE_DDL,
    JoinOptions,
    Place,
    by_block,
    make_pack,
    make_row_join,
    make_tile_join,
    tiles_of,
)

BLOCK_BYTES = 2**26
SMALL_BYTES = 2**24
STREAM_BLOCKS = 16
"""A task streams about so many times what it holds at most, so that its shuffle partition fits on a disk."""

KEY_BYTES = 64
"""What the keys of a row are taken to need; only sizes are estimated with it."""

SMALL_WORK = 10**10
"""Products of two elements, about a second of one core, that are not worth moving rows for more even shares."""

LEFT, RIGHT = "left_", "right_"
SCORE, RANK = "score", "rank"


@dataclass(frozen=True)
class Side:
    """Rows with `keys`, which tell them apart, and `embedding` array<float>; those where it is NULL are left out."""

    rows: DataFrame
    keys: tuple[str, ...]
    num_vectors: int

    def num_bytes(self, dim: int) -> int:
        return self.num_vectors * _row_bytes(dim)


@dataclass(frozen=True)
class Cells:
    """The index of the right side, whose rows have the column `cell`: left rows are compared with `probes` cells each.

    centroids_CD: float32, C at least 1. rows_C: int64 (C,), vectors of each cell; num_fresh: those in none of them,
    which all left rows are compared with.
    """

    centroids_CD: npt.NDArray[np.float32]
    rows_C: npt.NDArray[np.int64]
    num_fresh: int
    probes: int

    def blocks(self, row_bytes: int) -> CellBlocks:
        """As few as hold BLOCK_BYTES at most."""
        blocks_C = np.maximum(1, -(-self.rows_C * row_bytes // BLOCK_BYTES))
        return CellBlocks(self.centroids_CD, self.probes, blocks_C)


@dataclass(frozen=True)
class Grid:
    """Into how many parts the sides are cut: `blocks` of the held one, `groups` of the streamed one.

    is_half: both are the same rows, cut alike, and each pair of blocks meets in one task only.
    """

    left_is_resident: bool
    blocks: int
    groups: int
    is_half: bool = False

    @property
    def num_slots(self) -> int:
        return self.blocks if self.is_half else self.blocks * self.groups


def cells_of(spark: SparkSession, published: Published, rows: DataFrame, probes: int) -> Cells:
    """The index of a table whose `rows` are to be the right side; `probes`: at least 1.

    ConfigError for a table without an index; RefusedError where its centroids are gone.
    """
    made = published.index
    if made is None:
        raise ConfigError(
            f"--probes {probes}: table {published.ref} has no index to look in; `shoal index {published.ref}` builds "
            "one, and without --probes the join is exact"
        )
    centroids_CD = read_build(spark, published.ref, made.build)
    if centroids_CD is None or len(centroids_CD) != made.cells:
        raise damaged(published.ref, made)
    rows_C, num_fresh = np.zeros(made.cells, dtype=np.int64), 0
    for cell, num_vectors in rows.where("error IS NULL").groupBy(CELL).count().collect():
        if cell is not None and 0 <= cell < made.cells:
            rows_C[cell] = num_vectors
        else:
            num_fresh += num_vectors
    return Cells(centroids_CD, rows_C, num_fresh, min(probes, made.cells))


def plan_grid(left_bytes: int, right_bytes: int, num_slots: int, pair_bytes: int = 0, *, is_half: bool = False) -> Grid:
    """The grid that moves the fewest bytes with blocks of BLOCK_BYTES, and work for `num_slots` tasks at a time.

    pair_bytes: of the pairs that a task finds for all left rows.
    """
    if is_half:
        return Grid(
            left_is_resident=True, blocks=(blocks := _blocks(left_bytes, num_slots)), groups=blocks, is_half=True
        )
    grids = []
    for left_is_resident in (True, False):
        held, streamed = (left_bytes, right_bytes) if left_is_resident else (right_bytes, left_bytes)
        blocks = max(1, -(-held // BLOCK_BYTES))
        groups = max(1, -(-streamed // (STREAM_BLOCKS * BLOCK_BYTES)), -(-num_slots // blocks))
        if blocks > num_slots:
            blocks = _blocks(held, num_slots)
        moved = groups * held + blocks * streamed + (groups if left_is_resident else blocks) * pair_bytes
        grids.append((moved, Grid(left_is_resident, blocks, groups)))
    return min(grids, key=lambda each: each[0])[1]


def join_sides(
    spark: SparkSession, left: Side, right: Side, dim: int, options: JoinOptions, cells: Cells | None = None
) -> DataFrame:
    """The wanted pairs: left keys as `left_<key>`, right ones as `right_<key>`, score float, rank int from 1.

    rank: the place of the right row among those of its left row, by score and then by its keys.
    """
    if cells:
        found = _pairs_in_cells(spark, left, right, dim, options, cells)
    else:
        found = _pairs(spark, left, right, dim, options)
    ranked = _ranked(found, _short("l", left), _short("r", right))
    return _named(ranked if options.k is None else ranked.where(F.col(RANK) <= options.k), left, right)


def join_self(spark: SparkSession, side: Side, dim: int, options: JoinOptions, cells: Cells | None = None) -> DataFrame:
    """As `join_sides`, each unordered pair once, the row whose keys come first on the left, and no row with itself.

    With k a pair is there when either row has the other among its k nearest; with cells when either finds the other.
    """
    left, right = _short("l", side), _short("r", side)
    # A row may be its own nearest neighbour: with one more wanted, k others are left whether it is or not.
    wanted = options if options.k is None else replace(options, k=options.k + 1)
    if cells:
        found = _pairs_in_cells(spark, side, side, dim, wanted, cells)
    else:
        found = _pairs(spark, side, side, dim, wanted, is_half=options.k is None)
    found = found.where(~_as_one(left).eqNullSafe(_as_one(right)))
    if options.k is not None:
        found = _ranked(found, left, right).where(F.col(RANK) <= options.k)
    in_order = _as_one(left) < _as_one(right)
    first = [
        F.when(in_order, F.col(one)).otherwise(F.col(other)).alias(one) for one, other in zip(left, right, strict=True)
    ]
    second = [
        F.when(in_order, F.col(other)).otherwise(F.col(one)).alias(other)
        for one, other in zip(left, right, strict=True)
    ]
    once = found.select(*first, *second, SCORE).groupBy(*left, *right).agg(F.max(SCORE).alias(SCORE))
    return _named(_ranked(once, left, right), side, side)


def _pairs(
    spark: SparkSession, left: Side, right: Side, dim: int, options: JoinOptions, *, is_half: bool = False
) -> DataFrame:
    """Left keys as l0, l1, .., right ones as r0, r1, .., score: all that are wanted, and with k some more."""
    schema = _pair_schema(left, right)
    left_is_smaller = left.num_bytes(dim) <= right.num_bytes(dim)
    small, large = (left, right) if left_is_smaller else (right, left)
    if small.num_bytes(dim) <= SMALL_BYTES and _can_stay(spark, small, large, dim):
        names = _short("k", small)
        resident = [tile.packed() for tile in tiles_of(_located(small).toArrow(), names, dim)]
        pairs = pa.schema(to_arrow_schema(schema))
        join = make_row_join(resident, _short("k", large), dim, options, pairs, left_is_resident=left_is_smaller)
        return _located(large).mapInArrow(join, schema)
    pair_bytes = left.num_vectors * min(options.k or 1, right.num_vectors) * 2 * KEY_BYTES
    grid = plan_grid(left.num_bytes(dim), right.num_bytes(dim), slots(spark), pair_bytes, is_half=is_half)
    held, streamed = (left, right) if grid.left_is_resident else (right, left)
    of_held, of_streamed = _tiles(held, dim, grid.blocks), _tiles(streamed, dim, grid.groups)
    if grid.is_half:
        of_held = of_held.select(F.col("block").alias("slot"), F.lit(RESIDENT).alias("side"), "tile")
        of_streamed = of_streamed.select(_blocks_met(grid.blocks).alias("slot"), F.lit(STREAMED).alias("side"), "tile")
    else:
        of_held = of_held.select("block", "tile", F.explode(_numbers(grid.groups)).alias("group"))
        of_streamed = of_streamed.select(
            F.explode(_numbers(grid.blocks)).alias("block"), "tile", F.col("block").alias("group")
        )
        slot = (F.col("block") * grid.groups + F.col("group")).alias("slot")
        of_held = of_held.select(slot, F.lit(RESIDENT).alias("side"), "tile")
        of_streamed = of_streamed.select(slot, F.lit(STREAMED).alias("side"), "tile")
    return _met(of_held.unionAll(of_streamed), grid.num_slots, schema, options, left_is_resident=grid.left_is_resident)


def _pairs_in_cells(
    spark: SparkSession, left: Side, right: Side, dim: int, options: JoinOptions, cells: Cells
) -> DataFrame:
    """As `_pairs`; a block of the right side is held, and those left rows stream past that look in its cell.

    Rows that are in none of the cells meet all left rows as they would without an index.
    """
    blocks = cells.blocks(_row_bytes(dim))
    has_cell = F.coalesce(F.col(CELL).between(0, len(cells.centroids_CD) - 1), F.lit(False))
    indexed = replace(right, rows=right.rows.where(has_cell))
    held = _packed(_located(indexed, CELL).withColumn(SPREAD, _spread(right)), right, dim, blocks.of_right)
    streamed = _packed(_located(left), left, dim, blocks.of_left)
    of_held = held.select(F.col("block").alias("slot"), F.lit(RESIDENT).alias("side"), "tile")
    of_streamed = streamed.select(F.col("block").alias("slot"), F.lit(STREAMED).alias("side"), "tile")
    schema = _pair_schema(left, right)
    found = _met(of_held.unionAll(of_streamed), blocks.num_blocks, schema, options, left_is_resident=False)
    if not cells.num_fresh:
        return found
    fresh = replace(right, rows=right.rows.where(~has_cell), num_vectors=cells.num_fresh)
    return found.unionAll(_pairs(spark, left, fresh, dim, options))


def _met(
    tiles: DataFrame, num_slots: int, schema: T.StructType, options: JoinOptions, *, left_is_resident: bool
) -> DataFrame:
    """The wanted pairs of the tiles that meet in each slot."""
    join = make_tile_join(options, pa.schema(to_arrow_schema(schema)), left_is_resident=left_is_resident)
    return in_slots(tiles, num_slots).sortWithinPartitions("slot", "side").mapInArrow(join, schema)


def _can_stay(spark: SparkSession, small: Side, large: Side, dim: int) -> bool:
    """Whether the large side is worked on where it is read: few products, or parts enough for all slots."""
    if small.num_vectors * large.num_vectors * dim <= SMALL_WORK:
        return True
    return large.rows.rdd.getNumPartitions() >= 2 * slots(spark)


def _tiles(side: Side, dim: int, num_blocks: int) -> DataFrame:
    block = F.pmod(_spread(side), F.lit(num_blocks)).cast("int")
    return _packed(_located(side).withColumn("block", block), side, dim, by_block)


def _packed(located: DataFrame, side: Side, dim: int, place: Place) -> DataFrame:
    return located.mapInArrow(make_pack(_short("k", side), dim, place), TILE_DDL)


def _spread(side: Side) -> Column:
    """A number for each located row that cuts them into even parts."""
    return F.xxhash64(*_short("k", side))


def _blocks_met(num_blocks: int) -> Column:
    """One row for each block that this tile's block meets: of two blocks exactly one meets the other, evenly shared."""

    def meets(held: Column) -> Column:
        ahead = F.pmod(F.col("block") - held, F.lit(num_blocks)) * 2
        return (ahead < num_blocks) | ((ahead == num_blocks) & (held < F.col("block")))

    return F.explode(F.filter(_numbers(num_blocks), meets))


def _numbers(count: int) -> Column:
    return F.sequence(F.lit(0), F.lit(count - 1))


def _blocks(num_bytes: int, num_slots: int) -> int:
    """Blocks of BLOCK_BYTES at most, as many as keep all slots at work to the end."""
    return num_slots * max(1, -(-num_bytes // (BLOCK_BYTES * num_slots)))


def _ranked(pairs: DataFrame, left: Sequence[str], right: Sequence[str]) -> DataFrame:
    nth = F.row_number().over(Window.partitionBy(*left).orderBy(F.desc(SCORE), *right))
    return pairs.withColumn(RANK, nth)


def _named(pairs: DataFrame, left: Side, right: Side) -> DataFrame:
    of_left = [F.col(short).alias(LEFT + key) for short, key in zip(_short("l", left), left.keys, strict=True)]
    of_right = [F.col(short).alias(RIGHT + key) for short, key in zip(_short("r", right), right.keys, strict=True)]
    return pairs.select(*of_left, *of_right, SCORE, RANK)


def _located(side: Side, *others: str) -> DataFrame:
    """Keys, vector and `others` of the rows with one; the keys named so that no dot or clash of names is in the way."""
    keys = [F.col(quoted(key)).alias(short) for key, short in zip(side.keys, _short("k", side), strict=True)]
    return side.rows.where(F.col("embedding").isNotNull()).select(*keys, "embedding", *others)


def _row_bytes(dim: int) -> int:
    return 4 * dim + KEY_BYTES


def _short(letter: str, side: Side) -> list[str]:
    return [f"{letter}{index}" for index in range(len(side.keys))]


def _pair_schema(left: Side, right: Side) -> T.StructType:
    return T.StructType([*_fields("l", left), *_fields("r", right), T.StructField(SCORE, T.FloatType())])


def _fields(letter: str, side: Side) -> list[T.StructField]:
    types = [side.rows.schema[key].dataType for key in side.keys]
    return [T.StructField(short, kind) for short, kind in zip(_short(letter, side), types, strict=True)]


def _as_one(names: Sequence[str]) -> Column:
    """The columns as one value that compares column by column."""
    return F.struct(*[F.col(name).alias(f"k{index}") for index, name in enumerate(names)])
