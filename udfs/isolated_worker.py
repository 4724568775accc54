"""The child's side of `isolation.py`: builds an encoder and encodes what it is sent, until it is sent no more.

    python -m shoal.udfs.isolated_worker SOCKET STACKS

Two file descriptors: the socket to the parent, and the file that the watchdog writes to before it ends the process.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from shoal.conf.errors import ShoalError, WorkerError
from shoal.udfs.canaries import Canaries
from shoal.udfs.encoder import EncodeOptions, Encoder
from shoal.udfs.encoder_cache import cached_encoder
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.watchdog import WATCHDOG

_PR_SET_PDEATHSIG: Final = 1

Build = Callable[[EncoderSpec, str, EncodeOptions, Canaries | None], Encoder]


def main(build: Build = cached_encoder) -> None:
    """Answers its setup with None, then each list of texts with its Encoded; a ShoalError instead when one failed."""
    socket, WATCHDOG.output = Connection(int(sys.argv[1])), int(sys.argv[2])
    end_with_parent()
    faulthandler.enable()
    with suppress(EOFError, ConnectionError):
        try:
            encoder = build(*socket.recv())
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            socket.send(_told(error))
            return
        socket.send(None)
        while True:
            texts = socket.recv()
            try:
                answer: object = encoder.encode(texts)
            except Exception as error:  # noqa: BLE001 - as above
                answer = _told(error)
            socket.send(answer)


def end_with_parent() -> None:
    """Leaves no orphan where Linux can prevent it, and makes this process the first to go when memory runs out."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _told(error: Exception) -> ShoalError:
    """The error as one that survives the way to the parent."""
    if isinstance(error, ShoalError):
        return error
    return WorkerError(f"encoding stopped with {type(error).__name__}: {error}; the executor's log may say more")


if __name__ == "__main__":
    main()
