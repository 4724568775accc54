"""YAML text as plain values, each with the place it came from; stricter than YAML where YAML surprises people.

Refused, with a ConfigError: duplicate keys, tabs as indentation, anchors and aliases (a few lines of them can unfold to
gigabytes), tags, several documents, and a file of more than a megabyte. Scalars follow YAML 1.2's core: only true and
false are booleans, dates and 007 stay text. `${NAME}` and `${NAME:-default}` are filled in from the environment.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from shoal.conf.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20

Path = tuple[str | int, ...]

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9]\d{0,18})")
_FLOAT = re.compile(r"[-+]?(0|[1-9]\d*)?(\.\d*)?([eE][-+]?\d+)?")
_VARIABLE = re.compile(r"\$\$|\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}|(?P<broken>\$\{)", re.ASCII)


@dataclass
class Document:
    """A parsed mapping: `values` as plain Python, `origins` the place of every setting, `problems` what is wrong.

    `hidden` holds the paths whose values came from the environment, `unset` those whose variable does not exist.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, str] = field(default_factory=dict)
    hidden: set[Path] = field(default_factory=set)
    unset: set[Path] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def origin(self, path: Path) -> str:
        """Where a setting stands, `run.yaml:7`; for one that is missing, where the closest section around it does."""
        while path not in self.origins and path:
            path = path[:-1]
        return self.origins.get(path, "")

    def replace(self, path: Path, other: "Document") -> None:
        """Take the setting at `path`, and all below it, from a document that `read_value` or `read_text` gave."""
        self.remove(path)
        self.problems += other.problems
        if other.values[""] is None:
            return
        section: dict[Any, Any] = self.values
        for depth, part in enumerate(path[:-1]):
            section = section.setdefault(part, {})
            self.origins.setdefault(path[: depth + 1], other.origin(path))
        section[path[-1]] = other.values[""]
        self.origins |= {known: origin for known, origin in other.origins.items() if known}
        self.hidden |= other.hidden
        self.unset |= other.unset

    def remove(self, path: Path) -> None:
        """Forget the setting at `path` and all below it; nothing happens where there is none."""
        section: Any = self.values
        for part in path[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(path[-1], None)
        self.origins = {known: origin for known, origin in self.origins.items() if known[: len(path)] != path}
        self.hidden = {known for known in self.hidden if known[: len(path)] != path}
        self.unset = {known for known in self.unset if known[: len(path)] != path}


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader without anchors, aliases, tags and deep nesting; used for its nodes only."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node, or raise ConfigError for what Shoal refuses."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        where = f"{self.name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(
                f"{where}: an anchor (&) or alias (*); Shoal refuses them, because nested ones can fill the memory. "
                "Write the value out."
            )
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{where}: a tag (!); a run file holds plain values only. Remove the tag.")
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"{where}: more than {MAX_DEPTH} levels of nesting; a run file needs three. Flatten it.")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_mapping(text: str, name: str, wanted: str, takes_text: Callable[[Path], bool]) -> Document:
    """Read a whole file; `wanted` says what it should be where it is no mapping.

    Raises ConfigError for syntax, while duplicate keys and variables become `problems`. `takes_text` says which
    settings keep a plain scalar as it is written (`revision: 1234567` stays text).
    """
    node = _compose(text, name)
    if not isinstance(node, yaml.MappingNode):
        found = "is empty" if node is None else f"holds {_kind(node)}"
        raise ConfigError(f"{name} {found}; {wanted}.")
    reader = _Reader(name, takes_text, lines=True)
    reader.document.values = reader.mapping(node, ())
    return reader.document


def read_value(text: str, name: str, path: Path, takes_text: Callable[[Path], bool]) -> Document:
    """Read the YAML value of one setting, which is entry "" of the result; every place is `name`."""
    node = _compose(text, name)
    return _one_value(node or yaml.ScalarNode("", ""), name, path, takes_text)


def read_text(text: str, name: str, path: Path) -> Document:
    """Take the text itself, variables filled in, as the value of one setting: entry "" of the result."""
    return _one_value(yaml.ScalarNode("", text, style='"'), name, path, lambda _: True)


def _one_value(node: yaml.Node, name: str, path: Path, takes_text: Callable[[Path], bool]) -> Document:
    reader = _Reader(name, takes_text, lines=False)
    reader.document.origins[path] = name
    reader.document.values = {"": reader.value(node, path)}
    return reader.document


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        loader = StrictLoader(text)
        loader.name = name
        return loader.get_single_node()  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        if "'\\t'" in str(error.problem):
            place = f", column {mark.column + 1}" if mark is not None else ""
            message = f"{where}: a tab{place}; YAML is indented with spaces. Replace the tab by spaces."
        elif isinstance(error, yaml.composer.ComposerError):
            message = f"{where}: a second document starts (---); a run file has one. Split the file."
        else:
            what = "; ".join(part for part in (error.context, error.problem) if part)
            message = (
                f"{where}: not YAML ({what}). Mend the syntax; text with ':', '#', '{{' or '[' wants quotes, and so "
                "does ${NAME} inside braces."
            )
        raise ConfigError(message) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"{name}:{line}: a control character that YAML does not allow; remove it or escape it in quotes."
        raise ConfigError(message) from None


class _Reader:
    """Turns YAML nodes into a Document."""

    def __init__(self, name: str, takes_text: Callable[[Path], bool], *, lines: bool) -> None:
        self.name, self.takes_text, self.lines = name, takes_text, lines
        self.document = Document(origins={(): name})

    def value(self, node: yaml.Node, path: Path) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.document.origins[(*path, index)] = self._place(item)
                items.append(self.value(item, (*path, index)))
            return items
        return self._scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        places: dict[str, str] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.document.problems.append(
                    f"{place}: a setting's name is {_kind(key_node)}; quote text with braces."
                )
                continue
            key = str(key_node.value)
            if key in places:
                setting = ".".join(map(str, (*path, key)))
                self.document.problems.append(
                    f"{place}: {setting} is written twice, first at {places[key]}; keep one of the two."
                )
                continue
            places[key] = place
            self.document.origins[(*path, key)] = place
            value = self.value(value_node, (*path, key))
            if value is not None:
                values[key] = value
        return values

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        text = self._fill_in(str(node.value), path)
        filled = text != node.value
        if self.takes_text(path):
            return None if not filled and _is_plain(node) and _NULL.fullmatch(text) else text
        return _resolve(text) if filled or _is_plain(node) else text

    def _fill_in(self, text: str, path: Path) -> str:
        """The text with its variables replaced; marks the path as hidden when the environment gave a part of it."""

        def replacement(found: re.Match[str]) -> str:
            name, default = found["name"], found["default"]
            if found[0] == "$$":
                return "$"
            where = f"{self.document.origin(path)}: {'.'.join(map(str, path))}"
            if found["broken"]:
                self.document.unset.add(path)
                self.document.problems.append(
                    f"{where} has a '${{' that names no variable; write ${{NAME}}, or $$ for a dollar sign."
                )
                return ""
            value = os.environ.get(name)
            if value or (value is not None and default is None):
                self.document.hidden.add(path)
                return value
            if default is not None:
                return default
            self.document.problems.append(
                f"{where} wants the environment variable {name}, which is not set; set it, or write "
                f"${{{name}:-default}}."
            )
            self.document.unset.add(path)
            return ""

        return _VARIABLE.sub(replacement, text)

    def _place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.lines and node.start_mark else self.name


def _kind(node: yaml.Node) -> str:
    return (
        "a list"
        if isinstance(node, yaml.SequenceNode)
        else "a mapping"
        if isinstance(node, yaml.MappingNode)
        else "text"
    )


def _is_plain(node: yaml.Node) -> bool:
    return getattr(node, "style", None) is None


def _resolve(text: str) -> bool | int | float | str | None:
    """The value of an unquoted scalar, or of a variable wherever it stands: `"${TOKENS}"` may be a number."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and any(char.isdigit() for char in text):
        return float(text)
    return text
