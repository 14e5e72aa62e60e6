"""The contracts of reward models: process rewards, whole completions, costs, and rated attributes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import DemonstrationBatch, ProcessBatch, ProcessScores, RankedScores
from rlhf_lightning.verification.cases import some_rows
from rlhf_lightning.verification.convergence import SAFETY
from rlhf_lightning.verification.offline_checks import cut_checks, offline_checks
from rlhf_lightning.verification.point_checks import point_checks
from rlhf_lightning.verification.subject import (
    Check,
    Subject,
    at_least,
    at_most,
    field_function,
    has_outputs,
)


def process_checks(subject: Subject) -> list[Check]:
    """Return the checks of a process reward model, without convergence."""
    batch = some_rows(subject)
    module = subject.module
    given: ProcessScores = subject.seen(module, lambda: module.loss_sum(batch, Meter()))
    return [
        *input_checks(subject, given, batch),
        *cut_checks(subject, batch),
        *point_checks(subject, given),
        *label_checks(subject, given),
    ]


def input_checks(subject: Subject, given: ProcessScores, batch: ProcessBatch) -> list[Check]:
    """Check that a step's score belongs to the text up to the end of the step, and comes with the step's label."""
    sequences, module = batch.sequences, subject.module
    ends = [(row, int(end)) for row, flags in enumerate(sequences.supervised) for end in flags.nonzero().flatten()]
    cut_off = sequences._replace(
        prompts=tuple(sequences.prompts[row] for row, _ in ends),
        completions=tuple(sequences.completions[row][: end + 1] for row, end in ends),
        parents=tuple(range(len(ends))),
        supervised=tuple(sequences.supervised[row][: end + 1] for row, end in ends),
    )
    alone = module.reward_model(padded_layout(cut_off)).detach()
    same = len(alone) == len(given.scores)
    residual: Any = (given.scores.detach() - alone).abs().max() if same else torch.inf
    wrong = (given.labels - torch.cat(batch.labels)).abs().max() if same else torch.inf
    rows = torch.tensor([row for row, _ in ends])
    misplaced = float(not same or bool((given.row != rows).any()))
    return [
        at_most("step scores", residual, 1e-9, "a step's score must be read at its last token"),
        at_most("step labels", wrong, 0, "each step must keep its label, and unlabelled steps must have none"),
        at_most("step rows", misplaced, 0, "each step needs the index of its completion, which carries the weight"),
    ]


def label_checks(subject: Subject, given: ProcessScores) -> list[Check]:
    """Check that a step's score is drawn to the log-odds of its label alone.

    A class with ``no_target``, such as a ranking of steps, only has to raise right steps relative to wrong ones.
    """
    if subject.kind.no_target:
        falls, rises = (
            [slope_of_step(subject, given, step, label) for step in range(len(given.labels))] for label in (0.0, 1.0)
        )
        pulls = [fall - rise for fall, rise in zip(falls, rises, strict=True)]
        lifted = max(pulls) if min(pulls) > -1e-12 else min(pulls)  # a completion of one step has no order
        advice = "steps with one of the labels are never trained on: look at the ends of a mask"
        return [
            at_least(
                "direction",
                lifted,
                1e-12,
                "scores of right steps must rise and those of wrong steps fall: look at the sign",
            ),
            at_least("both labels", min(max(falls), -min(rises)), 1e-12, advice),
        ]
    odds = torch.logit(given.labels)
    at_rest = slopes_of_scores(subject, given._replace(scores=odds)).abs().max()
    soft = slopes_of_scores(subject, given)
    pull = (soft * (given.scores.detach() - odds)).min()
    right, wrong = (slopes_of_scores(subject, given._replace(labels=0 * given.labels + label)) for label in (1.0, 0.0))
    residual = (soft - given.labels * right - (1 - given.labels) * wrong).abs().max()
    return [
        at_most("log-odds", at_rest, 1e-9, "the score at the minimum must be the log-odds of the label"),
        at_least(
            "direction", pull, 1e-12, "scores of right steps must rise and those of wrong steps fall: look at the sign"
        ),
        at_most("labels", residual, 1e-9, "a soft label's gradient must be the expectation over right and wrong"),
    ]


def slope_of_step(subject: Subject, given: ProcessScores, step: int, label: float) -> float:
    """Return the gradient by one step's score for a given label of that step, with all labels rounded to 0 or 1."""
    labels = given.labels.round()
    labels[step] = label
    return float(slopes_of_scores(subject, given._replace(labels=labels))[step])


