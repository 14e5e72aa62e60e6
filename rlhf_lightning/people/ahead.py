"""Completions are sampled ahead of the people who judge them, in a thread of its own: nobody waits for a model."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_lightning.data.feedback.records import Item
from rlhf_lightning.errors import SettingError
from rlhf_lightning.people.store import FeedbackStore

if TYPE_CHECKING:
    from rlhf_lightning.people.selectors import Selector

PAUSE = 0.25
"""Seconds between two looks at how many items wait."""


class SamplingAhead:
    """Fills a store with items, as many ahead as asked.

    Args:
        store: where they go.
        batches: draws the next few items; sampling takes place in its ``next``.
        ahead: items that nobody has been given yet; sampling rests while there are as many.
        selector: says which of them is given out next; None gives them out as they came.
    """

    def __init__(
        self, store: FeedbackStore, batches: Iterator[Sequence[Item]], ahead: int, selector: Selector | None = None
    ) -> None:
        if ahead < 1:
            raise SettingError(
                "setting-out-of-range",
                f"ahead is {ahead}: it must be 1 or more, as an item waits for the next annotator",
            )
        self.store, self.batches, self.ahead, self.selector = store, batches, ahead, selector
        self.failure: str | None = None
        self._done, self._stop = False, threading.Event()
        self._thread = threading.Thread(target=self._fill, name="sampling ahead", daemon=True)

    def __enter__(self) -> SamplingAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def state(self) -> str:
        """What somebody is told for whom there is nothing; empty where nothing more will come."""
        if self.failure is not None:
            return f"Sampling has stopped: {self.failure}"
        return "" if self._done else "The next completions are being written."

    def _fill(self) -> None:
        try:
            while not self._stop.is_set():
                if self.store.waiting() >= self.ahead:
                    self._stop.wait(PAUSE)
                    continue
                batch = next(self.batches, None)
                if batch is None:
                    self._done = True
                    return
                if not self._stop.is_set():
                    self.store.add(batch)
                    if self.selector is not None:
                        self.store.rank(self.selector)
        except Exception as error:  # people go on with what is there, and whoever runs the server sees why
            self.failure = str(error).strip() or type(error).__name__
            traceback.print_exc()
