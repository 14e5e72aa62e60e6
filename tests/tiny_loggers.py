"""Loggers as a user might write them."""

from typing import Any

from lightning.pytorch.loggers import Logger


class MemoryLogger(Logger):
    """A logger that stores everything in memory.

    Args:
        save_dir: folder of the logger.
        colour: a setting without effect.
    """

    def __init__(self, save_dir: str, colour: str = "red") -> None:
        super().__init__()
        self.directory, self.colour = save_dir, colour
        self.steps: list[int] = []
        self.names: set[str] = set()

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.append(step)
        self.names |= set(metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hyperparams = params


class TableLogger(MemoryLogger):
    """A MemoryLogger that accepts tables, like W&B's logger."""

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.tables = [*getattr(self, "tables", []), (key, columns, data, step)]


class TextLogger(MemoryLogger):
    """A MemoryLogger that accepts text."""

    def log_text(self, key: str, text: str, step: int) -> None:
        self.texts = [*getattr(self, "texts", []), (key, text, step)]


class TrackedLogger(MemoryLogger):
    """A logger whose run has an id, like those of MLflow and W&B.

    Args:
        save_dir: folder of the logger.
        run_id: the run to continue; None starts one.
    """

    started = 0

    def __init__(self, save_dir: str, run_id: str | None = None) -> None:
        super().__init__(save_dir)
        self.run_id = run_id

    @property
    def version(self) -> Any:
        return self.run_id

    @property
    def experiment(self) -> None:
        if self.run_id is None:
            type(self).started += 1
            self.run_id = f"run-{self.started}"
