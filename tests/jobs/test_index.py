"""The index of a table: rows in the cells of their vectors, nights that go on, searches that read few files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

from shoal.conf.errors import ConfigError, RefusedError
from shoal.conf.loader import load_run
from shoal.jobs import sql_join, sql_text
from shoal.jobs.audit import audit
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.cells import CELL, FRESH, Index, cell_sizes, number_of_cells, read_build
from shoal.jobs.cli import main
from shoal.jobs.embed import Hooks, embed
from shoal.jobs.index import index
from shoal.jobs.index_report import files_read, index_report
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.maintenance import last_fit
from shoal.jobs.operation import table_of_ours
from shoal.jobs.optimize import optimize
from shoal.jobs.purge import purge
from shoal.jobs.report import Report
from shoal.jobs.restore import Wanted, restore
from shoal.jobs.sql_functions import _ENCODERS, install
from shoal.jobs.sql_parts import EMBED
from shoal.jobs.status import lines, status
from shoal.udfs.cells import nearest_cells
from shoal.udfs.hash_encoder import hash_vectors
from shoal.udfs.query_udf import embed_queries

pytestmark = [pytest.mark.spark, pytest.mark.slow]

ROWS, CELLS, DIM = 240, 6, 8
EMPTY = 3
"""Row without a text, and so without a vector and a cell."""


def night(
    spark: SparkSession, folder: Path, ids: range | list[int], *, changed: int | None = None, refresh: bool = False,
    hooks: Hooks | None = None, **settings: Any,
) -> Report:  # fmt: skip
    """One `shoal embed` of these rows; one of them has another text than before."""
    rows = [
        {
            "id": n,
            "body": None if n == EMPTY else f"text {n}{' anew' if n == changed else ''}",
            "lang": ["de", "en"][n % 2],
        }
        for n in ids
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "name": "docs",
        "source": {
            "format": "json", "path": "corpus.jsonl", "key": "id", "text": "body", "columns": ["lang"],
            "schema": "id INT, body STRING, lang STRING",
        },
        "encoder": {"model": f"hash:{DIM}"},
        "destination": {"path": "out/docs", "change_feed": True, "properties": {"search.team": "words"}},
        "limits": {"max_deleted": "100%"},
        "tracking": {"enabled": False},
    } | settings  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(run))
    return embed(spark, load_run(folder / "run.yaml"), full_refresh=refresh, hooks=hooks)


def ref_of(spark: SparkSession, folder: Path) -> TableRef:
    return table_of(spark, load_run(folder / "run.yaml").destination)


def contents(spark: SparkSession, ref: TableRef, version: int | None = None) -> list[str]:
    """Every row without its cell."""
    return sorted(str(row) for row in ref.read(spark, version).drop(CELL).collect())


def cells_of(spark: SparkSession, ref: TableRef) -> dict[int, int | None]:
    return {row["id"]: row[CELL] for row in ref.read(spark).select("id", CELL).collect()}


@pytest.fixture(scope="module")
def built(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 240 rows, one without a vector, in six cells."""
    folder = tmp_path_factory.mktemp("built")
    assert night(spark, folder, range(ROWS)).status == "published"
    index(spark, str(ref_of(spark, folder)), cells=CELLS)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_rows_are_in_the_cells_of_their_vectors_and_nothing_else_has_changed(spark: SparkSession, built: Path) -> None:
    ref = ref_of(spark, built)
    published = table_of_ours(spark, str(ref))
    made = published.index
    assert made is not None
    assert (made.cells, made.rows, made.target) == (CELLS, ROWS - 1, 0.95)
    assert contents(spark, ref) == contents(spark, ref, version=0)
    centroids_CD = read_build(spark, ref, made.build)
    assert centroids_CD is not None
    ids = [n for n in range(ROWS) if n != EMPTY]
    nearest = nearest_cells(hash_vectors([f"text {n}" for n in ids], DIM), centroids_CD).tolist()
    assert cells_of(spark, ref) == {EMPTY: None, **dict(zip(ids, nearest, strict=True))}
    detail = spark.sql(f"DESCRIBE DETAIL {ref.sql}").collect()[0]
    assert detail["partitionColumns"] == [CELL]
    assert published.properties["search.team"] == "words"
    assert "delta.constraints.shoal_dim" in published.properties
    # One file for each cell, and one for what has none.
    files = {cell: size.files for cell, size in cell_sizes(spark, ref.sql).items()}
    assert files == dict.fromkeys([None, *range(CELLS)], 1)
    assert audit(spark, str(ref)).is_clean


