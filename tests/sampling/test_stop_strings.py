"""Stop strings end completions in every engine: the tokens keep the string, the text ends before it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from small_server import BASE, SmallServer, serving
from tiny_models import EOS, random_rows, save_policy, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.commands.chat import Conversation
from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.modules import SFTModule
from rlhf_lightning.sampling.conversation import Turns
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingSettings
from rlhf_lightning.sampling.generate_engine import ContinuousBatchingEngine, GenerateEngine
from rlhf_lightning.sampling.remote_engine import RemoteEngine
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.scoring.learned import LearnedScorer
from rlhf_lightning.tokenization import Ends, completion_text, end_token_ids, load_tokenizer, turn_text
from rlhf_lightning.types import Episode, MultiTurn, Reply

PROMPTS = [torch.tensor(prompt) for prompt, _ in random_rows(9, seed=5, prompt=9)]
EPISODES = torch.arange(20, 29)
STOPS = ("7 w", "w55", "3 w1")
"""The first and the last end inside a token: 'w87 w4' contains the end of a token and the beginning of the next."""


@pytest.fixture(scope="module")
def policy(policy_folder: str) -> CausalLM:
    return load_policy(policy_folder).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def ends() -> Ends:
    return Ends.of((EOS,), STOPS, tiny_tokenizer())


@pytest.fixture
def server(policy_folder: str) -> Iterator[SmallServer]:
    with serving(policy_folder) as running:
        yield running


def draw(engine: SamplingEngine, policy: CausalLM, ends: Sequence[int], **settings: Any) -> Completions:
    chosen = SamplingSettings(**({"max_new_tokens": 16, "temperature": 0.9} | settings))
    return engine.sample(policy, PROMPTS, EPISODES, chosen, 7, ends)


def cut(whole: Completions) -> list[list[int]]:
    """Return completions truncated after the token that completes a stop string, searched token by token."""
    tokenizer, found = tiny_tokenizer(), []
    for ids in whole.ids:
        counts = (n for n in range(1, len(ids) + 1) if any(stop in tokenizer.decode(ids[:n]) for stop in STOPS))
        found.append(ids[: next(counts, len(ids))].tolist())
    return found


def as_lists(drawn: Completions) -> list[list[int]]:
    return [ids.tolist() for ids in drawn.ids]


class Unaware(SlotEngine):
    """An engine that supports only end tokens."""

    keeps_turns = False

    def complete(self, model: CausalLM, request: Any) -> Completions:
        return super().complete(model, request._replace(end_ids=Ends(request.end_ids)))


@pytest.mark.parametrize("settings", [{}, {"batch_size": 2}, {"temperature": 0.0}])
@pytest.mark.parametrize("engine", [SlotEngine(), GenerateEngine(), Unaware()])
def test_every_engine_ends_completions_at_the_same_token(
    policy: CausalLM, ends: Ends, engine: SamplingEngine, settings: dict[str, Any]
) -> None:
    whole, drawn = draw(SlotEngine(), policy, (EOS,), **settings), draw(engine, policy, ends, **settings)
    expected = cut(whole)
    assert as_lists(drawn) == expected != as_lists(whole)
    stopped = [len(ids) < len(all_ids) for ids, all_ids in zip(expected, whole.ids, strict=True)]
    assert any(stopped) and all(bool(done) for done, one in zip(drawn.finished, stopped, strict=True) if one)
    for ids, logprobs, expect in zip(drawn.ids, drawn.logprobs, whole.logprobs, strict=True):
        assert len(ids) == len(logprobs)
        torch.testing.assert_close(logprobs, expect[: len(ids)], atol=1e-4, rtol=0)


def test_slots_are_freed_immediately_at_a_stop_string(
    policy: CausalLM, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    forward = CausalLM.next_token_logits
    monkeypatch.setattr(CausalLM, "next_token_logits", lambda model, step: passes.append(1) or forward(model, step))
    draw(SlotEngine(), policy, ends, batch_size=2)
    fewer = len(passes)
    draw(SlotEngine(), policy, (EOS,), batch_size=2)
    assert fewer < len(passes) - fewer


def test_continuous_batching_ends_at_stop_strings(policy_folder: str, ends: Ends) -> None:
    drawn = draw(ContinuousBatchingEngine(), load_policy(policy_folder), ends)
    tokenizer = tiny_tokenizer()
    held = [any(stop in tokenizer.decode(ids) for stop in STOPS) for ids in drawn.ids]
    before = [any(stop in tokenizer.decode(ids[:-1]) for stop in STOPS) for ids in drawn.ids]
    assert any(held) and not any(before) and all(bool(f) for f, one in zip(drawn.finished, held, strict=True) if one)


@pytest.mark.parametrize("knows", [True, False])
def test_stop_strings_are_sent_to_a_server_and_enforced_locally(
    policy: CausalLM, ends: Ends, server: SmallServer, knows: bool
) -> None:
    server.knows_stops = knows
    drawn = draw(RemoteEngine(server.url, BASE, requests=2), policy, ends)
    assert all(body["stop"] == list(STOPS) for body in server.bodies())
    assert cut(drawn) == as_lists(drawn)
    assert any(len(ids) < 16 and ids[-1] != EOS and done for ids, done in zip(drawn.ids, drawn.finished, strict=True))


def test_stop_strings_are_found_across_partial_characters() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    ends = Ends.of((tokenizer.eos_token_id,), ("→é",), tokenizer)
    ids = tokenizer("a" * 40 + "é→→é and more", add_special_tokens=False)["input_ids"]
    stop = len(tokenizer("a" * 40 + "é→→é", add_special_tokens=False)["input_ids"])
    assert ends.stop(ids) == stop and ends.stop(ids[: stop - 1]) is None
    assert [ends.completed(ids[:count]) for count in range(1, stop + 1)] == [False] * (stop - 1) + [True]


def test_stop_strings_are_saved_with_the_tokenizer_and_removed_from_texts(policy_folder: str, tmp_path: Path) -> None:
    module = SFTModule(init_from=policy_folder, stop_strings=["w9 w1"])
    module.configure_model()
    exported = module.export(tmp_path / "out")
    tokenizer = load_tokenizer(exported)
    ends = end_token_ids(tokenizer)
    assert ends.strings == ("w9 w1",) and EOS in ends
    assert completion_text(tokenizer, [7, 9, 17, 8]) == turn_text(tokenizer, [7, 9, 17, 8]) == "w7 "
    assert completion_text(tokenizer, [7, 9, 17, 8], strings=False) == "w7 w9 w17 w8"
    with refused("stop-string-empty", "is empty"):
        load_tokenizer(policy_folder, stop_strings=[""])


def test_stop_strings_are_read_from_the_generation_config(tmp_path: Path) -> None:
    folder = Path(save_policy(tmp_path))
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "stop_strings": "w9 w1"}')
    assert end_token_ids(load_tokenizer(folder)).strings == ("w9 w1",)


def test_a_reward_model_scores_the_text_before_the_stop_string(policy_folder: str, reward_folder: str) -> None:
    scorer = LearnedScorer(reward_folder)
    assert scorer.shares_tokenizer(load_tokenizer(policy_folder))
    assert not scorer.shares_tokenizer(load_tokenizer(policy_folder, stop_strings=["w9"]))


def test_chat_hides_the_stop_string(policy_folder: str) -> None:
    def answer(stops: list[str]) -> tuple[str, list[int]]:
        policy, tokenizer = SamplingArguments(stop_strings=stops).load(policy_folder)
        talk = Conversation(policy, tokenizer, SamplingSettings(max_new_tokens=30, temperature=0.0))
        return "".join(talk.answer("w7 w8")), talk.ids

    whole, _ = answer([])
    words = whole.split()
    for first in range(2, min(len(words), 26) - 1):
        stop = f"{words[first][1:]} {words[first + 1][:2]}"
        said, ids = answer([stop])
        assert said == whole[: whole.index(stop)]
        assert len(ids) == len(tiny_tokenizer()(whole[: whole.index(stop) + len(stop)])["input_ids"])


class Again:
    """Replies with a message until the third turn."""

    def reset(self, row: Any) -> Any:
        return row["prompt"]

    def reply(self, episode: Episode) -> Reply:
        assert not any(stop in episode.messages[-1]["content"] for stop in STOPS)
        return Reply("w8", done=len(episode.messages) > 5)


@pytest.mark.parametrize("engine", [SlotEngine(), GenerateEngine(), Unaware()])
@pytest.mark.parametrize("chat", [True, False])
def test_turns_end_at_stop_strings_and_get_an_end_of_turn(
    policy: CausalLM, engine: SamplingEngine, chat: bool, policy_folder: str
) -> None:
    tokenizer = load_tokenizer(policy_folder, stop_strings=STOPS)
    prompts = [[{"role": "user", "content": f"w{n}"}] if chat else f"w{n}" for n in range(8, 17)]
    turns = Turns(MultiTurn(Again(), max_turns=4), tokenizer, prompts, {}, EPISODES.tolist())
    settings = SamplingSettings(16, batch_size=3)
    drawn = engine.sample(policy, PROMPTS, EPISODES, settings, 7, end_token_ids(tokenizer), turns=turns)
    seen = 0
    for ids, one in zip(drawn.ids, drawn.transcripts, strict=True):
        assert len(ids) == len(one.learned)
        for last, start in zip(one.ends[:-1], one.starts[1:], strict=True):
            between = ids[last + 1 : start].tolist()
            assert not one.learned[last + 1 : start].any()
            assert (between[0] == EOS) == (chat and int(ids[last]) != EOS)
            seen += int(ids[last]) != EOS
    assert seen
