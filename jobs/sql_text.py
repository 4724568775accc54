"""The text of the SQL functions of one served table: search by a text, a vector or a row, best row, every score.

Each body names one version of the table and the encoder of that version, so that no query can meet vectors of another
encoder.
"""

from shoal.jobs.hashing import quoted
from shoal.jobs.served_table import Column, ServedTable
from shoal.jobs.sql_join import join
from shoal.jobs.sql_lexical import bm25, hybrid
from shoal.jobs.sql_parts import (
    CODE,
    ONE,
    SqlParts,
    checked_k,
    k_parameter,
    literal,
    query_parameter,
    refuse,
)
from shoal.jobs.sql_rerank import mmr, rerank

MATCH_BYTES = 2**30
"""A table with fewer bytes of vectors is read whole for `match`: looking for the right cells takes as long."""


def names_of(served: ServedTable) -> list[str]:
    """The functions of one table, `shoal_embed` left out."""
    kinds = ("search", "match", "search_vector", "similar", "best", "scores", "bm25", "hybrid", "rerank", "mmr", "join")
    return [f"{served.name}_{kind}" for kind in kinds]


def statements(served: ServedTable, reranker: str | None = None) -> list[str]:
    """The statements that make the functions of one table, for a session that has those in Python.

    reranker: folder of a cross-encoder. They are temporary: Spark lets no permanent function call a Python function.
    """
    sql = _Sql(served)
    return [
        sql.search(),
        sql.match(),
        sql.search_vector(),
        sql.similar(),
        sql.best(),
        sql.scores(),
        bm25(sql),
        hybrid(sql),
        rerank(sql, reranker),
        mmr(sql),
        join(sql),
    ]


def permanent_statements(served: ServedTable, schema: str) -> dict[str, str]:
    """Name -> statement of the functions that a catalog can keep: those without a text to encode.

    They read the newest version of the table, whichever that is.
    """
    sql = _Sql(served, schema)
    made = {"search_vector": sql.search_vector(), "similar": sql.similar()}
    return {f"{schema}.{served.name}_{suffix}": statement for suffix, statement in made.items()}


