"""The next encoder: its vectors come to be in staging beside the serving table, which one commit then switches to them.

    plan     the whole source, in the next encoder's chunks; what has no vector of it yet is missing
    encode   what is missing, as far as the night's budget reaches
    judge    when nothing is missing: account, limits and gate of the table to come
    cut over one commit: rows, identity and dimension

Each night plans anew, so that what came, changed or went in the source meanwhile is right by itself: a vector in
staging is found by its content. Readers see nothing of it before the commit, and a night that fails here has
published all the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from shoal.conf.errors import CODES, LimitError, ShoalError
from shoal.conf.run import BudgetConfig
from shoal.jobs import limits
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.encoder_work import EncoderWork
from shoal.jobs.estimate import Estimate, warnings_of
from shoal.jobs.gate import check_gate
from shoal.jobs.have import Have
from shoal.jobs.hooks import Hooks
from shoal.jobs.layout import is_delta
from shoal.jobs.lease import Lease
from shoal.jobs.planner import ChunkPlan, RowPlan, plan_rows
from shoal.jobs.prepare import comparable, worker_error
from shoal.jobs.publish import Target, publish_replace
from shoal.jobs.published import Published, State, commits
from shoal.jobs.reconcile import count_encoded
from shoal.jobs.report import Report
from shoal.jobs.source import SourceRows
from shoal.jobs.staging import staged_errors, staged_vectors, trim_staging

BACKFILLING, READY, CUT_OVER, REFUSED, FAILED = "backfilling", "ready", "cut over", "refused", "failed"
VERB = "cutover"
MOVE_IT = "the table has been cut over: move next_encoder to encoder in the run file"

# Contents are counted by these leading hexadecimal digits of their hash, to take an exact number without sorting them.
PREFIX_DIGITS = 3
_PREFIX, _TRIED = "__prefix", "__tried"


def next_run_id(run_id: str) -> str:
    """The next encoder's part of a run has an id of its own: waves in staging, and the record of the cut-over."""
    return f"{run_id}-next"


@dataclass(frozen=True)
class NextPlan:
    """What the next encoder needs for the whole source, and what of it one night does (`chunks.todo`).

    fresh: contents without a vector that nobody has tried; tried: those that failed on an earlier night, which are
    tried again after all fresh ones; per_night: contents that the budget allows, None without one.
    """

    rows: RowPlan
    chunks: ChunkPlan
    have: Have
    fresh: int
    tried: int
    per_night: int | None
    tonight: Estimate

    @property
    def missing(self) -> int:
        """Contents that nobody will have tried after tonight."""
        return max(0, self.fresh - self.chunks.num_todo)

    def nights_left(self, missing: int) -> int:
        """Nights after this one, as long as the source stays as it is."""
        return math.ceil(missing / self.per_night) if self.per_night else 0

    def estimate_of(self, missing: int) -> dict[str, float | None]:
        """Seconds and price of so many contents, by what tonight's cost."""
        share = missing / self.chunks.num_todo if self.chunks.num_todo else 0.0
        told = {"seconds": self.tonight.seconds, "price": self.tonight.price}
        return {name: None if value is None else value * share for name, value in told.items()}


def plan_next(
    work: EncoderWork, source: SourceRows, published: Published | None, budget: BudgetConfig | None
) -> NextPlan:
    """Plans the whole source for the encoder to come; without a budget (None, not an empty one) nothing is encoded."""
    rows = comparable(published, source, work.spark)
    if rows is not None:
        # What the serving encoder failed on says nothing of the next one.
        rows = rows.withColumn("error", F.lit(None).cast("string"))
    planned = plan_rows(source, work.config.source, rows, work.keep, replace=VERB)
    tonight = _Tonight(work, budget)
    chunks, have = work.plan_chunks(planned, published, tonight)
    estimate = work.estimate(chunks.todo, chunks.num_todo)
    return NextPlan(planned, chunks, have, tonight.fresh, tonight.tried, tonight.per_night, estimate)


