"""Evaluate policies on held-out prompts: samples, proxy score, gold reward and KL to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import DataError
from rlhf_lightning.functional.logprobs import kl_k1
from rlhf_lightning.functional.statistics import best_of_n_curve, bootstrap_interval
from rlhf_lightning.models.causal_lm import CausalLM, inference_mode_of
from rlhf_lightning.models.layout import cut_sequences, lay_out, select
from rlhf_lightning.sampling.engines import SamplingEngine, SamplingSettings
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.scoring import LearnedScorer, Scorer
from rlhf_lightning.scoring.scorer import GoldReward, ask_scorer
from rlhf_lightning.types import MicroBatchLimits, Prompt, Sequences

MAX_TOKENS = 16_384


class ScoredSamples(NamedTuple):
    """Completions of a policy with their metrics. All tensors have shape (completions,)."""

    prompts: list[Prompt]  # the prompt of each completion
    completions: list[str]  # text of each completion
    scores: Tensor | None  # the scorer's score of each completion; None without a scorer
    gold: Tensor | None  # gold reward of each completion; None if no gold reward is known
    kl: Tensor | None  # sum over tokens of log policy - log reference, nats; None without a reference
    lengths: Tensor  # tokens, including the end token
    finished: Tensor  # whether the completion ended before the length limit


def sample_and_score(
    policy: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    seed: int,
    samples_per_prompt: int = 1,
    reference: CausalLM | None = None,
    scorer: Scorer | None = None,
    gold_reward: GoldReward | None = None,
    engine: SamplingEngine | None = None,
) -> ScoredSamples:
    """Sample completions of every prompt and measure them.

    With the same seed all policies use the same random numbers, so their samples are paired.

    Args:
        policy: the model to sample from.
        tokenizer: its tokenizer.
        prompts: held-out prompts.
        sampling: sampling settings.
        seed: seed of the sampling.
        samples_per_prompt: completions per prompt, adjacent in the result.
        reference: model to which the KL is measured.
        scorer: proxy score.
        gold_reward: true reward of (prompt, completion).
        engine: the engine; SlotEngine by default.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    encoded = tuple(torch.tensor(tokenization.encode_prompt(tokenizer, prompt)) for prompt in repeated)
    ends = tokenization.end_token_ids(tokenizer)
    drawn = (engine or SlotEngine()).sample(policy, encoded, torch.arange(len(encoded)), sampling, seed, ends)
    texts = tokenization.completion_texts(tokenizer, [ids.tolist() for ids in drawn.ids])
    sequences = Sequences(
        prompts=encoded,
        completions=drawn.ids,
        parents=tuple(range(len(encoded))),
        supervised=tuple(torch.ones(len(ids), dtype=torch.bool) for ids in drawn.ids),
    )
    scores = None
    if isinstance(scorer, LearnedScorer) and scorer.shares_tokenizer(tokenizer):
        scores = scorer.score_sequences(sequences)
    elif scorer is not None:
        scores = ask_scorer(scorer, repeated, texts, {}, type(scorer).__name__).scores
    gold = None
    if gold_reward is not None:
        pairs = zip(repeated, texts, strict=True)
        gold = torch.tensor([gold_reward(prompt, text) for prompt, text in pairs], dtype=torch.float64)
    return ScoredSamples(
        prompts=repeated,
        completions=texts,
        scores=scores,
        gold=gold,
        kl=None if reference is None else sequence_kl(policy, reference, sequences, sampling.temperature or 1.0),
        lengths=torch.tensor([len(ids) for ids in drawn.ids]),
        finished=drawn.finished,
    )


def sequence_kl(policy: CausalLM, reference: CausalLM, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """Return the KL estimate of each completion in nats: the sum over tokens of log policy - log reference."""
    device, totals = next(policy.parameters()).device, torch.zeros(len(sequences.completions))
    with inference_mode_of(policy), inference_mode_of(reference):
        share = policy.reads_trees and reference.reads_trees
        for rows in cut_sequences(sequences, limits=MicroBatchLimits(max_tokens=MAX_TOKENS), pack_rows=share):
            layout = lay_out(select(sequences, rows), share).to(device)
            tokens = kl_k1(policy(layout, temperature).logprobs, reference(layout, temperature).logprobs)
            totals[rows] = tokens.sum(-1).cpu()
    return totals


def best_of_n(samples: ScoredSamples, samples_per_prompt: int, n: int, of: Literal["gold", "scores"]) -> Tensor:
    """Return gold reward or proxy score of best-of-n sampling by proxy score for each prompt, shape (prompts,).

    This is the unbiased estimate over all subsets of ``n`` of a prompt's samples.

    Raises:
        DataError: the samples have no scores or no gold reward.
    """
    scores, values = samples.scores, getattr(samples, of)
    if scores is None or values is None:
        raise DataError("no-scores", f"best-of-n needs scores and {of}: sample with a scorer and a gold reward")
    pairs = zip(scores.double().view(-1, samples_per_prompt), values.double().view(-1, samples_per_prompt), strict=True)
    return torch.stack([best_of_n_curve(score, value)[n - 1] for score, value in pairs])


def mean_with_interval(values: Tensor, seed: int = 0) -> dict[str, Any]:
    """Return ``{"mean", "ci"}`` with a 95 % bootstrap interval over the values."""
    low, high = bootstrap_interval(values.double(), seed=seed)
    return {"mean": float(values.double().mean()), "ci": [float(low), float(high)]}
