"""Test multi-turn episodes as token sequences, equal for every engine, batch and number of slots."""

from typing import Any

import pytest
import torch
from conftest import refused
from models.families import build
from small_server import BASE, serving
from tiny_models import random_rows, tiny_config, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling import slot_engine
from rlhf_lightning.sampling.conversation import Turns
from rlhf_lightning.sampling.drawing import uniform
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingSettings
from rlhf_lightning.sampling.generate_engine import ContinuousBatchingEngine, GenerateEngine
from rlhf_lightning.sampling.own_logprobs import scored
from rlhf_lightning.sampling.remote_engine import RemoteEngine
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.sampling.worker_engine import WorkerEngine
from rlhf_lightning.types import Episode, MultiTurn, Reply

LIMIT, ENDS = 6, (3, *range(10, 40))
PROMPTS = [torch.tensor(prompt) for prompt, _ in random_rows(4, seed=3, prompt=14) for _ in range(3)]
EPISODES = torch.arange(40, 40 + len(PROMPTS))


class Talks:
    """Replies with as many tokens as the turn has, and ends the episode after a turn with an even last token."""

    def __init__(self, reward: float = 1.0) -> None:
        self.reward, self.batches = reward, []

    def reset(self, row: Any) -> Any:
        return row["prompt"]

    def reply(self, episode: Episode) -> Reply:
        last = episode.ids[-1]
        assert episode.learned[-1] and len(episode.ids) == len(episode.learned)
        return Reply(ids=[30 + last % 7] * (1 + len(episode.ids) % 4), reward=self.reward, done=last % 4 == 0)

    def reply_all(self, episodes: Any) -> list[Reply]:
        self.batches.append([episode.number for episode in episodes])
        return [self.reply(episode) for episode in episodes]


def converse(
    engine: SamplingEngine, model: CausalLM, slots: int | None = None, rules: MultiTurn | None = None, **settings: Any
) -> Completions:
    rules = rules or MultiTurn(Talks(), max_turns=4)
    chosen = SamplingSettings(**{"max_new_tokens": LIMIT, "temperature": 0.9, "batch_size": slots, **settings})
    texts = [f"w{len(prompt)}" for prompt in PROMPTS]
    turns = Turns(rules, tiny_tokenizer(), texts, {}, EPISODES.tolist())
    return engine.sample(model, PROMPTS, EPISODES, chosen, 11, ENDS, turns=turns)


def as_lists(drawn: Completions) -> list[list[int]]:
    return [ids.tolist() for ids in drawn.ids]


def naive(model: CausalLM, most: int = 4, budget: int = 10**6) -> list[tuple[list[int], list[bool], bool]]:
    """Sample each token from a forward pass over the whole text, with the random number of its position in the
    episode.
    """
    found = []
    for prompt, number in zip(PROMPTS, EPISODES, strict=True):
        ids: list[int] = []
        learned: list[bool] = []
        finished = False
        for turn in range(most):
            start = len(ids)
            while len(ids) - start < LIMIT and len(ids) < budget and not (len(ids) > start and ids[-1] in ENDS):
                with torch.no_grad():
                    logits = model.model(torch.cat([prompt, torch.tensor(ids, dtype=torch.long)])[None]).logits[0, -1]
                cumulative = (logits.double() / 0.9).softmax(-1).cumsum(-1)
                ids.append(int((cumulative < float(uniform(11, number[None], torch.tensor([len(ids)])))).sum()))
                learned.append(True)
            reply = Talks().reply(Episode({}, [], ids, learned, int(number)))
            finished = reply.done and ids[-1] in ENDS
            over = reply.done or ids[-1] not in ENDS or turn == most - 1
            if over or len(ids) + len(reply.ids or ()) >= budget:
                break
            ids += reply.ids or ()
            learned += [False] * len(reply.ids or ())
        found.append((ids, learned, finished))
    return found


SIZES = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def llama() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(LlamaForCausalLM(tiny_config()))


def mistral() -> CausalLM:
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    return CausalLM(MistralForCausalLM(config))


def gpt2(positions: int = 64) -> CausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "n_positions": positions, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return CausalLM(GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)))


def hybrid() -> CausalLM:
    model = CausalLM(build("lfm2", AutoModelForCausalLM, vocab_size=120))
    model.decoding = "slots"
    return model


@pytest.fixture(scope="module", params=[llama, mistral, gpt2, hybrid])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return request.param().eval()


@pytest.fixture(scope="module")
def policy() -> CausalLM:
    return llama().eval()


