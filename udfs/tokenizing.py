"""Texts to token ids by a fast tokenizer, for any text that a source can hold.

Axes: N texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHARS_PER_TOKEN: Final = 32
"""A text longer than this many characters per token the encoder sees is cut before it is tokenised."""

SPARE_TOKENS: Final = 64
"""Tokens that must lie beyond the limit for such a cut to count as harmless."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A window ready to be forwarded: what the model takes for each text, its length in tokens, and what was cut."""

    items_N: list[Any]
    n_tokens_N: NDArray[np.int32]
    truncated_N: NDArray[np.bool_]


def clean(text: str) -> str:
    """The text with lone surrogates, which no encoding of Unicode can carry, replaced by question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


class WindowTokenizer:
    """Tokenises whole windows, special tokens and prompt included, truncated to what the encoder sees."""

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int, prompt: str, truncation_side: str = "right") -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._prompt = prompt
        self._cut_from = CHARS_PER_TOKEN * (max_tokens + SPARE_TOKENS) if truncation_side == "right" else None
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length=max_tokens, strategy="longest_first", direction=truncation_side)

    def __call__(self, texts: list[str]) -> Tokenized:
        """Token ids (int64) of each text; a 5 MB text costs little more than the part that the encoder sees."""
        heads = [self._head(clean(self._prompt + text)) for text in texts]
        encodings = self._tokenizer.encode_batch_fast([head for head, _ in heads])
        truncated_N = np.array([bool(encoding.overflowing) for encoding in encodings], dtype=np.bool_)
        for row, (_, cut) in enumerate(heads):
            if cut and sum(len(rest.ids) for rest in encodings[row].overflowing) < SPARE_TOKENS:
                encodings[row] = self._tokenizer.encode_batch_fast([clean(self._prompt + texts[row])])[0]
                truncated_N[row] = bool(encodings[row].overflowing)
        ids = [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]
        return Tokenized(ids, np.array([len(row) for row in ids], dtype=np.int32), truncated_N)

    def _head(self, text: str) -> tuple[str, bool]:
        """The text up to the first space behind the cut: where words end, tokens do not depend on what follows."""
        if self._cut_from is None or len(text) <= 2 * self._cut_from:
            return text, False
        end = text.find(" ", self._cut_from, 2 * self._cut_from)
        return (text, False) if end < 0 else (text[:end], True)
