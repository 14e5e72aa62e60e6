"""Annotators who do not exist: they use the page as people do, and judge by a known gold reward, more or less well."""

from __future__ import annotations

import http.client
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any
from urllib.parse import urlsplit

from rlhf_lightning.data.feedback.records import STRENGTHS
from rlhf_lightning.errors import SettingError, StateError
from rlhf_lightning.people.labeller import Labeller, More, require_web_server
from rlhf_lightning.people.store import FeedbackStore
from rlhf_lightning.scoring.scorer import GoldReward, load_gold_reward
from rlhf_lightning.types import Prompt

LEVELS = (1.0, 2.0, 4.0)
"""Differences of perceived worth, in log-odds, above which a choice is rated slightly, clearly and far better."""


class PageError(StateError):
    """The page refuses a request, or does not answer."""


class Page:
    """What the page's script sends, sent from here over one connection that is kept.

    A request that got no answer is sent again, as the script does it: a judgement under its own key counts once.

    Args:
        address: where the page is, such as ``http://127.0.0.1:8765``.
        patience: seconds for which a server that does not answer is asked again.
    """

    def __init__(self, address: str, patience: float = 30.0) -> None:
        parts = urlsplit(address)
        self.patience, self.cookie = patience, ""
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)

    def enter(self, name: str) -> None:
        """Come in under a name."""
        self.ask("/api/enter", {"name": name})

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request, and again until there is an answer; returns the JSON of it.

        Raises:
            PageError: the answer is a refusal, or none came.
        """
        until = time.monotonic() + self.patience
        while True:
            try:
                status, text = self._send(path, body)
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                status, text = 503, str(error) or type(error).__name__
            if status < 400:
                return json.loads(text)
            if status < 500 or time.monotonic() > until:
                raise PageError("request-refused", f"{path} was answered with {status}: {text}")
            time.sleep(0.05)

    def _send(self, path: str, body: Mapping[str, Any] | None) -> tuple[int, str]:
        headers = {"cookie": self.cookie} if self.cookie else {}
        if body is None:
            self._connection.request("GET", path, headers=headers)
        else:
            headers["content-type"] = "application/json"
            self._connection.request("POST", path, json.dumps(body), headers)
        answer = self._connection.getresponse()
        text = answer.read().decode()
        self.cookie = (answer.getheader("set-cookie") or self.cookie).partition(";")[0]
        return answer.status, text

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class SimulatedAnnotator:
    r"""Judges what the page shows, as Bradley and Terry model it.

    Each completion seems worth gold / temperature + noise with Gumbel noise, the one on the left ``position_bias``
    more, and the one that seems best is chosen: P(left) = sigmoid((gold_l - gold_r) / temperature + position_bias). A
    longer list is ranked by what each seems worth (Plackett and Luce). A careless annotator does not read: gold counts
    as 0.

    Args:
        name: under which they come in.
        gold_reward: known true reward of (prompt, completion).
        temperature: difference of gold reward that is preferred with odds e : 1.
        position_bias: log-odds towards what is shown first.
        careless: whether they do not read.
        seed: decides the noise, with the name and the number of what is asked.
    """

    def __init__(
        self,
        name: str,
        gold_reward: GoldReward,
        temperature: float = 1 / 12,
        position_bias: float = 0.0,
        careless: bool = False,
        seed: int = 0,
    ) -> None:
        if temperature <= 0:
            raise SettingError(
                "setting-out-of-range",
                f"temperature is {temperature}: it must be positive; near 0, the annotator never errs",
            )
        self.name, self.gold_reward, self.temperature = name, gold_reward, temperature
        self.position_bias, self.careless, self.seed = position_bias, careless, seed

    def answer(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is sent to the page about an item that it shows.

        Args:
            item: as ``/api/item`` describes it.
        """
        prompt = shown_prompt(item["prompt"])
        noise = random.Random(f"{self.seed}/{self.name}/{item['assignment']}")
        worth = []
        for place, candidate in enumerate(item["candidates"]):
            gold = 0.0 if self.careless else self.gold_reward(prompt, candidate["raw"])
            gumbel = -math.log(-math.log(max(noise.random(), 1e-300)))
            worth.append(gold / self.temperature + gumbel + (self.position_bias if place == 0 else 0.0))
        order = sorted(range(len(worth)), key=lambda place: -worth[place])
        body: dict[str, Any] = {
            "key": f"{self.name}/{item['assignment']}".rjust(16, "-")[-64:],
            "assignment": item["assignment"],
            "verdict": "ranking",
            "ranks": [order.index(place) for place in range(len(worth))],
        }
        if len(worth) == 2:
            body["strength"] = strength_of(abs(worth[0] - worth[1]))
        return body


