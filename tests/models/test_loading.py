import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file
from tiny_models import FIRST_WORD, VOCABULARY, random_rows, save_policy, sequences, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, PreTrainedModel

from rlhf_lightning.loading import cache_folder
from rlhf_lightning.models.adapters import read_adapter
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.export import export_policy, export_reward_model
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import (
    LoadSettings,
    _from_pretrained,
    load_hf_model,
    load_reward_hf_model,
    prepare_for_training,
)
from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.models.resolving import fingerprint, is_adapter, load_base_of_adapter, resolve_folder
from rlhf_lightning.models.roles import load_policy, load_reference
from rlhf_lightning.models.scalar_head import ScalarModel

BATCH = sequences(random_rows(4, seed=31))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def bare_folder(tmp_path_factory: pytest.TempPathFactory, policy_folder: str) -> str:
    """Config and tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("bare")
    for file in Path(policy_folder).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return str(folder)


# -- names ------------------------------------------------------------------------------------------------------------


def test_existing_folders_and_hub_ids_resolve_and_missing_paths_are_refused(tmp_path: Path, policy_folder: str) -> None:
    assert resolve_folder(policy_folder) == policy_folder
    assert resolve_folder("gpt2") == "gpt2"
    assert resolve_folder("owner/model") == "owner/model"
    for missing in (str(tmp_path / "nowhere"), "./nowhere", "runs/sft/version_0/model", "~/no-such-folder-here"):
        with refused("no-model", "there is no model folder ", "no"):
            resolve_folder(missing.replace("runs", "no-runs"))
    with refused("no-model", "there is no file ", "weights.gguf"):
        resolve_folder(str(tmp_path / "weights.gguf"))


def test_environment_variables_set_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert cache_folder("~/mine") == Path.home() / "mine"
    monkeypatch.delenv("RLHF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "rlhf_lightning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "rlhf_lightning"


# -- weights ----------------------------------------------------------------------------------------------------------


def test_from_scratch_weights_depend_only_on_the_seed(bare_folder: str) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    first = weights(load_policy(bare_folder, LoadSettings(from_scratch=True, seed=4)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert equal(weights(load_policy(bare_folder, LoadSettings(from_scratch=True, seed=4))), first)
    assert not equal(weights(load_policy(bare_folder, LoadSettings(from_scratch=True, seed=5))), first)
    spread = first["model.model.embed_tokens.weight"][1:].std()
    assert float(spread) == pytest.approx(0.2, rel=0.04)  # the config's initializer_range


def test_from_scratch_ignores_stored_weights(policy_folder: str) -> None:
    stored = weights(load_policy(policy_folder))
    assert not equal(weights(load_policy(policy_folder, LoadSettings(from_scratch=True, seed=4))), stored)


@pytest.mark.parametrize("piece", ["bias", "weight_scale", "lora_A.weight"])
def test_unexpected_weights_of_a_layer_are_refused(piece: str, tmp_path: Path, policy_folder: str) -> None:
    shutil.copytree(policy_folder, tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    key = f"model.layers.1.self_attn.q_proj.{piece}"
    save_file(load_file(file) | {key: torch.ones(32)}, file, metadata={"format": "pt"})
    with refused("foreign-weights", key):
        load_policy(str(tmp_path / "x"))


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_integer_weights_without_a_scale_are_refused(kind: torch.dtype, tmp_path: Path, policy_folder: str) -> None:
    shutil.copytree(policy_folder, tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    key = "model.layers.1.self_attn.q_proj.weight"
    held = load_file(file)
    save_file(held | {key: (held[key] * 100).to(kind)}, file, metadata={"format": "pt"})
    with refused("integer-weights", key):
        load_policy(str(tmp_path / "x"))
    save_file(held | {"model.mask": torch.ones(4, dtype=kind)}, file, metadata={"format": "pt"})
    load_policy(str(tmp_path / "x"))  # a mask, as files of old models have


def test_an_adapter_of_integer_weights_is_refused(tmp_path: Path) -> None:
    save_file({"model.lora_A.weight": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "adapter_model.safetensors")
    with refused("integer-weights", "lora_A"):
        read_adapter(tmp_path)


def test_a_weight_of_the_wrong_shape_is_refused(tmp_path: Path, policy_folder: str) -> None:
    shutil.copytree(policy_folder, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text()) | {"vocab_size": VOCABULARY + 8}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with refused("unreadable-model", "model.embed_tokens.weight has the shape (120, 32)", "config.json says (128, 32)"):
        load_policy(str(tmp_path / "x"))


def test_a_wrong_shape_larger_than_memory_is_refused(tmp_path: Path, policy_folder: str) -> None:
    shutil.copytree(policy_folder, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text()) | {"vocab_size": 10**9}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with refused("unreadable-model", "(120, 32)", "(1000000000, 32)"):
        load_policy(str(tmp_path / "x"))


def test_a_memory_error_while_comparing_shapes_is_refused(tmp_path: Path) -> None:
    class Kind:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> None:
            raise MemoryError if options else RuntimeError("set ignore_mismatched_sizes to True")

    with refused("unreadable-model", "x: the shapes of the weights differ from config.json"):
        _from_pretrained("x", Kind, {})


def test_four_bit_weights_need_quantization_nf4(tmp_path: Path, policy_folder: str) -> None:
    load_policy(policy_folder, LoadSettings(quantization="nf4"), LoraSettings(r=2)).model.unload().save_pretrained(
        tmp_path
    )
    ids = torch.tensor([[7, 9, 30]])
    with refused("quantized-weights", "4 bits", "set quantization to nf4"):
        load_policy(str(tmp_path))
    with refused("quantized-weights"):
        load_policy(str(tmp_path), lora=LoraSettings(r=2))
    expected = load_reference(str(tmp_path)).model(input_ids=ids).logits
    policy = load_policy(str(tmp_path), LoadSettings(quantization="nf4"), LoraSettings(r=2))
    torch.testing.assert_close(policy.model(input_ids=ids).logits, expected)


def test_a_reward_model_as_policy_is_refused(reward_folder: str) -> None:
    with refused("reward-model", reward_folder):
        load_policy(reward_folder)


def test_unused_weights_are_reported(tmp_path: Path, policy_folder: str, caplog: Any) -> None:
    shutil.copytree(policy_folder, tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    save_file(load_file(file) | {"v_head.summary.weight": torch.ones(1, 32)}, file, metadata={"format": "pt"})
    with caplog.at_level(logging.INFO):
        load_policy(str(tmp_path / "x"))
        load_reward_hf_model(policy_folder, LoadSettings())
    assert "does not use: v_head.summary.weight." in caplog.text
    assert caplog.text.count("does not use") == 1


def test_a_folder_without_weights_is_refused_with_the_remedy(bare_folder: str) -> None:
    with refused("no-weights", "has no weights (no .safetensors file)", "from_scratch=true"):
        load_policy(bare_folder)


def test_missing_weights_are_refused(tmp_path: Path, policy_folder: str) -> None:
    folder = tmp_path / "half"
    shutil.copytree(policy_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with refused("incomplete-weights", "lacks weights for model.layers.1.mlp.up_proj.weight: it is not a complete"):
        load_policy(str(folder))


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_weights_are_loaded_in_the_requested_dtype(policy_folder: str, name: str) -> None:
    policy = load_policy(policy_folder, LoadSettings(dtype=name))
    assert {parameter.dtype for parameter in policy.parameters()} == {getattr(torch, name)}


def test_an_unsupported_dtype_is_refused(policy_folder: str) -> None:
    with refused("unknown-choice", "dtype is 'float16'", "'float32' or 'bfloat16'"):
        load_policy(policy_folder, LoadSettings(dtype="float16"))


def test_the_requested_attention_kernel_is_used(policy_folder: str) -> None:
    layout = padded_layout(BATCH)
    eager = load_policy(policy_folder, LoadSettings(attn_implementation="eager"))
    assert eager.model.config._attn_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(
            eager(layout).logprobs, load_policy(policy_folder)(layout).logprobs, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("from_scratch", [False, True])
def test_a_reward_model_from_a_causal_lm_gets_a_new_small_head(tmp_path: Path, from_scratch: bool) -> None:
    settings = LoadSettings(from_scratch, seed=3)
    policy_folder = save_policy(tmp_path / "policy", initializer_range=0.02)
    model = load_reward_hf_model(policy_folder, settings)
    trunk = weights(load_policy(policy_folder, settings).model.model)
    assert equal(weights(model.model), trunk)
    assert tuple(model.score.weight.shape) == (1, 32)
    # N(0, 1/33) on 32 weights: the sum of squares times 33 is chi-square with 32 degrees of freedom.
    assert 12 < float(model.score.weight.detach().square().sum()) * 33 < 63
    again = load_reward_hf_model(policy_folder, settings)
    assert torch.equal(again.score.weight, model.score.weight)
    other = load_reward_hf_model(policy_folder, LoadSettings(from_scratch, seed=4))
    assert not torch.equal(other.score.weight, model.score.weight)


def test_a_reward_model_keeps_its_trained_head(reward_folder: str) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32)
    assert equal(weights(load_reward_hf_model(reward_folder, LoadSettings())), weights(plain))


# -- what every stage needs -------------------------------------------------------------------------------------------


def gpt2_with_dropout() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, bos_token_id=2,
        eos_token_id=3, attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("config", [tiny_config(attention_dropout=0.5), gpt2_with_dropout()], ids=["llama", "gpt2"])
def test_dropout_is_disabled_on_load_even_in_train_mode(tmp_path: Path, config: Any) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy, layout = load_policy(str(tmp_path)), padded_layout(BATCH)
    assert policy.train().training
    trained = policy(layout).logprobs
    assert torch.equal(policy(layout).logprobs, trained)
    torch.testing.assert_close(policy.eval()(layout).logprobs, trained, atol=1e-6, rtol=0)
    policy.train()
    prepare_for_training(policy.model, LoadSettings(), dropout=0.5)
    assert not torch.allclose(policy(layout).logprobs, trained, atol=1e-2)


def test_lora_dropout_is_kept(policy_folder: str) -> None:
    policy, layout = load_policy(policy_folder, lora=LoraSettings(r=4, dropout=0.4)), padded_layout(BATCH)
    rates = {m.p for n, m in policy.named_modules() if n.endswith("lora_dropout.default")}
    assert rates == {0.4}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    policy.train()
    assert not torch.equal(policy(layout).logprobs, policy(layout).logprobs)


def test_an_eos_token_that_is_also_the_pad_token_gets_a_gradient(tmp_path: Path) -> None:
    policy = load_policy(save_policy(tmp_path / "shared", pad_token_id=3, tie_word_embeddings=False))
    rows = sequences([([FIRST_WORD, 3, 20], [21, 22, 3])])
    policy(padded_layout(rows)).logprobs.sum().backward()
    gradient = policy.model.get_input_embeddings().weight.grad
    assert float(gradient[3].norm()) > 1e-3
    assert float(gradient[50].norm()) == 0.0


def test_activation_checkpointing_gives_the_same_gradients(policy_folder: str) -> None:
    found = []
    for checkpointing in (False, True):
        policy = load_policy(policy_folder, LoadSettings(activation_checkpointing=checkpointing), LoraSettings(r=4))
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(2), std=0.05)
        policy.train()
        policy(padded_layout(BATCH)).logprobs.sum().backward()
        found.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


# -- adapters and the backbone they belong to -------------------------------------------------------------------------


def test_fingerprints_do_not_depend_on_saving_or_dtype(policy_folder: str, tmp_path: Path) -> None:
    expected = fingerprint(policy_folder)
    assert expected is not None and len(expected) == 32
    for name, dtype in (("again", torch.float32), ("half", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=dtype)
        model.save_pretrained(tmp_path / name)
        assert fingerprint(str(tmp_path / name)) == expected


def test_fingerprints_do_not_depend_on_sharding(tmp_path: Path) -> None:
    whole = save_policy(tmp_path / "whole", num_hidden_layers=12)  # sorted by name, layer 10 comes before layer 2
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert fingerprint(str(tmp_path / "shards")) == fingerprint(whole)


def test_fingerprints_of_different_weights_differ(policy_folder: str, other_folder: str, tmp_path: Path) -> None:
    assert fingerprint(other_folder) != fingerprint(policy_folder)
    policy = load_policy(policy_folder)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    (-policy(padded_layout(BATCH)).logprobs.mean()).backward()
    optimizer.step()
    policy.model.save_pretrained(tmp_path)
    assert fingerprint(str(tmp_path)) != fingerprint(policy_folder)


def test_hub_ids_and_folders_without_weights_have_no_fingerprint(bare_folder: str) -> None:
    assert fingerprint("owner/model") is None
    assert fingerprint(bare_folder) is None


def trained_adapter(base: str, folder: Path, tokenizer: Any) -> tuple[CausalLM, str]:
    policy = load_policy(base, lora=LoraSettings(r=4))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(6), std=0.1)
    return policy, str(export_policy(policy, tokenizer, folder))


def test_an_adapter_on_another_backbone_is_refused_with_both_fingerprints(
    tmp_path: Path, policy_folder: str, other_folder: str, tokenizer: Any
) -> None:
    base = tmp_path / "base"
    shutil.copytree(policy_folder, base)
    _, folder = trained_adapter(str(base), tmp_path / "adapter", tokenizer)
    assert is_adapter(folder) and not is_adapter(policy_folder)
    assert load_base_of_adapter(folder) == str(base)
    shutil.copy(Path(other_folder) / "model.safetensors", base)
    expected, found = str(fingerprint(policy_folder))[:8], str(fingerprint(other_folder))[:8]
    message = f"was trained on another backbone: its fingerprint is {expected}, that of {base} is {found}"
    for lora in (None, LoraSettings(r=4)):
        with refused("other-backbone", message):
            load_policy(folder, lora=lora)
    shutil.rmtree(base)
    with refused("no-model", f"there is no model folder {base}"):
        load_policy(folder)


def test_an_adapter_is_merged_for_full_fine_tuning(tmp_path: Path, policy_folder: str, tokenizer: Any) -> None:
    adapted, folder = trained_adapter(policy_folder, tmp_path / "adapter", tokenizer)
    merged, layout = load_policy(folder), padded_layout(BATCH)
    assert not merged.has_adapter and all(parameter.requires_grad for parameter in merged.parameters())
    with torch.no_grad():
        torch.testing.assert_close(merged(layout).logprobs, adapted(layout).logprobs, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(load_policy(policy_folder)(layout).logprobs, merged(layout).logprobs, atol=1e-2)


def test_a_reward_adapter_is_loaded_with_its_head(tmp_path: Path, policy_folder: str, tokenizer: Any) -> None:
    model = add_lora(load_reward_hf_model(policy_folder, LoadSettings(seed=3)), LoraSettings(r=4), "SEQ_CLS")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("score" in name for name in trainable)
    assert all("lora_" in name or "score" in name for name in trainable)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.normal_(generator=torch.Generator().manual_seed(7), std=0.1)
    trained = ScalarModel(model, bias=0.75)
    folder = str(export_reward_model(trained, tokenizer, tmp_path / "reward", policy_folder))
    loaded: PreTrainedModel = load_reward_hf_model(folder, LoadSettings())
    layout = padded_layout(BATCH)
    with torch.no_grad():
        torch.testing.assert_close(ScalarModel(loaded)(layout), trained(layout), atol=1e-4, rtol=1e-4)
    assert loaded.config.score_bias == 0.75


def test_lora_scales_its_update_by_alpha_over_r(policy_folder: str) -> None:
    policy = load_policy(policy_folder, lora=LoraSettings(r=4, alpha=12, targets=["v_proj"]))
    layer = policy.model.base_model.model.model.layers[0].self_attn.v_proj
    assert layer.scaling["default"] == 3.0
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
        x = torch.linspace(-1, 1, 32)
        expected = layer.base_layer(x) + 3.0 * layer.lora_B["default"].weight @ (layer.lora_A["default"].weight @ x)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_a_reward_model_can_start_from_a_policy_adapter(tmp_path: Path, policy_folder: str, tokenizer: Any) -> None:
    adapted, folder = trained_adapter(policy_folder, tmp_path / "adapter", tokenizer)
    rewards, layout = load_reward_hf_model(folder, LoadSettings(seed=3)), padded_layout(BATCH)
    with torch.no_grad():
        found = rewards.model(layout.input_ids).last_hidden_state
        expected = adapted.model.base_model.model.model(layout.input_ids).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    fresh = load_reward_hf_model(policy_folder, LoadSettings(seed=3))
    assert torch.equal(rewards.score.weight, fresh.score.weight)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_a_reward_adapter_as_policy_is_refused(
    tmp_path: Path, policy_folder: str, tokenizer: Any, lora: LoraSettings | None
) -> None:
    model = add_lora(load_reward_hf_model(policy_folder, LoadSettings()), LoraSettings(r=4), "SEQ_CLS")
    folder = str(export_reward_model(ScalarModel(model), tokenizer, tmp_path / "reward", policy_folder))
    with refused("reward-model", "is a reward model's: it scores completions and cannot generate them"):
        load_policy(folder, lora=lora)


def test_adapter_initialisation_depends_only_on_the_seed(policy_folder: str) -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        policy = load_policy(policy_folder, LoadSettings(seed=seed), LoraSettings(r=4))
        return {name: parameter for name, parameter in weights(policy).items() if "lora_A" in name}

    torch.manual_seed(1)
    state, first = torch.get_rng_state(), drawn(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert first and equal(drawn(3), first)
    assert not equal(drawn(4), first)


def test_load_hf_model_loads_a_plain_folder(policy_folder: str) -> None:
    model = load_hf_model(policy_folder, AutoModelForCausalLM, LoadSettings())
    stored = json.loads((Path(policy_folder) / "config.json").read_text())
    assert model.config.hidden_size == stored["hidden_size"] == 32
    assert math.isclose(float(model.get_input_embeddings().weight.detach().std()), 0.2, rel_tol=0.04)
