"""Which rows and contents a plan holds, on real DataFrames, and what follows from it through whole runs."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import SourceError
from shoal.conf.loader import load_run
from shoal.conf.run import ChunkConfig
from shoal.conf.source import SourceConfig
from shoal.jobs.embed import embed
from shoal.jobs.planner import ACTION, MAX_WAVES, RowCounts, RowPlan, Waves, cut, deal, plan_rows
from shoal.jobs.source import ROW_TEXT, read_source
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = pytest.mark.spark


@pytest.fixture
def keep(tmp_path: Path, spark: SparkSession) -> Callable[..., DataFrame]:
    """Stores tables below the test's folder, as a run does."""

    def kept(name: str, table: DataFrame, *, partition_by: str | None = None) -> DataFrame:
        path = str(tmp_path / "kept" / name)
        (table.write.partitionBy(partition_by) if partition_by else table.write).mode("overwrite").parquet(path)
        return spark.read.parquet(path)

    return kept


def plan_of(spark: SparkSession, keep: Callable[..., DataFrame], **source: Any) -> RowPlan:
    settings = SourceConfig.model_validate({"key": "id", "text": "body", **source})
    return plan_rows(read_source(spark, settings, None), settings, None, keep, replace="first run")


def published(spark: SparkSession, path: Path) -> dict[tuple[str, int], Any]:
    rows = spark.read.format("delta").load(str(path)).collect()
    found = {(row["id"], row["chunk_index"]): row for row in rows}
    assert len(found) == len(rows), "a chunk is published twice"
    return found


def test_a_key_that_several_rows_share_stops_the_run_with_three_examples(
    spark: SparkSession, keep: Callable[..., DataFrame]
) -> None:
    query = "SELECT id % 5 AS id, 'x' AS n, 'b' AS body FROM range(10)"

    with pytest.raises(
        SourceError, match=r"^source\.key: 10 rows share their key \(id, n\) with another row"
    ) as caught:
        plan_of(spark, keep, format="query", query=query, key=["id", "n"])

    assert str(caught.value).count("n='x'") == 3
    assert "set source.duplicates: keep_first" in str(caught.value)


@pytest.mark.parametrize("duplicates", ["error", "keep_first"])
def test_rows_without_a_key_stop_the_run_with_their_number(
    spark: SparkSession, keep: Callable[..., DataFrame], duplicates: str
) -> None:
    query = "SELECT * FROM VALUES ('a', 1, 'x'), ('b', NULL, 'x'), (NULL, 2, 'x') AS t(id, n, body)"

    with pytest.raises(SourceError, match=r"source\.key: 2 rows have NULL in \(id, n\); filter them out"):
        plan_of(spark, keep, format="query", query=query, key=["id", "n"], duplicates=duplicates)


def test_of_rows_with_one_key_the_same_is_kept_whatever_the_order_of_the_files(
    spark: SparkSession, keep: Callable[..., DataFrame], tmp_path: Path
) -> None:
    rows = [{"id": f"r{i % 4}", "body": f"text {i % 8}", "tag": f"t{i}"} for i in range(32)]
    kept = set()
    for attempt in range(3):
        random.Random(attempt).shuffle(rows)
        folder = tmp_path / f"order{attempt}"
        folder.mkdir()
        for part in range(attempt + 1):
            lines = [json.dumps(row) + "\n" for row in rows[part :: attempt + 1]]
            (folder / f"part{part}.jsonl").write_text("".join(lines))
        plan = plan_of(
            spark, keep, format="json", path=str(folder), schema="id STRING, body STRING, tag STRING",
            columns=["tag"], duplicates="keep_first",
        )  # fmt: skip
        assert plan.counts == RowCounts(source=4, new=4)
        kept.add(tuple(sorted((row["id"], row[ROW_TEXT], row["tag"]) for row in plan.rows.collect())))

    assert len(kept) == 1


STRINGS, WITH_INT, WITH_MORE = "id STRING, body STRING", "id INT, body STRING", "id STRING, body STRING, more INT"


@pytest.mark.parametrize(
    ("name", "text", "settings"),
    [
        # Cut short; of another type; with fewer fields than columns.
        ("cut.jsonl", '{"id": "a", "body": "x"}\n{"id": "b", "bo\n', {"format": "json", "schema": STRINGS}),
        ("type.jsonl", '{"id": "a", "body": "x"}\n{"id": "many"}\n', {"format": "json", "schema": WITH_INT}),
        ("short.csv", "id,body,more\na,x,1\nb\n", {"format": "csv", "schema": WITH_MORE}),
        ("type.csv", "id,body,more\na,x,1\nb,y,many\n", {"format": "csv", "schema": WITH_MORE, "columns": ["more"]}),
        ("short_inferred.csv", "id,more,body\na,1,x\nb\n", {"format": "csv"}),
    ],
)  # fmt: skip
def test_a_malformed_line_is_an_error_and_never_a_row_of_nulls(
    spark: SparkSession, keep: Callable[..., DataFrame], tmp_path: Path, name: str, text: str, settings: dict[str, Any]
) -> None:
    (tmp_path / name).write_text(text)

    with pytest.raises(SourceError, match=rf"source '.*/{name}' could not be read to its end: .*MALFORMED") as caught:
        plan_of(spark, keep, path=str(tmp_path / name), **settings)

    assert "\n" not in str(caught.value)


