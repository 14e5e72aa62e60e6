"""Test flags: config files come first in any order of flags, and nested settings can be set."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import refused
from tiny_run import BASIC

from rlhf_lightning.commands.flags import NestedFlag, configs_first, flags, put_nested, split_nested
from rlhf_lightning.commands.parsing import with_full_paths
from rlhf_lightning.commands.train import main, run
from rlhf_lightning.environments import load_environment
from rlhf_lightning.sampling.generate_engine import GenerateEngine
from rlhf_lightning.sampling.slot_engine import load_engine
from rlhf_lightning.scoring import load_scorer

MODEL = ["--model", "GRPOModule", "--model.init_from", "x", "--data", "PromptDataModule", "--data.source", "y"]


def printed(capsys, *argv, part="model"):
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        main(["fit", *argv, "--print_config"])
    told = capsys.readouterr()
    assert status.value.code == 0, told.err
    return yaml.safe_load(told.out)[part]["init_args"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["fit", "--model", "A", "--config", "a", "-c", "b", "--x=1"],
         ["fit", "--config", "a", "-c", "b", "--model", "A", "--x=1"]),
        (["fit", "--x", "1", "--config=a"], ["fit", "--config=a", "--x", "1"]),
        (["fit", "--config"], ["fit", "--config"]),
    ],
)  # fmt: skip
def test_config_files_are_applied_first_and_in_order(argv, expected):
    assert configs_first(argv) == expected


def test_flags_override_config_files_in_any_position():
    Path("a.yaml").write_text("model: {class_path: tiny_run.SlopeModule, init_args: {slope: 1.0, offset: 0.5}}\n")
    before = run(["fit", "--model.offset", "0.25", *BASIC, "--config", "a.yaml"])
    after = run(["fit", "--config", "a.yaml", "--model.offset", "0.25", *BASIC])
    assert before.config.fit.model.as_dict() == after.config.fit.model.as_dict()
    assert (before.model.slope, before.model.offset) == (1.0, 0.25)


def test_settings_of_another_class_are_reported_as_not_applied(capsys):
    Path("a.yaml").write_text(
        "model: {class_path: tiny_run.PoisonedModule, init_args: {slope: 1.0, poison: [3], value: inf}}\n"
    )
    cli = run(["fit", *BASIC, "--config", "a.yaml"])
    assert "a.yaml is for tiny_run.PoisonedModule: model.poison, model.value do not apply to SlopeModule" in (
        capsys.readouterr().out
    )
    assert cli.model.slope == 1.0


@pytest.mark.parametrize(
    "chosen",
    [
        ["--model.scorer", "InstructionScorer", "--model.scorer.init_args.limit", "0.5"],
        ["--model.scorer", "InstructionScorer", "--model.scorer.limit=0.5"],
        ["--model.scorer.limit", "0.5", "--model.scorer", "InstructionScorer"],
        ["--model.scorer", "my.Scorer", "--model.scorer.class_path", "InstructionScorer", "--model.scorer.limit", ".5"],
    ],
)  # fmt: skip
def test_flags_set_arguments_of_a_scorer(chosen, capsys):
    assert printed(capsys, *MODEL, *chosen)["scorer"] == {
        "class_path": "rlhf_lightning.scoring.InstructionScorer", "init_args": {"limit": 0.5}
    }  # fmt: skip


def test_flags_set_arguments_of_a_scorer_in_a_config_file(capsys):
    Path("scorer.yaml").write_text(
        "model:\n  class_path: GRPOModule\n  init_args:\n    scorer:\n"
        "      class_path: rlhf_lightning.scoring.WeightedSum\n"
        "      init_args: {weights: {a: 1.0}, scorers: {a: my.scorer, b: my.other}}\n"
    )
    given = ["--model.scorer.init_args.weights.a", "2", "--model.scorer.init_args.scorers.a.init_args.limit", "3"]
    scorer = printed(capsys, *MODEL, "--config", "scorer.yaml", *given)["scorer"]
    assert scorer["init_args"] == {
        "missing": "drop", "weights": {"a": 2},
        "scorers": {"a": {"class_path": "my.scorer", "init_args": {"limit": 3}}, "b": "my.other"}
    }  # fmt: skip


def test_flags_set_arguments_of_engine_and_optimizer(capsys):
    given = ["--model.engine.class_path", "RemoteEngine", "--model.engine.init_args.url", "http://x"]
    given += ["--model.optimizer.class_path", "torch.optim.SGD", "--model.optimizer.init_args.lr", "0.1"]
    found = printed(capsys, *MODEL, "--model.scorer", "my.scorer", *given)
    assert found["engine"]["class_path"].rpartition(".")[2] == "RemoteEngine"
    assert found["engine"]["init_args"] == {"url": "http://x"}
    assert found["optimizer"]["init_args"]["lr"] == 0.1


def test_init_args_without_a_class_are_refused():
    flag = NestedFlag("scorer", ("init_args", "limit"), 1)
    with refused("no-class-to-set", "--model.scorer.init_args.limit", "--model.scorer CLASS"):
        put_nested(None, flag)
    with refused("no-class-to-set", "runs/reward/model"):
        put_nested("runs/reward/model", flag)


def test_a_setting_that_a_class_lacks_is_refused(capsys):
    with pytest.raises(SystemExit) as status:
        main(["fit", *BASIC, "--model.engine.init_args.url", "x"])
    assert status.value.code == 2 and "model.engine is not an argument of SlopeModule" in capsys.readouterr().err


def test_only_nested_scorer_engine_and_optimizer_flags_are_extracted():
    argv = [
        "fit",
        "--model.lora.r",
        "4",
        "--model.scorer.help",
        "X",
        "--model.scorer",
        "y",
        "--model.init_args.scorer.a=1",
    ]
    assert split_nested(argv) == (argv[:-1], [NestedFlag("scorer", ("init_args", "a"), 1)])
    assert flags(["--a", "1", "--a=2", "-c", "x"]) == {"--a": "1", "--config": "x"}


SUM = {"class_path": "WeightedSum", "init_args": {"scorers": {
    "length": {"class_path": "LengthPenalty", "init_args": {"coef": 0.5}}, "again": "RepetitionPenalty"}}}  # fmt: skip
TOLERANT = {"class_path": "FaultTolerant", "init_args": {"scorer": {"class_path": "ZeroScorer"}}}
LISTED = {"class_path": "Ensemble", "init_args": {"scorers": [{"class_path": "ZeroScorer"}, "RepetitionPenalty"]}}


@pytest.mark.parametrize("scorer", [SUM, TOLERANT, LISTED, "ZeroScorer"])
@pytest.mark.parametrize("in_file", [True, False])
def test_short_names_of_shipped_classes_work_at_every_depth(scorer, in_file, policy_folder, capsys):
    """Short names work in a file, as a flag, nested, and in a list."""
    arguments = {"init_from": policy_folder, "engine": {"class_path": "GenerateEngine"}}
    config = {
        "model": {"class_path": "GRPOModule", "init_args": arguments | ({"scorer": scorer} if in_file else {})},
        "data": {"class_path": "PromptDataModule", "init_args": {"source": "rows.jsonl"}},
    }
    Path("grpo.yaml").write_text(yaml.safe_dump(config))
    given = [] if in_file else ["--model.scorer", scorer if isinstance(scorer, str) else json.dumps(scorer)]
    found = printed(capsys, "--config", "grpo.yaml", *given)
    assert isinstance(load_engine(found["engine"]), GenerateEngine)
    assert type(load_scorer(found["scorer"])) is type(load_scorer(scorer))


TOOLS = {"class_path": "ToolEnvironment", "init_args": {"tools": ["calculator"]}}
RETRIED = {"class_path": "FaultTolerantEnvironment", "init_args": {"environment": TOOLS, "retries": 1}}


@pytest.mark.parametrize("environment", [TOOLS, RETRIED, "GuessTheNumber", {"class_path": "GuessTheNumber"}])
@pytest.mark.parametrize("in_file", [True, False])
def test_short_names_of_shipped_environments_work_at_every_depth(environment, in_file, policy_folder, capsys):
    arguments = {"source": "rows.jsonl"} | ({"environment": environment} if in_file else {})
    config = {
        "model": {"class_path": "GRPOModule", "init_args": {"init_from": policy_folder, "scorer": "ZeroScorer"}},
        "data": {"class_path": "PromptDataModule", "init_args": arguments},
    }
    Path("grpo.yaml").write_text(yaml.safe_dump(config))
    text = environment if isinstance(environment, str) else json.dumps(environment)
    found = printed(capsys, "--config", "grpo.yaml", *([] if in_file else ["--data.environment", text]), part="data")
    assert type(load_environment(found["environment"])) is type(load_environment(environment))


def test_import_paths_of_user_classes_are_unchanged():
    described = {"class_path": "my_file.ZeroScorer", "init_args": {"class_path": "nothing shipped"}}
    assert with_full_paths({"scorer": described, "n": [1, "ZeroScorer"]}) == {
        "scorer": described, "n": [1, "ZeroScorer"]
    }  # fmt: skip
