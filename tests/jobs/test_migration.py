"""From one encoder to the next, night by night: the serving table stays right, the next one comes to be beside it."""

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import ConfigError, LimitError, RefusedError
from shoal.conf.loader import load_run
from shoal.conf.run import RunConfig
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.cutover import cutover
from shoal.jobs.embed import embed
from shoal.jobs.hashing import content_hash
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.plan import lines, plan
from shoal.jobs.published import read_published
from shoal.jobs.staging import append_wave, staged_rows
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = [pytest.mark.spark, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("run_and_die.py")
REPLACE, MERGE = "CREATE OR REPLACE TABLE AS SELECT", "MERGE"
# Of one object in two places YAML would make an anchor.
OLD, OLD_AGAIN, NEW = {"model": "hash:8"}, {"model": "hash:8"}, {"model": "hash:16"}

# 40 rows, 30 different texts.
DAY = [{"id": f"r{index:02}", "body": f"text {index % 30}"} for index in range(40)]
# Five rows go, five change, five come: ten new texts.
NIGHT = [{"id": f"r{i:02}", "body": f"night {i}" if i < 10 or i >= 40 else f"text {i % 30}"} for i in range(5, 45)]

Contents = dict[str, tuple[str, tuple[float, ...] | None, str | None]]


def settings(folder: Path, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Path:
    """A run file that migrates from hash:8 to hash:16; sections of None are left out."""
    if rows is not None:
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "name": "docs",
        "source": {
            "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "schema": "id STRING, body STRING"
        },
        "encoder": OLD,
        "next_encoder": NEW,
        "destination": {"path": "out/docs"},
        "limits": {"max_deleted": "100%"},
        "tracking": {"enabled": False},
        "spark": {
            "master": "local[2]",
            "conf": {
                "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
                "spark.sql.adaptive.enabled": False,
                "spark.sql.codegen.factoryMode": "NO_CODEGEN",
                "spark.sql.codegen.wholeStage": False,
                "spark.sql.shuffle.partitions": 2,
            },
        },
    } | sections  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({name: section for name, section in run.items() if section is not None}))
    return path


def budget(chunks: int, **more: Any) -> dict[str, Any]:
    return {"migration": {"budget": {"chunks": chunks}, **more}}


def rebuilt(rows: list[dict[str, Any]], dim: int) -> Contents:
    """What a table made anew with the encoder hash:dim holds, worked out without Spark."""
    vectors_ND = hash_vectors([row["body"] for row in rows], dim, normalize=True)
    return {
        row["id"]: (row["body"], tuple(vector.tolist()), None) for row, vector in zip(rows, vectors_ND, strict=True)
    }


def contents(spark: SparkSession, ref: TableRef) -> Contents:
    """What readers see, by key."""
    rows = ref.read(spark).collect()
    found: Contents = {}
    for row in rows:
        vector = row["embedding"] and tuple(np.array(row["embedding"], dtype=np.float32).tolist())
        found[row["id"]] = (row["text"], vector, row["error"])
    assert len(found) == len(rows), "a row is published twice"
    return found


def operations(spark: SparkSession, ref: TableRef) -> list[str]:
    return [row["operation"] for row in spark.sql(f"DESCRIBE HISTORY {ref.sql}").orderBy("version").collect()]


def staged(spark: SparkSession, ref: TableRef, fingerprint: str) -> int:
    """Contents in staging; none may stand there twice."""
    hashes = [bytes(row[0]) for row in staged_rows(spark, ref, fingerprint).select("content_hash").collect()]
    assert len(set(hashes)) == len(hashes), "a content was encoded twice"
    return len(hashes)


