from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.conf.errors import ModelError
from shoal.udfs.encoder import EncodeOptions, build_encoder
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.sentence_encoder import CUDA_TOKEN_BUDGET, initial_budget, pad
from shoal.udfs.vectors import cosines

Build = Callable[..., Path]
Describe = Callable[..., EncoderSpec]


def plain_vectors(folder: Path, texts: list[str], **settings: object) -> np.ndarray:
    """What sentence-transformers alone makes of the texts, in float32."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})
    return np.asarray(model.encode(texts, batch_size=4, **settings), dtype=np.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "mpnet", "modernbert", "qwen3"])
def test_vectors_equal_those_of_plain_sentence_transformers(
    make_checkpoint: Build, describe: Describe, texts: list[str], architecture: str
) -> None:
    folder = make_checkpoint(architecture, pooling="lasttoken" if architecture == "qwen3" else "mean")
    encoder = build_encoder(describe(folder), "cpu", EncodeOptions(token_budget=128))
    encoded = encoder.encode(texts)
    expected = plain_vectors(folder, texts)
    assert encoded.vectors_ND.dtype == np.float32
    assert encoded.errors_N == [None] * len(texts)
    assert cosines(encoded.vectors_ND, expected).min() >= 1 - 1e-6
    assert cosines(encoded.vectors_ND[:1], expected[5:6])[0] < 0.99  # the texts are told apart


@pytest.mark.parametrize(
    "pooling", ["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean", ("cls", "mean")]
)
def test_every_pooling_of_a_checkpoint_is_kept(
    make_checkpoint: Build, describe: Describe, texts: list[str], pooling: str | tuple[str, ...]
) -> None:
    folder = make_checkpoint(pooling=pooling)
    spec = describe(folder)
    encoded = build_encoder(spec, "cpu", EncodeOptions()).encode(texts)
    assert encoded.vectors_ND.shape == (len(texts), spec.dim)
    assert cosines(encoded.vectors_ND, plain_vectors(folder, texts)).min() >= 1 - 1e-6


@pytest.mark.parametrize("pooling", ["cls", "lasttoken"])
def test_the_run_file_can_override_the_pooling(
    make_checkpoint: Build, describe: Describe, texts: list[str], pooling: str
) -> None:
    overridden = build_encoder(describe(make_checkpoint(), pooling=pooling), "cpu", EncodeOptions()).encode(texts)
    expected = plain_vectors(make_checkpoint(pooling=pooling), texts)
    assert cosines(overridden.vectors_ND, expected).min() >= 1 - 1e-6


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("role", ["document", "query"])
def test_prompts_are_prepended_by_role_and_left_out_of_pooling_where_the_checkpoint_says_so(
    make_checkpoint: Build, describe: Describe, texts: list[str], role: str, include_prompt: bool
) -> None:
    prompts = {"query": "question about boats: ", "document": "text of the ledger: "}
    folder = make_checkpoint(prompts=prompts, include_prompt=include_prompt)
    spec = describe(folder)
    assert (spec.query_prompt, spec.document_prompt) == (prompts["query"], prompts["document"])
    encoded = build_encoder(spec, "cpu", EncodeOptions(role=role)).encode(texts)  # type: ignore[arg-type]
    expected = plain_vectors(folder, texts, prompt_name=role)
    assert cosines(encoded.vectors_ND, expected).min() >= 1 - 1e-6
    assert cosines(encoded.vectors_ND, plain_vectors(folder, texts, prompt="")).min() < 0.999


def test_a_dense_module_follows_pooling_in_float32(
    make_checkpoint: Build, describe: Describe, texts: list[str]
) -> None:
    folder = make_checkpoint(dense=12)
    encoded = build_encoder(describe(folder), "cpu", EncodeOptions()).encode(texts)
    assert encoded.vectors_ND.shape[1] == 12
    assert cosines(encoded.vectors_ND, plain_vectors(folder, texts)).min() >= 1 - 1e-6


def test_normalize_decides_the_length_of_a_vector(make_checkpoint: Build, describe: Describe, texts: list[str]) -> None:
    for folder in (make_checkpoint(), make_checkpoint(normalize=False)):
        unit = build_encoder(describe(folder), "cpu", EncodeOptions()).encode(texts).vectors_ND
        raw = build_encoder(describe(folder, normalize=False), "cpu", EncodeOptions()).encode(texts).vectors_ND
        assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
        assert not np.allclose(np.linalg.norm(raw, axis=1), 1, atol=1e-2)
        assert cosines(unit, raw).min() >= 1 - 1e-6


def test_bfloat16_vectors_are_normalised_in_float32(
    make_checkpoint: Build, describe: Describe, texts: list[str]
) -> None:
    spec = describe(make_checkpoint(), precision="bfloat16")
    vectors_ND = build_encoder(spec, "cpu", EncodeOptions()).encode(texts).vectors_ND
    assert np.allclose(np.linalg.norm(vectors_ND.astype(np.float64), axis=1), 1, atol=1e-6)


def test_max_tokens_truncates_and_says_so(make_checkpoint: Build, describe: Describe, texts: list[str]) -> None:
    folder = make_checkpoint()
    encoded = build_encoder(describe(folder, max_tokens=8), "cpu", EncodeOptions()).encode(texts)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    full = [len(model.tokenizer(text)["input_ids"]) for text in texts]
    assert encoded.n_tokens_N.tolist() == [min(8, length) for length in full]
    assert encoded.truncated_N.tolist() == [length > 8 for length in full]
    model.max_seq_length = 8
    assert cosines(encoded.vectors_ND, np.asarray(model.encode(texts))).min() >= 1 - 1e-6


def test_order_and_budget_do_not_change_vectors(make_checkpoint: Build, describe: Describe, texts: list[str]) -> None:
    spec = describe(make_checkpoint())
    small = build_encoder(spec, "cpu", EncodeOptions(token_budget=1)).encode(texts)
    large = build_encoder(spec, "cpu", EncodeOptions(token_budget=100_000)).encode(texts[::-1])
    assert cosines(small.vectors_ND, large.vectors_ND[::-1]).min() >= 1 - 1e-6
    assert small.padded_tokens == small.n_tokens_N.sum()
    assert large.padded_tokens == large.n_tokens_N.max() * len(texts)


def test_surrogates_control_characters_and_megabytes_do_not_fail_a_window(
    make_checkpoint: Build, describe: Describe
) -> None:
    hard = ["lone \ud800 surrogate", "\x00\x01\x02", "\u202e right to left \u05d0", "wide " * 1_000_000, "x" * 300_000]
    encoded = build_encoder(describe(make_checkpoint()), "cpu", EncodeOptions()).encode(hard)
    assert encoded.errors_N == [None] * len(hard)
    assert encoded.truncated_N.tolist() == [False, False, False, True, True]


def test_a_forward_pass_is_broken_off_between_layers(make_checkpoint: Build, describe: Describe) -> None:
    encoder = build_encoder(describe(make_checkpoint()), "cpu", EncodeOptions(time_limit_s=-1.0))
    assert encoder.encode(["one", "two"]).errors_N == ["time_limit", "time_limit"]


def test_an_encoder_that_does_not_load_is_a_model_error(
    make_checkpoint: Build, describe: Describe, tmp_path: Path
) -> None:
    import json
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(make_checkpoint(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-architecture"}))
    with pytest.raises(ModelError, match=r"could not be loaded .*no-such-architecture"):
        build_encoder(describe(folder), "cpu", EncodeOptions())


def test_padding_fills_up_on_the_right_to_the_step() -> None:
    input_ids_BT, mask_BT = pad([np.array([5, 6, 7]), np.array([8])], 1, step=4)
    assert input_ids_BT.tolist() == [[5, 6, 7, 1], [8, 1, 1, 1]]
    assert mask_BT.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_the_users_token_budget_is_kept_and_that_of_cuda_grows() -> None:
    assert initial_budget("cpu", 77).value == 77
    assert initial_budget("cpu", None).settled
    cuda = initial_budget("cuda:0", None)
    assert (cuda.value, cuda.settled) == (CUDA_TOKEN_BUDGET, False)


def test_static_word_vectors_are_encoded_through_their_own_preprocessing(
    tokenizer_folder: Path, describe: Describe, texts: list[str], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    words = StaticEmbedding(Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")), embedding_dim=16)
    SentenceTransformer(modules=[words], device="cpu").save(str(tmp_path))
    spec = describe(tmp_path)
    assert (spec.dim, spec.pooling) == (16, "mean")
    encoded = build_encoder(spec, "cpu", EncodeOptions(token_budget=64)).encode(texts)
    assert encoded.errors_N == [None] * len(texts)
    assert cosines(encoded.vectors_ND, plain_vectors(tmp_path, texts)).min() >= 1 - 1e-6


def test_a_tokenizer_with_segments_goes_through_the_checkpoints_own_preprocessing(
    make_checkpoint: Build, describe: Describe, texts: list[str], tmp_path: Path
) -> None:
    import json
    import shutil

    folder = tmp_path / "segments"
    shutil.copytree(make_checkpoint(prompts={"document": "d: "}), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for piece in tokenizer["post_processor"]["single"]:
        next(iter(piece.values()))["type_id"] = 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoder = build_encoder(describe(folder), "cpu", EncodeOptions())
    assert encoder.feeder._model._tokenizer is None  # type: ignore[attr-defined]
    encoded = encoder.encode(texts)
    assert cosines(encoded.vectors_ND, plain_vectors(folder, texts, prompt_name="document")).min() >= 1 - 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["bert", "roberta", "mpnet", "modernbert", "qwen3"])
def test_cuda_vectors_agree_with_float32_on_the_cpu(
    make_checkpoint: Build, describe: Describe, texts: list[str], architecture: str
) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = make_checkpoint(architecture)
    expected = plain_vectors(folder, texts)
    exact = build_encoder(describe(folder), "cuda:0", EncodeOptions()).encode(texts)
    fast = build_encoder(describe(folder, precision="bfloat16"), "cuda:0", EncodeOptions()).encode(texts)
    assert cosines(exact.vectors_ND, expected).min() >= 1 - 1e-5
    assert cosines(fast.vectors_ND, expected).min() >= 0.99  # random weights spread rounding further than trained ones
