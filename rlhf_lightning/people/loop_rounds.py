"""Rounds of a loop: their steps, inputs and seeds, and the state file that resumes them."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import docstring_parser
from filelock import FileLock, Timeout
from jsonargparse import ActionConfigFile

from rlhf_lightning.atomic_files import write_text
from rlhf_lightning.commands.flags import with_underscores
from rlhf_lightning.commands.parsing import PlainParser
from rlhf_lightning.commands.quiet import silence_libraries
from rlhf_lightning.errors import DataError, MissingError, SettingError, StateError
from rlhf_lightning.loading import read_yaml
from rlhf_lightning.people.handing_out import Policy
from rlhf_lightning.people.loop import LoopSettings
from rlhf_lightning.people.loop_steps import (
    REPORT,
    ensemble_of,
    evaluate,
    labels_of,
    learns_from_prompts,
    sample_pairs,
    train_stage,
    win_rate,
    write_report,
)
from rlhf_lightning.people.selectors import Selector, load_selector, selector_class
from rlhf_lightning.people.store import FeedbackStore, counts
from rlhf_lightning.recipes import resolve_recipe
from rlhf_lightning.runs.run import checked_run_name
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.scoring import Scorer, load_scorer
from rlhf_lightning.scoring.scorer import load_gold_reward
from rlhf_lightning.types import Prompt

STATE_FILE = "state.json"
FILES = ("prompts", "eval_prompts", "reward_config", "policy_config")
"""Settings that name a file whose content a loop depends on."""

MAY_CHANGE = ("rounds",)
"""Settings that may change when a loop is resumed."""


class LoopState:
    """Finished steps of a loop, by name, with their results.

    Raises:
        SettingError: the loop in the folder was started with other settings or other content of a file.
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
                f"{self.path} does not hold the steps, settings and files of a loop: restore it from a copy, or give "
                "another --name",
            )
        self.steps = parts[0]
        return parts[1], parts[2]

    def step(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a step's result; run it unless it is finished. Steps may be killed anywhere and run again."""
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
    """Hash the content of each file of `FILES`; for YAML the values without comments."""
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


def seed_of(*values: Any) -> int:
    """Derive a seed from the values; nearby values give unrelated seeds."""
    digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def run_loop(settings: LoopSettings, plain: dict[str, Any]) -> None:
    """Run or resume a loop.

    Raises:
        SettingError: the loop was started with other settings.
        StateError: another process runs it, or its labeller cannot start.
    """
    silence_libraries()
    folder = Path(settings.runs_folder) / checked_run_name(settings.name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "loop.lock", blocking=False):
            Loop(settings, folder, LoopState(folder, plain, fingerprints(plain))).run()
    except Timeout:
        raise StateError(
            "loop-locked", f"another process runs the loop in {folder}; wait for it to finish, or give another --name"
        ) from None


class Loop:
    """A loop in its folder."""

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

    def run(self) -> None:
        """Run the steps that are not finished."""
        if any(f"round_{number}/label" not in self.state.steps for number in range(self.settings.rounds)):
            self.settings.labeller.prepare()
        self.state.step("start/evaluate", self._evaluate_start)
        for number in range(self.settings.rounds):
            steps: dict[str, Callable[[int], dict[str, Any]]] = {"sample": self._sample, "label": self._label}
            steps |= {self._reward_stage(m): partial(self._reward, m) for m in range(self.settings.members)}
            steps |= {"policy": self._policy, "evaluate": self._evaluate}
            for name, work in steps.items():
                self.state.step(f"round_{number}/{name}", partial(work, number))
            self._report(number + 1)

    def _result(self, number: int, name: str) -> dict[str, Any]:
        return dict(self.state.steps[f"round_{number}/{name}"])

    def _round_folder(self, number: int) -> Path:
        return self.folder / f"round_{number}"

    def _reward_stage(self, member: int) -> str:
        return "reward" if self.settings.members == 1 else f"reward_{member}"

    def _reward_models(self, number: int) -> list[str]:
        return [self._result(number, self._reward_stage(m))["model"] for m in range(self.settings.members)]

    def _latest(self, number: int) -> str:
        return self.settings.init_from if number == 0 else str(self._result(number - 1, "policy")["model"])

    def _start(self, number: int) -> str:
        return self.settings.init_from if self.settings.start == "first" else self._latest(number)

    def _seed(self, *values: Any) -> int:
        return seed_of(self.settings.seed, *values)

    @property
    def _sampling(self) -> SamplingSettings:
        one = self.settings
        return SamplingSettings(one.max_new_tokens, one.temperature, batch_size=one.batch_size)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _open_store(self, number: int) -> FeedbackStore:
        one = self.settings
        seed, labeller = self._seed("page", number), one.labeller
        policy = Policy(one.annotators_per_item, one.repeats, lease=labeller.lease, seed=seed, salt=labeller.salt)
        return FeedbackStore(self._store_path(number), policy)

    def _store_path(self, number: int) -> Path:
        return self._round_folder(number) / "feedback.db"

    def _sample(self, number: int) -> dict[str, Any]:
        one = self.settings
        with self._open_store(number) as store:
            pairs = self._sampled(store, number, one.pairs)
        if pairs < one.pairs:
            raise DataError(
                "too-few-pairs",
                f"{self._latest(number)} gave {pairs} pairs of different answers to the prompts of {one.prompts}, and "
                f"{one.pairs} are wanted: give more prompts, or a higher temperature",
            )
        return {"pairs": pairs}

    def _sampled(self, store: FeedbackStore, number: int, count: int) -> int:
        policy, seed = self._latest(number), self._seed("sample", number)
        return sample_pairs(store, policy, self.settings.prompts, count, self._sampling, seed)

    def _label(self, number: int) -> dict[str, Any]:
        with self._open_store(number) as store:
            selector = self._selector(number)
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
                print(
                    f"round {number} has {found} of {wanted} labels and continues: there are no further pairs to judge"
                )
            return labels_of(store)

    def _more(self, store: FeedbackStore, number: int, selector: Selector | None) -> bool:
        """Sample further pairs for the missing labels; return whether there are any."""
        with store.reading() as connection:
            held = counts(connection)["items"]
        wanted = self.settings.pairs_for(self.settings.labels - store.labels())
        print(f"loop: {wanted} further pairs, since {store.labels()} of {self.settings.labels} labels are there")
        found = self._sampled(store, number, held + wanted)
        if selector is not None:
            store.rank(selector)
        return found > held

    def _selector(self, number: int) -> Selector | None:
        select = self.settings.select
        if select is None:
            return None
        if number == 0 and selector_class(select).members > 0:
            print(f"the first round is in random order: {select} asks the reward models of the round before")
            return load_selector("random", [], self._seed("select", number))
        models = self._reward_models(number - 1) if number > 0 else []
        return load_selector(select, models, self._seed("select", number))

    def _labelled(self, number: int) -> list[str]:
        return [f"{self._store_path(k)}@{self._result(k, 'label')['snapshot']}" for k in range(number + 1)]

    def _stage_flags(self, number: int, stage: str) -> dict[str, Any]:
        seed = self._seed(stage, number)
        return {"seed_everything": seed, "model.seed": seed, "data.seed": seed}

    def _reward(self, member: int, number: int) -> dict[str, Any]:
        stage, one = self._reward_stage(member), self.settings
        flags = {**self._stage_flags(number, stage), "model.init_from": one.init_from}
        flags["data.source"] = self._labelled(number)
        return train_stage(self._round_folder(number), stage, one.reward_config, flags)

    def _policy(self, number: int) -> dict[str, Any]:
        one = self.settings
        flags = {**self._stage_flags(number, "policy"), "model.init_from": self._start(number)}
        if self.on_policy:
            flags |= {"data.source": one.prompts, "model.scorer": ensemble_of(self._reward_models(number))}
        else:
            flags["data.source"] = self._labelled(number)
        return train_stage(self._round_folder(number), "policy", one.policy_config, flags)

    def _evaluate_start(self) -> dict[str, Any]:
        return self._evaluated(self.settings.init_from, self.folder / "start", self._judge())

    def _evaluate(self, number: int) -> dict[str, Any]:
        folder, judge = self._round_folder(number), self._judge(number)
        figures = self._evaluated(self._result(number, "policy")["model"], folder, judge)
        wins = win_rate(folder, self.folder / "start", judge, self._seed("evaluate"))
        return {**figures, **wins, "labels": sum(self._result(k, "label")["labels"] for k in range(number + 1))}

    def _judge(self, number: int | None = None) -> Scorer | None:
        if self.settings.scorer is not None:
            return load_scorer(self.settings.scorer)
        return None if number is None else load_scorer(ensemble_of(self._reward_models(number)))

    def _evaluated(self, policy: str, folder: Path, judge: Scorer | None) -> dict[str, Any]:
        one, seed = self.settings, self._seed("evaluate")
        return evaluate(policy, one.init_from, one.eval_prompts, self._sampling, seed, judge, self.gold_reward, folder)

    def _report(self, rounds: int) -> None:
        figures = [self._result(number, "evaluate") for number in range(rounds)]
        start = {**self.state.steps["start/evaluate"], "labels": 0}
        print(f"\n{write_report(self.folder, self.settings.name, [start, *figures])}\n\nreport: {self.folder / REPORT}")


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf loop``."""
    doc = docstring_parser.parse(inspect.getdoc(LoopSettings) or "")
    description = "\n\n".join(filter(None, [doc.short_description, doc.long_description]))
    parser = PlainParser(prog="rlhf loop", description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of the settings; flags win over it")
    parser.add_class_arguments(LoopSettings, as_group=False)
    given = parser.parse_args(with_underscores(argv))
    made = parser.instantiate(given).as_dict()
    plain, made = ({name: value for name, value in one.items() if name != "config"} for one in (given.as_dict(), made))

    run_loop(LoopSettings(**made), plain)
    return 0
