"""Erasure: after a purge no byte below the table's folders tells of what is gone, and all else reads as before."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from shoal.conf.errors import ConfigError, RefusedError, RunError, SourceError
from shoal.conf.loader import load_run
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.embed import embed
from shoal.jobs.history import history
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.published import State, read_published
from shoal.jobs.purge import MASK, Purge, lines, masked_record, purge, read_keys
from shoal.jobs.restore import Wanted, restore
from shoal.jobs.staging import staged_rows
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = [pytest.mark.spark, pytest.mark.slow]

Row = dict[str, Any]

# The first is gone from the source in the second night, the second is there to the end; both are the least or the
# greatest of their file in key and metadata, so that statistics name them.
GONE: Row = {"id": "aa-former-key", "body": "quokka was the word in the former text", "author": "00-former-author"}
SECRET: Row = {"id": "zz-secret-key", "body": "numbat is the word in the secret text", "author": "~~secret-author"}
OF_GONE = ("aa-former-key", "quokka", "00-former-author")
OF_SECRET = ("zz-secret-key", "numbat", "~~secret-author")
PLAIN: list[Row] = [{"id": f"r{index}", "body": f"text {index}", "author": f"author {index}"} for index in range(8)]
LIVE = [*PLAIN[1:], {"id": "r8", "body": " ", "author": "author 8"}]


def settings(folder: Path, rows: list[Row], *, named: str | None = None, **source: Any) -> Path:
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "name": "docs",
        "source": {
            "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "columns": ["author"],
            "schema": "id STRING, body STRING, author STRING",
        } | source,
        "encoder": {"model": "hash:8"},
        "destination": {
            **({"table": named} if named else {"path": "out/my docs"}),
            "change_feed": True,
            "properties": {"delta.checkpointInterval": "1"},
        },
        "limits": {"max_deleted": "100%", "max_errors": "100%"},
        "tracking": {"enabled": False},
        "spark": {"master": "local[2]", "conf": {"spark.sql.shuffle.partitions": "2"}},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def ref_of(spark: SparkSession, folder: Path) -> TableRef:
    return table_of(spark, load_run(folder / "run.yaml").destination)


@pytest.fixture(scope="module", autouse=True)
def uncompressed(spark: SparkSession) -> Iterator[None]:
    """Parquet without compression, so that a search of raw bytes sees dictionaries and statistics too."""
    spark.conf.set("spark.sql.parquet.compression.codec", "uncompressed")
    yield
    spark.conf.unset("spark.sql.parquet.compression.codec")


@pytest.fixture(scope="module")
def nights(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table after nights with an update, a deletion, an error, a failed run, staged leftovers and a try."""
    folder = tmp_path_factory.mktemp("nights")
    former = SECRET | {"body": "numbat is in the text before too"}
    embed(spark, load_run(settings(folder, [GONE, *PLAIN, former])))
    embed(spark, load_run(settings(folder, [former])), limit=1)
    named_in_filter = f"id = '{OF_GONE[0]}' OR id <> 'nobody'"
    with pytest.raises(SourceError, match="aa-former-key"):
        embed(spark, load_run(settings(folder, [*PLAIN, GONE, GONE, SECRET, SECRET], filter=named_in_filter)))
    embed(spark, load_run(settings(folder, [*LIVE, SECRET])))
    ref = ref_of(spark, folder)
    # What a run that dies after it has staged leaves, for the encoder that serves and for the next one.
    hashes = {row["id"]: row["content_hash"] for row in ref.read(spark).where("error IS NULL").collect()}
    former = ref.read(spark, 0).where(F.col("id") == OF_GONE[0]).collect()[0]["content_hash"]
    serving = read_published(spark, ref).fingerprint  # type: ignore[union-attr]
    staged = [
        (encoder, bytes(content), vector_of(text), 1, False, None, None, "dead")
        for encoder in (serving, "next")
        for content, text in (
            (hashes["r1"], "text 1"), (hashes[OF_SECRET[0]], SECRET["body"]), (former, GONE["body"])
        )
    ]  # fmt: skip
    spark.createDataFrame(staged, spark.read.format("delta").load(ref.staging).schema).write.format("delta").mode(
        "append"
    ).save(ref.staging)
    return folder


@pytest.fixture
def folder(nights: Path, tmp_path: Path) -> Path:
    shutil.copytree(nights, tmp_path, dirs_exist_ok=True)
    return tmp_path


