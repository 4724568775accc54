"""YAML as Shoal reads it: stricter than YAML, with places, and filled in from the environment."""

import time

import pytest

from shoal.conf.document import MAX_DEPTH, Document, read_mapping, read_text, read_value
from shoal.conf.errors import ConfigError


def read(text: str, *text_settings: str) -> Document:
    return read_mapping(text, "run.yaml", "write a mapping", lambda path: ".".join(map(str, path)) in text_settings)


def test_scalars_follow_the_core_of_yaml_1_2() -> None:
    text = "a: yes\nb: true\nc: 2026-01-31\nd: 007\ne: 12\nf: 1e3\ng: 1.5\nh: null\ni: 1:30\nj: '12'\nk: .inf\nl: NO\n"
    assert read(text).values == {
        "a": "yes",
        "b": True,
        "c": "2026-01-31",
        "d": "007",
        "e": 12,
        "f": 1000.0,
        "g": 1.5,
        "i": "1:30",
        "j": "12",
        "k": ".inf",
        "l": "NO",
    }


def test_a_setting_that_takes_text_keeps_what_is_written() -> None:
    assert read("revision: 1.10\nname: true\nother: 1.10\n", "revision", "name").values == {
        "revision": "1.10",
        "name": "true",
        "other": 1.1,
    }


def test_every_setting_knows_its_line() -> None:
    document = read("a:\n  b: 1\n  c:\n    - x\n    - y\n")
    assert document.origin(("a", "b")) == "run.yaml:2"
    assert document.origin(("a", "c", 1)) == "run.yaml:5"
    assert document.origin(("a", "missing")) == "run.yaml:1"


def test_duplicate_keys_are_reported_with_both_lines_and_the_rest_is_still_read() -> None:
    document = read("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n")
    assert document.values == {"a": 1, "b": {"c": 1}}
    assert document.problems == [
        "run.yaml:4: b.c is written twice, first at run.yaml:3; keep one of the two.",
        "run.yaml:5: a is written twice, first at run.yaml:1; keep one of the two.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n\tb: 1\n", r"run\.yaml:2: a tab, column 1; YAML is indented with spaces"),
        ("a: &x 1\n", r"run\.yaml:1: an anchor \(&\) or alias \(\*\)"),
        ("a: 1\nb: *x\n", r"run\.yaml:2: an anchor \(&\) or alias \(\*\)"),
        ("a: !!python/object:os.system 1\n", r"run\.yaml:1: a tag \(!\)"),
        ("a: 1\n---\nb: 2\n", r"run\.yaml:\d: a second document"),
        ("", r"run\.yaml is empty"),
        ("- a\n", r"run\.yaml holds a list"),
        ("just text\n", r"run\.yaml holds text"),
        ("a: [1\nb: 2\n", r"run\.yaml:2: not YAML"),
        ("a: {b: ${X}}\n", r"\$\{NAME\} inside braces"),
        ("a: 1\nb: \x07\n", r"run\.yaml:2: a control character"),
        (f"a: {'[' * 50}{']' * 50}\n", rf"more than {MAX_DEPTH} levels"),
    ],
)
def test_what_is_refused_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_a_billion_laughs_is_refused_before_the_first_one() -> None:
    lines = ["a0: &a0 [lol]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    started = time.perf_counter()
    with pytest.raises(ConfigError, match="an anchor"):
        read("\n".join(lines))
    assert time.perf_counter() - started < 1


def test_nesting_that_would_exhaust_the_stack_is_refused() -> None:
    with pytest.raises(ConfigError, match="levels of nesting"):
        read("a: " + "[" * 100_000)


def test_a_mapping_as_a_name_is_reported() -> None:
    assert read("{a: 1}: 2\n").problems == ["run.yaml:1: a setting's name is a mapping; quote text with braces."]


def test_variables_are_filled_in_and_their_settings_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_A", "7")
    monkeypatch.setenv("SHOAL_EMPTY", "")
    monkeypatch.delenv("SHOAL_NONE", raising=False)
    document = read(
        "number: ${SHOAL_A}\nquoted: '${SHOAL_A}'\ntext: ${SHOAL_A}\npart: x/${SHOAL_A}/y\n"
        "fallback: ${SHOAL_NONE:-5}\nempty: ${SHOAL_EMPTY:-e}\nescaped: $${SHOAL_A}\nlone: a$b\n",
        "text",
    )
    assert document.values == {
        "number": 7,
        "quoted": 7,
        "text": "7",
        "part": "x/7/y",
        "fallback": 5,
        "empty": "e",
        "escaped": "${SHOAL_A}",
        "lone": "a$b",
    }
    assert document.hidden == {("number",), ("quoted",), ("text",), ("part",)}
    assert document.problems == []


def test_a_filled_in_text_is_never_read_as_null_or_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_A", "null")
    monkeypatch.setenv("SHOAL_B", "{b: &x 1}")
    assert read("a: ${SHOAL_A}\nb: ${SHOAL_B}\n", "a", "b").values == {"a": "null", "b": "{b: &x 1}"}


def test_an_unset_or_malformed_variable_is_a_problem_that_names_setting_and_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SHOAL_NONE", raising=False)
    document = read("a:\n  b: ${SHOAL_NONE}\n  c: ${9}\n")
    assert document.problems == [
        (
            "run.yaml:2: a.b wants the environment variable SHOAL_NONE, which is not set; set it, or write "
            "${SHOAL_NONE:-default}."
        ),
        "run.yaml:3: a.c has a '${' that names no variable; write ${NAME}, or $$ for a dollar sign.",
    ]


def test_replacing_forgets_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_A", "7")
    document = read("a:\n  b: ${SHOAL_A}\n  c: [1, 2]\n")
    document.replace(("a", "b"), read_value("{d: 3}", "--set", ("a", "b"), lambda _: False))
    document.replace(("a", "c"), read_value("null", "--set", ("a", "c"), lambda _: False))
    document.replace(("e", "f"), read_text("null", "--set", ("e", "f")))
    assert document.values == {"a": {"b": {"d": 3}}, "e": {"f": "null"}}
    assert document.hidden == set()
    assert document.origin(("a", "b", "d")) == "--set"
    assert document.origin(("e",)) == "--set"
    assert document.origin(("a", "c")) == "run.yaml:1"
