"""Continuous batching for requests that arrive during decoding; servers sample with it.

Each completion has its own sampling settings, seed and end tokens. Up to rounding it equals the completion that
`SlotEngine` samples for the same prompt, seed, episode and settings.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.errors import StateError
from rlhf_lightning.functional.logprobs import chunk_size
from rlhf_lightning.models.causal_lm import CausalLM, PredictingStates, inference_mode_of
from rlhf_lightning.models.layout import cut_sequences, padded_layout, select
from rlhf_lightning.sampling.decoding import FULL_ENOUGH, ROOM, make_decoder
from rlhf_lightning.sampling.drawing import AHEAD, draw, uniform
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.own_logprobs import MAX_TOKENS
from rlhf_lightning.types import MicroBatchLimits, Sequences


class Token(NamedTuple):
    """A token with its log-probability and the most probable tokens at its position, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class LiveCompletion(ABC):
    """A requested completion. The sampling thread calls `take` for each token, then `end` or `fail` once.

    Args:
        prompt: token ids, int64, shape (tokens,).
        settings: sampling settings; ``batch_size`` has no effect.
        seed: seed of its random numbers.
        episode: number of the completion; completions with the same seed differ by it.
        end_ids: tokens that end it.
        top: number of most probable tokens to report with each token.
    """

    def __init__(
        self, prompt: Tensor, settings: SamplingSettings, seed: int, episode: int, end_ids: Iterable[int], top: int = 0
    ) -> None:
        self.prompt, self.settings, self.seed, self.episode = prompt, settings, seed, episode
        self.end_ids, self.top = frozenset(end_ids), top
        self.cancelled = False
        """Set it from any thread to drop the completion; no method is called after that."""

    @abstractmethod
    def take(self, token: Token) -> bool:
        """Receive the next token; return True to stop here."""

    @abstractmethod
    def end(self, reason: str) -> None:
        """Receive the end with its reason: ``stop`` (by an end token or by `take`), or ``length``."""

    @abstractmethod
    def fail(self, error: Exception) -> None:
        """Receive the error that ended the completion."""


class PromptScores(NamedTuple):
    """Scores that a model gives to the tokens of a prompt after the first.

    Attributes:
        tokens: each token with its log-probability and the most probable tokens.
        ranks: rank of each token among all tokens by probability, from 1.
    """

    tokens: list[Token]
    ranks: list[int]


class UnscoredPrompt(NamedTuple):
    """A prompt with tokens to score.

    Attributes:
        ids: int64, shape (tokens,).
        top: number of most probable tokens to report.
        scores: future that receives the scores.
    """

    ids: Tensor
    top: int
    scores: Future[PromptScores]


@dataclass(eq=False)
class _Row:
    completion: LiveCompletion
    length: int  # number of tokens of prompt and completion so far
    last: int = 0
    drawn: int = 0
    numbers: list[float] = field(default_factory=list)

    def number(self) -> float:
        """Return the random number of the next token."""
        place = self.drawn % AHEAD
        if place == 0:
            positions = torch.arange(self.drawn, self.drawn + AHEAD)
            episodes = torch.full_like(positions, self.completion.episode)
            self.numbers = uniform(self.completion.seed, episodes, positions).tolist()
        return self.numbers[place]


