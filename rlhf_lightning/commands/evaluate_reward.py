"""``rlhf evaluate-reward``: test reward models on labelled pairs, next to trivial baselines."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import DataError, SettingError, check_range

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.report import Section
    from rlhf_lightning.evaluation.reward_models import KnownPair

SHOWN_PAIRS = 100


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf evaluate-reward``."""
    return run_function(evaluate_reward, argv, "rlhf evaluate-reward", positional=["models"])


def evaluate_reward(
    pairs: str,
    models: Sequence[str] = (),
    judges: Sequence[str] = (),
    judge_args: dict[str, Any] | None = None,
    question: str | None = None,
    reference: str | None = None,
    beta: float = 0.1,
    subset: str | None = None,
    out: str = "reward_evaluation",
    seed: int = 0,
) -> int:
    """Test reward models on pairs with known winners, next to trivial baselines.

    Reports accuracy by subset with Wilson intervals, paired tests against the first model, best-of-list accuracy,
    calibration, margins and the correlation with length. The baselines choose the longer completion, the completion
    that the file shows first, the model's choice without the prompt, or the choice of a bag of words. A model that is
    only as accurate as a baseline may have learned only what the baseline uses. Writes report.json, report.md,
    reliability.png and report.html.

    Args:
        pairs: file of preferences or ranked lists in any format that training reads, or with lists of right and wrong
            completions as chosen and rejected (RewardBench 2, RM-Bench).
        models: folders of reward models or process reward models, or import paths of scorers. With --reference, folders
            of policies, which are tested by their implicit DPO reward.
        judges: generative judges: folders of language models, addresses of servers, or classes. The margin is the mean
            of their log-odds in both orders.
        judge_args: arguments of the judges' class: --judge_args.NAME VALUE.
        question: question to the judges about two completions.
        reference: the reference of the policies, for the implicit reward beta log(policy / reference).
        beta: coefficient of the implicit reward; it only affects calibration.
        subset: column that names the subset of a row.
        out: folder of the report.
        seed: seed of bootstrap resampling and cross-validation folds.
    """
    import numpy as np

    from rlhf_lightning.evaluation import reward_models as room
    from rlhf_lightning.evaluation.completions import QUESTION
    from rlhf_lightning.evaluation.report import write_report
    from rlhf_lightning.runs.samples import as_text
    from rlhf_lightning.scoring.judges import load_judge

    check_range(beta > 0, "it must be positive", beta=beta)
    if not models and not judges:
        raise SettingError("missing-setting", "there is no model to evaluate: name reward models, or --judges")
    read, lists = read_pairs(pairs, subset)
    decided = [pair for pair in read if not pair.tied]
    rows = [pair.row for pair in decided]
    gaps, blind, tied = {}, {}, {}
    kept = SamplingArguments().load(reference)[0] if reference else None
    for name in dict.fromkeys([*models, *judges]):
        if name in models:
            margins = partial(room.margins, _score(name, kept, beta))
        else:
            margins = partial(room.judge_margins, load_judge(name, judge_args), question=question or QUESTION)
        gaps[name] = margins(decided)
        blind[f"{name}, prompt-blind"] = margins(decided, prompt_blind=True)
        tied[name] = margins([pair for pair in read if pair.tied])
    baselines = {
        "longer completion": room.length_margins(decided), "bag of words": room.bag_of_words_margins(decided, seed),
        **blind,
    }  # fmt: skip
    positions = np.array([pair.position for pair in decided])
    if not np.isnan(positions).all():
        baselines["first in the file"] = positions
    subsets = dict.fromkeys(pair.subset for pair in decided)
    first = next(iter(gaps))
    report: dict[str, Any] = {
        "pairs": pairs, "decided": len(decided), "tied": len(read) - len(decided),
        "models": {
            name: {
                **room.accuracy(found, rows, seed), **room.quality(found, decided),
                "subsets": {one: _of_subset(found, decided, one, seed) for one in subsets},
                "lists": room.best_of_lists(found, decided, lists),
                "margin_on_ties": float(abs(tied[name]).mean()) if len(tied[name]) else None,
            }
            for name, found in gaps.items()
        },
        "baselines": {name: room.accuracy(found, rows, seed) for name, found in baselines.items()},
        "against_first": {name: room.compared(gaps[first], found, rows, seed)
                          for name, found in {**gaps, **baselines}.items() if name != first},
    }  # fmt: skip
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw_reliability(report["models"], folder / "reliability.png")
    notes = [f"{len(decided)} pairs with a winner and {len(read) - len(decided)} ties from {pairs}."]
    worst = sorted(range(len(decided)), key=lambda place: gaps[first][place])[:SHOWN_PAIRS]
    items = [{"pair": decided[place], "prompt": as_text(decided[place].prompt),
              "margins": [(name, float(found[place])) for name, found in gaps.items()]} for place in worst]  # fmt: skip
    said = write_report(
        folder, "reward.html.jinja", "Evaluation of reward models", notes, sections_of(report, first), report,
        {"Reliability": picture}, items=items,
    )  # fmt: skip
    print(said)
    return 0


