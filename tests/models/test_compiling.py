"""Compiled layers give the same results with few graphs; layers that cannot be compiled are reported."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_models import (
    assert_same,
    demonstration_step,
    fit,
    gradients_of_step,
    preference_step,
    prompt_step,
    random_pairs,
    random_rows,
    save_policy,
    weights_of,
)
from torch._dynamo.utils import counters

from rlhf_lightning.models import compiling
from rlhf_lightning.models.compiling import MOST_GRAPHS, missing_compiler
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules import DPOModule, PPOModule, SFTModule
from rlhf_lightning.training.compatibility import IncompatibleError, check, refused_compilation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(autouse=True)
def no_graphs_of_others() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


PIECES = 5
"""Graphs of a layer on packed rows: the attention of a row runs between them."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced, and their backward passes derived, but no kernels are written: that takes most of the time."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")


@pytest.mark.parametrize(("packs", "most"), [(False, 1), (True, PIECES)])
def test_compiled_layers_give_the_same_gradients(folder: str, packs: bool, most: int) -> None:
    step = demonstration_step(random_rows(5, seed=3), None)
    expected = gradients_of_step(SFTModule(init_from=folder, pack_rows=packs), step)
    assert graphs() == 0
    compiled = SFTModule(init_from=folder, compile_layers=True, pack_rows=packs)
    assert_same(gradients_of_step(compiled, step), expected, 1e-4, 1e-6)
    assert compiled.packs_rows is packs and graphs() == most


@pytest.mark.parametrize(("packs", "most"), [(False, 16), (True, 24)])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_the_number_of_graphs_does_not_depend_on_shapes(
    folder: str, lora: Any, packs: bool, most: int, quick: None
) -> None:
    """A kind of pass depends on: gradient, one row or several, attention mask, active adapters."""
    sizes = [(1, None), (2, 1), (3, None), (4, 2)]
    steps = [preference_step(random_pairs(count, seed=count), micro) for count, micro in sizes]
    assert len({tuple(step.micro_batches[0].sequences.lengths) for step in steps}) == len(steps)
    settings: dict[str, Any] = {
        "init_from": folder,
        "lora": lora,
        "pack_rows": packs,
        "learning_rate": 1e-2,
        "adam_eps": 1e-3,
    }
    compiled = DPOModule(compile_layers=True, **settings)
    plain = DPOModule(**settings)
    fit(compiled, steps)
    first = graphs()
    assert 0 < first <= most < MOST_GRAPHS
    fit(plain, steps)
    assert_same(weights_of(compiled), weights_of(plain), 1e-4, 1e-5)

    more = [preference_step(random_pairs(count, seed=count), None) for count in (5, 6, 7, 8)]
    fit(DPOModule(compile_layers=True, **settings), more)
    # New shapes, and another model of the same kind, which may repeat the graphs on both sides of packed attention.
    assert graphs() <= first + 2 * packs


def test_sampling_runs_uncompiled(folder: str, quick: None) -> None:
    """Each token would be a new shape, and rollouts must equal those of the uncompiled model."""
    prompts = [[6, 7, 8], [9, 10], [11, 12, 13, 14]]
    rollouts = []
    for compiled in (False, True):
        module = PPOModule(
            init_from=folder, scorer=lengths, compile_layers=compiled, max_new_tokens=12, learning_rate=1e-2,
            missing_eos_score=None, critic="shared", ppo_epochs=2,
        )  # fmt: skip
        fit(module, [prompt_step(prompts), prompt_step(prompts, first_episode=3)])
        rollouts.append(weights_of(module))
    assert_same(rollouts[1], rollouts[0], 1e-3, 1e-4)
    assert 0 < graphs() <= 8


def lengths(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_a_missing_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    message = str(missing_compiler("cpu"))
    assert "no C++ compiler was found" in message
    module = DPOModule(init_from="none", compile_layers=True)
    assert "set model.compile_layers to false" in refusal(SingleDeviceStrategy("cpu"), module)


def test_sharded_layers_that_recompute_activations_are_not_compiled() -> None:
    reason = refused_compilation("ModelParallelStrategy", "cpu", True)
    assert reason is not None and "activation_checkpointing do not work together" in reason
    assert refused_compilation("single", "cpu", True) is refused_compilation("ModelParallelStrategy", "cpu", False)


def refusal(strategy: Any, module: Any) -> str:
    trainer: Any = SimpleNamespace(strategy=strategy, num_devices=1, num_nodes=1, precision="32-true")
    with pytest.raises(IncompatibleError) as error:
        check(trainer, module)
    return str(error.value)
