"""Target files: which are taken, what is said of the others, and the ones that Shoal brings."""

from pathlib import Path

import pytest

from shoal.conf.errors import ConfigError
from shoal.conf.loader import SHIPPED_TARGETS, TARGET_FILE, load_target
from shoal.conf.target import TargetConfig

VARIABLES = {
    "SHOAL_MASTER": {
        "standalone": "spark://h:7077",
        "secured": "spark://h:7077",
        "connect": "sc://h:15002",
        "kubernetes": "k8s://https://h:6443",
        "local": "local[2]",
    },
    "SHOAL_ENVIRONMENT": {"yarn": "env.tar.gz"},
    "SHOAL_IMAGE": {"kubernetes": "images/shoal:1"},
    **{
        name: {"secured": "hush"}
        for name in ("SPARK_SECRET", "SPARK_KEYSTORE", "SPARK_KEYSTORE_PASSWORD", "SPARK_UI_KEY")
    },
    "SHOAL_CLUSTER": {"databricks": "0923-164208-meows279"},
    "SPARK_SECRET": {"secured": "hush"},
    "SPARK_KEYSTORE": {"secured": "ui.p12"},
    "SPARK_KEYSTORE_PASSWORD": {"secured": "hush"},
    "SPARK_UI_KEY": {"secured": "hush"},
}


def write(folder: Path, text: str) -> str:
    path = folder / "target.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED_TARGETS.glob("*.yaml")))
