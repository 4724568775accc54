"""One encoder per Python worker, kept between tasks: weights are loaded once, and freed when another takes over."""

from __future__ import annotations

import gc
import logging
import sys
import time
from typing import Final

from shoal.conf.errors import InternalError, WorkerError
from shoal.udfs.canaries import Canaries
from shoal.udfs.encoder import EncodeOptions, Encoder, build_encoder
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.feeding import failure_reason
from shoal.udfs.reasons import OUT_OF_MEMORY

logger = logging.getLogger(__name__)

MEMORY_TRIES: Final = 7
MEMORY_WAIT_S: Final = 15.0

_Key = tuple[str, str, str, str, EncodeOptions]

_ENCODERS: Final[dict[tuple[str, str], tuple[_Key, Encoder]]] = {}
_CHECKED: Final[set[_Key]] = set()


def cached_encoder(spec: EncoderSpec, device: str, options: EncodeOptions, canaries: Canaries | None = None) -> Encoder:
    """The encoder of this worker for (fingerprint, back end, device, role), its canaries checked once.

    Another fingerprint, query prompt, back end or other options for the same device and role replace it. WorkerError
    when the canaries have moved.
    """
    # The fingerprint leaves the query prompt out, since no stored vector depends on it; a query's vector does.
    prompt = spec.query_prompt if options.role == "query" else spec.document_prompt
    key = (spec.fingerprint, prompt, spec.backend, device, options)
    slot = (device, options.role)
    held = _ENCODERS.get(slot)
    if held is None or held[0] != key:
        del held
        drop_encoder(slot)
        _ENCODERS[slot] = (key, _build(spec, device, options))
    encoder = _ENCODERS[slot][1]
    if canaries is not None and key not in _CHECKED:
        canaries.check(encoder)
        _CHECKED.add(key)
    return encoder


def _build(spec: EncoderSpec, device: str, options: EncodeOptions) -> Encoder:
    """Build an encoder, waiting for device memory: Spark keeps an idle Python worker, and its weights, for a minute."""
    for left in reversed(range(MEMORY_TRIES)):
        try:
            return build_encoder(spec, device, options)
        except (MemoryError, RuntimeError) as error:
            if failure_reason(error) != OUT_OF_MEMORY:
                raise
            if not left:
                raise WorkerError(
                    f"encoder {spec.reference!r} does not fit into the memory of {device} ({error}); give the task "
                    "more memory, run fewer tasks per device, or choose a smaller encoder",
                    code="DEVICE_MEMORY",
                ) from error
            logger.warning("no memory for encoder %s on %s yet; waiting", spec.reference, device)
        gc.collect()
        time.sleep(MEMORY_WAIT_S)
    raise InternalError("MEMORY_TRIES is below 1")


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
