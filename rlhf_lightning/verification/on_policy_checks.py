"""The contract of objectives on sampled completions: rewards, advantages, ratios, the KL penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.types import Advantages, CriticValues, Minibatch, PolicyLogprobs, Rollout
from rlhf_lightning.verification.convergence import descend, policy_of
from rlhf_lightning.verification.exact import PolicyGradient, minibatch_of
from rlhf_lightning.verification.rollout_checks import (
    aggregation_check,
    holes_check,
    kl_loss_checks,
    learned_check,
    loss_padding_check,
    missing_score_check,
    return_checks,
    sampler_checks,
    temperature_checks,
    update_checks,
)
from rlhf_lightning.verification.subject import (
    ENTROPY,
    Check,
    Subject,
    at_least,
    at_most,
    field_function,
    known_statistics,
    with_leaves,
)


class Case:
    """A rollout of every completion in groups, by the subject's own code, with its rewards and advantages.

    Args:
        subject: the class.
        module: an instance with its models loaded.
    """

    def __init__(self, subject: Subject, module: Any) -> None:
        self.subject, self.module = subject, module
        self.expected = PolicyGradient(module, subject.world)
        self.rollout: Rollout = subject_rollout(self.expected)
        self.rewards: Tensor = module.shape_rewards(self.rollout).detach()
        self.advantages: Advantages = module.advantages(self.rollout, self.rewards)

    def logprobs(self, **changes: Any) -> PolicyLogprobs:
        """The input of the policy loss at ratio 1, with changes."""
        rollout = self.rollout
        plain = PolicyLogprobs(
            rollout.old_logprobs.clone(),
            rollout.old_logprobs,
            rollout.reference_logprobs,
            rollout.entropy,
            self.advantages.advantages.detach(),
            rollout.completion_mask,
            rollout.behaviour_logprobs,
            extras=rollout.extras,
            rollout=rollout,
            minibatch=minibatch_of(self.module, rollout, self.advantages),
        )
        # What changes for the rows changes for the minibatch that they are of.
        shared = {name: part for name, part in changes.items() if name in Minibatch._fields}
        if plain.minibatch is not None:
            plain = plain._replace(minibatch=plain.minibatch._replace(**shared))
        return plain._replace(**changes)


def subject_rollout(expected: PolicyGradient) -> Rollout:
    """Return the rollout that an expectation is taken over, with values that a critic might have given."""
    found: list[Rollout] = []
    module = expected.module
    original = module.advantages

    def keeping(rollout: Rollout, rewards: Tensor) -> Advantages:
        found.append(rollout)
        return original(rollout, rewards)

    module.advantages = keeping  # type: ignore[method-assign]
    try:
        expected.loss()
    finally:
        vars(module).pop("advantages", None)
    rollout = found[0]
    generator = torch.Generator().manual_seed(3)
    if rollout.values is None:
        return rollout
    values = torch.randn(rollout.values.shape, generator=generator, dtype=torch.float64)
    mask = rollout.completion_mask
    return rollout._replace(values=torch.where(mask, values, 0.0) if values.shape == mask.shape else values)


def on_policy_checks(subject: Subject) -> list[Check]:
    """Return the checks of an objective on samples, convergence left out."""
    case = Case(subject, subject.module)
    checks = [*reward_checks(case), *advantage_checks(case), *loss_checks(case)]
    checks += [missing_score_check(case), learned_check(case), aggregation_check(case)]
    checks += [loss_padding_check(case), holes_check(case)]
    checks += kl_loss_checks(case)
    checks += [*sampler_checks(subject, case), *temperature_checks(subject), *update_checks(subject)]
    if hasattr(subject.kind, "value_loss"):
        checks += [*value_checks(case), *return_checks(subject)]
    penalty = kl_penalty_check(subject)
    return checks if penalty is None else [*checks, penalty]


def reward_checks(case: Case) -> list[Check]:
    """The score is in the rewards once, at its slot; nothing is under the mask; the KL penalty costs reward."""
    module, rollout = case.module, case.rollout
    checks = []
    slots = module.score_slots(rollout)
    if slots is not None:
        unscored = module.shape_rewards(rollout._replace(scores=torch.zeros_like(rollout.scores)))
        change = case.rewards - unscored
        expected = torch.zeros_like(change).scatter(1, slots.unsqueeze(1), rollout.scores.to(change).unsqueeze(1))
        checks.append(
            at_most(
                "score slot",
                (change - expected).abs().max(),
                1e-9,
                "each score belongs once on the last completion token (or where score_slots says), unscaled",
            )
        )
    mask = rollout.completion_mask
    if case.rewards.shape == mask.shape:
        outside = case.rewards.masked_select(~mask).abs()
        worst = outside.max() if outside.numel() else 0.0
        checks.append(at_most("rewards under mask", worst, 0, "zero rewards behind the end of a completion"))
    if rollout.reference_logprobs is not None and module.kl_coef:
        nearer = torch.where(mask, rollout.reference_logprobs - 0.1, 0.0)
        change = (module.shape_rewards(rollout._replace(reference_logprobs=nearer)) - case.rewards).sum(-1)
        checks.append(
            at_most(
                "kl in reward",
                change.max(),
                1e-12,
                "more KL to the reference must never earn reward: look at the "
                "sign, and at which of the two log-probabilities is subtracted",
            )
        )
    return checks


def advantage_checks(case: Case) -> list[Check]:
    """Advantages are zero under the mask and do not see it, and follow the scores."""
    module, rollout, mask = case.module, case.rollout, case.rollout.completion_mask
    first = (torch.arange(len(rollout.scores)) % max(case.expected.group_size, 2) == 0).double()

    def raised(scores: Tensor, by: float) -> Tensor:
        given = [rollout._replace(scores=one) for one in (scores, scores + by * first)]
        plain, lifted = (module.advantages(one, module.shape_rewards(one)).advantages for one in given)
        gain = (lifted - plain).sum(-1) / mask.sum(-1)
        return gain[::2].mean() - gain[1::2].mean()

    gain = raised(rollout.scores, 1.0)
    if float(gain) < 1e-9:  # a method for success rates
        gain = raised(rollout.scores.sigmoid(), 0.2)
    sign = at_least("advantage sign", gain, 1e-9, "a higher score must give a higher advantage")
    return [*mask_checks(case), sign]


def mask_checks(case: Case) -> list[Check]:
    """Advantages are zero under the mask and do not see it."""
    module, rollout, mask = case.module, case.rollout, case.rollout.completion_mask
    outside = case.advantages.advantages.masked_select(~mask).abs()
    checks = [
        at_most(
            "advantages under mask",
            outside.max() if outside.numel() else 0.0,
            0,
            "zero advantages behind the end of a completion, after whitening too",
        ),
    ]
    wide: dict[str, Any] = {
        name: torch.nn.functional.pad(part, (0, 3))
        for name, part in rollout._asdict().items()
        if isinstance(part, Tensor) and part.dim() == 2
    }
    padded = rollout._replace(**wide)
    again = module.advantages(padded, module.shape_rewards(padded)).advantages[:, : mask.shape[1]]
    checks.append(
        at_most(
            "padding",
            (again - case.advantages.advantages).abs().max(),
            1e-9,
            "means, deviations and lengths count completion tokens alone, not the cells of the grid",
        )
    )
    return checks


def loss_checks(case: Case) -> list[Check]:
    """At ratio 1 the gradient is the policy gradient; away from it the policy is pulled back; all stays finite."""
    module, subject, mask = case.module, case.subject, case.rollout.completion_mask
    kl_coef, module.kl_coef = module.kl_coef, 0.0
    try:
        function, (leaf,) = field_function(subject, module, case.logprobs())
        gradient = torch.autograd.grad(torch.where(mask, function(leaf), 0.0).sum(), leaf)[0]
        unequal = unequal_weights(gradient, case.advantages.advantages.detach(), mask)
        checks = [
            at_most(
                "ratio one",
                unequal,
                1e-6,
                "before any update the gradient must be -advantage * d log policy, or that times weights of tokens: "
                "look at which log-probabilities make the ratio, and for a missing or a superfluous detach",
            )
        ]
        left_out = bool(unequal == 0) & (gradient == 0) & mask  # tokens of weight 0
        pulls = []
        for sign, moved in ((1.0, -0.7), (-1.0, 0.7)):  # made unlikelier though good, likelier though bad
            old = torch.where(mask, case.rollout.old_logprobs - moved, 0.0)
            given = case.logprobs(
                old_logprobs=old, behaviour_logprobs=old, advantages=torch.where(mask, torch.full_like(old, sign), 0.0)
            )
            function, (leaf,) = field_function(subject, module, given)
            found = torch.autograd.grad(torch.where(mask, function(leaf), 0.0).sum(), leaf)[0]
            pulls.append(-sign * found[mask] + 1e-9 * ((found == 0) & left_out)[mask])
        checks.append(
            at_least(
                "pull back",
                torch.stack([pull.min() for pull in pulls]).min(),
                1e-12,
                "a token that has moved the wrong way must keep its gradient: the clip belongs on the other side",
            )
        )
        if clips(module):
            checks.append(clip_check(case))
        elif isinstance(module, OnPolicyModule) and module.objective_name == "clip":
            checks.append(one_sided_clip_check(case))
    finally:
        module.kl_coef = kl_coef
    return [*checks, extremes_check(case), *entropy_check(case)]


def unequal_weights(gradient: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return how far a gradient at ratio 1 is from -advantage; 0 for weights of tokens that are a method.

    Such weights are not negative, differ within completions, and leave out neither all first nor all last tokens.
    """
    wanted = -advantages
    unequal = (gradient - wanted)[mask].abs().max() / wanted.abs().max().clamp_min(1e-12)
    counts = mask & (wanted.abs() > 1e-9 * wanted.abs().max())
    weights = torch.where(counts, gradient / torch.where(counts, wanted, 1.0), 0.0)
    several = counts & (counts.sum(-1, keepdim=True) > 1)
    if float(unequal) < 1e-6 or bool((weights < 0).any()) or bool((gradient[mask & ~counts].abs() > 1e-9).any()):
        return unequal
    mean = weights.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp_min(1)
    varies = bool(((weights - mean).abs() > 1e-6)[several].any())
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    sides = (weights[counts & (torch.arange(mask.shape[1]) == 0)], weights[counts & last])
    return unequal * 0 if varies and all(bool((side > 0).any()) for side in sides) else unequal


