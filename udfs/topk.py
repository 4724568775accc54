"""Exact nearest neighbours by inner product: the best k of each Arrow batch for every query, for `mapInArrow`.

Each partition keeps only its own best k per query, so the driver merges num_partitions * Q * k rows:

    columns = pa.schema([("id", pa.string()), ("chunk_index", pa.int32()), ("text", pa.string())])
    found = table.mapInArrow(
        make_topk(queries_QD, k, ["id", "chunk_index"], columns),
        "query int, score float, id string, chunk_index int, text string",
    )
    best = found.orderBy("query", F.desc("score"), "id", "chunk_index")  # then the first k of each query

Ties: the same score goes to the row whose id columns come first (ascending, in the order given), so the answer does
not depend on how the table is cut into files.

Axes: Q queries, D vector elements, N rows of a batch, K neighbours.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

MAX_SCORES = 2**22
"""Scores held at a time (16 MB of float32): a batch is taken in blocks of so many rows that Q * rows stays below."""

MAX_OUTPUT_ROWS = 8_192

SPARE = 16
"""Rows scored again beyond k, because the matrix product that picks them rounds; only scores within its rounding of the
k-th can be missed, and only when there are more of them than this."""


def topk_schema(columns: pa.Schema) -> pa.Schema:
    """Arrow schema of what `make_topk` gives: query int32, score float32, then `columns` as they are."""
    return pa.schema([("query", pa.int32()), ("score", pa.float32()), *columns])


def top_k(scores_QN: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Columns of the best k scores of every row, int64 (Q, min(k, N)), best first; ties go to the lower column.

    NaN counts as the worst score. ValueError for k below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 neighbour.")
    num_rows = scores_QN.shape[1]
    clean_QN = np.where(np.isnan(scores_QN), -np.inf, scores_QN)
    kept = min(k, num_rows)
    if kept == num_rows:
        return np.argsort(-clean_QN, axis=1, kind="stable").astype(np.int64)
    # A partition alone picks among equal scores at will, so the k-th score is found first and ties cut by column.
    kth_Q1 = np.partition(clean_QN, num_rows - kept, axis=1)[:, num_rows - kept, None]
    above_QN = clean_QN > kth_Q1
    room_Q1 = kept - above_QN.sum(axis=1, keepdims=True)
    ties_QN = clean_QN == kth_Q1
    chosen_QN = above_QN | (ties_QN & (np.cumsum(ties_QN, axis=1) <= room_Q1))
    columns_QK = np.nonzero(chosen_QN)[1].reshape(len(scores_QN), kept)
    order_QK = np.argsort(-np.take_along_axis(clean_QN, columns_QK, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns_QK, order_QK, axis=1)


def make_topk(
    queries_QD: npt.NDArray[np.float32], k: int, id_columns: Sequence[str], columns: pa.Schema
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """A mapInArrow function from rows with `embedding` list<float> to `topk_schema(columns)`.

    `columns` are the input columns to carry along, by name and Arrow type; `id_columns`, which decide ties, are among
    them. Rows with a NULL embedding are skipped. Memory: the queries, MAX_SCORES scores, one input batch and Q * 2k
    rows. ValueError when k is below 1, the queries are not (Q, D), an id column is not in `columns`, or a row of the
    table has another width than the queries.
    """
    queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 neighbour.")
    if queries_QD.ndim != 2:
        raise ValueError(f"queries have {queries_QD.ndim} axes; give one row per query, shape (Q, D).")
    missing = [name for name in id_columns if name not in columns.names]
    if missing:
        raise ValueError(f"id columns {missing} are not among the columns carried along ({columns.names}); add them.")

    def topk_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        best = topk_schema(columns).empty_table()
        for batch in batches:
            found = [best, *_score_batch(queries_QD, k, batch, id_columns, columns)]
            if len(found) > 1:
                best = _best_of(pa.concat_tables(found), k, id_columns)
        yield from best.combine_chunks().to_batches(max_chunksize=MAX_OUTPUT_ROWS)

    return topk_batches


def _score_batch(
    queries_QD: npt.NDArray[np.float32],
    k: int,
    batch: pa.RecordBatch,
    id_columns: Sequence[str],
    columns: pa.Schema,
) -> Iterator[pa.Table]:
    """For each block of the batch the best k rows of every query, as tables of `topk_schema(columns)`."""
    rows = pa.Table.from_batches([batch]).filter(pc.is_valid(batch.column("embedding")))
    step = max(1, MAX_SCORES // max(1, len(queries_QD)))
    for start in range(0, rows.num_rows, step):
        block = rows.slice(start, step)
        vectors_ND = vectors_of(block.column("embedding").combine_chunks(), queries_QD.shape[1])
        if id_columns:  # in id order, so that the lower position is the row whose id comes first
            order_N = pc.sort_indices(block, [(name, "ascending") for name in id_columns])
            block, vectors_ND = block.select(columns.names).take(order_N), vectors_ND[order_N.to_numpy()]
        query_M, position_M, score_M = _best_of_block(queries_QD, vectors_ND, k)
        carried = block.select(columns.names).take(pa.array(position_M)).cast(columns)
        arrays = [pa.array(query_M), pa.array(score_M), *carried.columns]
        yield pa.Table.from_arrays(arrays, schema=topk_schema(columns))


def _best_of_block(
    queries_QD: npt.NDArray[np.float32], vectors_ND: npt.NDArray[np.float32], k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Query, row and score of the best min(k, N) rows of every query, one after another."""
    positions, scores = [], []
    for query_D, candidates_C in zip(queries_QD, top_k(queries_QD @ vectors_ND.T, k + SPARE), strict=True):
        in_order_C = np.sort(candidates_C)
        scores_C = exact_scores(query_D, vectors_ND[in_order_C])
        best_K = top_k(scores_C[None, :], k)[0]
        positions.append(in_order_C[best_K])
        scores.append(scores_C[best_K])
    query_M = np.repeat(np.arange(len(queries_QD), dtype=np.int32), [len(found) for found in positions])
    return query_M, np.concatenate(positions), np.concatenate(scores)


def exact_scores(query_D: npt.NDArray[np.float32], vectors_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Inner products float32 (N,), summed in float64: equal vectors score the same wherever they stand.

    A float32 matrix product does not promise that: its sums are ordered by a row's place in the block.
    """
    return (vectors_ND.astype(np.float64) @ query_D.astype(np.float64)).astype(np.float32)


def vectors_of(column: pa.ListArray, dim: int) -> npt.NDArray[np.float32]:
    """float32 (N, dim) of a list<float> column without NULLs; ValueError where a row has another width or a NULL."""
    flat = column.flatten()
    lengths = pc.list_value_length(column)
    if flat.null_count or not pc.all(pc.equal(lengths, dim)).as_py():
        found = "NULL elements" if flat.null_count else f"widths {sorted(set(lengths.unique().to_pylist()))[:5]}"
        raise ValueError(f"column embedding has {found}, the queries have {dim}; encode them with the table's encoder.")
    return flat.to_numpy(zero_copy_only=False).reshape(-1, dim).astype(np.float32, copy=False)


def _best_of(found: pa.Table, k: int, id_columns: Sequence[str]) -> pa.Table:
    """The first k rows of each query, by score and then by the id columns; sorted so."""
    keys = [("query", "ascending"), ("score", "descending"), *((name, "ascending") for name in id_columns)]
    found = found.take(pc.sort_indices(found, keys))
    query_M = found.column("query").to_numpy()
    starts_M = np.searchsorted(query_M, query_M, side="left")
    return found.filter(pa.array(np.arange(len(query_M)) - starts_M < k))
