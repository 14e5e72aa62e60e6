"""Train, export and merge all forms of adapters: DoRA, rsLoRA, patterns, experts, full modules, token rows."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    EOS,
    VOCABULARY,
    fit,
    plain_logprobs,
    prompt_step,
    random_rows,
    ranked_pairs,
    ranked_step,
    save_policy,
    sequences,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM

from models.families import build
from rlhf_lightning.commands import export
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.frozen import Reference
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import LoadSettings, load_reward_hf_model
from rlhf_lightning.models.lora import LoraSettings, add_lora, lora_settings
from rlhf_lightning.models.roles import add_critic, load_policy
from rlhf_lightning.modules import PPOModule, RewardModule

ROWS = random_rows(4, seed=9)
LAYOUT = padded_layout(sequences(ROWS))
FORMS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "rows": {"trained_tokens": [7, 9, 30]},
}


def backbone(folder: Path, form: str, tied: bool = True) -> str:
    if form != "experts":
        return save_policy(folder, tie_word_embeddings=tied)
    model = build("qwen3_moe", AutoModelForCausalLM, vocab_size=VOCABULARY, eos_token_id=3, bos_token_id=2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def moved(policy: CausalLM) -> CausalLM:
    """Return the policy with every trained weight changed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return policy.eval()


def own(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [plain_logprobs(model, prompt, completion) for prompt, completion in ROWS]


def ours(policy: CausalLM) -> list[torch.Tensor]:
    with torch.no_grad():
        found = policy(LAYOUT).logprobs
    return [found[row, : len(completion)] for row, (_, completion) in enumerate(ROWS)]


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_form_trains_exports_continues_and_merges(tmp_path: Path, form: str, tied: bool) -> None:
    lora = LoraSettings(r=4, alpha=8, **FORMS[form])
    folder = backbone(tmp_path / "base", form, tied)
    bare = ours(load_policy(folder))
    policy = load_policy(folder, lora=lora)
    policy(LAYOUT).logprobs.sum().backward()
    trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    silent = [
        n for n, w in trained.items() if w.grad is None or not w.grad.any() and "lora_A" not in n and "experts" not in n
    ]
    assert trained and not silent, silent
    moved(policy)
    assert close(ours(policy), own(policy.model)) and not close(ours(policy), bare)
    with policy.as_reference():
        assert close(ours(policy), bare)
    export_policy(policy, tiny_tokenizer(), tmp_path / "adapter")
    foreign = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter")).eval()
    assert close(own(foreign), ours(policy))
    again = load_policy(str(tmp_path / "adapter"), lora=LoraSettings(r=4, alpha=8))
    assert close(ours(again), ours(policy))
    moved(again)
    with again.as_reference():
        assert close(ours(again), ours(policy))
    assert close(ours(again), own(again.model)) and not close(ours(again), ours(policy))
    assert export.merge_adapter(tmp_path / "adapter", tmp_path / "merged") < 1e-3
    merged = load_policy(str(tmp_path / "merged"))
    assert close(ours(merged), ours(policy))
    assert close(own(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), ours(policy))


@pytest.mark.parametrize("form", ["dora", "rows"])
def test_a_critic_on_the_same_backbone_has_its_own_adapter(tmp_path: Path, form: str) -> None:
    policy = moved(load_policy(backbone(tmp_path / "base", form), lora=LoraSettings(r=4, **FORMS[form])))
    before = ours(policy)
    critic = add_critic(policy, LoraSettings())
    torch.nn.init.normal_(critic.score.weight)
    values = critic(LAYOUT, per_token=True)
    values.sum().backward()
    assert any(w.grad is not None and w.grad.any() for n, w in policy.named_parameters() if ".critic" in n)
    moved(policy)
    assert not torch.allclose(critic(LAYOUT, per_token=True), values) and not close(ours(policy), before)
    with refused("moving-reference-adapter"):
        Reference(policy, str(tmp_path / "base"), LoadSettings(), own=True)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_token_rows_are_inherited_by_a_reward_model(tmp_path: Path, tied: bool) -> None:
    base = backbone(tmp_path / "base", "rows", tied)
    lora = LoraSettings(r=2, trained_tokens=[7, 9])
    export_policy(moved(load_policy(base, lora=lora)), tiny_tokenizer(), tmp_path / "policy")
    reward = RewardModule(init_from=str(tmp_path / "policy"), lora=LoraSettings(r=2))
    pairs = [([5, 6], [7, 8, EOS], [9, EOS]), ([4], [6, EOS], [8, 9, EOS])]
    fit(reward, [ranked_step(ranked_pairs(pairs))])
    deltas = [w for n, w in reward.model.named_parameters() if "trainable_tokens_delta" in n and w.requires_grad]
    assert len(deltas) == 1 and bool(deltas[0].isfinite().all())
    reward.export(tmp_path / "reward")
    module = PPOModule(
        init_from=str(tmp_path / "policy"), lora=LoraSettings(r=2), max_new_tokens=4, critic="adapter",
        scorer={"class_path": "LearnedScorer", "init_args": {"folder": str(tmp_path / "reward")}},
    )  # fmt: skip
    fit(module, [prompt_step([[5, 6], [7]], texts=["w5 w6", "w7"])])
    assert module.rollouts == 1


def test_a_shared_critic_is_refused_if_whole_modules_are_trained(tmp_path: Path) -> None:
    policy = load_policy(backbone(tmp_path / "base", "head"), lora=LoraSettings(modules_to_save=["lm_head"]))
    with refused("adapter-critic-whole-modules", "use critic='separate'"):
        add_critic(policy, LoraSettings())
    export_policy(policy, tiny_tokenizer(), tmp_path / "adapter")
    settings = LoadSettings()
    model = load_reward_hf_model(str(tmp_path / "base"), settings)
    with refused("unsupported-adapter", "trains lm_head in full"):
        add_lora(model, LoraSettings(), "SEQ_CLS", start_from=str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank_pattern": {"dwn_proj": 4}}, "rank_pattern names 'dwn_proj', which LlamaForCausalLM does not have"),
        ({"target_parameters": ["experts.up"]}, "target_parameters names 'experts.up'"),
        ({"modules_to_save": ["head"]}, "modules_to_save names 'head'"),
        ({"trained_tokens": [VOCABULARY]}, f"give the ids of tokens below {VOCABULARY}"),
        ({"target_parameters": ["q_proj.weight"], "dropout": 0.1}, "excludes dropout and dora"),
    ],
)
def test_lora_settings_that_match_no_module_are_refused(
    policy_folder: str, settings: dict[str, Any], words: str
) -> None:
    with refused("impossible-lora", words):
        load_policy(policy_folder, lora=LoraSettings(**settings))


