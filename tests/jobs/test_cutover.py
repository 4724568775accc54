"""A cut-over on somebody's word: refused while vectors are missing, one commit when they are there, safe to repeat."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, RefusedError
from shoal.conf.loader import load_run
from shoal.jobs.bookkeeping import Bookkeeper
from shoal.jobs.cli import main
from shoal.jobs.cutover import cutover
from shoal.jobs.embed import embed
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.operation import operating

pytestmark = [pytest.mark.spark, pytest.mark.slow]


def shown(spark: SparkSession, ref: TableRef) -> tuple[list[str], set[int]]:
    """The commits, oldest first, and the widths of the published vectors."""
    history = spark.sql(f"DESCRIBE HISTORY {ref.sql}").orderBy("version").collect()
    return [row["operation"] for row in history], {len(row["embedding"]) for row in ref.read(spark).collect()}


REPLACE = "CREATE OR REPLACE TABLE AS SELECT"


@pytest.mark.long
def test_a_manual_cut_over_waits_for_its_word_and_a_restore_is_not_undone_by_a_night(
    spark: SparkSession,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows([{"id": f"r{index}", "body": f"text {index}"} for index in range(6)])
    coming = {"next_encoder": {"model": "hash:16"}}
    config = load_run(run_file(**coming, migration={"budget": {"chunks": 4}, "cutover": "manual"}))
    ref = table_of(spark, config.destination)
    with pytest.raises(ConfigError, match="next_encoder is not set, so there is nothing to cut over to"):
        cutover(spark, load_run(run_file(name="old.yaml")))
    assert embed(spark, config).record()["migration"]["missing"] == 2

    with pytest.raises(RefusedError, match="hash:16: 2 of 6 contents have no vector of it yet; the table keeps"):
        cutover(spark, config)

    ready = embed(spark, config).record()
    assert (ready["migration"]["state"], ready["migration"]["encoded"]) == ("ready", 2)
    assert "`shoal cutover FILE` switches" in ready["migration"]["reason"]
    assert shown(spark, ref) == ([REPLACE], {8})
    capsys.readouterr()

    assert main(["cutover", str(config.folder / "run.yaml"), "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert (told["status"], told["version"], told["generation"], told["encoder"]) == ("published", 1, 2, "hash:16")
    assert shown(spark, ref) == ([REPLACE, REPLACE], {16})
    assert cutover(spark, config)["status"] == "unchanged"
    assert shown(spark, ref) == ([REPLACE, REPLACE], {16})
    runs = Bookkeeper(spark, ref, lambda _: None).records()
    assert [run["status"] for run in runs] == ["published", "unchanged", "refused", "published"]
    assert [run["verb"] for run in runs] == ["cutover", "embed", "cutover", "embed"]

    with operating(spark, str(ref), "restore") as operation:
        operation.commit(f"RESTORE TABLE {ref.sql} TO VERSION AS OF 0", "restored", runs[-1])
    held = embed(spark, load_run(run_file(**coming))).record()
    assert (held["migration"]["state"], held["migration"]["encoded"]) == ("ready", 0)
    assert "restored after a cut-over" in held["migration"]["reason"]
    assert shown(spark, ref)[1] == {8}
    assert cutover(spark, config)["status"] == "published"
    assert shown(spark, ref)[1] == {16}


@pytest.mark.long
def test_a_cut_over_takes_the_source_as_the_table_shows_it(
    spark: SparkSession, run_file: Callable[..., Path], tmp_path: Path
) -> None:
    place = str(tmp_path / "corpus")
    rows = spark.createDataFrame([("a", "one fish"), ("b", "two fish")], "id string, body string")
    rows.write.format("delta").save(place)
    source = {"format": "delta", "path": place, "key": "id", "text": "body"}
    coming = {"next_encoder": {"model": "hash:16"}, "migration": {"cutover": "manual"}}
    config = load_run(run_file(source=source, **coming))
    ref = table_of(spark, config.destination)
    embed(spark, config)
    rows.selectExpr("concat(id, '2') AS id", "'red ' || body AS body").write.format("delta").mode("append").save(place)

    done = cutover(spark, config)

    assert (done["status"], done["source_version"], done["rows"]["source"]) == ("published", 0, 2)
    assert shown(spark, ref)[1] == {16}
    following = embed(spark, config).record()
    assert (following["source_version"], following["rows"]["new"], following["chunks"]["encoded"]) == (1, 2, 2)
    assert ref.read(spark).count() == 4
