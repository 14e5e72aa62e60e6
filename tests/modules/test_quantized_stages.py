"""Train all four stages on a 4-bit backbone, each from the folder of the previous stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import (
    MetricsLog,
    demonstration_step,
    evaluate,
    fit,
    preference_step,
    prompt_step,
    random_pairs,
    random_rows,
    ranked_pairs,
    ranked_step,
    save_policy,
    weights_of,
)
from torch import Tensor

from rlhf_lightning.models.causal_lm import inference_mode_of
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.quantization import quantization_of
from rlhf_lightning.models.roles import AdapterScalar, load_policy
from rlhf_lightning.models.scalar_head import ScalarModel, unwrapped
from rlhf_lightning.modules.adaptive_preference import TRDPOModule
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.scoring import LearnedScorer

ROWS, PAIRS = random_rows(6, seed=1), random_pairs(6, seed=2)
PROMPTS = [prompt for prompt, _ in ROWS]
NF4: dict[str, Any] = {"lora": LoraSettings(r=4), "quantization": "nf4", "lr_schedule": "constant"}
PPO: dict[str, Any] = {
    "max_new_tokens": 5, "ppo_epochs": 2, "mini_batch_size": 3, "learning_rate": 1e-2, "missing_eos_score": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose matrix sizes are multiples of 64, with weights of the size of a trained model's."""
    folder = tmp_path_factory.mktemp("blocks") / "policy"
    return save_policy(folder, hidden_size=64, intermediate_size=128, initializer_range=0.08)


class Trained:
    """A trained stage: its module, its logged metrics, and its folder."""

    def __init__(self, module: Any, steps: list[Any], folder: Path) -> None:
        self.module, self.log = module, MetricsLog()
        module.configure_model()
        before = frozen(module)
        fit(module, steps, callbacks=[self.log])
        self.backbone_moved = any(not torch.equal(before[name], now) for name, now in frozen(module).items())
        self.folder = str(module.export(folder))


def frozen(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}


@pytest.fixture(scope="module")
def stages(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    root = tmp_path_factory.mktemp("stages")
    sft = Trained(
        SFTModule(init_from=base, learning_rate=2e-2, warmup=0, **NF4), [demonstration_step(ROWS)] * 5, root / "sft"
    )
    reward = Trained(
        RewardModule(init_from=sft.folder, learning_rate=1e-2, **NF4), [ranked_step(ranked_pairs(PAIRS))] * 5,
        root / "reward",
    )  # fmt: skip
    dpo = Trained(
        DPOModule(init_from=sft.folder, learning_rate=1e-2, warmup=0, **NF4), [preference_step(PAIRS)] * 5, root / "dpo"
    )
    module = PPOModule(reward.folder, init_from=sft.folder, critic="adapter", **NF4 | PPO)
    steps = [prompt_step(PROMPTS, first_episode=6 * index) for index in range(3)]
    return {"sft": sft, "reward": reward, "dpo": dpo, "ppo": Trained(module, steps, root / "ppo")}


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_each_stage_trains_an_adapter_on_a_four_bit_backbone(stages: dict[str, Trained], base: str, stage: str) -> None:
    trained = stages[stage]
    model = unwrapped(trained.module.model.model)
    assert quantization_of(model) == "nf4"
    layer = model.get_decoder().layers[0].self_attn.q_proj.base_layer if stage != "reward" else None
    if layer is not None:
        assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == 64 * 64 // 2
        assert layer.weight.quant_state.nested and layer.weight.quant_state.quant_type == "nf4"
        assert layer.compute_dtype == torch.float32
    assert not trained.backbone_moved
    assert {p.dtype for p in trained.module.parameters() if p.requires_grad} == {torch.float32}
    record = json.loads((Path(trained.folder) / "backbone.json").read_text())
    assert record["source"] == Path(base).name and record["quantization"] == "nf4"
    assert not (Path(trained.folder) / "model.safetensors").exists()


def test_each_stage_reduces_its_loss(stages: dict[str, Trained]) -> None:
    for stage in ("sft", "reward", "dpo"):
        losses = stages[stage].log.column("train/loss")
        assert losses[-1] < 0.9 * losses[0], stage
    assert stages["dpo"].log.column("train/loss")[0] == pytest.approx(0.6931472, abs=1e-6)
    ppo = stages["ppo"].log
    assert ppo.rows[0]["invariant/ratio"] < 1e-4 and ppo.rows[0]["invariant/sampler"] < 1e-4
    assert ppo.column("rollout/kl")[0] == pytest.approx(0.0, abs=1e-5) and abs(ppo.column("rollout/kl")[-1]) > 1e-3


def test_ppo_shares_one_backbone_and_scores_as_the_reward_model(stages: dict[str, Trained]) -> None:
    module = stages["ppo"].module
    assert type(module.critic) is AdapterScalar and type(module.scorer.model) is AdapterScalar
    assert module.reference.models == ()
    (batch,) = ranked_step(ranked_pairs(PAIRS)).micro_batches
    reward = stages["reward"].module.reward_model
    with torch.no_grad():
        expected = reward(padded_layout(batch.sequences)) - reward.bias
    alone = LearnedScorer(stages["reward"].folder)
    assert type(alone.model) is ScalarModel and quantization_of(unwrapped(alone.model.model)) == "nf4"
    for scorer in (module.scorer, alone):
        torch.testing.assert_close(scorer.score_sequences(batch.sequences), expected, atol=1e-5, rtol=1e-5)


def test_the_next_stage_starts_from_the_previous_weights(stages: dict[str, Trained]) -> None:
    layout = padded_layout(ranked_step(ranked_pairs(PAIRS)).micro_batches[0].sequences)
    sft, dpo = stages["sft"].module.policy, DPOModule(init_from=stages["sft"].folder, **NF4)
    dpo.configure_model()
    with torch.no_grad():
        expected = sft(layout).logprobs
        torch.testing.assert_close(dpo.policy(layout).logprobs, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dpo.reference.logprobs(layout), expected, atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]


def test_sampling_does_not_change_training(base: str) -> None:
    """After a forward pass in eval mode without gradients, logits and gradients equal those of a model without such a
    pass.
    """
    layout, found = padded_layout(ranked_step(ranked_pairs(PAIRS)).micro_batches[0].sequences), []
    for sampled in (False, True):
        policy = load_policy(base, LoadSettings(quantization="nf4"), LoraSettings(r=4)).train()
        if sampled:
            with inference_mode_of(policy):
                in_eval = policy(layout).logprobs
        logprobs = policy(layout).logprobs
        logprobs.sum().backward()
        found.append((logprobs.detach(), [p.grad for p in policy.parameters() if p.requires_grad]))
    torch.testing.assert_close(in_eval, found[0][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1][0], found[0][0], atol=0, rtol=0)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert other.abs().sum() > 0 or one.abs().sum() == 0
        torch.testing.assert_close(other, one, atol=0, rtol=0)


def test_eight_bit_backbones_train(base: str, tmp_path: Path) -> None:
    settings = NF4 | {"quantization": "int8"}
    sft = Trained(
        SFTModule(init_from=base, learning_rate=2e-2, warmup=0, **settings), [demonstration_step(ROWS)] * 4,
        tmp_path / "sft",
    )  # fmt: skip
    weight = sft.module.policy.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert weight.dtype == torch.int8 and not sft.backbone_moved
    losses = sft.log.column("train/loss")
    assert losses[-1] < 0.9 * losses[0]
    module = PPOModule(lambda p, c, **_: [0.0] * len(c), init_from=sft.folder, critic="adapter", **settings | PPO)
    steps = [prompt_step(PROMPTS, first_episode=6 * index) for index in range(2)]
    ppo = Trained(module, steps, tmp_path / "ppo")
    assert ppo.log.rows[0]["train/ratio"] == pytest.approx(1.0, abs=0.05)


def test_a_four_bit_run_resumes(base: str, tmp_path: Path) -> None:
    from training.test_module_checkpoints import Snapshot, run

    steps, path = [demonstration_step(ROWS[:3]), demonstration_step(ROWS[3:])] * 2, tmp_path / "middle.ckpt"
    settings = NF4 | {"learning_rate": 1e-2}
    whole, resumed = SFTModule(init_from=base, **settings), SFTModule(init_from=base, **settings)
    run(whole, steps, callbacks=[Snapshot(2, path)], max_epochs=1)
    assert all("lora_" in name for name in torch.load(path, weights_only=True)["state_dict"])
    run(resumed, steps, path, max_epochs=1)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight)
    other = SFTModule(init_from=base, **settings | {"quantization": None})
    with refused("another-start", "another quantization: nf4"):
        run(other, steps, path, max_epochs=1)


