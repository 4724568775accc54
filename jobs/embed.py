"""`shoal embed`: brings a published table in step with its source; README.md has the steps of the protocol.

    lease -> recover -> plan -> encode -> audit -> fence and commit -> the next encoder's part -> bookkeeping

A run can be killed between any two of them: before the commit readers see the old table and the next run goes on from
what is staged; after it the next run finishes the bookkeeping.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from shoal.conf.errors import RunError, ShoalError, code_of, first_line
from shoal.conf.run import RunConfig
from shoal.jobs import limits
from shoal.jobs.bookkeeping import Bookkeeper, drop_work, new_run_id
from shoal.jobs.changes import find_difference
from shoal.jobs.encoder_work import EncoderWork, KeptBelow
from shoal.jobs.estimate import warnings_of
from shoal.jobs.filesystem import FileSystem, join
from shoal.jobs.gate import check_gate
from shoal.jobs.have import Have
from shoal.jobs.hooks import Hooks, masked
from shoal.jobs.indexing import VERB as INDEX_VERB
from shoal.jobs.layout import SIDECAR_SUFFIX, TableRef, table_of
from shoal.jobs.lease import Lease, held
from shoal.jobs.maintenance import maintain
from shoal.jobs.migration import FAILED, MOVE_IT, Migration, document_of, failure, next_run_id, settled_document
from shoal.jobs.mounted_files import MountedFiles, open_files
from shoal.jobs.operation import Operation
from shoal.jobs.planner import ChunkPlan, RowPlan
from shoal.jobs.prepare import (
    Encoders,
    comparable,
    describe_encoders,
    replace_reason,
    resolve_encoder,
    try_terms,
    worker_error,
)
from shoal.jobs.publish import (
    Target,
    apply_settings,
    new_table_id,
    publish_merge,
    publish_replace,
    published_columns,
)
from shoal.jobs.published import Published, State, is_head, read_published
from shoal.jobs.reconcile import count_encoded
from shoal.jobs.remote import require_supported, without_java
from shoal.jobs.report import Report
from shoal.jobs.session import described, fitted, with_settings
from shoal.jobs.source import SourceRows, as_one_state, read_source
from shoal.jobs.staging import create_staging, mend_staging, trim_staging


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
    require_supported(spark, config)
    run_id = new_run_id()
    ref = table_of(spark, config.destination)
    files = open_files(spark, ref.sidecar)
    if limit is not None:
        ref = scratch_of(ref)
        files.delete(ref.path or "")
        files.delete(ref.sidecar)
    report = Report(
        config, run_id, str(ref), around=lambda phase: described(spark, f"shoal: {config.name}, {phase}", run_id)
    )
    if started is not None:
        report.seconds["start"] = report.started - started
        report.started = started
    try:
        with report.phase("start"):
            # What is wrong with source, model or destination is said before anything is made beside the last.
            source = read_source(spark, config.source, config.chunk, limit=limit)
            before = read_published(spark, ref)
            encoders = describe_encoders(config)
            files.require_writable(ref.sidecar)
        with with_settings(spark, fitted(spark)), held(files, ref.lease, run_id, say=hooks.say) as lease:
            hooks.step("lease taken")
            run = _Run(
                spark, config, encoders, ref, files, report, lease, hooks, full_refresh=full_refresh, limit=limit
            )
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
    report.status, report.error, report.code = getattr(error, "status", "failed"), told, code_of(error)
    if isinstance(error, ShoalError):
        error.args = (told,)
    error.report = report  # type: ignore[attr-defined]
    return error


def scratch_of(ref: TableRef) -> TableRef:
    """The table that `--limit` publishes to."""
    path = join(ref.sidecar, "try", "table")
    return TableRef(path, None, path + SIDECAR_SUFFIX)


@dataclass
class _Run:
    spark: SparkSession
    config: RunConfig
    encoders: Encoders
    ref: TableRef
    files: FileSystem
    report: Report
    lease: Lease
    hooks: Hooks
    full_refresh: bool
    limit: int | None

    def __post_init__(self) -> None:
        self.books = Bookkeeper(self.spark, self.ref, self.hooks.say)

    def go(self, source: SourceRows, before: Published | None) -> None:
        """Everything that needs the lease; a failure is written down too, as far as that is still possible.

        `source` and `before` were read without the lease, and are read again if another run may have moved them.
        """
        with self.report.phase("start"):
            self.books.create()
            create_staging(self.spark, self.ref)
            if isinstance(self.files, MountedFiles):
                self.files.require_shared(self.ref.staging)
            published = before if is_head(self.spark, before) else read_published(self.spark, self.ref)
            if source.version is not None:
                source = read_source(self.spark, self.config.source, self.config.chunk, limit=self.limit)
            self.books.recover(published, self.config.tracking)
            drop_work(self.files, self.ref)
            self.hooks.step("recovered")
        try:
            with self.report.phase("plan"):
                kept = join(self.ref.work, self.report.run_id, "source")
                source = as_one_state(self.spark, self.config, source, kept, limit=self.limit)
            self._plan_and_publish(source, published)
        except (PySparkException, Py4JJavaError) as error:
            failure = self._mended(error) or worker_error(error)
            self._write_down_failure(failure)
            raise failure from error
        except ShoalError as error:
            failure = self._mended(error) or error
            self._write_down_failure(failure)
            raise failure from error.__cause__
        finally:
            # Only this run's own: should the lease have been lost, the new holder is at work beside it.
            self.files.delete(join(self.ref.work, self.report.run_id))

    def _mended(self, error: Exception) -> RunError | None:
        """The error to raise where a file of staging could not be read; what cannot be read is gone from it then."""
        if not mend_staging(self.spark, self.ref, error):
            return None
        return RunError(
            f"a file of staging could not be read ({first_line(error)[:300]}); nothing was published. "
            "What cannot be read has been dropped and is encoded again: run it again",
            code="STAGING_DAMAGED",
        )

    def _plan_and_publish(self, source: SourceRows, published: Published | None) -> None:
        report = self.report
        with report.phase("start"):
            self.encoders = self.encoders.on(published)
            encoding = resolve_encoder(
                self.spark,
                self.config,
                self.encoders.serving,
                self.ref,
                published,
                full_refresh=self.full_refresh,
                say=self.hooks.say,
            )
            work = EncoderWork(self.spark, self.config, self.ref, encoding, self._kept())
            report.fingerprint, report.encoder = encoding.spec.fingerprint, encoding.spec.reference
            if published is not None and self.limit is None:
                changed = apply_settings(self.spark, published, self.config.destination)
                if changed:
                    self.hooks.say(f"table properties set: {', '.join(changed)}")
                    published = read_published(self.spark, self.ref)
        with report.phase("plan"):
            rows = self._plan_rows(source, published, work)
        if rows.is_empty:
            assert published is not None  # noqa: S101 - a first run always has something to do
            report.status, report.version, report.generation = "unchanged", published.version, published.generation
            self._migrate(source, work)
            self._maintain()
            with report.phase("record"):
                self._unchanged()
            return
        with report.phase("plan"):
            chunks, have = self._plan_chunks(rows, published, work)
        self.hooks.step("planned")
        if chunks.todo is not None:
            with report.phase("encode"):
                self._encode(chunks, work)
        self.lease.check()
        with report.phase("audit"):
            content = self._audited(work, rows, chunks, have, comparable(published, source, self.spark))
        self.hooks.step("audited")
        self.lease.check()
        with report.phase("publish"):
            self._publish(published, work, rows, content)
        self.hooks.step("committed")
        self._migrate(source, work)
        self._maintain()
        with report.phase("record"):
            self._write_down(encoding.spec.fingerprint)

    def _kept(self, *below: str) -> KeptBelow:
        return KeptBelow(self.spark, join(self.ref.work, self.report.run_id, *below))

    def _plan_rows(self, source: SourceRows, published: Published | None, work: EncoderWork) -> RowPlan:
        report, config = self.report, self.config
        report.source_version = source.version
        columns, fingerprint = published_columns(source, config), work.spec.fingerprint
        anew = replace_reason(
            published, source, columns, self.spark, fingerprint, work.lexical, full_refresh=self.full_refresh
        )
        if anew and published is not None:
            self.hooks.say(f"the table is written anew: {anew}")
        report.reason = anew
        found = find_difference(self.spark, config, self.ref, source, published, work.keep, replace=anew)
        rows, report.difference = found.rows, found.how
        report.source_state = found.state.record() if found.state else None
        report.rows = counts = rows.counts
        self.hooks.say(found.how)
        self.hooks.say(
            f"rows: {counts.new} new, {counts.changed} changed, {counts.metadata_only} metadata only, "
            f"{counts.deleted} deleted, {counts.unchanged} unchanged"
        )
        if self.limit is None:
            limits.check_rows(config.limits, counts)
        return rows

    def _plan_chunks(self, rows: RowPlan, published: Published | None, work: EncoderWork) -> tuple[ChunkPlan, Have]:
        report, config = self.report, self.config
        try_terms(self.spark, work.lexical)
        chunks, have = work.plan_chunks(rows, published)
        report.planned_chunks(chunks)
        found = work.estimate(chunks.todo, chunks.num_todo)
        report.estimate = {"seconds": found.seconds, "price": found.price}
        limits.check_cost(config.limits.max_cost, found.price)
        for warning in warnings_of(work.spec, found, config.chunk):
            self._warn(warning)
        return chunks, have

    def _warn(self, warning: str) -> None:
        self.report.warnings.append(warning)
        self.hooks.say(f"warning: {warning}")

    def _encode(self, chunks: ChunkPlan, work: EncoderWork) -> None:
        report = self.report
        done = work.encode(
            chunks,
            run_id=report.run_id,
            started=report.started,
            lease=self.lease,
            hooks=self.hooks,
            warn=self._warn,
        )
        report.progress, report.padding_share = done.progress, done.padding_share
        report.parity_min_cosine = done.parity_min_cosine

    def _audited(
        self, work: EncoderWork, rows: RowPlan, chunks: ChunkPlan, have: Have, before: DataFrame | None
    ) -> DataFrame:
        """The rows to publish, once every chunk is accounted for and limits and gate are kept.

        `before`: the published rows, where their keys can be compared.
        """
        report, config = self.report, self.config
        report.account, have = work.account(rows, chunks, have, report.run_id)
        if report.account.num_doubled:
            self._warn(f"{report.account.num_doubled} chunks were staged twice; the first vector of each is published")
        limits.check_errors(config.limits.max_errors, report.account)
        limits.check_vectors(self.spark, self.ref, fingerprint=work.spec.fingerprint, run_id=report.run_id)
        content = work.content(rows, chunks, have)
        if config.gate is not None and self.limit is None:
            chunked = config.chunk is not None
            report.ndcg = check_gate(self.spark, config.gate, work.spec, rows, content, before, chunked=chunked)
        return content

    def _migrate(self, source: SourceRows, serving: EncoderWork) -> None:
        """The next encoder's part of the night; whatever comes of it, the serving table has been kept up."""
        report, coming = self.report, self.encoders.coming
        if self.limit is not None or (coming is None and not self.encoders.cut_over):
            return
        with report.phase("migrate"):
            published = read_published(self.spark, self.ref)
            if coming is None or published is None:
                report.migration = settled_document(serving)
                self._warn(MOVE_IT)
                return
            try:
                encoding = resolve_encoder(
                    self.spark, self.config, coming, self.ref, None, full_refresh=False, say=self.hooks.say
                )
            except ShoalError as error:
                told = self.config.mask(str(error))
                report.migration = document_of(coming.spec.reference, None, FAILED, None) | failure(error, told)
                self._warn(f"next encoder {coming.spec.reference}: the table keeps its encoder; {told}")
                return
            if encoding.spec.fingerprint == serving.spec.fingerprint:
                report.migration = settled_document(serving)
                self._warn(MOVE_IT)
                return
            part = Report(self.config, next_run_id(report.run_id), str(self.ref), around=report.around)
            part.source_state, part.difference = report.source_state, "cut-over: the whole source"
            migration = Migration(
                EncoderWork(self.spark, self.config, self.ref, encoding, self._kept("next")),
                self.books,
                self.lease,
                self.hooks,
                part,
                self._warn,
            )
            report.migration = migration.night(source, published)

    def _maintain(self) -> None:
        """Compacts and vacuums what is due; should that fail, what has been published stands."""
        if self.config.maintenance != "auto" or self.limit is not None:
            return
        if without_java(self.spark):
            self.hooks.say("maintenance: not through Spark Connect or on Databricks; do it elsewhere, or by OPTIMIZE")
            return
        report, hooks = self.report, self.hooks
        with report.phase("maintain"):
            try:
                published = read_published(self.spark, self.ref)
                assert published is not None  # noqa: S101 - it has just been published
                operation = Operation(
                    self.spark, INDEX_VERB, f"{report.run_id}-{INDEX_VERB}", published,
                    self.files, self.books, self.lease, hooks.say, hooks.step,
                )  # fmt: skip
                report.maintenance = done = maintain(operation, index=self.config.index)
                if report.status == "unchanged" and (done["index"] or done["optimize"]):
                    # What this run saw of the source belongs to the newest generation.
                    head = read_published(self.spark, self.ref)
                    assert head is not None  # noqa: S101 - maintenance takes no table away
                    report.version, report.generation = head.version, head.generation
            except (ShoalError, PySparkException, Py4JJavaError, MemoryError, ValueError) as error:
                told = first_line(error)
                self._warn(f"maintenance failed, `shoal optimize` and `shoal vacuum` make good for it: {told}")

    def _publish(self, published: Published | None, work: EncoderWork, rows: RowPlan, content: DataFrame) -> None:
        report, settings = self.report, self.config.destination
        table_id = published.table_id if published else new_table_id()
        known = published.generation if published and published.ours else self.books.last_generation()
        report.generation = known + 1
        target = Target(self.ref, published, table_id, report.generation)
        report.status = "published"
        # The points of the progress curve would only fatten the commit; bookkeeping writes them.
        state = State(report.run_id, target.generation, {**report.record(), "progress": []})
        try:
            if rows.replace:
                described = work.encoding.described(self.config.tracking.uri)
                report.version = publish_replace(
                    self.spark, target, settings, rows, content, work.spec, described, state, work.lexical
                )
            else:
                report.version = publish_merge(self.spark, target, rows, content, state)
        except BaseException:
            report.status = "failed"
            raise
        with contextlib.suppress(PySparkException, Py4JJavaError):
            report.bytes_written = bytes_of(self.spark, self.ref, report.version)

    def _unchanged(self) -> None:
        report = self.report
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
        self.report.code = error.code
        try:
            self.lease.check()
            if self.report.account is None and self.report.fingerprint:
                self.report.encoded, self.report.tokens = count_encoded(
                    self.spark, self.ref, self.report.fingerprint, self.report.run_id
                )
            self.books.write(self.report.record())
            self.report.mlflow_run = self.books.send_pending(self.config.tracking).get(self.report.run_id)
        except (ShoalError, PySparkException, Py4JJavaError) as second:
            self.hooks.say(f"the failed run could not be written down: {first_line(second)}")


def bytes_of(spark: SparkSession, ref: TableRef, version: int) -> int:
    """Bytes of data files that one commit of the published table added."""
    history = (
        spark.sql(f"DESCRIBE HISTORY {ref.sql} LIMIT 8")
        .where(f"version = {version}")
        .select("operationMetrics")
        .collect()
    )
    # A session may keep no metrics of its commits: spark.databricks.delta.history.metricsEnabled.
    metrics: dict[str, Any] = (history[0]["operationMetrics"] if history else None) or {}
    return int(metrics.get("numTargetBytesAdded") or metrics.get("numOutputBytes") or 0)
