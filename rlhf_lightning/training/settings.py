"""Ranges of settings: each class states its own, and all are checked here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_lightning.errors import SettingError


def check_ranges(kind: type, settings: Mapping[str, Any]) -> None:
    """Refuse settings outside the ranges that a class and its bases state.

    Args:
        kind: class whose ``ranges`` map names of settings to intervals, such as "(0, inf)" or "[0, 0.5)".
        settings: values by name; None, and settings without a range, are accepted.

    Raises:
        SettingError: a value lies outside its interval, or is NaN.
    """
    ranges: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        ranges |= vars(base).get("ranges", {})
    for name, interval in ranges.items():
        value = settings.get(name)
        if value is not None and not _within(value, interval):
            where = f"{name} of {kind.__name__} is {value}"
            raise SettingError("setting-out-of-range", f"{where}: it must lie in {interval}")


def _within(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
