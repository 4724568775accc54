"""Rendered schedules: what they do on each exit code, and what the platforms' own checkers say of them."""

import json
import os
import re
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
from shoal.jobs.cli import SCHEDULERS, main
from shoal.jobs.schedule import KINDS, schedule
from shoal.jobs.schedule_rules import dns_name

REMOTE: dict[str, Any] = {
    "source": {"format": "parquet", "path": "s3a://b/in", "key": "id", "text": "body"},
    "destination": {"path": "s3a://b/docs"},
}
"""What a pod reaches."""

SCHEDULERS_PYTHON = Path(sys.prefix) / "schedulers" / "bin" / "python"


@pytest.fixture
def render(run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    for name in ("JAVA_HOME", "SPARK_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SHOAL_MASTER", "k8s://https://host:6443")
    monkeypatch.setenv("SHOAL_IMAGE", "registry/shoal:1")

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
    _, *parts = re.split(r"^# /etc/systemd/system/(\S+)\n", text, flags=re.MULTILINE)
    units = dict(zip(parts[::2], parts[1::2], strict=True))
    assert sorted(units) == ["shoal-docs-failed.service", "shoal-docs.service", "shoal-docs.timer"]
    service, timer = units["shoal-docs.service"], units["shoal-docs.timer"]
    for name, unit in units.items():
        (tmp_path / name).write_text(unit)

    checked = subprocess.run(
        ["systemd-analyze", "verify", *(str(tmp_path / name) for name in units)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip

    ours = [line for line in checked.stderr.splitlines() if "shoal-docs" in line]
    assert ours == []
    assert "OnCalendar=*-*-* 02:05:00" in timer
    for wanted in ("RestartPreventExitStatus=2 3 4", "TimeoutStartSec=12h", "OnFailure=shoal-docs-failed.service"):
        assert wanted in service


def test_a_dag_is_python_that_never_overlaps(render: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ENVIRONMENT", "env.tar.gz")
    monkeypatch.setenv("HADOOP_CONF_DIR", "/etc/hadoop")
    text = render("airflow", target="yarn")
    compile(text, "dag.py", "exec")
    variable = '"HADOOP_CONF_DIR": "/etc/hadoop"'
    settings = ("max_active_runs=1", "catchup=False", "retries=1", 'schedule="30 2 * * *"')
    for wanted in (*settings, '"submit"', '"yarn"', variable):
        assert wanted in text


@pytest.mark.skipif(not SCHEDULERS_PYTHON.exists(), reason="needs Airflow: make test makes its environment")
def test_airflow_and_the_schema_of_kubernetes_take_what_is_rendered(
    render: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "bin/shoal", "exit $CODE")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(tmp_path / "bin/python"))
        texts = {"dags/docs.py": render("airflow"), "cron.yaml": render("kubernetes", target="kubernetes", **REMOTE)}
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
    found = yaml.safe_load(render("kubernetes", target="kubernetes", **REMOTE))
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


TARGET = """\
# ${OF_A_COMMENT} is none
kind: standalone
master: "${THE_MASTER}"
conf:
  spark.authenticate.secret: "${THE_SECRET}"
  spark.eventLog.dir: "${WITH_DEFAULT:-/tmp}"
"""


@pytest.fixture
def own_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A target file, named from the folder it lies in, and what it takes from the environment."""
    (tmp_path / "own.yaml").write_text(TARGET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THE_MASTER", "spark://host:7077")
    monkeypatch.setenv("THE_SECRET", "hush & 'hush'")
    return "own.yaml"


def test_a_line_of_cron_brings_its_variables_into_an_empty_environment(
    render: Callable, own_target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_folder = tmp_path / "bin"
    executable(
        bin_folder / "shoal", f"echo $THE_MASTER $THE_SECRET > {tmp_path}/seen; echo $* >> {tmp_path}/seen; exit 2"
    )
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(bin_folder / "python"))
        text = render("cron", target=own_target)
    assert "hush" not in text
    assert "MAILTO=root" in text
    assert " timeout 12h " in text
    *given, line = [line for line in text.splitlines() if not line.startswith("#")]
    variables = dict(pair.replace('"', "").split("=", 1) for pair in given)
    assert variables == {"MAILTO": "root", "THE_MASTER": "spark://host:7077"}
    call = ["env", "-i", "PATH=/usr/bin:/bin", *(f"{name}={value}" for name, value in variables.items())]
    call += ["/bin/sh", "-c", line.removeprefix("30 2 * * * ")]

    without = subprocess.run(call, cwd="/", capture_output=True, text=True, check=False, timeout=60)
    assert without.returncode != 0
    assert not (tmp_path / "seen").exists()
    (tmp_path / ".shoal-docs.env").write_text("THE_SECRET=\"hush & 'hush'\"\n")
    done = subprocess.run(call, cwd="/", capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 2
    assert "shoal docs failed" in done.stdout
    words = f"submit {tmp_path}/run.yaml --target {tmp_path}/own.yaml --set limits.min_rows=5"
    assert (tmp_path / "seen").read_text().splitlines() == ["spark://host:7077 hush & 'hush'", words]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_schedule_has_a_secret_or_a_relative_target(
    kind: str, render: Callable, own_target: str, tmp_path: Path
) -> None:
    text = render(kind, target=own_target, **REMOTE)
    assert "hush" not in text
    assert "OF_A_COMMENT" not in text
    assert "WITH_DEFAULT" not in text
    for wanted in (f"{tmp_path}/own.yaml", "spark://host:7077", "THE_SECRET"):
        assert wanted in text


def test_an_address_with_a_token_is_a_secret_whatever_its_name(
    render: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_MASTER", "sc://host:15002/;token=hush")
    assert "hush" not in render("systemd", target="connect")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_variable_is_a_secret_by_what_it_goes_into(
    kind: str, render: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = {
        "ML_LOGIN": "hush-ml",
        "CONNECT_LOGIN": "hush-sc",
        "LAKE": "hush-s3",
        "NODES": "hush-target",
        "PG": "hush-pg",
    }
    for name, value in {**used, "BUCKET": "corpora", "SHOAL_ROOTS": "s3a://,/data,/tmp"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "own.yaml").write_text(
        TARGET.replace("${THE_MASTER}", "spark://host:7077").replace("THE_SECRET", "NODES")
    )

    text = render(
        kind,
        target=str(tmp_path / "own.yaml"),
        source={
            "format": "jdbc",
            "table": "${BUCKET}",
            "key": "id",
            "text": "body",
            "database": {"url": "jdbc:postgresql://host/d", "user": "u", "password_env": "PG"},
        },
        destination={"path": "s3a://${BUCKET}/docs", "properties": {"x.secret.key": "${LAKE}"}},
        tracking={"enabled": True, "uri": "http://u:${ML_LOGIN}@host:5000"},
        spark={"remote": "sc://host/;token=${CONNECT_LOGIN}"},
    )

    assert "hush" not in text
    for name in used:
        assert name in text
    assert "corpora" in text
    assert "s3a://,/data,/tmp" in text, "whoever runs it keeps to the same places"


def test_a_password_is_asked_for_although_it_is_not_set_here(render: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_LOGIN", raising=False)
    database = {"url": "jdbc:postgresql://host/d", "user": "u", "password_env": "PG_LOGIN"}

    text = render("cron", source={"format": "jdbc", "table": "t", "key": "id", "text": "body", "database": database})

    assert "has a line NAME='value' for PG_LOGIN." in text
    assert ".shoal-docs.env" in text.splitlines()[-1]


def test_a_variable_that_is_not_set_is_named(
    render: Callable, own_target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THE_MASTER")
    with pytest.raises(ConfigError, match="THE_MASTER, which is not set"):
        render("cron", target=own_target)


def test_yarn_is_asked_for_where_it_is(render: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ENVIRONMENT", "env.tar.gz")
    for name in ("HADOOP_CONF_DIR", "YARN_CONF_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="HADOOP_CONF_DIR"):
        render("cron", target="yarn")


def test_a_cron_job_has_its_files_a_writable_folder_and_its_address(
    render: Callable, own_target: str, tmp_path: Path
) -> None:
    batch = yaml.safe_load(render("kubernetes", target=own_target, **REMOTE))["spec"]["jobTemplate"]["spec"]
    container = batch["template"]["spec"]["containers"][0]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert set(mounts) == {str(tmp_path), f"{tmp_path}/run.yaml", f"{tmp_path}/own.yaml"}
    assert "readOnly" not in mounts[container["workingDir"]]
    assert batch["activeDeadlineSeconds"] == 12 * 3600
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["THE_MASTER"]["value"] == "spark://host:7077"
    assert env["THE_SECRET"]["valueFrom"] == {"secretKeyRef": {"name": "shoal-docs", "key": "THE_SECRET"}}
    assert "SPARK_LOCAL_IP" not in env
    assert container["image"] == "IMAGE"

    text = render("kubernetes", target="kubernetes", **REMOTE)
    pod = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    env = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
    assert pod["containers"][0]["image"] == "registry/shoal:1"
    for name in ("SPARK_LOCAL_IP", "SPARK_LOCAL_HOSTNAME"):
        assert env[name]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert 'kube_job_status_failed{job_name=~"shoal-docs-.*"} > 0' in text


def test_a_pod_is_refused_that_would_lose_its_records(render: Callable) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri"):
        render("kubernetes", tracking={"enabled": True}, **REMOTE)


def test_a_run_file_that_tells_nobody_is_warned_of(
    run_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["schedule", "--for", "cron"]
    assert main([*call, str(run_file())]) == 0
    assert "no on_failure" in " ".join(capsys.readouterr().err.split())
    assert main([*call, str(run_file(on_failure={"command": "true"}))]) == 0
    assert capsys.readouterr().err == ""
