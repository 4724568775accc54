"""The best answers once more: a cross-encoder's order is that of the library, and MMR chooses by its definition."""

import json
from pathlib import Path

import numpy as np
import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import ModelError
from shoal.conf.loader import load_run
from shoal.jobs.embed import embed
from shoal.jobs.sql_functions import install, reranker_folder
from shoal.udfs.hash_encoder import hash_vectors
from shoal.udfs.mmr_udf import maximal_marginal_relevance

pytestmark = pytest.mark.spark

SQL_ERRORS = (PySparkException, Py4JJavaError)

TEXTS = [f"{a} {b} {c}" for a in ("red", "blue", "old") for b in ("fish", "boat") for c in ("swims", "sinks")]


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder with weights by chance and the vocabulary of these texts."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("cross")
    words = sorted({word for text in TEXTS for word in text.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32)
    torch.manual_seed(5)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
            intermediate_size=32, max_position_embeddings=32, initializer_range=1.0,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tables of TEXTS, one with terms, one without texts."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [{"id": n, "body": text} for n, text in enumerate(TEXTS)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, more in (("docs", {"lexical": {}}), ("bare", {})):
        run = {
            "name": name,
            "source": {
                "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "schema": "id INT, body STRING",
            },
            "encoder": {"model": "hash:8"},
            "destination": {"path": name, "store_text": name == "docs"},
            "tracking": {"enabled": False},
        } | more  # fmt: skip
        (folder / "run.yaml").write_text(json.dumps(run))
        embed(spark, load_run(folder / "run.yaml"))
    return folder


def test_answers_come_in_the_order_of_the_cross_encoder(spark: SparkSession, folder: Path, cross_encoder: Path) -> None:
    from sentence_transformers import CrossEncoder

    install(spark, {"docs": str(folder / "docs")}, str(cross_encoder))
    scores = CrossEncoder(str(cross_encoder), local_files_only=True).predict([("old fish", text) for text in TEXTS])
    rows = spark.sql("SELECT * FROM docs_rerank('old fish', 5)").collect()
    best = np.argsort(-scores, kind="stable")[:5].tolist()
    assert len({round(float(scores[row]), 4) for row in best}) == 5
    assert [row["id"] for row in rows] == best
    assert [row["score"] for row in rows] == pytest.approx(scores[best].tolist(), abs=1e-5)
    assert [row["text"] for row in rows] == [TEXTS[row] for row in best]

    candidates = {row["id"] for row in spark.sql("SELECT id FROM docs_hybrid('old fish', 3, depth => 1)").collect()}
    few = spark.sql("SELECT id FROM docs_rerank('old fish', 3, depth => 1)").collect()
    assert {row["id"] for row in few} == candidates


def test_what_cannot_be_reranked_says_why(spark: SparkSession, folder: Path, cross_encoder: Path) -> None:
    install(spark, {"docs": str(folder / "docs")})
    with pytest.raises(SQL_ERRORS, match="docs_rerank: there is no reranker; start `shoal serve` with --reranker"):
        spark.sql("SELECT count(*) FROM docs_rerank('fish')").collect()
    install(spark, {"bare": str(folder / "bare")}, str(cross_encoder))
    with pytest.raises(SQL_ERRORS, match="bare_rerank: table bare stores no texts"):
        spark.sql("SELECT * FROM bare_rerank('fish')").collect()
    with pytest.raises(ModelError, match=r"reranker '\./nowhere': .*not there"):
        install(spark, {"docs": str(folder / "docs")}, "./nowhere")
    with pytest.raises(ModelError, match="is no cross-encoder"):
        reranker_folder("hash:8")


def test_an_encoder_in_the_place_of_a_reranker_is_no_ranking(spark: SparkSession, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    install(spark, {"docs": str(folder / "docs")}, str(tmp_path))
    with pytest.raises(SQL_ERRORS, match=r"reranker '.*' could not be loaded"):
        spark.sql("SELECT * FROM docs_rerank('fish')").collect()


@pytest.mark.parametrize("relevance", [None, 0.0, 1.0])
def test_mmr_chooses_as_its_definition_says(spark: SparkSession, folder: Path, relevance: float | None) -> None:
    install(spark, {"docs": str(folder / "docs")})
    vectors_ND = hash_vectors(TEXTS, 8)
    scores_N = vectors_ND @ hash_vectors(["fish"], 8)[0]
    nearest = np.argsort(-scores_N, kind="stable")[:7]
    share = 0.7 if relevance is None else relevance
    chosen = nearest[maximal_marginal_relevance(vectors_ND[nearest], scores_N[nearest], 5, share)]
    said = "" if relevance is None else f", relevance => {relevance}"
    rows = spark.sql(f"SELECT * FROM docs_mmr('fish', 5, depth => 7{said})").collect()
    assert [row["id"] for row in rows] == chosen.tolist()
    assert [row["score"] for row in rows] == pytest.approx(scores_N[chosen].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("docs_mmr(' ')", "the query is NULL or blank"),
        ("docs_mmr('fish', 0)", "k is NULL or below 1"),
        ("docs_mmr('fish', 3, 1.5)", "relevance is NULL, below 0 or above 1"),
        ("docs_mmr('fish', 3, NULL)", "relevance is NULL, below 0 or above 1"),
    ],
)
def test_what_mmr_cannot_be_asked(spark: SparkSession, folder: Path, call: str, told: str) -> None:
    install(spark, {"docs": str(folder / "docs")})
    with pytest.raises(SQL_ERRORS, match=rf"docs_mmr: {told}"):
        spark.sql(f"SELECT * FROM {call}").collect()