def test_recall_is_that_of_an_exact_search_for_rows_that_the_centroids_were_not_trained_on(
    spark: SparkSession, built: Path
) -> None:
    made = table_of_ours(spark, str(ref_of(spark, built))).index
    assert made is not None
    for curve in made.recall.values():
        assert list(curve) == [1, 2, 3, 4, 6]
        assert list(curve.values()) == sorted(curve.values())
        assert 0 < curve[1] < curve[6] == 1
    for k, probes in made.probes.items():
        assert made.recall[k].get(probes, 1) >= made.target
    assert Index.from_property(made.to_property()) == made


def test_a_night_puts_what_is_new_into_the_fresh_cell_and_one_without_changes_does_nothing(
    spark: SparkSession, folder: Path
) -> None:
    ref = ref_of(spark, folder)
    before = cells_of(spark, ref)
    assert night(spark, folder, range(ROWS)).status == "unchanged"
    report = night(spark, folder, [*range(10, ROWS), 1000, EMPTY], changed=20)
    assert report.reason is None
    assert (report.rows.new, report.rows.changed, report.rows.deleted) == (1, 1, 9)
    kept = {n: cell for n, cell in before.items() if n >= 10 or n == EMPTY}
    assert cells_of(spark, ref) == {**kept, 20: FRESH, 1000: FRESH}
    (found,) = status(spark, [str(ref)])
    assert found["index"]["fresh_rows"] == 2
    assert f"{CELLS} cells" in "\n".join(lines([found]))


def test_folding_in_changes_the_cells_of_fresh_rows_and_nothing_else(spark: SparkSession, folder: Path) -> None:
    ref = ref_of(spark, folder)
    night(spark, folder, [*range(ROWS), 1000, 1001], changed=20)
    rows, cells = contents(spark, ref), cells_of(spark, ref)
    version = table_of_ours(spark, str(ref)).version
    done = optimize(spark, str(ref))
    assert done["optimize"]["folded"] == 3
    assert contents(spark, ref) == rows
    now = cells_of(spark, ref)
    assert {n for n in now if now[n] != cells[n]} == {20, 1000, 1001}
    published = table_of_ours(spark, str(ref))
    assert published.index is not None
    centroids_CD = read_build(spark, ref, published.index.build)
    texts = ["text 20 anew", "text 1000", "text 1001"]
    assert [now[20], now[1000], now[1001]] == nearest_cells(hash_vectors(texts, DIM), centroids_CD).tolist()
    changes = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", version + 1)
    told = changes.load(ref.path).where("_change_type LIKE 'update%'").drop("_commit_timestamp", "_commit_version")
    rows = {
        kind: told.where(F.col("_change_type") == f"update_{kind}image").drop("_change_type")
        for kind in ("pre", "post")
    }
    assert {row["id"] for row in rows["post"].collect()} == {20, 1000, 1001}
    assert rows["pre"].drop(CELL).exceptAll(rows["post"].drop(CELL)).isEmpty()
    assert changes.load(ref.path).count() == 6
    (found,) = status(spark, [str(ref)])
    assert found["index"]["fresh_rows"] == 0
    # Three rows say nothing of those to come; this is what more would say.
    assert found["index"]["last_fit"] is None
    products_N = np.max(hash_vectors(texts, DIM) @ centroids_CD.T, axis=1)
    assert last_fit(spark, published, min_rows=3) == pytest.approx(products_N.mean(), abs=1e-5)
    assert night(spark, folder, [*range(ROWS), 1000, 1001], changed=20).status == "unchanged"
    assert optimize(spark, str(ref))["optimize"]["folded"] == 0


def hits(rows: list[Row]) -> list[tuple[int, float]]:
    return [(row["id"], row["score"]) for row in rows]


