"""The bench of search on a small table: what it says was found is true, and every form is measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.conf.errors import ConfigError
from shoal.jobs.bench_search import bench_search, lines

pytestmark = [pytest.mark.spark, pytest.mark.slow]


@pytest.mark.long
def test_every_form_is_measured_and_finds_what_it_says(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "shoal.jobs.cli",
        "bench",
        "search",
        "--rows",
        "20000",
        "--dim",
        "64",
        "--nights",
        "2",
        "--queries",
        "4",
    ]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    forms = {form["form"]: form for form in found["forms"]}
    assert list(forms) == [
        "ORDER BY .. LIMIT", "NEAREST BY", "exact", "index", "index, all cells", "FAISS flat"
    ]  # fmt: skip
    for name in ("ORDER BY .. LIMIT", "exact", "index, all cells", "FAISS flat"):
        assert forms[name]["recall"] == 1, name
    assert 0.8 < forms["index"]["recall"] <= 1
    assert all(form["seconds"] > 0 for form in forms.values())
    every, some = found["batches"]
    assert (every["recall"], every["vectors"]) == (1, 1000)
    assert 0.8 < some["recall"] <= 1
    assert found["join"]["seconds"] > 0
    assert 0.8 < found["join"]["recall"] <= 1
    assert {form["column"] for form in found["filters"]} == {
        f"{kind}{share}" for kind in "uc" for share in (500, 100, 10, 1)
    }
    assert all(form["recall"] > 0.8 for form in found["filters"])
    after = {form["form"]: form for form in found["after_nights"]}
    assert after["index, all cells"]["recall"] == 1
    assert after["index"]["recall"] > 0.8
    found["index"]["probes"] = {int(k): number for k, number in found["index"]["probes"].items()}
    assert any("FAISS" in line for line in lines(found))


@pytest.mark.parametrize(
    ("rows", "dim", "nights", "queries"), [(100, 8, 0, 1), (10_000, 0, 0, 1), (10_000, 8, -1, 1), (10_000, 8, 0, 0)]
)
def test_sizes_that_tell_nothing_are_refused(rows: int, dim: int, nights: int, queries: int) -> None:
    with pytest.raises(ConfigError):
        bench_search(rows, dim, nights, num_queries=queries, say=lambda _: None)
