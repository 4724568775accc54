"""A scripted history of nights: what a source holds and what a table made anew from it would hold, without Spark."""

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.udfs.hash_encoder import hash_vectors

EVENTS = (None, None, None, "optimize", "foreign append", "source rewritten")

Row = tuple[str | None, str]
"""Text and label of one row of the source."""

Chunk = dict[str, Any]
"""One published row: every column but the vector and the time it was made."""


@dataclass(frozen=True)
class Night:
    """What a night changes: `rows` is the whole source after it, `event` what somebody else does before the run."""

    number: int
    upserts: dict[str, Row]
    deletes: frozenset[str]
    event: str | None
    rows: dict[str, Row]


@dataclass
class History:
    """Nights of one seed: the same seed gives the same nights."""

    seed: int
    num_rows: int
    texts_per_night: int
    rows: dict[str, Row] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.next_key = 0

    def first(self) -> Night:
        """The rows of the first run; a tenth share their text with another, a few have none to encode."""
        return self._turn({self._key(): self._row() for _ in range(self.num_rows)}, frozenset(), None)

    def night(self) -> Night:
        """As many new rows as deleted ones, changed texts and labels; now and then somebody else does something too."""
        keys = sorted(self.rows)
        picked = self.random.sample(keys, min(len(keys), 2 * self.texts_per_night))
        third = self.texts_per_night // 3
        deletes = frozenset(picked[:third])
        changed = {key: self._row() for key in picked[third : 2 * third + third // 2]}
        labels = {
            key: (self.rows[key][0], f"night {self.number}") for key in picked[2 * third + third // 2 : 3 * third]
        }
        new = {self._key(): self._row() for _ in range(third)}
        return self._turn(changed | labels | new, deletes, self.random.choice(EVENTS))

    def _turn(self, upserts: dict[str, Row], deletes: frozenset[str], event: str | None) -> Night:
        self.rows = {key: row for key, row in (self.rows | upserts).items() if key not in deletes}
        night = Night(self.number, upserts, deletes, event, dict(self.rows))
        self.number += 1
        return night

    def _key(self) -> str:
        self.next_key += 1
        return f"r{self.next_key}"

    def _row(self) -> Row:
        dice = self.random.random()
        label = self.random.choice(("red", "green", "blue"))
        if dice < 0.01:
            return None, label
        if dice < 0.02:
            return " \n", label
        if dice < 0.12 and self.rows:
            return self.rows[self.random.choice(sorted(self.rows))][0], label
        words = self.random.randrange(3, 30)
        return " ".join(f"w{self.random.randrange(10**6)}" for _ in range(words)), label


def rebuilt(rows: dict[str, Row], *, count_tokens: Any = None) -> dict[str, Chunk]:
    """What a table made anew publishes for each row but the vector; `count_tokens` of a text, words unless given."""
    count = count_tokens or (lambda text: len(text.split()))
    chunks: dict[str, Chunk] = {}
    for key, (text, label) in rows.items():
        error = "null_text" if text is None else None if text.strip() else "blank_text"
        chunks[key] = {
            "id": key,
            "chunk_index": 0,
            "chunk_start": 0,
            "chunk_end": len(text or ""),
            "text": text,
            "content_hash": _hash(_string(text)),
            "row_hash": _hash(_string("whole") + _string(text)),
            "meta_hash": _hash("columns1" + _string("label") + _string(label)),
            "n_tokens": None if error or text is None else count(text),
            "truncated": False,
            "error": error,
            "label": label,
        }
    return chunks


def fake_vectors(texts: list[str], dim: int) -> npt.NDArray[np.float32]:
    """The vectors (N, D) of the hash encoder."""
    return hash_vectors(texts, dim, normalize=True)


def _hash(encoded: str) -> bytes:
    return hashlib.sha256(encoded.encode()).digest()[:16]


def _string(value: str | None) -> str:
    return "n" if value is None else f"s{len(value)}:{value}"
