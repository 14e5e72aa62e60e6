"""Train the objective shown in README as a user would: a file in the working directory and `rlhf fit`."""

import math
import sys
from pathlib import Path

import pytest

from rlhf_lightning.commands import train
from rlhf_lightning.worlds.assistant import write_world

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_world(tmp_path / "world", demonstrations=8, pairs_train=48, pairs_test=8)
    return tmp_path / "world"


def test_the_readme_objective_trains_from_the_command_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXPERIMENTS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(EXPERIMENTS)])
    flags = f"""fit --model my_objective.OffsetDPOModule --model.offset 0.7 --model.init_from {world}/model
        --model.from_scratch true --model.learning_rate 0.003 --model.beta 0.5 --data PreferenceDataModule
        --data.source {world}/pairs_train.jsonl --data.eval_source {world}/pairs_train.jsonl --data.batch_size 16
        --data.cache_dir {tmp_path}/cache --runs_folder {tmp_path}/runs --trainer.max_epochs 3"""
    done = train.run(flags.split())
    assert type(done.model).__name__ == "OffsetDPOModule"
    metrics = {name: float(value) for name, value in done.trainer.callback_metrics.items()}
    # At the start the margin is 0, so the loss is -log sigmoid(-0.7) = 1.1032.
    start = math.log1p(math.exp(0.7))
    assert metrics["val/loss"] < start - 0.05
    assert metrics["val/reward_margin"] > 0.1
    assert metrics["val/reward_accuracy"] > 0.6
    assert (Path(done.folder) / "model" / "model.safetensors").is_file()


def test_the_critic_free_example_trains(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorer is a function in the working directory."""
    (tmp_path / "short_answers.py").write_text(
        "def brevity(prompts, completions, **columns):\n    return [-len(text.split()) / 10 for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), str(EXPERIMENTS)])
    flags = f"""fit --model my_objective.BestOfGroupModule --model.gain 2.0 --model.scorer short_answers.brevity
        --model.init_from {world}/model --model.from_scratch true --model.learning_rate 0.003 --model.max_new_tokens 8
        --model.lr_schedule constant --model.kl_coef 0 --data PromptDataModule --data.source {world}/prompts_train.jsonl
        --data.eval_source {world}/prompts_test.jsonl --data.batch_size 64 --data.samples_per_prompt 8
        --data.eval_batch_size 64 --data.rollouts 10 --trainer.limit_val_batches 1
        --trainer.num_sanity_val_steps 0 --data.cache_dir {tmp_path}/cache --runs_folder {tmp_path}/runs
        --trainer.max_epochs 1"""
    done = train.run(flags.split())
    metrics = {name: float(value) for name, value in done.trainer.callback_metrics.items()}
    assert metrics["val/score"] > -0.7  # 8 words per completion at the start
