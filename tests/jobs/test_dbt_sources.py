"""The sources.yml that `shoal sql dbt` prints, with its tests and its freshness asked as dbt asks them."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.jobs import cli
from shoal.jobs.embed import embed

pytestmark = pytest.mark.spark


def tables_of(told: str) -> dict[str, dict[str, Any]]:
    sources = yaml.safe_load(told)["sources"]
    return {table["name"]: table | {"schema": source["schema"]} for source in sources for table in source["tables"]}


def relation(table: dict[str, Any]) -> str:
    """As dbt-spark writes it into SQL: schema and identifier, unquoted."""
    return f"{table['schema']}.{table['identifier']}"


def test_what_dbt_is_told_holds_when_dbt_asks(
    spark: SparkSession,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows([{"id": "a", "body": "one"}, {"id": "b", "body": None}])
    config = load_run(run_file())
    for _ in range(2):
        embed(spark, config)
    capsys.readouterr()

    assert cli.main(["sql", "dbt", f"library={tmp_path / 'out' / 'docs'}"]) == 0

    tables = tables_of(capsys.readouterr().out)
    assert set(tables) == {"library", "library_runs"}
    library, runs = tables["library"], tables["library_runs"]
    columns = {column["name"]: column for column in library["columns"]}
    types = dict(spark.sql(f"SELECT * FROM {relation(library)}").dtypes)
    assert set(columns) >= {"id", "chunk_index", "text", "embedding", "error", "embedded_at"}
    assert {name: column["data_type"] for name, column in columns.items()} == {name: types[name] for name in columns}
    tested = [name for name, column in columns.items() if column.get("data_tests") == ["not_null"]]
    assert tested == ["id", "chunk_index"]
    for name in tested:
        assert spark.sql(f"SELECT * FROM {relation(library)} WHERE {name} IS NULL").count() == 0
    fresh = spark.sql(
        f"SELECT count(*) AS runs, max({runs['loaded_at_field']}) AS loaded, current_timestamp() AS now "
        f"FROM {relation(runs)} WHERE {runs['freshness']['filter']}"
    ).collect()[0]
    assert fresh["runs"] == 2, "a night without changes is fresh too"
    assert timedelta(0) <= fresh["now"] - fresh["loaded"] < timedelta(hours=runs["freshness"]["warn_after"]["count"])


def test_a_table_of_the_catalog_stands_under_its_schema(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], capsys: Any
) -> None:
    write_rows([{"id": "a", "body": "one"}])
    spark.sql("CREATE SCHEMA IF NOT EXISTS shelf")
    try:
        embed(spark, load_run(run_file(destination={"table": "shelf.docs"})))
        capsys.readouterr()
        assert cli.main(["sql", "dbt", "shelf.docs"]) == 0
        tables = tables_of(capsys.readouterr().out)
        assert relation(tables["docs"]) == "shelf.docs"
        assert tables["docs_runs"]["schema"] == "delta"
        for table in tables.values():
            assert spark.sql(f"SELECT * FROM {relation(table)}").count() > 0
    finally:
        spark.sql("DROP SCHEMA shelf CASCADE")


def test_a_table_that_is_not_there_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sql", "dbt", str(tmp_path / "none")]) != 0
    assert "there is no such table" in capsys.readouterr().err
