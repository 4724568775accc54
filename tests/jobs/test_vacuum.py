"""`shoal vacuum`: what goes, what stays, what a dry run says, and a vacuum that was killed."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import BusyError
from shoal.conf.loader import load_run
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.cli import main
from shoal.jobs.embed import embed
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.lease import held
from shoal.jobs.operation import table_of_ours
from shoal.jobs.report import Report
from shoal.jobs.restore import Wanted, restore
from shoal.jobs.vacuum import lines, vacuum

pytestmark = [pytest.mark.spark, pytest.mark.slow]


def night(spark: SparkSession, folder: Path, *ids: int) -> Report:
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"id": i, "body": f"text {i}"}) + "\n" for i in ids))
    (folder / "run.yaml").write_text(
        "{name: docs, source: {format: json, path: corpus.jsonl, key: id, text: body, schema: 'id INT, body STRING'},"
        " encoder: {model: 'hash:8'}, destination: {path: out/docs}, tracking: {enabled: false},"
        " limits: {max_deleted: '100%'}}"
    )
    return embed(spark, load_run(folder / "run.yaml"))


@pytest.fixture(scope="module")
def nights(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nights, and beside the table: work of a dead run, a try, an old and a young file that no version has."""
    folder = tmp_path_factory.mktemp("nights")
    night(spark, folder, *range(10))
    night(spark, folder, *range(2, 12))
    out, beside = folder / "out/docs", folder / "out/docs__shoal"
    (beside / "work/dead").mkdir(parents=True)
    (beside / "work/dead/rows").write_text("work")
    (beside / "try").mkdir()
    (beside / "try/part").write_text("try")
    (out / "old.parquet").write_text("12345")
    (out / "young.parquet").write_text("1234567")
    return folder


@pytest.fixture
def folder(nights: Path, tmp_path: Path) -> Path:
    shutil.copytree(nights, tmp_path, dirs_exist_ok=True)
    aged = time.time() - 8 * 86400
    os.utime(tmp_path / "out/docs/old.parquet", (aged, aged))
    return tmp_path


def ref_of(spark: SparkSession, folder: Path) -> TableRef:
    return table_of(spark, load_run(folder / "run.yaml").destination)


def parts_of(document: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {part["name"]: (part["files"], part["bytes"]) for part in document["vacuum"]["parts"]}


def places(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in (folder / "out").rglob("*") if path.is_file()}


@pytest.mark.long
def test_what_dead_runs_left_goes_as_a_dry_run_said_and_restore_reaches_as_far_as_before(
    spark: SparkSession, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref, before = ref_of(spark, folder), places(folder)
    assert main(["vacuum", str(ref), "--dry-run", "--json"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert parts_of(dry) == {"work": (1, 4), "try": (1, 3), "published": (1, 5)}
    assert (dry["vacuum"]["files"], dry["vacuum"]["bytes"]) == (3, 12)
    assert "would remove 3 files, 12 bytes" in lines(dry)[0]
    assert places(folder) == before
    record = vacuum(spark, str(ref))
    assert parts_of(record) == parts_of(dry)
    assert (record["verb"], record["status"], record["vacuum"]["bytes"]) == ("vacuum", "vacuumed", 12)
    assert "removed 3 files, 12 bytes" in lines(record)[0]
    assert before - places(folder) == {
        "out/docs/old.parquet", "out/docs__shoal/work/dead/rows", "out/docs__shoal/try/part"
    }  # fmt: skip
    assert Bookkeeper(spark, ref, lambda _: None).records()[0] == record
    now = table_of_ours(spark, str(ref))
    assert (now.generation, now.foreign) == (2, ())
    assert night(spark, folder, *range(2, 12)).status == "unchanged"
    assert restore(spark, str(ref), Wanted(to=0))["status"] == "restored"
    assert ref.read(spark).count() == 10


@pytest.mark.long
def test_a_run_that_is_alive_is_left_alone(spark: SparkSession, folder: Path) -> None:
    ref, before = ref_of(spark, folder), places(folder)
    files = FileSystem(spark, ref.sidecar)
    with held(files, ref.lease, "dead", heartbeat_seconds=0.1), pytest.raises(BusyError, match="is alive"):
        vacuum(spark, str(ref))
    assert places(folder) == before


@pytest.mark.long
def test_a_vacuum_that_was_killed_is_finished_by_the_next(
    spark: SparkSession, folder: Path, dying: Callable[..., None]
) -> None:
    ref = ref_of(spark, folder)
    dying("vacuum", str(ref), "published vacuumed")
    assert not (folder / "out/docs/old.parquet").exists()
    assert Path(ref.lease).exists()
    assert vacuum(spark, str(ref))["status"] == "vacuumed"
    assert not Path(ref.lease).exists()
    report = night(spark, folder, *range(2, 13))
    assert (report.status, report.rows.new, ref.read(spark).count()) == ("published", 1, 11)
