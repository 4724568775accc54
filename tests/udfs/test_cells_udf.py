"""Which cells a query looks in."""

import numpy as np
import pandas as pd
import pytest

from shoal.udfs.cells_udf import cells_to_look_in, cells_udf

CENTROIDS_CD = np.array([[1, 0], [0, 1], [-1, 0], [0, 1]], dtype=np.float32)


@pytest.mark.parametrize(
    ("vectors", "probes", "expected"),
    [
        ([[1.0, 0.1]], 1, [0]),
        ([[1.0, 0.1]], 9, [0, 1, 3, 2]),
        ([[0.1, 1.0]], 2, [1, 3]),  # ties by number
        ([[1.0, 0.0], [-1.0, 0.0]], 2, [0, 2]),
        ([[-1.0, 0.0], None], 1, [2]),
        ([None], 3, []),
        ([], 3, []),
        (None, 3, []),
    ],
)
def test_the_nearest_cells_come_first(vectors: list | None, probes: int, expected: list[int]) -> None:
    given = None if vectors is None else [None if each is None else np.array(each, np.float32) for each in vectors]
    found = cells_to_look_in(CENTROIDS_CD, given, probes)
    assert (found.tolist(), found.dtype) == (expected, np.int32)


def test_each_row_of_a_batch_names_its_build() -> None:
    udf = cells_udf({"a@1": CENTROIDS_CD, "a@2": -CENTROIDS_CD}).func  # type: ignore[attr-defined]
    vectors = pd.Series([[np.array([1, 0], np.float32)]] * 2)
    found = udf(pd.Series(["a@1", "a@2"]), vectors, pd.Series([1, 1]))
    assert [each.tolist() for each in found] == [[0], [2]]
    with pytest.raises(KeyError):
        udf(pd.Series(["b@1"]), vectors[:1], pd.Series([1]))
