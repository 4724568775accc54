"""Tables that a Hive metastore knows: a server of its own, and processes that ask it."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyspark
import pytest
from cluster import SHORT_LIVED, clean_environment, die_with_parent, free_port

pytestmark = [pytest.mark.spark, pytest.mark.slow]

METASTORE = "org.apache.hadoop.hive.metastore.HiveMetaStore"
"""Hive's own server, which Spark's jars have."""

SITE = """\
<configuration>
  <property><name>hive.metastore.uris</name><value>thrift://127.0.0.1:{port}</value></property>
</configuration>
"""
DEFAULTS = """\
spark.master local[2]
spark.sql.adaptive.enabled false
spark.sql.catalogImplementation hive
spark.sql.codegen.factoryMode NO_CODEGEN
spark.sql.codegen.wholeStage false
spark.sql.warehouse.dir {warehouse}
"""
STEPS = """
import contextlib, io, json, sys
from shoal.conf.run import SparkConfig
from shoal.jobs.cli import main
from shoal.jobs.session import open_spark

spark, told = open_spark(SparkConfig(), app_name="tests"), []
for step in json.loads(sys.argv[1]):
    if isinstance(step, str):
        told.append([list(row) for row in spark.sql(step).collect()])
        continue
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*step, "--json"]) == 0
    told.append(json.loads(printed.getvalue()))
print(json.dumps(told, default=str))
"""


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Spark's folder of settings, which name a metastore that is running."""
    folder = tmp_path_factory.mktemp("metastore")
    port = free_port()
    properties = {
        "javax.jdo.option.ConnectionURL": f"jdbc:derby:;databaseName={folder}/catalog;create=true",
        "hive.metastore.warehouse.dir": f"{folder}/warehouse",
        "hive.async.log.enabled": "false",
        "hive.metastore.schema.verification": "false",
        "datanucleus.schema.autoCreateAll": "true",
    }
    java = Path(os.environ["JAVA_HOME"], "bin", "java") if "JAVA_HOME" in os.environ else "java"
    words = [word for name, value in properties.items() for word in ("--hiveconf", f"{name}={value}")]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [java, "-cp", f"{Path(pyspark.__file__).parent}/jars/*", METASTORE, "-p", str(port), *words],
            env=os.environ | {"JDK_JAVA_OPTIONS": SHORT_LIVED},
            cwd=folder, stdout=log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent,
        )  # fmt: skip
    try:
        _wait(server, port, folder / "log")
        (folder / "hive-site.xml").write_text(SITE.format(port=port))
        (folder / "spark-defaults.conf").write_text(DEFAULTS.format(warehouse=folder / "warehouse"))
        yield folder
    finally:
        server.kill()
        server.wait()


def _wait(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture
def process(configured: Path, tmp_path: Path) -> Callable[..., Any]:
    """Statements and commands, one after another in a process that asks the metastore; what each gave."""

    def run(*steps: str | list[str]) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", STEPS, json.dumps(steps)], cwd=tmp_path,
            env=clean_environment() | {"SPARK_CONF_DIR": str(configured)},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_metastores_tables_are_read_made_and_found_again(
    process: Callable[..., Any], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    source = {"format": "table", "table": "spark_catalog.shop.articles", "key": "id", "text": "body"}
    managed = run_file("managed.yaml", source=source, destination={"table": "spark_catalog.shop.docs"})
    external = run_file("external.yaml", source=source, destination={"table": "shop.outside", "path": "out/docs"})

    _, _, _, first, _, night, _, described, (hit,), history = process(
        "CREATE SCHEMA shop",
        "CREATE TABLE shop.articles (id STRING, body STRING) USING delta",
        "INSERT INTO shop.articles VALUES ('a', 'one text'), ('b', 'two texts')",
        ["embed", str(managed)],
        "UPDATE shop.articles SET body = 'two other texts' WHERE id = 'b'",
        ["embed", str(managed)],
        ["embed", str(external)],
        "DESCRIBE TABLE EXTENDED shop.outside",
        ["search", "shop.outside", "two other texts", "-k", "1"],
        ["history", "spark_catalog.shop.docs"],
    )
    assert (first["status"], first["chunks"]["encoded"]) == ("published", 2)
    assert (night["status"], night["rows"]["changed"], night["chunks"]["encoded"]) == ("published", 1, 1)
    told = {name: value for name, value, _ in described}
    assert (told["Type"], told["Location"]) == ("EXTERNAL", f"file:{tmp_path}/out/docs")
    assert (hit["id"], hit["score"]) == ("b", 1.0)
    assert [(entry["version"], entry["status"]) for entry in history["entries"]] == [(1, "published"), (0, "published")]
