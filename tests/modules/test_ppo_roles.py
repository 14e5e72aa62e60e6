"""Compare PPO with all roles on one backbone with the same run with a model copy per role."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file
from tiny_models import (
    LastGradients,
    MetricsLog,
    assert_same,
    demonstration_step,
    fit,
    prompt_step,
    random_pairs,
    random_rows,
    ranked_pairs,
    ranked_step,
    weights_of,
    within,
)
from training.test_module_checkpoints import Snapshot, run, saved

from rlhf_lightning.models.adapters import read_adapter
from rlhf_lightning.models.loading import LoadSettings, load_reward_hf_model
from rlhf_lightning.models.loading import load_hf_model as load
from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.models.resolving import fingerprint, load_base_of_adapter
from rlhf_lightning.models.roles import AdapterScalar, load_reference
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.grpo import GRPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.modules.unpaired import KTOModule
from rlhf_lightning.scoring import LearnedScorer
from rlhf_lightning.training.on_policy import OnPolicyModule

LORA = LoraSettings(r=4)
PROMPTS = [prompt for prompt, _ in random_rows(6, seed=61)]
STEPS = [prompt_step(PROMPTS, first_episode=6 * index) for index in range(3)]
SETTINGS: dict[str, Any] = {
    "lora": LORA, "max_new_tokens": 5, "ppo_epochs": 2, "mini_batch_size": 3, "learning_rate": 1e-2, "adam_eps": 1e-3,
    "lr_schedule": "constant", "missing_eos_score": None, "kl_coef": 0.3, "value_coef": 0.4,
}  # fmt: skip


@pytest.fixture(scope="module")
def stages(policy_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SFT and, from its adapter, a reward model: each an adapter on the same backbone."""
    root = tmp_path_factory.mktemp("stages")
    sft = SFTModule(init_from=policy_folder, lora=LORA, learning_rate=2e-2)
    fit(sft, [demonstration_step(random_rows(6, seed=1))] * 3)
    start = str(sft.export(root / "sft"))
    reward = RewardModule(init_from=start, lora=LORA, learning_rate=2e-2)
    fit(reward, [ranked_step(ranked_pairs(random_pairs(6, seed=2)))] * 3)
    return {"base": policy_folder, "sft": start, "reward": str(reward.export(root / "reward"))}


class CopiesReference:
    """A reference with its own weights, behind the interface of the shared reference."""

    def __init__(self, init_from: str) -> None:
        self.copy = load_reference(init_from)
        self.models = (self.copy,)

    def logprobs(self, layout: Any, temperature: float = 1.0) -> Any:
        with torch.no_grad():
            return self.copy(layout, temperature).logprobs


class CopiesModule(PPOModule):
    """The same PPO with a separate model per role; the critic is an adapter on its own backbone."""

    def load_models(self) -> None:
        super().load_models()
        folder = self.collector.scorer_spec
        self.collector._scorer = LearnedScorer(folder)
        self.reference = CopiesReference(self.init_from)  # type: ignore[assignment]
        hf = load_reward_hf_model(load_base_of_adapter(folder), LoadSettings(), pad_token_id=0)
        self.critic = ScalarModel(add_lora(hf, LORA, "SEQ_CLS", folder), bias=float(hf.config.score_bias))


def in_double(module: Any) -> Any:
    """The module in double precision, because twelve updates amplify rounding errors. Scores stay in single
    precision.
    """
    load = module.load_models

    def load_in_double() -> None:
        load()
        for model in (module, *module.frozen_models(), *module.scorer.models):
            model.double()

    module.load_models = load_in_double
    return module


def test_sharing_one_backbone_equals_separate_copies(stages: dict[str, str]) -> None:
    """Losses, metrics and gradients of three rollouts with four updates each."""
    found = []
    for kind, critic in ((PPOModule, "adapter"), (CopiesModule, "separate")):
        module: Any = kind(init_from=stages["sft"], scorer=stages["reward"], critic=critic, **SETTINGS)
        logged, kept = MetricsLog(), LastGradients()
        fit(in_double(module), STEPS, callbacks=[logged, kept])
        found.append((module, logged.rows, kept.gradients))
    (one, rows, gradients), (copies, expected_rows, expected_gradients) = found
    assert type(one.critic) is AdapterScalar and type(one.scorer.model) is AdapterScalar
    assert one.reference.models == () and type(copies.scorer.model) is ScalarModel
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            if name.startswith("invariant/"):  # they measure rounding itself
                assert max(row[name], expected[name]) < 1e-5
            else:
                assert row[name] == pytest.approx(expected[name], abs=2e-6, rel=1e-5), name
    assert rows[0]["train/value_loss"] > 1e-3 and rows[2]["rollout/kl"] > 1e-3
    # The same weights under the names that each arrangement gives them.
    renamed = {}
    for name, gradient in expected_gradients.items():
        if name == "critic.model.base_model.model.score.modules_to_save.default.weight":
            name = "critic.score.weight"
        elif name.startswith("critic."):
            name = name.replace("critic.model", "policy.model").replace(".default.", ".critic.")
        renamed[name] = gradient
    assert gradients.keys() == renamed.keys()
    for name, gradient in gradients.items():
        difference, size = float((gradient - renamed[name]).norm()), float(renamed[name].norm())
        assert difference <= 1e-5 * size, f"{name}: {difference} of {size}"
    assert any(float(g.abs().max()) > 1e-3 for name, g in gradients.items() if ".critic." in name)


