"""``rlhf evaluate``: evaluate policies on held-out prompts, with intervals, win rates and judges."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.atomic_files import write_lines
from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import SettingError, check_range

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.report import Section

DEFAULTS = SamplingArguments()
NOTE = "Means with 95 % bootstrap intervals that resample prompts; all models answer with the same random numbers."


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf evaluate``."""
    return run_function(evaluate, argv, "rlhf evaluate", positional=["models"])


def evaluate(
    models: Sequence[str],
    prompts: str,
    scorer: dict[str, Any] | str | None = None,
    judge: str | None = None,
    judge_args: dict[str, Any] | None = None,
    question: str | None = None,
    against: str | None = None,
    reference: str | None = None,
    gold: str | None = None,
    samples: int = 1,
    correct: float | None = None,
    as_chat: bool = False,
    shown: int = 200,
    out: str = "evaluation",
    sampling: SamplingArguments = DEFAULTS,
) -> int:
    """Sample completions of held-out prompts from each model, and compare the models on the same prompts.

    Reports for each model the score and its parts, KL, length, EOS rate, distinct n-grams and pass@k. Compared with the
    baseline it reports the difference of scores, the win rate and the length-controlled win rate. A judge gets every
    pair in both orders; its consistency and position bias are reported. A known gold reward shows over-optimisation of
    the scorer: best-of-n by score against gold reward, with a plot and the fits of Gao et al. (arXiv 2210.10760).
    Writes report.json, report.md, completions.jsonl and report.html, which shows completions side by side and works
    offline.

    Args:
        models: folders of policies (weights or adapters), .gguf files or hub ids.
        prompts: file of prompts (.jsonl, .json, .csv, .parquet): a column prompt or messages, or training rows.
        scorer: scores the completions: folder of a reward model, function, or {class_path: ..., init_args: ...}.
        judge: folder of a language model, address of a server, or class; compares each model with the baseline.
        judge_args: arguments of the judge's class: --judge_args.NAME VALUE.
        question: question to the judge about two answers.
        against: the baseline; by default the first model.
        reference: model to which the KL is measured; by default the baseline.
        gold: import path of a function (prompt, completion) -> known true reward, to measure over-optimisation.
        samples: completions per prompt; best-of-n against the gold reward needs 3.
        correct: lowest score of a correct completion, for pass@k.
        as_chat: put plain-text prompts into a user turn of the chat template.
        shown: number of prompts on the HTML page.
        out: folder of the report.
        sampling: sampling settings.
    """
    from rlhf_lightning.commands.generate import hint_at_template, read_prompts, scorer_beside
    from rlhf_lightning.evaluation.completions import by_prompt, summary, written
    from rlhf_lightning.evaluation.overoptimization import draw_best_of_n
    from rlhf_lightning.evaluation.report import write_report
    from rlhf_lightning.scoring.scorer import load_gold_reward

    names = list(dict.fromkeys([*([against] if against else []), *models]))
    check_range(samples >= 1, "it must be at least 1", samples=samples)
    if correct is not None and scorer is None:
        raise SettingError("missing-setting", "correct is a score threshold: give the --scorer that it applies to")
    if judge is not None and len(names) < 2:
        raise SettingError("missing-setting", "a judge compares two models: give a second one, or --against")
    sampling.settings()
    gold_of = None if gold is None else load_gold_reward(gold)
    asked = read_prompts(prompts, as_chat)
    baseline = reference or names[0]
    for name in (*names, baseline):
        sampling.find(name)  # a wrong name is refused before the first model samples
    kept: Any = None
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        policy, tokenizer = sampling.load(name)
        if kept is None:
            hint_at_template(asked, tokenizer)
            kept = policy if name == baseline else sampling.load(baseline)[0]
        score = None if scorer is None else scorer_beside(scorer, policy)
        print(f"{name}: {len(asked) * samples} completions", flush=True)
        found[name] = sampled(policy, tokenizer, asked, samples, sampling, score, scorer)
        add_kl(found[name], policy, kept, tokenizer, sampling.temperature)
        if gold_of is not None:
            for row in found[name]:
                row["gold"] = float(gold_of(row["prompt"], written(row)))
    summaries = {name: summary(rows, samples, correct, sampling.seed) for name, rows in found.items()}
    comparisons = compared(found, samples, sampling.seed, judge, judge_args, question)
    sections = sections_of(summaries, comparisons, names[0], baseline)
    report: dict[str, Any] = {"models": summaries, "comparisons": comparisons}
    pictures: dict[str, Path] = {}
    folder = Path(out)
    write_lines(folder / "completions.jsonl", ({"model": name, **row} for name, rows in found.items() for row in rows))
    if gold is not None:
        measured = overoptimization_of(found, summaries, samples, sampling.seed, baseline)
        report["overoptimization"] = measured
        sections += sections_of_gold(measured)
        if measured["best_of_n"]:
            pictures["Best of n by score"] = draw_best_of_n(measured["best_of_n"], folder / "best_of_n.png")
    settings = {"prompts": prompts, "scorer": scorer, "judge": judge, "gold": gold, "samples": samples,
                "seed": sampling.seed, "reference": baseline, **sampling.provenance()}  # fmt: skip
    report = {"settings": settings, **report}
    listed = "all" if shown >= len(asked) else f"the first {shown}"
    notes = [
        f"{len(asked)} prompts from {prompts}, {samples} completion{'s' * (samples > 1)} each; the page shows {listed}."
    ]
    items = by_prompt(found, samples)[:shown]
    title = "Evaluation of policies"
    print("\n" + write_report(folder, "evaluate.html.jinja", title, notes, sections, report, pictures, items=items))
    return 0


