"""``rlhf loop``: settings, rounds with their steps, inputs and seeds, and resuming from the state file."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import docstring_parser
from filelock import FileLock, Timeout
from jsonargparse import ActionConfigFile

from rlhf_lightning.commands.flags import with_underscores
from rlhf_lightning.commands.generate import ONE_TURN, SamplingArguments
from rlhf_lightning.commands.parsing import PlainParser
from rlhf_lightning.errors import DataError, SettingError, StateError, check_range
from rlhf_lightning.people.handing_out import Policy
from rlhf_lightning.people.labeller import Labeller
from rlhf_lightning.people.loop_steps import (
    REPORT,
    LoopState,
    ensemble_of,
    evaluate,
    fingerprints,
    labels_of,
    learns_from_prompts,
    sample_pairs,
    train_stage,
    win_rate,
    write_report,
)
from rlhf_lightning.people.selectors import Selector, load_selector, selector_class
from rlhf_lightning.people.store import FeedbackStore, counts
from rlhf_lightning.quiet import silence_libraries
from rlhf_lightning.runs.run import checked_run_name
from rlhf_lightning.scoring import Scorer, load_scorer
from rlhf_lightning.scoring.scorer import load_gold_reward
from rlhf_lightning.types import Prompt


@dataclass(frozen=True, kw_only=True)
class LoopSettings(SamplingArguments):
    """Run rounds of sampling, labelling, training and evaluation; each round learns from all labels so far.

    Each round has a folder ``RUNS_FOLDER/NAME/round_<k>`` with its feedback store, its runs and its completions on
    held-out prompts. ``state.json`` records finished steps, so the same command resumes an interrupted loop. If too
    many pairs are skipped, more pairs are sampled; if the policy gives no more, the round uses the labels it has.

    Args:
        name: name of the loop and of its folder.
        init_from: initial policy: source of the first pairs, start of training, and reference of the KL.
        prompts: file of prompts, in any format that `rlhf generate` reads.
        eval_prompts: file of held-out prompts.
        reward_config: `rlhf fit` config of the reward model; start, data, seeds and folders are filled in.
        policy_config: `rlhf fit` config of the policy: any objective on preferences, or on-policy.
        labeller: the Labeller, by class_path and init_args.
        rounds: number of rounds; a higher number continues a finished loop.
        labels: number of labels of each round.
        pool: number of pairs sampled in each round; by default a quarter more than labels.
        select: order of the pairs, as in `rlhf annotate --select`, by the previous round's reward models; the first
            round has a random order. null keeps the order of sampling.
        members: number of reward models of each round, with different seeds; the policy is trained on their mean score.
        start: policy from which each round starts training: first (init_from) or latest (of the previous round).
        gold_reward: import path of a function (prompt, completion) -> known true reward, for evaluation only.
        scorer: scorer of held-out completions without a gold reward; by default the round's reward models.
        annotators_per_item: number of annotators for each pair.
        repeats: share of pairs shown again with sides swapped, to measure consistency.
        batch_size: completions decoded in one batch, or concurrent requests.
        runs_folder: folder of loops.
        seed: seed of sampling, sides, weights and data order.
    """

    name: str
    init_from: str
    prompts: str
    eval_prompts: str
    reward_config: str
    policy_config: str
    labeller: Labeller
    rounds: int = 3
    labels: int = 100
    pool: int | None = None
    select: str | None = None
    members: int = 1
    start: Literal["first", "latest"] = "first"
    gold_reward: str | None = None
    scorer: str | None = None
    annotators_per_item: int = 1
    repeats: float = 0.0
    batch_size: int = 64
    runs_folder: str = "runs/loop"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings()  # raises if a sampling setting is out of range
        for name in ("rounds", "labels", "members", "annotators_per_item"):
            check_range(getattr(self, name) >= 1, "it must be 1 or more", **{name: getattr(self, name)})
        check_range(
            self.pairs * self.annotators_per_item >= self.labels,
            f"it must be {-(-self.labels // self.annotators_per_item)} or more, because each pair takes "
            f"{self.annotators_per_item} of the {self.labels} labels",
            pool=self.pool,
        )

    @property
    def pairs(self) -> int:
        """Pairs sampled in each round."""
        return self.pairs_for(self.labels) if self.pool is None else self.pool

    def pairs_for(self, labels: int) -> int:
        """Return the number of pairs for so many labels: a quarter more, because some are skipped."""
        items = -(-labels // self.annotators_per_item)
        return items + -(-items // 4)


def seed_of(*values: Any) -> int:
    """Derive a seed from the values; similar values give unrelated seeds."""
    digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def run_loop(settings: LoopSettings, plain: dict[str, Any]) -> None:
    """Run or resume a loop.

    Raises:
        SettingError: the loop was started with other settings.
        StateError: another process runs the loop, or its labeller cannot start.
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
                f"select {settings.select} compares {wanted} reward models, but members is {settings.members}: "
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
                f"{one.pairs} are needed: give more prompts, or a higher temperature",
            )
        return {"pairs": pairs}

    def _sampled(self, store: FeedbackStore, number: int, count: int) -> int:
        policy, seed = self._latest(number), self._seed("sample", number)
        return sample_pairs(store, policy, self.settings.prompts, count, self.settings, seed)

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
                    f"round {number} has no label: every pair was skipped or not judged; judge some, and run the "
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
        print(f"loop: {wanted} further pairs; {store.labels()} of {self.settings.labels} labels are collected")
        found = self._sampled(store, number, held + wanted)
        if selector is not None:
            store.rank(selector)
        return found > held

    def _selector(self, number: int) -> Selector | None:
        select = self.settings.select
        if select is None:
            return None
        if number == 0 and selector_class(select).members > 0:
            print(f"the first round is in random order: {select} needs the reward models of an earlier round")
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
        return evaluate(policy, one.init_from, one.eval_prompts, one, seed, judge, self.gold_reward, folder)

    def _report(self, rounds: int) -> None:
        figures = [self._result(number, "evaluate") for number in range(rounds)]
        start = {**self.state.steps["start/evaluate"], "labels": 0}
        print(f"\n{write_report(self.folder, self.settings.name, [start, *figures])}\n\nreport: {self.folder / REPORT}")


def tool_parser() -> PlainParser:
    """Return the parser of `rlhf loop`."""
    doc = docstring_parser.parse(inspect.getdoc(LoopSettings) or "")
    description = "\n\n".join(filter(None, [doc.short_description, doc.long_description]))
    parser = PlainParser(prog="rlhf loop", description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of settings; flags override it")
    parser.add_class_arguments(LoopSettings, as_group=False, skip=set(ONE_TURN))
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf loop``."""
    parser = tool_parser()
    given = parser.parse_args(with_underscores(argv))
    made = parser.instantiate(given).as_dict()
    plain, made = ({name: value for name, value in one.items() if name != "config"} for one in (given.as_dict(), made))

    run_loop(LoopSettings(**made), plain)
    return 0
