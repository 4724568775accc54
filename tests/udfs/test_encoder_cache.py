import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.conf.errors import WorkerError
from shoal.udfs.canaries import Canaries, encode_canaries
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_cache import cached_encoder
from shoal.udfs.encoder_spec import EncoderSpec

Build = Callable[..., Path]
Describe = Callable[..., EncoderSpec]


def test_an_encoder_is_built_once(make_checkpoint: Build, describe: Describe) -> None:
    spec = describe(make_checkpoint())
    first = cached_encoder(spec, "cpu", EncodeOptions())
    assert cached_encoder(dataclasses.replace(spec, reference="another name"), "cpu", EncodeOptions()) is first


def test_roles_have_an_encoder_each(make_checkpoint: Build, describe: Describe) -> None:
    spec = describe(make_checkpoint())
    document = cached_encoder(spec, "cpu", EncodeOptions())
    query = cached_encoder(spec, "cpu", EncodeOptions(role="query"))
    assert query is not document
    assert cached_encoder(spec, "cpu", EncodeOptions()) is document


@pytest.mark.parametrize("change", ["fingerprint", "options"])
def test_another_encoder_frees_the_one_it_replaces(make_checkpoint: Build, describe: Describe, change: str) -> None:
    spec = describe(make_checkpoint())
    held = weakref.ref(cached_encoder(spec, "cpu", EncodeOptions()))
    other = dataclasses.replace(spec, max_tokens=9) if change == "fingerprint" else spec
    options = EncodeOptions() if change == "fingerprint" else EncodeOptions(token_budget=10)
    cached_encoder(other, "cpu", options)
    assert held() is None


def test_canaries_are_checked_once_per_encoder(
    make_checkpoint: Build, describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = describe(make_checkpoint())
    vectors_CD = encode_canaries(cached_encoder(spec, "cpu", EncodeOptions()))
    checked: list[str] = []
    check = Canaries.check
    monkeypatch.setattr(Canaries, "check", lambda self, encoder: checked.append(self.fingerprint) or check(self, encoder))
    canaries = Canaries(spec.fingerprint, vectors_CD)
    for _ in range(3):
        cached_encoder(spec, "cpu", EncodeOptions(), canaries)
    assert checked == [spec.fingerprint]


def test_canaries_that_moved_are_checked_again_at_the_next_task(make_checkpoint: Build, describe: Describe) -> None:
    spec = describe(make_checkpoint())
    vectors_CD = np.roll(encode_canaries(cached_encoder(spec, "cpu", EncodeOptions())), 1, axis=0)
    for _ in range(2):
        with pytest.raises(WorkerError, match="has moved"):
            cached_encoder(spec, "cpu", EncodeOptions(), Canaries(spec.fingerprint, vectors_CD))
