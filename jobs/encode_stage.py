"""Sends the content to encode through the executors, wave by wave, into staging."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Event

from py4j.protocol import Py4JJavaError
from pyspark import inheritable_thread_target
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import WorkerError
from shoal.jobs.encoder_tasks import map_encoders
from shoal.jobs.layout import TableRef
from shoal.jobs.prepare import worker_error
from shoal.jobs.session import begin_group, cancel_group
from shoal.jobs.staging import append_wave
from shoal.udfs.canaries import Canaries
from shoal.udfs.encode_udf import make_encode
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.progress import ProgressTarget
from shoal.udfs.schema import ENCODE_OUTPUT_DDL

# While one wave commits and its last tasks run out, the next one's tasks have the free slots.
WAVES_IN_FLIGHT = 2

# What Spark says when a Python worker, or the executor around it, was gone before it had answered.
_DEATHS = (
    "Python worker exited unexpectedly",
    "ExecutorLostFailure",
    "Connection reset",
    "Broken pipe",
)


def encode_waves(
    spark: SparkSession,
    ref: TableRef,
    todo: DataFrame,
    num_waves: int,
    *,
    num_slots: int,
    run_id: str,
    spec: EncoderSpec,
    options: EncodeOptions,
    canaries: Canaries | None,
    progress: ProgressTarget | None,
    step: Callable[[str], None],
    staged: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda _: None,
) -> None:
    """Encodes `todo` and appends it to staging, a commit per wave; `step` is called before and after each commit.

    `staged` is called after it too.

    A wave that keeps killing its Python workers is encoded again with the encoder in a process of its own, and the
    chunk at fault becomes an error; `warn` is told. At the first wave that fails otherwise no further one is started
    and those in flight are cancelled; waves that have been committed stay. Raises WorkerError when an executor refuses
    (its canaries moved, no device), RunError otherwise.
    """
    encode_group = f"shoal-encode-{run_id}"
    stopped = Event()

    def attempt(wave: int, *, isolated: bool) -> None:
        how = ", isolated" if isolated else ""
        begin_group(spark, encode_group, f"shoal: encode wave {wave + 1} of {num_waves}{how}")
        target = None if progress is None else replace(progress, wave=wave)
        texts = in_slots(todo.where(F.col("wave") == wave), num_slots).select("content_hash", "text")
        function = make_encode(spec, options, canaries, target, isolated=isolated)
        append_wave(
            map_encoders(texts, spec, function, ENCODE_OUTPUT_DDL),
            ref,
            fingerprint=spec.fingerprint,
            run_id=run_id,
            wave=str(wave),
        )

    def encode(wave: int) -> None:
        step(f"wave {wave} started")
        try:
            attempt(wave, isolated=False)
        except (PySparkException, Py4JJavaError) as error:
            if stopped.is_set() or not killed_its_worker(error):
                raise
            warn(
                f"wave {wave + 1} of {num_waves} ended its Python workers (killed, crashed or hung); it is encoded "
                "again with the encoder in a process of its own, to find the chunks at fault"
            )
            step(f"wave {wave} isolated")
            attempt(wave, isolated=True)
        step(f"wave {wave} staged")
        staged()

    with ThreadPoolExecutor(WAVES_IN_FLIGHT, thread_name_prefix="shoal-wave") as pool:
        waiting = list(range(num_waves))
        running: set[Future[None]] = set()
        try:
            while waiting or running:
                while waiting and len(running) < WAVES_IN_FLIGHT:
                    running.add(pool.submit(inheritable_thread_target(spark)(encode), waiting.pop(0)))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException as error:
            stopped.set()
            cancel_group(spark, encode_group)
            if isinstance(error, (PySparkException, Py4JJavaError)):
                raise worker_error(error) from error
            raise


def killed_its_worker(error: PySparkException | Py4JJavaError) -> bool:
    """Whether a job failed because what ran it was gone, or its device: its chunks may be what ended it."""
    failure = worker_error(error)
    return failure.code == "DEVICE_FAILED" or (
        failure.code == WorkerError.default_code and any(words in str(error) for words in _DEATHS)
    )


def in_slots(rows: DataFrame, num_slots: int) -> DataFrame:
    """Puts each row into the partition that its `slot` names; before Spark 4.1 slots may share a partition."""
    by_id = getattr(rows, "repartitionById", None)
    if by_id is None:
        return rows.repartition(num_slots, "slot")
    return by_id(num_slots, F.col("slot"))
