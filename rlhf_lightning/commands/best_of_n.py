"""``rlhf best-of-n``: sample, score and select demonstrations (best-of-n, RAFT, rejection sampling)."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_lightning.atomic_files import write_lines
from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import DataError, SettingError, check_range

DEFAULTS = SamplingArguments()

Keep = Literal["best", "soft", "random", "top-k", "threshold"]
Row = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf best-of-n``."""
    return run_function(best_of_n, argv, "rlhf best-of-n")


def best_of_n(
    model: str,
    scorer: dict[str, Any] | str,
    prompts: str,
    out: str,
    n: int = 8,
    keep: Keep = "best",
    top: int | None = None,
    threshold: float | None = None,
    softness: float | None = None,
    keep_unfinished: bool = False,
    as_chat: bool = False,
    sampling: SamplingArguments = DEFAULTS,
) -> int:
    """Sample completions of each prompt, score them, and write the selected ones as demonstrations.

    Each line has prompt, completion, score, n and unique (the share of the prompt's samples that are distinct).
    SFTDataModule reads the file; supervised fine-tuning on it is one round of RAFT (Dong et al., arXiv 2304.06767).
    --keep random is a control: fine-tuning on own samples without selection. Empty completions and completions without
    a score are never kept. With --environment a demonstration is a whole episode; the policy's turns are trained on.

    Args:
        model: folder of a policy (weights or adapter), .gguf file or hub id.
        scorer: scores the completions: folder of a reward model, function, or {class_path: ..., init_args: ...}.
        prompts: file of prompts (.jsonl, .json, .csv, .parquet): a column prompt or messages, or training rows.
        out: JSONL file of demonstrations to write; it is created only when complete.
        n: completions per prompt.
        keep: best (of each prompt; ties are broken at random), soft (one of each prompt, drawn with the probabilities
            softmax(score / softness)), random (one of each prompt), top-k (the best over all prompts, which favours
            easy prompts) or threshold (all completions with at least this score).
        top: number of completions that top-k keeps.
        threshold: lowest score that threshold keeps.
        softness: temperature of soft in units of the score; near 0 it keeps the best, large values draw uniformly.
        keep_unfinished: also keep completions that were truncated at max_new_tokens.
        as_chat: put plain-text prompts into a user turn of the chat template.
        sampling: sampling settings.
    """
    from rlhf_lightning.commands.generate import (
        Speed,
        completions,
        hint_at_template,
        read_prompts,
        refuse_overwriting,
        scorer_beside,
    )

    _check(n, keep, top, threshold, softness)
    sampling.settings()  # raises before anything is read
    refuse_overwriting(prompts, out)
    asked = read_prompts(prompts, as_chat)
    policy, tokenizer = sampling.load(model)
    hint_at_template(asked, tokenizer)
    score = scorer_beside(scorer, policy)
    speed = Speed(len(asked) * n)
    rows = list(completions(policy, tokenizer, asked, n, sampling, speed, score, scorer))
    said = speed.finish()
    groups = [rows[start : start + n] for start in range(0, len(rows), n)]
    kept = selected(groups, keep, top, threshold, softness, keep_unfinished, sampling.seed)
    if not kept:
        raise DataError(
            "no-usable-rows",
            f"none of {len(rows)} completions is kept: {sum(not row['finished'] for row in rows)} were truncated at "
            f"max_new_tokens, {len(rows) - len(scores_of(rows))} have no score, and the best score is "
            f"{max(scores_of(rows), default=math.nan):.4g}; raise max_new_tokens, set keep_unfinished, or lower the "
            "threshold",
        )
    write_lines(Path(out), (demonstration(row, groups[place]) for place, row in kept))
    print(f"{out}: {said}\n{report_of(groups, [row for _, row in kept]).describe()}")
    left = [group for place, group in enumerate(groups) if place not in {place for place, _ in kept}]
    if left:
        print(why_none(left, keep, threshold, keep_unfinished))
    return 0


def _check(n: int, keep: Keep, top: int | None, threshold: float | None, softness: float | None) -> None:
    check_range(n >= 1, "it must be at least 1", n=n)
    for name, value, user in (
        ("top", top, "top-k"),
        ("threshold", threshold, "threshold"),
        ("softness", softness, "soft"),
    ):
        if (value is not None) != (keep == user):
            fault = "needs" if value is None else f"applies only to keep={user}, not to keep={keep}"
            raise SettingError(
                "conflicting-settings", f"keep={user} {fault} {name}" if value is None else f"{name} {fault}"
            )
    check_range(top is None or top >= 1, "it must be at least 1", top=top)
    check_range(softness is None or 0 < softness < math.inf, "it must be positive and finite", softness=softness)


