"""What a piece of work costs, for the benches: seconds, bytes by Hadoop's count, shuffle, what the heap holds.

Hadoop counts every byte that this JVM reads and writes, Delta's log and Shoal's small files included, but does not see
Parquet's vectored reads: `metering` turns those off. For local masters: other executors count for themselves.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

from pyspark.sql import SparkSession

from shoal.conf.run import SparkConfig
from shoal.jobs.session import open_spark

UNSEEN = "parquet.hadoop.vectored.io.enabled"
"""The setting of Parquet's reader that hides bytes from Hadoop's count."""


@dataclass
class Figures:
    """Of one piece of work; `heap_held` are the bytes that live objects of the JVM take when it is over."""

    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    shuffle_bytes: int = 0
    heap_held: int = 0

    def followed_by(self, other: "Figures") -> "Figures":
        """Of both pieces; of the heap what was held at the end of either, whichever is more."""
        return Figures(
            self.seconds + other.seconds,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.shuffle_bytes + other.shuffle_bytes,
            max(self.heap_held, other.heap_held),
        )

    def public(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": round(self.seconds, 2)}


class Laps:
    """Figures of pieces of work that follow each other: `lap` ends one and begins the next.

    At the beginning Delta forgets its logs, and reads them anew as a driver that has just started would.
    """

    def __init__(self, spark: SparkSession) -> None:
        self.spark = spark

    def __enter__(self) -> Self:
        forget_logs(self.spark)
        self._before, self._began = self._counts(), time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    def lap(self) -> Figures:
        """Waits for a full garbage collection, whose time counts for neither piece."""
        seconds, counts = time.monotonic() - self._began, self._counts()
        read, written, shuffled = (now - before for now, before in zip(counts, self._before, strict=True))
        figures = Figures(seconds, read, written, shuffled, self._held())
        self._before, self._began = self._counts(), time.monotonic()
        return figures

    def _counts(self) -> tuple[int, int, int]:
        statistics = list(self.spark._jvm.org.apache.hadoop.fs.FileSystem.getAllStatistics())  # type: ignore[union-attr]
        executors = self.spark.sparkContext._jsc.sc().statusStore().executorList(False)  # type: ignore[union-attr]
        return (
            sum(one.getBytesRead() for one in statistics),
            sum(one.getBytesWritten() for one in statistics),
            sum(executors.apply(index).totalShuffleWrite() for index in range(executors.size())),
        )

    def _held(self) -> int:
        runtime = self.spark._jvm.java.lang.Runtime.getRuntime()  # type: ignore[union-attr]
        runtime.gc()
        return int(runtime.totalMemory() - runtime.freeMemory())


@contextmanager
def metering(settings: SparkConfig, app_name: str) -> Iterator[SparkSession]:
    """A session whose figures are true; one that was there before is left running, as it was."""
    running = SparkSession.getActiveSession()
    spark = open_spark(settings, app_name=app_name)
    before = spark.conf.get(UNSEEN, None)
    spark.conf.set(UNSEEN, "false")
    try:
        yield spark
    finally:
        if running is None:
            spark.stop()
        elif before is None:
            spark.conf.unset(UNSEEN)
        else:
            spark.conf.set(UNSEEN, before)


@contextmanager
def metered(spark: SparkSession) -> Iterator[Figures]:
    """Figures that are filled in when the block ends."""
    figures = Figures()
    with Laps(spark) as laps:
        yield figures
        figures.__dict__.update(laps.lap().__dict__)


@dataclass
class WorkerMemory:
    """`peak`: the most bytes that any one Python worker of this machine's Spark had resident while it was watched."""

    peak: int = 0


@contextmanager
def watched_workers(interval_s: float = 0.1) -> Iterator[WorkerMemory]:
    """Looks at the workers below this process every so often, on Linux; a worker that lives for less is not seen.

    The kernel's own high-water mark is read, so that nothing between two looks is missed; it covers a worker's whole
    life, and pages that it shares with the daemon that it was forked from.
    """
    memory, stop = WorkerMemory(), Event()

    def watch() -> None:
        while not stop.wait(interval_s):
            memory.peak = max(memory.peak, *_worker_peaks(), 0)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        stop.set()
        thread.join()


def _worker_peaks() -> list[int]:
    """High-water marks, in bytes, of the processes below this one that run Python for Spark."""
    parents: dict[int, int] = {}
    peaks: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
            is_worker = b"pyspark.daemon" in (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended since
        parents[int(folder.name)] = int(status["PPid"])
        if is_worker and "VmHWM" in status:
            peaks[int(folder.name)] = int(status["VmHWM"].split()[0]) * 1024
    return [peak for process, peak in peaks.items() if os.getpid() in _ancestors(process, parents)]


def _ancestors(process: int, parents: dict[int, int]) -> set[int]:
    found: set[int] = set()
    while (process := parents.get(process, 0)) and process not in found:
        found.add(process)
    return found


def forget_logs(spark: SparkSession) -> None:
    """Drops what Delta has in memory of tables: needed where another table now lies at the same path."""
    spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]


def bytes_on_disk(folder: Path) -> int:
    """Bytes of all files below a folder, 0 when it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def human(number: float) -> str:
    """`13.4 MB`: bytes for people, by powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
