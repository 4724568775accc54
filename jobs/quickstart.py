"""`shoal quickstart`: the main job on a corpus that every machine has, the docstrings of Python's standard library."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.conf.run import RunConfig
from shoal.jobs.embed import Hooks, embed
from shoal.jobs.report import Report
from shoal.jobs.search import search
from shoal.jobs.stdlib_corpus import write_corpus

RUN_FILE = Path(__file__).parent.parent / "conf" / "quickstart.yaml"

QUESTIONS = (
    "read a file line by line",
    "run a command and capture what it prints",
    "wait until several threads have finished",
)


@dataclass(frozen=True)
class Answered:
    """The run's report, and for each question its nearest docstrings."""

    report: Report
    answers: dict[str, list[dict[str, Any]]]


def prepare(folder: Path, *, say: Callable[[str], None]) -> RunConfig:
    """Writes the corpus into `folder`, and a copy of the run file unless one is there to be edited; loads that copy."""
    folder.mkdir(parents=True, exist_ok=True)
    num_rows = write_corpus(folder / "stdlib.jsonl")
    say(f"corpus: {num_rows:,} docstrings of the standard library in {folder / 'stdlib.jsonl'}")
    run_file = folder / "quickstart.yaml"
    wanted = RUN_FILE.read_text()
    if not run_file.exists():
        run_file.write_text(wanted)
    return load_run(run_file)


def quickstart(spark: SparkSession, config: RunConfig, hooks: Hooks) -> Answered:
    """Embeds the corpus and asks the three questions; of a version that was asked before the answers are kept."""
    report = embed(spark, config, hooks=hooks)
    kept = config.folder / "answers.json"
    if kept.exists():
        asked = json.loads(kept.read_text())
        if (asked["table"], asked["version"]) == (report.table, report.version):
            return Answered(report, asked["answers"])
    found = search(spark, report.table, list(QUESTIONS), 3)
    answers = dict(zip(QUESTIONS, found, strict=True))
    kept.write_text(json.dumps({"table": report.table, "version": report.version, "answers": answers}, indent=2))
    return Answered(report, answers)
