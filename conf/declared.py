"""The settings that a kind of file declares: where one stands, what it takes, what its class says of it."""

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from shoal.conf.section import Section, SettingPath, dotted


@dataclass(frozen=True, eq=False)
class FileKind:
    """A kind of YAML file.

    root: its outermost section. noun: what people call it ("a run file"). example: a setting of it. stand_ins: values
    for required settings that are missing or broken, so that the rest can be checked; whatever follows from them is
    never reported.
    """

    root: type[Section]
    noun: str
    example: str
    stand_ins: Mapping[SettingPath, Any]

    @cache  # noqa: B019 - there is one object for each kind of file
    def takes_text(self, path: SettingPath) -> bool:
        """True where a scalar is kept as it is written: text, choices, limits, durations, entries of free settings."""
        found, rest = self.declared(path)
        core = core_type(found)
        if core is dict:
            return bool(rest) and get_args(_bare(found))[1] is not Any
        return core not in (int, float, bool, None) and section_of(found) is None

    def declared(self, path: SettingPath) -> tuple[Any, SettingPath]:
        """The type of the setting at or above `path`, with the rest of the path; None for an unknown name."""
        section: type[Section] | None = self.root
        found: Any = self.root
        for depth, part in enumerate(path):
            if section is None:
                return found, path[depth:]
            found = setting_names(section).get(str(part))
            if found is None:
                return None, path[depth:]
            section = section_of(found)
        return found, ()

    def description(self, path: SettingPath) -> str:
        """The documentation of a setting, as its class declares it."""
        section = self._section_at(path[:-1])
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        return fields[str(path[-1])].description or ""

    def unknown(self, path: SettingPath) -> str:
        """What to say about a name that is no setting: the nearest one of its section, or the place of its namesake."""
        section = self._section_at(path[:-1])
        names = list(setting_names(section))
        wanted = str(path[-1])
        near = difflib.get_close_matches(wanted.lower().replace("-", "_"), names, n=1)
        if near:
            hint = f"did you mean {dotted((*path[:-1], near[0]))}?"
        else:
            places = [
                f"{outer}.{inner}"
                for outer, annotation in setting_names(self.root).items()
                if (child := section_of(annotation)) is not None
                for inner in setting_names(child)
                if inner == wanted
            ]
            if section is not self.root and wanted in setting_names(self.root):
                places.append(wanted)
            hint = f"did you mean {' or '.join(places)}?" if places else "remove it."
        within = dotted(path[:-1]) or self.noun
        return f"{dotted(path)} is not a setting; {hint} Settings of {within}: {', '.join(names)}."

    def _section_at(self, path: SettingPath) -> type[Section]:
        found, _ = self.declared(path)
        return section_of(found) or self.root


def setting_names(section: type[Section]) -> dict[str, Any]:
    """The YAML names of a section's settings, each with its declared type."""
    return {field.alias or name: field.annotation for name, field in section.model_fields.items()}


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a setting holds, also where it is optional; None for a plain setting."""
    core = core_type(annotation)
    return core if isinstance(core, type) and issubclass(core, Section) else None


def core_type(annotation: Any) -> Any:
    """A declared type without Optional and Annotated; a dict or a list gives its origin."""
    bare = _bare(annotation)
    return get_origin(bare) or bare


def _bare(annotation: Any) -> Any:
    """A declared type without Optional and Annotated; `list` where several are left."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _bare(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        kept = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _bare(kept[0]) if len(kept) == 1 else list
    return annotation
