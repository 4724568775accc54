"""An encoder in a process of its own: what kills or hangs it is narrowed down to the chunk at fault.

Axes: N texts, D vector elements.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from typing import Final

import numpy as np

from shoal.conf.errors import ShoalError, WorkerError
from shoal.udfs import reasons
from shoal.udfs.canaries import Canaries
from shoal.udfs.encoder import Encoded, EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.watchdog import STDERR, patience_s

logger = logging.getLogger(__name__)

COMMAND: Final = (sys.executable, "-m", "shoal.udfs.isolated_worker")
REQUEST_CHUNKS: Final = 64
"""Texts of one request: as many are encoded once more, one by one, when it kills the process."""

DEATHS_IN_A_ROW: Final = 8
"""So many chunks that kill one after the other, with nothing encoded between them: it is not the chunks."""

_EXIT_S: Final = 10.0


class ChildDied(Exception):  # noqa: N818 - not an error of Shoal's: the encoder makes an error row of it
    """The child is gone; `reason` (of reasons.py) says whether it died or was ended because it hung."""

    def __init__(self, reason: str, how: str) -> None:
        super().__init__(how)
        self.reason = reason


class IsolatedEncoder:
    """Has texts encoded by a child process, which ends with the Python worker, and starts another one when it dies.

    A request that kills the child is repeated chunk by chunk: the chunk that kills it again, alone, is an error
    (`worker_died`; `time_limit` when it hung), the others have their vectors. So a request costs a start of the child,
    and one more for each chunk at fault: it loads the model, which is dearer than 64 forward passes of one chunk.
    WorkerError when the child dies before its first chunk, or with DEATHS_IN_A_ROW chunks in a row.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        device: str,
        options: EncodeOptions,
        canaries: Canaries | None = None,
        *,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.spec = spec
        self.num_deaths = 0
        self._limit_s = patience_s(options.time_limit_s)
        self._setup = (spec, device, replace(options, exit_when_hung=True), canaries)
        self._command = command
        self._child: _Child | None = None
        self._in_a_row = 0

    def __enter__(self) -> IsolatedEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def encode(self, texts: list[str]) -> Encoded:
        """Vectors of the texts, in their order."""
        parts: list[Encoded] = []
        start = alone_until = 0
        while start < len(texts):
            stop = start + 1 if start < alone_until else min(start + REQUEST_CHUNKS, len(texts))
            try:
                parts.append(self._ask(texts[start:stop]))
            except ChildDied as died:
                if stop - start > 1:
                    logger.warning("%s over %d chunks; they are encoded one by one", died, stop - start)
                    alone_until = stop
                    continue
                logger.warning("%s over one chunk, which is kept as error %r", died, died.reason)
                self._count(died)
                parts.append(_failed(died.reason, self.spec.dim))
            else:
                self._in_a_row = 0
            start = stop
        return _joined(parts, self.spec.dim)

    def _ask(self, texts: list[str]) -> Encoded:
        if self._child is None:
            self._child = _Child(self._command)
            self._set_up(self._child)
        try:
            # At worst every chunk ends up alone in a microbatch, after all those that it was in have been split.
            answer = self._child.ask(texts, 2 * len(texts) * self._limit_s)
            if isinstance(answer, ShoalError):
                # A chunk that breaks the device spoils it for the rest of the process, which is as good as dead.
                if answer.code == "DEVICE_FAILED":
                    raise ChildDied(reasons.WORKER_DIED, str(answer))
                raise answer
        except BaseException as error:
            self.num_deaths += isinstance(error, ChildDied)
            self.close()
            raise
        assert isinstance(answer, Encoded)  # noqa: S101 - the child sends nothing else
        return answer

    def _set_up(self, child: _Child) -> None:
        try:
            answer = child.ask(self._setup, None)
        except ChildDied as died:
            self.close()
            raise WorkerError(
                f"encoder {self.spec.reference!r}: {died} before it had a chunk to encode, so no chunk is at fault; "
                "look at the memory that a task has, and at the executor's log",
                code="WORKER_DIES",
            ) from died
        if isinstance(answer, ShoalError):
            self.close()
            raise answer

    def _count(self, died: ChildDied) -> None:
        self._in_a_row += 1
        if self._in_a_row >= DEATHS_IN_A_ROW:
            raise WorkerError(
                f"encoder {self.spec.reference!r}: {died} over {self._in_a_row} chunks in a row, each of them alone, "
                "so the chunks are not at fault; look at the memory that a task has, at the device, and at the "
                "executor's log",
                code="WORKER_DIES",
            ) from died


class _Child:
    """A process that encodes, and the socket to it; what its watchdog writes tells a hang from a death."""

    def __init__(self, command: Sequence[str]) -> None:
        self._socket, theirs = Pipe()
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        fds = (theirs.fileno(), self._stacks.fileno())
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)  # noqa: PTH100 - "" is the working folder
        self._process = subprocess.Popen(
            [*command, *map(str, fds)],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=STDERR,
            pass_fds=fds,
        )
        theirs.close()

    def ask(self, what: object, seconds: float | None) -> object:
        """Send and wait for the answer, at most so long; ChildDied when there will be none."""
        try:
            self._socket.send(what)
            if self._socket.poll(seconds):
                return self._socket.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        raise ChildDied(reasons.TIME_LIMIT, "the encoding process gave no answer")

    def end(self) -> None:
        """Kill the process and wait for it; one that even the kernel cannot end is left behind."""
        self._socket.close()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_S)
        self._stacks.close()

    def _death(self) -> ChildDied:
        try:
            status = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return ChildDied(reasons.WORKER_DIED, "the encoding process closed its socket")
        self._stacks.seek(0)
        stacks = self._stacks.read().decode(errors="replace")
        if stacks:
            logger.warning("where the encoding process hung:\n%s", stacks)
            return ChildDied(reasons.TIME_LIMIT, "the encoding process hung")
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return ChildDied(reasons.WORKER_DIED, f"the encoding process died ({how})")


def _failed(reason: str, dim: int) -> Encoded:
    return Encoded(
        vectors_ND=np.zeros((1, dim), dtype=np.float32),
        n_tokens_N=np.zeros(1, dtype=np.int32),
        truncated_N=np.zeros(1, dtype=np.bool_),
        errors_N=[reason],
    )


def _joined(parts: list[Encoded], dim: int) -> Encoded:
    return Encoded(
        vectors_ND=np.concatenate([np.zeros((0, dim), dtype=np.float32), *(part.vectors_ND for part in parts)]),
        n_tokens_N=np.concatenate([np.zeros(0, dtype=np.int32), *(part.n_tokens_N for part in parts)]),
        truncated_N=np.concatenate([np.zeros(0, dtype=np.bool_), *(part.truncated_N for part in parts)]),
        errors_N=[error for part in parts for error in part.errors_N],
        padded_tokens=sum(part.padded_tokens for part in parts),
        busy_s=sum(part.busy_s for part in parts),
    )
