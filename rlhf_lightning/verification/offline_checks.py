"""The contract of objectives on fixed data: demonstrations, pairs, judgements, rankings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.types import (
    DemonstrationBatch,
    PreferenceBatch,
    PreferenceLogprobs,
    ProcessBatch,
    RankedBatch,
    RankedScores,
    Sequences,
    Step,
    UnpairedBatch,
    UnpairedLogprobs,
)
from rlhf_lightning.verification.convergence import with_columns
from rlhf_lightning.verification.family_checks import family_checks
from rlhf_lightning.verification.subject import (
    Check,
    Subject,
    at_least,
    at_most,
    field_function,
    with_leaves,
    with_parts,
)


def some_rows(subject: Subject) -> Any:
    """Return a small batch of rows of unequal length, soft labels and unequal weights."""
    return with_columns(_some_rows(subject), subject.module.data_columns, subject.world)


def _some_rows(subject: Subject) -> Any:
    world, kind = subject.world, subject.kind.batch_type
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.5, 1.0], dtype=torch.float64)
    firsts, seconds = [(0, 0), (0, 3), (1, 1), (1, 5), (0, 6), (1, 0)], [(0, 2), (0, 0), (1, 4), (1, 0), (0, 1), (1, 6)]
    if kind is DemonstrationBatch:
        return DemonstrationBatch(world.sequences(firsts), weights)
    if kind is UnpairedBatch:
        desirable = torch.tensor([True, False, True, False, False, True])
        return UnpairedBatch(world.sequences(firsts), world.sequences(seconds), desirable, weights)
    target = torch.tensor([1.0, 0.7, 1.0, 0.2, 1.0, 0.9], dtype=torch.float64)
    if not subject.kind.weighs_rows:
        weights, target = torch.ones_like(weights), torch.ones_like(target)
    if kind is PreferenceBatch:
        first, second = world.sequences(firsts), world.sequences(seconds)
        both = Sequences(
            first.prompts,
            first.completions + second.completions,
            first.parents * 2,
            first.supervised + second.supervised,
        )
        return PreferenceBatch(both, target, torch.zeros_like(target), weights)
    pairs = [row for pair in zip(firsts, seconds, strict=True) for row in pair]
    ragged = world.sequences(pairs)
    ragged = ragged._replace(prompts=ragged.prompts[::2], parents=tuple(i // 2 for i in range(len(pairs))))
    return RankedBatch(ragged, torch.tensor([0, 1] * 6), target, torch.zeros_like(target), weights)


def cut(batch: Any, sizes: list[int]) -> list[Any]:
    """Cut a batch into parts of so many rows."""
    count, parts, start = len(batch.weights), [], 0
    for size in sizes:
        rows = list(range(start, min(start + size, count)))
        index = torch.tensor(rows)
        start += size
        sides = 2 if isinstance(batch, PreferenceBatch) else 1
        if isinstance(batch, RankedBatch):
            parts.append(_ranked_part(batch, rows))
            continue
        fields: dict[str, Any] = {
            name: part[index] for name, part in batch._asdict().items() if isinstance(part, Tensor)
        }
        fields["extras"] = {name: values[index] for name, values in batch.extras.items()}
        fields["sequences"] = _part(
            batch.sequences, [row + side * count for side in range(sides) for row in rows], sides
        )
        if isinstance(batch, ProcessBatch):
            fields["labels"] = tuple(batch.labels[row] for row in rows)
        if getattr(batch, "mismatched", None) is not None:
            fields["mismatched"] = _part(batch.mismatched, rows, 1)
        parts.append(batch._replace(**fields))
    return parts


def _part(sequences: Sequences, rows: list[int], sides: int) -> Sequences:
    own = rows[: len(rows) // sides]
    return Sequences(
        prompts=tuple(sequences.prompts[sequences.parents[row]] for row in own),
        completions=tuple(sequences.completions[row] for row in rows),
        parents=tuple(range(len(own))) * sides,
        supervised=tuple(sequences.supervised[row] for row in rows),
    )


def _ranked_part(batch: RankedBatch, rows: list[int]) -> RankedBatch:
    index, members = torch.tensor(rows), [member for row in rows for member in (2 * row, 2 * row + 1)]
    sequences = Sequences(
        prompts=tuple(batch.sequences.prompts[row] for row in rows),
        completions=tuple(batch.sequences.completions[m] for m in members),
        parents=tuple(i // 2 for i in range(len(members))),
        supervised=tuple(batch.sequences.supervised[m] for m in members),
    )
    extras = {name: values[index] for name, values in batch.extras.items()}
    ranks = batch.ranks[torch.tensor(members)]
    return RankedBatch(sequences, ranks, batch.target[index], batch.margin[index], batch.weights[index], extras)


def step_gradient(subject: Subject, batches: list[Any], rows: int, tokens: int) -> Tensor:
    """Return the gradient of one whole training step over micro-batches, through the module's own step."""
    module = subject.fresh(moved=True)
    found: list[Tensor] = []

    def update(losses: Any, count: float) -> float:
        found.append(subject.gradients(module, lambda: sum(loss() / max(count, 1) for loss in losses)))
        return 0.0

    module.update = update
    module.training_step(Step(tuple(batches), rows, tokens), 0)
    return found[0]


