import dataclasses
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from shoal.conf.errors import WorkerError
from shoal.udfs.canaries import Canaries, canary_texts, encode_canaries, library_versions
from shoal.udfs.encoder import EncodeOptions, Encoder, build_encoder
from shoal.udfs.encoder_spec import EncoderSpec


@pytest.fixture
def encoder(make_checkpoint: Callable[..., Path], describe: Callable[..., EncoderSpec]) -> Encoder:
    return build_encoder(describe(make_checkpoint()), "cpu", EncodeOptions())


def test_the_texts_are_frozen() -> None:
    joined = "\x00".join(canary_texts())
    assert len(canary_texts()) == len(set(canary_texts())) == 65
    assert sha256(joined.encode()).hexdigest() == "60611820b19ecc5e73dd00adbe8f2d5bb855c0bb1a379be8ea42b7b4f7dafb65"


def test_the_texts_cover_lengths_and_scripts() -> None:
    lengths = {len(text.split()) for text in canary_texts()}
    assert {1, 12, 400} <= lengths
    blocks = {ord(character) >> 8 for text in canary_texts() for character in text}
    assert {0x04, 0x05, 0x06, 0x09, 0x0E, 0x12, 0x1F4} <= blocks


def test_canaries_hold_for_another_batching(encoder: Encoder) -> None:
    canaries = Canaries(encoder.spec.fingerprint, encode_canaries(encoder))
    other = build_encoder(encoder.spec, "cpu", EncodeOptions(token_budget=64))
    assert canaries.check(other).min() >= 1 - 1e-6


def test_a_drift_names_the_worst_text_its_cosine_and_the_libraries(encoder: Encoder) -> None:
    vectors_CD = encode_canaries(encoder)
    vectors_CD[7] = vectors_CD[30]
    with pytest.raises(WorkerError, match=r"canary 7 \('the'\) has cosine .* below 0\.9999900 \(torch ") as caught:
        Canaries(encoder.spec.fingerprint, vectors_CD).check(encoder)
    assert f"numpy {library_versions()['numpy']}" in str(caught.value)


def test_drift_as_large_as_another_precision_makes_is_noticed(encoder: Encoder) -> None:
    rough = build_encoder(dataclasses.replace(encoder.spec, precision="bfloat16"), "cpu", EncodeOptions())
    with pytest.raises(WorkerError, match="has moved"):
        Canaries(encoder.spec.fingerprint, encode_canaries(rough)).check(encoder)


def test_a_vector_that_became_an_error_is_drift(encoder: Encoder) -> None:
    vectors_CD = encode_canaries(encoder)
    vectors_CD[3] = 0
    with pytest.raises(WorkerError, match="canary 3 "):
        Canaries(encoder.spec.fingerprint, vectors_CD).check(encoder)


def test_canaries_of_another_encoder_or_release_are_refused(encoder: Encoder) -> None:
    vectors_CD = encode_canaries(encoder)
    with pytest.raises(WorkerError, match="belong to encoder other"):
        Canaries("other", vectors_CD).check(encoder)
    with pytest.raises(WorkerError, match="shape"):
        Canaries(encoder.spec.fingerprint, np.ones((3, 2), np.float32)).check(encoder)
