"""What is wrong with a file of settings, a paragraph each: where, what was found, what to do."""

import copy
import difflib
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from shoal.conf.declared import FileKind
from shoal.conf.document import Document
from shoal.conf.redact import is_credential
from shoal.conf.section import FREE_SETTINGS, SettingPath, SettingsError, dotted, shown

_LONGEST_SHOWN = 80


def find_problems(kind: FileKind, data: dict[str, Any], found: Document) -> list[str]:
    """A paragraph for every problem of the data.

    Rules about several settings are tried only where a whole section is fine setting by setting, so broken settings are
    taken out (a required one is replaced) and the rest is checked again until nothing new turns up.
    """
    data = copy.deepcopy(data)
    paragraphs: list[str] = list(_plain_credentials(found.values, (), found))
    broken: set[SettingPath] = set()
    while True:
        try:
            kind.root.model_validate(data)
        except ValidationError as error:
            details = error.errors(include_url=False)
        else:
            return paragraphs
        paragraphs += [text for each in details for text in _explain(kind, each, found, broken)]
        new = {path for each in details for path in _culprits(kind, each, data)} - broken
        if not new:
            return paragraphs
        broken |= new
        for path in new:
            section = value_at(data, path[:-1])
            section.pop(path[-1], None)
            if path in kind.stand_ins:
                section[path[-1]] = copy.deepcopy(kind.stand_ins[path])


def _culprits(kind: FileKind, details: ErrorDetails, data: dict[str, Any]) -> Iterator[SettingPath]:
    """The settings to take out so that the rules behind a validation error have something to work on."""
    path = details["loc"]
    cause = details.get("ctx", {}).get("error")
    if not isinstance(cause, SettingsError):
        groups = [[path]]
    else:
        groups = [[(*path, *setting) for setting in problem.settings] for problem in cause.problems]
    for settings in groups:
        whole = [each[:-1] if isinstance(each[-1], int) else each for each in settings]
        sections = [(value_at(data, each[:-1]), each) for each in whole]
        there = [
            each
            for section, each in sections
            if isinstance(section, dict) and (each[-1] in section or each in kind.stand_ins)
        ]
        optional = [each for each in there if each not in kind.stand_ins]
        yield from (optional or there)[-1:]


def _explain(kind: FileKind, details: ErrorDetails, found: Document, broken: set[SettingPath]) -> Iterator[str]:
    """The paragraphs of one validation error, but for those that only follow from a broken setting."""
    path = details["loc"]
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, SettingsError):
        for problem in cause.problems:
            settings = [(*path, *setting) for setting in problem.settings]
            if not any(_touches(broken, setting) for setting in settings):
                yield from _paragraph(settings, problem.advice, found, problem.example)
    elif _touches(broken, path):
        return
    elif details["type"] == "extra_forbidden":
        yield f"{found.origin(path)}: {kind.unknown(path)}"
    else:
        yield from _paragraph([path], str(cause) if cause is not None else _advice(kind, details, found), found)


def _paragraph(settings: list[SettingPath], advice: str, found: Document, example: str = "") -> Iterator[str]:
    """One paragraph: where, which settings, what was found, what to do; none when a variable was missing anyway."""
    if any(_touches(found.unset, path) for path in settings):
        return
    what = " and ".join(f"{dotted(path)} is {_shown(path, found)}" for path in settings)
    if example and not any(_touches(found.hidden, path) for path in settings):
        advice = f"{advice}: {example}"
    yield f"{found.origin(settings[-1])}: {what}; {advice}."


def _plain_credentials(value: Any, path: SettingPath, found: Document) -> Iterator[str]:
    """A paragraph for each credential that is written out, where the user names the entries."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _plain_credentials(item, (*path, name), found)
    elif isinstance(value, str) and value.strip() and is_credential(str(path[-1])):
        is_free = any(part in FREE_SETTINGS - {"tags"} for part in path[:-1])
        if is_free and not value.startswith("{{secrets/") and not _touches(found.hidden, path):
            advice = "whoever reads the file could use it: write '${NAME}' and set NAME in the environment, or leave it"
            yield from _paragraph([path], f"{advice} to the platform", found)


def _touches(paths: set[SettingPath], path: SettingPath) -> bool:
    """True when one of the paths is above, at or below `path`."""
    return any(other[: len(path)] == path[: len(other)] for other in paths)


def _shown(path: SettingPath, found: Document) -> str:
    if _touches(found.hidden, path):
        return "a value from the environment"
    value = shown(value_at(found.values, path), path)
    if value is None:
        return "not set"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"


def value_at(values: Any, path: SettingPath) -> Any:
    """The value as the user wrote it; a place inside a scalar (one name where a list may stand) is the scalar."""
    for part in path:
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
    return values


def _advice(kind: FileKind, details: ErrorDetails, found: Document) -> str:
    """What to do about a problem that pydantic itself found."""
    problem, context = details["type"], details.get("ctx", {})
    if problem == "missing":
        field = kind.description(details["loc"])
        return f"it is required: {field[0].lower()}{field[1:].rstrip('.')}"
    if problem == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        near = []
        if not _touches(found.hidden, details["loc"]):
            near = difflib.get_close_matches(str(details["input"]).lower(), choices, n=1)
        return f"{f'did you mean {near[0]!r}? ' if near else ''}choose one of {', '.join(choices)}"
    if problem == "string_type" and isinstance(details["input"], dict):
        return "write text, in quotes where it has braces or a colon"
    bounds = {"greater_than_equal": "at least {ge}", "finite_number": "that is finite"}
    if problem in bounds:
        return f"write a number {bounds[problem].format(**context)}"
    kinds = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text",
        "model": "a mapping of settings",
        "dict": "a mapping of names to values",
    }
    wanted = kinds.get(problem.split("_")[0])
    return f"write {wanted}" if wanted else details["msg"]
