"""Test common Lightning usage: each works, or is refused with the remedy."""

import copy
import csv
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from conftest import refused
from datasets import Dataset, DatasetDict
from lightning.pytorch import callbacks as lightning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader, grad_norm
from tiny_models import (
    assert_same,
    demonstration_step,
    preference_step,
    quiet_trainer,
    random_pairs,
    random_rows,
    weights_of,
)
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from rlhf_lightning.data import PreferenceDataModule, PromptDataModule, SFTDataModule
from rlhf_lightning.modules import DPOModule, GRPOModule, PPOModule, RewardModule, SFTModule
from rlhf_lightning.runs import RunProgress
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.trainer_checks import check_hooks, check_loader

ROWS = [{"prompt": f"w{n}", "completion": f"w{n % 7} w{n % 5}"} for n in range(24)]
PAIRS = [{"prompt": f"w{n}", "chosen": f"w{n % 7} w1", "rejected": "w2"} for n in range(24)]


def lengths(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def sft(folder: str, **settings: Any) -> SFTModule:
    return SFTModule(init_from=folder, **{"learning_rate": 5e-3, "self_check": False, **settings})


def rows(**settings: Any) -> SFTDataModule:
    return SFTDataModule(ROWS, **{"batch_size": 6, "eval_rows": 6, **settings})


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def fit(folder: str, callbacks: Any = (), module: Any = None, data: Any = None, **settings: Any) -> Any:
    module = module or sft(folder)
    quiet_trainer(callbacks=list(callbacks), **settings).fit(module, data or rows())
    return module


# -- the Tuner ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SFT", "DPO", "reward model"])
def test_lr_find_suggests_a_rate_and_changes_no_other_state(policy_folder: str, kind: str, tmp_path: Path) -> None:
    make = {"SFT": SFTModule, "DPO": DPOModule, "reward model": RewardModule}[kind]
    module: Any = make(init_from=policy_folder, learning_rate=1e-5, self_check=False)
    data = rows() if kind == "SFT" else PreferenceDataModule(PAIRS, batch_size=6)
    trainer = quiet_trainer(default_root_dir=tmp_path, max_epochs=100)
    before = weights_of(fresh(make, policy_folder))
    found = Tuner(trainer).lr_find(module, datamodule=data, num_training=30, min_lr=1e-5, max_lr=0.5)
    assert found is not None and len(found.results["loss"]) >= 20
    assert all(torch.isfinite(torch.tensor(found.results["loss"])))
    assert 1e-5 < found.suggestion() < 0.5 and module.learning_rate == found.suggestion()
    assert module.updates == 0
    assert_same({name: weights_of(module)[name] for name in before}, before, rtol=0, atol=0)
    quiet_trainer(max_steps=2).fit(module, data)
    assert module.updates == 2


def fresh(make: Any, folder: str) -> Any:
    module = make(init_from=folder, self_check=False)
    module.configure_model()
    return module


def test_lr_find_of_an_on_policy_objective_is_refused_with_the_remedy(policy_folder: str) -> None:
    module = GRPOModule(init_from=policy_folder, scorer=lengths)
    data = PromptDataModule([{"prompt": "w1"}] * 4, samples_per_prompt=2)
    with refused("learning-rate-finder", "compare the score of short runs"):
        Tuner(quiet_trainer()).lr_find(module, datamodule=data)


def test_scale_batch_size_tunes_only_the_micro_batch_size(policy_folder: str, tmp_path: Path) -> None:
    module, data, seen = sft(policy_folder), rows(), []
    forward = module.training_step

    def counted(step: Any, batch_idx: int) -> Any:
        seen.append(len(step.micro_batches))
        return forward(step, batch_idx)

    module.training_step = counted  # type: ignore[method-assign]
    trainer = quiet_trainer(default_root_dir=tmp_path)
    found = Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=1)
    assert data.batch_size == 6 and data.micro_batch_size == found
    assert seen == [3, 2] and module.updates == 0  # six rows, two and four at a time


