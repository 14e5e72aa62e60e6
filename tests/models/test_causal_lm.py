from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import FIRST_WORD, VOCABULARY, plain_logprobs, random_rows, save_policy, sequences
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig

from rlhf_lightning.models.causal_lm import CausalLM, OverLogits, inference_mode_of
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.layout import Layout, padded_layout
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy, load_reference
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import sample

ROWS = random_rows(5, seed=3)
BATCH = sequences(ROWS)


@pytest.fixture(scope="module")
def policy(policy_folder: str) -> CausalLM:
    return load_policy(policy_folder)


@pytest.fixture(scope="module")
def plain(policy_folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)


def by_hand(plain: Any, temperature: float = 1.0, rows: list[Any] = ROWS) -> list[Tensor]:
    with torch.no_grad():
        return [plain_logprobs(plain, *row, temperature) for row in rows]


def assert_rows(grid: Tensor, expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for row, values in zip(grid, expected, strict=True):
        torch.testing.assert_close(row[: len(values)], values, atol=tolerance, rtol=1e-5)
        assert row[len(values) :].abs().sum() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_equal_log_softmax_of_the_models_logits(policy: CausalLM, plain: Any, temperature: float) -> None:
    outputs = policy(padded_layout(BATCH), temperature)
    assert_rows(outputs.logprobs.detach(), by_hand(plain, temperature))
    assert outputs.entropy is None and outputs.values is None and not outputs.extras


def likeliest(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"matches": (logits.argmax(-1) == targets).float()}


def test_entropy_and_matches_follow_the_distribution_at_the_temperature(policy: CausalLM, plain: Any) -> None:
    layout = padded_layout(BATCH)
    outputs = policy(layout, 0.7, with_entropy=True, statistics=OverLogits(layout, likeliest, (layout.targets,), 2))
    entropies, matches = [], []
    for prompt, completion in ROWS:
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
        matches.append((logits.argmax(-1) == torch.tensor(completion)).float())
    assert_rows(outputs.entropy.detach(), entropies, tolerance=2e-5)
    assert_rows(outputs.extras["matches"], matches)


def test_matches_are_ones_on_greedy_completions(policy: CausalLM) -> None:
    prompts = [torch.tensor(prompt) for prompt, _ in ROWS]
    drawn = sample(policy, prompts, torch.arange(5), SamplingSettings(6, temperature=0), 0, [3])
    layout = padded_layout(sequences([(p.tolist(), c.tolist()) for p, c in zip(prompts, drawn.ids, strict=True)]))
    asked = OverLogits(layout, likeliest, (layout.targets,))
    assert torch.equal(policy(layout, statistics=asked).extras["matches"], layout.completion_mask.float())


def noisy_pads(layout: Layout, lengths: list[int], extra: int) -> Layout:
    """The same rows with wider padding that contains random tokens."""
    rows, width = layout.input_ids.shape
    ids = torch.randint(0, VOCABULARY, (rows, width + extra), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths):
        ids[row, :length] = layout.input_ids[row, :length]

    def moved(index: Tensor) -> Tensor:
        return index + index.div(width, rounding_mode="floor") * extra

    return layout._replace(input_ids=ids, predictors=moved(layout.predictors), last=moved(layout.last))


@pytest.mark.parametrize("extra", [0, 7])
def test_padding_content_and_amount_do_not_change_logprobs(policy: CausalLM, extra: int) -> None:
    layout = padded_layout(BATCH)
    changed = noisy_pads(layout, BATCH.lengths, extra)
    assert extra or not torch.equal(changed.input_ids, layout.input_ids)
    before, after = (policy(one, with_entropy=True) for one in (layout, changed))
    torch.testing.assert_close(after.logprobs, before.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.entropy, before.entropy, atol=1e-5, rtol=0)


def test_logprobs_of_a_row_do_not_depend_on_the_batch(policy: CausalLM) -> None:
    together = policy(padded_layout(BATCH)).logprobs
    for row, pair in enumerate(ROWS):
        alone = policy(padded_layout(sequences([pair]))).logprobs[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=0)


def test_gradients_equal_those_of_the_plain_model(policy_folder: str) -> None:
    policy = load_policy(policy_folder)
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    outputs = policy(padded_layout(BATCH), 0.7, with_entropy=True)
    (outputs.logprobs.sum() + 0.3 * outputs.entropy.sum()).backward()
    total = torch.zeros(())
    for prompt, completion in ROWS:
        logits = plain(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        distribution = torch.distributions.Categorical(logits=logits)
        total = total + distribution.log_prob(torch.tensor(completion)).sum() + 0.3 * distribution.entropy().sum()
    total.backward()
    for (name, found), expected in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n} {m}")


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
FAMILIES = {
    "softcapped logits": Gemma2Config(
        **SMALL, head_dim=16, final_logit_softcapping=2.0, sliding_window=4, attn_implementation="eager"
    ),
    "multiplied logits": CohereConfig(**SMALL, logit_scale=0.25),
    "divided logits": GraniteConfig(**SMALL, logits_scaling=4.0),
    "learned positions": GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=3,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),  # fmt: skip
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_model_families_give_their_own_logits(family: str) -> None:
    torch.manual_seed(2)
    plain = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    policy = CausalLM(plain)
    rows = [([5, 6, 7, 8, 9, 10], [11, 12, 3]), ([20], [21, 22, 23, 24, 25, 26, 27, 3])]
    assert_rows(policy(padded_layout(sequences(rows)), 0.7).logprobs.detach(), by_hand(plain, 0.7, rows))
    prompts = [torch.tensor(prompt) for prompt, _ in rows]
    drawn = sample(policy, prompts, torch.arange(2), SamplingSettings(8, temperature=0.7), 4, [3])
    found = [(p.tolist(), c.tolist()) for p, c in zip(prompts, drawn.ids, strict=True)]
    for logprobs, expected in zip(drawn.logprobs, by_hand(plain, 0.7, found), strict=True):
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)


