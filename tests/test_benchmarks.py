"""Test the counting, comparison and storage of the speed and memory benchmarks."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_models import save_policy

from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import AdapterScalar, load_policy
from rlhf_lightning.scoring import LearnedScorer
from rlhf_lightning.types import Sequences

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments" / "benchmarks"))
import bench as own_bench
import compare
import folders
import operations
import results
import scaling
from cases import CASES, LIMIT, PEER, SUITES, Case, Goal

CASE = Case(
    "dpo",
    (
        Goal("first", steps=slice(1, 3), speed=2.0, share=0.5, memory=0.5),
        Goal("later", steps=slice(3, None), speed=4.0),
    ),
    ("--steps", "5"),
    {"ours": ()},
    (),
    same_losses=(1e-3, 1e-2),
)


def record(seconds, tokens=(), loss=(0.5,) * 5, peak=1.0, **more):
    return {"seconds": list(seconds), "tokens": list(tokens), "loss": list(loss), "peak_rss_gb": peak, **more}


RUNS = {
    "ours": [record([9, 1, 1, 0.5, 0.5], [10, 30, 70, 90, 130])],
    PEER: [record([9, 4, 4, 4, 4], peak=4.0)],  # the peer does not report its tokens; it read the same rows
    LIMIT: [record([9, 0.5, 0.5, 0.5, 0.5], [10, 30, 70, 90, 130], shared_prompt=True)],
}


def test_speeds_are_computed_over_the_steps_of_a_goal():
    first, later = (results.findings(CASE, goal, RUNS) for goal in CASE.goals)
    assert first["ours"].value == pytest.approx(60 / 2)  # 20 and 40 tokens in two seconds
    assert first["peer"].value == pytest.approx(60 / 8)
    assert first["speed"].value == pytest.approx(4.0)
    assert later["speed"].value == pytest.approx(8.0)
    # all steps of the limit after warm-up: 120 tokens in two seconds
    assert first["share"].value == pytest.approx(30 / 60)
    assert later["share"].value is None
    assert first["memory"].value == pytest.approx(0.25)


def test_results_say_whether_a_goal_is_met():
    assert "(>= 2: met)" in results.Finding(2.0, 2.0).written()
    assert "(>= 2: NOT met)" in results.Finding(1.99, 2.0).written()
    assert "(<= 0.5: met)" in results.Finding(0.5, 0.5, at_most=True).written()
    assert "(<= 0.5: NOT met)" in results.Finding(0.51, 0.5, at_most=True).written()
    assert results.Finding(None, 2.0).written() == "missing"
    assert results.Finding(None).written() == ""


def test_one_slow_run_does_not_change_the_median():
    slow = record([9, 100, 100, 100, 100], [10, 30, 70, 90, 130])
    runs = {**RUNS, "ours": [RUNS["ours"][0], slow, RUNS["ours"][0]]}
    assert results.findings(CASE, CASE.goals[0], runs) == results.findings(CASE, CASE.goals[0], RUNS)


def test_rollouts_are_counted_in_episodes():
    case = CASE._replace(same_losses=None, stage="ppo")
    own = record([9, 2, 2], [5, 6, 7], batch=8)
    assert results.speed(case, [own], slice(1, None), [own]) == pytest.approx(16 / 4)


@pytest.mark.parametrize(
    ("peers", "agree"),
    [
        ([0.5, 0.5, 0.5, 0.5, 0.5], True),
        ([0.5009, 0.509, 0.5, 0.5, 0.5], True),
        ([0.502, 0.5, 0.5, 0.5, 0.5], False),
        ([0.5, 0.52, 0.5, 0.5, 0.5], False),
        ([0.5, 0.5], False),
        ([0.5, float("nan"), 0.5, 0.5, 0.5], False),
    ],
)
def test_losses_must_agree_in_every_update(peers, agree):
    runs = {**RUNS, PEER: [record([9, 4, 4, 4, 4], loss=peers)]}
    assert results.losses_agree(CASE, runs) is agree


def test_losses_of_sampling_stages_are_not_compared():
    assert results.losses_agree(CASE._replace(same_losses=None), RUNS) is None
    assert results.losses_agree(CASE, {"ours": RUNS["ours"]}) is None


def test_the_page_lists_missing_runs():
    suite = SUITES["cpu"]._replace(cases={"one": CASE, "other": CASE})
    written = results.page(suite, {"one": {k: v for k, v in RUNS.items() if k != PEER}}, 1, ["- here"], {})
    assert "- one: peer (0 of 1)" in written
    assert "- other: ours (0 of 1), peer (0 of 1), limit (0 of 1)" in written
    assert "| one, first | 30.0 |  | missing |" in written


@pytest.mark.parametrize(("device", "name"), [(device, name) for device in SUITES for name in SUITES[device].cases])
def test_goals_use_sides_and_steps_of_their_case(device, name):
    case = SUITES[device].cases[name]
    steps = int(dict(zip(case.flags, case.flags[1:], strict=False))["--steps"])
    for goal in case.goals:
        assert goal.side in case.ours
        assert goal.memory_of in case.sides
        assert goal.share is None or case.limit is not None
        assert len(range(steps)[goal.steps]) >= 2  # medians are taken over the steps of three runs
    assert {goal.side for goal in case.goals} == set(case.ours)


# -- running ----------------------------------------------------------------------------------------------------------

STAGE = "import json\nprint('some words')\nprint('PEER ' + json.dumps({}))\n"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Return a comparison of two sides, each a one-line script."""
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    for name, seconds in (("peer", [3, 2]), ("limit", [2, 1])):
        figures = record(seconds, [1, 2], [0.5, 0.4])
        (tmp_path / f"{name}.py").write_text(STAGE.format(repr(figures)))
    case = Case("sft", (Goal(""),), ("--steps", "2", "--batch", "4"), {}, (), same_losses=(1e-3, 1e-3))
    monkeypatch.setitem(SUITES, "cpu", SUITES["cpu"]._replace(cases={"one": case}))
    monkeypatch.setattr(compare.Bench, "versions", lambda self, python: {"peer": "1"})
    args = argparse.Namespace(
        model=tmp_path, data=data, conversations=None, peer_python=Path(sys.executable), ppo_python=None,
        repeats=2, time_limit=60, device="cpu",
        peer_script=tmp_path / "peer.py", limit_script=tmp_path / "limit.py", threads=1, runs=tmp_path / "runs",
        out=tmp_path / "results.md",
    )  # fmt: skip
    return compare.Bench(args)


