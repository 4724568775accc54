"""The change feed against the snapshot and a rebuild, over random histories; each reason to fall back; what is read."""

import os
import random
import re
import shutil
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import SourceError
from shoal.conf.loader import load_run
from shoal.jobs.changes import _broken, _state_of, is_pure
from shoal.jobs.embed import Hooks, embed
from shoal.jobs.operation import operating
from shoal.jobs.plan import plan
from shoal.jobs.planner import key_range, near
from shoal.jobs.source import read_source
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = [pytest.mark.spark, pytest.mark.slow]

Model = dict[str, tuple[str | None, str | None]]
FEED_ON = "'delta.enableChangeDataFeed' = 'true'"


@dataclass
class Nightly:
    """A Delta source, what it should hold by now, and what each version held; runs read it by feed or by snapshot."""

    spark: SparkSession
    folder: Path
    rows: Model = field(default_factory=dict)
    versions: dict[int, Model] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return f"delta.`{self.folder}/source`"

    def create(self, rows: Model, properties: str = FEED_ON) -> None:
        self.spark.sql(
            f"CREATE TABLE {self.source} (id STRING, body STRING, tag STRING) USING delta TBLPROPERTIES ({properties})"
        )
        self.rows = dict(rows)
        self.frame(rows).write.format("delta").mode("append").save(f"{self.folder}/source")
        self.remember()

    def frame(self, rows: Model) -> DataFrame:
        values = [(key, *row) for key, row in rows.items()]
        return self.spark.createDataFrame(values, "id string, body string, tag string").coalesce(1)

    def sql(self, statement: str) -> None:
        self.spark.sql(statement.replace("SOURCE", self.source))

    def remember(self) -> None:
        self.versions[self.version] = dict(self.rows)

    @property
    def version(self) -> int:
        return int(self.spark.sql(f"DESCRIBE HISTORY {self.source} LIMIT 1").collect()[0]["version"])

    def run_file(self, out: str, **source: Any) -> Path:
        run = {
            "name": "docs",
            "source": {
                "format": "delta", "path": "source", "key": "id", "text": "body", "columns": ["tag"], **source
            },
            "encoder": {"model": "hash:8"},
            "destination": {"path": f"out/{out}"},
            "limits": {"max_deleted": "100%", "max_errors": "100%"},
            "tracking": {"enabled": False},
        }  # fmt: skip
        path = self.folder / f"{out}.yaml"
        path.write_text(yaml.safe_dump(run))
        return path

    def embed(self, out: str = "feed", hooks: Hooks | None = None, **source: Any) -> dict[str, Any]:
        return embed(self.spark, load_run(self.run_file(out, **source)), hooks=hooks).record()

    def published(self, out: str = "feed") -> list[Row]:
        """All columns but the time, by key."""
        table = self.spark.read.format("delta").load(f"{self.folder}/out/{out}")
        return sorted(table.drop("embedded_at").collect(), key=lambda row: (row["id"], row["chunk_index"]))

    def rebuilt(self) -> list[tuple[Any, ...]]:
        """Key, text, tag, error and vector of each row, worked out without Spark."""
        vectors_ND = hash_vectors([body or "" for body, _ in self.rows.values()], 8, normalize=True)
        found = []
        for (key, (body, tag)), vector in zip(self.rows.items(), vectors_ND, strict=True):
            error = "null_text" if body is None else "blank_text" if not body else None
            found.append((key, body, tag, error, None if error else vector.tolist()))
        return sorted(found)


