"""Evaluate reward models on pairs with known labels: accuracy, calibration, and trivial baselines."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array

from rlhf_lightning import tokenization
from rlhf_lightning.evaluation.differences import clustered_difference, mcnemar
from rlhf_lightning.functional.statistics import brier_score, calibration_error, log_loss, wilson_interval
from rlhf_lightning.types import Prompt

Score = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
FOLDS = 5


class KnownPair(NamedTuple):
    """Two completions of a row."""

    row: int  # number of the row, because the pairs of one list are not independent
    prompt: Prompt
    chosen: str
    rejected: str
    subset: str
    tied: bool  # the label is a tie
    position: float  # 1 if the file shows chosen first, -1 if second, NaN if its format always puts chosen first
    styles: tuple[tuple[int, int], ...] = ()  # places of chosen and rejected in lists that are ordered by style


def implicit_scores(policy: Any, reference: Any, tokenizer: Any, beta: float) -> Score:
    r"""Return the implicit reward of DPO, \beta \log \pi(y|x) / \pi_{ref}(y|x) (arXiv 2305.18290)."""
    from rlhf_lightning.evaluation.policies import sequence_kl
    from rlhf_lightning.scoring.learned import encoded_sequences

    def score(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        encoded = [tokenization.encode_completion(tokenizer, c, p) for p, c in zip(prompts, completions, strict=True)]
        sequences = encoded_sequences(tokenizer, prompts, encoded)
        return [beta * value for value in sequence_kl(policy, reference, sequences).tolist()]

    return score


def margins(score: Score, pairs: Sequence[KnownPair], prompt_blind: bool = False) -> np.ndarray:
    """Return the score of chosen minus rejected, shape (pairs,); ``prompt_blind`` scores without the prompt."""
    prompts = [_blank(pair.prompt) if prompt_blind else pair.prompt for pair in pairs]
    sides = [(prompt, pair.chosen) for prompt, pair in zip(prompts, pairs, strict=True)]
    sides += [(prompt, pair.rejected) for prompt, pair in zip(prompts, pairs, strict=True)]
    chosen, rejected = unique_scores(score, sides).reshape(2, -1)
    return np.asarray(chosen - rejected)


def unique_scores(score: Score, asked: Sequence[tuple[Prompt, str]]) -> np.ndarray:
    """Return the score of each prompt and completion; a completion that occurs again, as in lists, is scored once."""
    keys = [(json.dumps(prompt, sort_keys=True), completion) for prompt, completion in asked]
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    places = sorted(first.values())
    if not places:
        return np.zeros(0)
    given = score([asked[place][0] for place in places], [asked[place][1] for place in places])
    values = dict(zip((keys[place] for place in places), map(float, given), strict=True))
    return np.array([values[key] for key in keys])


def scores_by_comparison(
    margins: Callable[[Sequence[KnownPair]], np.ndarray], groups: Sequence[tuple[Prompt, Sequence[str]]]
) -> list[float]:
    """Return the score of each completion by a judge: its mean log-odds against the prompt's other completions.

    Every two completions of a prompt are compared. A completion that equals another one has log-odds 0 against it.

    Args:
        margins: returns the judge's log-odds for ``chosen``, NaN for a missing answer.
        groups: prompts with their completions.

    Returns:
        the scores in the order of the groups; NaN for a completion without any answer.
    """
    places = [(number, i, j) for number, (_, texts) in enumerate(groups) for i, j in combinations(range(len(texts)), 2)]
    differ = [(n, i, j) for n, i, j in places if groups[n][1][i] != groups[n][1][j]]
    asked = [KnownPair(n, groups[n][0], groups[n][1][i], groups[n][1][j], "all", False, math.nan) for n, i, j in differ]
    found = [np.full((len(texts), len(texts)), math.nan) for _, texts in groups]
    for n, i, j in places:
        found[n][i, j] = found[n][j, i] = 0.0
    for (n, i, j), gap in zip(differ, margins(asked).tolist(), strict=True):
        found[n][i, j], found[n][j, i] = gap, -gap
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a completion without any answer
        return [value for table in found for value in np.nanmean(table, 1).tolist()]


def judge_margins(judge: Any, pairs: Sequence[KnownPair], question: str, prompt_blind: bool = False) -> np.ndarray:
    """Return a judge's log-odds for chosen, mean over both orders, shape (pairs,); NaN for a missing answer."""
    from rlhf_lightning.evaluation.completions import judged_both_ways

    if not pairs:
        return np.zeros(0)
    prompts = [_blank(pair.prompt) if prompt_blind else pair.prompt for pair in pairs]
    asked = [(prompt, pair.chosen, pair.rejected) for prompt, pair in zip(prompts, pairs, strict=True)]
    forward, swapped, failed = judged_both_ways(judge, asked, question)
    odds = (torch.logit(forward, 1e-12) - torch.logit(swapped, 1e-12)) / 2
    return torch.where(failed.any(0), math.nan, odds).numpy()


