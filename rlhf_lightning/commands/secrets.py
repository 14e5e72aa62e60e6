"""Keys that stand in settings, which are written down: found before anything is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_lightning.sampling.json_server import IN_AN_ADDRESS, NO_VARIABLE, has_password, names_variable


def written_secret(settings: Any, where: str = "") -> str | None:
    """Return what is wrong with the first setting that holds a key, not the key itself; None where none does."""
    for setting, value in _texts(settings, where):
        if setting.rpartition(".")[2] == "api_key" and not names_variable(value):
            return f"{setting} {NO_VARIABLE}"
        if has_password(value):
            return f"{setting} {IN_AN_ADDRESS}"
    return None


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield every text in some settings, under its dotted name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            name = where if key == "init_args" else f"{where}.{key}".lstrip(".")
            yield from _texts(item, name)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, where)
    elif isinstance(value, str):
        yield where, value
