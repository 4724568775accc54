"""What a worker says of the machine that it runs on, for `shoal doctor`: a row of JSON for each task."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark import SparkFiles

from shoal.conf.run import EncoderConfig
from shoal.udfs.checkpoint import describe_checkpoint
from shoal.udfs.encode_udf import ArrowFunction, Task, probe_batches
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.progress import executor_here
from shoal.udfs.schema import PROBE_OUTPUT
from shoal.udfs.sent_model import with_files_here


def make_visit(spec: EncoderSpec, settings: EncoderConfig, options: EncodeOptions) -> ArrowFunction:
    """A `mapInArrow` function that ignores what its rows say: one row of PROBE_OUTPUT for a partition that has any.

    `report` is that of `make_probe` and more: host, executor (distinct on its host), cores, memory_bytes and
    free_disk_bytes of the machine, task_cores, python, shoal, gpu, model_digest ("" for hash), model_sent (through
    Spark, not found under the driver's path).
    """

    def visit(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for probed in probe_batches(batches, spec, options):
            (report,) = probed.column("report").to_pylist()
            facts = json.loads(report) | facts_here(spec, settings, Task.current(options))
            told = [pa.array([json.dumps(facts)]), probed.column("vectors")]
            yield pa.RecordBatch.from_arrays(told, schema=PROBE_OUTPUT)

    return visit


def facts_here(spec: EncoderSpec, settings: EncoderConfig, task: Task) -> dict[str, Any]:
    """What this machine is, and the model that it has."""
    local = with_files_here(spec)
    host, executor = executor_here()
    return {
        "host": host,
        "executor": executor,
        "cores": len(os.sched_getaffinity(0)),
        "task_cores": task.cpus,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(SparkFiles.getRootDirectory()).free,
        "python": platform.python_version(),
        "shoal": shoal_version(),
        "gpu": gpu_of(task.device),
        "model_digest": describe_checkpoint(settings, local.folder).weights_digest if local.folder else "",
        "model_sent": local.folder != spec.folder,
    }


def shoal_version() -> str:
    """The version of Shoal that this process runs; "" where its metadata did not come along."""
    try:
        return metadata.version("shoal")
    except metadata.PackageNotFoundError:
        return ""


def gpu_of(device: str) -> dict[str, Any] | None:
    """Name, memory_bytes and driver of a CUDA device; None for the CPU, and where torch finds no such device."""
    if not device.startswith("cuda"):
        return None
    import torch  # seconds, and only where there is a device

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    driver = Path("/proc/driver/nvidia/version")
    told = driver.read_text(encoding="ascii").split("Module")[-1].split()[0] if driver.exists() else None
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": told,
        "cuda": torch.version.cuda,
    }
