"""`lineage` of a run file: what a run read and wrote, and how it ended, as OpenLineage's events by its own client."""

import importlib
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from shoal.conf.errors import ConfigError, first_line
from shoal.conf.redact import scrub
from shoal.conf.run import RunConfig
from shoal.conf.source import SourceConfig
from shoal.udfs.visit_udf import shoal_version

PORTS = {"postgres": 5432, "mysql": 3306}
"""Of databases whose address may leave it out; OpenLineage's names have it."""

ENDS = {"published": "COMPLETE", "unchanged": "COMPLETE", "busy": "ABORT"}
"""By a run's status; all others are failures."""


def require_client(config: RunConfig) -> None:
    """ConfigError when the run file asks for lineage and OpenLineage's client is not installed."""
    if config.lineage is not None:
        _client_module("client")


def tell(config: RunConfig, document: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Sends a START and an end event for the run of this document, `shoal embed --json`'s, where the file asks for it.

    Where events go is the client's own configuration (OPENLINEAGE_URL, openlineage.yml). False, and a line by `say`,
    when they did not get there; the run itself stays what it was.
    """
    if config.lineage is None:
        return True
    try:
        client = _client_module("client").OpenLineageClient()
        if client.transport.kind == "console":
            raise ConfigError("no place to send events to; set OPENLINEAGE_URL, or write an openlineage.yml")
        for event in _events(config, config.lineage.namespace, document):
            client.emit(event)
        client.close()
    except Exception as error:  # noqa: BLE001 - whatever a lineage server does, the run is over
        told = scrub(config.mask(first_line(error)), pairs=True)
        say(f"warning: lineage: {told}; the run itself is not touched by it")
        return False
    return True


def _client_module(name: str) -> Any:
    try:
        return importlib.import_module(f"openlineage.client.{name}")
    except ImportError as error:
        raise ConfigError(
            "lineage is set, and OpenLineage's client is not installed; pip install openlineage-python, or remove the "
            "section"
        ) from error


def _events(config: RunConfig, namespace: str, document: dict[str, Any]) -> list[Any]:
    """The two events: the first says that there was a run, the second all that is known of it."""
    v2, facets = _client_module("event_v2"), _client_module("facet_v2")
    version = shoal_version()
    ended = datetime.now(UTC)
    started = ended - timedelta(seconds=(document.get("seconds") or {}).get("total") or 0.0)
    about: dict[str, Any] = {
        "processing_engine": facets.processing_engine_run.ProcessingEngineRunFacet(version, "Shoal")
    }
    if document.get("error"):
        about["errorMessage"] = facets.error_message_run.ErrorMessageRunFacet(document["error"], "PYTHON")
    # OpenLineage wants a UUID; two tellings of one run are to have the same.
    run_id = document.get("run_id")
    number = uuid.uuid5(uuid.NAMESPACE_URL, f"shoal:{run_id}") if run_id else uuid.uuid4()
    of_job = {"jobType": facets.job_type_job.JobTypeJobFacet("BATCH", "SHOAL", jobType="JOB")}
    if config.source.query:
        of_job["sql"] = facets.sql_job.SQLJobFacet(config.mask(config.source.query))
    job = v2.Job(namespace, config.name, facets=of_job)
    read, written = _inputs(config, namespace, document), [_output(config, namespace, document)]
    return [
        v2.RunEvent(
            eventTime=at.isoformat(), producer=f"urn:shoal:{version}", run=v2.Run(str(number), facets=facts), job=job,
            eventType=v2.RunState[kind], inputs=read, outputs=written,
        )
        for kind, at, facts in (
            ("START", started, {}), (ENDS.get(document.get("status") or "", "FAIL"), ended, about)
        )
    ]  # fmt: skip


def _inputs(config: RunConfig, namespace: str, document: dict[str, Any]) -> list[Any]:
    """The datasets of the source; of an SQL query none, whose text the job has."""
    dataset, about = _client_module("event_v2").InputDataset, _version(document.get("source_version"))
    return [dataset(*each, facets=about) for each in names_of_source(config.source, namespace)]


def _output(config: RunConfig, namespace: str, document: dict[str, Any]) -> Any:
    v2, facets = _client_module("event_v2"), _client_module("facet_v2")
    destination = config.destination
    named = (namespace, destination.table) if destination.table else name_of_path(destination.path or "")
    about = {
        "storage": facets.storage_dataset.StorageDatasetFacet("delta", "parquet"),
        **_version(document.get("version")),
    }
    counts: dict[str, Any] = {}
    if document.get("status") == "published":
        counts["outputStatistics"] = facets.output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
            rowCount=document["chunks"]["planned"], size=document["bytes_written"]
        )
    return v2.OutputDataset(*named, facets=about, outputFacets=counts)


def _version(number: int | None) -> dict[str, Any]:
    """The facet of a dataset at a version, where there is one."""
    if number is None:
        return {}
    return {"version": _client_module("facet_v2").dataset_version_dataset.DatasetVersionDatasetFacet(str(number))}


def names_of_source(source: SourceConfig, namespace: str) -> list[tuple[str, str]]:
    """(namespace, name) of each dataset, by OpenLineage's naming; a catalog's tables are in the job's namespace."""
    if source.database is not None:
        return [name_of_database(source.database.url, source.table)] if source.table else []
    if source.table:
        return [(namespace, source.table)]
    return [name_of_path(path) for path in source.paths]


def name_of_path(path: str) -> tuple[str, str]:
    """(namespace, name): the file system, and the path there; a bucket's keys have no slash in front."""
    scheme, separator, rest = path.partition("://")
    if not separator or scheme == "file":
        return "file", "/" + path.removeprefix("file:").lstrip("/")
    place, _, below = rest.partition("/")
    if scheme in ("s3a", "s3n", "s3", "gs"):
        return f"{'gs' if scheme == 'gs' else 's3'}://{place}", below.strip("/")
    return f"{scheme}://{place}", f"/{below.strip('/')}"


def name_of_database(url: str, table: str) -> tuple[str, str]:
    """(namespace, name) of a table behind a JDBC address."""
    parts = urlsplit(url.removeprefix("jdbc:"))
    scheme = "postgres" if parts.scheme == "postgresql" else parts.scheme
    port = parts.port or PORTS.get(scheme)
    database = parts.path.strip("/")
    full = f"public.{table}" if scheme == "postgres" and "." not in table else table
    place = f"{scheme}://{parts.hostname or 'localhost'}" + (f":{port}" if port else "")
    return place, ".".join(part for part in (database, full) if part)
