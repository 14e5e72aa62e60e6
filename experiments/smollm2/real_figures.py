"""Compute results with 95 % intervals from the held-out rows of the four stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import bag_of_words
import torch
from torch import Tensor

from rlhf_lightning import tokenization
from rlhf_lightning.evaluation.policies import ScoredSamples, mean_with_interval
from rlhf_lightning.functional.statistics import bootstrap_interval, calibration_error
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import sample

Row = dict[str, Any]


# -- intervals --------------------------------------------------------------------------------------------------------


def change(before: Sequence[float], after: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Return both means, the mean difference after - before, and its 95 % paired bootstrap interval over the rows.

    Raises:
        ValueError: the numbers of rows differ.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} rows before and {len(after)} after: a paired difference needs the same rows")
    first, last = (torch.tensor(values, dtype=torch.float64) for values in (before, after))
    difference = mean_with_interval(last - first, seed)
    return {
        "before": float(first.mean()),
        "after": float(last.mean()),
        "change": difference["mean"],
        "change_ci": difference["ci"],
    }


def token_mean(totals: Tensor, tokens: Tensor, seed: int = 0) -> dict[str, Any]:
    """Return the per-token mean of row totals, with a 95 % interval from resampling whole rows.

    Args:
        totals: sum over the tokens of each row, shape (rows,).
        tokens: number of tokens of each row, int64, shape (rows,).
        seed: seed of the resampling.
    """
    values = (totals / tokens).repeat_interleave(tokens)
    row = torch.arange(len(tokens)).repeat_interleave(tokens)
    low, high = bootstrap_interval(values, seed=seed, clusters=row)
    return {"mean": float(values.mean()), "ci": [float(low), float(high)]}


# -- results by stage -------------------------------------------------------------------------------------------------


def sft(passes: Sequence[Row], seed: int) -> dict[str, Any]:
    """Return the loss of the held-out demonstrations before and after, nats per token."""
    before, after = passes[0], passes[-1]
    tokens = torch.tensor(after["tokens"]).long()
    first, last = (torch.tensor(rows["negative_logprob"], dtype=torch.float64) for rows in (before, after))
    parts = [token_mean(values, tokens, seed) for values in (first, last, last - first)]
    return {
        "loss_before": parts[0]["mean"],
        "loss_after": parts[1]["mean"],
        "loss_change": parts[2]["mean"],
        "loss_change_ci": parts[2]["ci"],
        "perplexity_before": math.exp(parts[0]["mean"]),
        "perplexity_after": math.exp(parts[1]["mean"]),
        "eval_rows": len(tokens),
        "eval_tokens": int(tokens.sum()),
    }


def reward(rows: Row, tokenizer: Any, trained_on: Sequence[Row], unseen: Sequence[Row], seed: int) -> dict[str, Any]:
    """Return the accuracy of reward model and bag of words on the same unseen pairs, and their difference."""
    by_prompt = dict(zip(rows["prompt"], rows["score_margin"], strict=True))
    margins = torch.tensor([by_prompt[tuple(tokenization.encode_prompt(tokenizer, row["prompt"]))] for row in unseen])
    right = (margins > 0).double()
    weights = bag_of_words.fit_word_weights([texts(row) for row in trained_on])
    by_words = bag_of_words.is_right(weights, [texts(row) for row in unseen]).double()
    model, words, lead = (mean_with_interval(values, seed) for values in (right, by_words, right - by_words))
    longer = torch.tensor([len(chosen) > len(rejected) for chosen, rejected in map(texts, unseen)]).double()
    return {
        "accuracy": model["mean"],
        "accuracy_ci": model["ci"],
        "bag_of_words_accuracy": words["mean"],
        "bag_of_words_accuracy_ci": words["ci"],
        "lead": lead["mean"],
        "lead_ci": lead["ci"],
        "longer_accuracy": float(longer.mean()),
        "score_margin": float(margins.mean()),
        "ece": float(calibration_error(margins)),
        "eval_rows": len(unseen),
    }


def texts(row: Row) -> tuple[str, str]:
    """Return the chosen and the rejected completion of a conversational pair."""
    return row["chosen"][-1]["content"], row["rejected"][-1]["content"]


def dpo(rows: Row, seed: int) -> dict[str, Any]:
    """Return the implicit reward margin of held-out pairs; before training every margin is 0."""
    chosen, rejected = (torch.tensor(rows[f"{side}_reward"], dtype=torch.float64) for side in ("chosen", "rejected"))
    margin, right = mean_with_interval(chosen - rejected, seed), mean_with_interval((chosen > rejected).double(), seed)
    return {
        "reward_margin": margin["mean"],
        "reward_margin_ci": margin["ci"],
        "reward_accuracy": right["mean"],
        "reward_accuracy_ci": right["ci"],
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
        "loss_before": math.log(2),
        "loss_after": float(torch.tensor(rows["loss"], dtype=torch.float64).mean()),
        "eval_rows": len(chosen),
    }


def ppo(passes: Sequence[Row], seed: int) -> dict[str, Any]:
    """Return the score of held-out prompts before and after, sampled with the same random numbers."""
    before, after = passes[0], passes[-1]
    if before["prompt"] != after["prompt"]:
        raise ValueError("the held-out prompts came in another order after training: their answers cannot be paired")
    result: dict[str, Any] = {}
    for name, column in (
        ("score", "score"),
        ("trained_score", "ruled_score"),
        ("eos_rate", "finished"),
        ("completion_length", "length"),
    ):
        part = change(before[column], after[column], seed)
        result |= {f"{name}_before": part["before"], f"{name}_after": part["after"]}
        result |= {f"{name}_change": part["change"], f"{name}_change_ci": part["change_ci"]}
    kl = mean_with_interval(torch.tensor(after["kl"]), seed)
    return {**result, "kl": kl["mean"], "kl_ci": kl["ci"], "eval_rows": len(after["score"])}


def sampled(samples: ScoredSamples, seed: int) -> dict[str, Any]:
    """Return KL, EOS rate and length of a policy's samples."""
    assert samples.kl is not None
    kl = mean_with_interval(samples.kl, seed)
    return {
        "kl": kl["mean"],
        "kl_ci": kl["ci"],
        "eos_rate": float(samples.finished.double().mean()),
        "completion_length": float(samples.lengths.double().mean()),
        "sampled_prompts": len(samples.completions),
    }


# -- answers to show --------------------------------------------------------------------------------------------------


def shown_questions(rows: Sequence[Row], categories: Sequence[str], count: int) -> list[str]:
    """Return ``count`` questions: the first of each category, then the second of each, and so on."""
    of_category = [[row["prompt"][-1]["content"] for row in rows if row.get("category") == name] for name in categories]
    longest = max(map(len, of_category), default=0)
    in_turn = [questions[turn] for turn in range(longest) for questions in of_category if turn < len(questions)]
    return in_turn[:count]


def greedy_answers(policy: Any, tokenizer: Any, questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """Return the greedy answer to each question, truncated after ``max_new_tokens``."""
    prompts = [[{"role": "user", "content": question}] for question in questions]
    encoded = tuple(torch.tensor(tokenization.encode_prompt(tokenizer, prompt)) for prompt in prompts)
    settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=0.0)
    ends = tokenization.end_token_ids(tokenizer)
    drawn = sample(policy, encoded, torch.arange(len(encoded)), settings, 0, ends)
    answers = [tokenization.completion_text(tokenizer, ids.tolist()) for ids in drawn.ids]
    return [text if done else f"{text} ..." for text, done in zip(answers, drawn.finished.tolist(), strict=True)]
