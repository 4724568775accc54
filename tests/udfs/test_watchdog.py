import faulthandler
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from shoal.udfs.watchdog import GRACE_S, Watchdog, patience_s

SCRIPT = """
import ctypes, os, threading
from shoal.udfs.watchdog import Watchdog

libc, held = ctypes.CDLL(None), ctypes.PyDLL(None)  # a PyDLL keeps the interpreter's lock while it waits
watchdog = Watchdog()

def watched(seconds, action):
    with watchdog.watching(seconds):
        action()

{body}
os.write(1, b"survived")
"""

CASES = {
    "a block that keeps the interpreter's lock": ("watched(0.3, held.pause)", False),
    "a block in C": ("watched(0.3, libc.pause)", False),
    "a late block of another thread": (
        "threading.Thread(target=watched, args=(0.3, libc.pause)).start()\nwatched(60, libc.pause)",
        False,
    ),
    "blocks in time, in two threads": (
        (
            "early = threading.Thread(target=watched, args=(1, lambda: None))\nearly.start()\nearly.join()\n"
            "watched(60, lambda: None)"
        ),
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_only_a_late_block_ends_the_process(case: str) -> None:
    body, survives = CASES[case]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout == "survived") == survives, done.stderr
    assert done.returncode == (0 if survives else 1)
    assert ("in watched" in done.stderr) != survives


def test_the_clock_is_set_to_the_block_that_ends_first_and_stopped_after_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[float | None] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda left, **_: told.append(left))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: told.append(None))
    now = 100.0
    monkeypatch.setattr("shoal.udfs.watchdog.time", SimpleNamespace(monotonic=lambda: now))
    watchdog = Watchdog()
    with watchdog.watching(60):
        now += 10
        early = threading.Thread(target=enter_and_leave, args=(watchdog, 1))
        early.start()
        early.join()
        now += 5
        with watchdog.watching(600), pytest.raises(KeyError), watchdog.watching(2):
            raise KeyError
    # Each time a block begins or ends: for the one that is due first then, whatever thread it is of.
    assert told == [60, 1, 50, 45, 2, 45, 45, None]


def enter_and_leave(watchdog: Watchdog, seconds: float) -> None:
    with watchdog.watching(seconds):
        pass


def test_the_grace_is_never_longer_than_the_limit() -> None:
    assert patience_s(2) == 4
    assert patience_s(600) == 600 + GRACE_S
