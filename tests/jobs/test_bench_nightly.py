"""The nightly bench on a small table: what it says of files and rows is true; of its times nothing is asserted."""

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.jobs import bench_nightly
from shoal.jobs.synthetic_source import Change

pytestmark = [pytest.mark.spark, pytest.mark.slow]

FIGURES = {
    "seconds", "bytes_read", "bytes_written", "shuffle_bytes", "heap_held", "table_bytes_added", "table_bytes",
    "files_before", "files_after", "deleted_rows", "status", "difference", "rows", "encoded",
}  # fmt: skip


@pytest.mark.long
def test_nights_are_measured_by_what_they_changed(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    nights = (
        (Change("none"), "auto"),
        (Change("recent", 0.1), "auto"),
        (Change("metadata", 0.01), "auto"),
        (Change("recent", 0.1), "snapshot"),
    )
    monkeypatch.setattr(bench_nightly, "NIGHTS", nights)

    found = bench_nightly.bench_nightly(2000, 1, say=lambda _: None)

    full, (none, feed, labels, snapshot) = found["full"], found["changes"]
    assert all(set(night) >= FIGURES for night in (full, none, feed, labels, snapshot))
    assert (full["encoded"], full["files_before"], full["rows"]["new"]) == (2000, 0, 2000)
    assert full["table_bytes_added"] > full["table_bytes"] > 2000 * 384 * 4
    assert (none["status"], none["encoded"], none["table_bytes_added"]) == ("unchanged", 0, 0)
    for night in (feed, snapshot):
        assert (night["rows"]["changed"], night["rows"]["new"], night["rows"]["deleted"]) == (160, 20, 20)
        assert night["encoded"] == 180
        assert 180 * 384 * 4 < night["table_bytes_added"] < full["table_bytes_added"] / 2
        assert night["deleted_rows"] == 180
    assert (feed["difference"].split()[0], snapshot["difference"].split()[0]) == ("feed", "snapshot:")
    assert labels["encoded"] == 0
    assert labels["rows"]["metadata_only"] > 0
    assert {mode: [night["status"] for night in nights] for mode, nights in found["nights"].items()} == {
        "manual": ["published"],
        "auto": ["published"],
    }
    told = bench_nightly.lines(found)
    assert len(told) == 2 + 1 + 4 + 2
    assert spark.range(1).count() == 1, "the session that was there before is still there"


def test_a_table_too_small_to_change_by_a_thousandth_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--chunks is 999; .* ask for 1000 or more"):
        bench_nightly.bench_nightly(999, 0, say=lambda _: None)
