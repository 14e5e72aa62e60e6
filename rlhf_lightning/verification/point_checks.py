"""Checks of override points in every family: differentiable, finite, and a function of the input alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.compat import changes_in_place
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.verification.cases import narrowed, widened
from rlhf_lightning.verification.subject import (
    ENTROPY,
    SUM,
    WANTED,
    Check,
    Subject,
    at_most,
    differentiate,
    field_function,
    known_statistics,
    with_leaves,
    with_parts,
)

SIDES = (
    ("policy_chosen_logprobs", "reference_chosen_logprobs", "chosen_mask"),
    ("policy_rejected_logprobs", "reference_rejected_logprobs", "rejected_mask"),
    ("policy_logprobs", "reference_logprobs", "completion_mask"),
    ("logprobs", "", "completion_mask"),
)
"""Field names of the policy's and the reference's log-probabilities and of their mask, in the families' inputs."""

DRAWS = 8
"""Number of random inputs.

A token may be clipped or unselected in some of them; a token that never counts is missed.
"""

LONG, RUN = 600, 32
"""Row length beyond the usual truncations at 256 or 512 tokens, and length of a run of missed tokens that counts."""


def point_checks(subject: Subject, given: Any) -> list[Check]:
    """Check that the override point is differentiable, stays finite, and depends on its input alone."""
    module, checks = subject.module, []
    if not _has_detached_parts(subject):
        lost = lost_slopes(*field_function(subject, module, given))
        advice = "the loss depends on log-probabilities or scores without a gradient: look for a detach"
        checks.append(at_most("gradcheck", lost, 0, advice))
    certain = given._replace(target=torch.ones_like(given.target)) if hasattr(given, "target") else given
    changed = overwritten(certain, lambda one: subject.values(module, one))  # soft labels are mixed from copies
    advice = "the loss overwrites its input: replace operations in place (add_, div_, masked_fill_)"
    checks.append(at_most("input kept", changed, 0, advice))
    single = in_single(given)
    broken = [scale for scale in (1e3, -1e3) for one in (given, single) if not _finite_at(subject, one, scale)]
    advice = "clamp log-ratios before exp, and use logsigmoid instead of log(sigmoid)"
    checks.append(at_most("extremes", len(broken), 0, advice))
    if not subject.kind.batch_coupled:
        values = subject.values(module, given).detach()
        # Two calls with dropout agree for a third of the seeds, as the input has few rows. Ten agree for none.
        again = torch.stack([subject.values(module, given).detach() for _ in range(9)])
        advice = "the loss must depend only on its input: look for random numbers, or for changing state"
        checks.append(at_most("same twice", (again - values).abs().max(), 0, advice))
    return checks


def overwritten(given: Any, run: Callable[[Any], Any]) -> int:
    """Return how many tensors of an input a function overwrites; later terms and the metrics read these tensors."""
    kept = given._replace(**{name: part.clone() for name, part in given._asdict().items() if isinstance(part, Tensor)})
    run(kept)
    return sum(changes_in_place(part) > 0 for part in kept if isinstance(part, Tensor))


def lost_slopes(function: Any, leaves: list[Tensor]) -> int:
    """Count the elements that change the loss but get no gradient.

    Detached weights are allowed (focal losses, DFT): they change the gradient, but do not remove it.
    """
    total = function(*leaves).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    lost = 0
    for place, (leaf, slope) in enumerate(zip(leaves, found, strict=True)):
        flat = torch.zeros_like(leaf).flatten() if slope is None else slope.flatten()
        for element in (flat == 0).nonzero().flatten().tolist():
            ends = []
            for step in (1e-4, -1e-4):
                moved = [other.detach().clone() for other in leaves]
                moved[place].view(-1)[element] += step
                ends.append(float(function(*moved).sum().detach()))
            lost += not abs(ends[0] - ends[1]) <= 1e-8 * max(1.0, abs(ends[0]))
    return lost


def in_single(given: Any) -> Any:
    """Return the input of an override point in single precision, as in training."""

    def single(part: Any) -> Any:
        return part.float() if isinstance(part, Tensor) and part.is_floating_point() else part

    plain = {name: single(part) for name, part in given._asdict().items()}
    if hasattr(given, "extras"):
        plain["extras"] = {name: single(part) for name, part in given.extras.items()}
    return given._replace(**plain)


