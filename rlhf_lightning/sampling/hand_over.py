"""Transfer the trainer's weights to servers, and probe the servers' log-probabilities afterwards.

Adapters are loaded through vLLM's LoRA routes, with a new name on the server for each version. Full weights are written
to a folder from which the server reloads. Trainer and server access the folder under the same path.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor

from rlhf_lightning.errors import SettingError
from rlhf_lightning.models.adapters import POLICY, adapter_weights
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.sharding import (
    is_first_rank,
    is_sharded,
    on_any_rank,
    wait_for_ranks,
    whole_weights,
)
from rlhf_lightning.sampling.drawing import uniform
from rlhf_lightning.sampling.json_server import JSONServer, ServerError, finite, named_id

WEIGHTS = "model.safetensors"

ALREADY_LOADED = "already been loaded"
"""Part of vLLM's refusal of an adapter's name that it knows."""

Place = tuple[int, int]
"""Index of a probe sequence, and the id of a token after it."""

ForServers = Callable[[Callable[[JSONServer], object]], None]
"""Calls a function with each server."""


class AdapterHandOver:
    """Register each version of an adapter under a new name, and unload the oldest version.

    Args:
        folder: folder that trainer and servers access under the same path.
        versions: number of versions kept registered; episodes of earlier versions may still be in flight.
    """

    def __init__(self, folder: Path, versions: int = 1) -> None:
        self.folder, self.versions = folder.expanduser().absolute(), versions
        self.loaded: dict[str, list[tuple[str, str]]] = {}  # adapter -> digest and name of each version, oldest first

    def hand_over(self, model: CausalLM, adapter: str, for_servers: ForServers) -> tuple[str, bool]:
        """Return the servers' name of an adapter in its current state, and whether it was newly registered.

        Every rank of a sharded policy must call this; the first rank writes and registers.
        """
        weights = whole_weights(model.model) if is_sharded(model) else adapter_weights(model.model, adapter)
        sharded = is_sharded(model)
        digest = _shared(_digest(weights or {})) if sharded else _digest(weights or {})
        held = self.loaded.setdefault(adapter, [])
        for known, name in held:
            if known == digest:
                return name, False
        # Process ids repeat: a trainer in a container is often process 1, also when it resumes.
        new = f"rlhf-{adapter}-{secrets.token_hex(8)}"
        new = _shared(new) if sharded else new
        old = held.pop(0)[1] if len(held) >= self.versions else None
        held.append((digest, new))
        if not sharded or is_first_rank():
            self._register(model, adapter, new, weights if sharded else None, old, for_servers)
        if sharded:
            wait_for_ranks()
        return new, True

    def _register(
        self,
        model: CausalLM,
        adapter: str,
        new: str,
        weights: Mapping[str, Tensor] | None,
        old: str | None,
        for_servers: ForServers,
    ) -> None:
        given = {} if weights is None else {"state_dict": dict(weights)}
        model.model.save_pretrained(self.folder / new, selected_adapters=[adapter], **given)
        for_servers(lambda server: self._load(server, adapter, new))
        if old is not None:
            # A restarted server does not know the old version.
            for_servers(lambda server: _accepted(server, "/v1/unload_lora_adapter", {"lora_name": old}, "status 404"))
            shutil.rmtree(self.folder / old, ignore_errors=True)

    def _load(self, server: JSONServer, adapter: str, name: str) -> bool:
        """Register a version on a server; return False if the server knew it, as when a response had been lost."""
        # peft saves every adapter except the default one in a subfolder.
        path = self.folder / name if adapter == POLICY else self.folder / name / adapter
        body = {"lora_name": name, "lora_path": str(path)}
        return _accepted(server, "/v1/load_lora_adapter", body, ALREADY_LOADED)

    def register_again(self, server: JSONServer, name: str) -> bool:
        """Register a version on a server that was restarted; return False if no adapter has this name.

        Another thread may have registered it just before.
        """
        for adapter, held in list(self.loaded.items()):
            if name in [version for _, version in held]:
                if self._load(server, adapter, name):
                    rank_zero_warn(f"{server.url} was started again: {name} is registered on it once more.")
                return True
        return False


def _accepted(server: JSONServer, route: str, body: Mapping[str, Any], harmless: str) -> bool:
    """Return whether a server accepts a request; a refusal that contains ``harmless`` is tolerated."""
    try:
        server.post(route, body)
    except ServerError as error:
        if error.code != "server-refused" or harmless not in str(error):
            raise
        return False
    return True


class FolderHandOver:
    """Write all weights into the folder that the servers were started from, and make the servers reload them.

    The LM head is written as a separate tensor even if the policy ties it to the embeddings. A server may keep a packed
    copy of a tied head that reloading does not replace.

    Args:
        folder: folder of `write_server_folder`, accessed by trainer and servers under the same path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.digest = ""

    def hand_over(self, model: CausalLM, for_servers: ForServers) -> bool:
        """Transfer the model's weights to the servers; return whether the servers had other weights.

        Every rank must call this; the first rank writes. The servers must not be sampling meanwhile.

        Raises:
            SettingError: the folder was not written for servers.
        """
        if not (self.folder / "config.json").is_file():
            raise SettingError(
                "no-server-folder",
                f"{self.folder} holds no model that a server was started from: start the server with "
                f"`rlhf serve-vllm MODEL --folder {self.folder}`, and give the same folder here",
            )
        gathered = whole_weights(model.model)
        weights = untied(model.model.state_dict() if gathered is None else gathered)
        digest = _digest(weights)
        # The first rank holds all weights. It waits for the others, whose episodes may still be in flight.
        if not on_any_rank(model, digest != self.digest):
            return False
        self.digest = digest
        if is_first_rank():
            fresh = self.folder / f".{WEIGHTS}.new"
            save_file(weights, fresh, metadata={"format": "pt"})
            os.replace(fresh, self.folder / WEIGHTS)
            for_servers(_reload)
        wait_for_ranks()
        return True


