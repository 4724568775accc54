import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from shoal.conf.errors import ModelError
from shoal.conf.run import EncoderConfig
from shoal.udfs.encoder import EncodeOptions, build_encoder
from shoal.udfs.hash_encoder import HashEncoder, cut_words, describe_hash, hash_vectors


def encoder(model: str = "hash:8", role: str = "document", **settings: object) -> HashEncoder:
    spec = describe_hash(EncoderConfig(model=model, **settings))
    return build_encoder(spec, "cpu", EncodeOptions(role=role))


def test_a_vector_can_be_computed_by_hand():
    stream = hashlib.shake_128(b"a shoal").digest(6)
    odd = [2 * int.from_bytes(stream[at : at + 2], "little", signed=True) + 1 for at in (0, 2, 4)]
    length = sum(number * number for number in odd) ** 0.5
    expected = np.array([number / length for number in odd], dtype=np.float32)
    np.testing.assert_array_equal(encoder("hash:3").encode(["a shoal"]).vectors_ND[0], expected)


def test_the_recipe_is_frozen():
    golden = np.array([0.24836854539798692, 0.7672993911814552, 0.5912399766164804], dtype=np.float32)
    np.testing.assert_array_equal(hash_vectors(["a shoal"], 3)[0], golden)


def test_equal_texts_have_equal_vectors_of_length_1_in_any_batch():
    texts = ["one", "two", "three", "one"]
    together = encoder("hash:384").encode(texts)
    alone = np.concatenate([encoder("hash:384").encode([text]).vectors_ND for text in texts])
    np.testing.assert_array_equal(together.vectors_ND, alone)
    np.testing.assert_array_equal(together.vectors_ND[0], together.vectors_ND[3])
    np.testing.assert_allclose(np.linalg.norm(together.vectors_ND, axis=1), 1, atol=1e-6)
    assert together.vectors_ND.dtype == np.float32
    assert abs(together.vectors_ND[0] @ together.vectors_ND[1]) < 0.3


def test_no_text_is_an_error():
    texts = ["", "   ", "\ud800 lone", "\x00control", "\u0645\u0631\u062d\u0628\u0627", "x" * 5_000_000]
    encoded = encoder().encode(texts)
    assert encoded.errors_N == [None] * len(texts)
    assert np.isfinite(encoded.vectors_ND).all()


def test_no_texts_give_no_vectors():
    encoded = encoder().encode([])
    assert encoded.vectors_ND.shape == (0, 8)
    assert encoded.n_tokens_N.shape == (0,)


def test_words_above_max_tokens_are_not_seen():
    encoded = encoder(max_tokens=2).encode(["one two three", "one two", "one"])
    assert encoded.n_tokens_N.tolist() == [2, 2, 1]
    assert encoded.n_tokens_N.dtype == np.int32
    assert encoded.truncated_N.tolist() == [True, False, False]
    np.testing.assert_array_equal(encoded.vectors_ND[0], encoded.vectors_ND[1])


def test_cut_words_keeps_the_text_before_the_cut_as_it_is():
    assert cut_words(" one\n two  three ", 2) == (" one\n two", 2, True)
    assert cut_words(" one\n two ", 2) == (" one\n two ", 2, False)


def test_each_role_has_its_own_prompt():
    prompts = {"document_prompt": "passage: ", "query_prompt": "query: "}
    document = encoder(**prompts).encode(["x"])
    query = encoder(role="query", **prompts).encode(["x"])
    np.testing.assert_array_equal(document.vectors_ND, encoder().encode(["passage: x"]).vectors_ND)
    np.testing.assert_array_equal(query.vectors_ND, encoder().encode(["query: x"]).vectors_ND)
    assert document.n_tokens_N.tolist() == [2]


def test_the_spec_is_settled_small_and_picklable():
    spec = describe_hash(EncoderConfig(model="hash:384"))
    assert (spec.dim, spec.precision, spec.backend, spec.weights_digest) == (384, "float32", "numpy", "hash-v1")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len(pickle.dumps(spec)) < 2_000


@pytest.mark.parametrize("change", [{"model": "hash:9"}, {"max_tokens": 3}, {"document_prompt": "p "}])
def test_what_changes_a_vector_changes_the_fingerprint(change):
    plain = describe_hash(EncoderConfig(model="hash:8"))
    changed = describe_hash(EncoderConfig(**{"model": "hash:8", **change}))
    assert changed.fingerprint != plain.fingerprint


def test_a_dim_out_of_range_is_a_model_error():
    with pytest.raises(ModelError, match=r"'hash:99999'.*1 to 65536.*hash:384"):
        describe_hash(EncoderConfig(model="hash:99999"))


def test_another_form_is_not_described():
    with pytest.raises(ModelError, match="'org/name'"):
        describe_hash(EncoderConfig(model="org/name"))


def test_importing_it_loads_no_model_library():
    code = "import sys, shoal.udfs.hash_encoder; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
