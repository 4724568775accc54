"""Rendered schedules: what they do on each exit code, and what the platforms' own checkers say of them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.conf.errors import ConfigError
from shoal.conf.loader import load_run
from shoal.jobs.cli import SCHEDULERS
from shoal.jobs.schedule import KINDS, schedule
from shoal.jobs.schedule_rules import dns_name

SCHEDULERS_PYTHON = Path(sys.prefix) / "schedulers" / "bin" / "python"


@pytest.fixture
def render(run_file: Callable[..., Path]) -> Callable[..., str]:
    def rendered(kind: str, at: str = "02:30", target: str | None = None, **sections: Any) -> str:
        file = run_file(**sections)
        return schedule(kind, file, load_run(file), at, target, ["limits.min_rows=5"])

    return rendered


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("codes", "runs", "last"), [((0,), 1, 0), ((1, 0), 2, 0), ((1, 1), 2, 1), ((2,), 1, 2), ((3,), 1, 3), ((4,), 1, 4)]
)
def test_a_line_of_cron_tries_again_where_that_may_help(
    codes: tuple[int, ...], runs: int, last: int, render: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_folder = tmp_path / "bin with % blank"
    wanted = tmp_path / "codes"
    wanted.write_text("".join(f"{code}\n" for code in codes))
    executable(
        bin_folder / "shoal",
        f'echo "$*" >> {tmp_path}/calls\ncode=$(head -n 1 {wanted}); sed -i 1d {wanted}; exit $code',
    )
    executable(bin_folder / "sleep", f"echo $1 >> {tmp_path}/slept")
    monkeypatch.setattr(sys, "executable", str(bin_folder / "python"))

    line = render("cron").splitlines()[-1]

    assert line.startswith("30 2 * * * ")
    command = line.removeprefix("30 2 * * * ").replace("\\%", "%")
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(["/bin/sh", "-c", command], env=env, check=False, timeout=60)
    assert done.returncode == last
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"embed {tmp_path}/run.yaml --set limits.min_rows=5"] * runs
    assert (tmp_path / "slept").exists() is (runs == 2)


def test_a_line_of_cron_starts_no_second_run(render: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "bin/shoal", f"touch {tmp_path}/called")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    command = render("cron").splitlines()[-1].removeprefix("30 2 * * * ")
    held = ["flock", str(tmp_path / ".shoal-docs.lock"), "/bin/sh", "-c", command]
    assert subprocess.run(held, check=False, timeout=60).returncode == 4
    assert not (tmp_path / "called").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_units_of_systemd_are_what_systemd_takes(
    render: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "bin/shoal", "exit 0")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    text = render("systemd", at="2:05")
    service, timer = text.split("# /etc/systemd/system/shoal-docs.timer\n")
    units = {"shoal-docs.service": service, "shoal-docs.timer": timer}
    for name, unit in units.items():
        (tmp_path / name).write_text(unit)

    checked = subprocess.run(
        ["systemd-analyze", "verify", *(str(tmp_path / name) for name in units)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip

    ours = [line for line in checked.stderr.splitlines() if "shoal-docs" in line]
    assert ours == []
    assert "OnCalendar=*-*-* 02:05:00" in timer
    assert "RestartPreventExitStatus=2 3 4" in service


def test_a_dag_is_python_that_never_overlaps(render: Callable, tmp_path: Path) -> None:
    text = render("airflow", target="yarn")
    compile(text, "dag.py", "exec")
    for wanted in ("max_active_runs=1", "catchup=False", "retries=1", '"submit"', '"yarn"', 'schedule="30 2 * * *"'):
        assert wanted in text


@pytest.mark.skipif(not SCHEDULERS_PYTHON.exists(), reason="needs Airflow: make test makes its environment")
def test_airflow_and_the_schema_of_kubernetes_take_what_is_rendered(
    render: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "bin/shoal", "exit $CODE")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(tmp_path / "bin/python"))
        texts = {"dags/docs.py": render("airflow"), "cron.yaml": render("kubernetes", target="kubernetes")}
    (tmp_path / "dags").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)

    script = Path(__file__).with_name("look_at_schedules.py")
    looked = subprocess.run(
        [str(SCHEDULERS_PYTHON), str(script), str(tmp_path / "dags"), str(tmp_path / "cron.yaml")],
        env={**os.environ, "AIRFLOW_HOME": str(tmp_path / "airflow"), "PYTHONPATH": ""},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip

    assert looked.returncode == 0, looked.stderr[-4000:]
    found = json.loads(looked.stdout.splitlines()[-1])
    assert found["problems"] == {}
    embed = found["dags"]["shoal_docs"]["tasks"].pop("embed")
    assert found["dags"] == {"shoal_docs": {"max_active_runs": 1, "catchup": False, "tasks": {}}}
    failed = "AirflowFailException"
    assert embed.pop("raised") == {
        "0": None,
        "1": "RuntimeError",
        "2": failed,
        "3": failed,
        "4": "AirflowSkipException",
    }
    assert embed == {"retries": 1, "minutes": 10, "hours": 12}


def test_a_cron_job_of_kubernetes_fails_for_good_where_a_retry_is_pointless(render: Callable, tmp_path: Path) -> None:
    found = yaml.safe_load(render("kubernetes", target="kubernetes"))
    assert found["metadata"]["name"] == "shoal-docs"
    assert found["spec"]["concurrencyPolicy"] == "Forbid"
    batch = found["spec"]["jobTemplate"]["spec"]
    rule = batch["podFailurePolicy"]["rules"][0]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3, 4])
    pod = batch["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    container = pod["containers"][0]
    assert container["command"][:3] == ["shoal", "submit", f"{tmp_path}/run.yaml"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_kubernetes_gets_a_name_that_it_takes() -> None:
    assert dns_name("Docs_of.2026") == "shoal-docs-of-2026"
    assert len(dns_name("x" * 100)) == 52
    assert dns_name("a." * 50).endswith("a")


@pytest.mark.parametrize("at", ["24:00", "2", "02:60", "noon", "-1:00"])
def test_a_time_that_is_none_is_refused(at: str, render: Callable) -> None:
    with pytest.raises(ConfigError, match="write a time of day such as 02:30"):
        render("cron", at=at)


def test_the_command_line_offers_what_there_is() -> None:
    assert set(SCHEDULERS) == {*KINDS, "databricks"}
