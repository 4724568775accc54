"""The quickstart as a stranger runs it: in a folder of its own, killed in the middle, started again, run once more."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.spark, pytest.mark.slow]

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
SHOAL = Path(sys.executable).with_name("shoal")


def shoal(folder: Path, *arguments: str) -> Any:
    done = subprocess.run([SHOAL, *arguments, "--json"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for_waves(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Returns when staging has so many commits beside the one that made it."""
    log = folder / "out/docs__shoal/staging/_delta_log"
    end = time.monotonic() + 600
    while len(list(log.glob("*.json"))) < count + 1:
        assert process.poll() is None, "the quickstart ended before it could be killed"
        assert time.monotonic() < end, "no wave was staged in ten minutes"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and result of a quickstart that was killed after two waves and started again."""
    folder = tmp_path_factory.mktemp("quickstart")
    process = subprocess.Popen([SHOAL, "quickstart"], cwd=folder, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_waves(folder, 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "out/docs").exists(), "readers saw a table before it was published"
    return folder, shoal(folder, "quickstart")


def test_a_killed_quickstart_encodes_only_what_is_missing(quickstart: tuple[Path, dict[str, Any]]) -> None:
    _, result = quickstart
    chunks = result["embed"]["chunks"]
    assert result["embed"]["status"] == "published"
    assert chunks["reused"] > 0
    assert chunks["encoded"] == chunks["distinct"] - chunks["reused"]
    assert chunks["embedded"] == chunks["planned"] > 5000
    assert chunks["errors"] == 0


def test_it_answers_its_questions(quickstart: tuple[Path, dict[str, Any]]) -> None:
    _, result = quickstart
    found = {question: [hit["id"] for hit in hits] for question, hits in result["search"].items()}
    assert len(found) == 3
    assert any("subprocess" in key for key in found["run a command and capture what it prints"])


def test_run_again_it_encodes_nothing_and_commits_nothing(quickstart: tuple[Path, dict[str, Any]]) -> None:
    folder, first = quickstart
    again = shoal(folder, "embed", "out/quickstart.yaml")
    assert again["status"] == "unchanged"
    assert again["chunks"]["encoded"] == 0
    assert again["version"] == first["embed"]["version"]
    assert again["mlflow_run"]


def test_the_notebook_walks_through_its_table(quickstart: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = quickstart
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs
