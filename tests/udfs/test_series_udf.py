import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, FloatType

import shoal.udfs
from shoal.udfs.encoder import EncodeOptions, build_encoder
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.series_udf import embed_series, embed_udf, settled_spec
from shoal.udfs.vectors import cosines

Build = Callable[..., Path]
Describe = Callable[..., EncoderSpec]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def test_it_is_found_at_the_top_of_the_package() -> None:
    assert shoal.udfs.embed_udf is embed_udf
    with pytest.raises(AttributeError, match="no attribute 'embed'"):
        _ = shoal.udfs.embed  # type: ignore[attr-defined]


def test_it_is_an_iterator_udf_that_returns_float_arrays(make_checkpoint: Build) -> None:
    udf = embed_udf(make_checkpoint())
    assert udf.returnType == ArrayType(FloatType())  # type: ignore[attr-defined]
    from pyspark.util import PythonEvalType

    assert udf.evalType == PythonEvalType.SQL_SCALAR_PANDAS_ITER_UDF  # type: ignore[attr-defined]


def test_series_come_back_in_order_with_null_for_null_and_blank(
    make_checkpoint: Build, describe: Describe, texts: list[str]
) -> None:
    spec = describe(make_checkpoint())
    series = [pd.Series([*texts[:3], None, " "], index=[9, 7, 5, 3, 1]), pd.Series([None]), pd.Series(texts[3:])]
    out = list(embed_series(iter(series), spec, EncodeOptions()))
    assert [list(part.index) for part in out] == [list(part.index) for part in series]
    flat = [vector for part in out for vector in part]
    assert [vector is None for vector in flat] == [False] * 3 + [True] * 3 + [False] * (len(texts) - 3)
    vectors_ND = np.stack([vector for vector in flat if vector is not None])
    expected = build_encoder(spec, "cpu", EncodeOptions()).encode(texts).vectors_ND
    assert vectors_ND.dtype == np.float32
    assert cosines(vectors_ND, expected).min() >= 1 - 1e-6


def test_no_batches_build_no_encoder(make_checkpoint: Build, describe: Describe) -> None:
    spec = dataclasses.replace(describe(make_checkpoint()), folder="no/such/folder")
    assert list(embed_series(iter([]), spec, EncodeOptions())) == []


def test_nothing_is_left_to_auto(make_checkpoint: Build, describe: Describe) -> None:
    folder = make_checkpoint()
    spec = settled_spec(describe(folder, precision="auto", backend="auto"), "bfloat16", "openvino")
    assert (spec.precision, spec.backend) == ("float32", "torch")
    assert settled_spec(folder, "bfloat16", "torch").precision == "bfloat16"


@pytest.mark.spark
def test_a_dataframe_and_sql_get_the_encoders_vectors(
    spark: SparkSession, make_checkpoint: Build, describe: Describe, texts: list[str]
) -> None:
    embed = embed_udf(make_checkpoint())
    spark.udf.register("embed_text", embed)
    frame = spark.createDataFrame([*enumerate(texts), (len(texts), None)], "id int, body string")

    by_frame = frame.select("id", embed("body").alias("v")).orderBy("id").collect()
    frame.createOrReplaceTempView("bodies")
    by_sql = spark.sql("SELECT id, embed_text(body) AS v FROM bodies ORDER BY id").collect()

    assert by_frame[-1]["v"] is None
    assert by_sql[-1]["v"] is None
    expected = build_encoder(settled_spec(make_checkpoint(), "float32", "torch"), "cpu", EncodeOptions()).encode(texts)
    for rows in (by_frame, by_sql):
        vectors_ND = np.array([row["v"] for row in rows[:-1]], dtype=np.float32)
        assert cosines(vectors_ND, expected.vectors_ND).min() >= 1 - 1e-6