def _reload(server: JSONServer) -> None:
    """Make a server read its folder again. The sequence may be repeated, also on a server that was restarted in it."""
    server.post("/pause?mode=wait&clear_cache=true", {})
    server.post("/collective_rpc", {"method": "reload_weights"})
    server.post("/reset_prefix_cache", {})
    server.post("/resume", {})


def write_server_folder(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Write a transformers model and its tokenizer for servers that use `FolderHandOver`.

    The weights are in one file, with an untied LM head.
    """
    folder = Path(folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    config = type(model.config).from_dict(model.config.to_dict())
    config.tie_word_embeddings = False
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(untied(model.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def untied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights on the CPU, each with its own memory."""
    seen: set[int] = set()
    found = {}
    for name, weight in weights.items():
        weight = weight.detach().cpu().contiguous()
        found[name] = weight.clone() if weight.data_ptr() in seen else weight
        seen.add(weight.data_ptr())
    return found


class Probe:
    """Compare a server's next-token log-probabilities after fixed sequences with the trainer's.

    The probe checks the mean difference. It also compares with the trainer's values before the update: a server that
    kept the old weights returns these values, even if the update changed them by less than the bound. The probe
    requests sampled tokens instead of ``prompt_logprobs``, which crash vLLM's CPU worker with an adapter.

    Args:
        bound: largest allowed mean difference, nats per token.
        sequences: number of sequences.
        length: tokens per sequence.
        top: number of most probable next tokens to compare.
    """

    def __init__(self, bound: float, sequences: int = 8, length: int = 24, top: int = 20) -> None:
        self.bound, self.count, self.length, self.top = bound, sequences, length, top
        self.before: dict[str, dict[Place, float]] = {}  # server's address -> the trainer's values before the update

    def sequences(self, tokens: int) -> Tensor:
        """Return the sequences for a vocabulary of this many tokens, int64, shape (sequences, length)."""
        rows = torch.arange(self.count).unsqueeze(-1).expand(-1, self.length)
        places = torch.arange(self.length).expand(self.count, -1)
        return (uniform(0, rows, places) * tokens).long().clamp_max(tokens - 1)

    def request(self, name: str, sequences: Tensor) -> dict[str, Any]:
        """Return the request for a model's most probable tokens after each sequence."""
        return {
            "model": name, "prompt": sequences.tolist(), "max_tokens": 1, "temperature": 1.0, "seed": 0, "top_p": 1.0,
            "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "logprobs": self.top,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip

    def read(self, server: JSONServer, answer: Any, sequences: Tensor, tokens: int) -> dict[Place, float]:
        """Return the log-probabilities of the most probable tokens after each sequence from a server's response.

        Raises:
            ServerError: log-probabilities are missing for a sequence, or an id is not below ``tokens``.
        """
        try:
            rows = range(len(sequences))
            found = {
                (rows.index(choice["index"]), named_id(token)): finite(value)
                for choice in answer["choices"]
                for token, value in choice["logprobs"]["top_logprobs"][0].items()
            }
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                "server-answer-unusable",
                f"{server.url} answered the probe without top_logprobs ({type(error).__name__}): "
                f"{server.shown(answer)}; use a server that reports them, or set sync_bound to null",
            ) from None
        answered = {row for row, _ in found}
        if answered != set(rows) or max(token for _, token in found) >= tokens:
            raise ServerError(
                "server-answer-unusable",
                f"{server.url} answered the probe for {len(answered)} of {len(rows)} sequences, or with "
                f"token ids above {tokens - 1}; start the server with the policy's model",
            )
        return found

    def check(self, server: JSONServer, found: Mapping[Place, float], expected: Mapping[Place, float]) -> float:
        """Return the mean difference between a server's and the trainer's log-probabilities, nats per token.

        Raises:
            ServerError: ``stale-server`` or ``server-disagrees``.
        """
        before, self.before[server.url] = self.before.get(server.url, {}), dict(expected)
        error = sum(abs(found[place] - expected[place]) for place in expected) / max(len(expected), 1)
        both = [place for place in expected if place in before]
        table = torch.tensor([[numbers[place] for place in both] for numbers in (found, before, expected)])
        if _nearer_to(*table.double()):
            raise ServerError(
                "stale-server",
                f"{server.url} answers with the weights before the last update (the probe differs by {error:.3g} nats "
                "per token): the hand-over had no effect. Start the server on the folder of the engine (rlhf "
                "serve-vllm does), with VLLM_SERVER_DEV_MODE=1 for full weights",
            )
        if not error <= self.bound:
            raise ServerError(
                "server-disagrees",
                f"after the hand-over {server.url} gives log-probabilities that differ by {error:.3g} nats per token "
                f"from the trainer's (bound {self.bound:g}): it serves another model, another precision, or a head "
                "tied to the embeddings that was not loaded again; start it with rlhf serve-vllm, or raise sync_bound",
            )
        return error


def _nearer_to(found: Tensor, before: Tensor, now: Tensor) -> bool:
    """Return whether values are significantly closer to those before an update than to those after it.

    The values are projected on the line from before to now; the residual is noise. The update must have moved the
    values by much more than the noise.
    """
    moved, off = now - before, found - before
    length = float(moved.norm())
    if length == 0 or len(moved) < 10:
        return False
    share = float(off @ moved) / length**2
    noise = float((off - share * moved).norm()) / max(len(moved) - 1, 1) ** 0.5
    return share < 0.5 and length > 8 * noise


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        raw = weights[name].detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(name.encode())
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def _shared(value: str) -> str:
    """Return the first rank's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
