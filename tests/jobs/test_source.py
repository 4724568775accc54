"""Every kind of source, read as rows of keys, text and metadata; what is wrong with one is said with the setting."""

import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import Row, SparkSession

from shoal.conf.errors import ConfigError, SourceError
from shoal.conf.loader import load_run
from shoal.conf.run import ChunkConfig
from shoal.conf.source import SourceConfig
from shoal.conf.template import parse_template
from shoal.jobs.source import ROW_TEXT, SourceRows, read_source

pytestmark = pytest.mark.spark


def read(
    spark: SparkSession, *, limit: int | None = None, chunk: ChunkConfig | None = None, **source: Any
) -> SourceRows:
    settings = SourceConfig.model_validate({"key": "id", "text": "body", **source})
    return read_source(spark, settings, chunk, limit=limit)


def texts_of(source: SourceRows) -> dict[Any, str | None]:
    """Key (a tuple when composite) -> rendered text."""
    return {_key(row, source.keys): row[ROW_TEXT] for row in source.rows.collect()}


def _key(row: Row, names: tuple[str, ...]) -> Any:
    return row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)


TWO = {"a": "one fish", "b": "two\nfish"}


def as_parquet(spark: SparkSession, folder: Path) -> dict[str, Any]:
    spark.createDataFrame(list(TWO.items()), "id string, body string").write.parquet(str(folder / "rows"))
    return {"format": "parquet", "path": str(folder / "rows")}


def as_json(spark: SparkSession, folder: Path) -> dict[str, Any]:
    lines = [json.dumps({"id": key, "body": text}) + "\n" for key, text in TWO.items()]
    (folder / "rows.jsonl").write_text("".join(lines))
    return {"format": "json", "path": str(folder / "rows.jsonl")}


def as_json_of_a_schema(spark: SparkSession, folder: Path) -> dict[str, Any]:
    return {**as_json(spark, folder), "schema": "id STRING, body STRING, never_there INT"}


def as_csv(spark: SparkSession, folder: Path) -> dict[str, Any]:
    (folder / "rows.csv").write_text('id,body\na,one fish\nb,"two\nfish"\n')
    return {"format": "csv", "path": str(folder / "rows.csv"), "options": {"multiLine": "true"}}


def as_csv_without_header(spark: SparkSession, folder: Path) -> dict[str, Any]:
    (folder / "rows.csv").write_text('a;one fish\nb;"two\nfish"\n')
    options = {"multiLine": "true", "header": "false", "sep": ";"}
    return {"format": "csv", "path": str(folder / "rows.csv"), "options": options, "schema": "id STRING, body STRING"}


def as_two_paths(spark: SparkSession, folder: Path) -> dict[str, Any]:
    for key, text in TWO.items():
        (folder / f"{key}.jsonl").write_text(json.dumps({"id": key, "body": text}))
    return {"format": "json", "path": [str(folder / "a.jsonl"), str(folder / "b.jsonl")]}


def as_delta(spark: SparkSession, folder: Path) -> dict[str, Any]:
    table = spark.createDataFrame(list(TWO.items()), "id string, body string")
    table.write.format("delta").save(str(folder / "rows"))
    return {"format": "delta", "path": str(folder / "rows")}


def as_temporary_view(spark: SparkSession, folder: Path) -> dict[str, Any]:
    spark.createDataFrame(list(TWO.items()), "id string, body string").createOrReplaceTempView("fish_view")
    return {"format": "table", "table": "fish_view"}


def as_catalog_view(spark: SparkSession, folder: Path) -> dict[str, Any]:
    as_catalog_table(spark, folder)
    spark.sql("CREATE OR REPLACE VIEW pond.seen AS SELECT id, body FROM pond.fish")
    return {"format": "table", "table": "pond.seen"}


def as_catalog_table(spark: SparkSession, folder: Path) -> dict[str, Any]:
    spark.sql("CREATE SCHEMA IF NOT EXISTS pond")
    table = spark.createDataFrame(list(TWO.items()), "id string, body string")
    table.write.format("delta").mode("overwrite").saveAsTable("pond.fish")
    return {"format": "table", "table": "pond.fish"}


def as_query(spark: SparkSession, folder: Path) -> dict[str, Any]:
    as_temporary_view(spark, folder)
    return {"format": "query", "query": "SELECT id, body FROM fish_view WHERE length(body) > 0"}