def seen(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [(row["id"], row["text"], row["tag"], row["error"], row["embedding"]) for row in rows]


# What happens to a source between two nights: a verb, two rows, a text, a tag.
KEYS = [f"k{index}" for index in range(8)]
TEXTS = [f"text {index}" for index in range(6)] + ["", None]
TAGS = ["red", "blue", None]
VERBS = (
    "insert", "insert", "text", "tag", "rekey", "delete", "merge", "reorder", "overwrite", "optimize", "restore",
    "twice", "replace", "vacuum", "column",
)  # fmt: skip


def history_of(seed: int) -> list[list[Any]]:
    """Every verb once, three before each night; by seed, since Hypothesis would begin with the dullest history."""
    draw = random.Random(seed)
    verbs = iter(draw.sample(VERBS, len(VERBS)))
    return [
        [[next(verbs), *(draw.choice(options) for options in (KEYS, KEYS, TEXTS, TAGS))] for _ in range(3)]
        for _ in range(len(VERBS) // 3)
    ]


# After these a night has to compare everything, or (the last two) may have to.
BY_SNAPSHOT, MAYBE = {"restore", "column"}, {"vacuum", "replace"}


def literal(value: str | None) -> str:
    return "NULL" if value is None else f"'{value}'"


def take(nightly: Nightly, step: tuple[str, str, str, str | None, str | None]) -> str:
    """Makes one change to the source and to the model of it; the verb as it came out."""
    verb, one, two, body, tag = step
    rows = nightly.rows
    values = f"'{one}', {literal(body)}, {literal(tag)}"
    columns = "(id, body, tag)"
    if verb == "insert" and one not in rows:
        nightly.sql(f"INSERT INTO SOURCE {columns} VALUES ({values})")
        rows[one] = (body, tag)
    elif verb == "text" and one in rows:
        nightly.sql(f"UPDATE SOURCE SET body = {literal(body)} WHERE id = '{one}'")
        rows[one] = (body, rows[one][1])
    elif verb == "tag" and one in rows:
        nightly.sql(f"UPDATE SOURCE SET tag = {literal(tag)} WHERE id = '{one}'")
        rows[one] = (rows[one][0], tag)
    elif verb == "rekey" and one in rows and two not in rows:
        nightly.sql(f"UPDATE SOURCE SET id = '{two}' WHERE id = '{one}'")
        rows[two] = rows.pop(one)
    elif verb == "delete" and one in rows:
        nightly.sql(f"DELETE FROM SOURCE WHERE id = '{one}'")
        rows.pop(one)
    elif verb == "merge":
        nightly.sql(
            f"MERGE INTO SOURCE t USING (SELECT '{one}' AS id, {literal(body)} AS body UNION ALL SELECT '{two}x', 'm') "
            f"AS s ON t.id = s.id WHEN MATCHED THEN UPDATE SET body = s.body "
            f"WHEN NOT MATCHED THEN INSERT {columns} VALUES (s.id, s.body, NULL)"
        )
        for key, text in ((one, body), (f"{two}x", "m")):
            rows[key] = (text, rows[key][1] if key in rows else None)
    elif verb == "twice" and one not in rows:
        # There, gone and there again, as another row in between.
        nightly.sql(f"INSERT INTO SOURCE {columns} VALUES ('{one}', 'passing', NULL)")
        nightly.sql(f"DELETE FROM SOURCE WHERE id = '{one}'")
        nightly.sql(f"INSERT INTO SOURCE {columns} VALUES ({values})")
        rows[one] = (body, tag)
    elif verb in ("reorder", "overwrite"):
        kept = [key for key in rows if verb == "reorder" or key not in (one, two)]
        random.Random(one).shuffle(kept)
        nightly.rows = {key: rows[key] for key in kept}
        nightly.frame(nightly.rows).write.format("delta").mode("overwrite").save(f"{nightly.folder}/source")
    elif verb == "replace":
        nightly.rows = {**rows, one: (body, tag)}
        writer = nightly.frame(nightly.rows).writeTo(nightly.source).using("delta")
        writer.tableProperty("delta.enableChangeDataFeed", "true").createOrReplace()
    elif verb == "optimize":
        nightly.sql("OPTIMIZE SOURCE")
    elif verb == "restore":
        version = min(nightly.versions)
        nightly.sql(f"RESTORE TABLE SOURCE TO VERSION AS OF {version}")
        nightly.rows = dict(nightly.versions[version])
    elif verb == "vacuum":
        nightly.spark.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
        nightly.sql("VACUUM SOURCE RETAIN 0 HOURS")
        nightly.spark.conf.unset("spark.databricks.delta.retentionDurationCheck.enabled")
        nightly.versions.clear()
    elif verb == "column":
        nightly.sql(f"ALTER TABLE SOURCE ADD COLUMN more_{nightly.version} INT")
    else:
        return "nothing"
    nightly.remember()
    return verb


def play(spark: SparkSession, folder: Path, history: list[list[Any]]) -> None:
    """Nights over a history, by feed and by snapshot into tables of their own, compared after each."""
    nightly = Nightly(spark, folder)
    nightly.create({f"k{index}": (f"text {index}", "red") for index in range(3)})
    texts: set[str] = set()
    encoded = {"feed": 0, "snapshot": 0}
    for number, steps in enumerate([[], *history]):
        verbs = {take(nightly, step) for step in steps}
        by_feed, by_snapshot = nightly.embed("feed"), nightly.embed("snapshot", changes="snapshot")

        told = f"night {number} after {verbs}: {by_feed['difference']}"
        assert seen(nightly.published("feed")) == nightly.rebuilt(), told
        assert nightly.published("feed") == nightly.published("snapshot"), told
        assert by_feed["rows"] == by_snapshot["rows"], told
        assert by_feed["status"] == by_snapshot["status"], told
        if number == 0 or verbs & BY_SNAPSHOT:
            assert by_feed["difference"].startswith("snapshot: "), told
        elif not verbs & MAYBE:
            assert by_feed["difference"].startswith("feed from version "), told
        texts |= {body for body, _ in nightly.rows.values() if body}
        for out, record in (("feed", by_feed), ("snapshot", by_snapshot)):
            encoded[out] += record["chunks"]["encoded"]
            assert encoded[out] == len(texts), told


@pytest.mark.long
@settings(
    # A history takes half a minute: one in every test run, more by hand.
    max_examples=int(os.environ.get("SHOAL_HISTORIES", "1")),
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32))
def test_feed_and_snapshot_and_rebuild_agree_after_each_night_of_a_random_history(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("history")

    play(spark, folder, history_of(seed))

    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def published_once(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source of four rows and the table of a first run over it."""
    folder = tmp_path_factory.mktemp("once")
    nightly = Nightly(spark, folder)
    nightly.create({f"k{index}": (f"text {index}", "red") for index in range(4)})
    nightly.embed()
    return folder


@pytest.fixture
def nightly(spark: SparkSession, published_once: Path, tmp_path: Path) -> Nightly:
    """A copy of the published folder: the table goes on, the source is made anew where the copy lies."""
    shutil.copytree(published_once, tmp_path, dirs_exist_ok=True)
    found = Nightly(spark, tmp_path, {f"k{index}": (f"text {index}", "red") for index in range(4)})
    found.remember()
    return found


def test_nights_without_changes_commit_nothing_and_go_on_from_the_last_version_seen(nightly: Nightly) -> None:
    # The copied folder is another path: the whole source is compared once, and found to hold what the table holds.
    moved = nightly.embed()
    versions = []
    for statement in ("OPTIMIZE SOURCE", "UPDATE SOURCE SET tag = tag", "INSERT OVERWRITE SOURCE SELECT * FROM SOURCE"):
        nightly.sql(statement)
        record = nightly.embed()
        versions.append((record["difference"], record["status"], record["version"], record["rows"]["unchanged"]))

    assert moved["difference"] == "snapshot: settings of source or chunk differ from those of the last run"
    assert (moved["status"], moved["version"]) == ("unchanged", 0)
    now = nightly.version
    start = moved["source_version"]
    assert [version[1:] for version in versions] == [("unchanged", 0, 4)] * 3
    assert versions[0][0].startswith(f"feed from version {start} to ")
    assert versions[-1][0].endswith(f" to {now}")
    assert versions[-1][0] != f"feed from version {start} to {now}", "the version seen has advanced"
    again = nightly.embed()
    assert again["difference"] == f"feed from version {now} to {now}"
    assert again["source_version"] == now


@pytest.mark.long
def test_a_text_is_encoded_once_however_often_it_occurs_wherever_it_goes_and_when_it_comes_back(
    nightly: Nightly,
) -> None:
    insert = "INSERT INTO SOURCE SELECT concat('many', id), 'the same', NULL FROM range({})"
    nightly.embed()
    encoded = []
    for statement in (
        insert.format(1000),
        "UPDATE SOURCE SET id = 'moved' WHERE id = 'k1'",
        "UPDATE SOURCE SET body = CASE id WHEN 'k2' THEN 'text 3' ELSE 'text 2' END WHERE id IN ('k2', 'k3')",
        "DELETE FROM SOURCE WHERE body IN ('the same', 'text 0')",
        "UPDATE SOURCE SET tag = 'blue'",
        "INSERT INTO SOURCE VALUES ('back', 'text 0', 'red'), ('again', 'the same', NULL)",
    ):
        nightly.sql(statement)
        record = nightly.embed()
        assert record["difference"].startswith("feed from "), statement
        assert record["status"] == "published", statement
        encoded.append(record["chunks"]["encoded"])

    assert encoded == [1, 0, 0, 0, 0, 0]
    nightly.rows = {
        "moved": ("text 1", "blue"), "k2": ("text 3", "blue"), "k3": ("text 2", "blue"), "back": ("text 0", "red"),
        "again": ("the same", None),
    }  # fmt: skip
    assert seen(nightly.published()) == nightly.rebuilt()


@pytest.mark.long
def test_errors_that_may_pass_are_tried_again_though_the_feed_does_not_tell_of_them(
    spark: SparkSession, nightly: Nightly
) -> None:
    # A publication of this folder, so that the state which the operation keeps is one of this folder.
    nightly.sql("UPDATE SOURCE SET tag = 'green' WHERE id = 'k0'")
    nightly.rows["k0"] = ("text 0", "green")
    nightly.embed()
    with operating(spark, f"{nightly.folder}/out/feed", "test") as operation:
        operation.commit(
            f"UPDATE {operation.ref.sql} SET embedding = NULL, error = 'time_limit' WHERE id IN ('k1', 'k2', 'k3')",
            "published",
        )
    nightly.sql("UPDATE SOURCE SET body = 'changed' WHERE id = 'k2'")
    nightly.sql("UPDATE SOURCE SET tag = 'blue' WHERE id = 'k3'")
    nightly.rows |= {"k2": ("changed", "red"), "k3": ("text 3", "blue")}

    record = nightly.embed()

    assert record["difference"].startswith("feed from ")
    assert (record["rows"]["changed"], record["rows"]["retried"], record["rows"]["unchanged"]) == (3, 2, 1)
    assert seen(nightly.published()) == nightly.rebuilt()


@pytest.mark.long
def test_what_the_feed_cannot_tell_is_found_by_comparing_everything_and_the_reason_is_said(
    spark: SparkSession, nightly: Nightly
) -> None:
    nightly.embed()
    told = []

    def night(*statements: str) -> None:
        for statement in statements:
            nightly.sql(statement)
        told.append(nightly.embed()["difference"])
        assert seen(nightly.published()) == nightly.rebuilt(), told[-1]

    nightly.rows["off"] = ("while the feed is off", None)
    night(
        "ALTER TABLE SOURCE SET TBLPROPERTIES ('delta.enableChangeDataFeed' = 'false')",
        "INSERT INTO SOURCE VALUES ('off', 'while the feed is off', NULL)",
        "ALTER TABLE SOURCE SET TBLPROPERTIES ('delta.enableChangeDataFeed' = 'true')",
    )
    nightly.sql("UPDATE SOURCE SET body = 'new text' WHERE id = 'k1'")
    shutil.rmtree(nightly.folder / "source" / "_change_data")
    nightly.rows["k1"] = ("new text", "red")
    night()
    table = f"delta.`{nightly.folder}/out/feed`"
    spark.sql(f"DELETE FROM {table} WHERE id = 'k2'")
    night()
    nightly.rows.pop("k3")
    night("DELETE FROM SOURCE WHERE id = 'k3'")
    night("ALTER TABLE SOURCE ADD COLUMN more INT")
    shutil.rmtree(nightly.folder / "source")
    nightly.create(nightly.rows)
    night()

    reasons = (
        r"snapshot: the change feed cannot be read \(\[DELTA_MISSING_CHANGE_DATA\]",
        r"snapshot: the change feed cannot be read \(",
        r"snapshot: others wrote to the table: version \d+ \(DELETE\)",
        r"feed from version \d+ to \d+",
        r"snapshot: the columns of the source have changed",
        r"snapshot: the source is another table than the last run read",
    )
    for difference, reason in zip(told, reasons, strict=True):
        assert re.match(reason, difference)


@pytest.mark.long
def test_a_catalog_table_is_read_by_its_feed_and_columns_may_be_renamed(spark: SparkSession, tmp_path: Path) -> None:
    spark.sql("CREATE SCHEMA IF NOT EXISTS feeds")
    spark.sql(
        f"CREATE OR REPLACE TABLE feeds.docs (`a.id` BIGINT, body STRING, tags MAP<STRING, STRING>) USING delta "
        f"TBLPROPERTIES ({FEED_ON})"
    )
    spark.sql("INSERT INTO feeds.docs VALUES (1, 'one', map('x', 'y')), (2, 'two', NULL), (3, '', NULL)")
    source = {
        "format": "table", "path": None, "table": "feeds.docs", "key": ["`a.id` AS doc"], "text": "<{body}>",
        "columns": ["tags AS labels"], "filter": "length(body) < 9",
    }  # fmt: skip
    nightly = Nightly(spark, tmp_path)
    nightly.embed(**source)
    spark.sql("UPDATE feeds.docs SET tags = map('x', 'z') WHERE body = 'one'")
    spark.sql("UPDATE feeds.docs SET body = 'two grows too long' WHERE body = 'two'")
    spark.sql("INSERT INTO feeds.docs VALUES (4, 'four', NULL), (5, 'filtered out', NULL)")

    record = nightly.embed(**source)

    assert record["difference"].startswith("feed from version ")
    expected = {"source": 3, "new": 1, "changed": 0, "metadata_only": 1, "deleted": 1, "unchanged": 1, "retried": 0}
    assert record["rows"] == expected
    table = spark.read.format("delta").load(f"{tmp_path}/out/feed")
    found = {row["doc"]: (row["text"], row["labels"]) for row in table.collect()}
    assert found == {1: ("<one>", {"x": "z"}), 3: ("<>", None), 4: ("<four>", None)}


@pytest.mark.parametrize(
    ("differs", "reason"),
    [
        ({"settings": ""}, "settings of source or chunk differ from those of the last run"),
        ({"table_id": ""}, "the source is another table than the last run read"),
        ({"schema": ""}, "the columns of the source have changed"),
        ({"committed_ms": 0}, "version 1 of the source is not the one that was read last"),
        ({"version": 9}, "version 1 of the source is older than version 9, which was read before"),
        ({"version": -1}, "version -1 of the source, which was read last, is no longer in its log"),
    ],
)
def test_a_source_that_does_not_go_on_from_the_recorded_state_is_not_read_by_its_feed(
    spark: SparkSession, published_once: Path, differs: dict[str, Any], reason: str
) -> None:
    nightly = Nightly(spark, published_once)
    config = load_run(nightly.run_file("feed"))
    now = _state_of(spark, config, read_source(spark, config.source, config.chunk))
    assert now is not None
    assert _broken(spark, nightly.source, now, now) is None

    assert _broken(spark, nightly.source, replace(now, **differs), now) == reason


@pytest.mark.long
def test_rows_that_share_a_key_stop_a_night_by_feed_as_they_stop_any_other(nightly: Nightly) -> None:
    nightly.embed()
    nightly.sql("INSERT INTO SOURCE VALUES ('k1', 'other', NULL), ('new', 'one', NULL), ('new', 'one', NULL)")

    with pytest.raises(SourceError, match=r"rows share their key \(id\) with another row"):
        nightly.embed()

    nightly.sql("DELETE FROM SOURCE WHERE id = 'new' OR body = 'other'")
    nightly.sql("INSERT INTO SOURCE VALUES (NULL, 'no key', NULL)")
    with pytest.raises(SourceError, match=r"rows have NULL in \(id\)"):
        nightly.embed()
    nightly.sql("DELETE FROM SOURCE WHERE id IS NULL")
    assert nightly.embed()["difference"].startswith("feed from version 1 to ")


@pytest.mark.parametrize(
    ("settings", "arguments", "reason"),
    [
        ({"changes": "snapshot"}, {}, "source.changes asks for it"),
        ({"duplicates": "keep_first"}, {}, "source.duplicates is keep_first"),
        ({"filter": "rand() < 2"}, {}, "source.filter may say something else of the same row another time"),
        ({"filter": "id > 'a'"}, {}, "settings of source or chunk differ from those of the last run"),
        ({"version": 0}, {}, "version 0 of the source is older than version 1, which was read before"),
        ({}, {"full_refresh": True}, "the table is written anew"),
    ],
)
def test_settings_that_the_feed_cannot_answer_for_are_answered_by_a_snapshot(
    spark: SparkSession, published_once: Path, settings: dict[str, Any], arguments: dict[str, Any], reason: str
) -> None:
    run_file = Nightly(spark, published_once).run_file("feed", **settings)

    found = plan(spark, load_run(run_file), **arguments)

    assert found["difference"] == f"snapshot: {reason}"


@pytest.mark.long
def test_a_night_on_recent_rows_reads_no_older_file_of_source_or_table(
    spark: SparkSession, nightly: Nightly, tmp_path: Path
) -> None:
    older: list[Path] = []
    for letter in "mn":
        older = [*tmp_path.glob("source/*.parquet"), *tmp_path.glob("out/feed/*.parquet")]
        nightly.sql(f"INSERT INTO SOURCE SELECT concat('{letter}', id), concat('{letter} ', id), 'x' FROM range(9)")
        nightly.embed()
    nightly.sql("INSERT INTO SOURCE VALUES ('z', 'the last', 'x')")
    nightly.sql("UPDATE SOURCE SET tag = 'y' WHERE id = 'n3'")
    nightly.sql("UPDATE SOURCE SET body = 'n 0, or not' WHERE id = 'n4'")
    nightly.sql("DELETE FROM SOURCE WHERE id = 'n5'")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    steps = []

    def step(name: str) -> None:
        steps.append(name)
        if name == "audited":
            for path in older:
                path.rename(hidden / path.name)
        if name == "committed":
            for path in older:
                (hidden / path.name).rename(path)

    record = nightly.embed(hooks=Hooks(step=step))

    assert record["difference"].startswith("feed from ")
    assert (record["rows"]["new"], record["rows"]["changed"], record["rows"]["metadata_only"]) == (1, 1, 1)
    assert record["rows"]["deleted"] == 1
    assert {"audited", "committed"} <= set(steps)


KEY_TYPES = {
    "string": ["a'b", "\\", "z\N{ROCKET}"],
    "int": [-5, 0, 7],
    "bigint": [-(2**63), 2**63 - 1],
    "smallint": [-3, 4],
    "date": [date(1969, 12, 31), date(2026, 1, 2)],
    "timestamp": [datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC), datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)],
}


@pytest.mark.parametrize("data_type", KEY_TYPES)
def test_the_range_of_keys_holds_every_key_and_leaves_out_all_beyond_it(spark: SparkSession, data_type: str) -> None:
    values = KEY_TYPES[data_type]
    rows = spark.createDataFrame([(value,) for value in values], f"`the key` {data_type}")

    whole = near(rows, key_range(rows, ["the key"]))
    first = near(rows, key_range(rows.where(F.col("the key") == F.lit(values[0])), ["the key"]))

    assert len(key_range(rows, ["the key"])) == 2
    assert whole.count() == len(values)
    assert [row["the key"] for row in first.collect()] == [rows.first()["the key"]]


@pytest.mark.parametrize(
    "values", ["'a', NULL", "concat('$', '{x}'), 'b'", "'a\\nb', 'c'", "1.5BD, 2.5BD", "true, false"]
)
def test_keys_without_an_exact_literal_give_no_range(spark: SparkSession, values: str) -> None:
    rows = spark.createDataFrame([], "k string") if not values else spark.sql(f"SELECT explode(array({values})) AS k")

    assert key_range(rows, ["k"]) == []


@pytest.mark.parametrize(
    ("condition", "pure"),
    [
        ("length(body) > 3 AND lang IN ('en', 'now()')", True),
        ("coalesce(deleted, false) = false", True),
        ("`current_date` = 1", True),
        ("day > current_date", False),
        ("day > date_sub(now(), 7)", False),
        ("id IN (SELECT id FROM other)", False),
        ("rand() < 0.5", False),
        ("my_udf(body)", False),
        ("`my_udf`(body)", False),
        ("a.b.fn(body)", False),
        ("x = 1 -- now", False),
    ],
)
def test_only_conditions_that_depend_on_the_row_alone_are_pure(condition: str, pure: bool) -> None:
    assert is_pure(condition) == pure
