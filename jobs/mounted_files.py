"""Files on a disk that this machine has too: what Hadoop does for a Spark of our own, and nobody through Connect.

A volume of Databricks is such a disk.
"""

import errno
import logging
import os
import shutil
from pathlib import Path

from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, DestinationError
from shoal.jobs.filesystem import FileStamp, FileSystem, local_path
from shoal.jobs.remote import without_java

logger = logging.getLogger(__name__)

NO_RENAME = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EEXIST)
"""What a mount says that renames nothing, or nothing onto a file that is there, as volumes of Databricks may."""


def open_files(spark: SparkSession, root: str) -> FileSystem:
    """The files below a root, as the session reaches them; ConfigError where it does not."""
    return MountedFiles(root) if without_java(spark) else FileSystem(spark, root)


class MountedFiles(FileSystem):
    """A disk of this machine, by Python alone; what Spark Connect's server writes there has to be seen here."""

    def __init__(self, root: str) -> None:
        if local_path(root) is None:
            raise ConfigError(
                f"'{root}' is no path of a disk: through Spark Connect and on Databricks the run itself keeps its "
                "lease and its work there, so destination.sidecar has to name a folder of a disk that this machine and "
                "the executors share (on Databricks: of a volume)"
            )
        self._is_local = True

    def qualified(self, path: str) -> str:
        """The path with its scheme, by which two that mean the same can be compared."""
        return f"file:{os.path.normpath(self._here(path))}"

    def exists(self, path: str) -> bool:
        return self._here(path).exists()

    def is_occupied(self, path: str) -> bool:
        """Whether a file, or a folder with something in it, is there."""
        here = self._here(path)
        return here.is_file() or (here.is_dir() and any(here.iterdir()))

    def stamp(self, path: str) -> FileStamp | None:
        """What changes when a file is replaced by another; None when it is absent."""
        try:
            status = self._here(path).stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns // 1_000_000, status.st_size

    def names(self, folder: str) -> list[str]:
        """Names directly below a folder, sorted; none when the folder is absent."""
        here = self._here(folder)
        return sorted(path.name for path in here.iterdir()) if here.exists() else []

    def size(self, path: str) -> int:
        """Bytes of a file, or of everything below a folder; 0 when it is absent."""
        return self.usage(path)[1]

    def usage(self, path: str) -> tuple[int, int]:
        """Number and bytes of files at or below a path; 0 and 0 when it is absent."""
        here = self._here(path)
        sizes = [each.stat().st_size for each in ([here] if here.is_file() else here.rglob("*")) if each.is_file()]
        return len(sizes), sum(sizes)

    def stamps(self, folder: str) -> dict[str, FileStamp]:
        """The files at any depth below a folder, by their path from there on; none when the folder is absent."""
        here = self._here(folder)
        found = {each.relative_to(here).as_posix(): self.stamp(str(each)) for each in here.rglob("*") if each.is_file()}
        return {name: stamp for name, stamp in found.items() if stamp is not None}

    def download(self, path: str, file: Path) -> None:
        """A copy of one file on this machine's disk."""
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._here(path), file)

    def delete(self, path: str) -> None:
        """Removes a file or a whole folder; an absent one is no error, what may not be removed stays with a warning."""
        here = self._here(path)
        if here.is_dir() and not here.is_symlink():
            left: list[str] = []
            shutil.rmtree(here, onerror=lambda _, each, error: left.append(f"{each} ({error[1]})"))
            if left:
                logger.warning(
                    "%s was not removed whole: %s; the server and this client work as different users, or it is still "
                    "at work there",
                    here,
                    left[0],
                )
        else:
            here.unlink(missing_ok=True)

    def replace(self, path: str, text: str) -> None:
        """Overwrites a small file; at once where the disk renames files."""
        try:
            super().replace(path, text)
        except OSError as error:
            if error.errno not in NO_RENAME:
                raise
            here = self._here(path)
            here.with_name(f".{here.name}.{os.getpid()}").unlink(missing_ok=True)
            here.write_text(text)

    def move(self, old: str, new: str) -> bool:
        """Renames a file; False when it is gone, so that of two who try only one succeeds."""
        try:
            return super().move(old, new)
        except OSError as error:
            if error.errno not in NO_RENAME:
                raise
        text = self.read(old)
        if text is None or not self.create(new, text):
            return False
        try:
            self._here(old).unlink()
        except FileNotFoundError:
            self.delete(new)
            return False
        return True

    def require_shared(self, path: str) -> None:
        """DestinationError where a folder that the server has made is not seen here."""
        if not self._here(path).is_dir():
            raise DestinationError(
                f"destination: the server has made '{path}', and this machine does not see it; through Spark Connect "
                "it has to lie on a disk that this machine, the server and the executors share: mount it, or name "
                "another folder as destination.sidecar"
            )

    def require_writable(self, folder: str) -> None:
        """DestinationError, naming the folder, when a file cannot be made in it."""
        probe = f"{folder}/.shoal-{os.getpid()}"
        try:
            self._here(folder).mkdir(parents=True, exist_ok=True)
            self.create(probe, "")
            self.delete(probe)
        except OSError as error:
            raise DestinationError(
                f"destination: '{folder}' cannot be written ({error}); through Spark Connect it lies on a disk that "
                "this machine and the executors share: check that it is mounted here, its owner, its mode and the free "
                "space"
            ) from error

    def _here(self, path: str) -> Path:
        here = local_path(path)
        assert here is not None  # noqa: S101 - the root was one, and what is below it has its scheme
        return here
