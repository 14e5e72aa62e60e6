"""Sampling from a server of the OpenAI completions protocol, for policies that outgrow the machine they train on.

The server computes on other kernels and at another precision, so its log-probabilities differ from the trainer's, and
learning from its samples takes importance correction. An adapter in training is handed over through a folder that both
machines see, by the routes that vLLM documents for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from rlhf_lightning.sampling.json_server import JSONServer, ServerError
from rlhf_lightning.types import MicroBatchLimits, Sequences

MAX_TOKENS = 8192
"""Cells of a forward pass that scores what a server wrote."""


class RemoteEngine(SamplingEngine):
    """Draws completions from a server, each episode by a request and a seed of its own.

    Token ids go out and come back, with the log-probability of each, as vLLM serves them. Start it with
    ``--logprobs-mode processed_logprobs`` (at a temperature other than 1 its default reports other numbers than it drew
    with), ``--generation-config vllm``, and to train an adapter with ``--enable-lora --max-lora-rank R`` and
    ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``. The server draws with its own random numbers: episodes are not those of
    `SlotEngine`, and the same again only as far as the server's seeds reach.

    Args:
        url: address of the server without the route, such as ``http://host:8000``.
        model: name under which the server knows the policy's backbone, or the policy where it has no adapter.
        adapter_folder: folder that trainer and server see under the same path; the policy's adapter is handed over in
            it whenever it has changed.
        tokenizer: for a server that takes and returns text alone (``transformers serve``): the folder or hub id of its
            tokenizer. Its completions are encoded anew and scored by the policy itself, which leaves nothing to
            correct by, so they are for evaluation and not to learn from.
        requests: requests in flight at a time.
        timeout: of one request, seconds.
        retries: how often a request is made again after a lost connection, a time-out or a busy server.
        wait: before the first repetition, seconds; doubles up to a minute.
        api_key: name of the environment variable that holds the server's key; None sends none.
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
            raise SettingError("setting-out-of-range", f"requests is {requests}: it must be at least 1 at a time")
        self.model, self.requests = model, requests
        self.server = JSONServer(url.rstrip("/").removesuffix("/v1"), timeout, retries, wait, api_key)
        self.adapters = None if adapter_folder is None else _Adapters(self.server, Path(adapter_folder))
        self.tokenizer_name = tokenizer
        self.reports_logprobs = tokenizer is None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """What turns ids into text for a server that knows no ids; loaded on first use."""
        if self._tokenizer is None and self.tokenizer_name is not None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name, trust_remote_code=False)
        return self._tokenizer

    def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
        """Draw the completions.

        Raises:
            SettingError: a prompt is no text that the server would read as the same tokens; a mixture is asked for; or
                the server cannot have the policy's weights.
            ServerError: the server cannot be reached, or its answer is no completion.
        """
        prompts, settings, end_ids = request.prompts, request.settings, request.end_ids
        if request.mixture is not None:
            raise SettingError(
                "mixture-needs-slots",
                "a server samples from one model, and a mixture of models was asked for; use the SlotEngine",
            )
        name = self._name_of(model)
        bodies = [
            self._request(name, prompt, settings, _seed_of(request.seed, int(episode)), end_ids)
            for prompt, episode in zip(prompts, request.episodes, strict=True)
        ]
        drawn: list[_Drawn] = []
        with ThreadPoolExecutor(max_workers=self.requests) as pool:
            answers = [pool.submit(self.server.post, "/v1/completions", body) for body in bodies]
            try:
                for answer in answers:
                    drawn.append(self._completion(answer.result(), settings, end_ids))
                    if request.on_progress is not None:
                        request.on_progress(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what is not on its way yet would wait in vain
                raise
        ids = tuple(one.ids for one in drawn)
        finished = torch.tensor([int(one.ids[-1]) in end_ids for one in drawn], dtype=torch.bool)
        if not self.reports_logprobs:
            return Completions(ids, scored(model, prompts, ids, settings.temperature or 1.0), finished)
        return Completions(ids, tuple(one.logprobs for one in drawn if one.logprobs is not None), finished)

    def _name_of(self, model: CausalLM) -> str:
        """Return the name of the policy on the server, its adapter handed over if it has changed."""
        adapter = active_adapter(model.model) if model.has_adapter else None
        if adapter is None:
            if not model.has_adapter and any(parameter.requires_grad for parameter in model.parameters()):
                raise SettingError(
                    "server-needs-adapter",
                    "the policy trains all its weights, and the server's copy would not follow; train "
                    "an adapter (lora)",
                )
            return self.model
        if self.adapters is None:
            raise SettingError(
                "no-adapter-folder",
                "the policy is an adapter, and adapter_folder is null; set it to the folder where "
                "the server finds adapters",
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

    def _completion(self, answer: Any, settings: SamplingSettings, end_ids: Sequence[int]) -> _Drawn:
        """Return the completion that an answer holds."""
        try:
            choice = answer["choices"][0]
            if self.tokenizer is not None:
                return _Drawn(_read_text(self.tokenizer, choice, settings.max_new_tokens, end_ids), None)
            ids, logprobs = _read_ids(choice), [float(value) for value in choice["logprobs"]["token_logprobs"]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerError(
                "server-answer-unusable",
                f"{self.server.url} answered without the token ids and log-probabilities of a completion "
                f"({error!r}): {self.server.shown(answer)}; for a server that knows text alone, set "
                "tokenizer",
            ) from error
        if len(ids) != len(logprobs) or not 0 < len(ids) <= settings.max_new_tokens:
            raise ServerError(
                "server-answer-unusable",
                f"{self.server.url} answered with {len(ids)} tokens and {len(logprobs)} log-probabilities; "
                f"1 to {settings.max_new_tokens} of both were asked for",
            )
        if not all(math.isfinite(value) and value <= 1e-3 for value in logprobs):
            raise ServerError(
                "server-answer-unusable",
                f"{self.server.url} answered with invalid log-probabilities (not finite, or above 0): {logprobs[:8]}",
            )
        if any(token in end_ids for token in ids[:-1]):
            raise ServerError(
                "server-answer-unusable",
                f"{self.server.url} continued after an end token: it ignores stop_token_ids; use a "
                "server that supports them",
            )
        if choice.get("finish_reason") == "stop" and ids[-1] not in end_ids:
            raise ServerError(
                "server-answer-unusable",
                f"{self.server.url} stopped without one of the end tokens {list(end_ids)}; start the "
                "server with the policy's tokenizer",
            )
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


# -- what is said over the wire ---------------------------------------------------------------------------------------


class _Adapters:
    """Hands adapters over to a server: a folder and a name for each state, the one before unloaded.

    Args:
        server: the server.
        folder: seen by both sides under the same path.
    """

    def __init__(self, server: JSONServer, folder: Path) -> None:
        self.server, self.folder = server, folder.expanduser().absolute()
        self.loaded: dict[str, tuple[str, str]] = {}  # adapter -> digest of its weights, name on the server
        self.count = 0

    def hand_over(self, model: CausalLM, adapter: str) -> str:
        """Return the name on the server of an adapter as it is now."""
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
        # peft gives every adapter but the default one a folder below.
        path = folder if adapter == POLICY else folder / adapter
        self.server.post("/v1/load_lora_adapter", {"lora_name": new, "lora_path": str(path)})
        self.loaded[adapter] = (digest, new)
        if name:
            self.server.post("/v1/unload_lora_adapter", {"lora_name": name})
            shutil.rmtree(self.folder / name, ignore_errors=True)
        return new


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Return a digest of weights by name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _seed_of(seed: int, episode: int) -> int:
    """Return the server's seed of an episode, in [0, 2^31)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{episode}".encode()).digest()[:4], "big") >> 1


def _generation_config(settings: SamplingSettings, end_ids: Sequence[int]) -> dict[str, Any]:
    """Return how ``transformers serve`` is to draw, which would follow the model's own generation config otherwise."""
    config = {"do_sample": settings.temperature > 0, "eos_token_id": list(end_ids), "pad_token_id": end_ids[0]}
    if settings.temperature > 0:
        config |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return config


def _read_ids(choice: Mapping[str, Any]) -> list[int]:
    """Return the token ids of a choice: named as such, or in the place of the tokens' texts."""
    if choice.get("token_ids") is not None:
        return [int(token) for token in choice["token_ids"]]
    return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]


def _text_of(tokenizer: PreTrainedTokenizerBase, prompt: Tensor) -> str:
    """Return the text of a prompt.

    Raises:
        DataError: the server would read other tokens.
    """
    text = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if tokenizer(text)["input_ids"] != prompt.tolist():
        raise DataError(
            "prompt-text-differs",
            "the server would read other tokens from the prompt's text than the prompt holds: "
            f"{text[:200]!r}; use a server that takes token ids",
        )
    return text


def _read_text(
    tokenizer: PreTrainedTokenizerBase, choice: Mapping[str, Any], limit: int, end_ids: Sequence[int]
) -> Tensor:
    """Return the tokens of a completion that came as text, with an end token where it ended by itself."""
    ids = tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
    ids = [*ids[: next((i for i, token in enumerate(ids) if token in end_ids), len(ids))]]
    if choice["finish_reason"] == "stop" and len(ids) < limit:
        ids.append(tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else end_ids[0])
    if not ids:
        raise ValueError("an empty completion")
    return torch.tensor(ids[:limit])
