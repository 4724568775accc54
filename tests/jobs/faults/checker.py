"""The long-lived session beside the runs: changes the source, plays somebody else, and looks at what is published."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from nights import Chunk, Night, rebuilt
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.run import SparkConfig
from shoal.jobs.session import open_spark

MIN_COSINE = 1 - 1e-6
SOURCE_DDL = "id string, body string, label string"

QUICK = {
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.shuffle.partitions": "2",
}
"""For many small queries that run once: compiling their plans would cost more than it saves."""


@dataclass(frozen=True)
class Content:
    """What readers see: rows by key, vectors by key, and how many rows were there more than once."""

    chunks: dict[str, Chunk]
    vectors: dict[str, npt.NDArray[np.float32]]
    num_doubled: int


@dataclass(frozen=True)
class Difference:
    """How a table differs from a rebuild; all zero when it does not."""

    lost: int
    doubled: int
    foreign: int
    wrong: int

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.foreign or self.wrong)


class Checker:
    """Knows one folder with `source` and `docs`, both Delta tables."""

    def __init__(self, folder: Path, encode: Any, count_tokens: Any = None) -> None:
        self.folder, self.encode, self.count_tokens = folder, encode, count_tokens
        self.source, self.docs, self.sidecar = folder / "source", folder / "docs", folder / "docs__shoal"
        self.spark: SparkSession = open_spark(
            SparkConfig(master="local[1]", driver_memory="1g", conf=QUICK),
            app_name="faults checker",
            log_file=folder / "checker.log",
        )

    def write(self, night: Night) -> None:
        """Brings the source to what a night leaves behind, then does what somebody else does that night."""
        rows = [(key, body, label, False) for key, (body, label) in night.upserts.items()]
        rows += [(key, None, None, True) for key in night.deletes]
        frame = self.spark.createDataFrame(rows, f"{SOURCE_DDL}, gone boolean").coalesce(1)
        if night.number == 0:
            writer = frame.drop("gone").write.format("delta").option("delta.enableChangeDataFeed", "true")
            writer.save(str(self.source))
            return
        if night.event == "source rewritten":
            whole = [(key, body, label) for key, (body, label) in sorted(night.rows.items())]
            self.spark.createDataFrame(whole, SOURCE_DDL).coalesce(1).write.format("delta").mode("overwrite").save(
                str(self.source)
            )
        else:
            frame.createOrReplaceTempView("night")
            self.spark.sql(
                f"MERGE INTO delta.`{self.source}` s USING night n ON s.id = n.id WHEN MATCHED AND n.gone THEN DELETE "
                "WHEN MATCHED THEN UPDATE SET body = n.body, label = n.label "
                "WHEN NOT MATCHED AND NOT n.gone THEN INSERT (id, body, label) VALUES (n.id, n.body, n.label)"
            )
        if night.event == "optimize":
            self.spark.sql(f"OPTIMIZE delta.`{self.docs}`")
        if night.event == "foreign append":
            self.append_foreign()

    def append_foreign(self) -> None:
        """A row that no source has, written by somebody who goes round Shoal."""
        docs = self.spark.read.format("delta").load(str(self.docs))
        row = docs.where("embedding IS NOT NULL").limit(1).withColumn("id", F.lit("foreign"))
        row.write.format("delta").mode("append").save(str(self.docs))

    def read(self) -> Content | None:
        """The published table, None before there is one."""
        if not (self.docs / "_delta_log").is_dir() or not any((self.docs / "_delta_log").glob("*.json")):
            return None
        rows = self.spark.read.format("delta").load(str(self.docs)).collect()
        chunks, vectors = {}, {}
        for row in rows:
            chunk = row.asDict()
            vector = chunk.pop("embedding")
            chunk.pop("embedded_at")
            chunks[row["id"]] = {key: bytes(value) if isinstance(value, bytearray) else value
                                 for key, value in chunk.items()}  # fmt: skip
            if vector is not None:
                vectors[row["id"]] = np.array(vector, dtype=np.float32)
        return Content(chunks, vectors, len(rows) - len(chunks))

    def compare(self, found: Content | None, rows: dict[str, Any]) -> Difference:
        """Every column but the vector must be equal to a rebuild of these rows, vectors by their cosine."""
        wanted = rebuilt(rows, count_tokens=self.count_tokens)
        if found is None:
            return Difference(len(wanted), 0, 0, 0)
        lost, foreign = wanted.keys() - found.chunks.keys(), found.chunks.keys() - wanted.keys()
        wrong = {key for key in wanted.keys() & found.chunks.keys() if wanted[key] != found.chunks[key]}
        good = sorted(key for key in wanted.keys() & found.chunks.keys() if wanted[key]["error"] is None)
        wrong |= {key for key in good if key not in found.vectors}
        good = [key for key in good if key in found.vectors]
        if good:
            want_ND = self.encode([wanted[key]["text"] for key in good])
            have_ND = np.stack([found.vectors[key] for key in good])
            scale_N = np.linalg.norm(want_ND, axis=1) * np.linalg.norm(have_ND, axis=1)
            cosines_N = (want_ND.astype(np.float64) * have_ND).sum(axis=1) / scale_N
            wrong |= {key for key, cosine in zip(good, cosines_N, strict=True) if not cosine >= MIN_COSINE}
        return Difference(len(lost), found.num_doubled, len(foreign), len(wrong))

    def staged(self) -> dict[str, int]:
        """Rows of staging by run id."""
        path = self.sidecar / "staging"
        if not (path / "_delta_log").is_dir():
            return {}
        rows = self.spark.read.format("delta").load(str(path)).groupBy("run_id").count().collect()
        return {row["run_id"]: row["count"] for row in rows}

    def waves_of(self, run_id: str) -> dict[int, int]:
        """Contents per wave of a run that has planned, out of the work tables that it left behind."""
        todo = self.sidecar / "work" / run_id / "todo"
        return {
            int(wave.name.removeprefix("wave=")): sum(
                pq.read_metadata(file).num_rows for file in wave.glob("*.parquet")
            )
            for wave in todo.glob("wave=*")
        }

    def dead_run(self) -> str | None:
        """Who left the lease behind."""
        lease = self.sidecar / "lease.json"
        text = lease.read_text() if lease.exists() else ""
        return str(json.loads(text)["run_id"]) if text.strip() else None

    def runs(self) -> list[str]:
        """The run ids written down as runs, one for each entry."""
        runs = self.spark.read.format("delta").load(str(self.sidecar / "runs")).where("kind = 'run'")
        return [row["run_id"] for row in runs.select("run_id").collect()]

    def stop(self) -> None:
        self.spark.stop()
