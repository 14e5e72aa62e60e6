"""Combine the parts of a judgement into one score: weights, conditions, normalization and constraints.

With parts p_k, weights w_k, costs c_j and multipliers lambda_j, the score of a completion is

    (sum_k w_k p_k - sum_j lambda_j c_j) / (1 + sum_j lambda_j).

Without weights the first sum is the scorer's own score. If constraints are set, or if the scorer's own score is
normalized, the first sum is logged as ``rollout/score_objective``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from rlhf_lightning.errors import ContractError, DataError, SettingError
from rlhf_lightning.functional.policy_gradient import (
    constrained_scores,
    lagrange_multiplier,
    pid_multiplier,
    standardised_in_groups,
)
from rlhf_lightning.loading import check_ranges, refuse_contradictions
from rlhf_lightning.scoring.scorer import Judgements
from rlhf_lightning.similar_names import hint_at
from rlhf_lightning.training.meter import moments_over_ranks

OBJECTIVE = "objective"
"""Name of the part that holds the score before costs are subtracted."""

Normalization = Literal["sum_then_group", "group_then_sum", "batch"]
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
CONDITION = re.compile(r"^(.+?)\s*(>=|<=|>|<)\s*(\S+)$")


@dataclass
class PartSettings:
    """How the parts of a judgement are combined into its score.

    Args:
        weights: weight of each part by name: a number, or the name of a data column with a number for each row. Parts
            without a weight are logged and not trained on. null keeps the scorer's own score.
        conditions: condition under which a part counts, by part name, such as {short: "correct >= 1"}; otherwise the
            part is 0.
        normalize: order of summing and standardising. "sum_then_group" sums the parts, and the objective's own baseline
            and scale follow. "group_then_sum" standardises each part within its prompt's completions, sums, and
            standardises the sums over the rollout (GDPO, 2601.05242). "batch" standardises each part over the rollout,
            then sums.
        epsilon: added to each standard deviation.
    """

    weights: dict[str, Any] | None = None
    conditions: dict[str, str] | None = None
    normalize: Normalization = "sum_then_group"
    epsilon: float = 1e-4

    ranges: ClassVar[Mapping[str, str]] = {"epsilon": "(0, inf)"}


@dataclass
class Constraint:
    """Limit on the mean of a part that is a cost: E[cost] <= limit.

    After each training rollout the multiplier is updated from the excess e = mean cost over all ranks - limit.
    "lagrangian": log lambda += learning_rate * e (Dai et al., 2310.12773). "pid": lambda = max(0, proportional * e + I
    + derivative * max(0, rise of the cost)), I = max(0, I + learning_rate * e) (Stooke et al., 2007.03964).

    Args:
        limit: largest mean cost, in the scorer's units.
        method: update rule of the multiplier, "lagrangian" or "pid".
        multiplier: initial value of the multiplier.
        learning_rate: step of log lambda, or the integral gain of "pid"; 0 keeps the multiplier.
        proportional: gain of the excess, for "pid".
        derivative: gain of the cost's rise since the last rollout, for "pid".
        max_multiplier: upper bound of the multiplier; in "lagrangian" 1 / max_multiplier is its lower bound.
    """

    limit: float
    method: Literal["lagrangian", "pid"] = "lagrangian"
    multiplier: float = 1.0
    learning_rate: float = 0.1
    proportional: float = 0.0
    derivative: float = 0.0
    max_multiplier: float = 1000.0

    ranges: ClassVar[Mapping[str, str]] = {
        "limit": "(-inf, inf)", "multiplier": "[0, inf)", "learning_rate": "[0, inf)", "proportional": "[0, inf)",
        "derivative": "[0, inf)", "max_multiplier": "(0, inf)",
    }  # fmt: skip


@dataclass
class Multiplier:
    """Current multiplier of a constraint."""

    constraint: Constraint
    value: float = field(init=False)
    integral: float = field(init=False)
    last_cost: float | None = None

    def __post_init__(self) -> None:
        self.value = self.integral = float(self.constraint.multiplier)

    def move(self, cost: float) -> None:
        """Update from the mean cost of a training rollout; a non-finite mean changes nothing."""
        if not math.isfinite(cost):
            return
        one, rise = self.constraint, 0.0 if self.last_cost is None else cost - self.last_cost
        if one.method == "lagrangian":
            self.value = lagrange_multiplier(self.value, cost - one.limit, one.learning_rate, one.max_multiplier)
        else:
            gains = (one.proportional, one.learning_rate, one.derivative)
            excess = cost - one.limit
            self.value, self.integral = pid_multiplier(self.integral, excess, rise, *gains, one.max_multiplier)
        self.last_cost = cost

    def state_dict(self) -> dict[str, float | None]:
        """Return the state that later multipliers depend on."""
        return {"value": self.value, "integral": self.integral, "last_cost": self.last_cost}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Restore the state."""
        vars(self).update(state)


