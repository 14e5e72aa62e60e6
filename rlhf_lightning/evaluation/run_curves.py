"""Read settings, curves and samples of run folders, and group the runs into arms over seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_lightning.errors import DataError, MissingError, SettingError
from rlhf_lightning.evaluation.differences import Difference, holm, mean_interval, seed_difference
from rlhf_lightning.loading import flat_settings, read_config, read_records
from rlhf_lightning.runs.run import CONFIG_FILE, SAMPLES_FILE, find_run, status_of
from rlhf_lightning.runs.run_records import EVENTS
from rlhf_lightning.similar_names import hint_at

Axis = Literal["updates", "episodes", "tokens"]
NOT_COMPARED = ("seed_everything", "model.seed", "data.seed", "run_name", "runs_folder", "ckpt_path", "resume")
ROLLOUT_TAGS = ("rollout/score", "rollout/kl", "rollout/completion_length", "rollout/eos_rate")
FRONTIERS = (("rollout/kl", "rollout/score"), ("val/kl", "val/score"), ("val/kl", "val/reward_margin"))
LONGEST_NAME = 80
SEED_PART = re.compile(r"/seed_\d+$")
"""The last part of the run names of a sweep."""
LAST_SHARE = 0.1
"""The final value of a training metric is its mean over this last share of the updates."""


class FinishedRun(NamedTuple):
    """Content of a run folder."""

    folder: Path
    settings: dict[str, Any]  # flat, as on the command line
    seed: int
    status: str  # status of the last session; "finished" if it was complete
    scalars: dict[str, tuple[np.ndarray, np.ndarray]]  # positions and values by tag
    samples: list[dict[str, Any]]


class Curve(NamedTuple):
    """A metric of an arm: mean over seeds with its 95 % interval, all of shape (points,)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def run_folders(paths: Sequence[str]) -> list[Path]:
    """Return the training runs at and below some folders: the last version of each run name.

    Raises:
        MissingError: a folder does not exist or contains no runs.
    """
    found: dict[Path, None] = {}
    for text in paths:
        path = Path(text)
        if (path / CONFIG_FILE).is_file():
            found[path] = None
            continue
        names = sorted({config.parent.parent for config in path.rglob(CONFIG_FILE)})
        below = []
        for name in names:
            try:
                below.append(find_run(str(name), str(path)))
            except MissingError:
                continue  # only evaluations
        if not below:
            raise MissingError("unknown-run", f"no training run found at or below {path}")
        found |= dict.fromkeys(below)
    return list(found)


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        DataError: the folder has no TensorBoard events, or its files are damaged.
    """
    events = _events(folder)
    scalars = {}
    for tag in events.Tags()["scalars"]:
        by_step = {event.step: event.value for event in events.Scalars(tag)}
        steps = sorted(by_step)
        scalars[tag] = (np.array(steps, dtype=float), np.array([by_step[step] for step in steps]))
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise DataError("damaged-config", f"{config} is not a file")
    settings = flat_settings(read_config(config))
    samples = folder / SAMPLES_FILE
    rows = read_records(samples) if samples.is_file() else []
    if not all(map(_is_sample, rows)):
        raise DataError(
            "damaged-samples", f"{samples} has rows that are not samples: restore it from a copy, or delete it"
        )
    seed = settings.get("seed_everything") or 0
    if not isinstance(seed, int):
        raise DataError(
            "damaged-config", f"seed_everything in {folder / CONFIG_FILE} is {seed!r:.100}: it must be a number"
        )
    return FinishedRun(folder, settings, int(seed), status_of(folder) or "unknown", scalars, rows)


def _events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list(folder.glob(EVENTS))
    if not files:
        raise DataError("no-events", f"{folder} has no TensorBoard events to compare: train with TensorBoard's logger")
    if not all(file.is_file() for file in folder.iterdir() if "tfevents" in file.name):
        raise DataError(
            "damaged-events", f"{folder} holds a folder, a pipe or a device instead of TensorBoard's events"
        )
    try:
        return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    except Exception as error:  # libraries raise different errors for damaged files
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            "damaged-events", f"the TensorBoard events in {folder} cannot be read ({reason:.200})"
        ) from error


def _is_sample(row: dict[str, Any]) -> bool:
    prompt = row.get("prompt")
    turns = prompt if isinstance(prompt, list) else []
    return (
        isinstance(row.get("update"), int)
        and isinstance(row.get("completion"), str)
        and isinstance(row.get("score"), int | float | None)
        and isinstance(prompt, str | list)
        and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns)
    )


def plain(value: Any) -> str:
    """Return a setting's value as text in YAML notation (null for None)."""
    return "null" if value is None else str(value)


