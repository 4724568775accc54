"""One commit or none: the fence, transaction ids that are taken, and what survives when a table is written anew."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import EncoderChangedError, OvertakenError, RunError
from shoal.conf.loader import load_run
from shoal.jobs import publish
from shoal.jobs.embed import embed
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.planner import ACTION, CHANGED, RowCounts, RowPlan
from shoal.jobs.publish import Target, publish_merge, publish_replace
from shoal.jobs.published import Published, State, read_published
from shoal.udfs.hash_encoder import describe_hash, hash_vectors

pytestmark = pytest.mark.spark

TEXTS = {"r0": "one fish", "r1": "two fish", "r2": "red fish"}
RUN = """
name: docs
source: {format: json, path: corpus.jsonl, key: id, text: body, schema: "id STRING, body STRING"}
encoder: {model: "hash:8"}
destination: {path: out/docs}
tracking: {enabled: false}
"""


@pytest.fixture(scope="module")
def made(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file and its published table of three rows, to be copied."""
    folder = tmp_path_factory.mktemp("publish")
    lines = [json.dumps({"id": key, "body": text}) + "\n" for key, text in TEXTS.items()]
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "run.yaml").write_text(RUN)
    embed(spark, load_run(folder / "run.yaml"))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run.yaml"


@pytest.fixture
def before(spark: SparkSession, run: Path) -> Published:
    return published_at(spark, table_of(spark, load_run(run).destination))


def published_at(spark: SparkSession, ref: TableRef) -> Published:
    found = read_published(spark, ref)
    assert found is not None
    return found


Publisher = Callable[[SparkSession, Target, str], int]


def target_of(run: Path, before: Published, **fields: Any) -> Target:
    target = Target(before.ref, before, before.table_id, before.generation + 1)
    return replace(target, **fields)


def change(spark: SparkSession, ref: TableRef, run_id: str) -> tuple[RowPlan, DataFrame]:
    """A plan that changes r0, and the row it publishes: `text` says which run it was."""
    plan = spark.createDataFrame([("r0", CHANGED)], f"id string, {ACTION} string")
    rows = RowPlan(plan, RowCounts(source=3, changed=1), keys=("id",), metadata=())
    return rows, ref.read(spark, 0).where("id = 'r0'").withColumn("text", F.lit(run_id))


def merge(spark: SparkSession, target: Target, run_id: str) -> int:
    rows, content = change(spark, target.ref, run_id)
    return publish_merge(spark, target, rows, content, State(run_id, target.generation, {}))


def write_anew(spark: SparkSession, target: Target, run_id: str) -> int:
    rows, content = change(spark, target.ref, run_id)
    config = load_run_of(target)
    spec = describe_hash(config.encoder)
    state = State(run_id, target.generation, {})
    return publish_replace(spark, target, config.destination, rows, content, spec, {"identity": spec.identity()}, state)


def load_run_of(target: Target) -> Any:
    return load_run(Path(target.ref.path or "").parents[1] / "run.yaml")


def texts(spark: SparkSession, ref: TableRef) -> dict[str, str]:
    return {row["id"]: row["text"] for row in ref.read(spark).collect()}


BOTH = pytest.mark.parametrize("publisher", [merge, write_anew])


@BOTH
def test_a_plan_that_another_publication_overtook_is_fenced_off(
    spark: SparkSession, run: Path, before: Published, publisher: Publisher
) -> None:
    stale = target_of(run, before)
    assert merge(spark, stale, "first") == 1

    with pytest.raises(OvertakenError, match=r"version 1 \(MERGE by .*\) landed after this run planned on version 0"):
        publisher(spark, stale, "second")

    assert published_at(spark, before.ref).version == 1
    assert texts(spark, before.ref) == TEXTS | {"r0": "first"}


def test_a_first_run_that_finds_a_table_is_fenced_off(spark: SparkSession, run: Path, before: Published) -> None:
    with pytest.raises(OvertakenError, match="somebody created it while this run encoded"):
        write_anew(spark, replace(target_of(run, before), before=None), "first")
    assert texts(spark, before.ref) == TEXTS


