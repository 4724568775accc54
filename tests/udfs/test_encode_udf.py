import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark import cloudpickle

from shoal.conf.errors import ModelError, WorkerError
from shoal.udfs import reasons
from shoal.udfs.canaries import Canaries, canary_texts
from shoal.udfs.encode_udf import Task, make_encode, make_probe, prepare_worker
from shoal.udfs.encoder import EncodeOptions, build_encoder
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.progress import ProgressReceiver, ProgressTarget
from shoal.udfs.schema import ENCODE_INPUT, ENCODE_OUTPUT, PROBE_OUTPUT
from shoal.udfs.vectors import cosines


@pytest.fixture
def spec(make_checkpoint: Callable[..., Path], describe: Callable[..., EncoderSpec]) -> EncoderSpec:
    return describe(make_checkpoint())


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker sets in its environment ends with the test."""
    for name in ("HF_HUB_OFFLINE", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def batch(texts: list[str | None]) -> pa.RecordBatch:
    """A batch of ENCODE_INPUT; the content hash is the row's number in 16 bytes."""
    hashes = [number.to_bytes(16, "big") for number in range(len(texts))]
    return pa.RecordBatch.from_arrays(
        [pa.array(hashes, pa.binary()), pa.array(texts, pa.string())], schema=ENCODE_INPUT
    )


def test_batches_come_back_with_vectors_in_the_declared_schema(spec: EncoderSpec, texts: list[str]) -> None:
    given = [batch(texts), batch([]), batch(texts[:2])]
    function = cloudpickle.loads(cloudpickle.dumps(make_encode(spec, EncodeOptions())))
    out = list(function(iter(given)))
    assert [b.num_rows for b in out] == [len(texts), 2]
    assert all(b.schema == ENCODE_OUTPUT for b in out)
    out[0].validate(full=True)
    expected = build_encoder(spec, "cpu", EncodeOptions()).encode(texts)
    vectors_ND = out[0].column("embedding").flatten().to_numpy().reshape(len(texts), -1)
    assert cosines(vectors_ND, expected.vectors_ND).min() >= 1 - 1e-6
    assert out[0].column("content_hash").equals(given[0].column("content_hash"))
    assert out[0].column("n_tokens").to_pylist() == expected.n_tokens_N.tolist()
    assert out[0].column("truncated").to_pylist() == expected.truncated_N.tolist()
    assert out[0].column("error").null_count == len(texts)
    age = datetime.now(UTC) - out[0].column("embedded_at")[0].as_py()
    assert abs(age.total_seconds()) < 60


def test_texts_that_cannot_be_encoded_become_errors_in_their_place(spec: EncoderSpec) -> None:
    raw = pa.array([b"good", None, b"  \n", b"bad \xff\xfe", b"also good"], pa.binary())
    hashes = pa.array([bytes([n]) for n in range(5)], pa.binary())
    given = pa.RecordBatch.from_arrays([hashes, raw.view(pa.string())], schema=ENCODE_INPUT)
    (out,) = make_encode(spec, EncodeOptions())(iter([given]))
    assert out.column("error").to_pylist() == [
        None,
        reasons.NULL_TEXT,
        reasons.BLANK_TEXT,
        reasons.INVALID_UTF8,
        None,
    ]
    assert [value is None for value in out.column("embedding").to_pylist()] == [False, True, True, True, False]
    assert out.column("n_tokens").to_pylist()[1:4] == [0, 0, 0]


def test_a_batch_without_one_good_text_is_all_errors(spec: EncoderSpec) -> None:
    (out,) = make_encode(spec, EncodeOptions())(iter([batch([None, " "])]))
    assert out.column("embedding").null_count == 2


def test_an_empty_partition_builds_no_encoder(spec: EncoderSpec) -> None:
    nowhere = dataclasses.replace(spec, folder="no/such/folder")
    assert list(make_encode(nowhere, EncodeOptions())(iter([]))) == []
    assert list(make_encode(nowhere, EncodeOptions())(iter([batch([])]))) == []


def test_an_endless_input_is_never_collected(spec: EncoderSpec) -> None:
    read: list[int] = []

    def endless() -> Iterator[pa.RecordBatch]:
        for number in itertools.count():
            read.append(number)
            yield batch([f"text {number}"])

    out = make_encode(spec, EncodeOptions())(endless())
    assert next(out).num_rows == 1
    assert next(out).num_rows == 1
    assert len(read) == 3


def test_moved_canaries_stop_the_task_before_its_first_batch(spec: EncoderSpec) -> None:
    canaries = Canaries(spec.fingerprint, np.ones((len(canary_texts()), spec.dim), np.float32))
    out = make_encode(spec, EncodeOptions(), canaries)(iter([batch(["a"])]))
    with pytest.raises(WorkerError, match=rf"^partition 0, .*0{{32}} \(encoder {spec.fingerprint}\): .* has moved on"):
        next(out)


