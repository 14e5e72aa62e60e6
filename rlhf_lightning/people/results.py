"""Results of labelling: agreement, win rates of models, annotators' consistency and side bias, labels over time."""

from __future__ import annotations

import math
import shlex
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_lightning.data.feedback.database import item_of, judgements_of, snapshot_of
from rlhf_lightning.data.feedback.records import STRENGTH_WORDS, StoredJudgement
from rlhf_lightning.data.feedback.rows import pair_votes, reliabilities, rows_of, vote_table
from rlhf_lightning.functional.judging import krippendorff_alpha
from rlhf_lightning.functional.statistics import wilson_interval
from rlhf_lightning.people.hostile_text import shown_text
from rlhf_lightning.people.store import counts


class Rate(NamedTuple):
    """A share in [0, 1] of ``size`` cases, with the bounds of its 95 % Wilson interval."""

    share: float
    low: float
    high: float
    size: int


class AnnotatorResults(NamedTuple):
    """Results of one annotator."""

    name: str  # name of the annotator
    judged: int  # judgements that were not undone, including repeats and excluding skips
    skipped: int  # items skipped
    seconds: float  # median time of a judgement
    consistency: Rate | None  # share of hidden repeats judged the same as the first time; None without repeats
    left: Rate | None  # share of choices between two completions that chose the left; None without choices
    reliability: float | None  # estimated probability that a choice is right; None with fewer than three annotators


def rate(hits: float, count: int) -> Rate | None:
    """Return a share with its interval; None if ``count`` is 0."""
    if count == 0:
        return None
    low, high = wilson_interval(hits / count, count)
    return Rate(hits / count, float(low), float(high), count)


def results_of(connection: sqlite3.Connection) -> dict[str, Any]:
    """Compute everything that the results page shows."""
    judged = judgements_of(connection)
    return {
        "counts": counts(connection),
        "snapshot": snapshot_of(connection),
        "alpha": agreement(judged),
        "models": win_rates(connection, judged),
        "verdicts": verdicts(judged),
        "annotators": annotator_results(judged),
        "growth": growth(judged),
    }


def agreement(judgements: Iterable[StoredJudgement]) -> tuple[float, int] | None:
    """Return Krippendorff's alpha of choices between two completions, and the number of pairs judged by two or more.

    The distance of a tie to a choice is half the distance of the two opposite choices. Each pair is counted in both
    orders, because the order has no meaning: if the better model always came first, agreement would look like chance.
    Returns None without shared pairs.
    """
    shared = {pair: votes for pair, votes in pair_votes(judgements).items() if len(votes) > 1}
    if not shared:
        return None
    _, table = vote_table(shared)
    alpha = float(krippendorff_alpha(torch.cat([table, 1 - table], -1), "interval"))
    return None if math.isnan(alpha) else (alpha, len(shared))


def win_rates(connection: sqlite3.Connection, judgements: Iterable[StoredJudgement]) -> list[tuple[str, Rate]]:
    """Return the share of comparisons with other models that each model wins (ties count half), best model first.

    An item counts once, because its judgements are not independent of each other.
    """
    values: dict[str, dict[int, list[float]]] = {}
    models: dict[int, list[str | None]] = {}
    for (item, a, b), votes in pair_votes(judgements).items():
        if item not in models:
            models[item] = [candidate.model for candidate in item_of(connection, item).candidates]
        first, second = models[item][a], models[item][b]
        if first is None or second is None or first == second:
            continue
        for vote in votes.values():
            values.setdefault(first, {}).setdefault(item, []).append(vote)
            values.setdefault(second, {}).setdefault(item, []).append(1 - vote)
    found = []
    for model, items in values.items():
        means = [sum(one) / len(one) for one in items.values()]
        share = rate(sum(means), len(means))
        assert share is not None
        found.append((model, share))
    return sorted(found, key=lambda entry: -entry[1].share)


def words_of(judgement: StoredJudgement) -> str:
    """Describe a judgement in the words of the page."""
    if judgement.verdict == "ranking" and judgement.strength is not None:
        return STRENGTH_WORDS[judgement.strength]
    if judgement.verdict == "ranking":
        return "chosen" if len(judgement.shown) == 2 else "ranked"
    return {"tie": "equally good", "both_bad": "both bad", "skip": "skipped"}[judgement.verdict]


def verdicts(judgements: Iterable[StoredJudgement]) -> list[tuple[str, int, float]]:
    """Return the number of judgements of each kind and their share, strengths first, without hidden repeats."""
    found = Counter(words_of(one) for one in judgements if not one.repeat)
    order = (*reversed(STRENGTH_WORDS.values()), "chosen", "ranked", "equally good", "both bad", "skipped")
    return [(name, found[name], found[name] / found.total()) for name in order if found[name]]


