"""What nobody needs any more, and what somebody may: staging by encoder and age, work of runs that live or died."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.embed import embed
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.layout import TableRef, read_delta
from shoal.jobs.lease import held
from shoal.jobs.operation import table_of_ours
from shoal.jobs.published import Published
from shoal.jobs.sweep import DEFAULT_RETAIN, RETENTION, Stale, leftovers, retain_of, stale_staging, trim

pytestmark = [pytest.mark.spark, pytest.mark.slow]

NOW = datetime.now(UTC)
OLD = NOW - timedelta(days=30)


@pytest.fixture(scope="module")
def made(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "corpus.jsonl").write_text('{"id": "a", "body": "one"}\n{"id": "b", "body": "two"}\n')
    (folder / "run.yaml").write_text(
        "{name: docs, source: {format: json, path: corpus.jsonl, key: id, text: body, schema: 'id STRING, body STRING'}"
        ", encoder: {model: 'hash:8'}, destination: {path: out/docs}, tracking: {enabled: false}}"
    )
    embed(spark, load_run(folder / "run.yaml"))
    return folder


@pytest.fixture
def published(spark: SparkSession, made: Path, tmp_path: Path) -> Published:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return table_of_ours(spark, str(tmp_path / "out/docs"))


def stage(spark: SparkSession, ref: TableRef, rows: list[tuple[str, bytes, datetime]]) -> None:
    staging = read_delta(spark, ref.staging)
    staged = [(encoder, content, [0.0] * 8, 1, False, None, at, "dead") for encoder, content, at in rows]
    spark.createDataFrame(staged, staging.schema).write.format("delta").mode("append").save(ref.staging)


def test_staging_goes_by_encoder_and_age_and_never_the_next_one_or_what_is_not_published(
    spark: SparkSession, published: Published
) -> None:
    ref, serving = published.ref, published.fingerprint
    known = bytes(ref.read(spark).collect()[0]["content_hash"])
    stage(
        spark,
        ref,
        [
            (serving, known, OLD),
            (serving, b"not published yet", OLD),
            ("former", b"x", OLD),
            ("former", b"y", OLD),
            ("young", b"x", NOW),
            ("coming", b"x", OLD),
        ],
    )
    books = Bookkeeper(spark, ref, lambda _: None)
    record = books.records()[0]
    coming = {"next_encoder": {"model": "hash:16"}}
    # A next encoder that was never settled may be any of them.
    books.write(record | {"run_id": "unsettled", "config": record["config"] | coming})
    assert stale_staging(spark, published) == [Stale(serving, 1, is_serving=True)]
    settled = record | {"run_id": "settled", "config": record["config"] | coming}
    books.write(settled | {"migration": {"fingerprint": "coming"}})
    found = stale_staging(spark, published)
    assert sorted(found, key=lambda part: part.rows) == [Stale(serving, 1, is_serving=True), Stale("former", 2, False)]
    trim(spark, published, found)
    trim(spark, published, found)
    left = {(row["fingerprint"], bytes(row["content_hash"])) for row in read_delta(spark, ref.staging).collect()}
    assert left == {(serving, b"not published yet"), ("young", b"x"), ("coming", b"x")}
    # Without a next encoder in the run file, its vectors are kept as long as all others.
    books.write(record | {"run_id": "without"})
    assert stale_staging(spark, published) == [Stale("coming", 1, is_serving=False)]


def test_what_a_live_run_has_beside_the_table_is_left_out(spark: SparkSession, published: Published) -> None:
    ref, files = published.ref, FileSystem(spark, published.ref.sidecar)
    for name in ("alive", "dead"):
        (Path(ref.work) / name).mkdir(parents=True)
        (Path(ref.work) / name / "rows").write_text("1234")
    (Path(ref.sidecar) / "try").mkdir()
    (Path(ref.sidecar) / "try" / "table").write_text("12")
    stage(spark, ref, [("former", b"x", OLD)])
    with held(files, ref.lease, "alive"):
        found = {part.name: part for part in leftovers(spark, files, published)}
    assert found.keys() == {"work"}
    assert (found["work"].files, found["work"].bytes) == (1, 4)
    found = {part.name: part for part in leftovers(spark, files, published)}
    assert {name: (part.files, part.bytes, part.rows) for name, part in found.items()} == {
        "work": (2, 8, 0), "try": (1, 2, 0), "staging rows": (0, 0, 1)
    }  # fmt: skip


def test_the_retention_is_that_of_the_tables_property(spark: SparkSession, published: Published) -> None:
    assert retain_of(published) == timedelta(days=7)
    for told, retain in [("interval 36 hours", timedelta(hours=36)), ("interval 2 weeks", timedelta(days=14))]:
        assert retain_of(replace(published, properties={RETENTION: told})) == retain
    assert retain_of(replace(published, properties={})) == DEFAULT_RETAIN