def clips(module: Any) -> bool:
    """Whether the settings say that the loss is the clipped surrogate, and no ``objective`` of its own replaces it."""
    if not isinstance(module, OnPolicyModule) or module.objective_name != "clip":
        return False
    return type(module).objective is OnPolicyModule.objective


def far_gradients(case: Case) -> tuple[Tensor, Tensor]:
    """Return the gradients of good tokens at e^3 times their old probability, and of bad ones at e^-3 times."""
    module, mask, found = case.module, case.rollout.completion_mask, []
    for sign, moved in ((1.0, 3.0), (-1.0, -3.0)):
        old = torch.where(mask, case.rollout.old_logprobs - moved, 0.0)
        given = case.logprobs(
            old_logprobs=old, behaviour_logprobs=old, advantages=torch.where(mask, torch.full_like(old, sign), 0.0)
        )
        function, (leaf,) = field_function(case.subject, module, given)
        found.append(torch.autograd.grad(torch.where(mask, function(leaf), 0.0).sum(), leaf)[0][mask].abs())
    return found[0], found[1]


def clip_check(case: Case) -> Check:
    """Beyond the clip on the side that it already gains from, a token gets no more gradient."""
    worst = max(float(gradient.max()) for gradient in far_gradients(case))
    return at_most("clip", worst, 1e-9, "a good token that is already e^3 times as likely must not be pushed further")


