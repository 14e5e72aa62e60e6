"""A language model judges by each row's rubric: `rlhf fit --config experiments/objectives_of_users/rubric_judge.yaml`.

The column ``rubric`` is a criterion in words, or a list of ``{"criterion": ..., "weight": ...}``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf_lightning.scoring import Scorer
from rlhf_lightning.scoring.judges import load_judge
from rlhf_lightning.scoring.judges.judge import ComparingPrinciple, Judge, JudgeAnswer, Question, Wording, as_text
from rlhf_lightning.scoring.scorer import Scores, column
from rlhf_lightning.types import Judgement, Prompt

WORDING = Wording(answer="The right verdict is (")
ASKED = """\
{conversation} {completion}

Criterion: {criterion}

(A) The last answer meets the criterion.

(B) It does not.

Name the right verdict by its letter alone: (A) or (B)."""


class RubricScorer(Scorer):
    r"""Rubrics as rewards: score = sum_j w_j c_j / sum_j w_j (Gunjal et al., 2507.17746, explicit aggregation).

    c_j = p(A) / (p(A) + p(B)) is the judge's probability that criterion j is met; a judge that names a letter alone
    gives 0 or 1. Criteria that are more likely missed than met are the judgement's feedback. A completion with a
    criterion that gets no answer cannot be judged.

    Args:
        judge: what `load_judge` takes: a model's folder, the address of an OpenAI-compatible server, ...
        judge_args: further arguments of the judge, such as ``model`` and ``read`` of a server.
    """

    def __init__(self, judge: str | Judge, judge_args: Mapping[str, Any] | None = None) -> None:
        self.judge = load_judge(judge, judge_args)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return one judgement per completion, in [0, 1]."""
        given = column(columns, "rubric", self)
        rubrics = [[{"criterion": one}] if isinstance(one, str) else one for one in given]
        rows = zip(prompts, completions, rubrics, strict=True)
        asked = [question(prompt, text, one["criterion"]) for prompt, text, rubric in rows for one in rubric]
        answers = iter(self.judge(asked))
        return [judgement(rubric, [next(answers) for _ in rubric]) for rubric in rubrics]


def question(prompt: Prompt, completion: str, criterion: str) -> Question:
    """Return the question whether a completion meets a criterion: (A) yes, (B) no."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = ASKED.format(conversation=as_text(turns, WORDING), completion=completion, criterion=criterion)
    principle = ComparingPrinciple("rubric", criterion)
    return Question(prompt, completion, "", principle, [{"role": "user", "content": text}], WORDING)


def judgement(rubric: Sequence[Mapping[str, Any]], answers: Sequence[JudgeAnswer]) -> Judgement:
    """Return the weighted share of the criteria that are met, with those missed in words."""
    if any(answer.failure for answer in answers):
        return Judgement(None)
    met = torch.tensor([answer.first_logprob - answer.second_logprob for answer in answers]).sigmoid()
    weights = torch.tensor([float(one.get("weight", 1.0)) for one in rubric])
    missed = [one["criterion"] for one, share in zip(rubric, met, strict=True) if share < 0.5]
    return Judgement(float((weights * met).sum() / weights.sum()), feedback="\n".join(missed) or None)
