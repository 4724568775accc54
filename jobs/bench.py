"""`shoal bench encode`: the naive recipe, the bare encoder and the pipeline on the same texts, in one process tree.

Every arm is timed from its first text to its last vector, loading of the model included (the trial of the encoder has
left the pipeline one loaded worker, as in any first run). Compare the ratios: machines differ and are shared.
"""

import multiprocessing
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import ConfigError
from shoal.conf.run import (
    DestinationConfig,
    EncodeConfig,
    EncoderConfig,
    RunConfig,
    SparkConfig,
    TrackingConfig,
)
from shoal.conf.source import SourceConfig
from shoal.jobs.embed import Hooks, embed
from shoal.jobs.estimate import count_tokens
from shoal.jobs.layout import table_of
from shoal.jobs.prepare import describe_encoders, resolve_encoder
from shoal.jobs.session import open_spark
from shoal.jobs.stdlib_corpus import stdlib_rows
from shoal.udfs.encode_udf import encode_batches
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.naive_udf import make_naive
from shoal.udfs.schema import ENCODE_INPUT

WINDOW = 2048


def bench_encode(model: str, num_texts: int, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens per second of each arm and the ratios between them; the document of `shoal bench encode --json`."""
    texts = mixed_texts(num_texts)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        spark = open_spark(
            SparkConfig(master=f"local[{cores}]", conf={"spark.executorEnv.OMP_NUM_THREADS": "1"}),
            app_name="shoal bench",
        )
        try:
            return _measure(spark, Path(folder), model, texts, cores, say)
        finally:
            spark.stop()


def mixed_texts(count: int) -> list[str]:
    """Distinct texts from a few words to thousands: the standard library's docstrings, then their paragraphs."""
    whole = [row["doc"] for row in stdlib_rows(Path(sysconfig.get_path("stdlib")))]
    parts = [part for text in whole for part in text.split("\n\n") if len(part) > 20]
    found = list(dict.fromkeys(text for text in [*whole, *parts] if text.strip()))
    if count > len(found):
        raise ConfigError(f"--texts is {count}; the standard library has {len(found)} distinct texts, ask for fewer")
    return found[:count]


def _measure(
    spark: SparkSession, folder: Path, model: str, texts: list[str], cores: int, say: Callable[[str], None]
) -> dict[str, Any]:
    # A local master gives its tasks no GPU, and the naive recipe takes one where there is one.
    device = "cuda" if Path("/proc/driver/nvidia").is_dir() else None
    corpus = str(folder / "texts")
    spark.createDataFrame(list(enumerate(texts)), "id long, body string").repartition(cores).write.parquet(corpus)
    config = RunConfig(
        name="bench",
        source=SourceConfig(format="parquet", path=corpus, key=("id",), text="body"),
        encoder=EncoderConfig(model=model),
        destination=DestinationConfig(path=str(folder / "docs")),
        encode=EncodeConfig(device=device),
        tracking=TrackingConfig(enabled=False),
    )
    described, ref = describe_encoders(config).serving, table_of(spark, config.destination)
    spec = resolve_encoder(spark, config, described, ref, None, full_refresh=False, say=say).spec
    tokens = count_tokens(spec, texts)[0]
    seconds: dict[str, float] = {}
    arms: dict[str, Callable[[], float]] = {
        "naive": lambda: _naive(spark, corpus, str(folder / "naive"), spec, cores),
        "bare_processes": lambda: _bare(spec, texts, num_processes=cores, threads=1, device=device),
        "bare_threads": lambda: _bare(spec, texts, num_processes=1, threads=cores, device=device),
        "pipeline": lambda: embed(spark, config, hooks=Hooks()).seconds["encode"],
    }
    for name, run in arms.items():
        seconds[name] = run()
        say(f"{name}: {tokens / seconds[name]:,.0f} tokens/s")
    best_bare = min(seconds["bare_processes"], seconds["bare_threads"])
    return {
        "texts": len(texts),
        "tokens": tokens,
        "cores": cores,
        "encoder": {"model": model, "backend": spec.backend, "precision": spec.precision},
        "tokens_per_second": {name: round(tokens / taken, 1) for name, taken in seconds.items()},
        "ratios": {
            "pipeline_to_naive": round(seconds["naive"] / seconds["pipeline"], 3),
            "pipeline_to_bare": round(best_bare / seconds["pipeline"], 3),
        },
        "min_cosine_to_naive": _min_cosine(spark, str(folder / "naive"), str(folder / "docs")),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    rates, ratios, encoder = found["tokens_per_second"], found["ratios"], found["encoder"]
    return [
        (
            f"{found['texts']:,} texts, {found['tokens']:,} tokens, {found['cores']} cores, {encoder['model']} "
            f"({encoder['backend']}, {encoder['precision']})"
        ),
        *[f"{name:15} {rate:>12,.0f} tokens/s" for name, rate in rates.items()],
        f"pipeline : naive recipe   {ratios['pipeline_to_naive']:.2f}",
        f"pipeline : bare encoder   {ratios['pipeline_to_bare']:.2f}",
        f"lowest cosine between a vector of the pipeline and the naive one: {found['min_cosine_to_naive']:.6f}",
    ]


def _naive(spark: SparkSession, corpus: str, target: str, spec: EncoderSpec, cores: int) -> float:
    """The naive recipe as a job of its own, one thread per Python worker, one partition per core."""
    udf = F.pandas_udf(make_naive(spec.folder, 1), "array<float>")  # type: ignore[call-overload]
    began = time.monotonic()
    rows = spark.read.parquet(corpus).repartition(cores)
    rows.withColumn("embedding", udf("body")).write.format("delta").mode("overwrite").save(target)
    return time.monotonic() - began


def _bare(spec: EncoderSpec, texts: list[str], *, num_processes: int, threads: int, device: str | None) -> float:
    """The encoder in processes of its own, without Spark, texts dealt out evenly."""
    shares = [texts[start::num_processes] for start in range(num_processes)]
    began = time.monotonic()
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = sum(pool.map(_encode_share, repeat(spec), shares, repeat(threads), repeat(device)))
    seconds = time.monotonic() - began
    if done != len(texts):
        raise RuntimeError(f"the bare encoder returned {done} vectors for {len(texts)} texts")
    return seconds


def _encode_share(spec: EncoderSpec, texts: list[str], threads: int, device: str | None) -> int:
    """Runs in a process of its own: the loop of the executors, without executors."""
    batches = encode_batches(_batches(texts), spec, EncodeOptions(threads=threads, device=device))
    return sum(batch.num_rows - batch.column("embedding").null_count for batch in batches)


def _batches(texts: list[str]) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(texts), WINDOW):
        window = texts[start : start + WINDOW]
        yield pa.RecordBatch.from_arrays(
            [pa.array([b""] * len(window), pa.binary()), pa.array(window)], schema=ENCODE_INPUT
        )


def _min_cosine(spark: SparkSession, naive: str, docs: str) -> float:
    left = spark.read.format("delta").load(naive).select("id", F.col("embedding").alias("one"))
    right = spark.read.format("delta").load(docs).select("id", F.col("embedding").alias("other"))
    table = left.join(right, on="id", how="inner").select("one", "other").toArrow()
    one, other = (np.array(table.column(name).to_pylist(), dtype=np.float64) for name in ("one", "other"))
    cosines = (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    return round(float(cosines.min()), 6)
