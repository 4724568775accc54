"""`shoal cutover`: switches a table to the next encoder, once all its vectors are there and the gate lets them pass."""

from collections.abc import Callable
from typing import Any

from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, RefusedError
from shoal.conf.run import RunConfig
from shoal.jobs.changes import last_unchanged
from shoal.jobs.encoder_work import EncoderWork, KeptBelow
from shoal.jobs.filesystem import join
from shoal.jobs.hooks import Hooks, masked
from shoal.jobs.migration import MOVE_IT, VERB, Migration, NextPlan, plan_next
from shoal.jobs.operation import Operation, operating
from shoal.jobs.prepare import Encoders, describe_encoders, resolve_encoder
from shoal.jobs.published import Published
from shoal.jobs.report import Report
from shoal.jobs.source import SourceRows, as_one_state, read_source
from shoal.jobs.staging import create_staging


def cutover(spark: SparkSession, config: RunConfig, hooks: Hooks | None = None) -> dict[str, Any]:
    """The document of the cut-over, as of `shoal embed --json`; `status` is unchanged where it has been made already.

    Encodes nothing. Raises ConfigError without a next encoder, RefusedError with the counts when vectors of it are
    missing, LimitError when limits or gate of the run file stop it.
    """
    hooks = masked(hooks or Hooks(), config)
    if config.next_encoder is None:
        raise ConfigError("next_encoder is not set, so there is nothing to cut over to; name the encoder to come")
    encoders = describe_encoders(config)
    table = config.destination.name
    with operating(spark, table, VERB, say=hooks.say, step=hooks.step) as operation:
        report = Report(config, operation.run_id, str(operation.ref))
        report.verb = VERB
        now = encoders.on(operation.published)
        if now.cut_over:
            head = operation.published
            report.status, report.version, report.generation = "unchanged", head.version, head.generation
            report.fingerprint, report.encoder = head.fingerprint, head.encoder["reference"]
            report.reason = MOVE_IT
            hooks.say(MOVE_IT)
            return report.public() | {"encoder": report.encoder}
        folder = join(operation.ref.work, operation.run_id)
        try:
            _cut_over(operation, config, now, report, folder, hooks)
        finally:
            operation.files.delete(folder)
        return report.public() | {"encoder": report.encoder}


def _cut_over(
    operation: Operation, config: RunConfig, encoders: Encoders, report: Report, folder: str, hooks: Hooks
) -> None:
    spark, ref, published = operation.spark, operation.ref, operation.published
    # Says which fields differ where the table is of neither encoder.
    resolve_encoder(spark, config, encoders.serving, ref, published, full_refresh=False, say=hooks.say)
    assert encoders.coming is not None  # noqa: S101 - the run file has one, and the table is not of it
    coming = resolve_encoder(spark, config, encoders.coming, ref, None, full_refresh=False, say=hooks.say)
    create_staging(spark, ref)
    work = EncoderWork(spark, config, ref, coming, KeptBelow(spark, folder))
    migration = Migration(work, operation.books, operation.lease, hooks, report, _warn(report, hooks))
    source = as_one_state(spark, config, _as_seen(spark, config, published, report), join(folder, "source"))
    plan = plan_next(work, source, published, None)
    hooks.step("next planned")
    _require_all(plan, coming.spec.reference)
    content = migration.judge(plan, source)
    migration.cut_over(plan, content, published)


def _as_seen(spark: SparkSession, config: RunConfig, published: Published, report: Report) -> SourceRows:
    """The source as the table shows it where it has versions, else as it is now; what the record says of it too."""
    source = read_source(spark, config.source, config.chunk)
    report.difference = "cut-over: the whole source"
    newest = published.ours.state.record if published.ours and published.ours.state else {}
    seen = last_unchanged(spark, published.ref, published) or newest
    version = seen.get("source_version")
    if source.version is None or version is None:
        return source
    report.source_state = seen.get("source_state")
    if version == source.version:
        return source
    pinned = config.source.model_copy(update={"version": version, "timestamp": None})
    return read_source(spark, pinned, config.chunk)


def _require_all(plan: NextPlan, reference: str) -> None:
    if plan.fresh:
        raise RefusedError(
            f"next_encoder {reference}: {plan.fresh} of {plan.chunks.distinct} contents have no vector of it yet; the "
            f"table keeps its encoder. `shoal embed FILE` makes them, as many a night as migration.budget allows: run "
            f"it until `shoal status` says ready, then this again",
            code="CUTOVER_NOT_READY",
        )


def _warn(report: Report, hooks: Hooks) -> Callable[[str], None]:
    def warn(warning: str) -> None:
        report.warnings.append(warning)
        hooks.say(f"warning: {warning}")

    return warn


def lines(found: dict[str, Any]) -> list[str]:
    """The outcome for people."""
    if found["status"] == "unchanged":
        return [f"nothing to do: {found['reason']}"]
    rows, chunks = found["rows"], found["chunks"]
    return [
        f"cut over {found['table']} version {found['version']} to {found['encoder']}",
        f"rows      {rows['source']:,}: {chunks['embedded']:,} chunks with a vector, {chunks['errors']:,} errors",
        f"run       {found['run_id']}; going back within destination.retain encodes nothing",
    ]
