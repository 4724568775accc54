"""The recipe that Shoal replaces, a pandas UDF around SentenceTransformer.encode: the opponent in `shoal bench`."""

from collections.abc import Callable, Iterator

import pandas as pd


def make_naive(folder: str, threads: int) -> Callable[[Iterator[pd.Series]], Iterator[pd.Series]]:
    """The function of a scalar-iterator pandas UDF: string in, array<float> out.

    As people write it: loaded once per stream, batches of 32, float32, whatever order and padding `encode` chooses.
    """

    def embed(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        model = SentenceTransformer(
            folder, device="cuda" if torch.cuda.is_available() else "cpu", local_files_only=True
        )
        for texts in batches:
            yield pd.Series(list(model.encode(texts.tolist(), show_progress_bar=False)))

    return embed
