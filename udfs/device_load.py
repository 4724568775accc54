"""What a GPU is doing while it encodes: memory as CUDA tells it, utilisation where NVIDIA's own library is there."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceLoad:
    """Of the whole device, whoever uses it; busy_percent: of the last moments, None without nvidia-ml-py."""

    used_bytes: int
    total_bytes: int
    busy_percent: int | None


def device_load(device: str) -> DeviceLoad | None:
    """The load of a CUDA device that this process uses; None of any other, and where it cannot be told.

    It is for people to look at, so nobody's memory is spent on it: a process that asks CUDA of a device it does not use
    would get a context there.
    """
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda") or not torch.cuda.is_initialized():
        return None
    try:
        free, total = torch.cuda.mem_get_info(device)
    except Exception:
        logger.debug("the load of %s cannot be told", device, exc_info=True)
        return None
    try:
        busy = int(torch.cuda.utilization(device))
    except Exception:  # noqa: BLE001 - the library is missing, or the driver does not tell
        busy = None
    return DeviceLoad(total - free, total, busy)
