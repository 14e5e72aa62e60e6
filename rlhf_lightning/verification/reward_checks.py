"""The contract of process reward models: scores at the ends of steps, in log-odds."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import ProcessBatch, ProcessScores, RankedScores
from rlhf_lightning.verification.offline_checks import cut_checks, offline_checks, point_checks, some_rows
from rlhf_lightning.verification.subject import Check, Subject, at_least, at_most, field_function, has_outputs


def some_judged_rows(subject: Subject) -> ProcessBatch:
    """Return a small batch of completions of one and two steps, soft labels, a step nobody judged, unequal weights."""
    rows = [(0, 0), (0, 3), (1, 1), (1, 5), (0, 6), (1, 0)]
    sequences = subject.world.sequences(rows)
    flags = [flag.clone() for flag in sequences.supervised]
    flags[3][0] = False
    labels = torch.linspace(0.05, 0.95, 12, dtype=torch.float64)
    parts = tuple(labels[2 * row : 2 * row + int(flag.sum())] for row, flag in enumerate(flags))
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.5, 1.0], dtype=torch.float64)
    return ProcessBatch(sequences._replace(supervised=tuple(flags)), parts, weights)


def process_checks(subject: Subject) -> list[Check]:
    """Return the checks of a process reward model, convergence left out."""
    batch = some_judged_rows(subject)
    module = subject.module
    given: ProcessScores = subject.seen(module, lambda: module.loss_sum(batch, Meter()))
    return [
        *input_checks(subject, given, batch),
        *cut_checks(subject, batch),
        *point_checks(subject, given),
        *label_checks(subject, given),
    ]


def input_checks(subject: Subject, given: ProcessScores, batch: ProcessBatch) -> list[Check]:
    """A step's score is that of the text which ends with it, and comes with that step's label."""
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
        at_most("step scores", residual, 1e-9, "a step's score is read at its own last token, not before or after it"),
        at_most("step labels", wrong, 0, "each step must keep its own label, and steps that nobody judged have none"),
        at_most("step rows", misplaced, 0, "each step must know its completion: weights belong to those"),
    ]


def label_checks(subject: Subject, given: ProcessScores) -> list[Check]:
    """A step's score is drawn to the log-odds of its label, and to nothing else."""
    module = subject.module
    odds = torch.logit(given.labels)
    function, (leaf,) = field_function(subject, module, given._replace(scores=odds))
    at_rest = torch.autograd.grad(function(leaf).sum(), leaf)[0].abs().max()
    function, (leaf,) = field_function(subject, module, given)
    gradient = torch.autograd.grad(function(leaf).sum(), leaf)[0]
    pull = (gradient * (leaf.detach() - odds)).min()
    ones, zeros = (given._replace(labels=torch.full_like(given.labels, label)) for label in (1.0, 0.0))
    soft, right, wrong = (subject.values(module, one).detach() for one in (given, ones, zeros))
    residual = (soft - given.labels * right - (1 - given.labels) * wrong).abs().max()
    return [
        at_most("log-odds", at_rest, 1e-9, "the score at rest must be the log-odds of the label"),
        at_least("direction", pull, 1e-12, "right steps must rise and wrong ones fall: look at the sign"),
        at_most("labels", residual, 1e-9, "a soft label's loss is the expectation over right and wrong"),
    ]


def reward_checks(subject: Subject) -> list[Check]:
    """Return the checks of a reward model of whole completions, convergence left out."""
    batch, module = some_rows(subject), subject.module
    given = subject.seen(module, lambda: module.loss_sum(batch, Meter()))
    # Costs fall where scores rise, and their zero is fixed: what rankings leave open does not hold for them.
    ranks = isinstance(given, RankedScores) and not module.lower_is_better
    further = ranking_checks(subject, given) if ranks else []
    return [*offline_checks(subject), *further]


def list_checks(subject: Subject, certain: RankedScores) -> list[Check]:
    """Check a rated margin on pairs, and ties and the order of members in lists of three."""
    module = subject.module
    rated, plain = (subject.values(module, certain._replace(margin=certain.margin + extra)) for extra in (1.0, 0.0))
    scores = torch.tensor([0.3, -0.2, 0.9, -1.1, 0.4, 0.2], dtype=torch.float64)
    group, ones = torch.arange(6) // 3, torch.ones(2, dtype=torch.float64)
    lists = RankedScores(scores, group, torch.tensor([0, 1, 1, 0, 0, 1]), ones, 0 * ones, ones)
    swapped = torch.tensor([0, 2, 1, 4, 3, 5])
    losses, alike, turned = (
        subject.values(module, one)
        for one in (
            lists,
            lists._replace(scores=scores[swapped]),  # tied members exchanged
            lists._replace(scores=scores.flip(0), ranks=lists.ranks.flip(0)),
        )
    )
    best = scores + torch.tensor([0.1, 0.0, 0.0, 0.0, 0.1, 0.0], dtype=torch.float64)
    gain = losses - subject.values(module, lists._replace(scores=best))
    return [
        at_least("rated margin", (rated - plain).min().detach(), -1e-9, "a rated margin must ask for a larger gap"),
        at_most("ties", (alike - losses).abs().max().detach(), 1e-9, "members that tie must be treated alike"),
        at_most(
            "list order",
            (turned.flip(0) - losses).abs().max().detach(),
            1e-9,
            "a list's loss must depend on its ranks, not on the order in which its members stand",
        ),
        at_least("list direction", gain.min().detach(), 1e-9, "the best member of a list must rise"),
    ]


def ranking_checks(subject: Subject, given: RankedScores) -> list[Check]:
    """Check that a constant on all scores of a prompt changes nothing, and that the better ranked rises."""
    module, checks = subject.module, []
    certain = given._replace(target=torch.ones_like(given.target))
    function, (leaf,) = field_function(subject, module, certain)
    way = torch.ones_like(leaf)
    if has_outputs(given):
        way = torch.autograd.grad(module.score_of(leaf).sum(), leaf)[0]
    if not getattr(module, "centering", 0):
        moved = function(leaf.detach() + 3.0 * way) - function(leaf.detach())
        advice = "only differences of scores mean anything"
        checks.append(at_most("shift", moved.abs().max().detach(), 1e-9, advice))
    if not has_outputs(given):
        checks += list_checks(subject, certain)
    if getattr(module, "centering", 0):  # which pulls scores towards 0 as well
        centred = torch.where(given.ranks == 0, 0.1, -0.1).to(leaf)
        function, (leaf,) = field_function(subject, module, certain._replace(scores=centred))
    gradient = torch.autograd.grad(function(leaf).sum(), leaf)[0]
    if has_outputs(given):
        gradient = (gradient * way).sum(-1)
    pull = torch.where(given.ranks == 0, -gradient, gradient).min()
    checks.append(at_least("direction", pull, 1e-12, "rank 0 is the best: its score must rise, the other's fall"))
    return checks
