"""The Spark adapter of the search for many vectors: `shoal_near` of SQL, the wanted pairs of two blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from shoal.udfs.knn_join import JoinOptions, Tile, join_tiles
from shoal.udfs.topk import vectors_of

PAIRS = pa.schema([("left", pa.int32()), ("right", pa.int32()), ("score", pa.float32())])


def near_udf() -> Callable[..., Any]:
    """An Arrow UDF (left array<array<float>>, right array<array<float>>, k int, threshold double), which gives
    array<struct<left: int, right: int, score: float>>.

    Each row holds two blocks of vectors; what it gives are the places of a pair in them, counted from 0, and its inner
    product: of every left vector the best k (ties to the lower place), and of these the ones that reach the threshold,
    where there is one.
    """
    from pyspark.sql.functions import arrow_udf
    from pyspark.sql.types import ArrayType, FloatType, IntegerType, StructField, StructType

    def shoal_near(left: pa.Array, right: pa.Array, k: pa.Array, threshold: pa.Array) -> pa.Array:
        found: list[pa.RecordBatch] = []
        offsets, num_pairs = [0], 0
        for one, other, most, least in zip(left, right, k.to_pylist(), threshold.to_pylist(), strict=True):
            batches = near(one.values, other.values, JoinOptions(most, least))
            found += batches
            num_pairs += sum(batch.num_rows for batch in batches)
            offsets.append(num_pairs)
        pairs = pa.Table.from_batches(found, schema=PAIRS).to_struct_array().combine_chunks()
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pairs)

    # Annotations are text here, and Spark wants types to tell the kind of UDF from.
    shoal_near.__annotations__ = dict.fromkeys(("left", "right", "k", "threshold", "return"), pa.Array)
    types = {"left": IntegerType(), "right": IntegerType(), "score": FloatType()}
    pair = StructType([StructField(name, kind) for name, kind in types.items()])
    return arrow_udf(ArrayType(pair))(shoal_near)  # type: ignore[call-overload, no-any-return]


def near(left: pa.ListArray, right: pa.ListArray, options: JoinOptions) -> list[pa.RecordBatch]:
    """Batches of PAIRS between two blocks of vectors, list<float>.

    ValueError for a NULL, a vector of another width than the first one of `left`, and what is not finite.
    """
    if not len(left) or not len(right):
        return []
    dim = len(left[0])
    one, other = (
        Tile(pa.table({"place": pa.array(range(len(block)), pa.int32())}), vectors_of(block, dim))
        for block in (left, right)
    )
    return list(join_tiles([one], [other], options, PAIRS, left_is_resident=True))