def exact(spark: SparkSession, text: str, k: int) -> list[Row]:
    return spark.sql(f"SELECT * FROM docs_scores('{text}') ORDER BY score DESC, id LIMIT {k}").collect()


def test_a_search_reads_the_files_of_the_cells_it_looks_in(spark: SparkSession, folder: Path) -> None:
    ref = ref_of(spark, folder)
    night(spark, folder, [*range(ROWS), 1000])
    install(spark, {"docs": str(ref)})
    made = table_of_ours(spark, str(ref)).index
    assert made is not None
    centroids_CD = read_build(spark, ref, made.build)
    assert centroids_CD is not None
    for call in ("search('text 1000', 5, {})", "best('text 1000', 5, {})"):
        for probes in (1, 3, CELLS):
            answer = spark.sql(f"SELECT * FROM docs_{call.format(probes)}")
            rows = answer.collect()
            # Those cells, the fresh one, and the row that has none.
            assert files_read(answer) == probes + 2
            looked_in = np.argsort(-(centroids_CD @ hash_vectors(["text 1000"], DIM)[0]))[:probes].tolist()
            assert {row["id"] for row in rows} <= {
                n for n, cell in cells_of(spark, ref).items() if cell in (*looked_in, FRESH)
            }
            # The row itself came after the build.
            assert rows[0]["id"] == 1000
    assert hits(rows) == hits(exact(spark, "text 1000", 5))
    like = spark.sql("SELECT * FROM docs_similar(1000, 5, 2)")
    assert 1000 not in {row["id"] for row in like.collect()}
    assert files_read(spark.sql("SELECT * FROM docs_scores('x')")) == 0  # it has not run
    vector = ", ".join(str(value) for value in hash_vectors(["text 7"], DIM)[0].tolist())
    assert spark.sql(f"SELECT * FROM docs_search_vector(array({vector}), 1)").collect()[0]["id"] == 7


def test_k_rows_come_however_few_cells_were_measured_to_be_enough(spark: SparkSession, built: Path) -> None:
    install(spark, {"docs": str(ref_of(spark, built))})
    everything = spark.sql(f"SELECT * FROM docs_search('text 9', {ROWS})").collect()
    assert hits(everything) == hits(exact(spark, "text 9", ROWS))
    assert len(everything) == ROWS - 1
    assert spark.sql(f"SELECT * FROM docs_similar(9, {ROWS}, 1)").count() == ROWS - 2
    assert spark.sql("SELECT * FROM docs_search('text 9', 100, 1)").count() == 100