def offline_checks(subject: Subject) -> list[Check]:
    """Return the checks of an objective on fixed data, convergence left out."""
    module, batch = subject.module, some_rows(subject)
    given = subject.seen(module, lambda: module.loss_sum(batch, Meter()))
    if given is None:  # the loss is all in `loss_sum`
        subject.unseen = True
        return cut_checks(subject, batch)
    checks = [*input_checks(subject, given, batch), *cut_checks(subject, batch)]
    if not isinstance(given, RankedScores):
        checks.append(padding_check(subject, given))
    checks += [*point_checks(subject, given), *field_checks(subject, given)]
    return [*checks, *family_checks(subject, given, batch)]


def input_checks(subject: Subject, given: Any, batch: Any, temperature: float = 1.0) -> list[Check]:
    """What reaches the loss is what the models say about exactly the completions' tokens."""
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
            "the mask must count every token of a completion, the end token among them, and none of its prompt",
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
    index = {completion: place for place, completion in enumerate(world.completions)}
    probabilities = world.probabilities(table)
    rows = []
    for parent, ids in zip(sequences.parents, sequences.completions, strict=True):
        prompt = int(sequences.prompts[parent][0]) - 1 - world.config.tokens
        rows.append(probabilities[prompt, index[tuple(ids.tolist())]])
    return torch.stack(rows).log()


def cut_checks(subject: Subject, batch: Any) -> list[Check]:
    """How a step is cut, and among how many ranks, changes no gradient; rows count by their weights."""
    count = len(batch.weights)
    tokens = sum(int(mask.sum()) for mask in batch.sequences.supervised)
    whole = step_gradient(subject, [batch], count, tokens)
    scale = float(whole.abs().max())
    parts = step_gradient(subject, cut(batch, [1, 3, 2]), count, tokens)
    checks = [
        at_least("gradient", scale, 1e-12, "no gradient reaches the weights: something is detached"),
        at_most(
            "micro-batches",
            (parts - whole).abs().max() / max(scale, 1e-300),
            1e-7,
            "return one loss per row and let the module reduce: a mean inside loss_sum weighs short batches more",
        ),
    ]
    if not subject.kind.batch_coupled and not isinstance(batch, UnpairedBatch):
        ranks = sum(step_gradient(subject, [part], count, tokens) for part in cut(batch, [4, 2]))
        checks.append(
            at_most(
                "two ranks",
                (ranks - whole).abs().max() / max(scale, 1e-300),
                1e-7,
                "divide by the step's rows or tokens over all ranks, not by this rank's",
            )
        )
    local = subject.fresh().loss_count(Step((cut(batch, [1])[0],), 1000, 5000))
    checks.append(
        at_most(
            "step count",
            abs(local - (5000 if getattr(subject.kind, "counts_tokens", False) else 1000)),
            0,
            "divide by the step's rows or tokens over all ranks and micro-batches, which the step says",
        )
    )
    if subject.kind.weighs_rows and not subject.kind.batch_coupled:
        doubled = step_gradient(subject, [batch._replace(weights=2 * batch.weights)], count, tokens)
        checks.append(
            at_most(
                "row weights",
                (doubled - 2 * whole).abs().max() / max(scale, 1e-300),
                1e-9,
                "each row's loss must be multiplied by its weight",
            )
        )
    return checks


