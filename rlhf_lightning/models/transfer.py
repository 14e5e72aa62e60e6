"""Copy tensors from the host to a device without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on ``device``; a copy from the host to a GPU goes through pinned memory.

    Without it the driver copies pageable memory in stages, and this thread waits for everything that is queued on the
    GPU. PyTorch keeps pinned blocks, and reuses a block only after its copy has ended.
    """
    to_gpu = torch.device(device).type == "cuda"
    if to_gpu and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=to_gpu)  # a copy to the host must end before the host reads it