@pytest.mark.parametrize(
    "make",
    [
        as_parquet, as_json, as_json_of_a_schema, as_csv, as_csv_without_header, as_two_paths, as_delta,
        as_temporary_view, as_catalog_view, as_catalog_table, as_query,
    ],
)  # fmt: skip
def test_each_kind_of_source_gives_the_same_rows(
    spark: SparkSession, tmp_path: Path, make: Callable[[SparkSession, Path], dict[str, Any]]
) -> None:
    source = read(spark, **make(spark, tmp_path))

    assert texts_of(source) == TWO
    assert source.keys == ("id",)
    assert source.rows.columns == ["id", ROW_TEXT, "row_hash", "meta_hash"]
    pinned = make in (as_delta, as_catalog_table)
    assert (source.version is not None) == pinned


def test_text_files_are_one_row_each_in_nested_folders_too(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "notes/deep er").mkdir(parents=True)
    (tmp_path / "notes/a.txt").write_text("one\ntwo\n")
    (tmp_path / "notes/deep er/b.txt").write_text("three")
    (tmp_path / "notes/empty.txt").write_text("")

    source = read_source(spark, SourceConfig.model_validate({"format": "text", "path": str(tmp_path / "notes")}), None)

    found = {Path(key).name: text for key, text in texts_of(source).items()}
    # Spark does not list empty files.
    assert found == {"a.txt": "one\ntwo\n", "b.txt": "three"}
    assert source.keys == ("path",)


def test_a_delta_source_is_read_at_its_newest_version_or_the_one_pinned(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "rows")
    for text in ("old", "new"):
        table = spark.createDataFrame([("a", text)], "id string, body string")
        table.write.format("delta").mode("overwrite").save(path)
    history = spark.sql(f"DESCRIBE HISTORY delta.`{path}`").where("version = 0").select("timestamp")
    first = history.collect()[0][0].isoformat(sep=" ")

    newest = read(spark, format="delta", path=path)
    pinned = read(spark, format="delta", path=path, version=0)
    as_of = read(spark, format="delta", path=path, timestamp=first)

    assert (texts_of(newest), newest.version) == ({"a": "new"}, 1)
    assert (texts_of(pinned), pinned.version) == ({"a": "old"}, 0)
    assert (texts_of(as_of), as_of.version) == ({"a": "old"}, 0)
    with pytest.raises(SourceError, match=r"source\.timestamp '2020-01-01': .* has no version that old"):
        read(spark, format="delta", path=path, timestamp="2020-01-01")
    with pytest.raises(SourceError, match=r"\(format delta\) cannot be read: .*version 7"):
        read(spark, format="delta", path=path, version=7)


def test_a_pinned_catalog_table_keeps_its_version_while_the_table_moves_on(spark: SparkSession, tmp_path: Path) -> None:
    as_catalog_table(spark, tmp_path)
    source = read(spark, format="table", table="pond.fish")

    spark.sql("DELETE FROM pond.fish")

    assert texts_of(source) == TWO
    assert texts_of(read(spark, format="table", table="pond.fish")) == {}
    pinned = read(spark, format="table", table="pond.fish", version=source.version)
    assert texts_of(pinned) == TWO


def test_only_rows_for_which_the_filter_is_true_count(spark: SparkSession, tmp_path: Path) -> None:
    spark.sql(
        "SELECT * FROM VALUES ('a', 'x', 1), ('b', 'y', 2), ('c', 'z', NULL) AS t(id, body, n)"
    ).createOrReplaceTempView("counted")

    assert texts_of(read(spark, format="table", table="counted", filter="n > 1")) == {"b": "y"}
    for broken in ("nn > 1", "n >"):
        with pytest.raises(SourceError, match=rf"source\.filter '{broken}': "):
            read(spark, format="table", table="counted", filter=broken)


def test_metadata_of_any_type_travels_under_the_name_it_is_published_by(spark: SparkSession) -> None:
    spark.sql(
        "SELECT 'a' AS id, 'x' AS body, 'T' AS title, named_struct('x', 1, 'y', array('p', NULL)) AS info, "
        "array(1, 2) AS many, map('k', timestamp '2026-01-31 06:00:00') AS marks, 7 AS `my.dotted-name`"
    ).createOrReplaceTempView("rich")
    columns = ["title AS headline", "info", "many", "marks", "`my.dotted-name` AS dotted.name"]

    source = read(spark, format="table", table="rich", columns=columns)

    row = source.rows.collect()[0].asDict(recursive=True)
    assert source.metadata == ("headline", "info", "many", "marks", "dotted.name")
    assert {name: row[name] for name in source.metadata} == {
        "headline": "T",
        "info": {"x": 1, "y": ["p", None]},
        "many": [1, 2],
        "marks": {"k": datetime.datetime(2026, 1, 31, 6)},
        "dotted.name": 7,
    }


