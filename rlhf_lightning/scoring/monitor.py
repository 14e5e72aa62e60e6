"""Monitors: a second scorer that detects reward hacking and acts on suspicious completions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning import tokenization
from rlhf_lightning.errors import DataError, SettingError, StateError, check_choice, check_range
from rlhf_lightning.functional.statistics import logistic_fit
from rlhf_lightning.loading import read_records
from rlhf_lightning.micro_batches import cut_micro_batches
from rlhf_lightning.models.causal_lm import CausalLM, PredictingStates
from rlhf_lightning.models.layout import padded_layout, select
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.recording import kept_states
from rlhf_lightning.models.resolving import resolve_folder
from rlhf_lightning.scoring.composition import ScorerGroup
from rlhf_lightning.scoring.learned import load_scorer, scored_sequences
from rlhf_lightning.scoring.scorer import Measured, Scorer, Scores, ask_scorer
from rlhf_lightning.types import MicroBatchLimits, Prompt, Rollout


class NoisyTruth(Scorer):
    """Ground truth of 0 and 1 with a given error rate: each answer is flipped with that probability.

    The flips depend only on seed, prompt and completion, so they do not depend on batches, ranks or resuming.

    Args:
        truth: spec for `load_scorer`; 1 is a hack, 0 is none.
        error_rate: probability of a wrong answer, in [0, 0.5].
        seed: seed of the flips.
    """

    def __init__(self, truth: Any, error_rate: float = 0.0, seed: int = 0) -> None:
        check_range(0 <= error_rate <= 0.5, "it must lie in [0, 0.5], where 0.5 is a coin", error_rate=error_rate)
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


class LinearProbe(Scorer):
    """Linear probe on the policy's hidden states: the probability that a completion is a hack.

    The features are means of a layer's hidden states at the positions that predict the completion's tokens. A logistic
    regression is fitted to labelled samples, and fitted again as the policy changes. The fit is saved in checkpoints.

    Args:
        labelled: JSON Lines of samples with ``prompt``, ``completion`` (text) and ``label`` (true for a hack).
        layer: number of the decoder layer; -1 is the last.
        every: rollouts between two fits; null fits once, on the policy that training starts from.
        penalty: L2 penalty of the standardised weights, relative to the number of samples.
        max_tokens: maximum number of positions in a forward pass.

    Raises:
        DataError: a row lacks one of the three fields, or all labels are equal.
    """

    def __init__(
        self, labelled: str, layer: int = -1, every: int | None = 1, penalty: float = 0.01, max_tokens: int = 16_384
    ) -> None:
        rule = "every must be at least 1 or null, and penalty positive"
        check_range((every is None or every >= 1) and penalty > 0, rule, every=every, penalty=penalty)
        self.layer, self.every, self.penalty, self.max_tokens = layer, every, penalty, max_tokens
        rows = read_records(Path(labelled))
        wrong = [number for number, row in enumerate(rows, 1) if not {"prompt", "completion", "label"} <= row.keys()]
        if wrong:
            raise DataError("missing-columns", f"row {wrong[0]} of {labelled} lacks prompt, completion or label")
        self.labels = torch.tensor([float(row["label"]) for row in rows], dtype=torch.float64)
        if not 0 < self.labels.sum() < len(rows):
            raise DataError("one-label", f"{labelled} needs samples of both labels; found {len(rows)} of one")
        self.samples = [row["prompt"] for row in rows], [str(row["completion"]) for row in rows]
        self.policy: CausalLM | None = None
        self.weights: Tensor | None = None  # (hidden size + 1), the bias last
        self.rollouts = 0

    def load_beside(self, policy: CausalLM | None, settings: LoadSettings) -> None:
        """Keep the policy, whose hidden states the probe reads.

        Raises:
            SettingError: the policy's weights are sharded.
        """
        if policy is None:
            raise SettingError(
                "probe-without-policy", "LinearProbe reads the policy, which is sharded: use another monitor"
            )
        self.policy, self.tokenizer = policy, tokenization.load_tokenizer(resolve_folder(policy.source))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        if not len(completions):
            return []
        if self.weights is None:
            self.weights = self._fitted(self.features(*self.samples))
        return torch.sigmoid(self.features(prompts, completions) @ self.weights[:-1] + self.weights[-1])

    def _fitted(self, features: Tensor) -> Tensor:
        """Return weights and bias for raw features, from a regression on standardised features."""
        mean, spread = features.mean(0), features.std(0).clamp_min(1e-12)
        design = torch.cat([(features - mean) / spread, torch.ones(len(features), 1)], -1)
        ridge = torch.full((design.shape[1],), self.penalty * len(features), dtype=torch.float64)
        ridge[-1] = 1e-6
        fit = logistic_fit(design, self.labels, ridge)
        weights = fit[:-1] / spread
        return torch.cat([weights, fit[-1:] - mean @ weights])

    @torch.no_grad()
    def features(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Return the mean hidden state of each completion, fp64, shape (completions, hidden size)."""
        if self.policy is None:
            raise StateError(
                "probe-without-policy", "LinearProbe reads the policy of a run: use it as a scorer of `rlhf fit`"
            )
        sequences = scored_sequences(self.tokenizer, prompts, completions)
        policy, training = self.policy, self.policy.training
        device, found = next(policy.parameters()).device, dict[int, Tensor]()
        policy.eval()
        for rows in cut_micro_batches(sequences.lengths, MicroBatchLimits(max_tokens=self.max_tokens)):
            layout = padded_layout(select(sequences, rows)).to(device)
            with kept_states(policy, [self.layer], layout) as kept:
                policy(PredictingStates(layout))
            (states,) = kept.values()
            grid = layout.scatter(states.double())
            found |= zip(rows, (grid.sum(1) / layout.completion_mask.sum(1, keepdim=True)).cpu(), strict=True)
        policy.train(training)
        return torch.stack([found[row] for row in range(len(completions))])

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Drop the fit if a new one is due; the next call of the scorer fits again."""
        self.rollouts += 1
        if self.every is not None and self.rollouts % self.every == 0:
            self.weights = None

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollouts, self.weights = state["rollouts"], state["weights"]


class Monitor(ScorerGroup):
    """Scorer combined with a monitor that detects reward hacking and acts on flagged completions.

    The monitor is any scorer that returns a suspicion in [0, 1]: a rule, a judge, a `LinearProbe`, or a `NoisyTruth`. A
    completion is flagged if its suspicion is at least ``threshold``. A completion that the monitor cannot judge is not
    flagged.

    Actions: ``penalty`` subtracts ``penalty`` from the score of a flagged completion; ``screen`` removes its score, so
    that it is not trained on; ``stop`` ends the run after a rollout with a share of flagged completions of at least
    ``stop_at``; ``watch`` only logs.

    Metrics: ``monitor_flagged``. With ``truth`` (which never changes a score) also ``hack_rate``, and the monitor's
    ``monitor_precision`` (share of hacks among the flagged), ``monitor_recall`` (share of flagged among the hacks) and
    ``monitor_auroc`` (probability that a hack has a higher suspicion than an honest completion of the same call; ties
    count a half).

    Args:
        scorer: the scorer, as a spec for `load_scorer`.
        monitor: scorer that returns the suspicion.
        action: penalty, screen, stop or watch.
        threshold: minimum suspicion of a flagged completion.
        penalty: subtracted from the score of a flagged completion, with the action penalty.
        stop_at: share of flagged completions that ends the run, with the action stop.
        truth: scorer that returns 1 for a hack and 0 otherwise, to evaluate the monitor; null evaluates nothing.

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
        check_choice(("penalty", "screen", "stop", "watch"), action=action)
        check_range(0 < threshold <= 1 and 0 < stop_at <= 1, "both lie in (0, 1]", threshold=threshold, stop_at=stop_at)
        check_range(penalty >= 0, "it must be at least 0", penalty=penalty)
        super().__init__({"proxy": scorer, "monitor": monitor, **({} if truth is None else {"truth": truth})})
        self.action, self.threshold, self.penalty, self.stop_at = action, threshold, penalty, stop_at
        names = ("monitor_precision", "monitor_recall", "monitor_auroc", "hack_rate")
        self.measured = Measured("monitor_flagged", *(names if truth is not None else ()))

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
        self.measured.add("monitor_flagged", [float(one) for one in flagged])
        if truths is None:
            return
        hacks = [None if truth is None else truth >= 0.5 for truth in truths]
        known = list(zip(hacks, flagged, suspicions, strict=True))
        honest = [value for hack, _, value in known if hack is False and value is not None]
        self.measured.add("hack_rate", [None if hack is None else float(hack) for hack in hacks])
        self.measured.add("monitor_precision", [float(hack) if flag and hack is not None else None
                                                 for hack, flag, _ in known])  # fmt: skip
        self.measured.add("monitor_recall", [float(flag) if hack else None for hack, flag, _ in known])
        self.measured.add(
            "monitor_auroc",
            [_above(value, honest) if hack and value is not None and honest else None for hack, _, value in known],
        )

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Notify the members; end the run if too many completions are flagged.

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
    """Return the share of other values that are lower; equal values count a half."""
    return sum((value > other) + 0.5 * (value == other) for other in others) / len(others)
