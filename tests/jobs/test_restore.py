"""`shoal restore`: what comes back, what the next night makes of it, what is refused, and restores that were killed."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, DestinationError, RefusedError, RunError, ShoalError
from shoal.conf.loader import load_run
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.cli import main
from shoal.jobs.embed import embed
from shoal.jobs.history import history
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.published import ENCODER_PROPERTY, Published, read_published
from shoal.jobs.purge import purge
from shoal.jobs.report import Report
from shoal.jobs.restore import Wanted, lines, parse_time, restore
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = [pytest.mark.spark, pytest.mark.slow]

DAY = {f"r{index}": f"text {index}" for index in range(8)}
NIGHT = {f"r{index}": "changed" if index == 1 else f"text {index}" for index in range(1, 9)}
OLD, NEW = {"model": "hash:8"}, {"model": "hash:16"}


def night(spark: SparkSession, folder: Path, rows: dict[str, str], encoder: dict[str, Any], **how: Any) -> Report:
    """One `shoal embed` of these rows with this encoder."""
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"id": k, "body": v}) + "\n" for k, v in rows.items()))
    run = {
        "name": "docs",
        "source": {
            "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "schema": "id STRING, body STRING"
        },
        "encoder": encoder,
        "destination": {"path": "out/docs"},
        "limits": {"max_deleted": "100%"},
        "tracking": {"enabled": False},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return embed(spark, load_run(folder / "run.yaml"), **how)


def table(folder: Path) -> str:
    return str(folder / "out/docs")


def ref_of(spark: SparkSession, folder: Path) -> TableRef:
    return table_of(spark, load_run(folder / "run.yaml").destination)


def head(spark: SparkSession, folder: Path) -> Published:
    found = read_published(spark, ref_of(spark, folder))
    assert found is not None
    return found


def assert_is(spark: SparkSession, folder: Path, rows: dict[str, str], dim: int) -> None:
    """The published table is what a fresh run over these rows gives."""
    found = {row["id"]: row for row in ref_of(spark, folder).read(spark).collect()}
    assert {key: row["text"] for key, row in found.items()} == rows
    vectors_ND = hash_vectors(list(rows.values()), dim, normalize=True)
    np.testing.assert_allclose([found[key]["embedding"] for key in rows], vectors_ND, atol=1e-6)


@pytest.fixture(scope="module")
def three(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 0 has DAY, version 1 NIGHT, version 2 NIGHT with another encoder; a fourth run found nothing to do."""
    folder = tmp_path_factory.mktemp("three")
    night(spark, folder, DAY, OLD)
    night(spark, folder, NIGHT, OLD)
    night(spark, folder, NIGHT, NEW, full_refresh=True)
    night(spark, folder, NIGHT, NEW)
    return folder


@pytest.fixture
def folder(three: Path, tmp_path: Path) -> Path:
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_rows_identity_and_state_come_back_and_the_next_night_goes_on_from_there(
    spark: SparkSession, folder: Path
) -> None:
    spark.sql(f"ALTER TABLE delta.`{table(folder)}` SET TBLPROPERTIES ('team' = 'search')")
    new = head(spark, folder).properties
    record = restore(spark, table(folder), Wanted(to=0))
    now = head(spark, folder)
    assert record["status"] == "restored"
    assert (record["verb"], record["restored_to"], record["version"], record["generation"]) == ("restore", 0, 4, 4)
    assert record["rows"] == {**dict.fromkeys(record["rows"], 0), "source": 8, "unchanged": 8}
    assert json.loads(now.properties[ENCODER_PROPERTY])["reference"] == "hash:8"
    assert now.properties[ENCODER_PROPERTY] != new[ENCODER_PROPERTY]
    assert now.properties["delta.constraints.shoal_dim"].endswith("= 8")
    assert now.ours is not None
    assert now.ours.state is not None
    assert now.ours.state.record["fingerprint"] == now.fingerprint == record["fingerprint"]
    assert_is(spark, folder, DAY, 8)
    assert "to version 0, as version 4" in lines(record)[0]
    again = night(spark, folder, NIGHT, OLD)
    assert (again.status, again.generation) == ("published", 5)
    assert again.rows.changed + again.rows.new + again.rows.deleted == 3
    assert_is(spark, folder, NIGHT, 8)
    told = [(entry["version"], entry["verb"], entry["status"]) for entry in history(spark, table(folder))]
    assert told[:2] == [(5, "embed", "published"), (4, "restore", "restored")]


