"""Fixed texts whose vectors tell whether this worker still computes what the table holds.

Axes: C canaries, D vector elements.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shoal.conf.errors import WorkerError
from shoal.udfs.encoder import Encoder
from shoal.udfs.vectors import MIN_COSINE, cosines

LIBRARIES: Final = ("torch", "transformers", "sentence-transformers", "tokenizers", "openvino", "numpy")


@cache
def canary_texts() -> tuple[str, ...]:
    """The canaries, 1 to 400 words, many scripts and edge cases; their order never changes and none is ever edited."""
    return tuple(json.loads(resources.files("shoal.udfs").joinpath("canaries.json").read_text(encoding="utf-8")))


def library_versions() -> dict[str, str]:
    """Versions of what can move a vector, without importing any of it; absent libraries are left out."""
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True, slots=True)
class Canaries:
    """Vectors (C, D), float32, of the canaries as the encoder with this fingerprint first made them."""

    fingerprint: str
    vectors_CD: NDArray[np.float32]

    def check(self, encoder: Encoder) -> NDArray[np.float64]:
        """Cosines (C,) of the canaries here and then; WorkerError when one lies below `MIN_COSINE` of the precision.

        A text that was an error then has a zero vector, and must be one now.
        """
        spec = encoder.spec
        if spec.fingerprint != self.fingerprint:
            raise WorkerError(
                f"the canaries belong to encoder {self.fingerprint}, and this worker built {spec.fingerprint} from "
                f"{spec.folder!r}; another run replaced the encoder, start again"
            )
        vectors_CD = encode_canaries(encoder)
        if vectors_CD.shape != self.vectors_CD.shape:
            raise WorkerError(
                f"encoder {self.fingerprint} gave canary vectors of shape {vectors_CD.shape} here, and "
                f"{self.vectors_CD.shape} when its table was made; use the release of Shoal that made the table",
                code="CANARIES_MOVED",
            )
        cosines_C = cosines(vectors_CD, self.vectors_CD)
        worst = int(np.argmin(cosines_C))
        limit = MIN_COSINE[spec.precision]
        if not cosines_C[worst] >= limit:
            versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
            raise WorkerError(
                f"encoder {self.fingerprint} has moved on {platform.node()}: canary {worst} "
                f"({canary_texts()[worst][:40]!r}) has cosine {cosines_C[worst]:.7f} with its first vector, below "
                f"{limit:.7f} ({versions}); go back to the libraries and weights that made the table, or "
                "publish to a new destination",
                code="CANARIES_MOVED",
            )
        return cosines_C


def encode_canaries(encoder: Encoder) -> NDArray[np.float32]:
    """Vectors (C, D) of the canaries as documents."""
    return encoder.encode(list(canary_texts())).vectors_ND
