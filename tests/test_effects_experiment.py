"""Test the scripts of the effects pages: every arm is a valid config, measures are right, and shortened runs end."""

import importlib.util
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from rlhf_lightning import modules
from rlhf_lightning.commands import train
from rlhf_lightning.commands.sweep import Sweep, fit_command
from rlhf_lightning.evaluation.report import MARK
from rlhf_lightning.evaluation.run_curves import FinishedRun
from rlhf_lightning.worlds.assistant import write_world

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "effects"
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))

import arms  # noqa: E402
import losses  # noqa: E402
import pages  # noqa: E402
import rewards  # noqa: E402

EFFECTS = {**losses.EFFECTS, **rewards.EFFECTS}


def script(name):
    spec = importlib.util.spec_from_file_location(f"effects_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path):
    world = tmp_path / "start" / "world"
    world.mkdir(parents=True)
    rows = [{"prompt": "p", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(1000)]
    (world / "pairs_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Namespace(start=str(tmp_path / "start"), out=str(tmp_path / "out"), pages=str(tmp_path), seeds=2, scale=1.0)


def finished(folder, seed, scalars=None, **held_out):
    folder = folder / str(seed)
    folder.mkdir(parents=True)
    (folder / "model.held_out.json").write_text(json.dumps(held_out))
    curves = {tag: (np.arange(1.0, 1 + len(values)), np.array(values)) for tag, values in (scalars or {}).items()}
    return FinishedRun(folder, {}, seed, "finished", curves, [])


def test_every_arm_is_a_valid_module(arguments):
    for effect in EFFECTS.values():
        configs = effect.configs(arguments)
        for config in configs.values():
            getattr(modules, config["model"]["class_path"])(**config["model"]["init_args"])
        assert len(configs) >= 3


def test_the_flipped_fraction_of_labels_is_as_configured(arguments):
    losses.flipped_pairs(arguments)
    rows = [json.loads(line) for line in (Path(arguments.out) / "flipped.jsonl").read_text().splitlines()]
    flipped = sum(row["chosen"].startswith("r") for row in rows)
    assert len(rows) == 1000 and abs(flipped / 1000 - losses.FLIPPED) < 0.05
    assert all(row["chosen"][1:] == row["rejected"][1:] for row in rows)


def test_the_score_of_right_answers_ignores_their_length():
    answered = script("scores").answered
    prompt = [{"role": "user", "content": "How do I start with chess?"}]
    nothing, long = answered([prompt] * 2, ["", "chess " * 30])
    assert nothing.score == 0 and nothing.parts == {"wrong_words": 0.0} and long.parts == {"wrong_words": 30.0}


def test_a_page_has_means_intervals_and_paired_tests_and_keeps_what_is_written_by_hand(arguments, tmp_path):
    def run(arm, seed, value):
        return finished(tmp_path / arm, seed, {"val/chosen_reward": [0.0, value]}, **{arms.GOLD_REWARD: 0.5})

    found = {"DPO": [run("a", n, -1.0 - n) for n in range(3)], "RPO": [run("b", n, -n) for n in range(3)]}
    effect = EFFECTS["chosen_logprob"]
    path = pages.write_page("chosen_logprob", effect, found, arguments)
    path.write_text(path.read_text() + "\nRead by hand.\n")
    page = pages.write_page("chosen_logprob", effect, found, arguments).read_text()
    assert "| DPO" in page and "-20.000 [" in page and "-10.000 [" in page  # in nats: divided by beta
    assert re.search(r"\| 10.000 +\| \[10.000, 10.000\]", page) and (tmp_path / "chosen_logprob.svg").is_file()
    assert page.count(MARK) == 1 and page.endswith(f"{MARK}\nRead by hand.\n")
    assert arms.final(found["DPO"][0], "val/chosen_reward") == -1.0


def test_weak_labels_follow_the_weak_reward_model_alone():
    rows = [{"prompt": "p", "chosen": [{"content": a}], "rejected": [{"content": b}]} for a, b in ("xy", "yx", "zz")]
    found = rewards.relabelled(rows, lambda prompts, completions: [float(said == "y") for said in completions])
    assert ["".join(row[side][0]["content"] for side in ("chosen", "rejected")) for row in found] == ["yx", "yx", "zz"]


def test_the_gap_recovered_is_a_share_of_the_same_seeds_gap():
    arms_of = {rewards.FLOOR: {0: 0.5, 1: 0.6}, rewards.WEAK: {0: 0.6, 1: 0.65}, rewards.CEILING: {0: 0.9, 1: 0.8}}
    none = {**arms_of, rewards.FLOOR: {0: 0.9, 1: 0.6}}
    told = rewards.gap_recovered({"gold": arms_of, "accuracy": none})
    assert "0.25 [0.25, 0.25] by gold" in told and "undefined by accuracy" in told


def test_the_members_of_an_ensemble_are_the_next_seeds(arguments, monkeypatch):
    def reward_model(kind, seed, arguments):
        return FinishedRun(Path(str(seed)), {}, seed, "finished", {}, [])

    monkeypatch.setattr(rewards, "reward_model", reward_model)
    arguments.seeds = 5
    given = {arm: json.loads(rewards.ensemble(arm, 4, arguments)["model.scorer"]) for arm in rewards.ENSEMBLES}
    proxies = [spec["init_args"]["scorers"]["proxy"] for spec in given.values()]
    assert proxies[0] == "4/model" and [spec["init_args"]["penalty"] for spec in proxies[1:]] == [0.0, 1.0]
    assert proxies[1]["init_args"]["scorers"] == ["4/model", "0/model", "1/model"]


def test_the_frontier_is_read_at_a_fixed_kl(arguments, monkeypatch, tmp_path):
    run = finished(tmp_path / "run", 0, **{arms.GOLD_REWARD: 0.6, arms.KL: 4.0})
    curve = arms.Curve(np.arange(3), np.array([0.0, 1.0, 3.0]), np.array([0.4, 0.8, 0.6]))
    monkeypatch.setattr(rewards, "from_start", lambda run, arguments: curve)
    found = rewards.on_frontier("DPO", run, arguments)
    assert found == pytest.approx({"gold at 2 nats": 0.7, "highest gold": 0.8, arms.GOLD_REWARD: 0.6, arms.KL: 4.0})
    monkeypatch.setattr(rewards, "AT_KL", 3.5)
    assert np.isnan(rewards.on_frontier("DPO", run, arguments)["gold at 3.5 nats"])


class InProcess(Sweep):
    """A sweep that trains in the test process, which has imported everything."""

    def run(self):
        for run in self.runs:
            command = fit_command(self.folder, self.config, self.fixed, run)
            if command is not None:
                train.run(command[3:])
        return 0


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    write_world(folder / "world", demonstrations=100, pairs_train=400, pairs_test=40)
    data = ["--data.source", folder / "world" / "demonstrations.jsonl", "--data.eval_rows", 16]
    flags = ["--model.init_from", folder / "world" / "model", "--runs_folder", folder, "--run_name", "sft", *data]
    train.run(["fit", "--config", "recipe:assistant/sft", *map(str, flags)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFECTS)
def test_a_shortened_run_writes_its_page_and_runs_nothing_twice(name, quickstart, tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "Sweep", InProcess)
    argv = [name, "--start", quickstart, "--out", tmp_path, "--pages", tmp_path, "--seeds", 2, "--scale", 0.001]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, argv)])
    script("run").main()
    page = (tmp_path / f"{name}.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| .+ \| 2 +\|", line)]
    assert len(rows) == 3
    monkeypatch.setattr(InProcess, "run", lambda self: pytest.fail("a finished run was trained again"))
    script("run").main()
    assert (tmp_path / f"{name}.md").read_text() == page
