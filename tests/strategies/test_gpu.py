"""Test on a GPU: the same updates as on a CPU, and GPU features (4-bit kernels, memory, generators).

    make test ARGS="-m gpu -n 0"

Other runs exclude these tests; selected on a machine without a GPU, they are skipped with the reason.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import rank_cases
import torch
from tiny_models import (
    MetricsLog,
    demonstration_step,
    fit,
    preference_step,
    prompt_step,
    random_pairs,
    random_rows,
    save_policy,
    weights_of,
)
from tiny_run import BASIC, SlopeModule

from rlhf_lightning import modules
from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.models.compiling import missing_compiler
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.packing import PackedRow, attend_by_block, half_precision_of
from rlhf_lightning.models.quantization import quantization_of
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.models.scalar_head import unwrapped
from rlhf_lightning.modules import SFTModule
from rlhf_lightning.sampling.drawing import uniform
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import SlotEngine
from strategies.test_ranks import FAMILIES, OBJECTIVES, TAUGHT, assert_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch sees"),
]

GPU = "gpu"
ROWS, PAIRS = random_rows(6, seed=1), random_pairs(6, seed=2)
PROMPTS = [prompt for prompt, _ in ROWS]


def train(name: str, folder: str, **settings: Any) -> dict[str, Any]:
    return rank_cases.train(name, folder, settings.pop("strategy", "auto"), **settings)


# -- the same answer as on a CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_on_gpu_as_on_cpu(policy_folder: str, name: str) -> None:
    """In double precision: gradients, weights after five updates, drawn completions and what is logged."""
    assert_equal([train(name, policy_folder, accelerator=GPU)], train(name, policy_folder))


@pytest.mark.parametrize("name", sorted(TAUGHT))
def test_distillation_trains_on_gpu_as_on_cpu(policy_folder: str, other_folder: str, name: str) -> None:
    found = train(name, policy_folder, accelerator=GPU, teacher=other_folder)
    assert_equal([found], train(name, policy_folder, teacher=other_folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_objective_family_trains_on_gpu_as_on_cpu(policy_folder: str, family: str) -> None:
    name, settings = FAMILIES[family]
    found = train(name, policy_folder, accelerator=GPU, accumulation=4, **settings)
    assert_equal([found], train(name, policy_folder, **settings))


@pytest.mark.parametrize("family", ["dpo", "ppo", "grpo", "ppo-lora"])
def test_padded_and_packed_rows_give_the_same_gradient(policy_folder: str, family: str) -> None:
    name, settings = FAMILIES[family]
    padded = train(name, policy_folder, accelerator=GPU, pack_rows=False, **settings)
    packed = train(name, policy_folder, accelerator=GPU, pack_rows=True, **settings)
    for part in ("gradients", "weights"):
        for weight, value in padded[part].items():
            assert float((packed[part][weight] - value).norm()) <= 1e-9 * float(value.norm()), weight
    assert packed["drawn"] == padded["drawn"]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["as many keys", "grouped keys"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_variable_length_attention_equals_blockwise_attention(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    trees = [[5, 9, 3, 40], [130, 70], [0, 12], [1, 1], [200, 30, 31], [0, 4, 5]]
    row, width = PackedRow(trees, "cuda"), sum(map(sum, trees))
    draws = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, count, width, 64) for count in (heads[0], heads[1], heads[1])]
    exact = [torch.randn(shape, device="cuda", dtype=torch.float64, generator=draws) for shape in shapes]
    exact = [states.to(dtype).double().requires_grad_() for states in exact]
    half = [states.detach().to(dtype).requires_grad_() for states in exact]
    layer = torch.nn.Module()
    layer.num_key_value_groups = heads[0] // heads[1]  # type: ignore[assignment]
    weights = torch.randn(1, width, heads[0], 64, device="cuda", generator=draws)
    assert half_precision_of(exact[0]) is None
    if half_precision_of(half[0]) is None:
        pytest.skip("this PyTorch has no kernel that takes lengths on this device")
    found = []
    for states in (exact, half):
        output, _ = attend_by_block(layer, *states, None, row, scaling=0.2, is_causal=True)
        (output * weights).sum().backward()
        found.append([output.detach(), *(part.grad for part in states)])
    for one, other in zip(*found, strict=True):
        assert float((other.double() - one).norm()) < 1e-2 * float(one.norm())


@pytest.mark.parametrize("family", ["sft-lora", "dpo", "ppo-shared", "grpo"])
def test_fsdp_on_one_gpu_trains_identically(policy_folder: str, family: str) -> None:
    """Test FSDP2 and its NCCL group, as far as one device allows."""
    name, settings = FAMILIES[family]
    found = train(name, policy_folder, strategy="fsdp", accelerator=GPU, **settings)
    assert_equal([found], train(name, policy_folder, **settings))


def test_captured_decode_steps_draw_what_eager_steps_draw(policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(policy_folder, LoadSettings(), None).cuda()
    settings, ends = SamplingSettings(24, batch_size=4), tuple(range(20, 24))
    prompts = [torch.tensor(prompt) for prompt in PROMPTS]
    replays: list[Any] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    eager, captured = (
        SlotEngine(cuda_graphs).sample(policy, prompts, torch.arange(len(prompts)), settings, 0, ends)
        for cuda_graphs in (False, True)
    )
    assert len(replays) > 10
    assert [ids.tolist() for ids in captured.ids] == [ids.tolist() for ids in eager.ids]
    for one, other in zip(captured.logprobs, eager.logprobs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


class Counted(SFTModule):
    """Counts how often each update waits for the GPU."""

    def update(self, *given: Any) -> float:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                return super().update(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits = [one for one in told if "synchronizing CUDA operation" in str(one.message)]
            self.__dict__.setdefault("waits", []).append(len(waits))


def test_an_update_waits_once_for_the_gpu(policy_folder: str) -> None:
    module = Counted(init_from=policy_folder)
    fit(module, [demonstration_step(random_rows(6, seed=seed), 2) for seed in range(3)], accelerator=GPU)
    assert module.waits[1:] == [1, 1]  # kernels of the first update initialise their libraries


def test_random_numbers_on_gpu_equal_those_on_cpu() -> None:
    episodes, positions = torch.arange(4096) * 2**33 + 7, torch.arange(4096) % 61
    on_gpu = uniform(11, episodes.cuda(), positions.cuda())
    assert torch.equal(on_gpu.cpu(), uniform(11, episodes, positions))


# -- precision --------------------------------------------------------------------------------------------------------


HALF = [(family, "bf16-mixed") for family in ("sft-lora", "reward-lora", "dpo", "ppo", "grpo")]
HALF += [(family, "bf16-true") for family in ("sft-lora", "reward-lora", "dpo-lora", "ppo-lora")]


@pytest.mark.parametrize(("family", "precision"), HALF)
def test_half_precision_training_is_close_to_fp32(policy_folder: str, family: str, precision: str) -> None:
    name, settings = FAMILIES[family]
    settings = settings | {"double": False, "updates": 1, "accelerator": GPU}
    half, single = (train(name, policy_folder, precision=p, **settings) for p in (precision, "32-true"))
    assert {value.dtype for value in half["weights"].values()} == {torch.float32}
    if single["drawn"] != half["drawn"]:  # rounding may change a sampled token, and then the episodes differ
        assert all(torch.isfinite(value).all() for value in half["gradients"].values())
        return
    for weight, value in single["gradients"].items():
        if float(value.norm()) > 1e-4:
            assert torch.nn.functional.cosine_similarity(value.flatten(), half["gradients"][weight].flatten(), 0) > 0.95


# -- 4 and 8 bits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose matrix sizes are multiples of 64."""
    folder = tmp_path_factory.mktemp("blocks") / "policy"
    return save_policy(folder, hidden_size=64, intermediate_size=128, initializer_range=0.08)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_stages_train_on_a_quantised_backbone(blocks: str, quantization: Any, precision: str) -> None:
    settings: dict[str, Any] = {
        "init_from": blocks, "lora": LoraSettings(r=4), "quantization": quantization, "lr_schedule": "constant",
        "warmup": 0, "learning_rate": 1e-2,
    }  # fmt: skip
    dpo, log = modules.DPOModule(**settings), MetricsLog()
    fit(dpo, [preference_step(PAIRS)] * 5, callbacks=[log], accelerator=GPU, precision=precision)
    assert quantization_of(unwrapped(dpo.policy.model)) == quantization
    losses = log.column("train/loss")
    assert losses[0] == pytest.approx(0.6931, abs=2e-2) and losses[-1] < 0.9 * losses[0]
    ppo, log = (
        modules.PPOModule(scorer=rank_cases.low_words, critic="shared", max_new_tokens=5, ppo_epochs=1, **settings),
        MetricsLog(),
    )
    steps = [prompt_step(PROMPTS, first_episode=6 * index) for index in range(2)]
    fit(ppo, steps, callbacks=[log], accelerator=GPU, precision=precision)
    assert log.rows[0]["train/ratio"] == pytest.approx(1.0, abs=0.1)
    assert {p.dtype for p in ppo.parameters() if p.requires_grad} == {torch.float32}


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_run(policy_folder: str, tmp_path: Path) -> None:
    """Dropout draws from the GPU's own generator."""
    from training.test_module_checkpoints import Snapshot, run

    settings: dict[str, Any] = {"learning_rate": 5e-3, "lora": LoraSettings(r=2, dropout=0.5)}
    steps, path = [demonstration_step(random_rows(4, seed=90 + index), 2) for index in range(3)], tmp_path / "m.ckpt"
    whole = modules.SFTModule(init_from=policy_folder, **settings)
    run(whole, steps, callbacks=[Snapshot(4, path)], max_epochs=2, accelerator=GPU)
    torch.cuda.manual_seed(999)
    resumed = modules.SFTModule(init_from=policy_folder, **settings)
    run(resumed, steps, path, max_epochs=2, accelerator=GPU)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


