"""The few file operations beside Delta's own, on any file system that Spark can reach."""

import os
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, DestinationError, RunError, first_line

FileStamp = tuple[int, int]
"""Time of modification in ms, length in bytes."""

CONDITIONAL = "fs.option.create.conditional.overwrite"
"""Hadoop's option of a new file, and the capability of its stores: the file is refused if one is there by its end."""

READ_ATTEMPTS = 5
"""Of a file that is replaced while it is read, as a lease is with every heartbeat."""


def local_path(path: str) -> Path | None:
    """The local path behind `path`, None when it is on another file system."""
    if path.startswith("file:"):
        return Path("/" + path.removeprefix("file:").lstrip("/"))
    return None if ":" in path.split("/", 1)[0] else Path(path)


def absolute(path: str) -> str:
    """A local path from the working directory on; an address with a scheme as it is."""
    local = local_path(path)
    return path if local is None else str(local.expanduser().absolute())


def join(folder: str, *names: str) -> str:
    """A path below a folder, whatever the scheme."""
    return "/".join([folder.rstrip("/"), *names])


def full_disk(error: Exception) -> RunError | None:
    """The error to raise where Spark failed because there was no room left to write, None where it failed otherwise."""
    told = str(error)
    full = next((phrase for phrase in ("No space left on device", "Disk quota exceeded") if phrase in told), None)
    if full is None:
        return None
    return RunError(
        f"destination: there is no room left beside the table, or on a disk of Spark's own ({full}); nothing was "
        "published. Make room and run it again: what has been staged is kept",
        code="DISK_FULL",
    )


