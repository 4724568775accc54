"""Spark adapter of chunking: rows in, their chunks out, for `DataFrame.mapInArrow`."""

import os
from collections.abc import Callable, Iterator

import pyarrow as pa
from pyspark import TaskContext

from shoal.conf.errors import ShoalError, WorkerError
from shoal.conf.run import ChunkConfig
from shoal.udfs.chunking import Chunker, Span
from shoal.udfs.schema import CHUNK_OUTPUT
from shoal.udfs.sent_model import folder_here

MAX_OUTPUT_ROWS = 2_048
MAX_OUTPUT_CHARS = 16 * 2**20
"""An output batch ends at the first row that reaches one of the two; a chunk is never divided between batches."""

_CHUNKERS: dict[tuple[ChunkConfig, str], Chunker] = {}


def make_chunk(
    chunk: ChunkConfig, tokenizer_folder: str
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """A mapInArrow function from CHUNK_INPUT to CHUNK_OUTPUT; `tokenizer_folder` "" counts whitespace words.

    Every row gives at least one chunk: a blank text one that covers all of it, a NULL text one with NULL text and
    offsets 0 and 0, so that no row is lost before it becomes an error. Text that is not UTF-8 is read with U+FFFD for
    what cannot be decoded. The tokenizer is loaded once per Python worker, at the first batch.
    """

    def chunk_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.num_rows:
                yield from _chunk_batch(_chunker(chunk, tokenizer_folder), batch)

    return chunk_batches


def _chunker(chunk: ChunkConfig, tokenizer_folder: str) -> Chunker:
    key = (chunk, tokenizer_folder)
    if key not in _CHUNKERS:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else every task takes all cores
        _CHUNKERS.clear()
        _CHUNKERS[key] = Chunker(chunk, folder_here(tokenizer_folder, "tokenizer"))
    return _CHUNKERS[key]


def _chunk_batch(chunker: Chunker, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    output = _Output()
    row_hashes = batch.column("row_hash").to_pylist()
    for row_hash, text in zip(row_hashes, read_texts(batch.column("text")), strict=True):
        for index, (start, end) in enumerate(_spans(chunker, row_hash, text)):
            output.add(row_hash, index, (start, end), None if text is None else text[start:end])
            if output.is_full():
                yield output.take()
    if output.texts:
        yield output.take()


def _spans(chunker: Chunker, row_hash: bytes | None, text: str | None) -> list[Span]:
    if text is None:
        return [(0, 0)]
    try:
        return chunker.split(text) or [(0, len(text))]
    except ShoalError:
        raise
    except Exception as error:
        context = TaskContext.get()
        partition = context.partitionId() if context else 0
        name = row_hash.hex() if row_hash else "NULL"
        raise WorkerError(
            f"partition {partition}, row_hash {name}: its text of {len(text)} characters could not be cut into chunks "
            f"({type(error).__name__}: {error}); look at that row, or leave out chunk."
        ) from error


def read_texts(column: pa.Array) -> list[str | None]:
    """Python strings of an Arrow string column; bytes that are not UTF-8 become U+FFFD instead of an exception."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "replace") for value in raw]


class _Output:
    """Rows of CHUNK_OUTPUT on their way into a batch."""

    def __init__(self) -> None:
        self._start_again()

    def _start_again(self) -> None:
        self.row_hashes: list[bytes | None] = []
        self.indexes: list[int] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.texts: list[str | None] = []
        self.num_chars = 0

    def add(self, row_hash: bytes | None, index: int, span: Span, text: str | None) -> None:
        self.row_hashes.append(row_hash)
        self.indexes.append(index)
        self.starts.append(span[0])
        self.ends.append(span[1])
        self.texts.append(text)
        self.num_chars += span[1] - span[0]

    def is_full(self) -> bool:
        return len(self.texts) >= MAX_OUTPUT_ROWS or self.num_chars >= MAX_OUTPUT_CHARS

    def take(self) -> pa.RecordBatch:
        columns = [self.row_hashes, self.indexes, self.starts, self.ends, self.texts]
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, CHUNK_OUTPUT, strict=True)]
        self._start_again()
        return pa.RecordBatch.from_arrays(arrays, schema=CHUNK_OUTPUT)
