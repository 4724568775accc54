"""The runbook has a paragraph for every code and every reason, and every error that is raised has a code."""

import ast
import pickle
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.conf import errors
from shoal.conf.errors import CODE_NOTE, CODES, ShoalError, SourceError, code_of
from shoal.udfs.reasons import PERMANENT, TRANSIENT

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "RUNBOOK.md").read_text(encoding="utf-8")
MODULES = sorted(path for folder in ("conf", "udfs", "jobs") for path in (ROOT / folder).glob("*.py"))
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ShoalError)}


def paragraphs(part: str) -> dict[str, str]:
    """Heading -> text of one part of the page; fails on a heading that stands there twice."""
    below = PAGE.split(f"\n# {part}\n", 1)[1].split("\n# ", 1)[0]
    found = re.findall(r"^## (\S+)\n\n(.*?)(?=\n\n## |\Z)", below, flags=re.M | re.S)
    assert len({heading for heading, _ in found}) == len(found) == len(re.findall("^## ", below, flags=re.M))
    return dict(found)


def test_every_code_has_its_paragraph_in_alphabetical_order_and_nothing_else_has() -> None:
    assert list(paragraphs("Codes")) == sorted(CODES)


@pytest.mark.parametrize("code", sorted(CODES))
def test_a_paragraph_says_what_is_true_of_the_table_what_to_do_and_when_to_worry(code: str) -> None:
    text = paragraphs("Codes")[code]
    parts = re.split(r"\*\*(Table|Do|Worry):\*\*", text)
    assert parts[1::2] == ["Table", "Do", "Worry"]
    assert all(part.strip() for part in parts)
    mentioned = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", text)) - {
        "HF_HOME",
        "HF_TOKEN",
        "SHOAL_ROOTS",
        "SPARK_REMOTE",
    }
    assert mentioned <= set(CODES)


def test_every_reason_of_the_error_column_has_its_paragraph() -> None:
    assert list(paragraphs("Reasons in the column `error`")) == sorted(PERMANENT | TRANSIENT)
    permanent = {name for name, text in paragraphs("Reasons in the column `error`").items() if "ermanent" in text}
    assert permanent == PERMANENT


def test_the_exit_codes_of_the_page_are_those_of_the_errors() -> None:
    shown = {int(code) for code in re.findall(r"^\| (\d) \|", PAGE, flags=re.M)}
    assert shown == {getattr(errors, name).exit_code for name in KINDS}


def test_commands_of_the_page_exist() -> None:
    from shoal.jobs.cli import build_parser

    verbs = set(re.findall(r"`shoal (\w+)", PAGE))
    parser = build_parser()
    known = {name for action in parser._actions for name in getattr(action, "choices", None) or ()}
    assert verbs <= known


def codes_given() -> Iterator[tuple[str, ast.expr]]:
    """Place and value of every `code=` that an error is made with."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                for keyword in node.keywords:
                    if keyword.arg == "code":
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", keyword.value


def test_every_error_is_made_with_a_code_that_exists() -> None:
    given = dict(codes_given())
    assert len(given) > 30
    for place, value in given.items():
        assert isinstance(value, ast.Constant), f"{place}: {ast.unparse(value)}"
        assert value.value in CODES, f"{place}: {value.value}"
    for name in KINDS:
        assert getattr(errors, name).default_code in CODES, name


def test_every_code_stands_somewhere_in_the_code() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in MODULES)
    lonely = {code for code in CODES if text.count(f'"{code}"') == 1}
    assert lonely == set(), "no error and no finding has these codes"


def test_an_error_keeps_its_code_when_it_is_pickled_and_in_a_stack_trace() -> None:
    error = SourceError("source.key: 2 rows", code="KEY_NULL")
    again = pickle.loads(pickle.dumps(error))
    told = "".join(traceback.format_exception_only(again))

    assert (str(again), again.code, again.exit_code) == ("source.key: 2 rows", "KEY_NULL", 2)
    assert told == f"shoal.conf.errors.SourceError: source.key: 2 rows\n{CODE_NOTE}KEY_NULL\n"
    assert code_of(SourceError("x")) == "SOURCE_UNREADABLE"
    assert code_of(ValueError("x")) == "UNEXPECTED"
