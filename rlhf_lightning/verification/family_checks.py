"""Checks of single families on fixed data: labels, rated margins, directions, reference points."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.modules.preference import ForwardKLDPOModule
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import PreferenceLogprobs, TokenLogprobs, UnpairedLogprobs
from rlhf_lightning.verification.mistakes import settings_of
from rlhf_lightning.verification.point_checks import SIDES, demonstration_check, draws, slopes_of, statistic_checks
from rlhf_lightning.verification.subject import (
    WANTED,
    Check,
    Subject,
    at_least,
    at_most,
    differentiate,
    known_statistics,
    with_leaves,
    with_parts,
    without_leaves,
)

ODD_BETA = 0.37
"""Beta that no other factor of a reference point equals."""

SETTLED = 40.0
"""Nats by which the sides of a pair are separated, far enough for any loss to treat the pair as settled."""


def family_checks(subject: Subject, given: Any, batch: Any) -> list[Check]:
    """Check the value at the reference, the labels, and the direction of the gradient."""
    checks = []
    module = subject.fresh()
    at_start = subject.seen(module, lambda: module.loss_sum(batch, Meter()))
    stated = module.value_at_reference
    if stated is not None:
        hard = at_start._replace(target=torch.ones_like(at_start.target)) if hasattr(at_start, "target") else at_start
        residual = (subject.values(module, hard).detach() - stated).abs().max() / max(abs(stated), 1.0)
        checks.append(at_most("value at reference", residual, 1e-8, f"the class states {stated:.6g} there"))
    if isinstance(given, PreferenceLogprobs):
        checks += pair_checks(subject, given)
    elif isinstance(given, UnpairedLogprobs):
        checks += [judgement_direction(subject, given), *reference_point_checks(subject, given)]
    elif isinstance(given, TokenLogprobs):
        checks.append(demonstration_check(subject, given))
        checks += statistic_checks(subject.module, given, partial(subject.values, subject.module))
    return checks


# -- pairs ------------------------------------------------------------------------------------------------------------


def pair_checks(subject: Subject, given: PreferenceLogprobs) -> list[Check]:
    """Check both orders of a label, and the direction of the update if the policy has a pair very wrong or right."""
    replaced = replaces_labels(subject, given)
    if replaced:
        said = "not measured: numeric data columns replace the label"
        checks = [at_most(name, 0, 0, said) for name in ("labels", "soft label", "rated margin")]
    else:
        checks = label_checks(subject, given)
    certain = given._replace(target=torch.ones_like(given.target))
    lowered = certain._replace(policy_chosen_logprobs=given.policy_chosen_logprobs - SETTLED / 2 * given.chosen_mask)
    chosen, rejected = pulls(subject, lowered)
    advice = (
        "if chosen is far too unlikely, a step must raise it relative to rejected: look for a flipped sign, or for "
        "exchanged chosen and rejected"
    )
    checks.append(at_least("direction", (chosen - rejected).sum(), 1e-12, advice))
    checks += [implicit_reward_check(subject, certain), *pair_statistic_check(subject, certain)]
    checks += inverse_check(subject)
    if subject.kind.batch_coupled or replaced:
        return checks
    size = float((chosen - rejected).abs().max())
    # A loss need not be monotone at the reference (DiscoPOP), nor raise chosen elsewhere (APO-down).
    there = pulls(subject, at_reference(certain))
    drawn = [pulls(subject, one) for one in around_reference(certain)]
    around = tuple(torch.stack(side).mean() for side in zip(*drawn, strict=True))
    wrong = min(float(torch.maximum(-chosen, rejected).max()) for chosen, rejected in (there, around))
    advice = (
        "near policy = reference, chosen must not become less likely, nor rejected more likely: "
        "look for a term of the wrong sign, or for a weight that lets a gradient through"
    )
    checks.append(at_most("first step", wrong, 1e-9 * size, advice))
    advice = "near the reference, steps must increase the margin of pairs: look for a term of the wrong sign"
    checks.append(at_least("around the reference", around[0] - around[1], 1e-12, advice))
    chosen, rejected = pulls(subject, settled(certain))
    praised = torch.where(chosen < -1e-3 * size, 0.0, rejected).max()  # regression losses pull both sides back
    advice = "with a large margin, rejected still becomes more likely: look for a likelihood term of rejected"
    checks.append(at_most("rejected", praised, 1e-3 * size, advice))
    blamed = torch.where(rejected > -0.1 * chosen, 0.0, -chosen).max()
    advice = (
        "with a large margin, chosen is pushed down more than it was raised: look for the sign inside a penalty or an "
        "odds"
    )
    return [*checks, at_most("chosen", blamed, size, advice)]


def implicit_reward_check(subject: Subject, given: PreferenceLogprobs) -> Check:
    """Check that the implicit reward of a completion never decreases as its log-probability increases."""
    names, least = [side[0] for side in SIDES[:2]], 0.0
    for one in (given, settled(given), *draws(given, list(SIDES[:2]))):
        slopes = differentiate(
            lambda pairs: torch.cat(subject.module.implicit_reward(without_leaves(pairs))), one, names
        )[1]
        least = min(least, *(float(slope.min()) for slope in slopes.values()))
    advice = "an implicit reward falls as its completion becomes more likely: look at a sign in implicit_reward"
    return at_least("implicit reward", least, -1e-9, advice)


def inverse_check(subject: Subject) -> list[Check]:
    """Check that the ``ratio`` of an f-divergence, which gives the target, inverts its ``f``, which gives the loss."""
    module, family = subject.module, ForwardKLDPOModule
    if not isinstance(module, family) or type(module).target_policy is not family.target_policy:
        return []
    logratios = torch.linspace(-2, 2, 9, dtype=torch.float64)
    residual = (module.ratio(module.f(logratios)).log() - logratios).abs().max()
    advice = "ratio(f(a)) must be e^a: f gives the loss and ratio the target; look for a sign in an exponent"
    return [at_most("inverse", residual, 1e-6, advice)]


def pair_statistic_check(subject: Subject, given: PreferenceLogprobs) -> list[Check]:
    """Check the sign of a known statistic of tokens, summed over both sides of a pair."""
    pulls = []
    for name, (words, sign) in known_statistics(subject.module).items():
        sides = [side for side in ("chosen", "rejected") if f"{side}_{name}" in given.extras]
        if words not in WANTED or len(sides) < 2:
            continue
        leaves = [given.extras[f"{side}_{name}"].detach().clone().requires_grad_() for side in sides]
        extras = {**given.extras, **{f"{side}_{name}": leaf for side, leaf in zip(sides, leaves, strict=True)}}
        total = subject.values(subject.module, given._replace(extras=extras)).sum()
        found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else []
        masks = [getattr(given, f"{side}_mask") for side in sides]
        means = [
            torch.where(mask, slope, 0.0).sum(-1) / mask.sum(-1)
            for mask, slope in zip(masks, found, strict=False)
            if slope is not None
        ]
        pulls += [float((-sign * WANTED[words] * torch.stack(means).sum(0)).max())] if means else []
    advice = (
        "a divergence from the reference must cost something summed over both sides: look at the position of detach"
    )
    return [at_most("statistic", max(pulls), 1e-9, advice)] if pulls else []


def at_reference(given: PreferenceLogprobs) -> PreferenceLogprobs:
    """Return pairs with the policy equal to the reference; unchanged without a reference."""
    chosen, rejected = given.reference_chosen_logprobs, given.reference_rejected_logprobs
    if chosen is None or rejected is None:
        return given
    return given._replace(policy_chosen_logprobs=chosen, policy_rejected_logprobs=rejected)


def around_reference(given: PreferenceLogprobs) -> list[PreferenceLogprobs]:
    """Return pairs with the policy about one nat away from the reference, each with its mirror image."""
    drawn, there = draws(given, list(SIDES[:2])), at_reference(given)
    if there is given:
        return drawn
    found = []
    for one in drawn:
        for sign in (1.0, -1.0):
            moved = ((name, sign * (getattr(one, name) - getattr(given, name))) for name, _, _ in SIDES[:2])
            found.append(there._replace(**{name: getattr(there, name) + nats for name, nats in moved}))
    return found


def settled(given: PreferenceLogprobs) -> PreferenceLogprobs:
    """Return pairs whose chosen side is almost certain and whose rejected side is almost impossible."""
    reference = given.reference_chosen_logprobs
    return given._replace(
        policy_chosen_logprobs=-1e-3 * given.chosen_mask.double(),
        reference_chosen_logprobs=None if reference is None else reference - SETTLED * given.chosen_mask,
        policy_rejected_logprobs=given.policy_rejected_logprobs - SETTLED * given.rejected_mask,
    )


def pulls(subject: Subject, given: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
    """Return the update direction of the log-probabilities of chosen and of rejected, each of shape (pairs,)."""
    slopes = slopes_of(subject, given, list(SIDES[:2]))
    masks = {"policy_chosen_logprobs": given.chosen_mask, "policy_rejected_logprobs": given.rejected_mask}
    chosen, rejected = (-(slopes[name] * mask).sum(-1) for name, mask in masks.items())
    return chosen, rejected


def label_checks(subject: Subject, given: PreferenceLogprobs) -> list[Check]:
    """Check the effect of soft labels and rated margins."""
    checks = []
    if not subject.kind.batch_coupled:
        advice = (
            "target is the probability that chosen is better: the gradient must be the expectation over both orders, "
            "target * loss(c, r) + (1 - target) * loss(r, c), or be 0 where the margin is its log-odds"
        )
        checks.append(at_most("labels", label_residual(subject, given), 1e-9, advice))
    if subject.kind.weighs_rows:
        certain = torch.ones_like(given.target)
        hard, soft = (subject.values(subject.fresh(moved=True), given._replace(target=p * certain)) for p in (1.0, 0.6))
        advice = "a soft label must change the loss: target is the probability that chosen is better"
        checks.append(at_least("soft label", (hard - soft).detach().abs().max(), 1e-9, advice))
    return [*checks, rated_margin_check(subject, given)]


def rated_margin_check(subject: Subject, given: PreferenceLogprobs) -> Check:
    """Check that a stronger preference never lowers a loss."""
    sure = given._replace(target=torch.ones_like(given.target))
    stronger = sure._replace(rated_margin=sure.rated_margin + 1.0)
    rated, plain = (subject.values(subject.fresh(moved=True), one) for one in (stronger, sure))
    advice = "a stronger preference must need a larger margin: the rated margin is subtracted from the margin"
    return at_least("rated margin", (rated - plain).detach().min(), -1e-9, advice)


def pair_slopes(subject: Subject, given: PreferenceLogprobs, target: float | Tensor = 1.0) -> Tensor:
    """Return the gradient of each pair's loss by the log-probabilities of both sides, (2, pairs, length)."""
    labelled = given._replace(target=torch.zeros_like(given.target) + target)
    names = [side[0] for side in SIDES[:2]]
    slopes = differentiate(partial(subject.values, subject.fresh(moved=True)), labelled, names)[1].values()
    width = max(slope.shape[1] for slope in slopes)
    return torch.stack([torch.nn.functional.pad(slope, (0, width - slope.shape[1])) for slope in slopes])


