"""`shoal bench scale`: what each phase of a run reads, shuffles, writes and holds at a number of rows; for SCALE.md.

A first run and two nights of one hundredth change, one by comparing everything and one by the change feed. Vectors have
eight numbers, so that what is left is what grows with the rows: keys and hashes.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.conf.run import RunConfig, SparkConfig
from shoal.jobs.embed import embed
from shoal.jobs.hooks import Hooks
from shoal.jobs.meter import Figures, Laps, human, metering
from shoal.jobs.synthetic_source import Change, Changes, SyntheticSource

DIM = 8
MIN_ROWS = 1000
NIGHTLY = Change("random", 0.01)
NIGHTS: dict[str, Changes] = {"night, snapshot": "snapshot", "night, change feed": "auto"}

# The phase that ends with a step of Hooks.step; "encode" ends with its last wave.
PHASES = {
    "recovered": "start",
    "planned": "plan",
    "audited": "audit",
    "committed": "publish",
    "lease released": "record",
}


def bench_scale(num_rows: int, *, say: Callable[[str], None], settings: SparkConfig | None = None) -> dict[str, Any]:
    """Figures by run and phase; the document that `--json` prints. `settings`: how Spark is opened, a local master."""
    if num_rows < MIN_ROWS:
        raise ConfigError(f"--rows is {num_rows}; a hundredth of them changes, ask for {MIN_ROWS} or more")
    cores = len(os.sched_getaffinity(0))
    settings = settings or SparkConfig(master=f"local[{cores}]")
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, metering(settings, "shoal bench") as spark:
        source = SyntheticSource(spark, Path(folder), num_rows)
        source.create()
        runs = {"first run": _run(spark, source.run(DIM), say, "first run")}
        for name, changes in NIGHTS.items():
            source.apply(NIGHTLY, name)
            runs[name] = _run(spark, source.run(DIM, changes=changes), say, name)
        heap = spark._jvm.java.lang.Runtime.getRuntime().maxMemory()  # type: ignore[union-attr]
    return {"rows": num_rows, "dim": DIM, "cores": cores, "heap_limit": heap, "runs": runs}


def _run(spark: SparkSession, config: RunConfig, say: Callable[[str], None], name: str) -> dict[str, Any]:
    laps: dict[str, Figures] = {}
    one_at_a_time = Lock()
    with Laps(spark) as meter:

        def step(done: str) -> None:
            phase = "encode" if done.startswith("wave ") and done.endswith(" staged") else PHASES.get(done)
            with one_at_a_time:
                if phase:
                    laps[phase] = laps.get(phase, Figures()).followed_by(meter.lap())

        record = embed(spark, config, hooks=Hooks(step=step)).public()
    say(f"{name}: {sum(lap.seconds for lap in laps.values()):.1f} s, {record['difference']}")
    return {
        "difference": record["difference"],
        "status": record["status"],
        "rows": record["rows"],
        "encoded": record["chunks"]["encoded"],
        "phases": {phase: lap.public() for phase, lap in laps.items()},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    told = [f"{found['rows']:,} rows, {found['cores']} cores, heap up to {human(found['heap_limit'])}"]
    for name, run in found["runs"].items():
        told += [f"{name}: {run['encoded']:,} encoded, {run['difference']}"]
        told += [f"  {'phase':8} seconds      read  shuffled     wrote  heap held"]
        for phase, lap in run["phases"].items():
            read, shuffled, wrote, held = (
                human(lap[key]) for key in ("bytes_read", "shuffle_bytes", "bytes_written", "heap_held")
            )
            told.append(f"  {phase:8} {lap['seconds']:7.1f} {read:>9} {shuffled:>9} {wrote:>9} {held:>10}")
    return told
