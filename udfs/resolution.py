"""Settles what "auto" means for precision and back end, on the executor, once per encoder.

Axes: C canaries, D vector elements.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shoal.conf.errors import WorkerError
from shoal.udfs.canaries import encode_canaries
from shoal.udfs.encoder import EncodeOptions, Encoder, build_encoder
from shoal.udfs.encoder_spec import Backend, EncoderSpec, Precision
from shoal.udfs.vectors import MIN_COSINE, cosines

logger = logging.getLogger(__name__)

BFLOAT16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16"})
"""Processor features that make bfloat16 products faster than float32 ones, here and in every published measurement."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """A settled description, its encoder, the canary vectors (C, D), and their cosines (C,) with float32 torch."""

    spec: EncoderSpec
    encoder: Encoder
    vectors_CD: NDArray[np.float32]
    parity_C: NDArray[np.float64]


def resolve(spec: EncoderSpec, device: str, options: EncodeOptions | None = None) -> Resolution:
    """Settle precision by what the device is, and the back end by what it can do: the fastest that holds parity.

    The choice depends on flags, never on timing, so that the same device gives the same answer. Explicit values stay.
    ModelError when the vectors do not have the dim that the checkpoint announces; WorkerError when no back end of the
    precision class reproduces float32 torch.
    """
    options = options or EncodeOptions()
    precision = resolve_precision(spec.precision, device) if spec.kind != "hash" else "float32"
    spec = dataclasses.replace(spec, precision=precision)
    reference_CD = _reference(spec, device, options)
    limit = MIN_COSINE[spec.precision]
    failures: list[str] = []
    for backend in resolve_backends(spec, device):
        candidate = dataclasses.replace(spec, backend=backend)
        try:
            encoder = build_encoder(candidate, device, options)
            vectors_CD = encode_canaries(encoder)
        except (WorkerError, RuntimeError, ImportError) as error:
            logger.warning("back end %s cannot run %s", backend, spec.reference, exc_info=error)
            failures.append(f"{backend}: {error}")
            continue
        parity_C = cosines(vectors_CD, reference_CD)
        if parity_C.min() >= limit:
            return Resolution(candidate, encoder, vectors_CD, parity_C)
        failures.append(f"{backend}: cosine {parity_C.min():.6f} with float32 torch, below {limit:.6f}")
    raise WorkerError(
        f"encoder {spec.reference!r} in {spec.precision} on {device} has no back end that agrees with float32 torch "
        f"({'; '.join(failures)}); set encoder.precision: float32 or encoder.backend: torch",
        code="BACKEND_DISAGREES",
    )


def resolve_precision(precision: Precision, device: str) -> Precision:
    """An explicit precision as it is; else bfloat16 where the device has the instructions for it, else float32."""
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if BFLOAT16_FLAGS & cpu_flags() else "float32"


def resolve_backends(spec: EncoderSpec, device: str) -> Iterable[Backend]:
    """Back ends to try, fastest first."""
    if spec.kind == "hash":
        return ("numpy",)
    if spec.backend != "auto":
        return (spec.backend,)
    openvino = not device.startswith("cuda") and importlib.util.find_spec("openvino") is not None
    return ("openvino", "torch") if openvino and spec.precision != "float16" else ("torch",)


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Processor features as Linux names them; none where there is no such file."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def _reference(spec: EncoderSpec, device: str, options: EncodeOptions) -> NDArray[np.float32]:
    """Canary vectors of plain float32: torch on the same device, or the hash encoder itself."""
    if spec.kind == "hash":
        plain = dataclasses.replace(spec, backend="numpy")
    else:
        plain = dataclasses.replace(spec, precision="float32", backend="torch")
    return encode_canaries(build_encoder(plain, device, options))