WEIRD = {
    "good": "plain text",
    "null": None,
    "empty": "",
    "blank": " \t\n\N{NO-BREAK SPACE}\N{ZERO WIDTH SPACE}\N{IDEOGRAPHIC SPACE}",
    "controls_only": "\x01\x02\x7f",
    "controls": "bell \x07 and null \x00 inside",
    "emoji": "\N{ROCKET}\N{ZERO WIDTH JOINER}\N{FIRE} up",
    "right_to_left": "\u0645\u0631\u062d\u0628\u0627 \u202eabc",
}
REASONS = {"null": "null_text", "empty": "blank_text", "blank": "blank_text", "controls_only": "blank_text"}


def test_a_text_with_nothing_to_encode_is_one_chunk_with_a_reason(spark: SparkSession) -> None:
    rows = [(name.encode(), text) for name, text in WEIRD.items()]
    table = spark.createDataFrame(rows, f"row_hash binary, {ROW_TEXT} string")

    for chunk in (None, ChunkConfig(tokens=100)):
        found = {bytes(row["row_hash"]).decode(): row for row in cut(table, chunk, "").collect()}

        assert {name: row["error"] for name, row in found.items()} == {name: REASONS.get(name) for name in WEIRD}
        assert {name: row["text"] for name, row in found.items()} == WEIRD
        assert {row["chunk_index"] for row in found.values()} == {0}
        ends = {name: (row["chunk_start"], row["chunk_end"]) for name, row in found.items()}
        assert ends == {name: (0, len(text or "")) for name, text in WEIRD.items()}


def test_bytes_that_are_no_utf8_are_shown_replaced_and_hashed_as_they_are(spark: SparkSession) -> None:
    table = spark.createDataFrame([(b"1", b"caf\xe9"), (b"2", b"caf\xff")], "row_hash binary, raw binary")
    texts = table.select("row_hash", F.col("raw").cast("string").alias(ROW_TEXT))

    for chunk in (None, ChunkConfig(tokens=5)):
        one, other = cut(texts, chunk, "").orderBy("row_hash").collect()

        assert (one["text"], one["chunk_end"], one["error"]) == ("caf\ufffd", 4, "invalid_utf8")
        assert one["content_hash"] != other["content_hash"]


def test_contents_are_dealt_out_once_each_into_even_waves_and_slots(spark: SparkSession) -> None:
    table = spark.range(2000).select(
        F.substring(F.unhex(F.sha2(F.col("id").cast("string"), 256)), 1, 16).alias("content_hash"),
        F.expr("repeat('x', 1 + CAST(pow(2, id % 10) AS INT))").alias("text"),
    )

    dealt = (
        deal(table.unionByName(table), 4, 2)
        .select("content_hash", "wave", "slot", F.length("text").alias("n"))
        .collect()
    )

    assert len(dealt) == len({bytes(row["content_hash"]) for row in dealt}) == 2000
    sizes = Counter(row["wave"] for row in dealt)
    assert sorted(sizes) == [0, 1, 2, 3]
    assert max(sizes.values()) - min(sizes.values()) < 120
    for wave in range(4):
        chars = Counter[int]()
        for row in dealt:
            if row["wave"] == wave:
                chars[row["slot"]] += row["n"]
        assert sorted(chars) == [0, 1]
        # Every power of two of length differs by at most one content between the slots.
        assert abs(chars[0] - chars[1]) < 2 * 513


def test_a_small_run_still_has_waves_to_keep_and_a_huge_one_has_no_more_than_allowed() -> None:
    assert [Waves(2).number(n) for n in (1, 499, 500, 2_000, 400_000, 400_001, 10**9)] == [
        1,
        1,
        2,
        8,
        8,
        9,
        MAX_WAVES,
    ]
    assert [Waves(2, chunks=10).number(n) for n in (1, 10, 11, 10**9)] == [1, 1, 2, MAX_WAVES]


def test_a_handful_of_chunks_does_not_make_every_worker_load_the_encoder() -> None:
    assert [Waves(4).slots_for(n) for n in (1, 63, 64, 127, 128, 499, 1000)] == [1, 1, 2, 3, 4, 4, 4]
    assert Waves(4, chunks=10).slots_for(1000) == 4


