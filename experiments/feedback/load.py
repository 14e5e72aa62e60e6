"""Annotators at once on a real server: what is lost, what is doubled, how long an answer takes, and what a kill costs.

Server and annotators are processes of their own. Each annotator judges all it is given; every judgement is sent twice
under its key, as a page does whose answer was lost, and only the first time is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_lightning.commands.web_server import listen, make_server
from rlhf_lightning.data.feedback.database import judgements_of, reading
from rlhf_lightning.data.feedback.records import Candidate, Item
from rlhf_lightning.people.handing_out import Policy
from rlhf_lightning.people.labeller import Page, SimulatedAnnotator
from rlhf_lightning.people.server import make_app
from rlhf_lightning.people.store import FeedbackStore

PATIENCE = 600.0
"""Seconds for which an annotator asks a server again that does not answer: it may be starved, not gone."""

WORDS = "the page keeps what was said and gives each item to whoever has not seen it yet".split()


class Work(NamedTuple):
    """What is to be judged.

    Attributes:
        labels: judgements in all.
        annotators: people at once.
        per_item: judgements of each item.
    """

    labels: int = 5000
    annotators: int = 8
    per_item: int = 4


def text_of(number: int, words: int = 60) -> str:
    """A text of some length, another for each number."""
    return " ".join(random.Random(number).choices(WORDS, k=words)) + f" {number}"


def fill(path: Path, work: Work) -> None:
    """Make the store."""
    with FeedbackStore(path) as store:
        store.add(
            Item(text_of(3 * n, 20), (Candidate(text_of(3 * n + 1)), Candidate(text_of(3 * n + 2))))
            for n in range(work.labels // work.per_item)
        )


def serve(path: Path, work: Work, port: int) -> None:
    """Serve the store until the process is killed."""
    policy = Policy(work.per_item, repeats=0.0)
    make_server(make_app(FeedbackStore(path, policy))).run(sockets=[listen("127.0.0.1", port)])


def annotate(name: str, port: int, confirmed: Any) -> None:
    """Judge until nothing is left; hands over (row number, seconds) of each judgement that was confirmed."""
    annotator = SimulatedAnnotator(name, lambda prompt, completion: len(completion) / 1000, seed=1)
    found = []
    with closing(Page(f"http://127.0.0.1:{port}", patience=PATIENCE)) as page:
        page.enter(name)
        item = page.ask("/api/item")["item"]
        while item is not None:
            body, began = annotator.answer(item), time.perf_counter()
            told = page.ask("/api/judgements", body)
            found.append((told["id"], time.perf_counter() - began))
            again = page.ask("/api/judgements", body)
            assert again["id"] == told["id"], "sent twice, kept once"
            item = again["next"]["item"]
    confirmed.put(found)


def run(folder: Path, work: Work, kills: int = 0) -> dict[str, Any]:
    """Serve, have everything judged, kill the server so many times on the way, and count.

    Args:
        folder: where the store is made.
        work: what is to be judged.
        kills: SIGKILLs of the server, evenly over the work; it is started again at once.
    """
    context = multiprocessing.get_context("fork")
    path = folder / "load.db"
    fill(path, work)
    with closing(listen("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def started() -> Any:
        process = context.Process(target=serve, args=(path, work, port), daemon=True)
        process.start()
        return process

    server, confirmed = started(), context.Queue()
    names = [f"annotator-{n}" for n in range(work.annotators)]
    began = time.perf_counter()
    people = [context.Process(target=annotate, args=(name, port, confirmed), daemon=True) for name in names]
    for person in people:
        person.start()
    for kill in range(kills):
        wait_until(lambda at=(kill + 1) * work.labels // (kills + 1): judged(path) >= at)  # type: ignore[misc]
        os.kill(server.pid, signal.SIGKILL)
        server.join()
        server = started()
    answers: list[tuple[int, float]] = []
    for _ in people:
        answers += next_of(confirmed, people)
    seconds = time.perf_counter() - began
    for person in people:
        person.join()
    server.terminate()
    server.join()
    return counted(path, answers, work, seconds) | {"kills": kills}


def next_of(confirmed: Any, people: list[Any]) -> list[tuple[int, float]]:
    """What the next annotator who is done hands over.

    Raises:
        RuntimeError: an annotator has died.
    """
    while True:
        try:
            return confirmed.get(timeout=1)
        except queue.Empty:
            if any(person.exitcode for person in people):
                raise RuntimeError("an annotator has died; what it said stands above") from None


def judged(path: Path) -> int:
    """Rows of judgements in a store that somebody else has open."""
    with reading(path) as connection:
        return int(connection.execute("SELECT count(*) FROM judgements").fetchone()[0])


def wait_until(done: Callable[[], bool]) -> None:
    """Look again until it is so."""
    while not done():
        time.sleep(0.05)


def counted(path: Path, answers: list[tuple[int, float]], work: Work, seconds: float) -> dict[str, Any]:
    """What became of the judgements, and how long their answers took, milliseconds."""
    with reading(path) as connection:
        kept = judgements_of(connection)
    numbers = {one.id for one in kept}
    times = 1000 * np.array([took for _, took in answers])
    return {
        "labels": len(kept),
        "wanted": work.labels,
        "annotators": work.annotators,
        "lost": sum(number not in numbers for number, _ in answers),
        "unconfirmed": len(numbers - {number for number, _ in answers}),
        "doubled": len(kept) - len({(one.annotator, one.item) for one in kept}),
        "seconds": round(seconds, 1),
        "per_second": round(len(kept) / seconds, 1),
        **{f"p{q}": round(float(np.percentile(times, q)), 1) for q in (50, 95, 99)},
        "longest": round(float(times.max()), 1),
    }
