"""Settings are never ignored silently, and a run never ends early without a message."""

from pathlib import Path
from typing import Any

import pytest
from tiny_run import BASIC, UPDATES

from rlhf_lightning.commands.messages import own_settings
from rlhf_lightning.commands.train import raised_bound, run

DPO_FILE = """
model:
  class_path: DPOModule
  init_args: {init_from: none, beta: 0.1, max_grad_norm: 0.5, lora: {r: 4}}
data: {class_path: PreferenceDataModule, init_args: {source: pairs.jsonl}}
"""


@pytest.mark.parametrize(("further", "beta"), [((), 2.0), (("--model.beta", "0.3"), 0.3)])
def test_switching_the_objective_resets_its_own_settings_to_defaults(
    further: tuple[str, ...], beta: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of every module, such as lora and max_grad_norm, are kept."""
    Path("dpo.yaml").write_text(DPO_FILE, encoding="utf-8")
    seen: dict[str, Any] = {}
    from rlhf_lightning.commands.train import RlhfCLI

    def look(self: RlhfCLI) -> None:
        seen.update(self.config.fit.model.as_dict()["init_args"])
        raise SystemExit(0)

    monkeypatch.setattr(RlhfCLI, "before_instantiate_classes", look)
    with pytest.raises(SystemExit):
        run(["fit", "--config", "dpo.yaml", "--model", "SimPOModule", *further])
    assert (seen["beta"], seen["max_grad_norm"], seen["lora"]["r"]) == (beta, 0.5, 4)
    assert ("add --model.beta 0.1" in capsys.readouterr().out) == (not further)


def test_switching_between_on_policy_objectives_keeps_run_settings() -> None:
    own = own_settings("PPOModule", "GRPOModule")
    assert "kl_coef" in own and not {"scorer", "max_new_tokens", "lora", "init_from"} & own


def test_a_raised_bound_on_resume_replaces_the_other_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """Train three steps of an epoch of eight, then raise the limit beyond one epoch."""
    run(["fit", *BASIC, "--run_name", "raised", "--trainer.max_steps", "3"])
    resumed = run(["fit", "--resume", "runs/raised", "--trainer.max_steps", str(UPDATES + 2)])
    assert resumed.model.updates == UPDATES + 2
    assert "max_epochs 1 of the run no longer applies" in capsys.readouterr().out
    run(["fit", "--resume", "runs/raised"])
    assert f"nothing was left to train: the run had ended at update {UPDATES + 2}" in capsys.readouterr().out


def test_a_lowered_bound_on_resume_keeps_the_other_bound() -> None:
    trainer = {"max_steps": 3, "max_epochs": 1}
    assert raised_bound({"--trainer.max_epochs": "2"}, trainer) == ["--trainer.max_steps", "-1"]
    assert not raised_bound({"--trainer.max_steps": "2"}, trainer)
    assert not raised_bound({"--trainer.max_steps": "6", "--trainer.max_epochs": "1"}, trainer)


def test_each_validation_prints_one_line_of_headline_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    run(["fit", *BASIC, "--trainer.max_epochs", "2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation at update")]
    assert [line.split(":")[0] for line in lines] == ["validation at update 8", "validation at update 16"]
    assert "val/loss " in lines[0] and "val/slope " in lines[0]
