"""File operations on a local disk, with and without Java, and on another Hadoop file system: a view of a folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, DestinationError
from shoal.jobs.filesystem import FileSystem, absolute, join, local_path
from shoal.jobs.mounted_files import MountedFiles

pytestmark = pytest.mark.spark


@pytest.fixture(params=["local", "mounted", "hadoop"])
def root(request: pytest.FixtureRequest, spark: SparkSession, tmp_path: Path) -> Iterator[str]:
    """A folder by its path, and the same through ViewFs, where only Hadoop's calls reach it."""
    if request.param != "hadoop":
        yield str(tmp_path)
        return
    hadoop = spark._jsc.hadoopConfiguration()
    setting = "fs.viewfs.mounttable.shoal.link./data"
    hadoop.set(setting, tmp_path.as_uri())
    hadoop.set("fs.viewfs.impl.disable.cache", "true")
    yield "viewfs://shoal/data"
    hadoop.unset(setting)


@pytest.fixture
def files(request: pytest.FixtureRequest, spark: SparkSession, root: str) -> FileSystem:
    """What reaches the folder: Hadoop, or Python alone, as through Spark Connect."""
    is_mounted = request.node.callspec.params["root"] == "mounted"
    return MountedFiles(root) if is_mounted else FileSystem(spark, root)


def test_a_file_is_created_by_one_only(files: FileSystem, root: str, tmp_path: Path) -> None:
    path = join(root, "new", "lease.json")

    assert files.read(path) is None
    assert files.create(path, "first")
    assert not files.create(path, "second")
    assert files.read(path) == "first"
    assert (tmp_path / "new/lease.json").read_text() == "first"


def test_a_file_is_replaced_as_a_whole_and_leaves_no_part_behind(files: FileSystem, root: str, tmp_path: Path) -> None:
    path = join(root, "lease.json")
    files.create(path, "a longer text than the next")

    files.replace(path, "caf\N{LATIN SMALL LETTER E WITH ACUTE}")

    assert files.read(path) == "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert files.names(root) == ["lease.json"]


def test_of_two_who_move_a_file_one_succeeds(files: FileSystem, root: str) -> None:
    files.create(join(root, "old"), "text")

    assert files.move(join(root, "old"), join(root, "new"))
    assert not files.move(join(root, "old"), join(root, "newer"))
    assert files.names(root) == ["new"]


def test_files_and_folders_are_removed_and_absent_ones_are_no_error(files: FileSystem, root: str) -> None:
    files.create(join(root, "work", "run", "file"), "text")

    files.delete(join(root, "work"))
    files.delete(join(root, "work"))

    assert not files.exists(join(root, "work"))
    assert files.names(join(root, "work")) == []


def test_a_place_is_occupied_by_a_file_or_by_a_folder_with_something_in_it(
    files: FileSystem, root: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")

    assert not files.is_occupied(join(root, "absent"))
    assert not files.is_occupied(join(root, "empty"))
    assert files.is_occupied(join(root, "file"))
    assert files.is_occupied(root)


def test_a_folder_below_a_file_cannot_be_written(files: FileSystem, root: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DestinationError, match=r"destination: '.*/file/out' cannot be written \(.+\); .*check"):
        files.require_writable(join(root, "file", "out"))


def test_a_folder_that_can_be_written_is_made_and_left_empty(files: FileSystem, root: str, tmp_path: Path) -> None:
    files.require_writable(join(root, "out", "docs__shoal"))

    assert list((tmp_path / "out/docs__shoal").iterdir()) == []


def test_files_are_measured_and_copied(files: FileSystem, root: str, tmp_path: Path) -> None:
    folder = join(root, "model")
    assert (files.size(folder), files.usage(folder), files.stamps(folder), files.stamp(folder)) == (0, (0, 0), {}, None)
    files.create(join(folder, "config.json"), "{}")
    files.create(join(folder, "1_Pooling", "config.json"), "[1, 2]")

    assert (files.size(folder), files.usage(folder)) == (8, (2, 8))
    stamps = files.stamps(folder)
    assert {name: stamp[1] for name, stamp in stamps.items()} == {"config.json": 2, "1_Pooling/config.json": 6}
    assert files.stamp(join(folder, "config.json")) == stamps["config.json"]
    files.download(join(folder, "1_Pooling", "config.json"), tmp_path / "copy" / "config.json")
    assert (tmp_path / "copy/config.json").read_text() == "[1, 2]"
    assert files.qualified(folder) == files.qualified(f"{folder}/")


def test_a_store_that_nobody_mounts_is_refused() -> None:
    with pytest.raises(ConfigError, match="'s3a://bucket/docs__shoal' is no path of a disk: through Spark Connect"):
        MountedFiles("s3a://bucket/docs__shoal")


def test_paths_are_local_unless_they_have_another_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert local_path("s3a://bucket/docs") is None
    assert local_path("file:///data/docs") == local_path("file:/data/docs") == Path("/data/docs")
    assert absolute("out/docs") == str(tmp_path / "out/docs")
    assert absolute("s3a://bucket/docs") == "s3a://bucket/docs"
    assert join("s3a://bucket/docs/", "work", "run") == "s3a://bucket/docs/work/run"
