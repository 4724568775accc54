"""How Spark is opened, as far as a session that runs already shows it."""

import os
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.conf.run import SparkConfig
from shoal.jobs.jars import connectors, delta
from shoal.jobs.session import (
    CLASS_ARCHIVE,
    DELTA_EXTENSION,
    _launching,
    default_log_file,
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


def test_a_running_session_without_delta_is_refused(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.jobs.session.DELTA_EXTENSION", "io.delta.sql.AnotherExtension")

    with pytest.raises(ConfigError, match=r"spark\.sql\.extensions of the running session is .*AnotherExtension in it"):
        open_spark(SparkConfig(), app_name="again")


def test_the_log_of_spark_is_this_process_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert default_log_file().is_relative_to(tmp_path)
    assert default_log_file().suffix == ".log"
