import pickle
from collections.abc import Iterator

import pyarrow as pa
import pytest
from pyspark import cloudpickle

from shoal.conf.errors import ModelError, WorkerError
from shoal.conf.run import ChunkConfig
from shoal.udfs import chunk_udf
from shoal.udfs.chunk_udf import make_chunk, read_texts
from shoal.udfs.chunking import Chunker
from shoal.udfs.schema import CHUNK_INPUT, CHUNK_OUTPUT

CHUNK = ChunkConfig(tokens=3, overlap=1, boundary="word")


def batch(*texts: str | None) -> pa.RecordBatch:
    hashes = [number.to_bytes(16, "big") for number in range(len(texts))]
    return pa.RecordBatch.from_arrays([pa.array(hashes), pa.array(texts, pa.string())], schema=CHUNK_INPUT)


def rows(batches: list[pa.RecordBatch]) -> list[dict]:
    return pa.Table.from_batches(batches, CHUNK_OUTPUT).to_pylist()


def test_rows_come_out_as_their_chunks_in_the_declared_schema():
    batches = list(make_chunk(CHUNK, "")(iter([batch("one two three four five", "six")])))
    assert [each.schema for each in batches] == [CHUNK_OUTPUT]
    found = [(row["row_hash"][-1], row["chunk_index"], row["text"]) for row in rows(batches)]
    assert found == [(0, 0, "one two three"), (0, 1, "three four five"), (1, 0, "six")]


def test_offsets_give_the_text_of_the_chunk():
    text = "\U0001f600 one two \u0645\u0631\u062d\u0628\u0627 three\r\nfour"
    for row in rows(list(make_chunk(CHUNK, "")(iter([batch(text)])))):
        assert text[row["chunk_start"] : row["chunk_end"]] == row["text"]


def test_every_row_gives_a_chunk_blank_and_null_ones_too():
    found = rows(list(make_chunk(CHUNK, "")(iter([batch("", "  \n", None, "x")]))))
    spans = [(row["chunk_index"], row["chunk_start"], row["chunk_end"], row["text"]) for row in found]
    assert spans == [(0, 0, 0, ""), (0, 0, 3, "  \n"), (0, 0, 0, None), (0, 0, 1, "x")]


def test_output_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(chunk_udf, "MAX_OUTPUT_ROWS", 10)
    batches = list(make_chunk(CHUNK, "")(iter([batch("a b c d e f g h i j k l m n o p q r s t " * 10)])))
    assert {each.num_rows for each in batches[:-1]} == {10}
    assert 0 < batches[-1].num_rows <= 10
    assert [row["chunk_index"] for row in rows(batches)] == list(range(len(rows(batches))))


def test_output_batches_are_bounded_in_characters(monkeypatch):
    monkeypatch.setattr(chunk_udf, "MAX_OUTPUT_CHARS", 100)
    batches = list(make_chunk(CHUNK, "")(iter([batch("x" * 99, "y" * 99, "z")])))
    assert [each.num_rows for each in batches] == [2, 1]


def test_it_takes_one_batch_at_a_time_from_an_endless_source():
    def endless() -> Iterator[pa.RecordBatch]:
        while True:
            yield batch("one two")

    assert next(make_chunk(CHUNK, "")(endless())).num_rows == 1


def test_empty_partitions_and_batches_load_no_tokenizer(tmp_path):
    chunk = make_chunk(CHUNK, str(tmp_path / "absent"))
    assert list(chunk(iter([]))) == []
    assert list(chunk(iter([batch()]))) == []
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        list(chunk(iter([batch("one")])))


def test_a_worker_loads_the_tokenizer_once(monkeypatch):
    built = []
    monkeypatch.setattr(chunk_udf, "_CHUNKERS", {})
    monkeypatch.setattr(chunk_udf, "Chunker", lambda *args: built.append(args) or Chunker(*args))
    for _ in range(3):
        list(make_chunk(CHUNK, "")(iter([batch("one"), batch("two")])))
    assert built == [(CHUNK, "")]


def test_the_function_travels_as_spark_sends_it():
    chunk = pickle.loads(cloudpickle.dumps(make_chunk(CHUNK, "")))
    assert [row["text"] for row in rows(list(chunk(iter([batch("one two three four")]))))] == [
        "one two three",
        "three four",
    ]


def test_bytes_that_are_not_utf8_are_replaced():
    raw = pa.array([b"ok", b"caf\xe9", None])
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    assert read_texts(column) == ["ok", "caf\ufffd", None]


def test_a_failure_names_the_row(monkeypatch):
    def fail(self: Chunker, text: str) -> list[tuple[int, int]]:
        raise RuntimeError(f"cannot read {text}")

    monkeypatch.setattr(Chunker, "split", fail)
    with pytest.raises(WorkerError, match=r"partition 0, row_hash 0{32}: .* 3 characters .*RuntimeError: cannot read"):
        list(make_chunk(CHUNK, "")(iter([batch("one")])))
