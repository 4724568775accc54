"""`shoal bench nightly`: what a night costs, by how much of the source changed, and what thirty of them leave behind.

The hash encoder makes vectors of 384 numbers at next to no cost, so that what is left is Shoal's and Delta's own work.
The source is a Delta table with a change feed. Each change starts from the same published table; nights in a row go on.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.conf.run import RunConfig, SparkConfig
from shoal.jobs.compaction import size_of
from shoal.jobs.embed import embed
from shoal.jobs.meter import bytes_on_disk, forget_logs, human, metered, metering
from shoal.jobs.synthetic_source import Change, Changes, Maintenance, SyntheticSource

DIM = 384
MIN_CHUNKS = 1000
NIGHTLY = Change("random", 0.01)

NIGHTS: tuple[tuple[Change, Changes], ...] = (
    (Change("none"), "auto"),
    (Change("random", 0.001), "auto"),
    (Change("random", 0.01), "auto"),
    (Change("random", 0.1), "auto"),
    (Change("recent", 0.001), "auto"),
    (Change("recent", 0.01), "auto"),
    (Change("recent", 0.1), "auto"),
    (Change("metadata", 0.01), "auto"),
    (Change("none"), "snapshot"),
    (Change("random", 0.01), "snapshot"),
)
"""Each with the run's `source.changes`."""

MODES: tuple[Maintenance, ...] = ("manual", "auto")


def bench_nightly(num_chunks: int, num_nights: int, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Figures of a full run, of each of NIGHTS, and of nights in a row; the document that `--json` prints."""
    if num_chunks < MIN_CHUNKS:
        raise ConfigError(f"--chunks is {num_chunks}; a thousandth of them changes, ask for {MIN_CHUNKS} or more")
    if num_nights < 0:
        raise ConfigError(f"--nights is {num_nights}; ask for 0 (none in a row) or more")
    cores = len(os.sched_getaffinity(0))
    settings = SparkConfig(master=f"local[{cores}]")
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, metering(settings, "shoal bench") as spark:
        bench = _Bench(spark, Path(folder), num_chunks, say)
        return {
            "chunks": num_chunks,
            "dim": DIM,
            "cores": cores,
            "full": bench.full(),
            "changes": [bench.after(change, changes) for change, changes in NIGHTS],
            "nights": {mode: bench.in_a_row(num_nights, mode) for mode in MODES} if num_nights else {},
        }


@dataclass
class _Bench:
    """`live` is what runs work on, `base` what a first run left there."""

    spark: SparkSession
    folder: Path
    num_chunks: int
    say: Callable[[str], None]

    def full(self) -> dict[str, Any]:
        """The first run, which encodes everything."""
        source = self._source()
        source.create()
        found = self._run(source.run(DIM))
        _copy(self.folder / "live", self.folder / "base")
        self.say(f"full run: {found['seconds']:.1f} s")
        return found

    def after(self, change: Change, changes: Changes) -> dict[str, Any]:
        """One night after one change."""
        source = self._anew()
        source.apply(change, f"{change.which} {change.share}")
        named = {"which": change.which, "share": change.share, "changes": changes}
        found = self._run(source.run(DIM, changes=changes))
        self.say(f"{_name(named)}: {found['seconds']:.1f} s")
        return named | found

    def in_a_row(self, num_nights: int, maintenance: Maintenance) -> list[dict[str, Any]]:
        """Nights of one hundredth random change on one and the same table."""
        source = self._anew()
        nights = []
        for night in range(1, num_nights + 1):
            source.apply(NIGHTLY, f"night {night}")
            found = self._run(source.run(DIM, maintenance=maintenance))
            self.say(
                f"night {night}, maintenance {maintenance}: {found['seconds']:.1f} s, {found['files_after']} files"
            )
            nights.append({"night": night, **found})
        return nights

    def _source(self) -> SyntheticSource:
        return SyntheticSource(self.spark, self.folder / "live", self.num_chunks)

    def _anew(self) -> SyntheticSource:
        shutil.rmtree(self.folder / "live")
        _copy(self.folder / "base", self.folder / "live")
        forget_logs(self.spark)
        return self._source()

    def _run(self, config: RunConfig) -> dict[str, Any]:
        docs = Path(config.destination.name)
        table = f"delta.`{docs}`"
        files_before = size_of(self.spark, table).files if docs.is_dir() else 0
        on_disk = bytes_on_disk(docs)
        with metered(self.spark) as figures:
            record = embed(self.spark, config).public()
        size = size_of(self.spark, table)
        return {
            **figures.public(),
            "table_bytes_added": bytes_on_disk(docs) - on_disk,
            "table_bytes": size.bytes,
            "files_before": files_before,
            "files_after": size.files,
            "deleted_rows": size.deleted_rows,
            "status": record["status"],
            "difference": record["difference"],
            "rows": record["rows"],
            "encoded": record["chunks"]["encoded"],
        }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    told = [
        f"{found['chunks']:,} chunks of {found['dim']} numbers, {found['cores']} cores",
        f"{'':30} seconds      read     wrote  to table  files before, after  rows in deletion vectors",
        _line("full run", found["full"]),
        *[_line(_name(night), night) for night in found["changes"]],
    ]
    for mode, nights in found["nights"].items():
        told += [_line(f"night {night['night']}, maintenance {mode}", night) for night in nights]
    return told


def _name(night: dict[str, Any]) -> str:
    name = f"{night['which']} {night['share']:.1%}" if night["share"] else "no change"
    return name if night["changes"] == "auto" else f"{name}, snapshot"


def _line(name: str, night: dict[str, Any]) -> str:
    read, wrote, to_table = (human(night[key]) for key in ("bytes_read", "bytes_written", "table_bytes_added"))
    files = f"{night['files_before']} {night['files_after']}"
    return (
        f"{name:30} {night['seconds']:7.1f} {read:>9} {wrote:>9} {to_table:>9} {files:>20} {night['deleted_rows']:>25,}"
    )


def _copy(source: Path, target: Path) -> None:
    """Copies tables; data files, which nobody ever writes to again, are linked."""

    def copy(one: str, other: str) -> str:
        if one.endswith(".parquet") and "_delta_log" not in one:
            os.link(one, other)
            return other
        return str(shutil.copy2(one, other))

    shutil.copytree(source, target, copy_function=copy)
