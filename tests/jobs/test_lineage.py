"""What a lineage server is told of a run: a real HTTP server takes the events of OpenLineage's own client."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.conf.run import RunConfig
from shoal.jobs.cli import main
from shoal.jobs.lineage import name_of_database, name_of_path, tell

RUN = """\
name: docs
source: {format: delta, path: "s3a://lake/raw/docs", key: id, text: body}
encoder: {model: "hash:8"}
destination: {table: shop.docs}
lineage: {namespace: nightly}
"""
DOCUMENT = {
    "status": "published",
    "run_id": "20260131T060000-0a1b2c3d",
    "version": 7,
    "source_version": 12,
    "chunks": {"planned": 40},
    "bytes_written": 12345,
    "seconds": {"total": 90.0},
    "error": None,
}

# What OpenLineage's specification wants of any run event (version 2-0-2), written down in its own words.
NAMED = {"type": "object", "required": ["namespace", "name"], "properties": {"facets": {"type": "object"}}}
EVENT = {
    "type": "object",
    "required": ["eventTime", "producer", "schemaURL", "eventType", "run", "job"],
    "properties": {
        "eventTime": {"type": "string", "format": "date-time"},
        "producer": {"type": "string", "format": "uri"},
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        "run": {"type": "object", "required": ["runId"], "properties": {"runId": {"type": "string", "format": "uuid"}}},
        "job": NAMED,
        "inputs": {"type": "array", "items": NAMED},
        "outputs": {"type": "array", "items": NAMED},
    },
}


class Server:
    """Takes events at /api/v1/lineage, and answers with `status`."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.status = 201
        taker = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/api/v1/lineage" and taker.status < 300:
                    taker.events.append(json.loads(body))
                self.send_response(taker.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    running = Server()
    # A file, not OPENLINEAGE_URL: the client copies that into variables of its own, which would outlive the test.
    told = {"transport": {"type": "http", "url": running.url, "retry": {"total": 0}}}
    (tmp_path / "openlineage.yml").write_text(json.dumps(told))
    yield running
    running.close()


def config_of(tmp_path: Path, *changes: str) -> RunConfig:
    (tmp_path / "run.yaml").write_text(RUN)
    return load_run(tmp_path / "run.yaml", changes)


def test_a_run_is_told_from_its_source_to_its_table(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    assert tell(config_of(tmp_path), DOCUMENT, said.append)
    start, end = server.events

    assert said == []
    for event in server.events:
        jsonschema.validate(event, EVENT, format_checker=jsonschema.FormatChecker())
        assert (event["job"]["namespace"], event["job"]["name"]) == ("nightly", "docs")
        assert [(each["namespace"], each["name"]) for each in event["inputs"]] == [("s3://lake", "raw/docs")]
        assert [(each["namespace"], each["name"]) for each in event["outputs"]] == [("nightly", "shop.docs")]
    assert (start["eventType"], end["eventType"]) == ("START", "COMPLETE")
    assert start["run"]["runId"] == end["run"]["runId"]
    assert start["eventTime"] < end["eventTime"]
    assert end["inputs"][0]["facets"]["version"]["datasetVersion"] == "12"
    (written,) = end["outputs"]
    assert written["facets"]["version"]["datasetVersion"] == "7"
    assert written["outputFacets"]["outputStatistics"]["rowCount"] == 40
    assert written["outputFacets"]["outputStatistics"]["size"] == 12345

    assert tell(config_of(tmp_path), DOCUMENT, said.append)
    assert server.events[-1]["run"]["runId"] == end["run"]["runId"]


@pytest.mark.parametrize(
    ("status", "kind"), [("unchanged", "COMPLETE"), ("refused", "FAIL"), ("failed", "FAIL"), ("busy", "ABORT")]
)
def test_the_end_is_told_as_it_was(server: Server, tmp_path: Path, status: str, kind: str) -> None:
    document = {"status": status, "run_id": None, "version": None, "error": "why it ended"}
    assert tell(config_of(tmp_path), document, lambda _: None)
    end = server.events[-1]
    assert end["eventType"] == kind
    assert end["run"]["facets"]["errorMessage"]["message"] == "why it ended"
    assert "outputStatistics" not in end["outputs"][0].get("outputFacets", {})


@pytest.mark.spark
@pytest.mark.slow
def test_the_command_tells_of_a_run_that_published_and_of_one_that_was_refused(
    spark: SparkSession, server: Server, run_file: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows([{"id": "a", "body": "one text"}])
    run = str(run_file(lineage={"namespace": "nightly"}))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["embed", run]) == 0
        published = server.events[-1]
        assert main(["embed", run, "--set", "limits.min_rows=2"]) == 3
        assert main(["embed", run, "--limit", "1"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)

    assert [event["eventType"] for event in server.events] == ["START", "COMPLETE", "START", "FAIL"]
    assert [each["name"] for each in published["inputs"]] == [str(tmp_path / "corpus.jsonl")]
    (written,) = published["outputs"]
    assert (written["namespace"], written["name"]) == ("file", str(tmp_path / "out/docs"))
    assert written["facets"]["version"]["datasetVersion"] == "0"
    assert written["outputFacets"]["outputStatistics"]["rowCount"] == 1
    assert "limits.min_rows is 2" in server.events[-1]["run"]["facets"]["errorMessage"]["message"]


def test_a_query_is_told_with_the_job(server: Server, tmp_path: Path) -> None:
    changes = ("source.format=query", "source.path=null", "source.query=SELECT id, body FROM shop.articles")
    assert tell(config_of(tmp_path, *changes), DOCUMENT, lambda _: None)
    end = server.events[-1]
    assert end["job"]["facets"]["sql"]["query"] == "SELECT id, body FROM shop.articles"
    assert end["inputs"] == []


def test_a_server_that_refuses_is_a_warning(server: Server, tmp_path: Path) -> None:
    server.status = 500
    said: list[str] = []
    assert not tell(config_of(tmp_path), DOCUMENT, said.append)
    assert len(said) == 1
    assert said[0].startswith("warning: lineage: ")


def test_without_a_place_to_send_to_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    said: list[str] = []
    assert not tell(config_of(tmp_path), DOCUMENT, said.append)
    assert "set OPENLINEAGE_URL" in said[0]


def test_without_the_section_nothing_is_sent(server: Server, tmp_path: Path) -> None:
    assert tell(config_of(tmp_path, "lineage=null"), DOCUMENT, lambda _: None)
    assert server.events == []


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/data/docs", ("file", "/data/docs")),
        ("file:///data/docs", ("file", "/data/docs")),
        ("s3a://lake/raw/docs/", ("s3://lake", "raw/docs")),
        ("gs://lake/raw", ("gs://lake", "raw")),
        ("hdfs://nn:8020/raw", ("hdfs://nn:8020", "/raw")),
        ("abfss://lake@example.org/raw", ("abfss://lake@example.org", "/raw")),
    ],
)
def test_paths_have_openlineages_names(path: str, named: tuple[str, str]) -> None:
    assert name_of_path(path) == named


@pytest.mark.parametrize(
    ("url", "table", "named"),
    [
        ("jdbc:postgresql://db/shop", "articles", ("postgres://db:5432", "shop.public.articles")),
        ("jdbc:postgresql://db:6000/shop?ssl=true", "sales.docs", ("postgres://db:6000", "shop.sales.docs")),
        ("jdbc:mysql://db/shop", "articles", ("mysql://db:3306", "shop.articles")),
    ],
)
def test_tables_of_databases_have_openlineages_names(url: str, table: str, named: tuple[str, str]) -> None:
    assert name_of_database(url, table) == named
