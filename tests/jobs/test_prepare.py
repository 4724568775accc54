"""Errors that cross from a worker to the driver, out of Spark's stack traces; trials that do not agree."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import WorkerError
from shoal.jobs.canary_store import Probe
from shoal.jobs.prepare import require_agreement, worker_error
from shoal.udfs.canaries import Canaries
from shoal.udfs.encode_udf import ArrowFunction

pytestmark = pytest.mark.spark


@pytest.mark.parametrize(("code", "wanted"), [("CANARIES_MOVED", "CANARIES_MOVED"), (None, "WORKER_FAILED")])
def test_an_error_of_a_worker_keeps_kind_message_and_code(spark: SparkSession, code: str | None, wanted: str) -> None:
    def fail(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            raise WorkerError("encoder x has moved", code=code)
        except WorkerError as error:
            raise type(error)(f"partition 0: {error}", code=error.code) from error
        yield from batches

    with pytest.raises((PySparkException, Py4JJavaError)) as failed:
        spark.range(1).mapInArrow(fail, "id bigint").collect()
    found = worker_error(failed.value)

    assert type(found) is WorkerError
    assert str(found).endswith("encoder x has moved")
    assert found.code == wanted


def test_a_failure_that_is_not_ours_is_a_failed_worker(spark: SparkSession) -> None:
    def fail(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        raise ZeroDivisionError("by hand")
        yield from batches

    with pytest.raises((PySparkException, Py4JJavaError)) as failed:
        spark.range(1).mapInArrow(fail, "id bigint").collect()

    assert worker_error(failed.value).code == "WORKER_FAILED"
    assert "ZeroDivisionError: by hand" in str(worker_error(failed.value))


def test_a_server_of_spark_connect_that_went_away_is_no_failed_worker() -> None:
    told = (
        "<_InactiveRpcError of RPC that terminated with:\n\tstatus = StatusCode.UNAVAILABLE\n"
        '\tdetails = "Connection refused"\n\tdebug_error_string = "UNKNOWN:Error"\n>'
    )
    found = worker_error(PySparkException(told))
    assert found.code == "SPARK_UNAVAILABLE"
    assert "the server of Spark Connect went away (Connection refused)" in str(found)


def test_executors_have_to_agree_on_the_first_vectors_of_an_encoder() -> None:
    """Within what the precision allows; the loosest of them where they differ."""
    ours = np.eye(3, 4, dtype=np.float32)
    moved = ours.copy()
    moved[1, 0] = 0.02  # a cosine of 0.9998

    def probe(vectors: np.ndarray, precision: str = "float32") -> Probe:
        return Probe({"precision": precision}, Canaries("f", vectors))

    require_agreement([probe(ours)])
    require_agreement([probe(ours), probe(ours), probe(ours)])
    require_agreement([probe(ours), probe(moved, "bfloat16")])
    with pytest.raises(WorkerError, match=r"lowest cosine 0\.9998.*, allowed 0\.99999.*shoal doctor") as caught:
        require_agreement([probe(ours), probe(ours), probe(moved)])
    assert caught.value.code == "CANARIES_MOVED"


def missing_package(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    import no_such_package_of_ours  # type: ignore[import-not-found]  # noqa: F401

    yield from batches


def passed_on(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield from batches


@pytest.mark.parametrize(
    ("function", "driver", "told"),
    [
        (
            missing_package,
            None,
            "the Python of a worker lacks a package: ModuleNotFoundError: No module named 'no_such",
        ),
        (passed_on, "3.9", "the workers have another Python than the driver: PYTHON_VERSION_MISMATCH"),
    ],
)
def test_workers_that_do_not_fit_are_a_clear_error(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, function: ArrowFunction, driver: str | None, told: str
) -> None:
    if driver is not None:
        monkeypatch.setattr(spark.sparkContext, "pythonVer", driver)
    with pytest.raises(PySparkException) as caught:
        spark.range(1).mapInArrow(function, "id LONG").collect()
    failure = worker_error(caught.value)
    assert (failure.code, told in str(failure)) == ("WORKERS_UNFIT", True), str(failure)
    assert "`shoal doctor` visits them all" in str(failure)
