"""A judge under a constitution in the place of people: what it prefers goes into the store as a judgement."""

from __future__ import annotations

from typing import Any, ClassVar

from rlhf_lightning.constitution.labelling import LabelSettings, label_pairs
from rlhf_lightning.constitution.labels import LabelledPair
from rlhf_lightning.constitution.principles import load_constitution
from rlhf_lightning.data.feedback.records import Answer, Assignment
from rlhf_lightning.people.labeller import Labeller, More
from rlhf_lightning.people.store import FeedbackStore
from rlhf_lightning.scoring.judges.judge import Pair, load_judge

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