class FileSystem:
    """Hadoop's view of one root, with local files written by Python, whose exclusive create is atomic."""

    def __init__(self, spark: SparkSession, root: str) -> None:
        self._jvm: Any = spark._jvm
        try:
            self._fs = self._path(root).getFileSystem(spark._jsc.hadoopConfiguration())
        except Py4JJavaError as error:
            raise _unreachable(root, error) from error
        self._is_local = self._fs.getScheme() == "file"

    def qualified(self, path: str) -> str:
        """The path with its scheme and authority, by which two that mean the same can be compared."""
        return str(self._fs.makeQualified(self._path(path)).toString()).rstrip("/")

    def exists(self, path: str) -> bool:
        return bool(self._fs.exists(self._path(path)))

    def is_occupied(self, path: str) -> bool:
        """Whether a file, or a folder with something in it, is there."""
        place = self._path(path)
        return self.exists(path) and (self._fs.getFileStatus(place).isFile() or len(self._fs.listStatus(place)) > 0)

    def stamp(self, path: str) -> FileStamp | None:
        """What changes when a file is replaced by another; None when it is absent."""
        if not self.exists(path):
            return None
        status = self._fs.getFileStatus(self._path(path))
        return int(status.getModificationTime()), int(status.getLen())

    def names(self, folder: str) -> list[str]:
        """Names directly below a folder, sorted; none when the folder is absent."""
        if not self.exists(folder):
            return []
        return sorted(status.getPath().getName() for status in self._fs.listStatus(self._path(folder)))

    def size(self, path: str) -> int:
        """Bytes of a file, or of everything below a folder; 0 when it is absent."""
        return int(self._fs.getContentSummary(self._path(path)).getLength()) if self.exists(path) else 0

    def usage(self, path: str) -> tuple[int, int]:
        """Number and bytes of files at or below a path; 0 and 0 when it is absent."""
        if not self.exists(path):
            return 0, 0
        found = self._fs.getContentSummary(self._path(path))
        return int(found.getFileCount()), int(found.getLength())

    def stamps(self, folder: str) -> dict[str, FileStamp]:
        """The files at any depth below a folder, by their path from there on; none when the folder is absent."""
        if not self.exists(folder):
            return {}
        above = len(self.qualified(folder)) + 1
        found: dict[str, FileStamp] = {}
        left = self._fs.listFiles(self._path(folder), True)
        while left.hasNext():
            status = left.next()
            name = status.getPath().toString()[above:]
            found[name] = int(status.getModificationTime()), int(status.getLen())
        return found

    def download(self, path: str, file: Path) -> None:
        """A copy of one file on this machine's disk."""
        file.parent.mkdir(parents=True, exist_ok=True)
        # Without a checksum file of Hadoop's own beside it.
        self._fs.copyToLocalFile(False, self._path(path), self._path(f"file://{file.absolute()}"), True)

    def delete(self, path: str) -> None:
        """Removes a file or a whole folder; an absent one is no error."""
        self._fs.delete(self._path(path), True)

    def read(self, path: str) -> str | None:
        """The text of a small file, None when it is absent; one that is replaced meanwhile is read again."""
        local = self._local(path)
        if local is not None:
            try:
                return local.read_text()
            except FileNotFoundError:
                return None
        attempts = 0
        while True:
            attempts += 1
            try:
                stream = self._fs.open(self._path(path))
                try:
                    return str(self._jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
                finally:
                    stream.close()
            except Py4JJavaError as error:
                if _is_java(error, "FileNotFound"):
                    return None
                if attempts == READ_ATTEMPTS or not _was_replaced(error):
                    raise

    def create(self, path: str, text: str) -> bool:
        """Writes a new file; False when it exists already.

        Of two who try, one succeeds: on local disks, HDFS, and stores that take conditional writes, as S3 does by a
        Hadoop of 3.4.2 or newer. Elsewhere both may.
        """
        local = self._local(path)
        if local is None:
            return self._write(path, text, overwrite=False)
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(local, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(text)
        return True

    def replace(self, path: str, text: str) -> None:
        """Overwrites a small file; on a local disk readers see the old or the new text, never a part."""
        local = self._local(path)
        if local is None:
            self._write(path, text, overwrite=True)
            return
        part = local.with_name(f".{local.name}.{os.getpid()}")
        part.write_text(text)
        part.replace(local)

    def move(self, old: str, new: str) -> bool:
        """Renames a file; False when it is gone, so that of two who try only one succeeds."""
        local = self._local(old)
        if local is None:
            try:
                return bool(self._fs.rename(self._path(old), self._path(new)))
            except Py4JJavaError as error:
                if _is_java(error, "FileNotFound"):
                    return False
                raise
        try:
            os.rename(local, self._local(new) or new)  # noqa: PTH104
        except FileNotFoundError:
            return False
        return True

    def require_writable(self, folder: str) -> None:
        """DestinationError, naming the folder, when a file cannot be made in it."""
        probe = join(folder, f".shoal-{os.getpid()}")
        try:
            self._fs.mkdirs(self._path(folder))
            self.create(probe, "")
            self.delete(probe)
        except (OSError, Py4JJavaError) as error:
            reason = java_reason(error) if isinstance(error, Py4JJavaError) else str(error)
            raise DestinationError(
                f"destination: '{folder}' cannot be written ({reason}); check its owner, its mode and the free space"
            ) from error

    def _write(self, path: str, text: str, *, overwrite: bool) -> bool:
        is_conditional = not overwrite and self._fs.hasPathCapability(self._path(path), CONDITIONAL)
        builder = self._fs.createFile(self._path(path)).recursive().overwrite(overwrite or is_conditional)
        if is_conditional:
            builder.must(CONDITIONAL, "true")
        try:
            stream = builder.build()
            stream.write(bytearray(text, "utf-8"))
            stream.close()
        except Py4JJavaError as error:
            # A file that was there is told at the beginning; one that another has made meanwhile, at the end.
            if not overwrite and any(_is_java(error, name) for name in ("FileAlreadyExists", "RemoteFileChanged")):
                return False
            raise
        return True

    def _local(self, path: str) -> Path | None:
        """A path without a scheme is local only where Hadoop's default file system is."""
        return local_path(path) if self._is_local else None

    def _path(self, path: str) -> Any:
        return self._jvm.org.apache.hadoop.fs.Path(path)


def _unreachable(root: str, error: Py4JJavaError) -> ConfigError:
    """The error to raise where Hadoop has no way to an address."""
    scheme = root.partition(":")[0]
    return ConfigError(
        f"'{root}' cannot be reached ({java_reason(error)}); Spark needs Hadoop's connector for {scheme}:// on its "
        "class path, of the version of its own Hadoop (STORAGE.md has the names)",
        code="STORE_UNREACHABLE",
    )


def java_reason(error: Py4JJavaError) -> str:
    """What an error of the JVM's says in its first line, without the stack trace."""
    return first_line(Exception(error.java_exception.getMessage() or error.java_exception.toString()))


def _was_replaced(error: Py4JJavaError) -> bool:
    """Whether a store no longer has the file that was opened: S3 reads that one or none (If-Match, status 412)."""
    return _is_java(error, "RemoteFileChanged") or "Status Code: 412" in java_reason(error)


def _is_java(error: Py4JJavaError, name: str) -> bool:
    """Whether the JVM threw an exception of this name; which of them a file system throws is its own choice."""
    return name in error.java_exception.getClass().getName()
