"""The OpenVINO back end: the loaded torch transformer, converted in memory and compiled for this processor.

Axes: B chunks of a microbatch, T tokens, H hidden size, D vector elements.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any, Final

from shoal.conf.errors import WorkerError
from shoal.udfs.encoder import Encoded, EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.feeding import Feeder, Finish
from shoal.udfs.sentence_encoder import SentenceModel, initial_budget

HINTS: Final = {"float32": "f32", "bfloat16": "bf16"}

LENGTH_STEP: Final = 16
"""Microbatches are padded to a multiple of this many tokens: every new shape costs OpenVINO a preparation."""


class OpenVinoModel(SentenceModel):
    """The transformer in OpenVINO; tokenizing, pooling and what follows as in torch, in float32."""

    length_step = LENGTH_STEP

    def __init__(self, spec: EncoderSpec, options: EncodeOptions) -> None:
        super().__init__(spec, "cpu", options, "float32")
        if self._tokenizer is None:
            raise WorkerError(
                f"encoder {spec.reference!r} is not a plain text transformer, the only kind that the openvino back "
                "end takes; set encoder.backend: torch"
            )
        self._request = self._compile(spec, options)
        self.first.model = None

    def start(self, items: list[Any], time_limit_s: float) -> Finish:
        """Run the forward pass at once; TimeoutError when it takes longer than the limit, wherever it is."""
        import torch

        features = self.features(items)
        self._request.start_async(
            {"input_ids": features["input_ids"].numpy(), "attention_mask": features["attention_mask"].numpy()}
        )
        if not self._request.wait_for(int(time_limit_s * 1000)):
            self._request.cancel()
            with suppress(RuntimeError):  # waiting for a cancelled request raises that it was cancelled
                self._request.wait()
            raise TimeoutError("the forward pass took longer than encode.time_limit")
        self._request.wait()
        features["token_embeddings"] = torch.from_numpy(self._request.get_output_tensor(0).data)
        with torch.inference_mode():
            vectors = self.tail(features).numpy().copy()
        return lambda: vectors

    def _compile(self, spec: EncoderSpec, options: EncodeOptions) -> Any:
        """An inference request of the compiled transformer; WorkerError where its architecture cannot be converted."""
        import openvino
        import torch
        from transformers.utils import logging as transformers_logging

        class LastHiddenState(torch.nn.Module):
            def __init__(self, transformer: Any) -> None:
                super().__init__()
                self.transformer = transformer

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:
                return self.transformer(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)[0]

        example = {
            "input_ids": torch.ones((2, LENGTH_STEP), dtype=torch.int64),
            "attention_mask": torch.ones((2, LENGTH_STEP), dtype=torch.int64),
        }
        example["attention_mask"][1, LENGTH_STEP // 2 :] = 0
        transformers_logging.set_verbosity_error()
        if "sliding_attention" in (getattr(self.first.config, "layer_types", None) or ()):
            # A padded token whose window holds only padding is NaN under sdpa, and 0 * NaN spoils its neighbours.
            self.first.model.set_attn_implementation("eager")
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = openvino.convert_model(LastHiddenState(self.first.model), example_input=example)
            compiled = openvino.Core().compile_model(model, "CPU", compile_settings(spec, options))
        except Exception as error:
            raise WorkerError(
                f"encoder {spec.reference!r} cannot be converted for openvino ({type(error).__name__}: "
                f"{str(error)[:300]}); set encoder.backend: torch"
            ) from error
        finally:
            transformers_logging.set_verbosity_warning()
        return compiled.create_infer_request()


def compile_settings(spec: EncoderSpec, options: EncodeOptions) -> dict[str, Any]:
    """Settings of the CPU plugin; without ENABLE_CPU_PINNING off, two Python workers land on one core."""
    if spec.precision not in HINTS:
        raise WorkerError(
            f"encoder.precision is {spec.precision}, which the openvino back end does not compute; "
            "set encoder.precision: bfloat16 or float32, or encoder.backend: torch"
        )
    return {
        "INFERENCE_PRECISION_HINT": HINTS[spec.precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": options.threads or 1,
        "ENABLE_CPU_PINNING": False,
    }


class OpenVinoEncoder:
    """A sentence-transformers checkpoint on a CPU through OpenVINO."""

    def __init__(self, spec: EncoderSpec, device: str, options: EncodeOptions) -> None:
        if device != "cpu":
            raise WorkerError(f"encoder.backend is openvino, which runs on CPUs, but the task was given {device}")
        self.spec = spec
        self.feeder = Feeder(
            OpenVinoModel(spec, options),
            initial_budget(device, options.token_budget),
            time_limit_s=options.time_limit_s,
            normalize=spec.normalize,
            exit_when_hung=options.exit_when_hung,
        )

    def encode(self, texts: list[str]) -> Encoded:
        """Vectors of the texts, in their order; see `Feeder` for what happens to texts that fail."""
        return self.feeder.encode(self.feeder.prepare(texts))
