"""Evaluate another project's loss row by row, and check that it equals the shipped class it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import CriticValues, PolicyLogprobs, RankedScores, Rollout, TokenLogprobs
from rlhf_lightning.verification.cases import Case
from rlhf_lightning.verification.diagnosis import probe_input, value_input
from rlhf_lightning.verification.fit import masked_slopes
from rlhf_lightning.verification.subject import DIFFERENTIATED, Check, Subject, at_most, differentiate

LEAVES: dict[type, Sequence[str]] = {**DIFFERENTIATED, CriticValues: ("values",)}
"""Fields that carry gradient."""

SAME = 1e-7
"""Largest difference of values and gradients at which two losses count as equal."""

FEW = 16
"""Largest number of rows at which a mean is split row by row; with more rows, only its gradient is split."""


def by_row(function: Callable[[Any], Tensor], module: Any, given: Any) -> Tensor:
    """Return the values of a function row by row or token by token.

    A mean is split. For few rows, the function is called once per row. For many rows, as in training in the small
    world, the gradient of the mean is distributed over the rows.
    """
    found = function(given)
    if found.dim():
        return found
    if isinstance(given, CriticValues):
        return _by_token(function, given)
    rows = rows_of(given)
    if rows <= FEW and not type(module).batch_coupled:  # losses that sort have no values per row
        values = torch.stack([function(some_rows_of(given, [row])) for row in range(rows)])
        return _spread(module, given, values)
    with torch.enable_grad():
        slopes = differentiate(function, given, LEAVES[type(given)])[1]
    carriers = [(getattr(given, name) - getattr(given, name).detach()) * slope for name, slope in slopes.items()]
    if isinstance(given, PolicyLogprobs | TokenLogprobs):
        weights, divisor = _aggregated(module, given.completion_mask)
        share = torch.where(weights > 0, divisor / weights.clamp_min(1e-300), 0.0)
        return _weighted(given, found.detach() + torch.where(given.completion_mask, carriers[0] * share, 0.0))
    whole = sum(carrier.flatten(1).sum(-1) if carrier.dim() > 1 else carrier for carrier in carriers)
    if isinstance(given, RankedScores):
        whole = torch.zeros_like(given.target).index_add(0, given.group, carriers[0])
    return found.detach() + rows * torch.as_tensor(whole)


def _aggregated(module: Any, mask: Tensor) -> tuple[Tensor, Tensor]:
    if not hasattr(module, "aggregation"):
        return mask.double(), mask.sum().double()
    weights, divisor = module.aggregation(mask)
    return weights, torch.as_tensor(divisor)


def _spread(module: Any, given: Any, values: Tensor) -> Tensor:
    """Convert the mean of each row to values of its tokens, for families with token losses."""
    if not isinstance(given, PolicyLogprobs | TokenLogprobs):
        return values
    shares = []
    for row in range(len(values)):
        weights, divisor = _aggregated(module, given.completion_mask[row : row + 1])
        shares.append(divisor / weights.sum().clamp_min(1e-300))
    shared = (values * torch.stack(shares).to(values)).unsqueeze(-1)
    return _weighted(given, torch.where(given.completion_mask, shared, 0.0))


def _weighted(given: Any, values: Tensor) -> Tensor:
    """Multiply token losses of demonstrations by their row weights, as the family's losses do."""
    return values * given.weights.unsqueeze(-1) if isinstance(given, TokenLogprobs) else values


def _by_token(function: Callable[[Any], Tensor], given: CriticValues) -> Tensor:
    """Return the loss of each state, evaluated separately: the states of a critic are independent."""
    rows, places = given.completion_mask.nonzero(as_tuple=True)
    cells = [
        function(CriticValues(*(part[row : row + 1, place : place + 1] for part in given)))
        for row, place in zip(rows.tolist(), places.tolist(), strict=True)
    ]
    return torch.zeros_like(given.values).index_put((rows, places), torch.stack(cells))


def rows_of(given: Any) -> int:
    """Return the number of pairs, completions, groups or tokens of an input."""
    return len(given.target) if isinstance(given, RankedScores) else len(next(iter(given)))


def some_rows_of(given: Any, rows: list[int]) -> Any:
    """Select rows of an input, in order, and renumber the groups."""
    count, index = rows_of(given), torch.tensor(rows)
    fields: dict[str, Any] = {}
    if isinstance(given, RankedScores):
        members = torch.isin(given.group, index).nonzero().squeeze(-1)
        fields = {name: getattr(given, name)[members] for name in ("scores", "ranks")}
        fields["group"] = torch.unique(given.group[members], return_inverse=True)[1]
    for name, part in given._asdict().items():
        if isinstance(part, Tensor) and part.dim() and len(part) == count and name not in fields:
            fields[name] = part[index]
    if hasattr(given, "extras"):
        fields["extras"] = {name: part[index] for name, part in given.extras.items()}
    if isinstance(given, PolicyLogprobs):
        fields.update(rollout=None, minibatch=None)
    return given._replace(**fields)


# -- checks of adapters -----------------------------------------------------------------------------------------------