@dataclass
class _Tonight:
    """Picks what one night encodes: contents never tried first, by hash, as many as the budget allows."""

    work: EncoderWork
    budget: BudgetConfig | None
    fresh: int = 0
    tried: int = 0
    per_night: int | None = None

    def __call__(self, missing: DataFrame, number: int) -> tuple[DataFrame, int]:
        spark, ref = self.work.spark, self.work.ref
        marked = missing.withColumn(_TRIED, F.lit(0))
        if is_delta(spark, ref.staging):
            failed = staged_errors(spark, ref, self.work.spec.fingerprint)
            failed = failed.select("content_hash", F.lit(1).alias("__failed"))
            marked = missing.join(failed, on="content_hash", how="left")
            marked = marked.withColumn(_TRIED, F.coalesce("__failed", F.lit(0))).drop("__failed")
        prefix = F.substring(F.hex("content_hash"), 1, PREFIX_DIGITS)
        marked = marked.withColumn(_PREFIX, F.concat(F.col(_TRIED).cast("string"), prefix))
        # At most 2 * 16^PREFIX_DIGITS rows, however many contents there are.
        counts = sorted((row[_PREFIX], row["count"]) for row in marked.groupBy(_PREFIX).count().collect())
        self.fresh = sum(count for bucket, count in counts if bucket.startswith("0"))
        self.tried = number - self.fresh
        if self.budget is None:
            return missing.limit(0), 0
        self.per_night = self._allowed(missing, number)
        if self.per_night is None or self.per_night >= number:
            return missing, number
        taken, last = 0, counts[-1][0]
        for bucket, count in counts:
            if taken + count > self.per_night:
                last = bucket
                break
            taken += count
        whole = marked.where(F.col(_PREFIX) < last)
        part = marked.where(F.col(_PREFIX) == last).orderBy("content_hash").limit(self.per_night - taken)
        return whole.unionByName(part).drop(_PREFIX, _TRIED), self.per_night

    def _allowed(self, missing: DataFrame, number: int) -> int | None:
        """Contents that one night may encode; None without limits. Hours and price count through the last rate."""
        budget = self.budget or BudgetConfig()
        allowed = [] if budget.chunks is None else [budget.chunks]
        hours = [] if budget.hours is None else [budget.hours]
        per_hour = self.work.config.encode.price_per_hour
        if budget.price is not None and per_hour:
            hours.append(budget.price / per_hour)
        if hours:
            seconds = self.work.estimate(missing, number).seconds or 0.0
            if seconds > 0:
                allowed.append(max(1, math.floor(number * min(hours) * 3600 / seconds)))
        return min(allowed) if allowed else None


