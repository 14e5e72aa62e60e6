"""Check invariants that hold for the rollouts of any objective, and log the measured values as metrics."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rlhf_lightning.errors import SettingError, StateError
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import PolicyLogprobs, Rollout

NAMES = ("ratio", "sampler", "support", "mask", "score_slot", "first_kl", "sync_error")


class InvariantError(StateError):
    """A rollout violates an invariant, so training on it would be wrong."""


class Invariants:
    """Checks of a rollout. Each check raises or warns, and keeps its measured value for the log.

    In fp32 the largest difference is bounded, since only rounding may differ. In lower precision the mean is bounded.
    ``exact`` is False for a model that computes in lower precision and returns fp32.

    Differences caused by an external engine are measured and not bounded. ``own_sampler`` is False if the sampled
    log-probabilities come from such an engine or from an earlier policy. ``own_old`` is False if they are also the old
    log-probabilities. ``whole_support`` is False if the engine might exclude tokens.

    Args:
        on_violation: "raise", or "warn" and continue.
    """

    def __init__(self, on_violation: Literal["raise", "warn"] = "raise") -> None:
        if on_violation not in ("raise", "warn"):
            raise SettingError("unknown-choice", f"on_violation is {on_violation!r}: it must be 'raise' or 'warn'")
        self.on_violation, self.exact = on_violation, True
        self.own_sampler, self.own_old, self.whole_support = True, True, True
        self._measured: dict[str, float] = {}

    def take(self, strategy: Strategy) -> dict[str, float]:
        """Return the largest values measured on any rank since the last call, as metrics."""
        # A rank without rows has measured fewer names, so all ranks compare the same list.
        here = [self._measured.get(name, -1.0) for name in NAMES]
        self._measured = {}
        precision = torch.float32 if strategy.root_device.type == "mps" else torch.float64
        table = torch.tensor(here, dtype=precision, device=strategy.root_device)
        largest = strategy.reduce(table, reduce_op="max")
        return {f"invariant/{name}": value for name, value in zip(NAMES, largest.tolist(), strict=True) if value >= 0}

    def check_ratio(self, logprobs: PolicyLogprobs, meter: Meter) -> None:
        """Check that every ratio is 1 before the first update of a rollout, once the update reads ``meter``."""
        mask, now = logprobs.completion_mask, logprobs.logprobs.detach()
        moved = torch.expm1(torch.where(mask, now - logprobs.old_logprobs, 0.0)).abs()
        bounds_largest = self.own_old and self._is_exact(now)
        bound = (1e-4 if bounds_largest else 1e-2) if self.own_old else math.inf
        cause = "policy and rollout had different forward passes: dropout, a missing temperature, other padding"
        measured = moved.max() if bounds_largest else moved.sum() / mask.sum().clamp_min(1)
        meter.when_read(measured, partial(self._check, "ratio", bound=bound, cause=cause))

    def check_sampler(self, rollout: Rollout) -> None:
        """Check that the sampling engine and the trainer's forward pass give the same log-probabilities.

        For an external engine (``own_sampler`` False) the difference is only measured, since the sampler correction
        accounts for it.
        """
        if rollout.behaviour_logprobs is None:
            return
        difference = (rollout.behaviour_logprobs - rollout.old_logprobs)[rollout.completion_mask].abs()
        if not self.own_sampler:
            self._check("sampler", float(difference.mean()) if difference.numel() else 0.0, math.inf, "")
            if not self.whole_support:
                self._check_support(rollout)
            return
        self._check_difference(
            "sampler", difference, rollout.old_logprobs, 1e-2, 5e-2,
            "the sampler used different weights, another temperature, or a truncated distribution (top_p, top_k)",
        )  # fmt: skip

    def _check_support(self, rollout: Rollout) -> None:
        """Check that an engine samples from all tokens: the mean of old / behaviour over its samples is then 1.

        If it samples from a part of the vocabulary, the mean is the policy's probability of that part, and no
        correction can compensate for it. The mean is 1 also for an engine with other weights.
        """
        behaviour = rollout.behaviour_logprobs
        assert behaviour is not None
        ratio = (rollout.old_logprobs - behaviour)[rollout.completion_mask].double().clamp(max=20.0).exp()
        if len(ratio) < 100:
            return
        error = float(ratio.std()) / math.sqrt(len(ratio))
        self._check(
            "support", max(0.0, 1.0 - float(ratio.mean()) - 6 * error), 0.01,
            "the engine draws from a truncated distribution (top_p, top_k, min_p), applies penalties, or reports "
            "log-probabilities that ignore the temperature; start it without them",
        )  # fmt: skip

    def note_sync(self, error: float | None) -> None:
        """Record the difference that an engine's probe found after a weight transfer."""
        if error is not None:
            self._measured["sync_error"] = error

    def check_lengths(self, rollout: Rollout) -> None:
        """Check that the mask counts exactly the policy's tokens, including the end token."""
        lengths = torch.tensor([int(mask.sum()) for mask in rollout.sequences.supervised], dtype=torch.long)
        wrong = (rollout.completion_mask.sum(-1).cpu() != lengths).sum()
        self._check("mask", float(wrong), 0.0, "the mask of the layout does not match the completion")

    def check_scores(self, scores: Tensor, rewards: Tensor, slots: Tensor) -> None:
        """Check that each completion's score, possibly scaled, appears in the rewards only at its position.

        Args:
            scores: shape (episodes,); the rewards were computed from them with gradient.
            rewards: shape (episodes, positions).
            slots: position of each score, shape (episodes,).
        """
        known = ~scores.detach().isnan()
        place = torch.zeros_like(rewards, dtype=torch.bool).scatter(1, slots.unsqueeze(1), True)
        here, elsewhere = (
            torch.autograd.grad(torch.where(cells, rewards, 0.0).sum(), scores, retain_graph=True)[0][known].abs()
            for cells in (place, ~place)
        )
        wrong = elsewhere + (here == 0)
        self._check(
            "score_slot", float(wrong.max()) if wrong.numel() else 0.0, 1e-5,
            "shape_rewards puts a score on a position other than score_slots, or on several positions (return None "
            "from score_slots if scores are spread on purpose)",
        )  # fmt: skip

    def check_first_kl(self, rollout: Rollout) -> None:
        """Check that the KL of every completion is 0 before any update."""
        if rollout.reference_logprobs is None or not self.own_old:
            return
        difference = (rollout.old_logprobs - rollout.reference_logprobs)[rollout.completion_mask].abs()
        self._check_difference(
            "first_kl", difference, rollout.old_logprobs, 1e-3, 5e-2,
            "the reference is not the model that training started from",
        )  # fmt: skip

    def _check_difference(
        self, name: str, values: Tensor, like: Tensor, bound: float, mean_bound: float, cause: str
    ) -> None:
        if not values.numel():
            return
        if self._is_exact(like):
            self._check(name, float(values.max()), bound, cause)
        else:
            self._check(name, float(values.mean()), mean_bound, cause)

    def _is_exact(self, like: Tensor) -> bool:
        """Whether log-probabilities are computed in single or double precision."""
        single = like.dtype in (torch.float32, torch.float64)
        return self.exact and single and not torch.is_autocast_enabled(like.device.type)

    def _check(self, name: str, value: float, bound: float, cause: str) -> None:
        self._measured[name] = max(self._measured.get(name, 0.0), value)
        if value <= bound:
            return
        message = (
            f"invariant {name}: measured {value:.3g}, rounding errors are at most {bound:.3g}; usual cause: {cause}"
        )
        if self.on_violation == "raise":
            raise InvariantError(f"invariant-{name}", f"{message}. Set model.on_violation=warn to continue")
        rank_zero_warn(message)
