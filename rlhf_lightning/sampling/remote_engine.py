"""Sample from an OpenAI-compatible server, for policies too large for the training machine.

The server's kernels and precision differ, so its log-probabilities differ too, and learning from its samples needs
importance correction. Trained weights are transferred in a shared folder or from GPU to GPU; a probe compares
log-probabilities afterwards.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.errors import SettingError
from rlhf_lightning.models.adapters import active_adapter
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.folders import reading
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.sharding import is_first_rank, wait_for_ranks
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingRequest, SamplingSettings, spread
from rlhf_lightning.sampling.hand_over import AdapterHandOver, FolderHandOver, Place, Probe
from rlhf_lightning.sampling.json_server import JSONServer, ServerError, each, finite, named_id, request_seed
from rlhf_lightning.sampling.own_logprobs import scored
from rlhf_lightning.sampling.text_server import generation_config, read_text, text_of
from rlhf_lightning.sampling.weight_stream import IPCHandOver, NCCLHandOver, StreamHandOver
from rlhf_lightning.tokenization import Ends

LEAVING = threading.Lock()
"""Held while an unresponsive server is removed, since several requests detect it at the same time."""


class RemoteEngine(SamplingEngine):
    """Sample completions from servers; each episode has its own request and seed.

    Requests contain token ids, and responses contain token ids with their log-probabilities, as in vLLM; ``rlhf
    serve-vllm`` starts it with the required settings. The server uses its own random numbers, so episodes differ from
    those of `SlotEngine` and are only as reproducible as the server's seeded sampling.

    Args:
        url: address of the server without the route, such as ``http://host:8000``, or a list of addresses. Prompts are
            distributed over several servers by length; a server that does not respond is removed for the rest of the
            run.
        model: the server's name of the policy's backbone, or of the policy itself if it has no adapter.
        shared_folder: folder that trainer and servers access under the same path. A changed adapter is transferred in
            it; for a policy without adapter it is the folder that the servers were started from.
        transfer: how the weights of a policy without adapter reach the servers. "folder": through ``shared_folder``;
            "nccl": broadcast from the trainer's GPU to the servers' GPUs; "ipc": read by a server on the trainer's GPU.
        sleep: let a server on the trainer's GPU free its memory while the policy trains.
        sync_bound: largest allowed mean difference between the servers' and the trainer's log-probabilities of fixed
            sequences after a weight transfer, nats per token; null does not probe.
        tokenizer: folder or hub id of the tokenizer, for a server that only handles text (``transformers serve``). The
            policy itself then computes the log-probabilities, so no correction is possible: use such a server for
            evaluation, not for learning.
        requests: number of concurrent requests.
        timeout: time limit of one request, seconds.
        retries: retries of a request after a lost connection, a timeout or a busy server.
        wait: wait before the first retry, seconds; doubles up to a minute.
        api_key: name of the environment variable with the server's API key; null sends none.
    """

    exact = False

    def __init__(
        self,
        url: str | list[str],
        model: str,
        shared_folder: str | None = None,
        transfer: Literal["folder", "nccl", "ipc"] = "folder",
        sleep: bool = False,
        sync_bound: float | None = 0.05,
        tokenizer: str | None = None,
        requests: int = 64,
        timeout: float = 600.0,
        retries: int = 4,
        wait: float = 1.0,
        api_key: str | None = None,
    ) -> None:
        if requests < 1:
            raise SettingError("setting-out-of-range", f"requests is {requests}: it must be at least 1")
        if transfer != "folder" and shared_folder is not None:
            raise SettingError(
                "transfer-and-folder",
                f"transfer is {transfer} and shared_folder {shared_folder}: the weights reach the server without a "
                "folder, so leave one of the two out",
            )
        self.model, self.requests = model, requests
        urls = [url] if isinstance(url, str) else url
        if not urls:
            raise SettingError("invalid-url", "url is an empty list: give at least one server's address")
        self.servers = [JSONServer(u.rstrip("/").removesuffix("/v1"), timeout, retries, wait, api_key) for u in urls]
        folder = None if shared_folder is None else Path(shared_folder)
        self.adapters = None if folder is None else AdapterHandOver(folder)
        self.weights: FolderHandOver | StreamHandOver | None = None if folder is None else FolderHandOver(folder)
        if transfer != "folder":
            self.weights = NCCLHandOver() if transfer == "nccl" else IPCHandOver()
        self.sleep = sleep
        self.probe = None if sync_bound is None else Probe(sync_bound)
        self.tokenizer_name = tokenizer
        self.reports_logprobs = tokenizer is None
        self._name = model  # the servers' name of the model that is sampled from
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._in_flight: list[Future[Completions]] = []
        self._pool: ThreadPoolExecutor | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer for a server that only handles text; loaded on first use."""
        if self._tokenizer is None and self.tokenizer_name is not None:
            with reading(self.tokenizer_name, "tokenizer"):
                self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name, trust_remote_code=False)
        return self._tokenizer

    def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
        self.require_one_model(model, request, whole=False)
        return self._draw(self._name, _vocabulary(model), request)

    def start(self, model: CausalLM, request: SamplingRequest) -> Callable[[], Completions]:
        """Transfer the weights now, and let the servers sample while the caller trains."""
        if not self.reports_logprobs:
            return super().start(model, request)
        self.require_one_model(model, request, whole=False)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1)
        with self.synchronized(model):
            future = self._pool.submit(self._draw, self._name, _vocabulary(model), request)
        self._in_flight = [one for one in self._in_flight if not one.done()] + [future]
        return future.result

    def prepare(self, init_from: str, settings: LoadSettings, lora: LoraSettings | None, versions: int) -> None:
        if self.adapters is not None:
            self.adapters.versions = versions
        if self.sleep and versions > 1:
            raise SettingError(
                "sleep-with-lag",
                f"sleep is true and lag {versions - 1}: with lag the server samples while the policy trains, so it "
                "cannot free its memory; set one of the two to its default",
            )

    @contextmanager
    def synchronized(self, model: CausalLM) -> Iterator[None]:
        """Transfer changed weights. Servers that sleep while the policy trains are awake in the context."""
        if self.sleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._post_once("/wake_up")
        self._name = self._model_name(model)
        yield
        if self.sleep:
            self._post_once("/sleep?level=1")

    def _post_once(self, route: str) -> None:
        """Post to all servers from the first rank, while the other ranks wait."""
        wait_for_ranks()
        if is_first_rank():
            for server in self.servers:
                server.post(route, {})
        wait_for_ranks()

    def _draw(self, name: str, tokens: int, request: SamplingRequest) -> Completions:
        settings, end_ids = request.settings, request.end_ids
        bodies = [
            self._request(name, prompt, settings, request_seed(request.seed, int(episode), int(start)), end_ids)
            for prompt, episode, start in zip(request.prompts, request.episodes, request.first_positions, strict=True)
        ]
        servers = list(self.servers)
        parts = spread([len(prompt) for prompt in request.prompts], len(servers))
        owners = {row: server for server, part in zip(servers, parts, strict=False) for row in part}

        def ask(row: int) -> tuple[JSONServer, Any]:
            return self._ask(owners[row], bodies[row])

        drawn: list[tuple[Tensor, Tensor]] = []
        for server, answer in each(ask, range(len(bodies)), self.requests):
            drawn.append(self._completion(server, answer, settings, end_ids, tokens))
            if request.on_progress is not None:
                request.on_progress(1)
        if isinstance(self.weights, StreamHandOver) and self.weights.digest:
            self.weights.check(self.servers)
        finished = torch.tensor([int(ids[-1]) in end_ids for ids, _ in drawn], dtype=torch.bool)
        return Completions(tuple(ids for ids, _ in drawn), tuple(logprobs for _, logprobs in drawn), finished)

    def _ask(self, server: JSONServer, body: dict[str, Any]) -> tuple[JSONServer, Any]:
        """Return a server's response and the server; if the server does not respond, ask another one."""
        while True:
            server = server if server in self.servers else self.servers[0]
            try:
                return server, self._post(server, body)
            except ServerError as error:
                self._leave_out(server, error)

    def _post(self, server: JSONServer, body: dict[str, Any]) -> Any:
        """Return a server's response. A server that does not know the adapter was restarted, and gets it again."""
        for attempt in count():
            try:
                return server.post("/v1/completions", body)
            except ServerError as error:
                unknown = error.code == "server-refused" and "status 404" in str(error)
                if not unknown or self.adapters is None or attempt > server.retries:
                    raise
                with LEAVING:
                    if not self.adapters.register_again(server, body["model"]):
                        raise

    def _for_servers(self, action: Callable[[JSONServer], object]) -> None:
        """Call a function with each server; a server that does not respond is left out."""
        for server in list(self.servers):
            try:
                action(server)
            except ServerError as error:
                self._leave_out(server, error)

    def _leave_out(self, server: JSONServer, error: ServerError) -> None:
        """Remove a server that does not respond; raise every other error, and that of the last server."""
        with LEAVING:
            if error.code != "server-silent":
                raise error
            if server not in self.servers:
                return
            if len(self.servers) == 1:
                raise error
            self.servers.remove(server)
            rank_zero_warn(
                f"{error}; it is left out from now on, and its prompts go to {len(self.servers)} other servers."
            )

    def _model_name(self, model: CausalLM) -> str:
        """Return the policy's name on the servers, after transferring weights that have changed."""
        adapter = active_adapter(model.model) if model.has_adapter else None
        if adapter is None:
            return self._full_weights(model)
        if self.adapters is None:
            raise SettingError(
                "no-shared-folder",
                "the policy is an adapter, and shared_folder is null; set it to a folder that the server reads too",
            )
        name, fresh = self.adapters.hand_over(model, adapter, self._for_servers)
        if fresh:
            self._check_sync(model, name)
        return name

    def _full_weights(self, model: CausalLM) -> str:
        if model.has_adapter or not any(parameter.requires_grad for parameter in model.parameters()):
            if self.weights is not None and self.weights.digest:
                raise SettingError(
                    "server-holds-policy",
                    "a frozen model was to be sampled from, and the servers hold the trained policy; use the "
                    "SlotEngine for it, or train an adapter (lora)",
                )
            return self.model
        if self.weights is None:
            raise SettingError(
                "no-shared-folder",
                "the policy trains all its weights, and shared_folder is null: set it to the folder that the server "
                "was started from (rlhf serve-vllm MODEL --folder FOLDER), set transfer, or train an adapter (lora)",
            )
        for future in self._in_flight:  # episodes in flight keep the weights that they started with
            future.exception()
        if isinstance(self.weights, StreamHandOver):  # all servers receive together, so none can be left out
            changed = self.weights.hand_over(model, self.servers)
        else:
            changed = self.weights.hand_over(model, self._for_servers)
        if changed:
            self._check_sync(model, self.model)
        return self.model

    def _check_sync(self, model: CausalLM, name: str) -> None:
        """Probe every server after a weight transfer."""
        if self.probe is None or not self.reports_logprobs:
            return
        probe, tokens, found = self.probe, _vocabulary(model), dict[JSONServer, dict[Place, float]]()
        sequences = probe.sequences(tokens)

        def ask(server: JSONServer) -> None:
            answer = self._post(server, probe.request(name, sequences))
            found[server] = probe.read(server, answer, sequences, tokens)

        self._for_servers(ask)
        # One call for all servers: ranks of a sharded policy may have left out different servers.
        places = sorted({place for answered in found.values() for place in answered})
        own = scored(model, [sequences[row] for row, _ in places], [torch.tensor([token]) for _, token in places], 1.0)
        expected = dict(zip(places, (float(value) for value in own), strict=True))
        self.sync_error = max(
            probe.check(server, answered, {place: expected[place] for place in answered})
            for server, answered in found.items()
        )

    def _request(
        self, name: str, prompt: Tensor, settings: SamplingSettings, seed: int, end_ids: Ends
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": name,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "seed": seed,
        }
        if self.tokenizer is not None:
            config = generation_config(settings, end_ids)
            return body | {"prompt": text_of(self.tokenizer, prompt), "generation_config": json.dumps(config)}
        # All settings are sent, since a server takes missing settings from the model's generation config.
        body |= {"top_p": settings.top_p, "top_k": settings.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
        further = {"logprobs": 1, "stop_token_ids": list(end_ids), "ignore_eos": True, "skip_special_tokens": False}
        if end_ids.strings:
            further["stop"] = list(end_ids.strings)
        return (
            body | further | {"prompt": prompt.tolist(), "return_token_ids": True, "return_tokens_as_token_ids": True}
        )

    def _completion(
        self, server: JSONServer, answer: Any, settings: SamplingSettings, end_ids: Ends, tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Return ids (below ``tokens``) and log-probabilities of a response; for text the latter are empty."""
        try:
            choice = answer["choices"][0]
            if self.tokenizer is not None:
                return read_text(self.tokenizer, choice, settings.max_new_tokens, end_ids), torch.zeros(0)
            ids, logprobs = _read_ids(choice), [finite(value) for value in choice["logprobs"]["token_logprobs"]]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ServerError(
                "server-answer-unusable",
                f"{server.url} answered without the token ids and log-probabilities of a completion "
                f"({type(error).__name__}): {server.shown(answer)}; for a server that knows only text, set tokenizer",
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
        elif choice.get("finish_reason") == "stop" and ids[-1] not in end_ids and end_ids.stop(ids) is None:
            fault = (
                f"stopped without one of the end tokens {list(end_ids)}; start the server with the policy's tokenizer"
            )
        if fault:
            raise ServerError("server-answer-unusable", f"{server.url} {fault}")
        return torch.tensor(ids), torch.tensor(logprobs)


def _vocabulary(model: CausalLM) -> int:
    """Return the number of token ids of a policy."""
    return int(model.model.get_input_embeddings().weight.shape[0])


def _read_ids(choice: Mapping[str, Any]) -> list[int]:
    """Return the token ids of a choice, from ``token_ids`` or from the tokens' texts."""
    if choice.get("token_ids") is None:
        return [named_id(token) for token in choice["logprobs"]["tokens"]]
    ids = choice["token_ids"]
    if any(type(token) is not int for token in ids):
        raise ValueError("an id is not an integer")
    return list(ids)
