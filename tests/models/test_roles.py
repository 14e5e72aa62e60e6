from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import random_rows, sequences

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.export import export_policy, export_reward_model
from rlhf_lightning.models.frozen import Reference
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import LoadSettings, load_reward_hf_model
from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.models.roles import (
    AdapterScalar,
    add_critic,
    belongs_to,
    load_policy,
    load_reference,
    load_reward_model,
)
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.scoring import LearnedScorer

ROWS = sequences(random_rows(6, seed=5))
LAYOUT = padded_layout(ROWS)
LORA = LoraSettings(r=4)


def moved(model: Any, seed: int = 3) -> Any:
    """Redraw every trainable weight, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def reward_adapter(policy_folder: str, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    hf = add_lora(load_reward_hf_model(policy_folder, LoadSettings(), pad_token_id=0), LORA, "SEQ_CLS")
    folder = tmp_path_factory.mktemp("roles") / "reward"
    return str(export_reward_model(moved(ScalarModel(hf, bias=0.5)), tokenizer, folder, policy_folder))


@pytest.fixture
def policy(policy_folder: str) -> CausalLM:
    return moved(load_policy(policy_folder, lora=LORA), seed=4)


def own_scores(folder: str) -> torch.Tensor:
    return LearnedScorer(folder).score_sequences(ROWS)


def scorer_on(policy: CausalLM, folder: str, settings: LoadSettings | None = None, **changes: Any) -> LearnedScorer:
    scorer = LearnedScorer(folder, **changes)
    scorer.load_beside(policy, settings or LoadSettings())
    return scorer


# -- the reward model -------------------------------------------------------------------------------------------------


def test_a_reward_model_on_the_policys_backbone_scores_as_on_its_own(policy: CausalLM, reward_adapter: str) -> None:
    logprobs, trained = policy(LAYOUT).logprobs, {n for n, p in policy.named_parameters() if p.requires_grad}
    scorer = scorer_on(policy.train(), reward_adapter)
    assert isinstance(scorer.model, AdapterScalar)
    assert [name for name, _ in scorer.model.named_parameters()] == ["score.weight"]
    torch.testing.assert_close(scorer.score_sequences(ROWS), own_scores(reward_adapter), atol=1e-5, rtol=1e-5)
    assert float(scorer.score_sequences(ROWS).std()) > 0.1
    assert torch.equal(policy(LAYOUT).logprobs, logprobs)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trained
    moved(policy, seed=9)  # for any change of the policy
    torch.testing.assert_close(scorer.score_sequences(ROWS), own_scores(reward_adapter), atol=1e-5, rtol=1e-5)


def test_several_reward_models_share_one_backbone(
    policy: CausalLM, policy_folder: str, reward_adapter: str, tokenizer: Any, tmp_path: Path
) -> None:
    hf = add_lora(load_reward_hf_model(policy_folder, LoadSettings(), pad_token_id=0), LoraSettings(r=2), "SEQ_CLS")
    second = str(export_reward_model(moved(ScalarModel(hf), 8), tokenizer, tmp_path / "second", policy_folder))
    scorers = [scorer_on(policy, folder) for folder in (reward_adapter, second)]
    assert [scorer.model.adapter for scorer in scorers] == ["reward", "reward_2"]  # type: ignore[attr-defined]
    for scorer, folder in zip(scorers, (reward_adapter, second), strict=True):
        torch.testing.assert_close(scorer.score_sequences(ROWS), own_scores(folder), atol=1e-5, rtol=1e-5)


def test_a_reward_model_of_another_backbone_is_loaded_separately(
    policy: CausalLM, policy_folder: str, other_folder: str, reward_folder: str, reward_adapter: str
) -> None:
    assert belongs_to(policy, reward_adapter)
    strangers: list[tuple[CausalLM, str, dict[str, Any]]] = [
        (load_policy(other_folder, lora=LORA), reward_adapter, {}),  # another backbone
        (load_policy(policy_folder), reward_adapter, {}),  # no adapter: its weights will not stay
        (policy, reward_folder, {}),  # whole weights
        (policy, reward_adapter, {"dtype": "bfloat16"}),  # another precision than the backbone's
    ]
    for one, folder, changes in strangers:
        scorer = scorer_on(one, folder, **changes)
        assert type(scorer.model) is ScalarModel
        assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
        tolerance = 0.5 if changes else 1e-6
        torch.testing.assert_close(scorer.score_sequences(ROWS), own_scores(folder), atol=tolerance, rtol=0)


def test_frozen_models_are_loaded_in_frozen_dtype(policy_folder: str, reward_folder: str) -> None:
    settings = LoadSettings(frozen_dtype="bfloat16")
    policy = load_policy(policy_folder, settings)
    reference = Reference(policy, policy_folder, settings).copy
    assert reference is not None
    scorer = scorer_on(policy, reward_folder, settings)
    for model, dtype in ((policy, torch.float32), (reference, torch.bfloat16), (scorer.model, torch.bfloat16)):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert scorer.score_sequences(ROWS).dtype == reference(LAYOUT).logprobs.dtype == torch.float32
    own = Reference(policy, policy_folder, settings, own=True).copy
    assert own is not None and own.model.dtype == torch.float32  # a moving reference needs full precision


# -- the reference ----------------------------------------------------------------------------------------------------


def test_other_adapters_do_not_change_reference_logprobs(
    policy: CausalLM, policy_folder: str, reward_adapter: str
) -> None:
    scorer_on(policy, reward_adapter)
    add_critic(policy, LORA, reward_adapter)
    reference = Reference(policy, policy_folder, LoadSettings())
    assert reference.models == ()
    expected = load_reference(policy_folder)(LAYOUT).logprobs
    assert torch.equal(reference.logprobs(LAYOUT), expected)
    assert not torch.allclose(policy(LAYOUT).logprobs, expected, atol=1e-2)


# -- the critic -------------------------------------------------------------------------------------------------------


def test_a_critic_starts_from_the_reward_model_and_is_trained_separately(policy: CausalLM, reward_adapter: str) -> None:
    scorer, critic = scorer_on(policy, reward_adapter), add_critic(policy, LORA, reward_adapter)
    assert critic.bias == scorer.model.bias == 0.5
    assert torch.equal(critic(LAYOUT), scorer.model(LAYOUT))
    critic(LAYOUT, per_token=True).sum().backward()
    reached = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert reached and all(".critic." in name for name in reached)
    assert critic.score.weight.grad is not None and scorer.model.head.weight.grad is None  # type: ignore[union-attr]
    scores, logprobs = scorer.score_sequences(ROWS), policy(LAYOUT).logprobs
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".critic." in name:
                parameter.add_(0.1)
    assert torch.equal(scorer.score_sequences(ROWS), scores) and torch.equal(policy(LAYOUT).logprobs, logprobs)


def test_without_a_reward_model_a_critic_starts_from_the_policy_with_a_zero_head(policy: CausalLM) -> None:
    critic = add_critic(policy, LORA)
    assert critic(LAYOUT, per_token=True).abs().sum() == 0
    with torch.no_grad():
        critic.score.weight.copy_(torch.linspace(-1, 1, 32))
        states = policy.model.base_model.model.model(LAYOUT.input_ids).last_hidden_state.flatten(0, 1)
        expected = LAYOUT.scatter(states[LAYOUT.predictors] @ torch.linspace(-1, 1, 32))
    torch.testing.assert_close(critic(LAYOUT, per_token=True), expected, atol=1e-5, rtol=1e-5)


def test_a_critic_of_another_backbone_is_refused_with_the_remedy(
    other_folder: str, reward_adapter: str, reward_folder: str
) -> None:
    policy = load_policy(other_folder, lora=LORA)
    for folder in (reward_adapter, reward_folder):
        with refused("other-backbone", f"cannot start from {folder}: ", "use critic='separate'"):
            add_critic(policy, LORA, folder)


def test_merging_keeps_updates_below_bf16_resolution(policy_folder: str, tokenizer: Any, tmp_path: Path) -> None:
    """An update of a thousandth of each weight is below bf16's resolution; merging rounds once and does not drop it."""
    trained = load_policy(policy_folder, lora=LORA)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.004)
    folder = str(export_policy(trained, tokenizer, tmp_path / "adapter"))
    whole, half = load_policy(folder), load_policy(folder, LoadSettings(dtype="bfloat16"))
    for expected, found in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(expected.bfloat16(), found)
    assert load_reward_model(folder, LoadSettings()).model.dtype == torch.float32
