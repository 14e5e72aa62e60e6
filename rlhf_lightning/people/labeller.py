"""Who labels: the seam between a store that waits for labels and people, simulated annotators or an AI."""

from __future__ import annotations

import importlib.util
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from rlhf_lightning.errors import StateError
from rlhf_lightning.people.store import FeedbackStore

More = Callable[[], bool]
"""Puts further items into a store where nothing is left to judge; False if there are none to be had."""

PAUSE = 0.5
"""Seconds between two looks at how many labels there are."""

NOTICE = 60.0
"""Seconds between two lines that say so."""


def require_web_server() -> None:
    """Raise where what the page needs is not installed, before anything else is done.

    Raises:
        StateError: it is not.
    """
    missing = [name for name in ("starlette", "uvicorn", "markdown_it") if importlib.util.find_spec(name) is None]
    if missing:
        raise StateError(
            "missing-package",
            f"the page needs {', '.join(missing)}: pip install 'rlhf-lightning[annotate]'",
        )


class Labeller(ABC):
    """Brings labels into a store.

    One method is to be written; `FeedbackStore.next` says what is to be judged, None where nothing is, and
    `FeedbackStore.judge` keeps what was said of it. `rlhf loop` takes any subclass by ``class_path`` and ``init_args``.
    """

    lease: ClassVar[float] = 900.0
    """Seconds for which an item that was given out counts as being judged, see `handing_out.Policy`."""

    @abstractmethod
    def label(self, store: FeedbackStore, count: int, more: More) -> None:
        """Return when the store has ``count`` labels, those counted that were there before.

        Or when nothing is left to judge and ``more`` has nothing to add. It may be killed anywhere and is then called
        anew: what was judged is in the store.

        Args:
            store: opened for labelling, with items that wait.
            count: labels as `FeedbackStore.labels` counts them.
            more: to be called when nothing is left to judge and labels are still wanted, as when some items were
                skipped: puts further items into the store. Where it returns False there are none.
        """


class PeopleLabeller(Labeller):
    """People, on the page that `rlhf annotate` serves; waits until they have judged enough.

    What somebody skips goes to the others. When nobody is left to give it to, further pairs are sampled, while the page
    stays open.

    Args:
        host: address to listen on; the default is reached from this machine alone.
        port: port to listen on; 0 takes a free one.
        annotators: names, with commas between; each gets a link with a token of its own, and nobody else comes in.
            Needed where the host is not this machine alone.

    Raises:
        StateError: the web server is not installed.
        SettingError: other machines could reach the page, and nobody is named.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 8765, annotators: str | None = None) -> None:
        require_web_server()
        from rlhf_lightning.people.access import named

        named(host, annotators)
        self.host, self.port, self.annotators = host, port, annotators

    def label(self, store: FeedbackStore, count: int, more: More) -> None:
        """Serve the page and wait."""
        from rlhf_lightning.people.server import PageSettings, make_app
        from rlhf_lightning.people.serving import door_of, listen, say_where, served

        door, supply = door_of(store.path, self.host, self.annotators), Supply(store, count, more)
        listening = listen(self.host, self.port)
        with served(make_app(store, door, PageSettings(state=supply.state)), listening):
            say_where(listening, self.host, door)
            told = 0.0
            while (done := store.labels()) < count and not supply.is_over():
                if time.monotonic() - told > NOTICE:
                    told = time.monotonic()
                    print(f"{done} of {count} labels", flush=True)
                supply.refill()
                time.sleep(PAUSE)


class Supply:
    """Further items for a store, when somebody has nothing to judge and what is being judged will not be enough.

    Args:
        store: which people judge from.
        count: labels wanted.
        more: puts further items into the store.
    """

    def __init__(self, store: FeedbackStore, count: int, more: More) -> None:
        self.store, self.count, self.more = store, count, more
        self.exhausted = False
        self._idle = threading.Event()

    def state(self) -> str:
        """What somebody is told for whom there is nothing; that they asked is noted."""
        self._idle.set()
        if self.exhausted or self.store.labels() >= self.count:
            return ""
        return "Others are judging the last ones." if self._enough() else "The next completions are being written."

    def refill(self) -> None:
        """Put further items into the store if they are wanted."""
        if self._idle.is_set() and not self.exhausted and not self._enough():
            self.exhausted = not self.more()
        self._idle.clear()

    def is_over(self) -> bool:
        """Whether nothing more will come, and nobody is judging what there was."""
        return self.exhausted and self.store.waiting() == 0 and self.store.being_judged() == 0

    def _enough(self) -> bool:
        return self.store.labels() + self.store.being_judged() >= self.count
