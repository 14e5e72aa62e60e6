"""The contract of objectives on fixed data: demonstrations, pairs, unpaired completions, rankings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import PreferenceLogprobs, RankedScores, Sequences, Step, UnpairedBatch, UnpairedLogprobs
from rlhf_lightning.verification.cases import cut, in_ranks, rows_of_batch, some_rows, step_gradient
from rlhf_lightning.verification.family_checks import family_checks
from rlhf_lightning.verification.point_checks import field_checks, padding_check, point_checks
from rlhf_lightning.verification.subject import Check, Subject, at_least, at_most


def offline_checks(subject: Subject) -> list[Check]:
    """Return the checks of an objective on fixed data, without convergence."""
    module, batch = subject.module, some_rows(subject)
    given = subject.seen(module, lambda: module.loss_sum(batch, Meter()))
    if given is None:  # the whole loss is in `loss_sum`
        subject.notes.append(
            f"{subject.kind.__name__} computes its loss in loss_sum and never calls {subject.overridden}: checks of "
            "single rows, tokens and slopes are skipped; move the loss there to enable them"
        )
        return cut_checks(subject, rated(batch))
    checks = [*input_checks(subject, given, batch), *cut_checks(subject, rated(batch))]
    if not isinstance(given, RankedScores):
        checks.append(padding_check(subject, given))
    checks += [*point_checks(subject, given), *field_checks(subject, given)]
    return [*checks, *family_checks(subject, given, batch)]


def input_checks(subject: Subject, given: Any, batch: Any, temperature: float = 1.0) -> list[Check]:
    """Check that the loss gets the models' log-probabilities of exactly the completion tokens."""
    module, world = subject.module, subject.world
    if isinstance(given, RankedScores):
        return []
    sequences = batch.sequences
    if isinstance(given, PreferenceLogprobs):
        masks = torch.cat([given.chosen_mask.sum(-1), given.rejected_mask.sum(-1)])
        policy = torch.cat([given.policy_chosen_logprobs.sum(-1), given.policy_rejected_logprobs.sum(-1)])
        sides = (given.reference_chosen_logprobs, given.reference_rejected_logprobs)
        present = [side for side in sides if side is not None]
        reference = torch.cat([side.sum(-1) for side in present]) if len(present) == 2 else None
    else:
        masks = given.completion_mask.sum(-1)
        policy = (given.policy_logprobs if isinstance(given, UnpairedLogprobs) else given.logprobs).sum(-1)
        found = getattr(given, "reference_logprobs", None)
        reference = None if found is None else found.sum(-1)
    lengths = torch.tensor([len(ids) for ids in sequences.completions])
    table = module.policy.model.model.table.weight.detach() / temperature
    checks = [
        at_most(
            "tokens",
            (masks - lengths).abs().max(),
            0,
            "the mask must include every token of a completion, including the end token, and no prompt token",
        ),
        at_most(
            "policy logprobs",
            (policy.detach() - _exact(world, table, sequences)).abs().max(),
            1e-9,
            "the log-probabilities must be the policy's, of the completion alone, at the run's temperature",
        ),
    ]
    if reference is not None:
        frozen = world.reference_table.float().double() / temperature
        residual = (reference.detach() - _exact(world, frozen, sequences)).abs().max()
        checks += [
            at_most("reference logprobs", residual, 1e-9, "the reference must be the model that training started from"),
            at_most("reference detached", float(reference.requires_grad), 0, "the reference must carry no gradient"),
        ]
    return checks


def _exact(world: Any, table: Tensor, sequences: Sequences) -> Tensor:
    return world.values_of(sequences, world.probabilities(table)).log()


def rated(batch: Any) -> Any:
    """Return a batch in which every second pair or list has a rated margin."""
    if not hasattr(batch, "margin"):
        return batch
    places = torch.arange(len(batch.margin), dtype=batch.margin.dtype)
    return batch._replace(margin=(places % 2) * (0.5 + 0.1 * places))


def cut_checks(subject: Subject, batch: Any) -> list[Check]:
    """Check that splits into micro-batches and ranks change no gradient, and that rows count by their weights."""
    count = len(batch.weights)
    tokens = sum(int(mask.sum()) for mask in batch.sequences.supervised)

    def gradient(batches: list[Any], module: Any = None) -> Tensor:
        return step_gradient(subject, batches, count, tokens, module)

    whole = gradient([batch])
    scale = float(whole.abs().max())

    def residual(found: Tensor, wanted: Tensor = whole) -> float:
        return float((found - wanted).abs().max() / max(scale, 1e-300))

    ranks, said = in_ranks(
        [subject.fresh(moved=True) for _ in range(2)], lambda module, part: gradient([part], module), cut(batch, [4, 2])
    )
    local = subject.fresh().loss_count(Step((cut(batch, [1])[0],), 1000, 5000))
    wanted = 5000 if getattr(subject.kind, "counts_tokens", False) else 1000
    checks = [
        at_least("gradient", scale, 1e-12, "no gradient reaches the weights: look for a detach"),
        at_most(
            "micro-batches",
            residual(gradient(cut(batch, [1, 3, 2]))),
            1e-7,
            "return one loss per row and let the module reduce: a mean inside loss_sum weighs short batches more",
        ),
        at_most(
            "two ranks",
            residual(ranks),
            1e-7,
            f"divide by the step's rows or tokens over all ranks, not by this rank's, as statistics must be{said}",
        ),
        at_most(
            "step count",
            abs(local - wanted),
            0,
            "divide by the step's rows or tokens over all ranks and micro-batches, which the step gives",
        ),
    ]
    if subject.kind.weighs_rows and not subject.kind.batch_coupled:
        doubled = gradient([batch._replace(weights=2 * batch.weights)])
        advice = "each row's loss must be multiplied by its weight"
        checks.append(at_most("row weights", residual(doubled, 2 * whole), 1e-9, advice))
    if isinstance(batch, UnpairedBatch):
        kinds = [rows_of_batch(batch, (batch.desirable == good).nonzero().flatten().tolist()) for good in (True, False)]
        broken = sum(not bool(gradient([part]).isfinite().all()) for part in kinds)
        advice = "a step whose rows are all desirable, or all undesirable, has no finite loss: look for an empty mean"
        checks.append(at_most("one kind", broken, 0, advice))
    return checks
