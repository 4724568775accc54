"""The bench of the join on small tables: what it says of pairs is true, and nothing large comes to the driver."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.conf.errors import ConfigError
from shoal.jobs.bench_join import bench_join, lines

pytestmark = [pytest.mark.spark, pytest.mark.slow]

ROWS = 12_000

# Both sides are 18 MB, beyond what counts as small, and the driver may take 1 MB: results, broadcasts and all.
CAPPED = f"""
import json, sys
from shoal.conf.run import SparkConfig
from shoal.jobs import bench_join

conf = {{"spark.driver.maxResultSize": "1m", "spark.sql.shuffle.partitions": "4"}}
settings = SparkConfig(master="local[2]", driver_memory="640m", conf=conf)
print(json.dumps(bench_join.bench_join({ROWS}, {ROWS}, 384, say=lambda _: None, settings=settings)))
"""


@pytest.mark.long
def test_the_join_finds_all_true_neighbours_and_collects_neither_side(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CAPPED], cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
    )

    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["join"]["recall"] == 1
    assert found["join"]["shuffle_bytes"] > 2 * ROWS * 384 * 4
    assert 30_000_000 < found["join"]["worker_peak_bytes"] < 1_000_000_000
    reference = found["reference"]
    assert (reference["left"], reference["right"]) == (100, ROWS)
    for side, seconds in (("join", reference["join_warm_seconds"]), ("nearest_by", reference["nearest_by_seconds"])):
        assert reference[f"{side}_pairs_per_second"] == pytest.approx(100 * ROWS / seconds, rel=0.01)
    assert any("NEAREST BY" in line for line in lines(found))


def test_sizes_below_1_are_refused() -> None:
    with pytest.raises(ConfigError, match="--dim is 0"):
        bench_join(1, 1, 0, say=lambda _: None)
