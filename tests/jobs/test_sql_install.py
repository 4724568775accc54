"""Search functions in a schema: what they answer, that they follow the table, and what cannot be kept."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import DestinationError
from shoal.conf.loader import load_run
from shoal.jobs.embed import embed
from shoal.jobs.sql_install import lines, sql_install
from shoal.udfs.hash_encoder import hash_vectors

pytestmark = pytest.mark.spark


@pytest.fixture
def write(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> Callable[[list[str]], str]:
    def write(texts: list[str]) -> str:
        write_rows([{"id": f"k{n}", "body": text} for n, text in enumerate(texts)])
        embed(spark, load_run(run_file()))
        return str(tmp_path / "out" / "docs")

    return write


@pytest.fixture
def schema(spark: SparkSession) -> Iterator[str]:
    spark.sql("CREATE SCHEMA `find_me`")
    yield "find_me"
    spark.sql("DROP SCHEMA `find_me` CASCADE")


def literal(text: str) -> str:
    return f"array({', '.join(map(str, hash_vectors([text], 8)[0].tolist()))})"


def test_kept_functions_search_the_newest_version_and_complain_like_the_others(
    spark: SparkSession, write: Callable[[list[str]], str], schema: str
) -> None:
    table = write(["one fish", "two fish"])
    done = sql_install(spark, [f"docs={table}"], schema, dry_run=False)
    assert list(done["statements"]) == ["find_me.docs_search_vector", "find_me.docs_similar"]
    assert "docs_best" in lines(done)[1]

    write(["one fish", "two fish", "red fish", "one fish"])

    found = spark.newSession().sql(f"SELECT id FROM `find_me`.docs_search_vector({literal('red fish')}, 1)").collect()
    assert [row["id"] for row in found] == ["k2"]
    alike = spark.sql("SELECT id, score FROM `find_me`.docs_similar('k0', 1)").collect()
    assert [(row["id"], row["score"]) for row in alike] == [("k3", pytest.approx(1, abs=1e-6))]
    for call in ("docs_search_vector(array(1, 2), 1)", "docs_similar('none', 1)", "docs_similar('k0', 0)"):
        with pytest.raises((PySparkException, Py4JJavaError), match="QUERY_INVALID"):
            spark.sql(f"SELECT count(*) FROM `find_me`.{call}").collect()


@pytest.mark.long
def test_a_dry_run_prints_statements_that_work_elsewhere(
    spark: SparkSession, write: Callable[[list[str]], str], schema: str
) -> None:
    told = lines(sql_install(spark, [write(["one fish"])], schema, dry_run=True))
    kept = [row["function"] for row in spark.sql("SHOW USER FUNCTIONS IN `find_me`").collect()]
    assert [name for name in kept if "docs" in name] == []

    for line in told:
        spark.sql(line.removesuffix(";"))

    assert spark.sql(f"SELECT count(*) AS n FROM `find_me`.docs_search_vector({literal('x')})").collect()[0]["n"] == 1


def test_a_schema_that_is_not_there_is_said_to_be(spark: SparkSession, write: Callable[[list[str]], str]) -> None:
    with pytest.raises(DestinationError, match="CREATE SCHEMA `nowhere`"):
        sql_install(spark, [write(["one fish"])], "nowhere", dry_run=False)
