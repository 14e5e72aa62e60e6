"""Sampling from an OpenAI-compatible server, for policies too large for the training machine.

The server's kernels and precision differ, and so do its log-probabilities: learning from its samples takes importance
correction. A trained adapter is handed over in a shared folder, through vLLM's documented routes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.errors import DataError, SettingError
from rlhf_lightning.models.adapters import POLICY, active_adapter, adapter_weights
from rlhf_lightning.models.causal_lm import CausalLM, inference_mode_of
from rlhf_lightning.models.layout import cut_sequences, padded_layout, select
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingRequest, SamplingSettings
from rlhf_lightning.sampling.json_server import JSONServer, ServerError, each, finite, request_seed
from rlhf_lightning.types import MicroBatchLimits, Sequences

MAX_TOKENS = 8192
"""Cells of a forward pass that scores a server's completions."""


class RemoteEngine(SamplingEngine):
    """Draws completions from a server; each episode has its own request and seed.

    Token ids go out and come back, with the log-probability of each, as vLLM serves them. Start vLLM with
    ``--logprobs-mode processed_logprobs`` (otherwise log-probabilities ignore the temperature), ``--generation-config
    vllm``, and for an adapter ``--enable-lora --max-lora-rank R`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``. The
    server
    uses its own random numbers: episodes differ from those of `SlotEngine` and are only as reproducible as its seeds.

    Args:
        url: address of the server without the route, such as ``http://host:8000``.
        model: the server's name of the policy's backbone, or of the policy itself if it has no adapter.
        adapter_folder: folder that trainer and server see under the same path; a changed adapter is handed over in it.
        tokenizer: folder or hub id of the tokenizer, for a server of text alone (``transformers serve``). The policy
            itself
            scores its completions, which leaves nothing to correct by: use them for evaluation, not for learning.
        requests: requests in flight at a time.
        timeout: time limit of one request, seconds.
        retries: repetitions of a request after a lost connection, a timeout or a busy server.
        wait: wait before the first repetition, seconds; doubles up to a minute.
        api_key: name of the environment variable that holds the server's key; null sends none.
    """

    exact = False

    def __init__(
        self,
        url: str,
        model: str,
        adapter_folder: str | None = None,
        tokenizer: str | None = None,
        requests: int = 64,
        timeout: float = 600.0,
        retries: int = 4,
        wait: float = 1.0,
        api_key: str | None = None,
    ) -> None:
        if requests < 1:
            raise SettingError("setting-out-of-range", f"requests is {requests}: it must be at least 1")
        self.model, self.requests = model, requests
        self.server = JSONServer(url.rstrip("/").removesuffix("/v1"), timeout, retries, wait, api_key)
        self.adapters = None if adapter_folder is None else _Adapters(self.server, Path(adapter_folder))
        self.tokenizer_name = tokenizer
        self.reports_logprobs = tokenizer is None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer for a server of text alone; loaded on first use."""
        if self._tokenizer is None and self.tokenizer_name is not None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name, trust_remote_code=False)
        return self._tokenizer

    def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
        prompts, settings, end_ids = request.prompts, request.settings, request.end_ids
        if request.mixture is not None:
            raise SettingError(
                "mixture-needs-slots",
                "a server samples from one model, and a mixture of models was asked for; use the SlotEngine",
            )
        name = self._model_name(model)
        bodies = [
            self._request(name, prompt, settings, request_seed(request.seed, int(episode)), end_ids)
            for prompt, episode in zip(prompts, request.episodes, strict=True)
        ]
        tokens = model.model.get_input_embeddings().weight.shape[0]
        drawn: list[_Drawn] = []
        for answer in each(partial(self.server.post, "/v1/completions"), bodies, self.requests):
            drawn.append(self._completion(answer, settings, end_ids, tokens))
            if request.on_progress is not None:
                request.on_progress(1)
        ids = tuple(one.ids for one in drawn)
        finished = torch.tensor([int(one.ids[-1]) in end_ids for one in drawn], dtype=torch.bool)
        if not self.reports_logprobs:
            return Completions(ids, scored(model, prompts, ids, settings.temperature or 1.0), finished)
        return Completions(ids, tuple(one.logprobs for one in drawn if one.logprobs is not None), finished)

    def _model_name(self, model: CausalLM) -> str:
        """Return the policy's name on the server, after handing over an adapter that has changed."""
        adapter = active_adapter(model.model) if model.has_adapter else None
        if adapter is None:
            if not model.has_adapter and any(parameter.requires_grad for parameter in model.parameters()):
                raise SettingError(
                    "server-needs-adapter",
                    "the policy trains all its weights, but the server's copy would stay the same; train an adapter "
                    "(lora)",
                )
            return self.model
        if self.adapters is None:
            raise SettingError(
                "no-adapter-folder",
                "the policy is an adapter, and adapter_folder is null; set it to a folder that the server reads too",
            )
        return self.adapters.hand_over(model, adapter)

    def _request(
        self, name: str, prompt: Tensor, settings: SamplingSettings, seed: int, end_ids: Sequence[int]
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": name,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "seed": seed,
        }
        if self.tokenizer is not None:
            config = _generation_config(settings, end_ids)
            return body | {"prompt": _text_of(self.tokenizer, prompt), "generation_config": json.dumps(config)}
        if settings.top_p < 1:
            body["top_p"] = settings.top_p
        if settings.top_k > 0:
            body["top_k"] = settings.top_k
        further = {"logprobs": 1, "stop_token_ids": list(end_ids), "ignore_eos": True, "skip_special_tokens": False}
        return (
            body | further | {"prompt": prompt.tolist(), "return_token_ids": True, "return_tokens_as_token_ids": True}
        )

    def _completion(self, answer: Any, settings: SamplingSettings, end_ids: Sequence[int], tokens: int) -> _Drawn:
        """Return the completion that an answer holds; its ids must be below ``tokens``."""
        try:
            choice = answer["choices"][0]
            if self.tokenizer is not None:
                return _Drawn(_read_text(self.tokenizer, choice, settings.max_new_tokens, end_ids), None)
            ids, logprobs = _read_ids(choice), [finite(value) for value in choice["logprobs"]["token_logprobs"]]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ServerError(
                "server-answer-unusable",
                f"{self.server.url} answered without the token ids and log-probabilities of a completion "
                f"({type(error).__name__}): {self.server.shown(answer)}; for a server that knows only text, set "
                "tokenizer",
            ) from None
        fault = ""
        if len(ids) != len(logprobs) or not 0 < len(ids) <= settings.max_new_tokens:
            fault = (
                f"answered with {len(ids)} tokens and {len(logprobs)} log-probabilities; "
                f"1 to {settings.max_new_tokens} of both were asked for"
            )
        elif wrong := [token for token in ids if not 0 <= token < tokens]:
            fault = (
                f"answered with the token id {wrong[0]}, but the policy has the ids 0 to {tokens - 1}; "
                "start the server with the policy's model"
            )
        elif max(logprobs) > 1e-3:
            fault = f"answered with log-probabilities above 0: {logprobs[:8]}"
        elif any(token in end_ids for token in ids[:-1]):
            fault = "continued after an end token: it ignores stop_token_ids; use a server that supports them"
        elif choice.get("finish_reason") == "stop" and ids[-1] not in end_ids:
            fault = (
                f"stopped without one of the end tokens {list(end_ids)}; start the server with the policy's tokenizer"
            )
        if fault:
            raise ServerError("server-answer-unusable", f"{self.server.url} {fault}")
        return _Drawn(torch.tensor(ids), torch.tensor(logprobs))


