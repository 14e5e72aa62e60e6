"""A journal of finished work: a killed command resumes where it stopped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import DataError, SettingError


class Journal:
    """A file ``TARGET.partial``: a line with the task, then one synced line for each finished part.

    An incomplete last line is dropped, and its part is repeated.

    Args:
        target: the final output file.
        task: the settings that the results depend on, as plain values.

    Raises:
        SettingError: the existing journal belongs to another task.
        DataError: the journal is damaged.
    """

    def __init__(self, target: Path, task: Mapping[str, Any]) -> None:
        self.path = target.with_name(f"{target.name}.partial")
        self.task = json.loads(json.dumps(task, default=str))
        self.records: list[Any] = []
        self.done = 0
        if self.path.exists():
            self._resume()

    def _resume(self) -> None:
        whole = [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        try:
            parts = [json.loads(line) for line in whole]
            found = dict(parts[0]["task"]) if parts else self.task
            finished = [(list(part["records"]), int(part["done"])) for part in parts[1:]]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                "invalid-json",
                f"{self.path}, the journal of an interrupted run, is damaged ({error}): delete it to start over",
            ) from error
        if found != self.task:
            other = [name for name in {**found, **self.task} if found.get(name) != self.task.get(name)]
            raise SettingError(
                "settings-changed",
                f"{self.path} belongs to an interrupted run with another {', '.join(other)}: give the same settings to "
                "resume it, or delete it to start over",
            )
        for records, done in finished:
            self.records += records
            self.done = done
        with self.path.open("r+b") as file:
            file.truncate(sum(map(len, whole)))

    def add(self, done: int, records: list[Any]) -> None:
        """Write the records of a part, plain values; ``done`` is the total progress."""
        self.records += json.loads(json.dumps(records))
        self.done = done
        lines = [{"done": done, "records": records}]
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines.insert(0, {"task": self.task})
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Delete the journal after the output is written."""
        self.path.unlink(missing_ok=True)


def model_stamp(name: str) -> Any:
    """Return a model's name with the sizes and modification times of its files, to detect a changed model."""
    folder = Path(name).expanduser()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder] if folder.is_file() else []
    return [name, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