def padding_check(subject: Subject, given: Any) -> Check:
    """Columns under the mask, on either side and with any content, change no loss."""
    plain = subject.values(subject.fresh(moved=True), given).detach()
    residual = 0.0
    for side in ((0, 3), (3, 0)):
        wide: dict[str, Any] = {
            name: torch.nn.functional.pad(part, side)
            for name, part in {**given._asdict(), **given.extras}.items()
            if isinstance(part, Tensor) and part.dim() == 2
        }
        wide["extras"] = {name: wide.pop(name, values) for name, values in given.extras.items()}
        values = subject.values(subject.fresh(moved=True), given._replace(**wide)).detach()
        if values.dim() == 2:  # per token: cut the columns off again
            values = values[:, side[0] : values.shape[1] - side[1]]
        residual = max(residual, float((values - plain).abs().max()))
    return at_most(
        "padding", residual, 1e-10, "sum over tokens by the mask, and count tokens by it: never by the width"
    )


def point_checks(subject: Subject, given: Any) -> list[Check]:
    """The override point is a differentiable function that stays finite."""
    module = subject.module
    checks = []
    if not _has_detached_parts(subject):
        lost = lost_slopes(*field_function(subject, module, given))
        advice = "the loss depends on log-probabilities or scores that no gradient passes: look for a detach"
        checks.append(at_most("gradcheck", lost, 0, advice))
    checks.append(overwrite_check(subject, given))
    single = in_single(given)
    broken = [scale for scale in (1e3, -1e3) for one in (given, single) if not _finite_at(subject, one, scale)]
    checks.append(
        at_most("extremes", len(broken), 0, "clamp log-ratios before exp, and use logsigmoid instead of log(sigmoid)")
    )
    return checks


def overwrite_check(subject: Subject, given: Any) -> Check:
    """Check that a loss does not overwrite its input, which later terms and the metrics read."""
    kept = given._replace(**{name: p.clone() for name, p in given._asdict().items() if isinstance(p, Tensor)})
    if hasattr(given, "target"):  # soft labels are mixed from copies
        kept = kept._replace(target=torch.ones_like(given.target))
    subject.values(subject.module, kept)
    changed = sum(getattr(kept, name)._version > 0 for name, p in kept._asdict().items() if isinstance(p, Tensor))
    advice = "the loss overwrites its input: replace operations in place (add_, div_, masked_fill_)"
    return at_most("input kept", changed, 0, advice)


def lost_slopes(function: Any, leaves: list[Tensor]) -> int:
    """Count the elements by which a loss changes although no gradient passes them.

    A weight without gradient is a method (focal losses, DFT): there the gradient differs from the loss's, and is there.
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
    """Return the input of an override point in single precision, as training has it."""

    def single(part: Any) -> Any:
        return part.float() if isinstance(part, Tensor) and part.is_floating_point() else part

    plain = {name: single(part) for name, part in given._asdict().items()}
    if hasattr(given, "extras"):
        plain["extras"] = {name: single(part) for name, part in given.extras.items()}
    return given._replace(**plain)


def _finite_at(subject: Subject, given: Any, scale: float) -> bool:
    """Whether loss and gradient are finite for log-probabilities, scores or logits of a thousand.

    Log-probabilities are at most 0: a log-ratio of a thousand comes from the reference's.
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
    """Whether the loss holds statistics of itself without gradient, so that it is not a plain function."""
    return subject.kind.batch_coupled or subject.kind.token_statistics is not AlignmentModule.token_statistics


SIDES = (
    ("policy_chosen_logprobs", "reference_chosen_logprobs", "chosen_mask"),
    ("policy_rejected_logprobs", "reference_rejected_logprobs", "rejected_mask"),
    ("policy_logprobs", "reference_logprobs", "completion_mask"),
    ("logprobs", "", "completion_mask"),
)
"""Log-probabilities of the policy, of the reference, and their mask, in the inputs of the families."""


