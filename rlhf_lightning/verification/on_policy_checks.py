"""The contract of objectives on samples: rewards, advantages, ratios, the KL penalty, the critic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import CriticValues
from rlhf_lightning.verification.cases import Case, widened
from rlhf_lightning.verification.convergence import descend
from rlhf_lightning.verification.exact import PolicyGradient
from rlhf_lightning.verification.point_checks import overwritten, statistic_checks
from rlhf_lightning.verification.rollout_checks import (
    aggregation_check,
    equal_scores_check,
    holes_check,
    kl_loss_checks,
    learned_check,
    loss_padding_check,
    missing_score_check,
    ratio_check,
    return_checks,
    sampler_checks,
    temperature_checks,
    update_checks,
)
from rlhf_lightning.verification.subject import Check, Subject, at_least, at_most
from rlhf_lightning.verification.targets import policy_of

FAR = 3.0
"""Nats of policy movement at which any clip is active."""


def on_policy_checks(subject: Subject) -> list[Check]:
    """Return the checks of an objective on samples, without convergence."""
    case = case_of(subject)
    finite = equal_scores_check(case)
    if not finite.held:  # nothing else can be measured
        return [finite]
    checks = [finite, *reward_checks(case), *advantage_checks(case), *loss_checks(case)]
    checks += [missing_score_check(case), learned_check(case), aggregation_check(case)]
    checks += [loss_padding_check(case), ratio_check(case), holes_check(case), *kl_loss_checks(case)]
    checks += [*sampler_checks(case), *temperature_checks(subject), *update_checks(subject)]
    if hasattr(subject.kind, "value_loss"):
        checks += [*value_checks(case), *return_checks(subject)]
    return [*checks, *kl_penalty_checks(subject)]


def case_of(subject: Subject) -> Case:
    """Return the rollout of all groups of two; a class without advantages there gets its integer settings at 1.

    A method that draws k completions of a group, as in pass@k, has nothing to compare in a group of k.
    """
    case, ones = Case(subject, subject.module), subject.integers_at_one
    if ones and not bool(case.advantages.advantages.any()):
        subject.settings |= ones
        subject.notes.append(f"{', '.join(ones)}: set to 1, as otherwise groups of two have no advantages")
        vars(subject).pop("module")  # it has the former settings
        case = Case(subject, subject.module)
    return case


# -- rewards and advantages -------------------------------------------------------------------------------------------


def reward_checks(case: Case) -> list[Check]:
    """Check that rewards hold the score once, at its slot, are 0 where masked, and that the KL penalty lowers them."""
    module, rollout, mask = case.module, case.rollout, case.rollout.completion_mask
    checks, slots = [], module.score_slots(rollout)
    if slots is not None:
        unscored = module.shape_rewards(rollout._replace(scores=torch.zeros_like(rollout.scores)))
        change = case.rewards - unscored
        expected = torch.zeros_like(change).scatter(1, slots.unsqueeze(1), rollout.scores.to(change).unsqueeze(1))
        advice = (
            "each score must be added once, unscaled, to the last completion token (or the position in score_slots)"
        )
        checks.append(at_most("score slot", (change - expected).abs().max(), 1e-9, advice))
    if case.rewards.shape == mask.shape:
        advice = "zero rewards behind the end of a completion"
        checks.append(at_most("rewards under mask", largest(case.rewards.masked_select(~mask)), 0, advice))
    if rollout.reference_logprobs is not None and module.kl_coef:
        nearer = torch.where(mask, rollout.reference_logprobs - 0.1, 0.0)
        change = (module.shape_rewards(rollout._replace(reference_logprobs=nearer)) - case.rewards).sum(-1)
        advice = (
            "more KL to the reference must never increase the reward: look at the sign, and at which of the two "
            "log-probabilities is subtracted"
        )
        checks.append(at_most("kl in reward", change.max(), 1e-12, advice))
    return checks


def largest(values: Tensor) -> float:
    """Return the largest magnitude; 0 for an empty tensor."""
    return float(values.abs().max()) if values.numel() else 0.0


def advantage_checks(case: Case) -> list[Check]:
    """Check the masking, the sign, the group and the credit assignment of advantages."""
    mask, scores = case.rollout.completion_mask, case.rollout.scores
    first = (torch.arange(len(scores)) % max(case.expected.group_size, 2) == 0).double()

    def raised(scores: Tensor, by: float) -> Tensor:
        lifted = case.advantages_of(scores=scores + by * first) - case.advantages_of(scores=scores)
        gain = lifted.sum(-1) / mask.sum(-1)
        return gain[::2].mean() - gain[1::2].mean()

    gain = raised(scores, 1.0)
    if float(gain) < 1e-9:  # methods that treat rewards as success rates
        gain = raised(scores.sigmoid(), 0.2)
    advice = "a higher score must give a higher advantage"
    checks = [*mask_checks(case), at_least("advantage sign", gain, 1e-9, advice)]
    return [*checks, own_group_check(case), credit_check(case)]


def beyond_others(case: Case, row: int, **changes: Tensor) -> Tensor:
    """Return the change of one completion's advantages beyond a shift and factor common to other groups."""
    mask, group = case.rollout.completion_mask, case.rollout.group
    others = mask & (group != group[row])[:, None]
    before, after = case.advantages_of(), case.advantages_of(**changes)
    matrix = torch.stack([before[others], torch.ones_like(before[others])], -1)
    found = torch.linalg.lstsq(matrix, after[others].unsqueeze(-1)).solution.squeeze(-1)
    return torch.where(mask, after - found[0] * before - found[1], 0.0)[row]