@pytest.mark.parametrize("family", ["sft-lora", "dpo", "ppo-shared"])
def test_compiled_layers_train_identically(policy_folder: str, family: str) -> None:
    if lacking := missing_compiler("cuda"):
        pytest.skip(lacking)
    name, settings = FAMILIES[family]
    settings = settings | {"double": False, "updates": 2, "accelerator": GPU}
    plain, compiled = (train(name, policy_folder, compile_layers=on, **settings) for on in (False, True))
    for weight, value in plain["gradients"].items():
        assert float((compiled["gradients"][weight] - value).norm()) <= 1e-3 * float(value.norm()) + 1e-6, weight


class GreedyModule(SlopeModule):
    """Requests more GPU memory than it may have."""

    def loss_sum(self, batch: Any, meter: Any) -> torch.Tensor:
        torch.cuda.set_per_process_memory_fraction(1e-3)
        try:
            torch.ones(2**30, device=self.line.weight.device)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return super().loss_sum(batch, meter)


def test_out_of_memory_prints_one_line_with_the_settings_to_lower(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", f"{__name__}.GreedyModule"]
    where = ["--trainer.accelerator", GPU, "--trainer.devices", "1", "--runs_folder", str(tmp_path)]
    assert rlhf(["fit", *model, *BASIC[2:], *where]) == 1
    said = capfd.readouterr().err
    line = said.strip().splitlines()[-1]
    assert "Traceback" not in said
    assert line.startswith("rlhf: out of memory (") and "data.max_tokens" in line
