"""Sampling completions from the policy: pure sampling at a temperature, addressed random numbers, no wasted rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_lightning.models.causal_lm import CausalLM, DecodingStep, inference_mode_of
from rlhf_lightning.models.counter_rng import uniform
from rlhf_lightning.models.sharding import in_step


@dataclass
class SamplingSettings:
    """How completions are drawn. The model's own generation config is never consulted.

    Args:
        max_new_tokens: longest completion, tokens.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: keep the smallest set of tokens with this probability. Training needs 1: log-probabilities of a
            truncated distribution are not the policy's.
        top_k: keep this many likeliest tokens; 0 keeps all.
        batch_size: completions decoded side by side; None takes all at once.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: at least one token must be sampled")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: it must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: it must be 0 (all tokens) or positive")

    @property
    def is_pure(self) -> bool:
        """Whether tokens come from the policy's own distribution at the temperature, untruncated."""
        return self.temperature > 0 and self.top_p == 1.0 and self.top_k == 0


class Mixture(NamedTuple):
    """A second model that has a say in every token.

    Attributes:
        other: lends the second model; called for each of its forward passes, so that it may be another state of the
            first (adapters off).
        mix: the next-token logits to sample from, of the first model's and the second's, all (rows, vocabulary).
    """

    other: Callable[[], AbstractContextManager[CausalLM]]
    mix: Callable[[Tensor, Tensor], Tensor]


class Completions(NamedTuple):
    """What was sampled, in the order of the prompts.

    Attributes:
        ids: token ids of each completion, the end token included where it was reached; int64.
        logprobs: log-probability of each sampled token at the temperature; fp32.
        finished: bool, True where the end token was reached, shape (rows,).
    """

    ids: tuple[Tensor, ...]
    logprobs: tuple[Tensor, ...]
    finished: Tensor


def sample(
    model: CausalLM,
    prompts: Sequence[Tensor],
    episodes: Tensor,
    settings: SamplingSettings,
    seed: int,
    end_ids: Sequence[int],
    on_progress: Callable[[int], None] | None = None,
    mixture: Mixture | None = None,
) -> Completions:
    """Sample one completion for each prompt.

    The token at position t of episode e is the inverse CDF of the next-token distribution at the random number
    addressed by (seed, e, t). Prompts of like length are decoded together; finished completions leave the batch.

    Args:
        model: the policy; put in eval mode for the while.
        prompts: token ids of each prompt, int64.
        episodes: number of each episode, int64, shape (rows,).
        settings: temperature, length limit.
        seed: seed of the run.
        end_ids: tokens that end a completion.
        on_progress: called with the number of completions as they finish.
        mixture: a second model to sample from together with the first; None samples from the first alone.

    Raises:
        ValueError: a prompt is empty, so there is nothing to predict from.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty: the first token of a completion is predicted from the prompt's last one")
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    size = settings.batch_size or max(len(order), 1)
    ids: dict[int, Tensor] = {}
    logprobs: dict[int, Tensor] = {}
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    with inference_mode_of(model), in_step(model, partial(_pass_for_nothing, model, mixture)) as before_pass:
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            chosen = [prompts[row] for row in rows]
            decoded = _decode(chosen, episodes[rows], model, settings, seed, end_ids, mixture, before_pass)
            for row, tokens, scores, done in zip(rows, *decoded, strict=True):
                ids[row], logprobs[row], finished[row] = tokens, scores, done
            if on_progress is not None:
                on_progress(len(rows))
    indices = range(len(prompts))
    return Completions(tuple(ids[i] for i in indices), tuple(logprobs[i] for i in indices), finished)


def _decode(
    prompts: Sequence[Tensor],
    episodes: Tensor,
    model: CausalLM,
    settings: SamplingSettings,
    seed: int,
    end_ids: Sequence[int],
    mixture: Mixture | None,
    before_pass: Callable[[], None],
) -> tuple[list[Tensor], list[Tensor], list[bool]]:
    """Decode some prompts side by side; rows leave the batch once a quarter of it has finished."""
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    attention_mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        attention_mask[row, width - len(prompt) :] = 1
    input_ids, attention_mask, episodes = input_ids.to(device), attention_mask.to(device), episodes.to(device)
    positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    reader = _Reader(model) if mixture is None else _MixedReader(model, mixture)
    ends = torch.tensor(list(end_ids), device=device)

    tokens = torch.zeros(len(prompts), settings.max_new_tokens, dtype=torch.long, device=device)
    scores = torch.zeros(len(prompts), settings.max_new_tokens, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    alive = torch.arange(len(prompts), device=device)  # rows still in the batch
    active = torch.ones(len(prompts), dtype=torch.bool, device=device)  # of those, the unfinished ones
    for step in range(settings.max_new_tokens):
        before_pass()
        logits = reader.read(input_ids, attention_mask, positions)
        chosen, logprob = _draw(logits, settings, seed, episodes[alive], step)
        tokens[alive, step] = torch.where(active, chosen, 0)
        scores[alive, step] = torch.where(active, logprob, 0.0)
        lengths[alive] += active.long()
        stops = active & torch.isin(chosen, ends)
        ended[alive] |= stops
        active = active & ~stops
        left = int(active.sum())
        if left == 0:
            break
        input_ids, positions = chosen.unsqueeze(-1), positions[:, -1:] + 1
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(alive), 1)], dim=-1)
        if left <= 0.75 * len(alive):
            kept = active.nonzero().squeeze(-1)
            reader.keep(kept)
            alive, active = alive[kept], active[kept]
            input_ids, positions, attention_mask = input_ids[kept], positions[kept], attention_mask[kept]
    counts = lengths.tolist()
    tokens, scores = tokens.cpu(), scores.cpu()
    rows = range(len(prompts))
    return [tokens[r, : counts[r]] for r in rows], [scores[r, : counts[r]] for r in rows], ended.tolist()


class _Reader:
    """A model that reads rows of tokens on from where it was, and says what may come next."""

    def __init__(self, model: CausalLM) -> None:
        self.model, self.cache = model, DynamicCache(config=model.model.config)

    def read(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Return the logits of the token behind the last one, shape (rows, vocabulary)."""
        return self.model(DecodingStep(input_ids, attention_mask, positions, self.cache))

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.cache.batch_select_indices(rows)


