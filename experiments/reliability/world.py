"""Runs for the drills: every stage on a few rows of the assistant world, with steps of some 10 milliseconds."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.worlds.assistant import make_config, make_tokenizer, write_world


class Stage(NamedTuple):
    """A stage of the drills.

    Attributes:
        module: class of the stage.
        data: data class and file of its rows.
        flags: additional settings.
        on_policy: whether its steps are rollouts.
    """

    module: str
    data: tuple[str, str]
    flags: tuple[str, ...] = ()
    on_policy: bool = False


ROLLOUTS = (
    "--model.scorer", "{world}/scorer", "--model.max_new_tokens", "8", "--model.ppo_epochs", "2",
    "--model.mini_batch_size", "4", "--data.rollouts", "5", "--checkpoint.every_n_rollouts", "1",
    "--trainer.val_check_interval", "3",
)  # fmt: skip
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
        on_policy=True,
    ),
    "grpo": Stage(
        "GRPOModule", ("PromptDataModule", "prompts_train"), (*ROLLOUTS, "--data.samples_per_prompt", "2"), True
    ),
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
    flags += [flag.format(world=world) for flag in stage.flags]
    if lora:
        # Dropout masks come from each rank's own random numbers, and on-policy ratios have to start at 1.
        flags += ["--model.lora.r", "2", "--model.lora.dropout", "0.0" if stage.on_policy else "0.1"]
    return [*flags, *STRATEGIES[strategy]]
