"""Where a run is submitted to: the settings of a target file, and the rules of the cluster managers behind them."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from shoal.conf.section import (
    FreeEntries,
    Memory,
    NestedEntries,
    Section,
    SettingProblem,
    Text,
    property_problems,
    raise_all,
)

SCHEMES = {"standalone": "spark://", "kubernetes": "k8s://", "connect": "sc://"}
"""What the master of a kind starts with."""

ENCODERS_PER_GPU = "spark.shoal.encodersPerGpu"
"""The Spark property of Shoal's own that says how many tasks encode on one GPU at the same time."""

OWN_SETTINGS = {
    "spark.master": "master",
    "spark.submit.deployMode": "deploy_mode",
    "spark.driver.memory": "driver_memory",
    "spark.pyspark.python": "python",
    "spark.kubernetes.container.image": "image",
    "spark.executor.resource.gpu.amount": "gpus",
    ENCODERS_PER_GPU: "encoders_per_gpu",
}
"""Spark properties that a target has a setting for."""


OF_THE_SERVER = ("spark_home", "python", "environment", "gpus", "driver_memory", "conf")
"""What a client of Spark Connect has no say in."""

OF_DATABRICKS = ("cluster", "new_cluster")
NOT_OF_DATABRICKS = ("master", *OF_THE_SERVER)
"""What a cluster of Databricks has from its own description."""


class TargetConfig(Section):
    """A cluster, and how what a run needs gets there."""

    kind: Literal["local", "standalone", "yarn", "kubernetes", "databricks", "connect"] = Field(
        description="What manages the cluster; `connect`: whatever is behind a server of Spark Connect."
    )
    master: Text | None = Field(
        default=None,
        description="`spark://HOST:PORT`, `k8s://https://HOST:PORT` or `sc://HOST:PORT`; unset: `local[*]` or `yarn`.",
    )
    deploy_mode: Literal["client", "cluster"] = Field(
        default="client",
        description="Where the driver runs: on this machine, or inside YARN or Kubernetes.",
    )
    spark_home: Text | None = Field(
        default=None,
        description="The Spark whose `spark-submit` is called; unset: SPARK_HOME, else the installed pyspark.",
    )
    python: Text | None = Field(
        default=None,
        description="Python of the workers, at this path on every node, with Shoal's packages; unset: this one.",
    )
    environment: Text | None = Field(
        default=None,
        description="Packed Python environment, sent to all nodes: `.pex`, or `.tar.gz` of venv-pack or conda-pack.",
    )
    image: Text | None = Field(
        default=None,
        description="Kubernetes: the image of driver and executors, with Spark, Python and Shoal's packages.",
    )
    model: Literal["send", "shared"] = Field(
        default="send",
        description="Whether the encoder's files are sent to each node, or are found there under the driver's path.",
    )
    gpus: PositiveInt | None = Field(
        default=None,
        description="GPUs of each executor: encoding has a task for each, and all other work uses every core.",
    )
    encoders_per_gpu: PositiveInt = Field(
        default=1, description="Tasks that encode on one GPU at the same time, each with a copy of the model."
    )
    driver_memory: Memory | None = Field(default=None, description="Memory of the driver.")
    cluster: Text | None = Field(default=None, description="Databricks: the id of a cluster that is there.")
    new_cluster: NestedEntries | None = Field(
        default=None,
        description="Databricks: a cluster made for each run, as the Jobs API describes one; `spark_version`, "
        "`node_type_id`, `num_workers` ..",
    )
    packages: Literal["install", "there"] = Field(
        default="install",
        description="Databricks: whether each run installs Shoal's packages, or the cluster's image has them.",
    )
    conf: FreeEntries = Field(default_factory=dict, description="More Spark properties, by their full names.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        scheme = SCHEMES.get(self.kind)
        if scheme and not (self.master or "").startswith(scheme):
            problems.append(SettingProblem((("master",),), f"the master of kind {self.kind} starts with {scheme}"))
        if self.kind == "local" and not (self.master or "local").startswith("local"):
            problems.append(SettingProblem((("kind",), ("master",)), "the master of kind local starts with local"))
        if self.kind == "yarn" and self.master not in (None, "yarn"):
            problems.append(
                SettingProblem((("master",),), "YARN is found by HADOOP_CONF_DIR, and its master is always yarn")
            )
        if self.deploy_mode == "cluster" and self.kind not in ("yarn", "kubernetes"):
            advice = f"Spark runs a Python driver inside YARN and Kubernetes only; with kind {self.kind} use client"
            problems.append(SettingProblem((("deploy_mode",),), advice))
        if self.python and self.environment:
            problems.append(
                SettingProblem(
                    (("python",), ("environment",)), "a packed environment brings its Python; keep one of them"
                )
            )
        if self.kind == "connect" and (given := [name for name in OF_THE_SERVER if getattr(self, name)]):
            advice = "the server of Spark Connect was started with its own; what a session may set is in the run file"
            problems.append(SettingProblem(tuple((name,) for name in given), advice))
        of_databricks = [name for name in OF_DATABRICKS if getattr(self, name)]
        if self.kind == "databricks":
            if given := [name for name in NOT_OF_DATABRICKS if getattr(self, name)]:
                advice = "a cluster of Databricks has its own; Spark's properties go into new_cluster.spark_conf"
                problems.append(SettingProblem(tuple((name,) for name in given), advice))
            if len(of_databricks) != 1:
                advice = "name a cluster that is there, or describe a new one"
                problems.append(SettingProblem(tuple((name,) for name in OF_DATABRICKS), advice))
        elif of_databricks:
            settings = (("kind",), *((name,) for name in of_databricks))
            problems.append(SettingProblem(settings, "only kind databricks has clusters by id or description"))
        if self.kind == "local" and self.gpus:
            advice = "a local master hands out no GPUs; name the GPU of this machine by encode.device of the run file"
            problems.append(SettingProblem((("kind",), ("gpus",)), advice))
        if self.encoders_per_gpu > 1 and not self.gpus:
            problems.append(SettingProblem((("encoders_per_gpu",),), "say with gpus how many an executor has"))
        if (self.image is not None) is not (self.kind == "kubernetes"):
            advice = "Kubernetes needs an image with Spark, Python and Shoal's packages, and only Kubernetes takes one"
            problems.append(SettingProblem((("kind",), ("image",)), advice))
        raise_all(problems + property_problems(self.conf, OWN_SETTINGS))
        return self

    @property
    def address(self) -> str:
        """The master that Spark is told."""
        return self.master or {"local": "local[*]"}.get(self.kind, self.kind)
