"""`shoal join` on published tables: what the result is, what it says of itself, what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, DestinationError
from shoal.conf.loader import load_run
from shoal.jobs import cli
from shoal.jobs.cells import FRESH
from shoal.jobs.embed import embed
from shoal.jobs.indexing import VERB, build
from shoal.jobs.join import join
from shoal.jobs.operation import operating
from shoal.jobs.session import with_settings
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = pytest.mark.spark

LEFT = {"a": "one fish", "b": "two fish", "c": "red fish", "d": None}
RIGHT = {1: "red fish", 2: "blue fish", 3: "red fish", 4: "two fish", 5: " ", 6: "old fish"}


@pytest.fixture(scope="module")
def tables(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two tables of one encoder, with keys of different names and types, and one of another encoder."""
    folder = tmp_path_factory.mktemp("join")
    made = {
        "left": ("id STRING", LEFT, "hash:8"),
        "right": ("n INT", RIGHT, "hash:8"),
        "other": ("n INT", RIGHT, "hash:4"),
    }
    for name, (key, texts, model) in made.items():
        column = key.split()[0]
        rows = "".join(json.dumps({column: value, "body": text}) + "\n" for value, text in texts.items())
        (folder / f"{name}.jsonl").write_text(rows)
        settings = {
            "name": name,
            "source": {
                "format": "json", "path": f"{name}.jsonl", "key": column, "text": "body",
                "schema": f"{key}, body STRING",
            },
            "encoder": {"model": model},
            "destination": {"path": name},
            "tracking": {"enabled": False},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(settings))
        embed(spark, load_run(folder / f"{name}.yaml"))
    return {name: str(folder / name) for name in made}


def expected(k: int) -> list[tuple[str, int, int]]:
    """Left key, right key and rank; the scores of equal texts are equal, and the lower key comes first."""
    right = [(key, text) for key, text in RIGHT.items() if text.strip()]
    right_RD = hash_vectors([text for _, text in right], 8).astype(np.float64)
    pairs = []
    for key, text in LEFT.items():
        if text is not None:
            scores_R = (right_RD @ hash_vectors([text], 8)[0].astype(np.float64)).astype(np.float32)
            order = np.argsort(-scores_R, kind="stable")[:k]
            pairs += [(key, right[place][0], nth) for nth, place in enumerate(order, start=1)]
    return pairs


def quiet(_: str) -> None:
    """Nothing is told."""


def test_each_chunk_gets_its_nearest_in_one_commit_that_says_what_it_was_made_from(
    spark: SparkSession, tables: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "pairs")

    code = cli.main(["join", tables["left"], tables["right"], "--k", "3", "--out", out, "--json"])

    found = json.loads(capsys.readouterr().out)
    assert code == 0
    rows = spark.read.format("delta").load(out)
    assert dict(rows.dtypes) == {
        "left_id": "string", "left_chunk_index": "int", "right_n": "int", "right_chunk_index": "int",
        "score": "float", "rank": "int",
    }  # fmt: skip
    told = rows.orderBy("left_id", "rank").collect()
    assert [(row["left_id"], row["right_n"], row["rank"]) for row in told] == expected(3)
    alike = [row["score"] for row in told if LEFT[row["left_id"]] == RIGHT[row["right_n"]]]
    np.testing.assert_allclose(alike, [1, 1, 1], atol=1e-6)
    assert {name: found[name] for name in ("status", "table", "version", "self", "k", "threshold")} == {
        "status": "written", "table": out, "version": 0, "self": False, "k": 3, "threshold": None,
    }  # fmt: skip
    assert found["left"] == {"table": tables["left"], "version": 0, "rows": 4, "without_vector": 1}
    assert found["right"] == {"table": tables["right"], "version": 0, "rows": 6, "without_vector": 1}
    assert (found["pairs_scored"], found["pairs_written"]) == (3 * 5, 3 * 3)
    files = sum(path.stat().st_size for path in Path(out).glob("*.parquet"))
    assert found["bytes_written"] == files > 0
    detail = spark.sql(f"DESCRIBE DETAIL delta.`{out}`").collect()[0]
    history = spark.sql(f"DESCRIBE HISTORY delta.`{out}`").collect()
    made_from = json.loads(detail["properties"]["shoal.join"])
    assert [json.loads(commit["userMetadata"]) for commit in history] == [made_from]
    assert (made_from["left"], made_from["k"]) == ({"table": tables["left"], "version": 0}, 3)
    assert made_from["fingerprint"] == found["fingerprint"]


