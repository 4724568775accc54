"""One encoder per Python worker, kept between tasks: weights are loaded once, and freed when another takes over."""

from __future__ import annotations

import gc
import sys
from typing import Final

from shoal.udfs.canaries import Canaries
from shoal.udfs.encoder import EncodeOptions, Encoder, build_encoder
from shoal.udfs.encoder_spec import EncoderSpec

_Key = tuple[str, str, str, EncodeOptions]

_ENCODERS: Final[dict[tuple[str, str], tuple[_Key, Encoder]]] = {}
_CHECKED: Final[set[_Key]] = set()


def cached_encoder(spec: EncoderSpec, device: str, options: EncodeOptions, canaries: Canaries | None = None) -> Encoder:
    """The encoder of this worker for (fingerprint, back end, device, role), its canaries checked once.

    Another fingerprint, back end or other options for the same device and role replace it. WorkerError when the
    canaries have moved.
    """
    key = (spec.fingerprint, spec.backend, device, options)
    slot = (device, options.role)
    held = _ENCODERS.get(slot)
    if held is None or held[0] != key:
        del held
        drop_encoder(slot)
        _ENCODERS[slot] = (key, build_encoder(spec, device, options))
    encoder = _ENCODERS[slot][1]
    if canaries is not None and key not in _CHECKED:
        canaries.check(encoder)
        _CHECKED.add(key)
    return encoder


def drop_encoder(slot: tuple[str, str]) -> None:
    """Free the encoder of (device, role), if there is one, with the device memory that torch caches for it."""
    held = _ENCODERS.pop(slot, None)
    if held is None:
        return
    _CHECKED.discard(held[0])
    del held
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and slot[0].startswith("cuda"):
        torch.cuda.empty_cache()
