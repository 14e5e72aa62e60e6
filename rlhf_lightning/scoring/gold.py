"""Gold rewards: functions that know what a completion is truly worth, for simulated judges and annotators."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from rlhf_lightning.types import Prompt

GoldReward = Callable[[Prompt, str], float]


def imported_gold_reward(path: str) -> GoldReward:
    """The function that an import path names.

    Raises:
        ValueError: it names none.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"gold_reward {path!r} is no importable function (prompt, completion): {error}") from error
    if not callable(found):
        raise ValueError(f"gold_reward {path!r} is a {type(found).__name__}, and no function (prompt, completion)")
    return found
