"""Test custom optimizers and schedulers: accepted forms, refusals, and resume."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import refused
from lightning.pytorch.cli import ReduceLROnPlateau
from tiny_models import demonstration_step, fit, quiet_trainer, random_rows
from tiny_run import BASIC, NumbersDataModule, SlopeModule
from torch import nn
from torch.optim.lr_scheduler import StepLR

from rlhf_lightning.commands.train import run
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.planning.setup_from_config import optimizer_bytes
from rlhf_lightning.recipes import resolve_recipe
from rlhf_lightning.training.checkpoint_state import plain
from rlhf_lightning.training.muon import MuonAdamW, mark_layers

PLAIN = [part for part in BASIC if part not in ("--model.learning_rate", "0.1")]
SGD = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--model.optimizer.momentum", "0.5"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def settings_of(module: Any) -> dict[str, Any]:
    """Return the settings of the first parameter group after training."""
    group = module.optimizers(use_pl_optimizer=False).param_groups[0]
    return {name: value for name, value in group.items() if name != "params"}


def run_plain(module: SlopeModule, **settings: Any) -> None:
    """Fit without the command line."""
    quiet_trainer(**settings).fit(module, NumbersDataModule())


# -- which one --------------------------------------------------------------------------------------------------------


def test_optimizers_from_command_line_and_python_are_equivalent() -> None:

    told = run(["fit", *PLAIN, *SGD, "--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "3"])
    module = SlopeModule(
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.5), lr_scheduler=partial(StepLR, step_size=3)
    )
    run_plain(module, max_epochs=1)
    assert isinstance(told.trainer.optimizers[0], torch.optim.SGD)
    assert torch.equal(told.model.line.weight, module.line.weight)
    assert settings_of(module)["lr"] == pytest.approx(0.1 * 0.1**2)  # stepped once per update: at 3 and 6 of 8


def test_optimizer_in_yaml_and_in_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "sgd.yaml"
    file.write_text(
        "model:\n  class_path: tiny_run.SlopeModule\n  init_args:\n    optimizer:\n      class_path: torch.optim.SGD\n"
        "      init_args: {lr: 0.1}\ndata: tiny_run.NumbersDataModule\n"
    )
    first = run(["fit", "--config", str(file)])
    checkpoint = first.folder / "checkpoints" / "last.ckpt"
    kept = torch.load(checkpoint, weights_only=True)["hyper_parameters"]["optimizer"]
    assert kept["class_path"] == "torch.optim.SGD" and kept["init_args"]["lr"] == 0.1
    again = run(["fit", *PLAIN, "--ckpt_path", str(checkpoint), "--run_name", "more", "--trainer.max_epochs", "2"])
    assert isinstance(again.trainer.optimizers[0], torch.optim.SGD)
    read = SlopeModule.load_from_checkpoint(str(checkpoint), weights_only=True)
    assert read.optimizer is not None


def test_a_partial_is_saved_as_class_path_and_init_args() -> None:
    found = plain({"optimizer": partial(torch.optim.SGD, lr=0.1)})
    assert found == {"optimizer": {"class_path": "torch.optim.sgd.SGD", "init_args": {"lr": 0.1}}}
    module = SlopeModule(optimizer=found["optimizer"])
    module.configure_model()
    assert isinstance(module.make_optimizer(), torch.optim.SGD)


@pytest.mark.parametrize(
    ("short", "value", "long"),
    [
        ("learning_rate", 0.3, "optimizer"), ("betas", (0.8, 0.9), "optimizer"), ("adam_eps", 1e-6, "optimizer"),
        ("weight_decay", 0.1, "optimizer"), ("lr_schedule", "cosine", "lr_scheduler"), ("warmup", 3, "lr_scheduler"),
    ],
)  # fmt: skip
def test_giving_both_forms_is_refused(short: str, value: Any, long: str) -> None:
    makes = {"optimizer": partial(torch.optim.SGD, lr=0.1), "lr_scheduler": partial(StepLR, step_size=2)}[long]
    with refused("optimizer-and-short-form", f"model.{short}", f"model.{long}"):
        SlopeModule(**{short: value, long: makes})


def test_family_defaults_do_not_count_as_given_settings() -> None:
    module = SFTModule(
        init_from="unread", optimizer=partial(torch.optim.SGD, lr=0.1), lr_scheduler=partial(StepLR, step_size=2)
    )
    assert module.learning_rate == 2e-5
    SFTModule(init_from="unread", optimizer=partial(torch.optim.SGD, lr=0.1), lr_schedule="constant")


def test_invalid_optimizers_are_refused() -> None:
    for optimizer, code in ((lambda weights: weights, "no-optimizer"), ("torch.optim.SDG", "not-importable")):
        module = SlopeModule(optimizer=optimizer)
        module.configure_model()
        with refused(code, "model.optimizer"):
            module.make_optimizer()


def test_plan_counts_the_state_of_the_optimizer() -> None:
    assert optimizer_bytes(SlopeModule()) == 8
    assert optimizer_bytes(SlopeModule(optimizer=partial(torch.optim.SGD, lr=0.1))) == 0
    assert optimizer_bytes(SlopeModule(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))) == 4
    assert optimizer_bytes(SlopeModule(optimizer=torch.optim.Adafactor)) < 0.1
    assert optimizer_bytes(SlopeModule(optimizer=partial(torch.optim.Adam, amsgrad=True))) == pytest.approx(
        12, abs=1e-3
    )


# -- recipes of optimizers --------------------------------------------------------------------------------------------

RECIPES = ("muon", "adamw_8bit", "paged_adamw_8bit")
STATE = {"muon": 4.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0}
"""Bytes of optimizer state per weight of a large matrix."""


def optimizer_of(recipe: str) -> Any:
    """Return the optimizer that a recipe describes, as `model.optimizer` takes it."""
    text = Path(resolve_recipe(f"recipe:optimizer/{recipe}")).read_text(encoding="utf-8")
    return yaml.safe_load(text)["model"]["init_args"]["optimizer"]


def trained_by(optimizer: Any, folder: str, **settings: Any) -> SFTModule:
    """Train a tiny model for a few updates."""
    module = SFTModule(init_from=folder, optimizer=optimizer, lr_schedule="constant", warmup=0.0, **settings)
    fit(module, [demonstration_step(random_rows(4, seed=seed), None) for seed in range(4)])
    return module


@pytest.mark.parametrize("recipe", RECIPES)
def test_optimizer_recipes_train_and_plan_their_memory(recipe: str, policy_folder: str) -> None:
    spec = optimizer_of(recipe)
    if spec["class_path"].startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
    spec["init_args"]["lr"] = 1e-3
    module = trained_by(spec, policy_folder)
    plain = trained_by(partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0), policy_folder)
    before = load_policy(policy_folder).state_dict()
    for name, weight in module.policy.state_dict().items():
        moved, expected = ((one - before[name]).flatten() for one in (weight, plain.policy.state_dict()[name]))
        # Muon's updates have a root mean square of 0.2 lr, AdamW's first ones of about lr.
        assert 0.15 < float(moved.norm() / expected.norm()) < 1.5, name
        assert torch.cosine_similarity(moved, expected, dim=0) > 0.5, name
    assert optimizer_bytes(module) == pytest.approx(STATE[recipe], rel=0.1)


def test_muon_takes_matrices_of_layers_and_adamw_the_rest(policy_folder: str) -> None:
    module = SFTModule(init_from=policy_folder, optimizer=partial(MuonAdamW, lr=1e-3, weight_decay=0.1))
    module.configure_model()
    optimizer, names = module.make_optimizer(), {weight: name for name, weight in module.named_parameters()}
    groups = {group["name"]: [names[weight] for weight in group["params"]] for group in optimizer.param_groups}
    assert groups["layers"] and all(".layers." in name and "norm" not in name for name in groups["layers"])
    assert all("embed" in name or "lm_head" in name for name in groups["matrices"]) and groups["matrices"]
    assert all("norm" in name for name in groups["vectors"]) and groups["vectors"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]

    layers, others = nn.Linear(4, 6, bias=False), nn.Linear(4, 6)
    mark_layers([layers])
    weights = [*layers.parameters(), *others.parameters()]
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    ours = MuonAdamW(weights, lr=0.1, weight_decay=0.1)
    theirs = [
        torch.optim.Muon(copies[:1], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(copies[1:2], lr=0.1, weight_decay=0.1),
        torch.optim.AdamW(copies[2:], lr=0.1, weight_decay=0.0),
    ]
    for _ in range(3):
        for weight, copy in zip(weights, copies, strict=True):
            weight.grad = torch.randn_like(weight)
            copy.grad = weight.grad.clone()
        ours.step()
        for one in theirs:
            one.step()
        for weight, copy in zip(weights, copies, strict=True):
            torch.testing.assert_close(weight, copy)


# -- resuming ---------------------------------------------------------------------------------------------------------


COSINE = ["--model.lr_scheduler", "CosineAnnealingLR", "--model.lr_scheduler.T_max"]


MUON = ["--model.optimizer", "rlhf_lightning.training.muon.MuonAdamW", "--model.optimizer.lr", "0.1"]
EIGHT = ["--model.optimizer", "bitsandbytes.optim.AdamW8bit", "--model.optimizer.lr", "0.1"]


@pytest.mark.parametrize("further", [[], SGD, [*SGD, *COSINE, "16"], MUON, EIGHT])
def test_unchanged_settings_resume_bit_for_bit(further: list[str]) -> None:
    argv = ["fit", *(PLAIN if further else BASIC), *further, "--checkpoint.every_n_updates", "3"]
    argv += ["--trainer.max_epochs", "2", "--checkpoint.keep_last", "null"]
    whole = run([*argv, "--run_name", "whole"])
    middle = whole.folder / "checkpoints" / "update_000009.ckpt"
    resumed = run([*argv, "--run_name", "resumed", "--ckpt_path", str(middle)])
    assert torch.equal(whole.model.line.weight, resumed.model.line.weight)
    assert settings_of(whole.model) == settings_of(resumed.model)


def test_a_resumed_run_uses_the_new_settings() -> None:
    run(["fit", *BASIC, "--run_name", "first", "--trainer.max_epochs", "2", "--trainer.max_steps", "8"])
    before = torch.load("runs/first/version_0/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    asked = ["--model.learning_rate", "0.2", "--model.weight_decay", "0.3", "--model.betas", "[0.5, 0.6]"]
    changed = ["fit", "--resume", "runs/first", *asked, "--model.adam_eps", "1e-4", "--trainer.max_steps", "9"]
    resumed = run(changed)
    found = settings_of(resumed.model)
    assert found["weight_decay"] == 0.3 and found["betas"] == (0.5, 0.6) and found["eps"] == 1e-4
    assert found["initial_lr"] == 0.2 and resumed.trainer.callback_metrics["train/learning_rate"] == pytest.approx(
        0.2 * (1 - 8 / 9)
    )
    state = resumed.trainer.optimizers[0].state[resumed.model.line.weight]
    assert state["step"] == 9  # the moments are those of the previous run, one update later
    assert before["state"][0]["step"] == 8


def test_resume_keeps_moments_and_uses_a_new_schedule() -> None:
    run(["fit", *BASIC, "--run_name", "first"])
    resumed = run(["fit", "--resume", "runs/first", "--trainer.max_epochs", "2", "--model.lr_schedule", "constant"])
    assert settings_of(resumed.model)["lr"] == 0.1


def test_a_custom_scheduler_is_scaled_by_the_new_learning_rate() -> None:
    cosine = [*COSINE, "32"]
    run(["fit", *PLAIN, *SGD, *cosine, "--run_name", "first"])
    resumed = run(["fit", "--resume", "runs/first", "--trainer.max_epochs", "2", "--model.optimizer.lr", "0.4"])
    straight = run(["fit", *PLAIN, *SGD, *cosine, "--trainer.max_epochs", "2", "--run_name", "straight"])
    assert settings_of(resumed.model)["lr"] == pytest.approx(4 * settings_of(straight.model)["lr"])
    longer = run(["fit", "--resume", "runs/first", "--trainer.max_epochs", "3", "--model.lr_scheduler.T_max", "48"])
    assert longer.trainer.lr_scheduler_configs[0].scheduler.T_max == 48


def test_resuming_with_another_optimizer_class_is_refused() -> None:
    run(["fit", *BASIC, "--run_name", "first"])
    with refused("another-optimizer", "AdamW", "SGD"):
        run(["fit", "--resume", "runs/first", "--trainer.max_epochs", "2", "--model.learning_rate", "1e-5", *SGD])


# -- schedulers that look at a metric ---------------------------------------------------------------------------------


def test_reduce_on_plateau_steps_at_each_validation() -> None:
    impatient = partial(ReduceLROnPlateau, monitor="val/loss", patience=0, factor=0.5, threshold=1.0)
    module = SlopeModule(lr_scheduler=impatient, learning_rate=0.1)

    run_plain(module, max_epochs=4)
    assert settings_of(module)["lr"] == pytest.approx(0.1 * 0.5**4)


def test_a_plateau_needs_a_metric_that_validation_logs() -> None:
    argv = [
        "fit",
        *BASIC,
        "--model.lr_scheduler",
        "lightning.pytorch.cli.ReduceLROnPlateau",
        "--model.lr_scheduler.monitor",
    ]
    with refused("unknown-monitor", "val/nothing", "val/loss"):
        run([*argv, "val/nothing"])
    with refused("plateau-without-validation", "limit_val_batches"):
        run([*argv, "val/loss", "--trainer.limit_val_batches", "0"])
    module = SlopeModule(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with refused("plateau-without-monitor", "lightning.pytorch.cli.ReduceLROnPlateau"):
        run_plain(module)