@pytest.mark.long
def test_rows_of_many_chunks_are_found_whole_and_do_not_make_others_slow(spark: SparkSession, tmp_path: Path) -> None:
    night(spark, tmp_path, range(60), chunk={"tokens": 1})
    ref = ref_of(spark, tmp_path)
    long = " ".join(f"word{n}" for n in range(40))
    rows = [{"id": n, "body": long if n == 0 else f"text {n}", "lang": "de"} for n in range(60)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    embed(spark, load_run(tmp_path / "run.yaml"))
    index(spark, str(ref), cells=4)
    served = install(spark, {"docs": str(ref)}).served["docs"].index
    assert served is not None
    assert served.longest == 40
    answer = spark.sql("SELECT * FROM docs_search('word7', 1, 1)")
    assert answer.collect()[0]["text"] == "word7"
    # One cell holds enough chunks for this; k rows might all be in the last.
    assert files_read(answer) <= 2
    assert len({row["id"] for row in spark.sql("SELECT * FROM docs_best('word7', 60, 1)").collect()}) == 60
    assert spark.sql("SELECT * FROM docs_similar(0, 59, 1)").count() == 59


@pytest.mark.long
def test_an_index_does_not_make_the_table_forget_what_it_has_seen_of_its_source(
    spark: SparkSession, tmp_path: Path
) -> None:
    source = str(tmp_path / "source")
    rows = spark.range(50).selectExpr("CAST(id AS INT) AS id", "concat('text ', id) AS body", "'de' AS lang")
    rows.write.format("delta").option("delta.enableChangeDataFeed", "true").save(source)
    reads = {"format": "delta", "path": source, "key": "id", "text": "body", "columns": ["lang"]}
    night(spark, tmp_path, [], source=reads)
    spark.sql(f"UPDATE delta.`{source}` SET body = body WHERE id = 1")
    assert night(spark, tmp_path, [], source=reads).status == "unchanged"
    index(spark, str(ref_of(spark, tmp_path)), cells=2)
    report = night(spark, tmp_path, [], source=reads)
    assert (report.status, report.difference) == ("unchanged", "feed from version 1 to 1")


@pytest.mark.long
def test_a_run_that_died_after_its_maintenance_is_written_down(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night(spark, tmp_path, range(30))
    ref = ref_of(spark, tmp_path)

    def die(step: str) -> None:
        if step == "try removed":
            raise KeyboardInterrupt

    asked = {"index": {"cells": 2, "min_chunks": 10}, "maintenance": "auto"}
    monkeypatch.setattr("shoal.jobs.maintenance._why_vacuum", lambda *_, **__: ["it is time"])
    with pytest.raises(KeyboardInterrupt):
        night(spark, tmp_path, range(40), hooks=Hooks(step=die), **asked)
    committed = table_of_ours(spark, str(ref)).ours
    assert committed is not None
    assert committed.state is not None
    assert committed.state.record["verb"] == "index"
    written = {run["run_id"] for run in Bookkeeper(spark, ref, print).records()}
    night_id = committed.state.run_id.removesuffix("-index")
    assert written & {night_id, f"{night_id}-index"} == {f"{night_id}-index"}
    assert night(spark, tmp_path, range(40)).status == "unchanged"
    records = {run["run_id"]: run for run in Bookkeeper(spark, ref, print).records()}
    assert records[night_id]["version"] == committed.version - 1


@pytest.mark.long
@pytest.mark.parametrize(("step", "is_done"), [("cells trained", False), ("cells written", False), ("committed", True)])
def test_a_build_that_was_killed_has_happened_or_has_not(
    spark: SparkSession, folder: Path, dying: Callable[..., None], step: str, is_done: bool
) -> None:
    ref = ref_of(spark, folder)
    rows, before = contents(spark, ref), table_of_ours(spark, str(ref)).index
    dying("index", str(ref), step)
    found = table_of_ours(spark, str(ref)).index
    assert before is not None
    assert found is not None
    assert (found.build != before.build) == is_done
    assert contents(spark, ref) == rows
    install(spark, {"docs": str(ref)})
    assert hits(spark.sql(f"SELECT * FROM docs_search('text 9', {ROWS})").collect()) == hits(
        exact(spark, "text 9", ROWS)
    )
    assert night(spark, folder, range(ROWS)).status == "unchanged"
    built = [run for run in Bookkeeper(spark, ref, print).records() if run["status"] == "indexed"]
    assert {run["index"]["build"] for run in built} == {before.build, found.build}
    assert len(built) == 1 + is_done
    assert audit(spark, str(ref)).is_clean


@pytest.mark.long
def test_a_fold_that_was_killed_is_written_down_and_the_next_goes_on(
    spark: SparkSession, folder: Path, dying: Callable[..., None]
) -> None:
    night(spark, folder, [*range(ROWS), 1000])
    ref = ref_of(spark, folder)
    rows = contents(spark, ref)
    dying("optimize", str(ref), "committed")
    assert FRESH not in cells_of(spark, ref).values()
    assert contents(spark, ref) == rows
    assert optimize(spark, str(ref))["optimize"]["folded"] == 0
    folded = [run for run in Bookkeeper(spark, ref, print).records() if run["status"] == "folded"]
    assert [run["fold"]["rows"] for run in folded] == [1]
    assert night(spark, folder, [*range(ROWS), 1000]).status == "unchanged"


@pytest.mark.long
def test_a_match_looks_in_cells_until_they_hold_enough_rows_that_match(
    spark: SparkSession, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_text, "MATCH_BYTES", 0)
    ref = ref_of(spark, folder)
    night(spark, folder, [*range(ROWS), 1000, 1001])
    install(spark, {"docs": str(ref)})

    def matched(match: str, k: int) -> tuple[list[Row], int]:
        answer = spark.sql(f"SELECT * FROM docs_match('text 1000', {match}, {k})")
        return answer.collect(), files_read(answer)

    in_order = [row for row in exact(spark, "text 1000", 2 * ROWS) if row["lang"] == "de"]
    few, files = matched("map('lang', 'de')", 1)
    assert hits(few) == hits(in_order[:1])
    # Some cells hold enough. The row without a cell does not match, which its file's statistics tell.
    assert files < CELLS + 1
    everything, files = matched("map('lang', 'de')", ROWS)
    assert hits(everything) == hits(in_order)
    assert files == CELLS + 1
    assert [row["id"] for row in matched("map('id', '8')", 3)[0]] == [8]
    assert matched("map('lang', 'fr')", 3)[0] == []
    monkeypatch.setattr(sql_text, "MATCH_BYTES", 2**40)
    install(spark, {"docs": str(ref)})
    assert hits(matched("map('lang', 'de')", 3)[0]) == hits(in_order[:3])
    for call in ("docs_match('x', NULL)", "docs_search(NULL, 3)", "docs_best('x', 0)", "docs_similar(NULL)"):
        with pytest.raises((PySparkException, Py4JJavaError), match="QUERY_INVALID"):
            spark.sql(f"SELECT count(*) FROM {call}").collect()


@pytest.mark.long
def test_a_batch_looks_at_all_cells_or_for_each_vector_in_the_nearest(
    spark: SparkSession, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_join, "BLOCK_NUMBERS", 64 * DIM)  # four blocks of either side
    ref = ref_of(spark, folder)
    night(spark, folder, [*range(ROWS), 1000, 1001])
    install(spark, {"docs": str(ref)})
    rows = spark.sql(f"SELECT id, cell, embedding FROM {ref.sql} WHERE embedding IS NOT NULL ORDER BY id").collect()
    ids, cells = np.array([row["id"] for row in rows]), np.array([row["cell"] for row in rows])
    vectors_ND = np.array([row["embedding"] for row in rows], dtype=np.float32)

    def joined(more: str) -> dict[int, list[int]]:
        queries = f"(SELECT collect_list(struct(id, embedding)) FROM {ref.sql} WHERE embedding IS NOT NULL)"
        found = spark.sql(f"SELECT * FROM docs_join({queries}, {more})").collect()
        ranked = sorted(found, key=lambda row: (-row["score"], row["id"]))
        return {int(n): [row["id"] for row in ranked if row["query_id"] == str(n)] for n in ids}

    def true(looked_in_NN: np.ndarray[Any, Any]) -> dict[int, list[int]]:
        scores_NN = (vectors_ND.astype(np.float64) @ vectors_ND.T.astype(np.float64)).astype(np.float32)
        order_NN = np.lexsort((np.tile(ids, (len(ids), 1)), -np.where(looked_in_NN, scores_NN, -np.inf)))
        return {
            int(n): ids[[place for place in order_N if looked_in_N[place]][:3]].tolist()
            for n, order_N, looked_in_N in zip(ids, order_NN, looked_in_NN, strict=True)
        }

    assert joined("3") == joined(f"3, probes => {CELLS}") == true(np.ones((len(ids), len(ids)), dtype=np.bool_))
    made = table_of_ours(spark, str(ref)).index
    centroids_CD = made and read_build(spark, ref, made.build)
    assert centroids_CD is not None
    nearest_N = (vectors_ND @ centroids_CD.T).argmax(axis=1)
    assert joined("3, probes => 1") == true((cells == FRESH) | (cells == nearest_N[:, None]))


def test_a_query_is_encoded_once_with_an_index_too(
    spark: SparkSession, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_text, "MATCH_BYTES", 0)
    functions = install(spark, {"docs": str(ref_of(spark, built))})
    counted, known = spark.sparkContext.accumulator(0), dict(_ENCODERS[spark])

    def embed_counted(names: pd.Series, texts: pd.Series) -> pd.Series:
        counted.add(len(texts))
        return next(embed_queries(iter([(names, texts)]), known))

    spark.udf.register(EMBED, F.pandas_udf("array<float>")(embed_counted))
    try:
        for form in ("docs_search('x', 3)", "docs_best('x', 3)", "docs_match('x', map('lang', 'de'), 3)"):
            before = counted.value
            spark.sql(f"SELECT * FROM {form}").collect()
            assert counted.value - before == 1, form
    finally:
        functions._serve(functions.served["docs"])


@pytest.mark.long
def test_a_restore_takes_table_and_index_back_together(spark: SparkSession, folder: Path) -> None:
    ref = ref_of(spark, folder)
    first = table_of_ours(spark, str(ref)).index
    index(spark, str(ref), cells=2)
    second = table_of_ours(spark, str(ref)).index
    assert first is not None
    assert second is not None
    assert (first.cells, second.cells) == (CELLS, 2)
    before = contents(spark, ref)
    restore(spark, str(ref), Wanted(to=1))
    assert table_of_ours(spark, str(ref)).index == first
    assert set(cells_of(spark, ref).values()) == {None, *range(CELLS)}
    restore(spark, str(ref), Wanted(to=0))
    assert table_of_ours(spark, str(ref)).index is None
    assert CELL not in ref.read(spark).columns
    assert contents(spark, ref) == before
    install(spark, {"docs": str(ref)})
    assert spark.sql("SELECT * FROM docs_search('text 9', 1)").collect()[0]["id"] == 9
    assert night(spark, folder, range(ROWS)).status == "unchanged"


@pytest.mark.long
def test_a_table_made_anew_keeps_its_cells_only_with_its_encoder(spark: SparkSession, folder: Path) -> None:
    ref = ref_of(spark, folder)
    first = table_of_ours(spark, str(ref)).index
    night(spark, folder, range(ROWS), refresh=True)
    assert table_of_ours(spark, str(ref)).index == first
    assert set(cells_of(spark, ref).values()) == {None, FRESH}
    assert optimize(spark, str(ref))["optimize"]["folded"] == ROWS - 1
    assert set(cells_of(spark, ref).values()) == {None, *range(CELLS)}
    night(spark, folder, range(ROWS), refresh=True, encoder={"model": "hash:16"})
    assert table_of_ours(spark, str(ref)).index is None
    assert CELL not in ref.read(spark).columns


@pytest.mark.long
def test_runs_build_and_fold_where_the_run_file_asks_for_it(spark: SparkSession, tmp_path: Path) -> None:
    asked = {"index": {"cells": 4, "min_chunks": 100}}
    assert night(spark, tmp_path, range(80), maintenance="auto", **asked).maintenance == {
        "index": None, "optimize": None, "vacuum": None
    }  # fmt: skip
    ref = ref_of(spark, tmp_path)
    night(spark, tmp_path, range(120), **asked)
    (found,) = status(spark, [str(ref)])
    assert found["maintenance"]["index"] == ["the run file asks for an index, and 120 chunks have none"]
    report = night(spark, tmp_path, range(120), maintenance="auto", **asked)
    assert report.status == "unchanged"
    assert report.maintenance is not None
    published = table_of_ours(spark, str(ref))
    assert report.maintenance["index"]["version"] == report.version == published.version
    assert published.index is not None
    # Twice the rows: more of them wait in the fresh cell than a search looks through otherwise.
    report = night(spark, tmp_path, range(240), maintenance="auto", **asked)
    assert report.maintenance is not None
    assert report.maintenance["optimize"]["folded"] == 120
    assert FRESH not in set(cells_of(spark, ref).values())
    report = night(spark, tmp_path, range(700), maintenance="auto", **asked)
    assert report.maintenance is not None
    assert report.maintenance["index"]["reasons"][0] == "699 chunks, 119 when the cells were made"
    assert audit(spark, str(ref)).is_clean


@pytest.mark.long
def test_what_was_purged_stays_gone_and_the_index_stays(spark: SparkSession, folder: Path) -> None:
    ref = ref_of(spark, folder)
    (folder / "keys.txt").write_text("7\n")
    purge(spark, str(ref), folder / "keys.txt")
    assert 7 not in cells_of(spark, ref)
    assert table_of_ours(spark, str(ref)).index is not None
    install(spark, {"docs": str(ref)})
    assert 7 not in {row["id"] for row in spark.sql(f"SELECT id FROM docs_search('text 7', {ROWS})").collect()}


@pytest.mark.long
def test_an_index_without_its_centroids_says_what_to_do(spark: SparkSession, folder: Path) -> None:
    ref = ref_of(spark, folder)
    night(spark, folder, range(ROWS + 1))
    spark.sql(f"DELETE FROM delta.`{ref.cells}`")
    said: list[str] = []
    assert optimize(spark, str(ref), say=said.append)["optimize"]["folded"] == 0
    assert "`shoal index` builds it anew" in " ".join(said)
    with pytest.raises(RefusedError) as caught:
        index_report(spark, str(ref))
    assert caught.value.code == "INDEX_DAMAGED"
    (finding,) = audit(spark, str(ref)).findings
    assert finding.code == "INDEX_DAMAGED"
    # Nothing is lost meanwhile: every vector is looked at.
    functions = install(spark, {"docs": str(ref)})
    assert "[INDEX_DAMAGED]" in str(functions.served["docs"].index_problem)
    assert hits(spark.sql("SELECT * FROM docs_search('text 9', 7)").collect()) == hits(exact(spark, "text 9", 7))
    report = night(spark, folder, range(ROWS + 1), maintenance="auto")
    assert report.maintenance is not None
    assert report.maintenance["index"]["reasons"] == ["its centroids are gone"]
    made = table_of_ours(spark, str(ref)).index
    assert made is not None
    assert (made.asked, made.cells) == (CELLS, CELLS)
    assert audit(spark, str(ref)).is_clean


@pytest.mark.long
def test_rows_in_cells_that_there_are_not_are_found(spark: SparkSession, folder: Path) -> None:
    ref = ref_of(spark, folder)
    spark.sql(f"UPDATE {ref.sql} SET cell = IF(id = 7, {FRESH}, 99) WHERE id IN (5, 6, 7)")
    found = {finding.code: finding for finding in audit(spark, str(ref)).findings}
    assert set(found) == {"FOREIGN_COMMITS", "INDEX_DAMAGED"}
    assert found["INDEX_DAMAGED"].count == 2
    with pytest.raises(RefusedError, match="not written by Shoal") as caught:
        index(spark, str(ref))
    assert caught.value.code == "FOREIGN_COMMITS"
    said: list[str] = []
    assert optimize(spark, str(ref), say=said.append)["optimize"]["folded"] == 0
    assert "others wrote to the table" in " ".join(said)


@pytest.mark.long
def test_the_report_tells_recall_files_and_time_by_the_cells_looked_in(
    spark: SparkSession, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = ref_of(spark, built)
    plot = tmp_path / "plots" / "recall.png"
    assert main(["index", str(ref), "--report", "--plot", str(plot), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["probes"] for point in found["points"]] == [1, 2, 3, 4, 6]
    assert [point["files"] for point in found["points"]] == [2, 3, 4, 5, 7]
    recalls = [point["recall"] for point in found["points"]]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "told"), [({"cells": 1}, "2 to 8192"), ({"recall": 0.0}, "above 0"), ({"recall": 1.5}, "up to 1")]
)
def test_settings_out_of_range_are_refused(spark: SparkSession, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        index(spark, "nowhere", **given)


def test_a_table_without_vectors_or_without_an_index_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    night(spark, tmp_path, [EMPTY], limits={"max_errors": "100%"})
    table = str(ref_of(spark, tmp_path))
    with pytest.raises(RefusedError, match="no row with a vector"):
        index(spark, table)
    with pytest.raises(RefusedError, match="has no index"):
        index_report(spark, table)
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        index_report(spark, table, plot=Path("recall.docx"))


def test_the_number_of_cells_grows_with_the_table() -> None:
    numbers = [number_of_cells(rows, 384) for rows in (10, 10**5, 10**6, 10**7, 10**9, 10**12)]
    assert numbers == [2, 36, 256, 256, 8192, 8192]
    assert number_of_cells(5 * 10**7, 768) == 1144


def test_a_build_that_lacks_a_cell_is_no_build(spark: SparkSession, folder: Path) -> None:
    ref = ref_of(spark, folder)
    made = table_of_ours(spark, str(ref)).index
    assert made is not None
    DeltaTable.forPath(spark, ref.cells).delete(F.col(CELL) == 2)
    assert read_build(spark, ref, made.build) is None
    assert read_build(spark, ref, "another") is None
