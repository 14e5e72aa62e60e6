"""Packed sequences and completions with a shared prompt give the same results as each sequence alone."""

from typing import Any

import pytest
import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, sequences
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.models import packing
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.layout import FEW_PADS, Layout, cut_sequences, lay_out, packed_layout, padded_layout, select
from rlhf_lightning.models.packing import trees_of
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.types import MicroBatchLimits, Sequences


def shared_layout(batch: Sequences) -> Layout:
    """Return a layout with each prompt once, followed by its completions."""
    return packed_layout(batch, list(trees_of(batch)))


def separate(batch: Sequences) -> Layout:
    """Return a layout with each prompt repeated for each of its completions."""
    return packed_layout(batch, [[member] for member in range(len(batch.completions))])


PAIR = sequences([([5, 6, 7], [8, 9, 2]), ([4], [3, 2]), ([5, 6, 7], [9])])
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "granite": {},
    "olmo2": {},
    "phi3": {"pad_token_id": 0},
    "mistral": {"sliding_window": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_neox": {},
}


def model_of(family: str, kind: Any = AutoModelForCausalLM, attention: str = "sdpa", **changes: Any) -> Any:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "num_labels": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, **{**size, **heads, **FAMILIES.get(family, {}), **changes}
    )
    config.initializer_range = 0.3
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kind.from_config(config, attn_implementation=attention).eval()


def test_a_packed_row_of_two_prompts_by_hand() -> None:
    row = shared_layout(PAIR)
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9, 2, 9, 4, 3, 2]]
    assert row.positions is not None and row.packed is not None
    assert row.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 0, 1, 2]]
    # Completions in the given order: the third belongs to the first prompt.
    assert row.predictors.tolist() == [2, 3, 4, 7, 8, 2]
    assert row.targets.tolist() == [8, 9, 2, 3, 2, 9]
    assert row.cells.tolist() == [0, 1, 2, 3, 4, 6]
    assert row.last.tolist() == [5, 9, 6]
    (block,) = row.packed.blocks
    assert block.width == 10 and block.mask is not None
    assert block.mask[0, 0, 6].tolist() == [True] * 3 + [False] * 3 + [True] + [False] * 3
    assert block.mask[0, 0, 4].tolist() == [True] * 5 + [False] * 5
    assert block.mask[0, 0, 8].tolist() == [False] * 7 + [True] * 2 + [False]


def test_small_trees_share_a_block_and_single_sequences_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SMALL", 7)
    batch = sequences(
        [([5], [6, 7]), ([6], [6, 7]), ([7], [6, 7]), ([8], [6] * 9), ([9, 9, 9], [6] * 4), ([7], [8] * 7)]
    )
    row = shared_layout(batch)
    assert row.packed is not None
    assert [block.width for block in row.packed.blocks] == [6, 10, 10, 7]
    assert [block.mask is None for block in row.packed.blocks] == [False, False, True, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_padded_rows_for_each_family(family: str) -> None:
    policy = CausalLM(model_of(family), value_head=True)
    assert policy.value_head is not None
    torch.nn.init.normal_(policy.value_head.weight)
    assert policy.reads_trees
    found = []
    for layout in (padded_layout(PAIR), shared_layout(PAIR), separate(PAIR)):
        policy.zero_grad()
        outputs = policy(layout, 0.7, with_entropy=True, value_layout=layout.with_end_state())
        weights = torch.arange(1.0, outputs.logprobs.numel() + 1).view_as(outputs.logprobs).cos()
        (outputs.logprobs * weights).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        found.append([outputs.logprobs, outputs.entropy, outputs.values, gradients])
    for alone, *packed_ones in zip(*found, strict=True):
        for together in packed_ones:
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=2e-5)


def test_packed_scores_and_values_equal_padded_ones() -> None:
    model = ScalarModel(model_of("llama", AutoModelForSequenceClassification))
    for per_token in (False, True):
        alone, shared = (model(layout(PAIR), per_token=per_token) for layout in (padded_layout, shared_layout))
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention": "eager"}),
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2}),
        ("bloom", {"n_layer": 2, "n_head": 2, "attention": "eager"}),
        ("mamba", {"state_size": 4}),
    ],
)
def test_models_without_tree_attention_are_detected(family: str, changes: dict[str, Any]) -> None:
    if family == "mamba":
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("mamba", vocab_size=8, hidden_size=8, num_hidden_layers=1)
        )
    else:
        model = model_of(family, **changes)
    assert not CausalLM(model).reads_trees