def one_sided_clip_check(case: Case) -> Check:
    """A loss of one's own that stops bad tokens far off stops good ones too; one that never clips is free not to."""
    good, bad = far_gradients(case)
    pushed = float(good.min()) if float(bad.max()) < 1e-9 else 0.0
    advice = (
        "bad tokens stop where they are e^-3 times as likely, and good ones at e^3 are pushed on: clip on both sides"
    )
    return at_most("clip", pushed, 2.0, advice)


def extremes_check(case: Case) -> Check:
    """Log-ratios of a thousand nats give finite losses and gradients."""
    mask, broken = case.rollout.completion_mask, 0.0
    for moved in (1e3, -1e3):
        old = torch.where(mask, case.rollout.old_logprobs + moved, 0.0)
        given = case.logprobs(old_logprobs=old, behaviour_logprobs=old)
        given, (leaf,) = with_leaves(given)
        values = torch.where(mask, case.subject.values(case.module, given), 0.0)
        gradient = torch.autograd.grad(values.sum(), leaf)[0]
        broken = max(broken, float(not (values.isfinite().all() and gradient.isfinite().all())))
    return at_most("extremes", broken, 0, "clamp log-ratios before exp")


def entropy_check(case: Case) -> list[Check]:
    """Check that a loss which reads the entropy, as a field or a statistic of its own, rewards it."""
    known = known_statistics(case.module)
    named = {name: part for name, part in case.rollout.extras.items() if known.get(name) == (ENTROPY, 1)}
    if case.rollout.entropy is not None:
        named["entropy"] = case.rollout.entropy
    if not named:
        return []
    leaves = {name: part.detach().clone().requires_grad_() for name, part in named.items()}
    slots = {**case.rollout.extras, **{name: leaf for name, leaf in leaves.items() if name != "entropy"}}
    values = case.subject.values(case.module, case.logprobs(entropy=leaves.get("entropy"), extras=slots))
    if not values.requires_grad:
        return []
    found = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
    slopes = [slope.max() for slope in found if slope is not None and bool(slope.any())]
    advice = "a bonus subtracts the entropy from the loss: added, it drives the policy towards one completion"
    return [at_most("entropy bonus", torch.stack(slopes).max(), 0, advice)] if slopes else []