def test_what_is_raised_keeps_its_class_and_gains_the_place(spec: EncoderSpec) -> None:
    broken = dataclasses.replace(spec, folder="no/such/folder")
    with pytest.raises(ModelError, match=r"^partition 0, batch that starts with content hash 0{32} \(encoder "):
        list(make_encode(broken, EncodeOptions())(iter([batch(["a"])])))


def test_an_unexpected_failure_is_a_worker_error_with_its_cause(spec: EncoderSpec) -> None:
    def failing() -> Iterator[pa.RecordBatch]:
        yield batch(["a"])
        raise KeyError("upstream")

    with pytest.raises(WorkerError, match="encoding stopped with KeyError: 'upstream'") as caught:
        list(make_encode(spec, EncodeOptions())(failing()))
    assert isinstance(caught.value.__cause__, KeyError)


def test_progress_reaches_the_driver(spec: EncoderSpec, texts: list[str]) -> None:
    with ProgressReceiver() as receiver:
        target = ProgressTarget("127.0.0.1", receiver.port, receiver.secret, 2)
        out = list(make_encode(spec, EncodeOptions(), progress=target)(iter([batch(texts), batch([None, "b"])])))
        for _ in range(500):
            if receiver.totals(wave=2).chunks == len(texts) + 2:
                break
            import time

            time.sleep(0.01)
        totals = receiver.totals(wave=2)
    assert totals.chunks == len(texts) + 2
    assert totals.tokens == sum(sum(b.column("n_tokens").to_pylist()) for b in out)
    assert totals.padded >= totals.tokens
    assert totals.busy_s > 0


def test_outside_spark_a_task_is_partition_zero_on_one_cpu() -> None:
    assert Task.current(EncodeOptions()) == Task(0, 0, 1, "cpu")
    assert Task.current(EncodeOptions(device="cuda:1")).device == "cuda:1"


@pytest.mark.parametrize(("wanted", "given", "expected"), [(None, 3, 3), (2, 3, 2)])
def test_a_worker_keeps_to_its_threads(wanted: int | None, given: int, expected: int) -> None:
    options = prepare_worker(Task(0, 0, given, "cpu"), EncodeOptions(threads=wanted))
    assert options.threads == expected
    assert os.environ["RAYON_NUM_THREADS"] == str(expected)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_probe_reports_what_it_settled(spec: EncoderSpec) -> None:
    open_spec = dataclasses.replace(spec, backend="auto")
    function = cloudpickle.loads(cloudpickle.dumps(make_probe(open_spec, EncodeOptions())))
    (out,) = function(iter([batch(["x"]), batch(["y"])]))
    assert out.schema == PROBE_OUTPUT
    assert out.num_rows == 1
    report = json.loads(out.column("report")[0].as_py())
    assert report["precision"] == "float32"
    assert report["backend"] in {"openvino", "torch"}
    assert (report["dim"], report["device"], report["fingerprint"]) == (spec.dim, "cpu", spec.fingerprint)
    assert report["parity"]["min"] >= 1 - 1e-5
    assert report["tokens_per_s"] > 0
    assert {"torch", "transformers", "sentence-transformers"} <= set(report["libraries"])
    vectors_CD = np.frombuffer(out.column("vectors")[0].as_py(), dtype="<f4").reshape(-1, spec.dim)
    settled = dataclasses.replace(open_spec, backend=report["backend"])
    Canaries(spec.fingerprint, vectors_CD.copy()).check(build_encoder(settled, "cpu", EncodeOptions()))


def test_a_probe_of_nothing_returns_nothing(spec: EncoderSpec) -> None:
    assert list(make_probe(spec, EncodeOptions())(iter([batch([])]))) == []


MEMORY_SCRIPT = """
import resource, sys
import pyarrow as pa
from shoal.conf.run import EncoderConfig
from shoal.udfs.encode_udf import make_encode
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.hash_encoder import describe_hash
from shoal.udfs.schema import ENCODE_INPUT

def batches(count):
    for batch in range(count):
        texts = [f"text {batch} {row} " + "word " * (row % 50) for row in range(2048)]
        yield pa.RecordBatch.from_arrays([pa.array([b"h"] * 2048), pa.array(texts)], schema=ENCODE_INPUT)

encode = make_encode(describe_hash(EncoderConfig(model="hash:384")), EncodeOptions())
peaks = []
for count in (10, 150):
    rows = sum(batch.num_rows for batch in encode(batches(count)))
    assert rows == count * 2048
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


def test_memory_does_not_grow_with_the_size_of_a_partition() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    small_kb, large_kb = map(int, done.stdout.split())
    # 140 more batches are 440 MB of vectors: kept, they would show.
    assert large_kb - small_kb < 60_000
