"""Make training rows from judgements (preferences, single completions, demonstrations, prompts), and tables of votes.

Hidden repeats and skipped items give no labels.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import torch

from rlhf_lightning.data.feedback.database import NO_LIMIT, item_of, judgements_of
from rlhf_lightning.data.feedback.records import STRENGTHS, Item, StoredJudgement, digest
from rlhf_lightning.data.formats import ALL_FORMS, LABELS, TEMPLATE_COLUMNS
from rlhf_lightning.data.turns import MEDIA
from rlhf_lightning.errors import DataError
from rlhf_lightning.functional.judging import annotator_reliability

RowKind = Literal["preference", "unpaired", "demonstration", "prompt", "judgement"]
Labels = Literal["mean", "reliability"]
Row = dict[str, Any]
Reliabilities = Mapping[str, float] | None

ELSEWHERE = ("ranks", "prompts", "system", "history", "tools", "functions", *TEMPLATE_COLUMNS)
TAKEN_COLUMNS = {name for form in ALL_FORMS for name in form} | {*LABELS, *MEDIA, *ELSEWHERE}
"""Columns used by a form or a label. Rows leave out a prompt's own columns of these names: they could pass for labels.
"""


def rows_of(
    connection: sqlite3.Connection,
    kind: RowKind = "preference",
    upto: int = NO_LIMIT,
    labels: Labels = "mean",
    annotators: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Yield rows of one kind from the judgements that were valid at row ``upto``, in item order.

    A row also carries the other columns of its prompt, except `TAKEN_COLUMNS`.

    Args:
        connection: connection to the store.
        kind: kind of rows; ``judgement`` returns each judgement unchanged.
        upto: number of the last row of judgements.
        labels: how several judgements of an item become one label: ``mean``, or ``reliability`` (weighted by the
            annotators' estimated reliability).
        annotators: annotators whose judgements count; None for all.

    Raises:
        DataError: a named annotator has no judgements, or the store is damaged.
    """
    judged = _by_annotators(judgements_of(connection, upto), annotators)
    if kind == "prompt":
        yield from prompts(connection, judged)
        return
    grouped: dict[int, list[StoredJudgement]] = {}
    for one in judged:
        if kind in ("judgement", "demonstration") or not (one.repeat or one.verdict == "skip"):
            grouped.setdefault(one.item, []).append(one)
    weighted = labels == "reliability" and kind in ("preference", "unpaired")
    known = reliabilities(judged) if weighted else None
    make: Callable[[Item, list[StoredJudgement], Reliabilities], Iterable[Row]] = {
        "preference": preferences, "unpaired": single_completions, "demonstration": demonstrations, "judgement": raw,
    }[kind]  # fmt: skip
    for number in sorted(grouped):
        yield from make(item_of(connection, number), grouped[number], known)


def _by_annotators(judgements: list[StoredJudgement], annotators: Sequence[str] | None) -> list[StoredJudgement]:
    if annotators is None:
        return judgements
    known = {one.annotator for one in judgements}
    strangers = [name for name in annotators if name not in known]
    if strangers:
        raise DataError(
            "unknown-annotator",
            f"{', '.join(strangers)} judged nothing; annotators with judgements: {', '.join(sorted(known)) or 'none'}",
        )
    return [one for one in judgements if one.annotator in annotators]


def prompts(connection: sqlite3.Connection, judgements: list[StoredJudgement]) -> Iterator[Row]:
    """Yield each judged prompt once."""
    seen = set()
    for number in sorted({one.item for one in judgements}):
        item = item_of(connection, number)
        if (key := digest(item.prompt)) not in seen:
            seen.add(key)
            yield {**_columns(item), "prompt": item.prompt}


def preferences(item: Item, judgements: list[StoredJudgement], known: Reliabilities = None) -> Iterable[Row]:
    """Yield a pair with its share of votes and mean rated margin, or each ranking of a longer list.

    A tie or ``both_bad`` counts as half a vote for each side. Several rankings of one list share its weight, so that
    the loss is their mean.
    """
    if len(item.candidates) > 2:
        yield from _rankings(item, judgements, known)
        return
    share, margin = _share(judgements, known), _margin(judgements)
    chosen, rejected = (0, 1) if share > 0.5 or (share == 0.5 and margin >= 0) else (1, 0)
    yield {
        **_provenance(item, judgements, [chosen, rejected]),
        "chosen": item.candidates[chosen].completion,
        "rejected": item.candidates[rejected].completion,
        "preference": max(share, 1 - share),
        "margin": max(margin if chosen == 0 else -margin, 0.0),
    }


def _share(judgements: list[StoredJudgement], known: Reliabilities) -> float:
    """Return the probability that the first of two completions is better."""
    votes = [_vote(one.ranks, 0, 1) for one in judgements]
    if known is None:
        return sum(votes) / len(votes)
    odds = 1.0
    for one, value in zip(judgements, votes, strict=True):
        r = known[one.annotator]
        odds *= (r / (1 - r)) ** (2 * value - 1)
    return odds / (1 + odds)