def test_a_target_that_ships_is_made_by_variables_alone(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, values in VARIABLES.items():
        if name in values:
            monkeypatch.setenv(variable, values[name])

    target = load_target(name)

    assert target.kind == {"secured": "standalone"}.get(name, name)
    assert target.address == VARIABLES["SHOAL_MASTER"].get(name, name)
    assert target.cluster == VARIABLES["SHOAL_CLUSTER"].get(name)
    if name == "yarn":
        assert target.environment == str(tmp_path / "env.tar.gz")
    if name == "kubernetes":
        assert (target.image, target.python) == ("images/shoal:1", "python3")


def test_a_variable_that_is_not_set_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_MASTER", raising=False)
    with pytest.raises(ConfigError, match=r"standalone.yaml:\d+: master wants the environment variable SHOAL_MASTER"):
        load_target("standalone")


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(
        ConfigError,
        match="--target is 'yarm'; give one of connect, databricks, kubernetes, local, secured, standalone, yarn",
    ):
        load_target("yarm")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kind: standalone\n", "master is not set; the master of kind standalone starts with spark://"),
        ("kind: kubernetes\nmaster: spark://h:1\nimage: i\n", "the master of kind kubernetes starts with k8s://"),
        ("kind: kubernetes\nmaster: k8s://h\n", "Kubernetes needs an image"),
        ("kind: yarn\nimage: i\n", "only Kubernetes takes one"),
        ("kind: yarn\nmaster: spark://h:1\n", "its master is always yarn"),
        ("kind: connect\nmaster: spark://h:1\n", "the master of kind connect starts with sc://"),
        (
            "kind: connect\nmaster: sc://h\nconf: {spark.a: b}\n",
            "the server of Spark Connect was started with its",
        ),
        ("kind: connect\nmaster: sc://h\ngpus: 1\n", "the server of Spark Connect was started with its own"),
        ("kind: connect\nmaster: sc://h\ndeploy_mode: cluster\n", "with kind connect use client"),
        (
            "kind: databricks\n",
            "cluster is not set and new_cluster is not set; name a cluster that is there, or describe",
        ),
        ("kind: databricks\ncluster: c\nnew_cluster: {num_workers: 1}\n", "name a cluster that is there, or describe"),
        ("kind: databricks\ncluster: c\nconf: {spark.a: b}\n", "go into new_cluster.spark_conf"),
        ("kind: databricks\ncluster: c\nmaster: local\n", "a cluster of Databricks has its own"),
        ("kind: yarn\ncluster: c\n", "only kind databricks has clusters"),
        ("kind: databricks\nnew_cluster: big\n", "new_cluster is 'big'"),
        ("kind: local\nmaster: yarn\n", "the master of kind local starts with local"),
        ("kind: local\ndeploy_mode: cluster\n", "with kind local use client"),
        ("kind: standalone\nmaster: spark://h:1\ndeploy_mode: cluster\n", "with kind standalone use client"),
        ("kind: yarn\npython: /p\nenvironment: e.tar.gz\n", "a packed environment brings its Python; keep one of them"),
        ("kind: local\nconf: {spark.master: yarn}\n", "use master"),
        ("kind: yarn\nconf: {spark.executor.resource.gpu.amount: 1}\n", "use gpus"),
        ("kind: local\ngpus: 1\n", "name the GPU of this machine by encode.device"),
        ("kind: yarn\ngpus: 0\n", "greater than 0"),
        ("kind: yarn\nencoders_per_gpu: 2\n", "say with gpus how many an executor has"),
        ("kind: local\nconf: {fs.s3a.endpoint: e}\n", "put 'spark.hadoop.' in front"),
        ("kind: slurm\n", "choose one of local, standalone, yarn, kubernetes, databricks, connect"),
        ("kindd: local\n", "did you mean kind?"),
        ("- a\n", "a target file is a mapping of settings, such as 'kind: local'"),
    ],
)
def test_a_broken_target_is_told_in_a_sentence(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_target(write(tmp_path, text))
    assert told in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_target(write(tmp_path, "kind: local\nmodel: copy\nextra: 1\n"))
    assert "model is 'copy'" in str(caught.value)
    assert "extra is not a setting" in str(caught.value)


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    target = load_target(write(tmp_path, "kind: yarn\nenvironment: env.tar.gz\nspark_home: ../spark\n"))
    assert target.environment == str(tmp_path / "env.tar.gz")
    assert target.spark_home == str(tmp_path.parent / "spark")


def test_what_came_from_the_environment_into_a_property_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORD", "hush-hush")
    text = 'kind: local\nconf: {spark.hadoop.fs.s3a.endpoint: "${WORD}", spark.x.access.key: plain, spark.a: b}\n'
    target = load_target(write(tmp_path, text))
    assert target.conf["spark.hadoop.fs.s3a.endpoint"] == "hush-hush"
    assert target.redacted()["conf"] == {
        "spark.hadoop.fs.s3a.endpoint": "***",
        "spark.x.access.key": "***",
        "spark.a": "b",
    }
    assert "hush" not in repr(target)


@pytest.mark.parametrize(
    ("entry", "is_refused"),
    [
        ("conf: {spark.authenticate.secret: geheim}", True),
        ("conf: {spark.hadoop.fs.s3a.secret.key: geheim}", True),
        ("conf: {spark.hadoop.fs.azure.account.key.shop.dfs.the.store: geheim}", True),
        ("conf: {spark.kubernetes.authenticate.oauthToken: geheim}", True),
        ("new_cluster: {spark_env_vars: {DB_PASSWORD: geheim}}", True),
        ("new_cluster: {spark_env_vars: {DB_PASSWORD: '{{secrets/shoal/db}}'}}", False),
        ('conf: {spark.authenticate.secret: "${WORD}"}', False),
        ("conf: {spark.hadoop.fs.s3a.aws.credentials.provider: org.example.Provider}", False),
        ("conf: {spark.kubernetes.authenticate.oauthTokenFile: /run/token}", False),
    ],
)
def test_what_lets_somebody_in_does_not_stand_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, is_refused: bool
) -> None:
    monkeypatch.setenv("WORD", "geheim")
    path = write(tmp_path, f"kind: {'databricks' if 'cluster' in entry else 'local'}\n{entry}\n")
    if not is_refused:
        load_target(path)
        return
    with pytest.raises(
        ConfigError, match=r"is '\*\*\*'; whoever reads the file could use it: write '\$\{NAME\}'"
    ) as caught:
        load_target(path)
    assert "geheim" not in str(caught.value)


def test_every_required_setting_has_a_stand_in() -> None:
    required = {(name,) for name, field in TargetConfig.model_fields.items() if field.is_required()}
    assert set(TARGET_FILE.stand_ins) == required


def test_a_cluster_to_be_made_keeps_the_types_of_its_description_and_hides_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POOL", "hush-hush")
    text = (
        "kind: databricks\nnew_cluster:\n  num_workers: 2\n  is_single_node: false\n  spark_version: '17.3'\n"
        "  instance_pool_id: ${POOL}\n  spark_conf: {spark.x.access.key: hush, spark.y: 1}\n"
    )
    target = load_target(write(tmp_path, text))
    assert target.new_cluster == {
        "num_workers": 2,
        "is_single_node": False,
        "spark_version": "17.3",
        "instance_pool_id": "hush-hush",
        "spark_conf": {"spark.x.access.key": "hush", "spark.y": 1},
    }
    shown = target.redacted()["new_cluster"]
    assert (shown["instance_pool_id"], shown["spark_conf"]) == ("***", {"spark.x.access.key": "***", "spark.y": 1})
    assert "hush" not in repr(target)