class _Drawn(NamedTuple):
    ids: Tensor
    logprobs: Tensor | None


def scored(
    model: CausalLM, prompts: Sequence[Tensor], completions: Sequence[Tensor], temperature: float
) -> tuple[Tensor, ...]:
    """Return the policy's own log-probability of each token of each completion."""
    rows = tuple(range(len(completions)))
    supervised = tuple(torch.ones(len(ids), dtype=torch.bool) for ids in completions)
    sequences = Sequences(tuple(prompts), tuple(completions), rows, supervised)
    device, found = next(model.parameters()).device, dict[int, Tensor]()
    with inference_mode_of(model):
        for cut in cut_sequences(sequences, limits=MicroBatchLimits(max_tokens=MAX_TOKENS)):
            grid = model(padded_layout(select(sequences, cut)).to(device), temperature).logprobs.cpu()
            found |= {row: grid[place, : len(completions[row])] for place, row in enumerate(cut)}
    return tuple(found[row] for row in rows)


class _Adapters:
    """Hands adapters over to a server: a folder and a name for each state; the previous one is unloaded.

    ``folder`` is seen by both sides under the same path.
    """

    def __init__(self, server: JSONServer, folder: Path) -> None:
        self.server, self.folder = server, folder.expanduser().absolute()
        self.loaded: dict[str, tuple[str, str]] = {}  # adapter -> digest of its weights, name on the server
        self.count = 0

    def hand_over(self, model: CausalLM, adapter: str) -> str:
        """Return the server's name of an adapter in its current state."""
        if is_sharded(model):
            raise SettingError(
                "sharded-adapter", "a sharded adapter cannot be handed to a server; use the strategy ddp"
            )
        digest = _digest(adapter_weights(model.model, adapter))
        held, name = self.loaded.get(adapter, ("", ""))
        if held == digest:
            return name
        rank = dist.get_rank() if dist.is_initialized() else 0
        new = f"rlhf-{adapter}-{os.getpid()}-{rank}-{self.count}"
        self.count += 1
        folder = self.folder / new
        model.model.save_pretrained(folder, selected_adapters=[adapter])
        # peft saves every adapter except the default one in a subfolder.
        path = folder if adapter == POLICY else folder / adapter
        self.server.post("/v1/load_lora_adapter", {"lora_name": new, "lora_path": str(path)})
        self.loaded[adapter] = (digest, new)
        if name:
            self.server.post("/v1/unload_lora_adapter", {"lora_name": name})
            shutil.rmtree(self.folder / name, ignore_errors=True)
        return new


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _generation_config(settings: SamplingSettings, end_ids: Sequence[int]) -> dict[str, Any]:
    """Return settings for ``transformers serve``, which otherwise follows the model's own generation config."""
    config = {"do_sample": settings.temperature > 0, "eos_token_id": list(end_ids), "pad_token_id": end_ids[0]}
    if settings.temperature > 0:
        config |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return config


