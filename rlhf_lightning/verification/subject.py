"""The class under verification: new, unmodified instances in a small world, in fp64."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.errors import ContractError, SettingError
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.similar_names import hint_at
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.training.user_classes import own_bases
from rlhf_lightning.types import (
    DistillationLogits,
    PolicyLogprobs,
    PreferenceLogprobs,
    ProcessScores,
    RankedScores,
    TokenLogprobs,
    UnpairedLogprobs,
)
from rlhf_lightning.verification.convergence import descend, expected_loss, prepare
from rlhf_lightning.verification.targets import policy_of
from rlhf_lightning.verification.world import EnumerableWorld

SMALL_WORLD_SETTINGS: dict[str, Any] = {
    "kl_coef": 0.5,
    "max_new_tokens": 2,
    "missing_eos_score": None,
    "keep": 1.0,
    "lam": 1.0,
    "dynamic_sampling": False,
    "cache_reference": False,
    "context": "p1",
    "place": "system",
}
"""Default settings in the small world: with the defaults of large models, training would not reach the optimum."""

LEAST_BETA = 0.5


class Check(NamedTuple):
    """One line of the table.

    Attributes:
        name: name of the check.
        measured: measured value.
        bound: upper bound of the value, or lower bound if ``least``.
        held: whether the value is within the bound.
        advice: what to look at if it is not.
        least: whether the bound is a lower bound.
        meant: reason that the class gives for failing; empty for none.
        power: value that a check of random samples would measure in the presence of its mistake; None for exact checks.
    """

    name: str
    measured: float
    bound: float
    held: bool
    advice: str
    least: bool = False
    meant: str = ""
    power: float | None = None


def at_most(name: str, measured: Tensor | float, bound: float, advice: str, power: float | None = None) -> Check:
    """Return a check with an upper bound; NaN fails."""
    value = float(measured)
    return Check(name, value, bound, value <= bound, advice, power=power)


def at_least(name: str, measured: Tensor | float, bound: float, advice: str) -> Check:
    """Return a check with a lower bound; NaN fails."""
    value = float(measured)
    return Check(name, value, bound, value >= bound, advice, least=True)


class Subject:
    """The class under verification, with its settings and helpers for the checks.

    Args:
        kind: the class.
        world: world in which it is verified.
        folder: folder of the world's policy, see ``EnumerableWorld.write``.
        settings: arguments of the class.
    """

    def __init__(
        self, kind: type[AlignmentModule], world: EnumerableWorld, folder: str, settings: dict[str, Any] | None = None
    ) -> None:
        self.kind, self.world, self.folder = kind, world, folder
        self.settings = self._accepted(dict(settings or {}))
        self.notes: list[str] = []  # remarks that fail no check

    def _accepted(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the given settings plus the small world's defaults, without the defaults that the class sets itself.

        Raises:
            SettingError: a required setting is missing, or a given setting is unknown or set by the class itself.
        """
        module, settings = self._made(self.kind, {**self._defaults(), **given}, given)
        self.outputs = getattr(module, "outputs", 1)
        return settings

    def _made(self, kind: Any, settings: dict[str, Any], given: Collection[str] = ()) -> tuple[Any, dict[str, Any]]:
        """Return an instance of a class, and the settings without those that the class sets itself."""
        while True:
            try:
                return kind(init_from=self.folder, **settings), settings
            except TypeError as error:
                missing = re.search(r"missing \d+ required .*arguments?: (.+)", str(error))
                if missing is not None:
                    raise SettingError(
                        "missing-setting", f"{kind.__name__} needs {missing[1]}: give each as --model.NAME VALUE"
                    ) from error
                unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
                if unknown is not None and unknown[1] in given:
                    hint = hint_at(unknown[1], all_parameters(kind) - {"self", "args", "kwargs"})
                    raise SettingError(
                        "unknown-setting", f"{kind.__name__} has no setting {unknown[1]!r}; {hint}"
                    ) from error
                fixed = re.search(r"multiple values for keyword argument '(\w+)'", str(error))
                if fixed is None or fixed[1] not in settings:
                    raise
                if fixed[1] in given:
                    raise SettingError(
                        "class-sets-it", f"{kind.__name__} sets {fixed[1]} itself: do not give it"
                    ) from error
                del settings[fixed[1]]

    def settings_for(self, other: type[AlignmentModule]) -> dict[str, Any]:
        """Return this subject's settings, including defaults of the class, that another class accepts."""
        effective = {**self.kind(init_from=self.folder, **self.settings).hparams, **self.settings}
        known = all_parameters(other) - {"init_from"}
        return self._made(other, {name: value for name, value in effective.items() if name in known})[1]

    @property
    def known(self) -> set[str]:
        """Names of all settings of the class and its bases."""
        return all_parameters(self.kind)

    @property
    def integers_at_one(self) -> dict[str, int]:
        """The class's own integer settings above 1, with the value 1."""
        own = {name: one.default for base in own_bases(self.kind) for name, one in parameters_of(base).items()}
        return {name: 1 for name, default in own.items() if type(default) is int and default > 1}

    def _defaults(self) -> dict[str, Any]:
        known, own = self.known, own_bases(self.kind)
        shipped = {name for base in self.kind.__mro__[len(own) :] for name in parameters_of(base)}
        chosen = {name: value for name, value in SMALL_WORLD_SETTINGS.items() if name in shipped}
        stated = self.kind.target_of or any("target_policy" in vars(base) for base in own)
        free = any("kl_coef" in parameters_of(base) and parameters_of(base)["kl_coef"].default == 0 for base in own)
        if free and not stated:
            chosen.pop("kl_coef", None)  # the class has no KL penalty, and declares no target with one
        if "teacher" in known:
            chosen["teacher"] = self.world.write_teacher(Path(self.folder).with_name("teacher"))
            chosen.pop("kl_coef", None)  # the teacher replaces the reference, and there is no KL penalty
        elif "scorer" in known:
            chosen["scorer"] = self.world.judge
            chosen["temperature"] = 1.0  # enumerated problems assume temperature 1
        if "soft_labels" in known:  # hard labels have no optimum, and pairs have no KL reward
            chosen["soft_labels"] = True
            chosen.pop("kl_coef", None)
        beta = next((parameters_of(base)["beta"] for base in self.kind.__mro__ if "beta" in parameters_of(base)), None)
        if beta is not None and isinstance(beta.default, float) and beta.default < LEAST_BETA:
            chosen["beta"] = LEAST_BETA
        return chosen

    def fresh(self, moved: bool = False, **changes: Any) -> Any:
        """Return a new instance with its models loaded, in fp64.

        Args:
            moved: move the policy away from its reference by a fixed random step; invariants then only warn.
            changes: settings to change.
        """
        module: Any = prepare(self.kind(init_from=self.start, **{**self.settings, **changes}))
        if moved:
            if hasattr(module, "invariants"):
                module.invariants.on_violation = "warn"
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.requires_grad:
                        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                        parameter.add_(0.3 * noise.to(parameter))
        return module

    @cached_property
    def start(self) -> str:
        """Folder that instances start from: the policy, or a reward model with all scores 0.

        A new head on the policy would put the huge logits of impossible tokens into every score. They cancel in
        differences, but leave no significant digits in single precision.
        """
        if not issubclass(self.kind, RewardModule):
            return self.folder
        folder = Path(self.folder).with_name(f"untaught_{self.outputs}")
        return self.world.write_reward_model(folder, torch.zeros_like(self.world.rewards), self.outputs)

    @cached_property
    def module(self) -> Any:
        """Shared instance whose policy has moved away from its reference; must not be trained."""
        return self.fresh(moved=True)

    @cached_property
    def overridden(self) -> str:
        """Name of the family's override point."""
        return point_of(self.kind)

    def seen(self, module: Any, run: Callable[[], Any]) -> Any:
        """Return the first input of the override point while ``run`` runs; None if it was not called."""
        found: list[Any] = []
        original = getattr(module, self.overridden)

        @wraps(original)
        def listening(given: Any) -> Any:
            found.append(given)
            return original(given)

        setattr(module, self.overridden, listening)
        try:
            run()
        finally:
            vars(module).pop(self.overridden, None)
        return found[0] if found else None

    def values(self, module: Any, given: Any) -> Tensor:
        """Return the losses of the override point for an input."""
        return as_loss(getattr(module, self.overridden)(without_leaves(given))).values

    def gradients(self, module: Any, run: Callable[[], Tensor]) -> Tensor:
        """Return the gradient of a loss with respect to all trained weights, flattened."""
        module.zero_grad()
        run().backward()
        parts = [p.grad.flatten() for p in module.parameters() if p.requires_grad and p.grad is not None]
        return torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float64)

    def short_run(self, shuffled: bool, steps: int = 25, learning_rate: float = 0.02) -> float:
        """Return the expected reward after a few updates on exact expectations."""
        module = self.fresh()
        parameters = [p for p in module.parameters() if p.requires_grad]
        descend(expected_loss(module, self.world, shuffled), parameters, steps, learning_rate)
        return self.world.expected_reward(policy_of(module, self.world))


