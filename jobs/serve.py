"""`shoal serve`: published tables as SQL functions over JDBC, from one process, until it is told to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import RunError, first_line
from shoal.jobs.sql_functions import Functions, reranker_folder
from shoal.jobs.sql_parts import EMBED, literal
from shoal.jobs.sql_rerank import RERANK
from shoal.jobs.sql_text import names_of
from shoal.jobs.thrift import Endpoint, require_authentication, thrift_server

FOLLOW_S = 1.0
"""How often a table's log is asked for a newer version: two look-ups of one file."""

KEEP_WARM_BEATS = 30
"""Every so many looks a query keeps the Python workers, and the encoders in them: Spark ends idle ones after 60 s."""


def serve(
    spark: SparkSession,
    tables: Mapping[str, str],
    endpoint: Endpoint,
    catalog: Path,
    *,
    reranker: str | None = None,
    ready: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> None:
    """Serves until SIGTERM or SIGINT; `ready` is told once, when clients can connect.

    tables: function name -> path or catalog name; endpoint: a checked one; reranker: a cross-encoder, named as encoders
    are in a run file. Raises ConfigError for an endpoint that is open to others, DestinationError when a table is not
    there, ModelError when the cross-encoder is not, RunError when the server or Spark under it dies.
    """
    require_authentication(spark, endpoint, catalog)
    functions = Functions(spark, tables, say, reranker_folder(reranker) if reranker else None)
    # A pool of its own: what is looked up for following does not wait behind the clients' queries.
    spark.sparkContext.setLocalProperty("spark.scheduler.pool", "shoal")
    with _stopping(spark) as stop:
        functions.create()
        _keep_warm(spark, functions, say)
        with thrift_server(spark, endpoint):
            ready(document(functions, endpoint))
            _follow(spark, functions, stop, say)


def document(functions: Functions, endpoint: Endpoint) -> dict[str, Any]:
    """What `--json` prints when clients can connect."""
    served = functions.served.values()
    tables = {
        table.name: {"table": str(table.ref), "version": table.version, "functions": names_of(table)}
        for table in served
    }
    connect = None if endpoint.connect is None else f"sc://localhost:{endpoint.connect}"
    return {"status": "ready", "jdbc": endpoint.jdbc, "connect": connect, "tables": tables}


def lines(told: dict[str, Any]) -> list[str]:
    """The same for people."""
    shown = [f"ready: {told['jdbc']}"]
    shown += [f"Spark Connect: {told['connect']}"] if told["connect"] else []
    for name, table in told["tables"].items():
        shown.append(f"{name}: {table['table']} version {table['version']}: {', '.join(table['functions'])}")
    return shown


def _follow(spark: SparkSession, functions: Functions, stop: threading.Event, say: Callable[[str], None]) -> None:
    beats = 0
    while not stop.wait(FOLLOW_S):
        beats += 1
        try:
            rarely = beats % KEEP_WARM_BEATS == 0
            for name in functions.follow(retry=rarely):
                say(f"table '{name}' answers from version {functions.served[name].version} on")
            if rarely:
                _keep_warm(spark, functions, say)
        except (PySparkException, Py4JJavaError) as error:
            say(f"the tables could not be looked at, and will be again: {first_line(error)}")
        except (Py4JError, ConnectionError) as error:
            if stop.wait(FOLLOW_S):  # the signal went to the JVM too
                return
            raise RunError(
                f"Spark is gone ({first_line(error)}); start the server again, its log may say why",
                code="SERVER_FAILED",
            ) from error


def _keep_warm(spark: SparkSession, functions: Functions, say: Callable[[str], None]) -> None:
    """Has each table's encoder answer once, in its worker; what is wrong with one is told, and told to who asks it."""
    for table in functions.served.values():
        if table.encoder is None:
            continue
        try:
            spark.sql(f"SELECT {EMBED}('{table.encoder_key}', 'warm')").collect()
        except (PySparkException, Py4JJavaError) as error:
            say(f"table '{table.name}' cannot be searched by text: {first_line(error)}")
    if functions.reranker is not None:
        try:
            spark.sql(f"SELECT {RERANK}({literal(functions.reranker)}, 'warm', 'warm')").collect()
        except (PySparkException, Py4JJavaError) as error:
            say(f"answers cannot be reranked: {first_line(error)}")


@contextlib.contextmanager
def _stopping(spark: SparkSession) -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; what they did before comes back at the end.

    They also end all queries, those that this thread waits for among them.
    """
    stop = threading.Event()

    def cancel() -> None:
        with contextlib.suppress(Py4JError, OSError):  # the signal may have gone to the JVM too
            spark.sparkContext.cancelAllJobs()

    def on_signal(*_: Any) -> None:
        stop.set()
        threading.Thread(target=cancel, daemon=True).start()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