@pytest.mark.long
def test_a_version_is_named_by_its_run_or_by_a_time_and_one_that_is_there_already_is_left_alone(
    spark: SparkSession, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commits = {entry["version"]: entry for entry in history(spark, table(folder))}
    assert main(["restore", table(folder), "--run", commits[0]["run_id"], "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["restored_to"], first["version"]) == (0, 3)
    at = datetime.fromtimestamp(commits[2]["at_ms"] / 1000, UTC)
    assert main(["restore", table(folder), "--before", at.isoformat(), "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert (second["restored_to"], second["version"], second["generation"]) == (1, 4, 5)
    third = restore(spark, table(folder), Wanted(to=4))
    assert (third["status"], head(spark, folder).version) == ("unchanged", 4)
    assert "nothing to do" in lines(third)[0]
    assert night(spark, folder, NIGHT, OLD).status == "unchanged"
    # A restore is a commit of ours like others: it can be undone.
    assert restore(spark, table(folder), Wanted(to=2))["fingerprint"] == commits[2]["fingerprint"]
    assert_is(spark, folder, NIGHT, 16)


@pytest.mark.parametrize(
    ("wanted", "error", "told"),
    [
        (Wanted(to=99), DestinationError, "versions 0 to 2"),
        (Wanted(run="20200101T000000-00000000"), ConfigError, "has no such run; the newest are"),
        (Wanted(before=datetime(2000, 1, 1, tzinfo=UTC)), DestinationError, "name a later time"),
    ],
)
def test_a_version_that_is_not_there_is_refused_with_those_that_are(
    spark: SparkSession, three: Path, wanted: Wanted, error: type[ShoalError], told: str
) -> None:
    with pytest.raises(error, match=told):
        restore(spark, table(three), wanted)
    assert head(spark, three).version == 2


def test_a_run_that_published_nothing_is_no_place_to_go_back_to(spark: SparkSession, three: Path) -> None:
    newest = Bookkeeper(spark, ref_of(spark, three), lambda _: None).records()[0]
    with pytest.raises(ConfigError, match=r"published nothing \(status unchanged\)"):
        restore(spark, table(three), Wanted(run=newest["run_id"]))


def test_exactly_one_way_to_name_a_version_is_taken_and_times_without_a_zone_are_utc() -> None:
    with pytest.raises(ConfigError, match="exactly one of"):
        Wanted()
    with pytest.raises(ConfigError, match="exactly one of"):
        Wanted(to=1, run="x")
    with pytest.raises(ConfigError, match="is no time"):
        parse_time("yesterday")
    assert parse_time("2026-01-31") == datetime(2026, 1, 31, tzinfo=UTC)
    assert parse_time("2026-01-31T01:00:00+01:00") == datetime(2026, 1, 31, tzinfo=UTC)


def test_what_others_wrote_is_undone_but_does_not_come_back(spark: SparkSession, folder: Path) -> None:
    spark.sql(f"UPDATE delta.`{table(folder)}` SET text = 'not of this vector' WHERE id = 'r2'")
    restore(spark, table(folder), Wanted(to=2))
    assert_is(spark, folder, NIGHT, 16)
    with pytest.raises(RefusedError, match=r"version 3 \(UPDATE by .*not written by Shoal"):
        restore(spark, table(folder), Wanted(to=3))
    assert night(spark, folder, NIGHT, NEW).status == "unchanged"


@pytest.mark.long
def test_rows_that_were_purged_stay_erased(spark: SparkSession, folder: Path) -> None:
    def stop(name: str) -> None:
        if name == "marked":
            raise RunError("stopped")

    with pytest.raises(RunError, match="stopped"):
        purge(spark, table(folder), step=stop)
    with pytest.raises(RefusedError, match="rows were purged since, by version 3"):
        restore(spark, table(folder), Wanted(to=2))
    purge(spark, table(folder))
    with pytest.raises(DestinationError, match="a purge ended what was before"):
        restore(spark, table(folder), Wanted(to=2))


def test_a_version_without_its_files_is_refused_in_words_and_the_table_stays(spark: SparkSession, folder: Path) -> None:
    ref = ref_of(spark, folder)
    for name in ref.read(spark, 0).inputFiles():
        Path(name.removeprefix("file://").removeprefix("file:")).unlink()
    with pytest.raises(DestinationError, match=r"files that it needs are gone.* that can be are 2"):
        restore(spark, table(folder), Wanted(to=1))
    assert head(spark, folder).version == 2
    failed = Bookkeeper(spark, ref, lambda _: None).records()[0]
    assert (failed["verb"], failed["status"], failed["code"]) == ("restore", "failed", "VERSION_GONE")
    assert night(spark, folder, NIGHT, NEW).status == "unchanged"


@pytest.mark.long
def test_the_next_night_reads_the_change_feed_from_the_restored_state(spark: SparkSession, tmp_path: Path) -> None:
    source = f"delta.`{tmp_path / 'corpus'}`"
    spark.sql(
        f"CREATE TABLE {source} (id STRING, body STRING) USING delta "
        f"TBLPROPERTIES ('delta.enableChangeDataFeed' = 'true')"
    )
    spark.sql(f"INSERT INTO {source} VALUES ('a', 'one'), ('b', 'two'), ('c', 'three')")
    run = {
        "name": "docs",
        "source": {"format": "delta", "path": "corpus", "key": "id", "text": "body"},
        "encoder": OLD,
        "destination": {"path": "out/docs"},
        "limits": {"max_deleted": "100%"},
        "tracking": {"enabled": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    config = load_run(tmp_path / "run.yaml")
    embed(spark, config)
    spark.sql(f"UPDATE {source} SET body = 'other' WHERE id = 'a'")
    embed(spark, config)
    spark.sql(f"DELETE FROM {source} WHERE id = 'b'")
    embed(spark, config)
    assert restore(spark, table(tmp_path), Wanted(to=0))["source_version"] == 1
    assert_is(spark, tmp_path, {"a": "one", "b": "two", "c": "three"}, 8)
    report = embed(spark, config)
    assert report.difference == "feed from version 1 to 3"
    # The vector of 'other' is found in a version from before the restore.
    assert (report.rows.changed, report.rows.deleted, report.num_todo) == (1, 1, 0)
    assert_is(spark, tmp_path, {"a": "other", "c": "three"}, 8)


@pytest.mark.long
@pytest.mark.parametrize(("step", "is_done"), [("restore planned", False), ("committed", True)])
def test_a_restore_that_was_killed_has_happened_or_has_not(
    spark: SparkSession, folder: Path, dying: Callable[..., None], step: str, is_done: bool
) -> None:
    dying("restore", table(folder), step)
    assert head(spark, folder).version == (3 if is_done else 2)
    report = night(spark, folder, NIGHT, OLD if is_done else NEW)
    records = Bookkeeper(spark, ref_of(spark, folder), lambda _: None).records()
    assert [run["version"] for run in records if run["status"] == "restored"] == ([3] if is_done else [])
    assert report.status == ("published" if is_done else "unchanged")
    assert_is(spark, folder, NIGHT, 8 if is_done else 16)