def without_leaves(given: Any) -> Any:
    """Return an input whose differentiated fields may be overwritten in place, as after a forward pass."""
    leaves = {name: part for name, part in given._asdict().items() if isinstance(part, Tensor) and part.requires_grad}
    return given._replace(**{name: part.clone() for name, part in leaves.items() if part.is_leaf})


ENTROPY, SUM = "the policy's entropy", "the sum of the policy's log-probabilities of all tokens"
WANTED = {
    "KL(policy || reference)": 1,
    "KL(reference || policy)": 1,
    ENTROPY: -1,
    "the policy's mean log-probability of all tokens": -1,
    SUM: -1,
}
"""Known statistics of tokens, and the sign with which a token loss should depend on them."""


def known_statistics(module: Any) -> dict[str, tuple[str, int]]:
    """Return the class's token statistics that are known divergences or entropies: description and sign by name."""
    if type(module).token_statistics is AlignmentModule.token_statistics:
        return {}
    own, theirs = torch.randn(2, 20, 9, generator=torch.Generator().manual_seed(23), dtype=torch.float64)
    try:
        found = module.token_statistics(own, theirs, torch.arange(20) % 9)
    except Exception:  # the statistic needs more than logits
        return {}
    p, r = own.log_softmax(-1), theirs.log_softmax(-1)
    parts = (p.exp() * (p - r), r.exp() * (r - p), -p.exp() * p, p / p.shape[-1], p)
    known = {**dict(zip(WANTED, parts, strict=True)), "the reference's entropy": -r.exp() * r}
    return {
        name: (words, sign)
        for name, values in found.items()
        for words, part in known.items()
        for sign in (1, -1)
        if values.shape == p.shape[:1] and float((values - sign * part.sum(-1)).abs().max()) < 1e-9
    }


