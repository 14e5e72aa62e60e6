"""``rlhf evaluate-reward``: test reward models on labelled pairs, next to trivial baselines."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

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
    from rlhf_lightning.types import Prompt

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
    gold: str | None = None,
    completions: str | None = None,
    as_chat: bool = False,
    out: str = "reward_evaluation",
    seed: int = 0,
) -> int:
    """Test reward models on pairs with known winners, next to trivial baselines.

    Reports accuracy by subset with Wilson intervals, paired tests against the first model, best-of-list accuracy,
    calibration, margins and the correlation with length. The baselines choose the longer completion, the completion
    that the file shows first, the model's choice without the prompt, or the choice of a bag of words. A model that is
    only as accurate as a baseline may have learned only what the baseline uses. If the true reward of completions is
    known, --gold adds the gold reward of best-of-n by each model's score, with the fit of Gao et al. (arXiv
    2210.10760). Writes report.json, report.md, plots and report.html.

    Args:
        pairs: file of preferences or ranked lists in any format that training reads, or with lists of right and wrong
            completions as chosen and rejected (RewardBench 2). If both have one completion of each style (RM-Bench),
            the accuracy is also reported by style.
        models: folders of reward models or process reward models, or import paths of scorers. With --reference, folders
            of policies, which are tested by their implicit DPO reward.
        judges: generative judges: folders of language models, addresses of servers, or classes. The margin is the mean
            of their log-odds in both orders.
        judge_args: arguments of the judges' class: --judge_args.NAME VALUE.
        question: question to the judges about two completions.
        reference: the reference of the policies, for the implicit reward beta log(policy / reference).
        beta: coefficient of the implicit reward; it only affects calibration.
        subset: column that names the subset of a row.
        gold: known true reward: import path of a function (prompt, completion) -> reward, or a column of rewards.
        completions: file with 3 or more completions of each prompt for best-of-n, as rlhf generate --samples 8 writes;
            by default the ranked lists in --pairs.
        as_chat: put plain-text prompts into a user turn of the chat template.
        out: folder of the report.
        seed: seed of bootstrap resampling and cross-validation folds.
    """
    import numpy as np

    from rlhf_lightning.commands.evaluate import sections_of_gold
    from rlhf_lightning.commands.known_rewards import read_pairs, read_samples
    from rlhf_lightning.evaluation import reward_models as room
    from rlhf_lightning.evaluation.completions import QUESTION
    from rlhf_lightning.evaluation.overoptimization import best_of_n_by, draw_best_of_n
    from rlhf_lightning.evaluation.report import write_report
    from rlhf_lightning.runs.samples import as_text
    from rlhf_lightning.scoring.judges import load_judge

    check_range(beta > 0, "it must be positive", beta=beta)
    if not models and not judges:
        raise SettingError("missing-setting", "there is no model to evaluate: name reward models, or --judges")
    if gold is None and completions is not None:
        raise SettingError("missing-setting", "completions are compared with their true reward: give it with --gold")
    if gold is not None and not models:
        raise SettingError("missing-setting", "best-of-n needs scores, and judges only compare: name reward models")
    read, lists = read_pairs(pairs, subset, as_chat)
    groups = [] if gold is None else read_samples(completions or pairs, gold, as_chat)
    drawn = [row for group in groups for row in group]
    decided = [pair for pair in read if not pair.tied]
    rows = [pair.row for pair in decided]
    gaps, blind, tied, scores = {}, {}, {}, {}
    kept = SamplingArguments().load(reference)[0] if reference else None
    for name in dict.fromkeys([*models, *judges]):
        if name in models:
            score = _score(name, kept, beta, read[0].prompt)
            margins = partial(room.margins, score)
            scores[name] = score([row["prompt"] for row in drawn], [row["completion"] for row in drawn])
        else:
            margins = partial(room.judge_margins, load_judge(name, judge_args), question=question or QUESTION)
        gaps[name] = margins(decided)
        if np.isnan(gaps[name]).all():
            raise DataError("no-scores", f"{name} answers none of {len(decided)} pairs; try it on one of them alone")
        blind[f"{name}, prompt-blind"] = margins(decided, prompt_blind=True)
        tied[name] = margins([pair for pair in read if pair.tied])
    baselines = {
        "longer completion": room.length_margins(decided), "bag of words": room.bag_of_words_margins(decided, seed),
        **blind,
    }  # fmt: skip
    positions = np.array([pair.position for pair in decided])
    if not np.isnan(positions).all():
        baselines["first in the file"] = positions
    first = next(iter(gaps))
    report: dict[str, Any] = {
        "pairs": pairs, "decided": len(decided), "tied": len(read) - len(decided),
        "models": {
            name: {
                **accuracies(found, decided, seed), **room.quality(found, decided),
                "lists": room.best_of_lists(found, decided, lists),
                "margin_on_ties": float(abs(tied[name]).mean()) if len(tied[name]) else None,
            }
            for name, found in gaps.items()
        },
        "baselines": {name: accuracies(found, decided, seed) for name, found in baselines.items()},
        "against_first": {name: room.compared(gaps[first], found, rows, seed)
                          for name, found in {**gaps, **baselines}.items() if name != first},
    }  # fmt: skip
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"Reliability": draw_reliability(report["models"], folder / "reliability.png")}
    notes = [f"{len(decided)} pairs with a winner and {len(read) - len(decided)} ties from {pairs}."]
    sections = sections_of(report, first)
    if gold is not None:
        scores |= {"baseline: longer completion": [float(len(row["completion"])) for row in drawn],
                   "gold reward itself": [row["gold"] for row in drawn]}  # fmt: skip
        curves = {name: best_of_n_by(given, groups, seed) for name, given in scores.items()}
        report["best_of_n"] = {"completions": completions or pairs, "gold": gold, "curves": curves}
        pictures["Best of n by score"] = draw_best_of_n(curves, folder / "best_of_n.png")
        sections += sections_of_gold({"best_of_n": curves, "models": None})
        notes.append(f"Best of n: {len(drawn)} completions of {len(groups)} prompts from {completions or pairs}.")
    wrong = [place for place in np.argsort(gaps[first]).tolist() if gaps[first][place] <= 0][:SHOWN_PAIRS]
    items = [{"pair": decided[place], "prompt": as_text(decided[place].prompt),
              "margins": [(name, float(found[place])) for name, found in gaps.items()]} for place in wrong]  # fmt: skip
    said = write_report(
        folder, "reward.html.jinja", "Evaluation of reward models", notes, sections, report, pictures, items=items
    )
    print(said)
    return 0


def _score(name: str, reference: Any, beta: float, prompt: "Prompt") -> Any:
    """Return a function that scores completions: a scorer, or a policy's implicit reward.

    ``prompt`` is the first prompt; a hint says if a model expects its chat template and gets plain text.
    """
    from rlhf_lightning.commands.generate import hint_at_template
    from rlhf_lightning.evaluation.reward_models import implicit_scores
    from rlhf_lightning.scoring import load_scorer
    from rlhf_lightning.scoring.scorer import ask_scorer

    if reference is not None:
        policy, tokenizer = SamplingArguments().load(name)
        hint_at_template([(prompt, {})], tokenizer)
        return implicit_scores(policy, reference, tokenizer, beta)
    scorer = load_scorer(name)
    if hasattr(scorer, "tokenizer") and getattr(scorer, "prompt_form", None) != "plain text":
        hint_at_template([(prompt, {})], scorer.tokenizer)

    def score(prompts: Any, completions: Any) -> list[float]:
        return ask_scorer(scorer, prompts, completions, {}, f"scorer {name!r}").scores.tolist() if completions else []

    return score


def accuracies(gaps: Any, pairs: "Sequence[KnownPair]", seed: int) -> dict[str, Any]:
    """Return the accuracy on all pairs, on each subset, and by style if all rows have one completion of each style."""
    from rlhf_lightning.evaluation.reward_models import accuracy, by_style

    members = {"all": list(range(len(pairs)))}
    for place, pair in enumerate(pairs):
        if pair.subset != "all":
            members.setdefault(pair.subset, []).append(place)
    parts = {name: (gaps[places], [pairs[place] for place in places]) for name, places in members.items()}
    found = {name: accuracy(part, [pair.row for pair in kept], seed) for name, (part, kept) in parts.items()}
    styled = all(pair.styles for pair in pairs)
    styles = {name: by_style(*part, seed) for name, part in parts.items()} if styled else {}
    return {**found.pop("all"), "subsets": found, "styles": styles}


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
    if subsets:
        sections.append(Section("Subsets", ["model", "subset", *header[1:4]], subsets))
    lists = [[name, m["lists"]["accuracy"], interval(m["lists"]["ci"]), m["lists"]["lists"], m["lists"]["chance"]]
             for name, m in models.items() if m["lists"]]  # fmt: skip
    if lists:
        sections.append(Section("Best of k", ["model", "best found", "95 % interval", "lists", "chance"], lists))
    sections += sections_of_styles(dict(both), list(models))
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


def sections_of_styles(found: Mapping[str, Any], models: Sequence[str]) -> "list[Section]":
    """Return the tables of accuracy by style of models and baselines; empty if the rows have no styles."""
    from rlhf_lightning.evaluation.report import Section, interval

    levels = ("easy", "normal", "hard")
    rows = [
        [name, part, *(f"{at[level]['accuracy']:.3f} {interval(at[level]['ci'])}" for level in levels), at["average"]]
        for name, measured in found.items() for part, at in measured["styles"].items()
    ]  # fmt: skip
    cells = [
        [name, f"style {chosen}", *accuracies]
        for name in models if found[name]["styles"]
        for chosen, accuracies in enumerate(found[name]["styles"]["all"]["matrix"], 1)
    ]  # fmt: skip
    if not rows:
        return []
    note = (
        "Easy: the chosen completion has the later style of the lists (in RM-Bench the more elaborate one). Normal: "
        "both have the same style. Hard: the rejected completion has the later style."
    )
    rejected = [f"rejected: style {number}" for number in range(1, len(cells[0]) - 1)]
    return [
        Section("Accuracy by style", ["model", "subset", *levels, "average"], rows, note),
        Section("Accuracy by pair of styles", ["model", "chosen", *rejected], cells),
    ]


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
