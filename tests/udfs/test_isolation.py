import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from shoal.conf.errors import WorkerError
from shoal.conf.run import EncoderConfig
from shoal.udfs import reasons
from shoal.udfs.encode_udf import make_encode
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.hash_encoder import describe_hash, hash_vectors
from shoal.udfs.isolation import DEATHS_IN_A_ROW, REQUEST_CHUNKS, IsolatedEncoder
from shoal.udfs.schema import ENCODE_INPUT

COMMAND = (sys.executable, str(Path(__file__).with_name("poisoned_worker.py")))
SPEC = dataclasses.replace(describe_hash(EncoderConfig(model="hash:2")), dim=2)


@pytest.fixture
def passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the children have written down: "start", or the texts of a forward pass."""
    log = tmp_path / "passes.log"
    monkeypatch.setenv("POISON_LOG", str(log))
    return lambda: log.read_text().splitlines()


@pytest.fixture
def encoder(passes: Callable[[], list[str]]) -> Iterator[IsolatedEncoder]:
    with IsolatedEncoder(SPEC, "cpu", EncodeOptions(time_limit_s=0.5), command=COMMAND) as made:
        yield made
    assert children() == []


def children() -> list[int]:
    """Process ids of the children that this process has, dead ones that nobody waited for included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and "poisoned_worker" in (stat.parent / "cmdline").read_text():
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def test_harmless_texts_come_back_in_their_order_from_one_child(
    encoder: IsolatedEncoder, passes: Callable[[], list[str]]
) -> None:
    texts = ["x" * (n % 7 + 1) for n in range(2 * REQUEST_CHUNKS + 3)]
    encoded = encoder.encode(texts)
    assert encoded.vectors_ND[:, 0].tolist() == [len(text) for text in texts]
    assert encoded.n_tokens_N.tolist() == [len(text) for text in texts]
    assert encoded.errors_N == [None] * len(texts)
    assert encoded.padded_tokens >= sum(map(len, texts))
    assert passes().count("start") == 1
    assert encoder.encode([]).vectors_ND.shape == (0, 2)


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        ("kill", reasons.WORKER_DIED),
        ("segfault", reasons.WORKER_DIED),
        ("device", reasons.WORKER_DIED),
        ("hang", reasons.TIME_LIMIT),
    ],
)
def test_a_poison_chunk_stands_alone_after_two_deaths(
    encoder: IsolatedEncoder, passes: Callable[[], list[str]], poison: str, reason: str
) -> None:
    texts = [poison if n == 5 else f"text {n}" for n in range(REQUEST_CHUNKS + 4)]
    encoded = encoder.encode(texts)
    assert encoded.errors_N == [reason if n == 5 else None for n in range(len(texts))]
    assert encoded.vectors_ND[:, 0].tolist() == [0 if n == 5 else len(text) for n, text in enumerate(texts)]
    assert encoder.num_deaths == 2
    written = passes()
    assert written.count("start") == 3
    given = [text for line in written if line != "start" for text in line.split(",")]
    assert max(given.count(text) for text in texts) == 2, "a chunk was encoded more than once more than needed"
    assert encoder.encode(["after"]).errors_N == [None]


def test_several_poison_chunks_are_each_found(encoder: IsolatedEncoder) -> None:
    poison = {3: "kill", 4: "kill too", 40: "hang", 70: "kill"}
    encoded = encoder.encode([poison.get(n, f"text {n}") for n in range(80)])
    wanted = {n: reasons.TIME_LIMIT if text == "hang" else reasons.WORKER_DIED for n, text in poison.items()}
    assert {n: error for n, error in enumerate(encoded.errors_N) if error} == wanted


def test_a_child_that_died_by_chance_costs_no_chunk(encoder: IsolatedEncoder) -> None:
    assert encoder.encode(["a"]).errors_N == [None]
    (pid,) = children()
    os.kill(pid, signal.SIGKILL)
    assert encoder.encode(["b", "c"]).errors_N == [None, None]
    assert encoder.num_deaths == 1


def test_a_run_of_deadly_chunks_is_not_the_chunks_fault(encoder: IsolatedEncoder) -> None:
    with pytest.raises(WorkerError, match=rf"died \(SIGKILL\) over {DEATHS_IN_A_ROW} chunks in a row"):
        encoder.encode(["kill"] * DEATHS_IN_A_ROW)
    assert children() == []


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("dies at load", r"the encoding process died \(SIGKILL\) before it had a chunk to encode"),
        ("raises at load", "encoding stopped with RuntimeError: no such weights"),
    ],
)
def test_an_encoder_that_cannot_be_built_is_an_error_of_the_task(
    passes: Callable[[], list[str]], reference: str, told: str
) -> None:
    spec = dataclasses.replace(SPEC, reference=reference)
    with IsolatedEncoder(spec, "cpu", EncodeOptions(), command=COMMAND) as made, pytest.raises(WorkerError, match=told):
        made.encode(["a"])
    assert passes() == ["start"]
    assert children() == []


def test_what_the_child_raises_is_raised_here(encoder: IsolatedEncoder) -> None:
    with pytest.raises(WorkerError, match="encoding stopped with KeyError: 'bug'"):
        encoder.encode(["bug"])


def test_the_real_child_encodes_batches_as_the_worker_itself_would() -> None:
    texts = ["one", "two two", None, "three"]
    hashes = [bytes([number]) for number in range(len(texts))]
    given = pa.RecordBatch.from_arrays([pa.array(hashes), pa.array(texts)], schema=ENCODE_INPUT)
    (out,) = make_encode(SPEC, EncodeOptions(), isolated=True)(iter([given]))
    assert out.column("error").to_pylist() == [None, None, reasons.NULL_TEXT, None]
    vectors_ND = out.column("embedding").drop_null().flatten().to_numpy().reshape(3, 2)
    assert vectors_ND.tolist() == hash_vectors(["one", "two two", "three"], 2).tolist()