def test_scale_batch_size_without_a_datamodule_is_refused(policy_folder: str) -> None:
    with refused("batch-size-finder", "micro_batch_size can be tuned"):
        quiet_trainer(callbacks=[lightning.BatchSizeFinder()]).fit(sft(policy_folder), DataLoader(ROWS))  # type: ignore[arg-type]


# -- checkpoints and copies --------------------------------------------------------------------------------------------


def test_load_from_checkpoint_restores_settings_and_weights(policy_folder: str, tmp_path: Path) -> None:
    keep = lightning.ModelCheckpoint(tmp_path, "{epoch}-{step}", save_last=True)
    trained = fit(policy_folder, [keep], enable_checkpointing=True)
    loaded = SFTModule.load_from_checkpoint(keep.best_model_path, weights_only=True)
    assert loaded.hparams["learning_rate"] == 5e-3 and loaded.updates == trained.updates == 3
    assert_same(weights_of(loaded), weights_of(trained), rtol=0, atol=0)


@pytest.mark.parametrize("which", ["best", "last"])
def test_evaluation_accepts_best_and_last_as_ckpt_path(policy_folder: str, which: str, tmp_path: Path) -> None:
    keep = lightning.ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    trainer = quiet_trainer(callbacks=[keep], enable_checkpointing=True)
    module, data = sft(policy_folder), rows()
    trainer.fit(module, data)
    before = float(trainer.callback_metrics["val/loss"])
    (found,) = trainer.validate(module, data, ckpt_path=which, weights_only=True, verbose=False)
    assert found["val/loss"] == pytest.approx(before)


def test_a_manually_saved_checkpoint_resumes(policy_folder: str, tmp_path: Path) -> None:
    trainer, module, data = quiet_trainer(max_steps=2), sft(policy_folder), rows()
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    again = sft(policy_folder)
    quiet_trainer(max_epochs=2).fit(again, data, ckpt_path=str(tmp_path / "mine.ckpt"), weights_only=True)
    assert again.updates == 2 + 3


def test_copies_of_a_module_are_independent(policy_folder: str) -> None:
    module = fit(policy_folder)
    twin = copy.deepcopy(sft(policy_folder))
    assert twin.hparams == sft(policy_folder).hparams and pickle.loads(pickle.dumps(rows())).batch_size == 6
    fit(policy_folder, module=twin)
    assert_same(weights_of(twin), weights_of(module), rtol=0, atol=0)


def test_a_second_fit_continues_training(policy_folder: str) -> None:
    module = fit(policy_folder)
    fit(policy_folder, module=module)
    assert module.updates == 6


# -- hooks, metrics, logging -------------------------------------------------------------------------------------------


