"""`shoal doctor`: visits every executor before anything is encoded there, a line for each, and says what is amiss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.run import RunConfig
from shoal.jobs.canary_store import probe_of
from shoal.jobs.encoder_tasks import encoder_tasks, map_encoders, wait_for_executors
from shoal.jobs.meter import human
from shoal.jobs.prepare import Described, describe_encoders, options_of, worker_error
from shoal.jobs.remote import address_of, is_remote, require_supported, without_java, without_token
from shoal.jobs.session import DYNAMIC
from shoal.udfs.schema import PROBE_OUTPUT_DDL
from shoal.udfs.vectors import MIN_COSINE, cosines
from shoal.udfs.visit_udf import make_visit


@dataclass(frozen=True)
class Visit:
    """What one executor said: facts as `make_visit` describes them, and its canary vectors (C, D), float32."""

    facts: Mapping[str, Any]
    canaries_CD: npt.NDArray[np.float32]

    @property
    def name(self) -> str:
        """The executor among all."""
        return f"{self.facts['host']}/{self.facts['executor']}"


def doctor(spark: SparkSession, config: RunConfig) -> dict[str, Any]:
    """The document of `--json`: `executors`, a mapping of facts each, `problems`, sentences, and `status`.

    Loads the run file's encoder on every executor. WorkerError, ConfigError or ModelError where an executor could not
    even do that. On Databricks and through Spark Connect it knows of no executor that was not visited.
    """
    require_supported(spark, config)
    described = describe_encoders(config).serving
    remote = is_remote(spark)
    num_executors = 0 if without_java(spark) else wait_for_executors(spark)
    visits = visit(spark, config, described)
    problems = problems_of(visits, num_executors)
    return {
        "status": "unfit" if problems else "fit",
        "master": without_token(address_of(config.spark) or "") if remote else spark.sparkContext.master,
        "slots": encoder_tasks(spark).slots,
        "executors": [{"name": each.name, **each.facts} for each in visits],
        "problems": problems,
    }


def visit(spark: SparkSession, config: RunConfig, described: Described) -> list[Visit]:
    """One visit for each executor that has a free slot, in the order of their names."""
    spec = described.spec
    look = make_visit(spec, described.settings, options_of(config))
    num_slots = encoder_tasks(spark).slots
    # A barrier starts all tasks at once, so that no executor does the work of another; it needs every slot free, and
    # Spark has none where executors come and go. What the slots behind Spark Connect are is a guess.
    barrier = spark.conf.get(DYNAMIC, "false") != "true" and not without_java(spark)
    try:
        each_slot = spark.range(0, num_slots, 1, num_slots)
        rows = map_encoders(each_slot, spec, look, PROBE_OUTPUT_DDL, barrier=barrier).collect()
    except (PySparkException, Py4JJavaError) as error:
        raise worker_error(error) from error
    found: dict[str, Visit] = {}
    for row in rows:
        told = probe_of("", row["report"], row["vectors"])
        each = Visit(told.report, told.canaries.vectors_CD)
        found.setdefault(each.name, each)
    return [found[name] for name in sorted(found)]


def problems_of(visits: Sequence[Visit], num_executors: int) -> list[str]:
    """What does not fit together, a sentence each, by the first executor."""
    told = []
    if len(visits) < num_executors:
        told.append(
            f"{num_executors} executors are registered, and {len(visits)} were visited: the others have no free slot, "
            "or are just coming; run it again"
        )
    told += [
        f"{each.name} was given {each.facts['device']}, and torch finds no CUDA device there; it needs NVIDIA's "
        "driver, and a torch that was built for CUDA"
        for each in visits
        if each.facts["device"].startswith("cuda") and each.facts["gpu"] is None
    ]
    first = visits[0]
    for other in visits[1:]:
        for what, advice in SAME.items():
            here, there = _differing(first.facts[what], other.facts[what])
            if here != there:
                told.append(f"{what} is {here} on {first.name} and {there} on {other.name}; {advice}")
        lowest = float(cosines(first.canaries_CD, other.canaries_CD).min())
        limit = MIN_COSINE.get(first.facts["precision"], 1.0)
        if lowest < limit:
            told.append(
                f"the encoder gives other vectors on {other.name} than on {first.name} (lowest cosine {lowest:.6f}, "
                f"allowed {limit:.6f}); look at libraries, driver and device there"
            )
    return told


SAME = {
    "python": "give both the same Python, by `python` or `environment` of the target",
    "shoal": "give both the same Shoal; `shoal submit` sends its own",
    "libraries": "vectors may differ in the last digits; pack one environment for all",
    "model_digest": "one of them has other files; use `model: send` in the target",
    "precision": "they are of different kinds; set encoder.precision",
}
"""What has to be the same on all executors, and what to do where it is not."""


def _differing(here: Any, there: Any) -> tuple[str, str]:
    """Both as text; of mappings what differs."""
    if not isinstance(here, dict):
        return str(here) or "none", str(there) or "none"
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    texts = [
        ", ".join(f"{name} {side[name]}" if name in side else f"no {name}" for name in names) for side in (here, there)
    ]
    return texts[0], texts[1]


def lines(document: Mapping[str, Any]) -> list[str]:
    """The document for people."""
    told = [f"{document['master']}: {len(document['executors'])} executors, {document['slots']} tasks at a time"]
    for facts in document["executors"]:
        gpu = facts["gpu"]
        device = (
            facts["device"] if gpu is None else f"{gpu['name']} {human(gpu['memory_bytes'])}, driver {gpu['driver']}"
        )
        model = facts["model_digest"][:12] or "hash"
        told.append(
            f"{facts['name']}: {facts['cores']} cores, {human(facts['memory_bytes'])} memory, "
            f"{human(facts['free_disk_bytes'])} free disk, {device}, Python {facts['python']}, "
            f"torch {facts['libraries'].get('torch', 'none')}, Shoal {facts['shoal']}, model {model}, "
            f"{facts['backend']} {facts['precision']}, lowest canary cosine {facts['parity']['min']:.6f}"
        )
    return told + [f"problem: {problem}" for problem in document["problems"]]