def _finite_at(subject: Subject, given: Any, scale: float) -> bool:
    """Return whether loss and gradient are finite for log-probabilities, scores or logits of magnitude 1000.

    Log-probabilities are at most 0, so a log-ratio of 1000 comes from the reference.
    """
    values: dict[str, Any] = {}
    for name, sign in (("policy_chosen", 1), ("policy_rejected", -1), ("policy", 1), ("", 1)):
        own = f"{name}_logprobs".removeprefix("_")
        if not isinstance(getattr(given, own, None), Tensor):
            continue
        there = getattr(given, own).detach()
        theirs = own.replace("policy", "reference")
        rises = sign * scale > 0
        values[own] = 0 * there if rises else -abs(scale) * (there != 0)
        if theirs != own and getattr(given, theirs, None) is not None:
            values[theirs] = -abs(scale) * (there != 0) if rises else 0 * there
    prepared, leaves = with_leaves(given._replace(**values))
    if not values:
        leaves = [(scale * (leaf.detach() != 0).to(leaf)).requires_grad_() for leaf in leaves]
    losses = subject.values(subject.module, with_parts(prepared, leaves, subject.module))
    gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    return all(bool(part.isfinite().all()) for part in (losses, *gradients) if part is not None)


def _has_detached_parts(subject: Subject) -> bool:
    """Return whether the loss contains detached statistics of itself, so that its gradient is not its derivative."""
    return subject.kind.batch_coupled or subject.kind.token_statistics is not AlignmentModule.token_statistics


def statistic_checks(module: Any, given: Any, losses: Callable[[Any], Tensor]) -> list[Check]:
    """Check that a token loss which reads the entropy or a known statistic depends on it with the right sign."""
    known = known_statistics(module)
    names = [name for name in given.extras if known.get(name, ("",))[0] in WANTED]
    leaves = {name: given.extras[name].detach().clone().requires_grad_() for name in names}
    changes: dict[str, Any] = {"extras": {**given.extras, **leaves}}
    if getattr(given, "entropy", None) is not None:
        changes["entropy"] = leaves[""] = given.entropy.detach().clone().requires_grad_()
    values = losses(given._replace(**changes))
    asked = list(leaves.values())
    found = torch.autograd.grad(values.sum(), asked, allow_unused=True) if asked and values.requires_grad else []
    worst: dict[str, float] = {}
    for name, slope in zip(leaves, found, strict=False):
        words, sign = known.get(name, (ENTROPY, 1))
        if slope is not None and bool(slope.any()):
            check = "entropy bonus" if words == ENTROPY else "statistic"
            worst[check] = max(worst.get(check, 0.0), float((-sign * WANTED[words] * slope).max()))
    if any(known[name][0] == SUM and shares_sum_to_one(given, name, losses) for name in names):
        worst["uniform share"] = 1.0
    if not worst and added_without_gradient(given, names, losses):
        worst["entropy bonus"] = torch.inf
    advice = {
        "entropy bonus": "an entropy bonus is subtracted from the loss; adding it collapses the policy. Use the "
        "entropy of the update: that of the rollout has no gradient",
        "statistic": "a divergence from the reference is added to the loss, and a likelihood is subtracted",
        "uniform share": "a uniform label is the mean of the log-probabilities of all tokens, but this is their sum",
    }
    return [at_most(check, value, 0, advice[check]) for check, value in worst.items()]


def shares_sum_to_one(given: Any, name: str, losses: Callable[[Any], Tensor]) -> bool:
    """Return whether a token loss mixes the likelihood and a statistic with weights that sum to 1."""
    weights = getattr(given, "weights", None)
    leaf = given.extras[name].detach().clone().requires_grad_()
    values, slopes = differentiate(losses, given._replace(extras={**given.extras, name: leaf.detach()}), ["logprobs"])
    found = torch.autograd.grad(losses(given._replace(extras={**given.extras, name: leaf})).sum(), leaf)[0]
    if weights is None or values.dim() != 2:
        return False
    left = (slopes["logprobs"].abs() + found.abs() - weights.unsqueeze(-1))[given.completion_mask]
    return bool((left.abs() < 1e-9).all())


