"""The child of `isolation.py` around a model that some texts kill; run by test_isolation.py, with its two descriptors.

A vector is (length of the text, number of texts that its process had been given before). The file of the environment
variable POISON_LOG gets a line for each start ("start") and each forward pass (its texts, with commas).
"""

import ctypes
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from shoal.udfs.batching import TokenBudget
from shoal.udfs.canaries import Canaries
from shoal.udfs.encoder import Encoded, EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.feeding import Feeder, Finish
from shoal.udfs.isolated_worker import main
from shoal.udfs.tokenizing import Tokenized


def log(line: str) -> None:
    with Path(os.environ["POISON_LOG"]).open("a") as file:
        file.write(line + "\n")


class PoisonedModel:
    dim = 2
    packed = False
    depth = 1

    def tokenize(self, texts: list[str]) -> Tokenized:
        n_tokens_N = np.array([len(text) for text in texts], dtype=np.int32)
        return Tokenized(list(texts), n_tokens_N, n_tokens_N > 50)

    def start(self, items: list[Any], time_limit_s: float) -> Finish:  # noqa: ARG002
        log(",".join(items))
        if any("kill" in item for item in items):
            os.kill(os.getpid(), signal.SIGKILL)
        if any("segfault" in item for item in items):
            ctypes.string_at(0)
        if any("hang" in item for item in items):
            ctypes.PyDLL(None).pause()  # as a PyDLL it keeps the interpreter's lock: no Python thread can run
        if any("device" in item for item in items):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        vectors_BD = np.array([[len(item), 1] for item in items], dtype=np.float32)
        return lambda: vectors_BD

    def release_memory(self) -> None:
        pass


class PoisonedEncoder:
    def __init__(self, spec: EncoderSpec, options: EncodeOptions) -> None:
        self.spec = spec
        self.feeder = Feeder(
            PoisonedModel(),
            TokenBudget.fixed(10_000),
            time_limit_s=options.time_limit_s,
            normalize=False,
            exit_when_hung=options.exit_when_hung,
        )

    def encode(self, texts: list[str]) -> Encoded:
        if texts == ["bug"]:
            raise KeyError("bug")
        return self.feeder.encode(self.feeder.prepare(texts))


def build(spec: EncoderSpec, device: str, options: EncodeOptions, canaries: Canaries | None) -> PoisonedEncoder:
    del device, canaries
    log("start")
    if spec.reference == "dies at load":
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.reference == "raises at load":
        raise RuntimeError("no such weights")
    return PoisonedEncoder(spec, options)


if __name__ == "__main__":
    main(build)