def slopes_of_scores(subject: Subject, given: Any) -> Tensor:
    """Return the gradient of all losses by the scores; constants, as in a Brier score, have no effect on it."""
    function, (leaf,) = field_function(subject, subject.module, given)
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def reward_checks(subject: Subject) -> list[Check]:
    """Return the checks of a reward model of whole completions, without convergence."""
    batch, module = some_rows(subject), subject.module
    if isinstance(batch, DemonstrationBatch):
        return [*cut_checks(subject, batch), *rating_checks(subject, batch)]
    given = subject.seen(module, lambda: module.loss_sum(batch, Meter()))
    further: list[Check] = []
    if isinstance(given, RankedScores):
        further += ranking_checks(subject, given)
        further += sign_checks(subject, given) if has_safety(given) else []
    return [*offline_checks(subject), *further]


def rating_checks(subject: Subject, batch: DemonstrationBatch) -> list[Check]:
    """Check that each output is drawn to its own rating alone."""
    module = subject.module
    outputs = module.reward_model(padded_layout(batch.sequences)).detach()
    ones = torch.ones_like(batch.weights)

    def loss(leaf: Tensor, ratings: Tensor) -> Tensor:
        extras = dict(zip(module.data_columns, ratings.T, strict=True))
        hook = module.reward_model.register_forward_hook(lambda *_: leaf)
        try:
            total: Tensor = module.loss_sum(batch._replace(extras=extras, weights=ones), Meter())
            return total
        finally:
            hook.remove()

    def slope(at: Tensor, ratings: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, ratings), leaf)[0]

    given = torch.stack([batch.extras[name] for name in module.data_columns], -1)
    leaf = outputs.clone().requires_grad_()
    right = torch.autograd.gradcheck(lambda one: loss(one, given), leaf, eps=1e-6, atol=1e-5, raise_exception=False)
    far = [scale * torch.ones_like(outputs) for scale in (1e3, -1e3)]
    broken = sum(not bool(loss(at, given).isfinite() and slope(at, given).isfinite().all()) for at in far)
    others = 0.0
    for place in range(len(module.data_columns)):
        raised = outputs.clone()
        raised[:, place] += 1.0
        pull = slope(outputs, raised)
        pull[:, place] = 0.0
        others = max(others, float(pull.abs().max()))
    return [
        at_least("gradcheck", float(right), 1, "the gradient is not the loss's: look for a detach"),
        at_most("extremes", broken, 0, "loss and gradient must stay finite for outputs of 1000"),
        at_most("at rest", slope(outputs, outputs).abs().max(), 1e-12, "outputs equal to the ratings must not move"),
        at_most("direction", slope(outputs, outputs + 1).max(), -1e-12, "an output below its rating must rise"),
        at_most("own rating", others, 1e-12, "a rating must change only its own output: look at the order of columns"),
    ]


def has_safety(given: RankedScores) -> bool:
    """Return whether a loss reads safety labels, which give the zero of its costs a meaning."""
    return SAFETY.keys() <= given.extras.keys()


def with_safety(given: RankedScores, chosen: float, rejected: float) -> RankedScores:
    """Return scores with the same safety labels for all groups, if the loss reads any."""
    if not has_safety(given):
        return given
    labels = (torch.full_like(given.target, value) for value in (chosen, rejected))
    return given._replace(extras={**given.extras, **dict(zip(SAFETY, labels, strict=True))})