class LiveBatch:
    """Sample completions and score prompts on one thread, with all current requests in one batch.

    Args:
        model: the policy.
        slots: completions decoded at the same time; further requests wait.
    """

    def __init__(self, model: CausalLM, slots: int) -> None:
        self.model, self.slots = model, slots
        self.device = next(model.parameters()).device
        self.waiting: deque[LiveCompletion] = deque()
        self.unscored: deque[UnscoredPrompt] = deque()
        self.changed = threading.Condition()
        self.closed = False
        self._reset()

    def _reset(self) -> None:
        self.rows: list[_Row | None] = []
        self.decoder = make_decoder(self.model, self.slots, ROOM)

    @property
    def active(self) -> list[int]:
        """Slots that hold a completion."""
        return [index for index, row in enumerate(self.rows) if row is not None]

    def submit(self, completions: Sequence[LiveCompletion] = (), prompts: Sequence[UnscoredPrompt] = ()) -> None:
        """Request completions and scores of prompts, from any thread."""
        with self.changed:
            if self.closed:
                raise StateError("server-stopped", "the server is stopping")
            self.waiting.extend(completions)
            self.unscored.extend(prompts)
            self.changed.notify()

    def close(self) -> None:
        """End `run`; unfinished requests fail."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def run(self) -> None:
        """Process requests until `close` is called. An error ends the completions in the batch; later ones continue."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting or self.unscored or self.rows)
                if self.closed:
                    break
            try:
                with inference_mode_of(self.model):
                    self._score()
                    self._admit()
                    self._step()
            except Exception as error:  # out of memory, or an error in the model's code
                self._fail(error)
        self._fail(
            StateError("server-stopped", "the server stopped before the completion was complete"), everything=True
        )

    def _fail(self, error: Exception, everything: bool = False) -> None:
        failed = [row.completion for row in self.rows if row is not None]
        if everything:
            failed += self.waiting
            for prompt in self.unscored:
                if prompt.scores.set_running_or_notify_cancel():
                    prompt.scores.set_exception(error)
        self._reset()
        for completion in failed:
            if not completion.cancelled:
                completion.fail(error)

    # ---- completions ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Move waiting completions into the free slots, and sample their first tokens."""
        self.rows = [None if row is None or row.completion.cancelled else row for row in self.rows]
        if not self.active and self.rows:
            self._reset()
        if not self.decoder.refills and self.active:
            return
        free = [index for index in range(self.slots) if index >= len(self.rows) or self.rows[index] is None]
        entering = self._next(len(free))
        if not entering:
            return
        free = free[: len(entering)]
        self.rows += [None] * (max(free) + 1 - len(self.rows))
        for index, completion in zip(free, entering, strict=True):
            self.rows[index] = _Row(completion, len(completion.prompt))
        keys = [completion.prompt.numpy().tobytes() for completion in entering]
        distinct = {key: place for place, key in reversed(list(enumerate(keys)))}
        prompts = [entering[place].prompt for place in sorted(distinct.values())]
        numbers = {keys[place]: number for number, place in enumerate(sorted(distinct.values()))}
        places = torch.tensor([numbers[key] for key in keys], device=self.device)
        prefix = self.decoder.prefill(prompts)
        logits = prefix.logits[places]
        self.decoder.enter(prefix, places, torch.tensor(free, device=self.device))
        self._record(free, logits)

    def _next(self, most: int) -> list[LiveCompletion]:
        """Return queued completions that can be prefilled together."""
        taken: list[LiveCompletion] = []
        with self.changed:
            left: deque[LiveCompletion] = deque()
            while self.waiting and len(taken) < most:
                one = self.waiting.popleft()
                if one.cancelled:
                    continue
                longest = max(len(one.prompt), *(len(other.prompt) for other in taken), 0)
                differs = self.decoder.equal_lengths and len(one.prompt) != len(taken[0].prompt) if taken else False
                if taken and (differs or longest * (len(taken) + 1) > MAX_TOKENS):
                    left.append(one)
                    if not differs:
                        break
                else:
                    taken.append(one)
            self.waiting.extendleft(reversed(left))
        return taken

    def _step(self) -> None:
        """Sample the next token of each completion."""
        active = self.active
        if not active:
            self._reset()
            return
        if len(active) <= FULL_ENOUGH * len(self.rows):
            self.decoder.keep(torch.tensor(active, device=self.device))
            self.rows = [self.rows[index] for index in active]
        self.decoder.trim(max(row.length for row in self.rows if row is not None) - 1)
        # An empty slot decodes token 0 at position 0 until a completion enters it.
        tokens = torch.tensor([row.last if row else 0 for row in self.rows], device=self.device)
        lengths = np.array([row.length if row else 1 for row in self.rows])
        self._record(range(len(self.rows)), self.decoder.step(tokens, lengths))

    def _record(self, slots: Sequence[int], logits: Tensor) -> None:
        """Sample a token for each slot, and free the slots of completions that end."""
        groups: dict[tuple[float, float, int], list[int]] = {}
        for place, slot in enumerate(slots):
            if (row := self.rows[slot]) is not None:
                groups.setdefault(row.completion.settings.distribution, []).append(place)
        for places in groups.values():
            owners = [slots[place] for place in places]
            for slot, token in zip(owners, self._drawn(owners, logits[places]), strict=True):
                self._give(slot, token)

    def _drawn(self, slots: Sequence[int], logits: Tensor) -> list[Token]:
        """Sample tokens for completions with the same settings."""
        rows = [row for slot in slots if (row := self.rows[slot]) is not None]
        settings = rows[0].completion.settings
        numbers = torch.tensor([row.number() for row in rows], dtype=torch.float64, device=self.device)
        ids, logprobs, _ = draw(logits, numbers, *settings.distribution)
        most = max(row.completion.top for row in rows)
        best: list[tuple[tuple[int, float], ...]] = [()] * len(rows)
        if most:
            best = most_probable((logits / (settings.temperature or 1.0)).log_softmax(-1), most)
        return [
            Token(index, logprob, top[: row.completion.top])
            for row, index, logprob, top in zip(rows, ids.tolist(), logprobs.tolist(), best, strict=True)
        ]

    def _give(self, slot: int, token: Token) -> None:
        row = self.rows[slot]
        assert row is not None
        completion = row.completion
        row.last, row.drawn, row.length = token.id, row.drawn + 1, row.length + 1
        if completion.cancelled:
            self.rows[slot] = None
            return
        stops = completion.take(token) or token.id in completion.end_ids
        if stops or row.drawn >= completion.settings.max_new_tokens:
            self.rows[slot] = None
            completion.end("stop" if stops else "length")

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def _score(self) -> None:
        """Score waiting prompts, as many as fit into a forward pass."""
        taken: list[UnscoredPrompt] = []
        with self.changed:
            while self.unscored and (
                not taken or max(len(one.ids) for one in (*taken, self.unscored[0])) * (len(taken) + 1) <= MAX_TOKENS
            ):
                taken.append(self.unscored.popleft())
        taken = [one for one in taken if one.scores.set_running_or_notify_cancel()]
        try:
            found = score_prompts(self.model, [one.ids for one in taken], [one.top for one in taken])
        except Exception as error:
            for one in taken:
                one.scores.set_exception(error)
            return
        for one, scores in zip(taken, found, strict=True):
            one.scores.set_result(scores)


