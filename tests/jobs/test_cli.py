"""The command in this process: exit codes, and stdout that is one JSON document whatever happens."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from shoal.jobs.cli import main
from shoal.jobs.filesystem import FileSystem
from shoal.jobs.lease import held

CONTRACT = {
    "status", "table", "version", "generation", "run_id", "mlflow_run", "fingerprint", "source_version", "rows",
    "chunks", "errors", "tokens", "seconds", "bytes_written", "error", "difference",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_sigterm() -> Iterator[None]:
    """The command takes SIGTERM over; the test run gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def shoal(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """Runs one command line with --json: exit code, the document on stdout, what stood on stderr."""

    def run(*argv: object) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = main([*map(str, argv), "--json"])
        told = capsys.readouterr()
        return code, json.loads(told.out), told.err

    return run


def test_help_has_a_line_for_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])

    assert caught.value.code == 0
    told = capsys.readouterr().out
    verbs = (
        "embed", "plan", "cutover", "search", "history", "status", "errors", "audit", "restore", "optimize", "vacuum",
        "purge", "config",
    )  # fmt: skip
    for verb in verbs:
        assert any(line.split()[:1] == [verb] and len(line.split()) > 3 for line in told.splitlines()), verb


@pytest.mark.parametrize(
    "argv", [[], ["embed"], ["embed", "run.yaml", "--polling"], ["swim"], ["search", "t", "q", "-k", "x"]]
)
def test_a_line_that_cannot_be_parsed_is_a_usage_error(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)

    assert caught.value.code == 2


