"""Sample with transformers: ``generate``, which samples the same episodes, and continuous batching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from rlhf_lightning.errors import StateError
from rlhf_lightning.models.causal_lm import CausalLM, inference_mode_of
from rlhf_lightning.sampling.drawing import draw, uniform
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingRequest, SamplingSettings
from rlhf_lightning.sampling.json_server import request_seed
from rlhf_lightning.tokenization import Ends


class GenerateEngine(SamplingEngine):
    """Sample with ``generate``, batch after batch; each batch takes as long as its longest completion.

    A logits processor samples each token with its seeded random number, so the episodes are those of `SlotEngine`. Use
    it for models that override ``generate``, and for comparisons.
    """

    def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
        prompts, settings, end_ids = request.prompts, request.settings, request.end_ids
        self.require_one_model(model, request)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        size = settings.batch_size or max(len(order), 1)
        ids, logprobs = [torch.zeros(0, dtype=torch.long)] * len(prompts), [torch.zeros(0)] * len(prompts)
        finished = torch.zeros(len(prompts), dtype=torch.bool)
        with inference_mode_of(model), _own_generation_config(model.model):
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                device = next(model.parameters()).device
                addresses = request.episodes[rows].to(device), request.first_positions[rows].to(device)
                drawer = _Drawer(settings, request.seed, *addresses)
                tokens = _generate(model, [prompts[row] for row in rows], settings, end_ids, drawer)
                scores = torch.stack(drawer.logprobs, -1).cpu()
                stops = torch.isin(tokens, torch.tensor(list(end_ids)))
                for row, drawn, score, stop in zip(rows, tokens, scores, stops, strict=True):
                    finished[row] = stop.any()
                    count = int(stop.int().argmax()) + 1 if finished[row] else len(drawn)
                    ids[row], logprobs[row] = drawn[:count], score[:count]
                if request.on_progress is not None:
                    request.on_progress(len(rows))
        return Completions(tuple(ids), tuple(logprobs), finished)


BLOCK, BATCH_TOKENS = 32, 2048
"""Tokens per block of the paged KV cache, and tokens per forward pass of continuous batching."""


class ContinuousBatchingEngine(SamplingEngine):
    """Sample with transformers' continuous batching: a paged KV cache, and CUDA graphs on a GPU.

    It runs on the policy itself, so no weights are transferred. Its attention kernels differ from the trainer's, so
    learning from its samples needs a sampler correction. Its random numbers are torch's, so episodes depend on the
    other episodes of their rollout.
    """

    exact = False

    def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
        prompts, settings, end_ids = request.prompts, request.settings, request.end_ids
        self.require_one_model(model, request)
        if not prompts:
            return Completions((), (), torch.zeros(0, dtype=torch.bool))
        config = GenerationConfig(
            do_sample=settings.temperature > 0, max_new_tokens=settings.max_new_tokens, eos_token_id=list(end_ids),
            pad_token_id=end_ids[0], temperature=settings.temperature or 1.0, top_p=settings.top_p,
            top_k=settings.top_k,
        )  # fmt: skip
        # Without a limit, the cache would take most of the free memory.
        blocks = sum(-(-(len(prompt) + settings.max_new_tokens) // BLOCK) for prompt in prompts)
        batching = ContinuousBatchingConfig(
            return_logprobs=True, block_size=BLOCK, num_blocks=blocks + len(prompts), max_batch_tokens=BATCH_TOKENS
        )
        device = next(model.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with inference_mode_of(model), _own_generation_config(model.model), torch.random.fork_rng(devices):
            torch.manual_seed(request_seed(request.seed, int(request.episodes[0]), int(request.first_positions[0])))
            found = model.model.generate_batch(
                [prompt.tolist() for prompt in prompts],
                generation_config=config,
                continuous_batching_config=batching,
            )
        drawn = [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]
        faults = [one.error for one in drawn if one.error] or ["a request is missing"] * (len(drawn) != len(prompts))
        if faults:
            raise StateError("sampling-failed", f"continuous batching failed: {faults[0]}")
        if request.on_progress is not None:
            request.on_progress(len(drawn))
        ids = tuple(torch.tensor(one.generated_tokens) for one in drawn)
        finished = torch.tensor([int(row[-1]) in end_ids for row in ids], dtype=torch.bool)
        return Completions(ids, tuple(torch.tensor(one.logprobs) for one in drawn), finished)


class _Drawer(LogitsProcessor):
    """Sample each row's token with its seeded random number, and leave ``generate`` no other choice."""

    def __init__(self, settings: SamplingSettings, seed: int, episodes: Tensor, starts: Tensor) -> None:
        self.settings, self.seed, self.episodes, self.starts = settings, seed, episodes, starts
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        positions = self.starts + len(self.logprobs)
        numbers = uniform(self.seed, self.episodes, positions)
        chosen, logprobs, _ = draw(scores.float(), numbers, *self.settings.distribution)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen.unsqueeze(-1), 0.0)


class _TextEnds(StoppingCriteria):
    """Stop rows whose completions contain a stop string.

    Args:
        ends: the stop strings.
        width: number of prompt tokens.
    """

    def __init__(self, ends: Ends, width: int) -> None:
        self.ends, self.width = ends, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        said = input_ids[:, self.width :].tolist()
        return torch.tensor([self.ends.completed(ids) for ids in said], device=input_ids.device)


def _generate(
    model: CausalLM, prompts: Sequence[Tensor], settings: SamplingSettings, end_ids: Ends, drawer: _Drawer
) -> Tensor:
    """Return the tokens that ``generate`` appends to each prompt, shape (rows, longest completion), on the CPU."""
    width, device = max(len(prompt) for prompt in prompts), next(model.parameters()).device
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    config = GenerationConfig(
        do_sample=False, max_new_tokens=settings.max_new_tokens, eos_token_id=list(end_ids), pad_token_id=end_ids[0]
    )
    drawn = model.model.generate(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        logits_processor=LogitsProcessorList([drawer]),
        stopping_criteria=StoppingCriteriaList([_TextEnds(end_ids, width)] if end_ids.strings else []),
    )
    return drawn[:, width:].cpu()


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Replace the model's generation config temporarily, since ``generate`` would read top_p and others from it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
