"""The SQL functions in a plain session: answers, errors, one encoding per query, a table that changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Row, SparkSession
from pyspark.sql.functions import pandas_udf

from shoal.conf.errors import ConfigError, DestinationError
from shoal.conf.loader import load_run
from shoal.jobs import sql_functions
from shoal.jobs.embed import embed
from shoal.jobs.sql_functions import _ENCODERS, Functions, install, name_of, tables_of
from shoal.jobs.sql_parts import EMBED
from shoal.udfs.hash_encoder import hash_vectors
from shoal.udfs.query_udf import embed_queries

pytestmark = pytest.mark.spark

# With adaptive execution off, as in these tests, Spark wraps what fails in a broadcast once more.
SQL_ERRORS = (PySparkException, Py4JJavaError)

BODIES = ["one fish", "two fish", "red fish", "blue fish", "one fish", "red fish one fish two fish", None]


@pytest.fixture(scope="module")
def write(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Embeds BODIES in chunks of three words, with keys and metadata named like parameters and results."""
    folder = tmp_path_factory.mktemp("sql")

    def write(name: str = "docs", *, bodies: list[str | None] = BODIES, **settings: Any) -> str:
        rows = [{"query": n, "k": "ab"[n % 2], "body": body, "score": n / 2} for n, body in enumerate(bodies)]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        schema = "query INT, k STRING, body STRING, score DOUBLE"
        run = {
            "name": "docs",
            "source": {
                "format": "json", "path": "corpus.jsonl", "schema": schema, "key": ["query", "k"], "text": "body",
                "columns": ["score"],
            },
            "encoder": {"model": "hash:8", "query_prompt": "ask: "},
            "destination": {"path": name},
            "tracking": {"enabled": False},
        } | settings  # fmt: skip
        (folder / "run.yaml").write_text(json.dumps(run))
        embed(spark, load_run(folder / "run.yaml"), full_refresh=True)
        return str(folder / name)

    return write


@pytest.fixture(scope="module")
def docs(spark: SparkSession, write: Callable[..., str]) -> Functions:
    return install(spark, {"docs": write()})


def expected(text: str, prompt: str = "ask: ") -> list[tuple[int, float]]:
    """Key and score of every row with a vector, best first, ties by key."""
    good = [(n, body) for n, body in enumerate(BODIES) if body is not None]
    query_D = hash_vectors([prompt + text], 8)[0].astype(np.float64)
    scores_N = hash_vectors([body for _, body in good], 8).astype(np.float64) @ query_D
    return sorted(zip([n for n, _ in good], scores_N.tolist(), strict=True), key=lambda hit: (-hit[1], hit[0]))


def require_hits(rows: list[Row], wanted: list[tuple[int, float]]) -> None:
    assert [row["query"] for row in rows] == [key for key, _ in wanted]
    for row, (_, score) in zip(rows, wanted, strict=True):
        assert row["shoal_score"] == pytest.approx(score, abs=2e-6)


def test_search_gives_keys_chunk_text_metadata_and_score_best_first(spark: SparkSession, docs: Functions) -> None:
    found = spark.sql("SELECT * FROM docs_search('red fish', 3)")

    assert found.dtypes == [
        ("query", "int"), ("k", "string"), ("chunk_index", "int"), ("text", "string"), ("score", "double"),
        ("shoal_score", "float"),
    ]  # fmt: skip
    rows = found.collect()
    require_hits(rows, expected("red fish")[:3])
    for row in rows:
        assert (row["text"], row["score"]) == (BODIES[row["query"]], row["query"] / 2)


def test_k_is_ten_unless_said_and_arguments_have_names(spark: SparkSession, docs: Functions) -> None:
    require_hits(spark.sql("SELECT * FROM docs_search('one fish')").collect(), expected("one fish"))
    require_hits(spark.sql("SELECT * FROM docs_search(k => 2, query => 'x')").collect(), expected("x")[:2])


def test_a_filter_outside_chooses_among_the_k_and_one_over_all_scores_the_best_that_match(
    spark: SparkSession, docs: Functions
) -> None:
    in_order = expected("fish")
    other = "a" if in_order[0][0] % 2 else "b"
    matching = [hit for hit in in_order if "ab"[hit[0] % 2] == other]
    among_one = spark.sql(f"SELECT * FROM docs_search('fish', 1) WHERE k = '{other}'").collect()
    over_all = spark.sql(
        f"SELECT * FROM docs_scores('fish') WHERE k = '{other}' ORDER BY shoal_score DESC, query LIMIT 1"
    ).collect()

    assert among_one == []
    require_hits(over_all, matching[:1])


