"""Load-test a real annotation server: lost and duplicated judgements, response times, and the effect of kills.

Server and annotators are separate processes. Each annotator judges every item that it receives. Every judgement is sent
twice with the same key, as a page does when the response was lost; only the first request is timed.
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
"""Seconds for which an annotator keeps retrying a server that does not answer; the server may only be short of
processor time.
"""

WORDS = "the page keeps what was said and gives each item to whoever has not seen it yet".split()


class Work(NamedTuple):
    """The labelling work.

    Attributes:
        labels: total number of judgements.
        annotators: number of concurrent annotators.
        per_item: judgements per item.
    """

    labels: int = 5000
    annotators: int = 8
    per_item: int = 4


def text_of(number: int, words: int = 60) -> str:
    """Return a text of some length that depends on the number."""
    return " ".join(random.Random(number).choices(WORDS, k=words)) + f" {number}"


def fill(path: Path, work: Work) -> None:
    """Create the store."""
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
    """Judge until no item is left; send (row number, seconds) of each confirmed judgement to the queue."""
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
    """Serve the store, collect all judgements, kill the server ``kills`` times meanwhile, and count.

    Args:
        folder: folder of the new store.
        work: the labelling work.
        kills: number of SIGKILLs of the server, evenly spaced over the work; the server is restarted at once.
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
    """Return the confirmed judgements of the next annotator that finishes.

    Raises:
        RuntimeError: an annotator process failed.
    """
    while True:
        try:
            return confirmed.get(timeout=1)
        except queue.Empty:
            if any(person.exitcode for person in people):
                raise RuntimeError("an annotator has died; what it said stands above") from None


def judged(path: Path) -> int:
    """Return the number of judgement rows in a store that another process has open."""
    with reading(path) as connection:
        return int(connection.execute("SELECT count(*) FROM judgements").fetchone()[0])


def wait_until(done: Callable[[], bool]) -> None:
    """Poll until the condition holds."""
    while not done():
        time.sleep(0.05)


def counted(path: Path, answers: list[tuple[int, float]], work: Work, seconds: float) -> dict[str, Any]:
    """Return counts of judgements and their response times in milliseconds."""
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
