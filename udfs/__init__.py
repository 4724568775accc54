"""The executor side: everything that happens to a batch. Importing it loads no model library."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.udfs.series_udf import embed_udf

__all__ = ["embed_udf"]


def __getattr__(name: str) -> Any:
    """`embed_udf`, imported when asked for: it needs pyspark, and the rest of the package does not."""
    if name == "embed_udf":
        from shoal.udfs.series_udf import embed_udf

        return embed_udf
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
