"""Which chunks share a forward pass: microbatches of similar length under a budget of padded tokens.

Axes: N chunks of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

STEADY: Final = 1.05
"""A larger budget has to be this much faster than the best so far, or growing stops."""


def plan_microbatches(
    lengths_N: NDArray[np.int32], token_budget: int, *, packed: bool = False
) -> list[NDArray[np.intp]]:
    """Cut a window into microbatches, longest chunks first: index arrays that together hold every chunk once.

    A microbatch costs its longest chunk times its size, or the sum of its lengths when attention is packed; it stays
    within `token_budget`, and a chunk above the budget stands alone. Longest first means that memory peaks, and
    fails, at the start.
    """
    order_N = np.argsort(-lengths_N, kind="stable")
    sorted_N = np.maximum(lengths_N[order_N], 1).tolist()
    microbatches: list[NDArray[np.intp]] = []
    start = cost = 0
    for position, length in enumerate(sorted_N):
        cost = cost + length if packed else sorted_N[start] * (position - start + 1)
        if cost > token_budget and position > start:
            microbatches.append(order_N[start:position])
            start, cost = position, length
    if len(order_N):
        microbatches.append(order_N[start:])
    return microbatches


@dataclass(slots=True)
class TokenBudget:
    """Padded tokens of one forward pass: grows while that is faster, halves when memory runs out, never grows back."""

    value: int
    ceiling: int
    floor: int = 64
    best_rate: float = 0.0
    settled: bool = False

    @classmethod
    def fixed(cls, value: int) -> TokenBudget:
        """A budget that only memory can lower."""
        return cls(value=value, ceiling=value, settled=True)

    def halve(self) -> None:
        """Out of memory: half as much from now on."""
        self.value = max(self.value // 2, min(self.value, self.floor))
        self.ceiling = self.value
        self.settled = True

    def restore(self, value: int) -> None:
        """Back to an earlier value: it was one chunk that did not fit, not the size of the microbatch."""
        self.value = self.ceiling = value

    def observe(self, tokens: int, seconds: float) -> None:
        """One forward pass took so long; a nearly full one decides whether the next may be twice as large."""
        if self.settled or seconds <= 0 or tokens < 0.8 * self.value:
            return
        rate = tokens / seconds
        if self.value >= self.ceiling or rate < self.best_rate * STEADY:
            self.settled = True
            return
        self.best_rate = rate
        self.value = min(self.value * 2, self.ceiling)
