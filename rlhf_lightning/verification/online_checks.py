"""The contract of objectives on sampled pairs: which model samples, how pairs are formed, and what is learned."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.models.layout import select
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import NO_LIMITS, MicroBatchLimits, Rollout, Sequences
from rlhf_lightning.verification.cases import PICKED, gradient_of, in_ranks, part_of
from rlhf_lightning.verification.exact import PairPopulation, opponent_of
from rlhf_lightning.verification.family_checks import pair_checks
from rlhf_lightning.verification.offline_checks import input_checks
from rlhf_lightning.verification.point_checks import padding_check, point_checks
from rlhf_lightning.verification.rollout_checks import temperature_checks
from rlhf_lightning.verification.subject import Check, Subject, at_least, at_most
from rlhf_lightning.verification.targets import policy_of

MANY = 500
"""Samples per prompt for measuring frequencies."""

GAMES = 3000
"""Samples per prompt for distinguishing an opponent's mixture from its component models."""


class PairedSequences(NamedTuple):
    """Completions of pairs, chosen ones stacked on rejected ones, as in a batch of fixed data."""

    sequences: Sequences


def online_checks(subject: Subject) -> list[Check]:
    """Return the checks of an objective on pairs of its own samples, without convergence."""
    module = subject.module
    rollout = PairPopulation(module, subject.world).rollout()
    pairs = module.pairs(rollout)
    forming = [*pairing_checks(module, rollout), three_samples_check(module, rollout), missing_end_check(subject)]
    if not len(pairs.chosen):  # nothing to compute a loss of
        return [*forming, *temperature_checks(subject)]
    given = subject.seen(module, lambda: module.pair_loss_sum(rollout, pairs, Meter()))
    rows = torch.cat([pairs.chosen, pairs.rejected]).tolist()
    batch = PairedSequences(select(rollout.sequences, rows))
    checks = [*forming, drawing_check(subject)]
    checks += [*input_checks(subject, given, batch, module.sampling.temperature), *update_checks(subject)]
    checks += [padding_check(subject, given), *point_checks(subject, given), *pair_checks(subject, given)]
    checks += temperature_checks(subject)
    stated = subject.fresh().value_at_reference
    return checks if stated is None else [*checks, start_check(subject, stated)]


def pairing_checks(module: Any, rollout: Rollout) -> list[Check]:
    """Check that the better sample of each prompt is chosen; equal or missing scores form no pair."""
    scores, group = rollout.scores, rollout.group
    pairs = module.pairs(rollout)
    wrong = (scores[pairs.chosen] <= scores[pairs.rejected]) | (group[pairs.chosen] != group[pairs.rejected])
    residual = int((scores.view(-1, 2)[:, 0] != scores.view(-1, 2)[:, 1]).sum())
    level = module.pairs(rollout._replace(scores=torch.zeros_like(scores)))
    unscored = scores.clone()
    unscored[0] = torch.nan
    least = pairs.target.min() if len(pairs.target) else 1.0
    blind = module.pairs(rollout._replace(scores=unscored))
    used = torch.cat([blind.chosen, blind.rejected])
    return [
        at_most("best is chosen", wrong.sum(), 0, "chosen must have a higher score than rejected, both of one prompt"),
        at_least("pair label", least, 0.5, "target is the probability that chosen is better"),
        at_most("every pair", abs(len(pairs.chosen) - residual), 0, "each prompt whose samples differ gives one pair"),
        at_most("ties", len(level.chosen), 0, "samples with equal scores must form no pair"),
        at_most("no score", (used == 0).sum(), 0, "a sample without a score must not enter a pair"),
    ]


