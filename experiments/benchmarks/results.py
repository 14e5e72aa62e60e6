"""Turn the runs of a comparison into its page: medians, ratios, fractions of the limit, memory, and missing runs."""

from statistics import median
from typing import Any, NamedTuple

from cases import LIMIT, PEER, Case, Goal, Suite

Runs = dict[str, list[dict[str, Any]]]
"""Records of the runs of one case, by side."""


class Finding(NamedTuple):
    """A figure and its bound. Either is None if there is no figure or no bound."""

    value: float | None
    floor: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Return whether the figure meets its bound."""
        if self.value is None or self.floor is None:
            return None
        return self.value <= self.floor if self.at_most else self.value >= self.floor

    def written(self, digits: int = 2) -> str:
        """Format the figure, its bound, and whether the bound is met."""
        if self.value is None:
            return "missing" if self.floor is not None else ""
        if self.met is None or not self.floor:
            return f"{self.value:.{digits}f}"
        sign = "<=" if self.at_most else ">="
        return f"{self.value:.{digits}f} ({sign} {self.floor:g}: {'met' if self.met else 'NOT met'})"


def work(case: Case, record: dict[str, Any], steps: slice, ours: dict[str, Any]) -> float:
    """Return the work of the steps: tokens of the rows, or episodes if each side samples its own tokens.

    Both sides read the same rows, so our token count is used for both; some stages of the peer do not report tokens.
    The limit truncates rows slightly differently and reports its own count.
    """
    count = len(record["seconds"][steps])
    if case.same_losses is None:
        return count * record["batch"]
    tokens = record["tokens"] if record.get("tokens") and "shared_prompt" in record else ours["tokens"]
    each = [after - before for before, after in zip([0, *tokens], tokens, strict=False)]
    return sum(each[steps])


def speed(case: Case, records: list[dict[str, Any]], steps: slice, ours: list[dict[str, Any]]) -> float | None:
    """Return the median work per second over runs; None without runs."""
    rates = [work(case, record, steps, ours[0]) / sum(record["seconds"][steps]) for record in records if ours]
    return median(rates) if rates else None


def memory(records: list[dict[str, Any]]) -> float | None:
    """Return the median peak memory, GB (GPU memory if a run used a GPU); None without runs."""
    return median(record.get("peak_gpu_gb") or record["peak_rss_gb"] for record in records) if records else None


def ratio(above: float | None, below: float | None) -> float | None:
    """Return the quotient if both values are known, else None."""
    return None if above is None or below is None else above / below


def findings(case: Case, goal: Goal, runs: Runs) -> dict[str, Finding]:
    """Return the figures of one line, keyed by column."""
    ours, peer, limit = runs.get(goal.side, []), runs.get(PEER, []), runs.get(LIMIT, [])
    # The limit does the same work in every epoch, so all of its steps after warm-up count.
    against = slice(1, None)
    own, peers = speed(case, ours, goal.steps, ours), speed(case, peer, goal.steps, ours)
    limits = speed(case, limit, against, ours) if goal.share is not None else None
    peak, other = memory(ours), memory(runs.get(goal.memory_of, []))
    return {
        "ours": Finding(own),
        "peer": Finding(peers),
        "speed": Finding(ratio(own, peers), goal.speed),
        "share": Finding(ratio(own, limits), goal.share),
        "peak": Finding(peak),
        "other": Finding(other),
        "memory": Finding(ratio(peak, other), goal.memory, at_most=True),
    }


def loss_gaps(case: Case, runs: Runs) -> tuple[float, float] | None:
    """Return the differences between our losses and the peer's: the first loss, and the maximum over later ones. None
    if they cannot be compared.
    """
    ours, peer = next((runs[side] for side in case.ours if runs.get(side)), []), runs.get(PEER, [])
    if case.same_losses is None or not ours or not peer:
        return None
    gaps = [abs(a - b) for a, b in zip(ours[0]["loss"], peer[0]["loss"], strict=False)]
    if len(gaps) < len(ours[0]["seconds"]) or any(gap != gap for gap in gaps):
        return float("inf"), float("inf")
    return gaps[0], max(gaps[1:], default=0.0)


def losses_agree(case: Case, runs: Runs) -> bool | None:
    """Return whether both sides computed the same losses; None if they cannot be compared."""
    gaps = loss_gaps(case, runs)
    if gaps is None or case.same_losses is None:
        return None
    return all(gap <= most for gap, most in zip(gaps, case.same_losses, strict=True))


def missing(case: Case, runs: Runs, repeats: int) -> list[str]:
    """Return the sides with fewer runs than requested."""
    short = [(side, len(runs.get(side, []))) for side in case.sides if len(runs.get(side, [])) < repeats]
    return [f"{side} ({found} of {repeats})" for side, found in short]


def table(cases: dict[str, Case], found: dict[str, Runs]) -> list[str]:
    """Return the lines of the Markdown table, for all cases with any run."""
    lines = [
        "| case | ours /s | peer /s | speed | share of the limit | peak GB | against GB | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        for goal in case.goals if found.get(name) else ():
            row = findings(case, goal, found[name])
            label = f"{name}, {goal.name}" if goal.name else name
            figures = [row["ours"].written(1), row["peer"].written(1), row["speed"].written()]
            figures += [row["share"].written(), row["peak"].written(), row["other"].written(), row["memory"].written()]
            lines.append(f"| {label} | {' | '.join(figures)} |")
    return lines


def loss_lines(cases: dict[str, Case], found: dict[str, Runs]) -> list[str]:
    """Return one line on losses for each case with the same algorithm on both sides."""
    lines = []
    for name, case in cases.items():
        gaps, agree = loss_gaps(case, found.get(name, {})), losses_agree(case, found.get(name, {}))
        if gaps is not None and case.same_losses is not None:
            first, later = case.same_losses
            lines.append(
                f"- {name}: first loss differs by {gaps[0]:.1e} (at most {first:g}), later ones by {gaps[1]:.1e} "
                f"(at most {later:g}): {'the same' if agree else 'NOT the same'}"
            )
    return lines


def page(
    suite: Suite, found: dict[str, Runs], repeats: int, made_with: list[str], commands: dict[str, list[str]]
) -> str:
    """Return the whole page.

    Args:
        suite: the comparison.
        found: runs of each case.
        repeats: requested runs of each side.
        made_with: lines on versions and machine.
        commands: command line of each side of each case, without paths.
    """
    cases = suite.cases
    gaps = {name: missing(case, found.get(name, {}), repeats) for name, case in cases.items()}
    absent = [f"- {name}: {', '.join(sides)}" for name, sides in gaps.items() if sides]
    counts = {len(records) for runs in found.values() for records in runs.values()}
    return "\n".join(
        [
            "# Speed and memory against the peer and the limit",
            "",
            "Work per second is unpadded tokens of the rows (prompts counted for each completion), or episodes where",
            "each side samples its own; medians over runs taken in turn, the first step of each left out. The limit is",
            "bare PyTorch on exactly as many tokens, none of them pads. In brackets: what is asked for. Memory is",
            f"{suite.memory}.",
            "",
            *table(cases, found),
            "",
            f"Runs of a side: {', '.join(map(str, sorted(counts))) or 'none'}.",
            "",
            *suite.said,
            "",
            "## The same losses",
            "",
            *(loss_lines(cases, found) or ["No case has runs of both sides."]),
            "",
            "## Missing",
            "",
            *(absent or ["Nothing."]),
            "",
            "## Made with",
            "",
            *made_with,
            "",
            "## How each side was called",
            "",
            *[f"- {name}: `{command}`" for name, lines in commands.items() for command in lines],
            "",
        ]
    )
