"""A loaded checkpoint whose microbatches are forwarded without padding, asynchronously on CUDA.

Axes: B chunks of a microbatch, D vector elements.
"""

from __future__ import annotations

import gc
import logging
from typing import Any, Final

from shoal.conf.errors import ModelError
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.feeding import Finish
from shoal.udfs.packed_attention import ARCHITECTURES, NAME, first_position, pack, register
from shoal.udfs.sentence_encoder import SentenceModel
from shoal.udfs.vectors import cosines

logger = logging.getLogger(__name__)

SAME: Final = 0.999
"""Cosine between packed and padded vectors that the trial at loading asks for; wrong bounds give far less."""

_TRIAL: Final = ("one", "a second text that is longer than the first", "three words here")


class PackedModel(SentenceModel):
    """As its base, but packed where the architecture allows it and a trial against padding agrees.

    On CUDA two microbatches are in flight: while one is computed, the next is copied and queued.
    """

    def __init__(self, spec: EncoderSpec, device: str, options: EncodeOptions, precision: str) -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            import torch

            torch.cuda.set_device(device)
            self.depth = 2
        super().__init__(spec, device, options, precision)
        self.packed = False
        self._position = 0
        if self._can_pack(precision):
            self._try_packing()

    def start(self, items: list[Any], time_limit_s: float) -> Finish:
        """Queue the forward pass and the copy back; on a CPU, run it at once."""
        if not self._cuda:
            return super().start(items, time_limit_s)
        import torch

        vectors = self.forward(self.features(items))
        host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def finish() -> Any:
            done.synchronize()
            return host.numpy()

        return finish

    def features(self, items: list[Any]) -> dict[str, Any]:
        """Input tensors of a microbatch: end to end with their bounds, or padded."""
        if not self.packed:
            return super().features(items)
        features: dict[str, Any] = {name: self.to_device(array) for name, array in pack(items, self._position).items()}
        longest = max(len(ids) for ids in items)
        features |= {
            "cu_seq_lens_k": features["cu_seq_lens_q"],
            "max_length_q": longest,
            "max_length_k": longest,
            "modality": "text",
        }
        return features if self._prompt_length is None else {**features, "prompt_length": self._prompt_length}

    def release_memory(self) -> None:
        """Hand the blocks that torch caches back to the device."""
        gc.collect()
        if self._cuda:
            import torch

            torch.cuda.empty_cache()

    def _can_pack(self, precision: str) -> bool:
        architecture = getattr(getattr(self.first, "config", None), "model_type", None)
        kernel = precision in {"bfloat16", "float16"} or not self._cuda
        return self._tokenizer is not None and architecture in ARCHITECTURES and kernel

    def _try_packing(self) -> None:
        """Pack from now on, unless a few texts come out otherwise than padded."""
        items = self.tokenize(list(_TRIAL)).items_N
        padded_BD = self.start(items, float("inf"))().copy()
        register()
        transformer = self.first.model
        before = transformer.config._attn_implementation
        try:
            transformer.set_attn_implementation(NAME)
            declared = self.first.model_forward_params
            if declared is not None:
                self.first.model_forward_params = declared | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"}
            self._position = first_position(transformer)
            self.packed = True
            lowest = cosines(self.start(items, float("inf"))(), padded_BD).min()
            if lowest >= SAME:
                return
            found = f"cosine {lowest:.4f} with padding"
        except (RuntimeError, TypeError, ValueError, ImportError, ModelError) as error:
            found = f"{type(error).__name__}: {error}"
        logger.warning("packed attention is off for this encoder (%s); it is padded instead", found)
        self.packed = False
        transformer.set_attn_implementation(before)
