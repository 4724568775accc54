"""The one place that opens Spark: Delta on the class path, Spark's own output in a log file."""

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakKeyDictionary

from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkException
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.conf import RuntimeConfig

from shoal.conf.errors import ConfigError, RunError, first_line
from shoal.conf.run import SparkConfig
from shoal.jobs.jars import JARS_OF_SPARK, Artifact, connectors, delta
from shoal.jobs.remote import ADDRESS, address_of, is_remote, on_databricks, open_on_databricks, open_remote

DELTA_EXTENSION = "io.delta.sql.DeltaSparkSessionExtension"
DELTA_CATALOG = "org.apache.spark.sql.delta.catalog.DeltaCatalog"

CLASS_ARCHIVE = Path(sys.prefix) / "shoal-classes.jsa"
"""The Java classes of Spark and Delta as the JVM wants them in memory, if `class_archive.py` has put them there."""

SUBMITTED = "SHOAL_SUBMITTED"
"""Environment variable of a driver that `shoal submit` starts: PYSPARK_SUBMIT_ARGS says all that Spark is told."""

LOGGED_RUN = "mdc.shoal_run"
"""A local property that Spark hands to the loggers of tasks."""

DRIVER_LOG = "SHOAL_DRIVER_LOG"
"""Environment variable of such a driver; `json`: its Spark logs JSON lines."""

_AS_JSON = "spark.log.structuredLogging.enabled"
_JSON_LOG = "-Dlog4j2.configurationFile=classpath:org/apache/spark/log4j2-json-layout.properties"

_DELTA = {"spark.sql.extensions": DELTA_EXTENSION, "spark.sql.catalog.spark_catalog": DELTA_CATALOG}
_SESSION_DEFAULTS = {
    # Delta would refuse every version but the newest that was written longer ago than `retain`, also one that was the
    # newest until a minute ago; whether its files are still there is seen when they are read.
    "spark.databricks.delta.vacuum.enforceTimeTravelWithinDeletedFileRetentionDuration": "false",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "2048",
    "spark.sql.execution.arrow.pyspark.validateSchema.enabled": "true",
    "spark.sql.execution.pyspark.udf.faulthandler.enabled": "true",
    # So many rows are held at once, whatever their size: of a Parquet file, and of a window before it may spill. At
    # 4,096, Spark's own number, texts of 200 kB do not fit into the memory of an ordinary executor.
    "spark.sql.parquet.columnarReaderBatchSize": "128",
    "spark.sql.windowExec.buffer.in.memory.threshold": "128",
    "spark.sql.session.timeZone": "UTC",
    "spark.ui.showConsoleProgress": "false",
}
_DEFAULTS = {**_DELTA, **_SESSION_DEFAULTS}
SNAPSHOT_TASKS = "spark.databricks.delta.snapshotPartitions"
DELTA_S_OWN = 50
_LOCAL_DEFAULTS = {
    SNAPSHOT_TASKS: "2",
    "spark.sql.shuffle.partitions": "8",
    # As many tasks as this list the files for each VACUUM, ten thousand if nobody says otherwise.
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "8",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.ui.enabled": "false",
}

_BRIEF = {"spark.sql.codegen.factoryMode": "NO_CODEGEN", "spark.sql.codegen.wholeStage": "false"}
"""For verbs of a few small queries: compiling their plans takes longer than all the rows that they read."""

DYNAMIC = "spark.dynamicAllocation.enabled"
NO_LIMIT = 2**31 - 1
"""How Spark says that there may be any number of executors."""

_SLOTS: "WeakKeyDictionary[SparkSession, int]" = WeakKeyDictionary()
"""Of servers of Spark Connect, which are asked by a job."""

EXCLUDING = "spark.excludeOnFailure."
_CLUSTER_DEFAULTS = {
    # A task that an executor fails twice (a broken GPU, a full disk) goes elsewhere, instead of failing there so often
    # that the run ends. Spark's own limit, one attempt for each executor, takes small clusters their retries.
    f"{EXCLUDING}taskAndStage.enabled": "true",
    f"{EXCLUDING}task.maxTaskAttemptsPerExecutor": "2",
    f"{EXCLUDING}task.maxTaskAttemptsPerNode": "3",
    # The rule is for tasks alone: a store that is out of order for a moment fails some on every executor, and without
    # any executor left Spark ends the run.
    f"{EXCLUDING}stage.maxFailedTasksPerExecutor": "1000000",
}
"""For masters that are not local, unless the user says anything of it; Spark wants fewer attempts than it allows."""


