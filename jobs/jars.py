"""Java's part of what Spark lacks: Delta's jars and the connectors of object stores, and where Ivy has put them."""

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyspark

from shoal.conf.database import POSTGRESQL
from shoal.conf.errors import RunError

# These artifacts drag in dozens of jars that Spark carries already, some of them older.
JARS_OF_SPARK = (
    "org.apache.spark:*,org.scala-lang:*,org.slf4j:*,org.apache.logging.log4j:*,org.antlr:*,org.apache.parquet:*,"
    "org.roaringbitmap:*,org.apache.hadoop:hadoop-common,org.apache.hadoop:hadoop-client*,com.fasterxml.jackson*:*,"
    "com.google.code.findbugs:*,commons-*:*,javax*:*,jakarta*:*,io.netty:*,io.dropwizard*:*,io.airlift:*,"
    "io.unitycatalog:*,net.*:*"
)

# Where Spark's Ivy puts what it has fetched, unless spark.jars.ivy says otherwise.
IVY_JARS, IVY_CACHE = ".ivy2.5.2/jars", ".ivy2.5.2/cache"

NEEDED_BY_S3 = re.compile(r'<dependency org="([^"]+)" name="(bundle|analyticsaccelerator-s3)" rev="([^"]+)"')
"""What hadoop-aws cannot do without, as Ivy describes it: Amazon's SDK, and since Hadoop 3.4.2 a reader of theirs."""


POSTGRESQL_DRIVER = "42.7.7"


@dataclass(frozen=True)
class Artifact:
    """Something for the class path: its Maven coordinates, and what its jars are called where Ivy puts them.

    word: what a property has in it where this is there already. files: none where Ivy would have to say it first.
    """

    word: str
    coordinates: str
    files: tuple[str, ...]

    def fetched(self) -> list[Path]:
        """Its jars where Ivy has put them; none where one is missing."""
        jars = [Path.home() / IVY_JARS / name for name in self.files]
        return jars if all(jar.exists() for jar in jars) else []


def delta() -> Artifact:
    """Delta for the installed pyspark and delta-spark."""
    version = importlib.metadata.version("delta-spark")
    spark_minor = ".".join(pyspark.__version__.split(".")[:2])
    per_spark_builds = tuple(int(part) for part in version.split(".")[:2]) >= (4, 1)
    scala = f"_{spark_minor}_2.13" if per_spark_builds else "_2.13"
    names = [f"delta-spark{scala}", "delta-storage"]
    if per_spark_builds:
        names += ["delta-kernel-api", "delta-kernel-defaults", "delta-kernel-unitycatalog"]
    jars = tuple(f"io.delta_{name}-{version}.jar" for name in names)
    return Artifact("delta-spark", f"io.delta:delta-spark{scala}:{version}", jars)


def connectors(addresses: Iterable[str], spark_home: Path | None = None) -> list[Artifact]:
    """What Spark needs beside its own jars to reach these places: s3a:// and PostgreSQL so far.

    None where Spark's folder of jars has the connector already. spark_home: the distribution, by default pyspark's.
    """
    named = list(addresses)
    own = (spark_home or Path(pyspark.__file__).parent) / "jars"
    found = []
    if any("s3a://" in address for address in named):
        found += _of_s3(own)
    if any(address.startswith(POSTGRESQL) for address in named) and not any(own.glob("postgresql-*.jar")):
        jar = f"org.postgresql_postgresql-{POSTGRESQL_DRIVER}.jar"
        found.append(Artifact("postgresql", f"org.postgresql:postgresql:{POSTGRESQL_DRIVER}", (jar,)))
    return found


def _of_s3(own: Path) -> list[Artifact]:
    """Hadoop's connector, of one version with Spark's Hadoop."""
    hadoop = next(own.glob("hadoop-client-api-*.jar"), None)
    if hadoop is None or any(own.glob("hadoop-aws-*.jar")):
        return []
    version = hadoop.stem.removeprefix("hadoop-client-api-")
    described = Path.home() / IVY_CACHE / f"org.apache.hadoop/hadoop-aws/ivy-{version}.xml"
    files: list[str] = []
    if described.exists():
        needed = NEEDED_BY_S3.findall(described.read_text(encoding="utf-8"))
        files = [f"{org}_{name}-{rev}.jar" for org, name, rev in needed]
        files.append(f"org.apache.hadoop_hadoop-aws-{version}.jar")
    return [Artifact("hadoop-aws", f"org.apache.hadoop:hadoop-aws:{version}", tuple(files))]


def delta_jars() -> list[Path]:
    """Delta's jars on this machine, fetched as for any session if need be; RunError where they cannot be."""
    return delta().fetched() or [jar for jar in fetch(()) if jar.name.startswith("io.delta_")]


def fetch(places: Sequence[str]) -> list[Path]:
    """What Ivy brings to this machine for a session that works on the places; RunError where it cannot."""
    # Another folder of Ivy's, or none yet: a session of its own process says where they have come to.
    code = (
        "import sys; from shoal.conf.run import SparkConfig; from shoal.jobs.session import open_spark; "
        "spark = open_spark(SparkConfig(master='local[1]'), app_name='shoal jars', places=sys.argv[1:]); "
        "print(spark.sparkContext.getConf().get('spark.jars') or '')"
    )
    done = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(
            f"jars from Maven could not be had ({(done.stderr.strip().splitlines() or ['no answer'])[-1]}); the "
            "network, or Ivy's settings for a mirror, have to reach a Maven repository",
            code="SPARK_UNAVAILABLE",
        )
    found = (done.stdout.strip().splitlines() or [""])[-1]
    return [Path(jar.removeprefix("file://")) for jar in found.split(",") if jar]


def main() -> None:
    """Fetches the connectors of the places named on the command line, for sessions to come."""
    fetch(sys.argv[1:])


if __name__ == "__main__":
    main()