# -- what cannot be mixed ---------------------------------------------------------------------------------------------


def test_an_adapter_keeps_its_training_quantization(stages: dict[str, Trained], base: str, tmp_path: Path) -> None:
    folder = stages["sft"].folder
    for kind in (DPOModule, RewardModule):
        for other, told in ((None, "full precision"), ("int8", "int8")):
            with refused(
                "other-quantization", "trained on a backbone in nf4", f"on one in {told}; set quantization to nf4"
            ):
                kind(init_from=folder, **NF4 | {"quantization": other}).configure_model()
    full = SFTModule(init_from=base, lora=LoraSettings(r=4))
    full.configure_model()
    start = str(full.export(tmp_path / "full"))
    with refused("other-quantization", "in full precision, but is used on one in nf4; set quantization to null"):
        DPOModule(init_from=start, **NF4).configure_model()
    # A reward model with another quantisation than the policy's uses its own backbone.
    policy = PPOModule(stages["reward"].folder, init_from=base, critic="adapter", lora=LoraSettings(r=4), **PPO)
    policy.configure_model()
    assert type(policy.scorer.model) is ScalarModel  # type: ignore[attr-defined]
    assert quantization_of(unwrapped(policy.scorer.model.model)) == "nf4"  # type: ignore[attr-defined]
    # Merged, it is an ordinary full-precision model.
    assert quantization_of(load_policy(folder).model) is None
    assert evaluate(SFTModule(init_from=folder), [demonstration_step(ROWS)])["val/loss"] == pytest.approx(
        stages["sft"].log.column("train/loss")[-1], rel=0.2
    )


def test_invalid_four_bit_settings_are_refused_before_weights_are_read(base: str) -> None:
    with refused("quantized-training", "nf4"):
        fit(SFTModule(init_from=base, quantization="nf4"), [demonstration_step(ROWS)])
    with refused("quantized-from-scratch", "nf4"):
        SFTModule(init_from=base, from_scratch=True, **NF4)
    with refused("unknown-choice", "quantization is 'nf5'", "'nf4' or 'int8'"):
        load_policy(base, LoadSettings(quantization="nf5"), LoraSettings(r=4))  # type: ignore[arg-type]
    with refused("quantized-moving-reference", "nf4"):
        TRDPOModule(init_from=base, **NF4).configure_model()