def differing(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the settings that differ between runs, except seeds and names."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in NOT_COMPARED)
    return [name for name in names if len({json.dumps(run.settings.get(name), default=str) for run in runs}) > 1]


def _with_short_names(arms: dict[str, dict[int, FinishedRun]]) -> dict[str, dict[int, FinishedRun]]:
    """Name the arms by their runs, if lists of all settings that differ would be long names."""
    names = [SEED_PART.sub("", plain(next(iter(runs.values())).settings.get("run_name"))) for runs in arms.values()]
    if max(map(len, arms)) <= LONGEST_NAME or len(set(names)) < len(arms):
        return arms
    return dict(zip(names, arms.values(), strict=True))


class RunComparison:
    """Runs grouped into arms.

    Args:
        runs: the runs.
        by: settings that define the arms; empty means all settings that differ. An arm is then named by these
            settings, or by its run if they are many.
        axis: x-axis of the curves.
        metrics: tags to compare; empty means val/, the rollout headline metrics and the training loss.

    Raises:
        SettingError: no run has a setting or metric, or two runs of an arm have the same seed.
    """

    def __init__(
        self, runs: Sequence[FinishedRun], by: Sequence[str] = (), axis: Axis = "updates", metrics: Sequence[str] = ()
    ) -> None:
        self.runs, self.axis = runs, axis
        self.differing = differing(runs)
        if unknown := [name for name in by if not any(name in run.settings for run in runs)]:
            hint = hint_at(unknown[0], {name for run in runs for name in run.settings})
            raise SettingError("unknown-setting", f"no run has the setting {', '.join(unknown)}; {hint}")
        self.by = list(by) or self.differing
        arms: dict[str, dict[int, FinishedRun]] = {}
        for run in runs:
            arm = arms.setdefault(self.label(run), {})
            if run.seed in arm:
                others = [name for name in self.differing if name not in self.by]
                hint = f"they differ by {', '.join(others)}: add it to --by" if others else "give one of them"
                raise SettingError(
                    "repeated-seed",
                    f"{run.folder} and {arm[run.seed].folder} have the same seed {run.seed} in the same arm; {hint}",
                )
            arm[run.seed] = run
        self.arms = arms if by else _with_short_names(arms)
        self.within = [
            name for name in self.differing if name not in self.by and any(self._varies(a, name) for a in arms.values())
        ]
        tags = dict.fromkeys(tag for run in runs for tag in run.scalars)
        shown = [tag for tag in tags if tag.startswith("val/") or tag in (*ROLLOUT_TAGS, "train/loss")]
        self.metrics = [name for name in metrics or shown if any(self.series(run, name) for run in runs)]
        if not self.metrics or (metrics and len(self.metrics) < len(metrics)):
            missing = [name for name in metrics if name not in self.metrics]
            known = {tag.removeprefix(self.prefix) for tag in tags if tag.startswith(self.prefix)}
            wanted = ", ".join(missing) or "val/ or rollout/ metrics"
            hint = hint_at(missing[0] if missing else "val/score", known)
            raise SettingError("unknown-metric", f"no run has {wanted} over {axis}; {hint}")

    @property
    def prefix(self) -> str:
        """The prefix of the tags of this x-axis."""
        return "" if self.axis == "updates" else f"vs_{self.axis}/"

    @staticmethod
    def _varies(arm: Mapping[int, FinishedRun], name: str) -> bool:
        return len({json.dumps(run.settings.get(name), default=str) for run in arm.values()}) > 1

    def label(self, run: FinishedRun) -> str:
        """Return the name of a run's arm."""
        return ", ".join(f"{name.rpartition('.')[2]}={plain(run.settings.get(name))}" for name in self.by) or "all runs"

    def series(self, run: FinishedRun, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return positions and values of a metric of a run; None if it has none."""
        return run.scalars.get(self.prefix + metric)

    def curve(self, arm: str, metric: str) -> Curve | None:
        """Average a metric over the seeds of an arm; values at different positions are interpolated."""
        found = [series for run in self.arms[arm].values() if (series := self.series(run, metric)) is not None]
        if not found:
            return None
        start, end = max(x[0] for x, _ in found), min(x[-1] for x, _ in found)
        grid = np.unique(np.concatenate([x for x, _ in found]))
        grid = grid[(grid >= start) & (grid <= end)]
        values = np.array([np.interp(grid, x, y) for x, y in found])  # (seeds, points)
        mean, low, high = np.array([mean_interval(column.tolist()) for column in values.T]).reshape(-1, 3).T
        return Curve(grid, mean, low, high)

    def finals(self, arm: str, metric: str) -> dict[int, float]:
        """Return the final value of a metric by seed: the last value for val/, else the mean of the last tenth."""
        found = {}
        for seed, run in self.arms[arm].items():
            if (series := self.series(run, metric)) is not None:
                x, y = series
                late = x >= (x[-1] if metric.startswith("val/") else x[-1] - LAST_SHARE * (x[-1] - x[0]))
                found[seed] = float(y[late].mean())
        return found

    def tests(self, metric: str) -> dict[str, tuple[Difference, float]]:
        """Test each arm against the first; return the difference and its p-value, adjusted by Holm for the arms."""
        first, *others = self.arms
        found = {arm: seed_difference(self.finals(first, metric), self.finals(arm, metric))
                 for arm in others if self.finals(arm, metric) and self.finals(first, metric)}  # fmt: skip
        return dict(zip(found, zip(found.values(), holm([one.p for one in found.values()]), strict=True), strict=True))

    def frontier(self) -> tuple[str, str] | None:
        """Return the two metrics of the reward-KL plot; None if the runs do not have them."""
        return next((pair for pair in FRONTIERS if set(pair) <= set(self.metrics)), None)
