"""Ranges of numeric settings in one table, and the check that refuses values outside them and contradictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_lightning.errors import SettingError


class Range(NamedTuple):
    """Values that a setting may take.

    Attributes:
        low: smallest value.
        high: largest value.
        above: whether ``low`` itself is excluded.
    """

    low: float
    high: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        if math.isfinite(self.high):
            return f"in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"
        return f"above {self.low:g}" if self.above else f"at least {self.low:g}"

    def holds(self, value: float) -> bool:
        """Whether the value is in the range; NaN and infinity never are."""
        return math.isfinite(value) and (value > self.low if self.above else value >= self.low) and value <= self.high


POSITIVE, NOT_NEGATIVE, SHARE = Range(0, above=True), Range(0), Range(0, 1)

RANGES: dict[str, Range] = {
    "cispo_high": POSITIVE,
    "cispo_low": NOT_NEGATIVE,
    "clip": POSITIVE,
    "clip_high": POSITIVE,
    "dual_clip": Range(1, above=True),
    "early_stop_kl": POSITIVE,
    "gamma": SHARE,
    "gate_temperature": POSITIVE,
    "gate_temperature_negative": POSITIVE,
    "kl_clamp": POSITIVE,
    "kl_coef": NOT_NEGATIVE,
    "kl_horizon": POSITIVE,
    "kl_target": POSITIVE,
    "lam": SHARE,
    "mini_batch_size": Range(1),
    "off_policy_threshold": NOT_NEGATIVE,
    "overlong_buffer": Range(1),
    "ppo_epochs": Range(1),
    "pretraining_coef": NOT_NEGATIVE,
    "ratio_cap": Range(1, above=True),
    "sampler_high": POSITIVE,
    "sampler_low": NOT_NEGATIVE,
    "scale_epsilon": NOT_NEGATIVE,
    "value_clip": POSITIVE,
    "value_coef": NOT_NEGATIVE,
}
"""Range of each setting by its name; null, where a setting takes it, is always allowed."""


def check_settings(settings: Mapping[str, Any], contradictions: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse settings outside their range, and settings that contradict each other.

    Args:
        settings: values by name, such as a module's attributes; names without a range are passed over.
        contradictions: whether settings contradict each other and the sentence that says so, by error code.

    Raises:
        SettingError: naming the settings, their values and what to do.
    """
    for name, allowed in RANGES.items():
        value = settings.get(name)
        if isinstance(value, int | float) and not allowed.holds(value):
            raise SettingError("setting-out-of-range", f"{name} is {value}: it must be {allowed}")
    for code, (contradicts, sentence) in contradictions.items():
        if contradicts:
            raise SettingError(code, sentence)
