"""Ends the process in which a block of work never returns, even where it holds the interpreter (C code, CUDA)."""

from __future__ import annotations

import faulthandler
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

STDERR: Final = 2
GRACE_S: Final = 30.0
"""Seconds beyond the time limit, at most: what can be broken off from within gets the time to do so."""


class Watchdog:
    """One clock for all threads of a process; when a block is late, the stacks go to `output` and the process exits.

    The clock is the interpreter's own C thread (`faulthandler`), so that nothing the block does can hold it up.
    `output`: a file descriptor.
    """

    def __init__(self, output: int = STDERR) -> None:
        self.output = output
        self._ends: dict[int, float] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    @contextmanager
    def watching(self, seconds: float) -> Iterator[None]:
        """Ends the process when the block takes longer; blocks of several threads may overlap."""
        number = next(self._numbers)
        with self._lock:
            self._ends[number] = time.monotonic() + seconds
            self._set()
        try:
            yield
        finally:
            with self._lock:
                del self._ends[number]
                self._set()

    def _set(self) -> None:
        if self._ends:
            left = max(min(self._ends.values()) - time.monotonic(), 0.001)
            faulthandler.dump_traceback_later(left, file=self.output, exit=True)
        else:
            faulthandler.cancel_dump_traceback_later()


WATCHDOG: Final = Watchdog()
"""The process's own: the interpreter has one such clock."""


def patience_s(time_limit_s: float) -> float:
    """Seconds after which a microbatch counts as hung: its limit, and a grace that is never longer than the limit."""
    return time_limit_s + min(time_limit_s, GRACE_S)
