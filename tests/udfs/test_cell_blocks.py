"""Where rows go in a join by cells: blocks of their own cell, and blocks that a left row looks in."""

import numpy as np
import pyarrow as pa
import pytest

from shoal.udfs.cell_blocks import CellBlocks

CENTROIDS = np.array([[1, 0], [0, 1], [-1, 0]], dtype=np.float32)


def vectors(*rows: list[float]) -> pa.Table:
    return pa.table({"embedding": pa.array(list(rows), pa.list_(pa.float32()))})


def test_a_right_row_is_in_one_block_of_its_cell() -> None:
    blocks = CellBlocks(CENTROIDS, 1, np.array([2, 1, 3]))
    cells = pa.array([0, 0, 1, 2, 2], pa.int32())
    rows = pa.table({"cell": cells, "spread": pa.array([4, -1, 5, 1, -7], pa.int64())})

    numbers, found = blocks.of_right(rows)

    assert blocks.num_blocks == 6
    assert numbers.tolist() == [0, 1, 2, 3, 4]
    assert found.tolist() == [0, 1, 2, 4, 3 + -7 % 3]


@pytest.mark.parametrize(
    ("probes", "expected"),
    [
        (1, [(0, 0), (0, 1), (1, 2), (2, 3)]),
        (2, [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (2, 2), (2, 3)]),
        (9, [(row, block) for row in range(3) for block in range(4)]),
    ],
)
def test_a_left_row_looks_in_all_blocks_of_its_nearest_cells(probes: int, expected: list[tuple[int, int]]) -> None:
    """Cells of two blocks and of one; the second row is nearest to the second cell, then to the third."""
    blocks = CellBlocks(CENTROIDS, probes, np.array([2, 1, 1]))

    numbers, found = blocks.of_left(vectors([0.9, 0.1], [-0.2, 0.9], [-0.9, 0.1]))

    assert sorted(zip(numbers.tolist(), found.tolist(), strict=True)) == expected
