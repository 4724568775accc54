"""Turns a run's record into an MLflow run; the only module that talks to MLflow, and only from the driver."""

import json
import os
from pathlib import Path
from typing import Any

from shoal.conf.fingerprint import digest
from shoal.conf.run import TrackingConfig

RUN_ID_TAG = "shoal.run_id"

# Left alone, MLflow's client retries an unreachable server for minutes; a nightly run has better things to do.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
_FAILED = {"failed", "refused", "busy"}


def send(record: dict[str, Any], tracking: TrackingConfig) -> str:
    """Logs one record (see report.py) and returns the MLflow run id; a record that is there already is not doubled."""
    for key, value in _PATIENCE.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=tracking.uri)
    experiment = _experiment(client, experiment_name(tracking, record["name"]), tracking)
    run_id = record["run_id"]
    known = client.search_runs([experiment], filter_string=f"tags.`{RUN_ID_TAG}` = '{run_id}'", max_results=1)
    run = (
        known[0]
        if known
        else client.create_run(
            experiment,
            start_time=record["started_ms"],
            run_name=f"{record['name']} {run_id}",
            tags=_tags(record, tracking),
        )
    )
    mlflow_id = run.info.run_id
    for name, value in _tags(record, tracking).items() if known else ():
        client.set_tag(mlflow_id, name, value)
    _log(client, mlflow_id, record)
    status = "FAILED" if record["status"] in _FAILED else "FINISHED"
    client.set_terminated(mlflow_id, status=status, end_time=record["ended_ms"])
    return mlflow_id


def experiment_name(tracking: TrackingConfig, name: str) -> str:
    """The experiment of a run of this name; on Databricks experiments are paths of the workspace."""
    found = tracking.experiment or name
    return f"/Shared/{found}" if tracking.uri.startswith("databricks") and not found.startswith("/") else found


def _experiment(client: Any, name: str, tracking: TrackingConfig) -> str:
    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    # MLflow would put the artifacts of a local database into the working directory, whatever that is tonight.
    database = (
        tracking.uri.removeprefix("sqlite:///").partition("?")[0] if tracking.uri.startswith("sqlite:///") else None
    )
    place = (Path(database).parent / "mlruns" / name).absolute().as_uri() if database else None
    return client.create_experiment(name, artifact_location=place)


def _tags(record: dict[str, Any], tracking: TrackingConfig) -> dict[str, str]:
    tags = {
        RUN_ID_TAG: record["run_id"],
        "shoal.status": record["status"],
        "shoal.fingerprint": record["fingerprint"],
        "shoal.source_version": record["source_version"],
        "delta.table": record["table"],
        "delta.version": record["version"],
        "mlflow.source.git.commit": record["git_revision"],
    }
    return {key: str(value) for key, value in (tags | dict(tracking.tags)).items() if value is not None}


def _log(client: Any, run_id: str, record: dict[str, Any]) -> None:
    from mlflow.data.delta_dataset_source import DeltaDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    ended = record["ended_ms"]
    params = [Param(key, value[:6000]) for key, value in sorted(flat(record["config"]).items())]
    metrics = [Metric(key, value, ended, 0) for key, value in sorted(numbers(record).items())]
    for second, chunks, tokens in record.get("progress", []):
        at = record["started_ms"] + int(second * 1000)
        metrics += [
            Metric("progress.chunks", chunks, at, int(second)),
            Metric("progress.tokens", tokens, at, int(second)),
        ]
    for start in range(0, max(len(params), 1), 100):
        client.log_batch(run_id, params=params[start : start + 100])
    for start in range(0, max(len(metrics), 1), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    inputs = []
    for context, place, version in (
        ("source", record["source"], record["source_version"]),
        ("embeddings", record["table"], record["version"]),
    ):
        if version is None:
            continue
        source = DeltaDatasetSource(
            path=place if "/" in place else None,
            delta_table_name=None if "/" in place else place,
            delta_table_version=version,
        )
        # MLflow leaves version 0 out, and takes datasets of one name and digest for one.
        described = MetaDataset(source=source, name=place.rstrip("/").rsplit("/", 1)[-1])._to_mlflow_entity()
        dataset = Dataset(
            name=described.name,
            digest=f"{version}-{digest(place)[:8]}",
            source_type=described.source_type,
            source=json.dumps({**source.to_dict(), "delta_table_version": version}),
            schema=described.schema,
            profile=described.profile,
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    if inputs:
        client.log_inputs(run_id, datasets=inputs)
    client.log_dict(run_id, record["config"], "config.json")
    client.log_dict(run_id, {key: record[key] for key in ("rows", "chunks", "estimate")}, "plan.json")
    client.log_text(run_id, json.dumps(record, indent=2, sort_keys=True), "summary.json")


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `a.b.c` -> text; None and empty ones are left out."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The record's counts, times and rates under the names that MLflow shows."""
    found: dict[str, float] = {}
    for group in ("rows", "chunks", "seconds"):
        found |= {f"{group}.{key}": float(value) for key, value in record[group].items()}
    found |= {f"errors.{reason}": float(count) for reason, count in record["errors"].items()}
    found["tokens"] = float(record["tokens"])
    found["bytes_written"] = float(record["bytes_written"])
    if record["seconds"]["encode"] > 0:
        found["tokens_per_second"] = record["tokens"] / record["seconds"]["encode"]
    for name in ("padding_share", "parity_min_cosine", "ndcg"):
        if record.get(name) is not None:
            found[name] = float(record[name])
    return found
