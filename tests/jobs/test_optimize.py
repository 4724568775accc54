"""`shoal optimize`: fewer files, the same rows, and a night that goes on as if nothing had happened."""

import json
import shutil
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.cli import main
from shoal.jobs.compaction import compact, size_of
from shoal.jobs.embed import Hooks, embed
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.operation import table_of_ours
from shoal.jobs.optimize import lines, optimize
from shoal.jobs.report import Report

pytestmark = [pytest.mark.spark, pytest.mark.slow]


def night(spark: SparkSession, folder: Path, *ids: int, hooks: Hooks | None = None) -> Report:
    rows = [{"id": index, "body": f"text {index}"} for index in ids]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(
        "{name: docs, source: {format: json, path: corpus.jsonl, key: id, text: body, schema: 'id INT, body STRING'},"
        " encoder: {model: 'hash:8'}, destination: {path: out/docs}, tracking: {enabled: false},"
        " limits: {max_deleted: '100%'}}"
    )
    return embed(spark, load_run(folder / "run.yaml"), hooks=hooks)


@pytest.fixture(scope="module")
def nights(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nights")
    night(spark, folder, *range(10))
    night(spark, folder, *range(2, 12))
    return folder


@pytest.fixture
def folder(nights: Path, tmp_path: Path) -> Path:
    shutil.copytree(nights, tmp_path, dirs_exist_ok=True)
    return tmp_path


def ref_of(spark: SparkSession, folder: Path) -> TableRef:
    return table_of(spark, load_run(folder / "run.yaml").destination)


def ids(spark: SparkSession, ref: TableRef) -> list[int]:
    return sorted(row["id"] for row in ref.read(spark).select("id").collect())


def test_small_files_become_one_without_the_deleted_rows_and_a_dry_run_only_says_so(
    spark: SparkSession, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = ref_of(spark, folder)
    before = size_of(spark, ref.sql)
    assert before.files > 1
    assert before.deleted_rows == 2
    assert main(["optimize", str(ref), "--dry-run", "--json"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert dry["optimize"]["tables"]["published"] == {"before": before.public(), "after": None}
    assert dry["optimize"]["reasons"] == ["2 of 12 rows are marked as deleted"]
    assert "due: 2 of 12 rows" in lines(dry)[-1]
    assert table_of_ours(spark, str(ref)).version == 1
    record = optimize(spark, str(ref))
    after = size_of(spark, ref.sql)
    assert (after.files, after.deleted_rows, after.rows) == (1, 0, 10)
    assert (record["verb"], record["status"]) == ("optimize", "optimized")
    assert record["optimize"]["tables"]["published"] == {"before": before.public(), "after": after.public()}
    assert record["optimize"]["tables"]["runs"]["after"]["files"] == 1
    assert Bookkeeper(spark, ref, lambda _: None).records()[0] == record
    assert f"{before.files} files" in lines(record)[1]
    now = table_of_ours(spark, str(ref))
    assert (now.version, now.head.operation, now.generation, now.foreign) == (2, "OPTIMIZE", 2, ())
    assert night(spark, folder, *range(2, 12)).status == "unchanged"
    assert optimize(spark, str(ref))["status"] == "optimized"
    assert table_of_ours(spark, str(ref)).version == 2


@pytest.mark.long
def test_a_run_goes_on_over_an_optimize_by_somebody_else(spark: SparkSession, folder: Path) -> None:
    ref = ref_of(spark, folder)

    def step(name: str) -> None:
        if name == "audited":
            compact(spark, ref.sql)

    report = night(spark, folder, *range(3, 14), hooks=Hooks(step=step))
    assert (report.status, report.version) == ("published", 3)
    assert ids(spark, ref) == list(range(3, 14))
