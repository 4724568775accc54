import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.packed_attention import ARCHITECTURES
from shoal.udfs.packed_model import PackedModel
from shoal.udfs.sentence_encoder import SentenceModel
from shoal.udfs.vectors import cosines

Build = Callable[..., Path]
Describe = Callable[..., EncoderSpec]


def forwarded(model: SentenceModel, texts: list[str]) -> np.ndarray:
    """Vectors of the texts in one microbatch."""
    return np.array(model.start(model.tokenize(texts).items_N, 60.0)())


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_packed_vectors_equal_padded_ones(
    make_checkpoint: Build, describe: Describe, texts: list[str], architecture: str
) -> None:
    spec = describe(make_checkpoint(architecture))
    packed = PackedModel(spec, "cpu", EncodeOptions(), "float32")
    assert packed.packed
    padded = SentenceModel(spec, "cpu", EncodeOptions(), "float32")
    assert cosines(forwarded(packed, texts), forwarded(padded, texts)).min() >= 1 - 1e-6


@pytest.mark.parametrize("pooling", ["cls", "lasttoken", "max", "weightedmean"])
def test_packed_pooling_equals_padded_pooling(
    make_checkpoint: Build, describe: Describe, texts: list[str], pooling: str
) -> None:
    spec = describe(make_checkpoint(pooling=pooling))
    packed, padded = (kind(spec, "cpu", EncodeOptions(), "float32") for kind in (PackedModel, SentenceModel))
    assert packed.packed
    assert cosines(forwarded(packed, texts), forwarded(padded, texts)).min() >= 1 - 1e-6


def test_packed_pooling_leaves_the_prompt_out_like_padded_pooling(
    make_checkpoint: Build, describe: Describe, texts: list[str]
) -> None:
    spec = describe(make_checkpoint(prompts={"document": "text of the ledger: "}, include_prompt=False))
    packed, padded = (kind(spec, "cpu", EncodeOptions(), "float32") for kind in (PackedModel, SentenceModel))
    assert cosines(forwarded(packed, texts), forwarded(padded, texts)).min() >= 1 - 1e-6


def test_an_architecture_that_cannot_be_packed_is_padded(
    make_checkpoint: Build, describe: Describe, texts: list[str]
) -> None:
    spec = describe(make_checkpoint("mpnet"))
    model = PackedModel(spec, "cpu", EncodeOptions(), "float32")
    assert not model.packed
    padded = SentenceModel(spec, "cpu", EncodeOptions(), "float32")
    assert cosines(forwarded(model, texts), forwarded(padded, texts)).min() >= 1 - 1e-6


def test_a_trial_that_disagrees_turns_packing_off(
    make_checkpoint: Build,
    describe: Describe,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("shoal.udfs.packed_model.first_position", lambda _transformer: 3)
    spec = describe(make_checkpoint("roberta"))
    with caplog.at_level(logging.WARNING):
        model = PackedModel(spec, "cpu", EncodeOptions(), "float32")
    assert not model.packed
    assert "packed attention is off" in caplog.text
    padded = SentenceModel(spec, "cpu", EncodeOptions(), "float32")
    assert cosines(forwarded(model, texts), forwarded(padded, texts)).min() >= 1 - 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_packed_vectors_on_cuda_equal_padded_ones(
    make_checkpoint: Build, describe: Describe, texts: list[str], architecture: str
) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    spec = describe(make_checkpoint(architecture))
    packed = PackedModel(spec, "cuda:0", EncodeOptions(), "bfloat16")
    padded = PackedModel(spec, "cuda:0", EncodeOptions(), "float32")
    assert not padded.packed
    assert packed.packed
    assert cosines(forwarded(packed, texts), forwarded(padded, texts)).min() >= 0.99
