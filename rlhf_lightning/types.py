"""Define the typed tuples that data, models, losses and modules exchange.

Shapes: ``rows`` completions of a batch, ``length`` completion tokens (padded on the right with zeros), ``pairs``
preference pairs, ``groups`` prompts with several completions. Two invariants hold everywhere:

* a ``*_logprobs`` tensor is exactly 0 where its mask is False, so its sum over ``length`` is the sequence
  log-probability;
* masks are made from lengths, not from pad ids, and are True on completion tokens up to and including the end token.

``extras`` hold the further tensors of an objective by name, called slots: one value for each row or completion token.
Slots come from columns of the data (``data_columns``), from per-token statistics (``token_statistics``) and from
scorers. Micro-batching, packing, sharding over ranks and minibatches treat slots like fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, SupportsIndex, TypeVar, runtime_checkable

from torch import Tensor

Message = dict[str, Any]
"""One turn of a conversation: ``{"role": "user" | "assistant" | "system" | "tool", "content": text}``.

A turn may also hold ``reasoning_content`` (the reasoning before an answer), ``tool_calls``, ``tool_call_id``, ``name``
and ``weight`` (weight of its tokens in the loss, default 1). The first turn holds ``tools``, the tool descriptions.
"""

Prompt = str | list[Message]
"""A prompt: plain text, or the turns of a conversation."""


class Sequences(NamedTuple):
    """Prompts and their completions, ragged: ``models.layout`` pads or packs them.

    Attributes:
        prompts: token ids of each prompt, int64, each of shape (prompt tokens,).
        completions: token ids of each completion, int64, each of shape (completion tokens,).
        parents: index of each completion's prompt.
        supervised: bool mask over each completion's tokens, True on tokens that enter a loss: all tokens of a sampled
            or compared completion, the assistant turns of a demonstration, the last token of each judged step.
    """

    prompts: tuple[Tensor, ...]
    completions: tuple[Tensor, ...]
    parents: tuple[int, ...]
    supervised: tuple[Tensor, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt + completion."""
        return [len(self.prompts[p]) + len(c) for p, c in zip(self.parents, self.completions, strict=True)]


class DemonstrationBatch(NamedTuple):
    """Demonstrations for supervised fine-tuning: one completion per prompt.

    Attributes:
        sequences: the demonstrations.
        weights: weight of each demonstration, shape (rows,).
        extras: slots, shape (rows,).
    """

    sequences: Sequences
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class PreferenceBatch(NamedTuple):
    """Preference pairs: completions ``0 .. pairs-1`` are chosen, ``pairs .. 2*pairs-1`` rejected, for the same prompts.

    Attributes:
        sequences: prompts, and chosen completions stacked on rejected ones.
        target: probability that chosen is better, shape (pairs,); 1 for a plain label, 0.5 for a tie.
        margin: rated strength of the preference, shape (pairs,); 0 where unrated.
        weights: weight of each pair, shape (pairs,).
        extras: slots, shape (pairs,).
    """

    sequences: Sequences
    target: Tensor
    margin: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class RankedBatch(NamedTuple):
    """Groups of two or more ranked completions of one prompt; a pair is a group of two.

    Attributes:
        sequences: prompts (one per group) and their completions.
        ranks: rank of each completion in its group, 0 is best, equal ranks are ties; int64, shape (completions,).
        target: probability that the better ranked completion is better, in groups of two; otherwise 1; shape (groups,).
        margin: rated strength of the preference, 0 where unrated; shape (groups,).
        weights: weight of each group, shape (groups,).
        extras: slots, shape (groups,).
    """

    sequences: Sequences
    ranks: Tensor
    target: Tensor
    margin: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class ProcessBatch(NamedTuple):
    """Completions with judged steps, one completion per prompt.

    Attributes:
        sequences: the completions; ``supervised`` is True only on the last token of each judged step.
        labels: probability that each judged step is right, one tensor of shape (judged steps,) per completion; 0 or 1
            for plain labels.
        weights: weight of each completion, shape (rows,).
        extras: slots, shape (rows,).
    """

    sequences: Sequences
    labels: tuple[Tensor, ...]
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class UnpairedBatch(NamedTuple):
    """Completions judged individually, one per prompt.

    Attributes:
        sequences: the judged completions.
        mismatched: each prompt with the completion of another prompt, for KTO's KL estimate; None unless the module
            asks for it.
        desirable: bool, True if the completion was judged good, shape (rows,).
        weights: weight of each row, shape (rows,).
        extras: slots, shape (rows,).
    """

    sequences: Sequences
    mismatched: Sequences | None
    desirable: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class PromptBatch(NamedTuple):
    """Prompts to answer, with the data columns that a scorer may need.

    Attributes:
        prompts: token ids of each prompt, rendered with the generation prompt; int64, each (prompt tokens,).
        texts: each prompt as given by the data: plain text or messages.
        columns: further columns of the data, each a list with one value per prompt (``answer``, ``category`` ...).
        episodes: number of each prompt's episode in the run; it seeds the episode's random numbers; int64, (prompts,).
        group: index of the distinct prompt of each row, equal for the samples of one group; int64, (prompts,).
        pretraining: text to mix into the policy's updates (PPO-ptx), or None.
        extras: slots, shape (prompts,).
        multi_turn: the environment that replies to completions; None if each episode is a single completion.
    """

    prompts: tuple[Tensor, ...]
    texts: tuple[Prompt, ...]
    columns: Mapping[str, list[Any]]
    episodes: Tensor
    group: Tensor
    pretraining: DemonstrationBatch | None = None
    row_ids: tuple[int, ...] = ()
    extras: Mapping[str, Tensor] = {}
    multi_turn: MultiTurn | None = None