def selected(
    groups: Sequence[Sequence[Row]], keep: Keep, top: int | None, threshold: float | None, softness: float | None,
    keep_unfinished: bool, seed: int,
) -> list[tuple[int, Row]]:  # fmt: skip
    """Return the selected rows in the order of the prompts, each with the index of its group.

    ``groups`` are the samples of each prompt; ``seed`` is that of the draws. The others are arguments of `best_of_n`.
    """
    lot = random.Random(seed)
    usable = [[row for row in group if _is_usable(row, keep_unfinished)] for group in groups]
    if keep == "random":
        chosen = [(place, lot.choice(rows)) for place, rows in enumerate(usable) if rows]
    elif keep == "soft":
        assert softness is not None
        chosen = [(place, _drawn_softly(rows, softness, lot)) for place, rows in enumerate(usable) if rows]
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
        distinct.setdefault(json.dumps([row["prompt"], _written(row)]), (place, row))
    return sorted(list(distinct.values())[:top], key=lambda one: one[0])


def _drawn_softly(rows: Sequence[Row], softness: float, lot: random.Random) -> Row:
    import torch

    from rlhf_lightning.functional.selection import soft_best_of_n

    chances = soft_best_of_n(torch.tensor([row["score"] for row in rows], dtype=torch.float64), softness)
    return lot.choices(rows, chances.tolist())[0]


def _is_usable(row: Row, keep_unfinished: bool) -> bool:
    return bool(row["completion"].strip()) and row["score"] is not None and (row["finished"] or keep_unfinished)


def _written(row: Row) -> Any:
    """Return the text of a completion, or all turns of an episode."""
    return row.get("turns", row["completion"])


def scores_of(rows: Sequence[Row]) -> list[float]:
    """Return the scores of the completions that have one."""
    return [row["score"] for row in rows if row["score"] is not None]


def why_none(left: Sequence[Sequence[Row]], keep: Keep, threshold: float | None, keep_unfinished: bool) -> str:
    """Explain why some prompts have no demonstration, and what to change; ``left`` are their samples."""
    reasons = {"truncated": 0, "empty": 0, "unscored": 0, "low": 0, "alike": 0}
    for group in left:
        written = [row for row in group if row["completion"].strip()]
        whole = [row for row in written if row["finished"] or keep_unfinished]
        best = max(scores_of(whole), default=None)
        low = keep == "top-k" or (threshold is not None and best is not None and best < threshold)
        missing = "empty" if not written else "truncated" if not whole else "unscored"
        reasons[missing if best is None else "low" if low else "alike"] += 1
    words = {
        "truncated": "all samples were truncated (raise max_new_tokens or set keep_unfinished)",
        "empty": "all samples are empty",
        "unscored": "no sample has a score",
        "low": "scores are too low (lower the threshold, or raise top)",
        "alike": "another row has the same prompt and completion",
    }
    told = [f"{count:,}: {words[name]}" for name, count in reasons.items() if count]
    return f"prompts without a demonstration: {len(left):,} ({'; '.join(told)})"


def demonstration(row: Row, group: Sequence[Row]) -> Row:
    """Return a selected completion as a demonstration."""
    about = {"score": row["score"], "n": len(group), "unique": _distinct(group) / len(group)}
    return {"prompt": row["prompt"], "completion": _written(row), **about}


def _distinct(rows: Sequence[Row]) -> int:
    return len({json.dumps(_written(row)) for row in rows})


class SelectionReport(NamedTuple):
    """Statistics of a selection."""

    kept: int  # number of demonstrations
    acceptance: float  # their share of all samples
    answered: float  # share of prompts with a demonstration
    unique: float  # mean share of a prompt's samples that are distinct
    finished: float  # share of samples with an end token
    mean_score: float  # mean score of all samples
    best_score: float  # mean over prompts of the best sample, finished or not
    kept_score: float  # mean score of the demonstrations
    length_shift: float  # mean tokens of the demonstrations minus those of all samples

    def describe(self) -> str:
        """Return the statistics as three lines of text."""
        longer = "longer" if self.length_shift >= 0 else "shorter"
        return (
            f"kept {self.kept:,} completions: {self.acceptance:.1%} of the samples, for {self.answered:.1%} of the "
            f"prompts\n"
            f"mean score: {self.mean_score:.4g} of all samples, {self.best_score:.4g} of the best of each prompt, "
            f"{self.kept_score:.4g} of the kept ones\n"
            f"{self.unique:.1%} of a prompt's samples are distinct, {self.finished:.1%} reached an end token; kept "
            f"completions are {abs(self.length_shift):.1f} tokens {longer} than the mean"
        )


def report_of(groups: Sequence[Sequence[Row]], kept: Sequence[Row]) -> SelectionReport:
    """Return the statistics of a selection."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / max(len(values), 1)

    rows = [row for group in groups for row in group]
    return SelectionReport(
        kept=len(kept),
        acceptance=len(kept) / len(rows),
        answered=len({json.dumps(row["prompt"]) for row in kept}) / len({json.dumps(row["prompt"]) for row in rows}),
        unique=mean([_distinct(group) / len(group) for group in groups]),
        finished=mean([float(row["finished"]) for row in rows]),
        mean_score=mean(scores_of(rows)),
        best_score=mean([max(found) for group in groups if (found := scores_of(group))]),
        kept_score=mean([row["score"] for row in kept]),
        length_shift=mean([row["length"] for row in kept]) - mean([row["length"] for row in rows]),
    )
