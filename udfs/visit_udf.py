"""What a worker says of the machine that it runs on, for `shoal doctor`: a row of JSON for each task."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from pyspark import SparkFiles

from shoal.conf.run import EncoderConfig
from shoal.udfs.canaries import library_versions
from shoal.udfs.checkpoint import describe_checkpoint
from shoal.udfs.encode_udf import Task, prepare_worker, processor_name
from shoal.udfs.encoder import EncodeOptions
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.resolution import resolve
from shoal.udfs.sent_model import with_files_here

VISIT_DDL: Final = "facts STRING, canaries BINARY"
_SCHEMA: Final = pa.schema([pa.field("facts", pa.string()), pa.field("canaries", pa.binary())])

ArrowFunction = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]


def make_visit(spec: EncoderSpec, settings: EncoderConfig, options: EncodeOptions) -> ArrowFunction:
    """A `mapInArrow` function that ignores its rows: one row of VISIT_DDL for each task.

    `facts` is JSON: host, executor (distinct on its host), cores and memory_bytes and free_disk_bytes of the machine,
    python, processor, libraries, shoal, gpu, model_digest ("" for hash), model_sent
    (through Spark, not found under the driver's path), device, backend, precision, parity.
    `canaries`: the canary vectors (C, D) as little-endian float32, by the encoder that a run would use there.
    """

    def visit(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            pass
        facts, canaries = look_around(spec, settings, options)
        yield pa.RecordBatch.from_arrays([pa.array([json.dumps(facts)]), pa.array([canaries])], schema=_SCHEMA)

    return visit


def look_around(spec: EncoderSpec, settings: EncoderConfig, options: EncodeOptions) -> tuple[dict[str, Any], bytes]:
    """Facts of this machine, and the canary vectors (C, D) as little-endian float32."""
    task = Task.current(options)
    options = prepare_worker(task, options)
    local = with_files_here(spec)
    found = resolve(local, task.device, options)
    digest = describe_checkpoint(settings, local.folder).weights_digest if local.folder else ""
    facts = {
        "host": socket.gethostname(),
        # Spark forks the workers of an executor from one daemon of its own.
        "executor": os.getppid(),
        "cores": len(os.sched_getaffinity(0)),
        "task_cores": task.cpus,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(SparkFiles.getRootDirectory()).free,
        "python": platform.python_version(),
        "processor": processor_name(),
        "libraries": library_versions(),
        "shoal": shoal_version(),
        "gpu": gpu_of(task.device),
        "model_digest": digest,
        "model_sent": local.folder != spec.folder,
        "device": task.device,
        "backend": found.spec.backend,
        "precision": found.spec.precision,
        "parity": float(found.parity_C.min()),
    }
    return facts, found.vectors_CD.astype("<f4").tobytes()


def shoal_version() -> str:
    """The version of Shoal that this process runs; "" where its metadata did not come along."""
    try:
        return metadata.version("shoal")
    except metadata.PackageNotFoundError:
        return ""


def gpu_of(device: str) -> dict[str, Any] | None:
    """Name, memory_bytes and driver of a CUDA device; None for the CPU."""
    if not device.startswith("cuda"):
        return None
    import torch  # seconds, and only where there is a device

    properties = torch.cuda.get_device_properties(device)
    driver = Path("/proc/driver/nvidia/version")
    told = driver.read_text(encoding="ascii").split("Module")[-1].split()[0] if driver.exists() else None
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": told,
        "cuda": torch.version.cuda,
    }
