import pyarrow as pa
import pytest

from shoal.udfs import schema

SPARK_NAMES = {
    pa.binary(): "binary",
    pa.string(): "string",
    pa.int32(): "int",
    pa.bool_(): "boolean",
    pa.list_(pa.float32()): "array<float>",
    pa.timestamp("us", tz="UTC"): "timestamp",
}


@pytest.mark.parametrize("name", ["ENCODE_INPUT", "ENCODE_OUTPUT", "CHUNK_INPUT", "CHUNK_OUTPUT", "PROBE_OUTPUT"])
def test_the_ddl_says_what_the_arrow_schema_says(name: str) -> None:
    fields = getattr(schema, name)
    assert getattr(schema, f"{name}_DDL") == ", ".join(f"{field.name} {SPARK_NAMES[field.type]}" for field in fields)
