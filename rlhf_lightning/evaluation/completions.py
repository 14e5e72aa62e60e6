"""Compare policies by their completions of the same prompts: scores, diversity, pass@k, win rates and judges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.differences import Difference, clustered_difference
from rlhf_lightning.functional.judging import debiased_probability, position_bias, preference_probability, verdict
from rlhf_lightning.functional.statistics import (
    bootstrap_interval,
    length_controlled_fit,
    length_controlled_win_rate,
    pass_at_k,
    win_rate,
)
from rlhf_lightning.scoring.judges.judge import ComparingPrinciple, Judge, Question, Wording, as_text, checked_answers
from rlhf_lightning.types import Prompt

Row = dict[str, Any]
"""A completion in the format of `rlhf generate`, with ``kl`` if it was measured."""

QUESTION = "Which answer is more helpful, honest and harmless?"
DRAWS_PER_REFIT = 50
"""Ratio of bootstrap draws of a mean to refits of the length-controlled win rate, which cost more."""


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Return distinct-n, the share of distinct word n-grams among all n-grams (Li et al., arXiv 1510.03055).

    It falls with the number and length of texts, so compare policies on equal numbers of completions.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def written(row: Row) -> str:
    """Return the text of a completion; of an episode with an environment, all turns after the prompt."""
    from rlhf_lightning.runs.samples import as_text as turns_text

    return turns_text(row["turns"]) if "turns" in row else str(row["completion"])


def prompt_numbers(rows: Sequence[Row], samples: int) -> list[int]:
    """Return the number of each row's prompt; the samples of a prompt are adjacent."""
    return [place // samples for place in range(len(rows))]


def grouped(rows: Sequence[Row], samples: int) -> list[Sequence[Row]]:
    """Return the rows of each prompt; the samples of a prompt are adjacent."""
    return [rows[start : start + samples] for start in range(0, len(rows), samples)]


def summary(rows: Sequence[Row], samples: int, correct: float | None = None, seed: int = 0) -> dict[str, Any]:
    """Return the metrics of one policy; means have bootstrap intervals over prompts.

    Args:
        rows: its completions; the samples of a prompt are adjacent.
        samples: completions per prompt.
        correct: lowest score of a correct completion, for pass@k; None leaves pass@k out.
        seed: seed of the resampling.
    """
    clusters, texts = prompt_numbers(rows, samples), [row["completion"] for row in rows]
    names = dict.fromkeys(
        name for row in rows for name in row if name in ("score", "gold", "kl") or name.startswith("score_")
    )
    found: dict[str, Any] = {"completions": len(rows), "prompts": len(rows) // samples}
    for name in (*names, "length"):
        values = values_of(rows, name)
        mean = clustered_difference(values.tolist(), clusters, seed)
        found[name] = {"mean": mean.mean, "ci": [mean.low, mean.high], "missing": int(np.isnan(values).sum())}
    found["eos_rate"] = float(np.mean([row["finished"] for row in rows]))
    found |= {f"distinct_{n}": distinct_ngrams(texts, n) for n in (1, 2, 3)}
    found["unique"] = len({(cluster, text) for cluster, text in zip(clusters, texts, strict=True)}) / len(rows)
    if correct is not None:
        right = torch.from_numpy(values_of(rows, "score") >= correct).view(-1, samples).sum(-1)  # NaN counts as wrong
        for k in doublings(samples):
            rates = pass_at_k(samples, right, k)
            low, high = bootstrap_interval(rates, seed=seed)
            found[f"pass@{k}"] = {"mean": float(rates.mean()), "ci": [float(low), float(high)]}
    return found


def doublings(most: int) -> list[int]:
    """Return 1, 2, 4, ... and ``most``."""
    return sorted({2**power for power in range(most.bit_length())} | {most})


def values_of(rows: Sequence[Row], name: str) -> np.ndarray:
    """Return a metric of each row, NaN where it is missing."""
    return np.array([math.nan if row.get(name) is None else float(row[name]) for row in rows])


class WinRate(NamedTuple):
    """Win rate of a policy against the baseline (ties count half), with 95 % intervals over prompts."""

    rate: float
    ci: tuple[float, float]
    ties: float  # share of ties
    controlled: float  # length-controlled (AlpacaEval 2's regression)
    controlled_ci: tuple[float, float]
    length_bias: float  # phi, log-odds of a win per standardised length difference
    comparisons: int
    missing: int  # comparisons without a verdict


def win_rates(
    verdicts: Sequence[float], lengths: Sequence[float], clusters: Sequence[int], seed: int = 0, draws: int = 10_000
) -> WinRate:
    """Return win rate and length-controlled win rate.

    Args:
        verdicts: 1, 0.5 or 0 for each comparison; NaN if there is no verdict.
        lengths: length of the policy's completion minus length of the baseline's.
        clusters: number of the prompt of each comparison.
        seed: seed of the bootstrap.
        draws: number of bootstrap draws over prompts.

    Raises:
        DataError: no comparison has a verdict.
    """
    given = ~np.isnan(np.asarray(verdicts, dtype=float))
    if not given.any():
        raise DataError("no-verdicts", "no comparison has a verdict: the scorer or judge answered none")
    y = torch.tensor(np.asarray(verdicts, dtype=float)[given])
    gaps = torch.tensor(np.asarray(lengths, dtype=float)[given])
    _, owners = np.unique(np.asarray(clusters)[given], return_inverse=True)
    low, high = bootstrap_interval(y, draws, seed, torch.from_numpy(owners))
    members = [np.flatnonzero(owners == cluster) for cluster in range(owners.max() + 1)]
    lot, refits = np.random.default_rng(seed), []
    for _ in range(draws // DRAWS_PER_REFIT):
        drawn = torch.from_numpy(np.concatenate([members[one] for one in lot.integers(0, len(members), len(members))]))
        refits.append(float(length_controlled_win_rate(y[drawn], gaps[drawn])))
    ends = np.quantile(refits, [0.025, 0.975])
    return WinRate(
        float(win_rate(y)), (float(low), float(high)), float((y == 0.5).double().mean()),
        float(length_controlled_win_rate(y, gaps)), (float(ends[0]), float(ends[1])),
        float(length_controlled_fit(y, gaps)[1]), len(y), int((~given).sum()),
    )  # fmt: skip


def score_verdicts(rows: Sequence[Row], baseline: Sequence[Row]) -> list[float]:
    """Return 1, 0.5 or 0 if a score is above, equal to or below the baseline's score of the same prompt and sample."""
    gaps = values_of(rows, "score") - values_of(baseline, "score")
    return [float(value) for value in (np.sign(gaps) + 1) / 2]


def score_difference(rows: Sequence[Row], baseline: Sequence[Row], samples: int, seed: int = 0) -> Difference:
    """Test the difference of mean scores, paired by prompt and sample."""
    gaps = values_of(rows, "score") - values_of(baseline, "score")
    return clustered_difference(gaps.tolist(), prompt_numbers(rows, samples), seed)


class Judged(NamedTuple):
    """A judge's verdicts on pairs shown in both orders, and the judge's reliability."""

    verdicts: list[float]  # 1 if both orders prefer the policy, 0 if neither, 0.5 if they disagree, NaN without answer
    probability: float  # mean preference for the policy, averaged over both orders
    consistency: float  # share of pairs with the same winner in both orders
    position_bias: float  # mean preference for the first position, minus a half
    failures: int  # questions without an answer


def judged_both_ways(
    judge: Judge, pairs: Sequence[tuple[Prompt, str, str]], question: str = QUESTION
) -> tuple[Tensor, Tensor, Tensor]:
    """Ask a judge about pairs in both orders; return the probabilities of the first position, and missing answers.

    Args:
        judge: the judge.
        pairs: prompt, first and second completion.
        question: question to the judge.

    Returns:
        probabilities in the given and in the swapped order, each fp64, shape (pairs,); failures, shape (2, pairs).
    """
    principle, wording = ComparingPrinciple("evaluation", question), Wording()

    def asked(prompt: Prompt, first: str, second: str) -> Question:
        conversation = prompt if isinstance(prompt, str) else as_text(prompt, wording)
        text = wording.comparison.format(conversation=conversation, question=question, first=first, second=second)
        return Question(prompt, first, second, principle, [{"role": "user", "content": text}], wording)

    questions = [asked(*pair) for pair in pairs]
    questions += [asked(prompt, second, first) for prompt, first, second in pairs]
    answers = checked_answers(judge, questions)
    failed = torch.tensor([bool(answer.failure) for answer in answers]).view(2, -1)
    logprobs = torch.tensor([(a.first_logprob, a.second_logprob) for a in answers], dtype=torch.float64).view(-1, 2)
    # Bounded, so that two contradictory certain answers do not give NaN.
    forward, swapped = preference_probability(*logprobs.clamp(min=-700).T).view(2, -1)
    return forward, swapped, failed


def ask_judge(judge: Judge, rows: Sequence[Row], baseline: Sequence[Row], question: str = QUESTION) -> Judged:
    """Ask a judge to compare completions with the baseline's of the same prompt and sample, in both orders.

    Of episodes with an environment, the judge compares all turns.
    """
    pairs = list(zip(rows, baseline, strict=True))
    asked = [(row["prompt"], written(row), written(base)) for row, base in pairs]
    forward, swapped, failed = judged_both_ways(judge, asked, question)
    there = ~failed.any(0)
    same = [first == second for _, first, second in asked]
    found = torch.where(there, verdict(forward, swapped), math.nan)
    found = torch.where(torch.tensor(same), 0.5, found)  # equal texts are always a tie
    differ = there & ~torch.tensor(same)
    if not differ.any():
        return Judged(found.tolist(), math.nan, math.nan, math.nan, int(failed.sum()))
    return Judged(
        found.tolist(), float(debiased_probability(forward[differ], swapped[differ]).mean()),
        float((found[differ] != 0.5).double().mean()), float(position_bias(forward[differ], swapped[differ])),
        int(failed.sum()),
    )  # fmt: skip


def by_prompt(models: Mapping[str, Sequence[Row]], samples: int) -> list[dict[str, Any]]:
    """Return for each prompt the completions of all models side by side."""
    from rlhf_lightning.runs.samples import as_text as prompt_text

    first = next(iter(models.values()))
    return [
        {
            "prompt": prompt_text(first[start]["prompt"]),
            "sides": [
                (name, [{**row, "completion": written(row)} for row in rows[start : start + samples]])
                for name, rows in models.items()
            ],
        }
        for start in range(0, len(first), samples)
    ]
