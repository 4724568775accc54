"""Where a worker finds the encoder's files: in what the driver sent through Spark, else under the driver's own path."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
from pathlib import Path
from typing import Literal

from pyspark import SparkFiles, TaskContext

from shoal.conf.errors import ModelError
from shoal.udfs.encoder_spec import EncoderSpec

Part = Literal["model", "tokenizer"]
"""What of a checkpoint has been sent: all that an encoder loads, or what cutting into chunks needs."""


def archive_name(folder: str, part: Part) -> str:
    """The name under which Spark unpacks that part of a checkpoint folder on every executor."""
    return f"shoal-{part}-{hashlib.sha256(folder.encode()).hexdigest()[:16]}"


def folder_here(folder: str, part: Part) -> str:
    """The checkpoint folder on this machine; outside a task of Spark's, and for "" (no files), `folder` itself.

    ModelError where this machine has neither.
    """
    if not folder or TaskContext.get() is None:
        return folder
    sent = Path(SparkFiles.getRootDirectory()) / archive_name(folder, part)
    if sent.is_dir():
        return str(sent)
    if not Path(folder).is_dir():
        raise ModelError(
            f"encoder.model: the folder {folder!r} is not on {socket.gethostname()}, where a worker wants to load it, "
            "and has not been sent there; put it at this path on every node, or leave `model: shared` out of the target"
        )
    return folder


def with_files_here(spec: EncoderSpec) -> EncoderSpec:
    """The description with the checkpoint folder of this machine."""
    return dataclasses.replace(spec, folder=folder_here(spec.folder, "model"))