def lifted(values: Tensor, *place: int, by: float) -> Tensor:
    """Return a copy with one value raised."""
    found = values.clone()
    found[place] += by
    return found


def credit_check(case: Case) -> Check:
    """Check that each token position depends on the score, in some completions of several tokens."""
    mask, scores = case.rollout.completion_mask, case.rollout.scores
    rows = (mask.sum(-1) > 1).nonzero().squeeze(-1)[::5][:8].tolist()
    follows = [beyond_others(case, row, scores=lifted(scores, row, by=1.0)).abs() > 1e-9 for row in rows]
    credited, there = torch.stack(follows).any(0), mask[rows].any(0)
    if bool((there & ~credited).any()):
        credited = credited | credit_of_critic(case, rows)
    advice = "each token, the last one too, must get credit for the score: look at the direction of a sum and its ends"
    return at_most("credit", int((there & ~credited).sum()) if bool(credited.any()) else 0, 0, advice)


def credit_of_critic(case: Case, rows: list[int]) -> Tensor:
    """Return the tokens that depend on the critic's value of the next token, if none depends on earlier values.

    At lambda 0, the score reaches earlier tokens only through the critic.
    """
    mask, values = case.rollout.completion_mask, case.rollout.values
    found = torch.zeros_like(mask[0])
    if values is None or values.shape != mask.shape:
        return found
    for row in rows:
        count = int(mask[row].sum())
        moves = torch.stack(
            [beyond_others(case, row, values=lifted(values, row, at, by=1.0)).abs() > 1e-9 for at in range(count)]
        )[:, :count]
        if not bool(moves.triu(1).any()):
            found[: count - 1] |= moves.diagonal(-1)
    return found


def own_group_check(case: Case) -> Check:
    """Check that scores of some groups change other groups' advantages only by one common shift and factor.

    A mean or deviation over the whole rollout causes such a change. A wrong reshape or tiling of prompts causes others.
    """
    rollout, mask = case.rollout, case.rollout.completion_mask
    moved = rollout.group < 7
    raised = torch.linspace(0.5, 2.5, len(rollout.scores), dtype=torch.float64)
    before, after = case.advantages_of(), case.advantages_of(scores=rollout.scores + raised * moved)
    others = mask & ~moved.unsqueeze(-1)
    old, new = before[others], after[others]
    matrix = torch.stack([old, torch.ones_like(old)], -1)
    found = torch.linalg.lstsq(matrix, new.unsqueeze(-1)).solution
    residual = (matrix @ found).squeeze(-1) - new
    advice = "a group's advantages depend on another group's scores: look at how rows are grouped"
    return at_most("own group", largest(residual) / max(largest(old), 1e-9), 1e-6, advice)


