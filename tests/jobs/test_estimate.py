"""Tokens, time and price of what a plan would encode."""

from dataclasses import replace

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.conf.redact import scrub
from shoal.conf.run import EncoderConfig
from shoal.jobs.estimate import MANY_TRUNCATED, SAMPLE, Estimate, count_tokens, estimate, warn_chunks, warn_truncated
from shoal.udfs.hash_encoder import describe_hash

SPEC = describe_hash(EncoderConfig(model="hash:8", max_tokens=4))


def test_tokens_are_counted_as_the_encoder_sees_them() -> None:
    prompted = describe_hash(EncoderConfig(model="hash:8", max_tokens=4, document_prompt="say: "))

    assert count_tokens(SPEC, ["one two", "", "one two three four five"]) == (6, 1)
    assert count_tokens(prompted, ["one two", "", "one two three four five"]) == (8, 1)


@pytest.mark.spark
def test_a_large_plan_is_counted_on_a_sample_and_a_small_one_exactly(spark: SparkSession) -> None:
    size = 3 * SAMPLE
    todo = spark.range(size).select(
        F.unhex(F.sha2(F.col("id").cast("string"), 256)).alias("content_hash"),
        F.when(F.col("id") % 2 == 0, "one two").otherwise("one two three four five").alias("text"),
    )

    large = estimate(todo, size, SPEC, rate=100.0, price_per_hour=36.0)
    small = estimate(todo.where("text = 'one two'").limit(10), 10, SPEC, rate=None, price_per_hour=36.0)

    assert large.tokens == pytest.approx(3 * size, rel=0.1)
    assert large.truncated_share == pytest.approx(0.5, abs=0.1)
    assert large.seconds == large.tokens / 100
    assert large.price == pytest.approx(large.tokens / 100 * 0.01)
    assert small == Estimate(tokens=20, truncated_share=0.0, seconds=None, price=None)


def test_nothing_to_encode_costs_nothing_and_has_a_price_only_where_one_is_known() -> None:
    assert estimate(None, 0, SPEC, rate=None, price_per_hour=2.0) == Estimate(0, 0.0, 0.0, 0.0)
    assert estimate(None, 0, SPEC, rate=None, price_per_hour=None) == Estimate(0, 0.0, 0.0, None)


def test_many_texts_beyond_the_encoder_are_a_warning_unless_the_run_chunks() -> None:
    many = Estimate(10, MANY_TRUNCATED + 0.15, None, None)
    few = Estimate(10, MANY_TRUNCATED, None, None)

    told = warn_truncated(SPEC, many)
    assert told is not None
    assert told.startswith("about 20% of the texts are longer than the 4 tokens that hash:8 sees")
    assert told.endswith("set chunk.tokens to 2 and chunk.overlap to 0")
    assert scrub(told, pairs=True) == told, "what a run says is masked, and this is no secret"
    assert warn_truncated(SPEC, few) is None


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 32, 512])
def test_the_chunk_setting_that_a_warning_suggests_is_one_that_is_accepted(max_tokens: int) -> None:
    import re

    from shoal.conf.run import ChunkConfig

    spec = describe_hash(EncoderConfig(model="hash:8", max_tokens=max_tokens))
    told = warn_truncated(spec, Estimate(10, 1.0, None, None)) or ""
    found = re.search(r"chunk\.tokens to (\d+) and chunk\.overlap to (\d+)$", told)

    assert found
    chunk = ChunkConfig(tokens=int(found[1]), overlap=int(found[2]))
    assert chunk.tokens <= max_tokens


def test_chunks_that_the_encoder_would_cut_are_warned_of_and_others_not() -> None:
    spec = replace(SPEC, max_tokens=16, document_prompt="two words ")
    told = warn_chunks(spec, 16) or ""
    assert "chunk.tokens is 16" in told
    assert told.endswith("set chunk.tokens to 14 or less")
    assert warn_chunks(spec, 14) is None
