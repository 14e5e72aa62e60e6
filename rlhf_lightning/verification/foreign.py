"""Losses of other projects, or any function of tensors, through the contract of the family that they belong to.

An adapter is a function in any file. The type of its first argument names the family; the other arguments are settings,
each with a default. It returns one loss per row (pairs, completions, groups) or per token, or their mean::

    @compared_with(DPOModule)
    def DPO(pairs: PreferenceLogprobs, beta: float = 0.1) -> Tensor:
        return their_package.dpo_loss(pairs.chosen_sequence_logprobs, ..., beta)

``rlhf verify --foreign my_adapter.py:DPO --beta 0.3`` runs it in place of the family's own loss. A setting that the
family has too (``beta``, ``kl_coef``, ``clip`` ...) reaches both.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from rlhf_lightning.errors import MissingError, PackageError, SettingError
from rlhf_lightning.loading import import_path, import_user_module
from rlhf_lightning.modules.critic_free import CriticFreeModule
from rlhf_lightning.modules.distillation import GKDModule
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.modules.unpaired import KTOModule
from rlhf_lightning.training.module import AlignmentModule, as_loss
from rlhf_lightning.types import (
    Advantages,
    CriticValues,
    DistillationLogits,
    PolicyLogprobs,
    PreferenceLogprobs,
    RankedScores,
    Rollout,
    TokenLogprobs,
    UnpairedLogprobs,
)
from rlhf_lightning.verification.diagnosis import mask_of, probe_input, value_input
from rlhf_lightning.verification.on_policy_checks import Case
from rlhf_lightning.verification.subject import DIFFERENTIATED, Check, Subject, at_most

FAMILIES: dict[type, tuple[type[AlignmentModule], str]] = {
    PreferenceLogprobs: (DPOModule, "pair_loss"),
    UnpairedLogprobs: (KTOModule, "unpaired_loss"),
    RankedScores: (RewardModule, "ranking_loss"),
    TokenLogprobs: (SFTModule, "token_loss"),
    PolicyLogprobs: (CriticFreeModule, "policy_loss"),
    CriticValues: (PPOModule, "value_loss"),
    DistillationLogits: (GKDModule, "distillation_loss"),
    Rollout: (CriticFreeModule, "advantages"),
}
"""Family and override point of an adapter, by the type of its first argument."""

LEAVES: dict[type, Sequence[str]] = {**DIFFERENTIATED, CriticValues: ("values",)}
"""Fields that carry gradient."""

SAME = 1e-7
"""Largest difference of values and slopes of two losses that count as one."""

FEW = 16
"""Rows up to which a mean is split row by row; of more rows only the gradient is."""

SHIPPED_ADAPTERS = ("trl", "verl", "openrlhf")


class Adapter(NamedTuple):
    """A function of another project, and what it is compared with.

    Attributes:
        function: the adapter.
        given: type of its first argument.
        settings: its own settings; settings that the family has too are left out.
        base: shipped class whose loss it replaces.
        base_settings: settings of that class.
        compared: whether it should equal that class.
        title: name with the settings, for tables.
    """

    function: Callable[..., Tensor]
    given: type
    settings: dict[str, Any]
    base: type[AlignmentModule]
    base_settings: dict[str, Any]
    compared: bool
    title: str

    @property
    def point(self) -> str:
        """Name of the method that the function replaces; losses that couple pairs get all pairs at once."""
        coupled = self.given is PreferenceLogprobs and self.base.batch_coupled
        return "preference_loss" if coupled else FAMILIES[self.given][1]

    @property
    def left_out(self) -> set[str]:
        """Names of checks of settings that the function does not have."""
        if self.given is not PolicyLogprobs:
            return set()
        return {"sampler correction"} if self.compared else {"sampler correction", "clip"}


class RunsAs(NamedTuple):
    """A class whose rewards, advantages and aggregation an adapter takes, without being equal to it."""

    kind: type[AlignmentModule]
    settings: Mapping[str, Any] = {}


def compared_with(shipped: Any, by: str | None = None, **settings: Any) -> Callable[[Any], Any]:
    """Say which shipped class an adapter should equal.

    Args:
        shipped: the class, (class, settings), or `RunsAs` for a loss that no shipped class has; with ``by``, a mapping
            from that setting's values to those.
        by: name of the setting that decides.
        settings: settings of the class.
    """

    def remember(function: Any) -> Any:
        function.compared_with = (shipped, by, settings)
        return function

    return remember


def adapters(spec: str, given: Mapping[str, Any]) -> list[Adapter]:
    """Return the adapters that ``FILE:NAME`` names, or all of a file, with every value of settings that list theirs.

    Args:
        spec: ``trl:DPO``, ``my_adapter.py:DPO`` or a file alone; trl, verl and openrlhf are shipped.
        given: settings of the command line.

    Raises:
        MissingError: there is no such file.
        SettingError: the file has no such adapter, or a setting is unknown.
        PackageError: the package that a shipped adapter calls is not installed.
    """
    file, _, name = spec.partition(":")
    module = _module_of(file)
    public = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    functions = {key: value for key, value in public.items() if _input_of(value) in FAMILIES}
    if name and name not in functions:
        known = ", ".join(functions) or "none"
        raise SettingError("unknown-name", f"{file} has no adapter {name!r}; it has {known}")
    chosen = [functions[name]] if name else list(functions.values())
    return [adapter for function in chosen for adapter in _variants(function, dict(given), every=not name)]


def _module_of(file: str) -> Any:
    if file in SHIPPED_ADAPTERS:
        return _imported(f"rlhf_lightning.verification.foreign_{file}")
    if not Path(file).is_file():
        shipped = ", ".join(SHIPPED_ADAPTERS)
        raise MissingError("no-file", f"there is no file {file}: name a Python file with adapters, or one of {shipped}")
    return sys.modules[import_user_module(file)]


def _imported(name: str) -> Any:
    import_path(f"{name}.__name__", "module")
    return sys.modules[name]


def _input_of(function: Any) -> Any:
    names = list(inspect.signature(function).parameters)
    try:
        return get_type_hints(function).get(names[0]) if names else None
    except Exception as error:  # an annotation is any expression of the file
        reason = f"{type(error).__name__}: {error}"
        raise SettingError(
            "wrong-kind", f"the annotations of {function.__name__} cannot be read ({reason}): import what they name"
        ) from error


def _variants(function: Any, given: dict[str, Any], every: bool) -> Iterator[Adapter]:
    """Yield the adapter with the given settings; with ``every``, once for each value of a `Literal` setting."""
    parameters, hints = list(inspect.signature(function).parameters.values())[1:], get_type_hints(function)
    listed = [p.name for p in parameters if get_origin(hints.get(p.name)) is Literal and p.name not in given]
    values = get_args(hints[listed[0]]) if every and listed else (None,)
    for value in values:
        own = {**given, **({} if value is None else {listed[0]: value})}
        settings = {p.name: own.get(p.name, p.default) for p in parameters}
        base, base_settings, compared = _base(function, settings)
        shared = {p.name for p in parameters} & _settings_of(base)
        unknown = sorted(set(own) - settings.keys() - _settings_of(base))
        if unknown:
            raise SettingError("unknown-setting", f"{function.__name__} has no setting {unknown[0]!r}")
        words = [str(value) for value in own.values()]
        yield Adapter(
            function,
            _input_of(function),
            {name: setting for name, setting in settings.items() if name not in shared},
            base,
            {**base_settings, **{name: setting for name, setting in own.items() if name in _settings_of(base)}},
            compared,
            " ".join([function.__name__, *words]),
        )


def _settings_of(kind: type) -> set[str]:
    return {
        name
        for base in kind.__mro__
        if "__init__" in vars(base)
        for name in inspect.signature(vars(base)["__init__"]).parameters
    }


def _base(function: Any, settings: Mapping[str, Any]) -> tuple[type[AlignmentModule], dict[str, Any], bool]:
    """Return the class that an adapter runs in, its settings, and whether the adapter should equal it."""
    shipped, by, further = getattr(function, "compared_with", ({}, None, {}))
    if by is not None:
        shipped = shipped.get(settings[by])
    if not shipped:
        return FAMILIES[_input_of(function)][0], {}, False
    kind, own = shipped if isinstance(shipped, tuple) else (shipped, {})
    return kind, {**further, **own}, not isinstance(shipped, RunsAs)


def class_of(adapter: Adapter) -> type[AlignmentModule]:
    """Return the family's module, or the shipped class of the comparison, with the adapter as its loss."""
    point, base = adapter.point, adapter.base
    if not hasattr(base, point):
        raise SettingError("wrong-kind", f"{base.__name__} has no {point}: {adapter.title} cannot be compared with it")

    def called(module: Any, given: Any) -> Tensor:
        names = list(inspect.signature(adapter.function).parameters)[1:]
        settings = {name: adapter.settings.get(name, getattr(module, name, None)) for name in names}
        return adapter.function(given, **settings)

    def loss(self: Any, given: Any) -> Tensor:
        return by_row(lambda one: called(self, one), self, given)

    def advantages(self: Any, rollout: Rollout, rewards: Tensor) -> Advantages:
        found = called(self, rollout._replace(extras={**rollout.extras, "rewards": rewards}))
        return Advantages(torch.where(rollout.completion_mask, found.detach(), 0.0), None)

    body: dict[str, Any] = {point: advantages if point == "advantages" else loss, "adapter": adapter, "called": called}
    if adapter.compared:
        body["target_of"] = base
    return type(adapter.function.__name__, (base,), {**body, "__module__": adapter.function.__module__})


