"""The PyTorch Lightning framework for research on learning from human feedback.

Public classes are imported on first access, so that ``rlhf --help`` does not load torch. All exports of ``modules`` and
``data`` are re-exported automatically: a new objective needs no line in this file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlhf_lightning.quiet import silence_log_messages

if TYPE_CHECKING:
    from rlhf_lightning.data import *
    from rlhf_lightning.models.lora import LoraSettings as LoraSettings
    from rlhf_lightning.modules import *
    from rlhf_lightning.sampling.engines import SamplingSettings as SamplingSettings
    from rlhf_lightning.scoring import LearnedScorer as LearnedScorer
    from rlhf_lightning.scoring import Scorer as Scorer
    from rlhf_lightning.types import Loss as Loss

silence_log_messages()  # before any library is imported: some of them log during their import

_ROOMS = ("modules", "data")
"""Packages whose exported classes named ``*Module`` are all re-exported here."""

_SINGLE = {
    "LearnedScorer": "scoring",
    "LoraSettings": "models.lora",
    "Loss": "types",
    "SamplingSettings": "sampling.engines",
    "Scorer": "scoring",
    "WPOWeighting": "modules",
}
"""Further classes, with the modules that define them."""


def __getattr__(name: str) -> Any:
    """Import and return a public class."""
    if name in _SINGLE:
        return getattr(importlib.import_module(f"{__name__}.{_SINGLE[name]}"), name)
    if name == "__all__" or name.endswith("Module"):  # other names must not import torch
        rooms = [importlib.import_module(f"{__name__}.{room}") for room in _ROOMS]
        if name == "__all__":
            return sorted({*_SINGLE, *(kind for room in rooms for kind in room.__all__ if kind.endswith("Module"))})
        for room in rooms:
            if name in room.__all__:
                return getattr(room, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]
