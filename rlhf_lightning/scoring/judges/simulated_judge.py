"""A judge of known quality: what it prefers, how sure it is, and how much the order sways it are given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from statistics import NormalDist

import torch

from rlhf_lightning.scoring.judges.judge import JudgeAnswer, Question
from rlhf_lightning.scoring.scorer import GoldReward, load_gold_reward


class SimulatedJudge:
    r"""Names (A) with log-odds scale * (gold_reward(first) - gold_reward(second)) + position_bias + noise * normal.

    The normal number of a pair is fixed by (seed, prompt, the two completions, principle): asked in the other order,
    the judge makes the same mistake about them, and only the bias stays with the place.

    Args:
        gold_reward: ``(prompt, completion) -> number``, or its import path, such as
            ``rlhf_lightning.worlds.hazards.harmlessness_of``.
        scale: log-odds per unit of gold reward; what is true is then sigmoid(scale * difference).
        position_bias: log-odds for whatever stands first.
        noise: standard deviation of what the judge gets wrong about a pair, log-odds.
        seed: of the noise.
        name: what labels say they come from.

    Raises:
        ValueError: the import path names no function.
    """

    def __init__(
        self,
        gold_reward: str | GoldReward,
        scale: float = 12.0,
        position_bias: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
        name: str = "simulated",
    ) -> None:
        self.gold_reward = load_gold_reward(gold_reward)
        self.scale, self.position_bias, self.noise, self.seed, self.name = scale, position_bias, noise, seed, name

    def __call__(self, questions: Sequence[Question]) -> list[JudgeAnswer]:
        """Answer the questions."""
        return [self._answer(question) for question in questions]

    def log_odds(self, question: Question) -> float:
        """What the judge thinks of a question, the order aside."""
        first, second = (self.gold_reward(question.prompt, side) for side in (question.first, question.second))
        gap = first - second
        return self.scale * gap + self.noise * self._mistake(question)

    def _answer(self, question: Question) -> JudgeAnswer:
        odds = torch.tensor(self.log_odds(question) + self.position_bias, dtype=torch.float64)
        first, second = torch.nn.functional.logsigmoid(torch.stack([odds, -odds])).tolist()
        return JudgeAnswer(first, second)

    def _mistake(self, question: Question) -> float:
        """A standard normal number that changes sign with the order."""
        if not self.noise:
            return 0.0
        sides = sorted((question.first, question.second))
        key = json.dumps([self.seed, question.prompt, sides, question.principle.id])
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
        drawn = NormalDist().inv_cdf((number + 0.5) / 2**48)
        return drawn if question.first == sides[0] else -drawn