class _Sql(SqlParts):
    """The functions that every table has."""

    def search(self) -> str:
        name = f"{self.served.name}_search"
        about = (
            f"The k chunks of table {self.served.name} nearest to a text, best first; ties by key. A WHERE outside "
            f"filters among these k; {self.served.name}_match and {self.served.name}_scores find the k best that match."
        )
        parameters = [query_parameter(), k_parameter(), *self.probes()]
        return self.function(name, parameters, about, f"WITH {self.query_vector(name)} {self.best_k(name)}")

    def match(self) -> str:
        name = f"{self.served.name}_match"
        about = (
            f"The k chunks of table {self.served.name} nearest to a text among those whose columns have these values: "
            f"k rows, as long as so many match. For other conditions use {self.served.name}_scores."
        )
        match = ("match", "MAP<STRING, STRING>", "column -> value; NULL for a column that is NULL", None)
        given = f"{quoted(name)}.`match`"
        names = ", ".join(literal(column.name) for column in self._matchable)
        unknown = f"array_except(map_keys({given}), array({names}))"
        told = (
            f"raise_error(concat('[{CODE}] {name}: no column that can be matched is called ', "
            f"array_join({unknown}, ', '), '; there are ', array_join(array({names}), ', ')))"
        )
        nothing = refuse(name, "match is NULL; give a map of columns and values, or use search")
        checked = f"CASE WHEN {given} IS NULL THEN {nothing} WHEN size({unknown}) > 0 THEN {told} ELSE true END"
        scored = self.scored(where=self._matches, exact=not self._has_many)
        v = self.query_vector(
            name, more=f", {given} AS `__match`, {quoted(name)}.`k` AS `__k`", check=checked, cells=False
        )
        body = f"WITH {v}{self._cells_with_matches()} {self.best_k(name, scored)}"
        return self.function(name, [query_parameter(), match, k_parameter()], about, body)

    @property
    def _has_many(self) -> bool:
        """Whether it pays to look for the cells in which rows match."""
        return self.index is not None and self.index.made.rows * self.served.dim * 4 >= MATCH_BYTES

    @property
    def _matchable(self) -> list[Column]:
        """Columns whose values can be written as text."""
        nested = ("ARRAY", "MAP", "STRUCT", "BINARY", "VARIANT")
        return [column for column in [*self.served.keys, *self.served.metadata] if not column.type.startswith(nested)]

    @property
    def _matches(self) -> str:
        """Whether a row `t` has the values of `v`."""
        conditions = [
            f"(NOT map_contains_key(v.`__match`, {literal(column.name)}) OR t.{quoted(column.name)} <=> "
            f"CAST(v.`__match`[{literal(column.name)}] AS {column.type}))"
            for column in self._matchable
        ]
        return " AND ".join(conditions) or "true"

    def _cells_with_matches(self) -> str:
        """`p` for a search among the rows that match: the cells nearest to the query, or all that hold a match.

        Of the r rows nearest to the query, r as measured, so many cells hold the share that was asked for. Where k of
        these rows match, they are the k nearest that do, and are in those cells; the smallest such r counts. Where
        fewer do, nothing that was measured says where the others are, and every cell with a match is looked in, which
        is exact. Reaches that take more than half of the cells are not tried: exact is as quick then.
        """
        if self.index is None or not self._has_many:
            return ""
        held = (
            f"SELECT collect_set(t.`cell`) AS `__cells` FROM {self.relation} t CROSS JOIN v "
            f"WHERE t.`error` IS NULL AND {self._matches}"
        )
        made = self.index.made
        measured = [(rows, cells) for rows, cells in sorted(made.probes.items()) if cells < made.cells]
        probes = [(rows, cells) for rows, cells in measured if 2 * cells <= made.cells] or measured[:1]
        if not probes:
            return f", p AS ({held})"
        reach, most = probes[-1]
        near = f"SELECT {self.nearest_cells('array(v.`__e`)', str(most))} AS `__cells` FROM {ONE} CROSS JOIN v"
        looked_at = self.scored(more=f"{self._matches} AS `__is_match`, v.`__k`", cells="near")
        nearest = f"SELECT s.*, row_number() OVER (ORDER BY s.`__score` DESC) AS `__nth` FROM ({looked_at}) s"
        kth = "get(array_sort(collect_list(s.`__nth`) FILTER (WHERE s.`__is_match`)), max(s.`__k`) - 1) AS `__kth`"
        seen = f"SELECT {kth} FROM ({nearest}) s WHERE s.`__nth` <= {reach}"
        enough = " ".join(f"WHEN s.`__kth` <= {rows} THEN slice(n.`__cells`, 1, {cells})" for rows, cells in probes)
        return (
            f", near AS ({near}), seen AS ({seen}), held AS ({held}), p AS (SELECT CASE {enough} "
            "ELSE h.`__cells` END AS `__cells` FROM near n CROSS JOIN seen s CROSS JOIN held h)"
        )

    def search_vector(self) -> str:
        name = f"{self.served.name}_search_vector"
        about = f"As {self.served.name}_search, for a vector of {self.served.dim} numbers instead of a text."
        parameters = [("vector", "ARRAY<DOUBLE>", "the query vector", None), k_parameter(), *self.probes()]
        checked = f"{checked_k(name)} AS `__ok`{self.number_of_probes(name)}"
        vector = self.checked_vector(name, f"{quoted(name)}.`vector`", "give an array of numbers")
        v = f"v AS (SELECT {vector} AS `__e`, {checked})"
        return self.function(name, parameters, about, f"WITH {v}{self.cells()} {self.best_k(name)}")

    def best(self) -> str:
        name = f"{self.served.name}_best"
        about = (
            f"As {self.served.name}_search, with one chunk per row, its best: k rows of the source, where there are "
            "as many."
        )
        nth = f"row_number() OVER (PARTITION BY {self.keys} ORDER BY s.`__score` DESC, s.`chunk_index`)"
        of_row = f"SELECT s.*, {nth} AS `__nth_of_row` FROM ({self.scored()}) s"
        best = f"SELECT s.* FROM ({of_row}) s WHERE s.`__nth_of_row` = 1"
        parameters = [query_parameter(), k_parameter(), *self.probes()]
        v = self.query_vector(name, rows=True)
        return self.function(name, parameters, about, f"WITH {v} {self.best_k(name, best)}")

    def scores(self) -> str:
        name = f"{self.served.name}_scores"
        about = (
            f"Every chunk of table {self.served.name} that has a vector, with its score, in no order: filter with "
            f"WHERE, then ORDER BY {self.score} DESC LIMIT k gives the k best among those that match."
        )
        body = f"SELECT {self.named}, s.`__score` FROM ({self.scored(exact=True)}) s"
        return self.function(name, [query_parameter()], about, f"WITH {self.query_vector(name, exact=True)} {body}")

    def similar(self) -> str:
        name = f"{self.served.name}_similar"
        about = (
            f"The k chunks of other rows of table {self.served.name} nearest to the row with this key, by the nearest "
            "of its chunks."
        )
        keys = self.served.keys
        names = ["key"] if len(keys) == 1 else [f"key_{column.name}" for column in keys]
        parameters = [
            (parameter, column.type, f"{column.name} of the row", None)
            for parameter, column in zip(names, keys, strict=True)
        ]
        given = [f"{quoted(name)}.{quoted(parameter)}" for parameter in names]
        # Not with `=`: a NULL would make the optimizer empty the plan, and the check of the key with it.
        same = " AND ".join(f"t.{quoted(c.name)} <=> {value}" for c, value in zip(keys, given, strict=True))
        missing = " OR ".join(f"{value} IS NULL" for value in given)
        told = ", ', ', ".join(f"CAST({value} AS STRING)" for value in given)
        row = (
            f"r AS (SELECT collect_list(t.`embedding`) AS `__es` FROM {self.relation} t "
            f"WHERE t.`embedding` IS NOT NULL AND {same})"
        )
        vectors = (
            f"CASE WHEN {missing} THEN {refuse(name, 'the key is NULL; give the key of a row')} "
            f"WHEN size(r.`__es`) = 0 THEN raise_error(concat('[{CODE}] {name}: no row of table {self.served.name} "
            f"with a vector has the key ', {told}, '; look it up in the table')) ELSE r.`__es` END"
        )
        spare = self.index.longest if self.index else 0  # the chunks of the row itself
        checked = f"{checked_k(name)} AS `__ok`{self.number_of_probes(name, spare=spare)}"
        v = f"v AS (SELECT {vectors} AS `__es`, {checked} FROM r)"
        best = "array_max(transform(v.`__es`, e -> vector_inner_product({vector}, e)))"
        others = self.scored(best, f"NOT ({same})")
        body = f"WITH {row}, {v}{self.cells('v.`__es`')} {self.best_k(name, others)}"
        return self.function(name, [*parameters, k_parameter(), *self.probes()], about, body)
