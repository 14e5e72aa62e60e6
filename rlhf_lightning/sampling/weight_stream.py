"""Stream all weights to vLLM servers, one tensor at a time and without a shared folder.

vLLM's HTTP routes start and finish an update. In between, the workers of a server receive the tensors, by NCCL from
another GPU, or by CUDA IPC from the memory of their own GPU. Sharded weights are gathered one tensor at a time.
"""

from __future__ import annotations

import base64
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import reduce_tensor

from rlhf_lightning.errors import SettingError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.sharding import is_first_rank, on_any_rank, wait_for_ranks, whole
from rlhf_lightning.sampling.json_server import JSONServer, ServerError
from rlhf_lightning.workers import Threads

GRACE_SECONDS = 10.0
"""Longest wait for the answer of a server after a broadcast has failed, seconds."""


class StreamHandOver(ABC):
    """Replace the weights of servers while they run; a subclass defines how tensors reach the servers."""

    def __init__(self) -> None:
        self.digest = ""
        self.updates = 0

    @property
    def version(self) -> str:
        """The servers' name of the current weights."""
        return f"rlhf-{self.updates}"

    def hand_over(self, model: CausalLM, servers: Sequence[JSONServer]) -> bool:
        """Transfer the model's weights to the servers; return whether the servers had other weights.

        Every rank must call this; the first rank sends. The servers must not be sampling meanwhile.
        """
        weights, device = model.model.state_dict(keep_vars=True), next(model.parameters()).device
        digest = _local_digest(weights)
        if not on_any_rank(model, digest != self.digest):
            return False
        told = servers if is_first_rank() else ()
        self.connect(told, device)
        for server in told:
            server.post("/pause?mode=wait&clear_cache=true", {})
            server.post("/start_weight_update", {})
        self.send(weights, told)
        self.updates += 1
        for server in told:
            server.post("/finish_weight_update", {"weight_version": self.version})
            server.post("/reset_prefix_cache", {})
            server.post("/resume", {})
        wait_for_ranks()
        self.digest = digest
        return True

    def check(self, servers: Sequence[JSONServer]) -> None:
        """Check that servers still have the weights of the last transfer.

        Raises:
            ServerError: ``stale-server``: a server was started again since, with its initial weights.
        """
        for server in servers:
            found = server.get("/weight_info").get("weight_version")
            if found != self.version:
                raise ServerError(
                    "stale-server",
                    f"{server.url} has the weights {found!r}, and {self.version!r} were sent to it: it was started "
                    "again during the run, with its initial weights. Start all servers again, and resume the run",
                )

    @abstractmethod
    def connect(self, servers: Sequence[JSONServer], device: torch.device) -> None:
        """Connect to servers that are not yet connected; other ranks than the first get no servers."""

    @abstractmethod
    def send(self, weights: Mapping[str, Tensor], servers: Sequence[JSONServer]) -> None:
        """Send every tensor to every server. All ranks gather sharded tensors, and the first rank gets the servers."""


# -- NCCL -------------------------------------------------------------------------------------------------------------


class Link(Protocol):
    """Process group of the trainer, which is rank 0, and the workers of one server.

    Attributes:
        init_info: what the server needs to join.
    """

    init_info: Mapping[str, Any]

    def __init__(self, workers: int, device: torch.device) -> None:
        """Prepare a group with a number of workers; tensors are sent from the device."""

    def join(self) -> None:
        """Join the group, together with the workers."""

    def send(self, tensor: Tensor) -> None:
        """Broadcast a contiguous tensor to the workers."""


class NCCLLink:
    """Group of GPUs. Trainer and server must use the same version of NCCL."""

    def __init__(self, workers: int, device: torch.device) -> None:
        if device.type != "cuda":
            raise SettingError("nccl-without-gpu", f"transfer is nccl, and the policy is on {device}: use folder")
        self.ranks, self.device, self.key = workers + 1, device, nccl.unique_id()
        self.init_info: Mapping[str, Any] = {
            "nccl_unique_id_b64": base64.b64encode(self.key).decode(), "rank_offset": 1, "world_size": self.ranks,
        }  # fmt: skip

    def join(self) -> None:
        """Join the group; vLLM's workers then expect a sum of one number."""
        with torch.cuda.device(self.device):
            self.communicator = nccl.init_rank(self.ranks, self.key, 0)
            nccl.all_reduce([torch.zeros(1, device=self.device)], comms=[self.communicator])
            torch.cuda.synchronize()

    def send(self, tensor: Tensor) -> None:
        """Broadcast a tensor; it has arrived once the server has answered ``/update_weights``."""
        nccl.broadcast([tensor], comms=[self.communicator])


