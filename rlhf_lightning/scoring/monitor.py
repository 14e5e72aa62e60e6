"""Monitors: a second judgement of completions that looks for reward hacking, and acts on the score."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from rlhf_lightning.errors import SettingError, StateError
from rlhf_lightning.scoring.composition import ScorerGroup
from rlhf_lightning.scoring.loading import load_scorer
from rlhf_lightning.scoring.scorer import Measured, Scorer, Scores, ask_scorer
from rlhf_lightning.types import Prompt, Rollout


class NoisyTruth(Scorer):
    """A ground truth of 0 and 1 with a set error rate: each answer is flipped with that probability.

    The flips are a function of seed, prompt and completion, so they do not depend on batches, ranks or resumes.

    Args:
        truth: what `load_scorer` takes; 1 is a hack, 0 is none.
        error_rate: probability of a wrong answer, in [0, 0.5].
        seed: seed of the flips.
    """

    def __init__(self, truth: Any, error_rate: float = 0.0, seed: int = 0) -> None:
        if not 0 <= error_rate <= 0.5:
            raise SettingError(
                "setting-out-of-range", f"error_rate is {error_rate}: it must lie in [0, 0.5], where 0.5 is a coin"
            )
        self.truth, self.error_rate, self.seed = load_scorer(truth), error_rate, seed

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        told = ask_scorer(self.truth, prompts, completions, columns, "truth").scores.tolist()
        return [
            None if math.isnan(value) else (1.0 - value if self._flips(prompt, said) else value)
            for value, prompt, said in zip(told, prompts, completions, strict=True)
        ]

    def _flips(self, prompt: Prompt, completion: str) -> bool:
        digest = hashlib.blake2b(json.dumps([self.seed, prompt, completion]).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < self.error_rate


class Monitor(ScorerGroup):
    """Another scorer, with a monitor that looks for reward hacking and acts where it suspects it.

    The monitor is any scorer whose score is a suspicion in [0, 1]: a rule, a judge, or a `NoisyTruth`. A completion is
    flagged from the threshold on. What the monitor cannot judge is not flagged.

    Actions: ``penalty`` subtracts ``penalty`` from the score of a flagged completion; ``screen`` gives it no score, so
    that nothing is learned from it; ``stop`` ends the run after a rollout with a share of flagged completions of at
    least ``stop_at``; ``watch`` does nothing.

    Metrics: ``monitor_flagged``. With ``truth``, which never acts, also ``hack_rate``, and the monitor's
    ``monitor_precision`` (hacks among the flagged), ``monitor_recall`` (flagged among the hacks) and ``monitor_auroc``
    (probability that a hack is more suspicious than an honest completion scored at the same time; ties count a half).

    Args:
        scorer: what scores: what `load_scorer` takes.
        monitor: what suspects.
        action: penalty, screen, stop or watch.
        threshold: suspicion from which a completion is flagged.
        penalty: subtracted from the score of a flagged completion, with the action penalty.
        stop_at: share of flagged completions, with the action stop.
        truth: 1 for a hack and 0 for none, to measure the monitor by; null measures nothing.

    Raises:
        SettingError: the action is unknown, or a number is out of range.
    """

    def __init__(
        self,
        scorer: Any,
        monitor: Any,
        action: Literal["penalty", "screen", "stop", "watch"] = "penalty",
        threshold: float = 0.5,
        penalty: float = 1.0,
        stop_at: float = 0.02,
        truth: Any = None,
    ) -> None:
        if action not in ("penalty", "screen", "stop", "watch"):
            raise SettingError("unknown-choice", f"action is {action!r}; choose penalty, screen, stop or watch")
        if not 0 < threshold <= 1 or penalty < 0 or not 0 < stop_at <= 1:
            raise SettingError(
                "setting-out-of-range",
                f"threshold is {threshold}, penalty {penalty} and stop_at {stop_at}: threshold and stop_at must lie in "
                "(0, 1], and penalty be at least 0",
            )
        super().__init__({"proxy": scorer, "monitor": monitor, **({} if truth is None else {"truth": truth})})
        self.action, self.threshold, self.penalty, self.stop_at = action, threshold, penalty, stop_at
        names = ("monitor_precision", "monitor_recall", "monitor_auroc", "hack_rate")
        self._measured = Measured("monitor_flagged", *(names if truth is not None else ()))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        judged = self.member_judgements(prompts, completions, columns)
        suspicions = [one["monitor"].score for one in judged]
        flagged = [value is not None and value >= self.threshold for value in suspicions]
        self._measure(suspicions, flagged, [one["truth"].score for one in judged] if "truth" in self.scorers else None)
        weights = {"proxy": 1.0, "monitor": 0.0, "truth": 0.0}
        return [
            self.combined(self._score(one["proxy"].score, suspect), one, weights)
            for one, suspect in zip(judged, flagged, strict=True)
        ]

    def _score(self, score: float | None, flagged: bool) -> float | None:
        if score is None or not flagged or self.action in ("stop", "watch"):
            return score
        return None if self.action == "screen" else score - self.penalty

    def _measure(
        self, suspicions: Sequence[float | None], flagged: Sequence[bool], truths: Sequence[float | None] | None
    ) -> None:
        self._measured.add("monitor_flagged", [float(one) for one in flagged])
        if truths is None:
            return
        hacks = [None if truth is None else truth >= 0.5 for truth in truths]
        known = list(zip(hacks, flagged, suspicions, strict=True))
        honest = [value for hack, _, value in known if hack is False and value is not None]
        self._measured.add("hack_rate", [None if hack is None else float(hack) for hack in hacks])
        self._measured.add("monitor_precision", [float(hack) if flag and hack is not None else None
                                                 for hack, flag, _ in known])  # fmt: skip
        self._measured.add("monitor_recall", [float(flag) if hack else None for hack, flag, _ in known])
        self._measured.add(
            "monitor_auroc",
            [_above(value, honest) if hack and value is not None and honest else None for hack, _, value in known],
        )

    def take_metrics(self) -> dict[str, Tensor]:
        return {**super().take_metrics(), **self._measured.take()}

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Tell the members; end the run where the monitor suspects too many completions.

        Raises:
            StateError: with the action stop, the share of flagged completions is ``stop_at`` or more.
        """
        super().on_rollout_end(rollout, means)
        share = means.get("monitor_flagged", 0.0)
        if self.action == "stop" and share >= self.stop_at:
            raise StateError(
                "monitor-stopped",
                f"the monitor flags {share:.1%} of the completions of a rollout, and stop_at is {self.stop_at:.1%}: "
                "look at the samples, repair the scorer, and resume from an earlier checkpoint",
            )


def _above(value: float, others: Sequence[float]) -> float:
    """Return the share of other values that are lower; equal ones count a half."""
    return sum((value > other) + 0.5 * (value == other) for other in others) / len(others)
