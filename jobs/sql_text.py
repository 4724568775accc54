"""The text of the SQL functions of one served table: search by a text, a vector or a row, best row, every score.

Each body names one version of the table and the encoder of that version, so that no query can meet vectors of another
encoder. In a body, `v` is the one row that everything is computed from, and `p` the cells of the index to look in.
"""

import math
from collections.abc import Sequence

from shoal.jobs.cells import FRESH
from shoal.jobs.hashing import quoted
from shoal.jobs.served_table import Column, ServedTable

EMBED = "shoal_embed"
DEFAULT_K = 10
SCORE_NAMES = ("score", "shoal_score")
CODE = "QUERY_INVALID"

# How a vector scores, of a row or of a cell's centroid.
MIN_POWER = 0.5

PRODUCT = "vector_inner_product({vector}, v.`__e`)"

# The largest float32: what is beyond it would turn into infinity on the way into a vector.
MAX_FLOAT = "3.4028234663852886E38D"


def names_of(served: ServedTable) -> list[str]:
    """The functions of one table, `shoal_embed` left out."""
    return [f"{served.name}_{suffix}" for suffix in ("search", "match", "search_vector", "similar", "best", "scores")]


def statements(served: ServedTable) -> list[str]:
    """The statements that make the functions of one table, for a session that has `shoal_embed`.

    They are temporary: Spark lets no permanent function call a Python function.
    """
    sql = _Sql(served)
    return [sql.search(), sql.match(), sql.search_vector(), sql.similar(), sql.best(), sql.scores()]


def permanent_statements(served: ServedTable, schema: str) -> dict[str, str]:
    """Name -> statement of the functions that a catalog can keep: those without a text to encode.

    They read the newest version of the table, whichever that is.
    """
    sql = _Sql(served, schema)
    made = {"search_vector": sql.search_vector(), "similar": sql.similar()}
    return {f"{schema}.{served.name}_{suffix}": statement for suffix, statement in made.items()}


