"""Verify losses of other projects, or any function of tensors, with the contract of their family.

An adapter is a function in any file. The type of its first argument selects the family; the other arguments are
settings, each with a default. It returns one loss per row (pairs, completions, groups) or per token, or their mean::

    @compared_with(DPOModule)
    def DPO(pairs: PreferenceLogprobs, beta: float = 0.1) -> Tensor:
        return their_package.dpo_loss(pairs.chosen_sequence_logprobs, ..., beta)

``rlhf verify --foreign my_adapter.py:DPO --beta 0.3`` runs it instead of the family's own loss. A setting that the
family has too (``beta``, ``kl_coef``, ``clip`` ...) is passed to both.
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
from rlhf_lightning.similar_names import hint_at
from rlhf_lightning.training.module import AlignmentModule
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
from rlhf_lightning.verification.foreign_checks import by_row
from rlhf_lightning.verification.subject import all_parameters

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

SHIPPED_ADAPTERS = ("trl", "verl", "openrlhf")


class Adapter(NamedTuple):
    """A function of another project, and the shipped class it is compared with.

    Attributes:
        function: the adapter.
        given: type of its first argument.
        settings: its own settings, without those that the family has too.
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
        """Name of the method that the function replaces. Losses that couple pairs get all pairs at once."""
        coupled = self.given is PreferenceLogprobs and self.base.batch_coupled
        return "preference_loss" if coupled else FAMILIES[self.given][1]

    @property
    def left_out(self) -> set[str]:
        """Names of the checks of settings that the function does not have."""
        if self.given is not PolicyLogprobs:
            return set()
        return {"sampler correction"} if self.compared else {"sampler correction", "clip"}


class RunsAs(NamedTuple):
    """A class that provides rewards, advantages and aggregation for an adapter that need not equal it."""

    kind: type[AlignmentModule]
    settings: Mapping[str, Any] = {}


def compared_with(shipped: Any, by: str | None = None, **settings: Any) -> Callable[[Any], Any]:
    """Declare the shipped class that an adapter should equal.

    Args:
        shipped: the class, (class, settings), or `RunsAs` for a loss that no shipped class has. With ``by``, a mapping
            from values of that setting to these.
        by: name of the setting that selects the class.
        settings: settings of the class.
    """

    def remember(function: Any) -> Any:
        function.compared_with = (shipped, by, settings)
        return function

    return remember


def adapters(spec: str, given: Mapping[str, Any]) -> list[Adapter]:
    """Return the adapter ``FILE:NAME``, or all adapters of a file, with every value of their `Literal` settings.

    Args:
        spec: ``trl:DPO``, ``my_adapter.py:DPO`` or a file alone; trl, verl and openrlhf are shipped.
        given: settings from the command line.

    Raises:
        MissingError: the file does not exist.
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
        raise SettingError("unknown-name", f"{file} has no adapter {name!r}; {hint_at(name, functions)}")
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
    except Exception as error:  # an annotation may be any expression
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
        shared = {p.name for p in parameters} & all_parameters(base)
        known = settings.keys() | all_parameters(base)
        for unknown in sorted(own.keys() - known):
            hint = hint_at(unknown, known - {"self", "args", "kwargs"})
            raise SettingError("unknown-setting", f"{function.__name__} has no setting {unknown!r}; {hint}")
        words = [str(value) for value in own.values()]
        yield Adapter(
            function,
            _input_of(function),
            {name: setting for name, setting in settings.items() if name not in shared},
            base,
            {**base_settings, **{name: setting for name, setting in own.items() if name in all_parameters(base)}},
            compared,
            " ".join([function.__name__, *words]),
        )


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
    """Return the family's module, or the shipped class it is compared with, with the adapter as its loss."""
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


# -- packages without their dependencies ------------------------------------------------------------------------------


def import_alone(name: str, stubs: Sequence[str] = ()) -> Any:
    """Import one module of an installed package without running the ``__init__`` files of its parent packages.

    These import training dependencies (vLLM, Ray, DeepSpeed) that a loss does not need.

    Args:
        name: dotted name of the module.
        stubs: packages that the module imports but that are never called here; if not installed, empty stubs replace
            them.

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
    """A package stub: each attribute is an empty class, unless a module of that name is in its folder."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        super().__init__(name)
        self.__path__ = [] if folder is None else [str(folder)]
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__spec__.submodule_search_locations = self.__path__

    def __getattr__(self, name: str) -> Any:
        folders = [Path(folder) for folder in self.__path__]
        is_module = any((folder / f"{name}.py").is_file() or (folder / name).is_dir() for folder in folders)
        if name.startswith("__") or is_module:
            return super().__getattribute__(name)  # raises, and the import system then looks for the module
        found = type(name, (), {})
        setattr(self, name, found)
        return found