def test_the_cheaper_layout_is_chosen() -> None:
    assert lay_out(PAIR, pack_rows=False).packed is None
    assert lay_out(PAIR, pack_rows=True).input_ids.shape == (1, 10)
    equal = sequences([([5, 6], [7, 8]), ([6, 6], [7, 9])])
    assert lay_out(equal, pack_rows=True).packed is None  # nothing would be padded
    few = sequences([(range(6, 36), [7]), (range(8, 37), [8])])
    assert lay_out(few, pack_rows=True).packed is None  # one cell of 62
    long = sequences([(range(6, 66), [7, 8]), (range(6, 66), [9])])
    assert lay_out(long, pack_rows=True).input_ids.shape == (1, 63)
    assert lay_out(long, pack_rows=False).input_ids.shape == (2, 62)


def test_wide_trees_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WIDEST", 8)
    group = sequences([([5, 6, 7], [8, 9, 2])] * 3)
    tree = shared_layout(group)
    assert tree.input_ids.tolist() == [[5, 6, 7, 8, 9, 2] * 3]
    policy = CausalLM(model_of("llama"))
    torch.testing.assert_close(policy(tree).logprobs, policy(padded_layout(group)).logprobs)


def test_unsupervised_tokens_and_empty_prompts_equal_padded_rows() -> None:
    batch = sequences(
        [([], [7, 8, 2]), ([], [9, 3]), ([5], [6, 8])], supervised=[[True] * 3, [True] * 2, [False, True]]
    )
    padded, shared = padded_layout(batch), shared_layout(batch)
    assert shared.completion_mask.tolist() == padded.completion_mask.tolist()
    assert shared.targets.tolist() == padded.targets.tolist()
    with refused("empty-completion", "a completion is empty; drop such rows"):
        shared_layout(sequences([([5], [6]), ([5, 6], [])]))


ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 5), st.lists(st.integers(6, 99), min_size=1, max_size=6)),
    min_size=1,
    max_size=9,
)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(ROWS, st.integers(1, 9), st.integers(4, 40), st.integers(1, 30))
def test_random_rows_give_the_same_logprobs_for_any_micro_batches(
    rows: Any, micro_batch_size: int, max_tokens: int, small: int
) -> None:
    batch = sequences([([6 + prompt] * length, completion) for prompt, length, completion in rows])
    policy = POLICY
    with torch.no_grad():
        alone = policy(padded_layout(batch)).logprobs
        cuts = cut_sequences(batch, None, MicroBatchLimits(micro_batch_size, max_tokens), pack_rows=True)
        assert sorted(row for cut in cuts for row in cut) == list(range(len(rows)))
        for cut in cuts:
            assert len(cut) <= micro_batch_size
            chosen = lay_out(select(batch, cut), pack_rows=True)
            assert chosen.input_ids.numel() * (1 - FEW_PADS) <= max(max_tokens, max(batch.lengths))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(packing, "SMALL", small)
                others = (shared_layout(select(batch, cut)), separate(select(batch, cut)))
            for layout in (chosen, *others):
                found = policy(layout).logprobs
                torch.testing.assert_close(found, alone[cut, : found.shape[1]], rtol=1e-4, atol=1e-5)


POLICY = CausalLM(model_of("llama"))


def test_micro_batches_keep_completions_of_a_prompt_together() -> None:
    batch: Sequences = sequences([([5, 6], [7]), ([8, 9], [7]), ([5, 6], [7, 7]), ([8, 9], [7, 7, 7])])
    assert cut_sequences(batch, pack_rows=True) == [[1, 3, 0, 2]]
    assert cut_sequences(batch, limits=MicroBatchLimits(max_tokens=6), pack_rows=True) == [[1, 3], [0, 2]]
    assert cut_sequences(batch, limits=MicroBatchLimits(max_tokens=4), pack_rows=True) == [[3], [2], [0], [1]]
    assert cut_sequences(batch, [0, 2], MicroBatchLimits(1), pack_rows=True) == [[2], [0]]
    assert cut_sequences(batch, limits=MicroBatchLimits(max_tokens=6)) == [[3], [2], [0, 1]]