def test_a_match_finds_the_k_best_of_the_rows_with_these_values(spark: SparkSession, docs: Functions) -> None:
    in_order = expected("fish")
    for value in "ab":
        matching = [hit for hit in in_order if "ab"[hit[0] % 2] == value]
        require_hits(spark.sql(f"SELECT * FROM docs_match('fish', map('k', '{value}'), 2)").collect(), matching[:2])
    two = spark.sql("SELECT * FROM docs_match('fish', map('query', '3', 'score', '1.5'))").collect()
    assert [row["query"] for row in two] == [3]
    assert spark.sql("SELECT * FROM docs_match('fish', map('score', '99'))").collect() == []
    assert spark.sql("SELECT * FROM docs_match('fish', map('score', NULL))").collect() == []


def test_a_vector_of_any_number_type_searches_too(spark: SparkSession, docs: Functions) -> None:
    numbers = ", ".join(str(float(x)) for x in hash_vectors(["ask: red fish"], 8)[0])
    by_literal = spark.sql(f"SELECT * FROM docs_search_vector(array({numbers}), 3)").collect()
    by_function = spark.sql("SELECT * FROM docs_search_vector(shoal_embed('docs', 'red fish'), 3)").collect()

    require_hits(by_literal, expected("red fish")[:3])
    require_hits(by_function, expected("red fish")[:3])


def test_a_batch_gives_the_k_best_of_every_vector_with_its_id(spark: SparkSession, docs: Functions) -> None:
    texts = {"a": "red fish", "b": "one fish", "it's": "red fish"}
    queries = ", ".join(f'struct("{name}", shoal_embed("docs", "{text}"))' for name, text in texts.items())
    for more, kept, least in (("4", 4, -9), ("4, 0.2", 4, 0.2), ("k => 100", 100, -9)):
        rows = spark.sql(f"SELECT * FROM docs_join(array({queries}), {more})").collect()
        columns = ["query_id", "query", "k", "chunk_index", "text", "score", "shoal_score"]
        assert all(row.__fields__ == columns for row in rows)
        for name, text in texts.items():
            wanted = [hit for hit in expected(text)[:kept] if hit[1] >= least]
            found = [row for row in rows if row["query_id"] == name]
            require_hits(sorted(found, key=lambda row: (-row["shoal_score"], row["query"])), wanted)
    itself = spark.sql(
        f"SELECT * FROM docs_join((SELECT collect_list(struct(query, embedding)) FROM {docs.served['docs'].relation} "
        "WHERE embedding IS NOT NULL), 1)"
    ).collect()
    # Rows 0 and 4 have the same text: the first of them is the nearest to both.
    assert {row["query_id"]: row["query"] for row in itself} == {
        str(n): BODIES.index(body) for n, body in enumerate(BODIES) if body is not None
    }
    assert spark.sql("SELECT * FROM docs_join(array(), 3)").collect() == []


def test_rows_similar_to_a_row_leave_it_out(spark: SparkSession, docs: Functions) -> None:
    rows = spark.sql("SELECT * FROM docs_similar(0, 'a', 3)").collect()

    wanted = [hit for hit in expected("one fish", prompt="") if hit[0] != 0]
    require_hits(rows, wanted[:3])
    assert (rows[0]["query"], rows[0]["shoal_score"]) == (4, pytest.approx(1.0, abs=1e-6))


def test_best_gives_a_row_once_and_still_k_rows(spark: SparkSession, write: Callable[..., str]) -> None:
    chunked = write("chunked", chunk={"tokens": 2})
    install(spark, {"chunked": chunked})

    chunks = spark.sql("SELECT * FROM chunked_search('fish', 100)").collect()
    best = spark.sql("SELECT * FROM chunked_best('fish', 5)").collect()

    assert len(chunks) > len({row["query"] for row in chunks}), "no row has two chunks"
    first_of_row = {row["query"]: row for row in reversed(chunks)}
    wanted = sorted(first_of_row.values(), key=lambda row: (-row["shoal_score"], row["query"]))[:5]
    assert best == wanted


