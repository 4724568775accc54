"""How good a ranking is, and the files that say what would be right (BEIR's layout); numpy only.

A corpus folder holds corpus.jsonl (`_id`, `text`, perhaps `title`), queries.jsonl (`_id`, `text`) and qrels.tsv (a
header line, then query id, corpus id and relevance, tab-separated). See Thakur et al. 2021, "BEIR".
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from shoal.conf.errors import SourceError

Qrels = Mapping[str, Mapping[str, float]]
"""Relevance of a row by its id, by query id; what is not listed is not relevant."""


def ndcg(ranked: Mapping[str, Sequence[str]], qrels: Qrels, k: int = 10) -> float:
    """Mean nDCG@k over the queries that have a relevant row, from 0 to 1.

    Jarvelin & Kekalainen 2002, with the linear gain of trec_eval and BEIR: the sum of relevance / log2(rank + 1) over
    the first k, divided by that of the best possible order. Relevance of 0 or less gains nothing. A query without an
    answer in `ranked` counts 0. ValueError for k below 1, for a ranking that names a row twice, and where no query has
    a relevant row.
    """
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 rank.")
    scores = []
    for query, relevance in qrels.items():
        ideal = sorted((gain for gain in relevance.values() if gain > 0), reverse=True)
        if not ideal:
            continue
        found = list(ranked.get(query, ()))[:k]
        if len(set(found)) < len(found):
            raise ValueError(f"the ranking of query {query!r} names a row twice in its first {k}; keep the better one.")
        scores.append(_dcg([max(0.0, relevance.get(row, 0.0)) for row in found]) / _dcg(ideal[:k]))
    if not scores:
        raise ValueError(f"none of the {len(qrels)} judged queries has a relevant row; check the qrels.")
    return float(np.mean(scores))


def _dcg(gains: Sequence[float]) -> float:
    return float(np.sum(np.asarray(gains, dtype=np.float64) / np.log2(np.arange(2, len(gains) + 2))))


def read_corpus(folder: Path) -> dict[str, dict[str, str]]:
    """Rows of corpus.jsonl by `_id`: {"title": ..., "text": ...}, "" where a field is absent or null."""
    rows = _read_jsonl(folder / "corpus.jsonl")
    return {key: {field: str(row.get(field) or "") for field in ("title", "text")} for key, row in rows.items()}


def read_queries(folder: Path) -> dict[str, str]:
    """Texts of queries.jsonl by `_id`."""
    return {key: str(row.get("text") or "") for key, row in _read_jsonl(folder / "queries.jsonl").items()}


def read_qrels(file: Path) -> dict[str, dict[str, float]]:
    """Relevance by query and corpus id; SourceError for a line that is not `query <TAB> row <TAB> number`."""
    qrels: dict[str, dict[str, float]] = {}
    for number, line in enumerate(_read_lines(file), start=1):
        fields = line.split("\t")
        if number == 1 and fields[-1:] == ["score"]:
            continue
        try:
            query, row, relevance = fields
            qrels.setdefault(query, {})[row] = float(relevance)
        except ValueError as error:
            raise SourceError(
                f"{file}:{number} is {line[:80]!r}, which is not a query id, a row id and a number; "
                "separate them by tabs."
            ) from error
    return qrels


def _read_jsonl(file: Path) -> dict[str, dict[str, object]]:
    rows: dict[str, dict[str, object]] = {}
    for number, line in enumerate(_read_lines(file), start=1):
        try:
            row = json.loads(line)
            key = str(row["_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(f"{file}:{number} is {line[:80]!r}; write a JSON object with an _id.") from error
        if key in rows:
            raise SourceError(f"{file}:{number} has _id {key!r} for the second time; make the ids unique.")
        rows[key] = row
    return rows


def _read_lines(file: Path) -> list[str]:
    if not file.is_file():
        raise SourceError(f"{file} is not there; a corpus folder has corpus.jsonl, queries.jsonl and qrels.tsv.")
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
