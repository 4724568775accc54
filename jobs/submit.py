"""`shoal submit`: a verb on a cluster, with everything of Shoal's that the cluster needs."""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import pyspark

from shoal.conf.errors import RunError
from shoal.conf.loader import SHIPPED_TARGETS
from shoal.conf.run import RunConfig
from shoal.conf.target import ENCODERS_PER_GPU, TargetConfig
from shoal.jobs.encoder_tasks import GPUS
from shoal.jobs.jars import HADOOP_AWS, JARS_OF_SPARK, connectors, delta
from shoal.jobs.model_files import SHARED
from shoal.jobs.remote import ADDRESS, require_absolute, without_token
from shoal.jobs.session import DRIVER_LOG, SUBMITTED, logs_json
from shoal.jobs.shoal_zip import pack_shoal

ENVIRONMENT = "environment"
"""Where Spark unpacks a packed environment, below the working folder of an executor and of a driver in the cluster."""

ENTRY = "import sys\n\nfrom shoal.jobs.cli import main\n\nsys.exit(main())\n"
ZIP, SCRIPT, PROPERTIES = "shoal.zip", "shoal_submit.py", "spark.conf"
ZIP_PROPERTY = "spark.submit.pyFiles"
DISCOVERY, VENDOR = "spark.executor.resource.gpu.discoveryScript", "spark.executor.resource.gpu.vendor"
DISCOVERY_SCRIPT = SHIPPED_TARGETS / "discover_gpus.sh"
LISTS = ("spark.archives", "spark.files", "spark.jars", "spark.jars.excludes", "spark.jars.packages")


class Composed(Protocol):
    """A verb on a target, of which nothing has been done yet."""

    def document(self) -> dict[str, object]:
        """What `--dry-run --json` prints."""

    def lines(self) -> list[str]:
        """The same for people."""

    def run(self, say: Callable[[str], None]) -> int:
        """Has it done, and returns the exit code of the verb."""


@dataclass(frozen=True)
class Submission:
    """A verb on a cluster, out of a folder made for it, which holds Shoal as a zip, Spark's properties, and a script.

    properties: what Spark is told, but for the zip; shown: the same with secrets masked. arguments: of `shoal`. inside:
    whether spark-submit has the cluster run the script; else the driver is a process of ours, and starts Spark itself,
    because spark-submit mixes what a driver writes to stdout and stderr. python: of the workers.
    """

    spark_home: str
    properties: Mapping[str, str]
    shown: Mapping[str, str]
    arguments: tuple[str, ...]
    inside: bool
    python: str

    def command(self, folder: str) -> list[str]:
        """The call, when the files are in `folder`."""
        if not self.inside:
            return _driver(self.arguments)
        return [self._spark_submit, *_options(folder), f"{folder}/{SCRIPT}", *self.arguments]

    def variables(self, folder: str) -> dict[str, str]:
        """What the environment of the call has more than ours."""
        found = {"SPARK_HOME": self.spark_home}
        if not self.inside:
            given = shlex.join([*_options(folder), "pyspark-shell"])
            found |= {SUBMITTED: "1", "PYSPARK_PYTHON": self.python, "PYSPARK_SUBMIT_ARGS": given}
            found |= {DRIVER_LOG: "json"} if logs_json(self.properties) else {}
        return found

    def document(self) -> dict[str, object]:
        """What `--dry-run --json` prints; nothing has been done, so the files have no folder yet."""
        return {
            "status": "composed",
            "command": self.command("."),
            "environment": self.variables("."),
            "properties": dict(self.shown),
        }

    def lines(self) -> list[str]:
        """The same for people."""
        width = max(map(len, self.shown))
        told = [f"{name:{width}}  {value}" for name, value in sorted(self.shown.items())]
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables(".").items()]
        call = " ".join([*variables, shlex.join(self.command("."))])
        return [f"# {PROPERTIES}, made for each submission beside {ZIP}", *told, "", call]

    def run(self, say: Callable[[str], None]) -> int:
        """Submits, waits, and returns the driver's exit code; its output is ours. RunError without a spark-submit."""
        if not Path(self._spark_submit).is_file():
            raise RunError(
                f"'{self._spark_submit}' is not there; spark_home of the target, or SPARK_HOME, names the folder of a "
                "Spark distribution",
                code="SPARK_UNAVAILABLE",
            )
        with tempfile.TemporaryDirectory(prefix="shoal-submit-") as made:
            folder = Path(made)
            pack_shoal(folder / ZIP)
            if self.inside:
                (folder / SCRIPT).write_text(ENTRY, encoding="utf-8")
            properties = {**self.properties, ZIP_PROPERTY: str(folder / ZIP)}
            told = "".join(f"{_escaped(name)}={_escaped(value)}\n" for name, value in properties.items())
            (folder / PROPERTIES).write_text(told, encoding="utf-8")
            say(f"submitting to {self.properties['spark.master']}")
            return _called(self.command(made), self.variables(made))

    @property
    def _spark_submit(self) -> str:
        return str(Path(self.spark_home) / "bin" / "spark-submit")


