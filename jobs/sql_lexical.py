"""The SQL functions that look for words: BM25 over the terms of a table, and BM25 fused with the vectors.

In a body, `q` is the one row with the terms of the query, and `w` the same with what each of them weighs in this
version of the table.
"""

from shoal.jobs.hashing import quoted
from shoal.jobs.published import TERMS
from shoal.jobs.sql_parts import (
    CODE,
    Parameter,
    SqlParts,
    checked_k,
    checked_query,
    depth_of,
    depth_parameter,
    in_range,
    k_parameter,
    literal,
    query_parameter,
    refuse,
)

TERMS_OF = "shoal_terms"

K1, B = 1.2, 0.75
"""How soon a further occurrence of a term counts for less, and how much longer texts have to say more, as in Lucene."""

MAX_K1 = 1000

RRF_K = 60
"""Ranks are fused as 1 / (RRF_K + rank): Cormack, Clarke and Buettcher, SIGIR 2009."""


def bm25(sql: SqlParts) -> str:
    """BM25 as Lucene has it (Robertson and Zaragoza 2009, the variants: Kamphuis et al. 2020)."""
    name = f"{sql.served.name}_bm25"
    about = (
        f"The k chunks of table {sql.served.name} that share the most telling words with a text, by BM25, best first; "
        "ties by key. Chunks without any of the words are left out."
    )
    parameters: list[Parameter] = [
        query_parameter(),
        k_parameter(),
        ("k1", "DOUBLE", "how soon further occurrences of a word count for less, 0 at once", K1),
        ("b", "DOUBLE", "how much longer texts have to say more: 0 not at all, 1 in proportion", B),
    ]
    if sql.served.lexical is None:
        return sql.function(name, parameters, about, _without_terms(sql, name))
    k1, b = f"{quoted(name)}.`k1`", f"{quoted(name)}.`b`"
    nothing = (
        f"raise_error(concat('[{CODE}] {name}: the query has no term: ', {quoted(name)}.`query`, '; write words to "
        "look for'))"
    )
    checks = [
        checked_k(name),
        in_range(k1, 0, MAX_K1, refuse(name, f"k1 is out of its range; give 0 to {MAX_K1}")),
        in_range(b, 0, 1, refuse(name, "b is out of its range; give 0 to 1")),
        f"CASE WHEN size(q.`__terms`) = 0 THEN {nothing} ELSE true END",
    ]
    body = f"WITH {_weights(sql, name, ' AND '.join(checks))} {sql.best_k(name, _scored(sql, k1, b))}"
    return sql.function(name, parameters, about, body)


def hybrid(sql: SqlParts) -> str:
    """The two rankings, fused by rank or by a weighted sum of their scores."""
    name = f"{sql.served.name}_hybrid"
    about = (
        f"The k best chunks of table {sql.served.name} for a text by vectors and words: the best `depth` of "
        f"{sql.served.name}_search and of {sql.served.name}_bm25, fused by their ranks, or by their scores where a "
        "weight is given."
    )
    parameters: list[Parameter] = [
        query_parameter(),
        k_parameter(),
        ("weight", "DOUBLE", "share of the vectors in a weighted sum of both scores; unset: fused by rank", "NULL"),
        depth_parameter(),
        *sql.probes(),
    ]
    if sql.served.lexical is None:
        return sql.function(name, parameters, about, _without_terms(sql, name))
    weight = f"{quoted(name)}.`weight`"
    told = refuse(name, "the weight is below 0 or above 1; give a share, or leave it out")
    check = f"({weight} IS NULL OR {in_range(weight, 0, 1, told)})"
    rows, found = fused(sql, name, weight, check)
    return sql.function(name, parameters, about, f"WITH {rows} {sql.best_k(name, found)}")


def fused(sql: SqlParts, name: str, weight: str = "NULL", check: str = "true") -> tuple[str, str]:
    """The rows that everything is computed from, and the chunks that either ranking has, with their fused scores.

    weight: an expression; check: a further condition. For a table with terms and a function with a depth.
    """
    depth = depth_of(name)
    by_vector, by_words = sql.ranked(name, k=depth), sql.ranked(name, _scored(sql), k=depth)
    both = f"{_shares(by_vector, weight, weight)} UNION ALL {_shares(by_words, weight, f'1 - {weight}')}"
    by = [key.name for key in sql.served.keys] + ["chunk_index"]
    others = [f"any_value(s.{quoted(c.name)}) AS {quoted(c.name)}" for c in sql.columns if c.name not in by]
    grouped = ", ".join(f"s.{quoted(column)}" for column in by)
    chunks = (
        f"SELECT {', '.join([grouped, *others])}, CAST(sum(s.`__share`) AS FLOAT) AS `__score` FROM ({both}) s "
        f"GROUP BY {grouped}"
    )
    return f"{sql.query_vector(name, check=check, k=depth)}, {_weights(sql, name)}", chunks