def sign_checks(subject: Subject, given: RankedScores) -> list[Check]:
    """Check that costs of safe completions are drawn below 0 and harmful ones above, each by its own label."""
    certain = given._replace(target=torch.ones_like(given.target))
    best = given.ranks == 0

    def slope(cost: float, chosen: float, rejected: float) -> Tensor:
        # With equal costs, the comparison adds 0 to the sum over a pair.
        equal = torch.full_like(given.scores, cost)
        return slopes_of_scores(subject, with_safety(certain._replace(scores=equal), chosen, rejected))

    groups = torch.zeros_like(given.target)
    lowered = groups.index_add(0, given.group, slope(5.0, 1.0, 1.0))
    raised = groups.index_add(0, given.group, -slope(-5.0, 0.0, 0.0))
    unsure = slope(0.0, 0.5, 0.5)
    of_chosen, of_rejected = slope(0.0, 1.0, 0.5) - unsure, slope(0.0, 0.5, 1.0) - unsure
    own = torch.cat([of_chosen[best], of_rejected[~best]]).min()
    other = torch.cat([of_chosen[~best], of_rejected[best]]).abs().max()
    return [
        at_least("safe", lowered.min(), 1e-12, "costs of safe completions must fall below 0: look at the sign"),
        at_least("harmful", raised.min(), 1e-12, "costs of harmful completions must rise above 0: look at the sign"),
        at_least("own safety", own, 1e-12, "a label of safety must lower the cost of its own completion"),
        at_most("other's safety", other, 1e-12, "a label of safety must not move the other completion of a pair"),
    ]


def list_checks(subject: Subject, certain: RankedScores) -> list[Check]:
    """Check a rated margin on pairs, and ties and the order of members in lists of three."""
    module, sign = subject.module, orientation(subject)
    rated, plain = (subject.values(module, certain._replace(margin=certain.margin + extra)) for extra in (1.0, 0.0))
    scores = torch.tensor([0.3, -0.2, 0.9, -1.1, 0.4, 0.2], dtype=torch.float64)
    group, ones = torch.arange(6) // 3, torch.ones(2, dtype=torch.float64)
    extras = {name: values[:1].expand(2) for name, values in certain.extras.items()}
    lists = RankedScores(scores, group, torch.tensor([0, 1, 1, 0, 0, 1]), ones, 0 * ones, ones, extras)
    lists = with_safety(lists, 0.5, 0.5)
    swapped = torch.tensor([0, 2, 1, 4, 3, 5])
    losses, alike, turned = (
        subject.values(module, one)
        for one in (
            lists,
            lists._replace(scores=scores[swapped]),  # exchange the tied members
            lists._replace(scores=scores.flip(0), ranks=lists.ranks.flip(0)),
        )
    )
    best = scores + sign * 0.1 * (lists.ranks == 0)
    gain = losses - subject.values(module, lists._replace(scores=best))
    return [
        at_least("rated margin", (rated - plain).min().detach(), -1e-9, "a rated margin must require a larger gap"),
        at_most("ties", (alike - losses).abs().max().detach(), 1e-9, "members that tie must be treated alike"),
        at_most(
            "list order",
            (turned.flip(0) - losses).abs().max().detach(),
            1e-9,
            "a list's loss must depend on its ranks, not on the order of its members",
        ),
        at_least("list direction", gain.min().detach(), 1e-9, f"the best members of a list must {rises(sign)}"),
    ]


def lower_bound_check(subject: Subject, certain: RankedScores) -> Check:
    """Check that a loss does not fall without bound as the gaps of pairs grow."""
    gaps = orientation(subject) * torch.where(certain.ranks == 0, 1e3, -1e3).to(certain.scores)
    near, far = (subject.values(subject.module, certain._replace(scores=k * gaps)).detach() for k in (1.0, 2.0))
    advice = "the loss has no lower bound, so scores grow without end: a completion competes with itself too"
    return at_most("lower bound", (near - far).max(), 1.0, advice)


def shipped_loss(subject: Subject, given: RankedScores) -> Tensor:
    """Return the losses of the nearest shipped class for the same scores, at the class's own settings."""
    base: Any = next(base for base in subject.kind.__mro__ if base.__module__.startswith("rlhf_lightning."))
    return as_loss(base.ranking_loss(subject.module, given)).values