@dataclass
class Migration:
    """The next encoder's part of one run, under its lease; `report` becomes the cut-over's record.

    `warn` is told what somebody should look at.
    """

    work: EncoderWork
    books: Bookkeeper
    lease: Lease
    hooks: Hooks
    report: Report
    warn: Callable[[str], None]
    document: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.report.fingerprint, self.report.encoder = self.work.spec.fingerprint, self.work.spec.reference
        spec, budget = self.work.spec, self.work.config.migration.budget
        empty = document_of(spec.reference, spec.fingerprint, BACKFILLING, None)
        self.document = empty | {"budget": budget.model_dump(mode="json")}

    def night(self, source: SourceRows, published: Published) -> dict[str, Any]:
        """Encodes what the budget allows and cuts over when that is due; the run's `migration`, failures included."""
        try:
            plan = plan_next(self.work, source, published, self.work.config.migration.budget)
            self._told(plan)
            self.hooks.step("next planned")
            if plan.chunks.todo is not None:
                self._encode(plan)
            missing = plan.missing
            self.document |= {"missing": missing, "nights_left": plan.nights_left(missing)}
            self.document["estimate"] = plan.estimate_of(missing)
            if missing:
                self._say_progress(plan)
            else:
                self._finish(plan, source, published)
        except ShoalError as error:
            self._stopped(error)
        except (PySparkException, Py4JJavaError) as error:
            self._stopped(worker_error(error))
        return self.document

    def judge(self, plan: NextPlan, source: SourceRows) -> DataFrame:
        """The rows of the table to come, accounted for and within limits and gate; else LimitError."""
        work, report, config = self.work, self.report, self.work.config
        account, have = work.account(plan.rows, plan.chunks, plan.have, report.run_id)
        # Tonight's encoding is told by the run; the cut-over itself encodes nothing.
        report.account = replace(account, encoded=0, tokens=0)
        report.rows, report.source_version = plan.rows.counts, source.version
        report.planned, report.distinct = plan.chunks.planned, plan.chunks.distinct
        self.document["errors"] = account.errors
        if account.num_doubled:
            self.warn(f"{account.num_doubled} chunks were staged twice; the first vector of each is published")
        limits.check_rows(config.limits, plan.rows.counts)
        limits.check_errors(config.limits.max_errors, account)
        limits.check_vectors(work.spark, work.ref, fingerprint=work.spec.fingerprint, run_id=None)
        content = work.content(plan.rows, plan.chunks, have)
        if config.gate is not None:
            chunked = config.chunk is not None
            report.ndcg = check_gate(work.spark, config.gate, work.spec, plan.rows, content, None, chunked=chunked)
        self.hooks.step("next audited")
        return content

    def cut_over(self, plan: NextPlan, content: DataFrame, published: Published) -> None:
        """The one commit, its record in the books, staging trimmed."""
        work, report, spec = self.work, self.report, self.work.spec
        self.lease.check()
        report.generation = max(published.generation, self.books.last_generation()) + 1
        report.status, report.verb = "published", VERB
        report.reason = f"cut over from {published.encoder['reference']} to {spec.reference}"
        self.document |= {"state": CUT_OVER, "reason": MOVE_IT, "nights_left": 0, "missing": 0}
        report.migration = dict(self.document)
        target = Target(work.ref, published, published.table_id, report.generation)
        state = State(report.run_id, report.generation, report.record())
        described = work.encoding.described(work.config.tracking.uri)
        destination = work.config.destination
        try:
            report.version = publish_replace(
                work.spark, target, destination, plan.rows, content, spec, described, state, work.lexical
            )
        except BaseException:
            report.status = "failed"
            raise
        self.hooks.step("cut over")
        self.hooks.say(f"{report.reason}: version {report.version}; move next_encoder to encoder in the run file")
        self.document |= {"version": report.version}
        report.migration = dict(self.document)
        try:
            self.books.write(report.record())
            self.hooks.step("cut-over recorded")
            # Whoever took the lease over may have staged vectors of this encoder, and needs them.
            self.lease.check()
            trim_staging(work.spark, work.ref, spec.fingerprint)
        except (ShoalError, PySparkException, Py4JJavaError) as error:
            self.warn(f"version {report.version} is cut over, its bookkeeping is left to the next run: {error}")

    def _finish(self, plan: NextPlan, source: SourceRows, published: Published) -> None:
        content = self.judge(plan, source)
        self.document |= {"state": READY, "ndcg": self.report.ndcg}
        if self.work.config.migration.cutover == "manual":
            self.document["reason"] = "migration.cutover is manual: `shoal cutover FILE` switches the table"
        elif self._was_restored(published):
            self.document["reason"] = (
                "the table was restored after a cut-over to this encoder: `shoal cutover FILE` switches it again, or "
                "remove next_encoder"
            )
        else:
            self.cut_over(plan, content, published)
            return
        self.hooks.say(f"next encoder {self.work.spec.reference} is ready; {self.document['reason']}")

    def _was_restored(self, published: Published) -> bool:
        """Whether somebody went back behind a cut-over to this encoder: no night may undo that unasked."""
        restored = False
        for commit in commits(self.work.spark, published.ref):
            verb = commit.state.record.get("verb") if commit.state else None
            if verb == "restore":
                restored = True
            elif verb == VERB and commit.state is not None:
                return restored and commit.state.record.get("fingerprint") == self.work.spec.fingerprint
        return False

    def _encode(self, plan: NextPlan) -> None:
        report, work = self.report, self.work
        for warning in warnings_of(work.spec, plan.tonight, work.config.chunk):
            self.warn(f"next encoder: {warning}")
        try:
            with report.phase("encode"):
                work.encode(
                    plan.chunks,
                    run_id=report.run_id,
                    started=report.started,
                    lease=self.lease,
                    hooks=self.hooks,
                    warn=self.warn,
                    step_prefix="next ",
                )
        finally:
            # The night's record tells the time, not that of the cut-over.
            seconds, report.seconds["encode"] = report.seconds["encode"], 0.0
            self._count(plan, seconds)
        limits.check_vectors(work.spark, work.ref, fingerprint=work.spec.fingerprint, run_id=report.run_id)

    def _count(self, plan: NextPlan, seconds: float) -> None:
        work = self.work
        encoded, tokens = count_encoded(work.spark, work.ref, work.spec.fingerprint, self.report.run_id)
        failed = staged_errors(work.spark, work.ref, work.spec.fingerprint)
        vectors = staged_vectors(work.spark, work.ref, work.spec.fingerprint).select("content_hash")
        counts = failed.join(vectors, on="content_hash", how="left_anti").groupBy("error").count().collect()
        errors = plan.chunks.errors | {row["error"]: row["count"] for row in counts}
        left = max(0, plan.fresh - encoded)
        self.document |= {
            "encoded": encoded, "tokens": tokens, "seconds": round(seconds, 3), "missing": left,
            "errors": dict(sorted(errors.items())),
        }  # fmt: skip

    def _told(self, plan: NextPlan) -> None:
        chunks = plan.chunks
        self.document |= {
            "planned": chunks.planned,
            "distinct": chunks.distinct,
            "missing": plan.fresh,
            "errors": dict(chunks.errors),
            "per_night": plan.per_night,
        }
        self.hooks.say(
            f"next encoder {self.work.spec.reference}: {chunks.distinct} contents, {plan.fresh} missing, "
            f"{chunks.num_todo} to encode tonight"
        )

    def _say_progress(self, plan: NextPlan) -> None:
        left = plan.nights_left(plan.missing)
        self.document["reason"] = f"{plan.missing} of {plan.chunks.distinct} contents are missing"
        self.hooks.say(f"next encoder: {self.document['reason']}, about {left} more nights")

    def _stopped(self, error: ShoalError) -> None:
        told = self.work.config.mask(str(error))
        self.document |= failure(error, told)
        self.warn(f"next encoder {self.work.spec.reference}: the table keeps its encoder; {told}")


def settled_document(serving: EncoderWork) -> dict[str, Any]:
    """The run's `migration` where the table holds the vectors of `next_encoder` already."""
    spec = serving.spec
    return document_of(spec.reference, spec.fingerprint, CUT_OVER, MOVE_IT) | {"nights_left": 0}


def failure(error: ShoalError, told: str) -> dict[str, Any]:
    """What the run's `migration` says of an error; `told` is its message, masked."""
    state = REFUSED if isinstance(error, LimitError) else FAILED
    return {"state": state, "reason": f"{CODES[error.code]} ({error.code})", "error": told, "nights_left": None}


def document_of(reference: str, fingerprint: str | None, state: str, reason: str | None) -> dict[str, Any]:
    """The run's `migration` before anything is counted; README.md says what each key means."""
    return {
        "fingerprint": fingerprint,
        "encoder": reference,
        "state": state,
        "reason": reason,
        "error": None,
        "planned": 0,
        "distinct": 0,
        "missing": 0,
        "encoded": 0,
        "errors": {},
        "tokens": 0,
        "seconds": 0.0,
        "budget": None,
        "per_night": None,
        "nights_left": None,
        "estimate": {"seconds": 0.0, "price": None},
        "ndcg": None,
        "version": None,
    }
