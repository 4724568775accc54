"""How Spark is opened, as far as a session that runs already shows it."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from pyspark import SparkConf, inheritable_thread_target
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.conf.run import SparkConfig
from shoal.jobs import session
from shoal.jobs.jars import connectors, delta
from shoal.jobs.session import (
    CLASS_ARCHIVE,
    DELTA_EXTENSION,
    LOGGED_RUN,
    SNAPSHOT_TASKS,
    _configured,
    _launching,
    begin_group,
    default_log_file,
    described,
    fitted,
    logs_json,
    most_slots,
    open_spark,
    slots,
)

pytestmark = pytest.mark.spark


def test_a_running_session_is_used_as_it_is(spark: SparkSession) -> None:
    again = open_spark(SparkConfig(master="local[7]", conf={"spark.sql.shuffle.partitions": "99"}), app_name="again")

    assert again.sparkContext is spark.sparkContext
    assert again.conf.get("spark.sql.shuffle.partitions") == "2"
    assert slots(again) == 2


def test_the_session_is_set_up_for_delta_arrow_and_utc(spark: SparkSession) -> None:
    assert DELTA_EXTENSION in (spark.conf.get("spark.sql.extensions") or "")
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    assert spark.conf.get("spark.sql.execution.arrow.pyspark.validateSchema.enabled") == "true"


def test_a_local_session_asks_nobody_for_jars_that_are_there(spark: SparkSession) -> None:
    conf = spark.sparkContext.getConf()
    wanted = [delta(), *connectors(["s3a://", "jdbc:postgresql:"])]
    assert conf.get("spark.jars.packages") is None
    java = spark.sparkContext._jvm.java  # type: ignore[union-attr]
    class_path = java.lang.System.getProperty("java.class.path").split(os.pathsep)
    assert {str(jar) for artifact in wanted for jar in artifact.fetched()} <= set(class_path)
    options = java.lang.management.ManagementFactory.getRuntimeMXBean().getInputArguments()
    assert any(str(CLASS_ARCHIVE) in option for option in options) == CLASS_ARCHIVE.exists()


@pytest.mark.parametrize(
    ("master", "conf", "is_on"),
    [
        ("spark://host:7077", {}, "true"),
        ("yarn", {"spark.task.maxFailures": "8"}, "true"),
        ("spark://host:7077", {"spark.task.maxFailures": "3"}, None),
        ("spark://host:7077", {"spark.excludeOnFailure.application.enabled": "true"}, None),
        ("local[2]", {}, None),
    ],
)
def test_a_cluster_leaves_failing_executors_out_where_nobody_says_otherwise(
    spark: SparkSession, master: str, conf: dict[str, str], is_on: str | None
) -> None:
    del spark  # with its JVM there is a class for settings
    found, _ = _configured(SparkConfig(master=master, conf=conf), "shoal tests")
    assert found.get("spark.excludeOnFailure.taskAndStage.enabled") == is_on
    attempts = found.get("spark.excludeOnFailure.task.maxTaskAttemptsPerNode")
    assert attempts is None or int(attempts) < int(found.get("spark.task.maxFailures") or 4)


@pytest.mark.parametrize(
    ("conf", "expected"),
    [
        ({}, 3),
        ({"maxExecutors": "10"}, 3),
        ({"enabled": "true"}, 3),
        ({"enabled": "true", "maxExecutors": "2147483647"}, 3),
        ({"enabled": "true", "maxExecutors": "10"}, 10),
        ({"enabled": "true", "maxExecutors": "2"}, 3),
        ({"enabled": "true", "maxExecutors": "10", "cores": "4"}, 40),
        ({"enabled": "true", "maxExecutors": "10", "cores": "4", "cpus": "3"}, 10),
    ],
)
def test_executors_that_may_come_have_slots_too(spark: SparkSession, conf: dict[str, str], expected: int) -> None:
    del spark  # with its JVM there is a class for settings
    names = {"cores": "spark.executor.cores", "cpus": "spark.task.cpus"}
    settings = {names.get(name, f"spark.dynamicAllocation.{name}"): value for name, value in conf.items()}
    assert most_slots(SparkConf(loadDefaults=False).setAll(list(settings.items())), 3) == expected


def test_delta_s_log_is_read_by_as_many_tasks_as_a_small_cluster_has_slots(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = spark.conf.get(SNAPSHOT_TASKS)
    assert fitted(spark) == {}
    spark.conf.unset(SNAPSHOT_TASKS)
    try:
        assert fitted(spark) == {SNAPSHOT_TASKS: "2"}
        monkeypatch.setattr(session, "slots", lambda _: 64)
        assert fitted(spark) == {}
    finally:
        spark.conf.set(SNAPSHOT_TASKS, decided)


def test_the_environment_that_a_jvm_starts_in_is_the_users_with_additions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "a folder" / "classes.jsa"
    archive.parent.mkdir()
    archive.touch()
    monkeypatch.setattr("shoal.jobs.session.CLASS_ARCHIVE", archive)
    monkeypatch.setenv("SPARK_SUBMIT_OPTS", "-Dhttp.proxyHost=proxy")
    monkeypatch.delenv("SPARK_DIST_CLASSPATH", raising=False)
    before = dict(os.environ)
    with _launching([Path("one.jar"), Path("two.jar")]):
        assert os.environ["SPARK_DIST_CLASSPATH"] == os.pathsep.join(["one.jar", "two.jar"])
        assert os.environ["SPARK_SUBMIT_OPTS"].startswith("-Dhttp.proxyHost=proxy -XX:SharedArchiveFile=")
        assert f'"{archive}"' in os.environ["SPARK_SUBMIT_OPTS"]
    assert dict(os.environ) == before
    archive.unlink()
    with _launching([]):
        assert dict(os.environ) == before
    with _launching([], brief=True):
        assert os.environ["SPARK_SUBMIT_OPTS"] == "-Dhttp.proxyHost=proxy -XX:TieredStopAtLevel=1"


def test_the_log_of_a_driver_is_json_where_spark_is_told_so_of_all_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_SUBMIT_OPTS", "-Dmine=1")
    told = {}
    for as_json in (logs_json({}), logs_json({"spark.log.structuredLogging.enabled": "true"})):
        with _launching([], as_json=as_json):
            told[as_json] = os.environ["SPARK_SUBMIT_OPTS"].split()
    assert set(told[True]) - set(told[False]) == {
        "-Dlog4j2.configurationFile=classpath:org/apache/spark/log4j2-json-layout.properties"
    }


def test_what_is_done_for_a_run_is_logged_with_its_id_and_what_comes_after_is_not(spark: SparkSession) -> None:
    logger = spark._jvm.org.slf4j.MDC
    with described(spark, "shoal: docs, plan", "run-7"):
        assert logger.get(LOGGED_RUN) == "run-7"
        with ThreadPoolExecutor(1) as pool:
            in_wave = inheritable_thread_target(spark)(
                lambda: begin_group(spark, "g", "a wave") or logger.get(LOGGED_RUN)
            )
            assert pool.submit(in_wave).result() == "run-7"
    assert logger.get(LOGGED_RUN) is None


def test_a_local_session_listens_on_loopback_alone(spark: SparkSession) -> None:
    assert spark.range(1).count() == 1
    me = psutil.Process()
    sockets = []
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # a worker that was idle for long enough
            sockets += process.net_connections("inet")
    bound = {each.laddr.ip.removeprefix("::ffff:") for each in sockets if each.status in ("LISTEN", "NONE")}
    assert "127.0.0.1" in bound
    assert bound <= {"127.0.0.1", "::1"}


def test_a_running_session_without_delta_is_refused(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.jobs.session.DELTA_EXTENSION", "io.delta.sql.AnotherExtension")

    with pytest.raises(ConfigError, match=r"spark\.sql\.extensions of the running session is .*AnotherExtension in it"):
        open_spark(SparkConfig(), app_name="again")


def test_the_log_of_spark_is_this_process_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert default_log_file().is_relative_to(tmp_path)
    assert default_log_file().suffix == ".log"
