"""A Delta table of texts that say nothing, with a change feed, and what happens to it before a night; for benches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.run import DestinationConfig, EncoderConfig, LimitsConfig, RunConfig, TrackingConfig
from shoal.conf.source import SourceConfig
from shoal.conf.values import Limit

Changes = Literal["auto", "snapshot"]
Maintenance = Literal["manual", "auto"]

_PARTS = 1_000_000


@dataclass(frozen=True)
class Change:
    """What happens to the source before a night: to which rows, and to what share of them.

    random, and recent (the highest keys): of ten such rows eight get another text, one goes and one comes. metadata:
    random ones get another label. none: nothing.
    """

    which: Literal["none", "random", "recent", "metadata"] = "none"
    share: float = 0.0


@dataclass
class SyntheticSource:
    """The table `source` in a folder: id BIGINT, body (about 200 characters, all distinct) and label STRING."""

    spark: SparkSession
    folder: Path
    num_rows: int

    def __post_init__(self) -> None:
        self.next_key = self.num_rows

    @property
    def path(self) -> str:
        return str(self.folder / "source")

    def create(self) -> None:
        """Writes the rows, in eight files or more."""
        rows = self.spark.range(0, self.num_rows, 1, max(8, self.num_rows // 500_000))
        writer = self._rows(rows.select("id"), "first").write.format("delta")
        writer = writer.option("delta.enableChangeDataFeed", "true")
        writer.option("delta.enableDeletionVectors", "true").save(self.path)

    def apply(self, change: Change, salt: str) -> None:
        """Makes the change in up to three commits; another salt picks other random rows and gives other texts."""
        if change.which == "none":
            return
        table = f"delta.`{self.path}`"
        touched = f"pmod(xxhash64(id, '{salt}'), {_PARTS}) < {int(change.share * _PARTS)}"
        if change.which == "recent":
            touched = f"id >= {self.next_key - int(change.share * self.num_rows)}"
        if change.which == "metadata":
            self.spark.sql(f"UPDATE {table} SET label = '{salt}' WHERE {touched}")
            return
        num_gone = self.spark.sql(f"DELETE FROM {table} WHERE {touched} AND pmod(id, 10) = 3").collect()[0][0]
        hashes = ", ".join(f"sha2(concat_ws('/', '{salt}', '{index}', id), 256)" for index in range(3))
        self.spark.sql(f"UPDATE {table} SET body = concat_ws(' ', {hashes}) WHERE {touched} AND pmod(id, 10) < 9")
        come = self.spark.range(self.next_key, self.next_key + num_gone, 1, 1)
        self._rows(come, salt).write.format("delta").mode("append").save(self.path)
        self.next_key += num_gone

    def run(self, dim: int, *, changes: Changes = "auto", maintenance: Maintenance = "manual") -> RunConfig:
        """A run that publishes this source with the hash encoder, as `docs` in the same folder."""
        source = SourceConfig(
            format="delta", path=self.path, key=("id",), text="body", columns=("label",), changes=changes
        )
        return RunConfig(
            name="synthetic",
            source=source,
            encoder=EncoderConfig(model=f"hash:{dim}"),
            destination=DestinationConfig(path=str(self.folder / "docs")),
            limits=LimitsConfig(max_deleted=Limit(share=1.0)),
            tracking=TrackingConfig(enabled=False),
            maintenance=maintenance,
        )

    def _rows(self, keys: DataFrame, salt: str) -> DataFrame:
        body = F.concat_ws(" ", *[self._hash(salt, index) for index in range(3)])
        return keys.select("id", body.alias("body"), F.lit("new").alias("label"))

    def _hash(self, salt: str, index: int) -> Column:
        return F.sha2(F.concat_ws("/", F.lit(salt), F.lit(str(index)), F.col("id")), 256)
