"""``rlhf label``: soft labels from a judge that follows a constitution, and metrics of the judge."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rlhf_lightning.atomic_files import write_lines
from rlhf_lightning.commands.generate import ONE_TURN, SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import SettingError

if TYPE_CHECKING:
    from rlhf_lightning.scoring.judges.judge import Pair

DEFAULTS = SamplingArguments()

FOUND_AT_ONCE = 64
"""Number of pairs per journal entry."""


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf label``."""
    return run_function(label, argv, "rlhf label", without=ONE_TURN)


def label(
    judge: str,
    out: str,
    constitution: str = "harmless",
    pairs: str | None = None,
    prompts: str | None = None,
    model: str | None = None,
    judge_args: dict[str, Any] | None = None,
    principles: int = 1,
    average: Literal["probability", "logit"] = "probability",
    reasoning: bool = False,
    least_mass: float = 0.01,
    ties: Literal["keep", "drop"] = "keep",
    as_chat: bool = False,
    sampling: SamplingArguments = DEFAULTS,
) -> int:
    """Label pairs of completions with a judge, each comparison in both orders, and write soft labels.

    Pairs come from a file (--pairs) or are sampled (--prompts with --model). Each row has prompt, chosen, rejected and
    preference (probability that chosen is better), which PreferenceDataModule reads. It also has judge, constitution
    (its fingerprint), principles, probabilities (by principle, chosen shown first), swapped_probabilities (chosen shown
    second), tie, and human_preference (for pairs of a file). Missing answers are counted and give no label. The judge's
    consistency, position bias, ties, failures, entropy and agreement with existing labels are printed and written to
    OUT.report.json. The same command resumes a killed run.

    Args:
        judge: folder of a language model, .gguf file or hub id; address of an OpenAI-compatible server (its model:
            --judge_args.model NAME); or a class of rlhf_lightning.scoring.judges or by import path.
        out: JSONL file of labelled pairs; written when the run is complete.
        constitution: name of a shipped constitution (harmless, helpful), or a YAML file.
        pairs: file of preferences in any format that training reads; every two completions of a list are a pair. Their
            labels are not shown to the judge.
        prompts: file of prompts to sample two completions for.
        model: folder of the policy to sample from.
        judge_args: arguments of the judge's class: --judge_args.NAME VALUE.
        principles: number of principles drawn for each pair; the answers are averaged over principles.
        average: average the probability or the logit; logit removes a constant position bias.
        reasoning: let the judge reason before it answers; probabilities are clamped to [0.4, 0.6].
        least_mass: minimum total probability of the two letters; below it the answer counts as missing.
        ties: keep pairs whose verdict is a tie, with their soft label, or drop them.
        as_chat: put a plain-text prompt into a user turn of the chat template.
        sampling: sampling settings; at temperature 0 both completions are equal and give no pair.
    """
    from rlhf_lightning.commands.journal import Journal, model_stamp
    from rlhf_lightning.constitution.labelling import LabelSettings, compared
    from rlhf_lightning.constitution.principles import load_constitution
    from rlhf_lightning.scoring.judges import load_judge

    if (pairs is None) == (prompts is None) or (prompts is None) != (model is None):
        raise SettingError(
            "conflicting-settings", "give either --pairs, or --prompts with the --model that answers them"
        )
    rules = load_constitution(constitution)
    settings = LabelSettings(principles, average, reasoning, least_mass, sampling.seed)
    rules.require("comparing", principles)
    if pairs is not None:
        work = given_work(pairs)
    else:
        assert prompts is not None and model is not None
        work = sampled_work(prompts, model, sampling, as_chat)
    judging = load_judge(judge, _with_dtype(judge, judge_args, sampling.dtype))
    provenance = {
        "judge": judging.name,
        "constitution": rules.fingerprint,
        "constitution_name": f"{rules.name} v{rules.version}",
        **asdict(settings),
        **work.provenance,
    }
    task = {**provenance, **work.task, "judge": model_stamp(judge), "judge_args": judge_args, "dtype": sampling.dtype}
    journal = Journal(Path(out), task)
    if journal.done:
        print(f"{journal.path}: resuming after {journal.done:,} of {work.total:,}")
    for done, part in work.parts(journal.done):
        said = compared(judging, rules, part, settings, start=len(journal.records))
        found = zip(part, said, strict=True)
        journal.add(done, [{"pair": pair._asdict(), "comparisons": [asdict(one) for one in c]} for pair, c in found])
        print(f"{done:,} of {work.total:,}", flush=True)
    print(_written(Path(out), journal.records, settings, ties, provenance))
    journal.finish()
    return 0


