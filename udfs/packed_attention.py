"""Attention over chunks laid end to end without padding, for architectures that hand their sequence bounds down.

Axes: S all tokens of a microbatch, B its chunks, A query heads, K key heads, E head size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

NAME: Final = "shoal_packed"

ARCHITECTURES: Final = frozenset(
    {
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "distilbert",
        "electra",
        "modernbert",
        "qwen2",
        "qwen3",
        "mistral",
    }
)
"""Model types of transformers whose attention layers receive `cu_seq_lens_q`; each is tested against padding."""


def register() -> None:
    """Make the attention known to transformers under `NAME`, without a mask: bounds replace it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)


def attend(
    module: Any,
    query_1ASE: Any,
    key_1KSE: Any,
    value_1KSE: Any,
    attention_mask: Any,  # noqa: ARG001 - given by transformers, always None here
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - inference
    sliding_window: int | None = None,
    is_causal: bool | None = None,  # noqa: FBT001 - the signature is that of transformers
    cu_seq_lens_q: Any = None,
    max_length_q: int | None = None,
    **_kwargs: Any,
) -> tuple[Any, None]:
    """Attention inside each chunk, (1, S, A, E): torch's variable-length kernel on CUDA, a loop over chunks elsewhere.

    A window of w lets a token see w - 1 tokens back and, unless attention is causal, as many ahead.
    """
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    reach = -1 if sliding_window is None else sliding_window - 1
    if query_1ASE.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        query_SAE, key_SKE, value_SKE = (x[0].transpose(0, 1).contiguous() for x in (query_1ASE, key_1KSE, value_1KSE))
        attended_SAE = varlen_attn(
            query_SAE,
            key_SKE,
            value_SKE,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(reach, 0 if causal else reach),
            enable_gqa=query_SAE.shape[1] != key_SKE.shape[1],
        )
        return attended_SAE.unsqueeze(0), None
    return _attend_each(query_1ASE, key_1KSE, value_1KSE, cu_seq_lens_q, scaling, reach, causal=causal), None


def _attend_each(
    query_1ASE: Any, key_1KSE: Any, value_1KSE: Any, bounds: Any, scaling: float | None, reach: int, *, causal: bool
) -> Any:
    """The same by plain attention on one chunk after the other: the reference."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    edges = bounds.tolist()
    attended = []
    for start, end in pairwise(edges):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if reach >= 0:
            seen &= distance.abs() <= reach
        if causal:
            seen &= distance >= 0
        attended.append(
            scaled_dot_product_attention(
                query_1ASE[:, :, start:end],
                key_1KSE[:, :, start:end],
                value_1KSE[:, :, start:end],
                attn_mask=seen,
                scale=scaling,
                enable_gqa=query_1ASE.shape[1] != key_1KSE.shape[1],
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


def first_position(transformer: Any) -> int:
    """Position of a chunk's first token: families that learned from RoBERTa start behind the padding index."""
    import torch

    for module in transformer.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), torch.nn.Embedding):
            return padding + 1
    return 0


def pack(ids_B: list[NDArray[np.int64]], position: int) -> dict[str, NDArray[Any]]:
    """Ids and positions (1, S), int64, of chunks laid end to end, and their bounds (B + 1,), int32."""
    lengths_B = np.array([len(ids) for ids in ids_B])
    bounds = np.zeros(len(ids_B) + 1, dtype=np.int32)
    np.cumsum(lengths_B, out=bounds[1:])
    positions_S = np.arange(bounds[-1], dtype=np.int64) - np.repeat(bounds[:-1], lengths_B) + position
    return {"input_ids": np.concatenate(ids_B)[None], "position_ids": positions_S[None], "cu_seq_lens_q": bounds}
