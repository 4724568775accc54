"""The torch back end: sentence-transformers loads the checkpoint, Shoal feeds it.

Axes: B chunks of a microbatch, T tokens, H hidden size, N chunks of a window, D vector elements.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shoal.conf.errors import ModelError
from shoal.udfs.batching import TokenBudget
from shoal.udfs.encoder import Encoded, EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.feeding import Feeder, Finish
from shoal.udfs.tokenizing import Tokenized, WindowTokenizer, clean

CPU_TOKEN_BUDGET: Final = 1024
CUDA_TOKEN_BUDGET: Final = 16_384
CUDA_TOKEN_CEILING: Final = 262_144

_CHARS_PER_TOKEN_GUESS: Final = 3


def initial_budget(device: str, wanted: int | None) -> TokenBudget:
    """The user's budget; else a fixed one for CPUs (caches reward small passes) and a growing one for CUDA."""
    if wanted is not None:
        return TokenBudget.fixed(wanted)
    if device.startswith("cuda"):
        return TokenBudget(value=CUDA_TOKEN_BUDGET, ceiling=CUDA_TOKEN_CEILING)
    return TokenBudget.fixed(CPU_TOKEN_BUDGET)


def load_modules(spec: EncoderSpec, device: str, precision: str) -> list[Any]:
    """The checkpoint's modules on `device`: the first in `precision`, all that follow it in float32.

    Nothing is downloaded and no pickle is read. Pooling is the description's; a Normalize module at the end is dropped,
    as normalising is done last, in float32, if the description asks for it. ModelError where loading fails.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        model = SentenceTransformer(
            spec.folder,
            device=device,
            local_files_only=True,
            trust_remote_code=spec.trust_remote_code,
            model_kwargs={"dtype": getattr(torch, precision), "use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if type(error).__name__ in {"OutOfMemoryError", "AcceleratorError"}:
            raise
        raise ModelError(
            f"encoder.model: {spec.reference!r} in {spec.folder!r} could not be loaded "
            f"({type(error).__name__}: {error}); check the checkpoint with sentence-transformers"
        ) from error
    modules = list(model.eval())
    _set_pooling(modules, spec)
    if type(modules[-1]).__name__ == "Normalize":
        modules.pop()
    for module in modules[1:]:
        module.float()
    if hasattr(modules[0], "max_seq_length") and hasattr(modules[0], "modality_config"):
        modules[0].max_seq_length = spec.max_tokens
    return modules


def _set_pooling(modules: list[Any], spec: EncoderSpec) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    modes = tuple(spec.pooling.split("+"))
    for position, module in enumerate(modules):
        if isinstance(module, Pooling):
            wanted = modes[0] if len(modes) == 1 else modes
            modules[position] = Pooling(module.embedding_dimension, wanted, include_prompt=module.include_prompt).eval()


class SentenceModel:
    """Tokenizer and modules of a loaded checkpoint; `forward` runs one padded microbatch.

    Plain text transformers are tokenised a window at a time and padded here. What is not one (static word vectors,
    chat templates, tokenizers without a fast back end) goes through the checkpoint's own preprocessing.
    """

    packed = False
    depth = 1
    length_step = 1

    def __init__(self, spec: EncoderSpec, device: str, options: EncodeOptions, precision: str) -> None:
        import torch

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.dim = spec.dim
        self.device = device
        self.prompt = spec.query_prompt if options.role == "query" else spec.document_prompt
        self.modules = load_modules(spec, device, precision)
        self.first = self.modules[0]
        self._max_tokens = spec.max_tokens
        self._prompt_length = self._count_prompt()
        self._tokenizer = self._window_tokenizer()
        self._pad_id = 0 if self._tokenizer is None else int(self.first.tokenizer.pad_token_id or 0)
        self._deadline = float("inf")
        self._watch_layers()

    def tokenize(self, texts: list[str]) -> Tokenized:
        """Token ids of a window; without a fast tokenizer the texts, and lengths guessed from their characters."""
        if self._tokenizer is not None:
            return self._tokenizer(texts)
        cleaned = [clean(text) for text in texts]
        guesses = [min(len(text.encode()) // _CHARS_PER_TOKEN_GUESS + 2, self._max_tokens) for text in cleaned]
        n_tokens_N = np.array(guesses, dtype=np.int32)
        return Tokenized(cleaned, n_tokens_N, n_tokens_N >= self._max_tokens)

    def start(self, items: list[Any], time_limit_s: float) -> Finish:
        """Run the forward pass at once; TimeoutError between two layers when it takes longer than the limit."""
        self._deadline = time.monotonic() + time_limit_s
        try:
            vectors = self.forward(self.features(items)).numpy()
        finally:
            self._deadline = float("inf")
        return lambda: vectors

    def forward(self, features: dict[str, Any]) -> Any:
        """float32 vectors (B, D) of features on the device; pooling and what follows it run in float32."""
        import torch

        with torch.inference_mode():
            features = self.first(features)
            if "token_embeddings" in features:
                features["token_embeddings"] = features["token_embeddings"].float()
            return self.tail(features)

    def tail(self, features: dict[str, Any]) -> Any:
        """float32 vectors (B, D) from `token_embeddings` (B, T, H)."""
        for module in self.modules[1:]:
            features = module(features)
        return features["sentence_embedding"].float()

    def features(self, items: list[Any]) -> dict[str, Any]:
        """Input tensors of a microbatch on the device, padded on the right."""
        import torch

        if self._tokenizer is None:
            features = self.first.preprocess(items, prompt=self.prompt or None)
            return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
        input_ids_BT, mask_BT = pad(items, self._pad_id, self.length_step)
        features = {
            "input_ids": self.to_device(input_ids_BT),
            "attention_mask": self.to_device(mask_BT),
            "modality": "text",
        }
        return features if self._prompt_length is None else {**features, "prompt_length": self._prompt_length}

    def to_device(self, array: NDArray[Any]) -> Any:
        """The array as a tensor on the device, copied asynchronously from pinned memory where that is CUDA."""
        import torch

        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device != "cpu" else tensor

    def release_memory(self) -> None:
        """Nothing is cached on a CPU."""

    def _count_prompt(self) -> int | None:
        """Tokens of the prompt where pooling leaves them out, else None."""
        excluded = any(getattr(module, "include_prompt", True) is False for module in self.modules[1:])
        if not (self.prompt and excluded):
            return None
        length = self.first.preprocess(["a"], prompt=self.prompt).get("prompt_length")
        return None if length is None else int(length)

    def _window_tokenizer(self) -> WindowTokenizer | None:
        tokenizer: Any = getattr(self.first, "tokenizer", None)
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        ways = getattr(self.first, "modality_config", {})
        plain = (
            backend is not None
            and "message" not in ways
            and ways.get("text", {}).get("method") == "forward"
            and not getattr(self.first, "processing_kwargs", None)
            and getattr(self.first, "query_expansion", None) is None
            and set(tokenizer.model_input_names) <= {"input_ids", "attention_mask", "token_type_ids"}
            and not any(backend.encode("a b").type_ids)
        )
        if not plain:
            return None
        return WindowTokenizer(
            backend, max_tokens=self._max_tokens, prompt=self.prompt, truncation_side=tokenizer.truncation_side
        )

    def _watch_layers(self) -> None:
        """Let every layer look at the clock before it runs: a forward pass can be broken off nowhere else."""
        import torch

        def check_deadline(_module: Any, _inputs: Any) -> None:
            if time.monotonic() > self._deadline:
                raise TimeoutError("the forward pass took longer than encode.time_limit")

        for stack in (module for module in self.first.modules() if isinstance(module, torch.nn.ModuleList)):
            for layer in stack:
                layer.register_forward_pre_hook(check_deadline)


def pad(ids_B: list[NDArray[np.int64]], pad_id: int, step: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and mask (B, T), int64, filled up on the right to a T that is a multiple of `step`."""
    lengths_B = np.array([len(ids) for ids in ids_B])
    mask_BT = np.arange(-(-lengths_B.max() // step) * step) < lengths_B[:, None]
    input_ids_BT = np.full(mask_BT.shape, pad_id, dtype=np.int64)
    input_ids_BT[mask_BT] = np.concatenate(ids_B)
    return input_ids_BT, mask_BT.astype(np.int64)


class TorchEncoder:
    """A sentence-transformers checkpoint on a CPU or a CUDA device."""

    def __init__(self, spec: EncoderSpec, device: str, options: EncodeOptions) -> None:
        self.spec = spec
        model: SentenceModel
        if device.startswith("cuda"):
            from shoal.udfs.packed_model import PackedModel

            model = PackedModel(spec, device, options, spec.precision)
        else:
            model = SentenceModel(spec, device, options, spec.precision)
        self.feeder = Feeder(
            model,
            initial_budget(device, options.token_budget),
            time_limit_s=options.time_limit_s,
            normalize=spec.normalize,
            exit_when_hung=options.exit_when_hung,
        )

    def encode(self, texts: list[str]) -> Encoded:
        """Vectors of the texts, in their order; see `Feeder` for what happens to texts that fail."""
        return self.feeder.encode(self.feeder.prepare(texts))
