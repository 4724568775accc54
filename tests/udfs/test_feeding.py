import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.conf.errors import WorkerError
from shoal.udfs import reasons
from shoal.udfs.batching import TokenBudget
from shoal.udfs.encoder import Encoded
from shoal.udfs.feeding import Feeder, Finish, encode_windows, failure_reason
from shoal.udfs.tokenizing import Tokenized


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


class CountingModel:
    """A text's vector is (its length, 1); texts listed in `poison` raise, and so do passes above `memory` tokens."""

    dim = 2

    def __init__(
        self,
        *,
        poison: dict[str, Exception] | None = None,
        memory: int = 10**9,
        depth: int = 1,
        late: bool = False,
        packed: bool = False,
    ) -> None:
        self.poison = poison or {}
        self.memory = memory
        self.depth = depth
        self.late = late
        self.packed = packed
        self.passes: list[list[str]] = []
        self.released = 0

    def tokenize(self, texts: list[str]) -> Tokenized:
        n_tokens_N = np.array([len(text) for text in texts], dtype=np.int32)
        return Tokenized(list(texts), n_tokens_N, n_tokens_N > 50)

    def start(self, items: list[Any], time_limit_s: float) -> Finish:  # noqa: ARG002
        self.passes.append(items)

        def finish() -> np.ndarray:
            for item in items:
                if item in self.poison:
                    raise self.poison[item]
            if max(map(len, items)) * len(items) > self.memory:
                raise OutOfMemoryError("no room")
            return np.array([[len(item), 1] for item in items], dtype=np.float32)

        if self.late:
            return finish
        vectors = finish()
        return lambda: vectors

    def release_memory(self) -> None:
        self.released += 1


class FeederEncoder:
    """An encoder around a model, as the real ones are."""

    def __init__(self, model: CountingModel, budget: int = 100) -> None:
        self.feeder = Feeder(model, TokenBudget.fixed(budget), time_limit_s=60.0, normalize=False)

    def encode(self, texts: list[str]) -> Encoded:
        return self.feeder.encode(self.feeder.prepare(texts))


TEXTS = st.lists(st.integers(min_value=1, max_value=80).map(lambda n: "x" * n), max_size=60)


@settings(deadline=None)
@given(texts=TEXTS, budget=st.integers(1, 400), depth=st.integers(1, 3), late=st.booleans(), packed=st.booleans())
def test_vectors_come_back_in_the_order_of_the_texts(
    texts: list[str], budget: int, depth: int, late: bool, packed: bool
) -> None:
    encoded = FeederEncoder(CountingModel(depth=depth, late=late, packed=packed), budget).encode(texts)
    assert encoded.vectors_ND.tolist() == [[len(text), 1] for text in texts]
    assert encoded.errors_N == [None] * len(texts)
    assert encoded.padded_tokens >= encoded.n_tokens_N.sum()


@settings(deadline=None)
@given(
    bad=st.lists(st.booleans(), min_size=1, max_size=40),
    budget=st.integers(1, 300),
    depth=st.integers(1, 3),
    late=st.booleans(),
)
def test_poison_chunks_stand_alone_and_all_others_get_their_vectors(
    bad: list[bool], budget: int, depth: int, late: bool
) -> None:
    texts = [f"{i:03d}" + "x" * (i % 7) for i in range(len(bad))]
    poison: dict[str, Exception] = {
        text: ValueError("broken") for text, is_bad in zip(texts, bad, strict=True) if is_bad
    }
    encoded = FeederEncoder(CountingModel(poison=poison, depth=depth, late=late), budget).encode(texts)
    for text, is_bad, vector, error in zip(texts, bad, encoded.vectors_ND.tolist(), encoded.errors_N, strict=True):
        assert error == (reasons.ENCODER_ERROR if is_bad else None)
        assert vector == ([0, 0] if is_bad else [len(text), 1])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_out_of_memory_halves_the_budget_and_loses_nothing(late: bool, depth: int) -> None:
    model = CountingModel(memory=200, late=late, depth=depth)
    encoder = FeederEncoder(model, budget=1000)
    texts = ["x" * 10] * 200
    encoded = encoder.encode(texts)
    assert encoded.errors_N == [None] * 200
    assert model.released >= 1
    assert encoder.feeder.budget.value <= 250
    model.passes.clear()
    encoder.encode(texts)
    assert max(len(items) * 10 for items in model.passes) <= 250