def replaces_labels(subject: Subject, given: PreferenceLogprobs) -> bool:
    """Return whether other numbers replace the label: data columns, or the rated margin as a signed gap."""
    if not bool((pair_slopes(subject, given, 1.0) == pair_slopes(subject, given, 0.6)).all()):
        return False
    rated = given._replace(rated_margin=given.rated_margin + 0.7)
    turned = rated.swapped()._replace(rated_margin=-rated.rated_margin)
    alike = torch.allclose(pair_slopes(subject, rated), pair_slopes(subject, turned).flip(0), atol=1e-9)
    return alike or bool(subject.kind.data_columns)


def label_residual(subject: Subject, given: PreferenceLogprobs) -> float:
    """Return how far soft labels are from the expectation over both orders, or from the optimum at their log-odds.

    The minimum over both is returned. Gradients are compared: a Brier score differs from the expectation by a constant,
    which has no effect on training.
    """
    share = 0.3
    soft, right = pair_slopes(subject, given, share), pair_slopes(subject, given)
    wrong = pair_slopes(subject, given.swapped()).flip(0)
    scale = torch.maximum(right.abs().max(), wrong.abs().max()).clamp_min(1e-300)
    residual = float((soft - share * right - (1 - share) * wrong).abs().max() / scale)
    beta = getattr(subject.module, "beta", None)
    if residual < 1e-9 or not beta:
        return residual
    left = []
    for odds in (share, 0.8):
        gap = torch.logit(torch.tensor(odds, dtype=torch.float64)) / beta - given.margin.detach()
        first = given.chosen_mask & (given.chosen_mask.cumsum(-1) == 1)
        there = given._replace(policy_chosen_logprobs=given.policy_chosen_logprobs + first * gap.unsqueeze(-1))
        left.append(float(pair_slopes(subject, there, odds).abs().max() / scale))
    return min(residual, max(left))


