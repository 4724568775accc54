"""Live counts from workers to the driver by UDP: best effort, exact when they arrive, never in the way.

Spark's own counters move only at the end of a task. A datagram holds the absolute counts of one task attempt, so that
a lost one is made up for by the next, and a repeated one changes nothing. It is sealed with a secret of the run (keyed
BLAKE2, RFC 7693), so that nobody else's counts.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from dataclasses import dataclass, field
from hashlib import blake2b
from hmac import compare_digest
from secrets import token_bytes
from types import TracebackType
from typing import Any, Final

from shoal.udfs.device_load import DeviceLoad

logger = logging.getLogger(__name__)

MAX_DATAGRAM: Final = 1024
MAX_PLACE: Final = 100
"""Characters of the name of an executor."""
_POLL_S: Final = 0.2
_SEAL_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class ProgressTarget:
    """Where workers send their counts, with what seal, and the wave that they belong to."""

    host: str
    port: int
    secret: bytes = field(repr=False)
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


def executor_here() -> tuple[str, int]:
    """Host, and what tells its executors apart: Spark forks the workers of each from one daemon of its own."""
    return socket.gethostname(), os.getppid()


def place_of(device: str) -> str:
    """The executor that this worker belongs to, as `shoal doctor` names it, and its GPU where it has one."""
    executor = "{}/{}".format(*executor_here())
    return f"{executor} {device}" if device.startswith("cuda") else executor


class ProgressSender:
    """Sends the counts of one task attempt; a target of None, or one that cannot be reached, is silence.

    place: the executor, and its GPU, whose work it is; "" for one that is not told.
    """

    def __init__(self, target: ProgressTarget | None, partition: int, attempt: int, place: str = "") -> None:
        self._target = target
        self._task = (partition, attempt)
        self._place = place[:MAX_PLACE]
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

    def send(self, counts: Counts, load: DeviceLoad | None = None) -> None:
        """One datagram with the counts so far, and what the GPU is doing; never blocks and never raises."""
        if self._socket is None or self._target is None:
            return
        partition, attempt = self._task
        fields: list[Any] = [self._target.wave, partition, attempt]
        fields += [counts.chunks, counts.tokens, counts.padded, round(counts.busy_s, 3), self._place]
        fields += [None] if load is None else [[load.used_bytes, load.total_bytes, load.busy_percent]]
        try:
            body = json.dumps(fields).encode()
            self._socket.sendto(_seal(self._target.secret, body) + body, self._address)
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
    overtake each other. What `secret` did not seal is ignored.
    """

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.secret = token_bytes(_SEAL_BYTES)
        self._counts: dict[tuple[int, int], tuple[int, Counts, str]] = {}
        self._loads: dict[str, DeviceLoad] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.bind((host, port))
        self._socket.settimeout(_POLL_S)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self.port = self.address[1]
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
            parts = [counts for (of, _), (_, counts, _) in self._counts.items() if wave is None or of == wave]
        return sum(parts, Counts())

    def places(self) -> dict[str, tuple[Counts, DeviceLoad | None]]:
        """What each executor has done of the waves, and the newest load of its GPU, by its name in their order."""
        with self._lock:
            found: dict[str, Counts] = {}
            for _, counts, place in self._counts.values():
                found[place] = found.get(place, Counts()) + counts
            return {place: (found[place], self._loads.get(place)) for place in sorted(found)}

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
        seal, body = datagram[:_SEAL_BYTES], datagram[_SEAL_BYTES:]
        if not compare_digest(seal, _seal(self.secret, body)):
            return
        try:
            wave, partition, attempt, chunks, tokens, padded, busy_s, place, load = json.loads(body)
            counts = Counts(chunks=int(chunks), tokens=int(tokens), padded=int(padded), busy_s=float(busy_s))
            key, attempt = (int(wave), int(partition)), int(attempt)
            # It is shown on a terminal.
            place = "".join(char for char in str(place)[:MAX_PLACE] if char.isprintable())
            loaded = None if load is None else _load_of(*load)
        except (ValueError, TypeError, OverflowError, RecursionError):
            return
        with self._lock:
            known = self._counts.get(key)
            if known is None or (attempt, counts.chunks) > (known[0], known[1].chunks):
                self._counts[key] = (attempt, counts, place)
                if loaded is not None:
                    self._loads[place] = loaded


def _seal(secret: bytes, body: bytes) -> bytes:
    return blake2b(body, key=secret, digest_size=_SEAL_BYTES).digest()


def _load_of(used: Any, total: Any, busy: Any) -> DeviceLoad:
    return DeviceLoad(int(used), int(total), None if busy is None else int(busy))
