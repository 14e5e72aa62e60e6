"""Both ends of a weight transfer over gloo, in place of NCCL: the trainer's link, and a server's receiver."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_lightning.sampling.remote_engine import RemoteEngine
from rlhf_lightning.sampling.weight_stream import NCCLHandOver

TIMEOUT = timedelta(seconds=60)


class GlooLink:
    """The trainer's end: rank 0 of a group with the workers of one server."""

    def __init__(self, workers: int, device: torch.device) -> None:
        self.ranks = workers + 1
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        self.init_info = {
            "master_address": "127.0.0.1", "master_port": self.store.port, "rank_offset": 1, "world_size": self.ranks,
        }  # fmt: skip

    def join(self) -> None:
        self.group = dist.ProcessGroupGloo(self.store, 0, self.ranks, TIMEOUT)

    def send(self, tensor: Tensor) -> None:
        self.group.broadcast(tensor.detach().cpu(), 0).wait()


class GlooEngine(RemoteEngine):
    """An engine that streams weights over gloo."""

    def __init__(self, url: str | list[str], model: str, sync_bound: float | None = 1e-4, sleep: bool = False) -> None:
        super().__init__(url, model, transfer="nccl", sync_bound=sync_bound, sleep=sleep, retries=0)
        self.weights = NCCLHandOver(GlooLink)


class Receiver:
    """A server's end: one worker, which refuses requests in another order than vLLM's."""

    ROUTES = (
        "/shutdown_weight_transfer_engine", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
        "/finish_weight_update",
    )  # fmt: skip

    def __init__(self) -> None:
        self.group: Any = None
        self.updating, self.version = False, "default"
        self.lost: str | None = None  # name of a tensor that is received and not loaded

    def answer(self, route: str, body: Mapping[str, Any], model: torch.nn.Module) -> tuple[int, Any]:
        if route == "/shutdown_weight_transfer_engine":
            self.group = None
        elif route == "/init_weight_transfer_engine":
            info = body["init_info"]
            store = dist.TCPStore(info["master_address"], info["master_port"], is_master=False, timeout=TIMEOUT)
            self.group = dist.ProcessGroupGloo(store, info["rank_offset"], info["world_size"], TIMEOUT)
        elif route == "/update_weights":
            if self.group is None or not self.updating:
                return 400, {"error": "call /init_weight_transfer_engine and /start_weight_update first"}
            self._receive(body["update_info"], model)
        elif self.updating == (route == "/start_weight_update"):
            return 400, {"error": f"{route} while an update is {'' if self.updating else 'not '}active"}
        else:
            self.updating = route == "/start_weight_update"
            self.version = body.get("weight_version", self.version)
        return 200, {}

    def _receive(self, info: Mapping[str, Any], model: torch.nn.Module) -> None:
        state = model.state_dict()
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(tensor, 0).wait()
            if name != self.lost:
                state[name].copy_(tensor)
