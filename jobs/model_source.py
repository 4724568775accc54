"""From the model reference of a run file to a local folder, resolved once per run; the driver never loads the model."""

import difflib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from py4j.protocol import Py4JJavaError

from shoal.conf.errors import ModelError, RunError
from shoal.conf.fingerprint import digest
from shoal.conf.redact import scrub
from shoal.conf.run import EncoderConfig
from shoal.jobs.filesystem import FileSystem, java_reason, join
from shoal.jobs.session import running_session
from shoal.udfs.checkpoint import describe_checkpoint
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.hash_encoder import describe_hash

HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
HUB_LEFT_OUT = ("onnx/*", "openvino/*", "*/onnx/*", "*/openvino/*", "checkpoint-*/*")
CODE_FILES = ("*.py",)

FOLDER_HINT = "write it as ./folder if a folder is meant"


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model reference with every moving name in it settled.

    folder: the checkpoint on this machine ("" for hash). revision: a Hub commit; "VERSION/MODEL_ID" or a model id of
    the registry; "NAME==VERSION" of the distribution that carries a package; None for folders and hash.
    """

    folder: str
    reference: str
    revision: str | None


def resolve_spec(config: EncoderConfig, cache_folder: Path, *, tracking_uri: str | None = None) -> EncoderSpec:
    """The description of the encoder that the run file asks for; its precision and back end may still be "auto"."""
    if config.form == "hash":
        return describe_hash(config)
    model = resolve_model(config, cache_folder, tracking_uri=tracking_uri)
    return describe_checkpoint(config, model.folder, revision=model.revision)


def resolve_model(config: EncoderConfig, cache_folder: Path, *, tracking_uri: str | None = None) -> ResolvedModel:
    """Find or fetch the checkpoint.

    cache_folder takes what the MLflow registry and stores send; Hub models go to the Hub's own cache (HF_HOME).
    tracking_uri is the MLflow server, None for MLflow's current one. Raises ModelError where the reference leads
    nowhere, RunError where the Hub did not answer and a later try may succeed.
    """
    if config.form == "registry":
        return _from_registry(config, cache_folder, tracking_uri)
    if config.form == "store":
        return _from_store(config, cache_folder)
    return _RESOLVERS[config.form](config)


def _from_hash(config: EncoderConfig) -> ResolvedModel:
    return ResolvedModel("", config.model, None)


def _from_folder(config: EncoderConfig) -> ResolvedModel:
    folder = Path(config.model).expanduser()
    if not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, siblings, n=3)
        hint = f"nearest there: {', '.join(near)}" if near else f"{folder.parent} has {len(siblings)} entries"
        raise ModelError(
            f"encoder.model is {config.model!r}, which is {'a file' if folder.exists() else 'not there'} ({hint}); "
            "write the folder that holds modules.json or config.json.",
            code="MODEL_NOT_FOUND",
        )
    return ResolvedModel(str(folder), config.model, None)


def _from_store(config: EncoderConfig, cache_folder: Path) -> ResolvedModel:
    """A copy of a folder that only Spark reaches; another one as soon as one of its files has changed."""
    try:
        return _copied(config, cache_folder)
    except Py4JJavaError as error:
        raise ModelError(
            f"encoder.model is {config.model!r}, and that could not be read ({java_reason(error)}); check the "
            "address, and whether Spark's credentials for the store reach it.",
            code="MODEL_NOT_FOUND",
        ) from error


def _copied(config: EncoderConfig, cache_folder: Path) -> ResolvedModel:
    files = FileSystem(running_session(), config.model)
    found = files.stamps(config.model)
    wanted = {name: stamp for name, stamp in found.items() if is_among(name, _files_of(config), HUB_LEFT_OUT)}
    if not any(name.endswith(".safetensors") for name in wanted):
        raise ModelError(
            f"encoder.model is {config.model!r}, where {len(found)} files are, none of them with safetensors weights; "
            "write the address of the folder that holds modules.json or config.json.",
            code="MODEL_NOT_FOUND",
        )
    folder = cache_folder / "store" / digest([config.model, sorted(wanted.items())])[:32]
    if not folder.is_dir():

        def download(into: str) -> None:
            for name in wanted:
                files.download(join(config.model, name), Path(into, name))

        _fetch(download, folder)
    return ResolvedModel(str(folder), config.model, None)


def _files_of(config: EncoderConfig) -> list[str]:
    """What an encoder reads of a checkpoint."""
    return [*HUB_FILES, *(CODE_FILES if config.trust_remote_code else ())]


def is_among(name: str, wanted: Iterable[str], left_out: Iterable[str]) -> bool:
    """Whether a file, by its path in a checkpoint, fits one of the patterns wanted, and none of those left out."""
    return any(fnmatch(name, each) for each in wanted) and not any(fnmatch(name, each) for each in left_out)


def _from_package(config: EncoderConfig) -> ResolvedModel:
    name = config.model.removeprefix("package:")
    top, *rest = name.split(".")
    found = importlib.util.find_spec(top)  # of a top-level name: looks it up, runs none of its code
    if found is None:
        near = difflib.get_close_matches(top, importlib.metadata.packages_distributions(), n=3)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise ModelError(
            f"encoder.model is {config.model!r}, but no package {top!r} is installed here; {hint}install the package "
            "that carries the model, and write its import name.",
            code="MODEL_NOT_FOUND",
        )
    roots = [Path(root).joinpath(*rest) for root in found.submodule_search_locations or ()]
    folders = [folder for root in roots if root.is_dir() for folder in model_folders(root)]
    return ResolvedModel(
        str(_only(folders, config.model, f"package {name}", roots)), config.model, distribution_of(top)
    )


def distribution_of(package: str) -> str | None:
    """The distribution that brings an import name here, with its version; None where none or several do."""
    names = importlib.metadata.packages_distributions().get(package, [])
    return f"{names[0]}=={importlib.metadata.version(names[0])}" if len(names) == 1 else None


def model_folders(root: Path) -> list[Path]:
    """Folders under `root`, itself included, that hold a sentence-transformers checkpoint; sorted.

    Only where there is none, those with config.json and safetensors: inside a checkpoint, Dense modules look like that.
    """
    folders = sorted({file.parent for file in root.rglob("modules.json")})
    if folders:
        return folders
    return sorted({file.parent for file in root.rglob("config.json") if any(file.parent.glob("*.safetensors"))})


def _only(folders: list[Path], reference: str, place: str, roots: list[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    where = ", ".join(str(root) for root in roots) or "no folder"
    if not folders:
        raise ModelError(
            f"encoder.model is {reference!r}, but {place} ({where}) holds no folder with modules.json, nor one with "
            "config.json and safetensors; use one that carries a model.",
            code="MODEL_NOT_FOUND",
        )
    listed = ", ".join(str(folder) for folder in folders[:5])
    raise ModelError(
        f"encoder.model is {reference!r}, but {place} holds {len(folders)} models ({listed}); write the path of one.",
        code="MODEL_NOT_FOUND",
    )


def _from_hub(config: EncoderConfig) -> ResolvedModel:
    from huggingface_hub import constants, snapshot_download  # half a second, for this form alone
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"encoder.model is {config.model!r}" + (f" at revision {config.revision!r}" if config.revision else "")
    try:
        folder = snapshot_download(
            config.model,
            revision=config.revision,
            allow_patterns=_files_of(config),
            ignore_patterns=list(HUB_LEFT_OUT),
        )
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{what}, HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} does not hold all of it; "
                f"fetch it while online, set HF_HOME to the cache that has it, or {FOLDER_HINT}.",
                code="MODEL_NOT_FOUND",
            ) from error
        raise RunError(
            f"{what}, which is not in the cache {constants.HF_HUB_CACHE}, and the Hub did not answer; try again, or "
            "fetch it elsewhere and set HF_HOME.",
            code="HUB_UNREACHABLE",
        ) from error
    except GatedRepoError as error:
        raise ModelError(
            f"{what}, which is open only to those its owner admits; ask for access on its page and set HF_TOKEN.",
            code="MODEL_NOT_FOUND",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{what}, and the model has no such revision; write a branch, tag or commit.", code="MODEL_NOT_FOUND"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{what}, and the Hub has no such model, or none that this HF_TOKEN may see; check its name, or "
            f"{FOLDER_HINT}.",
            code="MODEL_NOT_FOUND",
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "unknown")
        raise RunError(
            f"{what}, and the Hub answered with HTTP status {status}; try again later.", code="HUB_UNREACHABLE"
        ) from error
    if not any(Path(folder).rglob("*.safetensors")):
        raise ModelError(
            f"{what}, and that has no safetensors weights; choose a revision that has them, or convert the model."
        )
    return ResolvedModel(folder, config.model, Path(folder).name)


def _from_registry(config: EncoderConfig, cache_folder: Path, tracking_uri: str | None) -> ResolvedModel:
    import mlflow  # six seconds, for this form alone
    from mlflow.exceptions import MlflowException

    servers = {"tracking_uri": tracking_uri, "registry_uri": _registry_uri(tracking_uri)}
    try:
        client = mlflow.MlflowClient(**servers)
        pinned, revision, born = _pin(client, config.model.removeprefix("models:/"))
        # A model id is unique; the other parts tell models of one name apart where there is no id, or two servers.
        folder = cache_folder / "registry" / digest([client.tracking_uri, pinned, revision, born])[:32]
        if not folder.is_dir():
            stored = pinned if servers["registry_uri"] is None else _stored_at(client, pinned)
            _fetch(lambda into: mlflow.artifacts.download_artifacts(stored, dst_path=into, **servers), folder)
    except MlflowException as error:
        raise ModelError(
            f"encoder.model is {config.model!r}, and the MLflow registry did not give it "
            f"({scrub(str(error), pairs=True)}); check the name, its alias or version, and tracking.uri.",
            code="MODEL_NOT_FOUND",
        ) from error
    native = [entry for entry in folder.rglob("model.sentence_transformer") if entry.is_dir()]
    folders = [found for root in (native or [folder]) for found in model_folders(root)]
    return ResolvedModel(
        str(_only(folders, config.model, f"{pinned} of the registry", [folder])), config.model, revision
    )


def pinned_reference(reference: str, revision: str) -> str:
    """The `models:/` reference that still means the model of a recorded revision when its alias has moved on."""
    version = revision.partition("/")[0]
    name = reference.removeprefix("models:/").partition("@")[0].partition("/")[0]
    return f"models:/{version}" if version.startswith("m-") else f"models:/{name}/{version}"


def _registry_uri(tracking_uri: str | None) -> str | None:
    """The registry that goes with a tracking server; None: the one that MLflow works out."""
    if tracking_uri is None or tracking_uri.startswith("databricks"):
        return None
    return os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri


def _stored_at(client: object, pinned: str) -> str:
    """Where the files lie: a download of `models:/...` asks MLflow's current registry, whatever server it is given."""
    name = pinned.removeprefix("models:/")
    if "/" not in name:
        return client.get_logged_model(name).artifact_location  # type: ignore[attr-defined]
    stored = client.get_model_version_download_uri(*name.rsplit("/", 1))  # type: ignore[attr-defined]
    return _stored_at(client, stored) if stored.startswith("models:/") else stored


