"""How Spark is opened, as far as a session that runs already shows it."""

from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.conf.run import SparkConfig
from shoal.jobs.session import DELTA_EXTENSION, default_log_file, delta_package, open_spark, slots

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


def test_a_running_session_without_delta_is_refused(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.jobs.session.DELTA_EXTENSION", "io.delta.sql.AnotherExtension")

    with pytest.raises(ConfigError, match=r"spark\.sql\.extensions of the running session is .*AnotherExtension in it"):
        open_spark(SparkConfig(), app_name="again")


@pytest.mark.parametrize(
    ("spark_version", "delta", "package"),
    [
        ("4.0.1", "4.0.0", "io.delta:delta-spark_2.13:4.0.0"),
        ("4.1.0", "4.1.0", "io.delta:delta-spark_4.1_2.13:4.1.0"),
        ("4.2.0", "4.4.0", "io.delta:delta-spark_4.2_2.13:4.4.0"),
    ],
)
def test_the_delta_package_fits_spark(
    monkeypatch: pytest.MonkeyPatch, spark_version: str, delta: str, package: str
) -> None:
    monkeypatch.setattr("pyspark.__version__", spark_version)
    monkeypatch.setattr("importlib.metadata.version", lambda _: delta)

    assert delta_package() == package


def test_the_log_of_spark_is_this_process_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert default_log_file().is_relative_to(tmp_path)
    assert default_log_file().suffix == ".log"
