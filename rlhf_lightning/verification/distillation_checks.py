"""The contract of distillation: divergences of whole distributions, and advantages from a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.models.layout import select
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import DemonstrationBatch, DistillationLogits, Rollout, Sequences, Step
from rlhf_lightning.verification.cases import Case, cut, some_rows, step_gradient
from rlhf_lightning.verification.exact import SelfTaught
from rlhf_lightning.verification.offline_checks import cut_checks
from rlhf_lightning.verification.on_policy_checks import loss_checks, mask_checks
from rlhf_lightning.verification.point_checks import point_checks
from rlhf_lightning.verification.rollout_checks import update_checks
from rlhf_lightning.verification.subject import (
    Check,
    Subject,
    at_least,
    at_most,
    field_function,
)
from rlhf_lightning.verification.world import EnumerableWorld

UPDATES = 400
"""Number of updates used to measure how often a step learns from samples."""


def divergence_checks(subject: Subject) -> list[Check]:
    """Return the checks of a divergence between student and teacher, without convergence."""
    batch = some_rows(subject)
    module = subject.module
    given: DistillationLogits = subject.seen(module, lambda: module.loss_sum(batch, Meter()))
    return [
        *input_checks(subject, given, batch, module.teacher_sequences(batch.sequences)),
        *cut_checks(on_data_alone(subject), batch),
        *sample_checks(subject, batch),
        *point_checks(subject, given),
        *minimum_checks(subject, given),
    ]


def self_distillation_checks(subject: Subject) -> list[Check]:
    """Return the checks of a policy whose teacher reads additional context, without convergence."""
    module, everything = subject.module, SelfTaught(subject.module, subject.world)
    rollout, sequences = everything.rollout(), everything.sequences
    read, taught = module.read_by_teacher(rollout)
    ones = torch.ones(len(sequences.completions), dtype=torch.float64)

    def loss(weights: Tensor, rows: list[int]) -> Tensor:
        return module.divergence_sum(select(sequences, rows), select(read, rows), weights, Meter())

    def gradient(weights: Tensor, rows: list[int]) -> Tensor:
        return subject.gradients(module, lambda: loss(weights, rows))

    rows = list(range(len(ones)))
    given: DistillationLogits = subject.seen(module, lambda: loss(ones, rows))
    whole, half = gradient(ones, rows), gradient(0.5 * ones, rows)
    parts = [gradient(ones[part], part) for part in (rows[::2], rows[1::2])]
    scale = whole.abs().max().clamp_min(1e-300)
    short = sum(len(read.prompts[row]) <= len(sequences.prompts[row]) for row in taught)
    told = [row for row, text in enumerate(module.contexts(rollout)) if text is not None]
    theirs = enumerate(module.contexts(with_own_texts(rollout)))
    reads_own = [row for row, text in theirs if text is not None and f"answer {row}." in text]
    further = []
    if "context" in subject.settings:
        silent = subject.fresh(context="{feedback}").read_by_teacher(rollout)[1]
        advice = "a completion without a text for the teacher must not be trained on"
        further.append(at_most("no text", len(silent), 0, advice))
    fields = {name for names in module.templates.values() for name in names}
    if "solution" in fields and "completion" not in fields:
        advice = (
            "the solution must be the best other completion of the prompt, but the teacher reads the completion itself"
        )
        further.append(at_most("other's solution", len(reads_own), 0, advice))
    return [
        *input_checks(subject, given, DemonstrationBatch(sequences, ones), read),
        at_most("context", short, 0, "the teacher must read more than the prompt"),
        at_most("taught", float(taught != told), 0, "every completion with a text for the teacher must be trained on"),
        at_most(
            "micro-batches",
            (sum(parts) - whole).abs().max() / scale,
            1e-9,
            "splitting into micro-batches must not change the gradient",
        ),
        at_most("row weights", (2 * half - whole).abs().max() / scale, 1e-9, "a row's weight must multiply its loss"),
        *further,
        *point_checks(subject, given),
        *minimum_checks(subject, given),
    ]


def with_own_texts(rollout: Rollout) -> Rollout:
    """Return the rollout with successful completions only, each with a unique text."""
    texts = tuple(f"answer {row}." for row in range(len(rollout.texts)))
    return rollout._replace(texts=texts, scores=torch.full_like(rollout.scores, 1e3))


def on_data_alone(subject: Subject) -> Subject:
    """Return the subject with every step on the completions of the data."""
    return Subject(subject.kind, subject.world, subject.folder, {**subject.settings, "on_policy_fraction": 0.0})


def input_checks(
    subject: Subject, given: DistillationLogits, batch: DemonstrationBatch, read: Sequences
) -> list[Check]:
    """Check that the divergence gets the logits of both models at exactly the tokens of the completions."""
    world, module = subject.world, subject.module
    sequences = batch.sequences
    prefixes, tokens, mask = (part[world.places_of(sequences)] for part in world.walks)
    student = module.policy.model.model.table.weight.detach()
    teacher = world.teacher_table.float().double()

    def residual(logits: Tensor, table: Tensor, prefixes: Tensor) -> Tensor:
        exact = table.log_softmax(-1)[prefixes]
        if len(exact) != len(logits):
            return torch.tensor(torch.inf)
        return (logits.detach().log_softmax(-1).exp() - exact.exp()).abs().max()

    of_student = residual(given.student_logits, student, prefixes[mask])
    of_teacher = residual(given.teacher_logits, teacher, walked(world, read))
    wrong_ids = len(given.targets) != int(mask.sum()) or bool((given.targets != tokens[mask]).any())
    return [
        at_most(
            "tokens", float(wrong_ids), 0, "the targets must be every token of a completion, including the end token"
        ),
        at_most("student logits", of_student, 1e-9, "they must be the student's own"),
        at_most("teacher logits", of_teacher, 1e-6, "they must be the teacher's own"),
        at_most("teacher detached", float(given.teacher_logits.requires_grad), 0, "the teacher must carry no gradient"),
    ]


def walked(world: EnumerableWorld, read: Sequences) -> Tensor:
    """Return the table row that predicts each completion token, after the prompts as the teacher reads them."""
    transitions, found = world.config.transitions(), []
    for parent, completion in zip(read.parents, read.completions, strict=True):
        prefix = 0
        for token in read.prompts[parent].tolist():
            prefix = int(transitions[prefix, token])
        for token in completion.tolist():
            found.append(prefix)
            prefix = int(transitions[prefix, token])
    return torch.tensor(found)


def sample_checks(subject: Subject, batch: DemonstrationBatch) -> list[Check]:
    """Check that a step on samples equals a step on the same completions as data, for any split into micro-batches."""
    always = Subject(subject.kind, subject.world, subject.folder, {**subject.settings, "on_policy_fraction": 1.0})
    module = always.fresh(moved=True)
    count = len(batch.weights)
    drawn = module.with_samples(Step((batch,), count, 0)).micro_batches[0]
    tokens = sum(len(ids) for ids in drawn.sequences.completions)
    expected = step_gradient(on_data_alone(subject), [drawn], count, tokens)
    scale = expected.abs().max().clamp_min(1e-300)
    whole, parts = (step_gradient(always, batches, count, 1) for batches in ([batch], cut(batch, [1, 3, 2])))
    learned = sum(subject.module.learns_from_samples(update) for update in range(UPDATES)) / UPDATES
    fraction = subject.module.on_policy_fraction
    return [
        at_most(
            "sampled step",
            (whole - expected).abs().max() / scale,
            1e-7,
            "samples must be used like data: divided by their own tokens, without gradient through the sampling",
        ),
        at_most(
            "sampled micro-batches",
            (parts - whole).abs().max() / scale,
            1e-7,
            "the sample of a row must not depend on the batch it is in",
        ),
        at_most(
            "coin",
            abs(learned - fraction),
            0.1,
            "steps must use samples as often as on_policy_fraction says",
            power=min(fraction, 1 - fraction),  # all steps are alike
        ),
    ]


def minimum_checks(subject: Subject, given: DistillationLogits) -> list[Check]:
    """Check that the loss is minimal at the teacher and decreases towards it."""
    module = subject.module
    function, (leaf,) = field_function(subject, module, given)
    towards = given.teacher_logits.detach() - leaf.detach()
    towards = torch.where(towards.abs() < 1e3, towards, 0.0)  # skip ids that are impossible
    values = function(leaf)
    gradient = torch.autograd.grad(values.sum(), leaf)[0]
    slope = (gradient * towards).sum(-1)
    moved = function((leaf + 3.0).detach()).detach()
    rests = [at_teacher(subject, one) for one in (given, many_ids())]
    return [
        at_most("direction", slope.max(), -1e-12, "a step towards the teacher's logits must lower the loss"),
        at_most(
            "gradient at teacher",
            max(left for left, _ in rests),
            1e-9,
            "at student = teacher the gradient must be 0: look for another temperature, or for tokens left out",
        ),
        at_least("minimum", min(gap for _, gap in rests), 1e-12, "no student may have a lower loss than the teacher"),
        at_most(
            "shift",
            (moved - values.detach()).abs().max(),
            1e-9,
            "a constant added to all logits must not change the loss",
        ),
    ]


def many_ids() -> DistillationLogits:
    """Return logits over more ids than a truncated distribution keeps, all with non-zero probability."""
    student, teacher = 3 * torch.randn(2, 24, 80, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
    return DistillationLogits(student, teacher, torch.arange(24) % 80)


def at_teacher(subject: Subject, given: DistillationLogits) -> tuple[float, float]:
    """Return the largest gradient at student = teacher, and the smallest increase of the loss away from it.

    Both exclude the cross-entropy on the data's tokens, which a loss may mix in.
    """

    def slopes(logits: Tensor) -> tuple[Tensor, Tensor]:
        function, (leaf,) = field_function(subject, subject.module, given._replace(student_logits=logits))
        values = function(leaf)
        return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]

    def entropy(logits: Tensor) -> Tensor:
        return -logits.log_softmax(-1).gather(-1, given.targets.unsqueeze(-1)).squeeze(-1)

    student, teacher = given.student_logits.detach(), given.teacher_logits.detach()
    (here, _), (there, left) = slopes(student), slopes(teacher)
    of_data = teacher.softmax(-1) - torch.nn.functional.one_hot(given.targets, teacher.shape[-1])
    share = float((left * of_data).sum() / of_data.square().sum())
    if share <= 0 or float((left - share * of_data).abs().max()) > 1e-9:
        share = 0.0
    gap = here - there - share * (entropy(student) - entropy(teacher))
    return float((left - share * of_data).abs().max()), float(gap.min())


def sampled_distillation_checks(subject: Subject) -> list[Check]:
    """Return the checks of distillation on sampled completions, without convergence."""
    case = Case(subject, subject.module)
    return [*mask_checks(case), *teacher_checks(case), *loss_checks(case), *update_checks(subject)]


def teacher_checks(case: Case) -> list[Check]:
    """Check that each token's advantage depends on the teacher's log-probability of that token alone."""
    module, rollout, mask = case.module, case.rollout, case.rollout.completion_mask
    assert rollout.reference_logprobs is not None
    world, (prompts, completions) = case.subject.world, case.expected.index
    prefixes, tokens, _ = (part[prompts, completions] for part in world.walks)
    said = (world.teacher_table.float().double() / module.sampling.temperature).log_softmax(-1)[prefixes, tokens]
    residual = (rollout.reference_logprobs - torch.where(mask, said, 0.0)).abs().max()
    first = torch.zeros_like(mask)
    first[:, 0] = True

    def advantages(**changes: Any) -> Tensor:
        changed = rollout._replace(**changes)
        return module.advantages(changed, module.shape_rewards(changed)).advantages

    praised = advantages(reference_logprobs=rollout.reference_logprobs + 0.1 * first) - advantages()
    some = first & (torch.arange(len(mask)) % 2 == 0).unsqueeze(-1)  # a baseline may cancel a common change
    gains = (advantages(reference_logprobs=rollout.reference_logprobs + 0.1 * some) - advantages())[:, 0]
    elsewhere = praised[:, 1:][mask[:, 1:]]
    baseline = elsewhere.mean().clamp(max=0)  # rollout baseline: raising one token lowers all others alike
    agreed = advantages(reference_logprobs=rollout.old_logprobs)
    return [
        at_most("teacher logprobs", residual, 1e-6, "they must be the teacher's, at the sampling temperature"),
        at_most(
            "teacher detached", float(case.advantages.advantages.requires_grad), 0, "advantages must carry no gradient"
        ),
        at_least(
            "advantage sign",
            gains[::2].min() - gains[1::2].mean(),
            1e-9,
            "tokens that the teacher finds more likely must become more likely",
        ),
        at_most(
            "own token",
            (elsewhere - baseline).abs().max(),
            1e-9,
            "a token's advantage must depend only on the teacher's log-probability of that token",
        ),
        at_most("agreement", agreed.abs().max(), 1e-9, "if student and teacher agree, advantages must be 0"),
    ]
