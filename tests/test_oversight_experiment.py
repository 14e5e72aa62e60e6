"""Test the script of the oversight page: its configs are valid and its metrics are right."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlhf_lightning.evaluation.run_curves import FinishedRun
from rlhf_lightning.loading import load
from rlhf_lightning.scoring import Scorer, load_scorer
from rlhf_lightning.scoring.monitor import Monitor
from rlhf_lightning.worlds.loopholes import write_loopholes

FILE = Path(__file__).resolve().parents[1] / "experiments" / "oversight" / "run.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("oversight_run", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(**values):
    scalars = {tag: (np.arange(len(many)), np.array(many)) for tag, many in values.items()}
    return FinishedRun(Path("."), {}, 0, "finished", scalars, [])


def test_every_arm_has_a_monitor_that_loads(script, tmp_path):
    arguments = Namespace(loophole="phrase", share=0.0, instructed=0.02, init_from="x", out=str(tmp_path), rollouts=3)
    write_loopholes(script.world(arguments), demonstrations=10)
    for arm, setting in script.ARMS.items():
        written = yaml.safe_load(yaml.safe_dump(script.config(arguments, arm)))
        scorer = load_scorer(written["model"]["init_args"]["scorer"])
        assert isinstance(load(scorer, Scorer, {}, "scorer"), Monitor) and scorer.action == setting["action"]


def test_onset_is_the_first_of_two_consecutive_rollouts(script):
    assert script.onset(run_of(**{script.HACK: [0.0, 0.03, 0.0, 0.02, 0.5, 0.9]})) == 4
    assert np.isnan(script.onset(run_of(**{script.HACK: [0.0, 0.03, 0.0]})))
    assert script.last_tenth(run_of(a=list(range(20))), "a") == 18.5
    assert (
        script.shown([1.0, 3.0, float("nan")]) == "2 [-10.7, 14.7], 2 of 3" and script.shown([float("nan")]) == "none"
    )


def test_a_monitor_is_measured_in_the_rollouts_that_log_it(script):
    run = run_of(**{script.HACK: [0.0, 0.5, 1.0, 0.5]})
    run.scalars["rollout/monitor_auroc"] = np.array([1, 3]), np.array([0.8, 0.4])
    assert script.measured(run, "rollout/monitor_auroc") == pytest.approx(0.6)
    assert script.measured(run, "rollout/monitor_auroc", (0.75, 1.0)) == pytest.approx(0.4)
    assert np.isnan(script.measured(run, "rollout/monitor_auroc", (0.5, 0.75)))
    assert np.isnan(script.measured(run, "rollout/monitor_recall"))
