"""`shoal index`: puts a table's rows into cells of like vectors, and says how many of them a search has to look in."""

from collections.abc import Callable
from typing import Any

from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.conf.run import MAX_CELLS
from shoal.jobs.indexing import RECALL, VERB, build
from shoal.jobs.operation import operating


def index(
    spark: SparkSession,
    table: str,
    *,
    cells: int | None = None,
    recall: float = RECALL,
    say: Callable[[str], None] = lambda _: None,
    step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The record of the build: `index` says what it is and what was measured.

    cells: how many (unset: by the size of the table). recall: share of the true neighbours that a search is to find.
    Raises ConfigError for settings out of range, DestinationError when there is no such table, RefusedError for one
    without vectors or that others have written to, BusyError when a run is alive on it.
    """
    if not 0 < recall <= 1:
        raise ConfigError(f"--recall is {recall}; it is a share of the true neighbours, above 0 and up to 1")
    if cells is not None and not 2 <= cells <= MAX_CELLS:
        raise ConfigError(f"--cells is {cells}; ask for 2 to {MAX_CELLS}")
    with operating(spark, table, VERB, say=say, step=step) as operation:
        return build(operation, cells=cells, recall=recall)


def lines(record: dict[str, Any]) -> list[str]:
    """The build for people."""
    made = record["index"]
    told = [
        f"indexed {record['table']} version {record['version']}: {made['rows']:,} vectors in {made['cells']:,} cells"
    ]
    for k, probes in sorted(made["probes"].items()):
        reached = "" if probes < made["cells"] else ", all there are: exact"
        told.append(f"{made['target']:.0%} of the {k} nearest are in {probes:,} cells{reached}")
    return [*told, f"run       {record['run_id']}"]
