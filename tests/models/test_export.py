import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from tiny_models import EOS, random_rows, sequences
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.export import export_policy, export_reward_model, model_name
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import LoadSettings, load_reward_hf_model
from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.models.resolving import fingerprint
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.models.scalar_head import ScalarModel

ROWS = random_rows(5, seed=41)
IDS = torch.tensor([prompt + completion for prompt, completion in random_rows(1, seed=42)])


def disturbed(model: nn.Module, seed: int = 0) -> None:
    """Change every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def padded(side: str) -> dict[str, torch.Tensor]:
    """Return the rows as a padded batch for plain transformers."""
    rows = [prompt + completion for prompt, completion in ROWS]
    width = max(map(len, rows)) + 1
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        cells = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, cells], mask[index, cells] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def reward_model(folder: str, lora: LoraSettings | None = None) -> ScalarModel:
    model = load_reward_hf_model(folder, LoadSettings(seed=2), pad_token_id=0)
    if lora is not None:
        model = add_lora(model, lora, "SEQ_CLS")
    trained = ScalarModel(model, bias=1.25)
    disturbed(trained)
    return trained


def own_scores(model: ScalarModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(padded_layout(sequences(ROWS)))


# -- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_head", [False, True])
def test_a_policy_loads_in_transformers_with_the_same_logits(
    policy_folder: str, tmp_path: Path, tokenizer: Any, value_head: bool
) -> None:
    policy = load_policy(policy_folder, value_head=value_head)
    disturbed(policy)
    folder = export_policy(policy, tokenizer, tmp_path / "model")
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits(loaded), logits(policy.model), atol=1e-5, rtol=1e-5)
    assert loaded.config.pad_token_id == tokenizer.pad_token_id != EOS
    assert loaded.config.use_cache


def test_the_next_stage_starts_from_the_exported_weights(policy_folder: str, tmp_path: Path, tokenizer: Any) -> None:
    policy = load_policy(policy_folder)
    disturbed(policy)
    folder = str(export_policy(policy, tokenizer, tmp_path / "model"))
    layout = padded_layout(sequences(ROWS))
    assert torch.equal(load_policy(folder)(layout).logprobs, policy(layout).logprobs)


@pytest.mark.parametrize("how", ["peft", "auto", "transformers"])
def test_an_adapter_loads_in_peft_with_the_same_logits(
    policy_folder: str, tmp_path: Path, tokenizer: Any, how: str
) -> None:
    policy = load_policy(policy_folder, lora=LoraSettings(r=4))
    disturbed(policy)
    folder = str(export_policy(policy, tokenizer, tmp_path / "model"))
    if how == "peft":
        base = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
        loaded: Any = PeftModel.from_pretrained(base, folder)
    elif how == "auto":
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(policy.model), atol=1e-5, rtol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    assert not torch.allclose(logits(plain), logits(policy.model), atol=1e-2)


def test_an_adapter_folder_names_its_backbone_and_has_only_adapter_weights(
    policy_folder: str, tmp_path: Path, tokenizer: Any
) -> None:
    policy = load_policy(policy_folder, lora=LoraSettings(r=4))
    folder = export_policy(policy, tokenizer, tmp_path / "model")
    record = json.loads((folder / "backbone.json").read_text())
    assert record == {"source": Path(policy_folder).name, "fingerprint": fingerprint(policy_folder)}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == policy_folder
    assert [file.name for file in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_only_adapter_folders_contain_the_path_of_the_backbone(
    policy_folder: str, tmp_path: Path, tokenizer: Any
) -> None:
    """A folder may be shared or pushed: local paths appear only where peft needs one."""

    def naming(folder: Path) -> set[str]:
        return {file.name for file in folder.iterdir() if policy_folder.encode() in file.read_bytes()}

    adapter = export_policy(load_policy(policy_folder, lora=LoraSettings(r=4)), tokenizer, tmp_path / "adapter")
    whole = export_policy(load_policy(policy_folder), tokenizer, tmp_path / "whole")
    assert naming(whole) == set() and naming(adapter) == {"adapter_config.json"}
    card = (adapter / "README.md").read_text()
    assert "base_model_name_or_path" in card and str(fingerprint(policy_folder)) in card


@pytest.mark.parametrize(
    ("source", "name"),
    [("owner/model", "owner/model"), ("/home/me/base", "base"), ("/x/runs/sft/version_3/model", "sft/version_3/model")],
)
def test_model_names_contain_no_local_path(source: str, name: str) -> None:
    assert model_name(source) == name


def test_an_adapter_with_a_missing_backbone_is_refused_with_the_remedy(
    policy_folder: str, tmp_path: Path, tokenizer: Any
) -> None:
    folder = export_policy(load_policy(policy_folder, lora=LoraSettings(r=4)), tokenizer, tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(policy_folder, "/gone/base"))
    with refused("no-model", "/gone/base", "base_model_name_or_path"):
        load_policy(str(folder))


def test_exporting_a_continued_adapter_omits_its_reference(policy_folder: str, tmp_path: Path, tokenizer: Any) -> None:
    first = load_policy(policy_folder, lora=LoraSettings(r=4))
    disturbed(first)
    start = str(export_policy(first, tokenizer, tmp_path / "first"))
    policy = load_policy(start, lora=LoraSettings(r=4))
    disturbed(policy, seed=1)
    folder = export_policy(policy, tokenizer, tmp_path / "second")
    assert not any("reference" in str(path) for path in folder.rglob("*"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == policy_folder
    base = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits(loaded), logits(policy.model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(loaded), logits(first.model), atol=1e-2)


def test_the_chat_template_is_exported_with_the_tokenizer(policy_folder: str, tmp_path: Path, tokenizer: Any) -> None:
    folder = export_policy(load_policy(policy_folder), tokenizer, tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "w7 w9"}]
    for template in (loaded.chat_template, tokenizer.chat_template):
        assert template is not None
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.pad_token_id == tokenizer.pad_token_id
    rendered = [t.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] for t in (loaded, tokenizer)]
    assert rendered[0] == rendered[1]
    stored = (folder / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(stored) == json.loads(tokenizer.backend_tokenizer.to_str()) and "\n" not in stored


def test_exporting_again_replaces_the_folder_atomically(policy_folder: str, tmp_path: Path, tokenizer: Any) -> None:
    target = tmp_path / "model"
    export_policy(load_policy(policy_folder, lora=LoraSettings(r=4)), tokenizer, target)
    policy = load_policy(policy_folder)
    export_policy(policy, tokenizer, target)
    assert not (target / "adapter_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert fingerprint(str(target)) == fingerprint(policy_folder)


def test_training_continues_after_an_export(policy_folder: str, tmp_path: Path, tokenizer: Any) -> None:
    policy = load_policy(policy_folder, lora=LoraSettings(r=4))
    before = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    export_policy(policy, tokenizer, tmp_path / "model")
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == before
    policy(padded_layout(sequences(ROWS))).logprobs.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in policy.parameters())


# -- reward models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_reward_model_gives_the_same_scores_in_transformers(
    reward_folder: str, tmp_path: Path, tokenizer: Any, side: str
) -> None:
    model = reward_model(reward_folder)
    folder = export_reward_model(model, tokenizer, tmp_path / "reward", reward_folder)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert loaded.config.num_labels == 1
    with torch.no_grad():
        scores = loaded(**padded(side)).logits.squeeze(-1)
    torch.testing.assert_close(scores, own_scores(model), atol=1e-5, rtol=1e-5)
    assert float(scores.std()) > 0.1


@pytest.mark.parametrize("how", ["peft", "auto"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_reward_adapter_gives_the_same_scores_in_peft_with_its_head(
    policy_folder: str, tmp_path: Path, tokenizer: Any, how: str, side: str
) -> None:
    model = reward_model(policy_folder, LoraSettings(r=4))
    folder = export_reward_model(model, tokenizer, tmp_path / "reward", policy_folder)
    if how == "peft":
        base = AutoModelForSequenceClassification.from_pretrained(
            policy_folder, dtype=torch.float32, num_labels=1, pad_token_id=0
        )
        loaded: Any = PeftModel.from_pretrained(base, folder)
    else:
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)
    with torch.no_grad():
        scores = loaded.eval()(**padded(side)).logits.squeeze(-1)
    torch.testing.assert_close(scores, own_scores(model), atol=1e-5, rtol=1e-5)


def test_the_score_bias_is_exported_in_the_config(reward_folder: str, tmp_path: Path, tokenizer: Any) -> None:
    model = reward_model(reward_folder)
    with_bias = export_reward_model(model, tokenizer, tmp_path / "biased", reward_folder)
    model.bias = 0.0
    without = export_reward_model(model, tokenizer, tmp_path / "plain", reward_folder)
    assert fingerprint(str(with_bias)) == fingerprint(str(without))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (with_bias, without)]
    assert [config.pop("score_bias") for config in configs] == [1.25, 0.0]
    assert configs[0] == configs[1]
    assert json.loads((with_bias / "backbone.json").read_text())["score_bias"] == 1.25


def test_a_policy_folder_exports_a_causal_lm(policy_folder: str) -> None:
    assert isinstance(load_policy(policy_folder), CausalLM) and load_policy(policy_folder).source == policy_folder
