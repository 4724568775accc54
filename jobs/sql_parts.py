"""What the SQL functions of a served table are made of: the vector of the query, the cells to look in, the k best.

In a body, `v` is the one row that everything is computed from, and `p` the cells of the index to look in.
"""

import math
from collections.abc import Sequence

from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.jobs.cells import FRESH
from shoal.jobs.hashing import quoted
from shoal.jobs.served_table import Column, ServedTable

EMBED = "shoal_embed"
CELLS = "shoal_cells"
DEFAULT_K = 10
DEFAULT_DEPTH = 100
SCORE_NAMES = ("score", "shoal_score")
CODE = "QUERY_INVALID"

PRODUCT = "vector_inner_product({vector}, v.`__e`)"
"""How the vector of a row scores."""

NEEDED = (4, 2)
"""The Spark whose SQL has that function first."""

ONE = "(VALUES (1)) AS o(`one`)"
"""What `v` is joined with where it stands alone: then Spark computes it once for all places, as the right side of a
join, and a query is encoded once.
"""

MIN_POWER = 0.5

# The largest float32: what is beyond it would turn into infinity on the way into a vector.
MAX_FLOAT = "3.4028234663852886E38D"

Parameter = tuple[str, str, str, int | float | str | None]
"""Name, type, meaning, default; None for a parameter that has to be given."""


def require_vector_functions(spark: SparkSession) -> None:
    """ConfigError where Spark's SQL has no vector functions."""
    if tuple(map(int, spark.version.split(".")[:2])) < NEEDED:
        raise ConfigError(
            f"Spark is {spark.version}, and its SQL has no vector functions, which came with 4.2: search there with "
            "`shoal search`, or serve the tables from a Spark 4.2, which may be another than the one that embeds"
        )


class SqlParts:
    """Text of the functions of one table. Parameters are always written as function.parameter, columns as t.column:
    a column of the table may be called like a parameter.
    """

    def __init__(self, served: ServedTable, schema: str | None = None) -> None:
        """schema: of the functions that a catalog keeps."""
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

    def scored(
        self, score: str = PRODUCT, where: str = "true", *, more: str = "", exact: bool = False, cells: str = "p"
    ) -> str:
        """Every row with a vector, or those in the cells to look in, with scores computed from the one row of `v`.

        more: a further column. cells: the one row that names those cells.
        """
        if self.index is not None and not exact:
            # A subquery of one row, so that Spark knows the cells before it lists files. Others may have written rows
            # without a cell.
            is_there = f"array_contains((SELECT p.`__cells` FROM {cells} p), t.`cell`)"
            where = f"{where} AND (t.`cell` IS NULL OR t.`cell` = {FRESH} OR {is_there})"
        return (
            f"SELECT {self.carried}, {f'{more}, ' if more else ''}{score.format(vector='t.`embedding`')} AS `__score` "
            f"FROM {self.relation} t "
            f"CROSS JOIN v WHERE t.`embedding` IS NOT NULL AND v.`__ok` AND {where}"
        )

    def cells(self, vectors: str = "array(v.`__e`)") -> str:
        """The one row `p`: the cells to look in, the nearest to any of these vectors."""
        if self.index is None:
            return ""
        return f", p AS (SELECT {self.nearest_cells(vectors, 'v.`__probes`')} AS `__cells` FROM {ONE} CROSS JOIN v)"

    def nearest_cells(self, vectors: str, number: str) -> str:
        """So many cells, the nearest first, as an array."""
        return f"{CELLS}({literal(self.served.cells_key)}, {vectors}, {number})"

    def probes(self) -> list[Parameter]:
        if self.schema is not None:
            return []
        return [("probes", "INT", "cells of the index to look in; unset: what its recall takes", "NULL")]

    def number_of_probes(self, name: str, *, k: str | None = None, rows: bool = False, spare: int = 0) -> str:
        """How many cells to look in: as asked for, else by k what was measured; in any case enough to hold k chunks.

        rows: to hold chunks of k rows of the source. spare: so many more chunks, which do not count.
        """
        if self.index is None:
            return ""
        made, k = self.index.made, k or f"{quoted(name)}.`k`"
        default = self.cells_for(k)
        held = self.index.enough_rows if rows else self.index.enough
        enough = " ".join(f"WHEN {k} <= {at_least - spare} THEN {number}" for at_least, number in held)
        given = f"{quoted(name)}.`probes`"
        asked = f"CASE WHEN {given} IS NULL THEN {default} ELSE greatest({given}, 1) END"
        return f", CAST(greatest({asked}, CASE {enough} ELSE {made.cells} END) AS INT) AS `__probes`"

    def cells_for(self, k: str) -> str:
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

    def best_k(self, name: str, scored: str | None = None, *, k: str | None = None) -> str:
        """The k best of `scored` (unset: all rows that a search looks at); `k`: an expression (unset: the argument)."""
        return f"SELECT {self.named}, s.`__score` FROM ({self.ranked(name, scored, k=k)}) s"

    def ranked(self, name: str, scored: str | None = None, *, k: str | None = None) -> str:
        """The same with all columns of `scored`, and with the rank of each row as `__nth`."""
        nth = f"row_number() OVER (ORDER BY {self.order})"
        all_ranked = f"SELECT s.*, {nth} AS `__nth` FROM ({scored or self.scored()}) s"
        # With a literal k below 1 the optimizer would empty the plan, and the check of k with it.
        wanted = f"greatest({k or f'{quoted(name)}.`k`'}, 1)"
        return f"SELECT s.* FROM ({all_ranked}) s WHERE s.`__nth` <= {wanted}"

    def query_vector(
        self,
        name: str,
        *,
        exact: bool = False,
        more: str = "",
        check: str = "true",
        cells: bool = True,
        rows: bool = False,
        k: str | None = None,
    ) -> str:
        """The one row that everything else is joined with: what makes a query be encoded once; then the cells.

        exact: for a function without k, that looks in all cells. more, check: further columns and a further condition.

        What is wrong is told by `__ok`, which the optimizer keeps where nobody looks at scores, as in `count(*)`.
        """
        has_cells = cells and not exact
        more += self.number_of_probes(name, k=k, rows=rows) if has_cells else ""
        after = self.cells() if has_cells else ""
        if self.served.encoder is None:
            refused = refuse(name, self.served.problem or "", code=None)
            nothing = f"CAST(NULL AS ARRAY<FLOAT>) AS `__e`, CAST({refused} AS BOOLEAN) AS `__ok`"
            return f"v AS (SELECT {nothing}{more}){after}"
        text = checked_query(name)
        checks = [f"{text} IS NOT NULL", check, *([] if exact else [checked_k(name)])]
        encoded = f"{EMBED}('{self.served.encoder_key}', {text}) AS `__e`"
        return f"v AS (SELECT {encoded}, {' AND '.join(checks)} AS `__ok`{more}){after}"

    def checked_vector(self, name: str, vector: str, absent: str, which: str = "''") -> str:
        """The vector, an array of numbers, as those of the table are, or the failure of the query.

        absent: what to do about a NULL. which: an expression, what stands behind "the vector" in all that is told.
        """

        def told(*parts: str) -> str:
            """`parts` are expressions."""
            return f"raise_error(concat({', '.join([literal(f'[{CODE}] {name}: the vector'), which, *parts])}))"

        dim = self.served.dim
        of_table = (
            f" elements and those of table {self.served.name} have {dim}; encode it with the encoder of the table"
        )
        width = told(literal(" has "), f"CAST(size({vector}) AS STRING)", literal(of_table))
        wrong = told(literal(" has elements that are NULL or not finite; give numbers"))
        is_wrong = f"x -> x IS NULL OR isnan(x) OR abs(x) > {MAX_FLOAT}"
        return (
            f"CASE WHEN {vector} IS NULL THEN {told(literal(f' is NULL; {absent}'))} "
            f"WHEN size({vector}) <> {dim} THEN {width} WHEN exists({vector}, {is_wrong}) THEN {wrong} "
            f"ELSE CAST({vector} AS ARRAY<FLOAT>) END"
        )

    def refused(self, name: str, told: str) -> str:
        """The body of a function that cannot be had, and says why."""
        nothing = ", ".join(f"CAST(NULL AS {column.type})" for column in self.columns)
        failing = f"SELECT {refuse(name, told)} IS NULL AS `__ok`"
        return f"SELECT {nothing}, CAST(NULL AS FLOAT) FROM ({failing}) s WHERE s.`__ok`"

    def function(
        self, name: str, parameters: Sequence[Parameter], about: str, body: str, first: Sequence[Column] = ()
    ) -> str:
        """The statement that makes a function; the columns of `body` are `first`, those of `columns`, and the score."""
        defaults = [f" DEFAULT {default}" if default is not None else "" for _, _, _, default in parameters]
        given = ", ".join(
            f"{quoted(parameter)} {kind}{default} COMMENT {literal(meaning)}"
            for (parameter, kind, meaning, _), default in zip(parameters, defaults, strict=True)
        )
        columns = [*first, *self.columns, Column(self.score, "FLOAT")]
        returned = ", ".join(f"{quoted(column.name)} {column.type}" for column in columns)
        made = f"TEMPORARY FUNCTION {quoted(name)}"
        if self.schema is not None:
            made = f"FUNCTION {'.'.join(quoted(part) for part in [*self.schema.split('.'), name])}"
        return f"CREATE OR REPLACE {made} ({given}) RETURNS TABLE({returned}) COMMENT {literal(about)} RETURN {body}"


