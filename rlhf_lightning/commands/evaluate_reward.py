"""``rlhf evaluate-reward``: test reward models on labelled pairs, next to trivial baselines."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import DataError, SettingError, check_range

if TYPE_CHECKING:
    from rlhf_lightning.types import Prompt

SHOWN_PAIRS = 100


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf evaluate-reward``."""
    return run_function(evaluate_reward, argv, "rlhf evaluate-reward", positional=["models"])


def evaluate_reward(
    models: Sequence[str] = (),
    pairs: str | None = None,
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
        models: folders of reward models or process reward models, or import paths of scorers. With --reference, folders
            of policies, which are tested by their implicit DPO reward.
        pairs: file of preferences or ranked lists in any format that training reads, or with lists of right and wrong
            completions as chosen and rejected (RewardBench 2). If both have one completion of each style (RM-Bench),
            the accuracy is also reported by style.
        judges: generative judges: folders of language models, addresses of servers, or classes. The margin is the mean
            of their log-odds in both orders.
        judge_args: arguments of the judges' class: --judge_args.NAME VALUE.
        question: question to the judges about two completions.
        reference: the reference of the policies, for the implicit reward beta log(policy / reference).
        beta: coefficient of the implicit reward; it only affects calibration.
        subset: column that names the subset of a row; with the subsets of RewardBench, the accuracy of its sections.
        gold: known true reward: import path of a function (prompt, completion) -> reward, or a column of rewards.
        completions: file with 3 or more completions of each prompt for best-of-n, as rlhf generate --samples 8 writes;
            by default the ranked lists in --pairs. A judge's score of a completion is its mean log-odds against the
            prompt's other completions, n (n - 1) questions for each prompt.
        as_chat: put plain-text prompts into a user turn of the chat template.
        out: folder of the report.
        seed: seed of bootstrap resampling and cross-validation folds.
    """
    import numpy as np

    from rlhf_lightning.commands.evaluate import sections_of_gold
    from rlhf_lightning.commands.known_rewards import read_pairs, read_samples
    from rlhf_lightning.evaluation import reward_models as room
    from rlhf_lightning.evaluation.completions import QUESTION, written
    from rlhf_lightning.evaluation.overoptimization import best_of_n_by, draw_best_of_n
    from rlhf_lightning.evaluation.report import write_report
    from rlhf_lightning.evaluation.reward_tables import draw_reliability, pair_report, sections_of
    from rlhf_lightning.runs.samples import as_text
    from rlhf_lightning.scoring.judges import load_judge

    check_range(beta > 0, "it must be positive", beta=beta)
    _refuse_missing(bool(models or judges), pairs, subset, gold, completions)
    read, lists = ([], {}) if pairs is None else read_pairs(pairs, subset, as_chat)
    groups = [] if gold is None else read_samples(completions or str(pairs), gold, as_chat)
    drawn = [row for group in groups for row in group]
    decided, ties = ([pair for pair in read if pair.tied is tied] for tied in (False, True))
    gaps, blind, tied, scores = {}, {}, {}, {}
    kept = SamplingArguments().load(reference)[0] if reference else None
    for name in dict.fromkeys([*models, *judges]):
        if name in models:
            score = _score(name, kept, beta, read[0].prompt if read else drawn[0]["asked"])
            margins = partial(room.margins, score)
            scores[name] = room.unique_scores(score, [(row["asked"], row["completion"]) for row in drawn]).tolist()
        else:
            margins = partial(room.judge_margins, load_judge(name, judge_args), question=question or QUESTION)
            asked = [(group[0]["prompt"], [written(row) for row in group]) for group in groups]
            scores[name] = room.scores_by_comparison(margins, asked)
        gaps[name], tied[name] = margins(decided), margins(ties)
        if decided and np.isnan(gaps[name]).all():
            raise DataError("no-scores", f"{name} answers none of {len(decided)} pairs; try it on one of them alone")
        blind[f"{name}, prompt-blind"] = margins(decided, prompt_blind=True)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    notes, sections, pictures, items = [], [], {}, []
    if pairs is not None:
        report = {"pairs": pairs, **pair_report(gaps, tied, blind, decided, ties, lists, seed)}
        notes.append(f"{len(decided)} pairs with a winner and {len(ties)} ties from {pairs}.")
        sections += sections_of(report)
        pictures["Reliability"] = draw_reliability(report["models"], folder / "reliability.png")
        first = next(iter(gaps.values()))
        wrong = [place for place in np.argsort(first).tolist() if first[place] <= 0][:SHOWN_PAIRS]
        items = [
            {"pair": decided[place], "prompt": as_text(decided[place].prompt),
             "margins": [(name, float(found[place])) for name, found in gaps.items()]}
            for place in wrong
        ]  # fmt: skip
    if gold is not None:
        scores |= {"baseline: longer completion": [float(len(written(row))) for row in drawn],
                   "gold reward itself": [row["gold"] for row in drawn]}  # fmt: skip
        curves = {name: best_of_n_by(given, groups, seed) for name, given in scores.items()}
        report["best_of_n"] = {"completions": completions or pairs, "gold": gold, "curves": curves}
        pictures["Best of n by score"] = draw_best_of_n(curves, folder / "best_of_n.png")
        sections += sections_of_gold({"best_of_n": curves, "models": None})
        notes.append(f"Best of n: {len(drawn)} completions of {len(groups)} prompts from {completions or pairs}.")
    title = "Evaluation of reward models"
    print(write_report(folder, "reward.html.jinja", title, notes, sections, report, pictures, items=items))
    return 0


def _refuse_missing(
    has_models: bool, pairs: str | None, subset: str | None, gold: str | None, completions: str | None
) -> None:
    """Refuse settings that lack another one.

    Raises:
        SettingError: always with a sentence about the missing setting.
    """
    if not has_models:
        raise SettingError("missing-setting", "there is no model to evaluate: name reward models, or --judges")
    if gold is None and completions is not None:
        raise SettingError("missing-setting", "completions are compared with their true reward: give it with --gold")
    if pairs is None and completions is None:
        raise SettingError("missing-setting", "there is nothing to score: give --pairs, or --completions with --gold")
    if pairs is None and subset is not None:
        raise SettingError("missing-setting", f"subset names a column of the pairs: give --pairs, or drop {subset!r}")


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
