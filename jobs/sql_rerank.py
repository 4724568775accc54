"""The SQL functions that look at the best answers once more: by a cross-encoder, or for what is new in them."""

from shoal.jobs.hashing import quoted
from shoal.jobs.sql_lexical import fused
from shoal.jobs.sql_parts import (
    Parameter,
    SqlParts,
    checked_query,
    depth_of,
    depth_parameter,
    in_range,
    k_parameter,
    literal,
    query_parameter,
    refuse,
)

RERANK = "shoal_rerank"
MMR = "shoal_mmr"

RELEVANCE = 0.7


def rerank(sql: SqlParts, model: str | None) -> str:
    """Candidates by vectors, and by words where the table has terms, in the order of a cross-encoder's scores.

    model: folder of the cross-encoder; None: the function says that there is none.
    """
    name = f"{sql.served.name}_rerank"
    by = "hybrid" if sql.served.lexical else "search"
    about = (
        f"The k best chunks of table {sql.served.name} for a text, as the server's cross-encoder scores the best "
        f"`depth` of {sql.served.name}_{by}."
    )
    parameters = [query_parameter(), k_parameter(), depth_parameter(), *sql.probes()]
    if model is None or not sql.served.has_text:
        told = (
            f"table {sql.served.name} stores no texts for a cross-encoder to read; set destination.store_text"
            if model
            else "there is no reranker; start `shoal serve` with --reranker, or give `install` one"
        )
        return sql.function(name, parameters, about, sql.refused(name, told))
    depth = depth_of(name)
    if sql.served.lexical:
        rows, found = fused(sql, name)
        candidates = sql.best_k(name, found, k=depth)
    else:
        rows, candidates = sql.query_vector(name, k=depth), sql.best_k(name, k=depth)
    score = f"{RERANK}({literal(model)}, {checked_query(name)}, s.`text`)"
    scored = f"SELECT {sql.named}, {score} AS `__score` FROM ({candidates}) s"
    return sql.function(name, parameters, about, f"WITH {rows} {sql.best_k(name, scored)}")


def mmr(sql: SqlParts) -> str:
    """Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998) among the nearest."""
    name = f"{sql.served.name}_mmr"
    about = (
        f"k of the `depth` chunks of table {sql.served.name} nearest to a text, chosen one after another: near to it "
        "and unlike those chosen before. They come in that order; the score is that of the search."
    )
    parameters: list[Parameter] = [
        query_parameter(),
        k_parameter(),
        ("relevance", "DOUBLE", "1: the nearest alone count, 0: after the first nothing but unlikeness", RELEVANCE),
        depth_parameter(),
        *sql.probes(),
    ]
    share, k, depth = f"{quoted(name)}.`relevance`", f"{quoted(name)}.`k`", depth_of(name)
    told = refuse(name, "relevance is NULL, below 0 or above 1; give a share")
    check = in_range(share, 0, 1, told)
    nearest = sql.ranked(name, sql.scored(more="t.`embedding` AS `__vector`"), k=depth)
    gathered = "array_sort(collect_list(struct(c.`__nth`, c.`__score`, c.`__vector`)))"
    chosen = f"{MMR}(l.`__all`.`__vector`, l.`__all`.`__score`, {k}, {share})"
    body = (
        f"WITH {sql.query_vector(name, check=check, k=depth)}, nearest AS ({nearest}), "
        f"listed AS (SELECT {gathered} AS `__all` FROM nearest c), "
        f"turns AS (SELECT {chosen} AS `__places` FROM listed l), "
        "chosen AS (SELECT posexplode(o.`__places`) AS (`__turn`, `__place`) FROM turns o) "
        f"SELECT {sql.named}, s.`__score` FROM nearest s JOIN chosen h ON s.`__nth` = h.`__place` + 1 "
        "ORDER BY h.`__turn`"
    )
    return sql.function(name, parameters, about, body)
