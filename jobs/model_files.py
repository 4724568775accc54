"""Sends the encoder's files to the executors, each once to a node, where they do not find them under our path."""

import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from weakref import WeakKeyDictionary

from pyspark import SparkContext
from pyspark.sql import SparkSession

from shoal.jobs.model_source import CODE_FILES, HUB_FILES, HUB_LEFT_OUT, is_among
from shoal.jobs.remote import is_remote
from shoal.jobs.session import is_here
from shoal.udfs.chunking import TOKENIZER_FILE
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.sent_model import Part, archive_name

SHARED = "spark.shoal.modelFiles"
"""Set to "shared" where every node has the model under the driver's path; then nothing is sent."""

_SENDING = Lock()
_SENT: "WeakKeyDictionary[SparkContext | SparkSession, set[str]]" = WeakKeyDictionary()
"""By application; by session where that is one of Spark Connect's."""


def send_model(spark: SparkSession, spec: EncoderSpec) -> None:
    """Has Spark bring the checkpoint's files to every executor of this application, once to each node.

    To be called before each job that loads the encoder: what has been sent is not sent again. Nothing is sent in local
    mode, for the hash encoder, and where `spark.shoal.modelFiles` is "shared". The archive is written without
    compression to the driver's temporary folder: as large as the weights, gone with the driver, or when it is sent.
    """
    _send(spark, spec.folder, "model", (*HUB_FILES, *CODE_FILES), HUB_LEFT_OUT)


def send_tokenizer(spark: SparkSession, folder: str) -> None:
    """The same of the checkpoint's tokenizer alone: chunks are cut on nights too that load no encoder."""
    _send(spark, folder, "tokenizer", (TOKENIZER_FILE,), ())


def _send(spark: SparkSession, folder: str, part: Part, wanted: Sequence[str], left_out: Sequence[str]) -> None:
    name = archive_name(folder, part)
    if not folder or is_here(spark) or spark.conf.get(SHARED, "") == "shared":
        return
    # Waves start from threads, and none may start before all is on its way.
    with _SENDING:
        sent = _SENT.setdefault(spark if is_remote(spark) else spark.sparkContext, set())
        if name in sent:
            return
        if is_remote(spark):
            with tempfile.TemporaryDirectory(prefix=name) as made:
                packed = Path(made) / f"{name}.zip"
                _pack(Path(folder), packed, wanted, left_out)
                spark.addArtifacts(f"{packed}#{name}", archive=True)
            sent.add(name)
            return
        context = spark.sparkContext
        # Spark deletes what is below its own temporary folder when the driver ends, however it ends.
        temporary = Path(context._temp_dir)  # type: ignore[attr-defined]
        with tempfile.NamedTemporaryFile(dir=temporary, prefix=name, suffix=".zip", delete=False) as file:
            _pack(Path(folder), Path(file.name), wanted, left_out)
        context.addArchive(f"{file.name}#{name}")
        sent.add(name)


def _pack(folder: Path, file: Path, wanted: Sequence[str], left_out: Sequence[str]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if is_among(name, wanted, left_out):
                archive.write(path, name)
