"""Query vectors by name and text, in this process: what a worker computes, remembers and refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shoal.conf.errors import ConfigError, ModelError
from shoal.conf.run import EncoderConfig
from shoal.udfs import query_udf
from shoal.udfs.checkpoint import describe_checkpoint
from shoal.udfs.encoder import Encoded
from shoal.udfs.hash_encoder import HashEncoder, describe_hash, hash_vectors
from shoal.udfs.query_udf import MAX_ENCODERS, MAX_VECTORS, QueryEncoder, embed_queries


def encoder(dim: int = 8, prompt: str = "ask: ") -> QueryEncoder:
    settings = EncoderConfig(model=f"hash:{dim}", query_prompt=prompt)
    return QueryEncoder(describe_hash(settings), settings)


def vectors(encoders: dict[str, QueryEncoder | str], *batches: list[tuple[object, object]]) -> list[list[np.ndarray]]:
    series = ((pd.Series([n for n, _ in rows]), pd.Series([t for _, t in rows])) for rows in batches)
    return [list(found) for found in embed_queries(series, encoders)]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that the model sees, from a worker that remembers nothing yet."""
    seen: list[str] = []
    encode = HashEncoder.encode

    def counted(self: HashEncoder, texts: list[str]) -> Encoded:
        seen.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(HashEncoder, "encode", counted)
    query_udf._VECTORS.clear()
    query_udf._ENCODERS.clear()
    return seen


def test_each_row_gets_the_vector_of_its_own_encoder_with_the_query_prompt(encoded: list[str]) -> None:
    known: dict[str, QueryEncoder | str] = {"docs": encoder(8), "wiki": encoder(16, prompt="")}

    ((first, second, third),) = vectors(known, [("docs", "red"), ("wiki", "red"), ("docs", "blue")])

    np.testing.assert_array_equal(first, hash_vectors(["ask: red"], 8)[0])
    np.testing.assert_array_equal(second, hash_vectors(["red"], 16)[0])
    np.testing.assert_array_equal(third, hash_vectors(["ask: blue"], 8)[0])
    assert first.dtype == np.float32


def test_a_text_is_encoded_once_however_often_it_is_asked(encoded: list[str]) -> None:
    vectors({"docs": encoder()}, [("docs", "red")] * 100, [("docs", "red"), ("docs", "blue")])
    vectors({"docs": encoder()}, [("docs", "blue")])

    assert encoded == ["red", "blue"]


def test_what_is_remembered_has_a_limit_and_the_oldest_goes(encoded: list[str]) -> None:
    texts = [f"text {n}" for n in range(MAX_VECTORS + 1)]
    (found,) = vectors({"docs": encoder()}, [("docs", text) for text in texts])
    vectors({"docs": encoder()}, [("docs", texts[-1]), ("docs", texts[0])])

    assert len(found) == len(texts)
    assert len(query_udf._VECTORS) == MAX_VECTORS
    assert encoded == [*texts, texts[0]]


def test_only_a_few_encoders_are_held(encoded: list[str]) -> None:
    for dim in range(8, 8 + MAX_ENCODERS + 2):
        vectors({"docs": encoder(dim)}, [("docs", "red")])

    assert [spec.dim for spec, _ in query_udf._ENCODERS] == list(range(10, 8 + MAX_ENCODERS + 2))


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("docs", None, "'docs' is NULL"),
        ("docs", " \t\n", "'docs' is blank"),
        ("dox", "red", "'dox' is no table that is served here; name one of 'docs'"),
        (None, "red", "None is no table"),
        ("gone", "red", "MODEL_NOT_FOUND"),
    ],
)
def test_what_cannot_be_encoded_is_an_error_and_never_a_missing_vector(name: object, text: object, told: str) -> None:
    known: dict[str, QueryEncoder | str] = {"docs": encoder(), "docs@1": encoder(), "gone": "[MODEL_NOT_FOUND] no"}
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        vectors(known, [("docs", "fine"), (name, text)])


def test_a_model_whose_files_changed_since_it_was_described_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(make_checkpoint(), tmp_path / "model")
    settings = EncoderConfig(model=str(folder), precision="float32", backend="torch")
    spec = describe_checkpoint(settings, str(folder))
    described = QueryEncoder(spec, settings)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")

    with pytest.raises(ModelError, match="its tokenizer have changed since the table was made"):
        vectors({"docs": described}, [("docs", "red")])