def comparison_checks(subject: Subject, given: RankedScores) -> list[Check]:
    """Check soft labels of pairs, if the family has them: label p of one order equals 1 - p of the other."""
    unsure = [with_safety(given._replace(target=torch.full_like(given.target, p)), 0.5, 0.5) for p in (1.0, 0.6)]
    hard, soft = (shipped_loss(subject, one) for one in unsure)
    if bool((hard == soft).all()) or (subject.kind.data_columns and not has_safety(given)):
        return []
    hard, soft = (subject.values(subject.module, one).detach() for one in unsure)
    turned = unsure[1]._replace(ranks=1 - given.ranks, target=1 - unsure[1].target)
    residual = float((subject.values(subject.module, turned).detach() - soft).abs().max())
    if not has_outputs(given):
        residual = max(residual, soft_label_residual(subject, unsure[0]))
    advice = (
        "target is the probability that the better one is better: the gradient is the expectation over both orders, "
        "or is 0 where the gap is its log-odds; a label p of one order is a label 1 - p of the other"
    )
    return [
        at_least("soft label", (hard - soft).abs().max(), 1e-9, "a soft label must change the loss: use target"),
        at_most("labels", residual, 1e-9, advice),
    ]


def soft_label_residual(subject: Subject, certain: RankedScores) -> float:
    """Return how far soft labels are from the expectation over both orders, or from an optimum at their log-odds."""
    share = torch.full_like(certain.target, 0.7)

    def slope(one: RankedScores) -> Tensor:
        return slopes_of_scores(subject, one)

    soft, right = slope(certain._replace(target=share)), slope(certain)
    wrong = slope(certain._replace(ranks=1 - certain.ranks))
    gap = orientation(subject) * torch.logit(share)[certain.group]
    there = certain._replace(scores=torch.where(certain.ranks == 0, gap / 2, -gap / 2), target=share)
    residuals = ((soft - 0.7 * right - 0.3 * wrong).abs().max(), slope(there).abs().max())
    return float(min(residuals) / torch.maximum(right.abs().max(), wrong.abs().max()).clamp_min(1e-300))


def list_weight_check(subject: Subject) -> list[Check]:
    """Check that a loss which is a multiple of the shipped loss has the same factor for lists of every length."""
    if subject.kind.__module__.startswith("rlhf_lightning."):
        return []
    factors = []
    for members in (2, 3, 5):
        scores = torch.linspace(-1, 1, members, dtype=torch.float64) ** 3 + 0.3
        nothing = torch.zeros(1, dtype=torch.float64)
        extras = {name: nothing for name in subject.kind.data_columns}
        ranks, group = torch.arange(members).roll(1), torch.zeros(members, dtype=torch.long)
        given = RankedScores(scores, group, ranks, nothing + 1, nothing, nothing + 1, extras)
        leaf = scores.clone().requires_grad_()
        right = torch.autograd.grad(shipped_loss(subject, given._replace(scores=leaf)).sum(), leaf)[0]
        own = slopes_of_scores(subject, given)
        factors.append(float(own @ right / (right @ right)))
        if float((own - factors[-1] * right).norm()) > 1e-9 * float(own.norm()):
            return []  # a different loss
    advice = (
        f"lists of 2, 3 and 5 members have {', '.join(f'{factor:.3g}' for factor in factors)} times the shipped loss: "
        "divide by the pairs of a list, so that long lists do not dominate"
    )
    return [at_most("list weight", max(factors) / max(min(factors), 1e-300) - 1, 1e-9, advice)]


def list_rest_check(subject: Subject) -> list[Check]:
    """Check that a loss which is stationary at the true scores for pairs is stationary there for lists of three too.

    Classes with a ``no_target`` are skipped. They may use lists differently, for example only the best and the worst
    member.
    """
    if subject.kind.no_target or subject.kind.data_columns or float(slope_at_truth(subject, 2)) > 1e-9:
        return []
    advice = "pairs have no gradient at the true scores, but lists of three have: look at the normaliser of each choice"
    return [at_most("list at rest", slope_at_truth(subject, 3), 1e-9, advice)]


