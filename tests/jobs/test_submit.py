"""What `shoal submit` tells Spark, without a cluster: tests/jobs/test_cluster.py has one."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.conf.errors import ConfigError, RunError
from shoal.conf.loader import load_run, load_target
from shoal.jobs.shoal_zip import pack_shoal
from shoal.jobs.submit import DISCOVERY_SCRIPT, PROPERTIES, SCRIPT, ZIP, ZIP_PROPERTY, RemoteCall, Submission, compose

GPU = "spark.executor.resource.gpu"
IN_THE_IMAGE = "/opt/spark/examples/src/main/scripts/getGpusResources.sh"


@pytest.fixture
def target(tmp_path: Path) -> Callable[[str], object]:
    def load(text: str) -> object:
        path = tmp_path / "target.yaml"
        path.write_text(text, encoding="utf-8")
        return load_target(str(path))

    return load


def composed(target: object, file: Path, *arguments: str) -> Submission:
    found = compose(target, "embed", file, load_run(file), arguments)  # type: ignore[arg-type]
    assert isinstance(found, Submission)
    return found


def test_what_the_target_sets_wins_over_the_run_file(run_file: Callable[..., Path], target: Callable) -> None:
    conf = {"spark.executor.memory": "9g", "spark.sql.shuffle.partitions": "7"}
    file = run_file(spark={"master": "local[1]", "driver_memory": "3g", "conf": conf})
    cluster = target("kind: standalone\nmaster: spark://h:7077\nconf: {spark.executor.memory: 2g}\n")

    found = composed(cluster, file, "--json")

    assert found.arguments == (
        "embed", str(file), "--json", "--set", "spark.master=null", "--set", "spark.driver_memory=null",
        "--set", "spark.conf.spark.executor.memory=null",
    )  # fmt: skip
    assert found.properties["spark.executor.memory"] == "2g"
    assert found.properties["spark.driver.memory"] == "3g"
    overridden = load_run(file, found.arguments[4::2])
    assert (overridden.spark.master, overridden.spark.driver_memory) == (None, None)
    assert overridden.spark.conf == {"spark.sql.shuffle.partitions": "7"}


def test_a_server_of_connect_is_told_by_the_environment_and_its_token_is_not_shown(
    run_file: Callable[..., Path], target: Callable
) -> None:
    file = run_file(spark={"remote": "sc://other:1", "conf": {"spark.a": "b"}})
    to = target("kind: connect\nmaster: sc://h:15002/;token=hush-hush\nmodel: shared\n")
    found = compose(to, "embed", file, load_run(file), ["--json"])

    assert isinstance(found, RemoteCall)
    assert found.address == "sc://h:15002/;token=hush-hush"
    assert found.arguments == (
        "embed", str(file), "--json", "--set", "spark.remote=null", "--set", "spark.conf.spark.shoal.modelFiles=shared",
    )  # fmt: skip
    assert load_run(file, found.arguments[4::2]).spark.conf == {"spark.a": "b", "spark.shoal.modelFiles": "shared"}
    for told in (json.dumps(found.document()), "\n".join(found.lines())):
        assert "SPARK_REMOTE" in told
        assert "hush" not in told


def test_jars_of_the_target_come_beside_those_of_delta(run_file: Callable[..., Path], target: Callable) -> None:
    given = "kind: yarn\nconf: {spark.jars: /j/a.jar, spark.jars.packages: 'g:a:1', spark.files: f.txt}\n"
    found = composed(target(given), run_file()).properties
    assert found["spark.files"] == "f.txt"
    assert [found["spark.jars"].split(",")[-1], found["spark.jars.packages"].split(",")[-1]] == ["/j/a.jar", "g:a:1"]
    assert "delta-spark" in found["spark.jars"] + found["spark.jars.packages"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kind: standalone\nmaster: spark://h:1\ngpus: 2\n", {}),
        (
            "kind: yarn\ngpus: 2\nencoders_per_gpu: 3\n",
            {"spark.shoal.encodersPerGpu": "3", f"{GPU}.discoveryScript": "./discover_gpus.sh"},
        ),
        (
            "kind: kubernetes\nmaster: k8s://h\nimage: i\ngpus: 2\n",
            {f"{GPU}.vendor": "nvidia.com", f"{GPU}.discoveryScript": IN_THE_IMAGE},
        ),
    ],
)
def test_executors_are_asked_for_gpus_and_tasks_are_not(
    text: str, told: dict[str, str], run_file: Callable[..., Path], target: Callable
) -> None:
    found = composed(target(text), run_file()).properties
    asked = {name: value for name, value in found.items() if "gpu" in name.lower()}
    assert asked == {f"{GPU}.amount": "2", "spark.shoal.encodersPerGpu": "1"} | told
    assert ("discover_gpus.sh" in found.get("spark.files", "")) is text.startswith("kind: yarn")


def test_the_discovery_script_tells_the_devices_as_spark_reads_them(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    smi.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.defpath}"}
    told = subprocess.run([DISCOVERY_SCRIPT], env=env, capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(told) == {"name": "gpu", "addresses": ["0", "1"]}
    smi.unlink()
    without = subprocess.run([DISCOVERY_SCRIPT], env={"PATH": os.defpath}, capture_output=True, timeout=60, check=False)
    assert without.returncode != 0


def test_an_environment_that_is_one_file_is_sent_beside_what_else_is(
    run_file: Callable[..., Path], target: Callable
) -> None:
    found = composed(target("kind: yarn\nenvironment: /e/env.pex\ngpus: 1\nconf: {spark.files: /a}\n"), run_file())
    sent, script, own = found.properties["spark.files"].split(",")
    assert (sent, Path(script).name, own) == ("/e/env.pex", "discover_gpus.sh", "/a")
    assert found.variables("f")["PYSPARK_PYTHON"] == "./env.pex"
    assert "spark.archives" not in found.properties


def test_a_packed_environment_is_what_the_workers_run(run_file: Callable[..., Path], target: Callable) -> None:
    found = composed(target("kind: yarn\nenvironment: /e/env.tar.gz\n"), run_file())
    assert found.properties["spark.archives"] == "/e/env.tar.gz#environment"
    assert found.variables("f")["PYSPARK_PYTHON"] == "./environment/bin/python"
    assert found.command("f")[:3] == [sys.executable, "-m", "shoal.jobs.cli"]


def test_a_driver_inside_the_cluster_gets_the_run_file_and_its_own_python(
    run_file: Callable[..., Path], target: Callable
) -> None:
    file = run_file(source={"format": "delta", "path": "s3a://b/t", "key": "id", "text": "t"})
    text = file.read_text().replace("out/docs", "s3a://b/docs")
    file.write_text(text)
    found = composed(target("kind: yarn\nenvironment: /e/env.tar.gz\ndeploy_mode: cluster\n"), file)
    assert found.properties["spark.files"] == str(file)
    assert found.arguments[:2] == ("embed", file.name)
    assert found.properties["spark.pyspark.python"] == "./environment/bin/python"
    assert found.command("f")[0].endswith("/bin/spark-submit")
    assert found.properties["spark.jars.packages"].startswith("io.delta:delta-spark")


def test_a_driver_inside_the_cluster_does_not_find_what_is_here(
    run_file: Callable[..., Path], target: Callable
) -> None:
    with pytest.raises(ConfigError, match=r"inside the cluster, and source.path, destination.path lie beside"):
        composed(target("kind: yarn\ndeploy_mode: cluster\n"), run_file())


def test_secrets_are_told_to_spark_and_to_nobody_else(
    run_file: Callable[..., Path], target: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORD", "hush-hush")
    found = composed(target('kind: local\nconf: {spark.hadoop.fs.s3a.endpoint: "${WORD}"}\n'), run_file())
    assert found.properties["spark.hadoop.fs.s3a.endpoint"] == "hush-hush"
    assert "hush" not in "".join([*found.lines(), str(found.document())])
    assert "hush" not in " ".join([*found.command("folder"), *found.variables("folder").values()])


def test_the_zip_holds_the_packages_with_their_data_and_says_its_version(tmp_path: Path) -> None:
    pack_shoal(tmp_path / ZIP)
    pack_shoal(tmp_path / "again.zip")

    assert (tmp_path / ZIP).read_bytes() == (tmp_path / "again.zip").read_bytes()
    names = set(zipfile.ZipFile(tmp_path / ZIP).namelist())
    assert {"shoal/jobs/cli.py", "shoal/udfs/canaries.json", "shoal/conf/targets/local.yaml"} <= names
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path / ZIP)!r}, {sysconfig.get_path('purelib')!r}]\n"
        "from importlib import metadata\n"
        "import shoal.udfs.canaries as canaries, shoal.conf.errors\n"
        "print(canaries.__file__, len(canaries.canary_texts()), metadata.version('shoal'))\n"
    )
    # Without `site` an editable install, which would come first, is not seen.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / ZIP}/shoal/udfs/canaries.pyc ")


def test_what_spark_submit_is_called_with_is_there_while_it_runs_and_its_exit_code_is_ours(
    run_file: Callable[..., Path], target: Callable, tmp_path: Path
) -> None:
    home = tmp_path / "spark"
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "spark-submit"
    script.write_text(f'#!/bin/sh\ncp -r "$(dirname "$2")" {tmp_path}/seen\nexit 3\n')
    script.chmod(0o755)
    inside = "kind: yarn\ndeploy_mode: cluster\n"
    cluster = target(f"{inside}spark_home: {home}\nconf: {{spark.a: 'x = y: \\z'}}\n")
    file = run_file(source={"format": "delta", "path": "s3a://b/t", "key": "id", "text": "t"}, name="there.yaml")
    file.write_text(file.read_text().replace("out/docs", "s3a://b/docs"))

    assert composed(cluster, file).run(lambda _: None) == 3

    seen = tmp_path / "seen"
    assert {path.name for path in seen.iterdir()} == {ZIP, SCRIPT, PROPERTIES}
    lines = (seen / PROPERTIES).read_text().splitlines()
    assert "spark.a=x\\ \\=\\ y\\:\\ \\\\z" in lines
    zip_named = next(line for line in lines if line.startswith(ZIP_PROPERTY))
    assert not Path(zip_named.partition("=")[2]).exists()


def test_a_spark_that_is_not_there_is_said_to_be_missing(
    run_file: Callable[..., Path], target: Callable, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"none/bin/spark-submit' is not there"):
        composed(target(f"kind: local\nspark_home: {tmp_path}/none\n"), run_file()).run(lambda _: None)
