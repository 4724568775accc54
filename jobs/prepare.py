"""What a run settles before it plans: the encoder with its fingerprint, and how it will publish."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from shoal.conf import errors
from shoal.conf.errors import (
    CODE_NOTE,
    CODES,
    ConfigError,
    EncoderChangedError,
    RefusedError,
    RunError,
    ShoalError,
    WorkerError,
)
from shoal.conf.redact import scrub
from shoal.conf.run import EncoderConfig, RunConfig
from shoal.jobs.canary_store import Probe, known_precision, probe_of
from shoal.jobs.cells import CELL
from shoal.jobs.encoder_tasks import encoder_tasks, map_encoders, wait_for_executors
from shoal.jobs.filesystem import full_disk
from shoal.jobs.layout import TableRef
from shoal.jobs.model_source import pinned_reference, resolve_spec
from shoal.jobs.publish import missing_constraints
from shoal.jobs.published import Published
from shoal.jobs.remote import without_java
from shoal.jobs.session import DYNAMIC, is_here
from shoal.jobs.source import SourceRows
from shoal.udfs.encode_udf import ArrowFunction, make_canaries, make_probe
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.schema import PROBE_OUTPUT_DDL
from shoal.udfs.terms_udf import terms_udf
from shoal.udfs.vectors import MIN_COSINE, cosines


@dataclass(frozen=True)
class Described:
    """An encoder of the run file as its files describe it: precision and back end may still be auto."""

    settings: EncoderConfig
    spec: EncoderSpec


@dataclass(frozen=True)
class Encoders:
    """Which encoder serves and which is to come; `cut_over`: the one to come serves already."""

    serving: Described
    coming: Described | None = None
    cut_over: bool = False

    def on(self, published: Published | None) -> "Encoders":
        """The same on a table that may have been cut over: then the next encoder is the one that serves."""
        if published is None or self.coming is None:
            return self
        settled = _as_published(self.coming.spec, published)
        if settled.precision == "auto" or settled.fingerprint != published.fingerprint:
            return self
        return Encoders(self.coming, None, cut_over=True)


FULL_REFRESH = "full refresh asked for"

MOST_TRIALS = 64
"""Slots whose canaries are compared at an encoder's first use: the driver gets the vectors of each."""


@dataclass(frozen=True)
class Encoding:
    """A resolved encoder; `probe` only when it had to be tried out to be resolved."""

    settings: EncoderConfig
    spec: EncoderSpec
    probe: Probe | None

    def described(self, tracking_uri: str) -> dict[str, Any]:
        """What the table remembers: enough to say what the encoder is, and to build it again for a query.

        An address with credentials in it is not remembered; MLFLOW_TRACKING_URI then says where the registry is.
        """
        settings = self.settings
        registry = (
            tracking_uri if settings.form == "registry" and scrub(tracking_uri, pairs=True) == tracking_uri else None
        )
        return {
            "identity": self.spec.identity(),
            "reference": self.spec.reference,
            "revision": self.spec.revision,
            "backend": self.spec.backend,
            "query_prompt": self.spec.query_prompt,
            "registry": registry,
            "settings": settings.model_dump(mode="json"),
        }


def describe_encoders(config: RunConfig) -> Encoders:
    """The encoders of the run file; ModelError when a model of either is not there."""

    def describe(settings: EncoderConfig) -> Described:
        return Described(settings, resolve_spec(settings, model_cache(), tracking_uri=config.tracking.uri))

    return Encoders(describe(config.encoder), describe(config.next_encoder) if config.next_encoder else None)


def resolve_encoder(
    spark: SparkSession,
    config: RunConfig,
    described: Described,
    ref: TableRef,
    published: Published | None,
    *,
    full_refresh: bool,
    say: Callable[[str], None],
) -> Encoding:
    """The described encoder with precision and back end settled, once and for all at the first run.

    What the table (or, before it exists, an earlier attempt) has settled holds on any processor; only where nothing is
    settled does an executor load the model and try. Raises EncoderChangedError when the table holds the vectors of
    another encoder and the run may not replace them.
    """
    spec = described.spec
    settled = None if published is None else _as_published(spec, published)
    # A full refresh may bring another encoder, which inherits nothing from its predecessor.
    if (
        published is not None
        and settled is not None
        and (not full_refresh or settled.fingerprint == published.fingerprint)
    ):
        spec = settled
    elif found := known_precision(spark, ref, spec):
        spec = _settle(spec, *found)
    probe = None
    if spec.precision == "auto" or spec.backend == "auto":
        say(f"trying out encoder {spec.reference}")
        probe, spec = try_out(spark, spec, options_of(config))
    if published is not None and published.fingerprint != spec.fingerprint and not full_refresh:
        raise _changed(published, spec)
    return Encoding(described.settings, spec, probe)


def _as_published(spec: EncoderSpec, published: Published) -> EncoderSpec:
    """The encoder with what the table has settled, wherever the run file leaves the choice."""
    recorded = published.encoder
    return _settle(spec, recorded["identity"].get("precision"), recorded.get("backend"))


