"""The settings of a run: one frozen, closed class per section, each setting documented where it is declared."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

from pydantic import BeforeValidator, Field, PrivateAttr, StrictBool, StrictFloat, StrictInt, model_validator

from shoal.conf.redact import MASK, masked_address, scrub
from shoal.conf.section import (
    Duration,
    FreeEntries,
    LimitValue,
    Memory,
    ModelReference,
    NaturalInt,
    PositiveInt,
    Price,
    RunName,
    Section,
    SettingPath,
    SettingProblem,
    StemmerName,
    TermPattern,
    Text,
    checked,
    property_problems,
    raise_all,
)
from shoal.conf.source import SourceConfig
from shoal.conf.values import Limit, ModelForm, model_form

MIN_MASKED = 4
"""Shorter values from the environment are no secrets, and would mask half of every message."""


class ChunkConfig(Section):
    """How a row's text is cut into chunks."""

    tokens: PositiveInt = Field(
        description="Most tokens in a chunk, counted by the encoder's tokenizer without its special tokens."
    )
    overlap: NaturalInt = Field(
        default=0, description="Tokens that a chunk repeats from the end of the one before it; less than `tokens`."
    )
    boundary: Literal["sentence", "word"] = Field(
        default="sentence", description="Where a chunk may end: at sentences where they fit, or at any word."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.overlap >= self.tokens:
            raise_all([SettingProblem((("overlap",), ("tokens",)), "the overlap must be smaller than the chunk")])
        return self


class EncoderConfig(Section):
    """What turns text into vectors; everything here but the backend is part of the fingerprint once resolved."""

    model: ModelReference = Field(
        description="The checkpoint: a folder (starting with ./, ../, ~ or /), the address of one on a store "
        "(`s3a://BUCKET/FOLDER`), `package:NAME` for one that an installed package carries, a Hub id, "
        "`models:/NAME@ALIAS` of the MLflow registry, or `hash:DIM` for vectors without meaning, to try a pipeline."
    )
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of a Hub model; resolved once to a commit."
    )
    pooling: Literal["mean", "cls", "lasttoken"] | None = Field(
        default=None, description="How token vectors become one; unset: what the checkpoint says."
    )
    max_tokens: PositiveInt | None = Field(
        default=None,
        description="Most tokens that the encoder sees of a chunk, special tokens included; unset: what the "
        "checkpoint says.",
    )
    normalize: StrictBool = Field(
        default=True, description="Scale vectors to length 1, so that the inner product is the cosine."
    )
    document_prompt: str | None = Field(
        default=None, description="Text put before every chunk; unset: what the checkpoint says; '': none."
    )
    query_prompt: str | None = Field(
        default=None, description="Text put before every query; unset: what the checkpoint says; '': none."
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of the forward pass; auto is resolved at the first run and kept with the table.",
    )
    backend: Literal["auto", "torch", "openvino"] = Field(
        default="auto",
        description="What runs the model; auto takes the fastest whose vectors agree with float32 torch.",
    )
    trust_remote_code: StrictBool = Field(
        default=False, description="Allow Python code that a checkpoint carries to run on the executors."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.revision is not None and self.form != "hub":
            advice = "only a Hub model has revisions (models:/ carries its version in its name); remove it"
            problems.append(SettingProblem((("model",), ("revision",)), advice))
        if self.backend == "openvino" and self.precision == "float16":
            advice = "OpenVINO runs on processors, in float32 or bfloat16; choose one of these, or backend torch"
            problems.append(SettingProblem((("backend",), ("precision",)), advice))
        if self.form == "hash":
            unused = [name for name in ("pooling", "trust_remote_code") if getattr(self, name)]
            unused += ["precision"] if self.precision not in ("auto", "float32") else []
            unused += ["backend"] if self.backend != "auto" else []
            unused += ["normalize"] if not self.normalize else []
            for name in unused:
                advice = "the hash encoder has no such choice (float32, length 1, no checkpoint); remove it"
                problems.append(SettingProblem((("model",), (name,)), advice))
        raise_all(problems)
        return self

    @property
    def form(self) -> ModelForm:
        """Where the model reference points: folder, store, package, hash, registry or hub."""
        return model_form(self.model)

    @property
    def hash_dim(self) -> int | None:
        """The dim of a `hash:DIM` encoder; None for a checkpoint, whose own files say it."""
        return int(self.model.removeprefix("hash:")) if self.form == "hash" else None


SETTING_OF_PROPERTY = {
    "delta.enabledeletionvectors": "deletion_vectors",
    "delta.enablechangedatafeed": "change_feed",
    "delta.deletedfileretentionduration": "retain",
    "delta.logretentionduration": "retain",
}


class DestinationConfig(Section):
    """The Delta table that a run keeps in step, by path or by catalog name."""

    path: Text | None = Field(
        default=None, description="Folder or URI of the table; with `table` the folder of an external table."
    )
    table: Text | None = Field(
        default=None, description="Catalog name of the table; without `path` the catalog decides where it lies."
    )
    sidecar: Text | None = Field(
        default=None,
        description="Folder of staging, work, the runs table and the lease. Unset: `<destination>__shoal` beside the "
        "table.",
    )
    store_text: StrictBool = Field(default=True, description="Publish the text of every chunk beside its vector.")
    deletion_vectors: StrictBool = Field(
        default=True, description="Let Delta mark rows as deleted instead of rewriting files; off for old readers."
    )
    change_feed: StrictBool = Field(
        default=False, description="Record row changes for others to read (Delta's change data feed)."
    )
    retain: Duration = Field(
        default=timedelta(days=7),
        description="How long restore works and going back to a former model encodes nothing.",
    )
    properties: FreeEntries = Field(
        default_factory=dict, description="More Delta table properties, set when the table is created."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.path is None and self.table is None:
            advice = "give a folder, a name in the catalog, or both for an external table"
            problems.append(SettingProblem((("path",), ("table",)), advice))
        for name in self.properties:
            setting = SETTING_OF_PROPERTY.get(name.lower())
            if setting is not None:
                advice = f"this property is set by destination.{setting}; use that"
                problems.append(SettingProblem((("properties", name),), advice))
            elif name.lower().startswith("shoal."):
                advice = "properties under shoal. are written by Shoal alone; choose another name"
                problems.append(SettingProblem((("properties", name),), advice))
        raise_all(problems)
        return self

    @property
    def name(self) -> str:
        """The catalog name, or the path of a table without one."""
        return self.table or self.path or ""


class LimitsConfig(Section):
    """When a run stops instead of publishing; a limit is a percentage or a whole number."""

    max_errors: LimitValue = Field(
        default=Limit(share=0.1, floor=100),
        description="Most chunks that may have an error instead of a vector. The default never trips below 100 chunks.",
    )
    max_deleted: LimitValue = Field(
        default=Limit(share=0.2, floor=100),
        description="Most published rows that a run may delete. The default never trips below 100 rows.",
    )
    min_rows: NaturalInt = Field(default=1, description="Fewest rows that the source must have; 0 accepts none.")
    max_cost: Price | None = Field(
        default=None, description="Highest estimated price of a run, in the unit of `encode.price_per_hour`."
    )


class GateConfig(Section):
    """A retrieval test that a run has to pass before it publishes."""

    folder: Text = Field(
        description="Folder with `queries.jsonl` (`_id`, `text`) and `qrels.tsv` (a header, then query id, key, "
        "relevance), as BEIR lays them out."
    )
    min_ndcg: Annotated[StrictFloat, Field(gt=0, le=1)] = Field(
        description="Lowest mean nDCG at rank `k`, from 0 to 1, of exact search in the table as it would be published."
    )
    k: PositiveInt = Field(default=10, description="Number of rows per query that are judged.")


class TrackingConfig(Section):
    """The MLflow record of every run."""

    enabled: StrictBool = Field(default=True, description="Record runs in MLflow; off, the other settings here wait.")
    uri: Text = Field(
        default="sqlite:///mlflow.db",
        description="Tracking server or database. A relative SQLite file lies beside the run file.",
    )
    experiment: Text | None = Field(default=None, description="MLflow experiment; unset: the name of the run.")
    tags: FreeEntries = Field(default_factory=dict, description="More tags for the MLflow run.")


class LineageConfig(Section):
    """Each run as OpenLineage's events; where they go is its client's own configuration (OPENLINEAGE_URL, a file)."""

    namespace: Text = Field(default="shoal", description="Of the job, and of tables that a catalog names.")


class EncodeConfig(Section):
    """How the encode phase is run: speed and price, never the vectors."""

    token_budget: PositiveInt | None = Field(
        default=None, description="Tokens in a microbatch, padding included; unset: found for the device."
    )
    wave_chunks: PositiveInt | None = Field(
        default=None, description="Chunks in a wave, the slice that one commit to staging makes safe; unset: found."
    )
    time_limit: Duration = Field(
        default=timedelta(minutes=10), description="Longest time for one microbatch before it counts as an error."
    )
    threads: PositiveInt | None = Field(
        default=None, description="Processor threads of one encoder; unset: the cores that Spark gives a task."
    )
    device: Annotated[str, BeforeValidator(checked(r"cpu|cuda(:\d+)?", "write cpu, cuda or cuda:0"))] | None = Field(
        default=None,
        description="Device of the encoder: `cpu`, `cuda` or `cuda:0`; unset: the GPU that Spark gives the task, else "
        "the processor. Local masters give none, so a GPU of this machine has to be named here.",
    )
    price_per_hour: Price | None = Field(
        default=None, description="What an hour of the whole cluster costs, in any currency; for the plan's estimate."
    )


class SparkConfig(Section):
    """How `shoal` opens Spark when it is not submitted, and properties for both cases."""

    master: Text | None = Field(
        default=None, description="Spark master; unset: what spark-submit gives, else `local[*]`."
    )
    remote: Text | None = Field(
        default=None,
        description="Server of Spark Connect, `sc://HOST:PORT`, instead of a Spark of our own; unset: SPARK_REMOTE.",
    )
    driver_memory: Memory | None = Field(default=None, description="Memory of a driver that `shoal` starts itself.")
    conf: FreeEntries = Field(
        default_factory=dict, description="More Spark properties, by their full names (`spark.sql.shuffle.partitions`)."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        own = {"spark.master": "spark.master", "spark.driver.memory": "spark.driver_memory"}
        problems = property_problems(self.conf, own)
        if self.remote is not None:
            if not self.remote.startswith("sc://"):
                problems.append(SettingProblem((("remote",),), "a server of Spark Connect is named as sc://HOST:PORT"))
            others = [(name,) for name in ("master", "driver_memory") if getattr(self, name) is not None]
            if others:
                problems.append(SettingProblem((("remote",), *others), "the server has its own; keep one of them"))
        raise_all(problems)
        return self


class BudgetConfig(Section):
    """How much of the next encoder's work one night may do; the first of the limits that is reached ends it."""

    chunks: PositiveInt | None = Field(default=None, description="Most chunks to encode in one night.")
    hours: Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Most hours of encoding in one night, by the rate of the nights before."
    )
    price: Price | None = Field(
        default=None, description="Highest price of one night, in the unit of `encode.price_per_hour`."
    )


MAX_CELLS = 8192
"""Centroids, and the sample that they are trained on, have to fit the driver's memory."""


class IndexConfig(Section):
    """Cells of like vectors that a search in SQL looks in, instead of the whole table."""

    recall: Annotated[StrictFloat, Field(gt=0, le=1)] = Field(
        default=0.95, description="Share of the true neighbours that a search is to find, by measurement at the build."
    )
    cells: Annotated[StrictInt, Field(ge=2, le=MAX_CELLS)] | None = Field(
        default=None, description="Number of cells; unset: by the size of the table."
    )
    min_chunks: NaturalInt = Field(
        default=100_000, description="Chunks from which on a run builds it: smaller tables are quick to search exactly."
    )


class LexicalConfig(Section):
    """The terms of each text beside its vector, for BM25 and hybrid search in SQL."""

    pattern: TermPattern = Field(
        default=r"\w\w+", description="A term, as a regular expression of Python's module regex; case does not count."
    )
    stopwords: tuple[Text, ...] = Field(
        default=(),
        description="Words that are no terms. BM25 gives words that most texts have next to no weight, so that none "
        "need be named.",
    )
    stemmer: StemmerName | None = Field(
        default=None, description="Language whose Snowball stemmer cuts `wings` and `wing` to one term; unset: none."
    )


class MigrationConfig(Section):
    """How the vectors of `next_encoder` come to be while the table goes on serving those of `encoder`."""

    budget: BudgetConfig = Field(
        default_factory=BudgetConfig, description="What one night may spend; unset: all that is missing."
    )
    cutover: Literal["auto", "manual"] = Field(
        default="auto",
        description="When every chunk has its next vector and the gate passes: switch the table in the same night, or "
        "wait for `shoal cutover`.",
    )


class HookConfig(Section):
    """Whom to tell when a run is over: a command or a webhook, with the run's JSON document."""

    command: Text | None = Field(
        default=None, description="Shell command; the document comes on its standard input. This or `webhook`."
    )
    webhook: (
        Annotated[
            str,
            BeforeValidator(
                checked(
                    r"https?://[^\s/?#@]+([/?#]\S*)?", "write an http:// or https:// address without user:password@"
                )
            ),
        ]
        | None
    ) = Field(default=None, description="URL that the document is sent to by POST; only its host is ever shown.")
    timeout: Duration = Field(default=timedelta(seconds=30), description="Longest time for one attempt.")
    retries: NaturalInt = Field(default=2, description="Further attempts when one fails.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.command is None) == (self.webhook is None):
            raise_all([SettingProblem((("command",), ("webhook",)), "give exactly one of the two")])
        return self


class RunConfig(Section):
    """One run file: what to read, how to encode it, where to publish it."""

    name: RunName = Field(description="Name of the run, in logs and as the MLflow experiment unless that is set.")
    source: SourceConfig = Field(description="Where the rows come from.")
    chunk: ChunkConfig | None = Field(default=None, description="How texts are cut; without it a row is one chunk.")
    encoder: EncoderConfig = Field(description="What turns text into vectors.")
    next_encoder: EncoderConfig | None = Field(
        default=None, description="The encoder to come: its vectors are made beside the serving ones, night by night."
    )
    migration: MigrationConfig = Field(
        default_factory=MigrationConfig, description="How the next encoder takes over; needs `next_encoder`."
    )
    destination: DestinationConfig = Field(description="The Delta table to keep in step.")
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="When a run stops instead of publishing.")
    gate: GateConfig | None = Field(
        default=None, description="Retrieval test before each publication; without it none is made."
    )
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Where runs are recorded.")
    encode: EncodeConfig = Field(default_factory=EncodeConfig, description="Speed and price of the encode phase.")
    index: IndexConfig | None = Field(
        default=None, description="Index of the table for search in SQL; without it a search reads all vectors."
    )
    lexical: LexicalConfig | None = Field(
        default=None, description="Terms for BM25 and hybrid search in SQL; without it the table has none."
    )
    maintenance: Literal["manual", "auto"] = Field(
        default="manual",
        description="auto: a run also builds the index, compacts the table and vacuums what `destination.retain` has "
        "passed, when due. manual: `shoal status` says when `shoal index`, `optimize` and `vacuum` are due.",
    )
    lineage: LineageConfig | None = Field(
        default=None, description="Unset: nobody is told what a run read and wrote. Needs openlineage-python."
    )
    on_success: HookConfig | None = Field(
        default=None, description="Whom to tell of a run that published, or found nothing to do."
    )
    on_failure: HookConfig | None = Field(default=None, description="Whom to tell of a run that did not get through.")
    spark: SparkConfig = Field(default_factory=SparkConfig, description="How Spark is opened.")

    _folder: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        limit = self.encoder.max_tokens
        if self.chunk is not None and limit is not None and self.chunk.tokens > limit:
            advice = "the encoder would cut the end off full chunks; make chunks smaller or raise the maximum"
            problems.append(SettingProblem((("chunk", "tokens"), ("encoder", "max_tokens")), advice))
        if self.gate is not None and len(self.source.key) != 1:
            advice = "qrels name rows by one key; remove the gate, or use a source with a single key column"
            problems.append(SettingProblem((("gate",), ("source", "key")), advice))
        if self.limits.max_cost is not None and self.encode.price_per_hour is None:
            advice = "without a price per hour there is no cost to limit; set it, or remove the limit"
            problems.append(SettingProblem((("limits", "max_cost"), ("encode", "price_per_hour")), advice))
        for name in ("path", "table"):
            place = getattr(self.destination, name)
            if place is not None and place == getattr(self.source, name):
                advice = "a run cannot publish over its own source; choose another destination"
                problems.append(SettingProblem((("source", name), ("destination", name)), advice))
        problems += self._migration_problems()
        raise_all(problems)
        return self

    def _migration_problems(self) -> list[SettingProblem]:
        problems = []
        if self.next_encoder is None and self.migration != MigrationConfig():
            advice = "without a next encoder there is nothing to migrate to; name it, or remove `migration`"
            problems.append(SettingProblem((("migration",), ("next_encoder",)), advice))
        if self.next_encoder == self.encoder:
            advice = "the two are the same, so there is nothing to migrate to; remove next_encoder, or change it"
            problems.append(SettingProblem((("next_encoder",), ("encoder",)), advice))
        if self.migration.budget.price is not None and self.encode.price_per_hour is None:
            advice = "without a price per hour there is no price to keep to; set it, or remove the budget's price"
            problems.append(SettingProblem((("migration", "budget", "price"), ("encode", "price_per_hour")), advice))
        limit = self.next_encoder.max_tokens if self.next_encoder else None
        if self.chunk is not None and limit is not None and self.chunk.tokens > limit:
            advice = "the next encoder would cut the end off full chunks; make chunks smaller or raise the maximum"
            problems.append(SettingProblem((("chunk", "tokens"), ("next_encoder", "max_tokens")), advice))
        return problems

    def mask(self, text: str) -> str:
        """The text with every value that came from the environment, and credentials in addresses, as `***`."""
        secrets = set()
        for path in self._hidden:
            value: Any = self
            for part in path:
                value = getattr(value, str(part), None) if isinstance(value, Section) else value[part]
            if value is not None and len(str(value)) >= MIN_MASKED:
                secrets.add(str(value))
        # One may be the beginning of another.
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, MASK).replace(repr(secret)[1:-1], MASK)
        for hook in (self.on_success, self.on_failure):
            if hook is not None and hook.webhook is not None:
                text = text.replace(hook.webhook, masked_address(hook.webhook))
        return scrub(text, pairs=True)

    @property
    def places(self) -> list[str]:
        """The addresses of what is read and written: of source, destination and models."""
        encoders = [encoder for encoder in (self.encoder, self.next_encoder) if encoder is not None]
        database = [self.source.database.url] if self.source.database else []
        named = [self.destination.path, self.destination.sidecar, *(encoder.model for encoder in encoders)]
        return [*self.source.paths, *database, *filter(None, named)]

    @property
    def named_paths(self) -> list[tuple[str, str]]:
        """(setting, path) of all that lies on a disk or in a store: models there, and MLflow's files or database.

        A name in the catalog may have a path for its last part, which Spark then reads.
        """
        database, gate = self.source.database, self.gate
        encoders = {"encoder.model": self.encoder, "next_encoder.model": self.next_encoder}
        tracking = re.sub(r"sqlite(\+\w+)?:///", "", self.tracking.uri).partition("?")[0]
        if tracking.startswith("file:"):
            tracking = unquote(tracking)
        named = {
            "source.database.password_file": database.password_file if database else None,
            "destination.path": self.destination.path,
            "destination.sidecar": self.destination.sidecar,
            "gate.folder": gate.folder if gate else None,
            **{name: each.model for name, each in encoders.items() if each and each.form in ("folder", "store")},
            "tracking.uri": tracking if self.tracking.enabled and tracking.startswith(("/", "file:")) else None,
        }
        paths = [("source.path", path) for path in self.source.paths]
        for setting, name in (("source.table", self.source.table), ("destination.table", self.destination.table)):
            if name and (setting, self.source.format) != ("source.table", "jdbc"):
                paths += [(setting, part) for part in name.split(".") if "/" in part]
        return paths + [(setting, path) for setting, path in named.items() if path is not None]

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from: the run file's, or the working directory without a file."""
        return self._folder or Path()

    def bind(self, folder: Path, hidden: frozenset[SettingPath]) -> None:
        """Record where the run file lies and which settings must never be shown; for the loader."""
        self._folder = folder
        self.hide(hidden)

    @property
    def experiment(self) -> str:
        """The MLflow experiment of the run."""
        return self.tracking.experiment or self.name