def foreign_checks(subject: Subject) -> list[Check]:
    """Check that a mean is the mean over its rows, and that an adapter equals the shipped class it is compared with."""
    adapter: Any = subject.kind.adapter  # type: ignore[attr-defined]
    module = subject.fresh(moved=True)
    shipped = None
    if adapter.compared:
        shipped = Subject(adapter.base, subject.world, subject.folder, subject.settings).fresh(moved=True)
    if adapter.given is Rollout:
        return [] if shipped is None else [advantages_check(subject, shipped, adapter)]
    given = value_input(subject) if adapter.given is CriticValues else probe_input(subject, module)
    if not isinstance(given, adapter.given):
        return []
    checks, point = [], adapter.point

    def called(one: Any) -> Tensor:
        return subject.kind.called(module, one)  # type: ignore[attr-defined]

    coupled = subject.kind.batch_coupled
    if not isinstance(given, CriticValues) and not coupled and called(given).dim() == 0:
        checks.append(reduction_check(called, module, given))
    if shipped is None:
        return checks

    def residual(one: Any) -> tuple[float, Tensor, Tensor]:
        theirs = _with_slopes(lambda x: by_row(called, module, x), one)
        ours = _with_slopes(lambda x: as_loss(getattr(shipped, point)(x)).values, one)
        if coupled:
            theirs[0], ours[0] = theirs[0].mean(), ours[0].mean()
        if isinstance(given, PolicyLogprobs):  # estimators of one gradient may differ in value
            theirs, ours = theirs[1:], ours[1:]
        scale = max(float(ours[0].abs().max()), 1.0)
        worst = max(float((a - b).abs().max()) / scale for a, b in zip(theirs, ours, strict=True))
        return worst, theirs[0], ours[0]

    few = some_rows_of(given, list(range(min(rows_of(given), FEW))))  # each row is evaluated separately
    worst = residual(few)[0]
    said = "" if worst <= SAME else smallest_input(few, residual)
    return [*checks, at_most("as shipped", worst, SAME, f"it is not {adapter.base.__name__}: {said}")]


def reduction_check(called: Callable[[Any], Tensor], module: Any, given: Any) -> Check:
    """Check that the loss of a batch is the mean over its rows, under the family's aggregation."""
    few = some_rows_of(given, list(range(min(rows_of(given), FEW))))
    if isinstance(few, TokenLogprobs):
        few = few._replace(weights=torch.ones_like(few.weights))
    values = by_row(called, module, few)
    expected = values.mean()
    if isinstance(given, PolicyLogprobs | TokenLogprobs):
        weights, divisor = _aggregated(module, few.completion_mask)
        expected = (values * weights).sum() / divisor
    advice = "the loss of a batch must be the mean of its rows' losses, over rows or tokens as the aggregation says"
    return at_most("reduction", (called(few) - expected).abs().detach(), SAME, advice)


def advantages_check(subject: Subject, shipped: Any, adapter: Any) -> Check:
    """Check that an advantage estimator equals that of the shipped class."""
    case = Case(subject, subject.module)
    rollout, mask = case.rollout, case.rollout.completion_mask
    rewards = shipped.shape_rewards(rollout).detach()
    theirs, ours = (one.advantages(rollout, rewards).advantages for one in (case.module, shipped))
    residual = torch.where(mask, theirs - ours, 0.0).abs()
    worst = int(residual.max(-1).values.argmax())
    group = (rollout.group == rollout.group[worst]).nonzero().squeeze(-1)
    advice = (
        f"it is not {adapter.base.__name__}: at scores {_short(rollout.scores[group])} it gives "
        f"{_short(theirs[worst][mask[worst]])}, and the shipped class {_short(ours[worst][mask[worst]])}"
    )
    return at_most("as shipped", residual.max(), SAME, advice)


def _with_slopes(function: Callable[[Any], Tensor], given: Any) -> list[Tensor]:
    """Return the row values and the gradients of a loss at an input, zero where masked."""
    values, slopes = masked_slopes(function, given, LEAVES[type(given)])
    return [values.flatten(1).sum(-1) if values.dim() > 1 else values, *slopes.values()]


def smallest_input(given: Any, residual: Callable[[Any], tuple[float, Tensor, Tensor]]) -> str:
    """Return the smallest input at which two losses differ, as text: one row, few tokens, short numbers."""

    def differs(one: Any) -> bool:
        try:
            return residual(one)[0] > 1e-6
        except (RuntimeError, IndexError, ValueError):
            return False

    alone = [some_rows_of(given, [row]) for row in range(rows_of(given))]
    found = next((one for one in alone if differs(one)), given)
    for rounded in ("tokens", 1, 0):
        smaller = _without_last_token(found) if rounded == "tokens" else _rounded(found, int(rounded))
        if smaller is not None and differs(smaller):
            found = smaller
    _, theirs, ours = residual(found)
    names = [name for name in found._fields if name not in ("weights", "rollout", "minibatch", "extras")]
    parts = [f"{name} {_short(getattr(found, name))}" for name in names if isinstance(getattr(found, name), Tensor)]
    return f"at {', '.join(parts)} it gives {_short(theirs)}, and the shipped class {_short(ours)}"


def _without_last_token(given: Any) -> Any:
    grids = {n: p for n, p in given._asdict().items() if isinstance(p, Tensor) and p.dim() == 2}
    if not grids or min(p.shape[1] for p in grids.values()) < 2:
        return None
    return given._replace(**{name: part[:, :1] for name, part in grids.items()})


def _rounded(given: Any, digits: int) -> Any:
    return given._replace(
        **{
            n: p.round(decimals=digits)
            for n, p in given._asdict().items()
            if isinstance(p, Tensor) and p.is_floating_point()
        }
    )


def _short(values: Tensor) -> str:
    return str([round(float(value), 6) for value in values.detach().flatten().tolist()])