def stopped_at(step: str) -> Any:
    def stop(name: str) -> None:
        if name == step:
            raise RunError(f"stopped at {step}")

    return stop


def vector_of(text: str) -> list[float]:
    vector: list[float] = hash_vectors([text], 8, normalize=True)[0].tolist()
    return vector


def places(folder: Path, words: tuple[str, ...], *texts: str) -> dict[str, set[str]]:
    """File below the table's folders -> the words, and vectors of the texts, that its bytes or its values hold."""
    vectors = {text: np.array(vector_of(text), dtype="<f4") for text in texts}
    found: dict[str, set[str]] = {}
    for path in sorted((folder / "out").rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        told = path.name.encode()
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            told += repr(file.read().to_pydict()).encode()
            for group in range(file.metadata.num_row_groups):
                told += repr(file.metadata.row_group(group).to_dict()).encode()
        hits = {word for word in words if word.encode() in data or word.encode() in told}
        hits |= {f"vector of {text}" for text, vector in vectors.items() if vector.tobytes() in data}
        if hits:
            found[path.relative_to(folder / "out").as_posix()] = hits
    return found


def contents(spark: SparkSession, ref: TableRef) -> dict[str, Row]:
    return {row["id"]: row.asDict() for row in ref.read(spark).collect()}


def log_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out/my docs/_delta_log").iterdir() if path.name[0].isdigit())


def table(folder: Path) -> str:
    return str(folder / "out/my docs")


def test_a_purge_leaves_no_byte_of_what_is_gone_and_every_other_row_as_it_was(
    spark: SparkSession, folder: Path
) -> None:
    ref = ref_of(spark, folder)
    before = contents(spark, ref)
    num_runs = len(Bookkeeper(spark, ref, lambda _: None).records())
    told = " ".join(places(folder, OF_GONE, GONE["body"]))
    for kind in ("my docs/part-", "_change_data/", "_delta_log/0", "checkpoint", "__shoal/staging/", "__shoal/runs/"):
        assert kind in told, f"nothing to purge in {kind}"
    assert "/try/" in " ".join(places(folder, OF_SECRET))

    done = purge(spark, table(folder))

    assert places(folder, OF_GONE, GONE["body"]) == {}
    assert contents(spark, ref) == before
    assert SECRET["id"] in before
    assert (done.status, done.given, done.found, done.staged) == ("purged", None, 0, 2)
    assert done.bytes_freed > 0
    kept = {encoder: staged_rows(spark, ref, encoder).count() for encoder in ("next", fingerprint_of(spark, ref))}
    assert set(kept.values()) == {2}, "a vector of live content is gone from staging"
    record = state_of(spark, ref).record
    published = read_published(spark, ref)
    assert published is not None
    assert (published.version, published.generation) == (done.version, done.generation)
    assert (record["verb"], record["run_id"], record["config"]["source"].get("filter")) == ("purge", done.run_id, None)
    assert {name.split(".")[0] for name in log_of(folder)} == {f"{done.version:020d}"}
    runs = Bookkeeper(spark, ref, lambda _: None).records()
    assert len(runs) == num_runs + 1
    assert (runs[0]["verb"], runs[0]["status"], runs[0]["version"]) == ("purge", "purged", done.version)
    assert [run["error"] for run in runs if run["status"] == "failed"] == [MASK]
    assert [run["config"]["source"]["filter"] for run in runs if run["config"]["source"].get("filter")] == [MASK]
    entries = history(spark, table(folder))
    assert [entry["version"] for entry in entries if entry["status"] == "purged"] == [done.version]
    assert f"before version {done.version}" in "\n".join(lines(done))

    night = embed(spark, load_run(settings(folder, [*LIVE, SECRET]))).record()
    assert (night["status"], night["rows"]["unchanged"]) == ("unchanged", 9)
    changed = [*LIVE[1:], SECRET, {"id": "r9", "body": "text 1", "author": "author 9"}]
    night = embed(spark, load_run(settings(folder, changed))).record()
    assert (night["status"], night["generation"]) == ("published", (done.generation or 0) + 1)
    assert (night["rows"]["new"], night["rows"]["deleted"], night["chunks"]["encoded"]) == (1, 1, 0)
    assert set(contents(spark, ref)) == {row["id"] for row in changed}


def state_of(spark: SparkSession, ref: TableRef) -> State:
    """What the newest commit of ours says."""
    published = read_published(spark, ref)
    assert published is not None
    assert published.ours is not None
    assert published.ours.state is not None
    return published.ours.state


def fingerprint_of(spark: SparkSession, ref: TableRef) -> str:
    published = read_published(spark, ref)
    assert published is not None
    return published.fingerprint


@pytest.mark.long
def test_a_purge_of_keys_removes_these_rows_as_well_and_says_which_are_not_there(
    spark: SparkSession, folder: Path
) -> None:
    ref = ref_of(spark, folder)
    spark.sql(f"ALTER TABLE {ref.sql} SET TBLPROPERTIES ('delta.checkpointPolicy' = 'v2')")
    before = contents(spark, ref)
    (folder / "keys.txt").write_text(f"{SECRET['id']}\n\n{SECRET['id']}\nno-such-key\n")
    assert any("my docs/part-" in name for name in places(folder, OF_SECRET, SECRET["body"]))

    done = purge(spark, table(folder), folder / "keys.txt")

    assert places(folder, (*OF_GONE, *OF_SECRET, "no-such-key"), GONE["body"], SECRET["body"]) == {}
    assert contents(spark, ref) == {key: row for key, row in before.items() if key != SECRET["id"]}
    assert (done.given, done.found, done.chunks, done.not_found) == (2, 1, 1, ("no-such-key",))
    assert done.staged == 4
    sidecars = [path.name for path in (folder / "out/my docs/_delta_log/_sidecars").glob("*.parquet")]
    assert {name.split(".")[0] for name in sidecars} == {f"{done.version:020d}"}
    record = state_of(spark, ref).record
    assert record["purge"] == {"keys": 2, "found": 1, "chunks": 1, "staged": 4}
    assert (record["rows"]["source"], record["source_state"]) == (8, None)
    spark.catalog.clearCache()
    spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]
    assert spark.read.option("versionAsOf", done.version or 0).format("delta").load(table(folder)).count() == 8

    assert "the next run brings them back" in "\n".join(lines(done))
    night = embed(spark, load_run(settings(folder, [*LIVE, SECRET]))).record()
    assert (night["rows"]["new"], night["rows"]["unchanged"]) == (1, 8)