def read_pairs(path: str, subset: str | None = None) -> "tuple[list[KnownPair], dict[int, int]]":
    """Return the pairs of a file of preferences, and the length of each list of more than two completions.

    Args:
        path: file of preferences in any format that training reads.
        subset: column that names a row's subset.

    Raises:
        MissingError: the file does not exist.
        DataError: no row can be used.
    """
    from rlhf_lightning.data.sources import usable_rows

    pairs: list[KnownPair] = []
    lists: dict[int, int] = {}
    for number, (count, found) in enumerate(usable_rows(path, partial(_pairs_of, subset=subset))):
        pairs += [pair._replace(row=number) for pair in found]
        if count != 2:
            lists[number] = count
    if all(pair.tied for pair in pairs):
        raise DataError("no-usable-rows", f"{path} has no pair with a winner")
    return pairs, lists


def _pairs_of(raw: Any, subset: str | None) -> "tuple[int, list[KnownPair]]":
    """Return the number of completions of a row, and all pairs of them."""
    from rlhf_lightning.data.formats import preference_with_ties, read_row
    from rlhf_lightning.evaluation.reward_models import KnownPair

    row = read_row(_as_list(raw), preference_with_ties)
    texts = [_text(completion) for completion in row.completions]
    assert row.prompt is not None
    name = "all" if subset is None else str(row.columns.get(subset, "none"))
    alone, pairs = len(texts) == 2, []
    for a in range(len(texts)):
        for b in range(a + 1, len(texts)):
            better, worse = (a, b) if row.ranks[a] <= row.ranks[b] else (b, a)
            if alone and row.target < 0.5:
                better, worse = worse, better
            tied = row.ranks[a] == row.ranks[b] or (alone and row.target == 0.5)
            pair = KnownPair(0, row.prompt, texts[better], texts[worse], name, tied, math.nan)
            pairs.append(pair._replace(position=_position(raw, pair, better < worse)))
    return len(texts), pairs


def _as_list(raw: Any) -> Any:
    """Return a row with lists of right and wrong completions, as in RewardBench 2 and RM-Bench, as a ranked list."""
    row: Any = raw if isinstance(raw, Mapping) else {}
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not _are_texts(chosen) or not _are_texts(rejected):
        return raw
    ranked = {"completions": [*chosen, *rejected], "ranks": [0] * len(chosen) + [1] * len(rejected)}
    return {name: value for name, value in row.items() if name not in ("chosen", "rejected")} | ranked


def _are_texts(side: Any) -> bool:
    return isinstance(side, list) and bool(side) and all(isinstance(text, str) for text in side)


def _position(raw: Any, pair: "KnownPair", earlier: bool) -> float:
    if "completion_1" in raw:
        return 1.0 if raw["completion_1"] == pair.chosen else -1.0
    return (1.0 if earlier else -1.0) if "ranks" in raw else math.nan


