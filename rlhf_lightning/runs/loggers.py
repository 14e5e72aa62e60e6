"""Loggers: their files go into the run folder, and tables to every logger that takes them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

PLACES = ("save_dir", "name", "run_name", "version", "tracking_uri", "artifact_location")
"""Arguments by which a logger says where it writes and what it calls the run; null leaves them to the run folder."""


def logger_arguments(kind: type[Logger], given: Mapping[str, Any], folder: Path, runs: Path) -> dict[str, Any]:
    """Return a logger's arguments, with those of `PLACES` that are null filled in from the run folder.

    TensorBoard and CSV loggers write into the folder itself. Others get it as ``save_dir`` and are named after it.
    MLflow's runs share a database in the runs folder, so that one server shows them all.

    Args:
        kind: the logger's class.
        given: its arguments, null in `PLACES` for what the user left open.
        folder: the run folder, ``runs/<name>/version_<n>``.
        runs: the folder of all runs.
    """
    name = folder.relative_to(runs).as_posix()
    if issubclass(kind, TensorBoardLogger | CSVLogger):
        filled = {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
        if any(given.get(argument) is not None for argument in filled):
            filled = {"save_dir": str(folder)}
    elif "tracking_uri" in given:
        filled = {"run_name": name}
        if given.get("save_dir") is None:
            filled["tracking_uri"] = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"
        if filled.get("tracking_uri", "").startswith("sqlite:") and given["tracking_uri"] is None:
            filled["artifact_location"] = (runs / "mlartifacts").absolute().as_uri()
    else:
        filled = {"save_dir": str(folder), "run_name" if "run_name" in given else "name": name}
    left_open = [argument for argument in PLACES if argument in given and given[argument] is None]
    kept = {argument: value for argument, value in given.items() if argument not in left_open}
    return kept | {argument: filled[argument] for argument in left_open if argument in filled}


def log_table(logger: Logger, name: str, rows: Sequence[Mapping[str, Any]], text: str, step: int) -> bool:
    """Log a table to a logger that takes tables or text; return whether it does.

    Known are TensorBoard (``experiment.add_text``), W&B and every logger with its ``log_table(key, columns, data,
    step)``, MLflow (``experiment.log_table(run_id, data, file)``), trackio (``trackio.Table``), and loggers of your
    own with ``log_text(key, text, step)``.

    Args:
        logger: the logger.
        name: name of the table.
        rows: the table, the same keys in each row.
        text: the table as markdown.
        step: updates so far.
    """
    experiment: Any = getattr(logger, "experiment", None)
    columns = list(rows[0]) if rows else []
    if isinstance(logger, TensorBoardLogger) or hasattr(experiment, "add_text"):
        experiment.add_text(name, text, step)
    elif callable(method := getattr(logger, "log_table", None)):
        method(key=name, columns=columns, data=[list(row.values()) for row in rows], step=step)
    elif hasattr(experiment, "log_table") and (run_id := getattr(logger, "run_id", None)) is not None:
        columnwise = {column: [row[column] for row in rows] for column in columns}
        experiment.log_table(run_id, columnwise, f"{name}/update_{step:06d}.json")
    elif callable(method := getattr(logger, "log_text", None)):
        method(key=name, text=text, step=step)
    elif type(experiment).__module__.partition(".")[0] == "trackio" and hasattr(experiment, "log"):
        pandas: Any = importlib.import_module("pandas")
        trackio: Any = importlib.import_module("trackio")
        experiment.log({name: trackio.Table(dataframe=pandas.DataFrame(list(rows)))}, step=step)
    else:
        return False
    return True
