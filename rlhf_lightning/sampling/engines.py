"""Interface of sampling engines: settings, requests, completions, and the base class `SamplingEngine`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import DataError, SettingError
from rlhf_lightning.models.causal_lm import CausalLM, inference_mode_of
from rlhf_lightning.models.layout import padded_layout, select
from rlhf_lightning.models.limits import check_prompts, room_after
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.scalar_head import unwrapped
from rlhf_lightning.models.self_check import CLOSE, CLOSE_BY_DTYPE
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.sampling.conversation import Transcript, Turns
from rlhf_lightning.sampling.decoding import Mixture
from rlhf_lightning.sampling.own_logprobs import scored
from rlhf_lightning.tokenization import Ends
from rlhf_lightning.types import Prompt, Sequences


@dataclass
class SamplingSettings:
    """Sampling settings. The model's own generation config is ignored.

    Args:
        max_new_tokens: maximum length of a completion, tokens; with an environment, of a turn.
        temperature: divisor of the logits; 0 takes the most probable token.
        top_p: nucleus size in (0, 1]. Training needs 1: truncated log-probabilities are not the policy's.
        top_k: number of most probable tokens to keep; 0 keeps all.
        batch_size: number of slots, the completions decoded at the same time; a waiting prompt replaces a finished
            completion. null decodes all at once.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, valid, range_ in (
            ("max_new_tokens", 1 <= self.max_new_tokens < 2**31, "be at least 1, and below 2147483648"),
            ("temperature", self.temperature >= 0, "be 0 (greedy) or positive"),
            ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]"),
            ("top_k", 0 <= self.top_k < 2**31, "be 0 (all tokens) or positive, and below 2147483648"),
        ):
            if not valid:
                raise SettingError("setting-out-of-range", f"{name} is {getattr(self, name)}: it must {range_}")

    @property
    def is_pure(self) -> bool:
        """Whether tokens come from the policy's untruncated distribution at the temperature."""
        return self.temperature > 0 and self.top_p == 1.0 and self.top_k == 0

    @property
    def distribution(self) -> tuple[float, float, int]:
        """Settings that determine the sampling distribution: ``temperature``, ``top_p`` and ``top_k``."""
        return self.temperature, self.top_p, self.top_k


