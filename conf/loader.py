"""From a run file and `--set` overrides to a RunConfig; every problem of a file is reported at once."""

import copy
import difflib
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from shoal.conf import document
from shoal.conf.document import Document
from shoal.conf.errors import ConfigError
from shoal.conf.run import RunConfig, TrackingConfig
from shoal.conf.section import Section, SettingPath, SettingsError, dotted, shown

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)(?!/|:memory:|file:)([^?]+)(.*)")
_NULLS = ("", "~", "null", "Null", "NULL")
_LONGEST_SHOWN = 80
_MOST_SHOWN = 100


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file; relative paths in it, and in overrides, start at its folder.

    `overrides` are `a.b=value` texts, later ones win; a setting that takes text takes the value as it is (in quotes:
    as YAML), others take YAML, and null removes. Raises ConfigError with a paragraph for every problem.
    """
    name = os.fspath(path)
    found = document.read_mapping(_file_text(Path(path), name), name, takes_text)
    problems = [problem for text in overrides if (problem := _override(found, text))]
    folder = Path(_normal(Path(path))).parent
    data = _resolved(found.values, folder)
    problems = list(dict.fromkeys([*found.problems, *problems, *_problems(data, found)]))
    if problems:
        more = len(problems) - _MOST_SHOWN
        raise ConfigError("\n\n".join(problems[:_MOST_SHOWN] + [f"And {more} more problems."] * (more > 0)))
    config = RunConfig.model_validate(data)
    config.bind(folder, frozenset(found.hidden))
    return config


def _file_text(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(document.MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such file; give the path of a run file.") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); give the path of a run file.") from None
    if len(data) > document.MAX_BYTES:
        raise ConfigError(f"{name}: larger than {document.MAX_BYTES:,} bytes; this is hardly a run file.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}:{line}: not UTF-8 (byte {data[error.start]:#04x}); save the file as UTF-8."
        ) from None


# The settings as the classes declare them


def setting_names(section: type[Section]) -> dict[str, Any]:
    """The YAML names of a section's settings, each with its declared type."""
    return {field.alias or name: field.annotation for name, field in section.model_fields.items()}


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a setting holds, also where it is optional; None for a plain setting."""
    core = _core(annotation)
    return core if isinstance(core, type) and issubclass(core, Section) else None


@cache
def takes_text(path: SettingPath) -> bool:
    """True where a scalar is kept as it is written: text, choices, limits, durations, entries of free settings."""
    declared, rest = _declared(path)
    core = _core(declared)
    return core not in (int, float, bool, None) and section_of(declared) is None and (core is not dict or bool(rest))


def _declared(path: SettingPath) -> tuple[Any, SettingPath]:
    """The declared type of the setting at or above `path`, with the rest of the path; None for an unknown name."""
    section: type[Section] | None = RunConfig
    declared: Any = RunConfig
    for depth, part in enumerate(path):
        if section is None:
            return declared, path[depth:]
        declared = setting_names(section).get(str(part))
        if declared is None:
            return None, path[depth:]
        section = section_of(declared)
    return declared, ()


def _core(annotation: Any) -> Any:
    """A declared type without Optional and Annotated; a dict or a list gives its origin."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _core(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        kept = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _core(kept[0]) if len(kept) == 1 else list
    return origin or annotation


# --set


def _override(found: Document, text: str) -> str | None:
    """Apply one `a.b=value`; returns a paragraph when it cannot be applied."""
    dotted_path, equals, value = text.partition("=")
    parts = tuple(part.strip() for part in dotted_path.split("."))
    if not equals or not all(parts):
        return "--set wants setting=value, such as --set chunk.tokens=128; write the setting, '=' and the value."
    declared, rest = _declared(parts)
    place = parts[: len(parts) - len(rest)]
    if declared is None:
        return f"--set: {_unknown(parts[: len(place) + 1])}"
    core = _core(declared)
    path: SettingPath = parts
    if rest and core is dict:
        path = (*place, ".".join(parts[len(place) :]))
    elif rest:
        setting = ".".join(place)
        return f"--set: {setting} has no settings inside it, so {'.'.join(parts)} is unknown; set {setting} itself."
    for depth in range(1, len(path)):
        section = _at(found.values, path[:depth])
        if section is not None and not isinstance(section, dict):
            return None  # the file has a plain value where a section belongs: validation reports it
    try:
        found.replace(path, _override_value(value, path, core))
    except ConfigError as error:
        return str(error)
    return None