@dataclass(frozen=True)
class RemoteCall:
    """A verb on a server of Spark Connect: the driver is a process of ours, whose environment has the address."""

    address: str
    arguments: tuple[str, ...]

    def document(self) -> dict[str, object]:
        """What `--dry-run --json` prints; a token in the address is left out."""
        return {"status": "composed", "command": self._command, "environment": {ADDRESS: self._shown}, "properties": {}}

    def lines(self) -> list[str]:
        """The same for people."""
        return [f"{ADDRESS}={shlex.quote(self._shown)} {shlex.join(self._command)}"]

    def run(self, say: Callable[[str], None]) -> int:
        """Waits for the driver, whose output is ours, and returns its exit code."""
        say(f"submitting to {self._shown}")
        return _called(self._command, {ADDRESS: self.address})

    @property
    def _command(self) -> list[str]:
        return _driver(self.arguments)

    @property
    def _shown(self) -> str:
        return without_token(self.address)


def _driver(arguments: Sequence[str]) -> list[str]:
    """The call of a driver that is a process of ours."""
    return [sys.executable, "-m", "shoal.jobs.cli", *arguments]


def _called(command: Sequence[str], variables: Mapping[str, str]) -> int:
    """The exit code of a call with more variables than ours, and without one that would name another server."""
    kept = {name: value for name, value in os.environ.items() if name != ADDRESS}
    process = subprocess.Popen(command, env={**kept, **variables})
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _options(folder: str) -> list[str]:
    return ["--properties-file", f"{folder}/{PROPERTIES}", "--load-spark-defaults"]


def compose(target: TargetConfig, verb: str, file: Path, config: RunConfig, arguments: Sequence[str] = ()) -> Composed:
    """The call that runs `shoal VERB FILE ARGUMENTS` on the target.

    What the target sets wins over the run file's section `spark`. Raises ConfigError where the driver, inside the
    cluster, would not find what the run file names.
    """
    if target.kind == "databricks":
        # Their client takes more than a second to import.
        from shoal.jobs.databricks_submit import composed_run

        require_absolute(config)
        return composed_run(target, verb, file, config, arguments)
    if target.kind == "connect":
        given = [verb, str(file.absolute()), *arguments, *_given_up(config, target)]
        if target.model == "shared":
            given += ["--set", f"spark.conf.{SHARED}=shared"]
        return RemoteCall(target.address, tuple(given))
    inside = target.deploy_mode == "cluster"
    if inside:
        require_absolute(config)
    packed = _packed(target.environment) if target.environment else None
    python = packed.python if packed else target.python
    properties = {
        "spark.master": target.address,
        "spark.submit.deployMode": target.deploy_mode,
        "spark.app.name": f"shoal {verb} {config.name}",
    }
    python = python or ("python3" if inside else sys.executable)
    if inside:
        properties |= {"spark.pyspark.python": python, "spark.log.level": "WARN"}
    memory = target.driver_memory or config.spark.driver_memory
    if memory:
        properties["spark.driver.memory"] = memory
    if packed:
        properties[packed.sent_by] = packed.told
    if target.image:
        properties["spark.kubernetes.container.image"] = target.image
    if target.gpus:
        properties = _with(properties, _gpu_properties(target, target.gpus))
    if target.model == "shared":
        properties[SHARED] = "shared"
    spark_home = target.spark_home or os.environ.get("SPARK_HOME") or str(Path(pyspark.__file__).parent)
    properties |= _jar_properties(target, config, Path(spark_home), inside=inside)
    if inside:
        properties = _with(properties, {"spark.files": str(file.absolute())})
    arguments = [verb, file.name if inside else str(file.absolute()), *arguments, *_given_up(config, target)]
    return Submission(
        spark_home=spark_home,
        properties=_with(properties, target.conf),
        shown=_with(properties | {ZIP_PROPERTY: ZIP}, target.redacted()["conf"]),
        arguments=tuple(arguments),
        inside=inside,
        python=python,
    )