def test_self_log_and_hooks_work_in_a_subclass(policy_folder: str, tmp_path: Path) -> None:
    norms: list[float] = []

    class Mine(SFTModule):
        def training_step(self, step: Any, batch_idx: int) -> Any:
            self.log("mine", 2.0, prog_bar=True)
            return super().training_step(step, batch_idx)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norms.append(sum(float(p.grad.norm()) for p in self.parameters() if p.grad is not None))

    logger = CSVLogger(tmp_path, name="", version="")
    module = Mine(init_from=policy_folder, self_check=False)
    trainer = quiet_trainer(logger=logger, log_every_n_steps=1)
    trainer.fit(module, rows())
    assert len(norms) == 3 and all(norm > 0 for norm in norms)
    assert float(trainer.callback_metrics["mine"]) == 2.0 and float(trainer.progress_bar_metrics["mine"]) == 2.0
    assert {"train/loss", "val/loss"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("on_policy", [False, True])
def test_the_step_of_a_csv_logger_counts_updates(policy_folder: str, on_policy: bool, tmp_path: Path) -> None:
    logger, monitor = CSVLogger(tmp_path, name="", version=""), lightning.LearningRateMonitor(logging_interval="step")
    module, data, each = sft(policy_folder), rows(), 1
    if on_policy:
        module = GRPOModule(init_from=policy_folder, scorer=lengths, max_new_tokens=3, ppo_epochs=2, self_check=False)
        data = PromptDataModule([{"prompt": f"w{n}"} for n in range(4)], batch_size=4, samples_per_prompt=2)
        each = 2
    quiet_trainer(logger=logger, callbacks=[monitor], log_every_n_steps=1, max_epochs=2).fit(module, data)
    found = [int(row["step"]) for row in csv_rows(tmp_path)]
    assert found == sorted(found) and max(found) == module.updates
    assert all(step % each == 0 for step in found)


def test_learning_rate_monitor_names_the_rate_and_its_groups(policy_folder: str, tmp_path: Path) -> None:
    monitor = lightning.LearningRateMonitor()
    fit(policy_folder, [monitor], logger=CSVLogger(tmp_path))
    assert list(monitor.lrs) == ["learning_rate/matrices", "learning_rate/vectors"]


def test_two_loggers_with_a_sparse_logging_interval(policy_folder: str, tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path, name="", version="")]
    fit(policy_folder, logger=loggers, log_every_n_steps=2)
    written = [row["train/loss"] for row in csv_rows(tmp_path) if row["train/loss"]]
    assert len(written) == 1 and list((tmp_path / "board").rglob("events*"))


CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "LambdaCallback": lambda: lightning.LambdaCallback(on_train_batch_end=lambda *_: None),
    "RichProgressBar": lightning.RichProgressBar,
    "TQDMProgressBar": lightning.TQDMProgressBar,
    "RunProgress": RunProgress,
    "RichModelSummary": lambda: lightning.RichModelSummary(max_depth=3),
    "GradientScale": lambda: lightning.LambdaCallback(on_before_optimizer_step=lambda *_: None),
    "ModelPruning": lambda: lightning.ModelPruning("l1_unstructured", amount=0.1),
    "WeightAveraging": lightning.WeightAveraging,
    "ThroughputMonitor": lambda: lightning.ThroughputMonitor(batch_size_fn=lambda step: step.rows),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_other_lightning_callbacks_work(policy_folder: str, name: str, tmp_path: Path) -> None:
    bar = {"enable_progress_bar": True} if "Progress" in name else {}
    logger = CSVLogger(tmp_path) if name == "ThroughputMonitor" else False
    assert fit(policy_folder, [CALLBACKS[name]()], logger=logger, **bar).updates == 3


