"""The main job end to end on real Delta tables, with the hash encoder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from shoal.conf.errors import LimitError, RefusedError
from shoal.conf.loader import load_run
from shoal.jobs.embed import embed
from shoal.jobs.session import LOGGED_RUN, described, with_settings
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = pytest.mark.spark


def published(spark: SparkSession, path: Path) -> dict[tuple[str, int], Any]:
    rows = spark.read.format("delta").load(str(path)).collect()
    found = {(row["id"], row["chunk_index"]): row for row in rows}
    assert len(found) == len(rows), "a chunk is published twice"
    return found


def rows_of(*texts: str | None, first: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"r{first + index}", "body": text} for index, text in enumerate(texts)]


def jobs_of(spark: SparkSession) -> set[str]:
    """What Spark's UI calls the jobs that it still knows."""
    jobs = spark.sparkContext._jsc.sc().statusStore().jobsList(None)  # type: ignore[union-attr]
    told = [jobs.apply(index).description() for index in range(jobs.size())]
    return {each.get() for each in told if each.isDefined()}


def test_the_jobs_of_a_run_are_called_by_its_phases_and_waves(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path]
) -> None:
    write_rows(rows_of("one fish", "two fish", "red fish"))
    with described(spark, "mine", "my run"):
        embed(spark, load_run(run_file(encode={"wave_chunks": 2})))
        assert spark.sparkContext.getLocalProperty("spark.job.description") == "mine"
        assert spark.sparkContext.getLocalProperty(LOGGED_RUN) == "my run"
    assert spark.sparkContext.getLocalProperty("spark.job.description") is None

    told = jobs_of(spark)
    for phase in ("plan", "audit", "publish", "record"):
        assert any(each.startswith(f"shoal: docs, {phase}") for each in told), phase
    assert {f"shoal: encode wave {wave} of 2" for wave in (1, 2)} <= told


def test_first_run_publishes_every_row_with_its_vector_and_the_second_does_nothing(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows(rows_of("one fish", "two fish", "red fish"))
    config = load_run(run_file())

    first = embed(spark, config).record()
    second = embed(spark, config).record()

    assert first["status"] == "published"
    assert first["chunks"] == {
        "planned": 3, "distinct": 3, "reused": 0, "encoded": 3, "embedded": 3, "errors": 0, "truncated": 0
    }  # fmt: skip
    assert (first["version"], first["generation"]) == (0, 1)
    assert second["status"] == "unchanged"
    assert second["chunks"]["encoded"] == 0
    assert second["version"] == 0
    table = published(spark, tmp_path / "out/docs")
    expected = hash_vectors(["one fish", "two fish", "red fish"], 8, normalize=True)
    for index in range(3):
        np.testing.assert_array_equal(np.array(table[f"r{index}", 0]["embedding"], dtype=np.float32), expected[index])
        assert table[f"r{index}", 0]["n_tokens"] == 2


def test_a_session_that_keeps_no_metrics_of_its_commits_publishes(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path]
) -> None:
    write_rows(rows_of("one fish"))

    with with_settings(spark, {"spark.databricks.delta.history.metricsEnabled": "false"}):
        report = embed(spark, load_run(run_file()))

    assert (report.status, report.version, report.bytes_written) == ("published", 0, 0)


def test_one_merge_moves_the_table_to_a_changed_source(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows(rows_of("a", "b", "c", "d"))
    config = load_run(run_file(limits={"max_deleted": "100%"}))
    embed(spark, config)
    write_rows(
        [{"id": "r0", "body": "a"}, {"id": "r1", "body": "B"}, {"id": "r3", "body": "a"}, {"id": "r9", "body": None}]
    )

    record = embed(spark, config).record()

    assert record["rows"] == {
        "source": 4, "new": 1, "changed": 2, "metadata_only": 0, "deleted": 1, "unchanged": 1, "retried": 0
    }  # fmt: skip
    assert record["chunks"]["encoded"] == 1
    assert record["chunks"]["reused"] == 1
    assert record["errors"] == {"null_text": 1}
    assert record["generation"] == 2
    table = published(spark, tmp_path / "out/docs")
    assert {key: row["text"] for key, row in table.items()} == {
        ("r0", 0): "a", ("r1", 0): "B", ("r3", 0): "a", ("r9", 0): None
    }  # fmt: skip
    assert table["r9", 0]["embedding"] is None
    assert table["r9", 0]["error"] == "null_text"
    history = spark.sql(f"DESCRIBE HISTORY delta.`{tmp_path}/out/docs`").collect()
    assert [row["operation"] for row in history] == ["MERGE", "CREATE OR REPLACE TABLE AS SELECT"]
    assert json.loads(history[0]["userMetadata"])["shoal"]["run_id"] == record["run_id"]


def expected_table(rows: list[dict[str, Any]]) -> dict[tuple[str, int], tuple[Any, ...]]:
    """What a full rebuild of these rows holds, worked out without Spark."""
    found = {}
    for row in rows:
        text = row["body"]
        error = "null_text" if text is None else "blank_text" if not text.strip() else None
        vector = None if error else tuple(hash_vectors([text], 8, normalize=True)[0].tolist())
        found[row["id"], 0] = (text, error, vector, row.get("tag"))
    return found


TEXTS = st.one_of(
    st.none(), st.sampled_from(["", " ", "alpha", "beta", "gamma", "alpha beta", "\N{ROCKET} up", "x" * 300])
)
SNAPSHOTS = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(TEXTS, st.sampled_from(["t1", "t2", None])), min_size=1
)


