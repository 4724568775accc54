from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shoal.udfs.packed_attention import attend, first_position, pack


def by_hand(query: np.ndarray, key: np.ndarray, value: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Attention of one head in numpy: softmax of scaled products over what is seen."""
    scores = np.where(seen, query @ key.T / np.sqrt(query.shape[1]), -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ value


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 2), (True, 3)])
def test_attention_stays_inside_each_chunk(causal: bool, window: int | None) -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, 2, 9, 4) for _ in range(3))
    bounds = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    found, _ = attend(
        SimpleNamespace(is_causal=causal), query, key, value, None, sliding_window=window, cu_seq_lens_q=bounds
    )
    assert found.shape == (1, 9, 2, 4)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        distance = np.arange(end - start)[:, None] - np.arange(end - start)[None, :]
        seen = np.ones_like(distance, dtype=bool)
        if window is not None:
            seen &= np.abs(distance) <= window - 1
        if causal:
            seen &= distance >= 0
        for head in range(2):
            q, k, v = (x[0, head, start:end].numpy() for x in (query, key, value))
            np.testing.assert_allclose(found[0, start:end, head].numpy(), by_hand(q, k, v, seen), atol=1e-5)


def test_packing_restarts_positions_at_every_chunk() -> None:
    packed = pack([np.array([7, 8, 9]), np.array([4]), np.array([5, 6])], 2)
    assert packed["input_ids"].tolist() == [[7, 8, 9, 4, 5, 6]]
    assert packed["position_ids"].tolist() == [[2, 3, 4, 2, 2, 3]]
    assert packed["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert packed["cu_seq_lens_q"].dtype == np.int32


def test_positions_start_behind_the_padding_index_only_where_a_table_is_learned_so() -> None:
    class Embeddings(torch.nn.Module):
        def __init__(self, padding_idx: int | None) -> None:
            super().__init__()
            self.padding_idx = padding_idx
            self.position_embeddings = torch.nn.Embedding(8, 2)

    assert first_position(torch.nn.Sequential(Embeddings(1))) == 2
    assert first_position(torch.nn.Sequential(Embeddings(None))) == 0