def mask_checks(case: Case) -> list[Check]:
    """Check that advantages are 0 where masked, ignore padding, and are computed without changing the rollout."""
    module, mask = case.module, case.rollout.completion_mask
    padded = widened(case.rollout)
    again = module.advantages(padded, module.shape_rewards(padded)).advantages[:, : mask.shape[1]]
    changed = overwritten(case.rollout, lambda one: module.advantages(one, module.shape_rewards(one)))
    return [
        at_most(
            "advantages under mask",
            largest(case.advantages.advantages.masked_select(~mask)),
            0,
            "zero advantages behind the end of a completion, after whitening too",
        ),
        at_most(
            "padding",
            largest(again - case.advantages.advantages),
            1e-9,
            "means, deviations and lengths must count only completion tokens, not padding",
        ),
        at_most(
            "rollout kept",
            changed,
            0,
            "the rollout is overwritten, which metrics and later updates read: replace operations in place",
        ),
    ]


# -- the loss ---------------------------------------------------------------------------------------------------------


def loss_checks(case: Case) -> list[Check]:
    """Check the policy gradient at ratio 1, the gradient away from it, and finite losses at extreme ratios."""
    module, mask = case.module, case.rollout.completion_mask
    kl_coef, module.kl_coef = module.kl_coef, 0.0
    try:
        gradient = case.slopes(case.logprobs())
        unequal = unequal_weights(gradient, case.advantages.advantages.detach(), mask)
        advice = (
            "before any update the gradient must be -advantage * d log policy, or that times token weights: look at "
            "which log-probabilities form the ratio, and for a missing or superfluous detach"
        )
        checks = [at_most("ratio one", unequal, 1e-6, advice)]
        left_out = bool(unequal == 0) & (gradient == 0) & mask  # tokens of weight 0
        signs = (case.slopes(case.moved_by(0.0, sign)) for sign in (1.0, -1.0))
        if bool((next(signs) == next(signs)).all()):  # the loss reads the scores itself
            return [*checks, extremes_check(case)]
        advice = "a token that moved against its advantage must keep its gradient: the wrong side is clipped"
        checks.append(at_least("pull back", pull_back(case, left_out), 1e-12, advice))
        if clips(module):
            advice = "a token with positive advantage at ratio e^3 must not be pushed further"
            checks.append(at_most("clip", max(map(largest, far_slopes(case))), 1e-9, advice))
        elif isinstance(module, OnPolicyModule) and module.objective_name == "clip":
            checks.append(one_sided_clip_check(case))
    finally:
        module.kl_coef = kl_coef
    return [*checks, extremes_check(case), *statistic_checks(module, case.logprobs(), case.loss)]


def pull_back(case: Case, left_out: Tensor) -> Tensor:
    """Return the smallest pull on good tokens that became less likely and bad tokens that became more likely.

    Far away, a token's gradient may be 0, as with dual clipping, but may not push the token further.
    """
    mask, pulls = case.rollout.completion_mask, []
    for sign in (1.0, -1.0):
        near, far = (-sign * case.slopes(case.moved_by(-sign * nats, sign)) for nats in (0.7, FAR))
        pulls.append((near + 1e-9 * ((near == 0) & left_out))[mask].min())
        pulls.append(torch.where(far[mask] >= 0, torch.inf, far[mask]).min())
    return torch.stack(pulls).min()


