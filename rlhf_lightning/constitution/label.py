"""``rlhf label``: a judge compares completions under a constitution; soft labels, and how far it can be trusted."""

# No postponed annotations: to resolve them jsonargparse imports what is under TYPE_CHECKING, and help takes seconds.

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import SettingError

if TYPE_CHECKING:
    from rlhf_lightning.scoring.judges.judge import Pair

DEFAULTS = SamplingArguments()

FOUND_AT_ONCE = 64
"""Pairs between two lines of the journal."""

Part = tuple[int, list["Pair"]]


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf label``."""
    return run_function(label, argv, "rlhf label")


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
    """Label pairs of completions by a judge, each comparison in both orders, and write them with soft labels.

    Pairs are given (--pairs) or sampled (--prompts with --model). A line of the file has prompt, chosen, rejected and
    preference (the probability that chosen is better), as PreferenceDataModule reads them, and judge, constitution (its
    fingerprint), principles, probabilities (that chosen is better, by principle, chosen shown first) and
    swapped_probabilities (chosen shown second), tie and human_preference (of given pairs). An answer that is none is
    counted and never made up. The judge's consistency, bias towards a place, ties, failures, entropy and agreement with
    the labels of given pairs are printed and written to OUT.report.json. A run that was killed goes on where it stopped
    when it is started again.

    Args:
        judge: folder of a language model, .gguf file or hub id; address of an OpenAI-compatible server (name its model:
            --judge_args.model NAME); or a class, of rlhf_lightning.scoring.judges or your own by its import path.
        out: JSONL file of labelled pairs to write; it appears when all is done.
        constitution: name of a shipped one (harmless, helpful), or a YAML file.
        pairs: file of preferences in any form that training reads; their labels are compared with, not shown. Every two
            completions of a list are a pair.
        prompts: file of prompts to sample two completions of.
        model: folder of the policy that is sampled from.
        judge_args: arguments of the judge's class: --judge_args.NAME VALUE.
        principles: principles drawn for each pair; their answers are averaged.
        average: of orders and principles, probability or logit; logit removes a constant bias towards a place whole.
        reasoning: let the judge reason before it answers; probabilities are then held within [0.4, 0.6].
        least_mass: least probability of the two letters together; below it the judge gave no answer.
        ties: keep pairs whose verdict is a tie, with their soft label, or drop them.
        as_chat: put a plain-text prompt into a user turn of the chat template.
        sampling: how completions are sampled; at temperature 0 a model has one answer, and no pair.
    """
    from rlhf_lightning.commands.journal import Journal, model_stamp
    from rlhf_lightning.commands.parsing import written_secret
    from rlhf_lightning.commands.quiet import quieten
    from rlhf_lightning.constitution.labelling import LabelSettings, compared
    from rlhf_lightning.constitution.principles import load_constitution
    from rlhf_lightning.scoring.judges import load_judge

    if (pairs is None) == (prompts is None) or (prompts is None) != (model is None):
        raise SettingError(
            "conflicting-settings",
            "give either --pairs, or --prompts with the --model that answers them",
        )
    if secret := written_secret({"judge": judge, "judge_args": judge_args or {}}):
        raise SettingError("written-secret", secret)
    quieten()
    rules = load_constitution(constitution)
    settings = LabelSettings(principles, average, reasoning, least_mass, sampling.seed)
    if len(rules.comparing) < principles:
        raise SettingError(
            "too-few-principles",
            f"the constitution {rules.title} has {len(rules.comparing)} principles to compare by, and principles is "
            f"{principles}: draw fewer for each pair",
        )
    if pairs is not None:
        work: Work = GivenPairs(pairs)
    else:
        assert prompts is not None and model is not None
        work = SampledPairs(prompts, model, sampling, as_chat)
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
        print(f"{journal.path}: going on after {journal.done:,} of {work.total:,}")
    for done, part in work.parts(journal.done):
        said = compared(judging, rules, part, settings, start=len(journal.records))
        found = zip(part, said, strict=True)
        journal.add(done, [{"pair": pair._asdict(), "comparisons": [asdict(one) for one in c]} for pair, c in found])
        print(f"{done:,} of {work.total:,}", flush=True)
    print(_written(Path(out), journal.records, settings, ties, provenance))
    journal.finish()
    return 0


def _written(target: Path, records: list[Any], settings: Any, ties: str, provenance: dict[str, Any]) -> str:
    """Write the labelled pairs and the report beside them; return what is printed."""
    from rlhf_lightning.commands.generate import write_lines
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
    """Arguments of the judge's class; a model on this machine is loaded at the precision asked for."""
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
    """Pairs of a file of preferences with what it says of them; a list is all of its pairs.

    Raises:
        MissingError: there is no such file.
        DataError: no row has two completions.
    """
    from rlhf_lightning.people.candidates import given_rows
    from rlhf_lightning.scoring.judges.judge import Pair

    found: list[Pair] = []
    for row in given_rows(path):
        assert row.prompt is not None
        for a, b in combinations(range(len(row.completions)), 2):
            preference = 0.5 if row.ranks[a] == row.ranks[b] else row.target
            found.append(Pair(row.prompt, row.completions[a], row.completions[b], preference, row.columns))
    return found