def sides_run(bench):
    return [json.loads(line)["side"] for line in (bench.folder / "one.jsonl").read_text().splitlines()]


def test_sides_alternate_and_finished_ones_are_not_rerun(bench):
    bench.run("one")
    assert sides_run(bench) == [PEER, LIMIT, PEER, LIMIT]
    bench.run("one")
    assert len(sides_run(bench)) == 4
    bench.args.repeats = 3
    bench.run("one")
    assert sides_run(bench)[4:] == [PEER, LIMIT]
    assert [len(records) for records in bench.kept("one").values()] == [3, 3]


def test_a_side_with_changed_code_is_rerun(bench):
    bench.run("one")
    bench.args.limit_script.write_text(STAGE.format(repr(record([5, 5]))))
    assert list(bench.kept("one")) == [PEER]
    bench.run("one")
    assert sides_run(bench)[4:] == [LIMIT, LIMIT]


def test_a_failed_side_is_reported_and_retried(bench, capsys):
    script = bench.args.limit_script
    good = script.read_text()
    script.write_text("raise SystemExit('no memory')")
    bench.run("one")
    assert "exit status 1" in capsys.readouterr().out
    assert "no memory" in (bench.folder / "one_limit.failed.log").read_text()
    assert list(bench.kept("one")) == [PEER]
    script.write_text(good)
    bench.run("one")
    assert [len(records) for records in bench.kept("one").values()] == [2, 2]


def test_a_run_over_the_time_limit_is_stopped(bench):
    bench.args.time_limit = 1
    bench.args.limit_script.write_text("import time\nprint('begun', flush=True)\ntime.sleep(30)\n")
    output, failure = bench.output_of(bench.command("one", LIMIT))
    assert "longer than 1 s" in failure
    assert "begun" in output


