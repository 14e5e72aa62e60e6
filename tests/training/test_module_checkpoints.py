import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import refused
from tiny_models import (
    StepData,
    assert_same,
    demonstration_step,
    fit,
    prompt_step,
    quiet_trainer,
    random_pairs,
    random_rows,
    ranked_pairs,
    ranked_step,
    weights_of,
)

from rlhf_lightning.data.loader import StepLoader
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.training.checkpoint_state import plain

ROWS = random_rows(6, seed=81)
PROMPTS = [prompt for prompt, _ in ROWS]


def low_words(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [sum(int(w[1:]) < 60 for w in text.split()) / 6 for text in completions]


class Snapshot(pl.Callback):
    """Saves a checkpoint when training step ``step`` of the run has ended."""

    def __init__(self, step: int, path: Path) -> None:
        self.left, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


class ResumableData(StepData):
    """Yields steps through the package's loader, different in each epoch."""

    def train_dataloader(self) -> StepLoader:  # type: ignore[override]
        def steps(epoch: int) -> list[Any]:
            return self.steps if epoch % 2 == 0 else self.steps[::-1]

        return StepLoader(steps, len(self.steps), "tiny")


def run(module: pl.LightningModule, steps: list[Any], ckpt_path: Path | None = None, **settings: Any) -> None:
    trainer = quiet_trainer(limit_val_batches=0, **settings)
    trainer.fit(module, ResumableData(steps), ckpt_path=None if ckpt_path is None else str(ckpt_path))


def saved(module: Any, steps: list[Any], path: Path) -> dict[str, Any]:
    """Fit on the steps and return the checkpoint."""
    fit(module, steps, callbacks=[Snapshot(len(steps), path)])
    return torch.load(path, weights_only=True)


# -- what is in it ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_only_trainable_weights(policy_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "small.ckpt"
    module = SFTModule(init_from=policy_folder, lora=LoraSettings(r=1, targets=["q_proj"]))
    checkpoint = saved(module, [demonstration_step(ROWS)], path)
    assert checkpoint["state_dict"].keys() == weights_of(module).keys()
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert sum(weight.numel() for weight in checkpoint["state_dict"].values()) == 2 * (32 + 32)
    whole = saved(SFTModule(init_from=policy_folder), [demonstration_step(ROWS)], tmp_path / "whole.ckpt")
    assert "policy.model.model.embed_tokens.weight" in whole["state_dict"]
    assert path.stat().st_size * 5 < (tmp_path / "whole.ckpt").stat().st_size


def test_reference_and_scorer_are_not_in_checkpoints(policy_folder: str, reward_folder: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 3, "ppo_epochs": 1, "lora": LoraSettings(r=2)}
    for critic, heads in (("shared", {"policy.value_head.weight", "policy.value_head.bias"}), ("separate", set())):
        module = PPOModule(init_from=policy_folder, scorer=reward_folder, critic=critic, **settings)
        state = saved(module, [prompt_step(PROMPTS)], tmp_path / f"{critic}.ckpt")["state_dict"]
        policy = {name for name in state if name.startswith("policy")}
        assert {name for name in policy if "lora_" not in name} == heads
        assert any(name.startswith("critic.") for name in state) == (critic == "separate")
        assert all(name.startswith(("policy.", "critic.")) for name in state)


class CountingModule(SFTModule):
    """Counts its rollouts in buffers, one of them in a submodule."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)
        self.statistics = torch.nn.BatchNorm1d(2, affine=False)

    def on_before_clip(self) -> None:
        self.seen += 1
        self.scratch += 1
        self.statistics(torch.full((2, 2), float(self.seen)))


def test_buffers_of_a_user_class_are_resumed(policy_folder: str, tmp_path: Path) -> None:
    path, steps = tmp_path / "middle.ckpt", [demonstration_step(ROWS, 2), demonstration_step(ROWS, 2)]
    whole, resumed = (CountingModule(init_from=policy_folder) for _ in range(2))
    run(whole, steps, callbacks=[Snapshot(1, path)], max_epochs=1)
    run(resumed, steps, path, max_epochs=1)
    assert float(resumed.seen) == float(whole.seen) == 2 and float(resumed.scratch) == 1
    assert torch.equal(resumed.statistics.running_mean, whole.statistics.running_mean)
    assert "scratch" not in torch.load(path, weights_only=True)["state_dict"]


def test_settings_are_kept_as_plain_types(policy_folder: str, tmp_path: Path) -> None:
    module = PPOModule(
        init_from=policy_folder, scorer=low_words, lora=LoraSettings(r=2), max_new_tokens=3, ppo_epochs=1
    )
    hparams = saved(module, [prompt_step(PROMPTS)], tmp_path / "run.ckpt")["hyper_parameters"]
    assert hparams["lora"] == asdict(LoraSettings(r=2)) and hparams["lora"]["targets"] == "all-linear"
    assert hparams["scorer"] == f"{__name__}.low_words"
    assert hparams["max_new_tokens"] == 3 and hparams["betas"] == [0.9, 0.999]
    assert plain(Path("x")) == "pathlib.PosixPath" or plain(Path("x")).startswith("pathlib")


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_run(policy_folder: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 5e-3, "lr_schedule": "cosine", "warmup": 0.2}
    steps = [demonstration_step(random_rows(4, seed=90 + index), 2) for index in range(3)]
    path = tmp_path / "middle.ckpt"
    whole = SFTModule(init_from=policy_folder, **settings)
    run(whole, steps, callbacks=[Snapshot(4, path)], max_epochs=2)  # in the middle of the second epoch
    resumed = SFTModule(init_from=policy_folder, **settings)
    run(resumed, steps, path, max_epochs=2)
    assert_same(weights_of(resumed), weights_of(whole), rtol=0, atol=1e-7)
    assert (resumed.updates, resumed.episodes, resumed.tokens) == (whole.updates, whole.episodes, whole.tokens)
    assert whole.updates == 6
    elsewhere = SFTModule(init_from=policy_folder, **settings)
    run(elsewhere, steps[:2] + steps[:1], max_epochs=2)
    assert max(float((weights_of(elsewhere)[n] - w).abs().max()) for n, w in weights_of(whole).items()) > 1e-4


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_resumed_ppo_run_samples_and_learns_as_an_uninterrupted_one(
    policy_folder: str, tmp_path: Path, critic: str
) -> None:
    settings: dict[str, Any] = {
        "scorer": low_words, "critic": critic, "max_new_tokens": 6, "learning_rate": 5e-3, "kl_target": 0.1,
        "kl_horizon": 50, "ppo_epochs": 2, "mini_batch_size": 4, "missing_eos_score": None,
    }  # fmt: skip
    steps = [prompt_step(PROMPTS, first_episode=6 * index) for index in range(3)]
    path = tmp_path / "middle.ckpt"
    whole = PPOModule(init_from=policy_folder, **settings)
    run(whole, steps, callbacks=[Snapshot(2, path)], max_epochs=1)
    resumed = PPOModule(init_from=policy_folder, **settings)
    run(resumed, steps, path, max_epochs=1)
    assert_same(weights_of(resumed), weights_of(whole), rtol=0, atol=1e-7)
    assert (resumed.updates, resumed.rollouts, resumed.episodes) == (12, 3, 18)
    assert resumed.kl_coef == whole.kl_coef != PPOModule(init_from="unread", **settings).kl_coef
    assert resumed.tokens == whole.tokens


def test_a_resumed_run_computes_with_as_many_threads_as_before(policy_folder: str, tmp_path: Path) -> None:
    """The last bits of results on a CPU depend on the number of threads."""

    class Threads(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            counts.append(torch.get_num_threads())

    counts, path, steps = list[int](), tmp_path / "one.ckpt", [demonstration_step(ROWS)] * 2
    assert saved(SFTModule(init_from=policy_folder), steps, path)["threads"] == 1
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match="used 1 threads and is resumed with 2: 1 are used again"):
        run(SFTModule(init_from=policy_folder), steps, path, max_epochs=2, callbacks=[Threads()])
    assert set(counts) == {1} and torch.get_num_threads() == 2


def test_the_score_bias_is_restored(policy_folder: str, tmp_path: Path) -> None:
    step = ranked_step(ranked_pairs(random_pairs(4, seed=3)))
    path = tmp_path / "reward.ckpt"
    module = RewardModule(init_from=policy_folder)
    fit(module, [step])
    bias = module.reward_model.bias
    trainer = quiet_trainer()
    trainer.validate(module, StepData([step], [step]), verbose=False)
    trainer.save_checkpoint(path)
    again = RewardModule(init_from=policy_folder)
    quiet_trainer().validate(again, StepData([step], [step]), ckpt_path=str(path), verbose=False, weights_only=True)
    assert again.reward_model.bias == bias != 0.0
    assert_same(weights_of(again), weights_of(module), rtol=0, atol=0)


def test_a_checkpoint_of_another_adapter_is_refused(policy_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.ckpt"
    saved(
        SFTModule(init_from=policy_folder, lora=LoraSettings(r=2, targets=["q_proj"])), [demonstration_step(ROWS)], path
    )
    other = SFTModule(init_from=policy_folder, lora=LoraSettings(r=2, targets=["q_proj", "v_proj"]))
    with refused("checkpoint-does-not-fit", "4 trainable weights are missing", "v_proj", "0 are unknown"):
        fit(other, [demonstration_step(ROWS)], ckpt_path=str(path))
    smaller = SFTModule(init_from=policy_folder, lora=LoraSettings(r=2, targets=["o_proj"]))
    with refused("checkpoint-does-not-fit", "4 trainable weights are missing", "4 are unknown"):
        fit(smaller, [demonstration_step(ROWS)], ckpt_path=str(path))


def test_a_tied_head_is_restored_with_its_embedding(policy_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "whole.ckpt"
    module = SFTModule(init_from=policy_folder, learning_rate=1e-2)
    saved(module, [demonstration_step(ROWS)], path)
    again = SFTModule(init_from=policy_folder)
    again.configure_model()
    again.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    inner = again.policy.model
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    assert torch.equal(inner.lm_head.weight, module.policy.model.lm_head.weight)


def test_hparams_contain_no_pickled_code() -> None:
    class Odd:
        pass

    found = plain({"a": (1, 2.0), "b": {"c": None}, "d": LoraSettings(r=1), "e": low_words, "f": Odd()})
    assert found["a"] == [1, 2.0] and found["b"] == {"c": None} and found["d"]["r"] == 1
    assert found["e"] == f"{__name__}.low_words"
    assert re.search(r"Odd$", found["f"])