class DataNeeds(NamedTuple):
    """Requirements of a module on its DataModule; the defaults apply to a DataModule without a module.

    Attributes:
        batch_type: class of the batches; None takes the first class that the DataModule lists.
        columns: numeric columns of the data to pass on in ``extras``.
        ties: keep pairs whose completions were judged equal.
        mismatched: also give each prompt the completion of another row.
        step_separator: text between two judged steps.
        packed: rows are packed, so that a micro-batch is limited by the sum of its tokens.
        predicts_prompts: ``predict`` answers prompts; otherwise it scores completions.
    """

    batch_type: type | None = None
    columns: tuple[str, ...] = ()
    ties: bool = False
    mismatched: bool = False
    step_separator: str = "\n"
    packed: bool = False
    predicts_prompts: bool = True


@runtime_checkable
class TakesData(Protocol):
    """A module that states its requirements on the data."""

    @property
    def data_needs(self) -> DataNeeds:
        """Return the module's requirements."""
        ...


class MicroBatchLimits(NamedTuple):
    """Limits of one forward and backward pass on a rank. They affect memory and speed, but no gradient.

    Attributes:
        micro_batch_size: maximum number of rows (demonstrations, pairs, groups, episodes), or None.
        max_tokens: token budget, including padding if rows are not packed; None for no limit. A row above the budget
            gets its own micro-batch.
    """

    micro_batch_size: int | None = None
    max_tokens: int | None = None


NO_LIMITS = MicroBatchLimits()

Batch = TypeVar("Batch")


class Step(NamedTuple, Generic[Batch]):
    """One item of a DataLoader: this rank's share of an optimizer step, split into micro-batches.

    A step of prompts is one rollout. The module splits the sampled episodes into micro-batches within ``limits``.

    Attributes:
        micro_batches: batches that each fit in memory; every rank gets the same number.
        rows: rows (pairs, groups, prompts) of this step over all ranks and micro-batches.
        tokens: supervised completion tokens of this step over all ranks and micro-batches.
        row_ids: indices of the step's rows among the rows that the data kept, from 0; a prompt with several samples
            counts once. Empty for a stream.
        limits: limits of each forward pass; fixed data is already split within them.
    """

    micro_batches: tuple[Batch, ...]
    rows: int
    tokens: int
    row_ids: tuple[int, ...] = ()
    limits: MicroBatchLimits = NO_LIMITS


class TokenLogprobs(NamedTuple):
    """The policy's log-probabilities of completion tokens.

    Attributes:
        logprobs: shape (rows, length), 0 where ``completion_mask`` is False.
        completion_mask: bool, shape (rows, length).
        weights: weight of each row, shape (rows,).
        extras: slots, shape (rows,) or (rows, length).
    """

    logprobs: Tensor
    completion_mask: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}

    @property
    def lengths(self) -> Tensor:
        """Completion tokens of each row, shape (rows,)."""
        return self.completion_mask.sum(-1)

    @property
    def sequence_logprobs(self) -> Tensor:
        """Log-probability of each completion, shape (rows,)."""
        return self.logprobs.sum(-1)