@pytest.fixture(scope="module")
def day(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table of DAY by the old encoder alone, to be copied."""
    folder = tmp_path_factory.mktemp("day")
    embed(spark, load_run(settings(folder, DAY, next_encoder=None)))
    return folder


@pytest.fixture
def night(day: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run file over a copy of that table; keywords are sections of it."""
    shutil.copytree(day, tmp_path, dirs_exist_ok=True)
    return lambda rows=None, **sections: load_run(settings(tmp_path, rows, **sections))


def test_nights_keep_the_serving_table_current_until_one_commit_switches_it_and_going_back_encodes_nothing(
    spark: SparkSession, tmp_path: Path
) -> None:
    config = load_run(settings(tmp_path, DAY, **budget(16)))
    ref = table_of(spark, config.destination)

    first = embed(spark, config).record()

    assert contents(spark, ref) == rebuilt(DAY, 8)
    part = first["migration"]
    assert (part["state"], part["planned"], part["distinct"]) == ("backfilling", 40, 30)
    assert (part["encoded"], part["missing"], part["nights_left"]) == (16, 14, 1)
    assert part["fingerprint"] != first["fingerprint"]
    assert part["reason"] == "14 of 30 contents are missing"
    planned = plan(spark, load_run(settings(tmp_path, NIGHT, **budget(16))))["migration"]
    assert staged(spark, ref, part["fingerprint"]) == 16

    second = embed(spark, load_run(settings(tmp_path, NIGHT, **budget(16)))).record()

    assert (second["status"], second["version"], second["generation"]) == ("published", 1, 2)
    assert contents(spark, ref) == rebuilt(NIGHT, 8)
    again = second["migration"]
    assert again["encoded"] == planned["encoded"] == 16
    assert again["missing"] == planned["missing"] - 16 > 0
    assert staged(spark, ref, part["fingerprint"]) == 32

    third = embed(spark, config := load_run(settings(tmp_path, **budget(16)))).record()

    assert third["status"] == "unchanged"
    done = third["migration"]
    assert (done["state"], done["missing"], done["nights_left"], done["version"]) == ("cut over", 0, 0, 2)
    assert done["encoded"] == again["missing"]
    assert contents(spark, ref) == rebuilt(NIGHT, 16)
    assert operations(spark, ref) == [REPLACE, MERGE, REPLACE]
    published = read_published(spark, ref)
    assert published is not None
    assert (published.fingerprint, published.generation) == (part["fingerprint"], 3)
    assert published.encoder["identity"]["dim"] == published.encoder["settings"]["model"].count("6") * 16 == 16
    runs = {run["run_id"]: run for run in Bookkeeper(spark, ref, lambda _: None).records()}
    cut = runs[f"{third['run_id']}-next"]
    assert (cut["verb"], cut["status"], cut["version"], cut["generation"]) == ("cutover", "published", 2, 3)
    assert cut["chunks"] == {
        "planned": 40, "distinct": 40, "reused": 40, "encoded": 0, "embedded": 40, "errors": 0, "truncated": 0
    }  # fmt: skip
    assert cut["reason"] == "cut over from hash:8 to hash:16"
    assert len(runs) == 4
    for fingerprint in (first["fingerprint"], part["fingerprint"]):
        assert staged(spark, ref, fingerprint) == 0

    # The run file still has the old encoder: nights go on with the new one, and say so.
    other = [*NIGHT[1:], {"id": "late", "body": "late"}]
    fourth = embed(spark, load_run(settings(tmp_path, other, **budget(16)))).record()
    assert (fourth["status"], fourth["fingerprint"], fourth["chunks"]["encoded"]) == (
        "published", part["fingerprint"], 1
    )  # fmt: skip
    assert fourth["migration"]["state"] == "cut over"
    assert fourth["warnings"] == ["the table has been cut over: move next_encoder to encoder in the run file"]
    assert contents(spark, ref) == rebuilt(other, 16)
    settled = embed(spark, load_run(settings(tmp_path, encoder=NEW, next_encoder=None))).record()
    assert (settled["status"], settled["migration"], settled["warnings"]) == ("unchanged", None, [])

    # Back again: all but the late text is in an earlier version.
    back = embed(spark, load_run(settings(tmp_path, encoder=NEW, next_encoder=OLD))).record()
    assert (back["migration"]["state"], back["migration"]["encoded"]) == ("cut over", 1)
    assert contents(spark, ref) == rebuilt(other, 8)
    assert config.next_encoder is not None


@pytest.mark.long
def test_a_gate_that_the_next_encoder_fails_leaves_the_nights_publication_alone(
    spark: SparkSession, night: Callable[..., RunConfig], tmp_path: Path
) -> None:
    folder = tmp_path / "judged"
    folder.mkdir()
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "text 3"}) + "\n")
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\tnobody\t1\n")
    gate = {"gate": {"folder": str(folder), "min_ndcg": 0.9}}
    config = night(**gate)
    ref = table_of(spark, config.destination)

    record = embed(spark, config).record()

    assert record["status"] == "unchanged"
    assert (record["migration"]["state"], record["migration"]["encoded"]) == ("refused", 30)
    assert "gate.min_ndcg is 0.9" in record["migration"]["error"]
    assert "the table keeps its encoder; gate.min_ndcg" in record["warnings"][0]
    assert contents(spark, ref) == rebuilt(DAY, 8)
    with pytest.raises(LimitError, match=r"gate.min_ndcg is 0.9"):
        cutover(spark, config)
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\tr03\t1\nq\tr33\t1\n")
    passed = embed(spark, config).record()
    assert (passed["migration"]["state"], passed["migration"]["encoded"]) == ("cut over", 0)
    assert passed["migration"]["ndcg"] == 1
    assert contents(spark, ref) == rebuilt(DAY, 16)


