"""Hashes on real rows, against a plain Python reading of the same encoding."""

import hashlib
from collections.abc import Sequence
from datetime import date, datetime
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import SourceError
from shoal.jobs.hashing import HASH_BYTES, columns_hash, content_hash, quoted

pytestmark = pytest.mark.spark

# Each tries to look like the encoding of something else: a length, a NULL, the end of one value and the start of
# the next.
NASTY = [None, "", "n", "a", "s1:a", "1:a", "an", "\N{ROCKET}"]


def hashes(spark: SparkSession, rows: Sequence[tuple[Any, ...]], ddl: str) -> list[bytes]:
    table = spark.createDataFrame(list(rows), ddl)
    return [bytes(row[0]) for row in table.select(columns_hash(table.schema.fields)).collect()]


def first128(encoding: str) -> bytes:
    return hashlib.sha256(encoding.encode()).digest()[:HASH_BYTES]


def encoding_of(value: Any) -> str:
    """The canonical encoding, written down a second time without Spark."""
    match value:
        case None:
            return "n"
        case bool():
            return f"b{str(value).lower()};"
        case int():
            return f"i{value};"
        case str():
            return f"s{len(value)}:{value}"
        case list():
            return f"a{len(value)}:" + "".join(map(encoding_of, value))
        case dict():
            pairs = (encoding_of(key) + encoding_of(item) for key, item in value.items())
            return f"m{len(value)}:" + "".join(sorted(pairs, key=str.encode))
    raise TypeError(type(value))


def test_no_two_rows_of_strings_share_a_hash_and_null_is_not_empty(spark: SparkSession) -> None:
    rows = list(product(NASTY, repeat=3))

    found = hashes(spark, rows, "a string, b string, c string")

    assert len(set(found)) == len(rows) == 512
    assert {len(value) for value in found} == {HASH_BYTES}


def test_lists_are_told_apart_by_their_nesting(spark: SparkSession) -> None:
    values = [
        None,
        [],
        [None],
        [[]],
        [[None]],
        [["a"], ["b"]],
        [["a", "b"]],
        [["a", "b"], []],
        [[], ["a", "b"]],
        [["ab"]],
    ]

    found = hashes(spark, [(value,) for value in values], "a array<array<string>>")

    assert len(set(found)) == len(values)


def test_structs_are_told_apart_by_null_fields_and_by_being_null(spark: SparkSession) -> None:
    values = [None, (None, None), ("a", None), (None, "a"), ("a", "a"), ("", None)]

    found = hashes(spark, [(value,) for value in values], "a struct<x: string, y: string>")

    assert len(set(found)) == len(values)


def test_the_order_of_map_entries_does_not_show_and_their_values_do(spark: SparkSession) -> None:
    table = spark.sql(
        "SELECT map('a', 1, 'b', 2) m UNION ALL SELECT map('b', 2, 'a', 1) UNION ALL SELECT map('a', 2, 'b', 1)"
    )

    one, other, swapped = (bytes(row[0]) for row in table.select(columns_hash(table.schema.fields)).collect())

    assert one == other
    assert one != swapped


def test_equal_values_of_different_types_do_not_meet(spark: SparkSession) -> None:
    found = [
        hashes(spark, [(value,)], f"a {kind}")[0] for value, kind in ((1, "int"), ("1", "string"), (True, "boolean"))
    ]
    found.append(hashes(spark, [(1.0,)], "a double")[0])
    found.append(hashes(spark, [(b"1",)], "a binary")[0])

    assert len(set(found)) == 5
    assert hashes(spark, [(1,)], "a int") == hashes(spark, [(1,)], "a bigint"), "a wider column is no change"


def test_the_name_of_a_column_counts(spark: SparkSession) -> None:
    assert hashes(spark, [("x",)], "a string") != hashes(spark, [("x",)], "b string")


def test_the_session_time_zone_does_not_show(spark: SparkSession) -> None:
    query = (
        "SELECT timestamp_micros(1700000000000001) at, date '2026-03-29' day, "
        "timestamp_ntz '2026-03-29 02:30:00' wall, array(timestamp_micros(7)) many"
    )
    before = spark.conf.get("spark.sql.session.timeZone")
    found = set()
    try:
        for zone in ("UTC", "Asia/Kolkata", "America/New_York", "Europe/Berlin"):
            spark.conf.set("spark.sql.session.timeZone", zone)
            table = spark.sql(query)
            found.add(bytes(table.select(columns_hash(table.schema.fields)).collect()[0][0]))
    finally:
        spark.conf.set("spark.sql.session.timeZone", before or "UTC")

    assert len(found) == 1


def test_hashes_are_what_they_were_in_the_first_release(spark: SparkSession) -> None:
    row = (
        "caf\N{LATIN SMALL LETTER E WITH ACUTE}", 7, True, 0.5, b"\x00\xff", date(2026, 1, 31),
        datetime(2026, 1, 31, 6), ["a", None], {"k": 1}, ("x",),
    )  # fmt: skip
    ddl = (
        "s string, i bigint, b boolean, f double, x binary, d date, w timestamp_ntz, a array<string>, "
        "m map<string, int>, r struct<y: string>"
    )
    (found,) = hashes(spark, [row], ddl)
    texts = spark.createDataFrame([("alpha",), (None,), ("",), ("\N{ROCKET}",)], "t string")
    contents = [bytes(value[0]) for value in texts.select(content_hash(F.col("t"))).collect()]

    # A change here makes every published row of every table look changed.
    assert found.hex() == "c1e1285b70b40d8abe4bbfb731e6a448"
    assert contents == [first128("s5:alpha"), first128("n"), first128("s0:"), first128("s1:\N{ROCKET}")]


VALUES = st.tuples(
    st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
    st.none() | st.lists(st.none() | st.integers(-(2**31), 2**31 - 1), max_size=3),
    st.none() | st.dictionaries(st.text("ab:1sn", max_size=3), st.none() | st.booleans(), max_size=3),
)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(VALUES, min_size=5, max_size=40))
def test_spark_encodes_any_row_as_the_plain_reading_does(spark: SparkSession, rows: list[tuple[Any, ...]]) -> None:
    found = hashes(spark, rows, "s string, a array<int>, m map<string, boolean>")

    for row, value in zip(rows, found, strict=True):
        named = "".join(encoding_of(name) + encoding_of(part) for name, part in zip("sam", row, strict=True))
        assert value == first128("columns3" + named)


def test_a_type_without_a_stable_form_is_refused_with_its_column(spark: SparkSession) -> None:
    table = spark.sql("SELECT INTERVAL '1' DAY AS took")

    with pytest.raises(SourceError, match=r"source\.columns: 'took' has the type interval.*cast it to a string"):
        columns_hash(table.schema.fields)


def test_a_quoted_name_is_read_back_whatever_is_in_it(spark: SparkSession) -> None:
    table = spark.createDataFrame([(1,)], "`a.b ``c` int")

    assert table.select(quoted("a.b `c")).collect()[0][0] == 1
