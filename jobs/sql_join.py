"""The SQL function that searches for many vectors at once, `docs_join`: blocks of both sides as matrix products."""

from shoal.jobs.cells import FRESH
from shoal.jobs.hashing import quoted
from shoal.jobs.served_table import Column
from shoal.jobs.sql_parts import ONE, SqlParts, checked_k, k_parameter, refuse

NEAR = "shoal_near"

BLOCK_NUMBERS = 2**20
"""A block has at most so many numbers (4 MB of float32), and between 64 and 2,048 vectors: enough for matrix products,
and few enough for the rows of pairs of blocks, of which Spark holds a dozen copies in a task.
"""

PART_BYTES, MOST_PARTS = 2**24, 10_000
"""Blocks of one task take about so many bytes: Spark holds them all in the memory of the JVM while it gathers them."""


def join(sql: SqlParts) -> str:
    """The statement of the function: for every vector of an array of ids and vectors its k nearest chunks.

    Queries become `g` as given, `q` checked, `c` with their cells, `e` a row for each cell, `a` blocks; rows become `t`
    with the block that they are in, `b` blocks, `d` blocks in columns; `n` has a row for each two blocks that meet, `p`
    and `s` one for each pair, `r` its rank.
    """
    name = f"{sql.served.name}_join"
    about = (
        f"For each of many vectors, given with ids, the k chunks of table {sql.served.name} nearest to it, in no "
        "order. Exact; with `probes` each vector looks in so many cells of the index."
    )
    queries = ("queries", "ARRAY<STRUCT<id STRING, vector ARRAY<DOUBLE>>>", "ids and vectors to look for", None)
    at_least = ("threshold", "DOUBLE", "only pairs with at least this score; unset: all", "NULL")
    probes = ("probes", "INT", "cells of the index to look in for each vector; unset: all", "NULL")
    taken = {column.name.lower() for column in sql.columns}
    query_id = Column("query_id" if "query_id" not in taken else "shoal_query_id", "STRING")

    threshold = f"{quoted(name)}.`threshold`"
    size = max(6, min(11, (BLOCK_NUMBERS // sql.served.dim).bit_length() - 1))
    num_parts = max(1, min(sql.served.bytes // PART_BYTES, MOST_PARTS))
    asked = f"{quoted(name)}.`probes`"
    cell, looked_in = str(FRESH), f"array({FRESH})"
    if sql.index is not None:
        near = sql.nearest_cells("array(q.`__vector`)", f"greatest({asked}, 1)")
        cell = f"CASE WHEN {asked} IS NULL THEN {FRESH} ELSE coalesce(t.`cell`, {FRESH}) END"
        looked_in = f"CASE WHEN {asked} IS NULL THEN array({FRESH}) ELSE array_append({near}, {FRESH}) END"
    key = ", ".join(f"t.{quoted(column.name)}" for column in [*sql.served.keys, Column("chunk_index", "INT")])
    in_order = "(a, b) -> CASE WHEN a.`key` < b.`key` THEN -1 WHEN a.`key` > b.`key` THEN 1 ELSE 0 END"
    leave_out = "leave it out (WHERE embedding IS NOT NULL)"
    which = "coalesce(concat(' of ', g.`__query`.`id`), '')"
    vector = sql.checked_vector(name, "g.`__query`.`vector`", leave_out, which)
    parts = {
        # The argument stands here alone: it may be an array of many megabytes, and each place would get its own.
        "g": f"SELECT posexplode({_given(name, threshold)}) AS (`__at`, `__query`) FROM {ONE}",
        "q": f"SELECT g.`__at`, g.`__query`.`id` AS `__id`, {vector} AS `__vector` FROM g",
        "c": f"SELECT q.*, {looked_in} AS `__cells` FROM q",
        "e": "SELECT c.`__at`, c.`__id`, c.`__vector`, explode(c.`__cells`) AS `__cell` FROM c",
        "a": (
            "SELECT e.`__cell`, collect_list(struct(e.`__at`, e.`__id`)) AS `__asked`, "
            "collect_list(e.`__vector`) AS `__left` FROM e "
            f"GROUP BY e.`__cell`, shiftright(e.`__at`, {size})"
        ),
        # Rows that were read one after another are a block; whatever order they come in, each is in one.
        "t": (
            f"SELECT /*+ REPARTITION({num_parts}, `__block`) */ "
            f"{cell} AS `__cell`, shiftright(monotonically_increasing_id(), {size}) AS `__block`, "
            f"struct(struct({key}) AS `key`, struct({sql.carried}) AS `row`, t.`embedding` AS `vector`) AS `__row` "
            f"FROM {sql.relation} t WHERE t.`embedding` IS NOT NULL"
        ),
        "b": (
            f"SELECT t.`__cell`, array_sort(collect_list(t.`__row`), {in_order}) AS `__rows` FROM t "
            "GROUP BY t.`__cell`, t.`__block`"
        ),
        # Rows and vectors apart: the vectors go to Python, and what is joined is copied many times.
        "d": "SELECT b.`__cell`, b.`__rows`.`row` AS `__rows`, b.`__rows`.`vector` AS `__right` FROM b",
        "n": (
            f"SELECT /*+ BROADCAST(a) */ a.`__asked`, d.`__rows`, {NEAR}(a.`__left`, d.`__right`, "
            f"{quoted(name)}.`k`, {threshold}) AS `__near` FROM d JOIN a ON a.`__cell` = d.`__cell`"
        ),
        # Taken out of the blocks before there are rows: a row would carry both blocks along.
        "p": (
            "SELECT inline(transform(n.`__near`, x -> struct(n.`__asked`[x.`left`] AS `__query`, "
            "n.`__rows`[x.`right`] AS `__row`, x.`score` AS `__score`))) FROM n"
        ),
        "s": "SELECT p.`__query`.*, p.`__row`.*, p.`__score` FROM p",
        "r": f"SELECT s.*, row_number() OVER (PARTITION BY s.`__at` ORDER BY {sql.order}) AS `__nth` FROM s",
    }
    with_parts = ", ".join(f"{part} AS ({text})" for part, text in parts.items())
    body = (
        f"WITH {with_parts} SELECT s.`__id`, {sql.named}, s.`__score` FROM r s "
        f"WHERE s.`__nth` <= greatest({quoted(name)}.`k`, 1)"
    )
    return sql.function(name, [queries, k_parameter(), at_least, probes], about, body, first=[query_id])


def _given(name: str, threshold: str) -> str:
    """The queries, or the failure of the query for what is wrong with the arguments beside their vectors."""
    finite = f"NOT isnan({threshold}) AND abs({threshold}) < double('infinity')"
    told = refuse(name, "threshold is not finite; give a number, or leave it out")
    nothing = refuse(name, "queries are NULL; give an array of ids and vectors")
    return (
        f"CASE WHEN NOT ({checked_k(name)}) THEN NULL WHEN NOT coalesce({finite}, true) THEN {told} "
        f"ELSE coalesce({quoted(name)}.`queries`, {nothing}) END"
    )