@pytest.mark.long
def test_hours_and_price_are_a_share_of_the_missing_tokens_and_a_plan_shows_what_a_night_would_do(
    spark: SparkSession, night: Callable[..., RunConfig]
) -> None:
    encode = {"encode": {"price_per_hour": 2.0}}
    for limit in ({"hours": 1e-12}, {"price": 1e-12}, {"chunks": 1, "hours": 1000.0, "price": 1e6}):
        planned = plan(spark, night(migration={"budget": limit}, **encode))
        part = planned["migration"]
        assert (part["missing"], part["encoded"], part["per_night"], part["nights_left"]) == (30, 1, 1, 29)
        assert planned["chunks"]["encoded"] == 0
    assert "hash:16: 30 of 30 missing, 1 to encode in this run" in "\n".join(lines(planned))
    config = night(migration={"budget": {"hours": 1000.0, "price": 1e6}}, **encode)
    part = plan(spark, config)["migration"]
    assert (part["state"], part["encoded"], part["nights_left"]) == ("ready", 30, 0)
    assert part["tokens"] == 60
    assert part["estimate"]["price"] == pytest.approx(part["estimate"]["seconds"] * 2 / 3600)


@pytest.mark.long
def test_contents_that_failed_before_come_after_all_others_and_do_not_hold_up_the_cut_over(
    spark: SparkSession, night: Callable[..., RunConfig]
) -> None:
    rows = [*DAY[:20], {"id": "blank", "body": " "}]
    config = night(rows, **budget(19))
    ref = table_of(spark, config.destination)
    fingerprint = plan(spark, config)["migration"]["fingerprint"]
    failed = spark.createDataFrame([("text 0",)], "body string").select(
        content_hash(F.col("body")).alias("content_hash"),
        F.lit(None).cast("array<float>").alias("embedding"),
        F.lit(2).alias("n_tokens"),
        F.lit(False).alias("truncated"),
        F.lit("time_limit").alias("error"),
        F.current_timestamp().alias("embedded_at"),
    )
    append_wave(failed, ref, fingerprint=fingerprint, run_id="an earlier night", wave="0")

    record = embed(spark, config).record()

    part = record["migration"]
    assert (part["state"], part["missing"], part["encoded"]) == ("cut over", 0, 19)
    assert part["errors"] == {"blank_text": 1, "time_limit": 1}
    table = contents(spark, ref)
    assert table.pop("blank")[1:] == (None, "blank_text")
    assert table.pop("r00")[1:] == (None, "time_limit")
    assert table == rebuilt(rows[1:20], 16)
    retried = embed(spark, config).record()
    assert (retried["rows"]["retried"], retried["chunks"]["encoded"]) == (1, 1)
    assert contents(spark, ref)["r00"] == rebuilt(rows[:1], 16)["r00"]


@pytest.mark.long
def test_too_many_errors_refuse_the_cut_over_and_failed_contents_are_tried_again(
    spark: SparkSession, night: Callable[..., RunConfig]
) -> None:
    config = night([*DAY, {"id": "blank", "body": " "}])
    ref = table_of(spark, config.destination)
    embed(spark, night(next_encoder=None, limits={"max_errors": 1}))

    record = embed(spark, night(limits={"max_errors": 0})).record()

    assert (record["status"], record["migration"]["state"]) == ("unchanged", "refused")
    assert record["migration"]["error"].startswith("limits.max_errors is 0 and 1 of 41 planned chunks")
    assert operations(spark, ref) == [REPLACE, MERGE]
    assert embed(spark, night(limits={"max_errors": 1})).record()["migration"]["state"] == "cut over"
    assert config.next_encoder is not None