def by_row(function: Callable[[Any], Tensor], module: Any, given: Any) -> Tensor:
    """Return what a function gives row by row or token by token.

    A mean is split: of few rows the function is called once for each; of many rows, as in training in the small world,
    the gradient of the mean is shared out among the rows.
    """
    found = function(given)
    if found.dim():
        return found
    if isinstance(given, CriticValues):
        return _by_token(function, given)
    rows = rows_of(given)
    if rows <= FEW and not type(module).batch_coupled:  # sorted over the batch, rows have no loss of their own
        values = torch.stack([function(some_rows_of(given, [row])) for row in range(rows)])
        return _spread(module, given, values)
    leaves = {name: getattr(given, name).detach().requires_grad_() for name in LEAVES[type(given)]}
    with torch.enable_grad():
        slopes = torch.autograd.grad(function(given._replace(**leaves)), list(leaves.values()), allow_unused=True)
    carriers = [
        (getattr(given, name) - getattr(given, name).detach()) * (0.0 if slope is None else slope)
        for name, slope in zip(leaves, slopes, strict=True)
    ]
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
    """Return rows' means as values of their tokens, where the family's losses are by token."""
    if not isinstance(given, PolicyLogprobs | TokenLogprobs):
        return values
    shares = []
    for row in range(len(values)):
        weights, divisor = _aggregated(module, given.completion_mask[row : row + 1])
        shares.append(divisor / weights.sum().clamp_min(1e-300))
    shared = (values * torch.stack(shares).to(values)).unsqueeze(-1)
    return _weighted(given, torch.where(given.completion_mask, shared, 0.0))


