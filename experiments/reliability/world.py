"""Runs for the drills: every stage on a few rows of the assistant world, with steps of some 10 milliseconds."""

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.types import Episode, Prompt, Reply
from rlhf_lightning.worlds.assistant import make_config, make_tokenizer, write_world


class SlowReplies:
    """Environment that rewards a turn by its length and replies after a random delay."""

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Return the data's prompt."""
        return row["prompt"]

    def reply(self, episode: Episode) -> Reply:
        """Reply to the policy's last turn."""
        time.sleep(random.random() * 0.02)
        return Reply("more", reward=len(episode.said) % 7 / 7)


class Stage(NamedTuple):
    """A stage of the drills.

    Attributes:
        module: class of the stage.
        data: data class and file of its rows.
        flags: additional settings.
        phases: phases in which the run is killed.
    """

    module: str
    data: tuple[str, str]
    flags: tuple[str, ...] = ()
    phases: tuple[str, ...] = ("saving", "update", "validation")

    @property
    def on_policy(self) -> bool:
        """Whether its steps are rollouts."""
        return "rollout" in self.phases


ROLLOUTS = (
    "--model.scorer", "{world}/scorer", "--model.max_new_tokens", "8", "--model.ppo_epochs", "2",
    "--model.mini_batch_size", "4", "--data.rollouts", "5", "--checkpoint.every_n_rollouts", "1",
    "--trainer.val_check_interval", "3",
)  # fmt: skip
GROUPS = (*ROLLOUTS, "--data.samples_per_prompt", "2")
ENVIRONMENT = {
    "class_path": "rlhf_lightning.environments.FaultTolerantEnvironment",
    "init_args": {"environment": {"class_path": "world.SlowReplies"}, "threads": 2},
}
EPISODES = (
    "--data.environment", json.dumps(ENVIRONMENT), "--data.max_turns", "4", "--model.stop_strings", '["e"]',
    "--model.sampling_batch_size", "3",
)  # fmt: skip
PHASES = ("saving", "rollout", "update", "validation")
STEPS = ("--data.rows", "56", "--checkpoint.every_n_updates", "2", "--trainer.val_check_interval", "4")
STAGES = {
    "sft": Stage("SFTModule", ("SFTDataModule", "demonstrations"), STEPS),
    "reward": Stage("RewardModule", ("PreferenceDataModule", "pairs_train"), STEPS),
    "dpo": Stage("DPOModule", ("PreferenceDataModule", "pairs_train"), STEPS),
    "kto": Stage("KTOModule", ("UnpairedDataModule", "pairs_train"), STEPS),
    "ppo": Stage(
        "PPOModule",
        ("PromptDataModule", "prompts_train"),
        (*ROLLOUTS, "--model.kl_target", "0.5", "--model.kl_horizon", "100"),
        PHASES,
    ),
    "grpo": Stage("GRPOModule", ("PromptDataModule", "prompts_train"), GROUPS, PHASES),
    "episodes": Stage("GRPOModule", ("PromptDataModule", "prompts_train"), (*GROUPS, *EPISODES), ("rollout",)),
}
STRATEGIES = {
    "single": (),
    "ddp": ("--trainer.strategy", "ddp", "--trainer.devices", "2"),
    "fsdp2": (
        "--trainer.strategy",
        '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": {"data_parallel_size": 2, '
        '"tensor_parallel_size": 1}}',
        "--trainer.devices",
        "2",
    ),
}
RANKS = {"single": 1, "ddp": 2, "fsdp2": 2}


def make_world(folder: Path) -> Path:
    """Write rows, a random policy and a random reward model."""
    write_world(folder, seed=0, demonstrations=80, pairs_train=80, pairs_test=8)
    config = make_config(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
        config.num_labels = 1
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "scorer")
    for name in ("policy", "scorer"):
        make_tokenizer().save_pretrained(folder / name)
    return folder


def command(name: str, world: Path, strategy: str = "single", lora: bool = False) -> list[str]:
    """Return the command line of a stage."""
    stage = STAGES[name]
    kind, rows = stage.data
    flags = [
        "fit", "--model", stage.module, "--model.init_from", f"{world}/policy", "--model.learning_rate", "1e-3",
        "--data", kind, "--data.source", f"{world}/{rows}.jsonl", "--data.eval_rows", "8", "--data.batch_size", "8",
        "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--samples.prompts", "2",
        "--samples.every_n_updates", "3", "--samples.max_new_tokens", "8",
    ]  # fmt: skip
    flags += [flag.replace("{world}", str(world)) for flag in stage.flags]
    if lora:
        # Dropout masks come from each rank's own random numbers, and on-policy ratios have to start at 1.
        flags += ["--model.lora.r", "2", "--model.lora.dropout", "0.0" if stage.on_policy else "0.1"]
    return [*flags, *STRATEGIES[strategy]]
