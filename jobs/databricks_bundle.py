"""`shoal schedule --for databricks`: a Declarative Automation Bundle, a folder that their CLI deploys as a job.

A retry of theirs knows no exit codes, so the task fails only where one helps, and a second task judges the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from shoal.conf.errors import ConfigError, RunError
from shoal.conf.redact import MASK
from shoal.conf.run import RunConfig
from shoal.conf.target import TargetConfig
from shoal.jobs.databricks_job import (
    NOTEBOOK,
    NOTEBOOK_SOURCE,
    ZIP,
    arguments_of,
    cluster_of,
    libraries_of,
    run_task,
    verdict_task,
)
from shoal.jobs.remote import require_absolute
from shoal.jobs.schedule_rules import LONGEST_HOURS, RETRY_MINUTES, dns_name, hour_and_minute
from shoal.jobs.shoal_zip import pack_shoal

FILE: Final = "databricks.yml"
_ROOT: Final = "${workspace.file_path}"
_ABOUT: Final = """\
# `databricks bundle deploy` from this folder, with DATABRICKS_HOST and its token, or --profile; then every night, UTC.
# Where it was made without --target, --var cluster_id=ID names the cluster.
# The folder has Shoal itself and the run file: make it anew when either has changed.
# email_notifications: {on_failure: [you@example.org]} in the job tells somebody; so does on_failure in the run file.
"""


def write_bundle(
    folder: Path, file: Path, config: RunConfig, at: str, target: TargetConfig | None, overrides: Sequence[str]
) -> list[Path]:
    """Makes the folder, and says what is in it; ConfigError for one that is there, and for a target of another kind."""
    if target is not None and target.kind != "databricks":
        raise ConfigError(f"--for databricks wants a target of kind databricks, and this one is of kind {target.kind}")
    more = [word for text in overrides for word in ("--set", text)]
    document = bundle(file, config, at, target or TargetConfig(kind="databricks", cluster="${var.cluster_id}"), more)
    require_absolute(config)
    if target is not None and (plain := list(_from_here(target.redacted()["new_cluster"], target.new_cluster))):
        raise ConfigError(
            f"new_cluster of the target has {', '.join(plain)} from this environment or under a secret's name, and the "
            "bundle would show it to whoever has the folder; write {{secrets/SCOPE/KEY}}, or what is none out"
        )
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"--out '{folder}' is there already; name a new folder") from None
    (folder / FILE).write_text(_ABOUT + yaml.safe_dump(document, sort_keys=False, width=120), encoding="utf-8")
    (folder / f"{NOTEBOOK}.py").write_text(NOTEBOOK_SOURCE, encoding="utf-8")
    (folder / file.name).write_bytes(file.read_bytes())
    pack_shoal(folder / ZIP)
    return sorted(folder.iterdir())


def _from_here(shown: Any, found: Any, place: str = "") -> Iterator[str]:
    """The settings whose values are masked where they are shown, but for references to Databricks' own secrets."""
    if isinstance(found, Mapping):
        for name, value in found.items():
            yield from _from_here(shown[name], value, f"{place}.{name}" if place else name)
    elif isinstance(found, list) and isinstance(shown, list):
        for index, value in enumerate(found):
            yield from _from_here(shown[index], value, f"{place}[{index}]")
    elif shown == MASK and not str(found).startswith("{{secrets/"):
        yield place


def bundle(file: Path, config: RunConfig, at: str, target: TargetConfig, more: Sequence[str]) -> dict[str, Any]:
    """What databricks.yml says: one job, its schedule, its cluster, its two tasks."""
    hour, minute = hour_and_minute(at)
    arguments = arguments_of(target, "embed", file.name, config, more)
    cluster = cluster_of(target)
    clusters = [{"job_cluster_key": "shoal", **cluster}] if target.new_cluster else []
    where = {"job_cluster_key": "shoal"} if clusters else cluster
    notebook = f"./{NOTEBOOK}.py"
    embed = {
        **run_task(notebook, _ROOT, arguments, [RunError.exit_code]),
        **where,
        "libraries": libraries_of(target, config),
        "max_retries": 1,
        "min_retry_interval_millis": RETRY_MINUTES * 60_000,
        "retry_on_timeout": False,
    }
    job = {
        "name": f"shoal {config.name}",
        "schedule": {"quartz_cron_expression": f"0 {minute} {hour} * * ?", "timezone_id": "UTC"},
        "max_concurrent_runs": 1,
        "timeout_seconds": LONGEST_HOURS * 3600,
        "tasks": [embed, {**verdict_task(notebook, _ROOT, arguments[0]), **where}],
    }
    if clusters:
        job["job_clusters"] = clusters
    name = dns_name(config.name)
    document: dict[str, Any] = {"bundle": {"name": name}}
    if target.cluster == "${var.cluster_id}":
        document["variables"] = {"cluster_id": {"description": "The id of a cluster in dedicated access mode."}}
    return {
        **document,
        # What a .gitignore leaves out would not be deployed.
        "sync": {"include": [ZIP, f"{NOTEBOOK}.py", file.name]},
        "resources": {"jobs": {name.replace("-", "_"): job}},
        "targets": {"production": {"default": True}},
    }
