"""Train the arms of an effect over seeds by the machinery of `rlhf sweep`, and measure the trained policies."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from rlhf_lightning.commands.sweep import PlannedRun, Sweep, record, state_of
from rlhf_lightning.evaluation.policies import sample_and_score
from rlhf_lightning.evaluation.report import write_json, write_markdown
from rlhf_lightning.evaluation.run_curves import FinishedRun, read_run
from rlhf_lightning.loading import read_config, read_record, read_records
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.roles import load_policy, load_reference
from rlhf_lightning.recipes import FOLDER
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.tokenization import load_tokenizer
from rlhf_lightning.types import Prompt
from rlhf_lightning.worlds.assistant import gold_of_conversation

HELD_OUT_PROMPTS = 100
SAMPLING = SamplingSettings(max_new_tokens=64, batch_size=64)
GOLD = "experiments.effects.scores.gold"
"""Import path of the scorer that knows the gold reward."""
KL, GOLD_REWARD = "KL, nats", "gold reward"

Config = dict[str, Any]
Arguments = argparse.Namespace


class Curve(NamedTuple):
    """A curve of one run, all of shape (points,). The places of a point, such as updates, align runs."""

    places: np.ndarray
    x: np.ndarray
    y: np.ndarray


class Panel(NamedTuple):
    """A plot: the labels of its axes, and the curve of a run."""

    x: str
    y: str
    curve: Callable[[FinishedRun, Arguments], Curve]


def nothing(arm: str, seed: int, arguments: Arguments) -> dict[str, str]:
    """Return no further settings."""
    return {}


class Effect(NamedTuple):
    """A published effect.

    Attributes:
        title: heading of the page.
        claim: what the paper claims, with its reference.
        setting: the experiment here.
        configs: function from the arguments to the config of each arm; the first arm is the baseline.
        measures: function from an arm, one of its runs and the arguments to values by name.
        panels: the plots.
        needs: function from arm, seed and arguments to further settings of that run; it trains what the run needs.
        note: function from the values by measure, arm and seed to a paragraph of the page.
    """

    title: str
    claim: str
    setting: str
    configs: Callable[[Arguments], dict[str, Config]]
    measures: Callable[[str, FinishedRun, Arguments], dict[str, float]]
    panels: tuple[Panel, ...]
    needs: Callable[[str, int, Arguments], dict[str, str]] = nothing
    note: Callable[[dict[str, dict[str, dict[int, float]]]], str] = lambda values: ""


# -- configs ----------------------------------------------------------------------------------------------------------


def sized(arguments: Arguments, full: int, least: int = 1) -> int:
    """Return a number of rows, rollouts or samples, reduced by ``--scale``."""
    return max(int(full * arguments.scale), least)


def start_of(arguments: Arguments) -> Path:
    """Return the folder of the quickstart's SFT policy."""
    return Path(arguments.start) / "sft/version_0/model"


def world_file(arguments: Arguments, name: str) -> Path:
    """Return a file of the quickstart's world, such as pairs_test."""
    return Path(arguments.start) / "world" / f"{name}.jsonl"


def held_out_rows(arguments: Arguments, name: str, rows: int) -> list[dict[str, Any]]:
    """Return the value of ``data.eval_source`` for the first rows of a file of the world."""
    return [{"path": str(world_file(arguments, name)), "rows": sized(arguments, rows, 8)}]


def recipe(stage: str, model: Config, data: Config, **further: Any) -> Config:
    """Return the quickstart's config of a stage with other settings of the model, the data and further sections."""
    config = read_config(FOLDER / "assistant" / f"{stage}.yaml")
    config.pop("export", None)
    for section, given in (("model", model), ("data", data)):
        config[section]["init_args"] |= given
    return {**config, **further}


def varied(shared: Config, arms: Mapping[str, Config]) -> dict[str, Config]:
    """Return a config for each arm: the shared one with other arguments, and possibly another class, of the model."""
    found = {}
    for arm, changes in arms.items():
        given = dict(changes)
        kind = given.pop("class_path", shared["model"]["class_path"])
        found[arm] = {
            **shared,
            "model": {"class_path": kind, "init_args": {**shared["model"]["init_args"], **given}},
        }
    return found


# -- training ---------------------------------------------------------------------------------------------------------