def added_without_gradient(given: Any, names: Collection[str], losses: Callable[[Any], Tensor]) -> bool:
    """Return whether the rollout's entropy, which has no gradient, changes a policy loss but not its gradient."""
    rollout = getattr(given, "rollout", None)
    if rollout is None or rollout.entropy is None:
        return False
    more = {name: rollout.extras[name] * 1.3 for name in names if name in rollout.extras}
    other = rollout._replace(entropy=rollout.entropy * 1.3, extras={**rollout.extras, **more})
    found = [differentiate(losses, given._replace(rollout=one), ["logprobs"]) for one in (rollout, other)]
    (values, before), (others, after) = ((value, slopes["logprobs"]) for value, slopes in found)
    return bool((values - others).abs().max() > 1e-9) and bool((before - after).abs().max() < 1e-12)


# -- losses of log-probabilities --------------------------------------------------------------------------------------


def padding_check(subject: Subject, given: Any) -> Check:
    """Check that masked columns, at either end or in the middle, change no loss."""
    plain = subject.values(subject.fresh(moved=True), given).detach()
    residual = 0.0
    for place in (None, 0, 1):
        values = subject.values(subject.fresh(moved=True), widened(given, place)).detach()
        if values.dim() == 2:  # per token
            values = values[:, : plain.shape[1]] if place is None else narrowed(values, place)
        residual = max(residual, float((values - plain).abs().max()))
    advice = "sum over tokens by the mask, and count tokens by it: never by the width, or by a slice"
    return at_most("padding", residual, 1e-10, advice)


def field_checks(subject: Subject, given: Any) -> list[Check]:
    """Check the gradient by token and by model, and the order of rows."""
    sides = [side for side in SIDES if hasattr(given, side[0])]
    if not sides:
        return []
    if hasattr(given, "target"):
        given = given._replace(target=torch.ones_like(given.target))
    drawn = [slopes_of(subject, given, sides), *(slopes_of(subject, one, sides) for one in draws(given, sides))]
    missed = sum(len(missed_tokens([one[side[0]] for one in drawn], getattr(given, side[2]))) for side in sides)
    missed += missed_in_long_rows(subject, given, sides)
    advice = "each completion token must get a gradient: look for a slice or a mask"
    checks = [at_most("every token", missed, 0, advice)]
    references = [reference for _, reference, _ in sides if reference in drawn[0]]
    left_out = bool(subject.kind.no_target) and unread(subject, given, references)  # as in SimPER
    if references and not left_out and not subject.kind.batch_coupled:
        advice = (
            "the reference's log-probability must be subtracted from the policy's: look for a sum instead of a "
            "difference, or for a reference that is left out"
        )
        checks.append(at_most("reference slope", opposition(drawn, sides), -1e-6, advice))
    coupled = subject.kind.batch_coupled
    turned, values = (
        subject.values(subject.fresh(moved=True) if coupled else subject.module, one).detach()
        for one in (reversed_rows(given), given)
    )
    if coupled:
        turned, values = turned.sum(), values.sum()
    advice = "each row's loss must depend only on that row, or on all rows symmetrically, and not on its position"
    residual = (turned.flip(0) - values if turned.dim() else turned - values).abs().max()
    bound = 1e-12 * max(1, len(given.weights)) * max(1.0, float(values.abs().max()))
    return [*checks, at_most("row order", residual, bound, advice)]


def draws(given: Any, sides: list[tuple[str, str, str]]) -> list[Any]:
    """Return the input with random log-probabilities of the policy, below and above those of the reference."""
    generator, found = torch.Generator().manual_seed(29), []
    for _ in range(DRAWS):
        fields = {}
        for policy, _, mask in sides:
            there, place = getattr(given, policy).detach(), getattr(given, mask)
            noise = torch.randn(there.shape, generator=generator, dtype=torch.float64)
            fields[policy] = torch.where(place, (there + noise).clamp(max=-0.01), 0.0)
        found.append(given._replace(**fields))
    return found


