"""What runs on Databricks: the notebook of a job calls this, out of Shoal's zip, with the notebook's own `dbutils`."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any, Final, TextIO

from shoal.conf.errors import BusyError
from shoal.jobs.cli import main

PARAMETERS: Final = ("folder", "arguments", "fail_with", "outcome", "exit_code")
"""The notebook's parameters, all text.

folder: where the zip and the run file are. arguments: of `shoal`, as JSON; its second word is the run file's name.
fail_with: the exit codes that fail the task, as JSON; outcome: the file in the folder that gets exit code and output,
or nothing. exit_code: that of the task before, which this one is to judge; with it nothing is run.
"""

EXIT_CODE: Final = "exit_code"
"""The task value that holds the exit code, for the task that comes after."""


class _Copied(io.TextIOBase):
    """A stream that keeps what goes through it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.kept = stream, io.StringIO()

    def write(self, text: str) -> int:
        self.stream.write(text)
        return self.kept.write(text)

    def flush(self) -> None:
        self.stream.flush()


def run(dbutils: Any) -> None:
    """Runs Shoal, or judges how it went in the task before; RuntimeError where the task has to fail.

    `dbutils` has the notebook's parameters, PARAMETERS, as widgets.
    """
    given = {name: dbutils.widgets.get(name) for name in PARAMETERS}
    if given["exit_code"]:
        code = int(given["exit_code"])
        if code not in (0, BusyError.exit_code):
            raise RuntimeError(f"shoal ended with exit code {code}; the log of the task before says why")
        return
    folder = Path(given["folder"])
    verb, file, *rest = json.loads(given["arguments"])
    told, log = _Copied(sys.stdout), _Copied(sys.stderr)
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(log):  # type: ignore[type-var] # it is text
        code = _code([verb, str(folder / file), *rest])
    dbutils.jobs.taskValues.set(key=EXIT_CODE, value=code)
    if given["outcome"]:
        document = {"exit_code": code, "stdout": told.kept.getvalue(), "stderr": log.kept.getvalue()}
        (folder / given["outcome"]).write_text(json.dumps(document), encoding="utf-8")
    if code in json.loads(given["fail_with"]):
        raise RuntimeError(f"shoal ended with exit code {code}; the output above says why")


def _code(arguments: list[str]) -> int:
    """The exit code of a call; a wrong command line ends by SystemExit."""
    try:
        return main(arguments)
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1
