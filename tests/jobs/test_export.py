"""What `shoal export` writes, read by the libraries it is for."""

import json
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import lance
import numpy as np
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, DestinationError, RunError
from shoal.conf.loader import load_run
from shoal.jobs import cli
from shoal.jobs.embed import embed
from shoal.jobs.export import ABOUT_FILE, export
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = pytest.mark.spark

UNTIL = "9999-12-31T23:59:59Z"
TEXTS = {"a": "one fish", "b": "two fish", "c": None, "d": "red fish"}
VECTORS = {key: hash_vectors([text], 8)[0] for key, text in TEXTS.items() if text}


@pytest.fixture(scope="module")
def made(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{"id": key, "body": text, "tag": key * 2, "until": UNTIL} for key, text in TEXTS.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "name": "docs",
        "source": {
            "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "columns": ["tag", "until"],
            "schema": "id STRING, body STRING, tag STRING, until TIMESTAMP",
        },
        "encoder": {"model": "hash:8"},
        "destination": {"path": "docs"},
        "tracking": {"enabled": False},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(run))
    embed(spark, load_run(folder / "run.yaml"))
    return folder


@pytest.fixture
def table(made: Path, tmp_path: Path) -> str:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return str(tmp_path / "docs")


def require_rows(rows: list[dict[str, Any]]) -> None:
    assert {row["id"]: (row["chunk_index"], row["text"], row["tag"]) for row in rows} == {
        key: (0, TEXTS[key], key * 2) for key in VECTORS
    }
    assert {row["until"] for row in rows} == {datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)}


def test_parquet_files_have_rows_vectors_and_say_where_they_are_from(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["export", table, "--to", "parquet", "--out", str(tmp_path / "files"), "--json"])

    told = json.loads(capsys.readouterr().out)
    assert code == 0
    rows = pq.read_table(tmp_path / "files").to_pylist()
    require_rows(rows)
    for row in rows:
        np.testing.assert_array_equal(np.float32(row["embedding"]), VECTORS[row["id"]])
    about = json.loads((tmp_path / "files" / ABOUT_FILE).read_text())
    assert (about["table"], about["version"], about["encoder"]) == (table, 0, "hash:8")
    assert (told["fingerprint"], told["rows"], told["without_vector"]) == (about["fingerprint"], 3, 1)
    assert told["bytes_written"] > 0


def test_a_lance_dataset_has_vectors_of_one_width_that_it_can_search(
    spark: SparkSession, table: str, tmp_path: Path
) -> None:
    export(spark, table, "lance", str(tmp_path / "docs.lance"))

    dataset = lance.dataset(str(tmp_path / "docs.lance"))
    require_rows(dataset.to_table().to_pylist())
    assert dataset.schema.field("embedding").type.list_size == 8
    assert json.loads(dataset.schema.metadata[b"shoal"])["version"] == 0
    nearest = dataset.to_table(nearest={"column": "embedding", "q": VECTORS["b"], "k": 1, "metric": "cosine"})
    assert nearest.column("id").to_pylist() == ["b"]


def test_positions_in_a_faiss_index_are_those_of_the_rows_beside_it(
    spark: SparkSession, table: str, tmp_path: Path
) -> None:
    folder = tmp_path / "index"
    export(spark, table, "faiss", str(folder))

    index = faiss.read_index(str(folder / "index.faiss"))
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    require_rows(rows)
    scores, positions = index.search(np.stack([VECTORS["d"], VECTORS["a"]]), 1)
    assert [rows[position]["id"] for position in positions[:, 0]] == ["d", "a"]
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)
    assert json.loads((folder / ABOUT_FILE).read_text())["identity"]["dim"] == 8
    assert sorted(path.name for path in folder.iterdir()) == [ABOUT_FILE, "index.faiss", "rows.parquet"]


@pytest.mark.parametrize("kind", ["parquet", "lance", "faiss"])
def test_what_is_there_already_stays(spark: SparkSession, table: str, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes").write_text("mine")

    with pytest.raises(DestinationError, match="something is there already"):
        export(spark, table, kind, str(folder))

    assert [path.read_text() for path in folder.iterdir()] == ["mine"]


def test_a_library_that_is_missing_is_named_before_anything_is_written(
    spark: SparkSession, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'shoal\[faiss\]'"):
        export(spark, table, "faiss", str(tmp_path / "index"))
    assert not (tmp_path / "index").exists()


def test_vectors_of_two_widths_end_the_export_and_leave_nothing(
    spark: SparkSession, table: str, tmp_path: Path
) -> None:
    spark.sql(f"ALTER TABLE delta.`{table}` DROP CONSTRAINT IF EXISTS shoal_dimension")
    for row in spark.sql(f"SHOW TBLPROPERTIES delta.`{table}`").collect():
        if row["key"].startswith("delta.constraints."):
            spark.sql(f"ALTER TABLE delta.`{table}` DROP CONSTRAINT {row['key'].removeprefix('delta.constraints.')}")
    spark.sql(f"UPDATE delta.`{table}` SET embedding = array(CAST(1 AS FLOAT)) WHERE id = 'a'")
    before = sorted(path.name for path in tmp_path.iterdir())

    with pytest.raises(RunError, match="another width than 8"):
        export(spark, table, "faiss", str(tmp_path / "index"))

    assert sorted(path.name for path in tmp_path.iterdir()) == before