@pytest.mark.slow
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=st.lists(SNAPSHOTS, min_size=2, max_size=3))
def test_after_every_night_of_any_history_the_table_equals_a_rebuild_from_scratch(
    spark: SparkSession,
    tmp_path_factory: pytest.TempPathFactory,
    history: list[dict[str, tuple[str | None, str | None]]],
) -> None:
    folder = tmp_path_factory.mktemp("history")
    (folder / "run.yaml").write_text(
        "name: docs\n"
        "source: {format: json, path: c.jsonl, key: id, text: body, columns: [tag],"
        ' schema: "id STRING, body STRING, tag STRING"}\n'
        'encoder: {model: "hash:8"}\n'
        "destination: {path: docs}\n"
        "limits: {max_errors: 100%, max_deleted: 100%}\n"
        "tracking: {enabled: false}\n"
    )
    seen: set[str] = set()
    for night in history:
        rows = [{"id": key, "body": text, "tag": tag} for key, (text, tag) in night.items()]
        (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        record = embed(spark, load_run(folder / "run.yaml")).record()

        table = published(spark, folder / "docs")
        found = {
            key: (
                row["text"],
                row["error"],
                None if row["embedding"] is None else tuple(np.array(row["embedding"], dtype=np.float32).tolist()),
                row["tag"],
            )
            for key, row in table.items()
        }
        assert found == expected_table(rows)
        counts = record["rows"]
        assert counts["source"] == counts["new"] + counts["changed"] + counts["metadata_only"] + counts["unchanged"]
        good = {row["body"] for row in rows if row["body"] and row["body"].strip()}
        # Only content that the table did not hold the night before may be encoded, and each text once.
        assert record["chunks"]["encoded"] == (0 if record["status"] == "unchanged" else len(good - seen))
        seen = good


def test_a_run_with_nothing_to_do_builds_no_encoder(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(rows_of("one fish", "two fish"))
    config = load_run(run_file())
    embed(spark, config)

    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("an encoder was asked for")

    monkeypatch.setattr("shoal.jobs.encoder_work.encode_waves", refuse)
    monkeypatch.setattr("shoal.jobs.encoder_work.try_out", refuse)
    monkeypatch.setattr("shoal.jobs.prepare.try_out", refuse)

    assert embed(spark, config).record()["status"] == "unchanged"


def test_a_gate_that_search_does_not_pass_stops_the_publication(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows(rows_of("one fish", "two fish", "red fish"))
    write_rows([{"_id": "q1", "text": "one fish"}, {"_id": "q2", "text": "two fish"}], "queries.jsonl")
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tr0\t1\nq2\tr2\t1\n")
    gate = {"folder": str(tmp_path), "min_ndcg": 0.9, "k": 1}

    with pytest.raises(LimitError, match=r"gate.min_ndcg is 0.9 .* reaches nDCG@1 0.5000") as refused:
        embed(spark, load_run(run_file(gate=gate)))
    assert refused.value.exit_code == 3
    assert not (tmp_path / "out/docs").exists()

    record = embed(spark, load_run(run_file(gate=gate | {"min_ndcg": 0.5}))).record()
    assert record["status"] == "published"
    assert record["ndcg"] == 0.5
    assert record["chunks"]["encoded"] == 0

    write_rows(rows_of("one fish", "blue fish", "two fish"))
    record = embed(spark, load_run(run_file(gate=gate))).record()
    assert record["ndcg"] == 1.0


@pytest.mark.long
def test_table_settings_that_change_later_take_effect_and_other_key_columns_are_refused(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows(rows_of("one fish", "two fish"))
    embed(spark, load_run(run_file()))
    destination = {"path": "out/docs", "retain": "3d", "deletion_vectors": False, "properties": {"team": "fish's"}}

    record = embed(spark, load_run(run_file(destination=destination))).record()
    again = embed(spark, load_run(run_file(destination=destination))).record()

    assert (record["status"], record["version"], again["version"]) == ("unchanged", 1, 1)
    properties = spark.sql(f"DESCRIBE DETAIL delta.`{tmp_path}/out/docs`").collect()[0]["properties"]
    assert properties["delta.deletedFileRetentionDuration"] == "interval 72 hours"
    assert properties["delta.enableDeletionVectors"] == "false"
    assert properties["team"] == "fish's"

    source = {
        "format": "json",
        "path": "corpus.jsonl",
        "key": "body",
        "text": "body",
        "schema": "id STRING, body STRING",
    }
    with pytest.raises(RefusedError, match=r"source.key: .* \['id'\] .* \['body'\]"):
        embed(spark, load_run(run_file(source=source, destination=destination)))


@pytest.mark.long
def test_what_a_foreign_writer_has_damaged_is_written_anew(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows(rows_of("one two three four five six", "seven eight nine"))
    config = load_run(run_file(chunk={"tokens": 2, "boundary": "word"}))
    embed(spark, config)
    table = f"delta.`{tmp_path}/out/docs`"
    before = published(spark, tmp_path / "out/docs")
    assert len(before) == 5
    spark.sql(f"DELETE FROM {table} WHERE id = 'r0' AND chunk_index = 0")
    spark.sql(f"INSERT INTO {table} BY NAME SELECT NULL AS id, 0 AS chunk_index, 'stray' AS error")

    record = embed(spark, config).record()

    assert (record["rows"]["changed"], record["rows"]["deleted"], record["rows"]["unchanged"]) == (1, 1, 1)
    after = published(spark, tmp_path / "out/docs")
    assert {key: (row["text"], row["embedding"]) for key, row in after.items()} == {
        key: (row["text"], row["embedding"]) for key, row in before.items()
    }
    assert embed(spark, config).record()["status"] == "unchanged"