def _weighted(given: Any, values: Tensor) -> Tensor:
    """Return token losses of demonstrations times the weights of their rows, which the family's losses contain."""
    return values * given.weights.unsqueeze(-1) if isinstance(given, TokenLogprobs) else values


def _by_token(function: Callable[[Any], Tensor], given: CriticValues) -> Tensor:
    """Return the loss of each state: a critic's states know nothing of each other."""
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
    """Return some rows of an input, in order; groups are numbered anew."""
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
    """Check that a mean is the mean of its rows, and that an adapter equals the shipped class it is compared with."""
    adapter: Adapter = subject.kind.adapter  # type: ignore[attr-defined]
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

    few = some_rows_of(given, list(range(min(rows_of(given), FEW))))  # each of them is called alone
    worst = residual(few)[0]
    said = "" if worst <= SAME else smallest_input(few, residual)
    return [*checks, at_most("as shipped", worst, SAME, f"it is not {adapter.base.__name__}: {said}")]


def reduction_check(called: Callable[[Any], Tensor], module: Any, given: Any) -> Check:
    """Check that the loss of a batch is the mean of its rows' losses, as the family's aggregation takes it."""
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


def advantages_check(subject: Subject, shipped: Any, adapter: Adapter) -> Check:
    """Check that an estimator gives the shipped class's advantages."""
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
    """Return values and slopes of a loss at an input, zero under its mask."""
    leaves = {name: getattr(given, name).detach().clone().requires_grad_() for name in LEAVES[type(given)]}
    values = function(given._replace(**leaves))
    mask = getattr(given, "completion_mask", None)
    if mask is not None and values.shape == mask.shape:
        values = torch.where(mask, values, 0.0)
    slopes = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
    filled = []
    for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
        slope, own = torch.zeros_like(leaf) if slope is None else slope, mask_of(given, name)
        filled.append(slope if own is None or own.shape != leaf.shape else torch.where(own, slope, 0.0))
    per_row = values.flatten(1).sum(-1) if values.dim() > 1 else values
    return [per_row.detach(), *filled]


def smallest_input(given: Any, residual: Callable[[Any], tuple[float, Tensor, Tensor]]) -> str:
    """Return the smallest input on which two losses differ, as text: one row, few tokens, short numbers."""

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


# -- packages without their dependencies ------------------------------------------------------------------------------


def import_alone(name: str, stubs: Sequence[str] = ()) -> Any:
    """Import one module of an installed package without running the ``__init__`` files of the packages above it.

    Those import what training needs (vLLM, Ray, DeepSpeed), and a loss needs none of it.

    Args:
        name: dotted name of the module.
        stubs: packages that the module imports and never calls here; those not installed become empty ones.

    Raises:
        PackageError: the package is not installed.
    """
    root = name.partition(".")[0]
    found = importlib.util.find_spec(root)
    if found is None or not found.submodule_search_locations:
        raise PackageError("not-installed", f"{root} is not installed: install it with `pip install --no-deps {root}`")
    for stub in stubs:
        if stub not in sys.modules and importlib.util.find_spec(stub.partition(".")[0]) is None:
            sys.modules[stub] = _Stub(stub)
    folder = Path(next(iter(found.submodule_search_locations)))
    parents = name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        package = ".".join(parents[:depth])
        if package not in sys.modules:
            sys.modules[package] = _Stub(package, folder.joinpath(*parents[1:depth]))
    return None if name.endswith(".__none__") else _imported(name)


class _Stub(types.ModuleType):
    """A package whose every name is an empty class, unless a module in its folder has that name."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        super().__init__(name)
        self.__path__ = [] if folder is None else [str(folder)]
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__spec__.submodule_search_locations = self.__path__

    def __getattr__(self, name: str) -> Any:
        folders = [Path(folder) for folder in self.__path__]
        is_module = any((folder / f"{name}.py").is_file() or (folder / name).is_dir() for folder in folders)
        if name.startswith("__") or is_module:
            return super().__getattribute__(name)  # raises, and the import system looks for the module
        found = type(name, (), {})
        setattr(self, name, found)
        return found
