"""Deprecated names: they work until a later release, and warn with that release and the replacement.

Functions and classes use ``typing_extensions.deprecated``, which type checkers understand, with
`RlhfDeprecationWarning`. Settings and metrics are rows of the tables below. CONTRIBUTING.md shows one of each. A test
fails once the version of the package reaches the release that removes a name.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_lightning.errors import SettingError


class RlhfDeprecationWarning(DeprecationWarning):
    """A name of this package that a later release removes. `rlhf` shows each message once."""


class Deprecation(NamedTuple):
    """The release that deprecates a name, the release that removes it, and the new name (None: no replacement)."""

    since: str
    removed_in: str
    use: str | None = None

    def warn(self, name: str) -> None:
        """Warn that ``name`` is deprecated."""
        remedy = f"use {self.use}" if self.use else "it has no replacement"
        message = f"{name} is deprecated since {self.since} and will be removed in {self.removed_in}: {remedy}"
        warnings.warn(message, RlhfDeprecationWarning, stacklevel=3)


SETTINGS: dict[str, Deprecation] = {}
"""By dotted name, such as ``model.beta`` of every module. A new name differs from the old one in the last part only."""

METRICS: dict[str, Deprecation] = {}
"""By tag, such as ``val/loss``. A renamed metric is logged under both tags."""


def show_warnings() -> None:
    """Show each deprecation once; by default Python hides DeprecationWarning outside of ``__main__``."""
    if not sys.warnoptions:  # else the user has chosen with -W or PYTHONWARNINGS
        warnings.filterwarnings("once", category=RlhfDeprecationWarning)


def current_flag(name: str) -> str:
    """Return the current name of a flag, such as ``model.beta``; warn if a part of it is deprecated."""
    path, keys = "", []
    for key in name.split("."):
        path, key = _current(path, key)
        keys.append(key)
    return ".".join(keys)


def current_settings(settings: Any, path: str = "") -> Any:
    """Return a config with the current names of its settings; warn of deprecated ones.

    Raises:
        SettingError: ``repeated-key``: a setting is given under its old and its new name.
    """
    if not SETTINGS or not isinstance(settings, Mapping):
        return settings
    found: dict[Any, Any] = {}
    for old, value in settings.items():
        below, key = _current(path, old)
        if key in found or (key != old and key in settings):
            raise SettingError("repeated-key", f"{below} is given twice, once under an old name: remove one")
        found[key] = current_settings(value, below)
    return found


def _current(path: str, key: Any) -> tuple[str, Any]:
    """Return the dotted name and the last part of a setting below ``path``, both current."""
    if key == "init_args":
        return path, key
    name = f"{path}.{key}".lstrip(".")
    if name not in SETTINGS:
        return name, key
    SETTINGS[name].warn(name)
    name = SETTINGS[name].use or name
    return name, name.rpartition(".")[2]


def with_old_tags(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics, and the renamed ones under their old tags too."""
    return {
        **metrics,
        **{old: metrics[entry.use] for old, entry in METRICS.items() if entry.use and entry.use in metrics},
    }


def warn_of_metric(tag: str) -> None:
    """Warn if a user's settings name a deprecated metric, for example as ``monitor``."""
    if tag in METRICS:
        METRICS[tag].warn(tag)
