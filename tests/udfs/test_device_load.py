"""What a device says of itself: without a GPU nothing, on one memory and, with NVIDIA's library, utilisation."""

import pytest
import torch

from shoal.udfs.device_load import device_load


def test_only_a_gpu_that_is_there_has_a_load() -> None:
    assert device_load("cpu") is None
    assert device_load(f"cuda:{torch.cuda.device_count()}") is None


@pytest.mark.gpu
def test_a_gpu_tells_its_memory_and_how_busy_it_is() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.zeros(1, device="cuda:0")
    before = device_load("cuda:0")
    held = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda:0")
    load = device_load("cuda:0")
    assert before is not None
    assert load is not None
    assert load.used_bytes >= before.used_bytes + held.numel()
    assert load.total_bytes == torch.cuda.get_device_properties(0).total_memory
    assert load.busy_percent is None or 0 <= load.busy_percent <= 100
