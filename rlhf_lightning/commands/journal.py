"""Work done so far, kept on the disk line by line: a command that was killed goes on where it stopped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import SettingError


class Journal:
    """A file beside the one to be written: what is being done, then a line for each part that is done.

    It is there once a part is done. A line is one write that is flushed to the disk; one that was torn is left out, and
    done again.

    Args:
        target: the file that all of it becomes.
        task: settings that the results depend on, plain values; a journal of another task is refused.

    Raises:
        SettingError: there is a journal of another task.
    """

    def __init__(self, target: Path, task: Mapping[str, Any]) -> None:
        self.path = target.with_name(f"{target.name}.partial")
        self.task = json.loads(json.dumps(task, default=str))
        self.records: list[Any] = []
        self.done = 0
        if self.path.exists():
            self._take_up()

    def _take_up(self) -> None:
        whole = [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        found = json.loads(whole[0])["task"] if whole else self.task
        if found != self.task:
            other = [name for name in {**found, **self.task} if found.get(name) != self.task.get(name)]
            raise SettingError(
                "settings-changed",
                f"{self.path} is of an interrupted run with another {', '.join(other)}: give the same settings to "
                "resume it, or remove it to start anew",
            )
        for line in whole[1:]:
            part = json.loads(line)
            self.records += part["records"]
            self.done = part["done"]
        with self.path.open("r+b") as file:
            file.truncate(sum(map(len, whole)))

    def add(self, done: int, records: list[Any]) -> None:
        """Keep the records of a part.

        Args:
            done: how much is done now, from the beginning.
            records: plain values.
        """
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
        """Forget it: what it led to is written."""
        self.path.unlink(missing_ok=True)


def model_stamp(name: str) -> Any:
    """Name of a model, with sizes and times of its files: another one under the same name is another task."""
    folder = Path(name).expanduser()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder] if folder.is_file() else []
    return [name, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
