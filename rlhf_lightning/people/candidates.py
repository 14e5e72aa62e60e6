"""Items for labelling: completions sampled from policies, or pairs and lists from a file."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rlhf_lightning import tokenization
from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.data.canonical import CanonicalRow
from rlhf_lightning.data.feedback.records import MOST_CANDIDATES, Candidate, Item
from rlhf_lightning.data.formats import preference_with_ties, read_row
from rlhf_lightning.data.sources import usable_rows
from rlhf_lightning.errors import DataError, check_range, failure_sentence
from rlhf_lightning.people.store import FeedbackStore
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.types import Prompt

if TYPE_CHECKING:
    from rlhf_lightning.people.selectors import Selector

TRIES = 4
"""Maximum number of samples drawn to get a completion different from the others; then the prompt is left out."""


class Sampled(NamedTuple):
    """A policy to sample from, with its name as given by the user, tokenizer and engine."""

    name: str
    model: Any
    tokenizer: Any
    engine: Any


def load_policies(names: Sequence[str], sampling: SamplingArguments) -> list[Sampled]:
    """Load each policy once."""
    return [Sampled(name, *sampling.load(name), sampling.make_engine()) for name in names]


def sampled_items(
    policies: Sequence[Sampled],
    rows: Sequence[tuple[Prompt, dict[str, Any]]],
    count: int,
    settings: SamplingSettings,
    seed: int,
    at_once: int,
    skip: Callable[[Prompt], bool],
    start: int = 0,
    on_pass: Callable[[int], None] | None = None,
) -> Iterator[list[Item]]:
    """Yield items for some prompts at a time; completion c comes from policy c modulo the number of policies.

    Completion c of prompt p is episode (p * count + c) * `TRIES`. If its text repeats another completion, one of the
    next episodes is used instead. A prompt without enough different completions is left out.

    Args:
        policies: policies to sample from.
        rows: prompts with their other columns.
        count: completions of each item.
        settings: sampling settings.
        seed: sampling seed.
        at_once: prompts sampled at a time.
        skip: returns whether to leave out a prompt, for example because it was sampled before.
        start: index of the first prompt.
        on_pass: called at each forward pass; may raise an exception to stop sampling.
    """
    numbered = list(enumerate(rows))
    for begin in range(start, len(numbered), at_once):
        chunk = [(number, row) for number, row in numbered[begin : begin + at_once] if not skip(row[0])]
        if chunk:
            yield _items(policies, chunk, count, settings, seed, on_pass)


def _items(
    policies: Sequence[Sampled], chunk: Sequence[Any], count: int, settings: SamplingSettings, seed: int,
    on_pass: Callable[[int], None] | None,
) -> list[Item]:  # fmt: skip
    sampling = {name: value for name, value in asdict(settings).items() if name != "batch_size"}
    found: dict[int, list[Candidate]] = {number: [] for number, _ in chunk}
    for place in range(count):
        policy = policies[place % len(policies)]
        left = list(chunk)
        for attempt in range(TRIES):
            episodes = [(number * count + place) * TRIES + attempt for number, _ in left]
            texts = _sample(policy, [row[0] for _, row in left], episodes, settings, seed, on_pass)
            again = []
            for entry, episode, text in zip(left, episodes, texts, strict=True):
                number = entry[0]
                if not text.strip() or any(text == one.completion for one in found[number]):
                    again.append(entry)
                else:
                    found[number].append(Candidate(text, policy.name, sampling, seed, episode))
            left = again
            if not left or settings.temperature == 0:
                break
    return [
        Item(prompt, tuple(found[number]), columns)
        for number, (prompt, columns) in chunk
        if len(found[number]) == count
    ]


def _sample(
    policy: Sampled, prompts: Sequence[Prompt], episodes: Sequence[int], settings: SamplingSettings, seed: int,
    on_pass: Callable[[int], None] | None,
) -> list[str]:  # fmt: skip
    encoded = [torch.tensor(tokenization.encode_prompt(policy.tokenizer, prompt)) for prompt in prompts]
    ends = tokenization.end_token_ids(policy.tokenizer)
    drawn = policy.engine.sample(policy.model, encoded, torch.tensor(episodes), settings, seed, ends, on_pass)
    return tokenization.completion_texts(policy.tokenizer, [ids.tolist() for ids in drawn.ids])


def given_rows(path: str) -> list[CanonicalRow]:
    """Read preferences, ties and ranked lists from a file; unusable rows are counted and reported.

    Raises:
        MissingError: the file does not exist.
        DataError: no row has two completions.
    """
    return usable_rows(path, partial(read_row, read=preference_with_ties))


def given_items(path: str) -> list[Item]:
    """Return the items of a file of preferences, without its labels.

    Raises:
        MissingError: the file does not exist.
        DataError: no row has two completions, or one has too many.
    """
    items: list[Item] = []
    for row in given_rows(path):
        assert row.prompt is not None
        if len(row.completions) > MOST_CANDIDATES:
            raise DataError(
                "too-many-completions",
                f"{path} has a list of {len(row.completions)} completions: at most {MOST_CANDIDATES} can be ranked",
            )
        items.append(Item(row.prompt, tuple(map(Candidate, row.completions)), row.columns))
    return items


PAUSE = 0.25
"""Seconds between checks of the number of waiting items."""


class _Stopped(Exception):
    """Raised within sampling when the page has stopped."""


class Stop(threading.Event):
    """An event that ends sampling between two forward passes, as `sampled_items`' ``on_pass``."""

    def __call__(self, finished: int) -> None:
        """Raise an exception if the event is set."""
        if self.is_set():
            raise _Stopped


class SamplingAhead:
    """Context manager that keeps a store filled with items from a background thread.

    Args:
        store: store to fill.
        batches: iterator that samples the next items.
        ahead: sampling pauses when more than this many items wait for an annotator.
        selector: orders the items; None keeps the order of sampling.
        unsampled: returns the number of prompts that are not sampled yet.
        stop: event that is set at the end; ``batches`` may check it too.
    """

    def __init__(
        self,
        store: FeedbackStore,
        batches: Iterator[Sequence[Item]],
        ahead: int,
        selector: Selector | None = None,
        unsampled: Callable[[], int] = lambda: 0,
        stop: Stop | None = None,
    ) -> None:
        check_range(ahead >= 1, "it must be 1 or more, so that an item is ready for the next annotator", ahead=ahead)
        self.store, self.batches, self.ahead, self.selector = store, batches, ahead, selector
        self._unsampled, self._coming = unsampled, unsampled()
        self.failure: str | None = None
        self._done, self._stop = False, stop or Stop()
        self._thread = threading.Thread(target=self._fill, name="sampling ahead", daemon=True)

    def __enter__(self) -> SamplingAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def state(self) -> str:
        """Return the message for an annotator without an item; empty if nothing more will come."""
        if self.failure is not None:
            return f"Sampling has stopped: {self.failure}"
        return "" if self._done else "The next completions are being written."

    def left(self, count: int) -> int:
        """Return the number of judgements left, including those of prompts that are not sampled yet."""
        return count + (0 if self._done or self.failure is not None else self._coming)

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
                    self._coming = self._unsampled()
                    if self.selector is not None:
                        self.store.rank(self.selector)
        except _Stopped:
            return
        except Exception as error:  # annotators continue with the existing items
            sentence = failure_sentence(error)
            self.failure = sentence or str(error).strip() or type(error).__name__
            if sentence is None:
                traceback.print_exc()
            print(f"sampling has stopped: {self.failure}", file=sys.stderr, flush=True)