OVERRIDE_POINTS = (
    "preference_loss", "unpaired_loss", "process_loss", "ranking_loss", "token_loss", "policy_loss",
    "distillation_loss",
)  # fmt: skip
DIFFERENTIATED: dict[type, Sequence[str]] = {
    PreferenceLogprobs: ("policy_chosen_logprobs", "policy_rejected_logprobs"),
    UnpairedLogprobs: ("policy_logprobs",),
    RankedScores: ("scores",),
    ProcessScores: ("scores",),
    TokenLogprobs: ("logprobs",),
    PolicyLogprobs: ("logprobs",),
    DistillationLogits: ("student_logits",),
}
"""Fields of each override point's input that carry gradient."""


def with_leaves(given: Any) -> tuple[Any, list[Tensor]]:
    """Return an override point's input with new leaf tensors in the fields that carry gradient, and these leaves."""
    plain: dict[str, Any] = {name: part.detach() for name, part in given._asdict().items() if isinstance(part, Tensor)}
    if hasattr(given, "extras"):
        plain["extras"] = {name: values.detach() for name, values in given.extras.items()}
    given = given._replace(**plain)
    if has_outputs(given):
        leaves = [given.extras["outputs"].clone().requires_grad_()]
    else:
        leaves = [getattr(given, name).clone().requires_grad_() for name in differentiated(given)]
    return with_parts(given, leaves), leaves


def differentiate(
    losses: Callable[[Any], Tensor], given: Any, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return losses, and the gradient of their sum by some fields of an input; 0 where no gradient flows."""
    named = [name for name in names if getattr(given, name, None) is not None]
    leaves = {name: getattr(given, name).detach().clone().requires_grad_() for name in named}
    values = losses(given._replace(**leaves))
    asked = list(leaves.values())
    found = torch.autograd.grad(values.sum(), asked, allow_unused=True) if values.requires_grad else [None] * len(asked)
    slopes = {
        name: torch.zeros_like(leaf) if slope is None else slope
        for (name, leaf), slope in zip(leaves.items(), found, strict=True)
    }
    return values.detach(), slopes


def has_outputs(given: Any) -> bool:
    """Return whether the scores of a loss are computed from several outputs of a head."""
    return isinstance(given, RankedScores) and "outputs" in given.extras


def with_parts(given: Any, parts: Sequence[Tensor], module: Any = None) -> Any:
    """Return an override point's input with new values in the fields that carry gradient."""
    if has_outputs(given):
        scores = given.scores if module is None else module.score_of(parts[0])
        return given._replace(scores=scores, extras={**given.extras, "outputs": parts[0]})
    return given._replace(**dict(zip(differentiated(given), parts, strict=True)))


def differentiated(given: Any) -> Sequence[str]:
    """Return the fields of an override point's input that carry gradient; subclasses use the fields of their base.

    Raises:
        ContractError: the input belongs to no known family.
    """
    names = next((names for kind, names in DIFFERENTIATED.items() if isinstance(given, kind)), None)
    if names is None:
        known = ", ".join(kind.__name__ for kind in DIFFERENTIATED)
        raise ContractError(
            "unknown-input",
            f"the override point gets a {type(given).__name__}, but checks exist only for {known}: derive it from "
            "one of those, or declare its own checks as contract",
        )
    return names


def field_function(subject: Subject, module: Any, given: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return the override point as a function of its differentiated fields, and the values of these fields."""
    prepared, leaves = with_leaves(given)

    def function(*parts: Tensor) -> Tensor:
        return subject.values(module, with_parts(prepared, parts, module))

    return partial(function), leaves


def point_of(kind: type) -> str:
    """Return the name of a class's override point; empty if it has none."""
    return next((name for name in OVERRIDE_POINTS if hasattr(kind, name)), "")


def parameters_of(kind: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class's own ``__init__``; empty if it is inherited."""
    if "__init__" not in vars(kind):
        return {}
    return dict(inspect.signature(vars(kind)["__init__"]).parameters)


def all_parameters(kind: type) -> set[str]:
    """Return the names of the settings of a class and its bases."""
    return {name for base in kind.__mro__ for name in parameters_of(base)}
