"""The Spark adapter of encoding: Arrow batches in, Arrow batches with vectors out, for `mapInArrow`.

Axes: N chunks of a batch, D vector elements.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import TaskContext

from shoal.conf.errors import ShoalError, WorkerError
from shoal.udfs import reasons
from shoal.udfs.canaries import Canaries, canary_texts, encode_canaries, library_versions
from shoal.udfs.device_load import device_load
from shoal.udfs.encoder import Encoded, EncodeOptions, Encoder
from shoal.udfs.encoder_cache import cached_encoder, drop_encoder
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.feeding import encode_windows
from shoal.udfs.isolation import IsolatedEncoder
from shoal.udfs.progress import Counts, ProgressSender, ProgressTarget, place_of
from shoal.udfs.resolution import resolve
from shoal.udfs.schema import ENCODE_OUTPUT, PROBE_OUTPUT
from shoal.udfs.sent_model import with_files_here
from shoal.udfs.vectors import to_list_array

ArrowFunction = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]

ISOLATED_ATTEMPTS = 1000
"""Added to the attempts of an isolated wave, so that its counts replace those of the attempts that died."""


@dataclass(frozen=True, slots=True)
class Task:
    """What Spark gave this task: its partition and attempt, CPU threads, and the device to encode on."""

    partition: int
    attempt: int
    cpus: int
    device: str

    @classmethod
    def current(cls, options: EncodeOptions) -> Task:
        """The running task; outside Spark partition 0, one thread, and the CPU unless the options name a device."""
        context = TaskContext.get()
        if context is None:
            return cls(0, 0, 1, options.device or "cpu")
        gpu = context.resources().get("gpu")
        device = options.device or (f"cuda:{gpu.addresses[0]}" if gpu else "cpu")
        return cls(context.partitionId(), context.attemptNumber(), context.cpus(), device)


@dataclass(frozen=True, slots=True)
class Window:
    """An Arrow batch with the texts that can be encoded, where they stand, and why the others cannot."""

    batch: pa.RecordBatch
    texts: list[str]
    rows: NDArray[np.intp]
    errors_N: list[str | None]

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> Window:
        """Split a batch of ENCODE_INPUT; null, blank and undecodable texts are errors and never reach the encoder."""
        texts = _decoded(batch.column("text"))
        errors_N: list[str | None] = [
            reasons.INVALID_UTF8
            if isinstance(text, bytes)
            else reasons.NULL_TEXT
            if text is None
            else (None if text.strip() else reasons.BLANK_TEXT)
            for text in texts
        ]
        rows = np.array([row for row, error in enumerate(errors_N) if error is None], dtype=np.intp)
        return cls(batch, [str(texts[row]) for row in rows], rows, errors_N)

    def output(self, encoded: Encoded, dim: int) -> pa.RecordBatch:
        """The batch of ENCODE_OUTPUT, in the order of the input."""
        n = self.batch.num_rows
        vectors_ND = np.zeros((n, dim), dtype=np.float32)
        n_tokens_N = np.zeros(n, dtype=np.int32)
        truncated_N = np.zeros(n, dtype=np.bool_)
        vectors_ND[self.rows] = encoded.vectors_ND
        n_tokens_N[self.rows] = encoded.n_tokens_N
        truncated_N[self.rows] = encoded.truncated_N
        errors_N = list(self.errors_N)
        for row, error in zip(self.rows, encoded.errors_N, strict=True):
            errors_N[row] = error
        valid_N = np.array([error is None for error in errors_N], dtype=np.bool_)
        now = int(datetime.now(UTC).timestamp() * 1_000_000)
        return pa.RecordBatch.from_arrays(
            [
                self.batch.column("content_hash"),
                to_list_array(vectors_ND, valid_N),
                pa.array(n_tokens_N),
                pa.array(truncated_N),
                pa.array(errors_N, type=pa.string()),
                pa.array(np.full(n, now, dtype=np.int64)).cast(pa.timestamp("us", tz="UTC")),
            ],
            schema=ENCODE_OUTPUT,
        )


def make_encode(
    spec: EncoderSpec,
    options: EncodeOptions,
    canaries: Canaries | None = None,
    progress: ProgressTarget | None = None,
    *,
    isolated: bool = False,
) -> ArrowFunction:
    """A `mapInArrow` function ENCODE_INPUT -> ENCODE_OUTPUT: one batch out for each batch in, rows in their order.

    The encoder is built at the first row of the first task and kept for the Python worker's life; empty partitions
    build none. Canaries, if given, are checked once per encoder. One batch is read ahead. `isolated`: the encoder lives
    in a process of its own for each task, and a chunk that kills or hangs that process is an error.
    """

    def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return encode_batches(batches, spec, options, canaries, progress, isolated=isolated)

    return encode


def encode_batches(
    batches: Iterator[pa.RecordBatch],
    spec: EncoderSpec,
    options: EncodeOptions,
    canaries: Canaries | None = None,
    progress: ProgressTarget | None = None,
    *,
    isolated: bool = False,
) -> Iterator[pa.RecordBatch]:
    """What the function of `make_encode` does; what it raises names partition, first content hash and fingerprint."""
    task = Task.current(options)
    windows: list[Window] = []

    def read() -> Iterator[list[str]]:
        for batch in batches:
            if batch.num_rows:
                windows.append(Window.of(batch))
                yield windows[-1].texts

    texts = read()
    first = next(texts, None)
    if first is None:
        return
    spec = with_files_here(spec)
    attempt = task.attempt + ISOLATED_ATTEMPTS * isolated
    sender = ProgressSender(progress, task.partition, attempt, place_of(task.device))
    counts = Counts()
    held = ExitStack()
    held.callback(sender.close)
    try:
        encoder: Encoder
        if isolated:
            # The device may have no room for the weights of an earlier wave beside those of the child.
            drop_encoder((task.device, options.role))
            options = prepare_worker(task, options)
            encoder = held.enter_context(IsolatedEncoder(spec, task.device, options, canaries))
        else:
            encoder = worker_encoder(spec, task, options, canaries)
        for encoded in encode_windows(encoder, _chain(first, texts)):
            window = windows.pop(0)
            yield window.output(encoded, spec.dim)
            counts += Counts(
                chunks=window.batch.num_rows,
                tokens=int(encoded.n_tokens_N.sum()),
                padded=encoded.padded_tokens,
                busy_s=encoded.busy_s,
            )
            sender.send(counts, device_load(task.device) if progress else None)
    except ShoalError as error:
        raise type(error)(f"{_where(task, windows, spec)}: {error}", code=error.code) from error
    except Exception as error:
        raise WorkerError(
            f"{_where(task, windows, spec)}: encoding stopped with {type(error).__name__}: {error}; the task is tried "
            "again, and if it keeps failing the cause below is the one to look at"
        ) from error
    finally:
        held.close()


def make_probe(spec: EncoderSpec, options: EncodeOptions) -> ArrowFunction:
    """A `mapInArrow` function that ignores what its rows say: one row of PROBE_OUTPUT for a partition that has any.

    `report` is JSON: precision, backend, dim, device, parity {min, mean}, libraries, processor, tokens_per_s over the
    canaries, fingerprint. `vectors` are the canary vectors (C, D) as little-endian float32.
    """

    def probe(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return probe_batches(batches, spec, options)

    return probe


def probe_batches(
    batches: Iterator[pa.RecordBatch], spec: EncoderSpec, options: EncodeOptions
) -> Iterator[pa.RecordBatch]:
    """What the function of `make_probe` does."""
    if not sum(batch.num_rows for batch in batches):
        return
    task = Task.current(options)
    options = prepare_worker(task, options)
    resolution = resolve(with_files_here(spec), task.device, options)
    began = time.perf_counter()
    encoded = resolution.encoder.encode(list(canary_texts()))
    seconds = time.perf_counter() - began
    report = {
        "precision": resolution.spec.precision,
        "backend": resolution.spec.backend,
        "dim": resolution.spec.dim,
        "device": task.device,
        "fingerprint": resolution.spec.fingerprint,
        "parity": {"min": float(resolution.parity_C.min()), "mean": float(resolution.parity_C.mean())},
        "libraries": library_versions(),
        "processor": processor_name(),
        "tokens_per_s": round(float(encoded.n_tokens_N.sum()) / max(seconds, 1e-9), 1),
    }
    vectors = np.ascontiguousarray(resolution.vectors_CD, dtype="<f4").tobytes()
    yield pa.RecordBatch.from_arrays([pa.array([json.dumps(report)]), pa.array([vectors])], schema=PROBE_OUTPUT)


def make_canaries(spec: EncoderSpec, options: EncodeOptions) -> ArrowFunction:
    """A `mapInArrow` function that ignores what its rows say, as that of `make_probe`, for an encoder that is settled.

    `report` is JSON: precision, dim.
    """

    def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        if not sum(batch.num_rows for batch in batches):
            return
        encoder = worker_encoder(with_files_here(spec), Task.current(options), options)
        vectors = np.ascontiguousarray(encode_canaries(encoder), dtype="<f4").tobytes()
        report = json.dumps({"precision": spec.precision, "dim": spec.dim})
        yield pa.RecordBatch.from_arrays([pa.array([report]), pa.array([vectors])], schema=PROBE_OUTPUT)

    return encode


def worker_encoder(spec: EncoderSpec, task: Task, options: EncodeOptions, canaries: Canaries | None = None) -> Encoder:
    """The cached encoder of this Python worker, with the threads that the task was given."""
    return cached_encoder(spec, task.device, prepare_worker(task, options), canaries)


def prepare_worker(task: Task, options: EncodeOptions) -> EncodeOptions:
    """Options with their threads settled, and an environment that keeps the hub off and the tokenizer to them.

    Rayon, under the tokenizer, takes every core of the machine and ignores OMP_NUM_THREADS. A Python worker of Spark's
    is ended when it hangs, any other process is not.
    """
    threads = options.threads or task.cpus
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    return dataclasses.replace(options, threads=threads, exit_when_hung=TaskContext.get() is not None)


def processor_name() -> str:
    """The processor as Linux names it, else as Python does."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:  # noqa: PTH123 - not a file to open as a path
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.processor())
    except OSError:
        return platform.processor()


def _chain(first: list[str], rest: Iterator[list[str]]) -> Iterator[list[str]]:
    yield first
    yield from rest


def _decoded(column: pa.Array) -> list[str | bytes | None]:
    """Texts of a string column; a value that is not UTF-8 stays bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decode(value) for value in column.view(pa.binary()).to_pylist()]


def _decode(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _where(task: Task, windows: list[Window], spec: EncoderSpec) -> str:
    first = windows[0].batch.column("content_hash")[0].as_py() if windows else None
    return (
        f"partition {task.partition}, batch that starts with content hash {first.hex() if first else 'unknown'} "
        f"(encoder {spec.fingerprint})"
    )
