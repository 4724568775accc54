from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.conf.errors import WorkerError
from shoal.udfs.encoder import EncodeOptions, build_encoder
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.openvino_encoder import compile_settings
from shoal.udfs.vectors import cosines

pytest.importorskip("openvino")

Build = Callable[..., Path]
Describe = Callable[..., EncoderSpec]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "mpnet", "modernbert", "qwen3"])
def test_openvino_vectors_equal_those_of_torch(
    make_checkpoint: Build, describe: Describe, texts: list[str], architecture: str
) -> None:
    folder = make_checkpoint(architecture, pooling="lasttoken" if architecture == "qwen3" else "mean")
    expected = build_encoder(describe(folder), "cpu", EncodeOptions()).encode(texts)
    found = build_encoder(describe(folder, backend="openvino"), "cpu", EncodeOptions()).encode(texts)
    assert found.errors_N == expected.errors_N
    assert found.n_tokens_N.tolist() == expected.n_tokens_N.tolist()
    assert cosines(found.vectors_ND, expected.vectors_ND).min() >= 1 - 1e-5


def test_openvino_pools_without_the_prompt_where_the_checkpoint_says_so(
    make_checkpoint: Build, describe: Describe, texts: list[str]
) -> None:
    folder = make_checkpoint(prompts={"document": "text of the ledger: "}, include_prompt=False)
    expected = build_encoder(describe(folder), "cpu", EncodeOptions()).encode(texts)
    found = build_encoder(describe(folder, backend="openvino"), "cpu", EncodeOptions()).encode(texts)
    assert cosines(found.vectors_ND, expected.vectors_ND).min() >= 1 - 1e-5


def test_an_inference_is_broken_off_at_the_time_limit_and_the_encoder_goes_on(
    make_checkpoint: Build, describe: Describe
) -> None:
    encoder = build_encoder(describe(make_checkpoint(), backend="openvino"), "cpu", EncodeOptions())
    model = encoder.feeder._model  # type: ignore[attr-defined]
    items = model.tokenize(["word " * 40] * 2000).items_N
    with pytest.raises(TimeoutError, match=r"encode\.time_limit"):
        model.start(items, 0.001)
    assert model.start(items[:2], 60.0)().shape == (2, encoder.spec.dim)


def test_threads_are_not_pinned_to_cores(make_checkpoint: Build, describe: Describe) -> None:
    settings = compile_settings(describe(make_checkpoint(), precision="bfloat16"), EncodeOptions(threads=3))
    assert settings["ENABLE_CPU_PINNING"] is False
    assert settings["INFERENCE_NUM_THREADS"] == 3
    assert settings["INFERENCE_PRECISION_HINT"] == "bf16"


def test_a_precision_it_cannot_compute_is_a_worker_error(make_checkpoint: Build, describe: Describe) -> None:
    with pytest.raises(WorkerError, match=r"encoder\.precision is float16"):
        compile_settings(describe(make_checkpoint(), precision="float16"), EncodeOptions())


def test_a_cuda_device_is_refused(make_checkpoint: Build, describe: Describe) -> None:
    with pytest.raises(WorkerError, match="runs on CPUs"):
        build_encoder(describe(make_checkpoint(), backend="openvino"), "cuda:0", EncodeOptions())
