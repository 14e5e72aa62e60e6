"""The contract of updates on samples: temperature, engines, missing scores, returns, and splits of a minibatch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.training.collector import without_unscored
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.types import MicroBatchLimits, PolicyLogprobs, Sequences
from rlhf_lightning.verification.cases import Case, Update, narrowed, widened
from rlhf_lightning.verification.subject import Check, Subject, at_least, at_most
from rlhf_lightning.verification.targets import all_rows, policy_of
from rlhf_lightning.verification.world import EnumerableWorld

TEMPERATURE, LAMBDA, DISCOUNT = 0.7, 0.9, 0.95
"""Values different from the defaults, so that ignoring a setting is noticed."""


def token_logprobs_of(world: EnumerableWorld, table: Tensor, sequences: Sequences) -> Tensor:
    """Return the log-probability of each completion token under a table, 0 where masked, shape (rows, length)."""
    prefixes, tokens, mask = (part[world.places_of(sequences)] for part in world.walks)
    return torch.where(mask, table.double().log_softmax(-1)[prefixes, tokens], 0.0)


def temperature_checks(subject: Subject) -> list[Check]:
    """Check that the temperature is applied to the log-probabilities of rollouts and of updates."""
    if "temperature" not in subject.known:
        return []
    module, world = subject.fresh(moved=True, temperature=TEMPERATURE), subject.world
    module.trainer.training = True  # validation draws fewer samples
    rollout = module.collect(world.questions(2))
    exact = token_logprobs_of(world, module.model.model.model.table.weight.detach() / TEMPERATURE, rollout.sequences)
    width = rollout.old_logprobs.shape[1]
    residual = float((rollout.old_logprobs - exact[:, :width]).abs().max())
    reference = rollout.reference_logprobs
    if reference is not None and module.teacher_name is None:
        theirs = token_logprobs_of(world, world.reference_table.float() / TEMPERATURE, rollout.sequences)
        residual = max(residual, float((reference - theirs[:, :width]).abs().max()))
    module.update = lambda losses, count, meter=None: float(sum(loss().detach() for loss in losses))
    given = subject.seen(module, lambda: module.learn(rollout, world.questions(1), Meter()))
    if isinstance(given, PolicyLogprobs):
        residual = max(residual, float((given.logprobs - given.old_logprobs).abs().max()))
    return [
        at_most(
            "temperature",
            residual,
            1e-6,
            "divide the logits by the sampling temperature, in rollouts, in updates and for the reference",
        )
    ]


def equal_scores_check(case: Case) -> Check:
    """Check that advantages are finite, also in groups and rollouts of equal scores."""
    equal = case.advantages_of(scores=torch.zeros_like(case.rollout.scores))
    broken = (~torch.cat([case.advantages.advantages.detach(), equal]).isfinite()).sum()
    advice = "equal scores have advantages of 0: add a small number to a deviation before dividing by it"
    return at_most("equal scores", broken, 0, advice)


def missing_score_check(case: Case) -> Check:
    """Check that a completion without a score has advantage 0 and does not affect the others."""
    module, rollout = case.module, case.rollout
    scores = rollout.scores.clone()
    scores[0] = torch.nan
    changed = rollout._replace(scores=scores)
    advantages = module.advantages(changed, module.shape_rewards(changed))
    if not module.learns_unscored:
        advantages = without_unscored(changed, advantages)
    found = advantages.advantages
    wrong = torch.inf if not bool(found.isfinite().all()) else float(found[0].abs().max())
    advice = "a completion whose score is NaN has advantage 0, and means and deviations leave it out"
    return at_most("missing score", wrong, 0, advice)


def learned_check(case: Case) -> Check:
    """Check that only completion tokens are learned from, and finished completions rather than truncated ones."""
    learned, mask, finished = case.advantages.learned, case.rollout.completion_mask, case.rollout.finished
    wrong = 0
    if learned is not None:
        wrong = int((learned & ~mask).sum())
        wrong += bool(learned[~finished].any()) and not bool(learned[finished].any())
    advice = "learned may mark only completion tokens, and must leave out truncated completions before finished ones"
    return at_most("learned", wrong, 0, advice)


def aggregation_check(case: Case) -> Check:
    """Check that padding changes neither the weights of tokens nor their divisor."""
    mask = case.rollout.completion_mask[:6]
    plain, wide = (case.module.aggregation(part) for part in (mask, torch.nn.functional.pad(mask, (0, 3))))
    residual = (wide.weights[:, : mask.shape[1]] - plain.weights).abs().max() + (wide.divisor - plain.divisor).abs()
    advice = "token weights and the divisor count learned tokens: never the padded width"
    return at_most("aggregation", residual + wide.weights[:, mask.shape[1] :].abs().max(), 1e-12, advice)


def loss_padding_check(case: Case) -> Check:
    """Check that masked columns change no token's loss."""
    mask, given = case.rollout.completion_mask, case.moved_by(0.1)
    if given.minibatch is not None:
        return at_most("loss padding", 0.0, 1e-10, "not measured: the loss sees the whole minibatch")
    wide = widened(given)._replace(rollout=widened(case.rollout))
    padded, plain = case.loss(wide)[:, : mask.shape[1]], case.loss(given)
    advice = "a completion's ratio averages over its own tokens: never over the padded width"
    return at_most("loss padding", (padded - plain).abs().max().detach(), 1e-10, advice)