class Completions(NamedTuple):
    """Sampled completions, in the order of the prompts.

    Attributes:
        ids: token ids of each completion, int64, including the end token (or the token that completes a stop string)
            if it was reached.
        logprobs: log-probability of each sampled token at the temperature; fp32 or wider.
        finished: bool, True if an end token or a stop string was reached, shape (rows,); with an environment, True if
            the environment ended the episode.
        entropies: entropy of the distribution of each token, nats; None if the engine does not report it.
        texts: text of each completion without the end token, and up to the stop string; for an episode, the text of the
            policy's last turn; empty until `decoded` is called.
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
        pairs = zip(self.ids, self.starts, strict=True)
        texts = tokenization.completion_texts(tokenizer, (ids[start:].tolist() for ids, start in pairs))
        return self._replace(texts=tuple(texts))

    @property
    def starts(self) -> list[int]:
        """Index of the first token of each text; of an episode, of the policy's last turn."""
        return [one.starts[-1] for one in self.transcripts] or [0] * len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens that the policy wrote in each completion."""
        return [len(ids) for ids in self.ids] if self.learned is None else [int(mask.sum()) for mask in self.learned]

    def asked(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the context of each text: the prompt, and with an environment also the turns before the last one."""
        if not self.transcripts:
            return list(prompts)
        return [one.asked(prompt) for one, prompt in zip(self.transcripts, prompts, strict=True)]

    def cut(self, ends: Ends) -> Completions:
        """Return the completions cut after the token that completes their first stop string."""
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
    """Arguments of `SamplingEngine.sample`, see there.

    ``starts`` are the positions in their episodes of the first tokens to sample, int64, shape (rows,); None for 0.
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
        """Position of the first token to sample in each episode, int64, shape (rows,)."""
        return torch.zeros_like(self.episodes) if self.starts is None else self.starts.to(self.episodes)


class SamplingEngine(ABC):
    """Base of engines that sample completions from a policy; a subclass defines `complete`.

    An engine may use other kernels, another process or other machines. ``exact`` and ``reports_logprobs`` state the
    consequences for learning from its samples.
    """

    exact: bool = True
    """Whether log-probabilities equal those of the trainer's forward pass up to rounding. Otherwise, learning from the
    samples needs importance correction."""

    reports_logprobs: bool = True
    """Whether the engine reports the log-probabilities that it sampled with; importance correction needs them.
    Otherwise `sample` returns the policy's own."""

    sync_error: float | None = None
    """Mean difference to the trainer's log-probabilities at the last weight transfer; None without a transfer."""

    keeps_turns: bool = False
    """Whether `complete` itself continues after the replies of ``request.turns``. Otherwise it is called once per turn,
    with the whole conversation as the prompt, and ``request.first_positions`` to seed the random numbers."""

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
            prompts: token ids of each prompt, int64; no prompt may be empty.
            episodes: number of each episode, int64, shape (rows,).
            settings: temperature, length limit.
            seed: seed of the run.
            end_ids: tokens that end a completion; `tokenization.Ends` also has stop strings.
            on_progress: called with the number of completions that have just finished; a `SlotEngine` calls it after
                each forward pass. If it raises, sampling ends.
            mixture: a second model to sample from together with the first; None samples from the first alone.
            turns: conversations with an environment, one per prompt; None samples one completion each.

        Raises:
            DataError: a prompt is empty.
        """
        refuse_empty(prompts)
        if isinstance(model, CausalLM):
            check_prompts(model.model, prompts, settings.max_new_tokens)
            if turns is not None:
                turns.limit(room_after(model.model, prompts))
        ends = end_ids if isinstance(end_ids, Ends) else Ends(end_ids)
        request = SamplingRequest(prompts, episodes, settings, seed, ends, on_progress, mixture, turns)
        with self.synchronized(model):
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
        if not self.reports_logprobs:
            own = scored(model, prompts, drawn.ids, settings.temperature or 1.0, drawn.learned)
            drawn = drawn._replace(logprobs=own)
        if model.self_check and not model.sampling_checked and self.exact and mixture is None and prompts:
            model.sampling_checked = True
            _check_first_row(model, request, drawn)
        return drawn

    @contextmanager
    def synchronized(self, model: CausalLM) -> Iterator[None]:
        """Give the sampler the model's current weights; `complete` is called in this context.

        All ranks enter it once for each call of `sample` or `start`, also without prompts. Collectives of an engine
        that does not keep turns belong here: with an environment, ranks call `complete` unequally often.
        """
        yield

    @abstractmethod
    def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
        """Sample the completions of a request to `sample`."""

    def start(self, model: CausalLM, request: SamplingRequest) -> Callable[[], Completions]:
        """Begin a request with the model's current weights; return a function that waits for its completions.

        An engine in this process samples at once. An engine that samples elsewhere returns immediately.
        """
        with self.synchronized(model):
            drawn = self.complete(model, request)
        return lambda: drawn

    def prepare(  # noqa: B027 - most engines need nothing
        self, init_from: str, settings: LoadSettings, lora: LoraSettings | None, versions: int
    ) -> None:
        """Receive, before the first rollout of a training run, how the policy is loaded.

        Args:
            init_from: folder or hub id of the policy.
            settings: load settings, such as the precision.
            lora: the adapter; None if all weights are trained.
            versions: number of versions of the weights whose episodes may be in flight at the same time.
        """

    def require_one_model(self, model: CausalLM, request: SamplingRequest, whole: bool = True) -> None:
        """Refuse requests that only the `SlotEngine` supports: mixtures and, with ``whole``, sharded weights.

        Raises:
            SettingError: ``mixture-needs-slots`` or ``sharded-needs-slots``.
        """
        name = type(self).__name__
        if request.mixture is not None:
            raise SettingError(
                "mixture-needs-slots",
                f"{name} samples from one model, and a mixture of models was asked for; use the SlotEngine",
            )
        if whole and is_sharded(model):
            raise SettingError(
                "sharded-needs-slots", f"{name} needs whole weights, and these are sharded; use the SlotEngine"
            )

    def _turn_by_turn(self, model: CausalLM, request: SamplingRequest, turns: Turns) -> Completions:
        """Sample one turn of all open episodes at a time; each turn reads the conversations from the beginning.

        Episodes with equal room for a turn share a call, so that no request exceeds the model's context.
        """
        count, limit = len(request.prompts), request.settings.max_new_tokens
        rows, logprobs = list(range(count)), [torch.zeros(0)] * count
        said: list[list[int]] = [[]] * count
        whole = [False] * count
        while rows:
            for most in sorted({turns.room(row, limit) for row in rows}):
                group = [row for row in rows if turns.room(row, limit) == most]
                heard = [torch.tensor(turns.ids(row), dtype=torch.long) for row in group]
                asked = request._replace(
                    prompts=[torch.cat([request.prompts[row], ids]) for row, ids in zip(group, heard, strict=True)],
                    episodes=request.episodes[group],
                    settings=replace(request.settings, max_new_tokens=most),
                    on_progress=None,
                    turns=None,
                    starts=torch.tensor([len(ids) for ids in heard]),
                )
                drawn = self.complete(model, asked).cut(request.end_ids)
                for place, row in enumerate(group):
                    unlearned = torch.zeros(len(heard[place]) - len(logprobs[row]))
                    logprobs[row] = torch.cat([logprobs[row], unlearned, drawn.logprobs[place]])
                    said[row], whole[row] = drawn.ids[place].tolist(), bool(drawn.finished[place])
            going = turns.replies(rows, [said[row] for row in rows], [whole[row] for row in rows])
            if request.on_progress is not None and not all(going):
                request.on_progress(going.count(False))
            rows = [row for row, more in zip(rows, going, strict=True) if more]
        ids = tuple(torch.tensor(turns.ids(row), dtype=torch.long) for row in range(count))
        return Completions(ids, tuple(logprobs), torch.zeros(count, dtype=torch.bool))  # `sample` sets finished


@torch.no_grad()
def _check_first_row(model: CausalLM, request: SamplingRequest, drawn: Completions) -> None:
    """Warn if log-probabilities of a model's first sampled completion differ from those of its forward pass."""
    if is_sharded(model):
        return  # other ranks may have no row to run
    layout = padded_layout(select(drawn.after(request.prompts), [0])).to(next(model.parameters()).device)
    with inference_mode_of(model):
        expected = model(layout, request.settings.temperature or 1.0).logprobs[0].cpu()
    gap = float((drawn.logprobs[0] - expected[: len(drawn.logprobs[0])]).abs().mean())
    if not gap <= CLOSE_BY_DTYPE.get(next(model.parameters()).dtype, CLOSE):
        rank_zero_warn(
            f"{type(unwrapped(model.model)).__name__}: log-probabilities of sampled tokens differ from the model's "
            f"forward by {gap:.2g} nats on average in the first completion; its samples are not the model's"
        )


def spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Distribute prompts over at most ``count`` workers: longest first, each to the worker with the fewest tokens.

    Returns:
        The prompt indices of each worker, sorted.
    """
    parts: list[list[int]] = [[] for _ in range(min(count, len(lengths)))]
    loads = [0] * len(parts)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = loads.index(min(loads))
        parts[place].append(row)
        loads[place] += lengths[row]
    return [sorted(part) for part in parts]


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