SETTINGS: dict[str, dict[str, Any]] = {
    "precision": {"precision": "bf16-mixed"},
    "max_time": {"max_time": "00:01:00:00"},
    "reload_dataloaders_every_n_epochs": {"reload_dataloaders_every_n_epochs": 1},
    "inference_mode": {"inference_mode": False},
    "use_distributed_sampler": {"use_distributed_sampler": True},
    "num_sanity_val_steps": {"num_sanity_val_steps": 2},
    "limit_val_batches": {"limit_val_batches": 1},
    "benchmark": {"benchmark": True},
    "enable_model_summary": {"enable_model_summary": True},
    "val_check_interval as a share": {"val_check_interval": 0.5},
    "profiler": {"profiler": "advanced"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_trainer_settings_work(policy_folder: str, name: str, tmp_path: Path) -> None:
    assert fit(policy_folder, default_root_dir=tmp_path, **SETTINGS[name]).updates == 3


def test_estimated_stepping_batches_is_known(policy_folder: str) -> None:
    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert trainer.estimated_stepping_batches == trainer.num_training_batches * 2 == 6

    fit(policy_folder, [Look()], max_epochs=2)


# -- data and models ---------------------------------------------------------------------------------------------------


def test_predict_returns_rows_of_a_datamodule(policy_folder: str) -> None:
    module = sft(policy_folder)
    module.sampling = replace(module.sampling, max_new_tokens=3)
    (found,) = quiet_trainer().predict(module, PromptDataModule([{"prompt": "w1"}], eval_source=[{"prompt": "w2"}]))
    assert [row["prompt"] for row in found] == ["w2"]


def test_predict_checks_the_weights_as_other_commands_do(policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr("rlhf_lightning.training.module.check_weights", lambda model, context: checked.append(model))
    module = SFTModule(init_from=policy_folder)
    module.sampling = replace(module.sampling, max_new_tokens=3)
    quiet_trainer().predict(module, PromptDataModule([{"prompt": "w1"}], eval_source=[{"prompt": "w2"}]))
    assert checked == [module.policy]


def test_a_datamodule_without_a_module_needs_a_tokenizer() -> None:
    data = rows()
    with refused("no-tokenizer-set", "tokenizer"):
        data.prepare_data()


@pytest.mark.parametrize("loader", [DataLoader(ROWS), DataLoader([1])], ids=["dicts", "steps"])
def test_a_loader_as_data_source_is_refused_with_the_remedy(loader: Any) -> None:
    with refused("loader-as-source", "train_dataloaders", "dataset"):
        SFTDataModule(loader)


def test_calling_a_module_is_refused_with_the_remedy(policy_folder: str) -> None:
    with refused("no-forward", "answer", "export"):
        sft(policy_folder)(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("method", ["to_torchscript", "to_onnx"])
def test_lightning_exports_are_refused_with_the_remedy(policy_folder: str, method: str) -> None:
    with refused("no-forward", "export"):
        getattr(sft(policy_folder), method)("model.pt")


def test_freeze_and_unfreeze_work_on_a_module(policy_folder: str) -> None:
    module = sft(policy_folder)
    module.configure_model()
    module.freeze()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    module.unfreeze()
    assert fit(policy_folder, module=module).updates == 3


def test_the_same_seed_gives_the_same_weights(policy_folder: str) -> None:
    weights = []
    for _ in range(2):
        pl.seed_everything(3, verbose=False)
        weights.append(weights_of(fit(policy_folder, data=rows(seed=3))))
    assert_same(weights[0], weights[1], rtol=0, atol=0)


# -- classes of one's own ----------------------------------------------------------------------------------------------


class OwnLoss(SFTModule):
    """Returns a loss, as with automatic optimization."""

    def training_step(self, step: Any, batch_idx: int) -> Any:
        return self.loss_sum(step.micro_batches[0], Meter()) / step.tokens


class Automatic(SFTModule):
    """Enables automatic optimization."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = True


class OwnClipping(SFTModule):
    """Clips in the hook of automatic optimization."""

    def configure_gradient_clipping(self, *args: Any, **settings: Any) -> None:
        raise AssertionError


class OwnRate(SFTModule):
    """Changes hparams instead of the setting."""

    def configure_callbacks(self) -> list[pl.Callback]:
        self.hparams["learning_rate"] = 1.0
        return super().configure_callbacks()


OWN: dict[str, tuple[type[SFTModule], str, str]] = {
    "a loss that is returned": (OwnLoss, "loss-without-update", "super().training_step"),
    "automatic optimization": (Automatic, "automatic-optimization", "leave it False"),
    "configure_gradient_clipping": (OwnClipping, "hook-never-called", "on_before_clip"),
    "changed hparams": (OwnRate, "changed-hparams", "set module.learning_rate"),
}


@pytest.mark.parametrize("name", OWN)
def test_unsupported_overrides_of_a_user_class_are_refused(policy_folder: str, name: str) -> None:
    kind, code, remedy = OWN[name]
    with refused(code, remedy):
        fit(policy_folder, module=kind(init_from=policy_folder, self_check=False))


class OwnOptimizer(SFTModule):
    """Makes its optimizer and schedule in Lightning's two forms."""

    as_lists = False

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return ([optimizer], [schedule]) if self.as_lists else {"optimizer": optimizer, "lr_scheduler": schedule}


@pytest.mark.parametrize("as_lists", [False, True])
def test_a_custom_optimizer_and_schedule_are_used(policy_folder: str, as_lists: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(OwnOptimizer, "as_lists", as_lists)
    module = fit(policy_folder, module=OwnOptimizer(init_from=policy_folder, self_check=False))
    assert module.updates == 3 and module._learning_rate_used == pytest.approx(0.025)


class Logs(SFTModule):
    """Logs a metric of a name without slash."""

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val_mine", 1.0)


@pytest.mark.parametrize("callback", [lightning.EarlyStopping, lightning.ModelCheckpoint])
def test_a_monitor_without_slash_is_refused_unless_a_class_logs_it(
    policy_folder: str, callback: Any, tmp_path: Path
) -> None:
    def made(name: str) -> Any:
        return callback(**({"dirpath": tmp_path} if callback is lightning.ModelCheckpoint else {}), monitor=name)

    with refused("monitor-without-slash", "monitor val/loss"):
        fit(policy_folder, [made("val_loss")], enable_checkpointing=True)
    own, here = Logs(init_from=policy_folder, self_check=False), {"default_root_dir": tmp_path}
    assert fit(policy_folder, [made("val_mine")], module=own, enable_checkpointing=True, **here).updates == 3


@pytest.mark.parametrize(
    ("base", "hook"), [(SFTModule, "on_validation_epoch_end"), (RewardModule, "on_fit_start"), (GRPOModule, "setup")]
)
def test_a_hook_without_super_is_refused(policy_folder: str, base: Any, hook: str) -> None:
    def replaced(self: Any, *given: Any) -> None:
        self.mine = True

    mine, given = type("Mine", (base,), {hook: replaced}), {"scorer": lengths} if base is GRPOModule else {}
    with refused("hook-without-super", f"Mine.{hook} does not call super().{hook}"):
        check_hooks(mine.__new__(mine))
    with refused("hook-without-super", f"Mine.{hook}"):
        fit(policy_folder, module=mine(init_from=policy_folder, **given))
    other = type("Other", (base,), {"on_before_zero_grad": replaced, "training_step": replaced})
    for kind in (base, other, Logs):
        check_hooks(kind.__new__(kind))


class Kept(SFTModule):
    """Saves its own state in checkpoints without calling super()."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1
        if self.updates < 0:
            super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["mine"] == 1
        if self.updates < 0:
            super().on_load_checkpoint(checkpoint)


def test_checkpoint_hooks_without_super_are_refused(policy_folder: str, tmp_path: Path) -> None:
    def made() -> Kept:
        return Kept(init_from=policy_folder, self_check=False)

    trainer, module = quiet_trainer(max_steps=2), made()
    trainer.fit(module, rows())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with refused("lost-progress", "must call super()"):
        quiet_trainer(max_epochs=2).fit(made(), rows(), ckpt_path=str(tmp_path / "a.ckpt"), weights_only=True)


def test_configure_callbacks_and_custom_hparams_work(policy_folder: str, tmp_path: Path) -> None:
    class Mine(SFTModule):
        def __init__(self, mine: int = 3, **settings: Any) -> None:
            super().__init__(**settings)
            self.save_hyperparameters()
            self.mine = mine

        def configure_callbacks(self) -> list[pl.Callback]:
            return [*super().configure_callbacks(), lightning.EarlyStopping("val/loss")]

    trainer, module = quiet_trainer(), Mine(init_from=policy_folder, mine=4, self_check=False)
    trainer.fit(module, rows())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    loaded = Mine.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, learning_rate=1.0)
    assert (loaded.mine, loaded.learning_rate, loaded.updates) == (4, 1.0, 3)


def test_lightnings_gradient_norms_are_logged(policy_folder: str) -> None:
    class Norms(SFTModule):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log_dict(grad_norm(self.policy, 2))

    trainer = quiet_trainer()
    trainer.fit(Norms(init_from=policy_folder, self_check=False), rows())
    assert float(trainer.callback_metrics["grad_2.0_norm_total"]) > 0


def test_callbacks_see_the_backward_pass_and_can_stop_the_run(policy_folder: str) -> None:
    seen: list[str] = []

    class Look(pl.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            seen.append("before")

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            seen.append("after")

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            trainer.should_stop = True

    assert fit(policy_folder, [Look()], max_epochs=4).updates == 1 and seen == ["before", "after"]


def test_on_before_zero_grad_is_called_for_each_update(policy_folder: str) -> None:
    seen: list[Any] = []

    class Look(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append(type(optimizer))

    class Mine(SFTModule):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            seen.append("module")

    fit(policy_folder, [Look()], module=Mine(init_from=policy_folder, self_check=False))
    assert seen == [torch.optim.AdamW, "module"] * 3


def test_validation_means_weight_steps_by_rows(policy_folder: str, recwarn: pytest.WarningsRecorder) -> None:
    class Mine(SFTModule):
        def validation_step(self, step: Any, batch_idx: int) -> None:
            super().validation_step(step, batch_idx)
            self.log("mine", float(step.rows))

    trainer = quiet_trainer()
    trainer.fit(Mine(init_from=policy_folder, self_check=False), rows(eval_batch_size=4))
    assert float(trainer.callback_metrics["mine"]) == pytest.approx((4 * 4 + 2 * 2) / 6)
    assert not [one for one in recwarn if "ambiguous" in str(one.message)]


@pytest.mark.parametrize("text", ["💡 Tip: For seamless cloud logging", "GPU available: False, used: False"])
def test_lightnings_advertisements_are_silenced_in_scripts(text: str) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    assert not logger.filter(logging.LogRecord("x", logging.INFO, "f", 1, text, None, None))


def test_importing_a_module_prints_nothing() -> None:
    """Some libraries log during import: bitsandbytes reports missing kernels that training does not use."""
    code = "import rlhf_lightning\nrlhf_lightning.DPOModule, rlhf_lightning.PreferenceDataModule"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_truncated_completions_warn_once(policy_folder: str, recwarn: pytest.WarningsRecorder) -> None:
    module = GRPOModule(init_from=policy_folder, scorer=lengths, max_new_tokens=1, self_check=False)
    prompts = [{"prompt": f"w{n}"} for n in range(8)]
    quiet_trainer(max_steps=3).fit(module, PromptDataModule(prompts, batch_size=8, samples_per_prompt=2))
    told = [text for one in recwarn if "ended before model.max_new_tokens=1" in (text := str(one.message))]
    assert len(told) == 1 and "raise it" in told[0]


@pytest.mark.parametrize("kind", [PPOModule, RewardModule])
def test_a_new_head_prints_one_line_and_no_epoch_is_negative(
    policy_folder: str, kind: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"scorer": lengths, "max_new_tokens": 2} if kind is PPOModule else {}
    data = PromptDataModule(PAIRS, batch_size=8) if kind is PPOModule else PreferenceDataModule(PAIRS, batch_size=8)
    bar, off = lightning.RichProgressBar(), {"logger": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", callbacks=[bar], **off)
    with caplog.at_level(logging.INFO):
        trainer.fit(kind(init_from=policy_folder, self_check=False, **settings), data)
    written = "".join(capfd.readouterr())
    assert "LOAD REPORT" not in written + caplog.text and "/-2" not in written
    assert bar._get_train_description(0).strip() == "Epoch 0"
    assert sum("has no score head: a new one is drawn" in one.message for one in caplog.records) == 1


# -- before and without a Trainer --------------------------------------------------------------------------------------


def test_using_weights_before_loading_is_refused(policy_folder: str) -> None:
    module = sft(policy_folder)
    for use in (module.make_optimizer, module.configure_optimizers, lambda: module.load_state_dict({})):
        with refused("weights-not-loaded", "configure_model()"):
            use()  # type: ignore[operator]
    module.configure_model()
    assert isinstance(module.make_optimizer(), torch.optim.AdamW)
    with refused("no-trainer", "make_optimizer()"):
        module.configure_optimizers()


def test_state_dict_loads_into_another_module(policy_folder: str, tmp_path: Path) -> None:
    module, other = fit(policy_folder), sft(policy_folder)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    other.configure_model()
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert_same(weights_of(other), weights_of(module), rtol=0, atol=0)


def test_weights_in_half_precision_are_refused(policy_folder: str) -> None:
    for change in (sft(policy_folder).half, sft(policy_folder).bfloat16):
        with refused("half-weights", "bf16-mixed"):
            change()


def test_a_checkpoint_as_model_folder_is_refused(policy_folder: str, tmp_path: Path) -> None:
    trainer, module = quiet_trainer(), sft(policy_folder)
    trainer.fit(module, rows())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with refused("no-model", "is a file", "rlhf export"):
        fit(policy_folder, module=sft(str(tmp_path / "a.ckpt")))


def test_resuming_from_a_weights_only_checkpoint_is_refused(policy_folder: str, tmp_path: Path) -> None:
    keep = lightning.ModelCheckpoint(tmp_path, save_weights_only=True)
    fit(policy_folder, [keep], enable_checkpointing=True)
    with refused("weights-alone", "load_from_checkpoint"):
        quiet_trainer(max_epochs=2).fit(sft(policy_folder), rows(), ckpt_path=keep.best_model_path, weights_only=True)


# -- loaders of one's own ----------------------------------------------------------------------------------------------


def steps(count: int = 3, make: Any = demonstration_step, of: Any = random_rows) -> list[Any]:
    return [make(of(2, seed=number)) for number in range(count)]


LOADERS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "nothing": (lambda: None, "no-data", "trainer.fit(module, datamodule)"),
    "collated Steps": (lambda: DataLoader(steps()), "collated-steps", "batch_size=None"),
    "Steps of another batch": (
        lambda: DataLoader(steps(make=preference_step, of=random_pairs), batch_size=None), "wrong-batch-type",
        "takes DemonstrationBatch",
    ),
    "a list of rows": (lambda: ROWS, "no-step", "DataModule"),
    "loaders by name": (lambda: {"a": DataLoader(steps(), batch_size=None)}, "no-step", "DataModule"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_of_other_batches_is_refused(policy_folder: str, name: str) -> None:
    make, code, remedy = LOADERS[name]
    with refused(code, remedy):
        quiet_trainer().fit(sft(policy_folder), make())


def test_shuffled_and_custom_step_loaders_work(policy_folder: str) -> None:
    class Mine(SFTModule):
        def train_dataloader(self) -> Any:
            return DataLoader(steps(), batch_size=None, shuffle=True)

    module = Mine(init_from=policy_folder, self_check=False)
    quiet_trainer().fit(module)
    assert module.updates == 3


def test_several_validation_loaders_are_refused(policy_folder: str) -> None:
    held_out = [DataLoader(steps(1), batch_size=None) for _ in range(2)]
    with refused("several-loaders", "trainer.validate"):
        quiet_trainer().fit(sft(policy_folder), DataLoader(steps(), batch_size=None), held_out)


@pytest.mark.parametrize("deals", [False, True])
def test_a_distributed_sampler_over_steps_is_refused(deals: bool) -> None:
    trainer: Any = quiet_trainer(use_distributed_sampler=deals)
    sampler: Any = DistributedSampler(ROWS, num_replicas=2, rank=0)  # type: ignore[arg-type]
    trainer.fit_loop._combined_loader = CombinedLoader(DataLoader(ROWS, sampler=sampler))  # type: ignore[arg-type]
    if not deals:
        return check_loader(trainer, None)
    with refused("dealt-steps", "use_distributed_sampler=False"):
        check_loader(trainer, None)


def test_steps_with_fewer_rows_than_asked_are_announced(policy_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    """A rollout repeats prompts, and a step is smaller than asked."""
    grpo = GRPOModule(init_from=policy_folder, scorer=lengths, max_new_tokens=2, mini_batch_size=16, self_check=False)
    prompts = PromptDataModule([{"prompt": "w7"}, {"prompt": "w8"}], batch_size=12, samples_per_prompt=4)
    texts = SFTDataModule([{"text": f"w{number} w9"} for number in range(7, 10)], batch_size=4)
    with caplog.at_level(logging.INFO):
        for module, data in ((grpo, prompts), (sft(policy_folder), texts)):
            quiet_trainer(max_epochs=1).fit(module, data)
    assert grpo.episodes == 12 and grpo.updates == 1
    for sentence in (
        "A rollout takes 3 prompts (data.batch_size / data.samples_per_prompt), but the data has 2",
        "model.mini_batch_size is 16, but a rollout has 12 episodes",
        "data.batch_size is 4, but an epoch has 3 rows: an optimizer step takes 3 rows.",
    ):
        assert sum(sentence in one.message for one in caplog.records) == 1


def test_prediction_writers_get_the_rows(policy_folder: str) -> None:
    got: list[Any] = []

    class Writer(lightning.BasePredictionWriter):
        def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *_: Any) -> None:
            got.extend(prediction)

    module, data = sft(policy_folder), PromptDataModule([{"prompt": "w1"}], eval_source=[{"prompt": "w2"}])
    module.sampling = replace(module.sampling, max_new_tokens=3)
    quiet_trainer(callbacks=[Writer("batch")]).predict(module, data, return_predictions=False)
    assert [row["prompt"] for row in got] == ["w2"]


def test_a_run_without_training_batches_is_refused(policy_folder: str) -> None:
    with refused("no-updates", "limit_train_batches"):
        fit(policy_folder, limit_train_batches=0)


def test_backbone_finetuning_is_refused_with_the_callback_to_use(policy_folder: str) -> None:
    with refused("backbone-finetuning", "BaseFinetuning"):
        fit(policy_folder, [lightning.BackboneFinetuning()])


# -- objects of other libraries, and what is not there yet -------------------------------------------------------------


def text_alone(text: str) -> float:
    return 1.0


@pytest.mark.parametrize("scorer", [text_alone, torch.nn.Linear(2, 1)], ids=["one text", "a model"])
def test_a_scorer_with_the_wrong_signature_is_refused(policy_folder: str, scorer: Any) -> None:
    module, data = GRPOModule(init_from=policy_folder, scorer=scorer), PromptDataModule([{"prompt": "w1"}] * 4)
    with refused("scorer-call"):
        quiet_trainer().fit(module, data)


SOURCES: dict[str, tuple[Callable[[], Any], str]] = {
    "a frame of pandas": (lambda: pd.DataFrame(ROWS), "from_pandas"),
    "columns": (lambda: {"prompt": ["w1"], "completion": ["w2"]}, "from_dict"),
    "a generator": (lambda: iter(ROWS), "list(rows)"),
    "a set of splits": (lambda: DatasetDict(train=Dataset.from_list(ROWS)), "dataset['train']"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_rows_in_another_format_are_refused_with_the_accepted_formats(name: str) -> None:
    make, remedy = SOURCES[name]
    with refused("invalid-source", remedy):
        SFTDataModule(make())


def test_a_loader_before_setup_is_refused(policy_folder: str) -> None:
    with refused("not-set-up", "super().setup(stage)"):
        rows().train_dataloader()


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [("policy", "weights-not-loaded", "configure_model()"), ("generate", "no-generate", "answer")],
)
def test_missing_lightning_attributes_are_explained(policy_folder: str, name: str, code: str, words: str) -> None:
    module = sft(policy_folder)
    with refused(code, words):
        getattr(module, name)
    assert not hasattr(module, name)


def test_spawned_processes_are_refused(policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.training.module.get_spawning_popen", object)
    with refused("spawned-ranks", "use ddp"):
        pickle.dumps(sft(policy_folder))
