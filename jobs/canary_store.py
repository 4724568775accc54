"""The canaries table: for each encoder the vectors of the fixed texts, as they were when it was first used."""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.jobs.layout import TableRef, is_delta, read_delta
from shoal.udfs.canaries import Canaries
from shoal.udfs.encoder_spec import EncoderSpec

CANARIES_DDL = "fingerprint string, backend string, report string, vectors binary, probed_at timestamp"


@dataclass(frozen=True)
class Probe:
    """What one executor found about an encoder: `report` as make_probe gives it, and the canaries' vectors."""

    report: dict[str, Any]
    canaries: Canaries


def load_probe(spark: SparkSession, ref: TableRef, fingerprint: str) -> Probe | None:
    """The first probe of this encoder on this table, None when it was never used here."""
    if not is_delta(spark, ref.canaries):
        return None
    rows = (
        read_delta(spark, ref.canaries)
        .where(F.col("fingerprint") == fingerprint)
        .orderBy("probed_at")
        .limit(1)
        .collect()
    )
    return probe_of(fingerprint, rows[0]["report"], rows[0]["vectors"]) if rows else None


def known_precision(spark: SparkSession, ref: TableRef, spec: EncoderSpec) -> tuple[str, str] | None:
    """Precision and back end that an earlier run settled for this encoder, before it could publish a table."""
    if not is_delta(spark, ref.canaries):
        return None
    for row in read_delta(spark, ref.canaries).orderBy("probed_at").select("fingerprint", "report").collect():
        told = json.loads(row["report"])
        settled = replace(spec, precision=told["precision"], backend=told["backend"])
        if settled.fingerprint == row["fingerprint"] and spec.precision in ("auto", settled.precision):
            return settled.precision, settled.backend
    return None


def save_probe(spark: SparkSession, ref: TableRef, fingerprint: str, backend: str, probe: Probe) -> None:
    """Adds the probe; a second run that does the same at once adds a row that is never read."""
    row = [
        (
            fingerprint,
            backend,
            json.dumps(probe.report, sort_keys=True),
            probe.canaries.vectors_CD.astype("<f4").tobytes(),
        )
    ]
    (
        spark.createDataFrame(row, "fingerprint string, backend string, report string, vectors binary")
        .withColumn("probed_at", F.current_timestamp())
        .coalesce(1)
        .write.format("delta")
        .mode("append")
        .save(ref.canaries)
    )


def probe_of(fingerprint: str, report: str, vectors: bytes) -> Probe:
    """A probe from the columns that make_probe yields: JSON text and little-endian float32 bytes."""
    told = json.loads(report)
    vectors_CD = np.frombuffer(vectors, dtype="<f4").reshape(-1, int(told["dim"]))
    return Probe(told, Canaries(fingerprint=fingerprint, vectors_CD=vectors_CD))