def test_a_table_joined_with_itself_has_each_pair_once_and_replaces_a_former_result(
    spark: SparkSession, tables: dict[str, str], tmp_path: Path
) -> None:
    out = str(tmp_path / "alike")
    join(spark, tables["right"], tables["left"], out, say=quiet)

    found = join(spark, tables["right"], tables["right"] + "/", out, threshold=0.99, say=quiet)

    rows = spark.read.format("delta").load(out).collect()
    assert [(row["left_n"], row["right_n"], row["rank"]) for row in rows] == [(1, 3, 1)]
    assert (found["self"], found["k"], found["threshold"], found["version"]) == (True, None, 0.99, 1)
    assert found["pairs_scored"] == 5 * 4 // 2
    assert len(spark.read.format("delta").option("versionAsOf", 0).load(out).collect()) == 5 * 3


def test_the_versions_that_were_read_are_joined_whatever_is_committed_meanwhile(
    spark: SparkSession, tables: dict[str, str], tmp_path: Path
) -> None:
    """The right table loses a row as soon as its version is known."""
    copy = str(tmp_path / "copy")
    spark.sql(f"CREATE TABLE delta.`{copy}` SHALLOW CLONE delta.`{tables['right']}`")

    def meanwhile(_: str) -> None:
        spark.sql(f"DELETE FROM delta.`{copy}` WHERE n = 1")

    found = join(spark, tables["left"], copy, str(tmp_path / "pairs"), k=1, say=meanwhile)

    rows = spark.read.format("delta").load(str(tmp_path / "pairs")).orderBy("left_id").collect()
    assert [(row["left_id"], row["right_n"], row["rank"]) for row in rows] == expected(1)
    assert (found["right"]["version"], found["right"]["rows"]) == (0, 6)


def test_pairs_are_counted_where_a_session_keeps_no_metrics_of_its_commits(
    spark: SparkSession, tables: dict[str, str], tmp_path: Path
) -> None:
    with with_settings(spark, {"spark.databricks.delta.history.metricsEnabled": "false"}):
        found = join(spark, tables["left"], tables["right"], str(tmp_path / "pairs"), k=2, say=quiet)

    assert (found["version"], found["pairs_written"]) == (0, 3 * 2)


def test_a_result_in_the_catalog_goes_by_its_name(spark: SparkSession, tables: dict[str, str]) -> None:
    spark.sql("CREATE SCHEMA IF NOT EXISTS fish")
    try:
        found = [join(spark, tables["left"], tables["right"], "fish.pairs", k=1, say=quiet) for _ in range(2)]
        assert [each["version"] for each in found] == [0, 1]
        assert spark.table("fish.pairs").count() == 3
    finally:
        spark.sql("DROP SCHEMA fish CASCADE")


def test_tables_of_two_encoders_are_refused_and_both_are_named(
    spark: SparkSession, tables: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"left holds vectors of hash:8 .* table .*other vectors of hash:4") as caught:
        join(spark, tables["left"], tables["other"], str(tmp_path / "pairs"), say=quiet)

    assert caught.value.code == "ENCODERS_DIFFER"
    assert not (tmp_path / "pairs").exists()


