"""The encoder of `hash:DIM`: numpy only, for tests and dry runs; equal texts meet, meaning is not looked at.

Recipe, to be followed by hand: the text (document prompt first, cut after `max_tokens` whitespace words) as UTF-8,
with `?` for every lone surrogate; `shake_128` of that, 2 * dim bytes; read as little-endian int16 `r`; the vector is
`2 * r + 1` (never zero), divided by its Euclidean norm unless `normalize` is false. Sums of squares stay whole numbers
below 2**53 and the two roundings are IEEE ones, so every machine makes the same bits.

Axes: N texts, D dim.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shoal.conf.errors import ModelError
from shoal.udfs.encoder import Encoded, EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec

if TYPE_CHECKING:
    from shoal.conf.run import EncoderConfig

WEIGHTS_DIGEST = "hash-v1"
MAX_DIM = 65_536
UNLIMITED_TOKENS = 2**31 - 1

_WORD = re.compile(r"\S+")


class HashEncoder:
    """Encodes by hashing: more than 50,000 texts a second at dim 384 on one core, and no row ever gets an error."""

    def __init__(self, spec: EncoderSpec, device: str, options: EncodeOptions) -> None:
        del device  # numpy has one
        self.spec = spec
        prompt = spec.document_prompt if options.role == "document" else spec.query_prompt
        self._prompt = prompt or ""

    def encode(self, texts: list[str]) -> Encoded:
        """Vectors float32 (n, dim), words seen int32 (n,), truncated bool (n,) and no errors, in the order given."""
        seen = []
        n_tokens_N = np.zeros(len(texts), dtype=np.int32)
        truncated_N = np.zeros(len(texts), dtype=np.bool_)
        for index, text in enumerate(texts):
            kept, n_tokens_N[index], truncated_N[index] = cut_words(self._prompt + text, self.spec.max_tokens)
            seen.append(kept)
        vectors_ND = hash_vectors(seen, self.spec.dim, normalize=self.spec.normalize)
        return Encoded(
            vectors_ND=vectors_ND,
            n_tokens_N=n_tokens_N,
            truncated_N=truncated_N,
            errors_N=[None] * len(texts),
            padded_tokens=int(n_tokens_N.sum()),
        )


def cut_words(text: str, max_words: int) -> tuple[str, int, bool]:
    """The text up to the end of its `max_words`-th word (from 1), the words in that, and whether more followed."""
    n_words = len(text.split())
    if n_words <= max_words:
        return text, n_words, False
    last = next(islice(_WORD.finditer(text), max_words - 1, None))
    return text[: last.end()], max_words, True


def hash_vectors(texts: Sequence[str], dim: int, *, normalize: bool = True) -> npt.NDArray[np.float32]:
    """float32 (n, dim) of the module's recipe, bit for bit the same everywhere."""
    stream = b"".join(hashlib.shake_128(text.encode("utf-8", "replace")).digest(2 * dim) for text in texts)
    vectors_ND = np.frombuffer(stream, dtype="<i2").reshape(len(texts), dim).astype(np.float64)
    vectors_ND *= 2.0
    vectors_ND += 1.0
    if normalize:
        vectors_ND /= np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))[:, None]
    return vectors_ND.astype(np.float32)


def describe_hash(config: EncoderConfig) -> EncoderSpec:
    """The spec of `hash:DIM`, settled without an executor; ModelError for a DIM above 65536."""
    dim = config.hash_dim
    if dim is None or not 1 <= dim <= MAX_DIM:
        raise ModelError(
            f"encoder.model is {config.model!r}, but the hash encoder makes 1 to {MAX_DIM} numbers; "
            "write for example hash:384."
        )
    return EncoderSpec(
        kind="hash",
        reference=config.model,
        revision=None,
        folder="",
        dim=dim,
        pooling="none",
        max_tokens=config.max_tokens or UNLIMITED_TOKENS,
        normalize=config.normalize,
        document_prompt=config.document_prompt or "",
        query_prompt=config.query_prompt or "",
        weights_digest=WEIGHTS_DIGEST,
        tokenizer_digest=WEIGHTS_DIGEST,
        modules_digest=WEIGHTS_DIGEST,
        precision="float32",
        backend="numpy",
    )