def test_text_of_limited_length_is_published_as_text(spark: SparkSession, tmp_path: Path) -> None:
    table = f"delta.`{tmp_path / 'limited'}`"
    spark.sql(f"CREATE TABLE {table} (id VARCHAR(9), body STRING, lang CHAR(2)) USING delta")
    spark.sql(f"INSERT INTO {table} VALUES ('a', 'one fish', 'de')")

    source = read(spark, format="delta", path=str(tmp_path / "limited"), columns=["lang"])
    fields = {field.name: field for field in source.rows.schema}
    assert {name: (fields[name].dataType.simpleString(), fields[name].metadata) for name in ("id", "lang")} == {
        "id": ("string", {}),
        "lang": ("string", {}),
    }
    assert source.rows.select("id", "lang").collect() == [("a", "de")]


def test_keys_keep_their_types_and_may_be_several(spark: SparkSession) -> None:
    spark.sql(
        "SELECT 7 AS n, date '2026-01-31' AS day, CAST(1.50 AS DECIMAL(5, 2)) AS price, true AS ok, 'x' AS body"
    ).createOrReplaceTempView("keyed")

    source = read(spark, format="table", table="keyed", key=["n AS number", "day", "price", "ok"])

    assert source.keys == ("number", "day", "price", "ok")
    assert texts_of(source) == {(7, datetime.date(2026, 1, 31), Decimal("1.50"), True): "x"}


@pytest.mark.parametrize(
    "kind", ["float", "double", "array<int>", "struct<x: int>", "map<string, int>", "binary", "void"]
)
def test_a_key_that_cannot_be_compared_is_refused_with_its_type(spark: SparkSession, kind: str) -> None:
    spark.createDataFrame([(None, "x")], f"id {kind}, body string").createOrReplaceTempView("badly_keyed")

    with pytest.raises(SourceError, match=r"source\.key: 'id' has the type .*; a key must be a string, a whole number"):
        read(spark, format="table", table="badly_keyed")


def test_every_column_that_is_not_there_is_named_with_its_nearest(spark: SparkSession) -> None:
    spark.sql("SELECT 'a' AS doc_id, 'x' AS body, 'y' AS title").createOrReplaceTempView("named")

    with pytest.raises(SourceError) as caught:
        read(spark, format="table", table="named", key="docid", text="{titel}: {body}", columns=["zzz"])

    assert str(caught.value).splitlines() == [
        "source.key: the source has no column 'docid'; did you mean doc_id?",
        "source.columns: the source has no column 'zzz'; it has: doc_id, body, title",
        "source.text: the source has no column 'titel'; did you mean title?",
    ]


def test_a_column_that_the_source_has_twice_is_named(spark: SparkSession) -> None:
    with pytest.raises(SourceError, match=r"source\.key: the source has 2 columns 'id'.*; name them apart in a query"):
        read(spark, format="query", query="SELECT 1 AS id, 2 AS id, 'x' AS body")
    with pytest.raises(SourceError, match=r"source\.text: the source has 2 columns 'body' \(body, Body\)"):
        read(spark, format="query", query="SELECT 1 AS id, 'x' AS body, 'y' AS Body")


def test_names_that_shoal_needs_itself_cannot_be_published(spark: SparkSession) -> None:
    with pytest.raises(
        SourceError, match=r"source\.columns: '__rank' begins with __.*; publish it as '__rank AS other'"
    ):
        read(spark, format="query", query="SELECT 1 AS id, 'x' AS body, 2 AS __rank", columns=["__rank"])


def test_spark_renders_a_template_as_its_definition_says(spark: SparkSession) -> None:
    values = [None, "", "x", "{y}", "$1 \\", "\N{ROCKET}"]
    cases = list(product(values, repeat=2))
    rows = [(index, *case) for index, case in enumerate(cases)]
    spark.createDataFrame(rows, "id int, title string, `the body` string").createOrReplaceTempView("templated")

    for template in ("{title}\n{the body}", "{{{title}}} - {the body}{title}", "always {title}", "title"):
        parsed = parse_template(template)
        found = texts_of(read(spark, format="table", table="templated", text=template))

        expected = {i: parsed.render({"title": case[0], "the body": case[1]}) for i, case in enumerate(cases)}
        assert found == expected, template