def test_a_query_is_encoded_once_in_every_form(spark: SparkSession, docs: Functions) -> None:
    counted = spark.sparkContext.accumulator(0)
    known = dict(_ENCODERS[spark])

    def embed_counted(names: pd.Series, texts: pd.Series) -> pd.Series:
        counted.add(len(texts))
        return next(embed_queries(iter([(names, texts)]), known))

    spark.udf.register(EMBED, pandas_udf("array<float>")(embed_counted))
    forms = {
        "docs_search('x', 3)": 1,
        "docs_best('x', 3)": 1,
        "docs_scores('x') WHERE k = 'a' ORDER BY shoal_score DESC LIMIT 3": 1,
        "docs_search_vector(shoal_embed('docs', 'x'), 3)": 1,
        "docs_similar(0, 'a', 3)": 0,
        "docs_match('x', map('k', 'a'), 3)": 1,
        "docs_search('x', 3) s JOIN docs_search('y', 3) t USING (query)": 2,
    }
    try:
        for form, times in forms.items():
            before = counted.value
            spark.sql(f"SELECT * FROM {form}").collect()
            assert counted.value - before == times, form
    finally:
        docs._serve(docs.served["docs"])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("docs_search(NULL, 3)", "docs_search: the query is NULL or blank"),
        ("docs_search('', 3)", "docs_search: the query is NULL or blank"),
        ("docs_best(' \t\n', 3)", "docs_best: the query is NULL or blank"),
        ("docs_scores('  ')", "docs_scores: the query is NULL or blank"),
        ("docs_match(NULL, map('k', 'a'))", "docs_match: the query is NULL or blank"),
        ("docs_match('x', NULL)", "docs_match: match is NULL"),
        (
            "docs_match('x', map('lang', 'de', 'k', 'a'))",
            "matched is called lang; there are query, k, score",
        ),
        ("docs_match('x', map('k', 'a'), 0)", "docs_match: k is NULL or below 1"),
        ("docs_search('x', 0)", "docs_search: k is NULL or below 1"),
        ("docs_best('x', -1)", "docs_best: k is NULL or below 1"),
        ("docs_search('x', NULL)", "docs_search: k is NULL or below 1"),
        ("docs_similar(0, 'a', 0)", "docs_similar: k is NULL or below 1"),
        ("docs_search_vector(array(1, 2), 3)", "the vector has 2 elements and those of table docs have 8"),
        ("docs_search_vector(NULL, 3)", "docs_search_vector: the vector is NULL"),
        ("docs_search_vector(array(1, 2, 3, 4, 5, 6, 7, NULL), 3)", "elements that are NULL or not finite"),
        ("docs_search_vector(array(1, 2, 3, 4, 5, 6, 7, double('NaN')), 3)", "elements that are NULL or not finite"),
        ("docs_search_vector(array(1, 2, 3, 4, 5, 6, 7, 1e39), 3)", "elements that are NULL or not finite"),
        ("docs_similar(NULL, 'a', 3)", "docs_similar: the key is NULL"),
        ("docs_join(NULL, 3)", "docs_join: queries are NULL"),
        ("docs_join(array(), 0)", "docs_join: k is NULL or below 1"),
        ("docs_join(array(), 1, double('NaN'))", "docs_join: threshold is not finite"),
        ("docs_join(array(struct('a', NULL)), 3)", "docs_join: the vector of a is NULL; leave it out"),
        (
            "docs_join(array(struct('a', array(1, 2))), 3)",
            "the vector of a has 2 elements and those of table docs have 8",
        ),
        (
            "docs_join(array(struct(NULL, array(1, 2, 3, 4, 5, 6, 7, NULL))), 3)",
            "the vector has elements that are NULL",
        ),
        ("docs_similar(0, 'b', 3)", "no row of table docs with a vector has the key 0, b"),
        ("docs_similar(6, 'a', 3)", "no row of table docs with a vector has the key 6, a"),
        ("(SELECT shoal_embed('docs', NULL))", "the text for 'docs' is NULL"),
        ("(SELECT shoal_embed('dox', 'x'))", "'dox' is no table that is served here"),
    ],
)
def test_what_cannot_be_searched_is_an_error_with_its_code_and_never_no_rows(
    spark: SparkSession, docs: Functions, call: str, told: str
) -> None:
    # Nobody looks at a score here, so that only what is kept on purpose can complain.
    asked = "*" if "shoal_embed" in call else "count(*)"
    with pytest.raises(SQL_ERRORS) as caught:
        spark.sql(f"SELECT {asked} FROM {call}").collect()

    assert told in str(caught.value)
    assert "QUERY_INVALID" in str(caught.value)


def test_functions_say_what_they_do(spark: SparkSession, docs: Functions) -> None:
    for suffix, word in (("search", "docs_scores"), ("search_vector", "8 numbers"), ("similar", "other rows"),
                         ("best", "one chunk per row"), ("match", "among those"), ("scores", "LIMIT k"),
                         ("join", "many vectors")):  # fmt: skip
        told = "\n".join(row[0] for row in spark.sql(f"DESCRIBE FUNCTION EXTENDED docs_{suffix}").collect())
        assert word in told, suffix