def value_checks(case: Case) -> list[Check]:
    """The critic is drawn to its returns, and clipping never makes a loss smaller."""
    module, mask, rollout = case.module, case.rollout.completion_mask, case.rollout
    assert rollout.values is not None and case.advantages.returns is not None
    returns = case.advantages.returns[:, : mask.shape[1]]
    old = rollout.values[:, : mask.shape[1]]

    def loss(values: Tensor, before: Tensor) -> Tensor:
        from rlhf_lightning.training.module import as_loss

        return torch.where(mask, as_loss(module.value_loss(CriticValues(values, before, returns, mask))).values, 0.0)

    def slope(values: Tensor) -> Tensor:
        leaf = values.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, values).sum(), leaf)[0][mask]

    # Near the return any critic's loss is a square: Huber's, log-cosh, with or without a half before it.
    near = torch.where(torch.arange(mask.shape[1]) % 2 == 0, 1e-3, -1e-3) + 0 * returns
    factors = slope(returns + near) / near[mask]
    factor = factors.mean().clamp_min(1e-12)
    far = (slope(old) * (old - returns)[mask]).min()
    toward = ((factors - factor) / factor).abs().max() if bool(far > 0) else torch.inf
    moved = old + 2.0
    below = (loss(moved, moved) - loss(moved, old))[mask].max()
    return [
        at_most("value gradient", toward, 1e-2, "every value must be drawn to its return, the nearer the less"),
        at_most("value clip", below, 1e-9, "the larger of the clipped and the plain loss counts, never the smaller"),
    ]


def kl_penalty_check(subject: Subject) -> Check | None:
    """With nothing to earn, training brings a policy that has moved away back to its reference."""
    module = subject.fresh(moved=True)
    if module.reference is None or not module.kl_coef:
        return None
    moved = kl_of_training(subject, module)
    if moved > -1e-6:  # a price on length moves the policy too
        free = subject.fresh(moved=True)
        free.kl_coef = 0.0
        moved -= kl_of_training(subject, free)
    if moved > -1e-6:  # a method for success rates
        moved = kl_of_training(subject, subject.fresh(moved=True), 1.0)
    return at_most(
        "kl penalty",
        moved,
        -1e-6,
        "with equal scores the KL to the reference must fall: look at the KL's sign and at the advantage it is part of",
    )


def kl_of_training(subject: Subject, module: Any, score: float = 0.0) -> float:
    """Return how much the KL to the reference changes while a policy is trained on equal scores."""
    before = subject.world.kl(policy_of(module, subject.world))
    expected = PolicyGradient(module, subject.world, shuffled=True)
    expected.scores, expected.rewards = expected.scores + score, expected.rewards + score
    descend(expected.loss, [p for p in module.parameters() if p.requires_grad], 25, 0.02)
    return subject.world.kl(policy_of(module, subject.world)) - before
