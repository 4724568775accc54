"""The main job on a real standalone cluster: a master and two workers as processes of their own, from the wheel."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyspark
import pytest
from pyspark.sql import SparkSession

from shoal.udfs.hash_encoder import hash_vectors

pytestmark = [pytest.mark.spark, pytest.mark.slow]

SPARK_HOME = Path(pyspark.__file__).parent
SHOAL = Path(sys.executable).with_name("shoal")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a standalone master with two workers of one core each."""
    folder = tmp_path_factory.mktemp("cluster")
    port, web = free_port(), free_port()
    address = f"spark://127.0.0.1:{port}"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SPARK_", "PYSPARK_"))}
    env = inherited | {
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_DIRS": str(folder / "local"),
        "SPARK_DAEMON_MEMORY": "256m",
        "PYSPARK_PYTHON": sys.executable,
    }
    daemon = [str(SPARK_HOME / "bin" / "spark-class")]
    commands = [
        ["org.apache.spark.deploy.master.Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", str(web)]
    ]
    for index in range(2):
        ports = ["--port", str(free_port()), "--webui-port", str(free_port())]
        size = ["--cores", "1", "--memory", "1g", "--work-dir", str(folder / f"work{index}")]
        commands.append(["org.apache.spark.deploy.worker.Worker", "--host", "127.0.0.1", *ports, *size, address])
    log = (folder / "daemons.log").open("w")
    daemons = [subprocess.Popen(daemon + command, env=env, cwd=folder, stdout=log, stderr=log) for command in commands]
    try:
        wait_until_alive(web, 2)
        yield address
    finally:
        for process in daemons:
            process.terminate()
        for process in daemons:
            process.wait(timeout=60)
        log.close()


def wait_until_alive(web: int, num_workers: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{web}/json/", timeout=5) as answer:
                if json.load(answer)["aliveworkers"] == num_workers:
                    return
        except OSError:
            pass
        time.sleep(0.5)
    pytest.fail(f"{num_workers} workers did not register within two minutes")


def test_a_run_from_an_unrelated_folder_publishes_through_two_workers(
    master: str,
    spark: SparkSession,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    texts = [f"text number {index} {'word ' * (index % 40)}" for index in range(600)]
    write_rows([{"id": str(index), "body": text} for index, text in enumerate(texts)])
    conf = {"spark.executor.memory": "768m", "spark.cores.max": "2", "spark.sql.shuffle.partitions": "4"}
    path = run_file(spark={"master": master, "conf": conf}, encode={"wave_chunks": 200})
    elsewhere = tmp_path / "elsewhere"
    for name in ("jobs", "conf", "udfs"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SPARK_", "PYSPARK_"))}
    env |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}

    done = subprocess.run(
        [SHOAL, "embed", path, "--json"], cwd=elsewhere, env=env, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    assert record["chunks"]["encoded"] == record["chunks"]["embedded"] == 600
    rows = spark.read.format("delta").load(str(tmp_path / "out/docs")).select("id", "embedding").collect()
    vectors = {int(row["id"]): np.array(row["embedding"], dtype=np.float32) for row in rows}
    np.testing.assert_array_equal(
        np.stack([vectors[index] for index in range(600)]), hash_vectors(texts, 8, normalize=True)
    )
    staged = spark.sql(f"DESCRIBE HISTORY delta.`{tmp_path}/out/docs__shoal/staging`").where("operation = 'WRITE'")
    assert staged.count() == 3