@pytest.mark.parametrize("critic", ["adapter", "shared", "separate"])
def test_the_first_gradient_equals_that_of_separate_copies(stages: dict[str, str], critic: str) -> None:
    """For every kind of critic, sharing the backbone with reference and reward model leaves the first gradient
    unchanged.
    """
    found = []
    for scorer in (stages["reward"], LearnedScorer(stages["reward"], dtype="float32")):
        if isinstance(scorer, LearnedScorer):
            scorer.load_beside = lambda *_: None  # type: ignore[method-assign]
        kept = LastGradients()
        module = PPOModule(
            init_from=stages["sft"], scorer=scorer, critic=critic, critic_init=stages["reward"] if critic != "shared"
            else None, **SETTINGS | {"ppo_epochs": 1, "mini_batch_size": None, "max_grad_norm": None},
        )  # fmt: skip
        fit(module, STEPS[:1], callbacks=[kept])
        found.append(kept.gradients)
    assert_same(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("micro", "checkpointing"), [(2, False), (None, True)])
def test_micro_batches_and_checkpointing_do_not_change_the_step(
    stages: dict[str, str], micro: int | None, checkpointing: bool
) -> None:
    found = []
    for size, saves in ((None, False), (micro, checkpointing)):
        kept = LastGradients()
        module = PPOModule(
            init_from=stages["sft"], scorer=stages["reward"], critic="adapter", activation_checkpointing=saves,
            **SETTINGS,
        )  # fmt: skip
        fit(module, within(STEPS[:1], size), callbacks=[kept])
        found.append(kept.gradients)
    assert_same(found[1], found[0], rtol=1e-4, atol=2e-6)


def test_a_critic_from_the_reward_model_predicts_the_score_at_the_last_state(stages: dict[str, str]) -> None:
    kept: list[Any] = []

    class Kept(PPOModule):
        def collect(self, *batches: Any) -> Any:
            found = super().collect(*batches)
            kept.append(found)
            return found

    fit(
        Kept(stages["reward"], init_from=stages["sft"], critic="adapter", reward_slot="after_eos", **SETTINGS),
        STEPS[:1],
    )
    (rollout,) = kept
    last = rollout.completion_mask.sum(-1, keepdim=True)
    torch.testing.assert_close(rollout.values.gather(-1, last).squeeze(-1), rollout.scores, atol=1e-5, rtol=1e-5)


def test_with_a_reward_model_of_another_backbone_the_critic_starts_from_the_policy(
    stages: dict[str, str], reward_folder: str
) -> None:
    logged = MetricsLog()
    module = PPOModule(init_from=stages["sft"], scorer=reward_folder, critic="adapter", **SETTINGS)
    fit(module, STEPS[:2], callbacks=[logged])
    assert type(module.scorer.model) is ScalarModel  # type: ignore[attr-defined]
    assert logged.rows[0]["rollout/value"] == 0.0 and logged.rows[1]["rollout/value"] != 0.0


@pytest.mark.parametrize("kind", [DPOModule, KTOModule, GRPOModule, PPOModule])
def test_every_family_loads_one_backbone_and_no_copy(stages: dict[str, str], kind: Any, monkeypatch: Any) -> None:
    loads = []
    for place in ("loading", "roles"):
        name = f"rlhf_lightning.models.{place}.load_hf_model"
        monkeypatch.setattr(name, lambda *a, **k: loads.append(a) or load(*a, **k))
    on_policy: dict[str, Any] = {"scorer": stages["reward"], "kl_coef": 0.1}
    module = kind(init_from=stages["sft"], lora=LORA, **on_policy if issubclass(kind, OnPolicyModule) else {})
    if kind is PPOModule:
        module.critic_kind = "adapter"
    module.configure_model()
    assert len(loads) == 1 and module.frozen_models() == () and module.reference is not None
    if issubclass(kind, OnPolicyModule):
        assert type(module.scorer.model) is AdapterScalar
    assert all("lora_" in name or name == "critic.score.weight" for name in module.state_dict())


# -- checkpoints and folders ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(stages: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    module = PPOModule(init_from=stages["sft"], scorer=stages["reward"], critic="adapter", **SETTINGS)
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    saved(module, STEPS[:1], path)
    return module, path