def shown_prompt(turns: Sequence[Mapping[str, str]]) -> Prompt:
    """The prompt that the page shows."""
    if len(turns) == 1 and not turns[0]["role"]:
        return turns[0]["text"]
    return [{"role": turn["role"], "content": turn["text"]} for turn in turns]


def strength_of(difference: float) -> int:
    """How much better a completion is said to be whose worth seems greater by so much, 1 to `STRENGTHS`."""
    return min(1 + sum(difference > level for level in LEVELS), STRENGTHS)


class SimulatedAnnotators(Labeller):
    """Annotators who judge by a known gold reward, one after the other, over the page's own HTTP routes.

    The same store gets the same labels from them, however often they are interrupted.

    Args:
        gold_reward: import path of a function (prompt, completion) -> gold reward.
        annotators: how many there are.
        temperature: difference of gold reward that is preferred with odds e : 1.
        careless: share of them who do not read.
        position_bias: log-odds towards what is shown first.
        seed: of their noise.

    Raises:
        SettingError: a number is out of range, or the import path names no function.
    """

    lease = math.inf

    def __init__(
        self,
        gold_reward: str,
        annotators: int = 4,
        temperature: float = 1 / 12,
        careless: float = 0.0,
        position_bias: float = 0.0,
        seed: int = 0,
    ) -> None:
        require_web_server()
        if annotators < 1 or not 0 <= careless <= 1:
            raise SettingError(
                "setting-out-of-range",
                f"annotators is {annotators} and careless {careless}: give 1 or more annotators, and the careless "
                "share of them, from 0 to 1",
            )
        gold = load_gold_reward(gold_reward)
        self.annotators = [
            SimulatedAnnotator(
                f"simulated-{n}", gold, temperature, position_bias, n < round(careless * annotators), seed
            )
            for n in range(annotators)
        ]

    def label(self, store: FeedbackStore, count: int, more: More) -> None:
        """Serve the page on a free port of this machine, and judge on it."""
        from rlhf_lightning.people.server import make_app
        from rlhf_lightning.people.serving import listen, served

        with ExitStack() as stack:
            port = stack.enter_context(served(make_app(store), listen("127.0.0.1", 0)))
            pages = [stack.enter_context(closing(Page(f"http://127.0.0.1:{port}"))) for _ in self.annotators]
            for page, annotator in zip(pages, self.annotators, strict=True):
                page.enter(annotator.name)
                if annotator.name == store.last()[1]:
                    page.ask("/api/item")  # comes with the receipt of a judgement, unless a kill was between the two
            while store.labels() < count and (self._judge_one(store, pages) or more()):
                pass

    def _judge_one(self, store: FeedbackStore, pages: Sequence[Page]) -> bool:
        """Have one judgement made, by whose turn it is or the next one who has something to judge; False if nobody."""
        turn, _ = store.last()
        for number in range(turn, turn + len(pages)):
            page, annotator = pages[number % len(pages)], self.annotators[number % len(pages)]
            item = page.ask("/api/item")["item"]
            if item is not None:
                page.ask("/api/judgements", annotator.answer(item))
                return True
        return False