def test_a_shared_value_head_starts_at_zero_and_reads_the_predicting_states(policy_folder: str) -> None:
    policy = load_policy(policy_folder, value_head=True)
    layout = padded_layout(BATCH)
    values = policy(layout, value_layout=layout.with_end_state()).values
    assert torch.equal(values, torch.zeros(5, layout.completion_mask.shape[1] + 1))

    head = policy.value_head
    assert head is not None
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, 32).unsqueeze(0))
        head.bias.fill_(0.25)
    values = policy(layout, value_layout=layout.with_end_state()).values
    for row, (prompt, completion) in enumerate(ROWS):
        states = policy.model.model(torch.tensor([prompt + completion])).last_hidden_state[0]
        expected = states[len(prompt) - 1 :] @ torch.linspace(-1, 1, 32) + 0.25
        torch.testing.assert_close(values[row, : len(completion) + 1], expected, atol=1e-5, rtol=1e-5)


# -- the reference inside an adapter ----------------------------------------------------------------------------------


def train_a_little(policy: CausalLM) -> None:
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (-policy(padded_layout(BATCH)).logprobs.mean()).backward()
        optimizer.step()


def test_with_an_adapter_the_reference_is_the_base_model(policy_folder: str, plain: Any) -> None:
    policy = load_policy(policy_folder, lora=LoraSettings(r=4))
    layout = padded_layout(BATCH)
    assert_rows(policy(layout).logprobs.detach(), by_hand(plain))  # B = 0: the adapter starts as the base
    train_a_little(policy)
    moved = policy(layout).logprobs.detach()
    assert float((moved.sum() - torch.cat(by_hand(plain)).sum()).abs()) > 0.1
    with policy.as_reference():
        assert_rows(policy(layout).logprobs.detach(), by_hand(plain))
    torch.testing.assert_close(policy(layout).logprobs.detach(), moved)


def test_the_reference_of_a_continued_adapter_is_the_loaded_adapter(policy_folder: str, tmp_path: Path) -> None:
    first = load_policy(policy_folder, lora=LoraSettings(r=4))
    train_a_little(first)
    folder = export_policy(first, AutoTokenizer.from_pretrained(policy_folder), tmp_path / "adapter")
    layout = padded_layout(BATCH)
    loaded = first(layout).logprobs.detach()

    policy = load_policy(str(folder), lora=LoraSettings(r=4))
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    torch.testing.assert_close(policy(layout).logprobs.detach(), loaded, atol=1e-5, rtol=1e-5)
    before = policy(layout).logprobs
    with policy.as_reference(), torch.no_grad():
        policy(layout)
    before.sum().backward()  # the graph built before the switch still gives gradients to the trained adapter only
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == trainable
    assert trainable and not any("reference" in name for name in trainable)
    policy.zero_grad()
    train_a_little(policy)
    assert float((policy(layout).logprobs.detach() - loaded).abs().max()) > 0.05
    with policy.as_reference():
        torch.testing.assert_close(policy(layout).logprobs.detach(), loaded, atol=1e-5, rtol=1e-5)
    assert trainable == {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def test_a_model_without_adapter_holds_no_reference(policy: CausalLM) -> None:
    with refused("no-adapter", "has no adapter, so it holds no reference of its own"), policy.as_reference():
        pass


def trainable_fraction(model: CausalLM) -> float:
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)


def test_only_the_adapter_is_trained(policy_folder: str) -> None:
    whole = load_policy(policy_folder)
    assert trainable_fraction(whole) == 1.0
    adapted = load_policy(policy_folder, lora=LoraSettings(r=4, targets=["q_proj"]))
    total = sum(parameter.numel() for parameter in whole.parameters())
    added = 2 * 4 * (32 + 32)  # two layers, A of 4 x 32 and B of 32 x 4
    assert trainable_fraction(adapted) == pytest.approx(added / (total + added))


def test_a_loaded_reference_is_frozen_and_equals_the_initial_policy(policy_folder: str, policy: CausalLM) -> None:
    reference = load_reference(policy_folder, LoadSettings(activation_checkpointing=True))
    assert not reference.training and not reference.model.is_gradient_checkpointing
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    layout = padded_layout(BATCH)
    assert torch.equal(reference(layout).logprobs, policy(layout).logprobs)


def test_eval_mode_is_restored_per_submodule() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    model.train()
    model[1].eval()
    with pytest.raises(RuntimeError, match="stop"), inference_mode_of(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == [True, True, False, False, False]
    assert torch.is_grad_enabled()


def test_first_word_is_not_a_special_token(tokenizer: Any) -> None:
    assert tokenizer.eos_token_id == 3 and max(tokenizer.all_special_ids) == FIRST_WORD - 1


@pytest.mark.parametrize("changes", [{}, {"final_logit_softcapping": 3.0}, {"logit_scale": 0.25}])
def test_full_distributions_agree_with_logprobs(tmp_path: Path, changes: dict[str, float]) -> None:
    model = load_policy(save_policy(tmp_path / "policy", **changes))
    rows = random_rows(4, seed=2)
    layout = padded_layout(sequences(rows))

    def chosen(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        assert len(logits) <= 5
        return {"logprob": logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)}

    found = model(OverLogits(layout, chosen, (layout.targets,), chunk_tokens=5))["logprob"]
    torch.testing.assert_close(layout.scatter(found), model(layout).logprobs)
