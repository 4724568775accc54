"""A verb as tasks of a job of Databricks: the notebook that calls Shoal, its parameters, its cluster's libraries."""

import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from databricks.sdk.service.compute import ClusterSpec

from shoal.conf.errors import ConfigError
from shoal.conf.run import RunConfig
from shoal.conf.target import TargetConfig
from shoal.jobs.databricks_task import EXIT_CODE, PARAMETERS
from shoal.jobs.model_files import SHARED
from shoal.jobs.model_source import distribution_of

ZIP: Final = "shoal.zip"
NOTEBOOK: Final = "shoal_task"
NOTEBOOK_SOURCE: Final = f"""\
# Databricks notebook source
import sys

sys.path.insert(0, dbutils.widgets.get("folder") + "/{ZIP}")

from shoal.jobs.databricks_task import run

run(dbutils)
"""

OF_THE_RUNTIME: Final = ("databricks-sdk", "delta-spark", "pyspark")
"""Packages that Databricks has its own of, which nothing may replace."""

_TEXTS: Final = ("spark_conf", "spark_env_vars", "custom_tags")
"""Mappings of a cluster's description whose values are text, whatever YAML took them for."""


def cluster_of(target: TargetConfig) -> dict[str, Any]:
    """The fields of a task that name its cluster; ConfigError for what Databricks' description of one does not have.

    A new one is in dedicated access mode, unless the target says otherwise: shared ones have no GPUs.
    """
    if target.new_cluster is None:
        return {"existing_cluster_id": target.cluster}
    wanted = {"data_security_mode": "SINGLE_USER", **target.new_cluster}
    for name in _TEXTS:
        if isinstance(found := wanted.get(name), Mapping):
            wanted[name] = {each: _as_text(value) for each, value in found.items()}
    try:
        unknown = list(_dropped(wanted, ClusterSpec.from_dict(wanted).as_dict()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"new_cluster of the target is not what Databricks' Jobs API takes ({error})") from error
    if unknown:
        raise ConfigError(
            f"new_cluster of the target has {', '.join(unknown)}, which Databricks' Jobs API does not know or takes in "
            "another form; its page of `clusters/create` lists the fields"
        )
    return {"new_cluster": wanted}


def _dropped(given: Any, kept: Any, place: str = "") -> Iterator[str]:
    """The fields that a description loses on its way through the API's classes; empty ones are none."""
    if isinstance(given, Mapping) and isinstance(kept, Mapping):
        for name, value in given.items():
            if value not in (None, {}, []):
                yield from _dropped(value, kept.get(name), f"{place}.{name}" if place else name)
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for each, other in zip(given, kept, strict=True):
            yield from _dropped(each, other, place)
    elif kept is None or isinstance(given, (Mapping, list)):
        yield place


def libraries_of(target: TargetConfig, config: RunConfig) -> list[dict[str, Any]]:
    """What the cluster installs: what Shoal requires for the run but for Spark and Delta, and what carries its models.

    ConfigError for a model in a package that is not installed here.
    """
    if target.packages == "there":
        return []
    encoders = [each for each in (config.encoder, config.next_encoder) if each]
    extras = ["lineage"] * (config.lineage is not None) + [each.backend for each in encoders]
    wanted = []
    for text in importlib.metadata.requires("shoal") or ():
        package, _, condition = (part.strip() for part in text.partition(";"))
        extra = re.search(r"extra == ['\"](\w+)", condition)
        if (extra is None or extra[1] in extras) and re.split(r"[^\w.-]", package)[0] not in OF_THE_RUNTIME:
            wanted.append(package)
    for each in encoders:
        if each.form == "package":
            module = each.model.removeprefix("package:").split(".")[0]
            carrier = distribution_of(module)
            if carrier is None:
                raise ConfigError(
                    f"encoder.model is {each.model!r}, and no installed package has {module}, so nobody knows what the "
                    "cluster is to install; install it here too, or say packages: there in the target"
                )
            wanted.append(carrier)
    return [{"pypi": {"package": text}} for text in dict.fromkeys(wanted)]


def arguments_of(target: TargetConfig, verb: str, file: str, config: RunConfig, more: Sequence[str]) -> list[str]:
    """What follows `shoal` there; ConfigError for what Databricks would take for a reference of its own."""
    given = [name for name in ("master", "remote", "driver_memory") if getattr(config.spark, name) is not None]
    found = [verb, file, *more, *(word for name in given for word in ("--set", f"spark.{name}=null"))]
    if target.model == "shared":
        found += ["--set", f"spark.conf.{SHARED}=shared"]
    for word in found:
        if "{{" in word or "${" in word:
            raise ConfigError(f"{word!r} would be taken for a reference by Databricks; write it into the run file")
        if re.match(r"on_\w+\.webhook=", word):
            raise ConfigError(
                "--set of a webhook would be a parameter of the job, which all who see the job can read; write "
                "'${NAME}' into the run file, and NAME into spark_env_vars of the cluster"
            )
    return found


def notebook_task(path: str, **given: str) -> dict[str, Any]:
    """A task's field for the notebook at a path; given: those of PARAMETERS that are not empty."""
    return {"notebook_task": {"notebook_path": path, "base_parameters": dict.fromkeys(PARAMETERS, "") | given}}


def run_task(path: str, folder: str, arguments: Sequence[str], fail_with: Sequence[int], outcome: str = "") -> Any:
    """A task that runs Shoal, by the name of its verb; the rest as PARAMETERS says."""
    given = {"folder": folder, "arguments": json.dumps(list(arguments)), "fail_with": json.dumps(list(fail_with))}
    return {"task_key": arguments[0], **notebook_task(path, **given, outcome=outcome)}


def verdict_task(path: str, folder: str, verb: str) -> Any:
    """A task that fails where the one before has ended with an exit code that is a failure, without failing itself."""
    reference = f"{{{{tasks.{verb}.values.{EXIT_CODE}}}}}"
    return {
        "task_key": "verdict",
        "depends_on": [{"task_key": verb}],
        **notebook_task(path, folder=folder, exit_code=reference),
    }


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
