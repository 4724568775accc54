"""What the driver holds: a corpus whose hashes alone are several times what it may collect goes through it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.conf.errors import ConfigError
from shoal.jobs.bench_scale import bench_scale

pytestmark = [pytest.mark.spark, pytest.mark.slow]

NUM_ROWS = 150_000

# Every result of a job, broadcast tables too, comes to the driver under this limit; 150,000 hashes are 2.4 MB. A
# process of its own, because the heap of a running JVM cannot be made smaller.
CAPPED = f"""
import json, sys
from shoal.conf.run import SparkConfig
from shoal.jobs import bench_scale

conf = {{
    "spark.driver.maxResultSize": "1m",
    "spark.sql.autoBroadcastJoinThreshold": "256k",
    "spark.sql.shuffle.partitions": "4",
}}
settings = SparkConfig(master="local[2]", driver_memory="640m", conf=conf)
print(json.dumps(bench_scale.bench_scale({NUM_ROWS}, say=lambda line: print(line, file=sys.stderr), settings=settings)))
"""


@pytest.mark.long
def test_nothing_that_grows_with_the_corpus_is_collected_on_the_driver(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CAPPED], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )

    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    first, snapshot, feed = found["runs"].values()
    assert found["heap_limit"] < 700_000_000
    assert (first["status"], first["encoded"]) == ("published", NUM_ROWS)
    for night in (snapshot, feed):
        assert night["status"] == "published"
        assert 0.005 * NUM_ROWS < night["encoded"] < 0.02 * NUM_ROWS
    assert (snapshot["difference"].split()[0], feed["difference"].split()[0]) == ("snapshot:", "feed")
    assert set(first["phases"]) == {"start", "plan", "encode", "audit", "publish", "record"}
    assert feed["phases"]["plan"]["shuffle_bytes"] < snapshot["phases"]["plan"]["shuffle_bytes"]


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--rows is 10; .* ask for 1000 or more"):
        bench_scale(10, say=lambda _: None)