def test_the_launcher_process_does_not_import_torch():
    """A child process inherits the peak resident memory of its parent, which would be counted as its own."""
    program = "import sys, compare; print(sorted({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=compare.HERE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_each_script_gets_only_its_own_flags(bench, tmp_path, monkeypatch):
    bench.cases = CASES
    monkeypatch.setattr(compare, "written", lambda kind, place, *_: place)
    limit = " ".join(bench.command("dpo_lora", LIMIT))
    assert limit.endswith("--batch 4 --max-length 512 --steps 10 --lora --shared-prompt")
    assert "--in-order" in bench.command("dpo_lora", PEER)
    assert "--in-order" not in bench.command("ppo_full", PEER)
    quantised = " ".join(bench.command("ppo_lora", "nf4"))
    assert "--quantization nf4" in quantised and quantised.endswith("reward_adapter_base_nf4")
    assert "scored" in " ".join(bench.command("reward_full", "ours"))
    assert "scored" not in " ".join(bench.command("reward_full", LIMIT))


# -- our side ---------------------------------------------------------------------------------------------------------


def test_a_fresh_reward_adapter_shares_the_policys_backbone(tmp_path):
    """It scores like the full reward model, because an untrained adapter changes nothing."""
    source = save_policy(tmp_path / "policy")
    folders.reward(tmp_path / "whole", Path(source))
    folders.reward(tmp_path / "adapter", Path(source), adapter=True)
    policy = load_policy(source, lora=LoraSettings(r=4))
    scorers = [LearnedScorer(str(tmp_path / kind)) for kind in ("whole", "adapter")]
    for scorer in scorers:
        scorer.load_beside(policy, LoadSettings())
    assert isinstance(scorers[1].model, AdapterScalar) and not isinstance(scorers[0].model, AdapterScalar)
    words = Sequences((torch.tensor([6, 7]),), (torch.tensor([8, 9, 10]),), (0,), (torch.ones(3, dtype=torch.bool),))
    whole, adapter = (scorer.score_sequences(words) for scorer in scorers)
    torch.testing.assert_close(adapter, whole)


def test_a_stage_prints_metrics_of_each_rollout(tmp_path):
    """PPO with all roles on one backbone, through the users' command."""
    small = folders.written("small", tmp_path / "small")
    weights = safetensors.torch.load_file(small / "model.safetensors")
    assert 0.9e6 < sum(weight.numel() for weight in weights.values()) < 1.1e6
    command = f"stage.py ppo --model {small} --data {small / 'prompts.jsonl'} --rows 16 --batch 4 --completion 5"
    command += " --steps 2 --epochs 1 --lora --critic shared --set model.fused_optimizer=false"
    path = os.pathsep.join([str(compare.HERE), str(compare.ROOT)])
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=compare.HERE, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    found = compare.record_of(done.stdout)
    assert found is not None, done.stderr[-2000:]
    assert len(found["seconds"]) == len(found["loss"]) == len(found["score"]) == 2
    assert 4 <= found["tokens"][0] <= 20 and 0 < found["tokens"][1] - found["tokens"][0] <= 20
    assert found["peak_rss_gb"] > 0.1


# -- how cost grows ---------------------------------------------------------------------------------------------------


def test_scaling_points_have_the_tokens_of_their_axis():
    points = scaling.SWEEPS["length"].points
    assert [point.tokens for point in points.values()] == [4 * length for length in points]
    spreads = [point.tokens for point in scaling.SWEEPS["spread"].points.values()]
    assert max(spreads) - min(spreads) <= 8  # the same work with a different spread
    assert scaling.spread(0.5, 3, 100) == (50, 100, 150)


def test_a_group_is_packed_as_one_tree():
    step = scaling.update(scaling.Point(8, (3, 4, 5, 6), group=2))
    sequences = step.micro_batches[0].sequences
    assert len(step.micro_batches) == 1 and step.tokens == 18
    assert [len(prompt) for prompt in sequences.prompts] == [8, 8] and sorted(sequences.parents) == [0, 0, 1, 1]
    rows = scaling.update(scaling.Point(4, (4,) * 8, max_tokens=16))
    assert [len(part.sequences.completions) for part in rows.micro_batches] == [2, 2, 2, 2]


