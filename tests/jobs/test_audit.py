"""Damage of every kind is found, shown and repaired by what the finding names; a sound table has no finding."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from py4j.protocol import Py4JJavaError
from pyarrow import parquet
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import CODES, ConfigError, DestinationError
from shoal.conf.loader import load_run
from shoal.jobs.audit import Audit, audit, differing, lines
from shoal.jobs.cli import main
from shoal.jobs.embed import embed
from shoal.jobs.layout import table_named
from shoal.jobs.published import read_published
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = [pytest.mark.spark, pytest.mark.slow]

ROWS = [{"id": f"r{n}", "body": f"text {n}", "tag": f"tag {n}"} for n in range(14)]


@pytest.fixture(scope="module")
def sound(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file and its published table, to be copied."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {
        "name": "docs",
        "source": {
            "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "columns": ["tag"],
            "schema": "id STRING, body STRING, tag STRING",
        },
        "encoder": {"model": "hash:8"},
        "destination": {"path": "docs"},
        "tracking": {"enabled": False},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(settings))
    embed(spark, load_run(folder / "run.yaml"))
    return folder


@pytest.fixture
def table(sound: Path, tmp_path: Path) -> str:
    """A copy of the table, to be damaged."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return str(tmp_path / "docs")


def codes(done: Audit) -> set[str]:
    return {finding.code for finding in done.findings}


def flip_bit(path: Path, column: str) -> None:
    """One bit of a column's last page, in a way that Hadoop's own checksum beside the file does not tell of."""
    group = parquet.read_metadata(path).row_group(0)
    chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
    start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start + chunk.total_compressed_size - 2] ^= 1
    path.write_bytes(damaged)
    (path.parent / f".{path.name}.crc").unlink()


def run_again(spark: SparkSession, table: str, *, full_refresh: bool = False) -> dict[str, Any]:
    return embed(spark, load_run(Path(table).with_name("run.yaml")), full_refresh=full_refresh).record()


def require_sound(spark: SparkSession, table: str) -> None:
    """The audit finds nothing, and every vector is that of its row's text."""
    done = audit(spark, table)
    assert lines(done)[-1] == "nothing was found", lines(done)
    assert (done.rows, done.vectors, done.sampled, done.not_checked) == (14, 14, 14, [])
    rows = spark.read.format("delta").load(table).orderBy("id").collect()
    wanted = sorted(ROWS, key=lambda row: row["id"])
    assert [(row["id"], row["text"], row["tag"]) for row in rows] == [tuple(row.values()) for row in wanted]
    vectors_ND = hash_vectors([row["body"] for row in wanted], 8, normalize=True)
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], dtype=np.float32), vectors_ND)


