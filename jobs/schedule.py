"""`shoal schedule`: what a platform team copies to run a file every night, with retries by exit code and no overlap.

What all schedules keep to is in `schedule_rules.py`; that of Databricks is a folder, by `databricks_bundle.py`. Nothing
here talks to a scheduler.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from shoal.conf.run import RunConfig
from shoal.jobs.schedule_rules import LONGEST_HOURS, NOT_AGAIN, RETRY_MINUTES, dns_name, hour_and_minute


@dataclass(frozen=True)
class Job:
    """What is run: `shoal` with these arguments, at hour:minute of every day."""

    name: str
    arguments: tuple[str, ...]
    folder: str
    hour: int
    minute: int

    @property
    def command(self) -> tuple[str, ...]:
        """The call on this machine, for schedulers with another PATH."""
        return (str(Path(sys.executable).with_name("shoal")), *self.arguments)


def schedule(kind: str, file: Path, config: RunConfig, at: str, target: str | None, overrides: Sequence[str]) -> str:
    """The text for one of KINDS; ConfigError for a time that is none."""
    hour, minute = hour_and_minute(at)
    path = file.absolute()
    verb = ["embed", str(path)] if target is None else ["submit", str(path), "--target", target]
    arguments = (*verb, *(word for text in overrides for word in ("--set", text)))
    return KINDS[kind](Job(config.name, arguments, str(path.parent), hour, minute))


def cron(job: Job) -> str:
    """A line of a crontab: one run at a time, ended after LONGEST_HOURS, a second try, a log."""
    run = shlex.join(job.command)
    script = f"{run}; code=$?; [ $code -eq 1 ] || exit $code; sleep {RETRY_MINUTES * 60}; {run}"
    lock, log = (shlex.quote(f"{prefix}shoal-{job.name}{suffix}") for prefix, suffix in ((".", ".lock"), ("", ".log")))
    held = f"flock -n -E 4 {lock} timeout {LONGEST_HOURS}h sh -c {shlex.quote(script)}"
    line = f"cd {shlex.quote(job.folder)} && {held} >> {log} 2>&1"
    # cron takes a bare % for the end of the line.
    return (
        "# crontab -e; on_failure in the run file tells somebody, since the output goes to the log.\n"
        f"{job.minute} {job.hour} * * * {line.replace('%', chr(92) + '%')}\n"
    )


def systemd(job: Job) -> str:
    """A service and its timer; systemd starts no second one while the first runs."""
    words = " ".join(_unit_word(word) for word in job.command)
    codes = " ".join(map(str, (*NOT_AGAIN, 4)))
    return f"""\
# /etc/systemd/system/shoal-{job.name}.service
[Unit]
Description=Shoal: {job.name}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec={LONGEST_HOURS}h
StartLimitBurst=2
# OnFailure=alert@%n.service

[Service]
Type=oneshot
WorkingDirectory={job.folder.replace("%", "%%")}
ExecStart={words}
TimeoutStartSec={LONGEST_HOURS}h
Restart=on-failure
RestartSec={RETRY_MINUTES}min
RestartPreventExitStatus={codes}

# /etc/systemd/system/shoal-{job.name}.timer
# then: systemctl enable --now shoal-{job.name}.timer
[Unit]
Description=Shoal: {job.name}, every night

[Timer]
OnCalendar=*-*-* {job.hour:02}:{job.minute:02}:00
Persistent=true

[Install]
WantedBy=timers.target
"""


def airflow(job: Job) -> str:
    """A DAG file for Airflow 3; the task runs where the worker has Shoal and the run file."""
    return f'''\
"""Shoal: {job.name}, every night; rendered by `shoal schedule --for airflow`."""

import subprocess
from datetime import datetime, timedelta

from airflow.sdk import dag, task

try:
    from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
except ImportError:  # the first releases of Airflow 3
    from airflow.exceptions import AirflowFailException, AirflowSkipException

COMMAND = {json.dumps(list(job.command), indent=4, ensure_ascii=False)}


@dag(
    dag_id={json.dumps(f"shoal_{job.name}")},
    schedule="{job.minute} {job.hour} * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    tags=["shoal"],
)
def shoal_nightly():
    # on_failure_callback=... tells somebody; so does on_failure in the run file.
    @task(
        retries=1,
        retry_delay=timedelta(minutes={RETRY_MINUTES}),
        execution_timeout=timedelta(hours={LONGEST_HOURS}),
    )
    def embed():
        code = subprocess.run(COMMAND, cwd={json.dumps(job.folder)}, check=False).returncode
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
    container = {
        "name": "shoal",
        "image": "IMAGE",
        "command": ["shoal", *job.arguments],
        "workingDir": job.folder,
        "volumeMounts": [{"name": "run-file", "mountPath": job.folder, "readOnly": True}],
    }
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": "spark",
        "containers": [container],
        "volumes": [{"name": "run-file", "configMap": {"name": dns_name(job.name)}}],
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
        "metadata": {"name": dns_name(job.name)},
        "spec": {
            "schedule": f"{job.minute} {job.hour} * * *",
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3600,
            "jobTemplate": {"spec": batch},
        },
    }
    return (
        "# kubectl create configmap NAME --from-file=the run file; IMAGE and serviceAccountName are your cluster's.\n"
        "# With --target kubernetes the pod is the driver and Spark starts the executors.\n" + _yaml(document)
    )


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
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if re.search(r"[\s\"'\\;]", word) else escaped
