"""The steps of a loop: pairs are sampled, labelled, learned from, and the policy is evaluated.

Each can be killed anywhere and begun again, and ends in the same bits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import rlhf_lightning.modules  # noqa: F401  objectives by their short names
from rlhf_lightning.commands import train
from rlhf_lightning.commands.generate import SamplingArguments, load_for_sampling, read_prompts, write_lines
from rlhf_lightning.commands.messages import subclasses_of
from rlhf_lightning.data.feedback.records import Item
from rlhf_lightning.data.feedback.snapshots import items_of, judgements_of
from rlhf_lightning.errors import SettingError
from rlhf_lightning.evaluation.policies import ScoredSamples, mean_with_interval, sample_and_score
from rlhf_lightning.loading import load_class
from rlhf_lightning.models.causal_lm import load_reference
from rlhf_lightning.people.candidates import TRIES, load_policies, sampled_items
from rlhf_lightning.people.store import FeedbackStore
from rlhf_lightning.runs.checkpoint_files import last_checkpoint
from rlhf_lightning.runs.run import CONFIG_FILE, MODEL_FOLDER, versions
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.scoring import Scorer
from rlhf_lightning.scoring.scorer import ask_scorer
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.types import Prompt, PromptBatch

AT_ONCE = 64
"""Prompts sampled together."""

COMPLETIONS_FILE = "completions.jsonl"


def sample_pairs(
    store: FeedbackStore, policy: str, prompts: str, count: int, settings: SamplingSettings, seed: int
) -> int:
    """Put pairs of two completions of the policy into a store until it holds ``count``, and return how many it holds.

    Prompts are taken in random order, and again from the start where there are fewer than pairs; what the store holds
    is gone on with. Fewer than ``count`` are what the policy gives two different answers to.
    """
    rows = read_prompts(prompts, as_chat=False)
    random.Random(seed).shuffle(rows)
    with store.reading() as connection:
        items = {item.key: item for item in items_of(connection)}
    begin, start = _after(list(items.values()), seed)
    policies = load_policies([policy], SamplingArguments()) if len(items) < count else []
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
    """Where sampling goes on after these: turn through the prompts, and number of the prompt in it."""
    if not items:
        return 0, 0
    last = items[-1].candidates[0]
    assert last.seed is not None and last.episode is not None
    return last.seed - seed, last.episode // (2 * TRIES) + 1


def labels_of(store: FeedbackStore) -> dict[str, Any]:
    """Return what is known of the labels in a store."""
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
    """Train a stage by `rlhf fit`, or go on with what was cut off; return the model's folder.

    Args:
        folder: of the round; the run is ``folder/stage``.
        stage: its name.
        config: YAML file.
        flags: settings beyond the file's.
    """
    argv = ["--config", config, "--runs_folder", str(folder), "--run_name", stage]
    for name, value in flags.items():
        argv += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    begun = [run for _, run in versions(folder / stage) if _can_go_on(run)]
    done = train.run(["fit", "--resume", str(begun[-1])] if begun else ["fit", *argv])
    return {"model": str(Path(done.folder or folder) / MODEL_FOLDER)}


def _can_go_on(run: Path) -> bool:
    try:
        last_checkpoint(run)
    except FileNotFoundError:
        return False
    return (run / CONFIG_FILE).is_file()


def learns_from_prompts(config: str) -> bool:
    """Whether the objective of a YAML file samples for itself and learns from scores, instead of from labels.

    Raises:
        SettingError: the file names no objective.
    """
    model = (yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}).get("model")
    name = model.get("class_path") if isinstance(model, Mapping) else model
    if not isinstance(name, str):
        raise SettingError(
            "unknown-objective",
            f"{config} names no objective: give it model: {{class_path: DPOModule}}, or another class",
        )
    kind = load_class(name, AlignmentModule, subclasses_of(AlignmentModule), "objective")
    return kind.batch_type is PromptBatch


def ensemble_of(models: Sequence[str]) -> Any:
    """What `load_scorer` takes for the mean score of reward models."""
    if len(models) == 1:
        return models[0]
    return {
        "class_path": "rlhf_lightning.scoring.Ensemble",
        "init_args": {"scorers": list(models), "penalty": 0.0},
    }


def evaluate(
    policy: str,
    reference: str,
    prompts: str,
    settings: SamplingSettings,
    seed: int,
    scorer: Scorer | None,
    gold_reward: Callable[[Prompt, str], float] | None,
    folder: Path,
) -> dict[str, Any]:
    """Answer the held-out prompts; write the completions into ``folder`` and return means with 95 % intervals."""
    rows: list[Prompt] = [prompt for prompt, _ in read_prompts(prompts, as_chat=False)]
    model, tokenizer = load_for_sampling(policy)
    device = next(model.parameters()).device
    anchor = load_reference(reference).to(device)
    samples = sample_and_score(
        model, tokenizer, rows, settings, seed, 1, anchor, None if scorer is None else scorer.to(device), gold_reward
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
    """Share of held-out prompts on which a policy's completion beats another's, a tie counted half, with its interval.

    The gold reward decides where it is known, else the scorer.

    Args:
        folder: where `evaluate` wrote the completions.
        against: where it wrote the other's.
        scorer: scores the other's; None with a gold reward.
        seed: of the interval.
    """
    mine, theirs = (
        [json.loads(line) for line in (place / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()]
        for place in (folder, against)
    )
    name = "gold_reward" if "gold_reward" in mine[0] else "score"
    other = [row.get(name) for row in theirs]
    if name == "score":
        assert scorer is not None
        texts = [row["completion"] for row in theirs]
        other = ask_scorer(scorer, [row["prompt"] for row in theirs], texts, {}, "scorer").scores.tolist()
    wins = [0.5 + 0.5 * ((one[name] > value) - (one[name] < value)) for one, value in zip(mine, other, strict=True)]
    found = mean_with_interval(torch.tensor(wins, dtype=torch.float64), seed)
    return {"win_rate": found["mean"], "win_rate_ci": found["ci"]}
