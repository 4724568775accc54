"""The hash encoder with a forward pass that some texts kill or hang; test_encode_stage.py ships it to the workers.

Its description registers it wherever it is unpickled, in a Python worker or in the child of one. The word "killing"
kills and "hanging" hangs the process, until the file that the description names as its folder is there.
"""

import ctypes
import os
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from shoal.udfs.batching import TokenBudget
from shoal.udfs.encoder import ENCODERS, Encoded, EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.feeding import Feeder, Finish
from shoal.udfs.hash_encoder import HashEncoder
from shoal.udfs.tokenizing import Tokenized


class PoisonedSpec(EncoderSpec):
    def __reduce__(self) -> tuple[Any, ...]:
        return poisoned, ({field.name: getattr(self, field.name) for field in fields(self)},)


def poisoned(settings: dict[str, Any]) -> PoisonedSpec:
    ENCODERS["hash", "torch"] = f"{__name__}:PoisonedEncoder"  # type: ignore[index]
    return PoisonedSpec(**settings | {"backend": "torch"})


class PoisonedModel:
    packed = False
    depth = 1

    def __init__(self, harmless: HashEncoder) -> None:
        self.harmless = harmless
        self.dim = harmless.spec.dim

    def tokenize(self, texts: list[str]) -> Tokenized:
        n_tokens_N = np.array([len(text.split()) for text in texts], dtype=np.int32)
        return Tokenized(list(texts), n_tokens_N, np.zeros(len(texts), dtype=np.bool_))

    def start(self, items: list[Any], time_limit_s: float) -> Finish:  # noqa: ARG002
        if not Path(self.harmless.spec.folder).exists():
            if any("killing" in item for item in items):
                os.kill(os.getpid(), signal.SIGKILL)
            if any("hanging" in item for item in items):
                ctypes.PyDLL(None).pause()  # as a PyDLL it keeps the interpreter's lock: no Python thread can run
        vectors_BD = self.harmless.encode(items).vectors_ND
        return lambda: vectors_BD

    def release_memory(self) -> None:
        pass


class PoisonedEncoder:
    def __init__(self, spec: EncoderSpec, device: str, options: EncodeOptions) -> None:
        self.spec = spec
        self.feeder = Feeder(
            PoisonedModel(HashEncoder(spec, device, options)),
            TokenBudget.fixed(32),
            time_limit_s=options.time_limit_s,
            normalize=spec.normalize,
            exit_when_hung=options.exit_when_hung,
        )

    def encode(self, texts: list[str]) -> Encoded:
        return self.feeder.encode(self.feeder.prepare(texts))