def ratio_check(case: Case) -> Check:
    """Check that the ratio's gradient is at most its derivative when all tokens of a completion become likelier.

    It may be smaller, since factors may be detached. A ratio to the current policy is constant but has a gradient.
    """
    given, step = case.moved_by(0.1), 1e-4
    mask = given.completion_mask

    def ratios(nats: Tensor) -> Tensor:
        moved = given._replace(logprobs=given.logprobs + mask * nats.unsqueeze(-1))
        return torch.where(mask, case.module.ratio(moved), 0.0).sum(-1)

    nats = torch.zeros(len(mask), dtype=torch.float64, requires_grad=True)
    values, ends = ratios(nats), [ratios(torch.full_like(nats, by).detach()) for by in (step, -step)]
    slope = torch.autograd.grad(values.sum(), nats)[0] if values.requires_grad else torch.zeros_like(nats)
    derivative = ((ends[0] - ends[1]) / (2 * step)).detach()
    passes = (slope.abs() > 1e-9) & (derivative.abs() > 1e-6)
    excess = torch.where(passes, slope / derivative, 0.0).max()
    advice = "the ratio's gradient exceeds its derivative: a factor lacks a detach, and the gradient counts twice"
    return at_most("ratio slope", excess, 1 + 1e-4, advice)


def holes_check(case: Case) -> Check:
    """Check that environment tokens between the policy's tokens change no reward, no advantage and no ratio."""
    module, rollout, mask = case.module, case.rollout, case.rollout.completion_mask
    given, width = case.moved_by(0.1), mask.shape[1]
    if getattr(module, "credit", "") == "turn" or getattr(module, "turn_gamma", 1) != 1:
        said = "not measured: a gap starts a new turn, which these settings treat separately"
        return at_most("holes", 0.0, 1e-9, said)
    largest = 0.0
    for place in range(1, width):
        wide = widened(rollout, place, 2)
        rewards = module.shape_rewards(wide)
        found = module.advantages(wide, rewards).advantages
        largest = max(largest, float((narrowed(found, place, 2) - case.advantages.advantages).abs().max()))
        largest = max(largest, float(found[:, place : place + 2].abs().max()))
        kept = rewards if rewards.dim() < 2 else narrowed(rewards, place, 2)
        largest = max(largest, float((kept - case.rewards).abs().max()))
        if given.minibatch is None:  # else the ratio may read all episodes of the step
            ratio = narrowed(module.ratio(widened(given, place, 2)._replace(rollout=wide)), place, 2)
            changed = torch.where(mask, ratio - module.ratio(given), 0.0)
            largest = max(largest, float(changed.detach().abs().max()))
    advice = "environment tokens are masked inside a row: carry values across them, and do not index adjacent columns"
    return at_most("holes", largest, 1e-9, advice)


def sampler_checks(case: Case) -> list[Check]:
    """Check that tokens the engine samples too often get less weight under a sampler correction, or the loss's own."""
    module, mask, old = case.module, case.rollout.completion_mask, case.rollout.old_logprobs
    if "sampler_correction" not in case.subject.known or case.subject.kind.teacher_name is not None:
        return []
    before = module.sampler_correction
    written = type(module).policy_loss is not OnPolicyModule.policy_loss
    own = written and before is None  # such a loss may have no correction without the setting
    weighs = before is None and module.sampler_weight(case.logprobs()) is not None  # uses its own weight
    module.sampler_correction = None if own else "token_truncate"
    try:
        sizes = []
        for overdrawn in (0.0, 1.0):
            behaviour = torch.where(mask, old + overdrawn, 0.0)
            given = case.logprobs(behaviour_logprobs=behaviour, advantages=mask.to(old))
            sizes.append(float(case.slopes(given)[mask].abs().mean()))
    finally:
        module.sampler_correction = before
    if own and abs(sizes[0] - sizes[1]) < 1e-9:  # the loss ignores the engine's log-probabilities
        return []
    advice = "the correction's weight is old / behaviour: look for the inverse, or for a correction that is dropped"
    return [at_least("sampler correction", sizes[0] - sizes[1], -1e-6 if weighs else 1e-6, advice)]


