r"""The text of a row: one column, or a template such as `"{title}\n{text}"` that joins several.

What a NULL does: a NULL field of a template renders as the empty string. When every field of a template is NULL, or the
one plain text column is NULL, the row has no text at all: it is an error row with the reason `null_text`.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LiteralPart:
    """Fixed text between the fields; doubled braces are already single."""

    text: str


@dataclass(frozen=True, slots=True)
class FieldPart:
    """The place of a column's value; `column` is an exact name of the source."""

    column: str


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed `source.text`; `is_column` says that it was a plain column name and not a template."""

    parts: tuple[LiteralPart | FieldPart, ...]
    is_column: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that the text needs, each once, in order of first use."""
        return tuple(dict.fromkeys(part.column for part in self.parts if isinstance(part, FieldPart)))

    def render(self, values: Mapping[str, str | None]) -> str | None:
        """The text of one row, or None where every field is NULL: the definition that Spark's rendering must match."""
        if all(values[column] is None for column in self.fields):
            return None
        return "".join(part.text if isinstance(part, LiteralPart) else values[part.column] or "" for part in self.parts)


def parse_template(text: str) -> Template:
    """Read a column name (no brace in it) or a template with `{column}` fields, where `{{` and `}}` mean braces.

    Raises ValueError, with the position counted from 1, for a lone brace, an empty field, blanks around a name, a
    conversion or format specification, and a template without any field. The message never repeats the text.
    """
    if "{" not in text and "}" not in text:
        if not text.strip():
            raise ValueError("name a column, or write a template such as '{title} {body}'")
        return Template((FieldPart(text),), is_column=True)
    parts: list[LiteralPart | FieldPart] = []
    literal = ""
    at = 0
    while at < len(text):
        char = text[at]
        if char in "{}" and text[at : at + 2] == char * 2:
            literal += char
            at += 2
        elif char == "{":
            end = text.find("}", at)
            if end < 0:
                raise ValueError(f"the brace at position {at + 1} is never closed; write '{{{{' for a plain brace")
            if literal:
                parts.append(LiteralPart(literal))
                literal = ""
            parts.append(FieldPart(_field_name(text[at + 1 : end], at + 1)))
            at = end + 1
        elif char == "}":
            raise ValueError(f"the brace at position {at + 1} closes nothing; write '}}}}' for a plain brace")
        else:
            literal += char
            at += 1
    if literal:
        parts.append(LiteralPart(literal))
    if not any(isinstance(part, FieldPart) for part in parts):
        raise ValueError("the template has no {column} in it, so every row would have the same text; name a column")
    return Template(tuple(parts), is_column=False)


def _field_name(name: str, position: int) -> str:
    if not name.strip():
        raise ValueError(f"the field at position {position} is empty; put a column's name between the braces")
    if name != name.strip():
        raise ValueError(f"the field at position {position} has blanks around its name; remove them")
    if "{" in name:
        raise ValueError(f"the field at position {position} has a brace inside; write '{{{{' for a plain brace")
    if ":" in name or "!" in name:
        raise ValueError(
            f"the field at position {position} has a format or conversion; a field is a column's name and nothing "
            "else (format or rename it with a query source)"
        )
    return name
