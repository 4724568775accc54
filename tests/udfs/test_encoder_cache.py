import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.conf.errors import WorkerError
from shoal.udfs import encoder_cache
from shoal.udfs.canaries import Canaries, encode_canaries
from shoal.udfs.encoder import EncodeOptions, Encoder
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


def test_queries_with_another_prompt_have_another_encoder_though_the_fingerprint_is_the_same(
    make_checkpoint: Build, describe: Describe
) -> None:
    spec = describe(make_checkpoint())
    asked = dataclasses.replace(spec, query_prompt="ask: ")
    assert asked.fingerprint == spec.fingerprint
    options = EncodeOptions(role="query")
    plain_ND = cached_encoder(spec, "cpu", options).encode(["fish"]).vectors_ND
    asked_ND = cached_encoder(asked, "cpu", options).encode(["fish"]).vectors_ND
    assert not np.allclose(plain_ND, asked_ND)
    document = cached_encoder(spec, "cpu", EncodeOptions())
    assert cached_encoder(asked, "cpu", EncodeOptions()) is document


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
    monkeypatch.setattr(
        Canaries, "check", lambda self, encoder: checked.append(self.fingerprint) or check(self, encoder)
    )
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


@pytest.mark.parametrize(("failures", "fits"), [(2, True), (99, False)])
def test_memory_that_another_worker_still_holds_is_waited_for(
    make_checkpoint: Build, describe: Describe, monkeypatch: pytest.MonkeyPatch, failures: int, fits: bool
) -> None:
    spec = describe(make_checkpoint())
    build, tries = encoder_cache.build_encoder, []

    def crowded(*arguments: Any) -> Encoder:
        tries.append(1)
        if len(tries) <= failures:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")
        return build(*arguments)

    monkeypatch.setattr(encoder_cache, "build_encoder", crowded)
    monkeypatch.setattr(encoder_cache, "MEMORY_WAIT_S", 0.0)
    if fits:
        assert cached_encoder(spec, "cpu", EncodeOptions()).spec == spec
        assert len(tries) == failures + 1
    else:
        with pytest.raises(WorkerError, match="does not fit into the memory of cpu"):
            cached_encoder(spec, "cpu", EncodeOptions())
        assert len(tries) == encoder_cache.MEMORY_TRIES


def test_other_failures_to_build_are_not_tried_again(
    make_checkpoint: Build, describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def failing(*_arguments: Any) -> Encoder:
        tries.append(1)
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(encoder_cache, "build_encoder", failing)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        cached_encoder(describe(make_checkpoint()), "cpu", EncodeOptions())
    assert tries == [1]
