"""Provide a store with items, and annotators who label it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands.conftest import own_folder, plain_folder, policy_folder, reward_folder  # noqa: F401
from data.conftest import ready  # noqa: F401  DataModules without a Trainer

from rlhf_lightning.data.feedback.records import Answer, Candidate, Item
from rlhf_lightning.people.handing_out import Policy
from rlhf_lightning.people.store import FeedbackStore

LEFT = Answer("ranking", (0, 1))
RIGHT = Answer("ranking", (1, 0))


def pair(number: int, first: str = "good", second: str = "poor") -> Item:
    candidates = (Candidate(f"{first} {number}", "models/a", {"temperature": 1.0}, 0, 2 * number),
                  Candidate(f"{second} {number}", "models/b", {"temperature": 1.0}, 0, 2 * number + 1))  # fmt: skip
    return Item(f"question {number}", candidates, {"topic": f"t{number}"})


def ranked_item(number: int, count: int = 4) -> Item:
    return Item([{"role": "user", "content": f"list {number}"}], tuple(Candidate(f"answer {n}") for n in range(count)))


def label(store: FeedbackStore, annotator: str, answer: Answer | Callable[[Any], Answer], key: str = "") -> Any:
    """Judge the next item; return the assignment and the row number."""
    asked = store.next(annotator)
    assert asked is not None, f"nothing is left for {annotator}"
    said = answer(asked) if callable(answer) else answer
    return asked, store.judge(annotator, asked.id, key or f"{annotator:-<16}{asked.id}", said)


def prefer(place: int, **details: Any) -> Callable[[Any], Answer]:
    """Choose one of the item's completions, wherever it is displayed."""
    return lambda asked: Answer("ranking", tuple(int(shown != place) for shown in asked.shown), **details)


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., FeedbackStore]]:
    opened = []

    def make(items: Any = 0, name: str = "feedback.db", clock: Any = None, **policy: Any) -> FeedbackStore:
        made = FeedbackStore(
            tmp_path / name, Policy(**{"repeats": 0.0, **policy}), **({} if clock is None else {"clock": clock})
        )
        opened.append(made)
        made.add([pair(n) for n in range(items)] if isinstance(items, int) else items)
        return made

    yield make
    for store in opened:
        store.close()