def test_a_foreign_copy_of_a_row_makes_that_row_new_again(spark: SparkSession, keep: Callable[..., DataFrame]) -> None:
    query = "SELECT id, 'x' AS body FROM VALUES ('a'), ('b') AS t(id)"
    settings = SourceConfig.model_validate({"format": "query", "query": query, "key": "id", "text": "body"})
    source = read_source(spark, settings, None)
    table = source.rows.withColumns({"chunk_index": F.lit(0), "error": F.lit(None).cast("string")})

    same = plan_rows(source, settings, table, keep, replace=None)
    doubled = plan_rows(source, settings, table.unionByName(table.where("id = 'a'")), keep, replace=None)

    assert same.counts == RowCounts(source=2, unchanged=2)
    assert same.is_empty
    assert doubled.counts == RowCounts(source=2, changed=1, unchanged=1)
    assert [(row["id"], row[ACTION]) for row in doubled.rows.collect()] == [("a", "changed")]


def test_an_error_that_may_pass_is_tried_again_and_one_of_the_text_is_not(
    spark: SparkSession, keep: Callable[..., DataFrame]
) -> None:
    query = "SELECT id, body FROM VALUES ('a', 'x'), ('b', ''), ('c', 'y') AS t(id, body)"
    settings = SourceConfig.model_validate({"format": "query", "query": query, "key": "id", "text": "body"})
    source = read_source(spark, settings, None)
    error = F.when(F.col("id") == "a", "out_of_memory").when(F.col("id") == "b", "blank_text")
    table = source.rows.withColumns({"chunk_index": F.lit(0), "error": error})

    plan = plan_rows(source, settings, table, keep, replace=None)

    assert plan.counts == RowCounts(source=3, changed=1, unchanged=2, retried=1)


TAGGED = {
    "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "columns": ["tag"],
    "schema": "id STRING, body STRING, tag STRING, more INT",
}  # fmt: skip


@pytest.mark.slow
def test_what_is_no_new_content_is_never_encoded(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"id": f"r{i}", "body": f"text {i}", "tag": "t", "more": i} for i in range(5)]
    write_rows(rows)
    run = run_file(source=TAGGED)
    first = embed(spark, load_run(run)).record()
    assert (first["status"], first["chunks"]["encoded"]) == ("published", 5)

    # The same rows in another order, in other files, of another format of line ends and spaces.
    folder = tmp_path / "rewritten"
    folder.mkdir()
    for part in range(3):
        lines = [
            json.dumps(dict(reversed(row.items())), indent=None, separators=(" , ", " : "))
            for row in rows[::-1][part::3]
        ]
        (folder / f"{part}.json").write_text("\r\n".join(lines))
    record = embed(spark, load_run(run, ["source.path=rewritten"])).record()
    assert (record["status"], record["rows"]["unchanged"], record["version"]) == ("unchanged", 5, first["version"])

    rows[0]["tag"] = "other"
    write_rows(rows)
    record = embed(spark, load_run(run)).record()
    assert record["rows"] == {
        "source": 5, "new": 0, "changed": 0, "metadata_only": 1, "deleted": 0, "unchanged": 4, "retried": 0
    }  # fmt: skip
    assert (record["chunks"]["encoded"], record["chunks"]["reused"]) == (0, 1)

    rows[1]["id"] = "moved"
    write_rows(rows)
    record = embed(spark, load_run(run)).record()
    assert (record["rows"]["new"], record["rows"]["deleted"], record["chunks"]["encoded"]) == (1, 1, 0)
    table = published(spark, tmp_path / "out/docs")
    assert {key: (row["text"], row["tag"]) for key, row in table.items()} == {
        ("r0", 0): ("text 0", "other"), ("moved", 0): ("text 1", "t"), ("r2", 0): ("text 2", "t"),
        ("r3", 0): ("text 3", "t"), ("r4", 0): ("text 4", "t"),
    }  # fmt: skip

    wider = load_run(
        run_file(
            source={**TAGGED, "columns": ["more", "tag AS label"]},
            destination={"path": "out/docs", "store_text": False},
        )
    )
    record = embed(spark, wider).record()
    assert record["reason"] == "columns changed: label, more, tag, text"
    assert (record["status"], record["chunks"]["encoded"], record["chunks"]["reused"]) == ("published", 0, 5)
    table = published(spark, tmp_path / "out/docs")
    assert table["r0", 0].asDict().keys() >= {"more", "label"}
    assert table["r0", 0].asDict().keys().isdisjoint({"tag", "text"})
    assert (table["r0", 0]["more"], table["r0", 0]["label"]) == (0, "other")
    for (name, _), row in table.items():
        text = f"text {name[1:]}" if name != "moved" else "text 1"
        vector = np.array(row["embedding"], dtype=np.float32)
        np.testing.assert_array_equal(vector, hash_vectors([text], 8)[0])
    assert embed(spark, wider).record()["status"] == "unchanged"


