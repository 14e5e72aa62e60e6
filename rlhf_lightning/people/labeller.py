"""Labellers add labels to a store: people on the annotation page, simulated annotators, or your own class."""

from __future__ import annotations

import http.client
import json
import math
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from rlhf_lightning.commands.web_server import listen, served
from rlhf_lightning.data.feedback.records import STRENGTHS
from rlhf_lightning.errors import StateError, check_range
from rlhf_lightning.people.serving import access_policy, checked_names, print_urls, read_instructions, require_page
from rlhf_lightning.people.store import FeedbackStore
from rlhf_lightning.scoring.scorer import GoldReward, load_gold_reward
from rlhf_lightning.types import Prompt

More = Callable[[], bool]
"""A function that adds items to a store without open items; returns False if there are no more."""

PAUSE = 0.5
"""Seconds between checks of the number of labels."""

NOTICE = 60.0
"""Seconds between progress lines."""


class Labeller(ABC):
    """Base class of labellers. `rlhf loop` takes any subclass by ``class_path`` and ``init_args``.

    A subclass implements `label`. `FeedbackStore.next` returns an assignment, `FeedbackStore.judge` records its answer.
    """

    lease: ClassVar[float] = 900.0
    """Seconds for which an assigned item counts as being judged, see `handing_out.Policy`."""

    salt: ClassVar[str | None] = None
    """Salt of a store's sides, see `handing_out.Policy`; programs set it to an empty text for reproducible labels."""

    def prepare(self) -> None:
        """Raise an error if labelling cannot start; called before anything is sampled."""
        return None

    @abstractmethod
    def label(self, store: FeedbackStore, count: int, more: More) -> None:
        """Return when the store has ``count`` labels, or when nothing is left to judge and ``more`` adds nothing.

        The process may be killed at any point; `label` is then called again, and recorded judgements stay in the store.

        Args:
            store: store with items, opened for labelling.
            count: number of labels wanted, as counted by `FeedbackStore.labels`; includes earlier labels.
            more: adds items when nothing is left to judge, for example because some were skipped; returns False if
                there are no more.
        """


