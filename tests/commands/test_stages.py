"""Run the real stages through `rlhf fit`: what a rollout stores, and that an interrupted run ends bit-identically."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import rows_of, scalars_of
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from commands.conftest import save
from rlhf_lightning.commands.train import run
from rlhf_lightning.modules import GRPOModule, PPOModule

PROMPTS = [f"ask for thing {number}" for number in range(20)]


@pytest.fixture
def ppo(tmp_path, monkeypatch):
    """Return the command line of a short PPO run: 4 rollouts of 4 episodes, 2 updates each."""
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


def test_a_killed_ppo_run_resumes_bit_identically(ppo, monkeypatch):
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


def test_samples_are_scored_and_headline_metrics_reach_hparams(ppo):
    folder = run(ppo).folder
    rows = rows_of(folder / "samples.jsonl")
    assert {row["update"] for row in rows} == {0, 8} and len(rows) == 8
    assert all(isinstance(row["score"], float) and 1 <= row["length"] <= 6 for row in rows)
    held_out = {row["prompt"] for row in rows}
    assert held_out <= set(PROMPTS) and len(held_out) == 4
    assert [step for step, _ in scalars_of(folder, "rollout/score")][:4] == [2, 4, 6, 8]
    assert scalars_of(folder, "val/score")[-1][0] == 8


def test_predict_writes_completions_with_logprobs(ppo):
    trained = run(ppo).folder
    config, checkpoint = str(trained / "config.yaml"), str(trained / "checkpoints" / "last.ckpt")
    predicted = run(["predict", "--config", config, "--ckpt_path", checkpoint])
    rows = rows_of(predicted.folder / "predictions.jsonl")
    assert len(rows) == 4 and {row["prompt"] for row in rows} <= set(PROMPTS)
    assert all(row["logprob"] < 0 and isinstance(row["completion"], str) for row in rows)


COMPOSED = """
model:
  class_path: GRPOModule
  init_args:
    scorer:
      class_path: rlhf_lightning.scoring.WeightedSum
      init_args:
        scorers:
          length:
            class_path: LengthPenalty
            init_args: {coef: 0.5, target: 3}
          repetition: {class_path: rlhf_lightning.scoring.RepetitionPenalty, init_args: {n: 1}}
        weights: {repetition: 2.0}
"""


def test_a_composed_scorer_from_yaml_resumes_bit_identically(ppo, monkeypatch):
    Path("scorer.yaml").write_text(COMPOSED)
    start = ppo[ppo.index("--model.init_from") + 1]
    argv = [
        "fit", "--config", "scorer.yaml", "--model.init_from", start, "--model.max_new_tokens", "6",
        *ppo[ppo.index("--data") :], "--data.samples_per_prompt", "2",
    ]  # fmt: skip
    whole = run([*argv, "--run_name", "whole"])
    assert whole.model.scorer.weights == {"length": 1.0, "repetition": 2.0}
    assert whole.model.scorer.scorers["length"].target == 3
    checkpoint = torch.load(whole.folder / "checkpoints" / "last.ckpt", weights_only=True)
    kept = checkpoint["hyper_parameters"]["scorer"]
    assert kept["init_args"]["scorers"]["length"]["init_args"].items() >= {"coef": 0.5, "target": 3}.items()
    assert len(kept) == 2
    length = scalars_of(whole.folder, "rollout/score_length")
    assert len(length) == 8 and all(value <= 0 for _, value in length)
    real = GRPOModule.collect

    def dies(self, *args, **kwargs):
        if self.rollouts == 4:
            raise RuntimeError("the machine is gone")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(GRPOModule, "collect", dies)
        with pytest.raises(RuntimeError, match="machine"):
            run([*argv, "--run_name", "cut"])
    resumed = run(["fit", "--resume", "runs/cut"])
    assert resumed.model.scorer.scorers["repetition"].n == 1
    assert scalars_of(resumed.folder, "rollout/score_length") == length


# -- seeds ------------------------------------------------------------------------------------------------------------

SEEN: list[tuple[str, str]] = []
"""Prompts and completions passed to `recorded_score`."""


def recorded_score(prompts, completions, **columns):
    SEEN.extend(zip(prompts, completions, strict=True))
    return [float(len(text)) for text in completions]


def drawn_by(ppo, *seeds):
    """Return training prompts in order, completions, weights and settings of a short run from new weights."""
    SEEN.clear()
    scorer = ppo.index("--model.scorer") + 1
    argv = [*ppo[:scorer], "commands.test_stages.recorded_score", *ppo[scorer + 1 :], "--model.from_scratch", "true"]
    argv += ["--samples.prompts", "0", "--trainer.limit_val_batches", "0", *seeds]
    cli = run(argv)
    config = yaml.safe_load((cli.folder / "config.yaml").read_text())
    prompts, completions = zip(*SEEN, strict=True)
    return prompts, completions, weights(cli.folder)["lm_head.weight"], config


def test_seed_everything_sets_data_order_sampling_and_new_weights(ppo):
    first, again, other = (drawn_by(ppo, "--seed_everything", seed) for seed in ("1", "1", "2"))
    assert first[:2] == again[:2] and torch.equal(first[2], again[2])
    assert first[0] != other[0] and first[1] != other[1] and not torch.equal(first[2], other[2])
    recorded = [(run[3]["seed_everything"], *(run[3][part]["init_args"]["seed"] for part in ("model", "data")))
                for run in (first, other)]  # fmt: skip
    assert recorded == [(1, 1, 1), (2, 2, 2)]


def test_model_and_data_seeds_override_seed_everything(ppo, capsys):
    own = ["--model.seed", "1", "--data.seed", "1"]
    first, other = drawn_by(ppo, "--seed_everything", "1"), drawn_by(ppo, "--seed_everything", "2", *own)
    assert first[:2] == other[:2] and torch.equal(first[2], other[2])
    assert "data.seed is 1 as given, which overrides seed_everything 2" in capsys.readouterr().out
