"""What stands at the destination is said before a run makes anything there."""

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import DestinationError, ModelError, ShoalError
from shoal.conf.loader import load_run
from shoal.jobs.embed import embed

pytestmark = pytest.mark.spark
ROWS = [{"id": "a", "body": "x"}, {"id": "b", "body": "y"}]


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_what_is_no_table_of_shoal_is_never_written_over(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows(ROWS)
    spark.range(3).write.format("delta").save(str(tmp_path / "plain"))
    spark.range(3).write.parquet(str(tmp_path / "parquet"))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("dear")
    (tmp_path / "file").write_text("text")
    cases = {
        "plain": r"destination '.*/plain' is not a Shoal table \(no property shoal\.format\)",
        "parquet": r"destination\.path '.*/parquet': there is something there that is no Delta table",
        "letters": r"destination\.path '.*/letters': there is something there that is no Delta table",
        "file": r"destination\.path '.*/file': there is something there that is no Delta table",
        "file/below": r"destination: '.*/file/below__shoal' cannot be written \(.+\); check its owner",
    }
    run = run_file()
    before = contents(tmp_path)
    for place, message in cases.items():
        with pytest.raises(DestinationError, match=message) as caught:
            embed(spark, load_run(run, [f"destination.path={place}"]))
        assert caught.value.report.record()["status"] == "failed"  # type: ignore[attr-defined]

    assert contents(tmp_path) == before


def test_a_folder_that_is_empty_may_become_the_table(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows(ROWS)
    (tmp_path / "out/docs").mkdir(parents=True)

    assert embed(spark, load_run(run_file())).record()["status"] == "published"


def broken_checkpoints(folder: Path) -> dict[str, str]:
    """Model reference -> why it is refused, for folders that no library has to be loaded to see through."""
    config = '{"model_type": "bert", "hidden_size": 8, "max_position_embeddings": 16}'
    (folder / "letters").mkdir()
    (folder / "letters/dear.txt").write_text("dear")
    for name in ("corrupt", "pickle", "remote"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
        (folder / name / "tokenizer.json").write_text("{}")
    (folder / "corrupt/model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json")
    (folder / "pickle/pytorch_model.bin").write_bytes(b"\x80\x04N.")
    (folder / "remote/model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    (folder / "remote/config.json").write_text(config[:-1] + ', "auto_map": {"AutoModel": "code.Model"}}')
    return {
        "./nowhere": r"encoder\.model.*which is not there",
        "./letters": r"encoder\.model: .*letters",
        "./corrupt": r"encoder\.model: .*corrupt.*damaged or incomplete; download the model again",
        "./pickle": r"encoder\.model: .*pickle.*safetensors",
        "./remote": r"encoder\.trust_remote_code is false, but the checkpoint brings its own code \(auto_map in",
    }


def test_a_model_that_cannot_be_used_is_said_before_anything_is_made(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows(ROWS)
    cases = broken_checkpoints(tmp_path)
    run = run_file()
    before = contents(tmp_path)
    for reference, message in cases.items():
        with pytest.raises(ModelError, match=f"(?s){message}") as caught:
            embed(spark, load_run(run, [f"encoder.model={reference}"]))
        assert caught.value.exit_code == 2

    assert contents(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not done or done.returncode:
        pytest.skip("only root may mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=True)


def test_a_full_disk_is_said_and_a_run_after_it_gets_through(
    spark: SparkSession, write_rows: Callable[..., Path], run_file: Callable[..., Path], small_disk: Path
) -> None:
    write_rows([{"id": f"r{i}", "body": random.Random(i).randbytes(5_000).hex()} for i in range(200)])
    destination = {"path": f"{small_disk}/docs"}

    with pytest.raises(ShoalError, match=r"there is no room left .*No space left") as caught:
        embed(spark, load_run(run_file(destination=destination)))

    assert caught.value.exit_code == 1, "room may be made, and then the same run gets through"
    assert "source" not in str(caught.value)
    assert not (small_disk / "docs").exists()
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert embed(spark, load_run(run_file(destination=destination))).record()["status"] == "published"
