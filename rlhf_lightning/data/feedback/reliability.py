"""How far each annotator can be trusted, estimated from where they agree with the others."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import torch

from rlhf_lightning.data.feedback.records import StoredJudgement
from rlhf_lightning.functional.agreement import annotator_reliability

PairVotes = dict[tuple[int, int, int], dict[str, float]]


def pair_votes(judgements: Iterable[StoredJudgement]) -> PairVotes:
    """Votes of each annotator on every two completions of an item: 1 for the first, 0 for the second, 0.5 for none."""
    votes: PairVotes = {}
    for one in judgements:
        if one.repeat or one.verdict == "skip":
            continue
        ranks = one.ranks or (0,) * len(one.shown)
        for a, b in combinations(range(len(ranks)), 2):
            value = 0.5 + 0.5 * ((ranks[a] < ranks[b]) - (ranks[a] > ranks[b]))
            votes.setdefault((one.item, a, b), {})[one.annotator] = value
    return votes


def vote_table(votes: PairVotes) -> tuple[list[str], torch.Tensor]:
    """Annotators by name, and their votes, NaN where there is none, shape (annotators, pairs)."""
    names = sorted({name for given in votes.values() for name in given})
    table = [[given.get(name, float("nan")) for given in votes.values()] for name in names]
    return names, torch.tensor(table, dtype=torch.float64).reshape(len(names), len(votes))


def reliabilities(judgements: Iterable[StoredJudgement]) -> dict[str, float]:
    """Probability that each annotator's choice is right, by `annotator_reliability` on all pairs of completions."""
    names, table = vote_table(pair_votes(judgements))
    if not names:
        return {}
    rates, _ = annotator_reliability(table)
    return dict(zip(names, rates.tolist(), strict=True))
