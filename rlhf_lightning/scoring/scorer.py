"""Base class of scorers (text in, scores or judgements out), and functions that load scorers and check scores."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ContractError, DataError, RlhfError, SettingError, undefined
from rlhf_lightning.loading import load
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.types import Judgement, Prompt, Rollout

Scores = Sequence[float | None | Judgement] | Tensor
"""One number or `Judgement` per completion; None if the completion cannot be judged."""

RESERVED_PARTS = ("std", "squared", "missing")
"""Names that a part of a `Judgement` must not have: the metric ``rollout/score_NAME`` has another meaning."""


LONGEST_PART_NAME = 100

LARGEST_SCORE = 1e6
"""Scores with a larger absolute value cause a warning."""


class Judgements(NamedTuple):
    """Checked judgements of several completions, as tensors.

    Attributes:
        scores: fp32, shape (completions,), NaN if a completion cannot be judged.
        parts: fp32 by name, shape (completions,), NaN if a completion lacks the part.
        token_rewards: fp32, one tensor per completion; empty if there are none.
        feedback: one text per completion, or None; empty if there is none.
        span_rewards: (start, end, reward) of spans of each completion's text; empty if there are none.
    """

    scores: Tensor
    parts: Mapping[str, Tensor] = {}
    token_rewards: tuple[Tensor, ...] = ()
    feedback: tuple[str | None, ...] = ()
    span_rewards: tuple[Sequence[tuple[int, int, float]], ...] = ()

    def plain(self) -> list[Judgement]:
        """Return one `Judgement` per completion."""

        def number(value: Tensor) -> float | None:
            return None if value.isnan() else float(value)

        parts = {name: values.tolist() for name, values in self.parts.items()}
        return [
            Judgement(
                number(score),
                {name: values[row] for name, values in parts.items()},
                self.token_rewards[row].tolist() if self.token_rewards else None,
                self.feedback[row] if self.feedback else None,
                self.span_rewards[row] if self.span_rewards else (),
            )
            for row, score in enumerate(self.scores)
        ]


GoldReward = Callable[[Prompt, str], float]
"""True score of a completion, for simulated judges and annotators."""


class Measured:
    """Metric values per completion under fixed names, collected until `take` is called."""

    def __init__(self, *names: str) -> None:
        self._values: dict[str, list[float]] = {name: [] for name in names}

    def add(self, name: str, values: Sequence[float | None]) -> None:
        """Add one value per completion; None values are not counted."""
        self._values[name] += [math.nan if value is None else float(value) for value in values]

    def take(self) -> dict[str, Tensor]:
        """Return the values since the last call, fp64, shape (completions,) each."""
        taken = {name: torch.tensor(values, dtype=torch.float64) for name, values in self._values.items()}
        self._values = {name: [] for name in self._values}
        return taken


class Scorer:
    """A callable that scores completions. Any function with this signature works too.

    A subclass that needs a device or weights overrides ``to`` and ``load_beside``. A subclass with networks lists them
    in ``models``. A subclass with additional metrics sets ``measured``. State that changes during training (a running
    mean, a multiplier) is updated in ``on_rollout_end`` and saved by ``state_dict``. State that changes while scoring
    is restored after sample tables and validation, and differs between ranks.
    """

    measured = Measured()
    """Additional metrics of the completions; `take_metrics` returns them."""

    @property
    def models(self) -> Sequence[nn.Module]:
        """The networks used for scoring; a sharded run shards them."""
        return ()

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return one number or `Judgement` per completion; None if it cannot be judged (not if it is bad).

        Args:
            prompts: each prompt in the form of the data: text or messages.
            completions: text of each completion, without the end token.
            columns: other columns of the data, one value per completion.
        """
        raise undefined(self, "__call__")

    def load_beside(self, policy: CausalLM | None, settings: LoadSettings) -> None:
        """Load the models needed for scoring. A scorer that contains other scorers must call this method on them.

        Args:
            policy: model whose backbone may be shared; None if its weights are sharded.
            settings: precision of the run.
        """

    def to(self, device: torch.device) -> Scorer:
        """Move the scorer to ``device``."""
        return self

    def weights_hash(self) -> str | None:
        """Return an identifier of the weights used for scoring, including those of inner scorers and judges.

        It is compared when a run is resumed. None if there are no weights on this machine.
        """
        asked = {name: value for name, value in vars(self).items() if hasattr(value, "weights_hash")}
        found = {name: one for name, value in asked.items() if (one := value.weights_hash()) is not None}
        return str(sorted(found.items())) if found else None

    def take_metrics(self) -> dict[str, Tensor]:
        """Return metrics since the last call, one value per scored completion; NaN values are not counted.

        On-policy modules log the mean of each metric as ``rollout/<name>``. Always return the same names, with empty
        values if nothing was scored, since every rank must log the same metrics.
        """
        return self.measured.take()

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Update the scorer's state after a training rollout and its updates, not after sample tables or validation.

        Args:
            rollout: this rank's episodes.
            means: means over all ranks, equal on each rank: ``score``, ``score_NAME`` of each part, ``kl``,
                ``completion_length`` and all other values logged as ``rollout/<name>``. State that is updated only from
                these means stays equal on all ranks.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later scores depend on, as plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned.

        Args:
            state: this rank's state; if the number of ranks changed, the state of rank 0.
        """


class ZeroScorer(Scorer):
    """Score every completion 0, for objectives that do not learn from scores."""

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float] | Tensor:
        return [0.0] * len(completions)


class FunctionScorer(Scorer):
    """Wrap a plain function as a scorer, called as ``function(prompts, completions, **columns)``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        refuse_other_calls(function)
        self.function = function

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        return self.function(prompts, completions, **columns)


