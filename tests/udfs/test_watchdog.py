import subprocess
import sys

import pytest

from shoal.udfs.watchdog import GRACE_S, patience_s

SCRIPT = """
import ctypes, os, sys, tempfile, threading, time
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
            "watched(60, lambda: time.sleep(1.2))\nwatched(1, lambda: None)\ntime.sleep(1.2)"
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


def test_the_grace_is_never_longer_than_the_limit() -> None:
    assert patience_s(2) == 4
    assert patience_s(600) == 600 + GRACE_S
