"""Exact k-nearest-neighbour join by inner product: blocks of one side held, the other streamed past, for `mapInArrow`.

Rows travel in *tiles*: the keys and vectors of at most TILE_ROWS rows in one binary value. `make_pack` cuts rows into
tiles, `make_tile_join` takes the tiles of one block and then those that meet it, `make_row_join` holds the tiles of a
small side and meets the rows of the other as they are.

A float32 matrix product only picks candidates. Its error is at most about D * 2**-24 * |l| * |r|; whatever could be
among the wanted within that error is scored again in float64, so none is missed and equal vectors score the same
wherever they stand. Ties go to the right row whose key columns come first.

Memory of a worker: the held block, the vectors and keys of one Arrow batch, STRIP_ROWS * TILE_ROWS scores (8 MB), and
for each left row held the places of its best k, with the keys of the right rows that stand there.

Axes: L left rows of a strip, R right rows of a tile, D vector elements, P pairs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shoal.udfs.topk import vectors_of

TILE_ROWS: Final = 2048
TILE_BYTES: Final = 2**22
"""A tile has at most so many bytes of vectors, and so fewer rows where vectors are wide."""

STRIP_ROWS: Final = 1024
"""Left rows that are scored together: their scores with one tile stay near the processor."""

PACK_BYTES: Final = 2**25
"""Bytes of vectors that `make_pack` gathers before it cuts tiles from them."""

OUTPUT_ROWS: Final = 8192
PAIRS: Final = 4096
"""Pairs scored again at a time."""

SPARE_TIES: Final = 4
"""A strip keeps at most so many times k pairs for each row before it decides between equal scores by key."""

COMPACT_ROWS: Final = 2**18
"""Keys of right rows that are kept before those that no left row needs any longer are dropped."""

RESIDENT: Final = 0
STREAMED: Final = 1

TILE_DDL: Final = "block int, tile binary"
TILE: Final = pa.schema([("block", pa.int32()), ("tile", pa.binary())])

EMBEDDING: Final = "embedding"
SCORE: Final = "score"

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]
MapInArrow = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]
Place = Callable[[pa.Table], tuple[Places, Places]]
"""From rows to row numbers and the block that each goes to: a row may go to several, or to none."""


@dataclass(frozen=True)
class JoinOptions:
    """Which pairs are wanted: of each left row the best k (None: all), of these the ones that score `threshold`.

    ValueError when neither is given, k is below 1, or the threshold is no number.
    """

    k: int | None
    threshold: float | None

    def __post_init__(self) -> None:
        if self.k is None and self.threshold is None:
            raise ValueError("neither k nor threshold is given; all pairs of two tables are never wanted.")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k is {self.k}; ask for at least 1 neighbour.")
        if self.threshold is not None and not np.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}; give a number.")


@dataclass(frozen=True)
class Tile:
    """Rows in key order: their key columns, and their vectors float32 (N, D)."""

    keys: pa.Table
    vectors_ND: Floats

    @property
    def num_rows(self) -> int:
        return len(self.vectors_ND)

    def packed(self) -> bytes:
        """One Arrow IPC stream."""
        flat = pa.array(np.ascontiguousarray(self.vectors_ND).ravel())
        column = pa.FixedSizeListArray.from_arrays(flat, self.vectors_ND.shape[1])
        table = self.keys.append_column(EMBEDDING, column).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()


def unpack(payload: bytes) -> Tile:
    """The tile that `Tile.packed` wrote, its vectors not copied."""
    table = pa.ipc.open_stream(payload).read_all()
    column = table.column(EMBEDDING).combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=True)
    return Tile(table.drop_columns([EMBEDDING]), flat.reshape(len(column), column.type.list_size))


def tiles_of(rows: pa.Table, keys: Sequence[str], dim: int) -> Iterator[Tile]:
    """Tiles of rows with `keys` and `embedding` list<float>; ValueError for a vector of another width or not finite."""
    step = _rows_per_tile(dim)
    for start in range(0, rows.num_rows, step):
        part = rows.slice(start, step)
        vectors_ND = vectors_of(part.column(EMBEDDING).combine_chunks(), dim)
        yield _in_key_order(part.select(list(keys)), vectors_ND)


def by_block(rows: pa.Table) -> tuple[Places, Places]:
    """Each row to the one that its column `block` names."""
    return np.arange(rows.num_rows), rows.column("block").to_numpy()


def make_pack(keys: Sequence[str], dim: int, place: Place = by_block) -> MapInArrow:
    """A mapInArrow function from rows with `keys`, `embedding` and what `place` reads to TILE, each of one block."""
    names = list(keys)

    def pack(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        held: list[pa.RecordBatch] = []
        for batch in batches:
            held += [batch] if batch.num_rows else []
            if sum(each.num_rows for each in held) * dim * 4 >= PACK_BYTES:
                yield from _pack_blocks(held, names, dim, place)
                held = []
        if held:
            yield from _pack_blocks(held, names, dim, place)

    return pack


def make_tile_join(options: JoinOptions, pairs: pa.Schema, *, left_is_resident: bool) -> MapInArrow:
    """A mapInArrow function from (slot int, side int, tile binary), sorted by slot and side, to `pairs`.

    The tiles of a slot with side RESIDENT are one block and are held; those with side STREAMED pass it. `pairs`: the
    left key columns, as many right ones as there are, and a float32 score, by any names in this order.
    """

    def join(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _, of_slot in groupby(_tile_rows(batches), key=itemgetter(0)):
            resident: list[Tile] = []
            for side, of_side in groupby(of_slot, key=itemgetter(1)):
                tiles = _gathered(unpack(row[2].as_py()) for row in of_side)
                if side == RESIDENT:
                    resident = list(tiles)
                else:
                    yield from join_tiles(resident, tiles, options, pairs, left_is_resident=left_is_resident)

    return join


def make_row_join(
    resident: Sequence[bytes],
    keys: Sequence[str],
    dim: int,
    options: JoinOptions,
    pairs: pa.Schema,
    *,
    left_is_resident: bool,
) -> MapInArrow:
    """A mapInArrow function from rows with `keys` and `embedding` to `pairs`; `resident`: the packed tiles held."""
    names = list(keys)

    def join(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        held = [unpack(payload) for payload in resident]
        rows = (tile for batch in batches for tile in tiles_of(pa.Table.from_batches([batch]), names, dim))
        yield from join_tiles(held, _gathered(rows), options, pairs, left_is_resident=left_is_resident)

    return join


def join_tiles(
    resident: Sequence[Tile],
    streamed: Iterable[Tile],
    options: JoinOptions,
    pairs: pa.Schema,
    *,
    left_is_resident: bool,
) -> Iterator[pa.RecordBatch]:
    """Wanted pairs of tiles held and tiles that come by: of each left row the best k among the right rows seen here.

    Where the left side is the streamed one, and all of the right side is held, that is the whole answer.
    """
    if left_is_resident:
        block = _LeftBlock(resident, options, pairs)
        for right in streamed:
            yield from block.meet(right)
        yield from block.found()
        return
    for left in streamed:
        block = _LeftBlock([left], options, pairs)
        for right in resident:
            yield from block.meet(right)
        yield from block.found()


def pair_scores(left_LD: Floats, right_RD: Floats, rows_P: Places, places_P: Places) -> Floats:
    """Inner products of the pairs, summed in float64 in one and the same order: float32 (P,)."""
    scores_P = np.empty(len(rows_P), dtype=np.float32)
    for start in range(0, len(rows_P), PAIRS):
        part = slice(start, start + PAIRS)
        left_PD, right_PD = left_LD[rows_P[part]].astype(np.float64), right_RD[places_P[part]].astype(np.float64)
        scores_P[part] = np.einsum("pd,pd->p", left_PD, right_PD)
    return scores_P


class _LeftBlock:
    """Left rows with what has been found for them; the places of right rows count on from tile to tile."""

    def __init__(self, tiles: Sequence[Tile], options: JoinOptions, pairs: pa.Schema) -> None:
        self._options = options
        self._pairs = pairs
        self._left_keys = [tile.keys for tile in tiles]
        self._right_keys: list[pa.Table] = []
        self._num_right = 0
        self._compact_above = COMPACT_ROWS
        self._strips: list[_Strip] = []
        start = 0
        for tile in tiles:
            for row in range(0, tile.num_rows, STRIP_ROWS):
                self._strips.append(_Strip(start + row, tile.vectors_ND[row : row + STRIP_ROWS], options))
            start += tile.num_rows

    def meet(self, right: Tile) -> Iterator[pa.RecordBatch]:
        """Scores all left rows with the tile; without k, what reaches the threshold is given at once."""
        if not right.num_rows:
            return
        longest = float(_norms(right.vectors_ND).max())
        k = self._options.k
        if k is None:
            for strip in self._strips:
                found = strip.score(right.vectors_ND, longest)
                yield from self._batches(strip, found, right.keys)
            return
        self._right_keys.append(right.keys)
        for strip in self._strips:
            strip.keep(strip.score(right.vectors_ND, longest).moved(self._num_right))
            if strip.num_kept > SPARE_TIES * k * strip.num_rows:
                strip.settle(self._key_ranks(strip.places()))
        self._num_right += right.num_rows
        if self._num_right > self._compact_above:
            self._compact()

    def found(self) -> Iterator[pa.RecordBatch]:
        """With k: the best of every left row, at most k."""
        if not self._right_keys:
            return
        keys = pa.concat_tables(self._right_keys).combine_chunks()
        for strip in self._strips:
            strip.settle(self._key_ranks(strip.places()))
            yield from self._batches(strip, strip.best, keys)

    def _batches(self, strip: "_Strip", found: "_Found", right_keys: pa.Table) -> Iterator[pa.RecordBatch]:
        left_keys = pa.concat_tables(self._left_keys)
        for start in range(0, len(found.rows_P), OUTPUT_ROWS):
            part = found.part(slice(start, start + OUTPUT_ROWS))
            left = left_keys.take(pa.array(part.rows_P + strip.start))
            right = right_keys.take(pa.array(part.places_P))
            arrays = [*left.columns, *right.columns, pa.chunked_array([pa.array(part.scores_P)])]
            cast = [array.cast(field.type) for array, field in zip(arrays, self._pairs, strict=True)]
            yield from pa.Table.from_arrays(cast, schema=self._pairs).combine_chunks().to_batches()

    def _key_ranks(self, places_P: Places) -> Places:
        """Ranks of right rows in key order, one for each place given."""
        used, inverse_P = np.unique(places_P, return_inverse=True)
        keys = pa.concat_tables(self._right_keys).take(pa.array(used))
        order = pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names]).to_numpy()
        ranks = np.empty(len(used), dtype=np.int64)
        ranks[order] = np.arange(len(used))
        return ranks[inverse_P]

    def _compact(self) -> None:
        """Drops the keys of right rows that no left row has among its best."""
        for strip in self._strips:
            strip.merge()
        used = np.unique(np.concatenate([strip.places() for strip in self._strips] or [np.empty(0, np.int64)]))
        self._right_keys = [pa.concat_tables(self._right_keys).take(pa.array(used)).combine_chunks()]
        for strip in self._strips:
            strip.best = replace(strip.best, places_P=np.searchsorted(used, strip.best.places_P))
        self._num_right = len(used)
        self._compact_above = max(COMPACT_ROWS, 2 * len(used))


@dataclass(frozen=True)
class _Found:
    """Pairs: the row within the strip, the place of the right row, the score."""

    rows_P: Places
    places_P: Places
    scores_P: Floats

    def part(self, which: slice | npt.NDArray[Any]) -> "_Found":
        return _Found(self.rows_P[which], self.places_P[which], self.scores_P[which])

    def moved(self, by: int) -> "_Found":
        return replace(self, places_P=self.places_P + by)


class _Strip:
    """Some left rows, what is known of the score that a pair of each needs, and the best pairs so far."""

    def __init__(self, start: int, vectors_LD: Floats, options: JoinOptions) -> None:
        self.start = start
        self.num_rows = len(vectors_LD)
        self.best = _Found(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        self._vectors_LD = np.ascontiguousarray(vectors_LD)
        self._norms_L = _norms(vectors_LD)
        self._k = options.k
        threshold = -np.inf if options.threshold is None else float(np.float32(options.threshold))
        self._needed_L = np.full(self.num_rows, threshold)
        self._is_open_L = np.full(self.num_rows, options.k is not None)
        self._pending: list[_Found] = []

    @property
    def num_kept(self) -> int:
        return len(self.best.rows_P) + sum(len(found.rows_P) for found in self._pending)

    def places(self) -> Places:
        """Places of the right rows of all pairs kept; merges first."""
        self.merge()
        return self.best.places_P

    def score(self, right_RD: Floats, longest: float) -> _Found:
        """Pairs of the tile that can still be wanted, at most k for each row; `longest`: the largest norm in it.

        Right rows are in key order, so that among equal scores the first stand first.
        """
        scores_LR = self._vectors_LD @ right_RD.T
        dim, num_right = self._vectors_LD.shape[1], len(right_RD)
        slack_L = (dim + 8) * (2.0**-24 * longest * self._norms_L + np.finfo(np.float32).tiny)
        if self._k is not None and num_right >= self._k and self._is_open_L.any():
            open_L = np.flatnonzero(self._is_open_L)
            nth = num_right - self._k
            kth = np.partition(scores_LR[open_L], nth, axis=1)[:, nth]
            self._needed_L[open_L] = np.maximum(self._needed_L[open_L], kth - slack_L[open_L])
            self._is_open_L[:] = False
        limit_L = np.nextafter((self._needed_L - slack_L).astype(np.float32), np.float32(-np.inf))
        hit_L = np.flatnonzero(scores_LR.max(axis=1) >= limit_L)
        rows_P, places_P = np.nonzero(scores_LR[hit_L] >= limit_L[hit_L, None])
        rows_P = hit_L[rows_P]
        scores_P = pair_scores(self._vectors_LD, right_RD, rows_P, places_P)
        found = _Found(rows_P, places_P, scores_P).part(scores_P >= self._needed_L[rows_P])
        return found if self._k is None else _best(found, self._k)

    def keep(self, found: _Found) -> None:
        """Adds pairs; they are merged when there are as many as the best themselves may be."""
        self._pending.append(found)
        if sum(len(each.rows_P) for each in self._pending) >= self.num_rows * (self._k or 1):
            self.merge()

    def merge(self) -> None:
        """Keeps of each row the best k, and whatever scores as the k-th does: keys decide later."""
        if not self._pending or self._k is None:
            return
        parts = [self.best, *self._pending]
        self._pending = []
        found = _Found(
            np.concatenate([part.rows_P for part in parts]),
            np.concatenate([part.places_P for part in parts]),
            np.concatenate([part.scores_P for part in parts]),
        )
        found = found.part(np.lexsort((-found.scores_P, found.rows_P)))
        nth_P = _nth_of_row(found.rows_P)
        last = found.part(nth_P == self._k - 1)
        kth_L = np.full(self.num_rows, -np.inf)
        kth_L[last.rows_P] = last.scores_P
        self._needed_L = np.maximum(self._needed_L, kth_L)
        self._is_open_L &= np.isneginf(kth_L)
        self.best = found.part(found.scores_P >= self._needed_L[found.rows_P])

    def settle(self, ranks_P: Places) -> None:
        """Cuts every row to k; `ranks_P`: the order among equal scores, for what `places` gave."""
        if self._k is not None:
            found = self.best.part(np.lexsort((ranks_P, -self.best.scores_P, self.best.rows_P)))
            self.best = found.part(_nth_of_row(found.rows_P) < self._k)


def _best(found: _Found, k: int) -> _Found:
    """The best k of each row, in its order; among equal scores the first."""
    found = found.part(np.lexsort((-found.scores_P, found.rows_P)))
    return found.part(_nth_of_row(found.rows_P) < k)


def _nth_of_row(rows_P: Places) -> Places:
    """Position of each pair among those of its row; rows stand together."""
    return np.arange(len(rows_P)) - np.searchsorted(rows_P, rows_P, side="left")


def _norms(vectors_ND: Floats) -> Doubles:
    """Lengths, float64 (N,); ValueError where one is not finite."""
    norms_N: Doubles = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))
    if not np.isfinite(norms_N).all():
        raise ValueError("column embedding has elements that are NaN or infinite; `shoal audit` shows the rows.")
    return norms_N


def _rows_per_tile(dim: int) -> int:
    return max(1, min(TILE_ROWS, TILE_BYTES // (4 * dim)))


def _in_key_order(keys: pa.Table, vectors_ND: Floats) -> Tile:
    order_N = pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names]).to_numpy()
    return Tile(keys.take(pa.array(order_N)).combine_chunks(), vectors_ND[order_N])


def _pack_blocks(held: list[pa.RecordBatch], keys: list[str], dim: int, place: Place) -> Iterator[pa.RecordBatch]:
    rows = pa.Table.from_batches(held)
    rows_P, blocks_P = place(rows)
    order_P = np.argsort(blocks_P, kind="stable")
    blocks, starts = np.unique(blocks_P[order_P], return_index=True)
    for block, rows_of in zip(blocks, np.split(rows_P[order_P], starts[1:]), strict=False):
        for tile in tiles_of(rows.take(pa.array(rows_of)), keys, dim):
            yield pa.RecordBatch.from_arrays([pa.array([block], pa.int32()), pa.array([tile.packed()])], schema=TILE)


def _tile_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, int, pa.Scalar]]:
    for batch in batches:
        yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), batch.column(2), strict=True)


def _gathered(tiles: Iterable[Tile]) -> Iterator[Tile]:
    """Neighbouring tiles in one, as large as a tile may be: small ones are not worth a matrix product."""
    held: list[Tile] = []
    for tile in tiles:
        num_rows = tile.num_rows + sum(each.num_rows for each in held)
        if held and num_rows > _rows_per_tile(tile.vectors_ND.shape[1]):
            yield _together(held)
            held = []
        held.append(tile)
    if held:
        yield _together(held)


def _together(tiles: list[Tile]) -> Tile:
    if len(tiles) == 1:
        return tiles[0]
    return _in_key_order(
        pa.concat_tables([tile.keys for tile in tiles]), np.concatenate([tile.vectors_ND for tile in tiles])
    )
