"""A plan and the run after it see the same; a plan leaves no trace."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import EncoderChangedError
from shoal.conf.loader import load_run
from shoal.jobs.embed import embed
from shoal.jobs.plan import lines, plan

pytestmark = [pytest.mark.spark, pytest.mark.slow]


def test_a_plan_of_a_night_says_what_the_run_then_does_and_writes_nothing(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"id": f"r{i}", "body": f"{i} one two three four five"} for i in range(6)]
    write_rows(rows)
    run = run_file(chunk={"tokens": 3}, limits={"max_deleted": "100%"}, encode={"price_per_hour": 7.2})
    embed(spark, load_run(run))
    rows[0]["body"] = "one two three"
    rows[1]["body"] = "nine eight seven six"
    write_rows([*rows[:4], {"id": "new", "body": " "}])
    config = load_run(run)
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}

    planned = plan(spark, config)

    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before
    with pytest.raises(EncoderChangedError, match="dim: 8 -> 16"):
        plan(spark, load_run(run, ["encoder.model=hash:16"]))
    refreshed = plan(spark, load_run(run, ["encoder.model=hash:16"]), full_refresh=True)
    assert refreshed["publish"] == "write the table anew: full refresh asked for"
    assert refreshed["chunks"]["reused"] == 0
    ran = embed(spark, config).record()
    assert planned["publish"] == "one MERGE"
    assert planned["rows"] == ran["rows"]
    assert (planned["rows"]["changed"], planned["rows"]["new"], planned["rows"]["deleted"]) == (2, 1, 2)
    assert planned["chunks"]["planned"] == ran["chunks"]["planned"]
    assert planned["chunks"]["distinct"] == ran["chunks"]["distinct"]
    assert planned["chunks"]["reused"] == ran["chunks"]["reused"]
    assert planned["chunks"]["encoded"] == ran["chunks"]["encoded"] > 0
    assert planned["errors"] == ran["errors"] == {"blank_text": 1}
    assert planned["tokens"] == ran["tokens"] > 0
    assert planned["fingerprint"] == ran["fingerprint"]
    assert planned["estimate"]["price"] == pytest.approx(planned["estimate"]["seconds"] * 0.002)
    told = "\n".join(lines(planned))
    assert "1 new, 2 changed" in told
    assert ", price 0." in told
    reads = planned["reads"]
    assert 0 < reads["merge_files"] <= reads["table_files"]
    assert reads["merge_bytes"] > reads["source_bytes"] == (tmp_path / "corpus.jsonl").stat().st_size
    assert f"{reads['merge_files']} of {reads['table_files']} files of the table to publish" in told
    json.dumps(planned)

    after = plan(spark, config)
    assert after["chunks"]["encoded"] == after["tokens"] == 0
    assert after["estimate"] == {"seconds": 0.0, "price": 0.0}
    assert (after["reads"]["merge_files"], after["reads"]["merge_bytes"]) == (0, 0)


def test_texts_longer_than_the_encoder_sees_are_a_warning_in_plan_and_run(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path]
) -> None:
    write_rows([{"id": f"r{i}", "body": f"{i} one two three four five"} for i in range(4)])
    config = load_run(run_file(encoder={"model": "hash:8", "max_tokens": 4}))

    planned = plan(spark, config)
    ran = embed(spark, config).record()

    (warning,) = planned["warnings"]
    assert warning.startswith("about 100% of the texts are longer than the 4 tokens that hash:8 sees")
    assert ran["warnings"] == [warning]
    assert ran["chunks"]["truncated"] == 4
    assert planned["tokens"] == ran["tokens"] == 16
    chunked = plan(spark, load_run(config.folder / "run.yaml", ["chunk.tokens=4"]))
    assert chunked["warnings"] == []