def options_of(config: RunConfig, *, role: str = "document") -> EncodeOptions:
    """The settings of `encode` as the executors take them."""
    settings = config.encode
    return EncodeOptions(
        token_budget=settings.token_budget,
        time_limit_s=settings.time_limit.total_seconds(),
        threads=settings.threads,
        device=settings.device,
        role="query" if role == "query" else "document",
    )


def try_out(spark: SparkSession, spec: EncoderSpec, options: EncodeOptions) -> tuple[Probe, EncoderSpec]:
    """Loads the model in one task, settles precision and back end, checks parity, and encodes the canaries.

    What it says the table is held against for ever, so on a cluster every slot, up to MOST_TRIALS, encodes them too:
    WorkerError where they do not agree.
    """
    (row,) = _told(spark, spec, make_probe(spec, options), 1)
    told = probe_of("", row["report"], row["vectors"]).report
    resolved = replace(spec, precision=told["precision"], backend=told["backend"])
    first = probe_of(resolved.fingerprint, row["report"], row["vectors"])
    if not is_here(spark):
        if spark.conf.get(DYNAMIC, "false") != "true" and not without_java(spark):
            wait_for_executors(spark)
        num_tasks = min(encoder_tasks(spark).slots, MOST_TRIALS)
        others = _told(spark, resolved, make_canaries(resolved, options), num_tasks)
        require_agreement([first, *(probe_of("", each["report"], each["vectors"]) for each in others)])
    return first, resolved


def _told(spark: SparkSession, spec: EncoderSpec, function: ArrowFunction, num_tasks: int) -> list[Row]:
    """What so many tasks that load the encoder say, a row of PROBE_OUTPUT each."""
    try:
        tasks = spark.range(0, num_tasks, 1, num_tasks)
        return map_encoders(tasks, spec, function, PROBE_OUTPUT_DDL).collect()
    except (PySparkException, Py4JJavaError) as error:
        raise worker_error(error) from error


def require_agreement(probes: Sequence[Probe]) -> None:
    """WorkerError where trials of one encoder gave other vectors than the first of them."""
    limit = min(MIN_COSINE[probe.report["precision"]] for probe in probes)
    lowest = np.min([cosines(probes[0].canaries.vectors_CD, probe.canaries.vectors_CD) for probe in probes])
    if not lowest >= limit:
        raise WorkerError(
            f"executors give different vectors for the same texts (lowest cosine {lowest:.7f}, allowed {limit:.7f}), "
            "and nothing says yet which are right; `shoal doctor` visits each and names them",
            code="CANARIES_MOVED",
        )


UNFIT = {
    "PYTHON_VERSION_MISMATCH": "the workers have another Python than the driver",
    "Cannot run program": "a worker found no Python where it was told to look",
    "ModuleNotFoundError: ": "the Python of a worker lacks a package",
}
REFUSED_BY_STORE = (
    "UnknownStoreException: ",
    "NoSuchBucketException: ",
    "AccessDeniedException: ",
    "NoAwsCredentialsException: ",
    "CredentialInitializationException: ",
)
UNFIT_ADVICE = (
    "`python` or `environment` of the target (without one: spark.pyspark.python) say what the workers run; it needs "
    "the driver's minor version and Shoal's packages; `shoal doctor` visits them all"
)


def worker_error(error: PySparkException | Py4JJavaError) -> ShoalError:
    """The error of ours that a worker raised, out of the JVM's and Python's stack traces; WorkerError for any other."""
    lines = [line.strip() for line in str(error).splitlines()]
    for index, line in enumerate(lines):
        name, found, message = line.partition(": ")
        kind = getattr(errors, name.rpartition(".")[2], None) if name.startswith("shoal.conf.errors.") else None
        if found and isinstance(kind, type) and issubclass(kind, ShoalError):
            return kind(message, code=_noted_code(lines[index + 1 :]))
    if full := full_disk(error):
        return full
    for line in lines:
        # Java says of files on local disks too that access is denied.
        if any(sign in line for sign in REFUSED_BY_STORE) and ("AccessDenied" not in line or "://" in line):
            advice = "check the addresses of the run file, and the credentials that Spark has for the store"
            return ConfigError(f"a store refused: {line}; {advice} (STORAGE.md)", code="STORE_UNREACHABLE")
    for sign, what in UNFIT.items():
        for line in lines:
            if sign in line:
                return ConfigError(f"{what}: {line[line.index(sign) :]}; {UNFIT_ADVICE}", code="WORKERS_UNFIT")
    if gone := re.search('StatusCode.UNAVAILABLE.*?details = "(.*?)"', str(error), re.DOTALL):
        return RunError(
            f"the server of Spark Connect went away ({gone[1]}); what has been staged is kept, run it again",
            code="SPARK_UNAVAILABLE",
        )
    told = next(
        (line for line in reversed(lines) if "Error: " in line or "Exception: " in line), lines[0] if lines else ""
    )
    return WorkerError(
        f"an executor failed: {told}; what has been staged is kept, run it again (--debug shows the trace)"
    )


