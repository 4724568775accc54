"""Search over one table that all tests here read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, DestinationError, EncoderChangedError
from shoal.conf.loader import load_run
from shoal.jobs.embed import embed
from shoal.jobs.search import search
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = pytest.mark.spark

BODIES = ["one fish", "two fish", "red fish", "blue fish", "one fish", None]


@pytest.fixture(scope="module")
def table(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six rows whose key is called as a column of the answer to come, one without a vector."""
    folder = tmp_path_factory.mktemp("search")
    rows = [{"query": n, "body": body, "tag": "ab"[n % 2]} for n, body in enumerate(BODIES)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "name": "docs",
        "source": {
            "format": "json", "path": "corpus.jsonl", "key": "query", "text": "body", "columns": ["tag"],
            "schema": "query INT, body STRING, tag STRING",
        },
        "encoder": {"model": "hash:8", "query_prompt": "ask: "},
        "destination": {"path": "docs"},
        "tracking": {"enabled": False},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(settings))
    embed(spark, load_run(folder / "run.yaml"))
    return str(folder / "docs")


def expected(text: str) -> list[tuple[int, float]]:
    """Key and score of every row with a vector, best first, ties by key."""
    good = [(n, body) for n, body in enumerate(BODIES) if body is not None]
    query_D = hash_vectors([f"ask: {text}"], 8)[0].astype(np.float64)
    scores_N = hash_vectors([body for _, body in good], 8).astype(np.float64) @ query_D
    return sorted(
        ((n, float(score)) for (n, _), score in zip(good, scores_N, strict=True)), key=lambda hit: (-hit[1], hit[0])
    )


def keys_and_scores(hits: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(hit["query"], hit["score"]) for hit in hits]


def test_each_query_gets_its_own_neighbours_best_first_with_its_prompt(spark: SparkSession, table: str) -> None:
    texts = ["red fish", "something else"]

    answers = search(spark, table, texts, 3)

    for text, hits in zip(texts, answers, strict=True):
        assert [hit.keys() for hit in hits] == [{"query", "chunk_index", "text", "score"}] * 3
        for hit, (key, score) in zip(hits, expected(text), strict=False):
            assert (hit["query"], hit["text"]) == (key, BODIES[key])
            assert hit["score"] == pytest.approx(score, abs=2e-6)


def test_a_k_beyond_the_table_gives_every_row_that_has_a_vector(spark: SparkSession, table: str) -> None:
    (hits,) = search(spark, table, ["one fish"], 1000)

    assert [key for key, _ in keys_and_scores(hits)] == [key for key, _ in expected("one fish")]


def test_only_rows_that_meet_the_condition_are_searched(spark: SparkSession, table: str) -> None:
    (hits,) = search(spark, table, ["one fish"], 10, where="tag = 'b' AND query < 4")
    (none,) = search(spark, table, ["one fish"], 10, where="tag = 'z'")

    assert {key for key, _ in keys_and_scores(hits)} == {1, 3}
    assert none == []


@pytest.mark.parametrize("where", ["nothing = 1", "tag = ", "query", "1; DROP TABLE x"])
def test_a_broken_condition_is_shown(spark: SparkSession, table: str, where: str) -> None:
    with pytest.raises(ConfigError, match=r"^--where '.*': .+"):
        search(spark, table, ["one fish"], 10, where=where)


def test_a_table_whose_encoder_is_no_longer_to_be_had_is_not_searched(spark: SparkSession, table: str) -> None:
    recorded = spark.sql(f"SHOW TBLPROPERTIES delta.`{table}` ('shoal.fingerprint')").collect()[0]["value"]
    change = f"ALTER TABLE delta.`{table}` SET TBLPROPERTIES ('shoal.fingerprint' = '%s')"
    spark.sql(change % ("0" * 32))
    try:
        with pytest.raises(EncoderChangedError, match=rf"hash:8 is now {recorded}: the model's files have changed"):
            search(spark, table, ["one fish"], 1)
    finally:
        spark.sql(change % recorded)


def test_what_cannot_be_searched_is_said(spark: SparkSession, table: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="-k is 0; ask for at least 1 neighbour"):
        search(spark, table, ["one fish"], 0)
    with pytest.raises(ConfigError, match="the query is blank"):
        search(spark, table, [" \n"], 1)
    with pytest.raises(DestinationError, match=r"table '.*/none': there is no such table; `shoal embed` makes one"):
        search(spark, str(tmp_path / "none"), ["one fish"], 1)
    spark.range(1).write.format("delta").save(str(tmp_path / "plain"))
    with pytest.raises(DestinationError, match=r"'.*/plain' is not a Shoal table"):
        search(spark, str(tmp_path / "plain"), ["one fish"], 1)
