"""The Arrow UDF of the batch search, on batches of blocks: pairs, their order, and what it refuses."""

import numpy as np
import pyarrow as pa
import pytest

from shoal.udfs.near_udf import near_udf
from shoal.udfs.vectors import to_list_array

RNG = np.random.default_rng(3)


def block(vectors_ND: np.ndarray) -> pa.ListArray:
    return to_list_array(vectors_ND.astype(np.float32), np.ones(len(vectors_ND), dtype=np.bool_))


def blocks(*each: np.ndarray) -> pa.ListArray:
    """One row for each block."""
    arrays = [block(vectors_ND) for vectors_ND in each]
    offsets = np.cumsum([0, *map(len, arrays)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.concat_arrays(arrays))


def shoal_near(left: pa.ListArray, right: pa.ListArray, k: int, threshold: float | None) -> list[list[tuple]]:
    udf = near_udf().func  # type: ignore[attr-defined]
    found = udf(left, right, pa.array([k] * len(left)), pa.array([threshold] * len(left), pa.float64()))
    return [sorted((pair["left"], -pair["score"], pair["right"]) for pair in row) for row in found.to_pylist()]


@pytest.mark.parametrize(("k", "threshold"), [(1, None), (3, None), (100, None), (3, 0.5), (100, 9.0)])
def test_each_row_is_a_pair_of_blocks_of_its_own(k: int, threshold: float | None) -> None:
    left = [RNG.normal(size=(rows, 4)).astype(np.float32) for rows in (5, 1, 7)]
    right = [RNG.normal(size=(rows, 4)).astype(np.float32) for rows in (6, 9, 2)]
    for found, left_LD, right_RD in zip(
        shoal_near(blocks(*left), blocks(*right), k, threshold), left, right, strict=True
    ):
        scores_LR = (left_LD.astype(np.float64) @ right_RD.T.astype(np.float64)).astype(np.float32)
        wanted = [
            (row, -float(scores_R[place]), int(place))
            for row, scores_R in enumerate(scores_LR)
            for place in np.argsort(-scores_R, kind="stable")[:k]
            if threshold is None or scores_R[place] >= threshold
        ]
        assert found == sorted(wanted)


def test_among_equal_scores_the_first_places_are_taken() -> None:
    same = np.ones((6, 3), dtype=np.float32)
    assert shoal_near(blocks(same[:1]), blocks(same), 2, None) == [[(0, -3.0, 0), (0, -3.0, 1)]]


def test_a_part_of_an_array_is_that_part() -> None:
    left = blocks(RNG.normal(size=(2, 3)), np.eye(3)[:1])
    right = blocks(RNG.normal(size=(4, 3)), np.eye(3))
    assert shoal_near(left.slice(1), right.slice(1), 1, None) == [[(0, -1.0, 0)]]


def test_without_vectors_there_are_no_pairs() -> None:
    assert shoal_near(blocks(np.ones((0, 3))), blocks(np.ones((2, 3))), 1, None) == [[]]
    assert shoal_near(blocks(np.ones((2, 3))), blocks(np.ones((0, 3))), 1, None) == [[]]


@pytest.mark.parametrize(("vector", "told"), [([1.0, 2.0], "widths"), ([1.0, 2.0, float("nan")], "NaN or infinite")])
def test_vectors_that_do_not_fit_are_refused(vector: list[float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        shoal_near(blocks(np.ones((1, 3))), blocks(np.array([vector])), 1, None)