# -- unpaired completions ---------------------------------------------------------------------------------------------


def judgement_direction(subject: Subject, given: UnpairedLogprobs) -> Check:
    """Check that desirable completions become likelier and undesirable ones unlikelier."""
    certain = {name: torch.ones_like(given.extras[name]) for name in subject.kind.data_columns}  # a confidence column
    least = []
    for one in (given, given._replace(extras={**given.extras, **certain})):
        rows = slopes_of(subject, one, list(SIDES))["policy_logprobs"].sum(-1)
        least.append(float(torch.where(given.desirable, -rows, rows).min()))
    return at_least(
        "direction",
        max(least),
        1e-12,
        "good completions must become more likely and bad ones less likely: look at the sign",
    )


def reference_point_checks(subject: Subject, given: UnpairedLogprobs) -> list[Check]:
    """Check that the reference point of the step is subtracted from the reward in all rows, or in none."""
    point = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    prepared, (leaf,) = with_leaves(given)
    odd = {"beta": ODD_BETA} if isinstance(getattr(subject.module, "beta", None), float) else {}
    even, module = torch.tensor([0.3, 0.5], dtype=torch.float64), subject.fresh()
    with settings_of(subject.module, **odd), settings_of(module, **odd):
        losses = subject.values(subject.module, with_parts(prepared, [leaf])._replace(reference_point=point))
        nats = float(module.reference_point(even + 1, even + 1) - module.reference_point(even, even))
    wrong, used, units = 0, 0, []
    for row, loss in enumerate(losses):
        slopes = torch.autograd.grad(loss, (point, leaf), retain_graph=True, allow_unused=True)
        by_point, by_ratio = (0.0 if slope is None else float(slope.sum()) for slope in slopes)
        used += by_point != 0
        wrong += by_point * by_ratio >= 0
        if slopes[1] is not None:
            unit = -nats * by_point / slopes[1][row][given.completion_mask[row]]
            units += [unit] if bool(unit.isfinite().all()) else []
    lengths = given.completion_mask.sum(-1)
    mixed = bool(odd) and any(
        all(bool(((unit - factor).abs() < 1e-6).all()) for unit in units) for factor in (ODD_BETA, 1 / ODD_BETA)
    )
    averaged = len(units) == len(lengths) and all(
        bool(((unit / units[0][0] - length / lengths[0]).abs() < 1e-6).all())
        for unit, length in zip(units, lengths, strict=True)
    )
    advice = "the reference point must be subtracted from the reward in every row, desirable and undesirable"
    checks = [at_most("reference point", wrong, 0, advice)] if used else []
    if averaged:  # some methods do this on purpose
        subject.notes.append(
            "log-ratios are averaged over tokens and compared with a reference point that is the mean of sums: the "
            "log-ratio of a longer completion has less weight relative to the point"
        )
    advice = (
        "a reference point in nats is multiplied by beta like the log-ratio; one in rewards is not: beta is misplaced"
    )
    checks += [at_most("point unit", float(mixed), 0, advice)] if used else []
    few, many = (torch.tensor(values, dtype=torch.float64) for values in ([0.3, 0.5], [1.1, 0.9]))
    of = subject.fresh().reference_point
    first, later, alone = of(few, few), of(many, many), subject.fresh().reference_point(many, many)
    stuck = bool(first == later) and bool(later != alone)
    advice = "the reference point must be recomputed in each step: the first value is reused"
    checks.append(at_most("every step", float(stuck), 0, advice))
    kind = subject.kind
    asks = getattr(kind, "needs_mismatched", False)
    if asks or (any(getattr(base, "needs_mismatched", False) for base in kind.__mro__) and not kind.no_target):
        unused = bool(of(few, few) != of(many, few)) and bool(of(few, few) == of(few, many))
        advice = "the reference point must come from mismatched completions: matched completions were used"
        checks.append(at_most("mismatched", float(unused), 0, advice))
    return checks