def query_parameter() -> Parameter:
    """The text to look for."""
    return ("query", "STRING", "what to look for", None)


def k_parameter() -> Parameter:
    """How many rows to answer with."""
    return ("k", "INT", "how many", DEFAULT_K)


def depth_parameter() -> Parameter:
    """How many candidates a function takes from a ranking before it chooses among them."""
    return ("depth", "INT", "how many of the best are looked at, at least k", DEFAULT_DEPTH)


def depth_of(name: str) -> str:
    """That number, for a function with both parameters."""
    return f"greatest({quoted(name)}.`depth`, {quoted(name)}.`k`)"


def checked_k(name: str) -> str:
    """True, or the failure of the query where k is none."""
    refused = refuse(name, "k is NULL or below 1; ask for at least 1")
    return f"CASE WHEN coalesce({quoted(name)}.`k`, 0) < 1 THEN {refused} ELSE true END"


def checked_query(name: str) -> str:
    """The query, which fails where there is nothing in it."""
    # Text that is no UTF-8 would end the Python worker.
    query = f"make_valid_utf8({quoted(name)}.`query`)"
    blank = refuse(name, "the query is NULL or blank; write what to look for")
    return f"CASE WHEN coalesce({query} RLIKE r'\\S', false) THEN {query} ELSE {blank} END"


def in_range(value: str, low: float, high: float, refused: str) -> str:
    """True, or the failure of the query for NULL, NaN and what is outside."""
    return f"CASE WHEN coalesce({value} BETWEEN {low} AND {high}, false) THEN true ELSE {refused} END"


def refuse(name: str, told: str, code: str | None = CODE) -> str:
    """An expression that fails the query; `code` None where the text brings its own."""
    coded = f"[{code}] {name}: {told}" if code else f"{told} ({name})"
    return f"raise_error({literal(coded)})"


def literal(value: str) -> str:
    """A string literal of SQL."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", " ")
    return f"'{escaped}'"
