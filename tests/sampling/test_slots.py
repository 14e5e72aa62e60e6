"""Test the engine's slots: rows entering and leaving, forward passes, and unchanged episodes."""

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from models.families import build
from tiny_models import random_rows, tiny_config
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rlhf_lightning.models.causal_lm import CausalLM, DecodingStep
from rlhf_lightning.models.packing import prefix_trees
from rlhf_lightning.sampling import decoding, slot_engine, static_steps
from rlhf_lightning.sampling.decoding import Decoder, Mixture
from rlhf_lightning.sampling.drawing import uniform
from rlhf_lightning.sampling.engines import Completions, SamplingSettings
from rlhf_lightning.sampling.slot_cache import SlotLayer
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.sampling.static_steps import StaticStep

DISTINCT = [torch.tensor(prompt) for prompt, _ in random_rows(7, seed=3, prompt=14)]
GROUPS = [prompt for prompt in DISTINCT for _ in range(3)]
EPISODES = torch.arange(40, 40 + len(GROUPS))
ENDS = (3, *range(10, 20))
LIMIT = 20


def llama(seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(LlamaForCausalLM(tiny_config()))


def mistral() -> CausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return CausalLM(MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=8)))


def gpt2() -> CausalLM:
    torch.manual_seed(0)
    longest = max(len(prompt) for prompt in DISTINCT) + LIMIT
    sizes = {"vocab_size": 120, "n_positions": longest, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return CausalLM(GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)))


MODELS = {"llama": llama, "sliding": mistral, "learned positions": gpt2}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> CausalLM:
    return MODELS[request.param]().eval()


@pytest.fixture(scope="module")
def policy() -> CausalLM:
    return llama().eval()


def draw(model: CausalLM, slots: int | None = None, prompts: list[Tensor] | None = None, **further: Any) -> Completions:
    prompts = GROUPS if prompts is None else prompts
    settings = SamplingSettings(LIMIT, 0.9, batch_size=slots)
    return SlotEngine().sample(model, prompts, EPISODES[: len(prompts)], settings, 11, ENDS, **further)


def as_lists(drawn: Completions) -> list[list[int]]:
    return [ids.tolist() for ids in drawn.ids]


def naive(model: CausalLM) -> list[list[int]]:
    """Sample one token at a time, each with a forward pass over the whole text so far."""
    found = []
    for prompt, episode in zip(GROUPS, EPISODES, strict=True):
        ids: list[int] = []
        while len(ids) < LIMIT and not (ids and ids[-1] in ENDS):
            with torch.no_grad():
                logits = model.model(torch.cat([prompt, torch.tensor(ids, dtype=torch.long)])[None]).logits[0, -1]
            cumulative = (logits.double() / 0.9).softmax(-1).cumsum(-1)
            number = float(uniform(11, episode[None], torch.tensor([len(ids)])))
            ids.append(int((cumulative < number).sum()))
        found.append(ids)
    return found


