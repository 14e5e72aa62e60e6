"""What must hold in every rollout, whatever the objective: checked while training, and logged as metrics."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rlhf_lightning.errors import SettingError, StateError
from rlhf_lightning.types import PolicyLogprobs, Rollout

NAMES = ("ratio", "sampler", "mask", "score_slot", "first_kl")
"""What is measured."""


class InvariantError(StateError):
    """A rollout breaks what must hold; what would be learned from it is wrong."""


class Invariants:
    """Checks of a rollout. Each raises or warns, and leaves its measured value to be logged.

    Bounds are for fp32, where what should be equal differs by rounding alone; lower precisions are held to a mean, and
    so is a model that computes in one although its log-probabilities are fp32 (``exact`` False).

    Args:
        on_violation: "raise", or "warn" and go on.
    """

    def __init__(self, on_violation: Literal["raise", "warn"] = "raise") -> None:
        if on_violation not in ("raise", "warn"):
            raise SettingError("unknown-choice", f"on_violation is {on_violation!r}: it must be 'raise' or 'warn'")
        self.on_violation, self.exact, self.own_sampler = on_violation, True, True
        self._measured: dict[str, float] = {}

    def take(self, strategy: Strategy) -> dict[str, float]:
        """Return the largest values on any rank that were measured since the last call, as metrics."""
        # A rank without rows has measured less than the others: all of them compare the same names.
        here = [self._measured.get(name, -1.0) for name in NAMES]
        self._measured = {}
        precision = torch.float32 if strategy.root_device.type == "mps" else torch.float64
        table = torch.tensor(here, dtype=precision, device=strategy.root_device)
        largest = strategy.reduce(table, reduce_op="max")
        return {f"invariant/{name}": value for name, value in zip(NAMES, largest.tolist(), strict=True) if value >= 0}

    def check_ratio(self, logprobs: PolicyLogprobs) -> None:
        """Before the first update of a rollout the policy is the one that sampled: every ratio is 1."""
        mask = logprobs.completion_mask
        moved = torch.expm1((logprobs.logprobs.detach() - logprobs.old_logprobs)[mask]).abs()
        self._check_difference(
            "ratio", moved, logprobs.logprobs, 1e-4, 1e-2,
            "policy and rollout were forwarded differently: dropout, a temperature left out, other padding",
        )  # fmt: skip

    def check_sampler(self, rollout: Rollout) -> None:
        """The sampling engine and the trainer's forward give the same log-probabilities.

        Where the engine computes elsewhere (``own_sampler`` False) it is measured, and left to importance correction.
        """
        if rollout.behaviour_logprobs is None:
            return
        apart = (rollout.behaviour_logprobs - rollout.old_logprobs)[rollout.completion_mask].abs()
        if not self.own_sampler:
            self._check("sampler", float(apart.mean()) if apart.numel() else 0.0, float("inf"), "")
            return
        self._check_difference(
            "sampler", apart, rollout.old_logprobs, 1e-2, 5e-2,
            "the sampler used other weights, another temperature, or truncated the distribution (top_p, top_k)",
        )  # fmt: skip

    def check_lengths(self, rollout: Rollout) -> None:
        """The mask counts exactly the tokens that the policy wrote, the end token among them."""
        lengths = torch.tensor([int(mask.sum()) for mask in rollout.sequences.supervised], dtype=torch.long)
        wrong = (rollout.completion_mask.sum(-1).cpu() != lengths).sum()
        self._check("mask", float(wrong), 0.0, "completions whose mask does not count their tokens: look at the layout")

    def check_scores(self, scores: Tensor, rewards: Tensor, slots: Tensor) -> None:
        """Each completion's score is in the rewards, on its slot and on no other; it may be scaled.

        Args:
            scores: of each completion, shape (episodes,); rewards were made of them with gradient.
            rewards: shape (episodes, slots).
            slots: where each score belongs, shape (episodes,).
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
            "shape_rewards puts a score on another slot than score_slots says, or on more than one "
            "(return None from score_slots where scores are spread on purpose)",
        )  # fmt: skip

    def check_first_kl(self, rollout: Rollout) -> None:
        """Before any update the policy is the reference: no completion costs KL."""
        if rollout.reference_logprobs is None:
            return
        apart = (rollout.old_logprobs - rollout.reference_logprobs)[rollout.completion_mask].abs()
        self._check_difference(
            "first_kl", apart, rollout.old_logprobs, 1e-3, 5e-2,
            "the reference is not the model that training started from",
        )  # fmt: skip

    def _check_difference(
        self, name: str, values: Tensor, like: Tensor, bound: float, mean_bound: float, cause: str
    ) -> None:
        """Hold the largest of the values to a bound, or in a lower precision their mean."""
        if not values.numel():
            return
        if (
            self.exact
            and like.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled(like.device.type)
        ):
            self._check(name, float(values.max()), bound, cause)
        else:
            self._check(name, float(values.mean()), mean_bound, cause)

    def _check(self, name: str, value: float, bound: float, cause: str) -> None:
        self._measured[name] = max(self._measured.get(name, 0.0), value)
        if value <= bound:
            return
        message = f"invariant {name}: measured {value:.3g}, at most {bound:.3g} is rounding; the usual cause: {cause}"
        if self.on_violation == "raise":
            raise InvariantError(f"invariant-{name}", f"{message}. on_violation=warn continues anyway")
        rank_zero_warn(message)
