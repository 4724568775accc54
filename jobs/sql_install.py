"""`shoal sql install`: those search functions that SQL can keep by itself, in a schema of a catalog."""

from collections.abc import Sequence
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import DestinationError, first_line
from shoal.jobs.hashing import quoted
from shoal.jobs.served_table import read_served
from shoal.jobs.sql_functions import tables_of
from shoal.jobs.sql_parts import require_vector_functions
from shoal.jobs.sql_text import permanent_statements

BY_TEXT = ("search", "match", "best", "scores", "bm25", "hybrid")


def sql_install(spark: SparkSession, arguments: Sequence[str], schema: str, *, dry_run: bool) -> dict[str, Any]:
    """Makes `<name>_search_vector` and `<name>_similar` for tables given as NAME=TABLE or TABLE; the `--json` document.

    They always read the newest version of their table. dry_run: only says the statements, for an endpoint that this
    process does not reach. Raises ConfigError on a Spark without vector functions, DestinationError when a table or the
    schema is not there, or the catalog refuses.
    """
    if not dry_run:
        require_vector_functions(spark)
    made: dict[str, str] = {}
    missing: list[str] = []
    for name, table in tables_of(arguments).items():
        served = read_served(spark, name, table)
        made |= permanent_statements(served, schema)
        missing += [f"{name}_{suffix}" for suffix in BY_TEXT]
    if not dry_run:
        for statement in made.values():
            try:
                spark.sql(statement)
            except (PySparkException, Py4JJavaError) as error:
                raise DestinationError(
                    f"--schema '{schema}': {first_line(error)}; create the schema (CREATE SCHEMA "
                    f"{quoted(schema)}), or have its owner run what --dry-run prints"
                ) from error
    return {
        "status": "planned" if dry_run else "installed",
        "schema": schema,
        "statements": made,
        "left_out": missing,
    }


def lines(document: dict[str, Any]) -> list[str]:
    """The document for people: statements to run elsewhere, or what was made."""
    if document["status"] == "planned":
        return [f"{statement};" for statement in document["statements"].values()]
    return [
        f"installed: {', '.join(document['statements'])}",
        f"left out, for Spark lets no function of a catalog call Python: {', '.join(document['left_out'])}",
    ]
