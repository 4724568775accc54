"""`shoal embed`: brings a published table in step with its source; README.md has the steps of the protocol.

    lease -> recover -> plan -> encode -> audit -> fence and commit -> bookkeeping

A run can be killed between any two of them: before the commit readers see the old table and the next run goes on from
what is staged; after it the next run finishes the bookkeeping.
"""

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from rich.console import Console

from shoal.conf.errors import ShoalError
from shoal.conf.run import RunConfig
from shoal.jobs import audit
from shoal.jobs.bookkeeping import Bookkeeper, drop_work
from shoal.jobs.canary_store import Probe, load_probe, save_probe
from shoal.jobs.encode_stage import encode_waves
from shoal.jobs.estimate import estimate, warnings_of
from shoal.jobs.filesystem import FileSystem, join
from shoal.jobs.gate import check_gate
from shoal.jobs.have import Have, find_have
from shoal.jobs.layout import SIDECAR_SUFFIX, TableRef, table_of
from shoal.jobs.lease import Lease, held
from shoal.jobs.planner import ChunkPlan, RowPlan, Waves, plan_chunks, plan_rows
from shoal.jobs.prepare import (
    Encoding,
    comparable,
    describe_encoder,
    options_of,
    replace_reason,
    resolve_encoder,
    try_out,
    worker_error,
)
from shoal.jobs.progress import shown_progress
from shoal.jobs.publish import (
    Target,
    apply_settings,
    assemble,
    new_table_id,
    publish_merge,
    publish_replace,
    published_columns,
)
from shoal.jobs.published import Published, State, is_head, read_published
from shoal.jobs.report import Report
from shoal.jobs.session import slots
from shoal.jobs.source import SourceRows, read_source
from shoal.jobs.staging import create_staging, staged_errors, staged_vectors, trim_staging
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.progress import ProgressReceiver, ProgressTarget


@dataclass(frozen=True)
class Hooks:
    """Where a run speaks: `say` one line for people, `step` the name of each step of the protocol when it is done."""

    say: Callable[[str], None] = lambda _: None
    step: Callable[[str], None] = lambda _: None
    console: Console = field(default_factory=lambda: Console(stderr=True))


def embed(
    spark: SparkSession,
    config: RunConfig,
    *,
    full_refresh: bool = False,
    limit: int | None = None,
    hooks: Hooks | None = None,
    started: float | None = None,
) -> Report:
    """Runs once and returns the report; raises ShoalError, with `report` attached to it, when it did not get through.

    `started` (as time.time()): when the user's wait began, if that was before the call. With `limit` it tries the
    run on so many rows and publishes to a scratch table beside the destination, made anew.
    """
    hooks = masked(hooks or Hooks(), config)
    run_id = new_run_id()
    ref = table_of(spark, config.destination)
    files = FileSystem(spark, ref.sidecar)
    if limit is not None:
        ref = scratch_of(ref)
        files.delete(ref.path or "")
        files.delete(ref.sidecar)
    report = Report(config, run_id, str(ref))
    if started is not None:
        report.seconds["start"] = report.started - started
        report.started = started
    try:
        with report.phase("start"):
            # What is wrong with source, model or destination is said before anything is made beside the last.
            source = read_source(spark, config.source, config.chunk, limit=limit)
            before = read_published(spark, ref)
            spec = describe_encoder(config)
            files.require_writable(ref.sidecar)
        with held(files, ref.lease, run_id, say=hooks.say) as lease:
            hooks.step("lease taken")
            run = _Run(spark, config, spec, ref, files, report, lease, hooks, full_refresh=full_refresh, limit=limit)
            run.go(source, before)
        hooks.step("lease released")
    except (PySparkException, Py4JJavaError) as error:
        failure = worker_error(error)
        raise _reported(failure, report) from error
    except BaseException as error:
        _reported(error, report)
        raise
    return report


def _reported(error: BaseException, report: Report) -> BaseException:
    """The error with the report attached, and with what came from the environment masked in both."""
    assert report.config is not None  # noqa: S101 - embed made it with one
    told = report.config.mask(str(error) or type(error).__name__)
    report.status, report.error = getattr(error, "status", "failed"), told
    if isinstance(error, ShoalError):
        error.args = (told,)
    error.report = report  # type: ignore[attr-defined]
    return error