def _pin(client: object, name: str) -> tuple[str, str, int]:
    """The URI that always means the same model, its revision for the record, and when it was made (ms)."""
    if "@" in name:
        model, alias = name.rsplit("@", 1)
        version = client.get_model_version_by_alias(model, alias)  # type: ignore[attr-defined]
    elif "/" in name:
        version = client.get_model_version(*name.rsplit("/", 1))  # type: ignore[attr-defined]
    else:
        logged = client.get_logged_model(name)  # type: ignore[attr-defined]
        return f"models:/{name}", name, logged.creation_timestamp
    pinned = f"models:/{version.name}/{version.version}"
    of_source = version.source.removeprefix("models:/") if version.source.startswith("models:/m-") else None
    model_id = version.model_id or of_source
    return pinned, f"{version.version}/{model_id}" if model_id else str(version.version), version.creation_timestamp


def _fetch(download: Callable[[str], object], folder: Path) -> None:
    """Fill `folder` in one move, so that a download that was killed is not taken for a model by the next run."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as into:
        download(into)
        try:
            Path(into).rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was first with the same model
                raise
        else:
            Path(into).mkdir()  # for TemporaryDirectory to remove


_RESOLVERS: dict[str, Callable[[EncoderConfig], ResolvedModel]] = {
    "hash": _from_hash,
    "folder": _from_folder,
    "package": _from_package,
    "hub": _from_hub,
}
