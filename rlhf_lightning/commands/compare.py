"""``rlhf compare``: compare runs over seeds with curves, final values, paired tests and the reward-KL frontier."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import DataError

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.report import Section
    from rlhf_lightning.evaluation.run_curves import FinishedRun, RunComparison

MOST_PANELS, SHOWN_PROMPTS, MOST_NAMED = 9, 8, 8


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf compare``."""
    return run_function(compare, argv, "rlhf compare", positional=["runs"])


def compare(
    runs: Sequence[str],
    by: Sequence[str] = (),
    over: Literal["updates", "episodes", "tokens"] = "updates",
    metrics: Sequence[str] = (),
    unfinished: bool = False,
    out: str = "comparison",
) -> int:
    """Compare runs, and test which settings make a difference larger than the noise between seeds.

    Reads the TensorBoard events in the run folders. Runs with equal settings and different seeds are one arm. Curves
    are means over an arm's seeds with Student's 95 % intervals. Final values are tested against the first arm, paired
    by seed, with p-values adjusted by Holm for the number of arms. Writes report.md, report.json, curves.png,
    frontier.png and report.html (one file with everything, which works offline). The folder tensorboard has one run per
    arm, with its mean curves, its settings and its final means for the HPARAMS tab.

    Args:
        runs: run folders, or folders that contain runs, such as a sweep; the last version of each name is used.
        by: settings that define the arms, as in model.beta; by default all settings that differ.
        over: x-axis of the curves; episodes and tokens exist for headline metrics.
        metrics: metrics, separated by spaces or commas; by default val/, the rollout headline metrics and train/loss.
        unfinished: include runs that have not finished.
        out: folder of the report.
    """
    from rlhf_lightning.evaluation.report import write_report
    from rlhf_lightning.evaluation.run_curves import RunComparison, read_run, run_folders

    found = [read_run(folder) for folder in run_folders(runs)]
    left_out = [] if unfinished else [run for run in found if run.status != "finished"]
    kept = [run for run in found if run not in left_out]
    if not kept:
        raise DataError("no-finished-run", f"none of {len(found)} runs has finished; give --unfinished to compare them")
    comparison = RunComparison(kept, _names(by), over, _names(metrics))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"Curves": draw_curves(comparison, folder / "curves.png")}
    if comparison.frontier():
        pictures["Reward against KL"] = draw_reward_kl(comparison, folder / "frontier.png")
    notes, sections = notes_of(comparison, left_out), sections_of(comparison)
    said = write_report(
        folder, "compare.html.jinja", "Comparison of runs", notes, sections, report_of(comparison, left_out), pictures,
        samples=samples_of(comparison),
    )  # fmt: skip
    write_arms(comparison, folder / "tensorboard")
    print(f"{said}   arms: tensorboard --logdir {folder / 'tensorboard'}")
    return 0


def _names(given: Sequence[str]) -> list[str]:
    return [name for text in given for name in text.split(",") if name]


def notes_of(comparison: "RunComparison", left_out: "Sequence[FinishedRun]") -> list[str]:
    """Return sentences about the compared runs and the runs that were left out."""
    counts = [len(arm) for arm in comparison.arms.values()]
    by = ", ".join(comparison.by) or "none: all settings are equal"
    by = by if len(comparison.by) <= MOST_NAMED else f"the {len(comparison.by)} settings that differ"
    notes = [
        f"{len(comparison.runs)} runs in {len(counts)} arms by {by}; seeds per arm: {', '.join(map(str, counts))}."
    ]
    if min(counts) < 2:
        notes.append("An arm has a single seed: without a second one there is no interval and no test.")
    if comparison.within:
        notes.append(f"Settings that also differ within an arm: {', '.join(comparison.within)}.")
    if "model.class_path" in comparison.differing:
        notes.append("The runs have different objectives, and losses of different objectives cannot be compared.")
    seeds = {frozenset(arm) for arm in comparison.arms.values()}
    if len(seeds) > 1:
        notes.append("The arms have different seeds; paired tests use only the shared seeds.")
    for run in left_out:
        notes.append(f"Left out, not finished: {run.folder} ({run.status}).")
    return notes


def sections_of(comparison: "RunComparison") -> "list[Section]":
    """Return the tables of final values, tests and differing settings."""
    from rlhf_lightning.evaluation.differences import mean_interval
    from rlhf_lightning.evaluation.report import Section, interval, p_value

    finals, tests = [], []
    for metric in comparison.metrics:
        for arm in comparison.arms:
            values = list(comparison.finals(arm, metric).values())
            if values:
                mean, *ends = mean_interval(values)
                finals.append([metric, arm, mean, interval(ends), len(values)])
        for arm, (gap, adjusted) in comparison.tests(metric).items():
            ends = [gap.low, gap.high]
            tests.append(
                [metric, arm, gap.mean, interval(ends), p_value(gap.p), p_value(adjusted), f"{gap.test}, n={gap.n}"]
            )
    first = next(iter(comparison.arms))
    sections = [
        Section(
            "Final values", ["metric", "arm", "mean", "95 % interval", "seeds"], finals,
            "Mean over seeds of the last value (val/) or of the last tenth of the training (other metrics).",
        )
    ]  # fmt: skip
    if tests:
        header = ["metric", "arm", "difference", "95 % interval", "p", "p (Holm)", "test"]
        note = (
            "Each arm minus the first. Holm's correction covers the arms of one metric; it does not correct for the "
            "number of metrics."
        )
        sections.append(Section(f"Differences from {first}", header, tests, note))
    if comparison.differing:
        rows = [[name, *(_values(arm, name) for arm in comparison.arms.values())] for name in comparison.differing]
        sections.append(Section("Settings that differ", ["setting", *comparison.arms], rows))
    return sections