def _vote(ranks: Sequence[int] | None, a: int, b: int) -> float:
    """Return 1 if completion a ranks above b, 0 if below, 0.5 for a tie or no ranks."""
    return 0.5 if ranks is None else 0.5 + 0.5 * ((ranks[a] < ranks[b]) - (ranks[a] > ranks[b]))


def _margin(judgements: list[StoredJudgement]) -> float:
    """Return the mean rated strength towards the first of two, in [-1, 1].

    The lowest level counts as 0, as in Llama 2 (2307.09288).
    """
    rated = [
        ((one.strength or 1) - 1) / (STRENGTHS - 1) * (2 * _vote(one.ranks, 0, 1) - 1) for one in judgements
    ]  # fmt: skip
    return sum(rated) / len(rated)


def _weights(judgements: list[StoredJudgement], known: Reliabilities) -> list[float]:
    return [1.0 if known is None else max(2 * known[one.annotator] - 1, 0.0) for one in judgements]


def _rankings(item: Item, judgements: list[StoredJudgement], known: Reliabilities) -> Iterable[Row]:
    weights = _weights(judgements, known)
    total = sum(weights)
    for one, weight in zip(judgements, weights, strict=True):
        if weight > 0:
            yield {
                **_provenance(item, [one], range(len(item.candidates))),
                "completions": [candidate.completion for candidate in item.candidates],
                "ranks": list(one.ranks or [0] * len(item.candidates)),
                "weight": weight / total,
            }


def single_completions(item: Item, judgements: list[StoredJudgement], known: Reliabilities = None) -> Iterable[Row]:
    """Yield each completion as good or bad: the best of a ranking scores 1, the worst 0, ``both_bad`` 0, a tie 0.5.

    The mean score decides. A mean of 0.5 gives no row, and the row's weight grows with the distance from 0.5.
    """
    weights = _weights(judgements, known)
    for place, candidate in enumerate(item.candidates):
        total = sum(weights)
        good = sum(w * _goodness(one, place) for w, one in zip(weights, judgements, strict=True))
        mean = good / total if total else 0.5
        if mean != 0.5:
            yield {
                **_provenance(item, judgements, [place]),
                "completion": candidate.completion,
                "label": mean > 0.5,
                "weight": abs(2 * mean - 1),
            }


def _goodness(judgement: StoredJudgement, place: int) -> float:
    if judgement.ranks is None:
        return 0.0 if judgement.verdict == "both_bad" else 0.5
    return 1 - judgement.ranks[place] / max(judgement.ranks)


def demonstrations(item: Item, judgements: list[StoredJudgement], known: Reliabilities = None) -> Iterable[Row]:
    """Yield completions as rewritten by annotators."""
    for one in judgements:
        if one.edited is not None:
            plain = isinstance(item.prompt, str)
            yield {
                **_provenance(item, [one], [one.edited_place or 0]),
                "completion": one.edited if plain else [{"role": "assistant", "content": one.edited}],
            }


def raw(item: Item, judgements: list[StoredJudgement], known: Reliabilities = None) -> Iterable[Row]:
    """Yield each judgement unchanged."""
    for one in judgements:
        yield {**vars(one), "prompt": item.prompt, "completions": [vars(candidate) for candidate in item.candidates]}


def _columns(item: Item) -> Row:
    return {name: value for name, value in item.columns.items() if name not in TAKEN_COLUMNS}


def _provenance(item: Item, judgements: list[StoredJudgement], places: Iterable[int]) -> Row:
    return {
        **_columns(item),
        "prompt": item.prompt,
        "item": item.id,
        "models": [item.candidates[place].model for place in places],
        "judgements": len(judgements),
        "flags": sorted({flag for one in judgements for flag in one.flags}),
    }


# ---- votes -----------------------------------------------------------------------------------------------------------

PairVotes = dict[tuple[int, int, int], dict[str, float]]


def pair_votes(judgements: Iterable[StoredJudgement]) -> PairVotes:
    """Return each annotator's vote on every two completions of an item: 1 for the first, 0 for the second, else 0.5."""
    votes: PairVotes = {}
    for one in judgements:
        if one.repeat or one.verdict == "skip":
            continue
        for a, b in combinations(range(len(one.shown)), 2):
            votes.setdefault((one.item, a, b), {})[one.annotator] = _vote(one.ranks, a, b)
    return votes


def vote_table(votes: PairVotes) -> tuple[list[str], torch.Tensor]:
    """Return annotator names and their votes, shape (annotators, pairs), NaN where a vote is missing."""
    names = sorted({name for given in votes.values() for name in given})
    table = [[given.get(name, float("nan")) for given in votes.values()] for name in names]
    return names, torch.tensor(table, dtype=torch.float64).reshape(len(names), len(votes))


def reliabilities(judgements: Iterable[StoredJudgement]) -> dict[str, float]:
    """Estimate the probability that each annotator's choice is right, by `annotator_reliability` on all pairs."""
    names, table = vote_table(pair_votes(judgements))
    if not names:
        return {}
    rates, _ = annotator_reliability(table)
    return dict(zip(names, rates.tolist(), strict=True))
