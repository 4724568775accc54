"""The feeding loop: windows of texts in, vectors in the same order out, whatever one of the texts does to the model.

Axes: N chunks of a window, D vector elements.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.conf.errors import ModelError, WorkerError
from shoal.udfs import reasons
from shoal.udfs.batching import TokenBudget, plan_microbatches
from shoal.udfs.encoder import Encoded, Encoder
from shoal.udfs.tokenizing import Tokenized
from shoal.udfs.vectors import check_vectors
from shoal.udfs.watchdog import WATCHDOG, patience_s

logger = logging.getLogger(__name__)

Finish = Callable[[], NDArray[np.float32]]

_MEMORY_WORDS: Final = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "status_alloc_failed",
    "bad_alloc",
)
_DEVICE_WORDS: Final = ("cuda error", "device-side assert", "illegal memory access", "cublas_status", "cudnn_status")


class Model(Protocol):
    """What the loop drives: a tokenizer and a forward pass."""

    dim: int
    packed: bool
    depth: int

    def tokenize(self, texts: list[str]) -> Tokenized:
        """Token ids and lengths of a window."""
        ...

    def start(self, items: list[Any], time_limit_s: float) -> Finish:
        """Begin the forward pass of one microbatch; what is returned waits for its vectors (n, D).

        Raises TimeoutError where the limit passed and the pass could be broken off.
        """
        ...

    def release_memory(self) -> None:
        """Give cached device memory back, after it ran out."""
        ...


def failure_reason(error: Exception) -> str | None:
    """Error reason for what a forward pass raised; None when the device itself is lost and no further pass can work."""
    words = str(error).lower()
    if isinstance(error, TimeoutError):
        return reasons.TIME_LIMIT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return reasons.OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and any(word in words for word in _MEMORY_WORDS):
        return reasons.OUT_OF_MEMORY
    if type(error).__name__ == "AcceleratorError" or any(word in words for word in _DEVICE_WORDS):
        return None
    return reasons.ENCODER_ERROR


@dataclass(slots=True)
class _Microbatch:
    rows: NDArray[np.intp]
    budget_before: int | None = None


class Feeder:
    """Feeds a model: microbatches by token budget, longest first, split until a poison chunk stands alone.

    The time limit holds for one microbatch. A back end that can be broken off (torch on a CPU between two layers,
    OpenVINO anywhere) raises TimeoutError, and the microbatch is split like any other that failed. What hangs in C code
    or a CUDA kernel cannot be broken off: with `exit_when_hung` the process ends, and `isolation.py` finds the chunk.
    """

    def __init__(
        self, model: Model, budget: TokenBudget, *, time_limit_s: float, normalize: bool, exit_when_hung: bool = False
    ) -> None:
        self.budget = budget
        self._model = model
        self._time_limit_s = time_limit_s
        self._normalize = normalize
        self._exit_when_hung = exit_when_hung

    def prepare(self, texts: list[str]) -> Tokenized:
        """Tokenise a window; may run in another thread than `encode`."""
        with self._watched():
            return self._model.tokenize(texts)

    def _watched(self) -> AbstractContextManager[None]:
        """Watches one step that cannot be broken off: a window's tokenizing, a microbatch's start or end."""
        return WATCHDOG.watching(patience_s(self._time_limit_s)) if self._exit_when_hung else nullcontext()

    def encode(self, window: Tokenized) -> Encoded:
        """Vectors of a window in its order; WorkerError when the device is lost, ModelError for a wrong dim."""
        n = len(window.items_N)
        vectors_ND = np.zeros((n, self._model.dim), dtype=np.float32)
        errors: dict[int, str] = {}
        padded, busy_s = self._forward_all(window, vectors_ND, errors)
        vectors_ND, errors_N = check_vectors(vectors_ND, normalize=self._normalize)
        for row, reason in errors.items():
            vectors_ND[row] = 0
            errors_N[row] = reason
        return Encoded(
            vectors_ND=vectors_ND,
            n_tokens_N=window.n_tokens_N,
            truncated_N=window.truncated_N,
            errors_N=errors_N,
            padded_tokens=padded,
            busy_s=busy_s,
        )

    def _forward_all(
        self, window: Tokenized, vectors_ND: NDArray[np.float32], errors: dict[int, str]
    ) -> tuple[int, float]:
        """Fill `vectors_ND` and `errors`; tokens forwarded with padding, and seconds."""
        planned_for = self.budget.value
        waiting = self._plan(window, np.arange(len(window.items_N)))
        in_flight: deque[tuple[_Microbatch, Finish]] = deque()
        padded = 0
        began = last = time.perf_counter()
        while waiting or in_flight:
            if waiting and len(in_flight) < self._model.depth:
                if self.budget.value != planned_for and all(entry.budget_before is None for entry in waiting):
                    planned_for = self.budget.value
                    waiting = self._plan(window, np.concatenate([entry.rows for entry in reversed(waiting)]))
                microbatch = waiting.pop()
                try:
                    with self._watched():
                        finish = self._model.start([window.items_N[row] for row in microbatch.rows], self._time_limit_s)
                except Exception as error:  # noqa: BLE001 - whatever one microbatch raises is the reason of an error row
                    while in_flight:
                        padded += self._finish(window, *in_flight.popleft(), vectors_ND, errors, waiting)
                    waiting += self._split(microbatch, error, errors)
                    continue
                in_flight.append((microbatch, finish))
            else:
                tokens = self._finish(window, *in_flight.popleft(), vectors_ND, errors, waiting)
                now = time.perf_counter()
                self.budget.observe(tokens, now - last)
                padded, last = padded + tokens, now
        return padded, time.perf_counter() - began

    def _plan(self, window: Tokenized, rows: NDArray[np.intp]) -> list[_Microbatch]:
        """Microbatches of these rows, the longest last: they are taken from the end."""
        planned = plan_microbatches(window.n_tokens_N[rows], self.budget.value, packed=self._model.packed)
        return [_Microbatch(rows[part]) for part in reversed(planned)]

    def _finish(
        self,
        window: Tokenized,
        microbatch: _Microbatch,
        finish: Finish,
        vectors_ND: NDArray[np.float32],
        errors: dict[int, str],
        waiting: list[_Microbatch],
    ) -> int:
        lengths = window.n_tokens_N[microbatch.rows]
        try:
            with self._watched():
                vectors_BD = finish()
        except Exception as error:  # noqa: BLE001 - as above
            waiting += self._split(microbatch, error, errors)
        else:
            if vectors_BD.shape != (len(lengths), self._model.dim):
                raise ModelError(
                    f"encoder.model announces vectors of {self._model.dim} elements and makes {vectors_BD.shape[-1]}; "
                    "its module settings do not fit its weights: download the model again or choose another"
                )
            vectors_ND[microbatch.rows] = vectors_BD
        return int(lengths.sum() if self._model.packed else lengths.max() * len(lengths))

    def _split(self, microbatch: _Microbatch, error: Exception, errors: dict[int, str]) -> list[_Microbatch]:
        """Halves of a microbatch that failed, or an error for a chunk that failed alone."""
        reason = failure_reason(error)
        if reason is None:
            raise WorkerError(
                f"the device failed in a forward pass ({type(error).__name__}: {error}); no vector was lost: the task "
                "is tried again in a new Python worker, and if it keeps failing, look at the device",
                code="DEVICE_FAILED",
            ) from error
        before = microbatch.budget_before
        if reason == reasons.OUT_OF_MEMORY:
            self._model.release_memory()
            before = self.budget.value if before is None else before
        if len(microbatch.rows) == 1:
            if before is not None:
                self.budget.restore(before)
            errors[int(microbatch.rows[0])] = reason
            logger.warning("a chunk failed alone and is kept as error %r", reason, exc_info=error)
            return []
        if reason == reasons.OUT_OF_MEMORY:
            self.budget.halve()
        middle = len(microbatch.rows) // 2
        return [_Microbatch(part, before) for part in (microbatch.rows[middle:], microbatch.rows[:middle])]


def encode_windows(encoder: Encoder, windows: Iterable[list[str]]) -> Iterator[Encoded]:
    """Encode window after window; while one is forwarded, a thread tokenises the next, if the encoder has a feeder.

    Reads one window ahead, and no more.
    """
    feeder: Feeder | None = getattr(encoder, "feeder", None)
    if feeder is None:
        for window in windows:
            yield encoder.encode(window)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-tokenize") as pool:
        prepared = None
        for window in windows:
            upcoming = pool.submit(feeder.prepare, window)
            if prepared is not None:
                yield feeder.encode(prepared.result())
            prepared = upcoming
        if prepared is not None:
            yield feeder.encode(prepared.result())