def _override_value(value: str, path: SettingPath, core: Any) -> Document:
    if not takes_text(path):
        return document.read_value(value, "--set", path, takes_text)
    opens_list = core in (list, tuple) and value.lstrip().startswith("[")
    if value.strip() in _NULLS[1:] or value.lstrip().startswith(("'", '"')) or opens_list:
        try:
            return document.read_value(value, "--set", path, takes_text)
        except ConfigError:
            return document.read_text(value, "--set", path)
    return document.read_text(value, "--set", path)


# Relative paths


def _resolved(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values with relative paths made absolute; what is not a path, or not text, stays for validation."""
    data = copy.deepcopy(values)
    source, destination, gate = (data.get(name) for name in ("source", "destination", "gate"))
    if isinstance(gate, dict):
        _change(gate, "folder", lambda path: _absolute(path, folder))
    if isinstance(source, dict):
        _change(source, "path", lambda path: _absolute(path, folder))
    if isinstance(destination, dict):
        _change(destination, "path", lambda path: _absolute(path, folder))
        _change(destination, "sidecar", lambda path: _absolute(path, folder))
    for encoder in (data.get("encoder"), data.get("next_encoder")):
        if isinstance(encoder, dict):
            _change(encoder, "model", lambda model: _absolute(model, folder) if _is_folder(model) else model)
    tracking = data.setdefault("tracking", {})
    if isinstance(tracking, dict):
        tracking.setdefault("uri", TrackingConfig.model_fields["uri"].default)
        _change(tracking, "uri", lambda uri: _tracking_uri(uri, folder))
    return data


def _change(section: dict[str, Any], name: str, change: Callable[[str], str]) -> None:
    value = section.get(name)
    if isinstance(value, str):
        section[name] = change(value)
    elif isinstance(value, list):
        section[name] = [change(item) if isinstance(item, str) else item for item in value]


def _absolute(path: str, folder: Path) -> str:
    if not path.strip() or _SCHEME.match(path):
        return path
    return _normal(folder / os.path.expanduser(path))  # noqa: PTH111  Path.expanduser raises for an unknown user


def _normal(path: Path) -> str:
    """The absolute path without `..`; links are not followed, so that a path stays as the user knows it."""
    return os.path.abspath(path)  # noqa: PTH100  resolve() follows links and asks the disk


def _is_folder(reference: str) -> bool:
    return reference.startswith(("/", "./", "../", "~")) or reference in (".", "..")


def _tracking_uri(uri: str, folder: Path) -> str:
    if database := _SQLITE.fullmatch(uri):
        return f"{database[1]}{_absolute(database[2], folder)}{database[3]}"
    return _absolute(uri, folder) if _is_folder(uri) else uri


# Problems


STAND_INS: dict[SettingPath, Any] = {
    ("name",): "run",
    ("source",): {"format": "json", "path": "-", "key": "-", "text": "-"},
    ("source", "format"): "json",
    ("source", "key"): "-",
    ("source", "text"): "-",
    ("chunk", "tokens"): sys.maxsize,
    ("encoder",): {"model": "hash:1"},
    ("encoder", "model"): "hash:1",
    ("next_encoder", "model"): "hash:1",
    ("destination",): {"path": "out"},
    ("gate", "folder"): "-",
    ("gate", "min_ndcg"): 1.0,
}
"""Values for required settings that are missing or broken; whatever follows from them is never reported."""


def _problems(data: dict[str, Any], found: Document) -> list[str]:
    """A paragraph for every problem of the data.

    Rules about several settings are tried only where a whole section is fine setting by setting, so broken settings are
    taken out (a required one is replaced) and the rest is checked again until nothing new turns up.
    """
    data = copy.deepcopy(data)
    paragraphs: list[str] = []
    broken: set[SettingPath] = set()
    while True:
        try:
            RunConfig.model_validate(data)
        except ValidationError as error:
            details = error.errors(include_url=False)
        else:
            return paragraphs
        paragraphs += [text for each in details for text in _explain(each, found, broken)]
        new = {path for each in details for path in _culprits(each, data)} - broken
        if not new:
            return paragraphs
        broken |= new
        for path in new:
            section = _at(data, path[:-1])
            section.pop(path[-1], None)
            if path in STAND_INS:
                section[path[-1]] = copy.deepcopy(STAND_INS[path])


def _culprits(details: ErrorDetails, data: dict[str, Any]) -> Iterator[SettingPath]:
    """The settings to take out so that the rules behind a validation error have something to work on."""
    path = details["loc"]
    cause = details.get("ctx", {}).get("error")
    if not isinstance(cause, SettingsError):
        groups = [[path]]
    else:
        groups = [[(*path, *setting) for setting in problem.settings] for problem in cause.problems]
    for settings in groups:
        whole = [each[:-1] if isinstance(each[-1], int) else each for each in settings]
        sections = [(_at(data, each[:-1]), each) for each in whole]
        there = [
            each
            for section, each in sections
            if isinstance(section, dict) and (each[-1] in section or each in STAND_INS)
        ]
        optional = [each for each in there if each not in STAND_INS]
        yield from (optional or there)[-1:]


def _explain(details: ErrorDetails, found: Document, broken: set[SettingPath]) -> Iterator[str]:
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
        yield f"{found.origin(path)}: {_unknown(path)}"
    else:
        yield from _paragraph([path], str(cause) if cause is not None else _advice(details, found), found)


def _paragraph(settings: list[SettingPath], advice: str, found: Document, example: str = "") -> Iterator[str]:
    """One paragraph: where, which settings, what was found, what to do; none when a variable was missing anyway."""
    if any(_touches(found.unset, path) for path in settings):
        return
    what = " and ".join(f"{dotted(path)} is {_shown(path, found)}" for path in settings)
    if example and not any(_touches(found.hidden, path) for path in settings):
        advice = f"{advice}: {example}"
    yield f"{found.origin(settings[-1])}: {what}; {advice}."


def _touches(paths: set[SettingPath], path: SettingPath) -> bool:
    """True when one of the paths is above, at or below `path`."""
    return any(other[: len(path)] == path[: len(other)] for other in paths)


def _shown(path: SettingPath, found: Document) -> str:
    if _touches(found.hidden, path):
        return "a value from the environment"
    value = shown(_at(found.values, path), path)
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


def _at(values: Any, path: SettingPath) -> Any:
    """The value as the user wrote it; a place inside a scalar (one name where a list may stand) is the scalar."""
    for part in path:
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
    return values


def _advice(details: ErrorDetails, found: Document) -> str:
    """What to do about a problem that pydantic itself found."""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "missing":
        field = _description(details["loc"])
        return f"it is required: {field[0].lower()}{field[1:].rstrip('.')}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        near = []
        if not _touches(found.hidden, details["loc"]):
            near = difflib.get_close_matches(str(details["input"]).lower(), choices, n=1)
        return f"{f'did you mean {near[0]!r}? ' if near else ''}choose one of {', '.join(choices)}"
    if kind == "string_type" and isinstance(details["input"], dict):
        return "write text, in quotes where it has braces or a colon"
    bounds = {"greater_than_equal": "at least {ge}", "finite_number": "that is finite"}
    if kind in bounds:
        return f"write a number {bounds[kind].format(**context)}"
    kinds = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text",
        "model": "a mapping of settings",
        "dict": "a mapping of names to values",
    }
    wanted = kinds.get(kind.split("_")[0])
    return f"write {wanted}" if wanted else details["msg"]


def _unknown(path: SettingPath) -> str:
    """What to say about a name that is no setting: the nearest one of its section, or the place of its namesake."""
    declared, _ = _declared(path[:-1])
    section = section_of(declared) or RunConfig
    names = list(setting_names(section))
    wanted = str(path[-1])
    near = difflib.get_close_matches(wanted.lower().replace("-", "_"), names, n=1)
    if near:
        hint = f"did you mean {dotted((*path[:-1], near[0]))}?"
    else:
        places = [
            f"{outer}.{inner}"
            for outer, annotation in setting_names(RunConfig).items()
            if (child := section_of(annotation)) is not None
            for inner in setting_names(child)
            if inner == wanted
        ]
        if section is not RunConfig and wanted in setting_names(RunConfig):
            places.append(wanted)
        hint = f"did you mean {' or '.join(places)}?" if places else "remove it."
    within = dotted(path[:-1]) or "a run file"
    return f"{dotted(path)} is not a setting; {hint} Settings of {within}: {', '.join(names)}."


def _description(path: SettingPath) -> str:
    """The documentation of a setting, as its class declares it."""
    declared, _ = _declared(path[:-1])
    section = section_of(declared) or RunConfig
    fields = {field.alias or name: field for name, field in section.model_fields.items()}
    return fields[str(path[-1])].description or ""