class _Packed(NamedTuple):
    """A packed environment: the property that has Spark send it, what that says, and its Python on a node."""

    sent_by: str
    told: str
    python: str


def _packed(path: str) -> _Packed:
    """One file of pex is a Python by itself; an archive is unpacked first."""
    if path.endswith(".pex"):
        return _Packed("spark.files", path, f"./{path.rpartition('/')[2]}")
    return _Packed("spark.archives", f"{path}#{ENVIRONMENT}", f"./{ENVIRONMENT}/bin/python")


def _jar_properties(target: TargetConfig, config: RunConfig, spark_home: Path, *, inside: bool) -> dict[str, str]:
    """Delta, and connectors; that of S3 only where no image or distribution of a platform brings its own."""
    brings_its_own = target.kind not in ("local", "standalone")
    wanted = [delta(), *connectors(config.places, spark_home)]
    wanted = [artifact for artifact in wanted if artifact.word != HADOOP_AWS or not brings_its_own]
    given = " ".join(target.conf.get(name, "") for name in LISTS)
    jars: list[str] = []
    packages: list[str] = []
    for artifact in wanted:
        if artifact.word not in given:
            fetched = [] if inside else artifact.fetched()
            jars += map(str, fetched)
            packages += [] if fetched else [artifact.coordinates]
    properties = {"spark.jars": ",".join(jars)} if jars else {}
    if packages:
        properties |= {"spark.jars.packages": ",".join(packages), "spark.jars.excludes": JARS_OF_SPARK}
    return properties


def _gpu_properties(target: TargetConfig, num_gpus: int) -> dict[str, str]:
    """What asks for executors with GPUs; a standalone worker has been told how to find its own when it was started."""
    properties = {GPUS: str(num_gpus), ENCODERS_PER_GPU: str(target.encoders_per_gpu)}
    if target.kind == "yarn":
        properties |= {DISCOVERY: f"./{DISCOVERY_SCRIPT.name}", "spark.files": str(DISCOVERY_SCRIPT)}
    elif target.kind == "kubernetes":
        # Every image that Spark's own tool builds has this one.
        properties |= {DISCOVERY: "/opt/spark/examples/src/main/scripts/getGpusResources.sh", VENDOR: "nvidia.com"}
    return properties


def _with(properties: Mapping[str, str], conf: Mapping[str, str]) -> dict[str, str]:
    """The properties with those of the target, which win but for lists: these take both."""
    both = {name: f"{properties[name]},{conf[name]}" for name in LISTS if name in properties and name in conf}
    return {**properties, **conf, **both}


def _given_up(config: RunConfig, target: TargetConfig) -> list[str]:
    """Overrides that take out of the run file what the target decides."""
    names = [name for name in ("master", "remote", "driver_memory") if getattr(config.spark, name) is not None]
    names += [f"conf.{name}" for name in config.spark.conf if name in target.conf]
    return [word for name in names for word in ("--set", f"spark.{name}=null")]


def _escaped(text: str) -> str:
    """Text as java.util.Properties reads it."""
    text = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return text.replace("=", "\\=").replace(":", "\\:").replace("#", "\\#").replace("!", "\\!").replace(" ", "\\ ")