class Work(Protocol):
    """Where pairs come from.

    Attributes:
        provenance: what the report says of it.
        task: what the pairs depend on besides.
        total: how much there is of it.
    """

    provenance: dict[str, Any]
    task: dict[str, Any]
    total: int

    def parts(self, done: int) -> Iterator[Part]:
        """Yield pairs, some at a time, and how much is done with them; what is done is left out."""
        ...


class GivenPairs:
    """The pairs of a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        from rlhf_lightning.data.feedback.records import digest

        self.pairs = given_pairs(path)
        self.total = len(self.pairs)
        self.provenance = {"pairs": path}
        self.task = {"content": digest([list(pair) for pair in self.pairs])}

    def parts(self, done: int) -> Iterator[Part]:
        """Yield the pairs in their order."""
        for start in range(done, self.total, FOUND_AT_ONCE):
            part = self.pairs[start : start + FOUND_AT_ONCE]
            yield start + len(part), part


class SampledPairs:
    """Two different completions of each prompt, sampled as `rlhf annotate` does; a model of one answer gives none.

    Args:
        prompts: file of prompts.
        model: folder of the policy.
        sampling: how completions are sampled.
        as_chat: whether plain prompts become a user's turn.
    """

    def __init__(self, prompts: str, model: str, sampling: SamplingArguments, as_chat: bool) -> None:
        from rlhf_lightning.commands.generate import read_prompts
        from rlhf_lightning.commands.journal import model_stamp
        from rlhf_lightning.data.feedback.records import digest

        self.rows = read_prompts(prompts, as_chat)
        self.model, self.sampling = model, sampling
        self.total = len(self.rows)
        self.provenance = {"prompts": prompts, "model": model, "sampling": sampling.provenance()}
        self.task = {"content": digest([list(row) for row in self.rows]), "model": model_stamp(model)}
        if sampling.chat_template is not None:
            self.task["chat_template"] = sampling.chat_template

    def parts(self, done: int) -> Iterator[Part]:
        """Yield the pairs of some prompts at a time."""
        from rlhf_lightning.people.candidates import load_policies, sampled_items
        from rlhf_lightning.scoring.judges.judge import Pair

        policies, settings = load_policies([self.model], self.sampling), self.sampling.settings()
        at_once = max(self.sampling.batch_size, FOUND_AT_ONCE)
        items = sampled_items(policies, self.rows, 2, settings, self.sampling.seed, at_once, lambda _: False, done)
        for start, part in zip(range(done, self.total, at_once), items, strict=True):
            pairs = []
            for item in part:
                first, second = item.candidates
                pairs.append(Pair(item.prompt, first.completion, second.completion, None, item.columns))
            yield min(start + at_once, self.total), pairs
