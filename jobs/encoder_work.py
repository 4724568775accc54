"""What a run does for one encoder, the serving one or the next: its chunks, its vectors in staging, its account."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from pyspark.sql import DataFrame, SparkSession

from shoal.conf.run import RunConfig
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.canary_store import Probe, load_probe, save_probe
from shoal.jobs.encode_stage import encode_waves
from shoal.jobs.encoder_tasks import encoder_tasks, failed_tasks
from shoal.jobs.estimate import Estimate, estimate
from shoal.jobs.filesystem import join
from shoal.jobs.have import Have, find_have, look_back
from shoal.jobs.hooks import Hooks
from shoal.jobs.layout import TableRef, is_delta
from shoal.jobs.lease import Lease
from shoal.jobs.planner import ChunkPlan, Keep, RowPlan, Take, Waves, plan_chunks
from shoal.jobs.prepare import FULL_REFRESH, Encoding, options_of, try_out
from shoal.jobs.progress import Points, shown_progress
from shoal.jobs.publish import assemble
from shoal.jobs.published import Published
from shoal.jobs.reconcile import Account, reconcile
from shoal.jobs.remote import is_remote, own_address
from shoal.jobs.staging import staged_errors, staged_vectors
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.progress import ProgressReceiver, ProgressTarget
from shoal.udfs.terms import describe_terms


@dataclass(frozen=True)
class Encoded:
    """How the encode phase went; the counts are in staging."""

    progress: Points
    padding_share: float | None
    parity_min_cosine: float


@dataclass
class EncoderWork:
    """One resolved encoder at work on one table; `keep` says where the plan is kept meanwhile."""

    spark: SparkSession
    config: RunConfig
    ref: TableRef
    encoding: Encoding
    keep: Keep

    def __post_init__(self) -> None:
        self.trial: Probe | None = None
        self.trial_is_kept = False
        self.options = options_of(self.config)

    @property
    def spec(self) -> EncoderSpec:
        return self.encoding.spec

    @property
    def lexical(self) -> str | None:
        """What cuts the terms of the rows to come; None without `lexical` in the run file."""
        return describe_terms(self.config.lexical)

    def plan_chunks(
        self, rows: RowPlan, published: Published | None, take: Take | None = None
    ) -> tuple[ChunkPlan, Have]:
        """The chunks of the rows, and where their vectors are; `take` picks what to encode of what has none."""
        staged = is_delta(self.spark, self.ref.staging)
        if rows.replace == FULL_REFRESH and _is_same(published, rows, self.spec):
            # Nothing but damage asks for that, so what is published is not taken over.
            published = None
        have = find_have(self.spark, self.ref, published, self.spec.fingerprint, staged=staged)
        waves = Waves(encoder_tasks(self.spark).most, self.config.encode.wave_chunks)
        folder = self.spec.folder
        chunks = plan_chunks(rows, self.config.chunk, folder, have.hashes(), self.keep, waves, take)
        if published is not None and published.fingerprint == self.spec.fingerprint:
            # Of another encoder's table no earlier version is of use but those that `find_have` has found.
            chunks, have = look_back(self.spark, published, have, chunks, self.keep, waves)
        return chunks, have

    def probe(self) -> Probe:
        """The encoder's trial: this run's, an earlier one's, or made now; never twice."""
        if self.trial is None:
            kept = None if self.encoding.probe else load_probe(self.spark, self.ref, self.spec.fingerprint)
            self.trial, self.trial_is_kept = self.encoding.probe or kept, kept is not None
        if self.trial is None:
            self.trial, _ = try_out(self.spark, self.spec, self.options)
        return self.trial

    def rate(self) -> float:
        """Tokens per second of the whole cluster, out of the newest run; before the first only the trial knows it."""
        rate = None
        if is_delta(self.spark, self.ref.runs):
            rate = Bookkeeper(self.spark, self.ref, lambda _: None).last_rate(self.spec.fingerprint)
        return rate or float(self.probe().report["tokens_per_s"]) * encoder_tasks(self.spark).slots

    def estimate(self, todo: DataFrame | None, num_todo: int) -> Estimate:
        """What these contents (content_hash, text) cost to encode."""
        rate = None if todo is None else self.rate()
        return estimate(todo, num_todo, self.spec, rate=rate, price_per_hour=self.config.encode.price_per_hour)

    def encode(
        self,
        chunks: ChunkPlan,
        *,
        run_id: str,
        started: float,
        lease: Lease,
        hooks: Hooks,
        warn: Callable[[str], None],
        step_prefix: str = "",
    ) -> Encoded:
        """Encodes what the plan has to do into staging, under this run id, watching the lease around each wave."""
        assert chunks.todo is not None  # noqa: S101 - there is nothing to encode otherwise
        spec, probe = self.spec, self.probe()
        if not self.trial_is_kept and load_probe(self.spark, self.ref, spec.fingerprint) is None:
            save_probe(self.spark, self.ref, spec.fingerprint, spec.backend, probe)
        hooks.step(f"{step_prefix}probed")
        hooks.say(
            f"encoding {chunks.num_todo} chunks with {spec.reference} ({spec.backend}, {spec.precision}) in "
            f"{chunks.num_waves} waves"
        )

        def step(name: str) -> None:
            lease.check()
            hooks.step(f"{step_prefix}{name}")

        failed = failed_tasks(self.spark)
        host, bound = _listening(self.spark)
        with ProgressReceiver(host=bound) as receiver:
            num_done = chunks.distinct - chunks.num_todo
            with shown_progress(
                receiver, chunks.num_todo, num_done, chunks.num_waves, started, hooks.console, hooks.say
            ) as shown:
                encode_waves(
                    self.spark,
                    self.ref,
                    chunks.todo,
                    chunks.num_waves,
                    num_slots=encoder_tasks(self.spark).most,
                    run_id=run_id,
                    spec=spec,
                    options=self.options,
                    canaries=probe.canaries,
                    progress=ProgressTarget(host, receiver.port, receiver.secret, 0),
                    step=step,
                    staged=shown.wave_staged,
                    warn=warn,
                )
            totals = receiver.totals()
        for executor, number in failed_tasks(self.spark).items():
            if (new := number - failed.get(executor, 0)) > 0:
                warn(
                    f"executor {executor} failed tasks ({new}), which were done again; "
                    "its log says why, and `shoal doctor` visits every executor"
                )
        padding = 1 - totals.tokens / totals.padded if totals.padded else None
        return Encoded(shown.points, padding, probe.report["parity"]["min"])

    def account(self, rows: RowPlan, chunks: ChunkPlan, have: Have, run_id: str) -> tuple[Account, Have]:
        """What became of every chunk, and where the vectors are now that they have been staged."""
        have = replace(have, staged=staged_vectors(self.spark, self.ref, self.spec.fingerprint))
        fingerprint = self.spec.fingerprint
        return reconcile(self.spark, self.ref, rows, chunks, have, fingerprint=fingerprint, run_id=run_id), have

    def content(self, rows: RowPlan, chunks: ChunkPlan, have: Have) -> DataFrame:
        """The rows to publish."""
        vectors = have.vectors(chunks.contents())
        failed = staged_errors(self.spark, self.ref, self.spec.fingerprint)
        store_text = self.config.destination.store_text
        return assemble(rows, chunks.chunks, vectors, failed, store_text=store_text, lexical=self.lexical)


@dataclass(frozen=True)
class KeptBelow:
    """Keeps work tables as Parquet below one folder: a dead run's are dropped by name, without reading them."""

    spark: SparkSession
    folder: str

    def __call__(self, name: str, table: DataFrame, *, partition_by: str | None = None) -> DataFrame:
        path = join(self.folder, name)
        (table.write.partitionBy(partition_by) if partition_by else table.write).parquet(path)
        return self.spark.read.parquet(path)


def _listening(spark: SparkSession) -> tuple[str, str]:
    """The address that workers send their progress to, and the one to bind, which need not be the same."""
    if is_remote(spark):
        address = own_address(spark)
        return address, address
    host = spark.conf.get("spark.driver.host") or "127.0.0.1"
    return host, spark.conf.get("spark.driver.bindAddress", host) or host


def _is_same(published: Published | None, rows: RowPlan, spec: EncoderSpec) -> bool:
    """Whether a table has the encoder and the key of the plan already."""
    return published is not None and (published.fingerprint, published.keys) == (spec.fingerprint, rows.keys)
