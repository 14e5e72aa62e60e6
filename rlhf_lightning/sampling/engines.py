"""Sampling completions from the policy: pure sampling at a temperature, with addressed random numbers.

One engine serves rollouts, evaluation, best-of-n, chat and generate. A `SamplingEngine` subclass can replace it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import DataError, SettingError
from rlhf_lightning.functional.logprobs import at_least_float32
from rlhf_lightning.loading import load, shipped_classes
from rlhf_lightning.models.causal_lm import CausalLM, inference_mode_of
from rlhf_lightning.models.limits import check_prompts
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.scalar_head import rope_switch, text_config
from rlhf_lightning.models.sharding import in_step
from rlhf_lightning.sampling.conversation import Transcript, Turns
from rlhf_lightning.sampling.counter_rng import uniform
from rlhf_lightning.sampling.decoding import Kept, Mixture, Prefix, idle_pass, make_decoder
from rlhf_lightning.tokenization import Ends
from rlhf_lightning.types import Prompt, Sequences

FULL_ENOUGH = 0.75
"""Share of active rows below which refilling or shrinking the batch pays: each costs about one step."""


@dataclass
class SamplingSettings:
    """How completions are drawn. The model's own generation config is never consulted.

    Args:
        max_new_tokens: longest completion, tokens; with an environment the longest turn.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: nucleus size in (0, 1]. Training needs 1: truncated log-probabilities are not the policy's.
        top_k: number of most probable tokens to keep; 0 keeps all.
        batch_size: slots, the completions decoded at a time; a waiting prompt replaces a finished completion. null
            takes all at once.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingError(
                "setting-out-of-range", f"max_new_tokens is {self.max_new_tokens}: it must be at least 1"
            )
        if self.temperature < 0:
            raise SettingError(
                "setting-out-of-range", f"temperature is {self.temperature}: it must be 0 (greedy) or positive"
            )
        if not 0 < self.top_p <= 1:
            raise SettingError("setting-out-of-range", f"top_p is {self.top_p}: it must lie in (0, 1]")
        if self.top_k < 0:
            raise SettingError("setting-out-of-range", f"top_k is {self.top_k}: it must be 0 (all tokens) or positive")

    @property
    def is_pure(self) -> bool:
        """Whether tokens come from the policy's untruncated distribution at the temperature."""
        return self.temperature > 0 and self.top_p == 1.0 and self.top_k == 0


