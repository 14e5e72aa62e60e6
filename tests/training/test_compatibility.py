"""Unsupported combinations are refused before anything is read, with the nearest supported combination."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_cases
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from tiny_models import quiet_trainer, save_policy

from rlhf_lightning.commands.train import main
from rlhf_lightning.modules import DPOModule, PPOModule, RewardModule
from rlhf_lightning.training import compatibility as rules
from rlhf_lightning.training.compatibility import IncompatibleError, check

SIZES = {"data_parallel_size": 2, "tensor_parallel_size": 1}


def trainer_with(strategy: Any, ranks: int = 1, precision: str = "32-true") -> Any:
    """Return the trainer attributes that the check reads; a real trainer needs the requested devices."""
    return SimpleNamespace(strategy=strategy, num_devices=ranks, num_nodes=1, precision=precision)


def refused(strategy: Any, ranks: int = 2, module: Any = None, data: Any = None, precision: str = "32-true") -> str:
    with pytest.raises(IncompatibleError) as error:
        check(trainer_with(strategy, ranks, precision), module or DPOModule(init_from="none"), data)
    return str(error.value)


def prompts(batch_size: int, samples: int) -> Any:
    return SimpleNamespace(batch_size=batch_size, samples_per_prompt=samples)


def test_supported_combinations_are_accepted() -> None:
    module = DPOModule(init_from="none")
    check(trainer_with(SingleDeviceStrategy("cpu")), module, SimpleNamespace(batch_size=1))
    check(trainer_with(DDPStrategy(), 4, "bf16-mixed"), module, SimpleNamespace(batch_size=7))
    check(trainer_with(ModelParallelStrategy(**SIZES), 2, "bf16-mixed"), module, SimpleNamespace(batch_size=7))
    ppo = PPOModule(init_from="none", scorer="none")
    check(trainer_with(ModelParallelStrategy(**SIZES), 2), ppo, prompts(8, 2))


def test_fsdp1_is_refused_with_fsdp2_as_remedy() -> None:
    assert "use ModelParallelStrategy (FSDP2)" in refused(FSDPStrategy())
    assert "use ModelParallelStrategy (FSDP2)" in str(rules.refused_strategy("deepspeed_stage_3"))
    assert rules.refused_strategy("ddp_find_unused_parameters_true") is None


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_fp16_is_refused_with_bf16_as_remedy(precision: str) -> None:
    assert "use bf16-mixed" in refused(SingleDeviceStrategy("cpu"), 1, precision=precision)


def test_sharding_quantised_weights_is_refused() -> None:
    module = DPOModule(init_from="none", quantization="nf4", lora={"r": 2})
    assert "nf4 weights cannot be sharded" in refused(ModelParallelStrategy(**SIZES), 2, module)
    assert rules.refused_quantization("ddp", "nf4") is None
    assert rules.refused_quantization("ModelParallelStrategy", None) is None


def test_the_mesh_size_must_equal_the_world_size() -> None:
    assert "set data_parallel_size=4 and tensor_parallel_size=1" in refused(ModelParallelStrategy(), 4)
    assert "there are 3 ranks: set data_parallel_size=3" in refused(ModelParallelStrategy(**SIZES), 3)
    uneven = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    assert "set data_parallel_size=3 and tensor_parallel_size=1" in refused(uneven, 3)


def test_tensor_parallelism_needs_a_plan_for_the_model(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "llama")
    two = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    check(trainer_with(two, 2), DPOModule(init_from=folder), SimpleNamespace(batch_size=4))
    assert "an adapter is attached to" in refused(two, 2, DPOModule(init_from=folder, lora={"r": 2}))
    four = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=4)
    assert "2 key and value heads" in refused(four, 4, DPOModule(init_from=folder))
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "no tensor-parallel plan" in refused(two, 2, DPOModule(init_from=str(tmp_path / "gpt2")))


def test_more_ranks_than_rows_are_refused() -> None:
    assert "use at most 3 ranks" in refused(DDPStrategy(), 4, data=SimpleNamespace(batch_size=3))
    ppo = PPOModule(init_from="none", scorer="none")
    assert "use at most 2 ranks" in refused(DDPStrategy(), 4, ppo, prompts(8, 4))
    assert "set data.batch_size=16 (8 prompts, samples_per_prompt 2)" in refused(DDPStrategy(), 4, ppo, prompts(14, 2))
    assert rules.refused_division(5, 4, 2) is not None
    check(trainer_with(DDPStrategy(), 4), ppo, prompts(8, 4), fits=False)


def test_sharding_a_model_with_an_adapter_to_merge_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    module = RewardModule(init_from=str(tmp_path), lora={"r": 2})
    assert "rlhf export --merge" in refused(ModelParallelStrategy(**SIZES), 2, module)
    assert rules.refused_roles("ModelParallelStrategy", "adapter") is not None
    assert rules.refused_roles("ddp", "adapter") is None


def test_a_python_trainer_is_checked_before_weights_are_read() -> None:
    module = rank_cases.module_of("SFTModule", "there_is_no_such_model")
    trainer = quiet_trainer(strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2))
    module.trainer = trainer
    with pytest.raises(IncompatibleError, match="there are 1 ranks: set data_parallel_size=1"):
        module.setup("fit")


MESH_LEFT_OPEN = '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'
COMMAND = ["fit", "--model", "DPOModule", "--model.init_from", "no_model", "--data", "PreferenceDataModule",
           "--data.source", "no_rows.jsonl", "--trainer.accelerator", "cpu"]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.strategy", "fsdp"], "ModelParallelStrategy (FSDP2)"),
        (["--trainer.precision", "16-mixed"], "use bf16-mixed"),
        (["--trainer.strategy", MESH_LEFT_OPEN], "set data_parallel_size=1"),
        (["--trainer.strategy", "ddp", "--trainer.devices", "4", "--data.batch_size", "2"], "use at most 2 ranks"),
    ],
)
def test_the_command_line_refuses_incompatible_settings_quickly(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises((IncompatibleError, SystemExit)) as error:
        main([*COMMAND, *flags])
    assert message in f"{capsys.readouterr().err} {error.value}"
    assert time.monotonic() - started < 10.0  # a second on an idle machine
    assert not list(tmp_path.rglob("version_*"))
