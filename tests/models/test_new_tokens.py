"""Test new tokens, stop tokens, vocabularies of different sizes, and rows beyond the LongRoPE switch length."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from peft import PeftModel
from tiny_models import (
    EOS,
    VOCABULARY,
    demonstration_step,
    fit,
    plain_logprobs,
    prompt_step,
    save_policy,
    save_reward_model,
    sequences,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.families import build
from rlhf_lightning.commands import export
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.limits import check_rows, limits_of
from rlhf_lightning.models.loading import make_room
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.models.scalar_head import rope_switch, text_config
from rlhf_lightning.modules import DPOModule, PPOModule, SFTModule
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.tokenization import encode_completion, end_token_ids, load_tokenizer

NEW = ["<act>", "</act>"]


def test_new_tokens_are_trained_and_exported(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "base", tie_word_embeddings=False)
    module = SFTModule(init_from=folder, new_tokens=NEW, learning_rate=0.1, warmup=0, lr_schedule="constant")
    ids = module.tokenizer.convert_tokens_to_ids(NEW)
    assert ids == [VOCABULARY, VOCABULARY + 1]
    assert encode_completion(module.tokenizer, "w7 <act> w8 </act>", "w9")[0] == [7, ids[0], 8, ids[1], EOS]
    fit(module, [demonstration_step([([5, 6], [7, ids[0], 8, ids[1], EOS])])])
    rows = module.policy.model.get_input_embeddings().weight
    assert rows.shape[0] == VOCABULARY + 2 and not torch.equal(rows[ids[0]], rows[ids[1]])
    exported = module.export(tmp_path / "sft")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert model.config.vocab_size == len(tokenizer) == VOCABULARY + 2
    text = tokenizer("w7 <act>", add_special_tokens=False)["input_ids"]
    assert text == [7, ids[0]] and tokenizer.decode(text, skip_special_tokens=True) == "w7 <act>"
    after = DPOModule(init_from=str(exported), new_tokens=NEW)  # the same setting again adds nothing
    assert len(after.tokenizer) == VOCABULARY + 2
    after.configure_model()
    assert after.policy.model.get_input_embeddings().weight.shape[0] == VOCABULARY + 2
    logits = model(torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(after.policy.model(torch.tensor([[5, 6, 7]])).logits, logits)


def test_embeddings_only_grow_and_new_rows_are_the_mean(policy_folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    before = model.get_input_embeddings().weight.detach().clone()
    make_room(model, 10)
    assert torch.equal(model.get_input_embeddings().weight, before)
    make_room(model, VOCABULARY + 3)
    after = model.get_input_embeddings().weight
    assert torch.equal(after[:VOCABULARY], before) and model.config.vocab_size == VOCABULARY + 3
    torch.testing.assert_close(after[VOCABULARY:], before.mean(0).expand(3, -1))
    assert model.get_output_embeddings().weight is after


def test_an_adapter_trains_the_embedding_rows_of_new_tokens(tmp_path: Path) -> None:
    small = save_policy(tmp_path / "small")
    with refused("new-tokens-need-rows", f"has {VOCABULARY} embeddings", "--new_tokens"):
        SFTModule(init_from=small, new_tokens=NEW, lora=LoraSettings(r=2)).configure_model()
    assert export.main([small, "--out", str(tmp_path / "larger"), "--new_tokens", json.dumps(NEW)]) == 0
    SFTModule(init_from=str(tmp_path / "larger"), new_tokens=NEW, lora=LoraSettings(r=2)).configure_model()
    folder = save_policy(tmp_path / "padded", vocab_size=VOCABULARY + 8)
    module = SFTModule(
        init_from=folder, new_tokens=NEW, lora=LoraSettings(r=2, trained_tokens=["w7"]), learning_rate=0.1,
        warmup=0, lr_schedule="constant",
    )  # fmt: skip
    ids = module.tokenizer.convert_tokens_to_ids(NEW)
    fit(module, [demonstration_step([([5, 6], [7, ids[0], 8, ids[1], EOS])])])
    start = AutoModelForCausalLM.from_pretrained(folder)
    rows = module.policy.model.get_input_embeddings().weight - start.get_input_embeddings().weight
    assert set(rows.abs().sum(-1).nonzero().flatten().tolist()) == {7, *ids}
    exported = module.export(tmp_path / "sft")
    foreign = PeftModel.from_pretrained(start, str(exported))
    batch = torch.tensor([[5, 6, 7, ids[0]]])
    torch.testing.assert_close(foreign(batch).logits, module.policy.model(batch).logits)
    after = DPOModule(init_from=str(exported), lora=LoraSettings(r=2))
    after.configure_model()
    torch.testing.assert_close(after.policy.model(batch).logits, foreign(batch).logits)
    with refused("unknown-token", "'<gone>' is not a token of"):
        SFTModule(init_from=folder, lora=LoraSettings(trained_tokens=["<gone>"])).configure_model()


def test_the_end_token_of_the_chat_template_ends_a_turn(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "base")
    module = SFTModule(init_from=folder, new_tokens=["<|im_start|>", "<|im_end|>"], chat_template="chatml")
    end = module.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_token_ids(module.tokenizer) == (EOS, end)
    asked = [{"role": "user", "content": "w7"}]
    assert encode_completion(module.tokenizer, "w8", asked)[0] == [8, end]


def test_stop_tokens_and_generation_config_define_end_tokens(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "base")
    file = Path(folder) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [EOS, 4, 2, 0, 17, 999]}))
    # from the generation config only special tokens, without BOS and padding
    assert end_token_ids(load_tokenizer(folder)) == (EOS, 4)
    tokenizer = load_tokenizer(folder, stop_tokens=["w9"])
    assert end_token_ids(tokenizer) == (EOS, 4, 9)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert end_token_ids(load_tokenizer(tmp_path / "saved")) == (EOS, 4, 9)
    with refused("stop-token-unknown", "'w9 w8' is 2 tokens"):
        load_tokenizer(folder, stop_tokens=["w9 w8"])
    module = SFTModule(init_from=folder, stop_tokens=[f"w{index}" for index in range(6, 60)])
    fit(module, [demonstration_step([([5, 6], [7, EOS])])])
    for engine in ("SlotEngine", "GenerateEngine"):
        from rlhf_lightning.sampling.slot_engine import load_engine

        module.engine = load_engine(engine)
        drawn = module.complete([torch.tensor([5, 6])] * 8, torch.arange(8), SamplingSettings(30), 0)
        assert bool(drawn.finished.all())
        ends = set(end_token_ids(module.tokenizer))
        assert all(ids[-1].item() in ends and not ends & set(ids[:-1].tolist()) for ids in drawn.ids)
    exported = AutoModelForCausalLM.from_pretrained(module.export(tmp_path / "sft"))
    assert exported.generation_config.eos_token_id == [EOS, 4, *range(6, 60)]


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "<e>": 2}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(split=False), decoders.Fuse()
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>").save_pretrained(tmp_path / "t")
    with refused("tokenizer-loses-spaces", "'a b' is read as 'ab'"):
        load_tokenizer(tmp_path / "t")


def ppo(folder: str, reward: str, **settings: Any) -> PPOModule:
    return PPOModule(
        init_from=folder, max_new_tokens=6, scorer={"class_path": "LearnedScorer", "init_args": {"folder": reward}},
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_roles_may_have_vocabularies_padded_to_different_sizes(tmp_path: Path, critic: Any) -> None:
    """Ids of padding rows can be sampled; a critic and a reward model with a smaller vocabulary must
    still read them.
    """
    folder = save_policy(tmp_path / "policy", vocab_size=VOCABULARY + 400, initializer_range=0.01)
    reward = save_reward_model(tmp_path / "reward")
    module = ppo(folder, reward, critic=critic)
    fit(module, [prompt_step([[5, 6], [7]] * 4, texts=["w5 w6", "w7"] * 4)])
    drawn = module.complete([torch.tensor([5, 6])] * 8, torch.arange(8), module.sampling, 0)
    assert max(int(ids.max()) for ids in drawn.ids) >= VOCABULARY


def test_a_critic_is_not_initialised_from_a_reward_model_with_another_vocabulary(tmp_path: Path, caplog: Any) -> None:
    folder, reward = save_policy(tmp_path / "policy"), save_reward_model(tmp_path / "reward")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(reward)
    module = ppo(folder, reward)
    with caplog.at_level("INFO"):
        module.configure_model()
    assert f"the critic starts from {folder}, since the reward model" in caplog.text
    assert module.critic is not None
    mine, theirs = (m.model.get_input_embeddings().weight for m in (module.critic, module.policy))
    assert torch.equal(mine, theirs)


# -- rotary positions that switch -------------------------------------------------------------------------------------


def long_rope(tmp_path: Path) -> str:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0],
    }  # fmt: skip
    model = build(
        "phi3", AutoModelForCausalLM, vocab_size=VOCABULARY, max_position_embeddings=64, hidden_size=32,
        original_max_position_embeddings=16, rope_parameters=rope, num_attention_heads=4, pad_token_id=0,
        eos_token_id=EOS, bos_token_id=2, partial_rotary_factor=1.0,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "long")
    tiny_tokenizer().save_pretrained(tmp_path / "long")
    return str(tmp_path / "long")


def test_rows_on_both_sides_of_the_longrope_switch_equal_single_rows(tmp_path: Path) -> None:
    policy = load_policy(long_rope(tmp_path)).eval()
    assert rope_switch(text_config(policy.model)) == 16 and not policy.reads_trees
    assert policy.decoding is None
    rows = [([7, 8, 9], [10, 11, 3]), ([7] * 12, [9] * 9), ([5, 6], [7, 8, 9, 3])]
    with torch.no_grad():
        found = policy(padded_layout(sequences(rows))).logprobs
        for row, (prompt, completion) in enumerate(rows):
            expected = plain_logprobs(policy.model, prompt, completion)
            torch.testing.assert_close(found[row, : len(completion)], expected, atol=1e-4, rtol=1e-4)


def test_completions_across_the_longrope_switch_equal_the_plain_model(tmp_path: Path) -> None:
    policy = load_policy(long_rope(tmp_path)).eval()
    prompts = [torch.tensor([7, 8, 9, 10, 11, 12, 13, 14, 15, 16]), torch.tensor([5, 6])]
    drawn = SlotEngine().sample(policy, prompts, torch.arange(2), SamplingSettings(12), 0, [])
    for prompt, ids, logprobs in zip(prompts, drawn.ids, drawn.logprobs, strict=True):
        for place in range(len(ids)):  # each token from the model's own forward of the text before it
            before = torch.cat([prompt, ids[:place]]).unsqueeze(0)
            with torch.no_grad():
                expected = policy.model(input_ids=before, use_cache=False).logits[0, -1].log_softmax(-1)[ids[place]]
            torch.testing.assert_close(logprobs[place], expected, atol=1e-4, rtol=1e-4)
    short = SlotEngine().sample(policy, prompts, torch.arange(2), SamplingSettings(4), 0, [])
    assert policy.decoding == "slots" and len(short.ids[0]) == 4


def test_rollouts_across_the_longrope_switch_are_refused(tmp_path: Path) -> None:
    limits = limits_of(load_policy(long_rope(tmp_path)).model)
    check_rows(limits, tiny_tokenizer(), 5, torch.tensor([16, 30]))  # fixed rows may be on both sides of the switch
    check_rows(limits, tiny_tokenizer(), 5, torch.tensor([16, 12]), sampled=8)
    check_rows(limits, tiny_tokenizer(), 5, torch.tensor([30]), sampled=8)
    with refused("rope-switch", "so that rows end within 16 tokens"):
        check_rows(limits, tiny_tokenizer(), 5, torch.tensor([20]), sampled=8)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    folder = save_policy(tmp_path / "dynamic", max_position_embeddings=16, rope_parameters=rope)
    rescaled = limits_of(load_policy(folder).model)
    with refused("rope-rescales", "longer than the 16 at which LlamaForCausalLM begins"):
        check_rows(rescaled, tiny_tokenizer(), 5, torch.tensor([17]))