def most_probable(logprobs: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """Return the ``count`` most probable tokens of each distribution with their log-probabilities, best first."""
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]))
    return [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def score_prompts(model: CausalLM, prompts: Sequence[Tensor], tops: Sequence[int]) -> list[PromptScores]:
    """Return log-probabilities (at temperature 1) and ranks of the tokens of prompts after the first.

    ``tops`` are the numbers of most probable tokens to report for each prompt.
    """
    longer = [row for row, ids in enumerate(prompts) if len(ids) > 1]
    sequences = Sequences(
        prompts=tuple(prompts[row][:1] for row in longer),
        completions=tuple(prompts[row][1:] for row in longer),
        parents=tuple(range(len(longer))),
        supervised=tuple(torch.ones(len(prompts[row]) - 1, dtype=torch.bool) for row in longer),
    )
    found = [PromptScores([], []) for _ in prompts]
    device = next(model.parameters()).device
    cuts = cut_sequences(sequences, limits=MicroBatchLimits(max_tokens=MAX_TOKENS)) if longer else []
    with inference_mode_of(model):
        for cut in cuts:
            layout = padded_layout(select(sequences, cut)).to(device)
            states, width = model(PredictingStates(layout)), layout.completion_mask.shape[1]
            owners = [longer[cut[cell // width]] for cell in layout.cells.tolist()]  # tokens of a row are in order
            _score_states(model, states, layout.targets, owners, tops, found)
    return found


def _score_states(
    model: CausalLM, states: Tensor, targets: Tensor, owners: Sequence[int], tops: Sequence[int],
    found: Sequence[PromptScores],
) -> None:  # fmt: skip
    most = max((tops[owner] for owner in owners), default=0)
    size = chunk_size(1024, int(model.logits(states[:1]).shape[-1]))
    for start in range(0, len(targets), size):
        chunk, members = targets[start : start + size], owners[start : start + size]
        logprobs = model.logits(states[start : start + size]).log_softmax(-1)
        chosen = logprobs.gather(-1, chunk.unsqueeze(-1))
        ranks = (logprobs > chosen).sum(-1) + 1
        best = most_probable(logprobs, most) if most else [()] * len(members)
        values = zip(chunk.tolist(), chosen.squeeze(-1).tolist(), ranks.tolist(), best, members, strict=True)
        for index, logprob, rank, top, owner in values:
            found[owner].tokens.append(Token(index, logprob, top[: tops[owner]]))
            found[owner].ranks.append(rank)