def test_what_the_verb_did_not_make_is_never_written_over(
    spark: SparkSession, tables: dict[str, str], tmp_path: Path
) -> None:
    plain, folder = tmp_path / "plain", tmp_path / "folder"
    spark.range(1).write.format("delta").save(str(plain))
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for out in (str(plain), str(folder), tables["left"]):
        with pytest.raises(DestinationError) as caught:
            join(spark, tables["left"], tables["right"], out, say=quiet)
        assert caught.value.code == "TABLE_NOT_OURS", out
    assert spark.read.format("delta").load(str(plain)).count() == 1
    assert spark.sql(f"DESCRIBE HISTORY delta.`{tables['left']}`").count() == 1


@pytest.mark.long
def test_an_index_narrows_a_join_to_the_nearest_cells_and_what_is_fresh(
    spark: SparkSession, tables: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two cells and with all of them, in one with no more than that; the fresh row is found either way."""
    copy, out = str(tmp_path / "copy"), str(tmp_path / "pairs")
    shutil.copytree(tables["right"], copy)
    shutil.copytree(f"{tables['right']}__shoal", f"{copy}__shoal", dirs_exist_ok=True)
    with operating(spark, copy, VERB) as operation:
        build(operation, cells=2)
    spark.sql(f"UPDATE delta.`{copy}` SET cell = {FRESH} WHERE n = 4")

    assert cli.main(["join", tables["left"], copy, "--k", "3", "--probes", "9", "--out", out]) == 0

    told = capsys.readouterr()
    assert "compared  each chunk with 2 of 2 cells and fresh rows in " in told.out
    assert "in 2 of 2 cells" in told.err
    rows = spark.read.format("delta").load(out).orderBy("left_id", "rank").collect()
    assert [(row["left_id"], row["right_n"], row["rank"]) for row in rows] == expected(3)
    one = join(spark, tables["left"], copy, out, k=3, probes=1, say=quiet)
    assert (one["cells"], one["pairs_scored"]) == ({"probes": 1, "of": 2}, None)
    rows = spark.read.format("delta").load(out).collect()
    assert {row["left_id"] for row in rows if row["right_n"] == 4} == {"a", "b", "c"}
    assert 3 <= len(rows) <= 9
    made_from = json.loads(spark.sql(f"DESCRIBE DETAIL delta.`{out}`").collect()[0]["properties"]["shoal.join"])
    assert made_from["cells"] == {"probes": 1, "of": 2}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"probes": 1}, ConfigError, "--probes 1: table .*right has no index to look in; `shoal index .*right` builds"),
        ({"probes": 0}, ConfigError, "--probes is 0; look in at least 1 cell"),
        ({"k": 0}, ConfigError, "--k, --threshold: k is 0"),
        ({"threshold": float("nan")}, ConfigError, "--k, --threshold: threshold is nan"),
        ({"right": "no/such/table"}, DestinationError, "table '/.*no/such/table': there is no such table"),
        ({"out": "no_schema.pairs"}, DestinationError, r"the schema `no_schema` is not there; .* write \./no_schema"),
    ],
    ids=str,
)
def test_what_cannot_be_joined_is_said(
    spark: SparkSession, tables: dict[str, str], tmp_path: Path, change: dict[str, Any], kind: type, message: str
) -> None:
    given = {"left": tables["left"], "right": tables["right"], "out": str(tmp_path / "pairs"), **change}
    with pytest.raises(kind, match=message):
        join(spark, given.pop("left"), given.pop("right"), given.pop("out"), **given, say=quiet)


def test_people_are_told_what_was_joined(
    spark: SparkSession, tables: dict[str, str], tmp_path: Path, shoal: Any
) -> None:
    code, told = shoal("join", tables["right"], tables["right"], "--k", "1", "--out", str(tmp_path / "pairs"))

    assert code == 0
    assert told[0] == f"left      {tables['right']} version 0: 6 chunks, 1 without a vector"
    assert told[1] == "right     the same"
    assert told[2].startswith("scored    10 pairs in ")
    assert told[3].startswith("written   ")


@pytest.fixture
def shoal(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    def run(*argv: str) -> tuple[int, list[str]]:
        return cli.main([*argv]), capsys.readouterr().out.splitlines()

    return run