@pytest.mark.parametrize("slots", [1, 3, 5, None])
def test_multi_turn_slot_sampling_equals_decoding_without_a_cache(model: CausalLM, slots: int | None) -> None:
    expected, drawn = naive(model), converse(SlotEngine(), model, slots)
    assert as_lists(drawn) == [ids for ids, _, _ in expected]
    assert [mask.tolist() for mask in drawn.learned or ()] == [learned for _, learned, _ in expected]
    assert drawn.finished.tolist() == [finished for _, _, finished in expected]
    assert len({len(one.ends) for one in drawn.transcripts}) > 2 and 0 < int(drawn.finished.sum()) < len(PROMPTS)


def test_logprobs_equal_the_models_on_policy_tokens_and_0_elsewhere(policy: CausalLM) -> None:
    drawn = converse(SlotEngine(), policy, 4)
    assert drawn.entropies is not None and drawn.learned is not None
    for mine, theirs, mask, entropies in zip(
        drawn.logprobs, scored(policy, PROMPTS, drawn.ids, 0.9), drawn.learned, drawn.entropies, strict=True
    ):
        torch.testing.assert_close(mine, torch.where(mask, theirs, 0.0), atol=1e-4, rtol=0)
        assert bool((entropies[mask] > 0).all()) and not entropies[~mask].any()