def field_checks(subject: Subject, given: Any) -> list[Check]:
    """Check the slopes by token and by model, the order of rows, and that a loss is a function of what it is given."""
    sides = [side for side in SIDES if hasattr(given, side[0])]
    if not sides:
        return []
    module = subject.module
    if hasattr(given, "target"):
        given = given._replace(target=torch.ones_like(given.target))
    named = {name for side in sides for name in side[:2] if getattr(given, name, None) is not None}
    leaves = {name: getattr(given, name).detach().clone().requires_grad_() for name in sorted(named)}
    values = subject.values(module, given._replace(**leaves))
    found = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
    slopes = {
        name: torch.zeros_like(leaf) if slope is None else slope
        for (name, leaf), slope in zip(leaves.items(), found, strict=True)
    }
    missed, opposite = 0, -1.0
    for policy, reference, name in sides:
        mask, slope = getattr(given, name), slopes[policy]
        moves = (slope != 0).any(-1)
        missed += int(((slope == 0) & mask)[moves].sum())
        if reference in slopes and bool(moves.any()):
            theirs = slopes[reference]
            sizes = (slope.norm(dim=-1) * theirs.norm(dim=-1)).clamp_min(1e-300)
            opposite = max(opposite, float(((slope * theirs).sum(-1) / sizes)[moves].max()))
    missed += missed_in_long_rows(subject, given, sides)
    checks = [
        at_most("every token", missed, 0, "each completion token must get a gradient: look for a slice or a mask"),
    ]
    if any(reference in slopes for _, reference, _ in sides) and not subject.kind.batch_coupled:
        checks.append(
            at_most(
                "reference slope",
                opposite,
                -1e-6,
                "the reference's log-probability must count against the policy's: look for a sum in place of a "
                "difference, or for a reference that is left out",
            )
        )
    if not subject.kind.batch_coupled:
        values = subject.values(module, given).detach()
        # Two calls with dropout agree on a third of the seeds: the input has few rows. Ten agree on none.
        again = torch.stack([subject.values(module, given).detach() for _ in range(9)])
        checks.append(
            at_most(
                "same twice",
                (again - values).abs().max(),
                0,
                "the loss must depend on its input alone: look for random numbers, or for state that moves",
            )
        )
        turned = subject.values(module, reversed_rows(given)).detach().flip(0)
        residual = (turned - subject.values(module, given).detach()).abs().max()
        checks.append(at_most("row order", residual, 1e-12, "each row's loss must depend on that row alone"))
    return checks


LONG = 600
"""Tokens of rows that are longer than the cuts at 256 or 512 tokens that people write."""


def missed_in_long_rows(subject: Subject, given: Any, sides: list[tuple[str, str, str]]) -> int:
    """Count the tokens of long completions that get no gradient; 0 for losses that read statistics of tokens."""
    if any(values.dim() > 1 for values in given.extras.values()):
        return 0
    generator, fields, leaves = torch.Generator().manual_seed(13), {}, {}
    for policy, reference, name in sides:
        rows = len(getattr(given, name))
        mask = torch.arange(LONG) < LONG - 7 * torch.arange(rows).unsqueeze(-1)
        noise = torch.rand(2, rows, LONG, generator=generator, dtype=torch.float64)
        fields[name] = mask
        fields[policy] = leaves[name] = torch.where(mask, -0.5 - noise[0], 0.0).requires_grad_()
        if reference and getattr(given, reference) is not None:
            fields[reference] = torch.where(mask, -0.5 - noise[0] + 0.02 * (noise[1] - 0.5), 0.0)
    values = subject.values(subject.module, given._replace(**fields))
    if not values.requires_grad:
        return 0
    missed = 0
    found = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
    for name, slope in zip(leaves, found, strict=True):
        if slope is not None:
            moves = (slope != 0).any(-1)
            missed += int(((slope == 0) & fields[name])[moves].sum())
    return missed


def reversed_rows(given: Any) -> Any:
    """Return the input of an override point with its rows in reverse order."""
    turned = {
        name: part.flip(0) for name, part in given._asdict().items() if isinstance(part, Tensor) and part.dim() > 0
    }
    return given._replace(**turned, extras={name: part.flip(0) for name, part in given.extras.items()})