def try_terms(spark: SparkSession, described: str | None) -> None:
    """Has an executor cut a text: a stemmer that it lacks is told before anything is encoded."""
    if described is None:
        return
    try:
        spark.range(1).select(terms_udf(described)(F.lit("a text"))).collect()
    except (PySparkException, Py4JJavaError) as error:
        raise worker_error(error) from error


def _noted_code(lines: list[str]) -> str | None:
    """The code that the error carries as a note, which a stack trace shows below its message."""
    code = next((line.removeprefix(CODE_NOTE) for line in lines if line.startswith(CODE_NOTE)), None)
    return code if code in CODES else None


def replace_reason(
    published: Published | None,
    source: SourceRows,
    columns: dict[str, str],
    spark: SparkSession,
    fingerprint: str,
    lexical: str | None,
    *,
    full_refresh: bool,
) -> str | None:
    """Why the whole table has to be written anew, None when a MERGE of the difference will do.

    `columns`: name -> type of the columns that this run would publish; `lexical`: how it cuts terms. Raises
    RefusedError when the key columns differ and nobody asked for a full refresh.
    """
    if published is None:
        return "first run"
    if full_refresh:
        return FULL_REFRESH
    if published.fingerprint != fingerprint:
        return "another encoder"
    if published.keys != source.keys:
        raise RefusedError(
            f"source.key: table {published.ref} has the key columns {list(published.keys)} and the run file has "
            f"{list(source.keys)}, so no row of the table could be kept; name another destination, or replace "
            f"the table with `shoal embed FILE --full-refresh`",
            code="KEY_CHANGED",
        )
    fields = [field for field in published.rows(spark).schema.fields if field.name != CELL]
    old = {field.name: field.dataType.simpleString() for field in fields}
    retyped = [key for key in source.keys if old.get(key) != columns.get(key)]
    if retyped:
        was, now = (", ".join(f"{key} {types.get(key)}" for key in retyped) for types in (old, columns))
        raise RefusedError(
            f"source.key: table {published.ref} has the keys ({was}) and the source now gives ({now}), so no row "
            f"of the table could be kept; give the source's types with source.schema or a query, or "
            f"replace the table with `shoal embed FILE --full-refresh`",
            code="KEY_CHANGED",
        )
    if missing_constraints(published.properties, int(published.encoder["identity"]["dim"])):
        return "its constraints are gone"
    differing = sorted(name for name in old.keys() | columns.keys() if old.get(name) != columns.get(name))
    if differing:
        return f"columns changed: {', '.join(differing)}"
    return "its terms were cut by other settings" if published.lexical != lexical else None


def model_cache() -> Path:
    """Where models fetched from the MLflow registry are kept on this machine."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "shoal" / "models"


def encoder_of(published: Published) -> EncoderSpec:
    """The table's encoder, found again by its reference and proved to be the same by its fingerprint."""
    recorded = published.encoder
    settings = EncoderConfig.model_validate(recorded["settings"])
    if settings.form == "hub" and recorded["revision"]:
        settings = settings.model_copy(update={"revision": recorded["revision"]})
    if settings.form == "registry":
        settings = settings.model_copy(update={"model": pinned_reference(settings.model, recorded["revision"])})
    spec = resolve_spec(settings, model_cache(), tracking_uri=recorded.get("registry"))
    spec = replace(
        spec,
        precision=recorded["identity"]["precision"],
        backend=recorded["backend"],
        query_prompt=recorded["query_prompt"],
    )
    if spec.fingerprint != published.fingerprint:
        raise EncoderChangedError(
            f"table {published.ref} holds vectors of fingerprint {published.fingerprint}, and {recorded['reference']} "
            f"is now {spec.fingerprint}: the model's files have changed. Put the former files back; a query vector "
            f"of another encoder would find nothing sensible",
            code="MODEL_CHANGED",
        )
    return spec


def comparable(published: Published | None, source: SourceRows, spark: SparkSession) -> DataFrame | None:
    """The published rows, where the keys of the source can be compared with theirs."""
    if published is None or published.keys != source.keys:
        return None
    rows = published.trusted_rows(spark)
    same = all(rows.schema[key].dataType == source.rows.schema[key].dataType for key in source.keys)
    return rows if same else None


def _settle(spec: EncoderSpec, precision: str | None, backend: str | None) -> EncoderSpec:
    """Takes what is recorded wherever the run file leaves the choice."""
    if spec.precision == "auto" and precision:
        spec = replace(spec, precision=precision)  # type: ignore[arg-type]
    if spec.backend == "auto" and backend:
        spec = replace(spec, backend=backend)  # type: ignore[arg-type]
    return spec


def _changed(published: Published, spec: EncoderSpec) -> EncoderChangedError:
    old, new = published.encoder["identity"], spec.identity()
    differing = [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    return EncoderChangedError(
        f"encoder: table {published.ref} holds vectors of {published.encoder['reference']} (fingerprint "
        f"{published.fingerprint}) and the run file asks for {spec.reference} (fingerprint {spec.fingerprint}); "
        f"{'; '.join(differing)}. Vectors of two encoders never share a table: put the old settings back "
        f"and give the new ones as next_encoder, which takes over when all its vectors are there, or replace every "
        f"vector now with `shoal embed FILE --full-refresh`"
    )
