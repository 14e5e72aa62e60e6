"""A loop and its rounds: what is done in which order, from what, and with which seed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from rlhf_lightning.commands.quiet import quieten
from rlhf_lightning.errors import DataError, MissingError, SettingError, StateError
from rlhf_lightning.people.handing_out import Policy
from rlhf_lightning.people.loop import LoopSettings
from rlhf_lightning.people.loop_report import REPORT, write_report
from rlhf_lightning.people.loop_steps import (
    ensemble_of,
    evaluate,
    labels_of,
    learns_from_prompts,
    sample_pairs,
    train_stage,
    win_rate,
)
from rlhf_lightning.people.selectors import Selector, load_selector, selector_class
from rlhf_lightning.people.store import FeedbackStore, counts
from rlhf_lightning.runs.atomic_files import write_text
from rlhf_lightning.runs.run import checked_run_name
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.scoring import Scorer, load_scorer
from rlhf_lightning.scoring.scorer import load_gold_reward
from rlhf_lightning.types import Prompt

STATE_FILE = "state.json"
FILES = ("prompts", "eval_prompts", "reward_config", "policy_config")
"""Settings that name a file whose contents decide what a loop does."""

MAY_CHANGE = ("rounds",)
"""Settings that a loop may be continued under another value of."""


class LoopState:
    """Steps that are done, by name, and their results.

    Args:
        folder: of the loop.
        settings: plain values of all its settings.
        files: fingerprint of each file that they name, see `fingerprints`.

    Raises:
        SettingError: the folder holds a loop with other settings, or with files that have changed since.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], files: Mapping[str, str]) -> None:
        self.path = folder / STATE_FILE
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.steps: dict[str, Any] = known.get("steps", {})
        earlier, self.settings, self.files = known.get("settings"), dict(settings), dict(files)
        if earlier is not None:
            changed = [name for name in settings if name not in MAY_CHANGE and settings[name] != earlier.get(name)]
            if changed:
                said = ", ".join(f"{name} {earlier.get(name)} (now {settings[name]})" for name in changed)
                raise SettingError(
                    "settings-changed",
                    f"the loop in {folder} was started with {said}: give another --name, or the same settings",
                )
            edited = [settings[name] for name, found in self.files.items() if found != known["files"].get(name)]
            if edited:
                raise SettingError(
                    "files-changed",
                    f"{' and '.join(edited)} changed since the loop in {folder} was started: give another --name, or "
                    "restore the earlier content",
                )

    def step(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a step's result; it is done now unless it was done before.

        Work must bear being cut off anywhere and begun again.
        """
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
    """Hash the content of each file of `FILES`, by the setting's name; for YAML its values alone, without comments.

    Raises:
        MissingError: there is no such file.
    """
    found = {}
    for name in FILES:
        path = Path(settings[name])
        if not path.exists():
            raise MissingError("no-file", f"there is no file {path} ({name})")
        if path.is_file():
            held = path.read_bytes()
            if path.suffix in (".yaml", ".yml"):
                held = json.dumps(yaml.safe_load(held), sort_keys=True, default=str).encode()
            found[name] = hashlib.blake2b(held, digest_size=16).hexdigest()
    return found


def seed_of(*values: Any) -> int:
    """A seed that the values decide; nearby values give seeds that have nothing to do with each other."""
    digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def run_loop(settings: LoopSettings, plain: dict[str, Any]) -> None:
    """Run a loop, or go on with it.

    Args:
        settings: of the loop.
        plain: the same as plain values, by which they are compared with what the loop was begun with.

    Raises:
        SettingError: the loop was started with other settings.
        StateError: another process runs it.
    """
    quieten()
    folder = Path(settings.runs_folder) / checked_run_name(settings.name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "loop.lock", blocking=False):
            Loop(settings, folder, LoopState(folder, plain, fingerprints(plain))).run()
    except Timeout:
        raise StateError(
            "loop-locked",
            f"another process runs the loop in {folder}; wait for it to finish, or give another --name",
        ) from None


class Loop:
    """A loop and its folder.

    Args:
        settings: what is done.
        folder: where.
        state: what of it is done already.
    """

    def __init__(self, settings: LoopSettings, folder: Path, state: LoopState) -> None:
        self.settings, self.folder, self.state = settings, folder, state
        self.on_policy = learns_from_prompts(settings.policy_config)
        path = settings.gold_reward
        self.gold_reward: Callable[[Prompt, str], float] | None = None if path is None else load_gold_reward(path)
        if settings.select is not None and settings.members < selector_class(settings.select).members:
            wanted = selector_class(settings.select).members
            raise SettingError(
                "too-few-reward-models",
                f"select {settings.select} compares {wanted} reward models, and members is {settings.members}: "
                f"set it to {wanted} or more",
            )

    # ---- the order of things -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Do what is not done yet."""
        self.state.step("start/evaluate", self.evaluate_start)
        for number in range(self.settings.rounds):
            steps: dict[str, Callable[[int], dict[str, Any]]] = {"sample": self.sample, "label": self.label}
            steps |= {self.reward_stage(m): partial(self.reward, m) for m in range(self.settings.members)}
            steps |= {"policy": self.policy, "evaluate": self.evaluate}
            for name, work in steps.items():
                self.state.step(f"round_{number}/{name}", partial(work, number))
            self.report(number + 1)

    def result(self, number: int, name: str) -> dict[str, Any]:
        """What a step of a round gave."""
        return dict(self.state.steps[f"round_{number}/{name}"])

    def round_folder(self, number: int) -> Path:
        """The folder of a round."""
        return self.folder / f"round_{number}"

    def reward_stage(self, member: int) -> str:
        """The name of a reward model's stage."""
        return "reward" if self.settings.members == 1 else f"reward_{member}"

    def reward_models(self, number: int) -> list[str]:
        """The reward models of a round."""
        return [self.result(number, self.reward_stage(m))["model"] for m in range(self.settings.members)]

    def latest(self, number: int) -> str:
        """The policy that a round begins with."""
        return self.settings.init_from if number == 0 else str(self.result(number - 1, "policy")["model"])

    def start(self, number: int) -> str:
        """The policy that a round's training starts from."""
        return self.settings.init_from if self.settings.start == "first" else self.latest(number)

    def seed(self, *values: Any) -> int:
        """A seed of its own for each purpose."""
        return seed_of(self.settings.seed, *values)

    @property
    def sampling(self) -> SamplingSettings:
        """How completions are sampled."""
        one = self.settings
        return SamplingSettings(one.max_new_tokens, one.temperature, batch_size=one.batch_size)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def open_store(self, number: int) -> FeedbackStore:
        """The store of a round, opened for labelling."""
        one = self.settings
        policy = Policy(one.annotators_per_item, one.repeats, lease=one.labeller.lease, seed=self.seed("page", number))
        return FeedbackStore(self.store_path(number), policy)

    def store_path(self, number: int) -> Path:
        """The file of a round's labels."""
        return self.round_folder(number) / "feedback.db"

    def sample(self, number: int) -> dict[str, Any]:
        """Sample the round's pairs from the latest policy."""
        one = self.settings
        with self.open_store(number) as store:
            pairs = self._sampled(store, number, one.pairs)
        if pairs < one.pairs:
            raise DataError(
                "too-few-pairs",
                f"{self.latest(number)} gave {pairs} pairs of different answers to the prompts of {one.prompts}, and "
                f"{one.pairs} are wanted: give more prompts, or a higher temperature",
            )
        return {"pairs": pairs}

    def _sampled(self, store: FeedbackStore, number: int, count: int) -> int:
        """Bring a round's store to so many pairs; return how many it has."""
        policy, seed = self.latest(number), self.seed("sample", number)
        return sample_pairs(store, policy, self.settings.prompts, count, self.sampling, seed)

    def label(self, number: int) -> dict[str, Any]:
        """Have them labelled."""
        with self.open_store(number) as store:
            selector = self.selector(number)
            if selector is not None:
                store.rank(selector)
            self.settings.labeller.label(store, self.settings.labels, partial(self._more, store, number, selector))
            found, wanted = store.labels(), self.settings.labels
            if found == 0:
                raise DataError(
                    "no-labels",
                    f"round {number} has no label: every pair was skipped or left unjudged; judge some, and run the "
                    "loop again",
                )
            if found < wanted:
                print(f"round {number} has {found} of {wanted} labels and goes on: there are no further pairs to judge")
            return labels_of(store)

    def _more(self, store: FeedbackStore, number: int, selector: Selector | None) -> bool:
        """Sample the pairs that labels are still wanted of, and some to spare."""
        with store.reading() as connection:
            held = counts(connection)["items"]
        wanted = self.settings.pairs_for(self.settings.labels - store.labels())
        print(f"loop: {wanted} further pairs, since {store.labels()} of {self.settings.labels} labels are there")
        found = self._sampled(store, number, held + wanted)
        if selector is not None:
            store.rank(selector)
        return found > held

    def selector(self, number: int) -> Selector | None:
        """What chooses a round's pairs; in the first one chance stands in where reward models are needed."""
        select = self.settings.select
        if select is None:
            return None
        if number == 0 and selector_class(select).members > 0:
            print(f"the first round is in random order: {select} asks the reward models of the round before")
            return load_selector("random", [], self.seed("select", number))
        models = self.reward_models(number - 1) if number > 0 else []
        return load_selector(select, models, self.seed("select", number))

    def labelled(self, number: int) -> list[str]:
        """The labels up to a round, as the source of a DataModule."""
        return [f"{self.store_path(k)}@{self.result(k, 'label')['snapshot']}" for k in range(number + 1)]

    def stage_flags(self, number: int, stage: str) -> dict[str, Any]:
        """What every stage of a round is given."""
        seed = self.seed(stage, number)
        return {"seed_everything": seed, "model.seed": seed, "data.seed": seed}

    def reward(self, member: int, number: int) -> dict[str, Any]:
        """Train a reward model on all labels so far."""
        stage, one = self.reward_stage(member), self.settings
        flags = {**self.stage_flags(number, stage), "model.init_from": one.init_from}
        flags["data.source"] = self.labelled(number)
        return train_stage(self.round_folder(number), stage, one.reward_config, flags)

    def policy(self, number: int) -> dict[str, Any]:
        """Train the policy, on all labels so far or against the reward models."""
        one = self.settings
        flags = {**self.stage_flags(number, "policy"), "model.init_from": self.start(number)}
        if self.on_policy:
            flags |= {"data.source": one.prompts, "model.scorer": ensemble_of(self.reward_models(number))}
        else:
            flags["data.source"] = self.labelled(number)
        return train_stage(self.round_folder(number), "policy", one.policy_config, flags)

    def evaluate_start(self) -> dict[str, Any]:
        """Evaluate the policy that everything starts from."""
        return self._evaluated(self.settings.init_from, self.folder / "start", self.judge())

    def evaluate(self, number: int) -> dict[str, Any]:
        """Evaluate a round's policy on held-out prompts, and beside the first one."""
        folder, judge = self.round_folder(number), self.judge(number)
        figures = self._evaluated(self.result(number, "policy")["model"], folder, judge)
        wins = win_rate(folder, self.folder / "start", judge, self.seed("evaluate"))
        return {**figures, **wins, "labels": sum(self.result(k, "label")["labels"] for k in range(number + 1))}

    def judge(self, number: int | None = None) -> Scorer | None:
        """What scores held-out completions of a round; None before there is anything."""
        if self.settings.scorer is not None:
            return load_scorer(self.settings.scorer)
        return None if number is None else load_scorer(ensemble_of(self.reward_models(number)))

    def _evaluated(self, policy: str, folder: Path, judge: Scorer | None) -> dict[str, Any]:
        one, seed = self.settings, self.seed("evaluate")
        return evaluate(policy, one.init_from, one.eval_prompts, self.sampling, seed, judge, self.gold_reward, folder)

    # ---- report ------------------------------------------------------------------------------------------------------

    def report(self, rounds: int) -> None:
        """Write the table, the picture and TensorBoard's scalars of the first rounds."""
        figures = [self.result(number, "evaluate") for number in range(rounds)]
        start = {**self.state.steps["start/evaluate"], "labels": 0}
        print(f"\n{write_report(self.folder, self.settings.name, [start, *figures])}\n\nreport: {self.folder / REPORT}")