def _text(completion: Any) -> str:
    from rlhf_lightning.data.canonical import RowRefused

    if isinstance(completion, str):
        return completion
    if len(completion) != 1 or not isinstance(completion[0].get("content"), str):
        raise RowRefused("a completion has several turns")
    return str(completion[0]["content"])


def _score(name: str, reference: Any, beta: float) -> Any:
    """Return a function that scores completions: a scorer, or a policy's implicit reward."""
    from rlhf_lightning.evaluation.reward_models import implicit_scores
    from rlhf_lightning.scoring import load_scorer
    from rlhf_lightning.scoring.scorer import ask_scorer

    if reference is not None:
        policy, tokenizer = SamplingArguments().load(name)
        return implicit_scores(policy, reference, tokenizer, beta)
    scorer = load_scorer(name)

    def score(prompts: Any, completions: Any) -> list[float]:
        return ask_scorer(scorer, prompts, completions, {}, f"scorer {name!r}").scores.tolist() if completions else []

    return score


def _of_subset(gaps: Any, pairs: Any, subset: str, seed: int) -> dict[str, Any]:
    from rlhf_lightning.evaluation.reward_models import accuracy

    places = [place for place, pair in enumerate(pairs) if pair.subset == subset]
    return accuracy(gaps[places], [pairs[place].row for place in places], seed)


def sections_of(report: Mapping[str, Any], first: str) -> "list[Section]":
    """Return the tables: accuracy with baselines, subsets, lists, calibration and paired tests."""
    from rlhf_lightning.evaluation.report import Section, interval, p_value

    def row(name: str, found: Mapping[str, Any]) -> list[Any]:
        return [name, found["accuracy"], interval(found["ci"]), found["pairs"], found["equal"], found["missing"]]

    models = report["models"]
    header = ["model", "accuracy", "95 % interval", "pairs", "equal scores", "no score"]
    both = [*models.items(), *((f"baseline: {name}", found) for name, found in report["baselines"].items())]
    sections = [
        Section("Accuracy", header, [row(name, found) for name, found in both], "Equal scores count as half right.")
    ]
    subsets = [[name, *row(one, found)[:4]] for name, m in models.items() for one, found in m["subsets"].items()]
    if len(subsets) > len(models):
        sections.append(Section("Subsets", ["model", "subset", *header[1:4]], subsets))
    lists = [[name, m["lists"]["accuracy"], interval(m["lists"]["ci"]), m["lists"]["lists"], m["lists"]["chance"]]
             for name, m in models.items() if m["lists"]]  # fmt: skip
    if lists:
        sections.append(Section("Best of k", ["model", "best found", "95 % interval", "lists", "chance"], lists))
    keys = ["ece", "brier", "log_loss", "margin", "margin_on_ties", "length_correlation"]
    rows = [[name, *(m[key] for key in keys)] for name, m in models.items()]
    note = "length_correlation: correlation of the margin with the difference of lengths in characters."
    sections.append(Section("Calibration, margins and length", ["model", *keys], rows, note))
    tests = [[name, test["difference"], interval(test["ci"]), p_value(test["p"]), test["test"]]
             for name, test in report["against_first"].items()]  # fmt: skip
    note = "Accuracy minus that of the first model on the same pairs; bootstrap interval by row."
    sections.append(
        Section(f"Against {first}", ["model or baseline", "difference", "95 % interval", "p", "test"], tests, note)
    )
    return sections


def draw_reliability(models: Mapping[str, Any], path: Path) -> Path:
    """Draw accuracy against confidence for each model, and return the path."""
    from rlhf_lightning.evaluation.report import pyplot, save_figure

    figure, axis = pyplot().subplots(figsize=(5, 4.5), layout="constrained")
    axis.plot([0.5, 1], [0.5, 1], "--", color="#888888", label="calibrated")
    for name, found in models.items():
        axis.plot(*list(zip(*found["reliability"], strict=True))[:2], "o-", label=f"{name}, ECE {found['ece']:.3f}")
    axis.set_xlabel("confidence, sigmoid of the absolute margin")
    axis.set_ylabel("accuracy")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path, dpi=110)
