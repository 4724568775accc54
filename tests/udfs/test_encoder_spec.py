import dataclasses
import pickle

import pytest

from shoal.udfs.encoder_spec import EncoderSpec


@pytest.fixture
def spec() -> EncoderSpec:
    return EncoderSpec(
        kind="sentence_transformers",
        reference="org/name",
        revision="abc",
        folder="some/folder",
        dim=4,
        pooling="mean",
        max_tokens=8,
        normalize=True,
        document_prompt="d",
        query_prompt="q",
        weights_digest="w",
        tokenizer_digest="t",
        modules_digest="m",
        precision="float32",
        backend="torch",
    )


def test_the_fingerprint_is_frozen(spec: EncoderSpec) -> None:
    assert spec.fingerprint == "97ad6ca7a3217d1de5247f1c7d758f58"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "hash"),
        ("dim", 5),
        ("pooling", "cls"),
        ("max_tokens", 9),
        ("normalize", False),
        ("document_prompt", ""),
        ("weights_digest", "x"),
        ("tokenizer_digest", "x"),
        ("modules_digest", "x"),
        ("precision", "bfloat16"),
    ],
)
def test_each_field_that_changes_a_vector_changes_the_fingerprint(spec: EncoderSpec, field: str, value: object) -> None:
    assert dataclasses.replace(spec, **{field: value}).fingerprint != spec.fingerprint


@pytest.mark.parametrize("field", ["reference", "revision", "folder", "query_prompt", "backend"])
def test_other_fields_leave_the_fingerprint_alone(spec: EncoderSpec, field: str) -> None:
    assert dataclasses.replace(spec, **{field: "other"}).fingerprint == spec.fingerprint


def test_every_field_is_part_of_the_identity_or_left_out_on_purpose(spec: EncoderSpec) -> None:
    left_out = {"reference", "revision", "folder", "query_prompt", "backend", "trust_remote_code"}
    assert set(spec.identity()) | left_out == {field.name for field in dataclasses.fields(EncoderSpec)}


def test_an_unsettled_precision_has_no_fingerprint(spec: EncoderSpec) -> None:
    with pytest.raises(ValueError, match="precision of encoder 'org/name' is still 'auto'"):
        _ = dataclasses.replace(spec, precision="auto").fingerprint


def test_a_description_is_small_and_survives_pickling(spec: EncoderSpec) -> None:
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len(pickle.dumps(spec)) < 4096