def _written(target: Path, records: list[Any], settings: Any, ties: str, provenance: dict[str, Any]) -> str:
    """Write the labelled pairs and their report; return the printed summary."""
    from rlhf_lightning.constitution.critique import report_file
    from rlhf_lightning.constitution.labelling import labelled_of
    from rlhf_lightning.constitution.labels import describe, judge_metrics
    from rlhf_lightning.evaluation.report import markdown_table, write_json

    labelled = labelled_of(*_read_back(records), settings)
    metrics = judge_metrics(labelled)
    kept = [one for one in labelled if one.preference is not None and (ties == "keep" or one.verdict != 0.5)]
    write_json(report_file(target), {**provenance, "ties": ties, "rows": len(kept), **metrics})
    write_lines(target, (one.row(provenance["judge"], provenance["constitution"]) for one in kept))
    who = f"{provenance['judge']} under {provenance['constitution_name']}"
    table = markdown_table(["judge", "value"], describe(metrics))
    return f"{target}: {len(kept):,} of {len(labelled):,} pairs labelled by {who}\n{table}"


def _with_dtype(judge: str, arguments: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    """Return the arguments of the judge's class, with the dtype for a local model."""
    given = dict(arguments or {})
    local = Path(judge).expanduser().exists() or judge.endswith(".gguf") or judge == "LocalJudge"
    return {"dtype": dtype, **given} if local else given


def _read_back(records: list[Any]) -> tuple[list["Pair"], list[tuple[Any, ...]]]:
    from rlhf_lightning.constitution.labels import Comparison
    from rlhf_lightning.scoring.judges.judge import Pair

    def comparison(found: dict[str, Any]) -> Comparison:
        lists = {name: tuple(found[name]) for name in ("failures", "reasoning")}
        return Comparison(**{**found, **lists})

    pairs = [Pair(**record["pair"]) for record in records]
    return pairs, [tuple(map(comparison, record["comparisons"])) for record in records]


def given_pairs(path: str) -> "list[Pair]":
    """Return the pairs of a file of preferences with their labels; a list gives all of its pairs."""
    from rlhf_lightning.people.candidates import given_rows
    from rlhf_lightning.scoring.judges.judge import Pair

    found: list[Pair] = []
    for row in given_rows(path):
        assert row.prompt is not None
        for a, b in combinations(range(len(row.completions)), 2):
            preference = 0.5 if row.ranks[a] == row.ranks[b] else row.target
            found.append(Pair(row.prompt, row.completions[a], row.completions[b], preference, row.columns))
    return found


class Work(NamedTuple):
    """Pairs to label: entries of the report, other values that the pairs depend on, number of pairs or prompts.

    ``parts(done)`` yields the pairs after ``done`` in parts, each with the progress after it.
    """

    provenance: dict[str, Any]
    task: dict[str, Any]
    total: int
    parts: Callable[[int], Iterator[tuple[int, list["Pair"]]]]


def given_work(path: str) -> Work:
    """Return the work for the pairs of a file."""
    from rlhf_lightning.data.feedback.records import digest

    pairs = given_pairs(path)

    def parts(done: int) -> Iterator[tuple[int, list["Pair"]]]:
        for start in range(done, len(pairs), FOUND_AT_ONCE):
            part = pairs[start : start + FOUND_AT_ONCE]
            yield start + len(part), part

    return Work({"pairs": path}, {"content": digest([list(pair) for pair in pairs])}, len(pairs), parts)


def sampled_work(prompts: str, model: str, sampling: SamplingArguments, as_chat: bool) -> Work:
    """Return the work for sampled pairs: two different completions of each prompt, sampled as in `rlhf annotate`."""
    from rlhf_lightning.commands.generate import read_prompts
    from rlhf_lightning.commands.journal import model_stamp
    from rlhf_lightning.data.feedback.records import digest
    from rlhf_lightning.people.candidates import load_policies, sampled_items
    from rlhf_lightning.scoring.judges.judge import Pair

    rows = read_prompts(prompts, as_chat)
    task: dict[str, Any] = {"content": digest([list(row) for row in rows]), "model": model_stamp(model)}
    for name in ("chat_template", "template_args"):
        if getattr(sampling, name) is not None:
            task[name] = getattr(sampling, name)

    def parts(done: int) -> Iterator[tuple[int, list["Pair"]]]:
        policies, at_once = load_policies([model], sampling), max(sampling.batch_size, FOUND_AT_ONCE)
        settings, seed = sampling.settings(), sampling.seed
        items = sampled_items(policies, rows, 2, settings, seed, at_once, lambda _: False, done)
        for start, part in zip(range(done, len(rows), at_once), items, strict=True):
            pairs = []
            for item in part:
                first, second = item.candidates
                pairs.append(Pair(item.prompt, first.completion, second.completion, None, item.columns))
            yield min(start + at_once, len(rows)), pairs

    return Work({"prompts": prompts, "model": model, "sampling": sampling.provenance()}, task, len(rows), parts)
