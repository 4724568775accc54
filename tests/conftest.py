"""One Spark session for all tests that need one, and small helpers to write sources and run files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


# Hundreds of small queries, each run once or twice: compiling and adapting their plans costs more than it saves, half
# of the time of a run. The test of the quickstart leaves Spark as users have it.
SMALL_QUERIES = {
    "spark.driver.extraJavaOptions": "-XX:+UseSerialGC -XX:TieredStopAtLevel=4",
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.shuffle.partitions": "2",
    "spark.sql.ui.retainedExecutions": "10",
}

# A JVM that lives for a command spends half of its time on compiling what it will not run often enough; the session of
# the tests above lives for hundreds of them.
SHORT_LIVED = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
COMPILED = ("spark.sql.adaptive.enabled", "spark.sql.codegen.factoryMode", "spark.sql.codegen.wholeStage")
os.environ.setdefault(
    "SPARK_SUBMIT_OPTS", " ".join([SHORT_LIVED, *(f"-D{name}={SMALL_QUERIES[name]}" for name in COMPILED)])
)

# These run commands in processes of their own, encode with a real model, or both.
LONGEST = {"test_quickstart.py", "test_protocol.py", "test_cranfield.py", "test_docs.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with slow tests: started last, one of them would run alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in slow))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Lets go of the tables of one file of tests: Delta keeps the plans of each for an hour, which fills the memory."""
    if nextitem is None or nextitem.path != item.path:
        sql = sys.modules.get("pyspark.sql")
        session = sql.SparkSession.getActiveSession() if sql else None
        if session is not None:
            session._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SparkSession"]:
    """Spark with Delta, two slots, and a warehouse of its own."""
    from shoal.conf.run import SparkConfig
    from shoal.jobs.jars import connectors
    from shoal.jobs.session import open_spark

    folder = tmp_path_factory.mktemp("spark")
    os.environ["PYSPARK_PYTHON"] = sys.executable
    settings = SparkConfig(
        master="local[2,2]",
        driver_memory="2g",
        conf={
            **SMALL_QUERIES,
            "spark.sql.warehouse.dir": str(folder / "warehouse"),
            "spark.sql.catalogImplementation": "in-memory",
            "spark.sql.debug.maxToStringFields": "100",
        },
    )
    # `make stores` has brought them; the tests on an older Spark do without.
    places = [place for place in ("s3a://", "jdbc:postgresql:") if all(jar.fetched() for jar in connectors([place]))]
    session = open_spark(settings, app_name="shoal tests", log_file=folder / "spark.log", places=places)
    yield session
    session.stop()


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines: `write_rows([{...}, ...], name="corpus.jsonl")`."""

    def write(rows: list[dict[str, Any]], name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run file over corpus.jsonl with the hash encoder; keywords replace whole sections, None removes one."""

    def write(name: str = "run.yaml", **sections: Any) -> Path:
        settings: dict[str, Any] = {
            "name": "docs",
            "source": {
                "format": "json",
                "path": "corpus.jsonl",
                "key": "id",
                "text": "body",
                "schema": "id STRING, body STRING",
            },
            "encoder": {"model": "hash:8"},
            "destination": {"path": "out/docs"},
            "tracking": {"enabled": False},
        }
        settings.update(sections)
        path = tmp_path / name
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return path

    return write


@pytest.fixture(scope="session")
def dying() -> Callable[..., None]:
    """Runs a verb in a process that has to be killed at a step: `dying("restore", table, "committed")`."""
    script = Path(__file__).parent / "jobs" / "verb_and_die.py"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SPARK_", "PYSPARK_"))}

    def run(verb: str, table: str, step: str, *more: Path) -> None:
        killed = subprocess.run(
            [sys.executable, script, verb, table, step, *more],
            env=env, capture_output=True, text=True, timeout=300, start_new_session=True, check=False,
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr

    return run


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """Removes the test's folder at its end: tables add up over a session."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