def _values(arm: "Mapping[int, FinishedRun]", name: str) -> str:
    from rlhf_lightning.evaluation.run_curves import plain

    return " / ".join(dict.fromkeys(plain(run.settings.get(name)) for run in arm.values()))


def report_of(comparison: "RunComparison", left_out: "Sequence[FinishedRun]") -> dict[str, Any]:
    """Return the content of report.json."""
    return {
        "by": comparison.by,
        "left_out": {str(run.folder): run.status for run in left_out},
        "arms": {
            arm: {
                "runs": {seed: str(run.folder) for seed, run in runs.items()},
                "finals": {metric: comparison.finals(arm, metric) for metric in comparison.metrics},
            }
            for arm, runs in comparison.arms.items()
        },
        "tests": {
            metric: {arm: {**gap._asdict(), "p_holm": p} for arm, (gap, p) in comparison.tests(metric).items()}
            for metric in comparison.metrics
        },
    }


def samples_of(comparison: "RunComparison") -> list[dict[str, Any]]:
    """Return the last samples of each arm's first seed, by prompt."""
    from rlhf_lightning.runs.samples import as_text

    found: dict[str, list[tuple[str, str, float | None]]] = {}
    for arm, runs in comparison.arms.items():
        rows = runs[min(runs)].samples
        last = max((row["update"] for row in rows), default=0)
        for row in rows:
            if row["update"] == last:
                found.setdefault(as_text(row["prompt"]), []).append((arm, row["completion"], row["score"]))
    return [{"prompt": prompt, "sides": sides} for prompt, sides in list(found.items())[:SHOWN_PROMPTS]]


def write_arms(comparison: "RunComparison", folder: Path) -> None:
    """Write each arm as a TensorBoard run: mean curves, settings, and final means with their interval bounds.

    Runs of an earlier comparison in the folder are replaced.
    """
    import shutil

    from torch.utils.tensorboard import SummaryWriter

    from rlhf_lightning.commands.sweep import arm_name
    from rlhf_lightning.evaluation.differences import mean_interval

    shutil.rmtree(folder, ignore_errors=True)
    for number, arm in enumerate(comparison.arms):
        first = next(iter(comparison.arms[arm].values()))
        settings = {name: str(first.settings.get(name)) for name in comparison.by} | {
            "seeds": len(comparison.arms[arm])
        }
        ends: dict[str, float] = {}
        for metric in comparison.metrics:
            found = mean_interval(list(comparison.finals(arm, metric).values()))
            ends |= dict(zip((metric, f"{metric} (low)", f"{metric} (high)"), found, strict=True))
        with SummaryWriter(str(folder / f"{number}_{arm_name({'arm': arm})}")) as writer:
            writer.add_hparams(settings, ends, run_name=".")
            for metric in comparison.metrics:
                if (curve := comparison.curve(arm, metric)) is not None:
                    for x, mean in zip(curve.x, curve.mean, strict=True):
                        writer.add_scalar(f"mean/{metric}", mean, int(x))


def draw_curves(comparison: "RunComparison", path: Path) -> Path:
    """Draw the curves of all arms, one panel per metric, and return the path."""
    from rlhf_lightning.evaluation.report import plot_text, pyplot, save_figure

    metrics = comparison.metrics[:MOST_PANELS]
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    size = (5 * columns, 3.4 * rows)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        for number, arm in enumerate(comparison.arms):
            if (curve := comparison.curve(arm, metric)) is not None:
                colour, dots = f"C{number % 10}", "o" if len(curve.x) < 12 else ""
                axis.plot(curve.x, curve.mean, color=colour, label=plot_text(arm), marker=dots, markersize=3)
                axis.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
        axis.set_title(plot_text(metric), fontsize=10)
        axis.set_xlabel(comparison.axis)
        axis.grid(alpha=0.3)
    shown = [pair for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    labels = {label: handle for handle, label in shown}
    below = {"loc": "outside lower center", "ncols": 1 if max(map(len, labels)) > 40 else columns}
    figure.legend(labels.values(), labels.keys(), frameon=False, fontsize=8, **below)
    return save_figure(figure, path, dpi=110)


def draw_reward_kl(comparison: "RunComparison", path: Path) -> Path:
    """Draw reward against KL: each arm's path over training, and its final point with intervals over seeds."""
    import numpy as np

    from rlhf_lightning.evaluation.differences import mean_interval
    from rlhf_lightning.evaluation.report import plot_text, pyplot, save_figure

    pair = comparison.frontier()
    assert pair is not None
    figure, axis = pyplot().subplots(figsize=(6.5, 4.5), layout="constrained")
    for number, arm in enumerate(comparison.arms):
        curves = [comparison.curve(arm, metric) for metric in pair]
        ends = [mean_interval(list(comparison.finals(arm, metric).values())) for metric in pair]
        if curves[0] is None or curves[1] is None:
            continue
        reward = np.interp(curves[0].x, curves[1].x, curves[1].mean)
        colour = f"C{number % 10}"
        axis.plot(curves[0].mean, reward, color=colour, alpha=0.4)
        half = [np.nan_to_num(high - mean) for mean, _, high in ends]
        axis.errorbar(ends[0][0], ends[1][0], half[1], half[0], "o", color=colour, capsize=3, label=plot_text(arm))
    axis.set_xlabel(f"{pair[0]}, nats per completion")
    axis.set_ylabel(pair[1])
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path, dpi=110)