def files_below(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_sound_table_has_no_finding_and_is_not_touched(
    spark: SparkSession, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(sound)

    require_sound(spark, str(sound / "docs"))
    capsys.readouterr()
    code = main(["audit", str(sound / "docs"), "--sample", "5", "--json"])

    found = json.loads(capsys.readouterr().out)
    assert (code, found["status"], found["findings"], found["sampled"], found["rows"]) == (0, "clean", [], 5, 14)
    assert files_below(sound) == before


def test_what_a_foreign_writer_did_is_found_and_the_next_run_makes_it_good(spark: SparkSession, table: str) -> None:
    target = f"delta.`{table}`"
    unit = ", ".join(["CAST(1 AS FLOAT)", *["CAST(0 AS FLOAT)"] * 7])
    with pytest.raises((PySparkException, Py4JJavaError), match="shoal_dim"):
        spark.sql(f"UPDATE {target} SET embedding = array(CAST(1 AS FLOAT)) WHERE id = 'r8'")
    for name in ("shoal_dim", "shoal_accounted"):
        spark.sql(f"ALTER TABLE {target} DROP CONSTRAINT {name}")
    spark.sql(
        f"UPDATE {target} SET content_hash = IF(id = 'r0', NULL, content_hash), embedding = CASE id "
        f"WHEN 'r1' THEN array({unit}) "
        "WHEN 'r2' THEN transform(embedding, x -> CAST(x * 2 AS FLOAT)) "
        "WHEN 'r3' THEN transform(embedding, (x, i) -> IF(i = 2, CAST('NaN' AS FLOAT), x)) "
        "WHEN 'r8' THEN array(CAST(1 AS FLOAT)) WHEN 'r9' THEN NULL ELSE embedding END, "
        "chunk_index = IF(id = 'r5', 3, chunk_index), text = IF(id = 'r6', 'another text', text), "
        "tag = IF(id = 'r7', 'another tag', tag) WHERE id < 'ra'"
    )
    spark.sql(f"INSERT INTO {target} SELECT * FROM {target} WHERE id = 'r4'")
    spark.sql(f"DELETE FROM {target} WHERE id = 'r10'")
    spark.conf.set("spark.databricks.delta.commitInfo.userMetadata", '{"shoal": {"run_id"')
    try:
        spark.sql(f"INSERT INTO {target} (id, chunk_index, text) VALUES ('x', 0, 'brought in')")
    finally:
        spark.conf.unset("spark.databricks.delta.commitInfo.userMetadata")

    done = audit(spark, table)

    shown = {finding.code: (finding.count, [str(one) for one in finding.examples]) for finding in done.findings}
    keys = {
        code: {re.findall(r"'id': '(\w+)'", one)[0] for one in examples if "'id'" in one}
        for code, (_, examples) in shown.items()
    }
    assert keys == {
        "FOREIGN_COMMITS": set(),
        "STATE_UNREADABLE": set(),
        "CONSTRAINTS_MISSING": set(),
        "ROWS_WITHOUT_HASH": {"r0", "x"},
        "ROWS_UNACCOUNTED": {"r9", "x"},
        "VECTORS_WRONG_DIM": {"r8"},
        "VECTORS_NOT_FINITE": {"r3"},
        "VECTORS_NOT_UNIT": {"r2"},
        "TEXT_CHANGED": {"r6"},
        "METADATA_CHANGED": {"r7"},
        "CHUNKS_DOUBLED": {"r4"},
        "CHUNKS_MISSING": {"r5"},
        "VECTORS_DIFFER": keys["VECTORS_DIFFER"],
    }
    assert shown["FOREIGN_COMMITS"][0] == 6
    assert shown["VECTORS_DIFFER"][0] == 4, "r1, r2, r3 and r6"
    assert all("shoal embed FILE" in finding.repair for finding in done.findings)
    assert "shoal_dim" in shown["CONSTRAINTS_MISSING"][1]

    record = run_again(spark, table)

    assert record["reason"] == "its constraints are gone"
    assert record["chunks"]["encoded"] == 0, "every vector stands in the version before"
    require_sound(spark, table)


@pytest.mark.long
def test_a_vector_that_a_foreign_writer_replaced_is_made_good_by_a_merge(spark: SparkSession, table: str) -> None:
    other = f"(SELECT first(embedding) FROM delta.`{table}` WHERE id = 'r2')"
    spark.sql(f"MERGE INTO delta.`{table}` t USING (SELECT {other} AS v) s ON t.id = 'r1' "
              "WHEN MATCHED THEN UPDATE SET embedding = s.v")  # fmt: skip

    done = audit(spark, table, seed=7)

    assert codes(done) == {"FOREIGN_COMMITS", "VECTORS_DIFFER"}
    assert done.findings[-1].examples == ({"id": "r1", "chunk_index": 0},)
    record = run_again(spark, table)
    assert (record["rows"]["changed"], record["rows"]["unchanged"], record["chunks"]["encoded"]) == (1, 13, 0)
    require_sound(spark, table)


@pytest.mark.long
def test_lost_and_rotten_files_are_found_and_a_full_refresh_encodes_everything_again(
    spark: SparkSession, table: str
) -> None:
    path = next(Path(table).glob("*.parquet"))
    flip_bit(path, "text")
    rotten = audit(spark, table)
    path.unlink()
    lost = audit(spark, table)

    assert [(one.code, one.examples) for one in rotten.findings] == [("FILES_DAMAGED", (path.name,))]
    assert [(one.code, one.examples) for one in lost.findings] == [("FILES_MISSING", (path.name,))]
    assert all("--full-refresh" in done.findings[0].repair and done.not_checked for done in (rotten, lost))
    record = run_again(spark, table, full_refresh=True)
    assert record["chunks"]["encoded"] == 14
    require_sound(spark, table)


@pytest.mark.long
def test_a_vector_that_rotted_unseen_is_found_and_a_full_refresh_does_not_take_it_over(
    spark: SparkSession, table: str
) -> None:
    log = Path(table, "_delta_log")
    spark.sql(f"UPDATE delta.`{table}` SET embedding = (SELECT first(embedding) FROM delta.`{table}` WHERE id = 'r2') "
              "WHERE id = 'r1'")  # fmt: skip
    # As if the damage had been there all along: no commit of others tells of it.
    commit = log / "00000000000000000001.json"
    ours = json.loads((log / "00000000000000000000.json").read_text().splitlines()[0])["commitInfo"]["userMetadata"]
    actions = [json.loads(line) for line in commit.read_text().splitlines()]
    for action in actions:
        if "commitInfo" in action:
            action["commitInfo"]["userMetadata"] = ours
    commit.write_text("".join(json.dumps(action) + "\n" for action in actions))
    (log / f".{commit.name}.crc").unlink(missing_ok=True)

    done = audit(spark, table)

    assert [(one.code, one.count) for one in done.findings] == [("VECTORS_DIFFER", 1)]
    assert "--full-refresh" in done.findings[0].repair
    assert run_again(spark, table)["status"] == "unchanged", "its hashes are right, so a night believes them"
    assert run_again(spark, table, full_refresh=True)["chunks"]["encoded"] == 14
    require_sound(spark, table)


@pytest.mark.long
def test_lost_properties_are_found_and_brought_back_by_the_restore_that_is_named(
    spark: SparkSession, table: str
) -> None:
    spark.sql(f"CREATE OR REPLACE TABLE delta.`{table}` USING delta AS SELECT 'r0' AS id, 1 AS other")
    gone = audit(spark, table)
    assert codes(gone) == {"PROPERTIES_DAMAGED"}
    carry_out(spark, gone)
    require_sound(spark, table)

    spark.sql(f"ALTER TABLE delta.`{table}` SET TBLPROPERTIES ('shoal.fingerprint' = '{'0' * 32}')")
    mixed = audit(spark, table)
    assert codes(mixed) == {"PROPERTIES_DAMAGED"}
    assert "shoal.encoder describes" in mixed.findings[0].examples[0]
    carry_out(spark, mixed)
    run_again(spark, table)
    require_sound(spark, table)


def carry_out(spark: SparkSession, done: Audit) -> None:
    """Runs the SQL that a repair names."""
    spark.sql(done.findings[0].repair.removeprefix("`").partition("` in Spark SQL")[0])


def test_an_encoder_that_cannot_be_loaded_and_a_table_without_texts_are_said_and_are_no_damage(
    spark: SparkSession, table: str
) -> None:
    target = f"delta.`{table}`"
    published = read_published(spark, table_named(spark, table))
    assert published is not None
    recorded = published.encoder
    recorded["settings"]["model"] = "./gone"
    changed = json.dumps(recorded).replace("'", "\\'")
    spark.sql(f"ALTER TABLE {target} SET TBLPROPERTIES ('shoal.encoder' = '{changed}')")

    done = audit(spark, table)

    assert done.is_clean
    assert done.not_checked[0].startswith("vectors: they could not be made again: [MODEL_")


def test_staging_that_holds_nonsense_is_found_and_may_be_deleted(
    spark: SparkSession, table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = table_named(spark, table)
    fingerprint = spark.sql(f"SHOW TBLPROPERTIES delta.`{table}` ('shoal.fingerprint')").collect()[0]["value"]
    spark.sql(
        f"INSERT INTO delta.`{ref.staging}` (fingerprint, content_hash, embedding) VALUES "
        f"('{fingerprint}', unhex(repeat('00', 16)), array(CAST(1 AS FLOAT)))"
    )

    capsys.readouterr()
    code = main(["audit", table, "--json"])

    found = json.loads(capsys.readouterr().out)
    assert (code, found["status"]) == (1, "damaged")
    assert [(one["code"], one["count"]) for one in found["findings"]] == [("STAGING_DAMAGED", 1)]
    assert ref.staging in found["findings"][0]["repair"]
    shutil.rmtree(ref.staging)
    run_again(spark, table)
    require_sound(spark, table)


def test_what_is_no_table_of_shoals_is_refused_with_its_code(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="no such table") as nothing:
        audit(spark, str(tmp_path / "nothing"))
    spark.range(3).write.format("delta").save(str(tmp_path / "other"))
    with pytest.raises(DestinationError, match="is not a Shoal table") as other:
        audit(spark, str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="--sample is -1"):
        audit(spark, str(tmp_path / "other"), sample=-1)
    assert (nothing.value.code, other.value.code) == ("TABLE_NOT_FOUND", "TABLE_NOT_OURS")


def test_a_vector_differs_by_its_direction_or_its_length() -> None:
    stored_ND = np.array([[1, 0], [1, 0.001], [0, 1], [3, 0], [0, 0]], dtype=np.float32)
    made = {index: np.array([1, 0], dtype=np.float32) for index in (0, 1, 2, 3, 4)}

    assert differing(stored_ND, made, "float32") == [2, 3, 4]
    assert differing(stored_ND, {0: made[0]}, "bfloat16") == []


def test_every_code_of_a_finding_has_its_line() -> None:
    source = Path(__file__).parents[2].joinpath("jobs/audit.py").read_text()
    named = set(re.findall(r'"([A-Z]+(?:_[A-Z]+)+)"', source))
    assert {"FILES_MISSING", "VECTORS_DIFFER", "STAGING_DAMAGED"} <= named <= set(CODES)
