"""Test the script of the effects pages: every arm is a valid config, and the pages show the runs' figures."""

import importlib.util
import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from rlhf_lightning import modules
from rlhf_lightning.evaluation.run_curves import FinishedRun

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "effects"


def script(name):
    spec = importlib.util.spec_from_file_location(f"effects_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run():
    return script("run")


@pytest.fixture
def arguments(tmp_path):
    world = tmp_path / "start" / "world"
    world.mkdir(parents=True)
    rows = [{"prompt": "p", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(1000)]
    (world / "pairs_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Namespace(start=tmp_path / "start", out=tmp_path / "out", rollouts=3, seeds=2)


def test_every_arm_is_a_valid_module(run, arguments):
    for effect in run.EFFECTS.values():
        shared = effect.config(arguments)["model"]
        for changes in effect.arms.values():
            given = dict(changes)
            kind = getattr(modules, given.pop("class_path", shared["class_path"]))
            kind(**{**shared["init_args"], **given})
        assert len(effect.arms) >= 3


def test_the_flipped_fraction_of_labels_is_as_configured(run, arguments):
    run.flipped_pairs(arguments)
    rows = [json.loads(line) for line in (arguments.out / "flipped.jsonl").read_text().splitlines()]
    flipped = sum(row["chosen"].startswith("r") for row in rows)
    assert len(rows) == 1000 and abs(flipped / 1000 - run.FLIPPED) < 0.05
    assert all(row["chosen"][1:] == row["rejected"][1:] for row in rows)


def test_the_score_of_right_answers_ignores_their_length():
    answered = script("scores").answered
    prompt = [{"role": "user", "content": "How do I start with chess?"}]
    nothing, long = answered([prompt] * 2, ["", "chess " * 30])
    assert nothing.score == 0 and nothing.parts == {"wrong_words": 0.0} and long.parts == {"wrong_words": 30.0}


def test_a_page_has_means_intervals_and_paired_tests(run, arguments, tmp_path, monkeypatch):
    def finished(arm, seed, value):
        folder = tmp_path / arm / str(seed)
        folder.mkdir(parents=True)
        (folder / "gold.json").write_text(json.dumps({"gold": 0.5 + 0.1 * seed}))
        curve = (np.array([1.0, 2.0]), np.array([0.0, value]))
        return FinishedRun(folder, {}, seed, "finished", {"val/chosen_reward": curve}, [])

    monkeypatch.setattr(run, "HERE", tmp_path)
    arms = {"DPO": [finished("a", n, -1.0 - n) for n in range(3)], "RPO": [finished("b", n, -n) for n in range(3)]}
    page = run.page("chosen_logprob", arms, arguments)
    assert "| DPO" in page and "-20.000 [" in page and "-10.000 [" in page  # in nats: divided by beta
    assert re.search(r"\| 10.000 +\| \[10.000, 10.000\]", page) and (tmp_path / "chosen_logprob.svg").is_file()
    assert run.final(arms["DPO"][0], "val/chosen_reward") == -1.0
