"""The stage with an encoder that some texts kill or hang, and what does not count as that."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from shoal.conf.errors import CODE_NOTE, WorkerError
from shoal.conf.loader import load_run
from shoal.conf.run import EncoderConfig
from shoal.jobs.embed import embed
from shoal.jobs.encode_stage import encode_waves, killed_its_worker
from shoal.jobs.hooks import Hooks
from shoal.jobs.layout import TableRef, table_of
from shoal.jobs.staging import create_staging
from shoal.udfs.canaries import Canaries, canary_texts
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.hash_encoder import describe_hash

pytestmark = [pytest.mark.spark, pytest.mark.slow]

POISON = Path(__file__).with_name("poisoned_encoder.py")
KILLER, HANGER = "r7", "r40"


@pytest.fixture
def defused(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that makes the encoder of `hash:8` harmless: until it is there, two words kill and hang its process."""
    file = tmp_path / "defused"
    monkeypatch.syspath_prepend(str(POISON.parent))
    module = importlib.import_module(POISON.stem)
    spark.sparkContext.addPyFile(str(POISON))

    def describe_poisoned(config: EncoderConfig) -> EncoderSpec:
        return module.poisoned(dataclasses.asdict(describe_hash(config)) | {"folder": str(file)})

    monkeypatch.setattr("shoal.jobs.model_source.describe_hash", describe_poisoned)
    return file


def row(name: str) -> dict[str, str]:
    word = {KILLER: "killing", HANGER: "hanging"}.get(name, "harmless")
    return {"id": name, "body": f"{word} {name}"}


@pytest.mark.long
def test_a_chunk_that_kills_and_one_that_hangs_become_errors_and_are_tried_again(
    spark: SparkSession,
    defused: Path,
    write_rows: Callable[..., Path],
    run_file: Callable[..., Path],
    no_leftovers: None,
) -> None:
    write_rows([row(f"r{number}") for number in range(60)])
    config = load_run(run_file(encode={"time_limit": "1s", "wave_chunks": 30}))
    ref = table_of(spark, config.destination)
    said: list[str] = []
    steps: list[str] = []

    report = embed(spark, config, hooks=Hooks(say=said.append, step=steps.append))

    record = report.record()
    assert record["status"] == "published"
    assert record["errors"] == {"worker_died": 1, "time_limit": 1}
    assert (record["chunks"]["encoded"], record["chunks"]["embedded"]) == (60, 58)
    assert report.progress[-1][1] == 60, "the isolated attempts did not replace the counts of those that died"
    isolated = [name for name in steps if name.endswith("isolated")]
    assert 1 <= len(isolated) <= 2
    assert [warning.partition(" ended its")[0] for warning in sorted(record["warnings"])] == [
        f"wave {int(name.split()[1]) + 1} of 2" for name in sorted(isolated)
    ]
    assert left_behind() == []
    first = contents(spark, ref)
    assert {key: error for key, (error, _) in first.items() if error} == {KILLER: "worker_died", HANGER: "time_limit"}

    defused.touch()
    record = embed(spark, config).record()

    assert record["status"] == "published"
    assert (record["rows"]["changed"], record["rows"]["retried"], record["chunks"]["encoded"]) == (2, 2, 2)
    assert record["errors"] == {}
    assert record["warnings"] == []
    second = contents(spark, ref)
    assert all(error is None for error, _ in second.values())
    assert {key for key in first if first[key] != second[key]} == {KILLER, HANGER}


def test_a_worker_that_refuses_is_not_isolated(spark: SparkSession, tmp_path: Path) -> None:
    ref = TableRef(str(tmp_path / "table"), None, str(tmp_path / "beside"))
    create_staging(spark, ref)
    # A worker checks an encoder once: this one must not have been in use before.
    spec = describe_hash(EncoderConfig(model="hash:29"))
    moved = Canaries(spec.fingerprint, np.ones((len(canary_texts()), spec.dim), np.float32))
    todo = spark.createDataFrame([(b"h", "text", 0, 0)], "content_hash binary, text string, wave int, slot int")
    steps: list[str] = []

    with pytest.raises(WorkerError, match="has moved on"):
        encode_waves(
            spark, ref, todo, 1, num_slots=1, run_id="r", spec=spec, options=EncodeOptions(), canaries=moved,
            progress=None, step=steps.append,
        )  # fmt: skip

    assert steps == ["wave 0 started"]


@pytest.mark.parametrize(
    ("told", "may_be_a_chunk"),
    [
        ("Python worker exited unexpectedly (crashed)", True),
        ("ExecutorLostFailure (executor 3 exited caused by one of the running tasks) Reason: exit code 137", True),
        (f"shoal.conf.errors.WorkerError: the device failed\n{CODE_NOTE}DEVICE_FAILED", True),
        ("shoal.conf.errors.ModelError: no such folder", False),
        ("java.io.IOException: No space left on device", False),
        ("org.apache.spark.SparkException: Job 7 cancelled part of cancelled job group shoal-encode-r", False),
        ("org.apache.spark.SparkException: Python worker failed to connect back.", False),
    ],
)
def test_only_a_death_leads_to_isolation(told: str, may_be_a_chunk: bool) -> None:
    assert killed_its_worker(PySparkException(told)) == may_be_a_chunk


def contents(spark: SparkSession, ref: TableRef) -> dict[str, tuple[str | None, Any]]:
    """Key -> error, and when it was encoded."""
    return {found["id"]: (found["error"], found["embedded_at"]) for found in ref.read(spark).collect()}


def left_behind() -> list[str]:
    """Process ids of encoding processes that outlived their task."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"shoal.udfs.isolated_worker" in command.read_bytes():
                found.append(command.parent.name)
        except OSError:
            continue
    return found
