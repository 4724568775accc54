"""The Spark adapter of queries: `shoal_embed(table, text)` in SQL, with a few encoders and vectors kept by each worker.

Axes: N rows of a batch, D vector elements.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shoal.conf.errors import ConfigError, ModelError
from shoal.conf.run import EncoderConfig
from shoal.udfs.checkpoint import describe_checkpoint
from shoal.udfs.encode_udf import Task, prepare_worker
from shoal.udfs.encoder import EncodeOptions, Encoder, build_encoder
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.feeding import encode_windows
from shoal.udfs.sent_model import with_files_here

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

MAX_ENCODERS: Final = 4
"""Encoders that one worker holds; one more, and the one that was asked longest ago goes."""

MAX_VECTORS: Final = 1024
"""Query vectors that one worker remembers."""

_ENCODERS: Final[OrderedDict[tuple[EncoderSpec, str], Encoder]] = OrderedDict()
_VECTORS: Final[OrderedDict[tuple[EncoderSpec, str], NDArray[Any]]] = OrderedDict()


@dataclass(frozen=True, slots=True)
class QueryEncoder:
    """What a worker builds a query encoder from; `settings` tell it how to see that the files are still the same."""

    spec: EncoderSpec
    settings: EncoderConfig


def query_udf(encoders: Mapping[str, QueryEncoder | str]) -> Callable[..., Any]:
    """A pandas UDF (name string, text string) -> array<float> for the encoders of these names.

    A text is encoded once per batch and worker, whatever the number of rows that have it. The query raises ConfigError
    for a NULL or blank text, an unknown name, a text that cannot be encoded and, with the text that stands in the place
    of an encoder, for one that could not be described; ModelError when its files have changed since.
    """
    import pandas as pd
    from pyspark.sql.functions import pandas_udf
    from pyspark.sql.types import ArrayType, FloatType

    known = dict(encoders)

    def shoal_embed(batches: Iterator[tuple[pd.Series, pd.Series]]) -> Iterator[pd.Series]:
        return embed_queries(batches, known)

    # Annotations are text here, and Spark wants types to tell the kind of UDF from.
    shoal_embed.__annotations__ = {
        "batches": Iterator[tuple[pd.Series, pd.Series]],
        "return": Iterator[pd.Series],
    }
    return pandas_udf(ArrayType(FloatType()))(shoal_embed)  # type: ignore[call-overload]


def embed_queries(
    batches: Iterator[tuple[pd.Series, pd.Series]], encoders: Mapping[str, QueryEncoder | str]
) -> Iterator[pd.Series]:
    """Series of float32 arrays (D,) for series of names and texts."""
    import pandas as pd

    for names, texts in batches:
        rows = [_checked(name, text, encoders) for name, text in zip(names, texts, strict=True)]
        found = {name: _vectors_of(encoders[name], [t for n, t in rows if n == name]) for name in {n for n, _ in rows}}
        yield pd.Series([found[name][text] for name, text in rows], index=texts.index, dtype=object)


def _checked(name: Any, text: Any, encoders: Mapping[str, QueryEncoder | str]) -> tuple[str, str]:
    if not isinstance(name, str) or name not in encoders:
        tables = ", ".join(repr(known) for known in sorted(encoders) if "@" not in known) or "none"
        raise ConfigError(
            f"shoal_embed: {name!r} is no table that is served here; name one of {tables}", code="QUERY_INVALID"
        )
    if not isinstance(text, str) or not text.strip():
        found = "blank" if isinstance(text, str) else "NULL"
        raise ConfigError(
            f"shoal_embed: the text for {name!r} is {found}; write what to look for", code="QUERY_INVALID"
        )
    return name, text


def _vectors_of(encoder: QueryEncoder | str, texts: list[str]) -> dict[str, NDArray[Any]]:
    """The vector of each different text; the model sees only those that this worker does not remember."""
    if isinstance(encoder, str):
        raise ConfigError(f"shoal_embed: {encoder}", code="MODEL_UNUSABLE")
    found: dict[str, NDArray[Any]] = {}
    missing = []
    for text in dict.fromkeys(texts):
        held = _VECTORS.get((encoder.spec, text))
        if held is None:
            missing.append(text)
        else:
            _VECTORS.move_to_end((encoder.spec, text))
            found[text] = held
    if missing:
        for encoded in encode_windows(_encoder_of(encoder), iter([missing])):
            for text, vector_D, error in zip(missing, encoded.vectors_ND, encoded.errors_N, strict=True):
                if error is not None:
                    raise ConfigError(
                        f"the query '{text[:80]}' cannot be encoded: {error}; shorten it", code="QUERY_INVALID"
                    )
                found[text] = _VECTORS[encoder.spec, text] = vector_D.copy()
        while len(_VECTORS) > MAX_VECTORS:
            _VECTORS.popitem(last=False)
    return found


def _encoder_of(wanted: QueryEncoder) -> Encoder:
    """The worker's encoder, built from files that are still those that were described."""
    options = EncodeOptions(role="query")
    task = Task.current(options)
    key = (wanted.spec, task.device)
    if key not in _ENCODERS:
        while len(_ENCODERS) >= MAX_ENCODERS:
            _ENCODERS.popitem(last=False)
            gc.collect()
        spec = with_files_here(wanted.spec)
        _require_same_files(spec, wanted.settings)
        _ENCODERS[key] = build_encoder(spec, task.device, prepare_worker(task, options))
    _ENCODERS.move_to_end(key)
    return _ENCODERS[key]


def _require_same_files(spec: EncoderSpec, settings: EncoderConfig) -> None:
    if spec.kind == "hash":
        return
    now = describe_checkpoint(settings, spec.folder)
    digests = ("weights_digest", "tokenizer_digest", "modules_digest")
    changed = [name.partition("_")[0] for name in digests if getattr(now, name) != getattr(spec, name)]
    if changed:
        raise ModelError(
            f"encoder {spec.reference!r}: its {', '.join(changed)} have changed since the table was made; put the "
            "former files back, a query vector of another encoder would find nothing sensible",
            code="MODEL_CHANGED",
        )
