"""Test the reply to a wrong command line: one sentence, the nearest right name, exit status 2."""

import pytest
from tiny_run import BASIC

from rlhf_lightning.commands.flags import with_underscores
from rlhf_lightning.commands.messages import explain
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.commands.train import main

YAML = """
model:
  class_path: tiny_run.SlopeModule
  init_args: {slope: 1.0}
data:
  class_path: tiny_run.NumbersDataModule
"""


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model.lr", "1"], "model.lr is not an argument of SlopeModule; use model.learning_rate"),
        (
            ["--model.init_args.lr", "1"],
            "model.lr is not an argument of SlopeModule; use model.learning_rate",
        ),
        (["--data.cuont", "3"], "data.cuont is not an argument of NumbersDataModule; the nearest is data.count"),
        (
            ["--data.eval-row", "3"],
            "data.eval_row is not an argument of NumbersDataModule; the nearest is data.eval_rows",
        ),
        (["--trainer.max_epoch", "1"], "there is no setting --trainer.max_epoch; the nearest is --trainer.max_epochs"),
        (["--epochs=3"], "there is no setting --epochs; the nearest is --trainer.max_epochs"),
        (["--lr", "3"], "there is no setting --lr; use --model.learning_rate"),
        (["--ckptpath", "x"], "there is no setting --ckptpath; the nearest is --ckpt_path"),
        (["--samples.prompt", "1"], "there is no setting --samples.prompt; the nearest is --samples.prompts"),
        (["--model", "SlopModule"], "model: there is no class SlopModule; did you mean SlopeModule?"),
        (["--model", "nowhere.Objective"], "model: nowhere.Objective cannot be imported from"),
        (
            ["--model", "tiny_run.SlopeModul"],
            "model: tiny_run has no class SlopeModul; the nearest is tiny_run.SlopeModule",
        ),
        (
            ["--model", "tiny_run.NumbersDataModule"],
            "model: tiny_run.NumbersDataModule is not a subclass of AlignmentModule",
        ),
        (
            ["--data", "tiny_run.UnfinishedDataModule"],
            "UnfinishedDataModule is abstract: it must define further",
        ),
        (["--model.slope", "steep"], "model.slope must be a number, not steep"),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs must be a whole number or null, not x"),
        (["--trainer.logger.name", "x"], "trainer.logger: Logger is an abstract base class; choose a class"),
        (["-c", "absent.yaml"], "absent.yaml"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(["fit", *BASIC, *flags])
    told = capsys.readouterr().err
    assert exit_status.value.code == 2
    assert sentence in told.splitlines()[0]
    assert "NestedArg" not in told and "Subtypes" not in told and len(told.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (YAML.replace("slope:", "sloop:"), "model.sloop is not an argument of SlopeModule; the nearest is model.slope"),
        (
            YAML + "trainer: {max_epoch: 2}\n",
            "there is no setting trainer.max_epoch; the nearest is trainer.max_epochs",
        ),
        (YAML.replace("data:", "daat:"), "there is no setting daat"),
        (YAML.replace("  init_args: {slope: 1.0}", "  slope: 1.0"), "put the arguments of SlopeModule under init_args"),
        (YAML.replace("{slope: 1.0}", "{slope: [}"), "invalid YAML in the config file"),
        (
            YAML.replace("SlopeModule", "SlopingModule"),
            "tiny_run has no class SlopingModule; the nearest is tiny_run.SlopeModule",
        ),
        ("model: {slope: 2}\n", "model.slope is not an argument of AlignmentModule"),
        (YAML.split("data:")[0], "missing: --data; give a class as in --model DPOModule, or a --config file"),
    ],
)
def test_invalid_yaml_is_refused_in_one_sentence(text, sentence, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_status:
        main(["fit", "--config", "run.yaml"])
    assert exit_status.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[0]


def test_the_nearest_existing_argument_is_suggested(capsys):
    """Names that users of other libraries type first."""
    for flag, suggestion in (("--data.batchsize", "data.batch_size"), ("--model.bta", "model.beta")):
        with pytest.raises(SystemExit):
            main(["fit", "--model", "DPOModule", "--model.init_from", "x", "--data", "PreferenceDataModule", flag, "1"])
        assert f"the nearest is {suggestion}" in capsys.readouterr().err


def test_missing_arguments_are_named_with_their_class(capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(["fit", "--model", "DPOModule", "--data", "PreferenceDataModule", "--data.source", "x.jsonl"])
    assert exit_status.value.code == 2
    assert "DPOModule needs --model.init_from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--trainer.gradient_clip_val", "1"], "model.max_grad_norm"),
        (["--trainer.accumulate_grad_batches", "4"], "data.micro_batch_size or data.max_tokens"),
        (["--trainer.precision", "16-mixed"], "use bf16-mixed or 32-true"),
        (["--trainer.strategy", "fsdp"], "ModelParallelStrategy"),
        (["--model", "OfflineModule", "--model.init_from", "x"], "model is an abstract base class"),
        (["--ckpt_path", "last"], "does not exist in a new run folder"),
        (["--ckpt_path", "nothing.ckpt"], "there is no checkpoint nothing.ckpt"),
    ],
)
def test_conflicting_settings_are_refused_with_the_replacement(flags, sentence, capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(["fit", *BASIC, *flags])
    assert exit_status.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[0]


def test_hyphens_become_underscores_in_flag_names_only():
    given = [
        "--max-new-tokens",
        "-1",
        "--data.batch-size=8",
        "--source",
        "my-file.jsonl",
        "--out=a-b.jsonl",
        "-c",
        "x-y",
    ]
    assert with_underscores(given) == [
        "--max_new_tokens", "-1", "--data.batch_size=8", "--source", "my-file.jsonl", "--out=a-b.jsonl", "-c", "x-y",
    ]  # fmt: skip


def test_boolean_flags_need_no_value():
    called = []

    def command(place: str, fast: bool = False, loud: bool = False) -> int:
        """Do it.

        Args:
            place: where.
            fast: at speed.
            loud: with noise.
        """
        called.append((place, fast, loud))
        return 4

    for argv in (["--fast", "here", "--loud"], ["here", "--fast", "true", "--loud=true"], ["--loud", "--fast", "here"]):
        assert run_function(command, argv, "try", positional=["place"]) == 4
    run_function(command, ["--fast", "false", "fast"], "try", positional=["place"])
    assert called == [("here", True, True)] * 3 + [("fast", False, False)]
    with pytest.raises(SystemExit):
        run_function(command, [], "try", positional=["place"])


def test_an_unknown_parser_message_is_joined_into_one_line():
    message = "Parser key \"model\":\n  Something new\n  Given value type: <class 'x'>\n  Given value: NestedArg(key=1)"
    assert explain(message) == 'Parser key "model":; Something new'


def test_class_help_prints_the_docstring(capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(["fit", "--model.help", "tiny_run.SlopeModule"])
    assert exit_status.value.code == 0
    shown = capsys.readouterr().out
    assert "initial value of the weight" in shown and "--model.learning_rate" in shown


def test_class_help_prints_usage_paper_equation_and_target_before_the_settings(capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(["fit", "--model.help", "GRPOModule"])
    assert exit_status.value.code == 0
    shown = capsys.readouterr().out
    usage = "usage: rlhf fit --model GRPOModule --model.init_from VALUE --model.scorer VALUE [--model.SETTING"
    parts = [usage, "arXiv 2402.03300", "max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) + kl_coef k3", "Target:",
             "settings:", "--model.kl_coef"]  # fmt: skip
    places = [shown.find(part) for part in parts]
    assert places[0] == 0 and -1 not in places and places == sorted(places), shown[:1500]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_texts_are_well_formed(command, capsys):
    with pytest.raises(SystemExit) as exit_status:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert exit_status.value.code == 0
    assert shown.startswith(f"usage: rlhf {command} [--config FILE.yaml ...]")
    for option in (
        "--run_name",
        "--checkpoint.every_n_updates",
        "--samples.prompts",
        "--trainer.max_epochs",
        "--ckpt_path",
    ):
        assert option in shown
    assert "--optimizer" not in shown and "--weights_only" not in shown and "==SUPPRESS==" not in shown


@pytest.mark.parametrize("text", ["[" * 20_000, "{a: " * 20_000, "/" * 5_000, "a" * 5_000])
@pytest.mark.parametrize("option", ["--model", "--model.lora", "--config", "--data"])
def test_a_very_long_value_is_not_tried_as_a_file_name(option, text, capsys):
    with pytest.raises(SystemExit) as exit_status:
        raise SystemExit(main(["fit", "--config", "recipe:dpo", "--model.init_from", "x", option, text]))
    said = capsys.readouterr().err
    assert exit_status.value.code == 2 and "Traceback" not in said and "Errno" not in said


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("model: {class_path: SFTModule, init_args: 7}", "model: init_args of SFTModule must be a mapping"),
        ("model: {class_path: SFTModule, init_args: [1]}", "model: init_args of SFTModule must be a mapping"),
        ("data: {class_path: SFTDataModule, init_args: x}", "data: init_args of SFTDataModule must be a mapping"),
        ("model: {class_path: 7}", "model: class_path is 7"),
        ("trainer: {callbacks: [{class_path: EarlyStopping, init_args: 7}]}", "trainer.callbacks: init_args of"),
        (
            "model: {class_path: GRPOModule, init_args: {scorer: {class_path: WordScorer, init_args: 7}}}",
            "model.scorer: init_args of WordScorer must be a mapping",
        ),
    ],
)
def test_malformed_class_arguments_are_refused_in_one_sentence(config, sentence, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(config)
    with pytest.raises(SystemExit) as exit_status:
        main(["fit", "--config", str(tmp_path / "c.yaml")])
    assert exit_status.value.code == 2 and sentence in capsys.readouterr().err