class NCCLHandOver(StreamHandOver):
    """Broadcast the weights from the first rank to the workers of each server.

    Args:
        link: class of the process groups.
    """

    def __init__(self, link: Callable[[int, torch.device], Link] = NCCLLink) -> None:
        super().__init__()
        self.link = link
        self._links: dict[str, Link] = {}

    def connect(self, servers: Sequence[JSONServer], device: torch.device) -> None:
        for server in servers:
            if server.url in self._links:
                continue
            link = self.link(server.get("/get_world_size")["world_size"], device)
            server.post("/shutdown_weight_transfer_engine", {})  # leaves the group of a trainer that has ended
            joining = Threads(1).submit(link.join)
            server.post("/init_weight_transfer_engine", {"init_info": {**link.init_info}}, retries=0)
            joining.result(server.timeout)
            self._links[server.url] = link

    def send(self, weights: Mapping[str, Tensor], servers: Sequence[JSONServer]) -> None:
        body, threads = {"update_info": _listing(weights)}, Threads(len(servers))
        answers = [threads.submit(partial(server.post, "/update_weights", body, retries=0)) for server in servers]
        try:
            for weight in weights.values():
                tensor = whole(weight.detach()).contiguous()
                for server in servers:
                    self._links[server.url].send(tensor)
                _raise_failures(answers)
        except RuntimeError:  # a server left the group, and its answer says why
            wait(answers, GRACE_SECONDS, FIRST_EXCEPTION)
            _raise_failures(answers)
            raise
        for answer in answers:
            answer.result()


def _raise_failures(answers: Sequence[Future[Any]]) -> None:
    """Raise the error of a server that has stopped receiving, since a broadcast would wait for it."""
    for answer in answers:
        if answer.done():
            answer.result()


# -- CUDA IPC ---------------------------------------------------------------------------------------------------------


class IPCHandOver(StreamHandOver):
    """Let a server on the trainer's GPU read the weights from the trainer's memory."""

    def __init__(self) -> None:
        super().__init__()
        self._connected = False

    def connect(self, servers: Sequence[JSONServer], device: torch.device) -> None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if device.type != "cuda" or len(servers) > 1 or ranks > 1:
            raise SettingError(
                "ipc-needs-one-gpu",
                f"transfer is ipc, with {ranks} trainer(s) on {device} and {len(servers)} server(s): ipc connects one "
                "trainer and one server on the same GPU; use nccl or folder",
            )
        if not self._connected:
            servers[0].post("/init_weight_transfer_engine", {"init_info": {}})
            self._connected = True

    def send(self, weights: Mapping[str, Tensor], servers: Sequence[JSONServer]) -> None:
        for name, weight in weights.items():
            tensor = whole(weight.detach()).contiguous()
            uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
            _, handle = reduce_tensor(tensor)
            torch.cuda.synchronize(tensor.device)
            packed = base64.b64encode(pickle.dumps([{uuid: handle}])).decode()
            body = {"update_info": {**_listing({name: weight}), "ipc_handles_pickled": packed}}
            servers[0].post("/update_weights", body, retries=0)


# -- tensors ----------------------------------------------------------------------------------------------------------


def _listing(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return names, types and whole shapes."""
    return {
        "names": list(weights),
        "dtype_names": [str(weight.dtype).removeprefix("torch.") for weight in weights.values()],
        "shapes": [list(weight.shape) for weight in weights.values()],
    }


def _local_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a hash of this rank's shards, computed on their device: the weights may be too large for the CPU."""
    shards = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights.values()]
    hashes = [torch.hash_tensor(shard.detach()).view(torch.int64) for shard in shards]
    return str(torch.stack(hashes).tolist())
