from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import random_rows, save_policy, sequences, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from rlhf_lightning.models import adapters
from rlhf_lightning.models.adapters import CRITIC, POLICY, adapter_weights, add_adapter, read_adapter, with_adapter
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import LoadSettings, prepare_for_training
from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.models.scalar_head import hidden_states
from rlhf_lightning.tokenization import load_tokenizer

LAYOUT = padded_layout(sequences(random_rows(4, seed=31)))


def with_critic(folder: str, settings: LoadSettings | None = None, dropout: float = 0.0) -> CausalLM:
    """Return a policy with a second trainable adapter, both moved from their initial weights."""
    policy = load_policy(folder, settings, LoraSettings(r=4, dropout=dropout))
    add_adapter(policy.model, CRITIC, policy.model.peft_config[POLICY], trainable=True, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def trainable(policy: CausalLM) -> set[str]:
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def outputs(policy: CausalLM) -> Any:
    with torch.no_grad():
        return policy(LAYOUT).logprobs


@pytest.mark.parametrize("name", [CRITIC, POLICY, None])
def test_switching_adapters_restores_the_active_one_and_keeps_gradients(policy_folder: str, name: str | None) -> None:
    policy = with_critic(policy_folder)
    before, trained = outputs(policy), trainable(policy)
    assert {key.split(".")[-2] for key in trained} == {POLICY, CRITIC}
    with pytest.raises(RuntimeError, match="stop"), with_adapter(policy.model, name):
        assert trainable(policy) == trained
        inside = outputs(policy)
        raise RuntimeError("stop")
    assert torch.equal(outputs(policy), before) and trainable(policy) == trained
    assert torch.equal(inside, before) == (name == POLICY)
    bare = outputs(load_policy(policy_folder))
    assert torch.equal(inside, bare) == (name is None)


def test_adapter_switches_can_be_nested(policy_folder: str) -> None:
    policy = with_critic(policy_folder)
    with with_adapter(policy.model, CRITIC):
        critic = outputs(policy)
        with policy.as_reference():
            assert torch.equal(outputs(policy), outputs(load_policy(policy_folder)))
        assert torch.equal(outputs(policy), critic)


def test_pefts_set_adapter_would_freeze_the_critic(policy_folder: str) -> None:
    """The reason for the package's own switch; if this fails, peft no longer changes requires_grad."""
    policy = with_critic(policy_folder)
    trained = trainable(policy)
    with policy.model.disable_adapter():
        pass
    assert trainable(policy) < trained and not any(CRITIC in name for name in trainable(policy))


def test_a_new_adapter_is_the_identity_and_seeded(policy_folder: str) -> None:
    policy = load_policy(policy_folder, lora=LoraSettings(r=4))
    before, trained, state = outputs(policy), trainable(policy), torch.get_rng_state()
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        add_adapter(policy.model, name, policy.model.peft_config[POLICY], seed=seed)
    assert torch.equal(outputs(policy), before) and trainable(policy) == trained
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (adapter_weights(policy.model, name) for name in ("one", "same", "other"))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one if "lora_A" in key)


def test_frozen_adapters_have_no_dropout_in_train_mode(policy_folder: str, tmp_path: Path) -> None:
    first = with_critic(policy_folder, dropout=0.4)
    folder = str(export_policy(first, load_tokenizer(policy_folder), tmp_path / "adapter"))
    policy = load_policy(folder, lora=LoraSettings(r=4, dropout=0.4)).train()
    assert not torch.equal(outputs(policy), outputs(policy))
    with policy.as_reference():
        assert torch.equal(outputs(policy), outputs(policy))
        torch.testing.assert_close(outputs(policy), outputs(first.eval()), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_architecture_is_refused(policy_folder: str, tmp_path: Path) -> None:
    for name, changes in (("deeper", {"num_hidden_layers": 3}), ("wider", {"hidden_size": 64})):
        other = load_policy(save_policy(tmp_path / name, **changes), lora=LoraSettings(r=4))
        start = read_adapter(export_policy(other, load_tokenizer(policy_folder), tmp_path / f"{name}_adapter"))
        policy = load_policy(policy_folder, lora=LoraSettings(r=4))
        with refused("adapter-mismatch", "does not fit the backbone: ", " differ in name or shape"):
            add_adapter(policy.model, "foreign", start.config, start.weights)


def test_activation_checkpointing_recomputes_with_the_adapter_of_the_forward(policy_folder: str) -> None:
    """One backward pass through three forward passes with different adapters, after switching back."""
    found = []
    for checkpointing in (False, True):
        policy = with_critic(policy_folder, LoadSettings(activation_checkpointing=checkpointing)).train()
        with with_adapter(policy.model, CRITIC):
            total = policy(LAYOUT).logprobs.sum()
        total = total + 0.3 * policy(LAYOUT).logprobs.square().sum()
        with with_adapter(policy.model, CRITIC):
            total = total + 0.1 * policy(LAYOUT).logprobs.pow(3).sum()
        total.backward()
        found.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-4)


# -- long rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)], ids=["full", "lora"])
def test_chunked_mlps_give_the_same_gradients(lora: LoraSettings | None, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(40).view(2, 20) + 6
    found = []
    for cells in (4096, 7):
        monkeypatch.setattr(adapters, "CHUNK_CELLS", cells)
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(tiny_config())
        prepare_for_training(model, LoadSettings(activation_checkpointing=True))
        if lora is not None:
            model = add_lora(model, lora, "CAUSAL_LM")
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        with torch.no_grad():
            found[-1].append(model(input_ids=ids, use_cache=False).logits)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_update_materialises_neither_full_logits_nor_full_mlp_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the largest tensor of a forward and a backward pass over one row of 1,200 tokens."""
    length, vocabulary = 1200, 20_000

    class Largest(TorchDispatchMode):
        cells = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple | list) else (made,):
                if isinstance(one, torch.Tensor):
                    self.cells = max(self.cells, one.numel())
            return made

    monkeypatch.setattr(adapters, "CHUNK_CELLS", 300)
    sizes = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 4096, "max_position_embeddings": length}
    model: Any = LlamaForCausalLM(tiny_config(**sizes))
    prepare_for_training(model, LoadSettings(activation_checkpointing=True))
    policy = CausalLM(model).train()
    layout = padded_layout(sequences([(range(5), [7] * (length - 5))]))
    with Largest() as largest:
        policy(layout).logprobs.sum().backward()
    assert largest.cells <= 1024 * vocabulary < length * vocabulary
    with Largest() as largest:
        hidden_states(policy.model, layout).sum().backward()
    assert largest.cells <= max(300 * 4096, vocabulary * 16) < length * 4096