def _blank(prompt: Prompt) -> Prompt:
    return "." if isinstance(prompt, str) else [{"role": "user", "content": "."}]


def length_margins(pairs: Sequence[KnownPair]) -> np.ndarray:
    """Return the margins of the baseline that prefers the longer completion, in characters."""
    return np.array([float(len(pair.chosen) - len(pair.rejected)) for pair in pairs])


def bag_of_words_margins(pairs: Sequence[KnownPair], seed: int = 0) -> np.ndarray:
    """Return margins of a bag of words without prompts: Bradley-Terry on count differences, cross-fitted by rows."""
    words = sorted({word for pair in pairs for text in (pair.chosen, pair.rejected) for word in text.split()})
    place = {word: number for number, word in enumerate(words)}
    cells = [
        (sign, row, place[word]) for row, pair in enumerate(pairs)
        for sign, text in ((1.0, pair.chosen), (-1.0, pair.rejected)) for word in text.split()
    ]  # fmt: skip
    signs, rows, columns = zip(*cells, strict=True) if cells else ((), (), ())
    counts = csr_array((signs, (rows, columns)), shape=(len(pairs), len(words)))  # adds up repeated words
    order = np.random.default_rng(seed).permutation(sorted({pair.row for pair in pairs})).tolist()
    fold_of = {row: number % FOLDS for number, row in enumerate(order)}
    folds = np.array([fold_of[pair.row] for pair in pairs])
    found = np.zeros(len(pairs))
    for fold in range(FOLDS):
        train, weights = counts[folds != fold], np.zeros(len(words))
        step = 4 / max(float(train.power(2).sum(1).max(initial=1.0)), 1.0)
        for _ in range(200):  # gradient ascent on the penalised log-likelihood
            p = 1 / (1 + np.exp(np.clip(train @ weights, -30, 30)))
            weights += step * (train.T @ p / max(train.shape[0], 1) - 1e-3 * weights)
        found[folds == fold] = counts[folds == fold] @ weights
    return found


def right(gaps: np.ndarray) -> np.ndarray:
    """Return 1 if the chosen completion scores higher, 0.5 for equal scores, 0 otherwise; NaN without a score."""
    return (np.sign(gaps) + 1) / 2


def accuracy(gaps: np.ndarray, rows: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Return accuracy with Wilson's interval, or with a bootstrap interval over rows if rows have several pairs."""
    verdicts = right(gaps)
    there = ~np.isnan(verdicts)
    rate, count = float(verdicts[there].mean()) if there.any() else math.nan, int(there.sum())
    owners = [row for row, kept in zip(rows, there, strict=True) if kept]
    if len(set(owners)) == len(owners) and count:
        low, high = map(float, wilson_interval(rate, count))
    else:
        _, low, high, *_ = clustered_difference(verdicts[there].tolist(), owners, seed)
    return {"accuracy": rate, "ci": [low, high], "pairs": count, "equal": int((gaps == 0).sum()),
            "missing": int((~there).sum())}  # fmt: skip


def quality(gaps: np.ndarray, pairs: Sequence[KnownPair], bins: int = 10) -> dict[str, Any]:
    """Return calibration, margins and the correlation of the margin with the length difference."""
    there = ~np.isnan(gaps)
    delta, lengths = torch.from_numpy(gaps[there]), length_margins(pairs)[there]
    spread = float(np.std(gaps[there]) * np.std(lengths))
    confidence = torch.sigmoid(delta.abs()).numpy()
    edges = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    diagram = [
        [float(confidence[edges == b].mean()), float(right(gaps[there])[edges == b].mean()), int((edges == b).sum())]
        for b in range(bins) if (edges == b).any()
    ]  # fmt: skip
    return {
        "ece": float(calibration_error(delta, bins)), "brier": float(brier_score(delta).mean()),
        "log_loss": float(log_loss(delta).mean()), "margin": float(delta.mean()),
        "margin_quartiles": np.quantile(gaps[there], [0.25, 0.5, 0.75]).tolist(),
        "length_correlation": float(np.corrcoef(gaps[there], lengths)[0, 1]) if spread else math.nan,
        "reliability": diagram,
    }  # fmt: skip


def compared(first: np.ndarray, second: np.ndarray, rows: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Test the accuracy of ``second`` minus that of ``first``: bootstrap by row, McNemar's test for single pairs."""
    there = ~np.isnan(first) & ~np.isnan(second)
    a, b = right(first[there]), right(second[there])
    owners = [row for row, kept in zip(rows, there, strict=True) if kept]
    gap = clustered_difference((b - a).tolist(), owners, seed)
    # McNemar's test needs independent pairs; pairs of one list are not independent.
    alone = len(set(owners)) == len(owners)
    p, test = (mcnemar(a == 1, b == 1), "McNemar") if alone else (gap.p, "sign flips by row")
    return {"difference": gap.mean, "ci": [gap.low, gap.high], "p": p, "test": test, "rows": gap.n}
