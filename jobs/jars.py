"""Java's part of what Spark lacks: Delta's jars and the connectors of object stores, and where Ivy has put them."""

import importlib.metadata
import os
import pwd
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

NEEDED_BY_DELTA = r"delta-storage|delta-kernel-[a-z]+"
NEEDED_BY_S3 = r"bundle|analyticsaccelerator-s3"
"""Amazon's SDK, and since Hadoop 3.4.2 a reader of theirs."""


HADOOP_AWS = "hadoop-aws"
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
        jars = [_home() / IVY_JARS / name for name in self.files]
        return jars if all(jar.exists() for jar in jars) else []


def delta() -> Artifact:
    """Delta for the installed pyspark and delta-spark."""
    version = importlib.metadata.version("delta-spark")
    spark_minor = ".".join(pyspark.__version__.split(".")[:2])
    per_spark_builds = tuple(int(part) for part in version.split(".")[:2]) >= (4, 1)
    scala = f"_{spark_minor}_2.13" if per_spark_builds else "_2.13"
    return _described("delta-spark", "io.delta", f"delta-spark{scala}", version, NEEDED_BY_DELTA)


def connectors(addresses: Iterable[str], spark_home: str | Path | None = None) -> list[Artifact]:
    """What Spark needs beside its own jars to reach these places: s3a:// and PostgreSQL so far.

    None where Spark's folder of jars has the connector already. spark_home: the distribution, by default pyspark's.
    """
    named = list(addresses)
    own = Path(spark_home or Path(pyspark.__file__).parent) / "jars"
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
    return [_described(HADOOP_AWS, "org.apache.hadoop", HADOOP_AWS, version, NEEDED_BY_S3)]


def _home() -> Path:
    """The user's folder as Java sees it, whatever HOME says."""
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return Path.home()


def _described(word: str, org: str, name: str, version: str, needed: str) -> Artifact:
    """An artifact, and the jars that it cannot do without, as Ivy has written down when it brought them."""
    described = _home() / IVY_CACHE / org / name / f"ivy-{version}.xml"
    files: list[str] = []
    if described.exists():
        pattern = rf'<dependency org="([^"]+)" name="({needed})" rev="([^"]+)"'
        found = re.findall(pattern, described.read_text(encoding="utf-8"))
        files = [f"{org}_{name}-{version}.jar", *(f"{of}_{part}-{rev}.jar" for of, part, rev in found)]
    return Artifact(word, f"{org}:{name}:{version}", tuple(files))


def delta_jars() -> list[Path]:
    """Delta's jars on this machine, fetched as for any session if need be; RunError where they cannot be."""
    return delta().fetched() or [jar for jar in fetch([delta()]) if jar.name.startswith("io.delta_")]


def fetch(artifacts: Sequence[Artifact]) -> list[Path]:
    """Has Ivy bring the artifacts, and says where their jars have come to; RunError where it cannot."""
    # Another folder of Ivy's, or none yet: a session of a process of its own knows.
    code = (
        "import sys; from pyspark.sql import SparkSession; builder = SparkSession.builder.master('local[1]'); "
        "builder.config('spark.jars.packages', sys.argv[1]).config('spark.jars.excludes', sys.argv[2]); "
        "builder.config('spark.ui.enabled', 'false').config('spark.driver.bindAddress', '127.0.0.1'); "
        "builder.config('spark.driver.host', '127.0.0.1'); "
        "print(builder.getOrCreate().sparkContext.getConf().get('spark.jars'))"
    )
    coordinates = ",".join(artifact.coordinates for artifact in artifacts)
    call = [sys.executable, "-c", code, coordinates, JARS_OF_SPARK]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(
            f"{coordinates} could not be had ({(done.stderr.strip().splitlines() or ['no answer'])[-1]}); the network, "
            "or Ivy's settings for a mirror, have to reach a Maven repository",
            code="SPARK_UNAVAILABLE",
        )
    return [Path(jar.removeprefix("file://")) for jar in done.stdout.strip().splitlines()[-1].split(",")]


def main() -> None:
    """Fetches what sessions on the places named on the command line need beside Delta, unless it is there."""
    missing = [artifact for artifact in connectors(sys.argv[1:]) if not artifact.fetched()]
    if missing:
        fetch(missing)


if __name__ == "__main__":
    main()
