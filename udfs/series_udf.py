"""The feeding loop as a pandas UDF, for people's own DataFrames and SQL."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from shoal.udfs.encode_udf import Task, worker_encoder
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_spec import Backend, EncoderSpec, Precision
from shoal.udfs.feeding import encode_windows

if TYPE_CHECKING:
    from shoal.udfs.encoder import Encoded


def embed_udf(
    model: str | Path | EncoderSpec,
    *,
    precision: Precision = "float32",
    backend: Literal["auto", "torch", "openvino"] = "torch",
    options: EncodeOptions | None = None,
) -> Callable[..., Any]:
    """A pandas UDF from string to array<float>: NULL, and any text without a vector, gives NULL.

    `model` is a folder that every worker can read, or a described encoder, whose own precision and back end then hold
    ("auto" becomes float32 and torch: nothing here remembers what another worker settled on). The encoder is loaded
    once per Python worker. ModelError for a folder that cannot be used.

        embed = embed_udf("models/minilm")
        frame.select("id", embed("text").alias("embedding"))
        spark.udf.register("embed", embed)   # SELECT embed(text) FROM docs
    """
    from pyspark.sql.functions import pandas_udf
    from pyspark.sql.types import ArrayType, FloatType

    spec = settled_spec(model, precision, backend)
    chosen = options or EncodeOptions()

    def embed(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        return embed_series(batches, spec, chosen)

    # Annotations are text here, and Spark wants types to tell the kind of UDF from.
    embed.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}
    return pandas_udf(ArrayType(FloatType()))(embed)  # type: ignore[call-overload]


def settled_spec(
    model: str | Path | EncoderSpec, precision: Precision, backend: Literal["auto", "torch", "openvino"]
) -> EncoderSpec:
    """The described encoder with nothing left to "auto"."""
    if isinstance(model, EncoderSpec):
        spec = model
    else:
        from shoal.conf.run import EncoderConfig
        from shoal.udfs.checkpoint import describe_checkpoint

        folder = str(Path(model).resolve())
        spec = describe_checkpoint(EncoderConfig(model=folder, precision=precision, backend=backend), folder)
    backends: dict[str, Backend] = {"sentence_transformers": "torch", "hash": "numpy"}
    return dataclasses.replace(
        spec,
        precision="float32" if spec.precision == "auto" else spec.precision,
        backend=backends[spec.kind] if spec.backend == "auto" else spec.backend,
    )


def embed_series(batches: Iterator[pd.Series], spec: EncoderSpec, options: EncodeOptions) -> Iterator[pd.Series]:
    """Series of float32 arrays, or None, for series of texts; builds the encoder at the first batch."""
    first = next(batches, None)
    if first is None:
        return
    encoder = worker_encoder(spec, Task.current(options), options)
    present: list[pd.Series] = []

    def read() -> Iterator[list[str]]:
        for batch in _chain(first, batches):
            present.append(batch.notna() & (batch.fillna("").str.strip() != ""))
            yield [str(text) for text in batch[present[-1]]]

    for encoded in encode_windows(encoder, read()):
        yield _series(encoded, present.pop(0))


def _series(encoded: Encoded, present: pd.Series) -> pd.Series:
    vectors = pd.Series([None] * len(present), index=present.index, dtype=object)
    usable = [error is None for error in encoded.errors_N]
    rows = np.flatnonzero(present.to_numpy())
    for row, vector, good in zip(rows, encoded.vectors_ND, usable, strict=True):
        if good:
            vectors.iat[int(row)] = vector
    return vectors


def _chain(first: pd.Series, rest: Iterator[pd.Series]) -> Iterator[pd.Series]:
    yield first
    yield from rest
