"""Language models that judge single completions: by the criteria of a rubric, or against a reference answer."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.errors import DataError, SettingError, check_choice, check_range
from rlhf_lightning.functional.judging import debiased_probability, preference_probability
from rlhf_lightning.scoring import scorer
from rlhf_lightning.scoring.judges import load_judge
from rlhf_lightning.scoring.judges.judge import (
    ComparingPrinciple,
    Judge,
    JudgeAnswer,
    Question,
    Wording,
    as_text,
    as_turns,
    checked_answers,
)
from rlhf_lightning.scoring.scorer import Scorer, Scores, column
from rlhf_lightning.types import Judgement, Prompt, Rollout

GOLD = "gold"
"""Name of the part with the second judge's score."""

VERDICT = Wording(answer="The right verdict is (")
ASKED = """\
{conversation} {completion}

Criterion: {criterion}

(A) The last answer meets the criterion.

(B) It does not.

Name the right verdict by its letter alone: (A) or (B)."""

BETTER = "Which answer is more helpful, honest and to the point?"

Criterion = Mapping[str, Any]


class RubricScorer(Scorer):
    r"""Rubrics as rewards (Gunjal et al., 2507.17746): a judge decides which criteria a completion meets.

    With explicit aggregation score = sum_j w_j c_j / sum_j |w_j|. c_j = p(A) / (p(A) + p(B)) is the judge's probability
    that criterion j is met, from one question per criterion. A judge that answers only with a letter gives 0 or 1. A
    negative weight marks a fault. A criterion with a ``name`` is a part of the judgement. The feedback lists criteria
    that are probably not met, and faults that are probably present. If a criterion gets no answer, the completion has
    no score.

    With implicit aggregation the judge reads all criteria at once, and the score is its probability that they are met
    as a whole: one question per completion, without parts and feedback.

    Args:
        judge: spec for `load_judge`: a model's folder, the address of an OpenAI-compatible server, ...
        judge_args: further arguments of the judge, such as ``model`` and ``read`` of a server.
        criteria: the rubric of all rows: a list, or a JSON file with a list; null reads the column ``rubric`` of each
            row. A criterion is a text, or {criterion: ..., weight: ..., name: ...}; a rubric may also be one text.
        gold: a second judge, whose score is the part ``gold``; it is logged and not trained on.
        gold_args: further arguments of the second judge.
        aggregation: "explicit" asks one question per criterion, "implicit" one per completion.
        dropout: probability of leaving out each criterion in a training rollout; at least one criterion is kept. The
            completions of a prompt are judged by the same criteria. The second judge and evaluation use all criteria.
        seed: seed of the dropout.

    Raises:
        SettingError: the criteria are not a list of criteria, the file cannot be read, or a setting is out of range.
    """

    def __init__(
        self, judge: str | Judge, judge_args: Mapping[str, Any] | None = None,
        criteria: str | list[Any] | None = None, gold: str | Judge | None = None,
        gold_args: Mapping[str, Any] | None = None, aggregation: Literal["explicit", "implicit"] = "explicit",
        dropout: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        check_choice(("explicit", "implicit"), aggregation=aggregation)
        check_range(0 <= dropout < 1, "it must be in [0, 1)", dropout=dropout)
        self.aggregation, self.dropout, self.seed, self.rollouts = aggregation, dropout, seed, 0
        self.criteria = None
        if criteria is not None:
            given = _read(criteria) if isinstance(criteria, str) else criteria
            try:
                self.criteria = checked_rubric(given)
            except DataError as error:
                raise SettingError("wrong-rubric", f"criteria: {error}") from error
        self.judge = load_judge(judge, judge_args)
        self.gold = None if gold is None else load_judge(gold, gold_args)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        if self.criteria is None:
            rubrics = [checked_rubric(one) for one in column(columns, "rubric", self)]
        else:
            rubrics = [self.criteria] * len(completions)
        kept = [self._kept(rubric, prompt) for rubric, prompt in zip(rubrics, prompts, strict=True)]
        found = self._judged(self.judge, prompts, completions, kept)
        if self.gold is None:
            return found
        golds = self._judged(self.gold, prompts, completions, rubrics)
        return [
            one._replace(parts={**one.parts, GOLD: math.nan if gold.score is None else gold.score})
            for one, gold in zip(found, golds, strict=True)
        ]

    def _judged(
        self, judge: Judge, prompts: Sequence[Prompt], completions: Sequence[str], rubrics: list[list[Criterion]]
    ) -> list[Judgement]:
        if self.aggregation == "implicit":
            rubrics = [[{"criterion": as_a_whole(rubric), "weight": 1.0}] for rubric in rubrics]
        rows = zip(prompts, completions, rubrics, strict=True)
        asked = [question(prompt, text, one["criterion"]) for prompt, text, rubric in rows for one in rubric]
        found = [judgement(rubric, share) for rubric, share in zip(rubrics, met(judge, asked, rubrics), strict=True)]
        return [one._replace(feedback=None) for one in found] if self.aggregation == "implicit" else found

    def _kept(self, rubric: list[Criterion], prompt: Prompt) -> list[Criterion]:
        """Return the criteria that a prompt's completions are judged by in this training rollout."""
        if not (self.dropout and scorer.LEARNING):
            return rubric
        said = json.dumps([self.seed, self.rollouts, prompt], sort_keys=True, default=str)
        draws = random.Random(said)  # depends on seed, rollout and prompt: equal on all ranks, and after resuming
        chances = [draws.random() for _ in rubric]
        kept = [one for one, chance in zip(rubric, chances, strict=True) if chance >= self.dropout and one["weight"]]
        return kept or [max(zip(chances, rubric, strict=True), key=lambda pair: (bool(pair[1]["weight"]), pair[0]))[1]]

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        self.rollouts += 1

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts} if self.dropout else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollouts = int(state.get("rollouts", 0))


