"""`shoal restore`: rows, schema, identity, index build and recorded state of an earlier version, in one commit."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, DestinationError, RefusedError, RunError, ShoalError
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.layout import is_delta
from shoal.jobs.operation import Operation, operating, table_of_ours
from shoal.jobs.published import HASHES, WITHOUT_DATA_CHANGE, Commit, commits, readable

VERB = "restore"
RESTORED, UNCHANGED = "restored", "unchanged"

# Versions that an error message names, and those that are looked at to find which can still be restored.
NUM_NAMED, NUM_TRIED = 5, 12


@dataclass(frozen=True)
class Wanted:
    """Which version a user asks for; exactly one of the three is set."""

    to: int | None = None
    run: str | None = None
    before: datetime | None = None

    def __post_init__(self) -> None:
        if [self.to, self.run, self.before].count(None) != 2:
            raise ConfigError("name exactly one of --to VERSION, --run RUN and --before TIME")


def parse_time(text: str) -> datetime:
    """A time as ISO 8601 has it; one without a zone is UTC, as `shoal history` shows times."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"--before '{text}' is no time; write one such as 2026-01-31 or 2026-01-31T06:00:00Z"
        ) from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def restore(
    spark: SparkSession,
    table: str,
    wanted: Wanted,
    *,
    say: Callable[[str], None] = lambda _: None,
    step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The record of the restore; `status` is unchanged where readers see that version already, and nothing was done.

    Raises ConfigError or DestinationError for a version that is not there, RefusedError for one that must not come
    back (others wrote it, rows have been purged since), RunError where its files are gone.
    """
    # What can be refused without the lease is refused before it is taken.
    published = table_of_ours(spark, table)
    history = list(commits(spark, published.ref))
    _base(history, _target(spark, table, history, wanted))
    with operating(spark, table, VERB, say=say, step=step) as operation:
        history = list(commits(spark, operation.ref))
        target = _target(spark, table, history, wanted)
        base = _base(history, target)
        if all(commit.operation in WITHOUT_DATA_CHANGE for commit in history if commit.version > target.version):
            say(f"table {operation.ref} is at version {target.version} already")
            return operation.record(UNCHANGED, base, **_more(target, base), version=operation.published.version)
        say(f"restoring version {target.version} of {operation.ref}")
        step("restore planned")
        try:
            return operation.commit(
                f"RESTORE TABLE {operation.ref.sql} TO VERSION AS OF {target.version}",
                RESTORED,
                base,
                **_more(target, base),
            )
        except RunError as error:
            if type(error) is not RunError or _is_readable(operation, target):
                raise
            raise _gone(operation, history, target) from error


def _more(target: Commit, base: dict[str, Any]) -> dict[str, Any]:
    """What the record of a restore says, beside what the run said that made the version."""
    return {
        "restored_to": target.version,
        "reason": f"restored to version {target.version} of run {base['run_id']}",
    }


def _target(spark: SparkSession, table: str, history: list[Commit], wanted: Wanted) -> Commit:
    """The commit whose version is meant, newest first in `history`."""
    if wanted.to is not None:
        found = next((commit for commit in history if commit.version == wanted.to), None)
        if found is None:
            raise DestinationError(
                f"--to {wanted.to}: the log of table '{table}' has the versions {history[-1].version} to "
                f"{history[0].version}{_ended(history)}; `shoal history` lists them",
                code="VERSION_GONE",
            )
        return found
    ours = [commit for commit in history if commit.state is not None]
    if wanted.run is not None:
        found = next((c for c in ours if c.state is not None and c.state.run_id == wanted.run), None)
        if found is None:
            raise _no_such_run(spark, table, ours, wanted.run, history)
        return found
    assert wanted.before is not None  # noqa: S101 - one of the three is set
    limit = wanted.before.timestamp()
    found = next((commit for commit in ours if commit.timestamp.timestamp() < limit), None)
    if found is None:
        first = ours[-1].timestamp.astimezone(UTC).isoformat(timespec="seconds") if ours else "none"
        raise DestinationError(
            f"--before {wanted.before.isoformat()}: the first publication that table '{table}' still has is of {first}"
            f"{_ended(history)}; name a later time",
            code="VERSION_GONE",
        )
    return found


def _base(history: list[Commit], target: Commit) -> dict[str, Any]:
    """The record of the run that made the target version; RefusedError where that version must not come back."""
    purged = [c for c in history if c.version > target.version and c.state and c.state.record.get("verb") == "purge"]
    if purged:
        raise RefusedError(
            f"version {target.version}: rows were purged since, by version {purged[-1].version}, and rows erased in "
            f"between stay erased; restore version {purged[0].version} or a later one",
            code="VERSION_PURGED",
        )
    for commit in history:
        if commit.version > target.version:
            continue
        if commit.state is not None:
            return commit.state.record
        if commit.operation not in WITHOUT_DATA_CHANGE:
            raise RefusedError(
                f"version {target.version}: version {commit.version} ({commit.operation} by "
                f"{commit.user or 'unknown'}) was not written by Shoal, and what it changed has not been checked; "
                f"restore one of the publications{_named(history)}",
                code="VERSION_FOREIGN",
            )
    raise RefusedError(
        f"version {target.version}: the log no longer has the commit of the run that made it, so what it recorded "
        f"cannot come back; restore one of the publications{_named(history)}",
        code="VERSION_GONE",
    )


def _named(history: list[Commit]) -> str:
    versions = [str(commit.version) for commit in history if commit.state is not None][:NUM_NAMED]
    return f" (the newest are {', '.join(versions)})" if versions else ""


def _ended(history: list[Commit]) -> str:
    """Who took the versions before away, where that was a purge."""
    if any(commit.state and commit.state.record.get("verb") == "purge" for commit in history):
        return " (a purge ended what was before)"
    return ""


def _no_such_run(spark: SparkSession, table: str, ours: list[Commit], run: str, history: list[Commit]) -> ShoalError:
    ref = table_of_ours(spark, table).ref
    known = None
    if is_delta(spark, ref.runs):
        records = Bookkeeper(spark, ref, lambda _: None).records()
        known = next((record for record in records if record["run_id"] == run), None)
    if known is None:
        newest = [commit.state.run_id for commit in ours if commit.state][:NUM_NAMED]
        return ConfigError(f"--run {run}: table '{table}' has no such run; the newest are {', '.join(newest)}")
    if known.get("version") is None or known["status"] in ("unchanged", "vacuumed", "optimized"):
        return ConfigError(
            f"--run {run}: it published nothing (status {known['status']}); name a publication{_named(history)}"
        )
    return DestinationError(
        f"--run {run}: it published version {known['version']}, which the log of table '{table}' no longer has"
        f"{_ended(history)}; name a newer one{_named(history)}",
        code="VERSION_GONE",
    )


def _is_readable(operation: Operation, commit: Commit) -> bool:
    try:
        rows = operation.ref.read(operation.spark, commit.version)
    except (PySparkException, Py4JJavaError):
        # Delta itself refuses what is older than the table's retention, whether its files are there or not.
        return False
    return readable(rows, *HASHES)


def _gone(operation: Operation, history: list[Commit], target: Commit) -> DestinationError:
    """The error for a version whose files are missing, with the versions that are not: each is looked at."""
    left = []
    for commit in [commit for commit in history if commit.state is not None][:NUM_TRIED]:
        if not _is_readable(operation, commit):
            break
        left.append(str(commit.version))
    return DestinationError(
        f"version {target.version} of table {operation.ref}: files that it needs are gone (vacuumed, or lost), so it "
        f"cannot be restored; the publications that can be are {', '.join(left) or 'none: run `shoal audit`'}",
        code="VERSION_GONE",
    )


def lines(record: dict[str, Any]) -> list[str]:
    """The outcome for people."""
    if record["status"] == UNCHANGED:
        return [f"nothing to do: {record['table']} is at version {record['restored_to']} already"]
    return [
        f"restored {record['table']} to version {record['restored_to']}, as version {record['version']}",
        f"rows      {record['rows']['source']:,}, encoder {record.get('encoder')}",
        f"run       {record['run_id']}; the next night goes on from there",
    ]
