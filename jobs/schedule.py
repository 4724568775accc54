"""`shoal schedule`: what a platform team copies to run a file every night, with retries by exit code and no overlap.

What all schedules keep to is in `schedule_rules.py`; that of Databricks is a folder, by `databricks_bundle.py`. Nothing
here talks to a scheduler.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from shoal.conf import roots
from shoal.conf.loader import SHIPPED_TARGETS, load_target
from shoal.conf.run import RunConfig
from shoal.conf.section import Section
from shoal.jobs.remote import require_absolute
from shoal.jobs.schedule_rules import (
    LONGEST_HOURS,
    NOT_AGAIN,
    RETRY_MINUTES,
    dns_name,
    hour_and_minute,
    named_variables,
    split_variables,
    variables_of_kind,
)


@dataclass(frozen=True)
class Job:
    """What is run: `shoal` with these arguments, at hour:minute of every day.

    variables: what the command wants of its environment; secrets: the names of those whose values stand nowhere here.
    files: what it reads besides, by their keys in a ConfigMap. image: what a pod runs. executors_call: whether other
    pods must reach this one.
    """

    name: str
    arguments: tuple[str, ...]
    folder: str
    hour: int
    minute: int
    variables: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    image: str = "IMAGE"
    executors_call: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        """The call on this machine, for schedulers with another PATH."""
        return (str(Path(sys.executable).with_name("shoal")), *self.arguments)


def schedule(kind: str, file: Path, config: RunConfig, at: str, target: str | None, overrides: Sequence[str]) -> str:
    """The text for one of KINDS, with the variables of this environment that the run will want.

    ConfigError for a time that is none, a variable that is not set, and a pod that would lose what it writes.
    """
    hour, minute = hour_and_minute(at)
    path = file.absolute()
    files = {path.name: path}
    names = named_variables([path.read_text(encoding="utf-8-sig")], overrides) | {roots.VARIABLE}
    sections: list[Section] = [config]
    verb = ["embed", str(path)]
    image, calls = "IMAGE", False
    if target is not None:
        found = load_target(target)
        sections.append(found)
        shipped = SHIPPED_TARGETS / f"{target}.yaml"
        if not shipped.is_file():
            target = str(Path(target).absolute())
            name = Path(target).name
            files[f"target-{name}" if name == path.name else name] = Path(target)
        text = (shipped if shipped.is_file() else Path(target)).read_text(encoding="utf-8-sig")
        names |= named_variables([text]) | variables_of_kind(found.kind, in_pod=kind == "kubernetes")
        verb = ["submit", str(path), "--target", target]
        image, calls = found.image or image, found.kind == "kubernetes" and found.deploy_mode == "client"
    elif kind != "kubernetes":
        names |= variables_of_kind("local", in_pod=False)
    if kind == "kubernetes":
        require_absolute(config)
    variables, secrets = split_variables(names, sections)
    if config.source.database and (password := config.source.database.password_env):
        variables.pop(password, None)
        secrets = tuple(sorted({*secrets, password}))
    packed = variables.get("SHOAL_ENVIRONMENT", "")
    if Path(packed).is_file():
        # A target that Shoal brings takes it from the working directory, which will be another.
        variables["SHOAL_ENVIRONMENT"] = str(Path(packed).absolute())
    arguments = (*verb, *(word for text in overrides for word in ("--set", text)))
    folder = str(path.parent)
    return KINDS[kind](Job(config.name, arguments, folder, hour, minute, variables, secrets, files, image, calls))


def cron(job: Job) -> str:
    """Lines of a crontab: one run at a time, ended after LONGEST_HOURS, a second try, a log, mail of a failure."""
    run = shlex.join(job.command)
    script = f"{run}; code=$?; [ $code -eq 1 ] || exit $code; sleep {RETRY_MINUTES * 60}; {run}"
    lock, log = (shlex.quote(f"{prefix}shoal-{job.name}{suffix}") for prefix, suffix in ((".", ".lock"), ("", ".log")))
    held = f"flock -n -E 4 {lock} timeout {LONGEST_HOURS}h sh -c {shlex.quote(script)}"
    secrets = f".shoal-{job.name}.env"
    sourced = f"set -a && . {shlex.quote(f'./{secrets}')} && set +a && " if job.secrets else ""
    told = shlex.quote(f"shoal {job.name} failed; the end of its log says why: {job.folder}/shoal-{job.name}.log")
    line = (
        f"cd {shlex.quote(job.folder)} && {sourced}{held} >> {log} 2>&1 "
        f"|| {{ code=$?; [ $code -eq 4 ] || echo {told}; exit $code; }}"
    )
    notes = ["# crontab -e; cron mails what a line prints, and this one prints when a run failed: name who gets it."]
    if job.secrets:
        notes.append(f"# {job.folder}/{secrets}, of mode 600, has a line NAME='value' for {', '.join(job.secrets)}.")
    given = [_cron_variable(name, value) for name, value in job.variables.items()]
    # cron takes a bare % for the end of the line.
    job_line = f"{job.minute} {job.hour} * * * {line.replace('%', chr(92) + '%')}"
    return "\n".join([*notes, "MAILTO=root", *given, job_line, ""])


def _cron_variable(name: str, value: str) -> str:
    quote = "'" if '"' in value else '"'
    return f"{name}={quote}{value}{quote}"


def systemd(job: Job) -> str:
    """A service, its timer, and what a failure starts; systemd starts no second one while the first runs."""
    words = " ".join(_unit_word(word) for word in job.command)
    codes = " ".join(map(str, (*NOT_AGAIN, 4)))
    lines = [f"Environment={_quoted(f'{name}={value}')}" for name, value in job.variables.items()]
    if job.secrets:
        names = ", ".join(job.secrets)
        lines += [f"# Of mode 600, with a line NAME=value for {names}.", f"EnvironmentFile=/etc/shoal/{job.name}.env"]
    variables = "".join(f"{line}\n" for line in lines)
    return f"""\
