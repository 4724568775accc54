import numpy as np
import pyarrow as pa
import pytest

from shoal.udfs import reasons
from shoal.udfs.vectors import check_vectors, cosines, to_list_array


def test_checked_vectors_have_length_one_and_bad_ones_a_reason() -> None:
    given = np.array([[3, 4], [0, 0], [np.nan, 1], [1e-20, 0], [1e30, 1e30]], dtype=np.float32)
    vectors_ND, errors_N = check_vectors(given, normalize=True)
    assert errors_N == [None, reasons.ZERO_VECTOR, reasons.NON_FINITE, None, None]
    np.testing.assert_allclose(vectors_ND[[0, 3, 4]], [[0.6, 0.8], [1, 0], [0.5**0.5, 0.5**0.5]], rtol=1e-6)
    assert not vectors_ND[[1, 2]].any()
    assert vectors_ND.dtype == np.float32


def test_vectors_that_are_not_normalised_are_left_as_they_are() -> None:
    given = np.array([[3, 4], [0.5, 0]], dtype=np.float32)
    vectors_ND, errors_N = check_vectors(given, normalize=False)
    assert vectors_ND.tolist() == given.tolist()
    assert errors_N == [None, None]


def test_cosine_of_zero_vectors_is_one_with_each_other_and_zero_with_others() -> None:
    left = np.array([[0, 0], [0, 0], [1, 0], [2, 2]], dtype=np.float32)
    right = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=np.float32)
    np.testing.assert_allclose(cosines(left, right), [1, 0, 0, 1])


@pytest.mark.parametrize("valid", [[True, True, True], [True, False, True], [False, False, False]])
def test_arrow_lists_hold_the_vectors_and_null_for_the_rest(valid: list[bool]) -> None:
    vectors_ND = np.arange(6, dtype=np.float32).reshape(3, 2)
    array = to_list_array(vectors_ND, np.array(valid))
    array.validate(full=True)
    assert array.type == pa.list_(pa.float32())
    assert array.to_pylist() == [row if ok else None for row, ok in zip(vectors_ND.tolist(), valid, strict=True)]


def test_no_rows_give_an_empty_arrow_list_array() -> None:
    array = to_list_array(np.zeros((0, 3), np.float32), np.zeros(0, bool))
    assert (len(array), array.type) == (0, pa.list_(pa.float32()))


def test_more_elements_than_int32_offsets_count_are_refused() -> None:
    huge = np.broadcast_to(np.zeros(1, np.float32), (3_000_000, 1000))
    with pytest.raises(ValueError, match="exceed one Arrow list array"):
        to_list_array(huge, np.ones(3_000_000, bool))
