"""The SQL functions of a served table, as text: search by a text, a vector or a row, best row, every score.

Each body names one version of the table and the encoder of that version, so that no query can meet vectors of another
encoder; following the table means replacing the functions (`Functions.follow`).
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, ShoalError, code_of, first_line
from shoal.jobs.hashing import quoted
from shoal.jobs.served_table import Column, ServedTable, has_been_moved, has_moved, read_served
from shoal.udfs.query_udf import QueryEncoder, query_udf

logger = logging.getLogger(__name__)

EMBED = "shoal_embed"
DEFAULT_K = 10
SCORE_NAMES = ("score", "shoal_score")
CODE = "QUERY_INVALID"

# The largest float32: what is beyond it would turn into infinity on the way into a vector.
MAX_FLOAT = "3.4028234663852886E38D"


_ENCODERS: WeakKeyDictionary[SparkSession, dict[str, QueryEncoder | str]] = WeakKeyDictionary()
"""What the one `shoal_embed` of a session knows, whoever made its functions."""


@dataclass
class Functions:
    """The functions of several tables in one Spark session; `follow` keeps them at the newest version."""

    spark: SparkSession
    tables: Mapping[str, str]
    say: Callable[[str], None]
    served: dict[str, ServedTable] = field(default_factory=dict)

    def create(self) -> None:
        """Makes the functions of all tables; DestinationError when one of the tables is not there."""
        for name, table in self.tables.items():
            self._serve(read_served(self.spark, name, table))

    def follow(self, *, retry: bool = False) -> list[str]:
        """Names of the tables whose functions were replaced because the table has moved since.

        retry: also those whose encoder could not be had, or whose name means another folder now. A table that cannot
        be read just now keeps its functions, and is looked at again next time.
        """
        moved = []
        for name, served in list(self.served.items()):
            try:
                again = retry and (served.problem is not None or has_been_moved(self.spark, served))
                if not again and not has_moved(self.spark, served):
                    continue
                # By its full name: what the one that was given means depends on the schema that a client is in.
                self._serve(read_served(self.spark, name, str(served.ref)))
            except (ShoalError, PySparkException, Py4JJavaError) as error:
                told = first_line(error)
                self.say(f"table '{name}' still answers from version {served.version}: [{code_of(error)}] {told}")
                continue
            moved.append(name)
        return moved

    def _serve(self, served: ServedTable) -> None:
        before = self.served.get(served.name)
        if served.problem and (before is None or before.problem != served.problem):
            self.say(f"table '{served.name}' cannot be searched by text: {served.problem}")
        # First the function that all others call; it goes on knowing the encoders of versions before.
        encoders = _ENCODERS.setdefault(self.spark, {})
        encoders[served.name] = served.encoder or served.problem or ""
        if served.encoder is not None:
            encoders[served.encoder_key] = served.encoder
        self.spark.udf.register(EMBED, query_udf(encoders))
        for statement in statements(served):
            self.spark.sql(statement)
        # Last: where one of them fails, the next look makes all of them again.
        self.served[served.name] = served


def install(spark: SparkSession, tables: Mapping[str, str]) -> Functions:
    """The functions in any session with Delta: `install(spark, {"docs": "out/docs"})`, then SQL has `docs_search`."""
    named = {name_of(name): table for name, table in tables.items()}
    if len(named) < len(tables):
        raise ConfigError(f"tables {sorted(tables)}: two of the names begin functions alike; give one another name")
    functions = Functions(spark, named, logger.warning)
    functions.create()
    return functions


def name_of(text: str) -> str:
    """What functions of a table begin with: in lower case, with `_` for each run of other characters than a-z, 0-9, _.

    A digit in front gets a `t_`. ConfigError where nothing is left.
    """
    name = re.sub(r"[^a-z0-9_]+", "_", text.lower()).strip("_")
    if not name:
        raise ConfigError(f"--table {text!r} leaves no name for its functions; write NAME=TABLE")
    return f"t_{name}" if name[0].isdigit() else name


def tables_of(arguments: Sequence[str]) -> dict[str, str]:
    """Function name -> table, of `NAME=TABLE` or TABLE, whose last part is the name then."""
    tables: dict[str, str] = {}
    for argument in arguments:
        name, equals, table = argument.partition("=")
        if not equals or "/" in name:
            name, table = re.split(r"[/.]", argument.rstrip("/"))[-1], argument
        if not table:
            raise ConfigError(f"--table {argument!r} names no table; write NAME=PATH or NAME=CATALOG_NAME")
        name = name_of(name)
        if name in tables:
            raise ConfigError(
                f"--table {argument!r}: functions named {name}_.. are those of {tables[name]!r} already; "
                "give it another name, as OTHER=TABLE"
            )
        tables[name] = table
    return tables


def names_of(served: ServedTable) -> list[str]:
    """The functions of one table, `shoal_embed` left out."""
    return [f"{served.name}_{suffix}" for suffix in ("search", "search_vector", "similar", "best", "scores")]


def statements(served: ServedTable) -> list[str]:
    """The statements that make the functions of one table, for a session that has `shoal_embed`.

    They are temporary: Spark lets no permanent function call a Python function.
    """
    sql = _Sql(served)
    return [sql.search(), sql.search_vector(), sql.similar(), sql.best(), sql.scores()]


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
            f"filters among these k: for the k best that match, use {self.served.name}_scores."
        )
        return self._function(name, [_query(), _k()], about, f"WITH {self._query_vector(name)} {self._best_k(name)}")

    def search_vector(self) -> str:
        name = f"{self.served.name}_search_vector"
        about = f"As {self.served.name}_search, for a vector of {self.served.dim} numbers instead of a text."
        parameters = [("vector", "ARRAY<DOUBLE>", "the query vector", None), _k()]
        vector = f"v AS (SELECT {self._checked_vector(name)} AS `__e`, {_checked_k(name)} AS `__ok`)"
        return self._function(name, parameters, about, f"WITH {vector} {self._best_k(name)}")

    def best(self) -> str:
        name = f"{self.served.name}_best"
        about = (
            f"As {self.served.name}_search, with one chunk per row, its best: k rows of the source, where there are "
            "as many."
        )
        nth = f"row_number() OVER (PARTITION BY {self.keys} ORDER BY s.`__score` DESC, s.`chunk_index`)"
        of_row = f"SELECT s.*, {nth} AS `__nth_of_row` FROM ({self._scored()}) s"
        best = f"SELECT s.* FROM ({of_row}) s WHERE s.`__nth_of_row` = 1"
        return self._function(
            name, [_query(), _k()], about, f"WITH {self._query_vector(name)} {self._best_k(name, best)}"
        )

    def scores(self) -> str:
        name = f"{self.served.name}_scores"
        about = (
            f"Every chunk of table {self.served.name} that has a vector, with its score, in no order: filter with "
            f"WHERE, then ORDER BY {self.score} DESC LIMIT k gives the k best among those that match."
        )
        body = f"SELECT {self.named}, s.`__score` FROM ({self._scored()}) s"
        return self._function(name, [_query()], about, f"WITH {self._query_vector(name, k=False)} {body}")

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
        same = " AND ".join(f"t.{quoted(c.name)} = {value}" for c, value in zip(keys, given, strict=True))
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
        v = f"v AS (SELECT {vectors} AS `__es`, {_checked_k(name)} AS `__ok` FROM r)"
        score = "array_max(transform(v.`__es`, e -> vector_inner_product(t.`embedding`, e)))"
        others = self._scored(score, f"NOT ({same})")
        return self._function(name, [*parameters, _k()], about, f"WITH {row}, {v} {self._best_k(name, others)}")

    def _scored(self, score: str = "vector_inner_product(t.`embedding`, v.`__e`)", where: str = "true") -> str:
        """Every row with a vector and its score, computed from the one row of `v`."""
        return (
            f"SELECT {self.carried}, {score} AS `__score` FROM {self.relation} t CROSS JOIN v "
            f"WHERE t.`embedding` IS NOT NULL AND v.`__ok` AND {where}"
        )

    def _best_k(self, name: str, scored: str | None = None) -> str:
        nth = f"row_number() OVER (ORDER BY {self.order})"
        ranked = f"SELECT s.*, {nth} AS `__nth` FROM ({scored or self._scored()}) s"
        # With a literal k below 1 the optimizer would empty the plan, and the check of k with it.
        return f"SELECT {self.named}, s.`__score` FROM ({ranked}) s WHERE s.`__nth` <= greatest({quoted(name)}.`k`, 1)"

    def _query_vector(self, name: str, *, k: bool = True) -> str:
        """The one row that everything else is joined with: what makes a query be encoded once.

        What is wrong is told by `__ok`, which the optimizer keeps where nobody looks at scores, as in `count(*)`.
        """
        if self.served.encoder is None:
            refused = _refuse(name, self.served.problem or "", code=None)
            return f"v AS (SELECT CAST(NULL AS ARRAY<FLOAT>) AS `__e`, CAST({refused} AS BOOLEAN) AS `__ok`)"
        query = f"{quoted(name)}.`query`"
        blank = _refuse(name, "the query is NULL or blank; write what to look for")
        text = f"CASE WHEN coalesce({query} RLIKE r'\\S', false) THEN {query} ELSE {blank} END"
        checked = f"{text} IS NOT NULL" + (f" AND {_checked_k(name)}" if k else "")
        return f"v AS (SELECT {EMBED}('{self.served.encoder_key}', {text}) AS `__e`, {checked} AS `__ok`)"

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
        self, name: str, parameters: Sequence[tuple[str, str, str, int | None]], about: str, body: str
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


def _query() -> tuple[str, str, str, int | None]:
    return ("query", "STRING", "what to look for", None)


def _k() -> tuple[str, str, str, int | None]:
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
