"""Judgements as rows of the forms that training reads: preferences, completions judged alone, demonstrations, prompts.

Hidden repeats measure an annotator and are no labels; neither is what was skipped.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rlhf_lightning.data.feedback.records import STRENGTHS, Item, StoredJudgement, digest
from rlhf_lightning.data.feedback.snapshots import FOREVER, item_of, judgements_of
from rlhf_lightning.errors import DataError

RowKind = Literal["preference", "unpaired", "demonstration", "prompt", "judgement"]
Labels = Literal["mean", "reliability"]
Row = dict[str, Any]
Reliabilities = Mapping[str, float] | None


def rows_of(
    connection: sqlite3.Connection,
    kind: RowKind = "preference",
    upto: int = FOREVER,
    labels: Labels = "mean",
    annotators: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Rows of one kind from the judgements that stood at row ``upto``, in the order of the items.

    Args:
        connection: to the store.
        kind: what the rows are for; ``judgement`` gives each judgement as it was made.
        upto: number of the last row.
        labels: how several judgements of an item become one: their plain ``mean``, or by the annotators' estimated
            ``reliability``.
        annotators: whose judgements count; None for everybody's.

    Raises:
        ValueError: one of them has judged nothing.
    """
    judged = _of(judgements_of(connection, upto), annotators)
    if kind == "prompt":
        yield from prompts(connection, judged)
        return
    grouped: dict[int, list[StoredJudgement]] = {}
    for one in judged:
        if kind in ("judgement", "demonstration") or not (one.repeat or one.verdict == "skip"):
            grouped.setdefault(one.item, []).append(one)
    known: Reliabilities = None
    if labels == "reliability" and kind in ("preference", "unpaired"):
        from rlhf_lightning.data.feedback.snapshots import reliabilities

        known = reliabilities(judged)
    of_kind: dict[str, Callable[[Item, list[StoredJudgement], Reliabilities], Iterable[Row]]] = {
        "preference": preferences, "unpaired": judged_alone, "demonstration": demonstrations, "judgement": raw,
    }  # fmt: skip
    for number in sorted(grouped):
        yield from of_kind[kind](item_of(connection, number), grouped[number], known)


def _of(judgements: list[StoredJudgement], annotators: Sequence[str] | None) -> list[StoredJudgement]:
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
    """Each prompt that was judged, once."""
    seen = set()
    for number in sorted({one.item for one in judgements}):
        item = item_of(connection, number)
        if (key := digest(item.prompt)) not in seen:
            seen.add(key)
            yield {**item.columns, "prompt": item.prompt}


def preferences(item: Item, judgements: list[StoredJudgement], known: Reliabilities = None) -> Iterable[Row]:
    """A pair with the share of votes for the chosen side and its rated margin; or each ranking of a longer list.

    A tie, and two that are both bad, is half a vote for each side. Several rankings of one list share its weight, so
    that the loss is their mean.
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
    """Probability that the first of two is better."""
    votes = [vote(one) for one in judgements]
    if known is None:
        return sum(votes) / len(votes)
    odds = 1.0
    for one, value in zip(judgements, votes, strict=True):
        r = known[one.annotator]
        odds *= (r / (1 - r)) ** (2 * value - 1)
    return odds / (1 + odds)


def vote(judgement: StoredJudgement) -> float:
    """Of two completions: 1 for the first, 0 for the second, 0.5 for neither."""
    if judgement.ranks is None:
        return 0.5
    return 1.0 if judgement.ranks[0] < judgement.ranks[1] else 0.0


def _margin(judgements: list[StoredJudgement]) -> float:
    """Mean rated strength towards the first of two, in [-1, 1]: the lowest level is 0, as in Llama 2 (2307.09288)."""
    rated = [((one.strength or 1) - 1) / (STRENGTHS - 1) * (2 * vote(one) - 1) for one in judgements]
    return sum(rated) / len(rated)


def _rankings(item: Item, judgements: list[StoredJudgement], known: Reliabilities) -> Iterable[Row]:
    weights = [1.0 if known is None else max(2 * known[one.annotator] - 1, 0.0) for one in judgements]
    total = sum(weights)
    for one, weight in zip(judgements, weights, strict=True):
        if weight > 0:
            yield {
                **_provenance(item, [one], range(len(item.candidates))),
                "completions": [candidate.completion for candidate in item.candidates],
                "ranks": list(one.ranks or [0] * len(item.candidates)),
                "weight": weight / total,
            }


def judged_alone(item: Item, judgements: list[StoredJudgement], known: Reliabilities = None) -> Iterable[Row]:
    """Each completion as good or bad: the best of a ranking counts 1, the worst 0, all that are bad 0, a tie half.

    The mean decides; a mean of a half says nothing and gives no row, and what is nearer to it weighs less.
    """
    weights = [1.0 if known is None else max(2 * known[one.annotator] - 1, 0.0) for one in judgements]
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
    """Completions as annotators rewrote them."""
    for one in judgements:
        if one.edited is not None:
            plain = isinstance(item.prompt, str)
            yield {
                **_provenance(item, [one], [one.edited_place or 0]),
                "completion": one.edited if plain else [{"role": "assistant", "content": one.edited}],
            }


def raw(item: Item, judgements: list[StoredJudgement], known: Reliabilities = None) -> Iterable[Row]:
    """Each judgement as it was made."""
    for one in judgements:
        yield {
            **vars(one),
            "prompt": item.prompt,
            "completions": [vars(candidate) for candidate in item.candidates],
        }


def _provenance(item: Item, judgements: list[StoredJudgement], places: Iterable[int]) -> Row:
    flags = sorted({flag for one in judgements for flag in one.flags})
    return {
        **item.columns,
        "prompt": item.prompt,
        "item": item.id,
        "models": [item.candidates[place].model for place in places],
        "judgements": len(judgements),
        "flags": flags,
    }
