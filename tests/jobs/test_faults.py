"""Short parts of `make faults`: the harness in tests/jobs/faults on a cluster, with a few kills and hurts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.long]

HARNESS = Path(__file__).parent / "faults" / "run_faults.py"
NUM_KILLS = 4
HURTS = {
    "vacuum": ("source vacuumed mid-read", 2),
    "staging": ("corrupted staging file", 2),
    "canary": ("wrong vectors (canary)", 1),
}


def test_what_is_published_stays_complete_and_the_next_run_makes_everything_good(tmp_path: Path) -> None:
    asked = ["--kills", str(NUM_KILLS), "--real", "0", "--hurts", ",".join(HURTS)]
    command = [sys.executable, HARNESS, *asked, "--json"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=800, check=False)

    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    kills = {fault: tally for fault, tally in found["faults"].items() if "killed" in fault}
    hurts = {fault: tally["count"] for fault, tally in found["faults"].items() if "killed" not in fault}
    assert found["problems"] == []
    assert sum(tally["count"] for tally in kills.values()) == NUM_KILLS
    assert hurts == dict(HURTS.values())
    for tally in found["faults"].values():
        assert tally["recovered"] == tally["count"]
        assert (tally["lost"], tally["doubled"]) == (0, 0)
