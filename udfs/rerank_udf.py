"""The Spark adapter of reranking: `shoal_rerank(folder, query, text)`, the score that a cross-encoder gives the two.

Each worker keeps the models that it has loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from shoal.conf.errors import ModelError
from shoal.udfs.encode_udf import Task, prepare_worker
from shoal.udfs.encoder import EncodeOptions

if TYPE_CHECKING:
    import pandas as pd

MAX_RERANKERS: Final = 2
"""Cross-encoders that one worker holds."""


def rerank_udf() -> Callable[..., Any]:
    """A pandas UDF (folder string, query string, text string) -> float: the score, by the model's own activation.

    ModelError for a folder that sentence-transformers cannot load as a CrossEncoder from safetensors.
    """
    import pandas as pd
    from pyspark.sql.functions import pandas_udf
    from pyspark.sql.types import FloatType

    def shoal_rerank(folders: pd.Series, queries: pd.Series, texts: pd.Series) -> pd.Series:
        return rerank_series(folders, queries, texts)

    # Annotations are text here, and Spark wants types to tell the kind of UDF from.
    shoal_rerank.__annotations__ = dict.fromkeys(("folders", "queries", "texts", "return"), pd.Series)
    return pandas_udf(FloatType())(shoal_rerank)  # type: ignore[call-overload]


def rerank_series(folders: pd.Series, queries: pd.Series, texts: pd.Series) -> pd.Series:
    """Series of float scores for series of folders, queries and texts; None where query or text is."""
    import pandas as pd

    found = pd.Series([None] * len(texts), index=texts.index, dtype=object)
    whole = queries.notna() & texts.notna()
    for folder in folders[whole].unique():
        rows = whole & (folders == folder)
        pairs = list(zip(queries[rows], texts[rows], strict=True))
        task = Task.current(EncodeOptions())
        scores = cross_encoder(folder, task.device).predict(pairs, show_progress_bar=False)
        if scores.ndim > 1:
            raise ModelError(
                f"reranker {folder!r} gives {scores.shape[1]} numbers for a pair and a ranking needs one; choose a "
                "cross-encoder with one label",
                code="MODEL_UNUSABLE",
            )
        found[rows] = scores.astype(float)
    return found


@lru_cache(maxsize=MAX_RERANKERS)
def cross_encoder(folder: str, device: str) -> Any:
    """The model of a folder, from safetensors alone and without the network."""
    import torch
    from sentence_transformers import CrossEncoder

    options = prepare_worker(Task.current(EncodeOptions()), EncodeOptions())
    torch.set_num_threads(options.threads or 1)
    try:
        return CrossEncoder(folder, device=device, local_files_only=True, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"reranker {folder!r} could not be loaded ({type(error).__name__}: {error}); check it with "
            "sentence-transformers' CrossEncoder",
            code="MODEL_UNUSABLE",
        ) from error