Term = tuple[Tensor, Tensor | float]
"""A part of the score and its weight; both have shape (episodes,), or the weight is a number."""


class ScoreRule:
    """Compute the score of a judgement from its parts.

    Args:
        settings: weights, conditions and normalization; None keeps the scorer's own score.
        constraints: for each part its `Constraint`, the settings of a `Constraint`, or only its limit.

    Raises:
        SettingError: a setting is unknown, out of range, or contradicts another.
    """

    def __init__(self, settings: Any = None, constraints: Mapping[str, Any] | None = None) -> None:
        self.settings: PartSettings = _made(PartSettings, settings or {}, "parts")
        if self.settings.normalize not in ("sum_then_group", "group_then_sum", "batch"):
            raise SettingError(
                "unknown-choice",
                f"parts.normalize is {self.settings.normalize!r}; choose 'sum_then_group', 'group_then_sum' or 'batch'",
            )
        self.conditions = {name: _condition(name, text) for name, text in (self.settings.conditions or {}).items()}
        self.multipliers = {name: Multiplier(_constraint(name, one)) for name, one in (constraints or {}).items()}
        refuse_contradictions(self._contradictions())

    def _contradictions(self) -> dict[str, tuple[bool, str]]:
        weighed, costs = set(self.settings.weights or ()), set(self.multipliers)
        loose, twice = sorted(set(self.conditions) - weighed - costs), sorted(weighed & costs)
        return {
            "nothing-weighed": (
                self.settings.weights is not None and not weighed,
                "parts.weights is empty: name a part, or leave it out",
            ),
            "conditions-without-weights": (
                bool(loose),
                f"parts.conditions names {', '.join(loose)}, which has no weight or constraint: set parts.weights",
            ),
            "weighed-cost": (bool(twice), f"{', '.join(twice)} has a weight and a constraint: keep one"),
        }

    @property
    def is_plain(self) -> bool:
        """Whether the score is the scorer's own score."""
        return not (self.settings.weights or self.multipliers)

    @property
    def rescales(self) -> bool:
        """Whether parts count in other units than their own, which rewards of single tokens keep."""
        weights = (self.settings.weights or {}).values()
        return bool(self.multipliers or self.conditions) or self.normalizes or any(weight != 1 for weight in weights)

    @property
    def normalizes(self) -> bool:
        """Whether scores are recomputed from normalized parts once the whole rollout is known."""
        return self.settings.normalize != "sum_then_group"

    @property
    def in_groups(self) -> bool:
        """Whether parts are standardised within groups."""
        return self.settings.normalize == "group_then_sum"

    def judged(self, judged: Judgements, columns: Mapping[str, Sequence[Any]]) -> Judgements:
        """Return the judgements with scores computed from their parts.

        Weights that name a data column are read from ``columns``.

        Raises:
            ContractError: a part is missing.
            DataError: the column of a weight is missing.
        """
        if self.is_plain:
            return judged
        objective = _total(self._objective(judged.scores, judged.parts, columns))
        if not self.multipliers:
            return judged._replace(scores=objective)
        scores = constrained_scores(objective, *self._costs(judged.parts))
        return judged._replace(scores=scores, parts=with_objective(judged.parts, objective))

    def normalized(
        self,
        scores: Tensor,
        parts: Mapping[str, Tensor],
        columns: Mapping[str, Sequence[Any]],
        group: Tensor,
        strategy: Strategy,
    ) -> Tensor:
        """Return scores from parts standardised over groups or over the rollout, shape (episodes,).

        Without weights, the part ``objective`` (else ``scores``) is standardised. ``strategy`` sums over all ranks.
        """

        def standardised(values: Tensor) -> Tensor:
            if self.in_groups:
                return standardised_in_groups(values, group, self.settings.epsilon)
            return self.standardised(values, strategy)

        own = parts.get(OBJECTIVE, scores)
        terms = [(standardised(values), weight) for values, weight in self._objective(own, parts, columns)]
        costs, multipliers = self._costs(parts)
        return constrained_scores(_total(terms), [standardised(one) for one in costs], multipliers)

    def standardised(self, values: Tensor, strategy: Strategy) -> Tensor:
        """Return values minus their mean over all ranks, divided by the standard deviation; NaN values stay NaN."""
        known, exact = ~values.isnan(), values.double()  # in float32, sums over ranks would round differently
        count = strategy.reduce(known.sum().double(), reduce_op="sum")
        mean, variance = moments_over_ranks(strategy, torch.nan_to_num(exact), known)
        deviation = (variance * count / (count - 1).clamp_min(1)).sqrt()
        return ((exact - mean) / (deviation + self.settings.epsilon)).to(values)

    def learned(self, parts: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the parts that the score is computed from."""
        return [parts[name] for name in (*(self.settings.weights or ()), *self.multipliers) if name in parts]

    def _objective(self, own: Tensor, parts: Mapping[str, Tensor], columns: Mapping[str, Sequence[Any]]) -> list[Term]:
        """Return the weighted parts; without weights, the scorer's own score."""
        if self.settings.weights is None:
            return [(own, 1.0)]
        weights = self.settings.weights.items()
        return [(self._part(name, parts), _weight(name, weight, columns, own)) for name, weight in weights]

    def _costs(self, parts: Mapping[str, Tensor]) -> tuple[list[Tensor], list[float]]:
        return [self._part(name, parts) for name in self.multipliers], [one.value for one in self.multipliers.values()]

    def _part(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Return a part: 0 if its condition is false, NaN if the part in its condition is unknown."""
        values = _known(name, parts)
        if name not in self.conditions:
            return values
        other, compare, bound = self.conditions[name]
        given = _known(other, parts)
        counts: Tensor = compare(given, bound)
        return torch.where(given.isnan(), given, torch.where(counts, values, 0.0))

    # -- state --------------------------------------------------------------------------------------------------------

    def on_rollout_end(self, means: Mapping[str, float]) -> None:
        """Update the multipliers from the mean costs of a training rollout, which are equal on all ranks."""
        for name, multiplier in self.multipliers.items():
            multiplier.move(means.get(f"score_{name}", math.nan))

    def metrics(self) -> dict[str, float]:
        """Return the multipliers that the rollout was scored with."""
        return {f"multiplier_{name}": one.value for name, one in self.multipliers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the multipliers."""
        return {name: one.state_dict() for name, one in self.multipliers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the multipliers of constraints that are still set."""
        for name in set(state) & set(self.multipliers):
            self.multipliers[name].load_state_dict(state[name])


def with_objective(parts: Mapping[str, Tensor], score: Tensor) -> dict[str, Tensor]:
    """Return the parts plus ``objective``: the score before costs are subtracted or scores are normalized.

    Raises:
        ContractError: ``reserved-part``.
    """
    if OBJECTIVE in parts:
        raise ContractError("reserved-part", f"a part is named {OBJECTIVE!r}, the name of the score itself: rename it")
    return {**parts, OBJECTIVE: score}


def _total(terms: Sequence[Term]) -> Tensor:
    first, *rest = (weight * values for values, weight in terms)
    return sum(rest, first)


def _known(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    if name not in parts:
        raise ContractError(
            "unknown-part",
            f"the scorer's judgements have no part {name!r}; they have {', '.join(sorted(parts)) or 'none'}",
        )
    return parts[name]


def _weight(name: str, weight: Any, columns: Mapping[str, Sequence[Any]], like: Tensor) -> Tensor | float:
    """Return a part's weight: a number, or the values of a data column."""
    if isinstance(weight, str):
        if weight not in columns:
            found = ", ".join(columns) or "none"
            raise DataError(
                "missing-data-column",
                f"parts.weights.{name} names the data column {weight!r}, which is missing (further columns: {found})",
            )
        try:
            values = torch.tensor([float(value) for value in columns[weight]], dtype=like.dtype, device=like.device)
        except (TypeError, ValueError):
            values = torch.tensor([math.nan])
        if not bool(values.isfinite().all()):
            raise DataError(
                "not-a-number", f"the data column {weight!r}, used as weight, has a value that is not a number"
            )
        return values
    return float(weight)


def _made(kind: Any, given: Any, where: str) -> Any:
    """Return a settings object from a mapping, checked."""
    if isinstance(given, Mapping):
        names = list(kind.__dataclass_fields__)
        for name in given:
            if name not in names:
                raise SettingError("unknown-name", f"{where} has no setting {name!r}; {hint_at(str(name), names)}")
        if "limit" in names and "limit" not in given:
            raise SettingError("wrong-arguments", f"{where} has no limit: set {where}.limit to the largest mean cost")
        given = kind(**given)
    if not isinstance(given, kind):
        raise SettingError("wrong-arguments", f"{where} is {given!r}; it must be a mapping of settings")
    for name in kind.ranges:
        if not _is_number(value := getattr(given, name)):
            raise SettingError("not-a-number", f"{where}.{name} is {value!r}; it must be a number")
    check_ranges(kind, vars(given))
    if isinstance(given, PartSettings):
        for name, weight in (given.weights or {}).items():
            if not (isinstance(weight, str) or (_is_number(weight) and abs(weight) < math.inf)):
                raise SettingError(
                    "not-a-number", f"{where}.weights.{name} is {weight!r}; give a number or a data column's name"
                )
    return given


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _constraint(name: str, given: Any) -> Constraint:
    made: Constraint = _made(Constraint, {"limit": given} if _is_number(given) else given, f"constraints.{name}")
    refuse_contradictions(
        {
            "unknown-choice": (
                made.method not in ("lagrangian", "pid"),
                f"constraints.{name}.method is {made.method!r}; choose 'lagrangian' or 'pid'",
            ),
            "gains-without-pid": (
                made.method == "lagrangian" and bool(made.proportional or made.derivative),
                f"constraints.{name} sets proportional or derivative, gains of the method 'pid': set method pid",
            ),
            "multiplier-of-zero": (
                made.method == "lagrangian" and not made.multiplier,
                f"constraints.{name}.multiplier is 0, and multiplicative updates never change 0: set a positive number",
            ),
        }
    )
    return made


def _condition(name: str, text: Any) -> tuple[str, Any, float]:
    """Return the part, the comparison and the bound of a condition such as "correct >= 1"."""
    found = CONDITION.match(text) if isinstance(text, str) else None
    try:
        return (found[1], COMPARISONS[found[2]], float(found[3])) if found else (name, None, float("nope"))
    except ValueError:
        raise SettingError(
            "unknown-condition",
            f"parts.conditions.{name} is {text!r}; write a part, a comparison and a number, such as 'correct >= 1'",
        ) from None
