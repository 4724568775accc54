"""The quickstart as a stranger runs it: in a folder of its own, run again, killed in the middle and started again."""

import json
import os
import re
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

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
README = Path(__file__).parents[2] / "README.md"
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
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a quickstart, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    env = os.environ | {"SPARK_SUBMIT_OPTS": ""}
    done = subprocess.run([SHOAL, "quickstart"], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def labels(printed: str) -> list[str]:
    """Questions as they are, of other lines the first word, neighbours left out."""
    lines = [line for line in printed.splitlines() if line and not line.startswith("  ")]
    return [line if line.startswith("?") else line.split()[0] for line in lines]


def require_whole(folder: Path) -> dict[str, int]:
    """Every chunk of the corpus is published with its vector, in one run; its chunks."""
    (run,) = shoal(folder, "history", "out/docs")["entries"]
    chunks = run["chunks"]
    assert run["status"] == "published"
    assert chunks["encoded"] == chunks["distinct"] - chunks["reused"]
    assert chunks["embedded"] == chunks["planned"] > 4000
    assert chunks["errors"] == 0
    return chunks


def test_every_docstring_gets_its_vector(quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    assert require_whole(folder)["reused"] == 0


@pytest.mark.long
def test_a_killed_quickstart_encodes_only_what_is_missing(tmp_path: Path) -> None:
    process = subprocess.Popen([SHOAL, "quickstart"], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_waves(tmp_path, 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/docs").exists(), "readers saw a table before it was published"
    done = subprocess.run([SHOAL, "quickstart"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert require_whole(tmp_path)["reused"] > 0


def test_it_prints_what_the_readme_shows_and_answers_its_questions(quickstart: tuple[Path, str]) -> None:
    folder, printed = quickstart
    shown = re.search(r"<!-- output: quickstart, example -->\n```text\n(.*?)```", README.read_text(), flags=re.S)
    assert shown is not None
    assert labels(printed) == labels(shown[1])
    answers = json.loads((folder / "out/answers.json").read_text())["answers"]
    assert [len(hits) for hits in answers.values()] == [3, 3, 3]
    assert any("subprocess" in hit["id"] for hit in answers["run a command and capture what it prints"])


@pytest.mark.long
def test_run_again_it_encodes_nothing_commits_nothing_and_answers_from_memory(quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    answers = folder / "out/answers.json"
    kept = json.loads(answers.read_text())
    kept["answers"]["read a file line by line"] = []
    answers.write_text(json.dumps(kept))

    again = shoal(folder, "quickstart")

    assert again["embed"]["status"] == "unchanged"
    assert again["embed"]["chunks"]["encoded"] == 0
    assert again["embed"]["version"] == kept["version"]
    assert again["embed"]["mlflow_run"]
    assert again["search"] == kept["answers"], "the model was loaded to ask again"


@pytest.mark.long
@pytest.mark.parametrize("name", ["quickstart", "search"])
def test_the_notebooks_walk_through_its_table(quickstart: tuple[Path, str], name: str) -> None:
    folder, _ = quickstart
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs
