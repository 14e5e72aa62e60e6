"""Who labels: the seam between a store that waits for labels and people, simulated annotators or an AI."""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from typing import ClassVar

from rlhf_lightning.feedback.store import FeedbackStore

PAUSE = 0.5
"""Seconds between two looks at how many labels there are."""

NOTICE = 60.0
"""Seconds between two lines that say so."""


def require_web_server() -> None:
    """Raise where what the page needs is not installed, before anything else is done.

    Raises:
        ImportError: it is not.
    """
    missing = [name for name in ("starlette", "uvicorn", "markdown_it") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the page needs {', '.join(missing)}: pip install 'rlhf-lightning[annotate]'")


class Labeller(ABC):
    """Brings labels into a store.

    One method is to be written; `FeedbackStore.next` says what is to be judged and `FeedbackStore.judge` keeps what was
    said of it. `rlhf loop` takes any subclass by ``class_path`` and ``init_args``.
    """

    lease: ClassVar[float] = 900.0
    """Seconds for which an item that was given out counts as being judged, see `handing_out.Policy`."""

    @abstractmethod
    def label(self, store: FeedbackStore, count: int) -> None:
        """Return when the store has ``count`` labels, those counted that were there before.

        It may be killed anywhere and is then called anew: what was judged is in the store.

        Args:
            store: opened for labelling, with items that wait.
            count: labels as `FeedbackStore.labels` counts them.

        Raises:
            ValueError: nothing is left to judge, and there are fewer.
        """


class PeopleLabeller(Labeller):
    """People, on the page that `rlhf annotate` serves; waits until they have judged enough.

    Args:
        host: address to listen on; the default is reached from this machine alone.
        port: port to listen on; 0 takes a free one.
        annotators: names, with commas between; each gets a link with a token of its own, and nobody else comes in.
            Needed where the host is not this machine alone.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 8765, annotators: str | None = None) -> None:
        require_web_server()
        self.host, self.port, self.annotators = host, port, annotators

    def label(self, store: FeedbackStore, count: int) -> None:
        """Serve the page and wait."""
        from rlhf_lightning.feedback.server import make_app
        from rlhf_lightning.feedback.serving import door_of, listen, say_where, served

        door = door_of(store.path, self.host, self.annotators)
        listening = listen(self.host, self.port)
        with served(make_app(store, door), listening):
            say_where(listening, self.host, door)
            told = 0.0
            while (done := store.labels()) < count:
                if time.monotonic() - told > NOTICE:
                    told = time.monotonic()
                    print(f"{done} of {count} labels", flush=True)
                time.sleep(PAUSE)