@pytest.mark.long
def test_a_purge_that_stopped_goes_on_when_it_is_run_again(spark: SparkSession, folder: Path) -> None:
    ref = ref_of(spark, folder)
    (folder / "keys.txt").write_text(SECRET["id"])
    with pytest.raises(RunError, match="stopped at marked"):
        purge(spark, table(folder), folder / "keys.txt", step=stopped_at("marked"))
    marked = state_of(spark, ref).record
    assert (marked["verb"], marked["status"]) == ("purge", "purging")
    with pytest.raises(RefusedError, match="rows were purged since"):
        restore(spark, table(folder), Wanted(to=0))
    assert SECRET["id"] not in contents(spark, ref)
    with pytest.raises(RunError, match="stopped at sealed"):
        purge(spark, table(folder), step=stopped_at("sealed"))
    assert places(folder, OF_SECRET), "the log was cut already"

    done = purge(spark, table(folder))

    assert done.status == "purged"
    assert places(folder, (*OF_GONE, *OF_SECRET), GONE["body"], SECRET["body"]) == {}
    assert set(contents(spark, ref)) == {row["id"] for row in LIVE}
    # That rows are missing here which the source may have still is not forgotten by the second purge.
    assert state_of(spark, ref).record["source_state"] is None


@pytest.mark.long
def test_a_purge_that_was_killed_in_the_middle_leaves_a_whole_table_and_is_finished_by_the_next(
    spark: SparkSession, folder: Path, dying: Callable[..., None]
) -> None:
    (folder / "keys.txt").write_text(SECRET["id"])
    dying("purge", table(folder), "published purged", folder / "keys.txt")
    ref = ref_of(spark, folder)
    assert (folder / "out/my docs__shoal/lease.json").exists()
    assert set(contents(spark, ref)) == {row["id"] for row in LIVE}
    assert places(folder, OF_SECRET), "the purge was through already"

    done: Purge = purge(spark, table(folder), folder / "keys.txt")

    assert (done.status, done.given, done.found, done.not_found) == ("purged", 1, 0, (SECRET["id"],))
    assert places(folder, (*OF_GONE, *OF_SECRET), GONE["body"], SECRET["body"]) == {}
    assert embed(spark, load_run(settings(folder, LIVE))).record()["status"] == "unchanged"


