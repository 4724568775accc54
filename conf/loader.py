"""From files and `--set` overrides to frozen settings; every problem of a file is reported at once."""

import copy
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.conf import document
from shoal.conf.declared import FileKind, core_type
from shoal.conf.document import Document
from shoal.conf.errors import ConfigError
from shoal.conf.problems import find_problems, value_at
from shoal.conf.redact import MASK
from shoal.conf.roots import require_inside
from shoal.conf.run import RunConfig, TrackingConfig
from shoal.conf.section import SettingPath
from shoal.conf.target import TargetConfig

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)(?!/|:memory:|file:)([^?]+)(.*)")
_NULLS = ("", "~", "null", "Null", "NULL")
_MOST_SHOWN = 100

RUN_FILE = FileKind(
    RunConfig,
    "a run file",
    "name: docs",
    {
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
    },
)

TARGET_FILE = FileKind(TargetConfig, "a target file", "kind: local", {("kind",): "local"})

SHIPPED_TARGETS = Path(__file__).parent / "targets"


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file; relative paths in it, and in overrides, start at its folder.

    `overrides` are `a.b=value` texts, later ones win; a setting that takes text takes the value as it is (in quotes:
    as YAML), others take YAML, and null removes. Raises ConfigError with a paragraph for every problem.
    """
    name = os.fspath(path)
    found = _read(Path(path), name, RUN_FILE)
    problems = [problem for text in overrides if (problem := _override(RUN_FILE, found, text))]
    folder = Path(_normal(Path(path))).parent
    data = _resolved(found.values, folder)
    _raise_all([*found.problems, *problems, *find_problems(RUN_FILE, data, found)])
    config = RunConfig.model_validate(data)
    config.bind(folder, frozenset(found.hidden))
    try:
        for setting, where in config.named_paths:
            require_inside(where, setting, is_pattern=setting == "source.path")
    except ConfigError as error:
        error.args = (config.mask(str(error)),)
        raise
    return config


def load_target(reference: str) -> TargetConfig:
    """The target of this name among those that Shoal brings, or of a target file.

    Relative paths in a file start at its folder, in one of Shoal's own (they come from the environment) at the working
    directory. Raises ConfigError with a paragraph for every problem, and for a packed environment that lies elsewhere
    than SHOAL_ROOTS allows.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED_TARGETS.glob("*.yaml"))}
    if reference not in shipped and not reference.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"--target is {reference!r}; give one of {', '.join(shipped)}, or the path of a target file (.yaml)."
        )
    path = shipped.get(reference, Path(reference))
    name = path.name if reference in shipped else reference
    found = _read(path, name, TARGET_FILE)
    folder = Path.cwd() if reference in shipped else Path(_normal(path)).parent
    data = copy.deepcopy(found.values)
    for setting in ("spark_home", "environment"):
        _change(data, setting, lambda value: _absolute(value, folder))
    _raise_all([*found.problems, *find_problems(TARGET_FILE, data, found)])
    target = TargetConfig.model_validate(data)
    target.hide(frozenset(found.hidden))
    if target.environment:
        try:
            require_inside(target.environment, "environment")
        except ConfigError as error:
            if ("environment",) in found.hidden:
                error.args = (str(error).replace(target.environment, MASK),)
            raise
    return target


def _raise_all(problems: Sequence[str]) -> None:
    """ConfigError with all of them, if there are any."""
    problems = list(dict.fromkeys(problems))
    if problems:
        more = len(problems) - _MOST_SHOWN
        raise ConfigError("\n\n".join(problems[:_MOST_SHOWN] + [f"And {more} more problems."] * (more > 0)))


def _read(path: Path, name: str, kind: FileKind) -> Document:
    wanted = f"{kind.noun} is a mapping of settings, such as '{kind.example}'"
    return document.read_mapping(_file_text(path, name, kind), name, wanted, kind.takes_text)


def _file_text(path: Path, name: str, kind: FileKind) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(document.MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such file; give the path of {kind.noun}.") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); give the path of {kind.noun}.") from None
    if len(data) > document.MAX_BYTES:
        raise ConfigError(f"{name}: larger than {document.MAX_BYTES:,} bytes; this is hardly {kind.noun}.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}:{line}: not UTF-8 (byte {data[error.start]:#04x}); save the file as UTF-8."
        ) from None


# --set


def _override(kind: FileKind, found: Document, text: str) -> str | None:
    """Apply one `a.b=value`; returns a paragraph when it cannot be applied."""
    dotted_path, equals, value = text.partition("=")
    parts = tuple(part.strip() for part in dotted_path.split("."))
    if not equals or not all(parts):
        return "--set wants setting=value, such as --set chunk.tokens=128; write the setting, '=' and the value."
    declared, rest = kind.declared(parts)
    place = parts[: len(parts) - len(rest)]
    if declared is None:
        return f"--set: {kind.unknown(parts[: len(place) + 1])}"
    core = core_type(declared)
    path: SettingPath = parts
    if rest and core is dict:
        path = (*place, ".".join(parts[len(place) :]))
    elif rest:
        setting = ".".join(place)
        return f"--set: {setting} has no settings inside it, so {'.'.join(parts)} is unknown; set {setting} itself."
    for depth in range(1, len(path)):
        section = value_at(found.values, path[:depth])
        if section is not None and not isinstance(section, dict):
            return None  # the file has a plain value where a section belongs: validation reports it
    try:
        found.replace(path, _override_value(kind, value, path, core))
    except ConfigError as error:
        return str(error)
    return None


def _override_value(kind: FileKind, value: str, path: SettingPath, core: Any) -> Document:
    if not kind.takes_text(path):
        return document.read_value(value, "--set", path, kind.takes_text)
    opens_list = core in (list, tuple) and value.lstrip().startswith("[")
    if value.strip() in _NULLS[1:] or value.lstrip().startswith(("'", '"')) or opens_list:
        try:
            return document.read_value(value, "--set", path, kind.takes_text)
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
        database = source.get("database")
        if isinstance(database, dict):
            _change(database, "password_file", lambda path: _absolute(path, folder))
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
