"""The PyTorch Lightning framework for research on learning from human feedback.

The public classes are read from their rooms when they are first asked for, so that ``rlhf --help`` need not load torch.
What a room exports is exported here: a new objective needs no line in this file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_lightning.data import *
    from rlhf_lightning.models.loading import LoraSettings as LoraSettings
    from rlhf_lightning.modules import *
    from rlhf_lightning.sampling.engines import SamplingSettings as SamplingSettings
    from rlhf_lightning.scoring import LearnedScorer as LearnedScorer
    from rlhf_lightning.scoring import Scorer as Scorer
    from rlhf_lightning.types import Loss as Loss

_ROOMS = ("modules", "data")
"""Rooms whose modules and DataModules are all public here."""

_SINGLE = {
    "LearnedScorer": "scoring",
    "LoraSettings": "models.loading",
    "Loss": "types",
    "SamplingSettings": "sampling.engines",
    "Scorer": "scoring",
    "WPOWeighting": "modules",
}
"""Further classes, by the file or room that they live in."""


def __getattr__(name: str) -> Any:
    """Return a public class from the room it lives in."""
    if name in _SINGLE:
        return getattr(importlib.import_module(f"{__name__}.{_SINGLE[name]}"), name)
    if name == "__all__" or name.endswith("Module"):  # asking for anything else must not import the rooms
        rooms = [importlib.import_module(f"{__name__}.{room}") for room in _ROOMS]
        if name == "__all__":
            return sorted({*_SINGLE, *(kind for room in rooms for kind in room.__all__ if kind.endswith("Module"))})
        for room in rooms:
            if name in room.__all__:
                return getattr(room, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]
