"""Live counts from workers to the driver by UDP: best effort, exact when they arrive, never in the way.

Spark's own counters move only at the end of a task. A datagram holds the absolute counts of one task attempt, so that
a lost one is made up for by the next, and a repeated one changes nothing.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

logger = logging.getLogger(__name__)

MAX_DATAGRAM: Final = 1024
_POLL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class ProgressTarget:
    """Where workers send their counts, and the run and wave that they belong to."""

    host: str
    port: int
    run_id: str
    wave: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Absolute counts: chunks done, real tokens, tokens with padding, seconds inside forward passes."""

    chunks: int = 0
    tokens: int = 0
    padded: int = 0
    busy_s: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            chunks=self.chunks + other.chunks,
            tokens=self.tokens + other.tokens,
            padded=self.padded + other.padded,
            busy_s=self.busy_s + other.busy_s,
        )


class ProgressSender:
    """Sends the counts of one task attempt; a target of None, or one that cannot be reached, is silence."""

    def __init__(self, target: ProgressTarget | None, partition: int, attempt: int) -> None:
        self._target = target
        self._task = (partition, attempt)
        self._socket: socket.socket | None = None
        self._address: Any = None
        if target is None:
            return
        try:
            found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_DGRAM)
            family, kind, protocol, _, self._address = found[0]
            self._socket = socket.socket(family, kind, protocol)
            self._socket.setblocking(False)
        except OSError as error:
            logger.info("no live progress: %s:%d cannot be reached (%s)", target.host, target.port, error)

    def send(self, counts: Counts) -> None:
        """One datagram with the counts so far; never blocks and never raises."""
        if self._socket is None or self._target is None:
            return
        partition, attempt = self._task
        fields = [self._target.run_id, self._target.wave, partition, attempt]
        fields += [counts.chunks, counts.tokens, counts.padded, round(counts.busy_s, 3)]
        try:
            self._socket.sendto(json.dumps(fields).encode(), self._address)
        except OSError:
            logger.debug("a progress datagram was not sent", exc_info=True)

    def close(self) -> None:
        """Release the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class ProgressReceiver:
    """Collects the counts of one run on the driver, in a daemon thread; a context manager.

    Of a partition the highest attempt counts, and of an attempt its highest counts: datagrams may be lost, doubled and
    overtake each other. Datagrams of other runs, and those that are none, are ignored.
    """

    def __init__(self, run_id: str, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._run_id = run_id
        self._counts: dict[tuple[int, int], tuple[int, Counts]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.bind((host, port))
        self._socket.settimeout(_POLL_S)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._receive, name="shoal-progress", daemon=True)

    def __enter__(self) -> ProgressReceiver:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def totals(self, wave: int | None = None) -> Counts:
        """Sum over the partitions of a wave, or of all waves."""
        with self._lock:
            parts = [counts for (of, _), (_, counts) in self._counts.items() if wave is None or of == wave]
        return sum(parts, Counts())

    def _receive(self) -> None:
        while not self._stop.is_set():
            try:
                datagram = self._socket.recv(MAX_DATAGRAM)
            except TimeoutError:
                continue
            except OSError:
                return
            self._take(datagram)

    def _take(self, datagram: bytes) -> None:
        try:
            run_id, wave, partition, attempt, chunks, tokens, padded, busy_s = json.loads(datagram)
            if run_id != self._run_id:
                return
            counts = Counts(chunks=int(chunks), tokens=int(tokens), padded=int(padded), busy_s=float(busy_s))
            key, attempt = (int(wave), int(partition)), int(attempt)
        except (ValueError, TypeError, OverflowError, RecursionError):
            return
        with self._lock:
            known = self._counts.get(key)
            if known is None or (attempt, counts.chunks) > (known[0], known[1].chunks):
                self._counts[key] = (attempt, counts)