def test_a_checkpoint_has_only_policy_and_critic_adapters(checkpoint: tuple[Any, Path]) -> None:
    module, path = checkpoint
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state.keys() == weights_of(module).keys()
    assert {name.split(".")[-2] for name in state} == {"default", "critic", "score"}
    parameters = [id(parameter) for parameter in module.parameters()]
    assert len(parameters) == len(set(parameters))
    assert {".reward." in name for name, p in module.named_parameters() if not p.requires_grad} == {True, False}


def test_folder_and_checkpoint_contain_only_trained_weights(
    checkpoint: tuple[Any, Path], stages: dict[str, str], tmp_path: Path
) -> None:
    """The folder has the adapter's weights; the checkpoint has both adapters and the head, with Adam's two moments."""
    module, path = checkpoint
    folder = module.export(tmp_path / "ppo")
    stored = load_file(folder / "adapter_model.safetensors")
    trained = weights_of(module)
    adapter = {name: weight for name, weight in trained.items() if ".default." in name}
    assert sum(w.numel() for w in stored.values()) == sum(w.numel() for w in adapter.values())
    assert not any("critic" in name or "reward" in name or "score" in name for name in stored)
    assert [file.name for file in folder.rglob("*.safetensors")] == ["adapter_model.safetensors"]
    count = sum(weight.numel() for weight in trained.values())
    content = torch.load(path, weights_only=True)
    moments = [m for state in content["optimizer_states"][0]["state"].values() for m in state.values() if m.dim()]
    held = [*content["state_dict"].values(), *moments]
    assert sum(tensor.numel() for tensor in held) == 3 * count
    assert path.stat().st_size < 3 * 4 * count + 1500 * len(held)  # names, shapes and the optimizer's step counts
    assert json.loads((folder / "backbone.json").read_text())["fingerprint"] == fingerprint(stages["base"])


def test_a_resumed_run_equals_an_uninterrupted_run(stages: dict[str, str], tmp_path: Path) -> None:
    def made() -> PPOModule:
        return PPOModule(init_from=stages["sft"], scorer=stages["reward"], critic="adapter", **SETTINGS)

    whole, resumed, path = made(), made(), tmp_path / "middle.ckpt"
    run(whole, STEPS, callbacks=[Snapshot(2, path)], max_epochs=1)
    run(resumed, STEPS, path, max_epochs=1)
    assert_same(weights_of(resumed), weights_of(whole), rtol=0, atol=1e-7)
    assert resumed.updates == whole.updates == 12


def test_a_checkpoint_without_its_critic_is_refused(
    checkpoint: tuple[Any, Path], stages: dict[str, str], tmp_path: Path
) -> None:
    _, path = checkpoint
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {name: w for name, w in content["state_dict"].items() if ".critic." not in name}
    torch.save(content, tmp_path / "half.ckpt")
    module = PPOModule(init_from=stages["sft"], scorer=stages["reward"], critic="adapter", **SETTINGS)
    with refused("checkpoint-does-not-fit", "28 trainable weights are missing", ".critic."):
        fit(module, STEPS[:1], ckpt_path=str(tmp_path / "half.ckpt"))


def test_resuming_with_changed_frozen_weights_is_refused(policy_folder: str, other_folder: str, tmp_path: Path) -> None:
    """No checkpoint holds the backbone, so only the fingerprint can detect the change."""
    base, step = tmp_path / "base", demonstration_step(random_rows(4, seed=1))
    shutil.copytree(policy_folder, base)
    saved(SFTModule(init_from=str(base), lora=LORA), [step], tmp_path / "run.ckpt")
    shutil.copy(Path(other_folder) / "model.safetensors", base)
    before, now = str(fingerprint(policy_folder))[:8], str(fingerprint(other_folder))[:8]
    with refused("another-start", f"another backbone: {before}", f"starts from {now}"):
        fit(SFTModule(init_from=str(base), lora=LORA), [step], ckpt_path=str(tmp_path / "run.ckpt"))


def test_resuming_with_a_changed_initial_adapter_is_refused(stages: dict[str, str], tmp_path: Path) -> None:
    """The KL is measured from this adapter."""
    start, step = tmp_path / "start", demonstration_step(random_rows(4, seed=1))
    shutil.copytree(stages["sft"], start)
    saved(SFTModule(init_from=str(start), lora=LORA), [step], tmp_path / "run.ckpt")
    moved = SFTModule(init_from=stages["sft"], lora=LORA, learning_rate=1e-1)
    fit(moved, [step])
    shutil.copy(moved.export(tmp_path / "moved") / "adapter_model.safetensors", start)
    assert read_adapter(start).head is None
    with refused("another-start", "another adapter"):
        fit(SFTModule(init_from=str(start), lora=LORA), [step], ckpt_path=str(tmp_path / "run.ckpt"))
