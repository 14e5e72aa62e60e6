"""Pairs and a judge to soft labels: both orders of every comparison, several principles, nothing made up."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.constitution.dialogue import comparison_messages, text_of
from rlhf_lightning.constitution.labels import Comparison, LabelledPair, judge_metrics, probabilities_of
from rlhf_lightning.constitution.principles import Constitution, load_constitution
from rlhf_lightning.data.feedback.records import Answer, Assignment
from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.judging import (
    debiased_probability,
    debiased_probability_from_logits,
    preference_probability,
    verdict,
)
from rlhf_lightning.people.labeller import Labeller, More
from rlhf_lightning.people.store import FeedbackStore
from rlhf_lightning.scoring.judges.judge import (
    ComparingPrinciple,
    Judge,
    JudgeAnswer,
    Pair,
    Question,
    checked_answers,
    load_judge,
)

MOST_CERTAIN = 30.0
"""Log-odds beyond which a judge is no surer: two that contradict each other with certainty are a tie, and no NaN."""

AFTER_REASONING = (0.4, 0.6)
"""Bounds of a probability that was read after reasoning, which saturates (arXiv 2212.08073, section 4.1)."""


@dataclass(frozen=True)
class LabelSettings:
    """How answers become labels.

    Args:
        principles: principles drawn for each pair; their answers are averaged.
        average: of orders and principles: ``probability``, or ``logit``, which removes a constant bias of the judge's
            log-odds towards a place without a trace.
        reasoning: let the judge reason before it answers; its probabilities are then held within [0.4, 0.6].
        least_mass: least probability of the two letters together; a judge that would rather say something else gave no
            answer.
        seed: of the draw of principles.
    """

    principles: int = 1
    average: Literal["probability", "logit"] = "probability"
    reasoning: bool = False
    least_mass: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.principles < 1:
            raise SettingError("setting-out-of-range", f"principles is {self.principles}: draw 1 or more for each pair")
        if self.average not in ("probability", "logit"):
            raise SettingError("unknown-choice", f"average is {self.average!r}: it must be probability or logit")
        if not 0 <= self.least_mass < 1:
            raise SettingError("setting-out-of-range", f"least_mass is {self.least_mass}: it must be in [0, 1)")


class Labels(NamedTuple):
    """What `label_pairs` returns.

    Attributes:
        pairs: every pair, in order, those without an answer among them.
        metrics: of the judge, see `judge_metrics`.
    """

    pairs: list[LabelledPair]
    metrics: dict[str, Any]


def label_pairs(
    judge: Judge,
    constitution: Constitution,
    pairs: Sequence[Pair],
    settings: LabelSettings | None = None,
    start: int = 0,
) -> Labels:
    """Label pairs by a judge under a constitution, each comparison in both orders.

    Args:
        judge: answers questions.
        constitution: has the principles, and the words of the question.
        pairs: what is to be compared.
        settings: how answers become labels.
        start: number of the first pair: the draw of principles is addressed by (seed, number), so that pairs labelled
            in parts get the labels that they would get together.

    Raises:
        ValueError: the constitution has no principles to compare by, or fewer than are to be drawn, or the judge does
            not give one answer to each question.
    """
    settings = settings or LabelSettings()
    labelled = labelled_of(pairs, compared(judge, constitution, pairs, settings, start), settings)
    return Labels(labelled, judge_metrics(labelled))


def compared(
    judge: Judge, constitution: Constitution, pairs: Sequence[Pair], settings: LabelSettings, start: int = 0
) -> list[tuple[Comparison, ...]]:
    """Ask the judge about every pair, and return what it said of each under each principle."""
    drawn = [drawn_principles(constitution, settings, start + place) for place in range(len(pairs))]
    questions = [
        _question(constitution, principle, pair, swapped, settings.reasoning)
        for pair, principles in zip(pairs, drawn, strict=True)
        for principle in principles
        for swapped in (False, True)
    ]
    found = iter(checked_answers(judge, questions))
    return [
        tuple(_comparison(principle.id, next(found), next(found), settings) for principle in principles)
        for principles in drawn
    ]


def labelled_of(
    pairs: Sequence[Pair], comparisons: Sequence[Sequence[Comparison]], settings: LabelSettings
) -> list[LabelledPair]:
    """Average what was said of each pair."""
    return [_labelled(pair, tuple(of_pair), settings) for pair, of_pair in zip(pairs, comparisons, strict=True)]


def drawn_principles(constitution: Constitution, settings: LabelSettings, number: int) -> list[ComparingPrinciple]:
    """The principles that pair ``number`` is compared by, no two of them the same.

    Raises:
        SettingError: the constitution has fewer.
    """
    there = constitution.comparing
    if len(there) < settings.principles:
        raise SettingError(
            "too-few-principles",
            f"the constitution {constitution.name} has {len(there)} principles to compare by, and principles is "
            f"{settings.principles}: draw fewer for each pair",
        )
    return random.Random(f"{settings.seed}/comparing/{number}").sample(there, settings.principles)


def _question(
    constitution: Constitution, principle: ComparingPrinciple, pair: Pair, swapped: bool, reasoning: bool
) -> Question:
    first, second = text_of(pair.first), text_of(pair.second)
    if swapped:
        first, second = second, first
    messages = comparison_messages(constitution, principle, pair.prompt, first, second)
    return Question(pair.prompt, first, second, principle, messages, constitution.wording, reasoning)


def _comparison(principle: str, answer: JudgeAnswer, swapped: JudgeAnswer, settings: LabelSettings) -> Comparison:
    both = (answer, swapped)
    failures = tuple(reason for one in both if (reason := _failure(one, settings.least_mass)))
    low, high = AFTER_REASONING if settings.reasoning else (0.0, 1.0)
    given = [
        None if _failure(one, settings.least_mass) else _probability(one, low, high)
        for one in both
    ]  # fmt: skip
    heard = [one for one in both if not one.failure]
    return Comparison(
        principle, given[0], given[1], failures,
        mass=sum(one.mass for one in heard) / len(heard) if heard else 0.0,
        bounded=sum(one.bounded for one in heard),
        reasoning=tuple(one.reasoning for one in both) if any(one.reasoning for one in both) else (),
    )  # fmt: skip


def _failure(answer: JudgeAnswer, least_mass: float) -> str:
    """Why an answer is none; empty where it is one."""
    if answer.failure:
        return answer.failure
    if math.isnan(answer.first_logprob) or math.isnan(answer.second_logprob):
        return "not_a_number"
    return "other_words" if answer.mass < max(least_mass, math.ulp(0.0)) else ""


def _probability(answer: JudgeAnswer, low: float, high: float) -> float:
    certain = max(answer.first_logprob, answer.second_logprob) - 2 * MOST_CERTAIN  # minus infinity has no difference
    first, second = (
        torch.tensor([max(value, certain)], dtype=torch.float64)
        for value in (answer.first_logprob, answer.second_logprob)
    )
    return float(preference_probability(first, second, low, high))


def _labelled(pair: Pair, comparisons: tuple[Comparison, ...], settings: LabelSettings) -> LabelledPair:
    kept = [one for one in comparisons if one.answered]
    if not kept:
        return LabelledPair(pair, comparisons, None, None)
    forward, swapped = probabilities_of(kept)
    if settings.average == "logit":
        logits, swapped_logits = _log_odds(forward).mean(0, keepdim=True), _log_odds(swapped).mean(0, keepdim=True)
        preference = debiased_probability_from_logits(logits, swapped_logits)
    else:
        preference = debiased_probability(forward, swapped)
    votes = float(verdict(forward, swapped).mean())
    decided = 1.0 if votes > 0.5 else 0.0 if votes < 0.5 else 0.5
    return LabelledPair(pair, comparisons, float(preference.mean()), decided)


def _log_odds(probability: Tensor) -> Tensor:
    return torch.logit(probability).clamp(-MOST_CERTAIN, MOST_CERTAIN)


LEVELS = (0.65, 0.8, 0.95)
"""Probabilities of the preferred completion from which it is said to be better by a level more, 1 to `STRENGTHS`."""


class AILabeller(Labeller):
    """A model that compares completions under a constitution, each pair in both orders.

    A judge that contradicts itself when the order changes calls a tie, one that gives no answer skips the pair, and
    what it is sure of becomes the strength of its choice. It judges each pair once: other judges are other labellers.

    Args:
        judge: a model's folder, the address of an OpenAI-compatible server, or a class, see `judging.load_judge`.
        judge_args: arguments of its class.
        constitution: name of one that comes with the package, or a file.
        settings: how its answers become labels.
    """

    lease: ClassVar[float] = float("inf")

    def __init__(
        self,
        judge: str,
        judge_args: dict[str, Any] | None = None,
        constitution: str = "harmless",
        settings: LabelSettings | None = None,
    ) -> None:
        self.judge = load_judge(judge, judge_args)
        self.constitution = load_constitution(constitution)
        self.settings = settings or LabelSettings()

    def label(self, store: FeedbackStore, count: int, more: More) -> None:
        """Judge what the store asks, until it has ``count`` labels."""
        while store.labels() < count:
            asked = store.next(self.judge.name)
            if asked is not None:
                store.judge(self.judge.name, asked.id, f"{self.judge.name}/{asked.id}", self.answer(asked))
            elif not more():
                return

    def answer(self, asked: Assignment) -> Answer:
        """What the judge says of two completions, in the order in which they were shown."""
        if len(asked.shown) > 2:
            return Answer("skip")  # a constitution compares two
        first, second = (asked.item.candidates[place].completion for place in asked.shown)
        pair = Pair(asked.item.prompt, first, second)
        # The draw of principles is addressed by the item: the same store gets the same labels, cut off or not.
        (labelled,) = label_pairs(self.judge, self.constitution, [pair], self.settings, asked.item.id).pairs
        return answer_of(labelled)


def answer_of(labelled: LabelledPair) -> Answer:
    """A label as the judgement of an annotator."""
    preference, verdict = labelled.preference, labelled.verdict
    if preference is None or verdict is None:
        return Answer("skip")
    if 0.5 in (preference, verdict):
        return Answer("tie")
    certainty = max(preference, 1 - preference)
    strength = 1 + sum(certainty >= level for level in LEVELS)
    return Answer("ranking", ranks=(0, 1) if preference > 0.5 else (1, 0), strength=strength)