class Completions(NamedTuple):
    """Sampled completions, in the order of the prompts.

    Attributes:
        ids: token ids of each completion, including the end token if it was reached, or the token that completes a
            stop string; int64.
        logprobs: log-probability of each sampled token at the temperature; fp32 or wider.
        finished: bool, True where an end token or a stop string was reached, shape (rows,); with an environment where
            it ended the episode.
        entropies: entropy of the distribution of each token, nats; None if the engine does not report it.
        texts: text of each completion without the end token, and up to the stop string; of an episode that of the
            policy's last turn; empty until `decoded`.
        learned: bool, one mask per completion: False on tokens that an environment wrote between the policy's turns,
            where log-probabilities and entropies are 0; None if the policy wrote all tokens.
        transcripts: the turns of each episode; empty without an environment.
    """

    ids: tuple[Tensor, ...]
    logprobs: tuple[Tensor, ...]
    finished: Tensor
    entropies: tuple[Tensor, ...] | None = None
    texts: tuple[str, ...] = ()
    learned: tuple[Tensor, ...] | None = None
    transcripts: tuple[Transcript, ...] = ()

    def decoded(self, tokenizer: PreTrainedTokenizerBase) -> Completions:
        """Return the completions with their texts."""
        starts = [one.starts[-1] for one in self.transcripts] or [0] * len(self.ids)
        pairs = zip(self.ids, starts, strict=True)
        return self._replace(
            texts=tuple(tokenization.completion_text(tokenizer, ids[start:].tolist()) for ids, start in pairs)
        )

    def asked(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return what each text answers: the prompt, and with an environment the turns before the last one."""
        if not self.transcripts:
            return list(prompts)
        return [one.asked(prompt) for one, prompt in zip(self.transcripts, prompts, strict=True)]

    def cut(self, ends: Ends) -> Completions:
        """Return the completions up to their first stop strings, the token that completes one included."""
        counts = [ends.stop(ids.tolist()) for ids in self.ids] if ends.strings else []
        if all(count is None for count in counts):
            return self
        finished = self.finished | torch.tensor([count is not None for count in counts])

        def cut(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(row[:count] for row, count in zip(rows, counts, strict=True))

        entropies = None if self.entropies is None else cut(self.entropies)
        return self._replace(ids=cut(self.ids), logprobs=cut(self.logprobs), finished=finished, entropies=entropies)

    def after(self, prompts: Sequence[Tensor]) -> Sequences:
        """Return the completions after their prompts, one prompt per completion."""
        learned = self.learned or tuple(torch.ones(len(ids), dtype=torch.bool) for ids in self.ids)
        return Sequences(tuple(prompts), self.ids, tuple(range(len(self.ids))), learned)


class SamplingRequest(NamedTuple):
    """Arguments of `SamplingEngine.sample`, which describes them.

    ``starts`` are the positions of the first tokens to draw in their episodes, int64, shape (rows,); None for 0.
    """

    prompts: Sequence[Tensor]
    episodes: Tensor
    settings: SamplingSettings
    seed: int
    end_ids: Ends
    on_progress: Callable[[int], None] | None
    mixture: Mixture | None
    turns: Turns | None = None
    starts: Tensor | None = None

    @property
    def first_positions(self) -> Tensor:
        """Position of the first token to draw in each episode, int64, shape (rows,)."""
        return torch.zeros_like(self.episodes) if self.starts is None else self.starts.to(self.episodes)


class SamplingEngine(ABC):
    """What draws completions from a policy; a subclass defines `complete`.

    An engine may use other kernels, another process or other machines. ``exact`` and ``reports_logprobs`` say what that
    means for learning from its samples.
    """

    exact: bool = True
    """Whether log-probabilities are those of the trainer's forward up to rounding. Learning from samples of an engine
    that is not exact takes importance correction."""

    reports_logprobs: bool = True
    """Whether log-probabilities are the ones that the engine drew with; importance correction needs them."""

    sync_error: float | None = None
    """Mean difference to the trainer's log-probabilities at the last hand-over of weights; None without hand-over."""

    keeps_turns: bool = False
    """Whether `complete` itself continues after the replies of ``request.turns``. Otherwise it is called once for each
    turn, with the whole conversation as prompt and ``request.first_positions`` to draw random numbers from."""

    def sample(
        self,
        model: CausalLM,
        prompts: Sequence[Tensor],
        episodes: Tensor,
        settings: SamplingSettings,
        seed: int,
        end_ids: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
        mixture: Mixture | None = None,
        turns: Turns | None = None,
    ) -> Completions:
        """Sample one completion for each prompt, or with ``turns`` one episode.

        Args:
            model: the policy; switched to eval mode while sampling.
            prompts: token ids of each prompt, int64; none is empty.
            episodes: number of each episode, int64, shape (rows,).
            settings: temperature, length limit.
            seed: seed of the run.
            end_ids: tokens that end a completion; `tokenization.Ends` has stop strings too.
            on_progress: called with the number of completions that have just finished; a `SlotEngine` calls it after
                each forward pass. Where it raises, sampling ends.
            mixture: a second model to sample from together with the first; None samples from the first alone.
            turns: conversations with an environment, one per prompt; None samples one completion each.

        Raises:
            DataError: a prompt is empty.
        """
        refuse_empty(prompts)
        if isinstance(model, CausalLM):
            check_prompts(model.model, prompts, settings.max_new_tokens)
        ends = end_ids if isinstance(end_ids, Ends) else Ends(end_ids)
        request = SamplingRequest(prompts, episodes, settings, seed, ends, on_progress, mixture, turns)
        if turns is None or self.keeps_turns:
            drawn = self.complete(model, request)
            drawn = drawn if turns is not None else drawn.cut(ends)
        else:
            drawn = self._turn_by_turn(model, request, turns)
        if turns is not None:
            transcripts = turns.transcripts()
            finished = torch.tensor([one.finished for one in transcripts], dtype=torch.bool)
            learned = tuple(one.learned for one in transcripts)
            drawn = drawn._replace(finished=finished, learned=learned, transcripts=transcripts)
        if model.self_check and not model.sampling_checked and self.exact and mixture is None and prompts:
            from rlhf_lightning.sampling.decoding_check import check_first_row  # it knows the engines of this file

            model.sampling_checked = True
            check_first_row(model, request, drawn)
        return drawn

    @abstractmethod
    def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
        """Draw the completions of a request to `sample`."""

    def start(self, model: CausalLM, request: SamplingRequest) -> Callable[[], Completions]:
        """Begin a request with the model's weights of now; what is returned waits for its completions.

        An engine of this process draws them at once. One that samples elsewhere returns while it does.
        """
        drawn = self.complete(model, request)
        return lambda: drawn

    def prepare(  # noqa: B027 - most engines need nothing
        self, init_from: str, settings: LoadSettings, lora: LoraSettings | None, versions: int
    ) -> None:
        """Take what the policy of a training run is loaded from, before its first rollout.

        Args:
            init_from: its folder or hub id.
            settings: precision and more.
            lora: the adapter; None if all weights are trained.
            versions: versions of the weights whose episodes may be in flight at a time.
        """

    def _turn_by_turn(self, model: CausalLM, request: SamplingRequest, turns: Turns) -> Completions:
        """Draw one turn of all open episodes after the other; each call reads the conversations from their start."""
        count = len(request.prompts)
        rows, logprobs = list(range(count)), [torch.zeros(0)] * count
        while rows:
            heard = [torch.tensor(turns.ids(row), dtype=torch.long) for row in rows]
            room = [turns.room(row, request.settings.max_new_tokens) for row in rows]
            asked = request._replace(
                prompts=[torch.cat([request.prompts[row], ids]) for row, ids in zip(rows, heard, strict=True)],
                episodes=request.episodes[rows],
                settings=replace(request.settings, max_new_tokens=max(room)),
                on_progress=None,
                turns=None,
                starts=torch.tensor([len(ids) for ids in heard]),
            )
            drawn = self.complete(model, asked).cut(request.end_ids)
            said = [ids[:most].tolist() for ids, most in zip(drawn.ids, room, strict=True)]
            for place, row in enumerate(rows):
                unlearned = torch.zeros(len(heard[place]) - len(logprobs[row]))
                logprobs[row] = torch.cat([logprobs[row], unlearned, drawn.logprobs[place][: room[place]]])
            rows_drawn = zip(drawn.finished.tolist(), drawn.ids, room, strict=True)
            whole = [done and len(ids) <= most for done, ids, most in rows_drawn]
            going = turns.replies(rows, said, whole)
            if request.on_progress is not None and not all(going):
                request.on_progress(going.count(False))
            rows = [row for row, more in zip(rows, going, strict=True) if more]
        ids = tuple(torch.tensor(turns.ids(row), dtype=torch.long) for row in range(count))
        return Completions(ids, tuple(logprobs), torch.zeros(count, dtype=torch.bool))  # the transcripts tell


def refuse_empty(prompts: Sequence[Tensor]) -> None:
    """Refuse empty prompts.

    Raises:
        DataError: ``empty-prompt``.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise DataError(
            "empty-prompt",
            "a prompt is empty, but the first token of a completion is predicted from the prompt; drop such rows",
        )


class SlotEngine(SamplingEngine):
    """Decodes in slots: waiting prompts replace finished completions, and equal prompts are prefilled once.

    The token at position t of episode e is the inverse CDF of the next-token distribution at the random number
    addressed by (seed, e, t). Episodes therefore do not depend on the slots, their order or the ranks.

    With an environment, an episode whose turn has ended leaves its slot with its keys and values. Once a quarter of the
    slots is free, the environment is asked for all replies together; the episodes enter again, ahead of waiting
    prompts, and read only their replies.
    """

    keeps_turns = True

    def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
        from rlhf_lightning.sampling.decoding_check import settle_decoding  # it samples with this engine

        settle_decoding(model)
        if request.mixture is not None:
            with request.mixture.other() as other:
                settle_decoding(other)
        run = _Run(model, request)
        idle = partial(idle_pass, model, request.mixture)
        with inference_mode_of(model), in_step(model, idle) as before_pass:
            return run.finish(before_pass)


sample = SlotEngine().sample
"""`SamplingEngine.sample` of a `SlotEngine`."""


def load_engine(spec: SamplingEngine | Mapping[str, Any] | str | None) -> SamplingEngine:
    """Return the engine that ``spec`` describes.

    Args:
        spec: what `loading.load` takes: an engine, a name such as ``GenerateEngine``, an import path, or
            ``{"class_path": ..., "init_args": {...}}``; None for a `SlotEngine`.

    Raises:
        SettingError: see `loading.load`.
    """
    if spec is None:
        return SlotEngine()
    return load(spec, SamplingEngine, shipped_classes("rlhf_lightning.sampling", SamplingEngine), "engine")


class _Run:
    """Prompts on their way through the slots of a batch.

    Bookkeeping is in NumPy, which dispatches nothing; each step transfers one tensor from the device, the drawn tokens.
    """

    def __init__(self, model: CausalLM, request: SamplingRequest) -> None:
        prompts, settings = request.prompts, request.settings
        self.prompts, self.settings, self.seed = list(prompts), settings, request.seed
        self.on_progress, self.turns = request.on_progress, request.turns
        like = next(model.parameters())[:0]
        self.device = like.device
        self.episodes = request.episodes.to(self.device)
        self.ends = np.array(list(request.end_ids), dtype=np.int64)
        self.texts = request.end_ids
        self.said: list[list[int]] = [[] for _ in prompts]  # the current turn of each episode, for stop strings
        self.keys = [prompt.cpu().numpy().tobytes() for prompt in prompts]
        first: dict[bytes, int] = {}
        for row, key in enumerate(self.keys):
            first.setdefault(key, row)
        # Similar lengths go together, equal prompts one after another.
        order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), first[self.keys[row]], row))
        self.waiting = deque(order)
        self.own = request.mixture is None  # whether entropies are those of the model's own distribution
        self.slots = min(settings.batch_size or len(prompts), len(prompts))
        self.decoder = make_decoder(model, self.slots, settings.max_new_tokens, request.mixture)
        longest = max(map(len, prompts), default=0) + settings.max_new_tokens
        if longest > (rope_switch(text_config(model.model)) or longest):
            self.decoder.decoding = "uncached"  # what is cached would have to be rotated anew
        self.held: dict[bytes, tuple[Prefix, int]] = {}  # prefilled prompts that further slots wait for
        self._free_all_slots()
        self.begun = np.zeros(len(prompts), dtype=np.int64)  # tokens of each episode before its current turn
        most = settings.max_new_tokens
        rooms = [most if self.turns is None else self.turns.room(row, most) for row in range(len(prompts))]
        self.limits = np.array(rooms, dtype=np.int64)  # tokens of each episode at which its current turn is cut
        self.kept: dict[int, Kept] = {}  # keys and values of episodes that wait for a reply
        self.silent: list[int] = []  # episodes that wait for a reply
        shape = (len(prompts), settings.max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.scores, self.entropies = torch.zeros(2, *shape, dtype=at_least_float32(like).dtype, device=self.device)
        self.unwritten: list[_Unwritten] = []  # tokens that are not in these grids yet
        # Random numbers are made for several tokens at a time, because that takes some hundred small operations.
        self.ahead = min(settings.max_new_tokens, AHEAD)
        columns = self.ahead * (settings.max_new_tokens // self.ahead + 1)
        self.numbers = torch.zeros(len(prompts), columns, dtype=torch.float64, device=self.device)
        # A finished row keeps decoding until its slot is taken, at a position within the model's range.
        self.longest = np.array([len(prompt) + settings.max_new_tokens for prompt in prompts], dtype=np.int64)
        self.counts = np.zeros(len(prompts), dtype=np.int64)
        self.ended = np.zeros(len(prompts), dtype=bool)

    def _free_all_slots(self, slots: int | None = None) -> None:
        slots = min(self.slots, len(self.waiting)) if slots is None else slots
        self.owners = np.zeros(slots, dtype=np.int64)  # completion in each slot
        self.active = np.zeros(slots, dtype=bool)
        self.drawn = np.zeros(slots, dtype=np.int64)  # completion tokens so far
        self.lengths = np.zeros(slots, dtype=np.int64)  # prompt and completion tokens
        self.last = torch.zeros(slots, dtype=torch.long, device=self.device)  # last drawn token

    def finish(self, before_pass: Callable[[], None]) -> Completions:
        """Decode until every prompt has its completion; call ``before_pass`` before each forward pass."""
        while self.waiting or self.silent or self.active.any():
            left = int(self.active.sum())
            if left <= FULL_ENOUGH * len(self.active):
                if self.silent and (left == 0 or self.decoder.refills):
                    self._hear()
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
        """Let waiting prompts enter the free slots, and draw their first tokens."""
        if not self.decoder.refills:
            self._free_all_slots()
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
        place = torch.tensor(places, device=self.device)
        logits = prefix.logits
        if places != list(range(len(logits))):
            logits = logits[place]
        self.decoder.enter(prefix, place, torch.from_numpy(slots).to(self.device))
        self.owners[slots] = rows
        self.lengths[slots] = [len(self.prompts[row]) for row in rows]
        self.drawn[slots] = begun = self.begun[rows]
        self.active[slots] = True
        if (late := begun % self.ahead > 0).any():  # numbers come in blocks, and this one has begun
            self._draw_numbers(self.owners[slots][late], (begun - begun % self.ahead)[late])
        self._record(slots, logits)

    def _hear(self) -> None:
        """Ask for the replies that episodes wait for, all at once; those that go on wait to enter first."""
        assert self.turns is not None
        self._write()
        rows, self.silent = sorted(self.silent), []
        counts, drawn = self.counts.tolist(), self.tokens[rows].tolist()
        said = [ids[int(self.begun[row]) : counts[row]] for row, ids in zip(rows, drawn, strict=True)]
        going = self.turns.replies(rows, said, self.ended[rows].tolist())
        if self.on_progress is not None and not all(going):
            self.on_progress(going.count(False))
        open_rows = [row for row, more in zip(rows, going, strict=True) if more]
        for row in set(rows) - set(open_rows):
            self.kept.pop(row, None)
        for row in open_rows:
            self._go_on(row, self.turns.ids(row))
        entering = sorted(open_rows, key=lambda row: len(self.prompts[row]))
        later = [*self.waiting]
        if self.decoder.equal_lengths:  # which are read together
            entering, later = sorted([*entering, *later], key=lambda row: len(self.prompts[row])), []
        self.waiting = deque([*entering, *later])

    def _go_on(self, row: int, ids: Sequence[int]) -> None:
        """Note the reply to an episode's turn, which has ``ids`` after its first prompt now."""
        assert self.turns is not None
        count, begun = int(self.counts[row]), len(ids)
        room = self.turns.room(row, self.settings.max_new_tokens)
        self._widen(begun + room)
        self.tokens[row, count:begun] = torch.tensor(ids[count:], device=self.device)
        before = self.prompts[row][: len(self.prompts[row]) - int(self.begun[row])]
        self.prompts[row] = torch.cat([before, torch.tensor(ids, dtype=before.dtype)])
        self.keys[row] = self.prompts[row].cpu().numpy().tobytes()
        self.begun[row], self.limits[row], self.ended[row] = begun, begun + room, False
        self.said[row] = []
        self.longest[row] = len(self.prompts[row]) + room

    def _widen(self, width: int) -> None:
        """Have at least ``width`` columns for the tokens of an episode."""
        missing = width - self.tokens.shape[1]
        if missing <= 0:
            return
        missing = max(missing, self.tokens.shape[1])  # doubles, so that few replies cost a copy
        widened = (torch.nn.functional.pad(grid, (0, missing)) for grid in (self.tokens, self.scores, self.entropies))
        self.tokens, self.scores, self.entropies = widened
        columns = self.ahead * (self.tokens.shape[1] // self.ahead + 1)
        self.numbers = torch.nn.functional.pad(self.numbers, (0, columns - self.numbers.shape[1]))

    def _drop_prefixes(self, row: int) -> None:
        """Drop the prefilled prompts, except one that still waits to enter further slots."""
        key = self.keys[row]
        split = self.decoder.refills and bool(self.waiting) and self.keys[self.waiting[0]] == key
        prefix, place = self.held[key]
        self.held = {}
        if split:
            self.held[key] = (prefix if len(prefix.logits) == 1 else prefix.select(place), 0)

    def _shrink(self) -> None:
        """Drop the slots of finished completions when no prompt waits for them."""
        kept = np.flatnonzero(self.active)
        there = torch.from_numpy(kept).to(self.device)
        self.decoder.keep(there)
        self.owners, self.active, self.drawn = self.owners[kept], self.active[kept], self.drawn[kept]
        self.lengths, self.last = self.lengths[kept], self.last[there]

    def _trim(self) -> None:
        """Make the batch as wide as its longest row.

        If all prompts started together the width stays, and with it the last bits of the numbers.
        """
        if self.slots < len(self.prompts):
            self.decoder.trim(int((self.lengths - 1)[self.active].max(initial=0)))

    def _record(self, slots: np.ndarray, logits: Tensor) -> None:
        """Draw the next token of each slot, and note which completions it ends."""
        owners, drawn, active = self.owners[slots], self.drawn[slots], self.active[slots]
        due = active & (drawn % self.ahead == 0)
        if due.any():
            self._draw_numbers(owners[due], drawn[due])
        places = torch.from_numpy(owners * self.numbers.shape[1] + drawn).to(self.device)
        chosen, logprobs, entropies = draw(logits, self.settings, self.numbers.view(-1)[places])
        self.unwritten.append(_Unwritten(owners, drawn, active, chosen, logprobs, entropies))
        ids = chosen.cpu().numpy()
        stops = np.isin(ids, self.ends) & active
        if self.texts.strings:
            stops |= self._complete_texts(owners.tolist(), active, ids.tolist())
        if len(slots) == len(self.last):
            self.last = chosen
        else:
            self.last = self.last.index_put((torch.from_numpy(slots).to(self.device),), chosen)
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
        """Write drawn tokens into the grids."""
        if not self.unwritten:
            return
        owners, drawn, active = (
            np.concatenate(part) for part in zip(*(one[:3] for one in self.unwritten), strict=True)
        )
        chosen, logprobs, entropies = (
            torch.cat(part) for part in zip(*(one[3:] for one in self.unwritten), strict=True)
        )
        self.unwritten = []
        kept = torch.from_numpy(np.flatnonzero(active)).to(self.device)
        places = torch.from_numpy((owners * self.tokens.shape[1] + drawn)[active]).to(self.device)
        for grid, values in ((self.tokens, chosen), (self.scores, logprobs), (self.entropies, entropies)):
            grid.view(-1)[places] = values[kept].to(grid.dtype)

    def _draw_numbers(self, rows: np.ndarray, places: np.ndarray) -> None:
        """Draw the random numbers of the next tokens of some completions."""
        owners, starts = (torch.from_numpy(part).to(self.device).unsqueeze(-1) for part in (rows, places))
        positions = starts + torch.arange(self.ahead, device=self.device)
        episodes = self.episodes[owners].expand_as(positions)
        self.numbers[owners, positions] = uniform(self.seed, episodes, positions)


class _Unwritten(NamedTuple):
    """What a pass drew: of each slot its completion, the token's place in it, and whether it counts."""

    owners: np.ndarray
    places: np.ndarray
    active: np.ndarray
    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor


AHEAD = 64
"""Tokens of a completion whose random numbers are made at a time, at most."""


def draw(logits: Tensor, settings: SamplingSettings, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the token drawn for each row, its log-probability at the temperature, and the distribution's entropy.

    Args:
        logits: fp32 or wider, shape (rows, vocabulary).
        settings: temperature and truncation.
        numbers: uniform in (0, 1), see `counter_rng.uniform`, shape (rows,); unused at temperature 0.
    """
    if settings.temperature == 0:
        best, logprobs = logits.argmax(-1), logits.log_softmax(-1)
        return best, logprobs.gather(-1, best.unsqueeze(-1)).squeeze(-1), entropy_of(logprobs.exp())
    logprobs = (logits if settings.temperature == 1 else logits / settings.temperature).log_softmax(-1)
    probabilities, kept = logprobs.exp(), _truncate(logprobs, settings)
    drawn = inverse_cdf(probabilities if kept is logprobs else kept.exp(), numbers)
    return drawn, logprobs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1), entropy_of(probabilities)


BLOCK = 256
"""Tokens whose probabilities are summed before the inverse CDF is looked up among them."""

BLOCKED = 8192
"""Words of a vocabulary from which on that is faster than one sum over all."""


def inverse_cdf(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Return the token of each row at which the cumulative probability reaches a share of the total, int64.

    The cumulative sum runs in double precision; of a large vocabulary over blocks of tokens, then within one block.

    Args:
        probabilities: shape (rows, vocabulary); they need not sum to 1.
        numbers: the shares, in (0, 1), shape (rows,).
    """
    vocabulary = probabilities.shape[-1]
    if vocabulary < BLOCKED:
        cumulative = probabilities.double().cumsum(-1)
        return _first_at_least(cumulative, (numbers * cumulative[:, -1]).unsqueeze(-1)).squeeze(-1)
    if vocabulary % BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, -vocabulary % BLOCK))
    blocks = probabilities.unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).double()
    cumulative = sums.cumsum(-1)
    wanted = (numbers * cumulative[:, -1]).unsqueeze(-1)
    block = _first_at_least(cumulative, wanted)
    within = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    # A block ends with its last token of positive probability, however its sum was rounded.
    wanted = (wanted - (cumulative - sums).gather(-1, block)).minimum(within[:, -1:])
    return (block * BLOCK + _first_at_least(within, wanted)).squeeze(-1).clamp_max(vocabulary - 1)


def _first_at_least(cumulative: Tensor, wanted: Tensor) -> Tensor:
    return torch.searchsorted(cumulative, wanted).clamp_max(cumulative.shape[-1] - 1)


def entropy_of(probabilities: Tensor) -> Tensor:
    """Return the entropy in nats of distributions of shape (rows, vocabulary); a probability of 0 adds nothing."""
    return torch.special.entr(probabilities).sum(-1)


def _truncate(logprobs: Tensor, settings: SamplingSettings) -> Tensor:
    """Set the log-probability of tokens outside top_k and top_p to -inf."""
    if settings.top_k > 0:
        least = logprobs.topk(min(settings.top_k, logprobs.shape[-1])).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, -torch.inf)
    if settings.top_p < 1:
        ordered, index = logprobs.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        dropped = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, index, before >= settings.top_p)
        logprobs = logprobs.masked_fill(dropped, -torch.inf)
    return logprobs
