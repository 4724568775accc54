"""Why a chunk has an error instead of a vector: the values of the `error` column."""

from typing import Final

NULL_TEXT: Final = "null_text"
BLANK_TEXT: Final = "blank_text"
INVALID_UTF8: Final = "invalid_utf8"

NON_FINITE: Final = "non_finite"
ZERO_VECTOR: Final = "zero_vector"
OUT_OF_MEMORY: Final = "out_of_memory"
TIME_LIMIT: Final = "time_limit"
ENCODER_ERROR: Final = "encoder_error"
WORKER_DIED: Final = "worker_died"

PERMANENT: Final[frozenset[str]] = frozenset({NULL_TEXT, BLANK_TEXT, INVALID_UTF8})
"""Reasons that lie in the content: encoding it again gives the same, so these errors count as done."""

TRANSIENT: Final[frozenset[str]] = frozenset(
    {NON_FINITE, ZERO_VECTOR, OUT_OF_MEMORY, TIME_LIMIT, ENCODER_ERROR, WORKER_DIED}
)
"""Reasons that another run, machine or release may not meet: these chunks are tried again."""