def unequal_weights(gradient: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return the deviation of the gradient at ratio 1 from -advantage; 0 for a common factor or valid token weights.

    Valid weights are non-negative, differ within completions, and leave out neither all first nor all last tokens.
    """
    wanted = -advantages
    unequal = (gradient - wanted)[mask].abs().max() / wanted.abs().max().clamp_min(1e-12)
    counts = mask & (wanted.abs() > 1e-9 * wanted.abs().max())
    weights = torch.where(counts, gradient / torch.where(counts, wanted, 1.0), 0.0)
    several = counts & (counts.sum(-1, keepdim=True) > 1)
    factor = weights[counts].mean()
    if bool(factor > 0) and float((gradient - factor * wanted)[mask].abs().max()) < 1e-6 * float(gradient.abs().max()):
        return unequal * 0  # the same gradient with another scale
    if float(unequal) < 1e-6 or bool((weights < 0).any()) or bool((gradient[mask & ~counts].abs() > 1e-9).any()):
        return unequal
    mean = weights.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp_min(1)
    varies = bool(((weights - mean).abs() > 1e-6)[several].any())
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    sides = (weights[counts & (torch.arange(mask.shape[1]) == 0)], weights[counts & last])
    return unequal * 0 if varies and all(bool((side > 0).any()) for side in sides) else unequal


def clips(module: Any) -> bool:
    """Return whether the settings select the clipped surrogate, and no ``objective`` of the class replaces it."""
    if not isinstance(module, OnPolicyModule) or module.objective_name != "clip":
        return False
    return type(module).objective is OnPolicyModule.objective


def far_slopes(case: Case) -> tuple[Tensor, Tensor]:
    """Return the gradients of good tokens at e^3 times their old probability, and of bad tokens at e^-3 times."""
    mask = case.rollout.completion_mask
    good, bad = (case.slopes(case.moved_by(sign * FAR, sign))[mask].abs() for sign in (1.0, -1.0))
    return good, bad


def one_sided_clip_check(case: Case) -> Check:
    """Check a user-defined loss: if it stops bad tokens far away, it stops good ones too. It need not clip at all."""
    good, bad = far_slopes(case)
    pushed = float(good.min()) if float(bad.max()) < 1e-9 else 0.0
    advice = (
        "tokens with negative advantage have no gradient at ratio e^-3, but tokens with positive advantage have one "
        "at ratio e^3: clip on both sides"
    )
    return at_most("clip", pushed, 2.0, advice)


def extremes_check(case: Case) -> Check:
    """Check that log-ratios of a thousand nats give finite losses and gradients."""
    broken = 0
    for nats in (1e3, -1e3):
        given = case.moved_by(nats)
        broken += not (bool(case.loss(given).isfinite().all()) and bool(case.slopes(given).isfinite().all()))
    return at_most("extremes", broken, 0, "clamp log-ratios before exp")


# -- the critic and the KL penalty ------------------------------------------------------------------------------------


def value_checks(case: Case) -> list[Check]:
    """Check that values are drawn to the returns, and that clipping never makes a loss smaller."""
    module, mask, rollout = case.module, case.rollout.completion_mask, case.rollout
    assert rollout.values is not None and case.advantages.returns is not None
    returns = case.advantages.returns[:, : mask.shape[1]]
    old = rollout.values[:, : mask.shape[1]]

    def loss(values: Tensor, before: Tensor) -> Tensor:
        return torch.where(mask, as_loss(module.value_loss(CriticValues(values, before, returns, mask))).values, 0.0)

    def slope(values: Tensor) -> Tensor:
        leaf = values.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, values).sum(), leaf)[0][mask]

    # Near the return, every critic loss (Huber, log-cosh) is a square up to a factor.
    near = torch.where(torch.arange(mask.shape[1]) % 2 == 0, 1e-3, -1e-3) + 0 * returns
    factors = slope(returns + near) / near[mask]
    factor = factors.mean().clamp_min(1e-12)
    far = (slope(old) * (old - returns)[mask]).min()
    toward = ((factors - factor) / factor).abs().max() if bool(far > 0) else torch.inf
    moved = old + 2.0
    below = (loss(moved, moved) - loss(moved, old))[mask].max()
    return [
        at_most(
            "value gradient", toward, 1e-2, "the gradient must move each value towards its return, and shrink near it"
        ),
        at_most("value clip", below, 1e-9, "use the larger of the clipped and the unclipped loss, never the smaller"),
    ]


def kl_penalty_checks(subject: Subject) -> list[Check]:
    """Check that with equal scores, training brings a policy that has moved back to its reference."""
    module = subject.fresh(moved=True)
    if module.reference is None or not module.kl_coef:
        return []
    moved = kl_of_training(subject, module)
    if moved > -1e-6:  # a length penalty moves the policy too
        free = subject.fresh(moved=True)
        free.kl_coef = 0.0
        moved -= kl_of_training(subject, free)
    if moved > -1e-6:  # methods that treat rewards as success rates
        moved = kl_of_training(subject, subject.fresh(moved=True), 1.0)
    advice = (
        "with equal scores the KL to the reference must fall: look at the KL's sign and at the advantage it is part of"
    )
    return [at_most("kl penalty", moved, -1e-6, advice)]


def kl_of_training(subject: Subject, module: Any, score: float = 0.0) -> float:
    """Return the change of the KL to the reference when a policy is trained on equal scores."""
    before = subject.world.kl(policy_of(module, subject.world))
    expected = PolicyGradient(module, subject.world, shuffled=True)
    expected.scores, expected.rewards = expected.scores + score, expected.rewards + score
    descend(expected.loss, [p for p in module.parameters() if p.requires_grad], 25, 0.02)
    return subject.world.kl(policy_of(module, subject.world)) - before
