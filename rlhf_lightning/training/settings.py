"""Check settings: the range of each, stated by its class, and contradictions between settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_lightning.errors import SettingError


def check_ranges(kind: type, settings: Mapping[str, Any]) -> None:
    """Refuse settings outside the ranges that a class and its bases state.

    Args:
        kind: its ``ranges`` map names of settings to intervals, such as "(0, inf)" or "[0, 0.5)".
        settings: values by name; only numbers and tuples of numbers are checked.

    Raises:
        SettingError: ``setting-out-of-range``: a value lies outside its interval, or is NaN.
    """
    ranges: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        ranges |= vars(base).get("ranges", {})
    for name, interval in ranges.items():
        value = settings.get(name)
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(_within(number, interval) for number in numbers if isinstance(number, int | float)):
            where = f"{name} of {kind.__name__} is {value}"
            raise SettingError("setting-out-of-range", f"{where}: it must lie in {interval}")


def refuse_contradictions(contradictions: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse settings that contradict each other.

    Args:
        contradictions: by error code, whether the settings contradict each other, and the error's sentence.

    Raises:
        SettingError: with the code of the first contradiction.
    """
    for code, (contradicts, sentence) in contradictions.items():
        if contradicts:
            raise SettingError(code, sentence)


def _within(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