def slopes_of(subject: Subject, given: Any, sides: list[tuple[str, str, str]]) -> dict[str, Tensor]:
    """Return the gradient of the summed loss by the log-probabilities of policy and reference."""
    names = [name for side in sides for name in side[:2] if name]
    return differentiate(partial(subject.values, subject.module), given, names)[1]


def opposition(drawn: list[dict[str, Tensor]], sides: list[tuple[str, str, str]]) -> float:
    """Return the largest cosine between the gradients by reference and policy, which must be negative.

    Rows with a constant policy gradient and no reference gradient, as of a likelihood, are skipped.
    """
    worst = -1.0
    for policy, reference, _ in sides:
        slope, theirs = drawn[0][policy], drawn[0].get(reference)
        linear = torch.stack([(one[policy] - slope).abs().amax(-1) < 1e-12 for one in drawn]).all(0)
        counts = (slope != 0).any(-1)
        if theirs is not None and bool(counts.any()):
            sizes = (slope.norm(dim=-1) * theirs.norm(dim=-1)).clamp_min(1e-300)
            cosines = torch.where(linear & (theirs == 0).all(-1), -1.0, (slope * theirs).sum(-1) / sizes)
            worst = max(worst, float(cosines[counts].max()))
    return worst


def unread(subject: Subject, given: Any, names: list[str]) -> bool:
    """Return whether a loss ignores some fields of its input."""
    leaves = [getattr(given, name).detach().clone().requires_grad_() for name in names]
    total = subject.values(subject.module, given._replace(**dict(zip(names, leaves, strict=True)))).sum()
    if not leaves or not total.requires_grad:
        return True
    return all(slope is None for slope in torch.autograd.grad(total, leaves, allow_unused=True))


def missed_tokens(drawn: list[Tensor], mask: Tensor) -> Tensor:
    """Return (row, position) of tokens that get no gradient in any draw, in rows that get a gradient in some draw."""
    counts = torch.stack([slope != 0 for slope in drawn]).any(0)
    return (mask & ~counts & counts.any(-1, keepdim=True)).nonzero()


def missed_in_long_rows(subject: Subject, given: Any, sides: list[tuple[str, str, str]]) -> int:
    """Count the runs of tokens without gradient in long rows; 0 for losses that read statistics of tokens."""
    if any(values.dim() > 1 for values in given.extras.values()):
        return 0
    generator = torch.Generator().manual_seed(13)
    fields: dict[str, Tensor] = {}
    for policy, reference, name in sides:
        rows = len(getattr(given, name))
        mask = torch.arange(LONG) < LONG - 7 * torch.arange(rows).unsqueeze(-1)
        noise = torch.rand(2, rows, LONG, generator=generator, dtype=torch.float64)
        fields |= {name: mask, policy: torch.where(mask, -0.5 - noise[0], 0.0)}
        if reference and getattr(given, reference) is not None:
            fields[reference] = torch.where(mask, -0.5 - noise[0] + 0.02 * (noise[1] - 0.5), 0.0)
    long, missed = given._replace(**fields), 0
    drawn = [slopes_of(subject, one, sides) for one in (long, *draws(long, sides)[:3])]
    for policy, _, name in sides:
        left_out = torch.zeros_like(fields[name])
        left_out[tuple(missed_tokens([one[policy] for one in drawn], fields[name]).T)] = True
        missed += int(left_out.unfold(-1, RUN, 1).all(-1).sum())
    return missed


def reversed_rows(given: Any) -> Any:
    """Return the input of an override point with its rows in reverse order."""
    turned = {
        name: part.flip(0) for name, part in given._asdict().items() if isinstance(part, Tensor) and part.dim() > 0
    }
    return given._replace(**turned, extras={name: part.flip(0) for name, part in given.extras.items()})


def demonstration_check(subject: Subject, given: Any) -> Check:
    """Check that no draw lowers the probability of a demonstration's token, and that some draw raises it."""
    sides = [SIDES[-1]]
    drawn = torch.stack([slopes_of(subject, one, sides)["logprobs"] for one in (given, *draws(given, sides))])
    most, least = drawn.max(0).values, drawn.min(0).values
    found = torch.where(most > 1e-12, most, least)[given.completion_mask]
    return at_most("direction", found.max(), -1e-12, "a demonstration's tokens must become more likely")