def trained(folder: Path, config: Config, settings: Mapping[int, Mapping[str, str]]) -> list[FinishedRun]:
    """Train the unfinished runs of a sweep with one run for each seed, and return the finished runs.

    Args:
        folder: folder of the sweep; the config is written next to it.
        config: config of all runs.
        settings: further settings of the run of each seed.

    Raises:
        SettingError: ``sweep-changed``: the folder holds runs of another config.
        SystemExit: the sweep was interrupted; the status is 75.
    """
    path = folder.with_name(f"{folder.name}.yaml")
    folder.mkdir(parents=True, exist_ok=True)
    write_markdown(path, yaml.safe_dump(config, sort_keys=False))
    runs = [PlannedRun(f"seed_{seed}", dict(given), seed) for seed, given in settings.items()]
    record(folder, str(path), path, {}, runs)
    if any(state_of(folder, run)[0] != "finished" for run in runs):
        print(f"\n{folder}", flush=True)
        if Sweep(folder, str(path), {}, runs, jobs=1).run() == 75:
            raise SystemExit(75)
    found = [state_of(folder, run) for run in runs]
    return [read_run(run) for state, run in found if state == "finished" and run is not None]


def needed(folder: Path, config: Config, seed: int) -> FinishedRun:
    """Return the run of one seed that other runs build on, trained on first use.

    Raises:
        SystemExit: the run failed.
    """
    for run in trained(folder, config, {seed: {}}):
        return run
    raise SystemExit(f"{folder}/seed_{seed} failed, and other runs need its model: see fit.log in that folder")


def train(name: str, effect: Effect, arguments: Arguments) -> dict[str, list[FinishedRun]]:
    """Train the unfinished runs of an effect, and return the finished runs of each arm."""
    return {
        arm: trained(
            arm_folder(name, arm, arguments), config,
            {seed: effect.needs(arm, seed, arguments) for seed in range(arguments.seeds)},
        )
        for arm, config in effect.configs(arguments).items()
    }  # fmt: skip


def arm_folder(name: str, arm: str, arguments: Arguments) -> Path:
    """Return the folder of an arm's runs."""
    return Path(arguments.out) / name / arm.replace(" ", "_").replace(",", "")


# -- measures ---------------------------------------------------------------------------------------------------------


def held_out_prompts(arguments: Arguments) -> list[Prompt]:
    """Return the held-out prompts that policies are measured on."""
    rows = read_records(world_file(arguments, "prompts_test"))
    return [row["prompt"] for row in rows[: sized(arguments, HELD_OUT_PROMPTS, 8)]]


@cache
def _reference(folder: str) -> CausalLM:
    return load_reference(folder)


def held_out(model: Path, arguments: Arguments) -> dict[str, float]:
    """Return means over a policy's completions of held-out prompts; kept in a file next to the model folder.

    Returns:
        `GOLD_REWARD`, and `KL` from the quickstart's SFT policy.
    """
    kept = model.with_name(f"{model.name}.held_out.json")
    if not kept.is_file():
        found = sample_and_score(
            load_policy(str(model)).eval(), load_tokenizer(str(model)), held_out_prompts(arguments), SAMPLING, 0,
            reference=_reference(str(start_of(arguments))), gold_reward=gold_of_conversation,
        )  # fmt: skip
        assert found.gold is not None and found.kl is not None
        write_json(kept, {GOLD_REWARD: float(found.gold.mean()), KL: float(found.kl.double().mean())})
    return {name: float(value) for name, value in read_record(kept).items()}


def final(run: FinishedRun, tag: str) -> float:
    """Return the last validation value of a metric; without validation, the mean over the last quarter of training."""
    values = run.scalars[tag][1]
    return float(values[-1] if tag.startswith("val/") else values[-max(len(values) // 4, 1) :].mean())


def end(arm: str, run: FinishedRun, arguments: Arguments) -> dict[str, float]:
    """Return gold reward and KL of a run's policy on held-out prompts."""
    return held_out(run.folder / "model", arguments)


def over_updates(tag: str, scale: float = 1.0) -> Callable[[FinishedRun, Arguments], Curve]:
    """Return the curve of a metric over updates."""
    return lambda run, arguments: Curve(run.scalars[tag][0], run.scalars[tag][0], scale * run.scalars[tag][1])


def against(x: str, y: str) -> Callable[[FinishedRun, Arguments], Curve]:
    """Return the curve of one metric against another metric of the same updates."""
    return lambda run, arguments: Curve(run.scalars[x][0], run.scalars[x][1], run.scalars[y][1])


def from_start(run: FinishedRun, arguments: Arguments) -> Curve:
    """Return gold reward against KL of the exported policies of a run, from the SFT policy to the last policy."""
    exports = sorted(path for path in (run.folder / "exports").glob("update_*") if path.is_dir())
    found = [held_out(model, arguments) for model in (start_of(arguments), *exports, run.folder / "model")]
    return Curve(np.arange(len(found)), *(np.array([one[name] for one in found]) for name in (KL, GOLD_REWARD)))
