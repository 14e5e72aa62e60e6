"""``rlhf best-of-n``: sample, score and keep completions as demonstrations (best-of-n, RAFT, rejection sampling)."""

# No postponed annotations: to resolve them jsonargparse imports what is under TYPE_CHECKING, and help takes seconds.

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import DataError, SettingError

DEFAULTS = SamplingArguments()

Keep = Literal["best", "random", "top-k", "threshold"]
Row = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf best-of-n``."""
    return run_function(best_of_n, argv, "rlhf best-of-n")


def best_of_n(
    model: str,
    scorer: str,
    prompts: str,
    out: str,
    n: int = 8,
    keep: Keep = "best",
    top: int | None = None,
    threshold: float | None = None,
    keep_unfinished: bool = False,
    as_chat: bool = False,
    sampling: SamplingArguments = DEFAULTS,
) -> int:
    """Sample completions of each prompt, score them, and write those worth imitating as demonstrations.

    A line has prompt, completion, score, n and unique (the share of the prompt's samples that are distinct), as
    SFTDataModule reads them: supervised fine-tuning on the file is one round of RAFT (Dong et al., arXiv 2304.06767).
    With --keep random the same samples give the control: what imitating oneself does without any selection.
    Empty completions are never kept, and those that did not end by themselves only on demand.

    Args:
        model: folder of a policy (whole or adapter), .gguf file or hub id.
        scorer: reward model's folder, or import path of a function, that scores the completions.
        prompts: file of prompts (.jsonl, .json, .csv, .parquet): a column prompt or messages, or any training form.
        out: JSONL file of demonstrations to write; it appears when all is done.
        n: completions per prompt.
        keep: best (of each prompt, equals by lot), random (one of each prompt), top-k (the best of all prompts
            together, which are those of easy prompts) or threshold (all that score at least so much).
        top: how many top-k keeps.
        threshold: least score that threshold keeps.
        keep_unfinished: also keep completions that were cut off at their longest.
        as_chat: put a plain-text prompt into a user turn of the chat template.
        sampling: how completions are sampled.
    """
    from rlhf_lightning.commands.generate import (
        Speed,
        completions,
        read_prompts,
        scorer_beside,
        write_lines,
    )
    from rlhf_lightning.commands.quiet import quieten

    _check(n, keep, top, threshold)
    quieten()
    sampling.settings()  # refused before anything is read
    asked = read_prompts(prompts, as_chat)
    policy, tokenizer = sampling.load(model)
    score = scorer_beside(scorer, policy)
    speed = Speed(len(asked) * n)
    rows = list(completions(policy, tokenizer, asked, n, sampling, speed, score, scorer))
    said = speed.finish()
    groups = [rows[start : start + n] for start in range(0, len(rows), n)]
    kept = selected(groups, keep, top, threshold, keep_unfinished, sampling.seed)
    if not kept:
        raise DataError(
            "no-usable-rows",
            f"none of {len(rows)} completions is kept: {sum(not row['finished'] for row in rows)} were cut off at "
            f"max_new_tokens, and the best score is {max(row['score'] for row in rows):.4g}; raise max_new_tokens, set "
            "keep_unfinished, or lower the threshold",
        )
    write_lines(Path(out), (demonstration(row, groups[place]) for place, row in kept))
    print(f"{out}: {said}\n{report_of(groups, [row for _, row in kept]).describe()}")
    return 0


def _check(n: int, keep: Keep, top: int | None, threshold: float | None) -> None:
    if n < 1:
        raise SettingError("setting-out-of-range", f"n is {n}: it must be at least 1")
    for name, value, user in (("top", top, "top-k"), ("threshold", threshold, "threshold")):
        if (value is not None) != (keep == user):
            fault = "needs" if value is None else f"belongs to keep={user}: keep={keep} does not take"
            raise SettingError(
                "conflicting-settings", f"keep={user} {fault} {name}" if value is None else f"{name} {fault} it"
            )
    if top is not None and top < 1:
        raise SettingError("setting-out-of-range", f"top is {top}: it must be at least 1")


def selected(
    groups: Sequence[Sequence[Row]], keep: Keep, top: int | None, threshold: float | None, keep_unfinished: bool,
    seed: int,
) -> list[tuple[int, Row]]:  # fmt: skip
    """Return what is kept, in the order of the prompts: the number of its group, and the row.

    Args:
        groups: the samples of each prompt.
        keep: the rule.
        top: how many top-k keeps.
        threshold: least score that threshold keeps.
        keep_unfinished: whether a completion may be cut off.
        seed: seed of the lot that decides between equals.
    """
    lot = random.Random(seed)
    usable = [
        [row for row in group if row["completion"].strip() and (row["finished"] or keep_unfinished)] for group in groups
    ]
    if keep == "random":  # among all samples, so that it is one draw from the policy
        chosen = [(place, lot.choice(rows)) for place, rows in enumerate(usable) if rows]
    else:
        drawn = [(place, row, lot.random()) for place, rows in enumerate(usable) for row in rows]
        ranked = sorted(drawn, key=lambda one: (-one[1]["score"], one[2]))
        chosen = [(place, row) for place, row, _ in ranked]
        if keep == "best":
            firsts: dict[int, Row] = {}
            for place, row in chosen:
                firsts.setdefault(place, row)
            chosen = list(firsts.items())
        elif keep == "threshold":
            assert threshold is not None
            chosen = [(place, row) for place, row in chosen if row["score"] >= threshold]
    distinct: dict[str, tuple[int, Row]] = {}
    for place, row in chosen:
        distinct.setdefault(json.dumps([row["prompt"], row["completion"]]), (place, row))
    return sorted(list(distinct.values())[:top], key=lambda one: one[0])


def demonstration(row: Row, group: Sequence[Row]) -> Row:
    """Return a kept completion as a line of demonstrations."""
    about = {"score": row["score"], "n": len(group), "unique": _distinct(group) / len(group)}
    return {"prompt": row["prompt"], "completion": row["completion"], **about}


def _distinct(rows: Sequence[Row]) -> int:
    return len({row["completion"] for row in rows})


class SelectionReport(NamedTuple):
    """What selection did.

    Attributes:
        kept: demonstrations.
        acceptance: their share of all samples.
        answered: share of prompts with a demonstration.
        unique: mean share of a prompt's samples that are distinct.
        finished: share of samples that ended by themselves.
        mean_score: of all samples.
        best_score: mean over prompts of the best sample, finished or not.
        kept_score: mean of the demonstrations.
        length_shift: mean tokens of the demonstrations less those of all samples.
    """

    kept: int
    acceptance: float
    answered: float
    unique: float
    finished: float
    mean_score: float
    best_score: float
    kept_score: float
    length_shift: float

    def describe(self) -> str:
        """Three lines of it."""
        return (
            f"kept {self.kept:,} completions: {self.acceptance:.1%} of the samples, {self.answered:.1%} of the prompts "
            f"have one\n"
            f"score {self.mean_score:.4g} on average, {self.best_score:.4g} the best of each prompt, "
            f"{self.kept_score:.4g} kept\n"
            f"{self.unique:.1%} of a prompt's samples are distinct, {self.finished:.1%} ended by themselves; kept ones "
            f"are {self.length_shift:+.1f} tokens longer than all"
        )


def report_of(groups: Sequence[Sequence[Row]], kept: Sequence[Row]) -> SelectionReport:
    """Return what selection did to the samples."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / max(len(values), 1)

    rows = [row for group in groups for row in group]
    return SelectionReport(
        kept=len(kept),
        acceptance=len(kept) / len(rows),
        answered=len({json.dumps(row["prompt"]) for row in kept}) / len({json.dumps(row["prompt"]) for row in rows}),
        unique=mean([_distinct(group) / len(group) for group in groups]),
        finished=mean([float(row["finished"]) for row in rows]),
        mean_score=mean([row["score"] for row in rows]),
        best_score=mean([max(row["score"] for row in group) for group in groups]),
        kept_score=mean([row["score"] for row in kept]),
        length_shift=mean([row["length"] for row in kept]) - mean([row["length"] for row in rows]),
    )
