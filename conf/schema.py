"""The settings described for others: a JSON Schema for editors, and the reference table of the README."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from pydantic.fields import FieldInfo

from shoal.conf.declared import section_of
from shoal.conf.run import RunConfig
from shoal.conf.section import Section
from shoal.conf.target import TargetConfig
from shoal.conf.values import Limit, format_duration


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a run file, with the YAML names and the documentation of every setting."""
    schema = RunConfig.model_json_schema(by_alias=True)
    for section in schema["$defs"].values():
        for name, described in section["properties"].items():
            if (section["title"], name) in _WRITTEN_DEFAULTS:
                described["default"] = _WRITTEN_DEFAULTS[section["title"], name]
    source = schema["$defs"]["SourceConfig"]
    source["required"] = ["format"]
    source["if"] = {"properties": {"format": {"const": "text"}}}
    source["else"] = {"required": ["key", "text"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Shoal run file",
    }


def field_table() -> str:
    """A Markdown table per section: setting, default, documentation; the README holds exactly this text."""
    tables = [_table("Run file", RunConfig), *_tables_within(RunConfig, ""), _table("Target file", TargetConfig)]
    return "\n\n".join(tables) + "\n"


def _tables_within(outer: type[Section], prefix: str) -> Iterator[str]:
    for name, field in outer.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            yield _table(f"`{prefix}{name}`", section)
            yield from _tables_within(section, f"{prefix}{name}.")


def _table(title: str, section: type[Section]) -> str:
    rows = [
        f"| `{field.alias or name}` | {_default(field)} | {field.description} |"
        for name, field in section.model_fields.items()
    ]
    return "\n".join([f"### {title}", "", "| setting | default | |", "|---|---|---|", *rows])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    default = field.default
    if field.default_factory is not None or default is None or default == ():
        return ""
    return f"`{_written(default)}`"


def _written(default: object) -> str:
    """A default as a run file writes it."""
    if isinstance(default, timedelta):
        return format_duration(default)
    return str(default).lower() if isinstance(default, bool) else str(default)


_WRITTEN_DEFAULTS = {
    (section.__name__, name): _written(field.default)
    for section in (section_of(field.annotation) for field in RunConfig.model_fields.values())
    if section is not None
    for name, field in section.model_fields.items()
    if isinstance(field.default, timedelta | Limit)
}