def test_a_scaling_point_measures_seconds_and_memory():
    found = scaling.measured(scaling.Point(4, (3, 4), vocabulary=300))
    assert found["seconds"] > 0 and found["resident"] > 50


def test_growth_is_the_exponent_of_the_last_points():
    assert scaling.growth([1, 2, 4, 8, 16], [9, 9, 1, 2, 4]) == "1.00"
    assert scaling.growth([1, 2, 4], [5, 5, 5]) == "0.00"
    assert scaling.growth([1, 2, 4], [5, 0, 5]) == ""


# -- work per layer ---------------------------------------------------------------------------------------------------

RECORDED = json.loads((compare.HERE / "operations.json").read_text())


@pytest.fixture(scope="module")
def two_and_three_layers(tmp_path_factory):
    return operations.written_models(tmp_path_factory.mktemp("layers"))


@pytest.mark.parametrize("case", operations.CASES)
def test_operation_counts_do_not_increase(case, two_and_three_layers):
    """Allow at most 2 % more than in operations.json, relative to transformers and peft."""
    if case.startswith("qlora"):
        pytest.importorskip("bitsandbytes")
    found = operations.ratios(operations.measured(case, two_and_three_layers))
    before = RECORDED["cases"][case]["ratio"]
    more = {name: (ratio, before[name]) for name, ratio in found.items() if ratio > 1.02 * before[name]}
    assert not more, f"now and before: {more}; python experiments/benchmarks/operations.py writes the file again"


# -- our own speed over time ------------------------------------------------------------------------------------------


def test_intervals_contain_the_ratio_and_widen_with_variance():
    ratio, low, high = own_bench.interval([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    assert ratio == low == high == pytest.approx(2)
    ratio, low, high = own_bench.interval([1.0, 1.1, 0.9], [2.0, 2.2, 1.8])
    assert 1.5 < low < ratio < high < 2.7
    assert own_bench.interval([1.0], [2.0])[1:] == (0.0, float("inf"))
    assert own_bench.student(10) == pytest.approx(2.228, rel=0.01)
    assert own_bench.student(3) == pytest.approx(3.182, rel=0.01)


def test_changed_timings_are_marked():
    def records(seconds):
        return [{"case": "help", "runs": [{"seconds": one, "load": 1.0} for one in seconds]}]

    (changed,) = own_bench.compared(records([1.0, 1.01, 0.99]), records([2.0, 2.01, 1.99]))[2:]
    assert "changed" in changed and "| 2.00 |" in changed
    (same,) = own_bench.compared(records([1.0, 1.2, 0.8]), records([1.1, 0.9, 1.0]))[2:]
    assert "changed" not in same


# -- start-up ---------------------------------------------------------------------------------------------------------


def modules_of(program, *names):
    """Return which of the named modules a fresh interpreter has imported after running a program."""
    shown = f"import sys; {program}; print('LOADED', *[name for name in {names} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(compare.ROOT)}
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True, env=environment)
    return set(done.stdout.rpartition("LOADED")[2].split())


HEAVY = ("torch", "transformers", "lightning", "peft", "numpy", "datasets", "jsonargparse", "scipy", "rich")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["fit", "--help"], ["fit", "--model", "SFTModule", "--model.lerning_rate", "1"]]
)
def test_help_and_flag_errors_import_no_heavy_packages(arguments):
    assert not modules_of(f"from rlhf_lightning.cli import main; main({arguments})", *HEAVY)


def test_training_imports_no_unused_packages():
    unused = ("bitsandbytes.nn", "torch._inductor.compile_fx", "datasets", "pandas", "pyarrow", "sklearn", "vllm")
    unused += ("rlhf_lightning.people.server", "rlhf_lightning.verification.verify")
    assert not modules_of("import rlhf_lightning.commands.train", *unused)
    assert modules_of("import rlhf_lightning.commands, bitsandbytes.functional", "bitsandbytes.nn")
