"""Test that an environment computes replies while other episodes are decoded, and that its delays change nothing."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from torch import Tensor

from rlhf_lightning.environments import FaultTolerantEnvironment
from rlhf_lightning.models.causal_lm import CausalLM, Decoding
from rlhf_lightning.runs.interruptions import has_ended
from rlhf_lightning.sampling.conversation import Turns
from rlhf_lightning.sampling.generate_engine import GenerateEngine
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.types import Episode, MultiTurn, Reply
from rlhf_lightning.workers import Threads
from sampling.test_turns import EPISODES, PROMPTS, Talks, as_lists, converse, hybrid, llama, naive

TESTS = Path(__file__).resolve().parents[1]


class Late(Talks):
    """Replies after a random delay."""

    def reply(self, episode: Episode) -> Reply:
        time.sleep(random.choice((0.0, 0.001, 0.01)))
        return super().reply(episode)


def rules(environment: Any, threads: int = 1, **settings: Any) -> MultiTurn:
    return MultiTurn(FaultTolerantEnvironment(environment, threads=threads, **settings), max_turns=4)


@pytest.fixture(scope="module")
def policy() -> CausalLM:
    return llama().eval()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 5, None])
def test_delays_change_no_bit_of_an_episode(policy: CausalLM, slots: int | None, threads: int) -> None:
    late, again, prompt = (
        converse(SlotEngine(), policy, slots, rules(kind(), threads)) for kind in (Late, Late, Talks)
    )
    assert as_lists(late) == [ids for ids, _, _ in naive(policy)]
    for mine, other, third in zip(late.logprobs, again.logprobs, prompt.logprobs, strict=True):
        assert torch.equal(mine, other) and torch.equal(mine, third)


@pytest.mark.parametrize("decoding", ["slots", "batches", "equal", "uncached"])
@pytest.mark.parametrize("make", [llama, hybrid])
def test_every_way_of_decoding_draws_the_same_episodes(make: Callable[[], CausalLM], decoding: Decoding) -> None:
    model = make().eval()
    model.decoding = decoding
    for slots in (3, None):
        assert as_lists(converse(SlotEngine(), model, slots, rules(Late()))) == [ids for ids, _, _ in naive(model)]


class Steps:
    """Counts the rows of each decoding step of a policy, and the steps made while a reply is pending."""

    def __init__(self, policy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.pending = self.overlapped = 0
        self.more = threading.Condition()
        self.forward, self.ask, self.hear = policy.next_token_logits, Turns.ask, Turns.hear
        monkeypatch.setattr(policy, "next_token_logits", self.count)
        monkeypatch.setattr(Turns, "ask", lambda turns, *given: self.change(1, self.ask, turns, *given))
        monkeypatch.setattr(Turns, "hear", lambda turns, *given: self.change(-1, self.hear, turns, *given))

    def change(self, by: int, call: Any, *given: Any) -> Any:
        self.pending += by
        return call(*given)

    def count(self, step: Any) -> Tensor:
        if step.input_ids.shape[1] == 1:  # wider passes are prefills
            with self.more:
                self.rows.append(len(step.input_ids))
                self.overlapped += self.pending > 0
                self.more.notify()
        return self.forward(step)


@pytest.mark.parametrize("slots", [2, 4, None])
def test_decoding_goes_on_while_replies_are_pending(
    policy: CausalLM, slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reply comes only after another step."""
    steps, came = Steps(policy, monkeypatch), []

    class Waits(Talks):
        def reply(self, episode: Episode) -> Reply:
            if not came:
                with steps.more:
                    came.append(steps.more.wait_for(lambda: steps.overlapped > 0, timeout=30))
            return super().reply(episode)

    drawn = converse(SlotEngine(), policy, slots, rules(Waits()))
    assert came == [True] and as_lists(drawn) == [ids for ids, _, _ in naive(policy)]
    assert steps.overlapped > len(steps.rows) / 2