def masked(hooks: Hooks, config: RunConfig) -> Hooks:
    """The hooks, with what came from the environment masked in everything that is said."""
    return replace(hooks, say=lambda line: hooks.say(config.mask(line)))


def new_run_id() -> str:
    """Sorts by time, and no two are alike."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


def scratch_of(ref: TableRef) -> TableRef:
    """The table that `--limit` publishes to."""
    path = join(ref.sidecar, "try", "table")
    return TableRef(path, None, path + SIDECAR_SUFFIX)


@dataclass
class _Run:
    spark: SparkSession
    config: RunConfig
    spec: EncoderSpec
    ref: TableRef
    files: FileSystem
    report: Report
    lease: Lease
    hooks: Hooks
    full_refresh: bool
    limit: int | None

    def __post_init__(self) -> None:
        self.trial: Probe | None = None
        self.books = Bookkeeper(self.spark, self.ref, self.hooks.say)
        self.options = options_of(self.config)

    def go(self, source: SourceRows, before: Published | None) -> None:
        """Everything that needs the lease; a failure is written down too, as far as that is still possible.

        `source` and `before` were read without the lease, and are read again if another run may have moved them.
        """
        with self.report.phase("start"):
            self.books.create()
            create_staging(self.spark, self.ref)
            published = before if is_head(self.spark, before) else read_published(self.spark, self.ref)
            if source.version is not None:
                source = read_source(self.spark, self.config.source, self.config.chunk, limit=self.limit)
            self.books.recover(published, self.config.tracking)
            drop_work(self.files, self.ref)
            self.hooks.step("recovered")
        try:
            self._plan_and_publish(source, published)
        except (PySparkException, Py4JJavaError) as error:
            failure = worker_error(error)
            self._write_down_failure(failure)
            raise failure from error
        except ShoalError as error:
            self._write_down_failure(error)
            raise
        finally:
            # Only this run's own: should the lease have been lost, the new holder is at work beside it.
            self.files.delete(join(self.ref.work, self.report.run_id))

    def _plan_and_publish(self, source: SourceRows, published: Published | None) -> None:
        report = self.report
        with report.phase("start"):
            encoding = resolve_encoder(
                self.spark,
                self.config,
                self.spec,
                self.ref,
                published,
                full_refresh=self.full_refresh,
                say=self.hooks.say,
            )
            report.fingerprint = encoding.spec.fingerprint
            if published is not None and self.limit is None:
                changed = apply_settings(self.spark, published, self.config.destination)
                if changed:
                    self.hooks.say(f"table properties set: {', '.join(changed)}")
                    published = read_published(self.spark, self.ref)
        with report.phase("plan"):
            rows = self._plan_rows(source, published, encoding)
        if rows.is_empty:
            with report.phase("record"):
                self._unchanged(published)
            return
        with report.phase("plan"):
            chunks, have = self._plan_chunks(rows, published, encoding)
        self.hooks.step("planned")
        if chunks.todo is not None:
            with report.phase("encode"):
                self._encode(chunks, chunks.todo, encoding)
        self.lease.check()
        with report.phase("audit"):
            have = replace(have, staged=staged_vectors(self.spark, self.ref, encoding.spec.fingerprint))
            report.account = audit.reconcile(
                self.spark, self.ref, rows, chunks, have, fingerprint=encoding.spec.fingerprint, run_id=report.run_id
            )
            if report.account.num_doubled:
                self._warn(
                    f"{report.account.num_doubled} chunks were staged twice; the first vector of each is published"
                )
            audit.check_errors(self.config.limits.max_errors, report.account)
            audit.check_vectors(self.spark, self.ref, fingerprint=encoding.spec.fingerprint, run_id=report.run_id)
            content = self._content(encoding, rows, chunks, have)
            if self.config.gate is not None and self.limit is None:
                before = comparable(published, source, self.spark)
                chunked = self.config.chunk is not None
                report.ndcg = check_gate(
                    self.spark, self.config.gate, encoding.spec, rows, content, before, chunked=chunked
                )
        self.hooks.step("audited")
        self.lease.check()
        with report.phase("publish"):
            self._publish(published, encoding, rows, content)
        self.hooks.step("committed")
        with report.phase("record"):
            self._write_down(encoding.spec.fingerprint)

    def _plan_rows(self, source: SourceRows, published: Published | None, encoding: Encoding) -> RowPlan:
        report, config = self.report, self.config
        report.source_version = source.version
        columns = published_columns(source, store_text=config.destination.store_text)
        anew = replace_reason(
            published, source, columns, self.spark, encoding.spec.fingerprint, full_refresh=self.full_refresh
        )
        if anew and published is not None:
            self.hooks.say(f"the table is written anew: {anew}")
        report.reason = anew
        rows = plan_rows(source, config.source, comparable(published, source, self.spark), self._keep, replace=anew)
        report.rows = counts = rows.counts
        self.hooks.say(
            f"rows: {counts.new} new, {counts.changed} changed, {counts.metadata_only} metadata only, "
            f"{counts.deleted} deleted, {counts.unchanged} unchanged"
        )
        if self.limit is None:
            audit.check_rows(config.limits, counts)
        return rows

    def _plan_chunks(self, rows: RowPlan, published: Published | None, encoding: Encoding) -> tuple[ChunkPlan, Have]:
        report, config, spec = self.report, self.config, encoding.spec
        have = find_have(self.spark, self.ref, published, spec.fingerprint, staged=True)
        waves = Waves(slots(self.spark), config.encode.wave_chunks)
        chunks = plan_chunks(rows, config.chunk, spec.folder, have.hashes(), self._keep, waves)
        report.planned_chunks(chunks)
        rate = None
        if chunks.todo is not None:
            # Before the first run only the trial of the encoder knows how fast it is; it is needed for canaries anyway.
            rate = self.books.last_rate(spec.fingerprint)
            rate = rate or self._probe(encoding).report["tokens_per_s"] * slots(self.spark)
        found = estimate(chunks.todo, chunks.num_todo, spec, rate=rate, price_per_hour=config.encode.price_per_hour)
        report.estimate = {"seconds": found.seconds, "price": found.price}
        audit.check_cost(config.limits.max_cost, found.price)
        for warning in warnings_of(spec, found, config.chunk):
            self._warn(warning)
        return chunks, have

    def _warn(self, warning: str) -> None:
        self.report.warnings.append(warning)
        self.hooks.say(f"warning: {warning}")

    def _keep(self, name: str, table: DataFrame, *, partition_by: str | None = None) -> DataFrame:
        """Work tables lie below the run's own folder: a dead run's are dropped by name, without reading them."""
        path = join(self.ref.work, self.report.run_id, name)
        (table.write.partitionBy(partition_by) if partition_by else table.write).parquet(path)
        return self.spark.read.parquet(path)

    def _probe(self, encoding: Encoding) -> Probe:
        """The encoder's trial: this run's, an earlier one's, or made now; never twice."""
        if self.trial is None:
            self.trial = encoding.probe or load_probe(self.spark, self.ref, encoding.spec.fingerprint)
        if self.trial is None:
            self.trial, _ = try_out(self.spark, encoding.spec, self.options)
        return self.trial

    def _encode(self, chunks: ChunkPlan, todo: DataFrame, encoding: Encoding) -> None:
        spec, report = encoding.spec, self.report
        probe = self._probe(encoding)
        if load_probe(self.spark, self.ref, spec.fingerprint) is None:
            save_probe(self.spark, self.ref, spec.fingerprint, spec.backend, probe)
        report.parity_min_cosine = probe.report["parity"]["min"]
        self.hooks.step("probed")
        self.hooks.say(
            f"encoding {chunks.num_todo} chunks with {spec.reference} ({spec.backend}, {spec.precision}) in "
            f"{chunks.num_waves} waves"
        )
        host = self.spark.conf.get("spark.driver.host") or "127.0.0.1"
        # Workers send to the address that the driver advertises; it need not be one that this host can bind.
        with ProgressReceiver(
            report.run_id, host=self.spark.conf.get("spark.driver.bindAddress", host) or host
        ) as receiver:
            num_done = chunks.distinct - chunks.num_todo
            with shown_progress(
                receiver, chunks.num_todo, num_done, report.started, self.hooks.console, self.hooks.say
            ) as points:

                def step(name: str) -> None:
                    self.lease.check()
                    self.hooks.step(name)

                encode_waves(
                    self.spark,
                    self.ref,
                    todo,
                    chunks.num_waves,
                    num_slots=slots(self.spark),
                    run_id=report.run_id,
                    spec=spec,
                    options=self.options,
                    canaries=probe.canaries,
                    progress=ProgressTarget(host, receiver.port, report.run_id, 0),
                    step=step,
                )
            report.progress = points
            totals = receiver.totals()
            report.padding_share = 1 - totals.tokens / totals.padded if totals.padded else None

    def _content(self, encoding: Encoding, rows: RowPlan, chunks: ChunkPlan, have: Have) -> DataFrame:
        vectors = have.vectors(chunks.contents())
        failed = staged_errors(self.spark, self.ref, encoding.spec.fingerprint)
        return assemble(rows, chunks.chunks, vectors, failed, store_text=self.config.destination.store_text)

    def _publish(self, published: Published | None, encoding: Encoding, rows: RowPlan, content: DataFrame) -> None:
        report, settings = self.report, self.config.destination
        table_id = published.table_id if published else new_table_id()
        known = published.generation if published and published.ours else self.books.last_generation()
        report.generation = known + 1
        target = Target(self.ref, published, settings, table_id, report.generation)
        report.status = "published"
        # The points of the progress curve would only fatten the commit; bookkeeping writes them.
        state = State(report.run_id, target.generation, {**report.record(), "progress": []})
        try:
            if rows.replace:
                described = encoding.described(self.config.encoder, self.config.tracking.uri)
                report.version = publish_replace(self.spark, target, rows, content, encoding.spec, described, state)
            else:
                report.version = publish_merge(self.spark, target, rows, content, state)
        except BaseException:
            report.status = "failed"
            raise
        with contextlib.suppress(PySparkException, Py4JJavaError):
            report.bytes_written = bytes_of(self.spark, self.ref, report.version)

    def _unchanged(self, published: Published | None) -> None:
        report = self.report
        report.status = "unchanged"
        if published is not None:
            report.version, report.generation = published.version, published.generation
        self.books.write(report.record())
        self.hooks.step("recorded")
        report.mlflow_run = self.books.send_pending(self.config.tracking).get(report.run_id)
        # A run that died after its commit has left behind what it staged, and all of it is published.
        self.lease.check()
        trim_staging(self.spark, self.ref, report.fingerprint or "")

    def _write_down(self, fingerprint: str) -> None:
        """Step 7; whatever fails in it is made good by the next run, and the publication stands."""
        report = self.report
        try:
            self.books.write(report.record())
            self.hooks.step("recorded")
            report.mlflow_run = self.books.send_pending(self.config.tracking).get(report.run_id)
            self.hooks.step("tracked")
            # Whoever took the lease over may have staged vectors of this encoder, and needs them.
            self.lease.check()
            trim_staging(self.spark, self.ref, fingerprint)
            self.hooks.step("trimmed")
        except (ShoalError, PySparkException, Py4JJavaError) as error:
            self._warn(f"version {report.version} is published, its bookkeeping is left to the next run: {error}")

    def _write_down_failure(self, error: ShoalError) -> None:
        self.report.status, self.report.error = error.status, self.config.mask(str(error))
        try:
            self.lease.check()
            if self.report.account is None and self.report.fingerprint:
                self.report.encoded, self.report.tokens = audit.count_encoded(
                    self.spark, self.ref, self.report.fingerprint, self.report.run_id
                )
            self.books.write(self.report.record())
            self.report.mlflow_run = self.books.send_pending(self.config.tracking).get(self.report.run_id)
        except (ShoalError, PySparkException, Py4JJavaError) as second:
            self.hooks.say(f"the failed run could not be written down: {second}")


def bytes_of(spark: SparkSession, ref: TableRef, version: int) -> int:
    """Bytes of data files that one commit of the published table added."""
    history = (
        spark.sql(f"DESCRIBE HISTORY {ref.sql} LIMIT 8")
        .where(f"version = {version}")
        .select("operationMetrics")
        .collect()
    )
    metrics: dict[str, Any] = history[0]["operationMetrics"] if history else {}
    return int(metrics.get("numTargetBytesAdded") or metrics.get("numOutputBytes") or 0)