class WinRateScorer(Scorer):
    """Probability that a judge prefers the completion to the row's reference answer, averaged over both orders.

    A completion equal to the reference scores 0.5. If a comparison gets no answer, the completion has no score.

    Args:
        judge: spec for `load_judge`: a model's folder, the address of an OpenAI-compatible server, ...
        judge_args: further arguments of the judge.
        reference: data column with the reference answer.
        question: asks which of two answers is better.
    """

    def __init__(
        self, judge: str | Judge, judge_args: Mapping[str, Any] | None = None, reference: str = "reference",
        question: str = BETTER,
    ) -> None:  # fmt: skip
        self.judge = load_judge(judge, judge_args)
        self.reference, self.principle = reference, ComparingPrinciple("win_rate", question)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        others = [str(one) for one in column(columns, self.reference, self)]
        rows = list(zip(prompts, completions, others, strict=True))
        asked = [self._question(prompt, own, other) for prompt, own, other in rows]
        asked += [self._question(prompt, other, own) for prompt, own, other in rows]
        answers = checked_answers(self.judge, asked)
        count = len(rows)
        wins = debiased_probability(_first(answers[:count]), _first(answers[count:]))
        failed = [bool(a.failure or b.failure) for a, b in zip(answers[:count], answers[count:], strict=True)]
        return [None if bad else win for bad, win in zip(failed, wins.tolist(), strict=True)]

    def _question(self, prompt: Prompt, first: str, second: str) -> Question:
        wording = Wording()
        text = wording.comparison.format(
            conversation=as_text(as_turns(prompt), wording),
            question=self.principle.question,
            first=first,
            second=second,
        )
        return Question(prompt, first, second, self.principle, [{"role": "user", "content": text}], wording)


def _first(answers: Sequence[JudgeAnswer]) -> Tensor:
    """Return the probability that the first option wins, shape (answers,); arbitrary where there is no answer."""
    known = [(0.0, 0.0) if one.failure else (one.first_logprob, one.second_logprob) for one in answers]
    logprobs = torch.tensor(known, dtype=torch.float64).view(-1, 2)
    return preference_probability(logprobs[:, 0], logprobs[:, 1])


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError("wrong-rubric", f"criteria names the file {path}, which cannot be read: {error}") from error


def checked_rubric(given: Any) -> list[Criterion]:
    """Return a rubric as a list of criteria with weights.

    Raises:
        DataError: the rubric is empty, or a criterion has no text or a weight that is not a finite number.
    """
    listed = [given] if isinstance(given, str | Mapping) else given
    if not isinstance(listed, Sequence) or not listed:
        raise DataError("wrong-rubric", f"a rubric is {given!r:.200}: it must be a text or a list of criteria")
    rubric: list[Criterion] = []
    for one in listed:
        made: Any = {"criterion": one} if isinstance(one, str) else one
        text = made.get("criterion") if isinstance(made, Mapping) else None
        weight = made.get("weight", 1.0) if isinstance(made, Mapping) else None
        number = isinstance(weight, int | float) and not isinstance(weight, bool) and abs(weight) < math.inf
        if not isinstance(text, str) or not text.strip() or not number:
            raise DataError("wrong-rubric", f"a criterion is {one!r:.200}: it must have a text and a finite weight")
        rubric.append({**made, "weight": float(made.get("weight", 1.0))})
    if not sum(abs(one["weight"]) for one in rubric):
        raise DataError("wrong-rubric", "every weight of a rubric is 0")
    return rubric


def as_a_whole(rubric: Sequence[Criterion]) -> str:
    """Return a rubric merged into one criterion."""
    lines = [
        f"- {'avoid: ' if one['weight'] < 0 else ''}{one['criterion']} (weight {abs(one['weight']):g})"
        for one in rubric
    ]
    return "\n".join(["It meets these criteria as a whole:", *lines])


def question(prompt: Prompt, completion: str, criterion: str) -> Question:
    """Return the question whether a completion meets a criterion: (A) yes, (B) no."""
    text = ASKED.format(conversation=as_text(as_turns(prompt), VERDICT), completion=completion, criterion=criterion)
    principle = ComparingPrinciple("rubric", criterion)
    return Question(prompt, completion, "", principle, [{"role": "user", "content": text}], VERDICT)


def met(judge: Judge, asked: Sequence[Question], rubrics: Sequence[Sequence[Criterion]]) -> list[list[float] | None]:
    """Return the probability that each criterion of each rubric is met; None for a rubric with a missing answer."""
    answers = checked_answers(judge, asked)
    shares, found, first = _first(answers).tolist(), [], 0
    for rubric in rubrics:
        rows = range(first, first + len(rubric))
        found.append(None if any(answers[row].failure for row in rows) else [shares[row] for row in rows])
        first += len(rubric)
    return found


def judgement(rubric: Sequence[Criterion], shares: Sequence[float] | None) -> Judgement:
    """Return the weighted share of met criteria as the score, with named criteria as parts and faults as feedback."""
    if shares is None:
        return Judgement(None)
    met_here = list(zip(rubric, shares, strict=True))
    score = sum(one["weight"] * share for one, share in met_here) / sum(abs(one["weight"]) for one in rubric)
    faults = [one["criterion"] for one, share in met_here if (share < 0.5) == (one["weight"] > 0) and one["weight"]]
    parts = {str(one["name"]): share for one, share in met_here if "name" in one}
    return Judgement(score, parts, feedback="\n".join(faults) or None)