class DistillationLogits(NamedTuple):
    """Input of a distillation loss: logits of some completion tokens over the shared vocabulary.

    Attributes:
        student_logits: the student's logits, with gradient, fp32 or wider, shape (tokens, vocabulary).
        teacher_logits: the teacher's logits, without gradient, same shape.
        targets: id of each completion token, int64, shape (tokens,).
    """

    student_logits: Tensor
    teacher_logits: Tensor
    targets: Tensor


class PreferenceLogprobs(NamedTuple):
    """Input of a loss on preference pairs. Token tensors have shape (pairs, length) and are 0 outside the mask.

    Attributes:
        policy_chosen_logprobs: the policy's log-probabilities of the chosen completions.
        policy_rejected_logprobs: the policy's log-probabilities of the rejected completions.
        reference_chosen_logprobs: the reference's log-probabilities, without gradient; None without a reference.
        reference_rejected_logprobs: the reference's log-probabilities, without gradient; None without a reference.
        chosen_mask: bool, True on the chosen completion's tokens.
        rejected_mask: bool, True on the rejected completion's tokens.
        target: probability that chosen is better, shape (pairs,).
        rated_margin: rated strength of the preference, 0 where unrated, shape (pairs,).
        weights: weight of each pair, shape (pairs,).
        extras: slots, shape (pairs,) or (pairs, length). Slots of one side are
            ``chosen_NAME`` and ``rejected_NAME``.
    """

    policy_chosen_logprobs: Tensor
    policy_rejected_logprobs: Tensor
    reference_chosen_logprobs: Tensor | None
    reference_rejected_logprobs: Tensor | None
    chosen_mask: Tensor
    rejected_mask: Tensor
    target: Tensor
    rated_margin: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}

    def swapped(self) -> PreferenceLogprobs:
        """Return the pairs with chosen and rejected exchanged, slots included; the target becomes 1 - target."""
        fields = {_other_side(name): value for name, value in self._asdict().items()}
        extras = {_other_side(name): value for name, value in self.extras.items()}
        return self._replace(**{**fields, "target": 1 - self.target, "extras": extras})

    def where(self, kept: Tensor, other: PreferenceLogprobs) -> PreferenceLogprobs:
        """Return these pairs where ``kept`` is True, shape (pairs,), and the pairs of ``other`` elsewhere."""

        def chosen(own: Tensor | None, theirs: Tensor | None) -> Any:
            if own is None or theirs is None:
                return None
            return own.where(kept if own.dim() == 1 else kept.unsqueeze(-1), theirs)

        names = [name for name in self._fields if name != "extras"]
        fields = {name: chosen(getattr(self, name), getattr(other, name)) for name in names}
        extras = {name: chosen(values, other.extras[name]) for name, values in self.extras.items()}
        return self._replace(**fields, extras=extras)

    @property
    def chosen_lengths(self) -> Tensor:
        """Tokens of each chosen completion, shape (pairs,)."""
        return self.chosen_mask.sum(-1)

    @property
    def rejected_lengths(self) -> Tensor:
        """Tokens of each rejected completion, shape (pairs,)."""
        return self.rejected_mask.sum(-1)

    @property
    def chosen_sequence_logprobs(self) -> Tensor:
        """log policy(chosen), shape (pairs,)."""
        return self.policy_chosen_logprobs.sum(-1)

    @property
    def rejected_sequence_logprobs(self) -> Tensor:
        """log policy(rejected), shape (pairs,)."""
        return self.policy_rejected_logprobs.sum(-1)

    @property
    def chosen_logratio(self) -> Tensor:
        """log policy(chosen) - log reference(chosen), shape (pairs,); without a reference only the first term."""
        policy = self.chosen_sequence_logprobs
        return policy if self.reference_chosen_logprobs is None else policy - self.reference_chosen_logprobs.sum(-1)

    @property
    def rejected_logratio(self) -> Tensor:
        """log policy(rejected) - log reference(rejected), shape (pairs,); without a reference only the first term."""
        policy = self.rejected_sequence_logprobs
        return policy if self.reference_rejected_logprobs is None else policy - self.reference_rejected_logprobs.sum(-1)

    @property
    def token_logratios(self) -> tuple[Tensor, Tensor]:
        """log policy - log reference of each token of chosen and of rejected, each of shape (pairs, length)."""
        chosen, rejected = self.policy_chosen_logprobs, self.policy_rejected_logprobs
        if self.reference_chosen_logprobs is None or self.reference_rejected_logprobs is None:
            return chosen, rejected
        return chosen - self.reference_chosen_logprobs, rejected - self.reference_rejected_logprobs

    @property
    def margin(self) -> Tensor:
        """chosen_logratio - rejected_logratio, shape (pairs,): the implicit reward margin before ``beta``."""
        return self.chosen_logratio - self.rejected_logratio


