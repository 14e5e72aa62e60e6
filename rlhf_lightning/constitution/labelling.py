"""Soft labels from a judge (every comparison in both orders, averaged over principles), and the AI labeller."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.constitution.labels import Comparison, LabelledPair, judge_metrics, probabilities_of
from rlhf_lightning.constitution.principles import Constitution, comparison_messages, load_constitution
from rlhf_lightning.data.feedback.records import Answer, Assignment, text_of
from rlhf_lightning.errors import check_choice, check_range
from rlhf_lightning.functional.judging import (
    debiased_probability,
    debiased_probability_from_logits,
    preference_probability,
    verdict,
)
from rlhf_lightning.people.labeller import Labeller, More
from rlhf_lightning.people.store import FeedbackStore
from rlhf_lightning.scoring.judges import load_judge
from rlhf_lightning.scoring.judges.judge import ComparingPrinciple, Judge, JudgeAnswer, Pair, Question, checked_answers

MOST_CERTAIN = 30.0
"""Bound of a judge's log-odds, so that two contradictory certain answers give a tie instead of NaN."""

AFTER_REASONING = (0.4, 0.6)
"""Bounds of probabilities after reasoning, because these probabilities saturate (arXiv 2212.08073, section 4.1)."""


@dataclass(frozen=True)
class LabelSettings:
    """How a judge's answers become labels.

    Args:
        principles: number of principles drawn for each pair; the answers are averaged over principles.
        average: average the probability or the logit; logit removes a constant position bias of the log-odds.
        reasoning: let the judge reason before it answers; its probabilities are clamped to [0.4, 0.6].
        least_mass: minimum total probability of the two letters; below it the answer counts as missing.
        seed: seed of the drawn principles.
    """

    principles: int = 1
    average: Literal["probability", "logit"] = "probability"
    reasoning: bool = False
    least_mass: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self.principles >= 1, "it must be at least 1 for each pair", principles=self.principles)
        check_choice(("probability", "logit"), average=self.average)
        check_range(0 <= self.least_mass < 1, "it must be in [0, 1)", least_mass=self.least_mass)


class Labels(NamedTuple):
    """All pairs in order, including those without an answer, and the judge's metrics (see `judge_metrics`)."""

    pairs: list[LabelledPair]
    metrics: dict[str, Any]


def label_pairs(
    judge: Judge,
    constitution: Constitution,
    pairs: Sequence[Pair],
    settings: LabelSettings | None = None,
    start: int = 0,
) -> Labels:
    """Label pairs with a judge under a constitution, each comparison in both orders.

    Args:
        judge: the judge.
        constitution: principles and wording of the questions.
        pairs: pairs to compare.
        settings: how answers become labels.
        start: index of the first pair. Principles are drawn by (seed, index), so labelling in parts gives the same
            labels.

    Raises:
        ConstitutionError: the constitution has fewer comparing principles than must be drawn.
        ContractError: the judge does not give one answer to each question.
    """
    settings = settings or LabelSettings()
    labelled = labelled_of(pairs, compared(judge, constitution, pairs, settings, start), settings)
    return Labels(labelled, judge_metrics(labelled))


def compared(
    judge: Judge, constitution: Constitution, pairs: Sequence[Pair], settings: LabelSettings, start: int = 0
) -> list[tuple[Comparison, ...]]:
    """Ask the judge about every pair; return the comparisons of each pair by principle."""
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
    """Average the comparisons of each pair into its label."""
    return [_labelled(pair, tuple(of_pair), settings) for pair, of_pair in zip(pairs, comparisons, strict=True)]


def drawn_principles(constitution: Constitution, settings: LabelSettings, number: int) -> list[ComparingPrinciple]:
    """Draw the distinct principles of pair ``number``; see `Constitution.require`."""
    constitution.require("comparing", settings.principles)
    return random.Random(f"{settings.seed}/comparing/{number}").sample(constitution.comparing, settings.principles)


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
    """Return the reason why an answer does not count; empty if it counts."""
    if answer.failure:
        return answer.failure
    if math.isnan(answer.first_logprob) or math.isnan(answer.second_logprob):
        return "not_a_number"
    return "other_words" if answer.mass < max(least_mass, math.ulp(0.0)) else ""


def _probability(answer: JudgeAnswer, low: float, high: float) -> float:
    certain = max(answer.first_logprob, answer.second_logprob) - 2 * MOST_CERTAIN  # avoids -inf - (-inf) = NaN
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
"""Thresholds of the preferred completion's probability; each threshold that it exceeds adds one level of strength."""


class AILabeller(Labeller):
    """A judge as labeller: compares each pair by a constitution, in both orders.

    If the two orders contradict each other, the label is a tie. If an answer is missing, the pair is skipped. The
    judge's probability gives the strength of the label.

    Args:
        judge: folder of a model, address of an OpenAI-compatible server, or a class, see `load_judge`.
        judge_args: arguments of the judge's class.
        constitution: name of a shipped constitution, or a file.
        settings: how answers become labels.
    """

    lease: ClassVar[float] = float("inf")
    salt: ClassVar[str | None] = ""

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
        """Judge the store's items until it has ``count`` labels."""
        while store.labels() < count:
            asked = store.next(self.judge.name)
            if asked is not None:
                store.judge(self.judge.name, asked.id, f"{self.judge.name}/{asked.id}", self.answer(asked))
            elif not more():
                return

    def answer(self, asked: Assignment) -> Answer:
        """Return the judge's answer about two completions in the order shown."""
        if len(asked.shown) > 2:
            return Answer("skip")  # a constitution compares pairs
        first, second = (asked.item.candidates[place].completion for place in asked.shown)
        pair = Pair(asked.item.prompt, first, second)
        # Principles are drawn by item number, so that an interrupted run gives the same labels.
        (labelled,) = label_pairs(self.judge, self.constitution, [pair], self.settings, asked.item.id).pairs
        return answer_of(labelled)


def answer_of(labelled: LabelledPair) -> Answer:
    """Convert a label to an annotator's answer."""
    preference, verdict = labelled.preference, labelled.verdict
    if preference is None or verdict is None:
        return Answer("skip")
    if 0.5 in (preference, verdict):
        return Answer("tie")
    certainty = max(preference, 1 - preference)
    strength = 1 + sum(certainty >= level for level in LEVELS)
    return Answer("ranking", ranks=(0, 1) if preference > 0.5 else (1, 0), strength=strength)