def test_a_continued_adapter_keeps_its_settings(tmp_path: Path, policy_folder: str, caplog: Any) -> None:
    policy = load_policy(policy_folder, lora=LoraSettings(r=4, rslora=True))
    export_policy(policy, tiny_tokenizer(), tmp_path / "adapter")
    with refused("continued-lora", "lora.dora is True, but the adapter in", "was trained with False"):
        load_policy(str(tmp_path / "adapter"), lora=LoraSettings(dora=True))
    with caplog.at_level(logging.INFO):
        load_policy(str(tmp_path / "adapter"), lora=LoraSettings(r=16, rslora=True))
    assert "keeps its r=4 and alpha=32" in caplog.text


def test_adapters_other_than_lora_are_refused(tmp_path: Path, policy_folder: str) -> None:
    from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig

    kinds = {
        "IA3": IA3Config(task_type="CAUSAL_LM"),
        "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    for kind, config in kinds.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy_folder), config)
        model.save_pretrained(tmp_path / kind)
        for lora in (None, LoraSettings()):
            with refused("unsupported-adapter", f"peft_type '{kind}': only LORA adapters can be used; merge it"):
                load_policy(str(tmp_path / kind), lora=lora)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alora_invocation_tokens": [7, 8]}, "sets alora_invocation_tokens, which changes the model's forward pass"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "sets layer_replication"),
        ({"bias": "all"}, "trains biases of its backbone"),
    ],
)
def test_lora_variants_with_another_forward_are_refused(
    tmp_path: Path, policy_folder: str, changes: dict[str, Any], words: str
) -> None:
    export_policy(load_policy(policy_folder, lora=LoraSettings(r=4)), tiny_tokenizer(), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with refused("unsupported-adapter", words):
        load_policy(str(tmp_path / "adapter"), lora=LoraSettings(r=4))


def test_unadapted_experts_are_reported(caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        add_lora(build("granitemoe", AutoModelForCausalLM), LoraSettings(r=2), "CAUSAL_LM")
    assert "GraniteMoeForCausalLM: all-linear does not adapt fused experts" in caplog.text
    assert "lora.target_parameters: [experts.down_proj, experts.gate_up_proj]" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        add_lora(build("qwen3_moe", AutoModelForCausalLM), LoraSettings(r=2), "CAUSAL_LM")
    assert "fused experts" not in caplog.text


def test_peft_settings_are_converted() -> None:
    given = LoraConfig(
        r=4, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"],
        trainable_token_indices=[3], target_modules=["q_proj"],
    )  # fmt: skip
    found = lora_settings(given)
    assert found == LoraSettings(
        r=4, alpha=8, targets=["q_proj"], rslora=True, dora=True, rank_pattern={"q_proj": 2},
        modules_to_save=["lm_head"], trained_tokens=[3],
    )  # fmt: skip
    with refused("unsupported-lora", "LoraConfig sets lora_bias"):
        lora_settings(LoraConfig(lora_bias=True))