def _other_side(name: str) -> str:
    """Return the name of the same field or slot for the other completion of the pair."""
    sides = {"chosen": "rejected", "rejected": "chosen"}
    return "_".join(sides.get(word, word) for word in name.split("_"))


class UnpairedLogprobs(NamedTuple):
    """Input of a loss on individually judged completions. Token tensors have shape (rows, length), 0 outside the mask.

    Attributes:
        policy_logprobs: the policy's log-probabilities of the completions.
        reference_logprobs: the reference's log-probabilities, without gradient; None without a reference.
        completion_mask: bool, True on completion tokens.
        desirable: bool, True if the completion was judged good, shape (rows,).
        weights: weight of each row, shape (rows,).
        reference_point: baseline of the rewards over the whole optimizer step, without gradient (KTO's z0 in nats,
            BCO's delta in reward units), shape ().
        extras: slots, shape (rows,) or (rows, length).
    """

    policy_logprobs: Tensor
    reference_logprobs: Tensor | None
    completion_mask: Tensor
    desirable: Tensor
    weights: Tensor
    reference_point: Tensor
    extras: Mapping[str, Tensor] = {}

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, shape (rows,)."""
        return self.completion_mask.sum(-1)

    @property
    def logratio(self) -> Tensor:
        """log policy - log reference of each completion, shape (rows,); without a reference only the first term."""
        policy = self.policy_logprobs.sum(-1)
        return policy if self.reference_logprobs is None else policy - self.reference_logprobs.sum(-1)


class RankedScores(NamedTuple):
    """Input of a loss on ranked completions.

    Attributes:
        scores: the reward model's score of each completion, shape (completions,).
        group: index of each completion's group (prompt), int64, shape (completions,).
        ranks: rank in the group, 0 is best, equal ranks are ties; int64, shape (completions,).
        target: probability that the better ranked completion is better, in groups of two; otherwise 1; shape (groups,).
        margin: rated strength of the preference, shape (groups,).
        weights: weight of each group, shape (groups,).
        extras: slots, shape (groups,).
    """

    scores: Tensor
    group: Tensor
    ranks: Tensor
    target: Tensor
    margin: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class ProcessScores(NamedTuple):
    """Input of a loss on judged steps.

    Attributes:
        scores: the reward model's score at each step's last token: log-odds that the step is right; shape (steps,).
        labels: probability that each step is right, shape (steps,).
        row: index of each step's completion, int64, shape (steps,).
        position: index of each step among its completion's judged steps, from 0; int64, shape (steps,).
        weights: weight of each completion, shape (rows,).
        extras: slots, shape (rows,).
    """

    scores: Tensor
    labels: Tensor
    row: Tensor
    position: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class Episode(NamedTuple):
    """An unfinished conversation between the policy and an environment.

    Attributes:
        row: the columns of the data row, and the first prompt as ``prompt``.
        messages: the turns so far, including the policy's last one; a first prompt of plain text is a user's turn.
        ids: token ids after the first prompt: the policy's turns as sampled, and the environment's replies.
        learned: whether the policy sampled each of ``ids``.
        number: number of the episode in the run; together with the position in ``ids`` it seeds random numbers.
        turn: number of the policy's last turn, from 0.
        last: whether a limit ends the episode after this turn, so that of the reply only the reward counts.
    """

    row: Mapping[str, Any]
    messages: Sequence[Message]
    ids: Sequence[int]
    learned: Sequence[bool]
    number: int
    turn: int = 0
    last: bool = False

    @property
    def said(self) -> str:
        """Text of the policy's last turn, without the end token but with all other control tokens."""
        return str(self.messages[-1]["content"])


