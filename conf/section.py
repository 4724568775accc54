"""What the sections of a run file share: the base class, broken rules, and the types of settings.

Validation is pure (no file, network or clock). A rule that concerns several settings raises SettingsError, whose
advice never repeats a value; the loader adds the settings, what was found and the line.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

import regex
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    StrictFloat,
    StrictInt,
    WithJsonSchema,
)

from shoal.conf.redact import MASK, is_secret_name, masked_address, scrub
from shoal.conf.template import parse_template
from shoal.conf.values import (
    SHOAL_COLUMNS,
    UNFIT_NAME,
    Limit,
    format_duration,
    model_form,
    parse_column,
    parse_duration,
    parse_limit,
)

SettingPath = tuple[str | int, ...]


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
    raise_all(
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


def checked(pattern: str, advice: str) -> Callable[[str], str]:
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


def _term_pattern(value: str) -> str:
    if isinstance(value, str):
        try:
            compiled = regex.compile(value)
        except regex.error as error:
            raise ValueError(f"write a regular expression of Python's module regex: {error}") from None
        if compiled.fullmatch(""):
            raise ValueError("it matches nothing at all as a term; write one that needs a character at least")
    return value


def _model_reference(value: str) -> str:
    if isinstance(value, str):
        model_form(value)
    return value


Text = Annotated[str, BeforeValidator(checked(r"(?s).*\S.*", "it is blank; write a value or leave the setting out"))]
RunName = Annotated[
    str,
    BeforeValidator(
        checked(r"[A-Za-z0-9][\w.-]{0,99}", "use at most 100 letters, digits, dots, hyphens and underscores")
    ),
]
VariableName = Annotated[
    str, BeforeValidator(checked(r"[A-Za-z_]\w*", "write the name of an environment variable, without $"))
]
Memory = Annotated[str, BeforeValidator(checked(r"[1-9]\d*[kKmMgGtT]", "write a size such as 4g or 512m"))]
ModelReference = Annotated[str, BeforeValidator(_model_reference)]
Timestamp = Annotated[str, BeforeValidator(_timestamp)]
TextTemplate = Annotated[str, BeforeValidator(_template)]
TermPattern = Annotated[str, BeforeValidator(_term_pattern)]
StemmerName = Literal[
    "arabic", "armenian", "basque", "catalan", "danish", "dutch", "english", "finnish", "french", "german", "greek",
    "hindi", "hungarian", "indonesian", "irish", "italian", "lithuanian", "nepali", "norwegian", "porter",
    "portuguese", "romanian", "russian", "serbian", "spanish", "swedish", "tamil", "turkish", "yiddish",
]  # fmt: skip
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
NestedEntries = Annotated[dict[str, Any], WithJsonSchema({"type": "object"})]
"""What another program reads: its entries have the types that YAML gives them."""
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

    def masked_texts(self) -> Iterator[tuple[str, str]]:
        """Each value that is not shown as it is, as text, and what is shown; wherever it came from."""
        yield from _masked(self.model_dump(mode="json", by_alias=True), ())

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


def _masked(value: Any, path: SettingPath) -> Iterator[tuple[str, str]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if entries is not None:
        for name, item in entries:
            yield from _masked(item, (*path, name))
    elif value is not None and (masked := shown(value, path)) != value:
        yield str(value), masked


def shown(value: Any, path: SettingPath) -> Any:
    """A plain value as it may be shown: masked where the name of its free entry says so, scrubbed where it is text."""
    free = next((place for place, part in enumerate(path) if part in FREE_SETTINGS and place + 1 < len(path)), None)
    if free is not None and any(is_secret_name(str(part)) for part in path[free + 1 :]):
        return MASK
    if path and path[-1] == "webhook" and isinstance(value, str):
        return masked_address(value)
    return scrub(value, pairs=free is not None) if isinstance(value, str) else value


FREE_SETTINGS = frozenset({"options", "properties", "tags", "conf", "new_cluster"})
"""Settings whose entries the user names; only there can the name of an entry say that it is a secret."""


def property_problems(conf: Mapping[str, str], own: Mapping[str, str]) -> list[SettingProblem]:
    """What is wrong with the names of Spark properties under `conf`; `own`: those that have a setting, and which."""
    problems = []
    for name in conf:
        if not name.startswith("spark."):
            advice = "Spark ignores properties whose name does not start with 'spark.'; for Hadoop put "
            problems.append(SettingProblem((("conf", name),), advice + "'spark.hadoop.' in front"))
        elif name in own:
            problems.append(SettingProblem((("conf", name),), f"use {own[name]}"))
    return problems


def raise_all(problems: list[SettingProblem]) -> None:
    """SettingsError with all of them, if there are any."""
    if problems:
        raise SettingsError(problems)