def open_spark(
    settings: SparkConfig,
    *,
    app_name: str,
    log_file: Path | None = None,
    places: Iterable[str] = (),
    brief: bool = False,
) -> SparkSession:
    """The running session if there is one, else a new one; what spark-submit set wins over our defaults.

    With `spark.remote`, or SPARK_REMOTE in the environment, it is one of Spark Connect's; on Databricks it is that of
    the cluster.

    places: what will be read and written, for the connectors of object stores, which come from Maven where need be.
    brief: whether a local session is for a few small queries, which nothing is compiled for that takes long.
    Spark's and the Python workers' output goes to `log_file` (default: `default_log_file()`). Raises RunError when the
    JVM does not start, ConfigError when a running session lacks Delta.
    """
    if on_databricks():
        return open_on_databricks(settings, _SESSION_DEFAULTS)
    active = SparkSession.getActiveSession()
    if active is not None:
        _require_delta(active)
        return active
    if address := address_of(settings):
        remote = open_remote(address, settings, _DEFAULTS)
        _require_delta(remote)
        return remote
    # Spark would go where it points, whatever the settings say.
    os.environ.pop(ADDRESS, None)
    log_file = log_file or default_log_file()
    master = settings.master
    try:
        if SUBMITTED in os.environ:
            # What the submission says, SparkConf learns from a JVM that has been started with it.
            _start_jvm(None, log_file, delta().fetched(), as_json=os.environ.get(DRIVER_LOG) == "json")
        wanted = connectors(places, os.environ.get("SPARK_HOME"))
        conf, class_path = _configured(settings, app_name, wanted, brief=brief)
        master = conf.get("spark.master")
        _start_jvm(conf, log_file, class_path, brief=brief, as_json=logs_json(dict(conf.getAll())))
        spark = SparkSession.builder.config(conf=conf).getOrCreate()
    except Exception as error:
        raise RunError(
            f"spark.master '{master}': Spark did not start ({first_line(error)}); "
            f"Java 17 has to be on PATH or in JAVA_HOME. Spark's own log: {log_file}",
            code="SPARK_UNAVAILABLE",
        ) from error
    _require_delta(spark)
    return spark


def running_session() -> SparkSession:
    """The session with Java that this process has opened, from whatever thread; RunError where there is none.

    ConfigError where there is one of Spark Connect.
    """
    if SparkContext._active_spark_context is None:
        if "SPARK_CONNECT_MODE_ENABLED" in os.environ:
            raise ConfigError(
                "an encoder in a store does not work through Spark Connect, where Shoal has no Java to read it with; "
                "do this with a Spark of your own",
                code="NOT_BY_CONNECT",
            )
        raise RunError("no Spark session is open in this process; open one first", code="SPARK_UNAVAILABLE")
    return SparkSession.getActiveSession() or SparkSession.builder.getOrCreate()


def _configured(
    settings: SparkConfig, app_name: str, wanted: Iterable[Artifact] = (), *, brief: bool = False
) -> tuple[SparkConf, list[Path]]:
    """What Spark is to be told, and the jars for the class path of a JVM that is yet to start."""
    conf = SparkConf()
    conf.setAppName(app_name)
    if settings.master:
        conf.set("spark.master", settings.master)
    conf.setIfMissing("spark.master", "local[*]")
    if settings.driver_memory:
        conf.set("spark.driver.memory", settings.driver_memory)
    for key, value in settings.conf.items():
        conf.set(key, value)
    defaults = dict(_DEFAULTS)
    master = conf.get("spark.master") or ""
    if master.startswith("local"):
        defaults |= _LOCAL_DEFAULTS | (_BRIEF if brief else {})
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    elif int(conf.get("spark.task.maxFailures", "4") or 4) > 3 and not any(
        key.startswith(EXCLUDING) for key, _ in conf.getAll()
    ):
        defaults |= _CLUSTER_DEFAULTS
        if conf.get(DYNAMIC, "false") != "true":
            # So long a task that may go nowhere waits for an executor that joins, which nobody has been asked for.
            defaults["spark.scheduler.excludeOnFailure.unschedulableTaskSetTimeout"] = "30s"
    lacking = [artifact for artifact in (delta(), *wanted) if not _has(conf, artifact.word)]
    # Asking Ivy takes seconds at every start; the executors of a cluster need what it has found.
    known = [artifact for artifact in lacking if is_local(master) and artifact.fetched()]
    class_path = [jar for artifact in known for jar in artifact.fetched()]
    if packages := [artifact.coordinates for artifact in lacking if artifact not in known]:
        _add(conf, "spark.jars.packages", packages)
        _add(conf, "spark.jars.excludes", [JARS_OF_SPARK])
    for key, value in defaults.items():
        conf.setIfMissing(key, value)
    return conf, class_path


