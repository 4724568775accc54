"""Hashes of rows, chunks and metadata by Spark's native functions, over an encoding that keeps what differs apart.

Every value is written with a type tag, strings with their length, NULL apart from empty, map entries in key order and
timestamps as microseconds since the epoch, so that neither the session's time zone nor the layout of the source shows.
"""

from collections.abc import Sequence

from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql import types as T

from shoal.conf.errors import SourceError

HASH_BYTES = 16


def hash128(parts: Sequence[Column]) -> Column:
    """First 128 bits (binary, 16 bytes) of sha256 over already encoded string columns, in their order."""
    return F.substring(F.unhex(F.sha2(F.concat(*parts), 256)), 1, HASH_BYTES)


def content_hash(text: Column) -> Column:
    """Identity of an encoder input: equal texts, NULL included, give equal hashes whatever row they stand in."""
    return hash128([encode_string(text)])


def columns_hash(fields: Sequence[T.StructField]) -> Column:
    """Hash over named columns with their types; no columns at all have a hash too."""
    parts = [F.lit(f"columns{len(fields)}")]
    for field in fields:
        parts += [encode_string(F.lit(field.name)), encode_value(F.col(quoted(field.name)), field.dataType, field.name)]
    return hash128(parts)


def encode_string(value: Column) -> Column:
    """`s<length>:<value>`, `n` for NULL; the length is in code points."""
    return F.coalesce(F.concat(F.lit("s"), F.char_length(value).cast("string"), F.lit(":"), value), F.lit("n"))


def encode_value(value: Column, data_type: T.DataType, name: str) -> Column:
    """The canonical string of one value of any type a metadata column may have; SourceError for one it may not."""
    if isinstance(data_type, T.StringType):
        return encode_string(value)
    if isinstance(data_type, T.ArrayType):
        items = F.transform(value, lambda item: encode_value(item, data_type.elementType, name))
        return _sized("a", value, F.array_join(items, ""))
    if isinstance(data_type, T.MapType):
        pairs = F.transform(
            F.map_entries(value),
            lambda entry: F.concat(
                encode_value(entry["key"], data_type.keyType, name),
                encode_value(entry["value"], data_type.valueType, name),
            ),
        )
        return _sized("m", value, F.array_join(F.array_sort(pairs), ""))
    if isinstance(data_type, T.StructType):
        fields = [
            F.concat(encode_string(F.lit(field.name)), encode_value(value.getField(field.name), field.dataType, name))
            for field in data_type.fields
        ]
        whole = F.concat(F.lit(f"r{len(fields)}:"), *fields)
        return F.when(value.isNull(), F.lit("n")).otherwise(whole)
    for types, tag, text in _SCALARS:
        if isinstance(data_type, types):
            return F.coalesce(F.concat(F.lit(tag), text(value), F.lit(";")), F.lit("n"))
    raise SourceError(
        f"source.columns: '{name}' has the type {data_type.simpleString()}, which has no stable form to compare; "
        f"leave it out or cast it to a string in a query source",
        code="SOURCE_MISMATCH",
    )


def quoted(name: str) -> str:
    """A column name as SQL reads it, dots and spaces included."""
    return "`" + name.replace("`", "``") + "`"


def _sized(tag: str, value: Column, body: Column) -> Column:
    return F.when(value.isNull(), F.lit("n")).otherwise(
        F.concat(F.lit(tag), F.size(value).cast("string"), F.lit(":"), body)
    )


def _as_string(value: Column) -> Column:
    return value.cast("string")


_SCALARS: tuple = (
    ((T.ByteType, T.ShortType, T.IntegerType, T.LongType), "i", _as_string),
    ((T.FloatType, T.DoubleType), "f", _as_string),
    ((T.DecimalType,), "d", _as_string),
    ((T.BooleanType,), "b", _as_string),
    ((T.BinaryType,), "x", F.hex),
    ((T.DateType,), "D", lambda value: F.unix_date(value).cast("string")),
    ((T.TimestampType,), "t", lambda value: F.unix_micros(value).cast("string")),
    ((T.TimestampNTZType,), "T", _as_string),
)