def test_config_check_needs_no_spark_and_names_what_is_wrong(
    run_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_file()

    assert main(["config", "check", str(run)]) == 0
    assert "valid run 'docs'" in capsys.readouterr().out
    assert main(["config", "check", str(run), "--set", "encoder.poolng=mean"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "encoder.poolng" in told.err
    assert "Traceback" not in told.err
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"].keys() >= {"source", "encoder", "destination"}


@pytest.mark.long
@pytest.mark.spark
@pytest.mark.slow
def test_a_tables_whole_life_by_the_command(
    spark: SparkSession,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    tmp_path: Path,
    shoal: Callable[..., tuple[int, Any, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"id": f"r{i}", "body": f"text {i}"} for i in range(4)] + [{"id": "void", "body": None}]
    write_rows(rows)
    run, table = run_file(limits={"max_deleted": 1}), tmp_path / "out/docs"

    before = sorted(tmp_path.rglob("*"))
    code, planned, _ = shoal("plan", run, "--set", "encode.price_per_hour=3.6")
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before, "a plan writes nothing"
    assert planned["estimate"]["seconds"] > 0
    assert planned["estimate"]["price"] == pytest.approx(planned["estimate"]["seconds"] / 1000)

    code, tried, _ = shoal("embed", run, "--limit", 2)
    assert (code, tried["status"], tried["rows"]["source"]) == (0, "published", 2)
    assert not table.exists()
    assert tried["table"] != str(table)

    code, first, told = shoal("embed", run)
    assert (code, first["status"], first["table"]) == (0, "published", str(table))
    assert first.keys() >= CONTRACT
    assert first["seconds"].keys() >= {"total", "start", "plan", "encode", "audit", "publish"}
    assert first["bytes_written"] > 0
    assert "rows: 5 new" in told
    assert planned["rows"] == first["rows"]
    assert planned["tokens"] == first["tokens"] == 8
    assert planned["chunks"]["encoded"] == first["chunks"]["encoded"] == 4
    assert planned["errors"] == first["errors"] == {"null_text": 1}

    code, second, _ = shoal("embed", run)
    assert (code, second["status"], second["version"]) == (0, "unchanged", first["version"])

    code, hits, _ = shoal("search", table, "text 2", "-k", 2, "--where", "id <> 'r1'")
    assert code == 0
    assert hits[0] == {"id": "r2", "chunk_index": 0, "text": "text 2", "score": 1.0}
    assert len(hits) == 2

    code, failed, _ = shoal("errors", table)
    assert code == 0
    assert failed == [
        {
            "reason": "null_text", "count": 1, "permanent": True,
            "samples": [{"id": "void", "chunk_index": 0, "text": None}],
        }
    ]  # fmt: skip

    # A trial on few rows is no deletion of the rest; the real run on them is, and is refused.
    write_rows(rows[:1])
    code, tried, _ = shoal("embed", run, "--limit", 1)
    assert (code, tried["status"]) == (0, "published")
    code, refused, told = shoal("embed", run)
    assert (code, refused["status"], refused["rows"]["deleted"]) == (3, "refused", 4)
    assert "limits.max_deleted is 1 and 4 of the 5 published rows" in refused["error"]
    assert refused["error"] in " ".join(told.split())

    code, changed, _ = shoal("embed", run, "--set", "encoder.model=hash:16")
    assert (code, changed["status"]) == (3, "refused")
    assert "dim: 8 -> 16" in changed["error"]

    code, told_history, _ = shoal("history", table)
    assert code == 0
    entries = told_history["entries"]
    assert [(month["runs"], month["encoded"]) for month in told_history["months"]] == [(4, 4)]
    assert [(entry["status"], entry["version"]) for entry in entries] == [
        ("refused", None), ("refused", None), ("unchanged", None), ("published", 0)
    ]  # fmt: skip
    assert entries[-1]["run_id"] == first["run_id"]
    assert (entries[-1]["encoder"], entries[-1]["chunks"]["encoded"]) == ("hash:8", 4)

    assert spark.read.format("delta").load(str(table)).count() == 5
    for verb in (
        ["history", table],
        ["errors", table],
        ["search", table, "text 2"],
        ["plan", run],
        ["embed", run, "--limit", 1],
    ):
        assert main([str(part) for part in verb]) == 0
        assert capsys.readouterr().out.strip(), verb


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        ("purge docs --keys ../gone.txt", "--keys"),
        ("index docs --report --plot ../plot.png", "--plot"),
        ("schedule run.yaml --for databricks --out ../bundle", "--out"),
        ("serve --table docs=docs --users ../users.json", "--users"),
        ("serve --table docs=docs --tls-keystore link/key.p12", "--tls-keystore"),
        ("serve --table docs=docs --catalog ../catalog", "--catalog"),
        ("sql install docs --catalog ../catalog", "--catalog"),
        ("passwd ../users.json ann", "file"),
        ("submit ../run.yaml --target target.yaml --dry-run", "environment"),
    ],
)
def test_files_outside_of_the_declared_places_are_refused(
    words: str,
    setting: str,
    run_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    (lake / "link").symlink_to(tmp_path)
    run_file(
        source={"format": "json", "path": "lake/in", "key": "id", "text": "body"}, destination={"path": "lake/docs"}
    )
    (lake / "target.yaml").write_text("{kind: yarn, environment: ../packed.tar.gz}\n")
    monkeypatch.chdir(lake)
    monkeypatch.setenv("SHOAL_ROOTS", str(lake))

    assert main(words.split()) == 2

    assert f"shoal: [PATH_OUTSIDE_ROOTS] {setting} is '" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name != "lake"] == ["run.yaml"]


@pytest.mark.spark
def test_every_failure_has_its_code_and_one_document(
    spark: SparkSession,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    tmp_path: Path,
    shoal: Callable[..., tuple[int, Any, str]],
) -> None:
    write_rows([{"id": "a", "body": "x"}])
    run = run_file()
    cases: list[tuple[list[object], int, str, str]] = [
        (["embed", tmp_path / "none.yaml"], 2, "failed", "none.yaml"),
        (["embed", run, "--limit", 0], 2, "failed", "--limit is 0"),
        (["embed", run, "--set", "source.path=none.jsonl"], 2, "failed", "none.jsonl"),
        (["embed", run, "--set", "limits.min_rows=2"], 3, "refused", "limits.min_rows is 2"),
        (["plan", run, "--set", "source.text=bodi"], 2, "failed", "did you mean body?"),
        (["plan", run, "--set", "encoder.model=./none"], 2, "failed", "encoder.model"),
        (["search", tmp_path / "none", "x"], 2, "failed", "there is no such table"),
        (["search", tmp_path / "none", " "], 2, "failed", "the query is blank"),
        (["history", tmp_path / "none"], 2, "failed", "there is no such table"),
        (["errors", tmp_path / "none"], 2, "failed", "there is no such table"),
    ]
    for argv, code, status, message in cases:
        found, document, told = shoal(*argv)

        assert (found, document["status"]) == (code, status), argv
        assert message in document["error"], argv
        assert f"shoal: [{document['code']}] " in told
        assert "Traceback" not in told
    assert "Traceback" in shoal("embed", run, "--set", "source.path=none.jsonl", "--debug")[2]


@pytest.mark.spark
def test_a_table_that_another_run_holds_is_busy(
    spark: SparkSession,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    tmp_path: Path,
    shoal: Callable[..., tuple[int, Any, str]],
) -> None:
    write_rows([{"id": "a", "body": "x"}])
    files = FileSystem(spark, str(tmp_path))

    with held(files, f"{tmp_path}/out/docs__shoal/lease.json", "the-other", heartbeat_seconds=0.2):
        code, document, _ = shoal("embed", run_file())

    assert (code, document["status"]) == (4, "busy")
    assert "run the-other" in document["error"]
    assert f"process {os.getpid()}" in document["error"]
    assert not (tmp_path / "out/docs").exists()


def test_a_query_with_bytes_that_are_no_text_is_refused(
    tmp_path: Path, shoal: Callable[..., tuple[int, Any, str]]
) -> None:
    code, document, _ = shoal("search", tmp_path / "none", "caf\udce9")

    assert (code, document["status"]) == (2, "failed")
    assert "is not UTF-8" in document["error"]


@pytest.mark.slow
def test_a_master_that_is_not_there_is_one_paragraph(
    write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows([{"id": "a", "body": "x"}])
    command = "import sys; from shoal.jobs.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = ["embed", str(run_file(spark={"master": "nonsense"})), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", command, *argv],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip

    document = json.loads(done.stdout)
    assert (done.returncode, document["status"]) == (1, "failed")
    assert document["error"].startswith("spark.master 'nonsense': Spark did not start (")
    assert "Traceback" not in done.stderr
