"""Mistakes of the first hours get a sentence with the remedy; also test the files that a run leaves for
the next stage.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import refused
from lightning.pytorch import Trainer
from tiny_run import BASIC, NumbersDataModule, SlopeModule

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.train import run
from rlhf_lightning.data import PreferenceDataModule
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.modules import DPOModule
from rlhf_lightning.tokenization import load_tokenizer

EARLY = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/nope"]
MISTAKES = {
    "a run that is not there": (["chat", "runs/nope"], "there is no model folder runs/nope"),
    "an export of no run": (["export", "runs/nope", "--out", "model"], "no run found at runs/nope"),
    "a hub name offline": (["chat", "missing/model"], "the Hugging Face Hub cannot be reached: check the name"),
    "a metric that never came": (["fit", *BASIC, *EARLY], "EarlyStopping monitors val/nope"),
    "an evaluation of no run": (["validate", "runs/nope"], "no run found at runs/nope"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_common_mistake_prints_one_sentence_with_the_remedy(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv, words = MISTAKES[mistake]
    assert rlhf(argv) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rlhf: ") and words in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_accelerator_is_refused_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf(["fit", *BASIC, "--trainer.accelerator", "gpu"]) == 1
    assert "set trainer.accelerator to cpu or auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "code"),
    [("gradient_clip_val", "trainer-clips-gradients"), ("accumulate_grad_batches", "accumulated-batches")],
)
def test_trainer_clipping_and_accumulation_are_refused_in_python(setting: str, code: str) -> None:
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, **{setting: 2})
    with refused(code, setting):
        trainer.fit(SlopeModule(), datamodule=NumbersDataModule())


def test_a_run_folder_as_model_is_refused_with_its_model_folder(
    policy_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in (2, 10):
        Path(f"runs/dpo/version_{version}/model").mkdir(parents=True)
    assert rlhf(["chat", "runs/dpo"]) == 1
    assert "its model is runs/dpo/version_10/model" in capsys.readouterr().err


def test_validate_uses_a_runs_checkpoint_and_settings_and_writes_inside_it() -> None:
    trained = run(["fit", *BASIC, "--run_name", "mine"])
    validated = run(["validate", "runs/mine"])
    assert str(validated.folder) == "runs/mine/version_0/validate/version_0"
    losses = [float(one.trainer.callback_metrics["val/loss"]) for one in (trained, validated)]
    assert losses[0] == pytest.approx(losses[1])
    assert str(run(["test", *BASIC, "--run_name", "mine"]).folder) == "runs/mine/version_1"
    assert str(run(["test", *BASIC]).folder) == "runs/slope/test/version_0"


@pytest.fixture
def pairs(write_rows: object) -> str:
    rows = [{"prompt": f"a{number}", "chosen": "bc", "rejected": "d"} for number in range(6)]
    return str(write_rows(rows, "pairs.jsonl"))  # type: ignore[operator]


def trainer() -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)


def test_validation_without_held_out_rows_is_refused(policy_folder: str, pairs: str) -> None:
    with refused("no-held-out-rows", "data.eval_source", "data.eval_rows"):
        trainer().validate(DPOModule(init_from=policy_folder), datamodule=PreferenceDataModule(pairs))


def test_a_policy_equal_to_its_reference_warns(
    policy_folder: str, pairs: str, recwarn: pytest.WarningsRecorder
) -> None:
    data = PreferenceDataModule(pairs, eval_rows=2)
    found = trainer().validate(DPOModule(init_from=policy_folder, self_check=False), datamodule=data)
    assert found[0]["val/reward_accuracy"] == 0.5
    assert any("is its own reference" in str(warning.message) for warning in recwarn)


def test_plain_prompts_for_a_chat_model_warn(policy_folder: str, plain_folder: str, pairs: str) -> None:
    def hint(folder: str, **settings: bool) -> str | None:
        data = PreferenceDataModule(pairs, **settings)
        data.tokenizer = load_tokenizer(folder)
        data.prepare_data()
        data.setup("validate")
        return data._chat_hint()

    assert "--data.as_chat true" in str(hint(policy_folder))
    assert hint(policy_folder, as_chat=True) is None and hint(plain_folder) is None


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_an_exported_folder_has_a_model_card(lora: LoraSettings | None, policy_folder: str) -> None:
    policy = load_policy(policy_folder, LoadSettings(), lora)
    folder = export_policy(policy, load_tokenizer(policy_folder), "model")
    card = (folder / "README.md").read_text(encoding="utf-8")
    loader = "AutoPeftModelForCausalLM" if lora else "AutoModelForCausalLM"
    assert (
        f"{loader}.from_pretrained" in card
        and "from `model`" in card
        and policy_folder not in card
        and "[More Information Needed]" not in card
    )
    assert json.loads((folder / "backbone.json").read_text())["fingerprint"]
