"""Sends the encoder's files to the executors, each once to a node, where they do not find them under our path."""

import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from weakref import WeakKeyDictionary

from pyspark import SparkContext
from pyspark.sql import SparkSession

from shoal.jobs.session import is_local
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.sent_model import archive_name

SHARED = "spark.shoal.modelFiles"
"""Set to "shared" where every node has the model under the driver's path; then nothing is sent."""

OTHER_FORMATS = ("onnx/*", "openvino/*", "*/onnx/*", "*/openvino/*", "checkpoint-*/*", "*.bin", "*.h5", "*.msgpack")

_SENT: "WeakKeyDictionary[SparkContext, set[str]]" = WeakKeyDictionary()


def send_model(spark: SparkSession, spec: EncoderSpec) -> None:
    """Has Spark bring the checkpoint's files to every executor of this application, once to each node.

    Nothing is sent in local mode, for the hash encoder, and where `spark.shoal.modelFiles` is "shared". The archive is
    written without compression to the driver's temporary folder: as large as the weights, gone with the driver.
    """
    context = spark.sparkContext
    sent = _SENT.setdefault(context, set())
    if not spec.folder or spec.folder in sent or is_local(context.master) or spark.conf.get(SHARED, "") == "shared":
        return
    sent.add(spec.folder)
    name = archive_name(spec.folder)
    # Spark deletes what is below its own temporary folder when the driver ends, however it ends.
    folder = Path(context._temp_dir)  # type: ignore[attr-defined]
    with tempfile.NamedTemporaryFile(dir=folder, prefix=name, suffix=".zip", delete=False) as file:
        _pack(Path(spec.folder), Path(file.name))
    context.addArchive(f"{file.name}#{name}")


def _pack(folder: Path, file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not any(fnmatch(name, pattern) for pattern in OTHER_FORMATS):
                archive.write(path, name)
