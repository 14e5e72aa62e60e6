"""Module state in a checkpoint, and checks that a checkpoint fits the module that resumes from it."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from rlhf_lightning.compat import attached_trainer, restore_loader_position
from rlhf_lightning.errors import StateError

ANOTHER_STRATEGY = (
    "the checkpoint was not written under ModelParallelStrategy and cannot be resumed under it; resume it with the "
    "strategy it was written under, or start a new run from its exported model (model.init_from)"
)

COUNTERS = ("updates", "episodes", "tokens", "rollouts", "steps", "skipped_updates")
"""Counters that seed random numbers, are TensorBoard's x-axes, and decide which training steps are logged."""


def trained_names(module: nn.Module) -> set[str]:
    """Return the names of the trainable weights; a tied weight is listed under its first name."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def own_buffers(module: nn.Module) -> set[str]:
    """Return the names of the module's own buffers, such as running statistics, without buffers of loaded models."""
    loaded = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, PreTrainedModel))
    return {name for name, _ in module.named_buffers() if not name.startswith(loaded)}


class ResumeState:
    """State for a module's next checkpoint, and state read from the checkpoint that it resumes from.

    Attributes:
        asked: settings of this run's optimizer and scheduler, see `optimization.asked`.
        asked_before: settings of the run that wrote the checkpoint, until they have been compared.
    """

    def __init__(self) -> None:
        self._trained: set[str] = set()
        self._trainable_before: set[str] = set()
        self._random: list[Any] | None = None
        self._callers_random: dict[str, Any] | None = None
        self._threads: int | None = None
        self._callers_threads: int | None = None
        self.asked: dict[str, Any] | None = None
        self.asked_before: dict[str, Any] | None = None

    def trained(self, module: nn.Module) -> set[str]:
        """Return the names of the weights in a checkpoint: all that were trainable at any time.

        A callback may freeze weights during a run, after training has changed them.
        """
        self._trained |= trained_names(module)
        return self._trained

    def check_names(self, module: nn.Module, found: set[str]) -> None:
        """Compare the names of trained weights with the names in a checkpoint.

        Raises:
            StateError: ``checkpoint-does-not-fit``, or ``weights-not-loaded``.
        """
        refuse_unloaded(module)
        known = {name for name, _ in module.named_parameters()} | own_buffers(module)
        missing, unknown = sorted(self.trained(module) - found), sorted(found - known)
        if missing or unknown:
            names = [", ".join(some[:2]) or "none" for some in (missing, unknown)]
            raise StateError(
                "checkpoint-does-not-fit",
                f"the checkpoint does not fit {type(module).__name__}: {len(missing)} trainable weights are missing "
                f"({names[0]}), {len(unknown)} are unknown ({names[1]})",
            )
        self._trained |= found  # a callback may have unfrozen some of them

    def saved(self, module: LightningModule) -> dict[str, Any]:
        """Return names of trained weights, random states, number of threads, and the optimizer's settings."""
        return {
            "sharded": module.device_mesh is not None,
            "trained": sorted(self.trained(module)),
            "trainable": sorted(trained_names(module)),
            "random": of_all_ranks(module, random_state(module.device)),
            "threads": torch.get_num_threads(),
            "asked": self.asked,
        }

    def restore(self, module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Read the state that ``saved`` returned.

        Raises:
            StateError: ``another-strategy`` or ``checkpoint-does-not-fit``.
        """
        if module.device_mesh is not None:
            if not checkpoint["sharded"] and module.trainer.state.fn == "fit":
                raise StateError("another-strategy", f"{ANOTHER_STRATEGY}: the optimizer's state has another order")
            self.check_names(module, set(checkpoint["trained"]))
        self._random, self._threads = checkpoint["random"], checkpoint.get("threads")
        self._trainable_before = set(checkpoint.get("trainable", ()))
        self.asked_before = checkpoint.get("asked")

    def begin(self, module: LightningModule, seed: int, updates: int) -> None:
        """Restore frozen weights, data position, random states and threads when a resumed training begins.

        Raises:
            StateError: ``another-world-size``: the number of ranks has changed, and the model has dropout.
        """
        before, self._trainable_before = self._trainable_before, set()
        if before and before != trained_names(module):  # callbacks freeze weights only at the start of an epoch
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in before)
        states, self._random = self._random, None
        if states is None:
            return
        self._callers_random = random_state(module.device)
        self._restore_threads()
        restore_loader_position(module.trainer)
        ranks = module.trainer.world_size
        if len(states) == ranks:
            set_random_state(states[module.global_rank], module.device)
            return
        if any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules()):
            raise StateError(
                "another-world-size",
                f"the checkpoint was written by {len(states)} ranks and this run has {ranks}: each rank draws its own "
                f"dropout masks, so results would change; resume on {len(states)} ranks, or with model.lora.dropout 0",
            )
        # The package does not use these generators; a user's code should at least draw differently on each rank.
        seed_rank(seed, updates, module.global_rank)

    def end(self, module: LightningModule) -> None:
        """Restore the random state and the number of threads that the caller of a resumed run had."""
        state, self._callers_random = self._callers_random, None
        if state is not None:
            set_random_state(state, module.device)
        threads, self._callers_threads = self._callers_threads, None
        if threads is not None:
            torch.set_num_threads(threads)

    def _restore_threads(self) -> None:
        """Compute with as many threads as before, since the last bits of results on a CPU depend on their number."""
        now, before = torch.get_num_threads(), self._threads
        if before is not None and before != now:
            self._callers_threads = now
            torch.set_num_threads(before)
            rank_zero_warn(
                f"The run used {before} threads and is resumed with {now}: {before} are used again, since the last "
                "bits of results depend on their number."
            )


def drop_untrained(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Drop weights that were never trainable from a state dict. This hook also works for a nested module."""
    kept = module.resume_state.trained(module) | own_buffers(module)
    for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in kept]:
        del state[name]


