"""Write the page of an effect: means over seeds, paired tests against the baseline, and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from arms import HELD_OUT_PROMPTS, Arguments, Effect  # in this folder

from rlhf_lightning.evaluation.differences import holm, mean_interval, seed_difference
from rlhf_lightning.evaluation.report import interval, markdown_table, p_value, rewrite_markdown
from rlhf_lightning.evaluation.run_curves import FinishedRun


def write_page(name: str, effect: Effect, arms: dict[str, list[FinishedRun]], arguments: Arguments) -> Path:
    """Write page and plots of an effect, keep what is written below it by hand, and return the path."""
    path = Path(arguments.pages) / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path.with_suffix(".svg"), effect, arms, arguments)
    return rewrite_markdown(path, page(name, effect, arms, arguments))


def page(name: str, effect: Effect, arms: dict[str, list[FinishedRun]], arguments: Arguments) -> str:
    """Return the measured part of a page."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for arm, runs in arms.items():
        for run in runs:
            for measure, value in effect.measures(arm, run, arguments).items():
                values.setdefault(measure, {}).setdefault(arm, {})[run.seed] = value
    first, *others = arms
    rows = [
        [arm, len(runs), *(_shown(list(found[arm].values())) for found in values.values())]
        for arm, runs in arms.items()
    ]
    tests = []
    for measure, found in values.items():
        gaps = [seed_difference(found[first], found[arm]) for arm in others]
        for arm, gap, p in zip(others, gaps, holm([gap.p for gap in gaps]), strict=True):
            tests.append([measure, arm, gap.mean, interval([gap.low, gap.high]), p_value(gap.p), p_value(p)])
    parts = [
        f"# {effect.title}",
        f"**Claim.** {effect.claim}",
        f"**Here.** {effect.setting} `python experiments/effects/run.py {name}` writes this page.",
        markdown_table(["arm", "seeds", *values], rows),
        "Means over seeds with Student's 95 % interval. A metric of training is that of the last validation, or the "
        f"mean over the last quarter of the rollouts. Gold reward and KL from the SFT policy are those of completions "
        f"of {HELD_OUT_PROMPTS} held-out prompts.",
        markdown_table(["metric", "arm", f"difference from {first}", "95 % interval", "p", "p (Holm)"], tests),
        "Paired t-tests over seeds; Holm's correction is for the arms of one metric.",
        effect.note(values),
        f"![{'; '.join(f'{panel.y} over {panel.x}' for panel in effect.panels)}]({name}.svg)",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _shown(values: list[float]) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:.3f} {interval([low, high])}"


def draw(path: Path, effect: Effect, arms: dict[str, list[FinishedRun]], arguments: Arguments) -> None:
    """Plot the panels of an effect: means over seeds, with 95 % intervals of the vertical axis."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "effects"
    count = len(effect.panels)
    figure, axes = plt.subplots(1, count, figsize=(2.5 + 4.5 * count, 4), layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, effect.panels, strict=True):
        for number, (arm, runs) in enumerate(arms.items()):
            x, mean, low, high = _over_seeds([panel.curve(run, arguments) for run in runs])
            axis.plot(x, mean, color=f"C{number}", label=arm, marker="o" if len(x) < 12 else "", markersize=3)
            axis.fill_between(x, low, high, color=f"C{number}", alpha=0.15, lw=0)
        axis.set_xlabel(panel.x)
        axis.set_ylabel(panel.y)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _over_seeds(curves: list[Any]) -> Any:
    """Return the mean x, the mean y and the bounds of its interval at the places of the first curve."""
    places = curves[0].places
    x, y = (
        np.array([np.interp(places, curve.places, getattr(curve, axis)) for curve in curves]) for axis in ("x", "y")
    )
    return (x.mean(0), *np.array([mean_interval(column.tolist()) for column in y.T]).T)
