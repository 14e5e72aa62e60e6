"""Replace NCCL by gloo in a vLLM server; the server imports this file, in the environment of vLLM."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """vLLM's engine for NCCL with another process group; start and finish of an update are vLLM's own."""

    def init_transfer_engine(self, init_info: Any) -> None:
        """Join the trainer's group."""
        timeout = timedelta(seconds=60)
        store = dist.TCPStore(init_info.master_address, init_info.master_port, is_master=False, timeout=timeout)
        self.gloo = dist.ProcessGroupGloo(store, init_info.rank_offset, init_info.world_size, timeout)

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Receive and load the tensors one by one."""
        info = self.parse_update_info(dict(update_info))
        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.gloo.broadcast(tensor, 0).wait()
            self.model.load_weights([(name, tensor)])


WeightTransferEngineFactory._registry["nccl"] = lambda: GlooWeightTransferEngine


class Extension:
    """What ``--worker-extension-cls`` names, so that every worker imports this file."""