def test_hashes_follow_text_chunking_and_metadata_each_for_itself(spark: SparkSession) -> None:
    spark.sql(
        "SELECT * FROM VALUES (1, 'x', 'p'), (2, 'x', 'q'), (3, 'y', 'p'), (4, NULL, 'p'), (5, '', NULL) AS "
        "t(id, body, tag)"
    ).createOrReplaceTempView("hashed")

    def hashes(**settings: Any) -> dict[int, tuple[bytes, bytes]]:
        rows = read(spark, format="table", table="hashed", **settings).rows.collect()
        return {row["id"]: (bytes(row["row_hash"]), bytes(row["meta_hash"])) for row in rows}

    plain, tagged = hashes(), hashes(columns=["tag"])
    chunked = hashes(columns=["tag"], chunk=ChunkConfig(tokens=5, overlap=1))

    assert len({row for row, _ in plain.values()}) == 4, "one and two have the same text, NULL is not empty"
    assert len({meta for _, meta in plain.values()}) == 1
    assert {row for row, _ in tagged.values()} == {row for row, _ in plain.values()}
    assert tagged[1][1] == tagged[3][1] != tagged[2][1]
    assert {row for row, _ in chunked.values()}.isdisjoint(row for row, _ in plain.values())
    assert [chunked[i][1] for i in chunked] == [tagged[i][1] for i in tagged]


def test_a_limit_takes_so_many_rows(spark: SparkSession) -> None:
    source = read(spark, format="query", query="SELECT id, 'x' AS body FROM range(100)", limit=7)

    assert len(texts_of(source)) == 7


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"format": "json", "path": "{folder}/no.jsonl"},
            r"source '.*/no\.jsonl' \(format json\) cannot be read: PATH_NOT_FOUND",
        ),
        ({"format": "parquet", "path": "{folder}/text.txt"}, r"\(format parquet\) cannot be read: "),
        ({"format": "parquet", "path": "{folder}/empty"}, r"\(format parquet\) cannot be read: UNABLE_TO_INFER_SCHEMA"),
        (
            {"format": "text", "path": "{folder}/no", "key": "path", "text": "text"},
            r"\(format text\) cannot be read: PATH_NOT_FOUND",
        ),
        ({"format": "delta", "path": "{folder}/empty"}, r"source '.*/empty' is no readable Delta table: "),
        ({"format": "delta", "path": "{folder}/no", "version": 0}, r"\(format delta\) cannot be read: "),
        ({"format": "table", "table": "pond.nothing"}, r"source\.table 'pond\.nothing': TABLE_OR_VIEW_NOT_FOUND"),
        ({"format": "table", "table": "no_such_schema.nothing"}, r"source\.table 'no_such_schema\.nothing': "),
        (
            {"format": "query", "query": "SELEC 1"},
            r"source 'SELEC 1' \(format query\) cannot be read: PARSE_SYNTAX_ERROR",
        ),
        ({"format": "query", "query": "DELETE FROM x"}, r"source 'DELETE FROM x' \(format query\) cannot be read: "),
        ({"format": "json", "path": "{folder}/bad.jsonl"}, r"\(format json\) cannot be read: .*MALFORMED"),
        (
            {"format": "json", "path": "{folder}/blank.jsonl"},
            r"source\.key: the source has no column 'id'; it has no columns",
        ),
        (
            {"format": "csv", "path": "{folder}/text.txt", "schema": "id STRING body"},
            r"\(format csv\) cannot be read: PARSE_SYNTAX_ERROR",
        ),
    ],
)
def test_a_source_that_cannot_be_read_says_which_and_why(
    spark: SparkSession, tmp_path: Path, source: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no table")
    (tmp_path / "blank.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "body": "x"}\n{"id": "b", "bo\n')
    spark.sql("CREATE SCHEMA IF NOT EXISTS pond")
    settings = {key: value.format(folder=tmp_path) if key == "path" else value for key, value in source.items()}

    with pytest.raises(SourceError, match=message):
        read(spark, **settings)


def test_a_metadata_column_that_clashes_with_one_of_shoal_is_a_configuration_error(
    run_file: Callable[..., Path],
) -> None:
    source = {"format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "columns": ["error"]}

    with pytest.raises(ConfigError, match=r"(?s)source\.columns\[0\].*'error AS source_error'"):
        load_run(run_file(source=source))
