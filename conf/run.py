"""The settings of a run: one frozen, closed class per section, each setting documented where it is declared.

Validation is pure (no file, network or clock). A rule that concerns several settings raises SettingsError, whose
advice never repeats a value; the loader adds the settings, what was found and the line.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    WithJsonSchema,
    model_validator,
)

from shoal.conf.redact import MASK, is_secret_name, scrub
from shoal.conf.template import Template, parse_template
from shoal.conf.values import (
    SHOAL_COLUMNS,
    UNFIT_NAME,
    Limit,
    MetadataColumn,
    ModelForm,
    format_duration,
    model_form,
    parse_column,
    parse_duration,
    parse_limit,
)

MIN_MASKED = 4
"""Shorter values from the environment are no secrets, and would mask half of every message."""

SettingPath = tuple[str | int, ...]
FILE_FORMATS = ("delta", "parquet", "json", "csv", "text")


@dataclass(frozen=True, slots=True)
class SettingProblem:
    """One broken rule: the settings concerned (paths inside the section that raises it) and what to do about it.

    `example` may repeat what the user wrote; it is shown only when none of the settings is hidden.
    """

    settings: tuple[SettingPath, ...]
    advice: str
    example: str = ""


class SettingsError(ValueError):
    """Every broken rule of one section; the loader turns each into a paragraph of a ConfigError."""

    def __init__(self, problems: list[SettingProblem]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{' and '.join(map(dotted, each.settings))}: {each.advice}" for each in problems))


def dotted(path: SettingPath) -> str:
    """The path of a setting as people write it: `source.columns[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _limit_schema() -> dict[str, Any]:
    return {"anyOf": [{"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*%$"}, {"type": "integer", "minimum": 0}]}


def _one_or_more(value: object) -> tuple[str, ...]:
    """A YAML string or list of strings as a tuple; ValueError for anything else and for an empty list."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items or not all(isinstance(item, str) for item in items):
        raise ValueError("write one name, or a list of names")
    return tuple(items)


def _column_entries(value: object) -> tuple[str, ...]:
    """Column entries whose published names are free; an empty list is fine here."""
    entries = _one_or_more(value) if value not in ([], ()) else ()
    columns = list(enumerate(map(parse_column, entries)))
    taken = (
        "that name belongs to a column of Shoal's own; publish it under another name with 'name AS new', or rename it "
    )
    unfit = "Delta allows no blanks and none of ,;{}()= in a column's name; publish it under another: 'name AS new'"
    _raise_all(
        [
            SettingProblem(
                ((index,),), f"{taken}in a source of format query", f"'{column.source} AS source_{column.name}'"
            )
            for index, column in columns
            if column.name.lower() in SHOAL_COLUMNS
        ]
        + [SettingProblem(((index,),), unfit) for index, column in columns if UNFIT_NAME.search(column.name)]
    )
    return entries


def _template(value: str) -> str:
    if isinstance(value, str):
        parse_template(value)
    return value


def _paths(value: object) -> str | list[str]:
    paths = _one_or_more(value)
    if not all(path.strip() for path in paths):
        raise ValueError("a path is empty; write where the files are")
    return value if isinstance(value, str) else list(paths)


def _checked(pattern: str, advice: str) -> Callable[[str], str]:
    """A validator that wants the whole text to match; `advice` is what the user reads when it does not."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if isinstance(value, str) and compiled.fullmatch(value) is None:
            raise ValueError(advice)
        return value

    return check


def _timestamp(value: str) -> str:
    if isinstance(value, str):
        try:
            datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("write a date or a time such as 2026-01-31 or 2026-01-31T06:00:00Z") from None
    return value


def _model_reference(value: str) -> str:
    if isinstance(value, str):
        model_form(value)
    return value


Text = Annotated[str, BeforeValidator(_checked(r"(?s).*\S.*", "it is blank; write a value or leave the setting out"))]
RunName = Annotated[
    str,
    BeforeValidator(
        _checked(r"[A-Za-z0-9][\w.-]{0,99}", "use at most 100 letters, digits, dots, hyphens and underscores")
    ),
]
Memory = Annotated[str, BeforeValidator(_checked(r"[1-9]\d*[kKmMgGtT]", "write a size such as 4g or 512m"))]
ModelReference = Annotated[str, BeforeValidator(_model_reference)]
Timestamp = Annotated[str, BeforeValidator(_timestamp)]
TextTemplate = Annotated[str, BeforeValidator(_template)]
PositiveInt = Annotated[StrictInt, Field(ge=1)]
NaturalInt = Annotated[StrictInt, Field(ge=0)]
Price = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]
LimitValue = Annotated[
    Limit,
    PlainValidator(parse_limit),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(_limit_schema()),
]
Duration = Annotated[
    timedelta,
    PlainValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^\d+\s*[smhd]$"}),
]
_NAMES_SCHEMA = {"type": "array", "items": {"type": "string"}}
Names = Annotated[
    tuple[str, ...],
    PlainValidator(_column_entries),
    PlainSerializer(list, return_type=list[str]),
    WithJsonSchema({"anyOf": [{"type": "string"}, _NAMES_SCHEMA]}),
]
FreeEntries = Annotated[
    dict[str, str],
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}),
]
Paths = Annotated[
    str | list[str], PlainValidator(_paths), WithJsonSchema({"anyOf": [{"type": "string"}, _NAMES_SCHEMA]})
]


class Section(BaseModel):
    """What all sections share: frozen, closed, and silent about secrets in `repr()` and `redacted()`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    _hidden: frozenset[SettingPath] = PrivateAttr(default=frozenset())

    def redacted(self) -> dict[str, Any]:
        """The settings by their YAML names, defaults included, as plain JSON values with every secret as `***`."""
        return _redact(self.model_dump(mode="json", by_alias=True), (), self._hidden)

    def hide(self, settings: frozenset[SettingPath]) -> None:
        """Mark settings (paths inside this section) whose values came from the environment: never shown again."""
        self._hidden = settings
        for name in type(self).model_fields:
            section = getattr(self, name)
            if isinstance(section, Section):
                section.hide(frozenset(path[1:] for path in settings if path[0] == name))

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        yield from self.redacted().items()


def _redact(value: Any, path: SettingPath, hidden: frozenset[SettingPath]) -> Any:
    if path in hidden:
        return MASK
    if isinstance(value, dict):
        return {name: _redact(item, (*path, name), hidden) for name, item in value.items()}
    if isinstance(value, list):
        return [_redact(item, (*path, index), hidden) for index, item in enumerate(value)]
    return shown(value, path)


def shown(value: Any, path: SettingPath) -> Any:
    """A plain value as it may be shown: masked where the name of its free entry says so, scrubbed where it is text."""
    free = next((place for place, part in enumerate(path) if part in FREE_SETTINGS and place + 1 < len(path)), None)
    if free is not None and any(is_secret_name(str(part)) for part in path[free + 1 :]):
        return MASK
    return scrub(value, pairs=free is not None) if isinstance(value, str) else value


FREE_SETTINGS = frozenset({"options", "properties", "tags", "conf"})
"""Settings whose entries the user names; only there can the name of an entry say that it is a secret."""


class SourceConfig(Section):
    """Where the rows come from, what identifies one, and what its text is."""

    format: Literal["delta", "parquet", "json", "csv", "text", "table", "query"] = Field(
        description="What the source is: a Delta table by path, files (json is one object per line, text is one row "
        "per file, subfolders included; an empty file gives none), a catalog table or view, or an SQL query."
    )
    path: Paths | None = Field(
        default=None,
        description="File, folder, glob or URI to read, or a list of them (Delta: one). For every format but table "
        "and query.",
    )
    table: Text | None = Field(default=None, description="Name of the catalog table or view; format table only.")
    query: Text | None = Field(
        default=None, description="SQL query whose result is the source; format query only. A place to rename and join."
    )
    version: NaturalInt | None = Field(
        default=None, description="Delta version to read; without it the newest. Format delta or table."
    )
    timestamp: Timestamp | None = Field(
        default=None,
        description="Point in time to read a Delta table at, such as 2026-01-31 or 2026-01-31T06:00:00Z. Format delta "
        "or table.",
    )
    options: FreeEntries = Field(
        default_factory=dict, description="Options of Spark's reader, such as `header: true` for csv."
    )
    schema_ddl: Text | None = Field(
        default=None,
        alias="schema",
        description="Columns and types as Spark DDL (`id STRING, body STRING`), instead of inferring them. Format "
        "json, csv or parquet.",
    )
    key: Names = Field(
        description="Column, or columns, that identify a row; `id AS doc_id` publishes under another name. Never "
        "NULL, never floating point. Format text: `path` unless set."
    )
    text: TextTemplate = Field(
        description="What is encoded: a column, or a template such as `{title}\\n{body}` (`{{` is a plain brace). A "
        "NULL field renders as the empty string; a row whose fields are all NULL is an error `null_text`. Format "
        "text: `text` unless set."
    )
    filter: Text | None = Field(default=None, description="SQL condition; rows for which it is not true are ignored.")
    columns: Names = Field(
        default=(),
        description="Metadata columns that travel with a row; `body AS summary` publishes under another name.",
    )
    duplicates: Literal["error", "keep_first"] = Field(
        default="error",
        description="What to do when several rows have one key: stop, or keep one of them, the same in every run.",
    )

    @model_validator(mode="before")
    @classmethod
    def _text_files_need_no_names(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("format") == "text":
            return {"key": "path", "text": "text", **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        _raise_all([*self._place_problems(), *self._column_problems()])
        return self

    def _place_problems(self) -> Iterator[SettingProblem]:
        wanted = self.format if self.format in ("table", "query") else "path"
        for name in ("path", "table", "query"):
            given = getattr(self, name) is not None
            if given and name != wanted:
                yield SettingProblem(
                    (("format",), (name,)), f"a source of this format takes source.{wanted}; remove source.{name}"
                )
            if not given and name == wanted:
                yield SettingProblem((("format",), (name,)), f"say what to read in source.{name}")
        if self.format == "delta" and isinstance(self.path, list):
            yield SettingProblem((("path",),), "a Delta source is one folder; read several with format query and UNION")
        pins = [name for name in ("version", "timestamp") if getattr(self, name) is not None]
        if len(pins) == 2:
            yield SettingProblem((("version",), ("timestamp",)), "they pin the same thing; keep one of the two")
        if pins and self.format not in ("delta", "table"):
            advice = "only format delta and table have versions; remove it"
            yield SettingProblem((("format",), (pins[0],)), advice)
        if self.schema_ddl is not None and self.format not in ("json", "csv", "parquet"):
            yield SettingProblem((("format",), ("schema",)), "it has no effect on this format; remove it")
        if self.options and self.format in ("table", "query"):
            yield SettingProblem((("format",), ("options",)), "they have no effect on this format; remove them")
        for option in self.options:
            if option.lower() in ("versionasof", "timestampasof"):
                name = "version" if option.lower() == "versionasof" else "timestamp"
                yield SettingProblem((("options", option),), f"use source.{name}, so that the version is recorded")

    def _column_problems(self) -> Iterator[SettingProblem]:
        names = [
            ((field, index), column)
            for field, columns in (("key", self.key_columns), ("columns", self.metadata_columns))
            for index, column in enumerate(columns)
        ]
        if not self.key:
            yield SettingProblem((("key",),), "name at least one column that identifies a row")
        seen: dict[str, SettingPath] = {}
        for path, column in names:
            alike = column.name.lower()
            if alike in seen:
                first = seen[alike]
                where = "key columns are published anyway" if first[0] == "key" != path[0] else "it is there already"
                yield SettingProblem((first, path), f"{where}; remove it, or rename one with 'name AS new'")
            seen.setdefault(alike, path)

    @property
    def paths(self) -> list[str]:
        """The paths as a list, empty for table and query."""
        return [] if self.path is None else [self.path] if isinstance(self.path, str) else list(self.path)

    @property
    def key_columns(self) -> tuple[MetadataColumn, ...]:
        """The key columns, each with its name in the source and its published name."""
        return tuple(parse_column(entry) for entry in self.key)

    @property
    def metadata_columns(self) -> tuple[MetadataColumn, ...]:
        """The metadata columns, each with its name in the source and its published name."""
        return tuple(parse_column(entry) for entry in self.columns)

    @property
    def key_names(self) -> tuple[str, ...]:
        """The published names of the key columns."""
        return tuple(column.name for column in self.key_columns)

    @property
    def metadata_names(self) -> tuple[str, ...]:
        """The published names of the metadata columns."""
        return tuple(column.name for column in self.metadata_columns)

    @property
    def template(self) -> Template:
        """`source.text`, parsed."""
        return parse_template(self.text)

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The source columns that the text is made of, each once, in order of first use."""
        return self.template.fields

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """Every source column that a run reads (keys, text, metadata), each once: what must exist."""
        keys = [column.source for column in self.key_columns]
        metadata = [column.source for column in self.metadata_columns]
        return tuple(dict.fromkeys([*keys, *self.text_fields, *metadata]))


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
            _raise_all([SettingProblem((("overlap",), ("tokens",)), "the overlap must be smaller than the chunk")])
        return self


class EncoderConfig(Section):
    """What turns text into vectors; everything here but the backend is part of the fingerprint once resolved."""

    model: ModelReference = Field(
        description="The checkpoint: a folder (starting with ./, ../, ~ or /), `package:NAME` for one that an "
        "installed package carries, a Hub id, `models:/NAME@ALIAS` of the MLflow registry, or `hash:DIM` for vectors "
        "without meaning, to try a pipeline."
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
        _raise_all(problems)
        return self

    @property
    def form(self) -> ModelForm:
        """Where the model reference points: folder, package, hash, registry or hub."""
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

    path: Text | None = Field(default=None, description="Folder or URI of the table; this or `table`.")
    table: Text | None = Field(default=None, description="Catalog name of the table; this or `path`.")
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
        if (self.path is None) == (self.table is None):
            advice = "give exactly one of the two: a folder, or a name in the catalog"
            problems.append(SettingProblem((("path",), ("table",)), advice))
        for name in self.properties:
            setting = SETTING_OF_PROPERTY.get(name.lower())
            if setting is not None:
                advice = f"this property is set by destination.{setting}; use that"
                problems.append(SettingProblem((("properties", name),), advice))
            elif name.lower().startswith("shoal."):
                advice = "properties under shoal. are written by Shoal alone; choose another name"
                problems.append(SettingProblem((("properties", name),), advice))
        _raise_all(problems)
        return self

    @property
    def name(self) -> str:
        """The path or the catalog name, whichever was given."""
        return self.path or self.table or ""


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
    device: Annotated[str, BeforeValidator(_checked(r"cpu|cuda(:\d+)?", "write cpu, cuda or cuda:0"))] | None = Field(
        default=None,
        description="Device of the encoder: `cpu`, `cuda` or `cuda:0`; unset: the GPU that Spark gives the task, else "
        "the processor. Local masters give none, so a GPU of this machine has to be named here.",
    )
    price_per_hour: Price | None = Field(
        default=None, description="What an hour of the whole cluster costs, in any currency; for the plan's estimate."
    )


class SparkConfig(Section):
    """How `shoal` opens Spark when it is not started by spark-submit, and properties for both cases."""

    master: Text | None = Field(
        default=None, description="Spark master; unset: what spark-submit gives, else `local[*]`."
    )
    driver_memory: Memory | None = Field(default=None, description="Memory of a driver that `shoal` starts itself.")
    conf: FreeEntries = Field(
        default_factory=dict, description="More Spark properties, by their full names (`spark.sql.shuffle.partitions`)."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        for name in self.conf:
            if not name.startswith("spark."):
                advice = "Spark ignores properties whose name does not start with 'spark.'; for Hadoop put "
                problems.append(SettingProblem((("conf", name),), advice + "'spark.hadoop.' in front"))
            elif name in ("spark.master", "spark.driver.memory"):
                setting = "master" if name == "spark.master" else "driver_memory"
                problems.append(SettingProblem((("conf", name),), f"use spark.{setting}"))
        _raise_all(problems)
        return self


class RunConfig(Section):
    """One run file: what to read, how to encode it, where to publish it."""

    name: RunName = Field(description="Name of the run, in logs and as the MLflow experiment unless that is set.")
    source: SourceConfig = Field(description="Where the rows come from.")
    chunk: ChunkConfig | None = Field(default=None, description="How texts are cut; without it a row is one chunk.")
    encoder: EncoderConfig = Field(description="What turns text into vectors.")
    destination: DestinationConfig = Field(description="The Delta table to keep in step.")
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="When a run stops instead of publishing.")
    gate: GateConfig | None = Field(
        default=None, description="Retrieval test before each publication; without it none is made."
    )
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Where runs are recorded.")
    encode: EncodeConfig = Field(default_factory=EncodeConfig, description="Speed and price of the encode phase.")
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
        _raise_all(problems)
        return self

    def mask(self, text: str) -> str:
        """The text with every value that came from the environment, and credentials in addresses, as `***`."""
        for path in self._hidden:
            value: Any = self
            for part in path:
                value = getattr(value, str(part), None) if isinstance(value, Section) else value[part]
            for secret in (str(value), repr(value)):
                if value is not None and len(str(value)) >= MIN_MASKED:
                    text = text.replace(secret, MASK)
        return scrub(text, pairs=True)

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


def _raise_all(problems: list[SettingProblem]) -> None:
    if problems:
        raise SettingsError(problems)
