"""Arrow schemas of what enters and leaves the executor stages, each beside the Spark DDL that says the same.

Spark's `mapInArrow` casts nothing: list offsets are int32, vector elements float32, and columns come in this order.
"""

from typing import Final

import pyarrow as pa

ENCODE_INPUT: Final = pa.schema([("content_hash", pa.binary()), ("text", pa.string())])
ENCODE_INPUT_DDL: Final = "content_hash binary, text string"

ENCODE_OUTPUT: Final = pa.schema(
    [
        ("content_hash", pa.binary()),
        ("embedding", pa.list_(pa.float32())),
        ("n_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("error", pa.string()),
        ("embedded_at", pa.timestamp("us", tz="UTC")),
    ]
)
ENCODE_OUTPUT_DDL: Final = (
    "content_hash binary, embedding array<float>, n_tokens int, truncated boolean, error string, embedded_at timestamp"
)

CHUNK_INPUT: Final = pa.schema([("row_hash", pa.binary()), ("text", pa.string())])
CHUNK_INPUT_DDL: Final = "row_hash binary, text string"

CHUNK_OUTPUT: Final = pa.schema(
    [
        ("row_hash", pa.binary()),
        ("chunk_index", pa.int32()),
        ("chunk_start", pa.int32()),
        ("chunk_end", pa.int32()),
        ("text", pa.string()),
    ]
)
CHUNK_OUTPUT_DDL: Final = "row_hash binary, chunk_index int, chunk_start int, chunk_end int, text string"

PROBE_OUTPUT: Final = pa.schema([("report", pa.string()), ("vectors", pa.binary())])
PROBE_OUTPUT_DDL: Final = "report string, vectors binary"