# /etc/systemd/system/shoal-{job.name}.service
[Unit]
Description=Shoal: {job.name}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec={LONGEST_HOURS}h
StartLimitBurst=2
OnFailure=shoal-{job.name}-failed.service

[Service]
Type=oneshot
WorkingDirectory={job.folder.replace("%", "%%")}
{variables}ExecStart={words}
TimeoutStartSec={LONGEST_HOURS}h
Restart=on-failure
RestartSec={RETRY_MINUTES}min
RestartPreventExitStatus={codes}
SuccessExitStatus=4

# /etc/systemd/system/shoal-{job.name}.timer
# then: systemctl enable --now shoal-{job.name}.timer
[Unit]
Description=Shoal: {job.name}, every night

[Timer]
OnCalendar=*-*-* {job.hour:02}:{job.minute:02}:00
Persistent=true

[Install]
WantedBy=timers.target

# /etc/systemd/system/shoal-{job.name}-failed.service
# It writes an error into the journal; call here what tells somebody.
[Unit]
Description=Shoal: {job.name} has failed

[Service]
Type=oneshot
ExecStart=/bin/sh -c "echo 'shoal {job.name} has failed' | systemd-cat -t shoal-{job.name} -p err"
"""


def airflow(job: Job) -> str:
    """A DAG file for Airflow 3; the task runs where the worker has Shoal and the run file."""
    secrets = f"# The worker's own environment has {', '.join(job.secrets)}.\n" if job.secrets else ""
    return f'''\
"""Shoal: {job.name}, every night; rendered by `shoal schedule --for airflow`."""

import logging
import os
import subprocess
from datetime import datetime, timedelta

from airflow.sdk import dag, task

try:
    from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
except ImportError:  # the first releases of Airflow 3
    from airflow.exceptions import AirflowFailException, AirflowSkipException

COMMAND = {json.dumps(list(job.command), indent=4, ensure_ascii=False)}
{secrets}ENVIRONMENT = {json.dumps(dict(job.variables), indent=4, ensure_ascii=False)}


def alert(context):
    # Writes an error into Airflow's log; call here what tells somebody.
    logging.getLogger("shoal").error("%s failed: %s", context.get("task_instance"), context.get("exception"))


@dag(
    dag_id={json.dumps(f"shoal_{job.name}")},
    schedule="{job.minute} {job.hour} * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    tags=["shoal"],
)
def shoal_nightly():
    @task(
        retries=1,
        retry_delay=timedelta(minutes={RETRY_MINUTES}),
        execution_timeout=timedelta(hours={LONGEST_HOURS}),
        on_failure_callback=alert,
    )
    def embed():
        environment = {{**os.environ, **ENVIRONMENT}}
        code = subprocess.run(COMMAND, cwd={json.dumps(job.folder)}, env=environment, check=False).returncode
        if code == 4:
            raise AirflowSkipException("another run holds the table")
        if code in {NOT_AGAIN}:
            raise AirflowFailException(f"exit code {{code}}: the log says what somebody has to decide or mend")
        if code:
            raise RuntimeError(f"exit code {{code}}: it may pass by itself")

    embed()


shoal_nightly()
'''


def kubernetes(job: Job) -> str:
    """A CronJob whose pod is the driver; image, account and the volume with the run file are the cluster's own."""
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": "shoal", "operator": "In", "values": [*NOT_AGAIN, 4]}}
    ]
    name = dns_name(job.name)
    env: list[dict[str, Any]] = [{"name": each, "value": value} for each, value in job.variables.items()]
    env += [{"name": each, "valueFrom": {"secretKeyRef": {"name": name, "key": each}}} for each in job.secrets]
    if job.executors_call:
        for each in ("SPARK_LOCAL_IP", "SPARK_LOCAL_HOSTNAME"):
            env.append({"name": each, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    mounts = [
        {"name": "files", "mountPath": str(path), "subPath": key, "readOnly": True} for key, path in job.files.items()
    ]
    labels = {"app": "shoal", "run": name}
    container = {
        "name": "shoal",
        "image": job.image,
        "command": ["shoal", *job.arguments],
        "workingDir": job.folder,
        "env": env,
        "volumeMounts": [{"name": "work", "mountPath": job.folder}, *mounts],
    }
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": "spark",
        "containers": [container],
        "volumes": [{"name": "work", "emptyDir": {}}, {"name": "files", "configMap": {"name": name}}],
    }
    batch = {
        "backoffLimit": 1,
        "activeDeadlineSeconds": LONGEST_HOURS * 3600,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }
    document = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "schedule": f"{job.minute} {job.hour} * * *",
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3600,
            "jobTemplate": {"metadata": {"labels": labels.copy()}, "spec": batch},
        },
    }
    given = " ".join(shlex.quote(f"--from-file={key}={path}") for key, path in job.files.items())
    notes = [f"kubectl create configmap {name} {given}"]
    if job.secrets:
        notes.append(f"kubectl create secret generic {name} --from-env-file=FILE  (with {', '.join(job.secrets)})")
    notes += [
        "The image and serviceAccountName are your cluster's; with --target kubernetes the pod is the driver.",
        f'An alert, with kube-state-metrics: kube_job_status_failed{{job_name=~"{name}-.*"}} > 0',
    ]
    return "".join(f"# {note}\n" for note in notes) + _yaml(document)


KINDS: Final[Mapping[str, Callable[[Job], str]]] = {
    "airflow": airflow,
    "cron": cron,
    "kubernetes": kubernetes,
    "systemd": systemd,
}


def _yaml(document: Any) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=120)


def _unit_word(word: str) -> str:
    """A word of ExecStart: systemd reads %, $ and quotes in its own way."""
    quoted = _quoted(word).replace("$", "$$")
    return quoted if re.search(r"[\s\"'\\;]", word) else quoted[1:-1]


def _quoted(text: str) -> str:
    """Text in quotes of systemd; a $ stays, which only commands read."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
