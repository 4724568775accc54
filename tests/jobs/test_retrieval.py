from math import log2

import pytest

from shoal.conf.errors import SourceError
from shoal.jobs.retrieval import ndcg, read_corpus, read_qrels, read_queries


def test_a_perfect_ranking_scores_1():
    assert ndcg({"q": ["a", "b", "x"]}, {"q": {"a": 2, "b": 1}}) == pytest.approx(1)


def test_a_ranking_is_scored_as_by_hand():
    qrels = {"q": {"a": 3, "b": 2, "c": 1}}
    gained = 2 / log2(2) + 3 / log2(4)
    best = 3 / log2(2) + 2 / log2(3) + 1 / log2(4)
    assert ndcg({"q": ["b", "x", "a"]}, qrels) == pytest.approx(gained / best)


def test_gain_is_linear_in_relevance():
    assert ndcg({"q": ["b", "a"]}, {"q": {"a": 2, "b": 1}}) == pytest.approx((1 + 2 / log2(3)) / (2 + 1 / log2(3)))


def test_only_the_first_k_count():
    assert ndcg({"q": ["x", "a"]}, {"q": {"a": 1}}, k=1) == 0
    many = {"q": {str(number): 1.0 for number in range(20)}}
    assert ndcg({"q": [str(number) for number in range(10)]}, many, k=10) == pytest.approx(1)


def test_queries_without_a_relevant_row_are_left_out_and_those_without_an_answer_count_0():
    qrels = {"none": {"a": 0}, "found": {"a": 1}, "unanswered": {"a": 1}}
    assert ndcg({"found": ["a"], "none": ["a"], "unjudged": ["a"]}, qrels) == pytest.approx(0.5)


def test_negative_relevance_gains_nothing():
    assert ndcg({"q": ["bad", "a"]}, {"q": {"a": 1, "bad": -2}}) == pytest.approx(1 / log2(3))


@pytest.mark.parametrize(
    ("ranked", "qrels", "k", "message"),
    [
        ({}, {"q": {"a": 1}}, 0, "k is 0"),
        ({"q": ["a", "a"]}, {"q": {"a": 1}}, 10, "query 'q' names a row twice"),
        ({"q": ["a"]}, {"q": {"a": 0}}, 10, "none of the 1 judged queries"),
    ],
)
def test_what_has_no_score_is_refused(ranked, qrels, k, message):
    with pytest.raises(ValueError, match=message):
        ndcg(ranked, qrels, k)


def test_a_corpus_folder_is_read(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "1", "title": "T", "text": "one\\u2028two"}\n\n{"_id": 2, "text": null}\n', encoding="utf-8"
    )
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "what"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\nq\t2\t0\n")
    assert read_corpus(tmp_path) == {"1": {"title": "T", "text": "one\u2028two"}, "2": {"title": "", "text": ""}}
    assert read_queries(tmp_path) == {"q": "what"}
    assert read_qrels(tmp_path / "qrels.tsv") == {"q": {"1": 1.0, "2": 0.0}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"corpus\.jsonl:2 is '\{broken'; write a JSON object with an _id"),
        ('{"text": "x"}', r"corpus\.jsonl:2 is .*_id"),
        ("[1]", r"corpus\.jsonl:2 is '\[1\]'"),
        ('{"_id": "1"}', r"corpus\.jsonl:2 has _id '1' for the second time"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "corpus.jsonl").write_text(f'{{"_id": "1", "text": "x"}}\n{line}\n')
    with pytest.raises(SourceError, match=message):
        read_corpus(tmp_path)


@pytest.mark.parametrize("line", ["q 1 1", "q\t1", "q\t1\tmuch"])
def test_a_bad_judgement_is_named(tmp_path, line):
    (tmp_path / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{line}\n")
    with pytest.raises(SourceError, match=r"qrels\.tsv:2 is .*separate them by tabs"):
        read_qrels(tmp_path / "qrels.tsv")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"queries\.jsonl is not there"):
        read_queries(tmp_path)
