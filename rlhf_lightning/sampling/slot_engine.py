"""Default engine of rollouts, evaluation, best-of-n, chat and generate: decodes in slots, in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32
from rlhf_lightning.loading import load, shipped_classes
from rlhf_lightning.models.causal_lm import CausalLM, inference_mode_of
from rlhf_lightning.models.scalar_head import rope_switch, text_config
from rlhf_lightning.models.sharding import in_step
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.sampling.conversation import PendingReplies, Turns
from rlhf_lightning.sampling.decoding import FULL_ENOUGH, Prefix, idle_pass, make_decoder
from rlhf_lightning.sampling.decoding_check import settle_decoding
from rlhf_lightning.sampling.drawing import AHEAD, draw, uniform
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingRequest
from rlhf_lightning.sampling.slot_cache import Kept


class SlotEngine(SamplingEngine):
    """Decode in slots: waiting prompts replace finished completions, and equal prompts are prefilled once.

    The token at position t of episode e is the inverse CDF of the next-token distribution at a random number seeded by
    (seed, e, t). Therefore episodes do not depend on the slots, their order or the ranks.

    With an environment, an episode leaves its slot when its turn ends, and its keys and values are kept. When a quarter
    of the slots is free, the environment is asked for all replies together. The episodes then enter slots again, before
    waiting prompts, and only their replies are prefilled.

    If the environment has ``start_replies``, the episodes enter again when next a quarter of the slots is free, and
    other episodes are decoded until then. This moment depends on token counts alone: a reply that is late is waited
    for. Therefore delays do not even change the rounding of log-probabilities, and resumed runs are bit-identical.

    Args:
        cuda_graphs: replay decode steps as CUDA graphs, for unsharded models with full attention in all layers on a
            GPU. Samples change only by rounding.
    """

    keeps_turns = True

    def __init__(self, cuda_graphs: bool = False) -> None:
        self.cuda_graphs = cuda_graphs

    def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
        settle_decoding(model, sample)
        if request.mixture is not None:
            with request.mixture.other() as other:
                settle_decoding(other, sample)
        run = _Run(model, request, self.cuda_graphs)
        idle = partial(idle_pass, model, request.mixture)
        with inference_mode_of(model), in_step(model, idle) as before_pass:
            try:
                return run.finish(before_pass)
            finally:
                for asked in run.asked:  # left by an error or Ctrl-C
                    asked.cancel()


sample = SlotEngine().sample
"""`SamplingEngine.sample` of a `SlotEngine`."""


def load_engine(spec: SamplingEngine | Mapping[str, Any] | str | None) -> SamplingEngine:
    """Return the engine that ``spec`` describes.

    Args:
        spec: a spec for `loading.load`: an engine, a name such as ``GenerateEngine``, an import path, or
            ``{"class_path": ..., "init_args": {...}}``; None for a `SlotEngine`.

    Raises:
        SettingError: see `loading.load`.
    """
    if spec is None:
        return SlotEngine()
    return load(spec, SamplingEngine, shipped_classes("rlhf_lightning.sampling", SamplingEngine), "engine")


class _Run:
    """State of a request while its prompts pass through the slots of a batch.

    Bookkeeping uses NumPy, which launches no kernels. Each step transfers one tensor from the device: the sampled
    tokens.
    """

    def __init__(self, model: CausalLM, request: SamplingRequest, graphs: bool) -> None:
        prompts, settings = request.prompts, request.settings
        self.prompts, self.settings, self.seed = list(prompts), settings, request.seed
        self.on_progress, self.turns = request.on_progress, request.turns
        like = next(model.parameters())[:0]
        self.device = like.device
        self.episodes, self.starts = (
            to_device(part, self.device) for part in (request.episodes, request.first_positions)
        )
        self.ends = np.array(list(request.end_ids), dtype=np.int64)
        self.texts = request.end_ids
        self.said: list[list[int]] = [[] for _ in prompts]  # the current turn of each episode, for stop strings
        self.keys = [prompt.cpu().numpy().tobytes() for prompt in prompts]
        first: dict[bytes, int] = {}
        for row, key in enumerate(self.keys):
            first.setdefault(key, row)
        # Prompts of similar length are batched together, and equal prompts are consecutive.
        order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), first[self.keys[row]], row))
        self.waiting = deque(order)
        self.own = request.mixture is None  # whether entropies are those of the model's own distribution
        self.slots = min(settings.batch_size or len(prompts), len(prompts))
        self.decoder = make_decoder(model, self.slots, settings.max_new_tokens, request.mixture, graphs)
        longest = max(map(len, prompts), default=0) + settings.max_new_tokens
        if longest > (rope_switch(text_config(model.model)) or longest):
            self.decoder.decoding = "uncached"  # cached keys would need another rotary embedding
        self.held: dict[bytes, tuple[Prefix, int]] = {}  # prefilled prompts needed by further slots
        self._free_all_slots()
        self.begun = np.zeros(len(prompts), dtype=np.int64)  # tokens of each episode before its current turn
        most = settings.max_new_tokens
        rooms = [most if self.turns is None else self.turns.room(row, most) for row in range(len(prompts))]
        self.limits = np.array(rooms, dtype=np.int64)  # token count of each episode at which its current turn is cut
        self.kept: dict[int, Kept] = {}  # keys and values of episodes between two turns
        self.silent: list[int] = []  # episodes whose turn has ended
        self.asked: deque[PendingReplies] = deque()  # requests for replies, oldest first
        shape = (len(prompts), settings.max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.scores, self.entropies = torch.zeros(2, *shape, dtype=at_least_float32(like).dtype, device=self.device)
        self.unwritten: list[_Unwritten] = []  # tokens not yet written into these tensors
        # Random numbers are generated for several tokens at once, since this takes hundreds of small operations.
        self.ahead = min(settings.max_new_tokens, AHEAD)
        columns = self.ahead * (settings.max_new_tokens // self.ahead + 1)
        self.numbers = torch.zeros(len(prompts), columns, dtype=torch.float64, device=self.device)
        # A finished row keeps decoding until its slot is reused, at a position within the model's range.
        self.longest = np.array([len(prompt) + settings.max_new_tokens for prompt in prompts], dtype=np.int64)
        self.counts = np.zeros(len(prompts), dtype=np.int64)
        self.ended = np.zeros(len(prompts), dtype=bool)

    def _free_all_slots(self, slots: int | None = None) -> None:
        slots = min(self.slots, len(self.waiting)) if slots is None else slots
        self.owners = np.zeros(slots, dtype=np.int64)  # index of the completion in each slot
        self.active = np.zeros(slots, dtype=bool)
        self.drawn = np.zeros(slots, dtype=np.int64)  # number of completion tokens so far
        self.lengths = np.zeros(slots, dtype=np.int64)  # number of prompt and completion tokens
        self.last = torch.zeros(slots, dtype=torch.long, device=self.device)  # last sampled token

    def finish(self, before_pass: Callable[[], None]) -> Completions:
        """Decode until every prompt has its completion; call ``before_pass`` before each forward pass."""
        while self.waiting or self.silent or self.asked or self.active.any():
            left = int(self.active.sum())
            if left <= FULL_ENOUGH * len(self.active):
                if self.turns is not None and (left == 0 or self.decoder.refills):
                    self._exchange(self.turns)
                if self.waiting and (left == 0 or self.decoder.refills):
                    self._fill(before_pass)
                elif left:
                    self._shrink()
            if self.active.any():
                self._trim()
                before_pass()
                self._record(np.arange(len(self.active)), self.decoder.step(self.last, self.lengths))
        self._write()
        counts = self.counts.tolist()
        ids, logprobs, entropies = (
            tuple(row[:count] for row, count in zip(grid.cpu(), counts, strict=True))
            for grid in (self.tokens, self.scores, self.entropies)
        )
        return Completions(ids, logprobs, torch.from_numpy(self.ended), entropies if self.own else None)

    def _fill(self, before_pass: Callable[[], None]) -> None:
        """Move waiting prompts into the free slots, and sample their first tokens."""
        if not self.decoder.refills:
            self._free_all_slots()
        self._grow(min(self.slots, int(self.active.sum()) + len(self.waiting)) - len(self.active))
        free = np.flatnonzero(~self.active).tolist()[: len(self.waiting)]
        if self.decoder.equal_lengths:
            length = len(self.prompts[self.waiting[0]])
            free = free[: sum(len(self.prompts[row]) == length for row in self.waiting)]
            self._free_all_slots(len(free))
        rows = [self.waiting.popleft() for _ in free]
        fresh = {self.keys[row]: row for row in reversed(rows) if self.keys[row] not in self.held}
        distinct = [row for row in rows if fresh.get(self.keys[row]) == row]
        for group in ([row for row in distinct if row not in self.kept], [row for row in distinct if row in self.kept]):
            if group:
                before_pass()
                kept = [self.kept.pop(row) for row in group if row in self.kept]
                prefix = self.decoder.prefill([self.prompts[row] for row in group], kept)
                self.held |= {self.keys[row]: (prefix, place) for place, row in enumerate(group)}
        places = [self.held[self.keys[row]] for row in rows]
        for prefix in {id(prefix): prefix for prefix, _ in places}.values():
            members = [index for index, (of, _) in enumerate(places) if of is prefix]
            slots = np.array([free[index] for index in members])
            self._enter(prefix, [places[index][1] for index in members], slots, [rows[index] for index in members])
        self._drop_prefixes(rows[-1])

    def _enter(self, prefix: Prefix, places: list[int], slots: np.ndarray, rows: list[int]) -> None:
        place = to_device(torch.tensor(places), self.device)
        logits = prefix.logits
        if places != list(range(len(logits))):
            logits = logits[place]
        self.decoder.enter(prefix, place, to_device(torch.from_numpy(slots), self.device))
        self.owners[slots] = rows
        self.lengths[slots] = [len(self.prompts[row]) for row in rows]
        self.drawn[slots] = begun = self.begun[rows]
        self.active[slots] = True
        if (late := begun % self.ahead > 0).any():  # random numbers come in blocks; this position is inside a block
            self._draw_numbers(self.owners[slots][late], (begun - begun % self.ahead)[late])
        self._record(slots, logits)

    def _exchange(self, turns: Turns) -> None:
        """Ask for replies to the turns that have ended, and queue the episodes that continue after earlier requests."""
        if self.silent:
            self._write()
            rows, self.silent = sorted(self.silent), []
            counts, drawn = self.counts.tolist(), self.tokens[rows].tolist()
            said = [ids[int(self.begun[row]) : counts[row]] for row, ids in zip(rows, drawn, strict=True)]
            self.asked.append(turns.ask(rows, said, self.ended[rows].tolist()))
        while self.asked and (len(self.asked) > turns.overlap or not (self.waiting or self.active.any())):
            self._hear(turns, self.asked.popleft())

    def _hear(self, turns: Turns, asked: PendingReplies) -> None:
        """Take the replies to a request; episodes that continue are queued before waiting prompts."""
        rows, going = asked.rows, turns.hear(asked)
        if self.on_progress is not None and not all(going):
            self.on_progress(going.count(False))
        open_rows = [row for row, more in zip(rows, going, strict=True) if more]
        for row in set(rows) - set(open_rows):
            self.kept.pop(row, None)
        for row in open_rows:
            self._go_on(row, turns.ids(row))
        entering = sorted(open_rows, key=lambda row: len(self.prompts[row]))
        later = [*self.waiting]
        if self.decoder.equal_lengths:  # prompts that are prefilled together need equal lengths
            entering, later = sorted([*entering, *later], key=lambda row: len(self.prompts[row])), []
        self.waiting = deque([*entering, *later])

    def _go_on(self, row: int, ids: Sequence[int]) -> None:
        """Continue an episode after a reply; ``ids`` are now all its tokens after the first prompt."""
        assert self.turns is not None
        count, begun = int(self.counts[row]), len(ids)
        room = self.turns.room(row, self.settings.max_new_tokens)
        self._widen(begun + room)
        self.tokens[row, count:begun] = to_device(torch.tensor(ids[count:]), self.device)
        before = self.prompts[row][: len(self.prompts[row]) - int(self.begun[row])]
        self.prompts[row] = torch.cat([before, torch.tensor(ids, dtype=before.dtype)])
        self.keys[row] = self.prompts[row].cpu().numpy().tobytes()
        self.begun[row], self.limits[row], self.ended[row] = begun, begun + room, False
        self.said[row] = []
        self.longest[row] = len(self.prompts[row]) + room

    def _widen(self, width: int) -> None:
        """Widen the tensors to at least ``width`` columns for the tokens of an episode."""
        missing = width - self.tokens.shape[1]
        if missing <= 0:
            return
        missing = max(missing, self.tokens.shape[1])  # doubles, so that copies are rare
        widened = (torch.nn.functional.pad(grid, (0, missing)) for grid in (self.tokens, self.scores, self.entropies))
        self.tokens, self.scores, self.entropies = widened
        columns = self.ahead * (self.tokens.shape[1] // self.ahead + 1)
        self.numbers = torch.nn.functional.pad(self.numbers, (0, columns - self.numbers.shape[1]))

    def _drop_prefixes(self, row: int) -> None:
        """Drop the prefilled prompts, except a prompt that still has to enter further slots."""
        key = self.keys[row]
        split = self.decoder.refills and bool(self.waiting) and self.keys[self.waiting[0]] == key
        prefix, place = self.held[key]
        self.held = {}
        if split:
            self.held[key] = (prefix if len(prefix.logits) == 1 else prefix.select(place), 0)

    def _grow(self, slots: int) -> None:
        """Add slots for episodes that come back after the batch has shrunk."""
        if slots > 0:
            self.owners, self.active, self.drawn, self.lengths = (
                np.pad(part, (0, slots)) for part in (self.owners, self.active, self.drawn, self.lengths)
            )
            self.last = torch.nn.functional.pad(self.last, (0, slots))

    def _shrink(self) -> None:
        """Remove the slots of finished completions if no prompt waits for them."""
        kept = np.flatnonzero(self.active)
        there = to_device(torch.from_numpy(kept), self.device)
        self.decoder.keep(there)
        self.owners, self.active, self.drawn = self.owners[kept], self.active[kept], self.drawn[kept]
        self.lengths, self.last = self.lengths[kept], self.last[there]

    def _trim(self) -> None:
        """Make the batch as wide as its longest row.

        If all prompts started together the width is kept, so that results stay bit-identical.
        """
        if self.slots < len(self.prompts):
            self.decoder.trim(int((self.lengths - 1)[self.active].max(initial=0)))

    def _record(self, slots: np.ndarray, logits: Tensor) -> None:
        """Sample the next token of each slot, and record which completions it ends."""
        owners, drawn, active = self.owners[slots], self.drawn[slots], self.active[slots]
        due = active & (drawn % self.ahead == 0)
        if due.any():
            self._draw_numbers(owners[due], drawn[due])
        places = to_device(torch.from_numpy(owners * self.numbers.shape[1] + drawn), self.device)
        chosen, logprobs, entropies = draw(logits, self.numbers.view(-1)[places], *self.settings.distribution)
        self.unwritten.append(_Unwritten(owners, drawn, active, chosen, logprobs, entropies))
        ids = chosen.cpu().numpy()
        stops = np.isin(ids, self.ends) & active
        if self.texts.strings:
            stops |= self._complete_texts(owners.tolist(), active, ids.tolist())
        if len(slots) == len(self.last):
            self.last = chosen
        else:
            self.last = self.last.index_put((to_device(torch.from_numpy(slots), self.device),), chosen)
        drawn = drawn + active
        self.drawn[slots], self.lengths[slots] = drawn, np.minimum(self.lengths[slots] + 1, self.longest[owners])
        done = active & (stops | (drawn >= self.limits[owners]))
        self.counts[owners[done]] = drawn[done]
        self.ended[owners[stops]] = True
        self.active[slots] = active & ~done
        if self.turns is not None and done.any():
            gone, rows = slots[done], owners[done].tolist()
            self.silent += rows
            self.kept |= zip(rows, self.decoder.leave(gone.tolist(), (self.lengths[gone] - 1).tolist()), strict=False)
        elif self.turns is None and self.on_progress is not None:
            self.on_progress(int(done.sum()))

    def _complete_texts(self, owners: list[int], active: np.ndarray, chosen: list[int]) -> np.ndarray:
        """Return which rows complete a stop string with their next token."""
        found = np.zeros_like(active)
        for place in np.flatnonzero(active).tolist():
            said = self.said[owners[place]]
            said.append(chosen[place])
            found[place] = self.texts.completed(said)
        return found

    def _write(self) -> None:
        """Write sampled tokens into the result tensors."""
        if not self.unwritten:
            return
        owners, drawn, active = (
            np.concatenate(part) for part in zip(*(one[:3] for one in self.unwritten), strict=True)
        )
        chosen, logprobs, entropies = (
            torch.cat(part) for part in zip(*(one[3:] for one in self.unwritten), strict=True)
        )
        self.unwritten = []
        kept = to_device(torch.from_numpy(np.flatnonzero(active)), self.device)
        places = to_device(torch.from_numpy((owners * self.tokens.shape[1] + drawn)[active]), self.device)
        for grid, values in ((self.tokens, chosen), (self.scores, logprobs), (self.entropies, entropies)):
            grid.view(-1)[places] = values[kept].to(grid.dtype)

    def _draw_numbers(self, rows: np.ndarray, places: np.ndarray) -> None:
        """Generate the random numbers of the next tokens of some completions."""
        owners, starts = (to_device(torch.from_numpy(part), self.device).unsqueeze(-1) for part in (rows, places))
        positions = starts + torch.arange(self.ahead, device=self.device)
        episodes = self.episodes[owners].expand_as(positions)
        self.numbers[owners, positions] = uniform(self.seed, episodes, positions + self.starts[owners])


class _Unwritten(NamedTuple):
    """Samples of one pass: for each slot its completion, the token's position in it, and whether it counts."""

    owners: np.ndarray
    places: np.ndarray
    active: np.ndarray
    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor
