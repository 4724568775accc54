"""What a GPU is doing while it encodes: memory as CUDA tells it, utilisation where NVIDIA's own library is there."""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceLoad:
    """Of the whole device, whoever uses it; busy_percent: of the last moments, None without nvidia-ml-py."""

    used_bytes: int
    total_bytes: int
    busy_percent: int | None


def device_load(device: str) -> DeviceLoad | None:
    """The load of a CUDA device; None of any other, and where it cannot be told: this is for people to look at."""
    if not device.startswith("cuda"):
        return None
    import torch

    try:
        free, total = torch.cuda.mem_get_info(device)
    except Exception:
        logger.debug("the load of %s cannot be told", device, exc_info=True)
        return None
    return DeviceLoad(total - free, total, _busy_percent(device))


def _busy_percent(device: str) -> int | None:
    import torch

    try:
        return int(torch.cuda.utilization(device))
    except Exception:  # noqa: BLE001 - the library is missing, or the driver does not tell
        return None
