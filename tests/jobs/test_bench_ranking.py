"""The bench of rankings on a small judged corpus: BM25 is as good as that of a kept library, since it is the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.conf.errors import ConfigError
from shoal.jobs.bench_ranking import FORMS, bench_ranking, lines

pytestmark = [pytest.mark.spark, pytest.mark.slow]

TEXTS = {"a": "wings of a bird", "b": "heat in a wing", "c": "heat and drag", "d": "a jet of hot air", "e": "drag"}
QUERIES = {"1": "wing", "2": "hot drag", "3": "nobody judged this", "4": "?"}
QRELS = {"1": {"b": 2, "a": 1}, "2": {"d": 1}, "4": {"a": 1}}


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    for name, texts in (("corpus", TEXTS), ("queries", QUERIES)):
        rows = [{"_id": key, "title": "", "text": text} for key, text in texts.items()]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [f"{query}\t{row}\t{gain}\n" for query, gains in QRELS.items() for row, gain in gains.items()]
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(pairs))
    return tmp_path


@pytest.mark.long
def test_every_ranking_is_judged(judged: Path) -> None:
    command = [sys.executable, "-m", "shoal.jobs.cli", "bench", "ranking", str(judged), "--model", "hash:8"]
    done = subprocess.run(
        [*command, "--stemmer", "english", "--json"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "left out: 1 queries without any word" in done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["queries"], found["stemmer"]) == (5, 2, "english")
    judgements = {ranking["ranking"]: ranking["ndcg"] for ranking in found["rankings"]}
    assert list(judgements) == [*FORMS, "BM25 of bm25s"]
    assert judgements["BM25"] == judgements["BM25 of bm25s"]
    assert judgements["BM25"] > 0.5
    assert len(lines(found)) == 2 + len(judgements)


def test_a_folder_without_judgements_and_no_queries_are_refused(judged: Path) -> None:
    with pytest.raises(ConfigError, match="--queries is 0"):
        bench_ranking(judged, "hash:8", None, 0, say=lambda _: None)
    (judged / "qrels.tsv").write_text("9\ta\t1\n")
    with pytest.raises(ConfigError, match=r"no query of queries\.jsonl"):
        bench_ranking(judged, "hash:8", None, None, say=lambda _: None)