@BOTH
def test_a_publication_whose_transaction_id_is_taken_is_never_mistaken_for_success(
    spark: SparkSession, run: Path, before: Published, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = target_of(run, before)
    merge(spark, stale, "first")
    monkeypatch.setattr(publish, "_fence", lambda *_: None)

    with pytest.raises(OvertakenError, match=r"version 1 \(run first\) landed after"):
        publisher(spark, stale, "second")

    assert texts(spark, before.ref) == TEXTS | {"r0": "first"}


@BOTH
def test_a_generation_that_the_table_has_had_is_an_error_although_nobody_overtook(
    spark: SparkSession, run: Path, before: Published, publisher: Publisher
) -> None:
    used = target_of(run, before, generation=before.generation)

    with pytest.raises(RunError, match=r"has made no commit .*generation"):
        publisher(spark, used, "second")

    assert published_at(spark, before.ref).version == 0
    assert texts(spark, before.ref) == TEXTS


def test_a_publication_stands_although_another_landed_on_top_of_it_before_it_was_looked_at(
    spark: SparkSession, run: Path, before: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = publish._own_head

    def late(spark: SparkSession, target: Target, state: State) -> int:
        monkeypatch.setattr(publish, "_own_head", look)
        assert merge(spark, target_of(run, published_at(spark, before.ref)), "second") == 2
        return look(spark, target, state)

    monkeypatch.setattr(publish, "_own_head", late)

    assert merge(spark, target_of(run, before), "first") == 1


def test_a_publication_whose_outcome_cannot_be_seen_is_not_said_to_have_changed_nothing(
    spark: SparkSession, run: Path, before: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> int:
        raise PySparkException("the server is not there any more\nand a trace")

    monkeypatch.setattr(publish, "_fence", gone)
    with pytest.raises(RunError, match="not there any more; the table is as it was"):
        merge(spark, target_of(run, before), "first")

    monkeypatch.setattr(publish, "_own_head", gone)
    with pytest.raises(RunError, match="not there any more; whether it landed could not be seen"):
        merge(spark, target_of(run, before), "first")


def test_a_commit_leaves_no_settings_behind_in_the_session(spark: SparkSession, run: Path, before: Published) -> None:
    merge(spark, target_of(run, before), "first")

    before.ref.read(spark).where("id = 'r1'").write.format("delta").mode("append").save(before.ref.path)

    last = spark.sql(f"DESCRIBE HISTORY {before.ref.sql} LIMIT 1").collect()[0]
    assert (last["version"], last["operation"], last["userMetadata"]) == (2, "WRITE", None)


@pytest.mark.parametrize(
    ("column", "constraint"),
    [
        ("slice(embedding, 1, 7) AS embedding", "shoal_dim"),
        ("CAST(NULL AS array<float>) AS embedding", "shoal_accounted"),
        ("'why' AS error", "shoal_accounted"),
    ],
)
def test_nobody_can_append_a_row_that_breaks_the_table_s_promises(
    spark: SparkSession, made: Path, column: str, constraint: str
) -> None:
    ref = table_of(spark, load_run(made / "run.yaml").destination)
    name = column.rsplit(" ", 1)[1]
    rows = ref.read(spark).selectExpr(f"* EXCEPT ({name})", column)

    with pytest.raises((PySparkException, Py4JJavaError), match=f"(?s)CHECK constraint {constraint}"):
        rows.write.format("delta").mode("append").save(ref.path)


@pytest.fixture
def dressed(spark: SparkSession, run: Path) -> TableRef:
    """The table with everything that its owner may have set on it."""
    ref = table_of(spark, load_run(run).destination)
    spark.sql(f"ALTER TABLE {ref.sql} SET TBLPROPERTIES ('team' = 'search')")
    spark.sql(f"COMMENT ON TABLE {ref.sql} IS 'ask ada'")
    spark.sql(f"ALTER TABLE {ref.sql} ALTER COLUMN text COMMENT 'as shown to users'")
    spark.sql(f"ALTER TABLE {ref.sql} ADD CONSTRAINT short CHECK (length(id) < 9)")
    return ref


def test_another_encoder_is_refused_replaces_the_table_only_on_demand_and_the_way_back_encodes_nothing(
    spark: SparkSession, run: Path, dressed: TableRef
) -> None:
    eight, sixteen = load_run(run), load_run(run, ["encoder.model=hash:16"])
    planned_on = published_at(spark, dressed)

    with pytest.raises(EncoderChangedError, match=r"holds vectors of hash:8 .* asks for hash:16 .*dim: 8 -> 16") as no:
        embed(spark, sixteen)

    assert no.value.exit_code == 3
    assert published_at(spark, dressed).version == planned_on.version

    there = embed(spark, sixteen, full_refresh=True).record()

    assert (there["status"], there["chunks"]["encoded"], there["version"]) == ("published", 3, planned_on.version + 1)
    assert_vectors(spark, dressed, 16)
    assert_dressed(spark, dressed, 16)

    back = embed(spark, eight, full_refresh=True).record()

    assert (back["chunks"]["encoded"], back["chunks"]["reused"], back["chunks"]["embedded"]) == (0, 3, 3)
    assert back["fingerprint"] == planned_on.fingerprint
    assert back["generation"] == 3
    assert_vectors(spark, dressed, 8)
    assert_dressed(spark, dressed, 8)


def assert_vectors(spark: SparkSession, ref: TableRef, dim: int) -> None:
    rows = ref.read(spark).orderBy("id").collect()
    assert [row["text"] for row in rows] == list(TEXTS.values())
    found = np.array([row["embedding"] for row in rows], dtype=np.float32)
    np.testing.assert_array_equal(found, hash_vectors(list(TEXTS.values()), dim, normalize=True))


def assert_dressed(spark: SparkSession, ref: TableRef, dim: int) -> None:
    detail = spark.sql(f"DESCRIBE DETAIL {ref.sql}").collect()[0]
    assert detail["description"] == "ask ada"
    properties = detail["properties"]
    assert properties["team"] == "search"
    assert properties["delta.constraints.short"] == "length ( id ) < 9"
    assert properties["delta.constraints.shoal_dim"] == f"embedding IS NULL OR size(embedding) = {dim}"
    assert ref.read(spark).schema["text"].metadata["comment"] == "as shown to users"
    with pytest.raises((PySparkException, Py4JJavaError), match=r"(?s)CHECK constraint short"):
        ref.read(spark).selectExpr("* EXCEPT (id)", "'far too long' AS id").write.format("delta").mode("append").save(
            ref.path
        )
