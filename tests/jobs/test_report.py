"""The summary of a run, from the settings and counts alone."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.conf.loader import load_run
from shoal.jobs.planner import RowCounts
from shoal.jobs.reconcile import Account
from shoal.jobs.report import PHASES, Report, git_revision, source_name


def test_a_record_is_plain_json_at_any_time_and_keeps_secrets(
    run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_TEST_PLACE", "hidden-bucket")
    source = {"format": "json", "path": "s3a://${SHOAL_TEST_PLACE}/docs", "key": "id", "text": "body"}
    tracking = {"tags": {"api_token": "hush"}}
    config = load_run(run_file(source=source, tracking=tracking))
    report = Report(config, "run-1", "/data/docs")

    told = json.dumps(report.record())

    assert "hidden-bucket" not in told
    assert "hush" not in told
    assert source_name(config) == "***"
    assert report.record()["status"] == "failed", "a run that says nothing else has failed"


def test_the_public_document_leaves_out_what_only_bookkeeping_needs(run_file: Callable[..., Path]) -> None:
    public = Report(load_run(run_file()), "run-1", "/data/docs").public()

    assert public.keys().isdisjoint({"config", "progress", "started_ms", "git_revision"})
    assert public["chunks"].keys() == {"planned", "distinct", "reused", "encoded", "embedded", "errors", "truncated"}
    assert public["rows"].keys() >= {"source", "new", "changed", "metadata_only", "deleted", "unchanged"}
    assert public["seconds"].keys() >= {"total", *PHASES}


def test_the_summary_says_what_was_done(run_file: Callable[..., Path]) -> None:
    report = Report(load_run(run_file()), "run-1", "/data/docs")
    report.status, report.version = "published", 3
    report.rows = RowCounts(source=1200, new=1200)
    report.planned = report.distinct = report.num_todo = 1200
    report.account = Account(1200, 1198, 5, 1198, 24_000, {"blank_text": 2})
    report.seconds["encode"] = 2.0

    told = report.lines()

    assert told[0] == "published /data/docs version 3"
    assert "rows      1,200: 1,200 new, 0 changed" in told[1]
    assert told[2] == "chunks    1,200: 1,198 encoded, 0 reused, 2 errors, 5 truncated"
    assert told[3] == "encoding  24,000 tokens in 2.0 s: 599 chunks/s, 12,000 tokens/s"
    assert "errors    blank_text: 2" in told
    report.status = "unchanged"
    assert report.lines() == ["nothing to do: 1,200 rows unchanged in /data/docs (version 3)"]


def test_time_counts_for_its_phase_even_when_the_phase_fails(run_file: Callable[..., Path]) -> None:
    report = Report(load_run(run_file()), "run-1", "/data/docs")

    with pytest.raises(ValueError, match="stop"), report.phase("encode"):
        raise ValueError("stop")

    assert report.seconds["encode"] > 0
    assert report.seconds["audit"] == 0


def test_the_git_revision_is_that_of_the_run_files_folder(tmp_path: Path) -> None:
    def git(*argv: str) -> str:
        settings = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *settings, *argv], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert git_revision(tmp_path) is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
