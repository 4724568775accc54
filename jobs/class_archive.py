"""`make jars`: fetches Delta's jars and puts the Java classes of a session into an archive that the JVM maps.

Without it every command reads and checks thousands of classes anew; see Java's class data sharing.
"""

import logging
import os
import tempfile

from pyspark import SparkContext
from pyspark.sql import SparkSession

from shoal.conf.run import SparkConfig
from shoal.jobs.jars import delta_jars
from shoal.jobs.session import CLASS_ARCHIVE, open_spark

logger = logging.getLogger(__name__)


def main() -> None:
    """Writes CLASS_ARCHIVE; a JVM that cannot write one only starts more slowly. RunError without Delta's jars."""
    CLASS_ARCHIVE.unlink(missing_ok=True)
    delta_jars()
    given = os.environ.get("SPARK_SUBMIT_OPTS", "")
    os.environ["SPARK_SUBMIT_OPTS"] = f'{given} -XX:ArchiveClassesAtExit="{CLASS_ARCHIVE}"'
    spark = open_spark(SparkConfig(master="local[1]"), app_name="shoal jars")
    process = SparkContext._gateway.proc  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        _use(spark, f"{folder}/table")
        spark.stop()
    # The JVM ends with its standard input, and writes the archive then.
    process.stdin.close()
    process.wait()
    if not CLASS_ARCHIVE.exists():
        logger.warning("this JVM has written no class archive to %s; sessions start without", CLASS_ARCHIVE)


def _use(spark: SparkSession, path: str) -> None:
    """What every run does, so that the classes for it are there."""
    table = f"delta.`{path}`"
    rows = "SELECT id, CAST(id AS STRING) AS text, array(CAST(id AS FLOAT)) AS vector FROM range(10)"
    spark.sql(f"CREATE TABLE {table} USING delta AS {rows}")
    spark.sql(
        f"MERGE INTO {table} t USING ({rows} WHERE id > 5) s ON t.id = s.id WHEN MATCHED THEN UPDATE SET t.text = '' "
        "WHEN NOT MATCHED BY SOURCE THEN DELETE"
    )
    spark.sql(f"DESCRIBE HISTORY {table}").collect()
    spark.sql(f"SELECT *, row_number() OVER (ORDER BY id) FROM {table} JOIN range(3) USING (id)").toArrow()


if __name__ == "__main__":
    main()