def logs_json(properties: Mapping[str, str]) -> bool:
    """Whether these properties want JSON lines as logs; a JVM that Python starts has to be told so by an option."""
    return properties.get(_AS_JSON) == "true"


def _start_jvm(
    conf: SparkConf | None, log_file: Path, class_path: list[Path], *, brief: bool = False, as_json: bool = False
) -> None:
    """Starts the JVM of this process, unless it has one or belongs to spark-submit."""
    if "PYSPARK_GATEWAY_PORT" in os.environ or SparkContext._gateway is not None:
        return
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("a") as log, _launching(class_path, brief=brief, as_json=as_json):
        gateway = launch_gateway(conf, {"stdout": log, "stderr": log})
    SparkContext._ensure_initialized(gateway=gateway, conf=conf)


def default_log_file() -> Path:
    """Where Spark's chatter goes: a file of this process in the user's temporary folder."""
    return Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}" / f"spark-{os.getpid()}.log"


@contextmanager
def _launching(class_path: list[Path], *, brief: bool = False, as_json: bool = False) -> Iterator[None]:
    """The environment that the JVM starts in: it adds to what spark-defaults.conf says, where settings would replace.

    An archive of other jars or of another JVM is ignored by the JVM, which would say so. brief: the JVM compiles
    quickly instead of well. as_json: it logs JSON lines.
    """
    archive = f'-XX:SharedArchiveFile="{CLASS_ARCHIVE}" -Xlog:cds=off -Xlog:cds+dynamic=off'
    options = [archive] * CLASS_ARCHIVE.exists() + ["-XX:TieredStopAtLevel=1"] * brief + [_JSON_LOG] * as_json
    added = {
        "SPARK_DIST_CLASSPATH": os.pathsep.join(str(jar) for jar in class_path),
        "SPARK_SUBMIT_OPTS": " ".join(options),
    }
    separators = {"SPARK_DIST_CLASSPATH": os.pathsep, "SPARK_SUBMIT_OPTS": " "}
    before = {name: os.environ.get(name) for name in added}
    try:
        for name, value in added.items():
            if value:
                os.environ[name] = separators[name].join(part for part in (before[name], value) if part)
        yield
    finally:
        for name, former in before.items():
            if former is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = former


@contextmanager
def with_settings(spark: SparkSession, wanted: Mapping[str, str]) -> Iterator[None]:
    """Session settings for the length of a statement; what the user had set is put back."""
    before: dict[str, str | None] = {name: spark.conf.get(name, None) for name in wanted}
    try:
        for name, value in wanted.items():
            spark.conf.set(name, value)
        yield
    finally:
        for name, former in before.items():
            if former is None:
                spark.conf.unset(name)
            else:
                spark.conf.set(name, former)


@contextmanager
def described(spark: SparkSession, text: str, run_id: str) -> Iterator[None]:
    """What Spark's UI calls the jobs of this thread for the length of a block, and whose they are in logs.

    Structured logs, and patterns with %X{mdc.shoal_run}, have the run with every line of a task and of this thread.
    """
    if is_remote(spark):
        tags = [f"shoal: {run_id}", text.replace(",", ";")]
        for tag in tags:
            spark.addTag(tag)
        try:
            yield
        finally:
            for tag in tags:
                spark.removeTag(tag)
        return
    context = spark.sparkContext
    wanted = {"spark.job.description": text, LOGGED_RUN: run_id}
    before = {name: context.getLocalProperty(name) for name in wanted}
    try:
        for name, value in wanted.items():
            context.setLocalProperty(name, value)
        _log_as_of_the_run(context)
        yield
    finally:
        for name, former in before.items():
            context.setLocalProperty(name, former)  # type: ignore[arg-type] # None takes it away
        _log_as_of_the_run(context)