class _Sql:
    """Text of the functions of one table. Parameters are always written as function.parameter, columns as t.column:
    a column of the table may be called like a parameter.
    """

    def __init__(self, served: ServedTable, schema: str | None = None) -> None:
        self.served = served
        self.schema = schema
        self.relation = served.relation if schema is None else served.ref.sql
        # A permanent function outlives the build, and so reads all rows.
        self.index = served.index if schema is None else None
        taken = {column.name.lower() for column in [*served.keys, *served.metadata]}
        self.score = next((name for name in SCORE_NAMES if name not in taken), "__score")
        self.columns = [*served.keys, Column("chunk_index", "INT"), Column("text", "STRING"), *served.metadata]
        text = "t.`text`" if served.has_text else "CAST(NULL AS STRING) AS `text`"
        self.carried = ", ".join(
            text if column.name == "text" else f"t.{quoted(column.name)}" for column in self.columns
        )
        self.named = ", ".join(f"s.{quoted(column.name)}" for column in self.columns)
        self.keys = ", ".join(f"s.{quoted(column.name)}" for column in served.keys)
        self.order = f"s.`__score` DESC, {self.keys}, s.`chunk_index`"

    def search(self) -> str:
        name = f"{self.served.name}_search"
        about = (
            f"The k chunks of table {self.served.name} nearest to a text, best first; ties by key. A WHERE outside "
            f"filters among these k; {self.served.name}_match and {self.served.name}_scores find the k best that match."
        )
        parameters = [_query(), _k(), *self._probes()]
        return self._function(name, parameters, about, f"WITH {self._query_vector(name)} {self._best_k(name)}")

    def match(self) -> str:
        name = f"{self.served.name}_match"
        about = (
            f"The k chunks of table {self.served.name} nearest to a text among those whose columns have these values: "
            f"k rows, as long as so many match. For other conditions use {self.served.name}_scores."
        )
        match = ("match", "MAP<STRING, STRING>", "column -> value; NULL for a column that is NULL", None)
        given = f"{quoted(name)}.`match`"
        names = ", ".join(_text(column.name) for column in self._matchable)
        unknown = f"array_except(map_keys({given}), array({names}))"
        told = (
            f"raise_error(concat('[{CODE}] {name}: no column that can be matched is called ', "
            f"array_join({unknown}, ', '), '; there are ', array_join(array({names}), ', ')))"
        )
        nothing = _refuse(name, "match is NULL; give a map of columns and values, or use search")
        checked = f"CASE WHEN {given} IS NULL THEN {nothing} WHEN size({unknown}) > 0 THEN {told} ELSE true END"
        v = self._query_vector(
            name, more=f", {given} AS `__match`, {quoted(name)}.`k` AS `__k`", check=checked, cells=False
        )
        body = f"WITH {v}{self._cells_with_matches()} {self._best_k(name, self._scored(where=self._matches))}"
        return self._function(name, [_query(), match, _k()], about, body)

    @property
    def _matchable(self) -> list[Column]:
        """Columns whose values can be written as text."""
        nested = ("ARRAY", "MAP", "STRUCT", "BINARY", "VARIANT")
        return [column for column in [*self.served.keys, *self.served.metadata] if not column.type.startswith(nested)]

    @property
    def _matches(self) -> str:
        """Whether a row `t` has the values of `v`."""
        conditions = [
            f"(NOT map_contains_key(v.`__match`, {_text(column.name)}) OR t.{quoted(column.name)} <=> "
            f"CAST(v.`__match`[{_text(column.name)}] AS {column.type}))"
            for column in self._matchable
        ]
        return " AND ".join(conditions) or "true"

    def _cells_with_matches(self) -> str:
        """`p` for a search among the rows that match: cells, nearest first, until they hold enough of these.

        Of the rows in the r nearest cells the share s matches. To find k of those, a search has to reach as far as one
        for k / s rows of all would; enough are the first r cells in which that one would look.
        """
        if self.index is None:
            return ""
        made = self.index.made
        rank = f"row_number() OVER (ORDER BY {PRODUCT.format(vector='c.`centroid`')} DESC, c.`cell`)"
        ranked = (
            f"SELECT c.`cell`, {rank} AS `__nth` FROM {self._centroids} c CROSS JOIN v "
            f"WHERE c.`build` = {_text(made.build)}"
        )
        counted = (
            f"SELECT t.`cell`, count(*) AS `__rows`, count_if({self._matches}) AS `__hits`, max(v.`__k`) AS `__k` "
            f"FROM {self.relation} t CROSS JOIN v WHERE t.`error` IS NULL AND t.`cell` >= 0 GROUP BY t.`cell`"
        )
        so_far = "OVER (ORDER BY r.`__nth` ROWS UNBOUNDED PRECEDING)"
        grown = (
            f"SELECT r.`cell`, r.`__nth`, sum(n.`__rows`) {so_far} AS `__rows`, sum(n.`__hits`) {so_far} AS `__hits`, "
            f"max(n.`__k`) OVER () AS `__k` FROM ranked r JOIN counted n ON n.`cell` = r.`cell`"
        )
        needed = self._cells_for("g.`__k` * g.`__rows` / nullif(g.`__hits`, 0)")
        stop = f"SELECT min(g.`__nth`) AS `__nth` FROM grown g WHERE g.`__hits` >= g.`__k` AND {needed} <= g.`__nth`"
        chosen = f"g.`__nth` <= coalesce(s.`__nth`, {made.cells})"
        return (
            f", ranked AS ({ranked}), counted AS ({counted}), grown AS ({grown}), stop AS ({stop}), "
            f"p AS (SELECT collect_list(g.`cell`) AS `__cells` FROM grown g CROSS JOIN stop s WHERE {chosen})"
        )

    def search_vector(self) -> str:
        name = f"{self.served.name}_search_vector"
        about = f"As {self.served.name}_search, for a vector of {self.served.dim} numbers instead of a text."
        parameters = [("vector", "ARRAY<DOUBLE>", "the query vector", None), _k(), *self._probes()]
        checked = f"{_checked_k(name)} AS `__ok`{self._number_of_probes(name)}"
        v = f"v AS (SELECT {self._checked_vector(name)} AS `__e`, {checked})"
        return self._function(name, parameters, about, f"WITH {v}{self._cells(PRODUCT)} {self._best_k(name)}")

    def best(self) -> str:
        name = f"{self.served.name}_best"
        about = (
            f"As {self.served.name}_search, with one chunk per row, its best: k rows of the source, where there are "
            "as many."
        )
        nth = f"row_number() OVER (PARTITION BY {self.keys} ORDER BY s.`__score` DESC, s.`chunk_index`)"
        of_row = f"SELECT s.*, {nth} AS `__nth_of_row` FROM ({self._scored()}) s"
        best = f"SELECT s.* FROM ({of_row}) s WHERE s.`__nth_of_row` = 1"
        parameters = [_query(), _k(), *self._probes()]
        v = self._query_vector(name, rows=True)
        return self._function(name, parameters, about, f"WITH {v} {self._best_k(name, best)}")

    def scores(self) -> str:
        name = f"{self.served.name}_scores"
        about = (
            f"Every chunk of table {self.served.name} that has a vector, with its score, in no order: filter with "
            f"WHERE, then ORDER BY {self.score} DESC LIMIT k gives the k best among those that match."
        )
        body = f"SELECT {self.named}, s.`__score` FROM ({self._scored(exact=True)}) s"
        return self._function(name, [_query()], about, f"WITH {self._query_vector(name, exact=True)} {body}")

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
            f"CASE WHEN {missing} THEN {_refuse(name, 'the key is NULL; give the key of a row')} "
            f"WHEN size(r.`__es`) = 0 THEN raise_error(concat('[{CODE}] {name}: no row of table {self.served.name} "
            f"with a vector has the key ', {told}, '; look it up in the table')) ELSE r.`__es` END"
        )
        spare = self.index.longest if self.index else 0  # the chunks of the row itself
        checked = f"{_checked_k(name)} AS `__ok`{self._number_of_probes(name, spare=spare)}"
        v = f"v AS (SELECT {vectors} AS `__es`, {checked} FROM r)"
        best = "array_max(transform(v.`__es`, e -> vector_inner_product({vector}, e)))"
        others = self._scored(best, f"NOT ({same})")
        body = f"WITH {row}, {v}{self._cells(best)} {self._best_k(name, others)}"
        return self._function(name, [*parameters, _k(), *self._probes()], about, body)

    def _scored(self, score: str = PRODUCT, where: str = "true", *, exact: bool = False) -> str:
        """Every row with a vector, or those in the cells to look in, with scores computed from the one row of `v`."""
        if self.index is not None and not exact:
            # A subquery of one row, so that Spark knows the cells before it lists files. Others may have written rows
            # without a cell.
            cells = "array_contains((SELECT p.`__cells` FROM p), t.`cell`)"
            where = f"{where} AND (t.`cell` IS NULL OR t.`cell` = {FRESH} OR {cells})"
        return (
            f"SELECT {self.carried}, {score.format(vector='t.`embedding`')} AS `__score` FROM {self.relation} t "
            f"CROSS JOIN v WHERE t.`embedding` IS NOT NULL AND v.`__ok` AND {where}"
        )

    def _cells(self, score: str) -> str:
        """The one row `p`: the cells to look in, the nearest of them."""
        if self.index is None:
            return ""
        rank = f"row_number() OVER (ORDER BY {score.format(vector='c.`centroid`')} DESC, c.`cell`)"
        ranked = (
            f"SELECT c.`cell`, v.`__probes`, {rank} AS `__nth` FROM {self._centroids} c "
            f"CROSS JOIN v WHERE c.`build` = {_text(self.index.made.build)}"
        )
        return f", p AS (SELECT collect_list(r.`cell`) AS `__cells` FROM ({ranked}) r WHERE r.`__nth` <= r.`__probes`)"

    @property
    def _centroids(self) -> str:
        assert self.index is not None  # noqa: S101 - asked for where there is an index
        return f"delta.{quoted(self.index.centroids)}"

    def _probes(self) -> list[tuple[str, str, str, int | str | None]]:
        if self.schema is not None:
            return []
        return [("probes", "INT", "cells of the index to look in; unset: what its recall takes", "NULL")]

    def _number_of_probes(self, name: str, *, rows: bool = False, spare: int = 0) -> str:
        """How many cells to look in: as asked for, else by k what was measured; in any case enough to hold k chunks.

        rows: to hold chunks of k rows of the source. spare: so many more chunks, which do not count.
        """
        if self.index is None:
            return ""
        made, k = self.index.made, f"{quoted(name)}.`k`"
        default = self._cells_for(k)
        held = self.index.enough_rows if rows else self.index.enough
        enough = " ".join(f"WHEN {k} <= {at_least - spare} THEN {number}" for at_least, number in held)
        given = f"{quoted(name)}.`probes`"
        asked = f"CASE WHEN {given} IS NULL THEN {default} ELSE greatest({given}, 1) END"
        return f", CAST(greatest({asked}, CASE {enough} ELSE {made.cells} END) AS INT) AS `__probes`"

    def _cells_for(self, k: str) -> str:
        """How many cells hold the k nearest to the share that was asked for: as measured, and beyond that by a power.

        Of the power at least a half: a guess on the safe side of what was measured at the two largest k.
        """
        assert self.index is not None  # noqa: S101 - asked for where there is an index
        made = self.index.made
        (less, few), (largest, most) = sorted(made.probes.items())[-2:]
        power = max(MIN_POWER, math.log(most / few) / math.log(largest / less))
        steps = " ".join(f"WHEN {k} <= {each} THEN {number}" for each, number in sorted(made.probes.items()))
        beyond = f"ceil({most} * power({k} / {largest}, {power:.4f}))"
        return f"CASE {steps} ELSE least({beyond}, {made.cells}) END"

    def _best_k(self, name: str, scored: str | None = None) -> str:
        nth = f"row_number() OVER (ORDER BY {self.order})"
        ranked = f"SELECT s.*, {nth} AS `__nth` FROM ({scored or self._scored()}) s"
        # With a literal k below 1 the optimizer would empty the plan, and the check of k with it.
        return f"SELECT {self.named}, s.`__score` FROM ({ranked}) s WHERE s.`__nth` <= greatest({quoted(name)}.`k`, 1)"

    def _query_vector(
        self,
        name: str,
        *,
        exact: bool = False,
        more: str = "",
        check: str = "true",
        cells: bool = True,
        rows: bool = False,
    ) -> str:
        """The one row that everything else is joined with: what makes a query be encoded once; then the cells.

        exact: for a function without k, that looks in all cells. more, check: further columns and a further condition.

        What is wrong is told by `__ok`, which the optimizer keeps where nobody looks at scores, as in `count(*)`.
        """
        has_cells = cells and not exact
        more += self._number_of_probes(name, rows=rows) if has_cells else ""
        after = self._cells(PRODUCT) if has_cells else ""
        if self.served.encoder is None:
            refused = _refuse(name, self.served.problem or "", code=None)
            nothing = f"CAST(NULL AS ARRAY<FLOAT>) AS `__e`, CAST({refused} AS BOOLEAN) AS `__ok`"
            return f"v AS (SELECT {nothing}{more}){after}"
        query = f"{quoted(name)}.`query`"
        blank = _refuse(name, "the query is NULL or blank; write what to look for")
        text = f"CASE WHEN coalesce({query} RLIKE r'\\S', false) THEN {query} ELSE {blank} END"
        checks = [f"{text} IS NOT NULL", check, *([] if exact else [_checked_k(name)])]
        encoded = f"{EMBED}('{self.served.encoder_key}', {text}) AS `__e`"
        return f"v AS (SELECT {encoded}, {' AND '.join(checks)} AS `__ok`{more}){after}"

    def _checked_vector(self, name: str) -> str:
        vector, dim = f"{quoted(name)}.`vector`", self.served.dim
        width = (
            f"raise_error(concat('[{CODE}] {name}: the vector has ', CAST(size({vector}) AS STRING), "
            f"' elements and those of table {self.served.name} have {dim}; encode it with the encoder of the table'))"
        )
        return (
            f"CASE WHEN {vector} IS NULL THEN {_refuse(name, 'the vector is NULL; give an array of numbers')} "
            f"WHEN size({vector}) <> {dim} THEN {width} "
            f"WHEN exists({vector}, x -> x IS NULL OR isnan(x) OR abs(x) > {MAX_FLOAT}) "
            f"THEN {_refuse(name, 'the vector has elements that are NULL or not finite; give numbers')} "
            f"ELSE CAST({vector} AS ARRAY<FLOAT>) END"
        )

    def _function(
        self, name: str, parameters: Sequence[tuple[str, str, str, int | str | None]], about: str, body: str
    ) -> str:
        given = ", ".join(
            f"{quoted(parameter)} {kind}{f' DEFAULT {default}' if default is not None else ''} COMMENT {_text(meaning)}"
            for parameter, kind, meaning, default in parameters
        )
        columns = [*self.columns, Column(self.score, "FLOAT")]
        returned = ", ".join(f"{quoted(column.name)} {column.type}" for column in columns)
        made = f"TEMPORARY FUNCTION {quoted(name)}"
        if self.schema is not None:
            made = f"FUNCTION {'.'.join(quoted(part) for part in [*self.schema.split('.'), name])}"
        return f"CREATE OR REPLACE {made} ({given}) RETURNS TABLE({returned}) COMMENT {_text(about)} RETURN {body}"


def _query() -> tuple[str, str, str, int | str | None]:
    return ("query", "STRING", "what to look for", None)


def _k() -> tuple[str, str, str, int | str | None]:
    return ("k", "INT", "how many", DEFAULT_K)


def _checked_k(name: str) -> str:
    refused = _refuse(name, "k is NULL or below 1; ask for at least 1")
    return f"CASE WHEN coalesce({quoted(name)}.`k`, 0) < 1 THEN {refused} ELSE true END"


def _refuse(name: str, told: str, code: str | None = CODE) -> str:
    """An expression that fails the query; `code` None where the text brings its own."""
    coded = f"[{code}] {name}: {told}" if code else f"{told} ({name})"
    return f"raise_error({_text(coded)})"


def _text(value: str) -> str:
    """A string literal of SQL."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", " ")
    return f"'{escaped}'"