@pytest.mark.long
def test_what_others_wrote_to_a_catalog_table_before_a_purge_is_still_made_anew_by_the_next_run(
    spark: SparkSession, tmp_path: Path
) -> None:
    spark.sql(f"CREATE SCHEMA purged_herd LOCATION '{tmp_path}'")
    config = load_run(settings(tmp_path, [GONE, *LIVE], named="purged_herd.docs"))
    embed(spark, config)
    ref = table_of(spark, config.destination)
    spark.sql("UPDATE purged_herd.docs SET text = 'not what was encoded' WHERE id = 'r2'")
    spark.sql("DELETE FROM purged_herd.docs WHERE id = 'r3'")
    (tmp_path / "keys.txt").write_text(GONE["id"])

    done = purge(spark, "purged_herd.docs", tmp_path / "keys.txt")

    assert (done.table, done.found) == ("purged_herd.docs", 1)
    assert len(done.warnings) == 1
    assert "DELETE" in done.warnings[0]
    assert spark.sql("DESCRIBE HISTORY purged_herd.docs").count() == 1
    night = embed(spark, load_run(settings(tmp_path, LIVE, named="purged_herd.docs"))).record()
    assert (night["rows"]["new"], night["rows"]["changed"], night["rows"]["unchanged"]) == (1, 1, 6)
    assert {row["text"] for row in contents(spark, ref).values()} == {row["body"] for row in LIVE}
    spark.sql("DROP SCHEMA purged_herd CASCADE")


FIELDS = [T.StructField("shop", T.StringType()), T.StructField("day", T.DateType()), T.StructField("no", T.LongType())]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("keys.csv", 'no,shop,day,more\n7,"a, b",2026-01-02,x\n7,"a, b",2026-01-02,y\n'),
        ("keys.jsonl", '{"shop": "a, b", "no": 7, "day": "2026-01-02", "more": [1]}\n'),
    ],
)
def test_keys_of_several_columns_are_read_with_the_types_of_the_table(
    spark: SparkSession, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    keys = read_keys(spark, tmp_path / name, FIELDS)
    assert keys.schema.simpleString() == "struct<shop:string,day:date,no:bigint>"
    assert [(row["shop"], str(row["day"]), row["no"]) for row in keys.collect()] == [("a, b", "2026-01-02", 7)]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("keys.csv", "no,shop\n7,a\n", "header lacks the key column day; it has no, shop"),
        ("keys.csv", "no,shop,day\n7,a,2026-01-02\nseven,a,2026-01-02\n", r"line 3 has no value .*no bigint"),
        ("keys.jsonl", '{"shop": "a", "no": 7}\n', "line 1 is no JSON object with the key columns shop, day, no"),
        ("keys.jsonl", '{"shop": null, "no": 7, "day": "2026-01-02"}\n', "line 1 has no value"),
        ("keys.txt", "a\n", r"the table's key has 3 columns \(shop, day, no\)"),
        ("keys.csv", "no,shop,day\n", "there are no keys in it"),
        ("absent.txt", None, "it cannot be read"),
    ],
)
def test_a_file_of_keys_that_does_not_fit_the_table_is_refused_before_anything_is_done(
    spark: SparkSession, tmp_path: Path, name: str, text: str | None, told: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_keys(spark, tmp_path / name, FIELDS)


def test_a_masked_record_keeps_counts_and_loses_what_may_quote_a_row() -> None:
    record = {
        "error": "row 'x' is doubled", "warnings": ["'x'", "'y'"], "reason": "chunking changed", "errors": {"blank": 2},
        "migration": {"error": "row 'x'", "missing": 3}, "config": {"source": {"filter": "id <> 'x'", "path": "p"}},
    }  # fmt: skip
    assert masked_record(record) == {
        "error": MASK, "warnings": [MASK, MASK], "reason": "chunking changed", "errors": {"blank": 2},
        "migration": {"error": MASK, "missing": 3}, "config": {"source": {"filter": MASK, "path": "p"}},
    }  # fmt: skip
    assert masked_record({"error": None, "warnings": [], "config": None}) == {
        "error": None,
        "warnings": [],
        "config": None,
    }