def test_without_texts_or_an_encoder_a_table_answers_what_it_can(
    spark: SparkSession, write: Callable[..., str]
) -> None:
    path = write("bare", destination={"path": "bare", "store_text": False})
    functions = install(spark, {"bare": path})
    rows = spark.sql("SELECT * FROM bare_search('red fish', 2)").collect()

    told = json.loads(spark.sql(f"DESCRIBE DETAIL delta.`{path}`").collect()[0]["properties"]["shoal.encoder"])
    told["settings"]["model"] = "./gone"
    value = json.dumps(told).replace("'", "\\'")
    spark.sql(f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('shoal.encoder' = '{value}')")
    functions.follow()
    assert (functions.follow(), functions.follow(retry=True)) == ([], ["bare"])

    require_hits(rows, expected("red fish")[:2])
    assert [row["text"] for row in rows] == [None, None]
    for query in ("SELECT count(*) FROM bare_scores('x')", "SELECT shoal_embed('bare', 'x')"):
        with pytest.raises(SQL_ERRORS, match="MODEL_NOT_FOUND"):
            spark.sql(query).collect()
    assert len(spark.sql("SELECT * FROM bare_similar(0, 'a', 3)").collect()) == 3


@pytest.mark.long
def test_a_cut_over_changes_rows_and_encoder_in_one_step(spark: SparkSession, write: Callable[..., str]) -> None:
    functions = install(spark, {"moving": write("moving", encoder={"model": "hash:8"})})
    exact = "SELECT query, shoal_score FROM moving_search('red fish', 1)"
    assert functions.follow() == []

    write("moving", encoder={"model": "hash:8", "document_prompt": "b: ", "query_prompt": "b: "})
    before = spark.sql(exact).collect()
    assert functions.follow() == ["moving"]
    after = spark.sql(exact).collect()
    prompt = spark.sql("SELECT shoal_embed('moving', 'red fish') AS e").collect()[0]["e"]

    # A query vector of the other encoder would score below 1 on both sides.
    assert before == after == [Row(query=2, shoal_score=pytest.approx(1.0, abs=1e-6))]
    np.testing.assert_array_equal(np.array(prompt, np.float32), hash_vectors(["b: red fish"], 8)[0])
    assert functions.served["moving"].version == 1


@pytest.mark.long
def test_a_replacement_that_failed_half_way_is_made_at_the_next_look(
    spark: SparkSession, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("shaky")
    functions = install(spark, {"shaky": path})
    write("shaky", bodies=["a tide"])
    made = sql_functions.statements
    monkeypatch.setattr(sql_functions, "statements", lambda *of: [*made(*of)[:2], "SELECT * FROM no_such_table"])
    assert functions.follow() == []
    monkeypatch.undo()

    assert functions.follow() == ["shaky"]
    assert [row["text"] for row in spark.sql("SELECT text FROM shaky_scores('a tide')").collect()] == ["a tide"]


@pytest.mark.long
def test_a_client_in_another_schema_changes_no_table_that_is_followed(
    spark: SparkSession, write: Callable[..., str]
) -> None:
    path = write("own")
    spark.sql(f"CREATE TABLE wiki USING delta LOCATION '{path}'")
    spark.sql("CREATE SCHEMA side")
    try:
        functions = install(spark, {"wiki": "wiki"})
        write("own", bodies=["a tide"])
        spark.sql("USE side")
        assert functions.follow() == ["wiki"]
        assert [row["text"] for row in spark.sql("SELECT text FROM wiki_search('a tide')").collect()] == ["a tide"]
    finally:
        spark.sql("USE default")
        spark.sql("DROP SCHEMA side")
        spark.sql("DROP TABLE wiki")


@pytest.mark.long
def test_another_dimension_and_new_rows_are_followed_too(spark: SparkSession, write: Callable[..., str]) -> None:
    functions = install(spark, {"grown": write("grown")})
    write("grown", bodies=["a tide"], encoder={"model": "hash:16"})
    functions.follow()

    assert [row["text"] for row in spark.sql("SELECT text FROM grown_search('a tide')").collect()] == ["a tide"]
    with pytest.raises(SQL_ERRORS, match="those of table grown have 16"):
        spark.sql("SELECT * FROM grown_search_vector(array(1, 2), 1)").collect()


def test_a_table_that_is_not_there_is_an_error_at_once(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="there is no such table"):
        install(spark, {"docs": str(tmp_path / "none")})


@pytest.mark.parametrize(
    ("arguments", "tables"),
    [
        (["docs=out/docs"], {"docs": "out/docs"}),
        (["out/My Docs-2024/"], {"my_docs_2024": "out/My Docs-2024/"}),
        (["shop.wiki"], {"wiki": "shop.wiki"}),
        (["2024=out/a", "b=out/a"], {"t_2024": "out/a", "b": "out/a"}),
        (["out/day=1/docs"], {"docs": "out/day=1/docs"}),
    ],
)
def test_names_of_functions_follow_a_rule(arguments: list[str], tables: dict[str, str]) -> None:
    assert tables_of(arguments) == tables


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a-b=x", "a.b=y"], "functions named a_b_.. are those of 'x' already"),
        (["docs="], "names no table"),
        (["---=x"], "leaves no name"),
    ],
)
def test_names_that_clash_or_say_nothing_are_errors(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tables_of(arguments)


def test_a_name_is_never_read_as_sql() -> None:
    assert name_of("x`; DROP TABLE y") == "x_drop_table_y"