def sampled(
    policy: Any, tokenizer: Any, asked: Any, samples: int, sampling: SamplingArguments, score: Any, scorer: Any
) -> list[dict[str, Any]]:
    """Return a row for each completion of a policy, with its token ids."""
    from rlhf_lightning.commands.generate import Speed, completions

    speed = Speed(len(asked) * samples)
    rows = list(completions(policy, tokenizer, asked, samples, sampling, speed, score, scorer, with_ids=True))
    speed.finish()
    return rows


def add_kl(rows: list[dict[str, Any]], policy: Any, reference: Any, tokenizer: Any, temperature: float) -> None:
    """Replace the token ids of each row by the KL estimate of its completion.

    The KL is measured at the sampling temperature, or at temperature 1 for greedy decoding.
    """
    from rlhf_lightning.evaluation.policies import sequence_kl
    from rlhf_lightning.scoring.learned import encoded_sequences

    drawn = [(row.pop("ids"), row.pop("learned")) for row in rows]
    encoded = [(ids, [True] * len(ids) if mask is None else mask) for ids, mask in drawn]
    sequences = encoded_sequences(tokenizer, [row["prompt"] for row in rows], encoded)
    for row, kl in zip(rows, sequence_kl(policy, reference, sequences, temperature or 1.0).tolist(), strict=True):
        row["kl"] = kl