class Reply(NamedTuple):
    """An environment's reply to a turn of the policy.

    Attributes:
        text: the reply: a user's turn of the chat template, or the continuation of a plain text.
        messages: the reply as turns of any role, such as tool results; instead of ``text``.
        ids: token ids of the reply; instead of ``text``.
        reward: reward of the policy's turn, added to the turn's last token.
        done: whether the episode ends here; the reply's text is then ignored.
        turn: the policy's turn as a message, if it holds more than text (tool calls).
        feedback: judgement of the policy's turn in words; a teacher reads it, the policy does not.
    """

    text: str | None = None
    messages: Sequence[Message] = ()
    ids: Sequence[int] | None = None
    reward: float = 0.0
    done: bool = False
    turn: Message | None = None
    feedback: str | None = None

    @property
    def fault(self) -> str:
        """Description of what is wrong with the reply; empty if it is valid."""
        try:
            finite = math.isfinite(self.reward)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # not a number, or a tensor of several
            finite = False
        texts = ("text", self.text, str | None), ("feedback", self.feedback, str | None)
        for name, value, kind in (*texts, ("turn", self.turn, dict | None)):
            if not isinstance(value, kind):
                return f"gave the {name} {value!r:.200}, which has the wrong type"
        if not isinstance(self.messages, list | tuple):
            return f"gave the messages {self.messages!r:.200}: expected a list of turns"
        for turn in self.messages:
            if not (isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and "content" in turn):
                return f"gave the message {turn!r:.200}, which lacks a role or a content"
        try:
            "".join(map(str, (self.text, self.feedback, *(turn["content"] for turn in self.messages)))).encode()
        except UnicodeEncodeError:
            return "gave a text with a lone surrogate"
        if self.ids is not None and not all(isinstance(index, SupportsIndex) and index >= 0 for index in self.ids):
            return f"gave the ids {self.ids!r:.200}, which are not token ids"
        return "" if finite else f"gave the reward {self.reward!r:.200}, which is not a finite number"


@runtime_checkable
class Environment(Protocol):
    """An environment: it provides the first prompt and replies to the policy's turns.

    A reply should depend on the episode alone. Episodes are then the same for any batch size and number of ranks, and a
    resumed run repeats them. An environment that can answer a whole batch faster than single episodes also defines
    ``reply_all(episodes) -> replies``. A reply of None from ``reply_all`` drops the episode.

    An environment that takes long also defines ``start_replies(episodes) -> concurrent.futures.Future``, whose result
    is that of ``reply_all``. A `SlotEngine` decodes other episodes in the meantime.
    """

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Return an episode's first prompt; ``row`` holds the columns of a data row, with its prompt as ``prompt``."""
        ...

    def reply(self, episode: Episode) -> Reply:
        """Return the reply to the policy's last turn."""
        ...


class MultiTurn(NamedTuple):
    """The environment of a run and the limits of its episodes.

    Attributes:
        environment: replies to the policy's turns.
        max_turns: maximum number of turns of the policy.
        max_tokens: maximum number of tokens after the first prompt, including replies; None for no limit.
    """

    environment: Environment
    max_turns: int = 8
    max_tokens: int | None = None


class Judgement(NamedTuple):
    """A scorer's full judgement of one completion, returned instead of a number.

    Attributes:
        score: the completion's score; None if it cannot be judged.
        parts: further numbers by name (several rewards, costs ...), logged as ``rollout/score_NAME``.
        token_rewards: additional reward of each completion token, including the end token; a shorter list is padded
            with 0. The score stays on the last token.
        feedback: the judgement in words.
        span_rewards: (start, end, reward) of spans of the completion's text, in characters. ``score`` includes their
            sum. Each reward moves from the completion's last token to the last token of its span.
    """

    score: float | None
    parts: Mapping[str, float] = {}
    token_rewards: Sequence[float] | None = None
    feedback: str | None = None
    span_rewards: Sequence[tuple[int, int, float]] = ()