def three_samples_check(module: Any, rollout: Rollout) -> Check:
    """Check with three samples per prompt: each prompt forms a pair, and its chosen completion is the better one."""
    few = part_of(rollout, list(range(12)))
    scores = torch.tensor([0.0, 2.0, 1.0, 3.0, 1.0, 2.0, -1.0, 0.0, 5.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    pairs = module.pairs(few._replace(scores=scores, group=torch.arange(12) // 3))
    found = list(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))
    wrong = 4 - len({chosen // 3 for chosen, _ in found})
    wrong += sum(one // 3 != other // 3 or bool(scores[one] <= scores[other]) for one, other in found)
    return at_most("best of three", wrong, 0, "for each prompt, chosen must be a better sample than rejected")


def missing_end_check(subject: Subject) -> Check:
    """Check that a completion without an end token loses against a completion with one, regardless of its score."""
    module = subject.fresh(missing_eos_penalty=1e3)
    drawn = module.draw([subject.world.questions(2)])
    told = torch.tensor(subject.world.score(drawn.batch.texts, texts_of(subject, drawn.sequences)))
    wanted = told - 1e3 * (~drawn.completions.finished).double()
    return at_most(
        "missing end",
        (drawn.scores.double() - wanted).abs().max(),
        1e-3,
        "missing_eos_penalty must lower the score that is used to form pairs: take scores from collector.judge",
    )


def texts_of(subject: Subject, sequences: Sequences) -> list[str]:
    """Return the completions' texts."""
    return [subject.world.text_of(ids.tolist()) for ids in sequences.completions]


def far_from_reference(subject: Subject) -> Any:
    """Return an instance whose policy is far from its reference, so that few samples distinguish them."""
    module, generator = subject.fresh(), torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return module


def drawing_check(subject: Subject) -> Check:
    """Check that samples follow the policy, or the reference in its turn, at the sampling temperature."""
    module, world = far_from_reference(subject), subject.world
    questions = world.questions(2 * MANY)
    per_prompt = torch.arange(len(questions.prompts)) // 2
    drawn = module.draw([questions._replace(group=per_prompt)])
    explored = module.by_reference(per_prompt)
    index = {completion: place for place, completion in enumerate(world.completions)}
    found = torch.tensor([index[tuple(ids.tolist())] for ids in drawn.sequences.completions])
    worst, powers = 0.0, []
    heat = module.sampling.temperature
    own = world.probabilities(module.policy.model.model.table.weight.detach() / heat)
    reference = world.probabilities(world.reference_table / heat)
    colder = own**2 / (own**2).sum(-1, keepdim=True)
    for turn, policy, others in ((~explored, own, (reference, colder)), (explored, reference, (own,))):
        for prompt in range(world.config.prompts):
            mine = found[turn & (questions.group == prompt)]
            if not len(mine):
                continue
            counts = torch.bincount(mine, minlength=len(index))
            spread = (len(mine) * policy[prompt] * (1 - policy[prompt])).sqrt().clamp_min(1)
            worst = max(worst, float(((counts - len(mine) * policy[prompt]) / spread).abs().max()))
            powers += [float((len(mine) * (other - policy)[prompt] / spread).abs().max()) for other in others]
    return at_most(
        "drawn from",
        worst,
        5.0,
        "standard errors of the frequency of a completion: check which model samples, and at which temperature",
        power=min(powers),  # with another model, or half the temperature
    )


def update_checks(subject: Subject) -> list[Check]:
    """Check that splits of a minibatch into micro-batches and ranks change no gradient."""
    whole = step_gradient(subject, subject.fresh(moved=True))
    scale = float(whole.abs().max())
    advice = "return one loss per pair and let the module reduce: divide by the pairs of all ranks and micro-batches"
    checks = [at_least("gradient", scale, 1e-12, "no gradient reaches the weights: look for a detach")]
    for name, limits in (("micro-batches", MicroBatchLimits(4)), ("max tokens", MicroBatchLimits(None, 9))):
        found = step_gradient(subject, subject.fresh(moved=True), limits=limits)
        checks.append(at_most(name, (found - whole).abs().max() / max(scale, 1e-300), 1e-7, advice))
    shares = [list(range(8)), list(range(8, 12))]
    ranks, said = in_ranks(
        [subject.fresh(moved=True) for _ in range(2)], lambda module, rows: step_gradient(subject, module, rows), shares
    )
    return [*checks, at_most("two ranks", (ranks - whole).abs().max() / max(scale, 1e-300), 1e-7, advice + said)]


def some_groups(subject: Subject, module: Any) -> Rollout:
    """Return a rollout of six pairs of completions of unequal length, including one tie."""
    rows = [row for group in PICKED for row in (2 * group, 2 * group + 1)]
    return part_of(PairPopulation(module, subject.world).rollout(), rows)


def step_gradient(
    subject: Subject, module: Any, rows: list[int] | None = None, limits: MicroBatchLimits = NO_LIMITS
) -> Tensor:
    """Return the gradient of an update through the module's own ``learn``, on all or the given rows of a rollout."""
    module.limits, rollout = limits, some_groups(subject, module)
    chosen = rollout if rows is None else part_of(rollout, rows)
    module.updates = 1  # the policy has left its reference
    return gradient_of(subject, module, lambda: module.learn(chosen, subject.world.questions(1), Meter()))


def start_check(subject: Subject, stated: float) -> Check:
    """Check the loss of a pair with the policy equal to the reference."""
    module = subject.fresh()
    rollout = PairPopulation(module, subject.world).rollout()
    given = module.preference_logprobs(rollout, module.pairs(rollout))
    given = given._replace(target=torch.ones_like(given.target))
    residual = (subject.values(module, given).detach() - stated).abs().max() / max(abs(stated), 1.0)
    return at_most("value at reference", residual, 1e-7, f"the class states {stated:.6g} there")


def opponent_check(subject: Subject) -> Check:
    """Check that Nash-MD's opponent samples from the mixture, with its own random numbers."""
    module, world = far_from_reference(subject), subject.world
    questions = world.questions(GAMES)
    theirs = module.opponent_scores(questions).double().view(world.config.prompts, -1)
    own = module.collector.draw(module.policy, module.tokenizer, questions).scores.double().view_as(theirs)
    mixture = opponent_of(module, world)
    drawn = (theirs.unsqueeze(-1) - world.rewards.unsqueeze(1)).abs().argmin(-1)  # the score identifies the completion
    counts = torch.stack([torch.bincount(row, minlength=mixture.shape[1]) for row in drawn])
    spread = (GAMES * mixture * (1 - mixture)).sqrt().clamp_min(1)
    off = ((counts - GAMES * mixture) / spread).abs().max()
    others = (policy_of(module, world), world.problem.reference)
    power = min(float((GAMES * (other - mixture) / spread).abs().max()) for other in others)
    alike = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1].abs() for pair in zip(own, theirs, strict=True)])
    return at_most(
        "opponent",
        torch.maximum(off, alike * GAMES**0.5).max(),
        5.0,
        "standard errors of the frequency of a completion from that of the mixture, or of the opponent's correlation "
        "with the policy's samples: mix the logits of every token, and give the opponent random numbers of its own",
        power=power,  # with the policy or the reference instead
    )
