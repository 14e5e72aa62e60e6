"""Steps of a loop (sample pairs, train stages, evaluate policies, write the report) and the record of finished steps.

A step may be killed at any point and run again; the result is bit-identical.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.tensorboard import SummaryWriter

import rlhf_lightning.modules  # noqa: F401  objectives by their short names
from rlhf_lightning.atomic_files import write_lines, write_text
from rlhf_lightning.commands import train
from rlhf_lightning.commands.generate import SamplingArguments, read_prompts
from rlhf_lightning.commands.messages import subclasses_of
from rlhf_lightning.data.feedback.database import items_of, judgements_of
from rlhf_lightning.data.feedback.records import Item
from rlhf_lightning.errors import MissingError, SettingError, StateError
from rlhf_lightning.evaluation.policies import ScoredSamples, mean_with_interval, sample_and_score
from rlhf_lightning.evaluation.report import interval, markdown_table, pyplot, save_figure, write_markdown
from rlhf_lightning.loading import load_class, read_config, read_records, read_yaml
from rlhf_lightning.models.roles import load_reference
from rlhf_lightning.people.candidates import TRIES, load_policies, sampled_items
from rlhf_lightning.people.store import FeedbackStore
from rlhf_lightning.recipes import resolve_recipe
from rlhf_lightning.runs.checkpoint_files import last_checkpoint
from rlhf_lightning.runs.run import CONFIG_FILE, MODEL_FOLDER, versions
from rlhf_lightning.runs.run_records import EVENTS
from rlhf_lightning.scoring import Scorer
from rlhf_lightning.scoring.scorer import ask_scorer
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.types import Prompt, PromptBatch

STATE_FILE = "state.json"
FILES = ("prompts", "eval_prompts", "reward_config", "policy_config")
"""Settings that name a file; the loop depends on the content of these files."""

MAY_CHANGE = ("rounds",)
"""Settings that may change when a loop is resumed."""

AT_ONCE = 64
"""Prompts sampled at a time."""

COMPLETIONS_FILE, REPORT, PLOT = "completions.jsonl", "loop.md", "loop.png"
FIGURES = ("gold_reward", "win_rate", "score", "kl", "length", "finished")


class LoopState:
    """Finished steps of a loop, by name, with their results.

    Raises:
        SettingError: the loop in the folder was started with other settings or other file contents.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], files: Mapping[str, str]) -> None:
        self.path = folder / STATE_FILE
        self.steps: dict[str, Any] = {}
        self.settings, self.files = dict(settings), dict(files)
        if self.path.is_file():
            earlier, hashes = self._read()
            changed = [name for name in settings if name not in MAY_CHANGE and settings[name] != earlier.get(name)]
            if changed:
                said = ", ".join(f"{name} {earlier.get(name)} (now {settings[name]})" for name in changed)
                raise SettingError(
                    "settings-changed",
                    f"the loop in {folder} was started with {said}: give another --name, or the same settings",
                )
            edited = [settings[name] for name, found in self.files.items() if found != hashes.get(name)]
            if edited:
                raise SettingError(
                    "files-changed",
                    f"{' and '.join(edited)} changed since the loop in {folder} was started: give another --name, or "
                    "restore the earlier content",
                )

    def _read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the finished steps; return the settings and the fingerprints of the files."""
        parts: list[Any] = []
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            parts = [known[name] for name in ("steps", "settings", "files")]
            sound = all(isinstance(part, dict) for part in (*parts, *parts[0].values()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise StateError(
                "damaged-state",
                f"{self.path} does not contain the steps, settings and files of a loop: restore it from a copy, or "
                "give another --name",
            )
        self.steps = parts[0]
        return parts[1], parts[2]

    def step(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a step's result; run the step unless it is finished. A step may be killed at any point and rerun."""
        if name not in self.steps:
            print(f"\nloop: {name}", flush=True)
            began = time.monotonic()
            result = work()
            ended = datetime.now(UTC).isoformat(timespec="milliseconds")
            self.steps[name] = {**result, "seconds": round(time.monotonic() - began, 3), "ended": ended}
            state = {"settings": self.settings, "files": self.files, "steps": self.steps}
            write_text(self.path, json.dumps(state, indent=2) + "\n")
        return dict(self.steps[name])


def fingerprints(settings: Mapping[str, Any]) -> dict[str, str]:
    """Hash the content of each file of `FILES`; for YAML files, hash the values without comments."""
    found = {}
    for name in FILES:
        path = Path(resolve_recipe(settings[name]))
        if not path.exists():
            raise MissingError("no-file", f"there is no file {path} ({name})")
        if path.is_file():
            held = path.read_bytes()
            if path.suffix in (".yaml", ".yml"):
                held = json.dumps(read_yaml(held.decode()), sort_keys=True, default=str).encode()
            found[name] = hashlib.blake2b(held, digest_size=16).hexdigest()
    return found