def label_rows(
    connection: sqlite3.Connection, annotator: str | None = None, before: int | None = None, count: int = 25
) -> dict[str, Any]:
    """Return one page of labels, newest first, and the ``before`` of the next page (None at the end).

    Args:
        connection: connection to the store.
        annotator: annotator whose labels are listed; None for all annotators.
        before: only judgements with smaller numbers are listed; None starts with the newest.
        count: number of labels per page.
    """
    mine = [one for one in judgements_of(connection) if annotator is None or one.annotator == annotator]
    older = [one for one in mine if before is None or one.id < before][::-1]
    rows = [_label_row(connection, one) for one in older[:count]]
    return {"rows": rows, "older": rows[-1]["id"] if len(older) > count else None, "newer": before is not None}


def _label_row(connection: sqlite3.Connection, one: StoredJudgement) -> dict[str, Any]:
    item = item_of(connection, one.item)
    places = one.shown if one.ranks is None else sorted(one.shown, key=lambda place: one.ranks[place])  # type: ignore[index]
    texts = [clipped(item.candidates[place].text) for place in places]
    prompt = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
    models = [item.candidates[place].model or "unknown" for place in places]
    return {
        "id": one.id, "judged": one.judged[:16].replace("T", " "), "annotator": one.annotator, "repeat": one.repeat,
        "prompt": clipped(prompt), "verdict": words_of(one), "preferred": texts[0] if one.ranks else "",
        "other": " | ".join(texts[1:] if one.ranks else texts), "models": " > ".join(models),
    }  # fmt: skip


def clipped(text: str, length: int = 120) -> str:
    """Return the beginning of a text on one line, with hidden characters shown by their code."""
    line = " ".join(shown_text(text[: 2 * length]).split())
    return line if len(line) <= length else f"{line[:length]} …"


def training_command(connection: sqlite3.Connection, path: Path, upto: int) -> tuple[str, str | None]:
    """Return a command that trains on the current labels, and its initial policy (None if unknown)."""
    model = connection.execute(
        "SELECT model FROM candidates WHERE model IS NOT NULL GROUP BY model ORDER BY count(*) DESC, model LIMIT 1"
    ).fetchone()
    init_from = None if model is None else str(model[0])
    source = shlex.quote(f"{path}@{upto}")
    usable = sum(row.get("preference") != 0.5 for row in rows_of(connection, "preference", upto))
    held_out = min(20, usable // 5)
    command = f"rlhf fit --config recipe:dpo --model.init_from {shlex.quote(init_from or 'POLICY')}"
    return f"{command} --data.source {source} --data.eval_rows {held_out} --trainer.max_epochs 3", init_from


def annotator_results(judgements: Sequence[StoredJudgement]) -> list[AnnotatorResults]:
    """Return the results of each annotator, by name."""
    names = sorted({one.annotator for one in judgements})
    several = len({one.annotator for one in judgements if not one.repeat and one.verdict != "skip"}) > 2
    known = reliabilities(judgements) if several else {}
    return [_annotator(name, [one for one in judgements if one.annotator == name], known) for name in names]


def _annotator(name: str, mine: list[StoredJudgement], known: dict[str, float]) -> AnnotatorResults:
    judged = [one for one in mine if one.verdict != "skip"]
    first = {one.item: one for one in judged if not one.repeat}
    repeats = [one for one in judged if one.repeat and one.item in first]
    same = sum((one.verdict, one.ranks) == (first[one.item].verdict, first[one.item].ranks) for one in repeats)
    sides = [one.picked_left for one in judged if one.picked_left is not None]
    seconds = sorted(one.seconds for one in judged)
    return AnnotatorResults(
        name, len(judged), len(mine) - len(judged), seconds[len(seconds) // 2] if seconds else 0.0,
        rate(same, len(repeats)), rate(sum(sides), len(sides)), known.get(name),
    )  # fmt: skip


WIDTH, HEIGHT = 640, 160
"""Size of the growth plot, SVG units."""


def growth(judgements: Sequence[StoredJudgement]) -> dict[str, Any] | None:
    """Return the number of labels over time as points of a line; None with fewer than two labels."""
    times = [datetime.fromisoformat(one.judged).timestamp() for one in judgements]
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    span = times[-1] - times[0]
    keep = range(0, len(times), max(len(times) // 500, 1))
    points = [
        (WIDTH * (times[n] - times[0]) / span, HEIGHT * (1 - (n + 1) / len(times))) for n in (*keep, len(times) - 1)
    ]
    return {
        "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        "width": WIDTH,
        "height": HEIGHT,
        "count": len(times),
        "ticks": [(HEIGHT * (1 - part), round(len(times) * part)) for part in (0, 0.5, 1)],
        "first": judgements[0].judged[:16].replace("T", " "),
        "last": judgements[-1].judged[:16].replace("T", " "),
    }