class _MixedReader(_Reader):
    """Two models that read the same tokens, their logits mixed; each remembers in a cache of its own."""

    def __init__(self, model: CausalLM, mixture: Mixture) -> None:
        super().__init__(model)
        self.mixture = mixture
        with mixture.other() as other:
            self.other = _Reader(other)

    def read(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Return the mixed logits, shape (rows, vocabulary)."""
        own = super().read(input_ids, attention_mask, positions)
        with self.mixture.other():
            return self.mixture.mix(own, self.other.read(input_ids, attention_mask, positions))

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        super().keep(rows)
        self.other.keep(rows)


def _pass_for_nothing(model: CausalLM, mixture: Mixture | None) -> None:
    """Forward one token: other ranks are still decoding, and the weights they gather are cut over all ranks."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    reader = _Reader(model) if mixture is None else _MixedReader(model, mixture)
    reader.read(token, torch.ones_like(token), token)


def _draw(
    logits: Tensor, settings: SamplingSettings, seed: int, episodes: Tensor, position: int
) -> tuple[Tensor, Tensor]:
    """Return the token drawn for each row, and its log-probability at the temperature."""
    if settings.temperature == 0:
        best = logits.argmax(-1)
        return best, logits.log_softmax(-1).gather(-1, best.unsqueeze(-1)).squeeze(-1)
    logprobs = (logits / settings.temperature).log_softmax(-1)
    kept = _truncate(logprobs, settings)
    cumulative = kept.double().exp().cumsum(-1)
    numbers = uniform(seed, episodes, torch.full_like(episodes, position))
    drawn = torch.searchsorted(cumulative, (numbers * cumulative[:, -1]).unsqueeze(-1)).squeeze(-1)
    drawn = drawn.clamp_max(logits.shape[-1] - 1)
    return drawn, logprobs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def _truncate(logprobs: Tensor, settings: SamplingSettings) -> Tensor:
    """Set the log-probability of tokens outside top_k and top_p to -inf."""
    if settings.top_k > 0:
        least = logprobs.topk(min(settings.top_k, logprobs.shape[-1])).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, -torch.inf)
    if settings.top_p < 1:
        ordered, index = logprobs.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        dropped = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, index, before >= settings.top_p)
        logprobs = logprobs.masked_fill(dropped, -torch.inf)
    return logprobs