# ---- steps -----------------------------------------------------------------------------------------------------------


def sample_pairs(
    store: FeedbackStore, policy: str, prompts: str, count: int, sampling: SamplingArguments, seed: int
) -> int:
    """Add pairs of two completions of the policy to a store until it holds ``count``; return how many it holds.

    Prompts come in random order, starting after the prompts in the store; they are used several times if there are
    fewer prompts than pairs. The result is below ``count`` if the policy too rarely gives two different answers.
    """
    rows = read_prompts(prompts, as_chat=False)
    random.Random(seed).shuffle(rows)
    with store.reading() as connection:
        items = {item.key: item for item in items_of(connection)}
    begin, start = _after(list(items.values()), seed)
    settings = sampling.settings()
    policies = load_policies([policy], sampling) if len(items) < count else []
    for turn in range(begin, 1 + -(-count // len(rows))):
        if len(items) >= count:
            break
        for batch in sampled_items(policies, rows, 2, settings, seed + turn, AT_ONCE, lambda prompt: False, start):
            items |= {item.key: item for item in batch if item.key not in items}
            if len(items) >= count:
                break
        start = 0
    store.add(list(items.values())[:count])
    return min(len(items), count)


def _after(items: Sequence[Item], seed: int) -> tuple[int, int]:
    """Return where sampling resumes after these items: the pass over the prompts, and the prompt's index in it."""
    if not items:
        return 0, 0
    last = items[-1].candidates[0]
    assert last.seed is not None and last.episode is not None
    return last.seed - seed, last.episode // (2 * TRIES) + 1


def labels_of(store: FeedbackStore) -> dict[str, Any]:
    """Summarize the labels of a store."""
    with store.reading() as connection:
        judged = judgements_of(connection)
    snapshot = store.snapshot()
    return {
        "labels": store.labels(),
        "snapshot": snapshot.upto,
        "fingerprint": snapshot.fingerprint,
        "annotators": len({one.annotator for one in judged}),
        "first": min(one.judged for one in judged),
    }


def train_stage(folder: Path, stage: str, config: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Train a stage with `rlhf fit`, or resume it; return the folder of its model."""
    argv = ["--config", config, "--runs_folder", str(folder), "--run_name", stage]
    for name, value in flags.items():
        argv += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    started = [run for _, run in versions(folder / stage) if _can_resume(run)]
    done = train.run(["fit", "--resume", str(started[-1])] if started else ["fit", *argv])
    return {"model": str(Path(done.folder or folder) / MODEL_FOLDER)}


def _can_resume(run: Path) -> bool:
    try:
        last_checkpoint(run)
    except FileNotFoundError:
        return False
    return (run / CONFIG_FILE).is_file()


def learns_from_prompts(config: str) -> bool:
    """Whether the objective of a YAML file is on-policy, so that it learns from scores instead of labels."""
    model = read_config(Path(resolve_recipe(config))).get("model")
    name = model.get("class_path") if isinstance(model, Mapping) else model
    if not isinstance(name, str):
        raise SettingError(
            "unknown-objective",
            f"{config} names no objective: set model: {{class_path: DPOModule}}, or another class",
        )
    kind = load_class(name, AlignmentModule, subclasses_of(AlignmentModule), "objective")
    return kind.batch_type is PromptBatch


def ensemble_of(models: Sequence[str]) -> Any:
    """Return the scorer setting for the mean score of several reward models."""
    if len(models) == 1:
        return models[0]
    return {"class_path": "rlhf_lightning.scoring.Ensemble", "init_args": {"scorers": list(models), "penalty": 0.0}}


def evaluate(
    policy: str,
    reference: str,
    prompts: str,
    sampling: SamplingArguments,
    seed: int,
    scorer: Scorer | None,
    gold_reward: Callable[[Prompt, str], float] | None,
    folder: Path,
) -> dict[str, Any]:
    """Answer held-out prompts; write the completions to ``folder``; return means with 95 % intervals."""
    rows: list[Prompt] = [prompt for prompt, _ in read_prompts(prompts, as_chat=False)]
    model, tokenizer = sampling.load(policy)
    device = next(model.parameters()).device
    anchor = load_reference(reference).to(device)
    judge = None if scorer is None else scorer.to(device)
    samples = sample_and_score(
        model, tokenizer, rows, sampling.settings(), seed, 1, anchor, judge, gold_reward, sampling.make_engine()
    )
    write_lines(folder / COMPLETIONS_FILE, _lines(samples))
    figures: dict[str, Any] = {
        "length": float(samples.lengths.double().mean()),
        "finished": float(samples.finished.double().mean()),
    }
    for name, values in (("gold_reward", samples.gold), ("score", samples.scores), ("kl", samples.kl)):
        if values is not None:
            found = mean_with_interval(values, seed)
            figures |= {name: found["mean"], f"{name}_ci": found["ci"]}
    return figures


def _lines(samples: ScoredSamples) -> list[dict[str, Any]]:
    columns = {
        name: None if values is None else values.tolist()
        for name, values in (("gold_reward", samples.gold), ("score", samples.scores), ("kl", samples.kl))
    }
    known = {name: values for name, values in columns.items() if values is not None}
    return [
        {"prompt": prompt, "completion": text, **{name: values[row] for name, values in known.items()}}
        for row, (prompt, text) in enumerate(zip(samples.prompts, samples.completions, strict=True))
    ]


def win_rate(folder: Path, against: Path, scorer: Scorer | None, seed: int) -> dict[str, Any]:
    """Return a policy's win rate against another on held-out prompts, by gold reward or scorer; a tie counts half."""
    mine, theirs = (read_records(place / COMPLETIONS_FILE) for place in (folder, against))
    name = "gold_reward" if "gold_reward" in mine[0] else "score"
    other = [row.get(name) for row in theirs]
    if name == "score":
        assert scorer is not None
        texts = [row["completion"] for row in theirs]
        other = ask_scorer(scorer, [row["prompt"] for row in theirs], texts, {}, "scorer").scores.tolist()
    wins = [0.5 + 0.5 * ((one[name] > value) - (one[name] < value)) for one, value in zip(mine, other, strict=True)]
    found = mean_with_interval(torch.tensor(wins, dtype=torch.float64), seed)
    return {"win_rate": found["mean"], "win_rate_ci": found["ci"]}


# ---- report ----------------------------------------------------------------------------------------------------------


class LabelPoint(NamedTuple):
    """A measurement after a number of labels, with its interval."""

    labels: int
    value: float
    low: float
    high: float


def draw_label_curves(
    panels: Mapping[str, Mapping[str, Sequence[LabelPoint]]], path: str | Path, title: str = ""
) -> Path:
    """Plot one panel per metric with one curve per method; return the path."""
    size = (5.5 * len(panels), 4.2)
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, constrained_layout=True, squeeze=False)
    for axis, (merit, methods) in zip(axes[0], panels.items(), strict=True):
        for method, points in methods.items():
            line = sorted(points)
            labels, values = [point.labels for point in line], [point.value for point in line]
            axis.plot(labels, values, marker="o", markersize=4, label=method)
            axis.fill_between(labels, [point.low for point in line], [point.high for point in line], alpha=0.15)
        axis.set_xlabel("labels")
        axis.set_ylabel(merit)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="lower right")
    if title:
        figure.suptitle(title)
    return save_figure(figure, path, metadata={"Software": None})


def write_report(folder: Path, name: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Write loop.md, loop.png and the TensorBoard event file; return the table."""
    shown = [figure for figure in FIGURES if any(figure in point for point in points)]
    merit = "gold_reward" if "gold_reward" in shown else "win_rate"
    curve = [LabelPoint(point["labels"], point[merit], *point[f"{merit}_ci"]) for point in points if merit in point]
    draw_label_curves({merit.replace("_", " "): {name: curve}}, folder / PLOT)
    table = _table(points, shown)
    write_markdown(folder / REPORT, _page(name, table))
    _write_scalars(folder, points, shown)
    return table


def _table(points: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> str:
    header, rows = ["labels"], [[point["labels"]] for point in points]
    for figure in shown:
        has_interval = any(f"{figure}_ci" in point for point in points)
        header += [figure.replace("_", " "), "95 % interval"] if has_interval else [figure]
        for row, point in zip(rows, points, strict=True):
            row.append(point.get(figure))
            if has_interval:
                row.append(interval(point[f"{figure}_ci"]) if f"{figure}_ci" in point else "")
    return markdown_table(header, rows)


def _page(name: str, table: str) -> str:
    return (
        f"# The loop {name}\n\n"
        "Each row is a policy trained on that many labels and evaluated on held-out prompts; 0 labels is the initial "
        "policy. Gold reward is the known true reward; it is not used in training. Win rate is against the initial "
        "policy on the same prompts; a tie counts half. Score comes from the round's reward models, so scores of "
        "different rounds are not comparable. KL is from the initial policy, in nats per completion.\n\n"
        f"{table}\n\n![curve]({PLOT})\n"
    )


def _write_scalars(folder: Path, points: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> None:
    """Write a new event file that replaces the earlier one."""
    earlier = list(folder.glob(EVENTS))
    with SummaryWriter(str(folder)) as writer:
        for point in points:
            for figure in shown:
                if figure in point:
                    writer.add_scalar(f"loop/{figure}", point[figure], point["labels"])
    for file in earlier:
        file.unlink()