def compared(
    found: Mapping[str, list[dict[str, Any]]], samples: int, seed: int, judge: str | None,
    judge_args: dict[str, Any] | None, question: str | None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return the comparisons of each model with the first model, by score and by judge."""
    from rlhf_lightning.evaluation.completions import (
        QUESTION,
        ask_judge,
        prompt_numbers,
        score_difference,
        score_verdicts,
        win_rates,
    )
    from rlhf_lightning.scoring.judges import load_judge

    (_, baseline), *others = found.items()
    asking = None if judge is None else load_judge(judge, judge_args)
    result: dict[str, dict[str, Any]] = {}
    for name, rows in others:
        result[name] = {}
        lengths = [float(row["length"] - base["length"]) for row, base in zip(rows, baseline, strict=True)]
        clusters = prompt_numbers(rows, samples)
        if "score" in rows[0]:
            verdicts = score_verdicts(rows, baseline)
            result[name]["score_difference"] = score_difference(rows, baseline, samples, seed)._asdict()
            result[name]["score"] = win_rates(verdicts, lengths, clusters, seed)._asdict()
        if asking is not None:
            judged = ask_judge(asking, rows, baseline, question or QUESTION)
            reliability = {key: value for key, value in judged._asdict().items() if key != "verdicts"}
            result[name]["judge"] = {**win_rates(judged.verdicts, lengths, clusters, seed)._asdict(), **reliability}
            for row, value in zip(rows, judged.verdicts, strict=True):
                row["verdict"] = None if value != value else value
    return result


def overoptimization_of(
    found: Mapping[str, list[dict[str, Any]]], summaries: Mapping[str, dict[str, Any]], samples: int, seed: int,
    reference: str,
) -> dict[str, Any]:  # fmt: skip
    """Return best-of-n by score against the gold reward for each model, and a fit over the models by their KL."""
    from rlhf_lightning.evaluation.completions import grouped
    from rlhf_lightning.evaluation.overoptimization import FEWEST, best_of_n_points, policy_points

    curves = {
        name: best_of_n_points(grouped(rows, samples), seed)
        for name, rows in found.items() if samples >= FEWEST and "score" in rows[0]
    }  # fmt: skip
    kl, gold = ([one[name]["mean"] for one in summaries.values()] for name in ("kl", "gold"))
    return {"best_of_n": curves, "models": policy_points(kl, gold) if reference == next(iter(found)) else None}


def sections_of_gold(found: Mapping[str, Any]) -> "list[Section]":
    """Return the tables of over-optimisation: best-of-n by score, and the fits."""
    from rlhf_lightning.evaluation.report import Section, interval

    curves, models = found["best_of_n"], found["models"]
    rows = [
        [name, point["n"], point["kl"], point["score"], f"{point['gold']['mean']:.3f} {interval(point['gold']['ci'])}",
         point["fit"]]
        for name, curve in curves.items() for point in curve["points"]
    ]  # fmt: skip
    fits = [
        *((f"{name}, best of n", curve) for name, curve in curves.items()),
        *([("models", models)] if models else []),
    ]
    over_models = ", d (alpha - beta log d) over the models, if these are checkpoints of reinforcement learning"
    note = (
        "Fitted gain in gold reward, d the square root of the KL: d (alpha - beta d) for best of n"
        f"{over_models if models else ''}. Empty: the fit has no peak. A peak beyond the measured KL is an "
        "extrapolation."
    )
    of_samples = "KL from the policy that the completions are samples of, nats."
    tables = [
        Section("Best of n by score", ["model", "n", "kl", "score", "gold", "fit"], rows, of_samples),
        Section(
            "Over-optimisation", ["fit", "alpha", "beta", "KL of the peak"],
            [[name, one["alpha"], one["beta"], one["peak_kl"]] for name, one in fits], note,
        ),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def sections_of(
    summaries: Mapping[str, dict[str, Any]], comparisons: Mapping[str, dict[str, Any]], baseline: str, reference: str
) -> "list[Section]":
    """Return the tables: models, further metrics, comparisons and the judge."""
    from rlhf_lightning.evaluation.report import Section, interval, p_value

    def measured(value: dict[str, Any]) -> str:
        missing = f", {value['missing']} missing" if value.get("missing") else ""
        return f"{value['mean']:.3f} {interval(value['ci'])}{missing}"

    first = next(iter(summaries.values()))
    means = [name for name, value in first.items() if isinstance(value, dict)]
    plain = ["eos_rate", "distinct_1", "distinct_2", "distinct_3", "unique"]
    rows = [[name, *(measured(found[key]) for key in means)] for name, found in summaries.items()]
    sections = [
        Section("Models", ["model", *means], rows, f"{NOTE} KL from {reference}, nats per completion."),
        Section(
            "End tokens and diversity", ["model", *plain],
            [[name, *(found[key] for key in plain)] for name, found in summaries.items()],
            "distinct_n: fraction of distinct word n-grams. unique: fraction of distinct samples of a prompt.",
        ),
    ]  # fmt: skip
    wins, judges, gaps = [], [], []
    for name, found in comparisons.items():
        if "score_difference" in found:
            gap = found["score_difference"]
            gaps.append([name, gap["mean"], interval([gap["low"], gap["high"]]), p_value(gap["p"]), gap["n"]])
        for by in ("score", "judge"):
            if by in found:
                win = found[by]
                controlled = f"{win['controlled']:.3f} {interval(win['controlled_ci'])}"
                rate = f"{win['rate']:.3f} {interval(win['ci'])}"
                wins.append([name, by, rate, win["ties"], controlled, win["length_bias"], win["missing"]])
        if "judge" in found:
            keys = ("probability", "consistency", "position_bias", "failures")
            judges.append([name, *(found["judge"][key] for key in keys)])
    if gaps:
        header = ["model", "difference of scores", "95 % interval", "p", "prompts"]
        sections.append(Section(f"Score against {baseline}", header, gaps, "Sign-flip test over prompts."))
    if wins:
        header = ["model", "by", "win rate", "ties", "length-controlled", "length bias", "missing"]
        note = "A tie counts as half a win. The length-controlled rate is the expected win rate at equal lengths."
        sections.append(Section(f"Win rate against {baseline}", header, wins, note))
    if judges:
        header = ["model", "probability", "consistency", "position bias", "failures"]
        note = "Every pair was shown in both orders. A pair whose winner changes with the order is a tie."
        sections.append(Section("Reliability of the judge", header, judges, note))
    return sections