def test_a_batch_that_has_shrunk_grows_when_episodes_come_back(
    policy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(policy, monkeypatch)
    converse(SlotEngine(), policy, None, rules(Talks()))
    least = min(steps.rows[: len(steps.rows) // 2])
    assert least < 0.75 * len(PROMPTS) and max(steps.rows[steps.rows.index(least) :]) > least + 1


def test_one_thread_calls_the_environment_in_order() -> None:
    calls: list[tuple[int, int]] = []

    class Notes(Late):
        def reply(self, episode: Episode) -> Reply:
            calls.append((threading.get_ident(), episode.number))
            return super().reply(episode)

    environment = FaultTolerantEnvironment(Notes())
    episodes = [Episode({}, [], [11], [True], number) for number in range(8)]
    for future in [environment.start_replies(episodes[start : start + 2]) for start in (0, 2, 4, 6)]:
        future.result()
    assert [number for _, number in calls] == [*range(8)]
    assert {thread for thread, _ in calls}.isdisjoint({threading.get_ident()}) and len(dict(calls)) == 1


class Odd(Late):
    """Raises in episodes with an odd number, from their second turn on."""

    def reply(self, episode: Episode) -> Reply:
        if episode.number % 2 and episode.turn:
            raise OSError("the simulator is away")
        return super().reply(episode)


def test_faults_drop_the_same_episodes_as_without_overlap(policy: CausalLM) -> None:
    overlapped, whole = (
        converse(engine, policy, 4, rules(Odd(), threads=2, on_fault="drop"))
        for engine in (SlotEngine(), GenerateEngine())
    )
    assert as_lists(overlapped) == as_lists(whole)
    failed = [one.failed for one in overlapped.transcripts]
    assert failed == [one.failed for one in whole.transcripts] and 0 < sum(failed) < len(EPISODES)


def test_a_fault_ends_sampling_and_cancels_later_requests(policy: CausalLM) -> None:
    begun: list[Future[Any]] = []

    class Fails(FaultTolerantEnvironment):
        def start_replies(self, episodes: Any) -> Future[Any]:
            begun.append(super().start_replies(episodes) if not begun else Future())
            return begun[-1]

    with refused("no-reply", "Raises", "OSError: the simulator is away"):
        converse(SlotEngine(), policy, 3, MultiTurn(Fails(Raises()), max_turns=4))
    assert len(begun) > 1 and all(future.cancelled() for future in begun[1:])


class Raises(Talks):
    def reply(self, episode: Episode) -> Reply:
        raise OSError("the simulator is away")


class Starts(Talks):
    """Returns something given from start_replies."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def start_replies(self, episodes: Any) -> Any:
        return self.given


def future_of(outcome: Any) -> Future[Any]:
    future = Future[Any]()
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
    return future


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ([Reply("w9")], "bad-reply", "return a Future"),
        (future_of(5), "bad-reply", "returned 5"),
        (future_of([]), "bad-reply", "returned 0 replies"),
        (future_of(["hello"] * len(PROMPTS)), "bad-reply", "'hello' in place of a Reply"),
        (future_of(SystemExit(0)), "environment-exits", "sys.exit(0)"),
    ],
)
def test_what_is_no_future_of_replies_is_refused(policy: CausalLM, given: Any, code: str, words: str) -> None:
    with refused(code, "Starts", words):
        converse(SlotEngine(), policy, rules=MultiTurn(Starts(given)))


def test_threads_end_after_their_owner() -> None:
    threads = Threads(2)
    found = threads.submit(threading.current_thread).result()
    del threads
    found.join(timeout=30)
    assert not found.is_alive()


SCRIPT = """
import sys
from rlhf_lightning.cli import terminable
from rlhf_lightning.environments import FaultTolerantEnvironment
from rlhf_lightning.types import Episode

if __name__ == "__main__":
    spec = {"class_path": "faulty_environment.Hangs", "init_args": {"file": sys.argv[1]}}
    environment = FaultTolerantEnvironment(spec, seconds=float(sys.argv[2]) or None, retries=3, wait=0.0)
    with terminable([]):
        environment.reply_all([Episode({}, [], [11], [True], number) for number in range(20)])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "number"), [("0", signal.SIGINT), ("60", signal.SIGTERM)])
def test_a_signal_ends_a_process_whose_environment_hangs(tmp_path: Path, seconds: str, number: int) -> None:
    """Processes of the environment, and processes that these started, end too."""
    file = tmp_path / "processes"
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(file), seconds], env=environment)
    deadline = time.monotonic() + 200
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) != 0
    started = [int(one) for one in file.read_text().split()]
    if seconds == "0":  # the environment is responsible for child processes of threads
        os.kill(started[1], signal.SIGKILL)
    while not all(map(has_ended, started)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
