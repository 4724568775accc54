"""File operations on a local disk, and on another Hadoop file system: a view of a folder under its own scheme."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import DestinationError
from shoal.jobs.filesystem import FileSystem, absolute, join, local_path

pytestmark = pytest.mark.spark


@pytest.fixture(params=["local", "hadoop"])
def root(request: pytest.FixtureRequest, spark: SparkSession, tmp_path: Path) -> Iterator[str]:
    """A folder by its path, and the same through ViewFs, where only Hadoop's calls reach it."""
    if request.param == "local":
        yield str(tmp_path)
        return
    hadoop = spark._jsc.hadoopConfiguration()
    setting = "fs.viewfs.mounttable.shoal.link./data"
    hadoop.set(setting, tmp_path.as_uri())
    hadoop.set("fs.viewfs.impl.disable.cache", "true")
    yield "viewfs://shoal/data"
    hadoop.unset(setting)


def test_a_file_is_created_by_one_only(spark: SparkSession, root: str, tmp_path: Path) -> None:
    files = FileSystem(spark, root)
    path = join(root, "new", "lease.json")

    assert files.read(path) is None
    assert files.create(path, "first")
    assert not files.create(path, "second")
    assert files.read(path) == "first"
    assert (tmp_path / "new/lease.json").read_text() == "first"


def test_a_file_is_replaced_as_a_whole_and_leaves_no_part_behind(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    files = FileSystem(spark, root)
    path = join(root, "lease.json")
    files.create(path, "a longer text than the next")

    files.replace(path, "caf\N{LATIN SMALL LETTER E WITH ACUTE}")

    assert files.read(path) == "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert files.names(root) == ["lease.json"]


def test_of_two_who_move_a_file_one_succeeds(spark: SparkSession, root: str) -> None:
    files = FileSystem(spark, root)
    files.create(join(root, "old"), "text")

    assert files.move(join(root, "old"), join(root, "new"))
    assert not files.move(join(root, "old"), join(root, "newer"))
    assert files.names(root) == ["new"]


def test_files_and_folders_are_removed_and_absent_ones_are_no_error(spark: SparkSession, root: str) -> None:
    files = FileSystem(spark, root)
    files.create(join(root, "work", "run", "file"), "text")

    files.delete(join(root, "work"))
    files.delete(join(root, "work"))

    assert not files.exists(join(root, "work"))
    assert files.names(join(root, "work")) == []


def test_a_place_is_occupied_by_a_file_or_by_a_folder_with_something_in_it(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    files = FileSystem(spark, root)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")

    assert not files.is_occupied(join(root, "absent"))
    assert not files.is_occupied(join(root, "empty"))
    assert files.is_occupied(join(root, "file"))
    assert files.is_occupied(root)


def test_a_folder_below_a_file_cannot_be_written(spark: SparkSession, root: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DestinationError, match=r"destination: '.*/file/out' cannot be written \(.+\); check its owner"):
        FileSystem(spark, root).require_writable(join(root, "file", "out"))


def test_a_folder_that_can_be_written_is_made_and_left_empty(spark: SparkSession, root: str, tmp_path: Path) -> None:
    FileSystem(spark, root).require_writable(join(root, "out", "docs__shoal"))

    assert list((tmp_path / "out/docs__shoal").iterdir()) == []


def test_paths_are_local_unless_they_have_another_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert local_path("s3a://bucket/docs") is None
    assert local_path("file:///data/docs") == local_path("file:/data/docs") == Path("/data/docs")
    assert absolute("out/docs") == str(tmp_path / "out/docs")
    assert absolute("s3a://bucket/docs") == "s3a://bucket/docs"
    assert join("s3a://bucket/docs/", "work", "run") == "s3a://bucket/docs/work/run"
