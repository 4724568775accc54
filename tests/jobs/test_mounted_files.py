"""Files that a client of Spark Connect keeps on a disk, with the server beside it."""

import errno
import logging
import os
from pathlib import Path

import pytest

from shoal.conf.errors import ConfigError, DestinationError
from shoal.jobs.mounted_files import MountedFiles


def test_what_may_not_be_removed_stays_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = tmp_path / "work/ours", tmp_path / "work/theirs"
    for folder in (ours, theirs):
        folder.mkdir(parents=True)
        (folder / "rows").touch()
    unlink = os.unlink

    def refuse(path: str, **more: int) -> None:
        if theirs.exists() and not ours.exists():
            raise PermissionError(13, "Permission denied", path)
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", refuse)
    files = MountedFiles(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        files.delete(str(ours))
        assert not caplog.records
        files.delete(str(theirs))
    assert not ours.exists()
    assert (theirs / "rows").exists()
    assert f"{theirs} was not removed whole" in caplog.text
    assert "Permission denied" in caplog.text


def test_a_disk_has_to_be_shared_with_the_server(tmp_path: Path) -> None:
    files = MountedFiles(str(tmp_path))
    files.require_shared(str(tmp_path))
    with pytest.raises(DestinationError, match=r"this machine does not see it; .* name another folder as destination"):
        files.require_shared(str(tmp_path / "staging"))


def test_a_store_is_no_such_disk() -> None:
    with pytest.raises(ConfigError, match=r"'s3a://lake' is no path of a disk"):
        MountedFiles("s3a://lake")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_mount_that_renames_nothing_still_replaces_and_moves_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    files, lease, taken = MountedFiles(str(tmp_path)), str(tmp_path / "lease.json"), str(tmp_path / "taken")
    assert files.create(lease, "first")
    files.replace(lease, "second")
    assert (tmp_path / "lease.json").read_text() == "second"
    assert files.move(lease, taken)
    assert (tmp_path / "taken").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert not files.move(lease, str(tmp_path / "late")), "only one of two may have it"
    with pytest.raises(IsADirectoryError):
        files.replace(str(tmp_path), "a folder")