def _weights(sql: SqlParts, name: str, ok: str = "true") -> str:
    """`q`, `n` and `w`: the terms of the query, how many texts have each, what each weighs."""
    served = sql.served
    assert served.lexical is not None  # noqa: S101 - the caller has looked
    found = f"{TERMS_OF}({literal(served.lexical)}, {checked_query(name)})"
    terms = f"t.{quoted(TERMS)}"
    # A row for the whole table beside those of the terms: one pass over the column counts both.
    each = f"explode(concat(array(CAST(NULL AS STRING)), array_intersect({terms}, q.`__terms`)))"
    counted = (
        f"SELECT e.`__term`, count(*) AS `__rows`, sum(size({terms})) AS `__length` FROM {sql.relation} t CROSS JOIN q "
        f"LATERAL VIEW {each} e AS `__term` WHERE {terms} IS NOT NULL GROUP BY e.`__term`"
    )
    of_all = "max(CASE WHEN d.`__term` IS NULL THEN d.{} END)"
    entries = "collect_list(CASE WHEN d.`__term` IS NOT NULL THEN struct(d.`__term`, d.`__rows`) END)"
    rows = "coalesce(try_element_at(n.`__with`, x), 0)"
    weight = f"ln(1 + (n.`__rows` - {rows} + 0.5D) / ({rows} + 0.5D))"
    return (
        f"q AS (SELECT {found} AS `__terms`), "
        f"n AS (SELECT {of_all.format('`__rows`')} AS `__rows`, {of_all.format('`__length`')} AS `__length`, "
        f"map_from_entries({entries}) AS `__with` FROM ({counted}) d), "
        f"w AS (SELECT q.`__terms`, transform(q.`__terms`, x -> {weight}) AS `__weights`, "
        f"n.`__length` / nullif(n.`__rows`, 0) AS `__mean`, {ok} AS `__ok` FROM q CROSS JOIN n)"
    )


def _scored(sql: SqlParts, k1: str = f"{K1}D", b: str = f"{B}D") -> str:
    """Every row that has a term of the query, with its score; k1, b: expressions."""
    terms = f"t.{quoted(TERMS)}"
    times = f"transform(w.`__terms`, x -> size({terms}) - size(array_remove({terms}, x)))"
    damping = f"{k1} * (1 - {b} + {b} * size({terms}) / w.`__mean`)"
    scores = f"zip_with({times}, w.`__weights`, (times, weight) -> weight * times / (times + {damping}))"
    return (
        f"SELECT {sql.carried}, CAST(aggregate({scores}, 0D, (total, x) -> total + x) AS FLOAT) AS `__score` "
        f"FROM {sql.relation} t CROSS JOIN w WHERE w.`__ok` AND arrays_overlap({terms}, w.`__terms`)"
    )


def _shares(ranking: str, weight: str, share: str) -> str:
    """The rows of one ranking, with what each adds to the fused score."""
    low, high = "min(s.`__score`) OVER ()", "max(s.`__score`) OVER ()"
    # From 0 for the last to 1 for the first, since the two scores have nothing in common.
    scaled = f"coalesce((s.`__score` - {low}) / nullif({high} - {low}, 0), 1)"
    # A query without words has one ranking alone, and its order is to stay.
    by_rank = f"{weight} IS NULL OR size(q.`__terms`) = 0"
    added = f"CASE WHEN {by_rank} THEN 1D / ({RRF_K} + s.`__nth`) ELSE ({share}) * {scaled} END"
    return f"SELECT s.*, {added} AS `__share` FROM ({ranking}) s CROSS JOIN q"


def _without_terms(sql: SqlParts, name: str) -> str:
    told = f"table {sql.served.name} has no terms; set `lexical` in its run file and run `shoal embed`"
    return sql.refused(name, told)