def test_chunks_have_exact_offsets_stay_with_metadata_and_go_with_their_row(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    bodies = {
        "long": "  one two three four five \N{ROCKET} six seven eight nine ten\n eleven twelve",
        "sentences": "A short one. Then one of six words now. End!",
        "short": "alone",
        "bad": " ",
    }
    write_rows([{"id": key, "body": body, "tag": "t"} for key, body in bodies.items()])
    run = run_file(source=TAGGED, chunk={"tokens": 5, "overlap": 1}, limits={"max_errors": "100%"})

    first = embed(spark, load_run(run)).record()

    table = published(spark, tmp_path / "out/docs")
    for (name, _), row in table.items():
        assert row["text"] == bodies[name][row["chunk_start"] : row["chunk_end"]]
        assert row["error"] == ("blank_text" if name == "bad" else None)
        assert row["n_tokens"] is None if name == "bad" else row["n_tokens"] <= 5
    of_long = [row for (name, _), row in sorted(table.items()) if name == "long"]
    assert [row["chunk_index"] for row in of_long] == list(range(len(of_long)))
    assert len(of_long) >= 3
    assert first["chunks"]["planned"] == len(table)
    covered = {at for row in of_long for at in range(row["chunk_start"], row["chunk_end"])}
    assert all(char.isspace() for at, char in enumerate(bodies["long"]) if at not in covered)

    bodies["sentences"] = "shrunk"
    write_rows([{"id": key, "body": body, "tag": "new" if key == "long" else "t"} for key, body in bodies.items()])
    second = embed(spark, load_run(run)).record()

    after = published(spark, tmp_path / "out/docs")
    assert second["chunks"]["encoded"] == 1
    assert {key for key in after if key[0] == "sentences"} == {("sentences", 0)}
    assert after["sentences", 0]["text"] == "shrunk"
    for key in table:
        if key[0] == "long":
            assert after[key]["tag"] == "new"
            same = (
                "text",
                "chunk_start",
                "chunk_end",
                "embedding",
                "n_tokens",
                "embedded_at",
                "content_hash",
                "row_hash",
            )
            assert [after[key][name] for name in same] == [table[key][name] for name in same]
        elif key[0] != "sentences":
            assert after[key] == table[key]


@pytest.mark.slow
def test_texts_of_every_kind_go_through_one_run_and_each_has_a_vector_or_a_reason(
    spark: SparkSession, run_file: Callable[..., Path], tmp_path: Path
) -> None:
    huge = "word " * 1_000_000
    rows = [{"id": name, "body": text} for name, text in WEIRD.items()] + [{"id": "huge", "body": huge}]
    lines = [json.dumps(row) for row in rows] + ['{"id": "surrogate", "body": "half \\ud800 a pair"}']
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    raw = spark.createDataFrame([("bytes", b"caf\xe9 au lait")], "id string, body binary")
    raw.selectExpr("id", "CAST(body AS STRING) AS body").write.parquet(str(tmp_path / "raw"))
    query = (
        f"SELECT id, body FROM json.`{tmp_path}/corpus.jsonl` UNION ALL SELECT id, body FROM parquet.`{tmp_path}/raw`"
    )
    source = {"format": "query", "query": query, "key": "id", "text": "body"}

    record = embed(spark, load_run(run_file(source=source, limits={"max_errors": "50%"}))).record()

    table = {key: row for (key, _), row in published(spark, tmp_path / "out/docs").items()}
    assert table.keys() == {*WEIRD, "huge", "surrogate", "bytes"}
    assert record["errors"] == {"blank_text": 3, "invalid_utf8": 1, "null_text": 1}
    assert record["chunks"]["planned"] == record["chunks"]["embedded"] + record["chunks"]["errors"] == 11
    assert {key: row["error"] for key, row in table.items()} == {
        **dict.fromkeys(table), **REASONS, "bytes": "invalid_utf8"
    }  # fmt: skip
    for row in table.values():
        assert (row["embedding"] is None) == (row["error"] is not None)
        if row["error"] is None:
            vector = np.array(row["embedding"], dtype=np.float32)
            np.testing.assert_array_equal(vector, hash_vectors([row["text"]], 8)[0])
    assert table["huge"]["n_tokens"] == 1_000_000
    assert table["surrogate"]["text"] == "half ? a pair"
    assert {key: table[key]["text"] for key in WEIRD} == WEIRD