class LeftOut(NamedTuple):
    """Completions that were sampled and scored for a rollout, then dropped.

    Attributes:
        row_ids: number of each completion's data row; empty for a stream.
        scores: score of each completion, shape (completions,); NaN if it cannot be judged.
    """

    row_ids: tuple[int, ...]
    scores: Tensor


class Rollout(NamedTuple):
    """Completions sampled from the policy, with their statistics. Token tensors have shape (episodes, length).

    Attributes:
        sequences: prompts and sampled completions, ragged; one prompt per episode.
        completion_mask: bool, True on the policy's tokens including the end token; False on an environment's tokens.
        old_logprobs: the policy's log-probabilities at the rollout's start, computed by the training forward.
        reference_logprobs: the reference's log-probabilities; None without a reference.
        values: the critic's value of the state before each token; None without a critic.
        scores: score of each completion, shape (episodes,); NaN if it cannot be judged.
        finished: bool, True if the completion has an end token, shape (episodes,).
        group: index of each episode's prompt, int64, shape (episodes,).
        behaviour_logprobs: the sampling engine's log-probabilities; None if nothing was sampled.
        episodes: number of each episode in the run, int64, shape (episodes,); None if nothing was sampled.
        baseline_scores: score to compare each episode's score with (ReMax: of the greedy completion), shape
            (episodes,), or None.
        entropy: entropy of the policy's next-token distribution at the rollout's start, nats; None if unknown.
        parts: named scores of a `Judgement`, each of shape (episodes,); NaN if a completion has none.
        token_rewards: token rewards from the scorer or the environment, without the score; None without any.
        feedback: each completion's judgement in words, or None.
        prompts: each prompt as given by the data.
        texts: text of each completion, without the end token.
        columns: further columns of the data, each a list with one value per episode.
        row_ids: number of each episode's data row; empty for a stream.
        left_out: this rank's completions that dynamic sampling scored and dropped; None in methods that keep all.
        extras: slots, shape (episodes,) or (episodes, length).
        turns: number of the policy's turns, int64, shape (episodes,); None without an environment.
    """

    sequences: Sequences
    completion_mask: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor | None
    values: Tensor | None
    scores: Tensor
    finished: Tensor
    group: Tensor
    behaviour_logprobs: Tensor | None = None
    episodes: Tensor | None = None
    baseline_scores: Tensor | None = None
    entropy: Tensor | None = None
    parts: Mapping[str, Tensor] = {}
    token_rewards: Tensor | None = None
    feedback: tuple[str | None, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    texts: tuple[str, ...] = ()
    columns: Mapping[str, list[Any]] = {}
    row_ids: tuple[int, ...] = ()
    left_out: LeftOut | None = None
    extras: Mapping[str, Tensor] = {}
    turns: Tensor | None = None


class Pairs(NamedTuple):
    """Pairs of samples of a rollout. All tensors have shape (pairs,).

    Attributes:
        chosen: index of the better episode, int64.
        rejected: index of the worse episode of the same prompt, int64.
        target: probability that chosen is better.
        rated_margin: score of chosen minus score of rejected.
        weights: weight of each pair.
    """

    chosen: Tensor
    rejected: Tensor
    target: Tensor
    rated_margin: Tensor
    weights: Tensor

    def at(self, index: Tensor) -> Pairs:
        """Return the pairs at some indices."""
        return Pairs(*(part[index] for part in self))


class Advantages(NamedTuple):
    """Advantages of a rollout, and the critic's targets.

    Attributes:
        advantages: shape (episodes, length), 0 outside the mask.
        returns: regression target of the critic, shape (episodes, length); None without a critic.
        learned: bool, True on tokens that enter the policy loss, shape (episodes, length); None for all tokens.
        cost_returns: for each constrained part, the target of its own critic, shape (episodes, length).
    """

    advantages: Tensor
    returns: Tensor | None
    learned: Tensor | None = None
    cost_returns: Mapping[str, Tensor] = {}


class Aggregation(NamedTuple):
    """An average of token losses: a weighted sum, and its divisor.

    Attributes:
        weights: weight of each token, shape (rows, length), 0 outside the mask.
        divisor: these rows' share of the divisor, a scalar; it is summed over micro-batches and ranks first.
    """

    weights: Tensor
    divisor: Tensor

    def weighted_sum(self, losses: Tensor) -> Tensor:
        """Return the weighted sum of token losses, a scalar; losses of weight 0 may be NaN."""
        return (losses.where(self.weights != 0, losses.new_zeros(())) * self.weights).sum()


class Minibatch(NamedTuple):
    """All episodes of one optimizer step, over all micro-batches and ranks, without gradient.

    For methods that select or rank tokens. Episodes are ordered by their number in the run, so their order does not
    depend on the micro-batch size or the number of ranks. Token tensors have shape (episodes, length).

    Attributes:
        old_logprobs: the policy's log-probabilities at the rollout's start.
        entropy: entropy of the policy's next-token distribution at the rollout's start, nats.
        advantages: advantage of each token.
        completion_mask: bool, True on the policy's tokens.
        learned: bool, True on tokens that enter the policy loss.
        scores: score of each completion, shape (episodes,).
        group: number of the first episode of each completion's prompt, int64, shape (episodes,).
        rows: index of each row of the micro-batch among these episodes, int64, shape (rows,).
        behaviour_logprobs: the sampling engine's log-probabilities; None if nothing was sampled.
        logprobs: the policy's log-probabilities before the update; None unless the class sets
            ``needs_minibatch_logprobs``.
    """

    old_logprobs: Tensor
    entropy: Tensor
    advantages: Tensor
    completion_mask: Tensor
    learned: Tensor
    scores: Tensor
    group: Tensor
    rows: Tensor
    behaviour_logprobs: Tensor | None = None
    logprobs: Tensor | None = None


class PolicyLogprobs(NamedTuple):
    """Input of a policy-gradient loss, for some rows of a rollout. Token tensors have shape (rows, length).

    Attributes:
        logprobs: the policy's current log-probabilities, with gradient, 0 outside the mask.
        old_logprobs: the policy's log-probabilities at the rollout's start.
        reference_logprobs: the reference's log-probabilities; None without a reference.
        entropy: entropy of the policy's next-token distribution in nats, with gradient; None unless asked for.
        advantages: advantage of each token.
        completion_mask: bool, True on the policy's tokens.
        behaviour_logprobs: the sampling engine's log-probabilities; None if nothing was sampled.
        extras: slots, shape (rows,) or (rows, length).
        rollout: these rows of the rollout, truncated to this micro-batch's length, or None.
        minibatch: all rows of this optimizer step; None unless the class sets ``needs_minibatch``.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor | None
    entropy: Tensor | None
    advantages: Tensor
    completion_mask: Tensor
    behaviour_logprobs: Tensor | None = None
    extras: Mapping[str, Tensor] = {}
    rollout: Rollout | None = None
    minibatch: Minibatch | None = None


class CriticValues(NamedTuple):
    """Input of a value loss, for some rows of a rollout. All tensors have shape (rows, length).

    Attributes:
        values: the critic's current values, with gradient.
        old_values: the critic's values when the rollout was collected.
        returns: regression target, advantages + old values.
        completion_mask: bool, True on completion tokens.
    """

    values: Tensor
    old_values: Tensor
    returns: Tensor
    completion_mask: Tensor


class Loss(NamedTuple):
    """An objective's losses and its own metrics.

    Attributes:
        values: loss of each row, shape (rows,), or of each token, shape (rows, length). The module averages the losses
            over tokens, micro-batches and ranks.
        metrics: further values of either shape by name, averaged in the same way and logged.
    """

    values: Tensor
    metrics: Mapping[str, Tensor] = {}


class EnumeratedProblem(NamedTuple):
    """A problem with all completions of all prompts enumerated, from which exact solutions are computed.

    Attributes:
        reference: the reference's probability of each completion, fp64, shape (prompts, completions); rows sum to 1.
        rewards: score of each completion, fp64, shape (prompts, completions).
        preference: probability that the first completion is preferred to the second, fp64, shape
            (prompts, completions, completions).
        lengths: tokens of each completion, int64, shape (prompts, completions).
        teacher: the teacher's probability of each completion, for objectives with a teacher; same shape as
            ``reference``.
    """

    reference: Tensor
    rewards: Tensor
    preference: Tensor
    lengths: Tensor
    teacher: Tensor
