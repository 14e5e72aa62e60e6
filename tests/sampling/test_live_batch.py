"""Completions requested at any time equal those of the SlotEngine; prompt log-probabilities equal the model's."""

import random
import threading
from concurrent.futures import Future

import pytest
import torch
from tiny_models import EOS, FIRST_WORD, plain_logprobs

from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.live_batch import LiveBatch, LiveCompletion, UnscoredPrompt, score_prompts
from rlhf_lightning.sampling.slot_engine import sample


class Kept(LiveCompletion):
    """Records its tokens; stops after ``stop_after`` tokens."""

    def __init__(self, *args, stop_after=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens, self.stop_after, self.result = [], stop_after, Future()

    def take(self, token):
        self.tokens.append(token)
        return self.stop_after == len(self.tokens)

    def end(self, reason):
        self.result.set_result(reason)

    def fail(self, error):
        self.result.set_exception(error)


@pytest.fixture(scope="module")
def policy(policy_folder):
    return load_policy(policy_folder).eval()


@pytest.fixture
def running(policy):
    """Start a batch with the given number of slots on a thread."""
    begun = []

    def start(slots=3, model=policy):
        batch = LiveBatch(model, slots)
        thread = threading.Thread(target=batch.run, daemon=True)
        thread.start()
        begun.append((batch, thread))
        return batch

    yield start
    for batch, thread in begun:
        batch.close()
        thread.join(timeout=20)
        assert not thread.is_alive()


def prompt(*ids):
    return torch.tensor(ids)


WAYS = [SamplingSettings(12), SamplingSettings(7, temperature=0), SamplingSettings(9, 0.7, top_p=0.8),
        SamplingSettings(12, 1.3, top_k=5)]  # fmt: skip


@pytest.mark.parametrize("decoding", [None, "batches", "equal", "uncached"])
def test_completions_equal_those_of_the_slot_engine(policy, running, decoding, monkeypatch):
    """One batch has different settings, seeds and lengths, more completions than slots, and new requests while it
    runs.
    """
    monkeypatch.setattr(policy, "decoding", decoding)
    lot, asked = random.Random(0), []
    for number in range(14):
        ids = prompt(*(lot.randrange(FIRST_WORD, 120) for _ in range(lot.choice((1, 3, 8)))))
        asked.append(Kept(ids, WAYS[number % 4], number // 3, number % 3, [EOS], top=number % 2))
    batch = running()
    batch.submit(asked[:5])
    asked[2].result.result(timeout=60)
    batch.submit(asked[5:])
    for one in asked:
        reason = one.result.result(timeout=60)
        expected = sample(policy, [one.prompt], torch.tensor([one.episode]), one.settings, one.seed, [EOS])
        assert [token.id for token in one.tokens] == expected.ids[0].tolist()
        found = torch.tensor([token.logprob for token in one.tokens])
        torch.testing.assert_close(found, expected.logprobs[0], atol=1e-4, rtol=1e-4)
        assert reason == ("stop" if expected.finished[0] else "length")
        assert all(len(token.top) == one.top for token in one.tokens)


def test_greedy_tokens_have_the_highest_probability(running):
    one = Kept(prompt(10, 11), SamplingSettings(5, temperature=0), 0, 0, [], top=3)
    running().submit([one])
    one.result.result(timeout=60)
    for token in one.tokens:
        assert token.top[0][0] == token.id and token.top[0][1] == pytest.approx(token.logprob)
        assert [logprob for _, logprob in token.top] == sorted((lp for _, lp in token.top), reverse=True)


def test_stopped_and_cancelled_completions_leave_the_batch(running):
    stopped = Kept(prompt(10), SamplingSettings(50), 0, 0, [], stop_after=3)
    dropped = Kept(prompt(11), SamplingSettings(2000), 0, 0, [])
    batch = running(1)
    batch.submit([stopped, dropped])
    assert stopped.result.result(timeout=60) == "stop" and len(stopped.tokens) == 3
    dropped.cancelled = True
    after = Kept(prompt(12), SamplingSettings(4), 0, 0, [])
    batch.submit([after])
    assert after.result.result(timeout=60) == "length" and not dropped.result.done()


def test_a_failed_batch_does_not_affect_the_next(policy, running, monkeypatch):
    batch = running(2)
    first = Kept(prompt(10), SamplingSettings(3), 0, 0, [])
    monkeypatch.setattr(batch, "_record", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    batch.submit([first])
    with pytest.raises(MemoryError):
        first.result.result(timeout=60)
    monkeypatch.undo()
    second = Kept(prompt(10), SamplingSettings(3), 0, 0, [])
    batch.submit([second])
    assert second.result.result(timeout=60) == "length"


def test_prompt_logprobs_equal_those_of_the_model(policy, running):
    prompts = [prompt(10, 20, 30), prompt(7), prompt(*range(40, 70))]
    found = score_prompts(policy, prompts, [2, 1, 0])
    batch, scores = running(), [Future() for _ in prompts]
    batch.submit(prompts=[UnscoredPrompt(*one) for one in zip(prompts, [2, 1, 0], scores, strict=True)])
    with torch.no_grad():
        for ids, one, top, score in zip(prompts, found, [2, 1, 0], scores, strict=True):
            expected = plain_logprobs(policy.model, ids[:1], ids[1:]) if len(ids) > 1 else torch.zeros(0)
            assert [token.id for token in one.tokens] == ids[1:].tolist()
            torch.testing.assert_close(torch.tensor([t.logprob for t in one.tokens]), expected, atol=1e-5, rtol=1e-5)
            assert all(len(token.top) == top for token in one.tokens)
            assert [t.id for t in score.result(timeout=60).tokens] == ids[1:].tolist()
        logits = policy.model(prompts[0].unsqueeze(0)).logits[0].log_softmax(-1)
        ranks = [int((logits[place] > logits[place, prompts[0][place + 1]]).sum()) + 1 for place in (0, 1)]
        assert found[0].ranks == ranks
        assert [index for index, _ in found[0].tokens[0].top] == logits[0].topk(2).indices.tolist()


def test_closing_fails_incomplete_requests(policy):
    batch = LiveBatch(policy, 1)
    waiting, score = Kept(prompt(10), SamplingSettings(3), 0, 0, []), Future()
    batch.submit([waiting], [UnscoredPrompt(prompt(10, 11), 0, score)])
    batch.close()
    batch.run()
    for future in (waiting.result, score):
        assert future.exception(timeout=5).code == "server-stopped"