def refuse_other_calls(function: Callable[..., Any]) -> None:
    """Refuse a model, and a function that does not accept the arguments of a scorer.

    Raises:
        SettingError: ``scorer-call``.
    """
    kind = type(function).__name__
    if type(function).__module__.partition(".")[0] in ("torch", "transformers", "peft", "rlhf_lightning"):
        raise SettingError(
            "scorer-call", f"a {kind} does not score texts: give the folder of a reward model (export), or a function"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # a C function without a signature
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [one for one in signature.parameters.values() if one.kind in kinds]
    try:
        signature.bind([], [], **{one.name: None for one in named[2:] if one.default is one.empty})
    except TypeError as error:
        name = getattr(function, "__name__", kind)
        raise SettingError(
            "scorer-call",
            f"the scorer {name}{signature} cannot be called: it is called as {name}(prompts, completions, **columns), "
            "two lists and the columns of the data, and returns one number for each completion",
        ) from error


def checked_scores(scores: Scores, count: int, name: str) -> Tensor:
    """Return scores as fp32, shape (count,), on the CPU; None becomes NaN.

    A scorer that returns NaN is refused, since NaN means a failed computation. For a completion that cannot be judged
    it must return None.

    Raises:
        BadScoresError: the number of scores is wrong, or a score is not a number, NaN or infinite.
    """
    if isinstance(scores, Sequence) and any(isinstance(score, Judgement) for score in scores):
        scores = [score.score if isinstance(score, Judgement) else score for score in scores]
    wanted = f"{name} must return one number for each completion"
    if not isinstance(scores, Tensor | Sequence) or isinstance(scores, str):
        if isinstance(scores, Mapping | set | str) or not isinstance(scores, Iterable):
            raise BadScoresError("not-numbers", f"{wanted}: it returned {scores!r:.200}")
        scores = list(scores)
    missing = [] if isinstance(scores, Tensor) else [row for row, score in enumerate(scores) if score is None]
    values = _numbers([0.0 if score is None else score for score in scores] if missing else scores, wanted)
    if values.numel() != count:
        raise BadScoresError(
            "number-of-scores",
            f"{name} returned {values.numel()} scores for {count} completions; it must return one for each",
        )
    if values.dim() != 1:
        raise BadScoresError("not-numbers", f"{wanted}: it returned an array of shape {tuple(values.shape)}")
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        value = values[bad[0]].item()
        raise BadScoresError(
            "not-finite",
            f"{name} returned {value} for completion {bad[0]}; {len(bad)} of {count} are not finite; "
            "rlhf_lightning.scoring.FaultTolerant with on_fault: drop leaves them out",
        )
    if bool((values.abs() > LARGEST_SCORE).any()):
        warnings.warn(
            f"{name} returned scores beyond {LARGEST_SCORE:g}; they dominate every mean, and fp32 loses their "
            "differences: rescale them",
            stacklevel=2,
        )
    return values.index_fill(0, torch.tensor(missing), math.nan) if missing else values


def _numbers(values: Any, wanted: str) -> Tensor:
    """Return numbers as fp32 on the CPU; shape (n, 1) becomes (n,). ``wanted`` begins the error message."""
    try:
        found = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadScoresError("not-numbers", f"{wanted}: {error}") from error
    return found.squeeze(1) if found.dim() == 2 and found.shape[1] == 1 else found


def call_scorer(
    scorer: Callable[..., Any],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    name: str,
) -> Scores:
    """Return a scorer's result, unchecked.

    Raises:
        ContractError: the scorer called sys.exit, which must not end the run as a success.
        MissingColumnError: a function reads a column that the data lacks.
    """
    try:
        given = scorer(prompts, completions, **columns)
        if inspect.iscoroutine(given):
            given.close()
            raise ContractError("async-scorer", f"{name} is an async function: give a regular function; it may block")
        return list(given) if isinstance(given, Iterator) else given
    except KeyError as error:
        asked = error.args[0] if error.args else None
        if not isinstance(scorer, FunctionScorer) or not isinstance(asked, str) or asked in columns:
            raise
        raise MissingColumnError(
            "missing-data-column",
            f"{scorer.function.__name__} asks for {asked!r}, which the data lacks (further columns: "
            f"{', '.join(columns) or 'none'}); add it to the rows, or rename one by data.columns",
        ) from error
    except SystemExit as error:
        raise ContractError(
            "scorer-exits",
            f"{name} called sys.exit({'' if error.code is None else repr(error.code)}); raise an exception, or return "
            "None for a completion that cannot be judged",
        ) from error


def ask_scorer(
    scorer: Callable[..., Any],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    name: str,
) -> Judgements:
    """Return a scorer's judgements of completions, checked; see `call_scorer` and `checked_judgements`."""
    return checked_judgements(call_scorer(scorer, prompts, completions, columns, name), len(completions), name)


def checked_judgements(given: Scores, count: int, name: str) -> Judgements:
    """Return judgements as tensors on the CPU; a plain number is a judgement without parts.

    Raises:
        BadScoresError: see `checked_scores`.
        ContractError: a part has a reserved name or is infinite, or a token reward is not finite.
    """
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    if not any(isinstance(one, Judgement) for one in listed):
        return Judgements(checked_scores(given, count, name))
    each = [one if isinstance(one, Judgement) else Judgement(one) for one in listed]
    scores = checked_scores([one.score for one in each], count, name)
    parts = {}
    names = {part for one in each for part in one.parts}
    for part in names:  # part names become metric names, in files and on terminals
        if not isinstance(part, str) or not part.isprintable() or not 0 < len(part) <= LONGEST_PART_NAME:
            raise ContractError(
                "part-name", f"{name} calls a part {part!r:.200}; use up to {LONGEST_PART_NAME} printable characters"
            )
    for part in sorted(names):
        if part in RESERVED_PARTS:
            raise ContractError("reserved-part", f"{name} calls a part {part!r}, which is reserved: rename it")
        found = [math.nan if one.parts.get(part) is None else one.parts[part] for one in each]
        parts[part] = _numbers(found, f"{name} must return a number as part {part!r}")
        if bool(parts[part].isinf().any()):
            raise ContractError("infinite-part", f"{name} returned an infinite part {part!r}: return NaN for no value")
    rewards: tuple[Tensor, ...] = ()
    if any(one.token_rewards is not None for one in each):
        wanted = f"{name} must return a list of numbers as token rewards"
        rewards = tuple(
            _numbers([] if one.token_rewards is None else one.token_rewards, wanted).flatten() for one in each
        )
        if not all(bool(row.isfinite().all()) for row in rewards):
            raise ContractError("token-reward", f"{name} returned a token reward that is NaN or infinite")
    feedback = tuple(one.feedback for one in each) if any(one.feedback is not None for one in each) else ()
    spans = tuple(_spans(one.span_rewards, name) for one in each) if any(one.span_rewards for one in each) else ()
    return Judgements(scores, parts, rewards, feedback, spans)


def _spans(given: Any, name: str) -> list[tuple[int, int, float]]:
    """Return checked span rewards."""
    try:
        spans = [(index(start), index(end), float(reward)) for start, end, reward in given]
    except (TypeError, ValueError, OverflowError):
        spans = [(-1, -1, 0.0)]
    if not all(0 <= start < end and math.isfinite(reward) for start, end, reward in spans):
        raise ContractError(
            "span-reward",
            f"{name} returned {given!r:.200} as span rewards: each is (start, end, reward) with start < end, in "
            "characters of the completion, and a finite reward",
        )
    return spans


LEARNING = False
"""Whether completions are currently judged for training; see `learning`."""


@contextlib.contextmanager
def learning() -> Iterator[None]:
    """Mark completions judged inside this context as training samples, for scorers that add noise only in training."""
    global LEARNING
    LEARNING = True
    try:
        yield
    finally:
        LEARNING = False


@contextlib.contextmanager
def unmoved(scorer: Any) -> Iterator[None]:
    """Restore a scorer's state on exit, so that sample tables and validation do not change a run."""
    before = copy.deepcopy(scorer.state_dict()) if isinstance(scorer, Scorer) else {}
    try:
        yield
    finally:
        if before:
            scorer.load_state_dict(before)


class BadScoresError(RlhfError, ValueError):
    """A scorer returned unusable scores."""


class MissingColumnError(DataError):
    """A scorer needs a data column that is missing."""


def column(columns: Mapping[str, Sequence[Any]], name: str, scorer: Scorer) -> Sequence[Any]:
    """Return a column of the data.

    Raises:
        MissingColumnError: the column is missing.
    """
    if name not in columns:
        found = ", ".join(columns) or "none"
        raise MissingColumnError(
            "missing-data-column",
            f"{type(scorer).__name__} needs the data column {name}, which is missing (further "
            f"columns: {found}); add it, or rename one by data.columns",
        )
    return columns[name]


def load_gold_reward(spec: str | GoldReward) -> GoldReward:
    """Return the function ``(prompt, completion) -> number`` given directly or by import path.

    Raises:
        SettingError: see `loading.load`.
    """
    return load(spec, Callable, {}, "gold_reward")
