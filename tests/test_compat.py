"""Test the use of other packages' private API: one test per function of compat.py, whose message says what changed."""

import inspect
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import pytest
import torch
from datasets import Dataset
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from tiny_models import tiny_config
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, MixtralConfig, MixtralModel

from rlhf_lightning import compat
from rlhf_lightning.commands.train import RlhfCLI
from rlhf_lightning.commands.train_settings import SettingsCLI


class Line(LightningModule):
    """A model with one weight that takes its own optimizer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.line = torch.nn.Linear(1, 1)
        self.seen: list[Any] = []

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.zeroed = optimizer

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        compat.call_before_zero_grad(self.trainer, optimizer)
        optimizer.zero_grad()
        assert compat.logged_batch(self.trainer) is batch, "the trainer's results no longer hold the batch"
        self.manual_backward(self.line(batch).sum())
        optimizer.step()

    def on_train_batch_end(self, *_: Any) -> None:
        follows = compat.validation_follows(self.trainer), compat.epoch_is_done(self.trainer)
        compat.set_logged_step(self.trainer, 7)
        self.seen.append((*follows, sorted(compat.dump_checkpoint(self.trainer))))

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", self.line(batch).sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def fitted(tmp_path: Any) -> Line:
    module, data = Line(), DataLoader(torch.ones(2, 1))
    settings: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    logger = TensorBoardLogger(tmp_path)
    Trainer(max_epochs=1, devices=1, logger=logger, num_sanity_val_steps=0, **settings).fit(module, data, data)
    return module


def test_lightning_attaches_its_trainer_to_a_module(fitted: Line) -> None:
    assert compat.attached_trainer(Line()) is None, "LightningModule._trainer is no longer None before a fit"
    assert compat.attached_trainer(fitted) is fitted.trainer, "LightningModule._trainer is no longer the trainer"


def test_lightning_calls_hooks_by_their_name(fitted: Line) -> None:
    assert fitted.zeroed.optimizer is not None, "on_before_zero_grad was not called"
    assert compat.logged_batch(fitted.trainer) is None, "the trainer's results hold a batch after the fit"


def test_lightning_gives_a_trainer_no_datamodule_until_it_has_one(fitted: Line) -> None:
    assert compat.attached_datamodule(fitted.trainer) is None
    fitted.trainer.datamodule = given = object()  # type: ignore[attr-defined]
    assert compat.attached_datamodule(fitted.trainer) is given, "Trainer.datamodule is no longer the DataModule"


def test_lightning_exposes_validation_and_epoch_end_conditions(fitted: Line) -> None:
    found = [seen[:2] for seen in fitted.seen]
    assert found == [(False, False), (True, True)], "_should_check_val_fx or _is_training_done mean something else now"


def test_lightning_checkpoints_have_the_keys_that_are_patched(fitted: Line) -> None:
    assert {"loops", "state_dict", "optimizer_states", "callbacks", "lr_schedulers"} <= set(fitted.seen[0][2]), (
        "dump_checkpoint leaves out a part"
    )


def test_lightning_logs_at_the_step_that_was_set(fitted: Line) -> None:
    assert fitted.trainer.fit_loop.epoch_loop._batches_that_stepped == 8, (
        "_batches_that_stepped is no longer raised by 1 after each training step"
    )


def test_lightning_keeps_the_loader_state_attributes(fitted: Line) -> None:
    loop = fitted.trainer.fit_loop
    names = ("_combined_loader_states_to_load", "_data_fetcher", "_load_combined_loader_states")
    gone = [name for name in names if not hasattr(loop, name)]
    assert not gone, f"Lightning's fit loop has no {gone}"
    compat.restore_loader_position(fitted.trainer)


def test_lightning_names_the_cluster_environment(fitted: Line) -> None:
    found = type(compat.cluster_environment(fitted.trainer)).__name__
    assert found.endswith("Environment"), f"_accelerator_connector.cluster_environment is {found}"


def test_lightning_keeps_the_data_source_attributes(fitted: Line) -> None:
    assert isinstance(compat.given_data(fitted.trainer), DataLoader), "fit_loop._data_source is no longer the loader"
    assert isinstance(compat.held_out_data(fitted.trainer), DataLoader), "val_loop._data_source is no longer the loader"
    assert compat.given_data(Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)) is None


@pytest.mark.parametrize("deals", [False, True])
def test_lightning_keeps_the_distributed_sampler_attribute(deals: bool) -> None:
    trainer = Trainer(use_distributed_sampler=deals, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert compat.deals_out_loaders(trainer) is deals, "the trainer keeps use_distributed_sampler elsewhere"


def test_lightning_keeps_the_period_attributes_of_model_checkpoint() -> None:
    assert compat.checkpoint_period(ModelCheckpoint(every_n_train_steps=3)) == (3, None), (
        "ModelCheckpoint keeps its periods elsewhere"
    )
    assert compat.checkpoint_period(ModelCheckpoint())[0] == 0, "ModelCheckpoint has another default period"


def test_lightning_keeps_the_name_that_a_batch_size_finder_tunes() -> None:
    finder = BatchSizeFinder(batch_arg_name="rows")
    assert compat.tuned_setting(finder) == "rows", "BatchSizeFinder keeps batch_arg_name elsewhere"
    compat.set_tuned_setting(finder, "others")
    used = inspect.getsource(BatchSizeFinder.scale_batch_size)
    assert finder._batch_arg_name == "others" and "_batch_arg_name" in used, "BatchSizeFinder no longer reads the name"


def test_lightnings_rich_bar_describes_epochs_with_the_changed_method() -> None:
    bar: Any = RichProgressBar()
    bar._trainer = SimpleNamespace(max_epochs=-1)
    compat.describe_endless_epochs(bar)
    assert bar._get_train_description(0).strip() == "Epoch 0", "RichProgressBar._get_train_description changed"
    calls = inspect.getsource(RichProgressBar).count("_get_train_description(")
    assert calls > 1, "RichProgressBar no longer calls _get_train_description"


def test_lightning_keeps_the_mesh_size_attributes() -> None:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    assert compat.mesh_sizes(strategy) == (2, 1), "ModelParallelStrategy keeps its sizes elsewhere"


def test_lightning_cli_has_the_used_methods() -> None:
    assert "_subcommand_parsers" in inspect.getsource(LightningCLI), "LightningCLI._subcommand_parsers is gone"
    assert list(inspect.signature(LightningCLI._get).parameters)[1:3] == ["config", "key"], "LightningCLI._get changed"
    parsers = compat.subcommand_parsers(SimpleNamespace(_subcommand_parsers={"fit": 1}))
    assert parsers == {"fit": 1}
    ran: list[dict[str, Any]] = []
    trainer = SimpleNamespace(fit=lambda **given: ran.append(given))
    compat.run_subcommand(SimpleNamespace(trainer=trainer, _prepare_subcommand_kwargs=lambda _: {"model": 1}), "fit")
    assert ran == [{"model": 1}], "LightningCLI._run_subcommand no longer calls the trainer's method"
    stand_in = SimpleNamespace(_get=lambda settings, name: settings[name])
    assert compat.setting_of(stand_in, {"model": 2}, "model") == 2
    names = {*vars(RlhfCLI), *vars(SettingsCLI)}
    overridden = {name for name in names if name.startswith("_") and not name.startswith("__")}
    gone = sorted(name for name in overridden if not hasattr(LightningCLI, name))
    assert not gone, f"RlhfCLI overrides {gone}, which LightningCLI no longer calls"


def test_tensorboard_writes_several_values_as_one_event(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path)
    assert callable(compat.event_writer(logger).add_summary), "SummaryWriter._get_file_writer changed"
    assert "events.out.tfevents" in compat.event_file(logger), "EventFileWriter._file_name changed"
    assert not compat.has_prefix(logger), "TensorBoardLogger._prefix changed"
    assert compat.has_prefix(TensorBoardLogger(tmp_path, prefix="x")), "TensorBoardLogger._prefix changed"


def test_jsonargparse_lists_its_options_and_their_types() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--count", type=int | None)
    found = {action.dest: compat.type_of_option(action) for action in compat.parser_actions(parser)}
    assert "count" in found, "ArgumentParser._actions changed"
    assert found["count"] == int | None, "ActionTypeHint._typehint changed"


def test_transformers_names_the_attention_kernel_of_a_model() -> None:
    model = LlamaForCausalLM(tiny_config())
    assert compat.uses_sdpa(model), "_supports_sdpa or config._attn_implementation changed"
    model.set_attn_implementation("eager")
    assert not compat.uses_sdpa(model), "config._attn_implementation no longer follows set_attn_implementation"
    assert not compat.is_stateful(model), "_is_stateful changed"


def test_transformers_names_the_routers_of_a_mixture_of_experts() -> None:
    sizes = {"num_local_experts": 2, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8}
    found = compat.router_recorder(MixtralModel(MixtralConfig(**sizes, **heads)))
    assert found is not None and issubclass(found[0], torch.nn.Module), "_can_record_outputs names routers otherwise"
    assert compat.router_recorder(LlamaModel(tiny_config())) is None


def test_transformers_overwrites_the_pad_row_of_some_classes() -> None:
    model = LlamaForCausalLM(tiny_config())
    assert compat.erases_pad_row(model) is False, "LlamaForCausalLM._init_weights draws loaded embeddings again"


def test_peft_keeps_the_adapters_of_fully_trained_modules() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model = get_peft_model(layers, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    wrapper = next(part for part in model.modules() if isinstance(part, ModulesToSaveWrapper))
    assert compat.wrapper_holds(wrapper, "default"), "ModulesToSaveWrapper._adapters changed"
    assert not compat.wrapper_holds(wrapper, "other")


def test_peft_keeps_the_adapter_switch_of_a_layer() -> None:
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    layer = next(part for part in model.modules() if isinstance(part, BaseTunerLayer))
    assert compat.adapter_switch(layer) == (["default"], False), "BaseTunerLayer keeps its switch elsewhere"
    compat.set_adapter_switch(layer, (["default"], True))
    assert layer.disable_adapters, "BaseTunerLayer._disable_adapters no longer disables"


def test_torch_and_datasets_keep_the_used_private_names() -> None:
    compat.allow_graphs(1)
    assert torch._dynamo.config.recompile_limit >= 1, "torch._dynamo.config.recompile_limit is gone"
    copies = [torch.zeros(2, dtype=torch.bfloat16)]
    compat.copy_each(copies, [torch.ones(2)])
    assert copies[0].tolist() == [1, 1], "torch._foreach_copy_ no longer converts the precision"
    assert compat.changes_in_place(copies[0].add_(1)) > 1, "Tensor._version no longer counts changes"
    assert "TORCH_CONTIGUOUS_FORMAT" in compat.memory_format_encoding().__members__, "_MEM_FORMAT_ENCODING changed"
    one, other = Dataset.from_dict({"x": [1]}), Dataset.from_dict({"x": [2]})
    assert compat.dataset_fingerprint(one) != compat.dataset_fingerprint(other), "Dataset._fingerprint changed"


def test_lightning_installs_signal_handlers_with_one_method() -> None:
    trainer, before = Trainer(logger=False, accelerator="cpu", devices=1), signal.getsignal(signal.SIGTERM)
    try:
        with compat.without_signal_handlers(trainer):
            trainer._signal_connector.register_signal_handlers()
            assert signal.getsignal(signal.SIGTERM) is before
        trainer._signal_connector.register_signal_handlers()
        assert signal.getsignal(signal.SIGTERM) is not before, "Lightning installs its handlers elsewhere"
    finally:
        trainer._signal_connector.teardown()
        signal.signal(signal.SIGTERM, before)


def test_a_model_reports_the_kernel_it_was_built_with() -> None:
    kind = AutoModelForCausalLM.from_config(tiny_config()).__class__
    model = compat.new_model(kind, tiny_config(), "eager")
    assert compat.attention_kernel(model.config) == "eager", "transformers: configs name their kernel otherwise"
    assert model.dtype == torch.float32


def test_peft_exposes_the_layers_used_by_fused_kernels() -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type="mamba"))
    assert compat.bypasses_adapters(model, "layers.0.mixer.out_proj"), "peft: the check of Mamba's layers has moved"
    assert not compat.bypasses_adapters(model, "layers.0.mixer.in_proj")


def test_every_function_of_compat_is_tested_here() -> None:
    functions = [name for name, value in vars(compat).items() if inspect.isfunction(value)]
    text = Path(__file__).read_text()
    assert functions and not [name for name in functions if f"compat.{name}(" not in text]
