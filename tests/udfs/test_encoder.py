import dataclasses
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

from shoal.udfs.encoder import ENCODERS, EncodeOptions, build_encoder
from shoal.udfs.encoder_spec import Backend, EncoderSpec, Kind


def test_every_kind_and_back_end_is_registered_and_exists() -> None:
    assert {kind for kind, _ in ENCODERS} == set(get_args(Kind))
    assert {backend for _, backend in ENCODERS} == set(get_args(Backend)) - {"auto"}
    for target in ENCODERS.values():
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name))


def test_an_unsettled_back_end_is_refused(
    make_checkpoint: Callable[..., Path], describe: Callable[..., EncoderSpec]
) -> None:
    spec = describe(make_checkpoint(), backend="auto")
    with pytest.raises(ValueError, match=r"back end 'auto', and no such encoder is registered \(hash/numpy, "):
        build_encoder(spec, "cpu", EncodeOptions())
    with pytest.raises(ValueError, match="back end 'numpy'"):
        build_encoder(dataclasses.replace(spec, backend="numpy"), "cpu", EncodeOptions())