def kl_loss_checks(case: Case) -> list[Check]:
    """Check that the mean of the KL loss over the policy's samples equals the KL; for k2, that it is positive."""
    module, world = case.module, case.subject.world
    if not module.kl_coef or module.reference is None:
        return []
    layout = padded_layout(world.sequences(all_rows(world)))
    with torch.no_grad():
        now, reference = module.policy(layout).logprobs, module.reference.logprobs(layout)
        given = PolicyLogprobs(now, now, reference, None, torch.zeros_like(now), layout.completion_mask)
        kl = module.kl_loss(given)
    if kl is None:
        return []
    mean = float((now.sum(-1).exp() * kl.sum(-1)).sum()) / world.config.prompts
    exact = world.kl(policy_of(module, world))
    if module.kl_estimator == "k2":
        return [at_least("kl loss", mean, 1e-9, "the KL loss must be positive: look at its sign")]
    advice = "the mean of the KL loss must be KL(policy || reference): look at its sign, and at its direction"
    return [at_most("kl loss", abs(mean / exact - 1), 1e-6, advice)]


def return_checks(subject: Subject) -> list[Check]:
    """Check the critic's targets against directly summed generalised advantages, at lambda and gamma below 1."""
    if not {"lam", "gamma"} <= subject.known:
        return []
    module = subject.fresh(moved=True, lam=LAMBDA, gamma=DISCOUNT)
    case = Case(subject, module)
    values, found = case.rollout.values, case.advantages.returns
    assert values is not None and found is not None
    residual = min(return_residual(case, values, found, lam) for lam in (LAMBDA, 1.0))  # a critic may use lambda 1
    advice = "returns are values + sum (gamma lambda)^k (r + gamma V' - V): look at gamma, lambda and the last state"
    return [at_most("returns", residual, 1e-8, advice)]


def return_residual(case: Case, values: Tensor, found: Tensor, lam: float) -> float:
    """Return the distance of the critic's targets from values plus directly summed generalised advantages."""
    mask = case.module.critic_states(case.rollout)
    expected = torch.zeros_like(found)
    for row in range(0, len(mask), 5):
        states = mask[row].nonzero().squeeze(-1).tolist()
        after = [*states[1:], None]
        rests = [
            case.rewards[row, state] + (0 if later is None else DISCOUNT * values[row, later]) - values[row, state]
            for state, later in zip(states, after, strict=True)
        ]
        for place, state in enumerate(states):
            weights = [(DISCOUNT * lam) ** ahead for ahead in range(len(states) - place)]
            gain = sum(weight * rest for weight, rest in zip(weights, rests[place:], strict=True))
            expected[row, state] = values[row, state] + gain
    rows = torch.arange(0, len(mask), 5)
    return float(torch.where(mask, found - expected, 0.0)[rows].abs().max())


def update_checks(subject: Subject) -> list[Check]:
    """Check that splits into micro-batches and ranks do not change the gradient of an update."""
    update = Update(subject)
    whole = update.gradient()
    scale = whole.abs().max().clamp_min(1e-300)
    advice = "return one loss per token and let the module reduce: divide by the minibatch's count over all ranks"
    checks = [at_least("gradient", whole.abs().max(), 1e-12, "no gradient reaches the weights: look for a detach")]
    for name, limits in (("micro-batches", MicroBatchLimits(3)), ("max tokens", MicroBatchLimits(None, 5))):
        checks.append(at_most(name, (update.gradient(limits=limits) - whole).abs().max() / scale, 1e-7, advice))
    ranks, said = update.over_ranks(update.gradient)
    checks.append(at_most("two ranks", (ranks - whole).abs().max() / scale, 1e-7, advice + said))
    residual, said = update.over_ranks(update.rank_residual)
    advice = f"a deviation over a rollout is that of all ranks: use moments_over_ranks{said}"
    return [*checks, at_most("rollout over ranks", residual, 1e-9, advice)]
