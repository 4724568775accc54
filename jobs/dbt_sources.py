"""`shoal sql dbt`: published tables as sources of a dbt project, with what dbt can test and how fresh they are."""

from collections.abc import Sequence
from typing import Any

import yaml
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.jobs.hashing import quoted
from shoal.jobs.layout import TableRef, table_named
from shoal.jobs.published import Published, read_settled
from shoal.jobs.sql_functions import tables_of

WARN_HOURS, ERROR_HOURS = 26, 50
"""A nightly run that was missed once, and twice."""

FRESH = "kind = 'run' AND get_json_object(record, '$.status') IN ('published', 'unchanged')"
"""Runs after which the table was in step: a night that found nothing to do counts as well."""

ABOUT = {
    "chunk_index": "Place of the chunk in its row's text, from 0.",
    "text": "The chunk's text.",
    "embedding": "The chunk's vector; NULL where `error` says why there is none.",
    "error": "Why there is no vector; NULL where there is one.",
    "embedded_at": "When the vector was made.",
}


def dbt_sources(spark: SparkSession, arguments: Sequence[str]) -> str:
    """The text of a `sources.yml` for tables given as NAME=TABLE or TABLE.

    Each table is a source table of its name, and its runs one of the name `<name>_runs`, whose freshness is that of the
    table. Raises DestinationError when a table is not there, ConfigError when two have one name.
    """
    by_schema: dict[str, list[dict[str, Any]]] = {}
    names = tables_of(arguments)
    for name, table in names.items():
        published = read_settled(spark, table_named(spark, table))
        if f"{name}_runs" in names:
            raise ConfigError(f"{name}_runs would be the table given and the runs of {name}; write OTHER=TABLE for one")
        schema, identifier = _place(published.ref)
        by_schema.setdefault(schema, []).append(_table(spark, published, name, identifier))
        by_schema.setdefault("delta", []).append(_runs(published, name))
    sources = [
        {"name": "shoal" if schema == "delta" else f"shoal_{schema}", "schema": schema, "tables": tables}
        for schema, tables in sorted(by_schema.items())
    ]
    return yaml.safe_dump({"version": 2, "sources": sources}, sort_keys=False, allow_unicode=True, width=120)


def _place(ref: TableRef) -> tuple[str, str]:
    """Schema and identifier as dbt writes them into SQL, without quotes of its own."""
    if ref.name is None:
        return "delta", quoted(ref.path or "")
    *schema, identifier = ref.name.split(".")
    if len(schema) > 1:
        raise ConfigError(
            f"table '{ref.name}' has a catalog in its name, which dbt-spark has no place for; leave it out"
        )
    return schema[0] if schema else "default", identifier


def _table(spark: SparkSession, published: Published, name: str, identifier: str) -> dict[str, Any]:
    not_null = {*published.keys, "chunk_index"}
    columns = []
    for field in published.rows(spark).schema:
        if field.name not in (*published.keys, *published.metadata, *ABOUT):
            continue
        about = ABOUT.get(field.name, "Key of the source row." if field.name in published.keys else "")
        column: dict[str, Any] = {"name": field.name, "data_type": field.dataType.simpleString()}
        if about:
            column["description"] = about
        if field.name in not_null:
            column["data_tests"] = ["not_null"]
        columns.append(column)
    described = f"A row for each chunk, with its vector by {published.encoder['reference']}. Kept in step by Shoal."
    return {"name": name, "identifier": identifier, "description": described, "columns": columns}


def _runs(published: Published, name: str) -> dict[str, Any]:
    return {
        "name": f"{name}_runs",
        "identifier": quoted(published.ref.runs),
        "description": f"A row for each run on {name}; how fresh it is says when {name} was last in step.",
        "loaded_at_field": "written_at",
        "freshness": {
            "warn_after": {"count": WARN_HOURS, "period": "hour"},
            "error_after": {"count": ERROR_HOURS, "period": "hour"},
            "filter": FRESH,
        },
    }