class PeopleLabeller(Labeller):
    """People who label on the page of `rlhf annotate`; waits until there are enough labels.

    Skipped items go to other annotators. When no other annotator is left, further pairs are sampled.

    Args:
        host: address to listen on; by default only this machine can connect.
        port: port to listen on; 0 chooses a free port.
        annotators: names separated by commas; each gets a link with a token, and no other person may label. Required if
            the host admits other machines.
        instructions: Markdown file with instructions, shown to each annotator at the start and on demand.

    Raises:
        StateError: the web server is not installed.
        MissingError: the file of instructions does not exist.
        SettingError: other machines can reach the page and no annotator is named.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 8765, annotators: str | None = None, instructions: str | None = None
    ) -> None:
        require_page()
        checked_names(host, annotators)
        self.instructions = "" if instructions is None else read_instructions(Path(instructions))
        self.host, self.port, self.annotators = host, port, annotators

    def prepare(self) -> None:
        """Raise an error if the port is in use."""
        listen(self.host, self.port).close()

    def label(self, store: FeedbackStore, count: int, more: More) -> None:
        """Serve the page until there are enough labels."""
        from rlhf_lightning.people.server import PageSettings, make_app

        access, supply = access_policy(store.path, self.host, self.annotators), Supply(store, count, more)
        listening = listen(self.host, self.port)
        page = PageSettings(state=supply.state, left=supply.left, instructions=self.instructions)
        with served(make_app(store, access, page), listening):
            print_urls(listening, self.host, access)
            told = 0.0
            while (done := store.labels()) < count and not supply.is_over():
                if time.monotonic() - told > NOTICE:
                    told = time.monotonic()
                    print(f"{done} of {count} labels", flush=True)
                supply.refill()
                time.sleep(PAUSE)


class Supply:
    """Adds items to a store when an annotator is idle and the open assignments cannot give enough labels."""

    def __init__(self, store: FeedbackStore, count: int, more: More) -> None:
        self.store, self.count, self.more = store, count, more
        self.exhausted = False
        self._idle = threading.Event()

    def state(self) -> str:
        """Return the message for an annotator without an item, and record that an annotator is idle."""
        self._idle.set()
        if self.store.labels() >= self.count:
            return "This round has all its labels. If there is another round, it appears here after training."
        if self.exhausted:
            return ""
        return (
            "Other annotators are judging the last items."
            if self._enough()
            else "The next completions are being written."
        )

    def left(self, count: int) -> int:
        """Return the number of labels that are still wanted; the number of items left is ignored."""
        return max(self.count - self.store.labels(), 0)

    def refill(self) -> None:
        """Add items if they are needed."""
        if self._idle.is_set() and not self.exhausted and not self._enough():
            self.exhausted = not self.more()
        self._idle.clear()

    def is_over(self) -> bool:
        """Whether no further items will come and no annotator is judging."""
        return self.exhausted and self.store.waiting() == 0 and self.store.being_judged() == 0

    def _enough(self) -> bool:
        return self.store.labels() + self.store.being_judged() >= self.count


# ---- simulated annotators --------------------------------------------------------------------------------------------

LEVELS = (1.0, 2.0, 4.0)
"""Differences of perceived value, in log-odds, above which a choice is rated slightly, clearly and much better."""


class PageError(StateError):
    """The page refused a request or did not answer."""


class Page:
    """Client of the page's routes over one persistent connection.

    A request without an answer is repeated; a repeated judgement counts once, because it has the same key.
    """

    def __init__(self, address: str, patience: float = 30.0) -> None:
        parts = urlsplit(address)
        self.patience, self.cookie = patience, ""
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)

    def enter(self, name: str) -> None:
        """Sign in under a name."""
        self.ask("/api/enter", {"name": name})

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request, repeat it until it is answered, and return the JSON of the answer.

        Raises:
            PageError: the page refused the request or did not answer.
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
        """Close the connection."""
        self._connection.close()


class SimulatedAnnotator:
    r"""Simulated annotator after Bradley and Terry.

    The perceived value of a completion is gold / temperature plus Gumbel noise, plus ``position_bias`` for the first
    completion. The completion with the highest perceived value is chosen, so
    P(first) = sigmoid((gold_1 - gold_2) / temperature + position_bias). Longer lists are ranked by perceived value
    (Plackett-Luce). For a careless annotator, gold is 0.

    Args:
        name: name of the annotator.
        gold_reward: known true reward of (prompt, completion).
        temperature: difference of gold reward that is preferred with odds e : 1.
        position_bias: log-odds towards the completion shown first.
        careless: whether the annotator ignores the gold reward.
        seed: seed of the noise, together with the name and the assignment.
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
        check_range(
            temperature > 0, "it must be positive; near 0, the annotator makes no errors", temperature=temperature
        )
        self.name, self.gold_reward, self.temperature = name, gold_reward, temperature
        self.position_bias, self.careless, self.seed = position_bias, careless, seed

    def answer(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Return the judgement of an item in the page's format.

        Args:
            item: the item as ``/api/item`` describes it.
        """
        prompt = shown_prompt(item["prompt"])
        noise = random.Random(f"{self.seed}/{self.name}/{item['assignment']}")
        values = []
        for place, candidate in enumerate(item["candidates"]):
            gold = 0.0 if self.careless else self.gold_reward(prompt, candidate["raw"])
            gumbel = -math.log(-math.log(max(noise.random(), 1e-300)))
            values.append(gold / self.temperature + gumbel + (self.position_bias if place == 0 else 0.0))
        order = sorted(range(len(values)), key=lambda place: -values[place])
        body: dict[str, Any] = {
            "key": f"{self.name}/{item['assignment']}".rjust(16, "-")[-64:],
            "store": item.get("store"),
            "assignment": item["assignment"],
            "verdict": "ranking",
            "ranks": [order.index(place) for place in range(len(values))],
        }
        if len(values) == 2:
            body["strength"] = strength_of(abs(values[0] - values[1]))
        return body


def shown_prompt(turns: Sequence[Mapping[str, str]]) -> Prompt:
    """Return the prompt that the page shows."""
    if len(turns) == 1 and not turns[0]["role"]:
        return turns[0]["text"]
    return [{"role": turn["role"], "content": turn["text"]} for turn in turns]


def strength_of(difference: float) -> int:
    """Return the rated strength, 1 to `STRENGTHS`, of a difference in perceived value."""
    return min(1 + sum(difference > level for level in LEVELS), STRENGTHS)


class SimulatedAnnotators(Labeller):
    """Simulated annotators who take turns over the page's HTTP routes; interruptions do not change their labels.

    Args:
        gold_reward: import path of a function (prompt, completion) -> gold reward.
        annotators: number of annotators.
        temperature: difference of gold reward that is preferred with odds e : 1.
        careless: share of annotators who ignore the gold reward.
        position_bias: log-odds towards the completion shown first.
        seed: seed of their noise.

    Raises:
        SettingError: a number is out of range, or the import path names no function.
    """

    lease = math.inf
    salt = ""

    def __init__(
        self,
        gold_reward: str,
        annotators: int = 4,
        temperature: float = 1 / 12,
        careless: float = 0.0,
        position_bias: float = 0.0,
        seed: int = 0,
    ) -> None:
        require_page()
        rule = "give 1 or more annotators, and the careless fraction of them, from 0 to 1"
        check_range(annotators >= 1 and 0 <= careless <= 1, rule, annotators=annotators, careless=careless)
        gold, wild = load_gold_reward(gold_reward), round(careless * annotators)
        self.annotators = [
            SimulatedAnnotator(f"simulated-{n}", gold, temperature, position_bias, n < wild, seed)
            for n in range(annotators)
        ]

    def label(self, store: FeedbackStore, count: int, more: More) -> None:
        """Serve the page on a free port and judge on it."""
        from rlhf_lightning.people.server import make_app

        with ExitStack() as stack:
            port = stack.enter_context(served(make_app(store), listen("127.0.0.1", 0)))
            pages = [stack.enter_context(closing(Page(f"http://127.0.0.1:{port}"))) for _ in self.annotators]
            for page, annotator in zip(pages, self.annotators, strict=True):
                page.enter(annotator.name)
                if annotator.name == store.last()[1]:
                    page.ask("/api/item")  # already done with the last judgement, except after a kill
            while store.labels() < count and (self._judge_one(store, pages) or more()):
                pass

    def _judge_one(self, store: FeedbackStore, pages: Sequence[Page]) -> bool:
        """Let the next annotator with an item judge it; return False if there is none."""
        turn, _ = store.last()
        for number in range(turn, turn + len(pages)):
            page, annotator = pages[number % len(pages)], self.annotators[number % len(pages)]
            item = page.ask("/api/item")["item"]
            if item is not None:
                page.ask("/api/judgements", annotator.answer(item))
                return True
        return False
