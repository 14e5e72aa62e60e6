"""What a loop has done: the result of each step, in one file that is written whole after each."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from rlhf_lightning.errors import MissingError, SettingError
from rlhf_lightning.runs.atomic_files import write_text

STATE_FILE = "state.json"
FILES = ("prompts", "eval_prompts", "reward_config", "policy_config")
"""Settings that name a file whose contents decide what a loop does."""

MAY_CHANGE = ("rounds",)
"""Settings that a loop may be continued under another value of."""


class LoopState:
    """Steps that are done, by name, and their results.

    Args:
        folder: of the loop.
        settings: plain values of all its settings.
        files: fingerprint of each file that they name, see `fingerprints`.

    Raises:
        SettingError: the folder holds a loop with other settings, or with files that have changed since.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], files: Mapping[str, str]) -> None:
        self.path = folder / STATE_FILE
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.steps: dict[str, Any] = known.get("steps", {})
        earlier, self.settings, self.files = known.get("settings"), dict(settings), dict(files)
        if earlier is not None:
            changed = [name for name in settings if name not in MAY_CHANGE and settings[name] != earlier.get(name)]
            if changed:
                said = ", ".join(f"{name} {earlier.get(name)} (now {settings[name]})" for name in changed)
                raise SettingError(
                    "settings-changed",
                    f"the loop in {folder} was started with {said}: give another --name, or the same settings",
                )
            edited = [settings[name] for name, found in self.files.items() if found != known["files"].get(name)]
            if edited:
                raise SettingError(
                    "files-changed",
                    f"{' and '.join(edited)} changed since the loop in {folder} was started: give another --name, or "
                    "restore the earlier content",
                )

    def step(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a step's result; it is done now unless it was done before.

        Work must bear being cut off anywhere and begun again.
        """
        if name not in self.steps:
            print(f"\nloop: {name}", flush=True)
            began = time.monotonic()
            result = work()
            ended = datetime.now(UTC).isoformat(timespec="milliseconds")
            self.steps[name] = {**result, "seconds": round(time.monotonic() - began, 3), "ended": ended}
            state = {"settings": self.settings, "files": self.files, "steps": self.steps}
            write_text(self.path, json.dumps(state, indent=2) + "\n")
        return dict(self.steps[name])


def fingerprints(settings: Mapping[str, Any]) -> dict[str, str]:
    """Hash of what each file of `FILES` holds, by the setting's name; of YAML its values, whatever the comments say.

    Raises:
        MissingError: there is no such file.
    """
    found = {}
    for name in FILES:
        path = Path(settings[name])
        if not path.exists():
            raise MissingError("no-file", f"there is no file {path} ({name})")
        if path.is_file():
            held = path.read_bytes()
            if path.suffix in (".yaml", ".yml"):
                held = json.dumps(yaml.safe_load(held), sort_keys=True, default=str).encode()
            found[name] = hashlib.blake2b(held, digest_size=16).hexdigest()
    return found


def seed_of(*values: Any) -> int:
    """A seed that the values decide; nearby values give seeds that have nothing to do with each other."""
    digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
