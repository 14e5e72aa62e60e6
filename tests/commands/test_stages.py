"""The real stages through `rlhf fit`: what is kept of a rollout, and that a cut run ends in the same bits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import rows_of, scalars_of
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from commands.conftest import save
from rlhf_lightning.commands.train import run
from rlhf_lightning.modules import PPOModule

PROMPTS = [f"ask for thing {number}" for number in range(20)]


@pytest.fixture
def ppo(tmp_path, monkeypatch):
    """Command line of a short PPO run: 4 rollouts of 4 episodes, 2 updates each."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS)
    Path("prompts.jsonl").write_text(rows)
    policy = save(tmp_path / "policy", LlamaForCausalLM)
    scorer = save(tmp_path / "scorer", LlamaForSequenceClassification, seed=1)
    return [
        "fit", "--model", "PPOModule", "--model.init_from", policy, "--model.scorer", scorer,
        "--model.max_new_tokens", "6", "--model.ppo_epochs", "2", "--model.learning_rate", "1e-3",
        "--data", "PromptDataModule", "--data.source", "prompts.jsonl", "--data.batch_size", "4",
        "--data.eval_rows", "4", "--checkpoint.every_n_rollouts", "1", "--checkpoint.after_validation", "false",
    ]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_cut_ppo_run_ends_in_the_same_bits(ppo, monkeypatch):
    whole = run([*ppo, "--run_name", "whole"])
    assert (whole.model.rollouts, whole.model.updates, whole.model.episodes) == (4, 8, 16)
    real = PPOModule.collect

    def dies(self, batch, *args, **kwargs):
        if self.rollouts == 2:
            raise RuntimeError("the machine is gone")
        return real(self, batch, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(PPOModule, "collect", dies)
        with pytest.raises(RuntimeError, match="machine"):
            run([*ppo, "--run_name", "cut"])
    resumed = run(["fit", "--resume", "runs/cut"])
    assert (resumed.model.rollouts, resumed.model.updates) == (4, 8)
    mine, theirs = weights(resumed.folder), weights(whole.folder)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for tag in ("rollout/score", "rollout/kl", "val/score", "progress/episodes"):
        assert scalars_of(resumed.folder, tag) == scalars_of(whole.folder, tag)
    assert rows_of(resumed.folder / "samples.jsonl") == rows_of(whole.folder / "samples.jsonl")


def test_samples_of_a_stage_with_a_scorer_are_scored_and_headlines_reach_the_tab(ppo):
    folder = run(ppo).folder
    rows = rows_of(folder / "samples.jsonl")
    assert {row["update"] for row in rows} == {0, 8} and len(rows) == 8
    assert all(isinstance(row["score"], float) and 1 <= row["length"] <= 6 for row in rows)
    held_out = {row["prompt"] for row in rows}
    assert held_out <= set(PROMPTS) and len(held_out) == 4
    assert [step for step, _ in scalars_of(folder, "rollout/score")][:4] == [2, 4, 6, 8]
    assert scalars_of(folder, "val/score")[-1][0] == 8


def test_predict_writes_the_policys_completions(ppo):
    trained = run(ppo).folder
    config, checkpoint = str(trained / "config.yaml"), str(trained / "checkpoints" / "last.ckpt")
    predicted = run(["predict", "--config", config, "--ckpt_path", checkpoint])
    rows = rows_of(predicted.folder / "predictions.jsonl")
    assert len(rows) == 4 and {row["prompt"] for row in rows} <= set(PROMPTS)
    assert all(row["logprob"] < 0 and isinstance(row["completion"], str) for row in rows)