def test_a_chunk_that_never_fits_is_an_error_and_the_budget_comes_back() -> None:
    model = CountingModel(poison={"huge" * 9: MemoryError()})
    encoder = FeederEncoder(model, budget=400)
    encoded = encoder.encode(["huge" * 9, *["x" * 30] * 30])
    assert encoded.errors_N == [reasons.OUT_OF_MEMORY] + [None] * 30
    assert encoder.feeder.budget.value == 400


def test_a_chunk_over_the_time_limit_is_an_error_of_its_own() -> None:
    encoded = FeederEncoder(CountingModel(poison={"slow": TimeoutError("too long")})).encode(["a", "slow", "b"])
    assert encoded.errors_N == [None, reasons.TIME_LIMIT, None]


def test_a_lost_device_stops_the_window() -> None:
    model = CountingModel(poison={"b": RuntimeError("CUDA error: an illegal memory access was encountered")})
    with pytest.raises(WorkerError, match="the device failed in a forward pass"):
        FeederEncoder(model).encode(["a", "b"])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), reasons.OUT_OF_MEMORY),
        (OutOfMemoryError("any words"), reasons.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), reasons.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), reasons.OUT_OF_MEMORY),
        (TimeoutError("limit"), reasons.TIME_LIMIT),
        (IndexError("index out of range in self"), reasons.ENCODER_ERROR),
        (RuntimeError("CUDA error: device-side assert triggered"), None),
    ],
)
def test_what_a_pass_raises_has_one_reason(error: Exception, reason: str | None) -> None:
    assert failure_reason(error) == reason


def test_non_finite_and_zero_vectors_are_errors() -> None:
    class Broken(CountingModel):
        def start(self, items: list[Any], time_limit_s: float) -> Finish:  # noqa: ARG002
            values = {"nan": [np.nan, 1], "inf": [1, np.inf], "zero": [0, 0]}
            vectors = np.array([values.get(item, [3, 4]) for item in items], dtype=np.float32)
            return lambda: vectors

    feeder = Feeder(Broken(), TokenBudget.fixed(100), time_limit_s=60.0, normalize=True)
    encoded = feeder.encode(feeder.prepare(["nan", "good", "inf", "zero"]))
    assert encoded.errors_N == [reasons.NON_FINITE, None, reasons.NON_FINITE, reasons.ZERO_VECTOR]
    assert encoded.vectors_ND.tolist() == [[0, 0], [np.float32(0.6), np.float32(0.8)], [0, 0], [0, 0]]


def test_an_empty_window_gives_no_vectors() -> None:
    encoded = FeederEncoder(CountingModel()).encode([])
    assert encoded.vectors_ND.shape == (0, 2)


def test_windows_are_read_one_ahead_and_no_further() -> None:
    read: list[int] = []

    def endless() -> Iterator[list[str]]:
        for number in itertools.count():
            read.append(number)
            yield ["x" * (number + 1)]

    encoded = encode_windows(FeederEncoder(CountingModel()), endless())
    assert next(encoded).vectors_ND[0, 0] == 1
    assert next(encoded).vectors_ND[0, 0] == 2
    assert read == [0, 1, 2]


def test_the_next_window_is_tokenised_in_another_thread_while_one_is_forwarded() -> None:
    tokenised = threading.Event()

    class Waiting(CountingModel):
        def tokenize(self, texts: list[str]) -> Tokenized:
            if texts == ["second"]:
                tokenised.set()
            return super().tokenize(texts)

        def start(self, items: list[Any], time_limit_s: float) -> Finish:
            if items == ["first"]:
                assert tokenised.wait(timeout=20)
            return super().start(items, time_limit_s)

    encoded = list(encode_windows(FeederEncoder(Waiting()), [["first"], ["second"]]))
    assert [window.errors_N for window in encoded] == [[None], [None]]


def test_an_encoder_without_a_feeder_is_simply_called() -> None:
    class Plain:
        def encode(self, texts: list[str]) -> Encoded:
            n = len(texts)
            return Encoded(
                vectors_ND=np.ones((n, 1), np.float32),
                n_tokens_N=np.ones(n, np.int32),
                truncated_N=np.zeros(n, bool),
                errors_N=[None] * n,
            )

    sizes = [len(e.errors_N) for e in encode_windows(Plain(), [["a"], ["b", "c"]])]  # type: ignore[arg-type]
    assert sizes == [1, 2]


def test_busy_seconds_are_those_of_the_passes() -> None:
    class Slow(CountingModel):
        def start(self, items: list[Any], time_limit_s: float) -> Finish:
            time.sleep(0.02)
            return super().start(items, time_limit_s)

    assert FeederEncoder(Slow()).encode(["a"]).busy_s >= 0.02
