"""The blocks of a join by cells: where the rows of the right side go, and which blocks a left row looks in.

Axes: N rows, C cells, D vector elements, P places of rows in blocks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal.udfs.topk import MAX_SCORES, top_k, vectors_of

CELL, SPREAD, EMBEDDING = "cell", "spread", "embedding"

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CellBlocks:
    """centroids_CD: float32, of the cells that the right side is in. probes: cells that each left row looks in.

    blocks_C: int64 (C,), at least 1: into how many blocks the rows of each cell are cut.
    """

    centroids_CD: npt.NDArray[np.float32]
    probes: int
    blocks_C: npt.NDArray[np.int64]

    @property
    def num_blocks(self) -> int:
        return int(self.blocks_C.sum())

    def of_right(self, rows: pa.Table) -> tuple[Places, Places]:
        """Row numbers and the block of each, by its `cell` int, and by `spread`, a long, where a cell has several."""
        cells_N = rows.column(CELL).to_numpy()
        spread_N = rows.column(SPREAD).to_numpy()
        return np.arange(len(cells_N)), self._starts_C[cells_N] + spread_N % self.blocks_C[cells_N]

    def of_left(self, rows: pa.Table) -> tuple[Places, Places]:
        """Row numbers and the blocks that these rows, at least one, look in, by their `embedding`.

        ValueError where that is not a vector of D numbers.
        """
        num_cells, dim = self.centroids_CD.shape
        vectors_ND = vectors_of(rows.column(EMBEDDING).combine_chunks(), dim)
        step = max(1, MAX_SCORES // num_cells)
        cells_NP = [
            top_k(vectors_ND[start : start + step] @ self.centroids_CD.T, self.probes)
            for start in range(0, len(vectors_ND), step)
        ]
        cells_P = np.concatenate(cells_NP).ravel()
        rows_P = np.repeat(np.arange(len(vectors_ND)), len(cells_P) // len(vectors_ND))
        number_P = self.blocks_C[cells_P]
        nth = np.arange(number_P.sum()) - np.repeat(np.cumsum(number_P) - number_P, number_P)
        return np.repeat(rows_P, number_P), np.repeat(self._starts_C[cells_P], number_P) + nth

    @property
    def _starts_C(self) -> Places:  # noqa: N802 - its axis
        """The first block of each cell."""
        return np.cumsum(self.blocks_C) - self.blocks_C
