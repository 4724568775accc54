"""The contract of an encoder, and the registry that builds one from its description.

Axes: N chunks, D vector elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.udfs.encoder_spec import EncoderSpec

Role = Literal["document", "query"]

ENCODERS: Final[dict[tuple[str, str], str]] = {
    ("sentence_transformers", "torch"): "shoal.udfs.sentence_encoder:TorchEncoder",
    ("sentence_transformers", "openvino"): "shoal.udfs.openvino_encoder:OpenVinoEncoder",
    ("hash", "numpy"): "shoal.udfs.hash_encoder:HashEncoder",
}
"""(kind, back end) -> "module:class"; text, so that nothing heavy is imported before an encoder is built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """How to encode; none of it changes a vector beyond rounding, except the role, which picks the prompt.

    token_budget: padded tokens of one forward pass; None finds it. time_limit_s: seconds for one microbatch.
    threads: CPU threads of this Python worker; None leaves what the task was given. device: "cpu", "cuda:0"; None takes
    the GPU that Spark gave the task, else the CPU. exit_when_hung: whether the process is one that may be ended when a
    forward pass never returns; a Python worker is.
    """

    token_budget: int | None = None
    time_limit_s: float = 600.0
    threads: int | None = None
    role: Role = "document"
    device: str | None = None
    exit_when_hung: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Vectors of N texts in the order given; a row with an error has a zero vector.

    vectors_ND float32 (N, D); n_tokens_N int32, tokens seen after truncation; truncated_N bool; errors_N the reason
    or None. padded_tokens and busy_s describe the work: tokens forwarded with padding, seconds in
    forward passes.
    """

    vectors_ND: NDArray[np.float32]
    n_tokens_N: NDArray[np.int32]
    truncated_N: NDArray[np.bool_]
    errors_N: list[str | None]
    padded_tokens: int = 0
    busy_s: float = 0.0


class Encoder(Protocol):
    """Turns texts into vectors; one text that cannot be encoded is an error in the result, not an exception."""

    spec: EncoderSpec

    def encode(self, texts: list[str]) -> Encoded:
        """Vectors of the texts, in their order."""
        ...


def build_encoder(spec: EncoderSpec, device: str, options: EncodeOptions) -> Encoder:
    """Build the encoder that (kind, back end) name, on `device` ("cpu", "cuda:0"); ValueError for an unknown pair."""
    target = ENCODERS.get((spec.kind, spec.backend))
    if target is None:
        known = ", ".join(f"{kind}/{backend}" for kind, backend in sorted(ENCODERS))
        raise ValueError(
            f"encoder {spec.reference!r} has kind {spec.kind!r} and back end {spec.backend!r}, and no such encoder is "
            f"registered ({known}); resolve the description first"
        )
    module, _, name = target.partition(":")
    build: Callable[[EncoderSpec, str, EncodeOptions], Encoder] = getattr(import_module(module), name)
    return build(spec, device, options)
