from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import refused
from scipy import stats
from tiny_models import plain_logprobs, random_rows, sequences
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.decoding import Decoder, Mixture
from rlhf_lightning.sampling.drawing import inverse_cdf
from rlhf_lightning.sampling.engines import Completions, SamplingSettings
from rlhf_lightning.sampling.slot_engine import sample

PROMPTS = [torch.tensor(prompt) for prompt, _ in random_rows(12, seed=21, prompt=10)]
EPISODES = torch.arange(100, 112)
ENDS = (3, *range(10, 25))
"""Many end tokens, so that completions have many different lengths."""


@pytest.fixture(scope="module")
def policy(policy_folder: str) -> CausalLM:
    return load_policy(policy_folder)


def draw(policy: CausalLM, rows: list[int] | None = None, seed: int = 7, **settings: Any) -> Completions:
    rows = list(range(12)) if rows is None else rows
    chosen = SamplingSettings(**({"max_new_tokens": 16, "temperature": 0.9} | settings))
    return sample(policy, [PROMPTS[row] for row in rows], EPISODES[rows], chosen, seed, ENDS)


def as_lists(drawn: Completions) -> list[list[int]]:
    return [ids.tolist() for ids in drawn.ids]


# -- addressed sampling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5])
def test_episodes_do_not_depend_on_the_batch_size(policy: CausalLM, batch_size: int) -> None:
    whole, cut = draw(policy), draw(policy, batch_size=batch_size)
    assert as_lists(cut) == as_lists(whole)
    assert torch.equal(cut.finished, whole.finished)
    for one, other in zip(cut.logprobs, whole.logprobs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert len({len(ids) for ids in whole.ids}) > 3


def test_episodes_do_not_depend_on_other_prompts(policy: CausalLM) -> None:
    whole = as_lists(draw(policy))
    order = [7, 3, 11, 0, 5]
    assert as_lists(draw(policy, order)) == [whole[row] for row in order]


def test_removing_finished_rows_does_not_change_other_episodes(
    policy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [as_lists(draw(policy, [row]))[0] for row in range(12)]
    kept: list[int] = []
    keep = Decoder.keep

    def counted(reader: Decoder, rows: torch.Tensor) -> None:
        kept.append(len(rows))
        keep(reader, rows)

    monkeypatch.setattr(Decoder, "keep", counted)
    assert as_lists(draw(policy)) == alone
    assert len(kept) >= 3 and kept == sorted(kept, reverse=True)


def test_seed_and_episode_number_determine_the_samples(policy: CausalLM) -> None:
    base = as_lists(draw(policy))
    assert as_lists(draw(policy, seed=8)) != base
    settings = SamplingSettings(16, 0.9)
    later = sample(policy, PROMPTS, EPISODES + 12, settings, 7, ENDS)
    assert as_lists(later) != base
    same_prompt = sample(policy, [PROMPTS[0]] * 12, EPISODES, settings, 7, ENDS)
    assert len({tuple(ids) for ids in as_lists(same_prompt)}) > 8
    assert as_lists(same_prompt)[0] == base[0]


def test_the_global_random_state_is_neither_read_nor_changed(policy: CausalLM) -> None:
    torch.manual_seed(1)
    first = as_lists(draw(policy))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert as_lists(draw(policy)) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


# -- the right distribution -------------------------------------------------------------------------------------------


def test_greedy_decoding_equals_transformers_token_for_token(policy: CausalLM, policy_folder: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    drawn = draw(policy, temperature=0.0, max_new_tokens=12)
    for prompt, ids in zip(PROMPTS, drawn.ids, strict=True):
        generated = plain.generate(
            prompt.unsqueeze(0), do_sample=False, max_new_tokens=12, eos_token_id=list(ENDS), pad_token_id=0
        )
        assert ids.tolist() == generated[0, len(prompt) :].tolist()
    assert 0 < int(drawn.finished.sum()) <= 12


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_those_of_the_training_forward(policy: CausalLM, temperature: float) -> None:
    drawn = draw(policy, temperature=temperature)
    layout = padded_layout(sequences(list(zip([p.tolist() for p in PROMPTS], as_lists(drawn), strict=True))))
    with torch.no_grad():
        grid = policy(layout, temperature).logprobs
    for row, logprobs in enumerate(drawn.logprobs):
        torch.testing.assert_close(logprobs, grid[row, : len(logprobs)], atol=1e-4, rtol=0)


def chi_square_p(counts: Counter[int], probabilities: torch.Tensor, total: int) -> float:
    """p-value of the counts under the probabilities, rare tokens pooled."""
    common = [token for token in range(len(probabilities)) if float(probabilities[token]) * total >= 10]
    expected = [float(probabilities[token]) * total for token in common]
    observed = [float(counts[token]) for token in common]
    return float(stats.chisquare([*observed, total - sum(observed)], [*expected, total - sum(expected)]).pvalue)


def first_tokens(policy: CausalLM, draws: int = 4000, **settings: Any) -> tuple[Counter[int], Completions]:
    chosen = SamplingSettings(max_new_tokens=1, **settings)
    drawn = sample(policy, [PROMPTS[0]] * draws, torch.arange(draws), chosen, 3, ENDS)
    return Counter(int(ids[0]) for ids in drawn.ids), drawn


def first_distribution(policy: CausalLM, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return torch.softmax(policy.model(PROMPTS[0].unsqueeze(0)).logits[0, -1].double() / temperature, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_softmax_distribution(policy: CausalLM, temperature: float) -> None:
    counts, _ = first_tokens(policy, temperature=temperature)
    assert chi_square_p(counts, first_distribution(policy, temperature), 4000) > 0.01
    assert chi_square_p(counts, first_distribution(policy, temperature * 1.3), 4000) < 1e-6  # the test can tell


def test_later_tokens_follow_the_conditional_softmax_distribution(policy: CausalLM) -> None:
    """The probability integral transform of each sampled token is uniform after every prefix."""
    drawn = sample(policy, [PROMPTS[0]] * 300, torch.arange(300), SamplingSettings(6), 5, [3])
    start, quantiles, generator = len(PROMPTS[0]), [], torch.Generator().manual_seed(0)
    rows = pad_sequence([torch.cat([PROMPTS[0], ids]) for ids in drawn.ids], batch_first=True)
    with torch.no_grad():
        cumulative = policy.model(rows).logits[:, start - 1 : -1].double().softmax(-1).cumsum(-1)
    for row, ids in enumerate(drawn.ids):
        for position, token in enumerate(ids.tolist()):
            upper, below = cumulative[row, position, token], cumulative[row, position, token - 1] if token else 0.0
            quantiles.append(float(below + (upper - below) * torch.rand((), generator=generator)))
    assert stats.kstest(quantiles, "uniform").pvalue > 0.01


def test_top_k_keeps_the_most_probable_and_renormalises(policy: CausalLM) -> None:
    probabilities = first_distribution(policy, 1.0)
    counts, _ = first_tokens(policy, draws=2000, top_k=5)
    best = probabilities.topk(5).indices.tolist()
    assert set(counts) == set(best)
    kept = torch.zeros_like(probabilities)
    kept[best] = probabilities[best] / probabilities[best].sum()
    assert stats.chisquare([counts[t] for t in best], [float(kept[t]) * 2000 for t in best]).pvalue > 0.01


def test_top_p_keeps_the_smallest_set_of_that_probability(policy: CausalLM) -> None:
    probabilities = first_distribution(policy, 1.0)
    ordered = probabilities.sort(descending=True)
    size = int((ordered.values.cumsum(0) < 0.3).sum()) + 1
    kept = ordered.indices[:size].tolist()
    counts, drawn = first_tokens(policy, draws=2000, top_p=0.3)
    assert set(counts) == set(kept) and size > 2
    share = ordered.values[:size] / ordered.values[:size].sum()
    assert stats.chisquare([counts[t] for t in kept], (share * 2000).tolist()).pvalue > 0.01
    # The reported value is the policy's own log-probability, not that of the truncated distribution.
    for ids, logprobs in zip(drawn.ids[:20], drawn.logprobs, strict=False):
        assert float(logprobs[0]) == pytest.approx(float(probabilities[ids[0]].log()), abs=1e-5)


# -- ends -------------------------------------------------------------------------------------------------------------


def test_a_completion_stops_at_its_first_end_token_or_at_the_limit(policy: CausalLM) -> None:
    drawn = draw(policy, max_new_tokens=8)
    assert 0 < int(drawn.finished.sum()) < 12
    for ids, logprobs, finished in zip(drawn.ids, drawn.logprobs, drawn.finished, strict=True):
        tokens = ids.tolist()
        assert len(logprobs) == len(tokens)
        assert not any(token in ENDS for token in tokens[:-1])
        assert (tokens[-1] in ENDS) == bool(finished)
        assert finished or len(tokens) == 8


def test_a_longer_limit_continues_the_same_episodes(policy: CausalLM) -> None:
    short, long = draw(policy, max_new_tokens=4), draw(policy, max_new_tokens=16)
    assert as_lists(short) == [ids[:4] for ids in as_lists(long)]


def test_on_progress_counts_every_completion(policy: CausalLM) -> None:
    seen: list[int] = []
    sample(policy, PROMPTS, EPISODES, SamplingSettings(2, batch_size=5), 0, ENDS, on_progress=seen.append)
    assert sum(seen) == 12 and 0 in seen  # also after a pass in which none ended: a caller may stop there


# -- training next to it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4, dropout=0.5)])
def test_train_mode_and_activation_checkpointing_do_not_change_samples(
    policy: CausalLM, policy_folder: str, lora: LoraSettings | None
) -> None:
    training = load_policy(policy_folder, LoadSettings(activation_checkpointing=True), lora)
    training.train()
    if lora is not None:
        next(module for name, module in training.named_modules() if name.endswith("lora_dropout.default")).eval()
    modes = [module.training for module in training.modules()]
    assert as_lists(draw(training)) == as_lists(draw(policy))
    assert [module.training for module in training.modules()] == modes and any(modes)
    assert training.model.is_gradient_checkpointing
    outputs = training(padded_layout(sequences(random_rows(2))))
    assert outputs.logprobs.requires_grad


def test_sampled_logprobs_of_a_trained_adapter_equal_the_plain_models(policy: CausalLM, policy_folder: str) -> None:
    adapted = load_policy(policy_folder, lora=LoraSettings(r=4))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    drawn = draw(adapted, [0, 1])
    assert as_lists(drawn) != as_lists(draw(policy, [0, 1]))
    for row, (ids, logprobs) in enumerate(zip(drawn.ids, drawn.logprobs, strict=True)):
        with torch.no_grad():
            expected = plain_logprobs(adapted.model, PROMPTS[row], ids, 0.9)
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [7, 1000, 8192, 9000])
def test_blockwise_inverse_cdf_equals_the_full_one(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(64, vocabulary, generator=generator).pow(4)
    probabilities[:, torch.rand(vocabulary, generator=generator) < 0.5] = 0.0
    probabilities[:, vocabulary // 2] = 1e-6
    probabilities = probabilities.double()  # so that no number falls on the boundary of two tokens
    cumulative = probabilities.cumsum(-1)
    edges = torch.tensor([1e-9, 0.5, 1 - 1e-12])
    numbers = torch.cat([edges, torch.rand(61, generator=generator)]).double()
    expected = torch.searchsorted(cumulative, (numbers * cumulative[:, -1]).unsqueeze(-1)).squeeze(-1)
    found = inverse_cdf(probabilities, numbers)
    assert bool((probabilities.gather(-1, found.unsqueeze(-1)) > 0).all())
    assert torch.equal(found, expected)


def test_an_empty_prompt_is_refused(policy: CausalLM) -> None:
    prompts = [PROMPTS[0], torch.tensor([], dtype=torch.long)]
    with refused("empty-prompt", "a prompt is empty", "the first token"):
        sample(policy, prompts, EPISODES[:2], SamplingSettings(2), 0, ENDS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be at least 1"),
        ({"temperature": -0.5}, "temperature is -0.5: it must be 0 (greedy) or positive"),
        ({"top_p": 0.0}, "top_p is 0.0: it must lie in (0, 1]"),
        ({"top_p": 1.5}, "top_p is 1.5: it must lie in (0, 1]"),
        ({"top_k": -1}, "top_k is -1: it must be 0 (all tokens) or positive"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with refused("setting-out-of-range", message):
        SamplingSettings(**settings)


def test_is_pure_means_untruncated_and_not_greedy() -> None:
    assert SamplingSettings(temperature=0.7).is_pure
    assert not SamplingSettings(temperature=0).is_pure
    assert not SamplingSettings(top_p=0.9).is_pure
    assert not SamplingSettings(top_k=3).is_pure


# -- two models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_mixtures_are_sampled_per_token(
    policy: CausalLM, other_folder: str, share: float, batch_size: int | None
) -> None:
    other = load_policy(other_folder)
    mixture = Mixture(lambda: nullcontext(other), lambda own, theirs: (1 - share) * own + share * theirs)
    settings = SamplingSettings(16, 0.9, batch_size=batch_size)
    drawn = sample(policy, PROMPTS, EPISODES, settings, 7, ENDS, mixture=mixture)
    if share in (0.0, 1.0):
        assert as_lists(drawn) == as_lists(draw(other if share else policy))
    for prompt, ids, found in zip(PROMPTS, drawn.ids, drawn.logprobs, strict=True):
        whole = torch.cat([prompt, ids])[None]
        logits = (1 - share) * policy.model(whole).logits[0] + share * other.model(whole).logits[0]
        mixed = torch.log_softmax(logits / 0.9, -1)[len(prompt) - 1 : -1]
        torch.testing.assert_close(found, mixed.gather(-1, ids[:, None])[:, 0].detach(), rtol=1e-4, atol=1e-4)
