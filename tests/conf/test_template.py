"""Templates: what parses, what is refused, and what a NULL does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.conf.template import FieldPart, LiteralPart, parse_template


def test_text_without_braces_is_a_column() -> None:
    template = parse_template("body")
    assert (template.is_column, template.fields, template.parts) == (True, ("body",), (FieldPart("body"),))


def test_fields_and_literals_keep_their_order() -> None:
    template = parse_template("{{{title}}}: {body}\n{title}")
    assert template.parts == (
        LiteralPart("{"),
        FieldPart("title"),
        LiteralPart("}: "),
        FieldPart("body"),
        LiteralPart("\n"),
        FieldPart("title"),
    )
    assert template.fields == ("title", "body")
    assert not template.is_column


def test_a_null_field_renders_as_the_empty_string() -> None:
    assert parse_template("{a}-{b}").render({"a": None, "b": "x"}) == "-x"


def test_all_fields_null_is_no_text_at_all() -> None:
    assert parse_template("{a}-{b}").render({"a": None, "b": None}) is None
    assert parse_template("a").render({"a": None}) is None
    assert parse_template("a").render({"a": ""}) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name a column"),
        ("{title", "position 1 is never closed"),
        ("{a} title}", "position 10 closes nothing"),
        ("x{}", "position 2 is empty"),
        ("x{ a}", "position 2 has blanks"),
        ("{a:>10}", "has a format"),
        ("{a!r}", "has a format"),
        ("{a{b}", "brace inside"),
        ("{{title}}", "no {column} in it"),
    ],
)
def test_a_malformed_template_says_where_and_what_to_do(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_template(text)


@given(st.text(), st.text())
def test_escaped_text_around_a_field_comes_back_unchanged(before: str, value: str) -> None:
    escaped = before.replace("{", "{{").replace("}", "}}")
    assert parse_template(escaped + "{a}").render({"a": value}) == before + value
