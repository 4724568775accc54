"""The section `source` of a run file: where the rows come from, what identifies one, and what its text is."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shoal.conf.database import DatabaseConfig
from shoal.conf.redact import is_secret_name
from shoal.conf.section import (
    FreeEntries,
    Names,
    NaturalInt,
    Paths,
    Section,
    SettingPath,
    SettingProblem,
    Text,
    TextTemplate,
    Timestamp,
    raise_all,
)
from shoal.conf.template import Template, parse_template
from shoal.conf.values import MetadataColumn, parse_column

SETTING_OF_OPTION = frozenset(
    {"url", "user", "dbtable", "query", "partitioncolumn", "lowerbound", "upperbound", "numpartitions"}
)
"""Options of Spark's JDBC reader, in lower case, that a database has settings for."""


class SourceConfig(Section):
    """Where the rows come from, what identifies one, and what its text is."""

    format: Literal["delta", "parquet", "json", "csv", "text", "table", "query", "jdbc"] = Field(
        description="What the source is: a Delta table by path, files (json is one object per line, text is one row "
        "per file, subfolders included; an empty file gives none), a catalog table or view, an SQL query, or a table "
        "or query of a database."
    )
    path: Paths | None = Field(
        default=None,
        description="File, folder, glob or URI to read, or a list of them (Delta: one). For every format but table, "
        "query and jdbc.",
    )
    table: Text | None = Field(
        default=None, description="Name of the catalog table or view, or of the database's table; format table or jdbc."
    )
    query: Text | None = Field(
        default=None,
        description="SQL query whose result is the source, in the database's own SQL for format jdbc; format query or "
        "jdbc. A place to rename and join.",
    )
    database: DatabaseConfig | None = Field(default=None, description="The database; format jdbc only.")
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
    changes: Literal["auto", "snapshot"] = Field(
        default="auto",
        description="How a night finds what is new: auto reads the change feed of a Delta source where it has one and "
        "it reaches back far enough, snapshot always compares the whole source with the table. Both give the same.",
    )

    @model_validator(mode="before")
    @classmethod
    def _text_files_need_no_names(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("format") == "text":
            return {"key": "path", "text": "text", **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_all([*self._place_problems(), *self._column_problems()])
        return self

    def _place_problems(self) -> Iterator[SettingProblem]:
        wanted = {"table": ("table",), "query": ("query",), "jdbc": ("table", "query")}.get(self.format, ("path",))
        for name in ("path", "table", "query"):
            given = getattr(self, name) is not None
            if given and name not in wanted:
                yield SettingProblem(
                    (("format",), (name,)), f"a source of this format takes source.{wanted[0]}; remove source.{name}"
                )
            if not given and wanted == (name,):
                yield SettingProblem((("format",), (name,)), f"say what to read in source.{name}")
        if self.format == "jdbc" and (self.table is None) == (self.query is None):
            yield SettingProblem((("table",), ("query",)), "say what to read in exactly one of the two")
        if (self.format == "jdbc") != (self.database is not None):
            yield SettingProblem((("format",), ("database",)), "format jdbc and a database go together")
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
        shared = self.database is not None and self.database.partitions > 1
        for option in self.options if self.format == "jdbc" else ():
            if is_secret_name(option) or option.lower() in SETTING_OF_OPTION:
                advice = "use source.database, which keeps passwords out of the run file and shows one state"
                yield SettingProblem((("options", option),), advice)
            if shared and option.lower() in ("sessioninitstatement", "fetchsize"):
                advice = "it would part the connections from the state that they share; leave it out, or the partitions"
                yield SettingProblem((("options", option), ("database", "partitions")), advice)
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