@pytest.mark.long
@pytest.mark.parametrize("seed", [7])
def test_after_random_nights_the_table_is_that_of_a_rebuild_and_each_text_was_encoded_once_per_encoder(
    spark: SparkSession, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    rows = {f"r{index}": f"text {index % 9}" for index in range(12)}
    served: set[str] = set()
    fingerprint, encoded, nights = "", 0, 0
    while True:
        nights += 1
        assert nights < 12, "the migration does not come to an end"
        corpus = [{"id": key, "body": body} for key, body in rows.items()]
        config = load_run(settings(tmp_path, corpus, **budget(chance.randint(3, 5))))
        ref = table_of(spark, config.destination)
        record = embed(spark, config).record()
        part = record["migration"]
        fingerprint, encoded = part["fingerprint"], encoded + part["encoded"]
        assert record["chunks"]["encoded"] == len(set(rows.values()) - served), "the serving encoder encoded again"
        served |= set(rows.values())
        if part["state"] == "cut over":
            break
        assert contents(spark, ref) == rebuilt(corpus, 8)
        assert staged(spark, ref, fingerprint) == encoded
        for key in chance.sample(sorted(rows), chance.randint(0, 2)):
            del rows[key]
        for key in chance.sample(sorted(rows), chance.randint(0, 1)):
            rows[key] = f"text {chance.randrange(20)}"
        if chance.random() < 0.5:
            rows[f"n{nights}"] = f"text {chance.randrange(20)}"

    assert contents(spark, ref) == rebuilt(corpus, 16)
    assert nights > 2
    assert encoded <= len(served)


@pytest.mark.long
@pytest.mark.parametrize("step", ["next wave 1 staged", "fenced", "cut over"])
def test_a_night_killed_in_its_migration_is_finished_by_the_next_and_encodes_nothing_twice(
    spark: SparkSession, night: Callable[..., RunConfig], tmp_path: Path, step: str
) -> None:
    # The fence of a night without changes is that of the cut-over.
    rows = DAY if step == "fenced" else NIGHT
    config = night(rows, encode={"wave_chunks": 9})
    ref = table_of(spark, config.destination)
    commits = [REPLACE] if step == "fenced" else [REPLACE, MERGE]

    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "run.yaml", step, "die"],
        capture_output=True, text=True, timeout=300, check=False, start_new_session=True,
    )  # fmt: skip

    assert done.returncode == -signal.SIGKILL, done.stderr
    dead = json.loads((tmp_path / "out/docs__shoal/lease.json").read_text())["run_id"]
    landed = step == "cut over"
    waited = 40 if step != "next wave 1 staged" else staged(spark, ref, plan(spark, config)["migration"]["fingerprint"])
    assert waited > 0
    assert contents(spark, ref) == rebuilt(rows, 16 if landed else 8)
    assert operations(spark, ref) == commits + [REPLACE] * landed

    record = embed(spark, config).record()

    assert record["status"] == "unchanged"
    assert record["migration"]["state"] == "cut over"
    assert contents(spark, ref) == rebuilt(rows, 16)
    assert operations(spark, ref) == [*commits, REPLACE]
    assert staged(spark, ref, record["migration"]["fingerprint"]) == 0
    runs = Bookkeeper(spark, ref, lambda _: None).records()
    written = {run["run_id"]: run for run in runs}
    assert len(written) == len(runs), "a run is written down twice"
    assert record["migration"]["encoded"] == 40 - waited
    if step == "fenced":
        assert dead not in written
    else:
        assert (written[dead]["status"], written[dead]["version"]) == ("published", 1)
    cut = written[f"{dead if landed else record['run_id']}-next"]
    assert (cut["verb"], cut["version"], cut["generation"]) == ("cutover", len(commits), len(commits) + 1)


@pytest.mark.long
def test_a_full_refresh_takes_no_vector_from_an_earlier_version_of_another_encoder(
    spark: SparkSession, night: Callable[..., RunConfig]
) -> None:
    embed(spark, night(DAY[:20], next_encoder=None))
    prompted = {"encoder": {"model": "hash:8", "document_prompt": "passage: "}, "next_encoder": None}
    config = night(DAY, **prompted)

    record = embed(spark, config, full_refresh=True).record()

    assert (record["chunks"]["encoded"], record["chunks"]["distinct"]) == (30, 30)
    vectors_ND = hash_vectors([f"passage: {row['body']}" for row in DAY], 8, normalize=True)
    table = contents(spark, table_of(spark, config.destination))
    assert {key: row[1] for key, row in table.items()} == {
        row["id"]: tuple(vector.tolist()) for row, vector in zip(DAY, vectors_ND, strict=True)
    }


def test_a_next_encoder_that_is_the_encoder_is_a_mistake_and_a_changed_encoder_is_pointed_to_it(
    spark: SparkSession, night: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match="the two are the same, so there is nothing to migrate to"):
        night(next_encoder=OLD_AGAIN)
    with pytest.raises(RefusedError, match=r"dim: 8 -> 4.*give the new ones as next_encoder"):
        embed(spark, night(encoder={"model": "hash:4"}))
