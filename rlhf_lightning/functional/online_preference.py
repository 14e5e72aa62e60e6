"""Preference objectives on completions that the policy itself has just sampled.

Losses stand in the classes. Online DPO's pairs come from `best_and_worst` of the policy's samples, and its loss is
DPO's. Nash-MD samples its opponent from `nash_md_logits`, and its loss is a policy gradient (`reinforce_loss`)
whose advantage is the chance to win less a half, with `kl_k2` to the reference beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32, require_shape


def best_and_worst(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the best- and of the worst-scored sample of each group; groups whose scores all tie are left out.

    Args:
        scores: shape (episodes,); NaN where a sample could not be scored, which is then neither.
        group: index of the prompt each episode answers, int64 from 0, shape (episodes,).

    Returns:
        Chosen and rejected episodes, each of shape (pairs,), in the order of their groups.
    """
    require_shape("episodes", scores=scores, group=group)
    groups = torch.bincount(group)
    member = group == torch.arange(len(groups), device=group.device).unsqueeze(-1)
    member = member & ~scores.isnan()  # (groups, episodes)
    highest, chosen = torch.where(member, scores, -torch.inf).max(-1)
    lowest, rejected = torch.where(member, scores, torch.inf).min(-1)
    return chosen[highest > lowest], rejected[highest > lowest]


def nash_md_logits(policy_logits: Tensor, reference_logits: Tensor, mixture: float = 0.5) -> Tensor:
    r"""Logits of the opponent that Nash-MD samples, the geometric mixture policy^{1 - c} reference^c.

    (1 - c) policy logits + c reference logits (Munos et al., arXiv 2312.00886).

    Args:
        policy_logits: shape (..., vocabulary).
        reference_logits: same shape.
        mixture: c, share of the reference.
    """
    require_shape("...", policy_logits=policy_logits, reference_logits=reference_logits)
    return torch.lerp(at_least_float32(policy_logits), at_least_float32(reference_logits), mixture)
