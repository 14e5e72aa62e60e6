"""A remote scorer: unavailable, available again, permanently gone, sending nonsense, requiring a key."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import refused
from score_server import ScoreServer

from rlhf_lightning.sampling.json_server import JSONServer, ServerError
from rlhf_lightning.scoring import FaultTolerant, RemoteScorer, checked_scores
from rlhf_lightning.scoring.scorer import ask_scorer
from rlhf_lightning.types import Judgement

CANARY = "hf_canary0123456789"


@pytest.fixture(scope="module")
def server() -> Iterator[ScoreServer]:
    server = ScoreServer()
    server.start()
    yield server
    server.kill()


def score(scorer: Any, texts: list[str], **columns: list[Any]) -> Any:
    return scorer(["p"] * len(texts), texts, **columns)


def test_scores_keep_the_order_of_completions(server: ScoreServer) -> None:
    texts = ["a " * (row % 7 + 1) for row in range(23)]
    scorer = RemoteScorer(server.url, batch_size=4, requests=3)
    assert score(scorer, texts) == [row % 7 + 1 for row in range(23)]
    assert score(scorer, []) == []
    assert score(RemoteScorer(server.url, batch_size=1), ["a", "b c"], bonus=[10, 20]) == [11, 22]
    assert score(RemoteScorer(server.url), ["none"]) == [None]
    messages = [{"role": "user", "content": "hello"}]
    assert scorer([messages], ["a b"]) == [2]


def test_scoring_survives_a_server_restart() -> None:
    server = ScoreServer()
    server.start()
    scorer = RemoteScorer(server.url, retries=8, wait=0.1)
    assert score(scorer, ["a b"]) == [2]
    server.kill()
    timer = threading.Timer(0.5, server.start, kwargs={"wait": False})
    timer.start()
    assert score(scorer, ["a b c"]) == [3]
    timer.join()
    server.kill()


def test_a_dead_server_fails_within_the_retry_limit() -> None:
    scorer = RemoteScorer(ScoreServer().url, batch_size=1, requests=2, retries=2, wait=0.05)
    started = time.monotonic()
    with refused("server-silent", "gave no answer in 3 attempts; the last: ", "refused"):
        score(scorer, ["a"] * 50)
    assert time.monotonic() - started < 2
    dropping = FaultTolerant(scorer, on_fault="drop", most_in_a_row=20)
    assert score(dropping, ["a"] * 10) == [None] * 10
    assert dropping.take_metrics()["score_failed"].tolist() == [1.0] * 10


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("busy", "in 1 attempts; the last: status 503"),
        ("refuse", "refused with status 401"),
        ("elsewhere", "refused with status 302"),
        ("nonsense", 'answered without {"scores": ...}: {"answer": 42}'.replace("...", "[...]")),
        ("trickle", "not whole after 0.3 s"),
    ],
)
def test_malformed_responses_are_refused(server: ScoreServer, word: str, message: str) -> None:
    with pytest.raises(ServerError) as error:
        score(RemoteScorer(server.url, retries=0, timeout=0.3), [word])
    assert message in str(error.value)


def test_too_few_scores_are_refused(server: ScoreServer) -> None:
    with refused("number-of-scores", "returned 1 scores for 2 completions"):
        checked_scores(score(RemoteScorer(server.url), ["a", "fewer"]), 2, "x")
    assert score(FaultTolerant(RemoteScorer(server.url), on_fault="drop"), ["a b", "fewer"]) == [2, None]


@pytest.mark.parametrize("place", [0.9, "0", 1e400, None, [0]])
def test_span_positions_must_be_integers(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = {"score": 1.0, "span_rewards": [[place, 2, 0.5]]}
    monkeypatch.setattr(JSONServer, "post", lambda *_: {"scores": [judged]})
    with refused("not-numbers"):
        score(RemoteScorer("http://host"), ["a b"])
    with refused("span-reward"):
        ask_scorer(lambda *_, **__: [Judgement(**judged)], ["p"], ["a b"], {}, "x")


def test_the_api_key_is_sent_and_never_printed(server: ScoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", CANARY)
    scorer = RemoteScorer(server.url, retries=0, api_key="JUDGE_API_KEY")
    with pytest.raises(ServerError, match=r"no such key: Bearer \*\*\*") as error:
        score(scorer, ["refuse"])
    assert CANARY not in repr(error.value) and error.value.__cause__ is None
    monkeypatch.delenv("JUDGE_API_KEY")
    for name in (CANARY, "sk-" + CANARY, "JUDGE_API_KEY"):
        with pytest.raises(ValueError, match="api_key") as refused:
            RemoteScorer(server.url, api_key=name)
        assert CANARY not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("host:8000", "is invalid; give an address such as"),
        ("file:///etc/passwd", "is invalid; give an address such as"),
        ("http://user:canary@host/score", "put the key into an environment variable"),
    ],
)
def test_invalid_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        RemoteScorer(url)
    assert "canary" not in str(error.value)