@pytest.mark.parametrize("ahead", [1, 4])
def test_random_numbers_depend_on_the_position_in_the_episode(
    policy: CausalLM, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = as_lists(converse(SlotEngine(), policy))
    monkeypatch.setattr(slot_engine, "AHEAD", ahead)
    assert as_lists(converse(SlotEngine(), policy, 3)) == whole


@pytest.mark.parametrize("slots", [4, None])
def test_generate_engine_equals_slot_engine(policy: CausalLM, slots: int | None) -> None:
    ours, theirs = converse(SlotEngine(), policy), converse(GenerateEngine(), policy, slots)
    assert as_lists(theirs) == as_lists(ours) and torch.equal(theirs.finished, ours.finished)
    assert [one.rewards for one in theirs.transcripts] == [one.rewards for one in ours.transcripts]
    for mine, other in zip(theirs.logprobs, ours.logprobs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


def test_a_server_gets_one_seed_per_turn(policy_folder: str) -> None:
    model = load_policy(policy_folder).requires_grad_(False).eval()
    with serving(policy_folder) as server:
        drawn = converse(RemoteEngine(server.url, BASE), model)
        bodies = server.bodies()
    assert len({body["seed"] for body in bodies}) == len(bodies) > len(PROMPTS)
    assert drawn.learned is not None and not all(bool(mask.all()) for mask in drawn.learned)
    for mine, theirs, mask in zip(drawn.logprobs, scored(model, PROMPTS, drawn.ids, 0.9), drawn.learned, strict=True):
        torch.testing.assert_close(mine, torch.where(mask, theirs, 0.0), atol=1e-4, rtol=0)


def test_episodes_of_a_text_server_get_the_policys_own_logprobs(policy_folder: str) -> None:
    model = load_policy(policy_folder).requires_grad_(False).eval()
    with serving(policy_folder, text=True) as server:
        drawn = converse(RemoteEngine(server.url, BASE, tokenizer=policy_folder), model)
    assert drawn.learned is not None and not all(bool(mask.all()) for mask in drawn.learned)
    for mine, theirs, mask in zip(drawn.logprobs, scored(model, PROMPTS, drawn.ids, 0.9), drawn.learned, strict=True):
        torch.testing.assert_close(mine, torch.where(mask, theirs, 0.0), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_worker_processes_draw_the_same_episodes(policy_folder: str) -> None:
    model, engine = load_policy(policy_folder), WorkerEngine(workers=2, threads=1)
    engine.prepare(policy_folder, LoadSettings(), None, 1)
    ours, theirs = converse(SlotEngine(), model), converse(engine, model)
    assert as_lists(theirs) == as_lists(ours) and torch.equal(theirs.finished, ours.finished)
    assert max(len(one.ends) for one in ours.transcripts) > 2


def test_continuous_batching_has_other_random_numbers_in_each_turn(
    policy_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    manual_seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    converse(ContinuousBatchingEngine(), load_policy(policy_folder))
    assert len(seeds) == len(set(seeds)) > 2


@pytest.mark.parametrize("engine", [SlotEngine(), GenerateEngine()])
def test_an_episode_ends_at_the_models_last_position(engine: SamplingEngine) -> None:
    model = gpt2(positions=24).eval()
    drawn = converse(engine, model, rules=MultiTurn(Talks(), max_turns=9))
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(PROMPTS, drawn.ids, strict=True)]
    assert max(lengths) == 24 and bool((~drawn.finished[torch.tensor(lengths) == 24]).all())
    assert as_lists(drawn) == as_lists(converse(SlotEngine(), model, rules=MultiTurn(Talks(), max_turns=9)))


def test_only_replies_and_last_tokens_are_prefilled_between_turns(
    policy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    forward = policy.next_token_logits

    def counted(step: Any) -> Tensor:
        read.append(step.input_ids.shape[1])
        return forward(step)

    monkeypatch.setattr(policy, "next_token_logits", counted)
    drawn = converse(SlotEngine(), policy, 4)
    longest = max(sum(1 for same in mask.tolist() if not same) for mask in drawn.learned or ())
    assert longest > 4 and len(PROMPTS) > 4
    assert sum(width > 5 for width in read) <= 3 + 1  # the first prompts; a reply has 4 tokens, after an end token


@pytest.mark.parametrize("slots", [3, None])
def test_replies_are_requested_in_batches(policy: CausalLM, slots: int | None) -> None:
    talks = Talks()
    drawn = converse(SlotEngine(), policy, slots, MultiTurn(talks, max_turns=4))
    assert sum(map(len, talks.batches)) == sum(len(one.ends) for one in drawn.transcripts)
    assert max(map(len, talks.batches)) > 1


@pytest.mark.parametrize("engine", [SlotEngine(), GenerateEngine()])
@pytest.mark.parametrize("budget", [4, 9, 15])
def test_the_token_budget_truncates_turns_and_ends_episodes(
    policy: CausalLM, engine: SamplingEngine, budget: int
) -> None:
    drawn = converse(engine, policy, 4, MultiTurn(Talks(), 4, budget))
    assert as_lists(drawn) == [ids for ids, _, _ in naive(policy, budget=budget)]
    assert max(map(len, drawn.ids)) == budget
    assert drawn.finished.tolist() == [finished for _, _, finished in naive(policy, budget=budget)]


def test_the_last_turn_gets_a_reward_and_no_reply(policy: CausalLM) -> None:
    drawn = converse(SlotEngine(), policy, rules=MultiTurn(Talks(0.5), max_turns=1))
    assert all(one.rewards == (0.5,) and bool(one.learned.all()) for one in drawn.transcripts)
    assert [one.messages[0]["role"] for one in drawn.transcripts] == ["assistant"] * len(PROMPTS)


def test_on_progress_counts_whole_episodes(policy: CausalLM) -> None:
    for engine in (SlotEngine(), GenerateEngine()):
        seen: list[int] = []
        turns = Turns(MultiTurn(Talks(), 4), tiny_tokenizer(), ["w9"] * len(PROMPTS), {}, EPISODES.tolist())
        engine.sample(policy, PROMPTS, EPISODES, SamplingSettings(LIMIT), 11, ENDS, seen.append, turns=turns)
        assert sum(seen) == len(PROMPTS)


class Wrong(Talks):
    """Returns values other than replies."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def reply_all(self, episodes: Any) -> Any:
        return self.given(episodes)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda episodes: [], "returned 0 replies"),
        (lambda episodes: ["hello"] * len(episodes), "'hello' in place of a Reply"),
        (lambda episodes: [Reply("w9", reward=float("nan"))] * len(episodes), "the reward nan"),
        (lambda episodes: [Reply("w9", reward="a")] * len(episodes), "the reward 'a'"),  # type: ignore[arg-type]
        (lambda episodes: [Reply("w9", reward=10**400)] * len(episodes), "not a finite number"),
        (lambda episodes: [Reply("w9", reward=torch.ones(2))] * len(episodes), "not a finite number"),  # type: ignore[arg-type]
        (lambda episodes: [Reply("w9", reward=1j)] * len(episodes), "not a finite number"),  # type: ignore[arg-type]
        (lambda episodes: [Reply("\ud800")] * len(episodes), "a lone surrogate"),
        (lambda episodes: [Reply(5)] * len(episodes), "the text 5"),  # type: ignore[arg-type]
        (lambda episodes: [Reply(messages=[5])] * len(episodes), "lacks a role"),  # type: ignore[list-item]
        (lambda episodes: [Reply(messages=5)] * len(episodes), "a list of turns"),  # type: ignore[arg-type]
        (lambda episodes: [Reply(messages=[{"content": "w9"}])] * len(episodes), "lacks a role"),
        (lambda episodes: [Reply("w9", turn="w9")] * len(episodes), "the turn 'w9'"),  # type: ignore[arg-type]
        (lambda episodes: [Reply(ids=[10**6])] * len(episodes), "token ids"),
        (lambda episodes: [Reply(ids=[-1])] * len(episodes), "not token ids"),
    ],
)
def test_invalid_replies_are_refused(policy: CausalLM, given: Any, words: str) -> None:
    with refused("bad-reply", "Wrong", words):
        converse(SlotEngine(), policy, rules=MultiTurn(Wrong(given)))


def test_an_empty_reply_is_refused(policy: CausalLM) -> None:
    with refused("empty-reply", "Wrong"):
        converse(SlotEngine(), policy, rules=MultiTurn(Wrong(lambda episodes: [Reply()] * len(episodes))))