class Passes:
    """Records the input shape of each forward pass."""

    def __init__(self, model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.widths: list[int] = []
        forward = model.next_token_logits

        def counted(step: DecodingStep) -> Tensor:
            rows, tokens = step.input_ids.shape
            mask = None if step.packed is not None else step.attention_mask
            cached = step.cache.get_seq_length() if mask is None and step.packed is None else 0
            width = tokens + cached if mask is None else mask.shape[-1]
            self.shapes.append((rows if step.last is None else len(step.last), tokens))
            self.widths.append(width)
            return forward(step)

        monkeypatch.setattr(model, "next_token_logits", counted)

    @property
    def prefills(self) -> list[tuple[int, int]]:
        return [shape for shape, width in zip(self.shapes, self.widths, strict=True) if width == shape[1]]

    @property
    def steps(self) -> list[int]:
        """Number of rows of each decode pass."""
        return [rows for (rows, tokens), width in zip(self.shapes, self.widths, strict=True) if width > tokens]


# -- the same episodes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 8, None])
def test_slot_sampling_equals_decoding_without_a_cache(model: CausalLM, slots: int | None) -> None:
    assert as_lists(draw(model, slots)) == naive(model)


@pytest.mark.parametrize("ahead", [1, 3, 7])
@pytest.mark.parametrize("slots", [4, None])
def test_precomputed_random_numbers_belong_to_their_tokens(
    policy: CausalLM, slots: int | None, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = as_lists(draw(policy, slots))
    monkeypatch.setattr(slot_engine, "AHEAD", ahead)
    assert as_lists(draw(policy, slots)) == whole
    assert max(len(ids) for ids in whole) > 2 * 7  # each row continues with its own random numbers


def test_episodes_vary_and_logprobs_do_not_depend_on_slots(model: CausalLM) -> None:
    whole, cut = draw(model), draw(model, 4)
    assert len({len(ids) for ids in whole.ids}) > 5 and 0 < int(whole.finished.sum()) < len(GROUPS)
    assert torch.equal(whole.finished, cut.finished)
    for one, other in zip(whole.logprobs, cut.logprobs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("slots", [1, 4, None])
def test_both_models_of_a_mixture_stay_synchronised(policy: CausalLM, slots: int | None) -> None:
    other = llama(1).eval()
    for share, alone in ((0.0, policy), (1.0, other)):
        mixture = Mixture(lambda: nullcontext(other), lambda own, theirs, s=share: (1 - s) * own + s * theirs)
        assert as_lists(draw(policy, slots, mixture=mixture)) == as_lists(draw(alone))


def test_a_sliding_window_of_one_mixture_model_limits_both(policy: CausalLM) -> None:
    window = mistral().eval()
    mixture = Mixture(lambda: nullcontext(window), lambda own, theirs: theirs)
    assert as_lists(draw(policy, 4, mixture=mixture)) == as_lists(draw(window))


def test_no_prompts_give_no_completions(policy: CausalLM) -> None:
    drawn = draw(policy, prompts=[])
    assert drawn.ids == () and drawn.logprobs == () and drawn.finished.shape == (0,)


# -- static steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [4, None])
def test_static_steps_draw_the_same_completions_and_keep_their_addresses(
    policy: CausalLM, slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SamplingSettings(LIMIT, 0.9, batch_size=slots)
    expected = draw(policy, slots)
    monkeypatch.setattr(decoding, "is_replayable", lambda model: True)
    monkeypatch.setattr(static_steps, "STRIDE", 8)
    forward, addresses = StaticStep._forward, dict[StaticStep, list[tuple[int, ...]]]()

    def noted(step: StaticStep) -> Tensor:
        buffers = [buffer for layer in step.cache.layers for buffer in (layer.keys, layer.values)]
        place = tuple(part.data_ptr() for part in (step.ids, step.counts, *buffers))
        addresses.setdefault(step, []).append((*step.ids.shape, step.width, *place))
        return forward(step)

    monkeypatch.setattr(StaticStep, "_forward", noted)
    drawn = SlotEngine(cuda_graphs=True).sample(policy, GROUPS, EPISODES, settings, 11, ENDS)
    assert as_lists(drawn) == as_lists(expected)
    for found, known in zip(drawn.logprobs, expected.logprobs, strict=True):  # sums over more columns round otherwise
        torch.testing.assert_close(found, known, atol=1e-5, rtol=0)
    assert len(addresses) > 2 and max(map(len, addresses.values())) > 4
    for places in addresses.values():
        assert all(one == other for one, other in pairwise(places))


def test_cuda_graphs_without_a_gpu_warn_and_change_no_bit(policy: CausalLM) -> None:
    settings = SamplingSettings(LIMIT, 0.9, batch_size=4)
    with pytest.warns(UserWarning, match="cuda_graphs has no effect"):
        drawn = SlotEngine(cuda_graphs=True).sample(policy, GROUPS, EPISODES, settings, 11, ENDS)
    assert as_lists(drawn) == as_lists(draw(policy, 4))


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 4, 8, None])
def test_each_distinct_prompt_is_prefilled_once(
    policy: CausalLM, slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(policy, monkeypatch)
    draw(policy, slots)
    assert sum(rows for rows, _ in passes.prefills) == len(DISTINCT)


def test_prompts_with_a_common_prefix_are_prefilled_in_one_packed_row(
    policy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and cached keys and values equal those of padded rows."""
    words = torch.arange(20, 60)
    prompts = [torch.cat([words[:12], row]) for row in (words[20:21], words[30:39], words[21:24], words[:1])]
    prompts += [words[5:9], words[7:22]]
    assert [shared for shared, _ in prefix_trees(prompts)] == [12, 0, 0]
    passes = Passes(policy, monkeypatch)
    with torch.no_grad():
        packed = Decoder(policy, 8, 4).prefill(prompts)
        monkeypatch.setattr(policy, "reads_trees", False)
        padded = Decoder(policy, 8, 4).prefill(prompts)
    assert passes.shapes == [(6, 12 + 1 + 9 + 3 + 1 + 4 + 15), (6, 21)]
    torch.testing.assert_close(packed.logits, padded.logits, atol=1e-5, rtol=0)
    for one, other in zip(packed.cache.layers, padded.cache.layers, strict=True):
        assert one.keys.shape == other.keys.shape
        for row, prompt in enumerate(prompts):
            for found, expected in ((one.keys, other.keys), (one.values, other.values)):
                torch.testing.assert_close(
                    found[row, :, -len(prompt) :], expected[row, :, -len(prompt) :], atol=1e-5, rtol=0
                )


def test_a_long_common_prefix_allows_a_wide_tree() -> None:
    long = torch.arange(1000)
    prompts = [torch.cat([long, torch.tensor([row, row])]) for row in range(8)]
    assert prefix_trees(prompts) == [(1000, list(range(8)))]
    short = [torch.cat([long[:20], torch.full((60,), row)]) for row in range(8)]
    assert [(shared, len(rows)) for shared, rows in prefix_trees(short)] == [(20, 3), (20, 3), (20, 2)]
    assert prefix_trees([long[:3], long[:3]]) == [(2, [0, 1])]


def test_samples_of_a_group_equal_samples_drawn_alone(policy: CausalLM) -> None:
    alone = [
        SlotEngine().sample(policy, [prompt], episode[None], SamplingSettings(LIMIT, 0.9), 11, ENDS)
        for prompt, episode in zip(GROUPS, EPISODES, strict=True)
    ]
    assert as_lists(draw(policy)) == [one.ids[0].tolist() for one in alone]


def test_no_forward_pass_after_the_last_completion_ends(policy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [len(ids) for ids in draw(policy).ids]
    passes = Passes(policy, monkeypatch)
    draw(policy)
    assert len(passes.shapes) == max(lengths)  # the prompts give the first token
    passes.shapes.clear(), passes.widths.clear()
    draw(policy, 1)
    assert passes.steps == [1] * sum(length - 1 for length in lengths)
    assert len(passes.prefills) == len(DISTINCT)


def test_completions_of_one_token_need_no_decode_step(policy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(policy, monkeypatch)
    settings = SamplingSettings(LIMIT, batch_size=4)
    SlotEngine().sample(policy, GROUPS, EPISODES, settings, 0, tuple(range(120)))
    assert passes.steps == [] and sum(rows for rows, _ in passes.prefills) == len(DISTINCT)


def test_slots_stay_busy_and_the_cache_no_wider_than_its_longest_row(
    policy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(20, 120, (5,), generator=generator) for _ in range(60)]
    settings, ends = SamplingSettings(40, batch_size=8), tuple(range(10, 18))
    passes = Passes(policy, monkeypatch)
    drawn = SlotEngine().sample(policy, prompts, torch.arange(60), settings, 0, ends)
    lengths = [len(ids) for ids in drawn.ids]
    needed = sum(length - 1 for length in lengths)
    assert max(passes.steps) == 8
    assert needed / sum(passes.steps) > 0.8  # decoded batch by batch, it is less than one half
    batches = [lengths[start : start + 8] for start in range(0, 60, 8)]
    assert needed / sum(len(batch) * (max(batch) - 1) for batch in batches) < 0.5
    assert max(passes.widths) <= 5 + max(lengths)


def test_with_sliding_windows_finished_rows_leave_before_new_prompts_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mistral().eval()
    passes = Passes(model, monkeypatch)
    draw(model, 8)
    assert min(passes.steps) < 6 and max(passes.steps) == 8


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "mamba2", "lfm2", "qwen3_next"])
def test_window_caches_and_recurrent_states_of_free_slots_are_refilled(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CausalLM(build(name, AutoModelForCausalLM, vocab_size=120)).eval()
    model.decoding = "slots"
    prompts = GROUPS[:12]
    whole, passes = draw(model, prompts=prompts), Passes(model, monkeypatch)
    drawn = draw(model, 3, prompts=prompts)
    assert as_lists(drawn) == as_lists(whole) and len({len(ids) for ids in drawn.ids}) > 3
    first, entered = passes.shapes.index((3, 1)), [shape for shape in passes.shapes if shape[1] > 1]
    assert len(entered) > 2 and any(shape[1] > 1 for shape in passes.shapes[first:])
    assert passes.steps.count(3) > 0.6 * len(passes.steps), "slots wait for others to end"
    for prompt, ids, logprobs in zip(prompts, drawn.ids, drawn.logprobs, strict=True):
        with torch.no_grad():
            logits = model.model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.9).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)


# -- the buffers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 5, None])
def test_growing_the_cache_does_not_change_samples(
    policy: CausalLM, slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = draw(policy, slots)
    monkeypatch.setattr(decoding, "ROOM", 1)
    moved: list[int] = []
    move = SlotLayer._moved

    def counted(layer: SlotLayer, buffer: Tensor, lead: int, columns: int) -> Tensor:
        moved.append(columns)
        return move(layer, buffer, lead, columns)

    monkeypatch.setattr(SlotLayer, "_moved", counted)
    found = draw(policy, slots)
    assert as_lists(found) == as_lists(expected) and len(set(moved)) > 1
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_rows_enter_at_the_last_column_and_leave_from_any_slot() -> None:
    layer = SlotLayer(slots=3, room=2)

    def states(*rows: list[float]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32)[:, None, :, None]

    layer.enter(states([1, 2], [3, 4]), -states([1, 2], [3, 4]), torch.tensor([0, 1]))
    layer.enter(states([5]), -states([5]), torch.tensor([2]))
    keys, values = layer.update(states([6], [7], [8]), -states([6], [7], [8]))
    assert keys[:, 0, :, 0].tolist() == [[1, 2, 6], [3, 4, 7], [0, 5, 8]] and torch.equal(values, -keys)
    layer.keep(torch.tensor([0, 2]))
    layer.trim(2)
    assert layer.get_seq_length() == 2 and layer.get_mask_sizes(1) == (3, 0)
    for token in (9.0, 10.0, 11.0, 12.0, 13.0, 14.0):
        keys, values = layer.update(states([token], [-token]), -states([token], [-token]))
    assert keys[:, 0, :, 0].tolist() == [[2, 6, 9, 10, 11, 12, 13, 14], [5, 8, -9, -10, -11, -12, -13, -14]]
    assert torch.equal(values, -keys)
    layer.enter(states([20.0] * 10), -states([20.0] * 10), torch.tensor([1]))
    keys, _ = layer.update(states([15], [21]), -states([15], [21]))
    assert keys[0, 0, :, 0].tolist() == [0, 0, 2, 6, 9, 10, 11, 12, 13, 14, 15]
    assert keys[1, 0, :, 0].tolist() == [20.0] * 10 + [21]


@pytest.mark.parametrize("slots", [2, None])
def test_a_stop_takes_effect_before_the_next_forward_pass(
    slots: int | None, policy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(policy, monkeypatch)
    counts: list[int] = []

    def stop(count: int) -> None:
        counts.append(len(passes.shapes))
        if len(counts) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(policy, slots, on_progress=stop)
    assert len(passes.shapes) == counts[1] <= counts[0] + 2
