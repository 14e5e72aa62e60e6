"""Sampling completions from the policy: pure sampling at a temperature, with addressed random numbers.

One engine serves rollouts, evaluation, best-of-n, chat and generate. A `SamplingEngine` subclass can replace it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.errors import DataError, SettingError
from rlhf_lightning.functional.logprobs import at_least_float32
from rlhf_lightning.loading import load, shipped_classes
from rlhf_lightning.models.causal_lm import CausalLM, inference_mode_of
from rlhf_lightning.models.loading import LoadSettings, LoraSettings
from rlhf_lightning.models.scalar_head import rope_switch, text_config
from rlhf_lightning.models.sharding import in_step
from rlhf_lightning.sampling.counter_rng import uniform
from rlhf_lightning.sampling.decoding import Mixture, Prefix, idle_pass, make_decoder
from rlhf_lightning.types import Sequences

FULL_ENOUGH = 0.75
"""Share of active rows below which refilling or shrinking the batch pays: each costs about one step."""


@dataclass
class SamplingSettings:
    """How completions are drawn. The model's own generation config is never consulted.

    Args:
        max_new_tokens: longest completion, tokens.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: nucleus size in (0, 1]. Training needs 1: truncated log-probabilities are not the policy's.
        top_k: number of most probable tokens to keep; 0 keeps all.
        batch_size: slots, the completions decoded at a time; a waiting prompt replaces a finished completion. null
            takes
            all at once.
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
        ids: token ids of each completion, including the end token if it was reached; int64.
        logprobs: log-probability of each sampled token at the temperature; fp32 or wider.
        finished: bool, True where the end token was reached, shape (rows,).
        entropies: entropy of the distribution of each token, nats; None if the engine does not report it.
        texts: text of each completion without the end token; empty until a tokenizer has decoded it.
        learned: bool, one mask per completion: False on tokens that an environment wrote between the policy's turns;
            None if the policy wrote all tokens.
    """

    ids: tuple[Tensor, ...]
    logprobs: tuple[Tensor, ...]
    finished: Tensor
    entropies: tuple[Tensor, ...] | None = None
    texts: tuple[str, ...] = ()
    learned: tuple[Tensor, ...] | None = None

    def after(self, prompts: Sequence[Tensor]) -> Sequences:
        """Return the completions after their prompts, one prompt per completion."""
        learned = self.learned or tuple(torch.ones(len(ids), dtype=torch.bool) for ids in self.ids)
        return Sequences(tuple(prompts), self.ids, tuple(range(len(self.ids))), learned)


class SamplingRequest(NamedTuple):
    """Arguments of `SamplingEngine.sample`, which describes them."""

    prompts: Sequence[Tensor]
    episodes: Tensor
    settings: SamplingSettings
    seed: int
    end_ids: Sequence[int]
    on_progress: Callable[[int], None] | None
    mixture: Mixture | None


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
    ) -> Completions:
        """Sample one completion for each prompt.

        Args:
            model: the policy; switched to eval mode while sampling.
            prompts: token ids of each prompt, int64; none is empty.
            episodes: number of each episode, int64, shape (rows,).
            settings: temperature, length limit.
            seed: seed of the run.
            end_ids: tokens that end a completion.
            on_progress: called with the number of completions that have just finished.
            mixture: a second model to sample from together with the first; None samples from the first alone.

        Raises:
            DataError: a prompt is empty.
        """
        request = SamplingRequest(prompts, episodes, settings, seed, end_ids, on_progress, mixture)
        refuse_empty(prompts)
        drawn = self.complete(model, request)
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
    addressed by
    (seed, e, t). Episodes therefore do not depend on the slots, their order or the ranks.
    """

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

    Bookkeeping stays on the CPU; each step transfers one tensor from the device: which rows drew an end token.
    """

    def __init__(self, model: CausalLM, request: SamplingRequest) -> None:
        prompts, settings = request.prompts, request.settings
        self.prompts, self.settings, self.seed = prompts, settings, request.seed
        self.on_progress = request.on_progress
        like = next(model.parameters())[:0]
        self.device = like.device
        self.episodes = request.episodes.to(self.device)
        self.ends = torch.tensor(list(request.end_ids), device=self.device)
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
        shape = (len(prompts), settings.max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.scores, self.entropies = torch.zeros(2, *shape, dtype=at_least_float32(like).dtype, device=self.device)
        # Random numbers are made for several tokens at a time, because that takes some hundred small operations.
        self.ahead = min(settings.max_new_tokens, AHEAD)
        columns = self.ahead * (settings.max_new_tokens // self.ahead + 1)
        self.numbers = torch.zeros(len(prompts), columns, dtype=torch.float64, device=self.device)
        # A finished row keeps decoding until its slot is taken, at a position within the model's range.
        self.longest = torch.tensor([len(prompt) + settings.max_new_tokens for prompt in prompts])
        self.counts = torch.zeros(len(prompts), dtype=torch.long)
        self.ended = torch.zeros(len(prompts), dtype=torch.bool)

    def _free_all_slots(self, slots: int | None = None) -> None:
        slots = min(self.slots, len(self.waiting)) if slots is None else slots
        self.owners = torch.zeros(slots, dtype=torch.long)  # completion in each slot
        self.active = torch.zeros(slots, dtype=torch.bool)
        self.drawn = torch.zeros(slots, dtype=torch.long)  # completion tokens so far
        self.lengths = torch.zeros(slots, dtype=torch.long)  # prompt and completion tokens
        self.last = torch.zeros(slots, dtype=torch.long, device=self.device)  # last drawn token

    def finish(self, before_pass: Callable[[], None]) -> Completions:
        """Decode until every prompt has its completion; call ``before_pass`` before each forward pass."""
        while self.waiting or bool(self.active.any()):
            left = int(self.active.sum())
            if left <= FULL_ENOUGH * len(self.active):
                if self.waiting and (left == 0 or self.decoder.refills):
                    self._fill(before_pass)
                elif left:
                    self._shrink()
            if bool(self.active.any()):
                self._trim()
                before_pass()
                self._record(torch.arange(len(self.active)), self.decoder.step(self.last, self.lengths.to(self.device)))
        counts = self.counts.tolist()
        ids, logprobs, entropies = (
            tuple(row[:count] for row, count in zip(grid.cpu(), counts, strict=True))
            for grid in (self.tokens, self.scores, self.entropies)
        )
        return Completions(ids, logprobs, self.ended, entropies if self.own else None)

    def _fill(self, before_pass: Callable[[], None]) -> None:
        """Let waiting prompts enter the free slots, and draw their first tokens."""
        if not self.decoder.refills:
            self._free_all_slots()
        free = (~self.active).nonzero().squeeze(-1).tolist()[: len(self.waiting)]
        if self.decoder.equal_lengths:
            length = len(self.prompts[self.waiting[0]])
            free = free[: sum(len(self.prompts[row]) == length for row in self.waiting)]
            self._free_all_slots(len(free))
        rows = [self.waiting.popleft() for _ in free]
        fresh = {self.keys[row]: row for row in reversed(rows) if self.keys[row] not in self.held}
        distinct = [row for row in rows if fresh.get(self.keys[row]) == row]
        if distinct:
            before_pass()
            prefix = self.decoder.prefill([self.prompts[row] for row in distinct])
            self.held |= {self.keys[row]: (prefix, place) for place, row in enumerate(distinct)}
        places = [self.held[self.keys[row]] for row in rows]
        for prefix in {id(prefix): prefix for prefix, _ in places}.values():
            members = [index for index, (of, _) in enumerate(places) if of is prefix]
            slots = torch.tensor([free[index] for index in members])
            self._enter(prefix, [places[index][1] for index in members], slots, [rows[index] for index in members])
        self._drop_prefixes(rows[-1])

    def _enter(self, prefix: Prefix, places: list[int], slots: Tensor, rows: list[int]) -> None:
        place = torch.tensor(places, device=self.device)
        logits = prefix.logits
        if places != list(range(len(logits))):
            logits = logits[place]
        self.decoder.enter(prefix, place, slots.to(self.device))
        self.owners[slots] = torch.tensor(rows)
        self.lengths[slots] = torch.tensor([len(self.prompts[row]) for row in rows])
        self.drawn[slots] = 0
        self.active[slots] = True
        self._record(slots, logits)

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
        kept = self.active.nonzero().squeeze(-1)
        self.decoder.keep(kept.to(self.device))
        self.owners, self.active, self.drawn = self.owners[kept], self.active[kept], self.drawn[kept]
        self.lengths, self.last = self.lengths[kept], self.last[kept.to(self.device)]

    def _trim(self) -> None:
        """Make the batch as wide as its longest row.

        If all prompts started together the width stays, and with it the last bits of the numbers.
        """
        if self.slots < len(self.prompts):
            self.decoder.trim(max((self.lengths - 1)[self.active].tolist(), default=0))

    def _record(self, slots: Tensor, logits: Tensor) -> None:
        """Draw the next token of each slot, and note which completions it ends."""
        owners, drawn, active = self.owners[slots], self.drawn[slots], self.active[slots]
        due = active & (drawn % self.ahead == 0)
        if bool(due.any()):
            self._draw_numbers(owners[due].to(self.device), drawn[due].to(self.device))
        owned, places = owners.to(self.device), drawn.to(self.device)
        chosen, logprobs, entropies = draw(logits, self.settings, self.numbers[owned, places])
        stops = torch.isin(chosen, self.ends).cpu() & active
        self.last[slots.to(self.device)] = chosen
        if not bool(active.all()):
            index = active.nonzero().squeeze(-1).to(self.device)
            owned, places = owned[index], places[index]
            chosen, logprobs, entropies = chosen[index], logprobs[index], entropies[index]
        self.tokens[owned, places], self.scores[owned, places] = chosen, logprobs
        self.entropies[owned, places] = entropies
        drawn = drawn + active
        self.drawn[slots], self.lengths[slots] = drawn, torch.minimum(self.lengths[slots] + 1, self.longest[owners])
        done = active & (stops | (drawn >= self.settings.max_new_tokens))
        self.counts[owners[done]] = drawn[done]
        self.ended[owners[stops]] = True
        self.active[slots] = active & ~done
        if self.on_progress is not None and bool(done.any()):
            self.on_progress(int(done.sum()))

    def _draw_numbers(self, rows: Tensor, places: Tensor) -> None:
        """Draw the random numbers of the next tokens of some completions."""
        positions = places.unsqueeze(-1) + torch.arange(self.ahead, device=self.device)
        episodes = self.episodes[rows].unsqueeze(-1).expand_as(positions)
        self.numbers[rows.unsqueeze(-1), positions] = uniform(self.seed, episodes, positions)


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
        return best, logprobs.gather(-1, best.unsqueeze(-1)).squeeze(-1), entropy_of(logprobs)
    logprobs = (logits / settings.temperature).log_softmax(-1)
    kept = _truncate(logprobs, settings)
    cumulative = kept.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, (numbers * cumulative[:, -1]).unsqueeze(-1)).squeeze(-1)
    drawn = drawn.clamp_max(logits.shape[-1] - 1)
    return drawn, logprobs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1), entropy_of(logprobs)


def entropy_of(logprobs: Tensor) -> Tensor:
    """Return the entropy in nats of log-probabilities of shape (rows, vocabulary)."""
    return -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1)  # 0 * -inf is NaN: a masked token adds nothing


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