def excuse_untrained(module: Any, keys: Any) -> None:
    """Remove weights that checkpoints leave out from the missing keys; a hook like `drop_untrained`."""
    kept, missing = module.resume_state.trained(module), keys.missing_keys
    missing[:] = [name for name in missing if any(name == one or name.endswith(f".{one}") for one in kept)]


def refuse_unloaded(module: nn.Module) -> None:
    """Refuse to use the weights of a module before they are loaded.

    Raises:
        StateError: ``weights-not-loaded``.
    """
    if next(module.parameters(), None) is None:
        raise StateError(
            "weights-not-loaded",
            f"the weights of {type(module).__name__} are not loaded yet, which a Trainer does: call "
            "module.configure_model() first",
        )


def check_start(before: Mapping[str, Any], now: Mapping[str, Any], init_from: str | None) -> None:
    """Refuse to resume with frozen weights other than those that the checkpoint was trained with.

    Args:
        before: fingerprints in the checkpoint.
        now: fingerprints of this run.
        init_from: source of the models; None if no frozen weights from it are used.

    Raises:
        StateError: ``another-start`` or ``another-scorer``.
    """
    for part in ("backbone", "adapter", "quantization") if init_from is not None else ():
        if before[part] != now[part]:
            raise StateError(
                "another-start",
                f"the checkpoint was trained on another {part}: {str(before[part])[:8]}, and this run starts from "
                f"{str(now[part])[:8]} ({init_from}). Checkpoints hold no frozen weights: resume from the same "
                "init_from",
            )
    if "scorer" in before and before["scorer"] != now["scorer"]:
        raise StateError(
            "another-scorer",
            "the checkpoint was trained on scores of another reward model than the one in model.scorer now, or its "
            "weights have changed: resume with the same weights, or start a new run from the exported model "
            "(model.init_from)",
        )


# -- random numbers ---------------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the random states of Python, NumPy, torch and the device."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(name), [int(key) for key in keys], *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set the random states that ``random_state`` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_rank(*numbers: int) -> None:
    """Seed Python, NumPy and torch from several numbers."""
    words = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def rank_of(module: LightningModule) -> tuple[int, int]:
    """Return this rank and the number of ranks; (0, 1) without a trainer, for example in an export."""
    trainer = attached_trainer(module)
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def of_all_ranks(module: LightningModule, value: Any) -> list[Any]:
    """Gather a value from every rank, in rank order."""
    if module.trainer.world_size == 1:
        return [value]
    everyone: list[Any] = [None] * module.trainer.world_size
    dist.all_gather_object(everyone, value)
    return everyone


def plain(value: Any) -> Any:
    """Return hyper-parameters as plain types, so that a checkpoint loads without running code."""
    if isinstance(value, functools.partial):
        return {"class_path": plain(value.func), "init_args": plain(value.keywords)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
