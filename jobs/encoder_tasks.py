"""Tasks that load an encoder: how many at a time, what each is given, and the model's files on their way to them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import pyarrow as pa
from pyspark import SparkContext
from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import DataFrame, SparkSession

from shoal.conf.errors import ConfigError
from shoal.conf.target import ENCODERS_PER_GPU
from shoal.jobs.model_files import send_model
from shoal.jobs.remote import without_java
from shoal.jobs.session import DYNAMIC, is_here, most_slots, slots
from shoal.udfs.encoder_spec import EncoderSpec

GPUS = "spark.executor.resource.gpu.amount"
GPUS_OF_ALL = "spark.task.resource.gpu.amount"

SETTLED_S = 5.0
WAIT_S = 30.0

_PROFILES: "WeakKeyDictionary[SparkContext, dict[tuple[int, int], ResourceProfile]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class EncoderTasks:
    """How many tasks that load an encoder run at once, and what each is given; no profile: what any task is given.

    most: how many may, when all executors have come that dynamic allocation may ask for.
    """

    slots: int
    most: int
    profile: ResourceProfile | None = None


def encoder_tasks(spark: SparkSession) -> EncoderTasks:
    """A task for each GPU of the executors, or for each share of one; without GPUs a task in every slot.

    Only where `spark.executor.resource.gpu.amount` is set and `spark.task.resource.gpu.amount` is not: that one gives
    a GPU to every task of Spark's, so that planning has no more tasks than there are GPUs. The cores of an executor
    are divided among its encoders. Raises ConfigError where executors come and go.
    """
    conf = spark.conf
    num_gpus = int(conf.get(GPUS, "0") or 0)
    if not num_gpus or conf.get(GPUS_OF_ALL, "0") not in ("", "0") or is_here(spark):
        now = slots(spark)
        return EncoderTasks(now, most_slots(conf, now))
    if without_java(spark):
        raise ConfigError(
            f"{GPUS} is {num_gpus} on the server, and a client of Spark Connect does not learn what its executors "
            f"have; have the server started with {GPUS_OF_ALL}: 1, which gives every task a GPU"
        )
    context = spark.sparkContext
    if conf.get(DYNAMIC, "false") == "true":
        raise ConfigError(
            f"{GPUS} is {num_gpus} and {DYNAMIC} is true, which Spark does not have together unless every task gets a "
            f"GPU; set {DYNAMIC}: false, or {GPUS_OF_ALL}: 1"
        )
    if context not in _PROFILES:
        wait_for_executors(spark)
    sharing = sharing_of(conf.get(ENCODERS_PER_GPU, "1") or "1")
    cores_of_executors = _cores_of_executors(spark)
    # A task that asks for more cores than an executor has would wait for ever.
    fewest = min(cores_of_executors, default=int(conf.get("spark.executor.cores", "1") or 1))
    cores = max(1, fewest // (num_gpus * sharing))
    per_executor = [min(num_gpus * sharing, num_cores // cores) for num_cores in cores_of_executors]
    num_slots = max(1, sum(per_executor))
    return EncoderTasks(num_slots, num_slots, _profile(context, cores, sharing))


def map_encoders(
    rows: DataFrame,
    spec: EncoderSpec,
    function: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]],
    ddl: str,
    *,
    barrier: bool = False,
) -> DataFrame:
    """`rows.mapInArrow(function, ddl)`, for a function that loads this encoder: its files and its GPU are there."""
    spark = rows.sparkSession
    send_model(spark, spec)
    return rows.mapInArrow(function, ddl, barrier=barrier, profile=encoder_tasks(spark).profile)


def wait_for_executors(spark: SparkSession) -> int:
    """Number of executors, once there are some and no more come; in local mode the driver is the one."""
    if is_here(spark):
        return 1
    end = time.monotonic() + WAIT_S
    found, since = 0, time.monotonic()
    while time.monotonic() < end and not (found and time.monotonic() - since >= SETTLED_S):
        now = len(_cores_of_executors(spark))
        if now != found:
            found, since = now, time.monotonic()
        time.sleep(0.2)
    return found


def failed_tasks(spark: SparkSession) -> dict[str, int]:
    """Tasks that have failed on each executor, a dead one too, by its name and where its log is; those without any, the
    driver of a local master, and what lies behind Spark Connect left out.

    One that could not read what a lost executor had written counts too.
    """
    if without_java(spark) or is_here(spark):
        return {}
    found = [each for each in _executors(spark, active=False) if each.failedTasks()]
    return {f"{each.id()} ({', '.join([each.hostPort(), *_log_of(each)])})": each.failedTasks() for each in found}


def _log_of(executor: Any) -> list[str]:
    """The address of what an executor has written, as the cluster manager shows it."""
    known = executor.executorLogs().get("stderr")
    return [] if known.isEmpty() else [known.get()]


def sharing_of(text: str) -> int:
    """How many tasks encode on one GPU at the same time, by the Spark property; ConfigError for what is no number."""
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"{ENCODERS_PER_GPU} is {text!r}; write how many tasks encode on one GPU at the same time: 1 or more"
        )
    return int(text)


def _cores_of_executors(spark: SparkSession) -> list[int]:
    """Cores that each executor offers, of those that are there now."""
    return [each.totalCores() for each in _executors(spark) if each.id() != "driver" and each.totalCores()]


def _executors(spark: SparkSession, *, active: bool = True) -> list[Any]:
    """Spark's own summaries of the driver and of the executors, of those that are there now or of all."""
    known = spark.sparkContext._jsc.sc().statusStore().executorList(active)  # type: ignore[attr-defined]
    return [known.apply(index) for index in range(known.size())]


def _profile(context: SparkContext, cores: int, sharing: int) -> ResourceProfile:
    """The profile for these tasks; the same one each time, because Spark keeps all that it has seen."""
    made = _PROFILES.setdefault(context, {})
    if (cores, sharing) not in made:
        wanted = TaskResourceRequests().cpus(cores).resource("gpu", 1 / sharing)
        made[cores, sharing] = ResourceProfileBuilder().require(wanted).build
    return made[cores, sharing]
