"""Adapt, merge, export and reload LM heads, embeddings and special tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import (
    VOCABULARY,
    demonstration_step,
    fit,
    plain_logprobs,
    preference_step,
    prompt_step,
    quiet_trainer,
    random_rows,
    ranked_pairs,
    ranked_step,
    save_policy,
    save_reward_model,
    sequences,
    tiny_tokenizer,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rlhf_lightning.commands import export
from rlhf_lightning.data import SFTDataModule
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.limits import check_rows, limits_of
from rlhf_lightning.models.loading import LoadSettings, load_weights
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.modules import DPOModule, PPOModule, RewardModule, SFTModule
from rlhf_lightning.scoring import LearnedScorer

ROWS = random_rows(4, seed=9)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_head_or_embeddings_trains_and_merges(tmp_path: Path, tied: bool, target: str) -> None:
    folder = save_policy(tmp_path / "policy", tie_word_embeddings=tied)
    policy = load_policy(folder, lora=LoraSettings(r=4, targets=[target, "q_proj"]))
    layout = padded_layout(sequences(ROWS))
    policy(layout).logprobs.sum().backward()
    adapted = {name: p for name, p in policy.named_parameters() if p.requires_grad and target in name}
    assert adapted and any(p.grad is not None and p.grad.any() for p in adapted.values())
    with torch.no_grad():
        for parameter in adapted.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        found = policy(layout).logprobs
        for row, (prompt, completion) in enumerate(ROWS):
            expected = plain_logprobs(policy.model, prompt, completion)
            torch.testing.assert_close(found[row, : len(completion)], expected, atol=1e-4, rtol=1e-4)
    export_policy(policy, tiny_tokenizer(), tmp_path / "adapter")
    merged = load_weights(str(tmp_path / "adapter"), AutoModelForCausalLM, LoadSettings())
    ids = torch.tensor([ROWS[0][0] + ROWS[0][1]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, policy.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert export.merge_adapter(tmp_path / "adapter", tmp_path / "merged") < 1e-3
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(again(ids).logits, policy.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_merge_that_changes_the_outputs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_policy(tmp_path / "policy")
    policy = load_policy(folder, lora=LoraSettings(r=4))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    export_policy(policy, tiny_tokenizer(), tmp_path / "adapter")
    whole = load_policy(folder).model
    monkeypatch.setattr("rlhf_lightning.models.loading.load_weights", lambda *_args, **_kwargs: whole)
    with refused("merge-differs", "logits that differ by"):
        export.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def tokenizer_without_spare_token() -> PreTrainedTokenizerFast:
    """Return a tokenizer without an unused token; one token is beginning, end and unknown."""
    words = ["<|end|>", *(f"w{index}" for index in range(40))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|end|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>", unk_token="<|end|>"
    )


def test_all_stages_work_without_a_spare_pad_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_without_spare_token()
    size = len(tokenizer)
    folder = save_policy(tmp_path / "base", vocab_size=size, pad_token_id=None, eos_token_id=0, bos_token_id=0)
    tokenizer.save_pretrained(folder)
    rows = [([5, 6, 7], [8, 9, 0]), ([4, 8], [3, 0])]
    pairs = [([5, 6], [7, 8, 0], [9, 0]), ([4], [6, 0], [8, 9, 0])]
    stages: list[tuple[str, Any, Any, list[Any]]] = [
        ("sft", SFTModule, {}, [demonstration_step(rows)]),
        ("dpo", DPOModule, {}, [preference_step(pairs)]),
        ("reward", RewardModule, {}, [ranked_step(ranked_pairs(pairs))]),
    ]
    start = folder
    for name, kind, settings, steps in stages:
        module = kind(init_from=start, **settings)
        fit(module, steps)
        exported = module.export(tmp_path / name)
        loaded = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
        whole = loaded.from_pretrained(exported)
        pad = AutoTokenizer.from_pretrained(exported).pad_token_id
        assert pad == whole.config.pad_token_id == size < whole.get_input_embeddings().num_embeddings
        with torch.no_grad():
            whole(input_ids=torch.tensor([[5, 6, pad], [5, 6, 7]]))
        if name != "reward":
            start = str(exported)
    module = PPOModule(
        init_from=start,
        max_new_tokens=4,
        scorer={"class_path": "LearnedScorer", "init_args": {"folder": str(tmp_path / "reward")}},
    )
    fit(module, [prompt_step([[5, 6], [7]], texts=["w4 w5", "w6"])])
    AutoModelForCausalLM.from_pretrained(module.export(tmp_path / "ppo"))


def test_the_generation_config_lists_every_token_that_ends_a_turn(tmp_path: Path) -> None:
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", *(f"w{index}" for index in range(36))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    folder = save_policy(tmp_path / "base", vocab_size=40, eos_token_id=0, pad_token_id=3)
    tokenizer.save_pretrained(folder)
    module = SFTModule(init_from=folder, chat_template="chatml")
    fit(module, [demonstration_step([([5, 6], [7, 2])])])
    model = AutoModelForCausalLM.from_pretrained(module.export(tmp_path / "sft"))
    assert model.generation_config.eos_token_id == [0, 2] and model.generation_config.pad_token_id == 3


def test_rows_beyond_embeddings_or_positions_are_refused(tmp_path: Path, policy_folder: str) -> None:
    limits = limits_of(AutoModelForCausalLM.from_pretrained(policy_folder))
    tokenizer = tiny_tokenizer()
    check_rows(limits, tokenizer, VOCABULARY - 1, torch.tensor([limits.trained]))
    with refused("tokenizer-larger-than-model", f"(id {VOCABULARY}), but LlamaForCausalLM has {VOCABULARY} embeddings"):
        check_rows(limits, tokenizer, VOCABULARY, torch.tensor([1]))
    with pytest.warns(UserWarning, match="1 rows are longer than the 128 tokens that LlamaForCausalLM was trained on"):
        check_rows(limits, tokenizer, 5, torch.tensor([3, 129]))
    for name, positions in (("gpt2", 32), ("opt", 32)):
        config = AutoConfig.for_model(
            name, vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
            ffn_dim=32, word_embed_proj_dim=32,
        )  # fmt: skip
        learned = limits_of(AutoModelForCausalLM.from_config(config))
        assert learned.positions == positions and learned.trained is None
        with refused("positions-exceeded", "1 rows are longer than the 32 positions"):
            check_rows(learned, tokenizer, 5, torch.tensor([33, 32]))


def test_a_row_longer_than_the_positions_is_refused_before_training(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "w7 w8 w9", "completion": "w10 " * 9}) + "\n")
    module = SFTModule(init_from=str(tmp_path / "gpt2"))
    data = SFTDataModule(source=str(tmp_path / "rows.jsonl"), batch_size=1)
    with refused("positions-exceeded", "positions of GPT2LMHeadModel"):
        quiet_trainer(limit_val_batches=0).fit(module, data)


def test_streamed_rows_and_scored_texts_beyond_the_positions_are_refused(tmp_path: Path) -> None:
    """If rows cannot be checked before training, the forward pass raises the error."""
    positions = {"max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, num_labels=1, **positions)  # fmt: skip
    for kind, name in ((AutoModelForCausalLM, "policy"), (AutoModelForSequenceClassification, "reward")):
        kind.from_config(config).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "w7 w8 w9", "completion": "w10 " * 20}) + "\n")
    data = SFTDataModule(source=str(tmp_path / "rows.jsonl"), batch_size=1, streaming=True, steps_per_epoch=2)
    with refused("positions-exceeded", "GPT2Model"):
        quiet_trainer(limit_val_batches=0).fit(SFTModule(init_from=str(tmp_path / "policy")), data)
    with refused("positions-exceeded", "GPT2Model"):
        LearnedScorer(str(tmp_path / "reward"))(["w7"], ["w8 " * 20])
    small = save_reward_model(tmp_path / "small", vocab_size=20)
    with refused("tokenizer-larger-than-model", "20 embeddings"):
        LearnedScorer(small)(["w7"], ["w30"])
