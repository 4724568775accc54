"""BM25 and hybrid search in SQL: the same scores as a kept library, night after night, and terms that stay right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bm25s
import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.jobs.audit import audit
from shoal.jobs.embed import embed
from shoal.jobs.published import TERMS
from shoal.jobs.report import Report
from shoal.jobs.restore import Wanted, restore
from shoal.jobs.sql_functions import install
from shoal.jobs.sql_lexical import K1, RRF_K, B
from shoal.jobs.sql_parts import DEFAULT_DEPTH
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = pytest.mark.spark

SQL_ERRORS = (PySparkException, Py4JJavaError)

WORDS = [
    "wing", "lift", "drag", "jet", "flow", "shock", "wave", "heat",
    "plate", "cone", "layer", "speed", "sound", "wind", "tunnel", "boundary",
]  # fmt: skip

Bodies = dict[int, str | None]


def corpus(num_rows: int = 60) -> Bodies:
    """Texts of different lengths in which some words are frequent and some are rare; one has no words, one is NULL."""
    bodies: Bodies = {
        n: " ".join(WORDS[(n * n + 3 * place) % (place % 16 + 1)] for place in range(3 + n * 7 % 23))
        for n in range(num_rows)
    }
    return bodies | {num_rows: "?!", num_rows + 1: None}


def night(
    spark: SparkSession, folder: Path, bodies: Bodies, *, lexical: dict[str, Any] | None, **settings: Any
) -> Report:
    rows = [{"id": n, "body": body, "lang": "en" if n % 3 else None} for n, body in bodies.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "name": "docs",
        "source": {
            "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "columns": ["lang"],
            "schema": "id INT, body STRING, lang STRING",
        },
        "encoder": {"model": "hash:8"},
        "destination": {"path": "docs"},
        "limits": {"max_deleted": "100%", "max_errors": "100%"},
        "tracking": {"enabled": False},
        **({} if lexical is None else {"lexical": lexical}),
    } | settings  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(run))
    return embed(spark, load_run(folder / "run.yaml"))


def scores_of_the_library(bodies: Bodies, query: str, k1: float = K1, b: float = B) -> dict[int, float]:
    """What bm25s gives each text that has a word of the query."""
    texts = {n: body for n, body in bodies.items() if body is not None}
    terms = bm25s.tokenize(list(texts.values()), stopwords=None, return_ids=False, show_progress=False)
    library = bm25s.BM25(method="lucene", k1=k1, b=b)
    library.index([list(of_text) for of_text in terms], show_progress=False)
    asked = bm25s.tokenize([query], stopwords=None, return_ids=False, show_progress=False)[0]
    return {n: float(score) for n, score in zip(texts, library.get_scores(list(asked)), strict=True) if score > 0}


def require_same(found: list[Any], wanted: dict[int, float]) -> None:
    assert {row["id"]: row["score"] for row in found} == pytest.approx(wanted, abs=1e-4)
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)


@pytest.fixture(scope="module")
def docs(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    night(spark, folder, corpus(), lexical={})
    install(spark, {"docs": str(folder / "docs")})
    return folder


@pytest.mark.parametrize("query", ["wing", "shock WAVE, shock", "boundary layer of a flat plate", "wing speed sound"])
def test_scores_are_those_of_a_kept_library(spark: SparkSession, docs: Path, query: str) -> None:
    require_same(
        spark.sql(f"SELECT * FROM docs_bm25('{query}', 100)").collect(), scores_of_the_library(corpus(), query)
    )
    require_same(
        spark.sql(f"SELECT * FROM docs_bm25('{query}', k => 100, k1 => 1.5, b => 0.2)").collect(),
        scores_of_the_library(corpus(), query, 1.5, 0.2),
    )


def test_the_k_best_come_with_their_text_and_columns(spark: SparkSession, docs: Path) -> None:
    best = sorted(scores_of_the_library(corpus(), "heat").items(), key=lambda hit: (-round(hit[1], 5), hit[0]))[:3]
    rows = spark.sql("SELECT * FROM docs_bm25('heat', 3)").collect()
    assert [row["id"] for row in rows] == [n for n, _ in best]
    assert [row["text"] for row in rows] == [corpus()[n] for n, _ in best]
    assert [row["lang"] for row in rows] == ["en" if n % 3 else None for n, _ in best]
    assert spark.sql("SELECT * FROM docs_bm25('zeppelin')").collect() == []


def test_terms_are_those_of_the_text(spark: SparkSession, docs: Path) -> None:
    terms = {row["id"]: row[TERMS] for row in spark.read.format("delta").load(str(docs / "docs")).collect()}
    assert terms[60] == []
    assert terms[61] is None
    assert terms[1] == corpus()[1].split()  # type: ignore[union-attr]


def test_a_chunk_without_a_vector_is_found_by_its_words(spark: SparkSession, tmp_path: Path) -> None:
    night(spark, tmp_path, {0: "a wing", 1: "a rare zeppelin"}, lexical={})
    spark.sql(f"UPDATE delta.`{tmp_path / 'docs'}` SET embedding = NULL, error = 'time_limit' WHERE id = 1")
    install(spark, {"failed": str(tmp_path / "docs")})
    for function in ("bm25", "hybrid"):
        assert 1 in {row["id"] for row in spark.sql(f"SELECT id FROM failed_{function}('zeppelin')").collect()}


def test_nights_keep_terms_and_weights_right(spark: SparkSession, tmp_path: Path) -> None:
    night(spark, tmp_path, corpus(), lexical={})
    bodies = corpus() | {3: "wind tunnel", 7: None, 61: "a wing at last", 90: "wing wing wing"}
    del bodies[5], bodies[12]
    report = night(spark, tmp_path, bodies, lexical={})
    assert (report.reason, report.rows.new, report.rows.changed, report.rows.deleted) == (None, 1, 3, 2)
    install(spark, {"kept": str(tmp_path / "docs")})
    for query in ("wing", "wind tunnel", "last heat"):
        require_same(
            spark.sql(f"SELECT * FROM kept_bm25('{query}', 100)").collect(), scores_of_the_library(bodies, query)
        )


@pytest.mark.long
def test_other_settings_cut_all_terms_anew_and_encode_nothing(spark: SparkSession, tmp_path: Path) -> None:
    def terms(version: int | None = None) -> Any:
        reader = spark.read.format("delta")
        rows = (reader.option("versionAsOf", version) if version is not None else reader).load(str(tmp_path / "docs"))
        return rows.where("id = 0").collect()[0].asDict().get(TERMS, "no column")

    bodies: Bodies = {0: "the wings", 1: "a wing"}
    assert night(spark, tmp_path, bodies, lexical=None).status == "published"
    assert terms() == "no column"
    steps = [
        ({}, "columns changed: bm25_terms", ["the", "wings"]),
        ({"stemmer": "english"}, "its terms were cut by other settings", ["the", "wing"]),
        ({"stemmer": "english", "stopwords": ["the"]}, "its terms were cut by other settings", ["wing"]),
        (None, "columns changed: bm25_terms", "no column"),
    ]
    for lexical, reason, wanted in steps:
        report = night(spark, tmp_path, bodies, lexical=lexical)
        assert (report.status, report.reason, report.encoded) == ("published", reason, 0)
        assert terms() == wanted
        assert night(spark, tmp_path, bodies, lexical=lexical).status == "unchanged"

    install(spark, {"restored": str(tmp_path / "docs")})
    with pytest.raises(SQL_ERRORS, match="table restored has no terms"):
        spark.sql("SELECT * FROM restored_bm25('wing')").collect()
    restore(spark, str(tmp_path / "docs"), Wanted(to=2))
    install(spark, {"restored": str(tmp_path / "docs")})
    assert len(spark.sql("SELECT * FROM restored_bm25('wings')").collect()) == 2


@pytest.mark.long
def test_a_cut_over_keeps_the_terms(spark: SparkSession, tmp_path: Path) -> None:
    night(spark, tmp_path, corpus(), lexical={"stemmer": "english"})
    report = night(
        spark, tmp_path, corpus(), lexical={"stemmer": "english"}, next_encoder={"model": "hash:12"},
        migration={"cutover": "auto"},
    )  # fmt: skip
    assert report.migration is not None
    assert report.migration["state"] == "cut over"
    install(spark, {"over": str(tmp_path / "docs")})
    assert len(spark.sql("SELECT * FROM over_hybrid('wings', 5)").collect()) == 5


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("docs_bm25(NULL)", "the query is NULL or blank"),
        ("docs_bm25(' ')", "the query is NULL or blank"),
        ("docs_bm25('?!')", r"the query has no term: \?!"),
        ("docs_bm25('wing', 0)", "k is NULL or below 1"),
        ("docs_bm25('wing', 3, -1)", "k1 is out of its range; give 0 to 1000"),
        ("docs_bm25('zeppelin', 3, double('NaN'))", "k1 is out of its range"),
        ("docs_bm25('wing', 3, 1, 1.5)", "b is out of its range; give 0 to 1"),
        ("docs_bm25('wing', 3, 1, NULL)", "b is out of its range"),
        ("docs_hybrid(NULL)", "the query is NULL or blank"),
        ("docs_hybrid('wing', 0)", "k is NULL or below 1"),
        ("docs_hybrid('wing', weight => 1.5)", "the weight is below 0 or above 1"),
    ],
)
def test_what_cannot_be_asked_fails_with_a_reason(spark: SparkSession, docs: Path, call: str, told: str) -> None:
    with pytest.raises(SQL_ERRORS, match=rf"\[QUERY_INVALID\] docs_\w+: {told}"):
        spark.sql(f"SELECT * FROM {call}").collect()


@pytest.mark.parametrize("call", ["docs_bm25('?!')", "docs_bm25('wing', 0)", "docs_hybrid('wing', weight => 2)"])
def test_it_fails_where_nobody_looks_at_the_columns_too(spark: SparkSession, docs: Path, call: str) -> None:
    with pytest.raises(SQL_ERRORS, match="QUERY_INVALID"):
        spark.sql(f"SELECT count(*) FROM {call}").collect()


def rankings(query: str) -> tuple[dict[int, float], dict[int, float]]:
    """Scores by the vectors and by the words."""
    texts = {n: body for n, body in corpus().items() if body is not None}
    query_D = hash_vectors([query], 8)[0]
    by_vector = dict(zip(texts, (hash_vectors(list(texts.values()), 8) @ query_D).tolist(), strict=True))
    return by_vector, scores_of_the_library(corpus(), query)


def ranks(scores: dict[int, float]) -> dict[int, int]:
    in_order = sorted(scores, key=lambda n: (-round(scores[n], 5), n))
    return {n: rank for rank, n in enumerate(in_order[:DEFAULT_DEPTH], start=1)}


def test_ranks_are_fused_by_their_reciprocals(spark: SparkSession, docs: Path) -> None:
    fused: dict[int, float] = {}
    for scores in rankings("shock wave"):
        for n, rank in ranks(scores).items():
            fused[n] = fused.get(n, 0) + 1 / (RRF_K + rank)
    rows = spark.sql("SELECT * FROM docs_hybrid('shock wave', 100)").collect()
    assert {row["id"]: row["score"] for row in rows} == pytest.approx(fused, abs=1e-6)
    assert [row["text"] for row in rows] == [corpus()[row["id"]] for row in rows]
    best = spark.sql("SELECT id FROM docs_hybrid('shock wave', 4)").collect()
    assert [row["id"] for row in best] == [row["id"] for row in rows[:4]]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_weight_adds_the_scaled_scores(spark: SparkSession, docs: Path, weight: float) -> None:
    fused: dict[int, float] = {}
    for share, scores in zip((weight, 1 - weight), rankings("jet heat"), strict=True):
        low, high = min(scores.values()), max(scores.values())
        for n, score in scores.items():
            fused[n] = fused.get(n, 0) + share * (score - low) / (high - low)
    rows = spark.sql(f"SELECT * FROM docs_hybrid('jet heat', 100, {weight})").collect()
    assert {row["id"]: row["score"] for row in rows} == pytest.approx(fused, abs=1e-5)


def test_a_query_without_words_is_left_to_the_vectors(spark: SparkSession, docs: Path) -> None:
    by_vector = spark.sql("SELECT id FROM docs_search('?!', 5)").collect()
    for weight in ("NULL", "0"):
        assert spark.sql(f"SELECT id FROM docs_hybrid('?!', 5, {weight})").collect() == by_vector


def test_the_depth_bounds_the_candidates_and_k_is_the_least(spark: SparkSession, docs: Path) -> None:
    by_vector, by_words = rankings("wing")
    few = {*list(ranks(by_vector))[:3], *list(ranks(by_words))[:3]}
    assert {row["id"] for row in spark.sql("SELECT id FROM docs_hybrid('wing', 3, depth => 1)").collect()} <= few
    assert len(spark.sql("SELECT id FROM docs_hybrid('wing', 20, depth => 1)").collect()) == 20
    fused: dict[int, float] = {}
    for scores in (by_vector, by_words):
        for n, rank in list(ranks(scores).items())[:30]:
            fused[n] = fused.get(n, 0) + 1 / (RRF_K + rank)
    best = max(fused, key=lambda n: (round(fused[n], 7), -n))
    (row,) = spark.sql("SELECT * FROM docs_hybrid('wing', 1, depth => 30)").collect()
    assert (row["id"], row["score"]) == (best, pytest.approx(fused[best], abs=1e-6))


def test_keys_and_columns_may_be_called_as_arguments_are(spark: SparkSession, tmp_path: Path) -> None:
    rows = [{"k": n % 2, "x": n, "weight": n / 2, "depth": None, "body": f"wing {n}"} for n in range(6)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "name": "odd",
        "source": {
            "format": "json", "path": "corpus.jsonl", "key": ["k", "x"], "text": "body", "columns": ["weight", "depth"],
            "schema": "k INT, x INT, weight DOUBLE, depth INT, body STRING",
        },
        "encoder": {"model": "hash:8"},
        "destination": {"path": "odd", "store_text": False},
        "tracking": {"enabled": False},
        "lexical": {"pattern": "\\w+"},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    embed(spark, load_run(tmp_path / "run.yaml"))
    install(spark, {"odd": str(tmp_path / "odd")})
    (row,) = spark.sql("SELECT * FROM odd_bm25('4', 3)").collect()
    assert (row["k"], row["x"], row["weight"], row["depth"], row["text"]) == (0, 4, 2.0, None, None)
    best = spark.sql("SELECT * FROM odd_hybrid('5', 6, 0)").collect()
    assert len(best) == 6
    assert (best[0]["x"], best[0]["weight"]) == (5, 2.5)


@pytest.mark.long
def test_with_an_index_both_rankings_are_the_same_as_without(spark: SparkSession, tmp_path: Path) -> None:
    night(spark, tmp_path, corpus(), lexical={})
    install(spark, {"plain": str(tmp_path / "docs")})
    before = spark.sql("SELECT * FROM plain_hybrid('cone', 10)").collect()
    cells = {"cells": 4, "min_chunks": 1, "recall": 1.0}
    report = night(spark, tmp_path, corpus(), lexical={}, maintenance="auto", index=cells)
    assert report.maintenance is not None
    assert report.maintenance["index"] is not None
    functions = install(spark, {"celled": str(tmp_path / "docs")})
    assert functions.served["celled"].index is not None
    assert spark.sql("SELECT * FROM celled_hybrid('cone', 10, probes => 4)").collect() == before


def test_text_that_is_no_utf8_has_terms_too(spark: SparkSession, tmp_path: Path, run_file: Callable[..., Path]) -> None:
    source = spark.sql("SELECT 'a' AS id, CAST(X'77696E6720C3' AS STRING) AS body")
    source.write.parquet(str(tmp_path / "broken"))
    source_of = {"format": "parquet", "path": "broken", "key": "id", "text": "body"}
    embed(spark, load_run(run_file(source=source_of, lexical={})))
    (row,) = spark.read.format("delta").load(str(tmp_path / "out/docs")).collect()
    assert row[TERMS] == ["wing"]


@pytest.mark.long
def test_a_table_that_has_lost_its_terms_is_found_and_served_without_them(spark: SparkSession, tmp_path: Path) -> None:
    night(spark, tmp_path, {0: "a wing"}, lexical=None)
    spark.sql(f"ALTER TABLE delta.`{tmp_path / 'docs'}` SET TBLPROPERTIES ('shoal.lexical' = '{{}}')")
    (finding,) = [each for each in audit(spark, str(tmp_path / "docs")).findings if each.code == "PROPERTIES_DAMAGED"]
    assert finding.examples == ("columns are missing: bm25_terms",)
    install(spark, {"lost": str(tmp_path / "docs")})
    assert len(spark.sql("SELECT * FROM lost_search('wing')").collect()) == 1
    with pytest.raises(SQL_ERRORS, match="table lost has no terms"):
        spark.sql("SELECT * FROM lost_bm25('wing')").collect()