def slope_at_truth(subject: Subject, members: int) -> Tensor:
    """Return the largest mean gradient at the true scores, which generate the rankings (Plackett-Luce)."""
    scores = torch.tensor([0.4, -0.3, 1.0], dtype=torch.float64)[:members]
    orders = torch.tensor(list(itertools.permutations(range(members))))
    picked = (orientation(subject) * scores)[orders]
    chance = torch.stack([picked[:, k] - picked[:, k:].logsumexp(-1) for k in range(members)]).sum(0).exp()
    leaf = scores.repeat(len(orders)).requires_grad_()
    group, ones = torch.arange(len(orders)).repeat_interleave(members), torch.ones_like(chance)
    losses = subject.values(
        subject.module, RankedScores(leaf, group, orders.argsort(-1).flatten(), ones, 0 * ones, ones)
    )
    slopes = torch.autograd.grad((chance * losses).sum(), leaf)[0]
    return slopes.view(-1, members).sum(0).abs().max()


def orientation(subject: Subject) -> int:
    """Return 1 where the better completion has the higher score, -1 where scores are costs."""
    return -1 if subject.module.lower_is_better else 1


def rises(sign: int) -> str:
    """Return the direction in which the score of a better completion must move."""
    return "rise" if sign > 0 else "fall"


def ranking_checks(subject: Subject, given: RankedScores) -> list[Check]:
    """Check that a constant added to all scores of a prompt changes nothing, and that better ranks get better scores.

    Safety labels give costs a zero. Still, the loss difference between a label and its opposite does not depend on a
    constant. With a safety label of 0.5, costs of 0 move only by their ranks.
    """
    module, checks, sign = subject.module, [], orientation(subject)
    certain = given._replace(target=torch.ones_like(given.target))
    function, (leaf,) = field_function(subject, module, certain)
    way = torch.ones_like(leaf)
    if has_outputs(given):
        way = torch.autograd.grad(module.score_of(leaf).sum(), leaf)[0]
    if not getattr(module, "centering", 0):
        moved = shifted(function, leaf, 3.0 * way)
        if has_safety(given):
            opposite, (leaf,) = field_function(subject, module, given._replace(target=torch.zeros_like(given.target)))
            moved = moved - shifted(opposite, leaf, 3.0 * way)
        if subject.kind.no_target and not has_safety(given):  # no_target allows pulling scores towards 0
            held = moved + shifted(function, leaf, -3.0 * way)
            moved = torch.where(held > 1e-9, 0.0, moved)
        advice = "the loss must depend only on differences of scores"
        checks.append(at_most("shift", moved.abs().max().detach(), 1e-9, advice))
    checks += comparison_checks(subject, given)
    if not has_outputs(given):
        checks += [*list_checks(subject, certain), *list_weight_check(subject), *list_rest_check(subject)]
        checks.append(lower_bound_check(subject, certain))
    if has_safety(given):
        unsure = with_safety(certain._replace(scores=torch.zeros_like(given.scores)), 0.5, 0.5)
        function, (leaf,) = field_function(subject, module, unsure)
    elif getattr(module, "centering", 0) or subject.kind.no_target:  # may pull scores towards 0
        centred = sign * torch.where(given.ranks == 0, 0.1, -0.1).to(leaf)
        function, (leaf,) = field_function(subject, module, certain._replace(scores=centred))
    gradient = torch.autograd.grad(function(leaf).sum(), leaf)[0]
    if has_outputs(given):
        gradient = (gradient * way).sum(-1)
    pull = sign * torch.where(given.ranks == 0, -gradient, gradient)
    advice = f"rank 0 is the best: its score must {rises(sign)}, the other's {rises(-sign)}"
    checks.append(at_least("direction", pull.min(), 1e-12, advice))
    return checks


def shifted(function: Callable[..., Tensor], leaf: Tensor, by: Tensor) -> Tensor:
    """Return the change of each loss when a constant is added to the scores."""
    return function(leaf.detach() + by) - function(leaf.detach())
