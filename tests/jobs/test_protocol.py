"""The publication protocol under faults: runs killed at its steps, killed workers, two runs at once, overtaken runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from delta.tables import DeltaTable
from pyspark.sql import SparkSession

from shoal.conf.errors import BusyError, LeaseLostError, OvertakenError
from shoal.conf.loader import load_run
from shoal.conf.run import RunConfig
from shoal.jobs import publish
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.embed import Hooks, embed
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.staging import staged_rows
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = [pytest.mark.spark, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("run_and_die.py")
WAVES = 4
DAY = [{"id": f"r{index}", "body": f"text {index % 50}"} for index in range(60)]
# Ten rows go, ten change, ten come: twenty new texts.
NIGHT = [
    {"id": f"r{index}", "body": f"night {index}" if index < 20 or index >= 60 else f"text {index % 50}"}
    for index in range(10, 70)
]
Contents = dict[tuple[str, int], tuple[str | None, str | None, tuple[float, ...]]]


def settings(folder: Path, rows: list[dict[str, Any]], **sections: Any) -> Path:
    """A run file over these rows, with waves of a quarter of what a first run or a night has to encode."""
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "name": "docs",
        "source": {
            "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "schema": "id STRING, body STRING"
        },
        "encoder": {"model": "hash:8"},
        "destination": {"path": "out/docs"},
        "encode": {"wave_chunks": 5 if rows is NIGHT else 13},
        "limits": {"max_deleted": "100%"},
        "tracking": {"enabled": False},
        "spark": {
            "master": "local[2]",
            "conf": {
                "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
                "spark.sql.adaptive.enabled": False,
                "spark.sql.codegen.factoryMode": "NO_CODEGEN",
                "spark.sql.codegen.wholeStage": False,
                "spark.sql.shuffle.partitions": 2,
            },
        },
    } | sections  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def start(run_file: Path, *arguments: str) -> subprocess.Popen[str]:
    """A run in a process group of its own, which its JVM shares."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SPARK_", "PYSPARK_"))}
    return subprocess.Popen(
        [sys.executable, SCRIPT, run_file, *arguments],
        env=env | {"PYSPARK_PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def die(run_file: Path, step: str) -> str:
    """Runs until the step, where it is killed, and returns its run id, out of the lease that it left behind."""
    process = start(run_file, step, "die")
    _, told = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, f"the run did not get to step '{step}': {told}"
    lease = run_file.parent / "out/docs__shoal/lease.json"
    return str(json.loads(lease.read_text())["run_id"])


def rebuilt(rows: list[dict[str, Any]]) -> Contents:
    """What a table made anew from these rows holds, worked out without Spark."""
    vectors_ND = hash_vectors([row["body"] for row in rows], 8, normalize=True)
    return {
        (row["id"], 0): (row["body"], None, tuple(vector.tolist()))
        for row, vector in zip(rows, vectors_ND, strict=True)
    }


def contents(spark: SparkSession, ref: TableRef) -> Contents | None:
    """What readers see: keys -> text, error, vector; None when there is no table."""
    if not DeltaTable.isDeltaTable(spark, ref.path or ""):
        return None
    rows = ref.read(spark).collect()
    found = {
        (row["id"], row["chunk_index"]): (
            row["text"],
            row["error"],
            tuple(np.array(row["embedding"], dtype=np.float32).tolist()),
        )
        for row in rows
    }
    assert len(found) == len(rows), "a chunk is published twice"
    return found


def operations(spark: SparkSession, ref: TableRef) -> list[str]:
    """The published table's commits, oldest first."""
    history = spark.sql(f"DESCRIBE HISTORY {ref.sql}").orderBy("version").collect()
    return [row["operation"] for row in history]


def assert_nothing_is_left(spark: SparkSession, ref: TableRef, fingerprint: str) -> None:
    files = FileSystem(spark, ref.sidecar)
    assert files.names(ref.work) == []
    assert not files.exists(ref.lease)
    assert staged_rows(spark, ref, fingerprint).isEmpty()


@pytest.fixture(scope="module")
def day(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table that holds DAY, to be copied by each test that needs one."""
    folder = tmp_path_factory.mktemp("day")
    embed(spark, load_run(settings(folder, DAY)))
    return folder


@pytest.fixture
def after_day(day: Path, tmp_path: Path) -> Path:
    """The published table of a day, and NIGHT as its source."""
    shutil.copytree(day, tmp_path, dirs_exist_ok=True)
    return settings(tmp_path, NIGHT)


REPLACE, MERGE = "CREATE OR REPLACE TABLE AS SELECT", "MERGE"


@pytest.mark.parametrize(
    ("night", "step", "has_landed"),
    [
        pytest.param(False, "lease taken", False, marks=pytest.mark.long),
        pytest.param(False, "recovered", False, marks=pytest.mark.long),
        pytest.param(True, "planned", False, marks=pytest.mark.long),
        pytest.param(False, "probed", False, marks=pytest.mark.long),
        pytest.param(False, "wave 1 staged", False, marks=pytest.mark.long),
        (True, "wave 1 staged", False),
        pytest.param(True, "audited", False, marks=pytest.mark.long),
        pytest.param(False, "fenced", False, marks=pytest.mark.long),
        pytest.param(False, "landed", True, marks=pytest.mark.long),
        pytest.param(True, "landed", True, marks=pytest.mark.long),
        pytest.param(True, "recorded", True, marks=pytest.mark.long),
        pytest.param(False, "tracked", True, marks=pytest.mark.long),
        pytest.param(True, "trimmed", True, marks=pytest.mark.long),
    ],
)
def test_a_run_killed_at_a_step_leaves_a_complete_version_and_the_next_run_finishes(
    spark: SparkSession, day: Path, tmp_path: Path, night: bool, step: str, has_landed: bool
) -> None:
    if night:
        shutil.copytree(day, tmp_path, dirs_exist_ok=True)
    rows = NIGHT if night else DAY
    run_file = settings(tmp_path, rows)
    config = load_run(run_file)
    ref = table_of(spark, config.destination)

    dead = die(run_file, step)

    old = rebuilt(DAY) if night else None
    assert contents(spark, ref) == (rebuilt(rows) if has_landed else old)
    staged = staged_hashes(spark, ref)

    record = embed(spark, config).record()

    assert contents(spark, ref) == rebuilt(rows)
    assert operations(spark, ref) == ([REPLACE, MERGE] if night else [REPLACE])
    assert_nothing_is_left(spark, ref, record["fingerprint"])
    runs = Bookkeeper(spark, ref, lambda _: None).records()
    assert len({run["run_id"] for run in runs}) == len(runs), "a run is written down twice"
    written = {run["run_id"]: run for run in runs}
    chunks = record["chunks"]
    if has_landed:
        assert record["status"] == "unchanged"
        assert (written[dead]["status"], written[dead]["version"]) == ("published", int(night))
        assert written[dead]["chunks"]["encoded"] == (20 if night else 50)
        assert written[dead]["generation"] == record["generation"] == (2 if night else 1)
    else:
        assert record["status"] == "published"
        assert dead not in written
        assert chunks["reused"] + chunks["encoded"] == chunks["distinct"]
        # Every wave that had been committed is found again, and nothing that was in one is encoded twice.
        assert chunks["encoded"] == (20 if night else 50) - len(staged)
        if step.startswith("wave"):
            assert 0 < len(staged) < (20 if night else 50)
        elif step in ("audited", "fenced"):
            assert chunks["encoded"] == 0


def staged_hashes(spark: SparkSession, ref: TableRef) -> set[bytes]:
    if not DeltaTable.isDeltaTable(spark, ref.staging):
        return set()
    rows = spark.read.format("delta").load(ref.staging).select("content_hash").collect()
    assert len({bytes(row[0]) for row in rows}) == len(rows), "a content is staged twice"
    return {bytes(row[0]) for row in rows}


@pytest.mark.long
def test_a_run_outlives_its_python_workers(spark: SparkSession, tmp_path: Path) -> None:
    config = load_run(settings(tmp_path, DAY, encode={}))
    # Idle workers are taken up again: those that a job before left behind will be the ones that encode.
    spark.range(4, numPartitions=2).mapInArrow(lambda batches: batches, "id bigint").count()
    killed: list[int] = []

    def freeze_then_kill(name: str) -> None:
        if name == "wave 0 started":
            frozen = python_workers(spark)
            for pid in frozen:
                os.kill(pid, signal.SIGSTOP)
            killed.extend(frozen)
            killer.start()

    def kill_when_tasks_hang() -> None:
        tracker = spark.sparkContext.statusTracker()
        hung_since, last = time.monotonic(), None
        while time.monotonic() - hung_since < 3:
            time.sleep(0.1)
            stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
            now = [(stage.stageId, stage.numActiveTasks, stage.numCompletedTasks) for stage in stages if stage]
            if not now or now != last or not any(active for _, active, _ in now):
                hung_since, last = time.monotonic(), now
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_tasks_hang, daemon=True)
    record = embed(spark, config, hooks=Hooks(step=freeze_then_kill)).record()
    killer.join(timeout=30)

    assert killed, "there was no worker to kill"
    tracker = spark.sparkContext.statusTracker()
    jobs = tracker.getJobIdsForGroup(f"shoal-encode-{record['run_id']}")
    stages = {stage for job in jobs for stage in tracker.getJobInfo(job).stageIds}  # type: ignore[union-attr]
    failed = sum(info.numFailedTasks for stage in stages if (info := tracker.getStageInfo(stage)))
    assert failed > 0, "no task was hit"
    assert record["status"] == "published"
    assert record["chunks"]["encoded"] == record["chunks"]["embedded"] - 10 == 50
    assert contents(spark, table_of(spark, config.destination)) == rebuilt(DAY)


def python_workers(spark: SparkSession) -> list[int]:
    """Process ids of the workers that this session's `pyspark.daemon` has forked."""
    jvm = spark._jvm.java.lang.ProcessHandle.current().pid()  # type: ignore[union-attr]
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] not in "ZT":
            parents[int(stat.parent.name)] = int(fields[1])
    return [pid for pid, parent in parents.items() if parents.get(parent) == jvm]


@pytest.fixture
def waiting(after_day: Path, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a night in another process, returns when it has come to a step, and ends it with the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(step: str) -> subprocess.Popen[str]:
        process = start(after_day, step, "wait", str(tmp_path))
        processes.append(process)
        end = time.monotonic() + 300
        while not (tmp_path / "waiting").exists():
            if process.poll() is not None:
                pytest.fail(f"the run ended before step '{step}': {process.communicate()}")
            assert time.monotonic() < end, f"the run did not come to step '{step}' within five minutes"
            time.sleep(0.05)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


def test_a_second_run_is_told_who_holds_the_table_and_takes_over_as_soon_as_that_run_is_dead(
    spark: SparkSession, after_day: Path, waiting: Callable[[str], subprocess.Popen[str]]
) -> None:
    config = load_run(after_day)
    ref = table_of(spark, config.destination)
    first = waiting("planned")
    holder = json.loads((after_day.parent / "out/docs__shoal/lease.json").read_text())

    with pytest.raises(BusyError, match=f"run {holder['run_id']} by .* on {holder['host']} .process {first.pid}.") as e:
        embed(spark, config)

    assert (e.value.exit_code, e.value.report.record()["status"]) == (4, "busy")  # type: ignore[attr-defined]
    assert contents(spark, ref) == rebuilt(DAY)
    assert len(FileSystem(spark, ref.sidecar).names(ref.work)) == 1, "the work of a live run was dropped"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    said: list[str] = []
    began = time.monotonic()
    took: list[float] = []

    def step(name: str) -> None:
        if name == "lease taken":
            took.append(time.monotonic() - began)

    record = embed(spark, config, hooks=Hooks(say=said.append, step=step)).record()

    assert record["status"] == "published"
    assert f"run {holder['run_id']} on {holder['host']} is dead; taking its lease over" in said
    assert not any("watching its heartbeat" in line for line in said)
    assert contents(spark, ref) == rebuilt(NIGHT)
    assert_nothing_is_left(spark, ref, record["fingerprint"])


@pytest.mark.long
def test_a_run_that_stood_still_and_was_overtaken_loses_cleanly(
    spark: SparkSession, after_day: Path, waiting: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    config = load_run(after_day)
    ref = table_of(spark, config.destination)
    slow = waiting("audited")
    os.killpg(slow.pid, signal.SIGSTOP)

    fast = embed(spark, config).record()
    (tmp_path / "go").touch()
    os.killpg(slow.pid, signal.SIGCONT)
    told, _ = slow.communicate(timeout=120)

    assert fast["status"] == "published"
    assert fast["chunks"]["encoded"] == 0, "what the slow run had staged was encoded again"
    report = json.loads(told)
    assert (report["raised"], report["status"]) == ("LeaseLostError", "failed")
    assert "took the table over while this run stood still" in report["error"]
    assert operations(spark, ref) == [REPLACE, MERGE]
    assert contents(spark, ref) == rebuilt(NIGHT)
    again = embed(spark, config).record()
    assert again["status"] == "unchanged"
    assert_nothing_is_left(spark, ref, fast["fingerprint"])


def hooked(step: str, action: Callable[[], None]) -> Hooks:
    """Does something once, when a step is done."""
    done: list[str] = []

    def at(name: str) -> None:
        if name == step and not done:
            done.append(name)
            action()

    return Hooks(step=at)


def publish_meanwhile(spark: SparkSession, config: RunConfig, ref: TableRef) -> None:
    """Another run publishes the same night although this one holds the lease."""
    Path(ref.lease).unlink()
    assert embed(spark, config).record()["status"] == "published"


@pytest.mark.long
def test_a_run_that_lost_its_lease_to_a_publication_stops_before_its_own(spark: SparkSession, after_day: Path) -> None:
    config = load_run(after_day)
    ref = table_of(spark, config.destination)

    with pytest.raises(LeaseLostError, match="nothing was published by this run") as raised:
        embed(spark, config, hooks=hooked("audited", lambda: publish_meanwhile(spark, config, ref)))

    assert raised.value.report.record()["status"] == "failed"  # type: ignore[attr-defined]
    assert operations(spark, ref) == [REPLACE, MERGE]
    assert contents(spark, ref) == rebuilt(NIGHT)


@pytest.mark.long
def test_a_run_overtaken_after_its_last_look_at_the_lease_is_stopped_by_the_fence(
    spark: SparkSession, after_day: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run(after_day)
    ref = table_of(spark, config.destination)
    fence, overtaken = publish._fence, []

    def overtaken_then_fenced(*args: Any) -> None:
        if not overtaken:
            overtaken.append(True)
            publish_meanwhile(spark, config, ref)
        fence(*args)

    monkeypatch.setattr(publish, "_fence", overtaken_then_fenced)

    with pytest.raises(
        OvertakenError, match=r"version 1 \(MERGE by .*\) landed after .* planned on version 0; nothing was"
    ):
        embed(spark, config)

    assert operations(spark, ref) == [REPLACE, MERGE]
    assert contents(spark, ref) == rebuilt(NIGHT)
    assert embed(spark, config).record()["status"] == "unchanged"


def test_a_lease_lost_between_waves_stops_the_run_and_spares_the_work_of_the_new_holder(
    spark: SparkSession, after_day: Path
) -> None:
    config = load_run(after_day)
    ref = table_of(spark, config.destination)
    files = FileSystem(spark, ref.sidecar)

    def take_over() -> None:
        lease = json.loads(files.read(ref.lease) or "{}")
        files.replace(ref.lease, json.dumps(lease | {"run_id": "usurper", "heartbeat": 0}))
        files.create(f"{ref.work}/usurper/rows/part", "theirs")

    with pytest.raises(LeaseLostError, match="run usurper took the table over"):
        embed(spark, config, hooks=hooked("wave 1 staged", take_over))

    assert operations(spark, ref) == [REPLACE]
    assert contents(spark, ref) == rebuilt(DAY)
    assert files.names(ref.work) == ["usurper"]
    assert json.loads(files.read(ref.lease) or "{}")["run_id"] == "usurper"


@pytest.mark.long
def test_a_foreign_append_between_plan_and_publication_overtakes_the_run(spark: SparkSession, after_day: Path) -> None:
    config = load_run(after_day)
    ref = table_of(spark, config.destination)

    def append() -> None:
        rows = ref.read(spark).where("id = 'r0'").selectExpr("* EXCEPT (id)", "'foreign' AS id")
        rows.write.format("delta").mode("append").save(ref.path)

    with pytest.raises(OvertakenError, match=r"version 1 \(WRITE by .*\) landed after this run planned on version 0"):
        embed(spark, config, hooks=hooked("audited", append))

    assert operations(spark, ref) == [REPLACE, "WRITE"]
    record = embed(spark, config).record()
    assert record["chunks"]["encoded"] == 0
    assert contents(spark, ref) == rebuilt(NIGHT), "the next run plans on the table as the other left it"


@pytest.mark.long
def test_an_optimize_between_plan_and_publication_does_no_harm(spark: SparkSession, after_day: Path) -> None:
    config = load_run(after_day)
    ref = table_of(spark, config.destination)

    record = embed(
        spark, config, hooks=hooked("audited", lambda: spark.sql(f"OPTIMIZE {ref.sql} ZORDER BY (id)").collect())
    ).record()

    assert operations(spark, ref) == [REPLACE, "OPTIMIZE", MERGE]
    assert (record["status"], record["version"], record["generation"]) == ("published", 2, 2)
    assert contents(spark, ref) == rebuilt(NIGHT)