def _log_as_of_the_run(context: SparkContext) -> None:
    """Has what the JVM does for this thread logged as its jobs are; Spark sees to tasks alone."""
    if on_databricks():
        return
    logger = context._jvm.org.slf4j.MDC  # type: ignore[union-attr] # there is a JVM
    run_id = context.getLocalProperty(LOGGED_RUN)
    if run_id is None:
        logger.remove(LOGGED_RUN)
    else:
        logger.put(LOGGED_RUN, run_id)


def begin_group(spark: SparkSession, group: str, text: str) -> None:
    """Makes the jobs that this thread starts from here on members of a group; text: what Spark's UI calls them."""
    if is_remote(spark):
        spark.addTag(group)
    else:
        spark.sparkContext.setJobGroup(group, text, interruptOnCancel=True)
        _log_as_of_the_run(spark.sparkContext)


def cancel_group(spark: SparkSession, group: str) -> None:
    """Ends the jobs of a group, and their tasks; whoever asks has an error to tell, so that of a server is not told."""
    if is_remote(spark):
        with suppress(PySparkException):
            spark.interruptTag(group)
    else:
        spark.sparkContext.cancelJobGroup(group)


def is_local(master: str) -> bool:
    """Whether the driver does the work itself, so that all it has is there."""
    return re.match(r"local(\[|$)", master) is not None


def is_here(spark: SparkSession) -> bool:
    """Whether all work of a session is done in this process and its children, on this machine."""
    return not is_remote(spark) and is_local(spark.sparkContext.master or "")


def slots(spark: SparkSession) -> int:
    """Tasks that run at the same time, as far as Spark knows now."""
    if is_remote(spark):
        if spark not in _SLOTS:
            # Nothing tells a client, but a range has as many parts.
            _SLOTS[spark] = spark.range(1 << 12).select(F.spark_partition_id()).distinct().count()
        return _SLOTS[spark]
    return max(1, spark.sparkContext.defaultParallelism)


def most_slots(conf: SparkConf | RuntimeConfig, now: int) -> int:
    """Slots with as many executors as dynamic allocation may ask for; `now`: what those have that are there."""
    most = int(conf.get("spark.dynamicAllocation.maxExecutors", "") or NO_LIMIT)
    if conf.get(DYNAMIC, "false") != "true" or most >= NO_LIMIT:
        return max(1, now)
    tasks = int(conf.get("spark.executor.cores", "1") or 1) // int(conf.get("spark.task.cpus", "1") or 1)
    return max(1, now, most * max(1, tasks))


def fitted(spark: SparkSession) -> dict[str, str]:
    """What a session is to be told for the length of a run: as many tasks for Delta's log as the cluster has slots.

    Delta's own number, which is the most, is what a small run on a small cluster mostly does. Nothing where somebody
    has decided on one, or where Delta is not the open one.
    """
    if on_databricks() or spark.conf.get(SNAPSHOT_TASKS, None) is not None:
        return {}
    num_slots = most_slots(spark.conf, slots(spark))
    return {SNAPSHOT_TASKS: str(num_slots)} if num_slots < DELTA_S_OWN else {}


def _has(conf: SparkConf, word: str) -> bool:
    keys = ("spark.jars", "spark.jars.packages", "spark.driver.extraClassPath")
    return any(word in (conf.get(key) or "") for key in keys)


def _add(conf: SparkConf, key: str, values: list[str]) -> None:
    """Adds to a list that the user may have begun."""
    conf.set(key, ",".join([*filter(None, [conf.get(key)]), *values]))


def _require_delta(spark: SparkSession) -> None:
    found = spark.conf.get("spark.sql.extensions", "") or ""
    if DELTA_EXTENSION not in found:
        raise ConfigError(
            f"spark.sql.extensions of the running session is '{found}'; Shoal needs {DELTA_EXTENSION} in it and "
            f"spark.sql.catalog.spark_catalog={DELTA_CATALOG}"
        )
