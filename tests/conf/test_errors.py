"""The error tree: exit codes and statuses that scripts rely on, and the drawing of it."""

import inspect
import re

import pytest

from shoal.conf import errors
from shoal.conf.errors import ShoalError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", CLASSES)
def test_the_drawing_shows_every_class_with_its_exit_code_and_status(kind: type[ShoalError]) -> None:
    assert issubclass(kind, ShoalError)
    drawn = re.search(rf"\b{kind.__name__}\s+(\d)\s+(\w+)", errors.__doc__ or "")
    assert drawn is not None
    assert (int(drawn[1]), drawn[2]) == (kind.exit_code, kind.status)


@pytest.mark.parametrize(
    ("name", "exit_code", "status"),
    [
        ("ConfigError", 2, "failed"),
        ("SourceError", 2, "failed"),
        ("LimitError", 3, "refused"),
        ("EncoderChangedError", 3, "refused"),
        ("BusyError", 4, "busy"),
        ("OvertakenError", 1, "failed"),
        ("InternalError", 1, "failed"),
    ],
)
def test_exit_codes_are_those_of_the_contract(name: str, exit_code: int, status: str) -> None:
    kind = getattr(errors, name)
    assert (kind.exit_code, kind.status) == (exit_code, status)