def _read_ids(choice: Mapping[str, Any]) -> list[int]:
    """Return the token ids of a choice, from ``token_ids`` or from the tokens' texts."""
    if choice.get("token_ids") is None:
        return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
    ids = choice["token_ids"]
    if any(type(token) is not int for token in ids):
        raise ValueError("an id is not an integer")
    return list(ids)


def _text_of(tokenizer: PreTrainedTokenizerBase, prompt: Tensor) -> str:
    """Return the text of a prompt; refuse a prompt whose text is encoded to other tokens."""
    text = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if tokenizer(text)["input_ids"] != prompt.tolist():
        raise DataError(
            "prompt-text-differs",
            f"the server would encode the prompt's text to other tokens: {text[:200]!r}; use a server that takes "
            "token ids",
        )
    return text


def _read_text(
    tokenizer: PreTrainedTokenizerBase, choice: Mapping[str, Any], limit: int, end_ids: Sequence[int]
) -> Tensor:
    """Return the tokens of a completion that came as text; add an end token if it ended by itself."""
    if not isinstance(choice["text"], str):
        raise ValueError("the text is missing")
    ids = tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
    ids = [*ids[: next((i for i, token in enumerate(ids) if token in end_ids), len(ids))]]
    if choice["finish_reason"] == "stop" and len(ids) < limit:
        ids.append(tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else end_ids[0])
    if not ids:
        raise ValueError("an empty completion")
    return torch.tensor(ids[:limit])
