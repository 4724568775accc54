"""What an encoder is: the picklable description that the driver ships and a worker builds the encoder from."""

from dataclasses import dataclass
from typing import Literal

from shoal.conf.fingerprint import digest

Kind = Literal["sentence_transformers", "hash"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Backend = Literal["auto", "torch", "openvino", "numpy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """A model and everything that decides its vectors; a few kilobytes, no weights.

    `precision` and `backend` may be "auto" until `resolve` on an executor has settled them. Prompts are the resolved
    ones ("" for none). Digests are hex sha256 of the checkpoint's weights, tokenizer and module settings.
    """

    kind: Kind
    reference: str
    revision: str | None
    folder: str
    dim: int
    pooling: str
    max_tokens: int
    normalize: bool
    document_prompt: str
    query_prompt: str
    weights_digest: str
    tokenizer_digest: str
    modules_digest: str
    trust_remote_code: bool = False
    precision: Precision = "auto"
    backend: Backend = "auto"

    def identity(self) -> dict[str, str | int | bool]:
        """Everything that changes a stored vector, and nothing else.

        Left out: where the model lies (folder, reference, revision: the digests say what it is), the back end (held to
        the same vectors by the parity check) and the query prompt (no stored vector depends on it).
        """
        if self.precision == "auto":
            raise ValueError(
                f"the precision of encoder {self.reference!r} is still 'auto': "
                "it has no fingerprint before `resolve` settled it on an executor"
            )
        return {
            "kind": self.kind,
            "dim": self.dim,
            "pooling": self.pooling,
            "max_tokens": self.max_tokens,
            "normalize": self.normalize,
            "document_prompt": self.document_prompt,
            "weights_digest": self.weights_digest,
            "tokenizer_digest": self.tokenizer_digest,
            "modules_digest": self.modules_digest,
            "precision": self.precision,
        }

    @property
    def fingerprint(self) -> str:
        """First 32 hex digits of the identity's digest; ValueError while the precision is "auto"."""
        return digest(self.identity())[:32]
