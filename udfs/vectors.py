"""Arithmetic on finished vectors: normalising, health, comparison, and the way into Arrow.

Axes: N vectors, D elements.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shoal.udfs import reasons

MIN_COSINE: Final = {"float32": 1 - 1e-5, "bfloat16": 0.9995, "float16": 0.9995}
"""Lowest cosine, by precision, between vectors of one text that two back ends, machines or releases may show.

float32 vectors of one text differ by about 1e-7 per element between batches, bfloat16 ones by 1e-3; a wrong weight,
prompt, pooling or mask moves the cosine by far more than either threshold.
"""


def check_vectors(vectors_ND: NDArray[np.float32], *, normalize: bool) -> tuple[NDArray[np.float32], list[str | None]]:
    """Vectors, normalised to length 1 if asked, and each one's error reason or None; a vector with an error is zero."""
    finite_N: NDArray[np.bool_] = np.asarray(np.isfinite(vectors_ND).all(axis=1))
    safe_ND = vectors_ND if finite_N.all() else np.where(finite_N[:, None], vectors_ND, np.float32(0))
    norms_N = np.linalg.norm(safe_ND.astype(np.float64), axis=1)
    usable_N: NDArray[np.bool_] = finite_N & (norms_N > 0)
    if normalize:
        scale_N = np.divide(1.0, norms_N, out=np.zeros_like(norms_N), where=usable_N)
        safe_ND = (safe_ND * scale_N[:, None]).astype(np.float32)
    errors: list[str | None] = [None] * len(vectors_ND)
    for row in np.flatnonzero(~usable_N):
        errors[row] = reasons.ZERO_VECTOR if finite_N[row] else reasons.NON_FINITE
    return np.ascontiguousarray(safe_ND, dtype=np.float32), errors


def cosines(left_ND: NDArray[np.float32], right_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each pair of vectors, in float64; two zero vectors count as equal, a zero and another as 0."""
    left, right = left_ND.astype(np.float64), right_ND.astype(np.float64)
    norms_N = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    both_zero_N = ~left.any(axis=1) & ~right.any(axis=1)
    products_N = np.einsum("nd,nd->n", left, right)
    return np.where(both_zero_N, 1.0, np.divide(products_N, norms_N, out=np.zeros_like(norms_N), where=norms_N > 0))


def to_list_array(vectors_ND: NDArray[np.float32], valid_N: NDArray[np.bool_]) -> pa.ListArray:
    """Arrow list<float32> of the vectors with NULL where not valid, from one block: no Python list is made."""
    n, dim = vectors_ND.shape
    if n * dim > np.iinfo(np.int32).max:
        raise ValueError(f"{n} vectors of {dim} elements exceed one Arrow list array; send smaller batches")
    kept_ND = vectors_ND if valid_N.all() else vectors_ND[valid_N]
    offsets = np.zeros(n + 1, dtype=np.int32)
    np.cumsum(valid_N * np.int32(dim), out=offsets[1:])
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(np.ascontiguousarray(kept_ND).ravel()), mask=pa.array(~valid_N)
    )
