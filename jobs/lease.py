"""One run at a time on one table: an advisory lease file beside it, kept alive by a heartbeat.

The lease saves work; what keeps the table right is the fence at the commit (publish.py), should a lease be lost.
A holder is dead when its heartbeat counter stands still for TAKEOVER_BEATS intervals of the observer's own clock, or at
once when it ran on this very machine and its process is gone. Wall clocks of two machines are never compared.
"""

import contextlib
import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JJavaError

from shoal.conf.errors import BusyError, LeaseLostError
from shoal.jobs.filesystem import FileSystem

HEARTBEAT_SECONDS = 5.0
TAKEOVER_BEATS = 4


@dataclass
class Lease:
    """A held lease; `check` at every step that costs or commits something."""

    files: FileSystem
    path: str
    body: dict[str, Any]
    heartbeat_seconds: float

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        # Away from local disks a rewrite is not atomic: a look in the middle of it would see no lease at all.
        self._file = threading.Lock()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._beat, name="shoal-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """LeaseLostError when somebody else holds the lease by now."""
        if self._lost is None:
            self._look()
        if self._lost is not None:
            raise LeaseLostError(
                f"lease {self.path}: run {self._lost} took the table over while this run stood still; "
                f"nothing was published by this run, and what it had encoded is kept for the next"
            )

    def release(self) -> None:
        """Stops the heartbeat and removes the file, unless it is somebody else's by now."""
        self._stop.set()
        self._thread.join()
        if self._lost is None:
            self._look()
        if self._lost is None:
            self.files.delete(self.path)

    def _look(self) -> None:
        with self._file:
            self._read()

    def _read(self) -> None:
        held = _parse(self.files.read(self.path))
        if held.get("run_id") != self.body["run_id"]:
            self._lost = str(held.get("run_id", "unknown"))

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat_seconds):
            # A full disk or a store that does not answer is no reason to stop: the counter then stands still, and
            # whoever takes over makes this run lose at its next check.
            with contextlib.suppress(OSError, Py4JJavaError), self._file:
                self._read()
                if self._lost is not None:
                    return
                self.body["heartbeat"] += 1
                self.files.replace(self.path, json.dumps(self.body))


@contextlib.contextmanager
def held(
    files: FileSystem,
    path: str,
    run_id: str,
    *,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Lease]:
    """Holds the lease for the block; BusyError, naming the holder, when another run is alive on the table."""
    body = {
        "run_id": run_id,
        "host": socket.gethostname(),
        "user": _user(),
        "pid": os.getpid(),
        "process": _process_identity(os.getpid()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "heartbeat": 0,
    }
    text = json.dumps(body)
    while not files.create(path, text):
        _take_over(files, path, run_id, heartbeat_seconds, say)
    lease = Lease(files, path, body, heartbeat_seconds)
    try:
        yield lease
    finally:
        lease.release()


def holder(files: FileSystem, path: str) -> dict[str, Any] | None:
    """What the lease file says, None when nobody holds the table."""
    text = files.read(path)
    return None if text is None else _parse(text)


def _take_over(files: FileSystem, path: str, run_id: str, heartbeat_seconds: float, say: Callable[[str], None]) -> None:
    """Clears the way when the holder is dead, BusyError when it is alive."""
    seen = files.read(path)
    if seen is None:
        return
    body = _parse(seen)
    if not died_here(body):
        say(f"lease of run {body.get('run_id')} on {body.get('host')} found; watching its heartbeat")
        end = time.monotonic() + TAKEOVER_BEATS * heartbeat_seconds
        while time.monotonic() < end:
            time.sleep(min(0.5, heartbeat_seconds / 4))
            now = files.read(path)
            if now is None:
                return
            if now != seen:
                raise _busy(path, _parse(now))
    say(f"run {body.get('run_id')} on {body.get('host')} is dead; taking its lease over")
    grave = f"{path}.{run_id}"
    if not files.move(path, grave):
        return
    moved = files.read(grave)
    if moved is not None and _parse(moved).get("run_id") != body.get("run_id"):
        # Another run took over between our look and our rename: give its lease back.
        files.create(path, moved)
        files.delete(grave)
        raise _busy(path, _parse(moved))
    files.delete(grave)


def _busy(path: str, body: dict[str, Any]) -> BusyError:
    return BusyError(
        f"lease {path}: run {body.get('run_id')} by {body.get('user')} on {body.get('host')} (process "
        f"{body.get('pid')}) holds the table since {body.get('started')} and is alive (heartbeat "
        f"{body.get('heartbeat')}); wait for it, or stop it"
    )


def died_here(body: dict[str, Any]) -> bool:
    """Whether the holder ran in this machine's process space and is gone: no need to watch its heartbeat."""
    then, now = body.get("process"), _process_identity(int(body.get("pid", 0)))
    here = _process_identity(os.getpid())
    if not then or not here or then["space"] != here["space"]:
        return False
    return now is None or now["started"] != then["started"]


def _process_identity(pid: int) -> dict[str, str] | None:
    """Boot, process namespace and start tick of a live process, None when it is gone or a zombie; Linux only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - the link's text is wanted, not a path
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if stat[0] == "Z" else {"space": f"{boot} {space}", "started": stat[19]}


def _parse(text: str | None) -> dict[str, Any]:
    try:
        body = json.loads(text or "{}")
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
