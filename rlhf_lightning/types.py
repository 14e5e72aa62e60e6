"""The glossary: what travels between data, models, losses and modules, as small typed tuples.

Shapes use these letters throughout the package: ``rows`` completions of a batch, ``length`` completion tokens (padded
on the right with zeros), ``pairs`` preference pairs, ``groups`` prompts with several completions.

Two invariants hold everywhere and make the properties below one-liners:

* a ``*_logprobs`` tensor is exactly 0 where its mask is False: its sum over ``length`` is the sequence log-probability;
* masks come from lengths and are True on completion tokens up to and including the end token, never from pad ids.

``extras`` are the slots of an objective: tensors that no field names, with one value for each row or each completion
token. They come from columns of the data (``data_columns``), per-token statistics (``token_statistics``), and scorers.
Micro-batches, packing, ranks and minibatches treat them as fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor

Message = dict[str, Any]
"""One turn of a conversation: ``{"role": "user" | "assistant" | "system" | "tool", "content": text}``.

A turn may also hold ``reasoning_content`` (the thought before an answer), ``tool_calls``, ``tool_call_id``, ``name``
and ``weight`` (of its tokens in the loss, 1 unless given). The first turn holds ``tools``, the descriptions of tools.
"""

Prompt = str | list[Message]
"""What is given to the policy: plain text, or the turns of a conversation."""


class Sequences(NamedTuple):
    """Prompts and the completions that hang on them, ragged: nothing is padded before ``models.layout``.

    Attributes:
        prompts: token ids of each prompt, int64, each of shape (prompt tokens,).
        completions: token ids of each completion, int64, each of shape (completion tokens,).
        parents: for each completion the index of its prompt.
        supervised: for each completion a bool mask over its tokens: True where a loss may look. False on the user
            turns inside a multi-turn demonstration; all True for a sampled or compared completion; True on the ends of
            judged steps alone.
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
        extras: slots by name, see the module's text; shape (rows,).
    """

    sequences: Sequences
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class PreferenceBatch(NamedTuple):
    """Pairs: completions ``0 .. pairs-1`` are chosen, ``pairs .. 2*pairs-1`` rejected; both halves share their prompts.

    Attributes:
        sequences: prompts, and chosen completions stacked on rejected ones.
        target: probability that chosen is the better one, shape (pairs,); 1 for a plain label, 0.5 for a tie.
        margin: rated strength of the preference, shape (pairs,); 0 where unrated.
        weights: weight of each pair, shape (pairs,).
        extras: slots by name, see the module's text; shape (pairs,).
    """

    sequences: Sequences
    target: Tensor
    margin: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class RankedBatch(NamedTuple):
    """Groups of two or more completions of one prompt with their ranks; a pair is a group of two.

    Attributes:
        sequences: prompts (one a group) and their completions.
        ranks: rank of each completion within its group, 0 is best, equal ranks are ties; int64, shape (completions,).
        target: for groups of two, the probability that the better ranked is better, else 1; shape (groups,).
        margin: rated strength of the preference, 0 where unrated; shape (groups,).
        weights: weight of each group, shape (groups,).
        extras: slots by name, see the module's text; shape (groups,).
    """

    sequences: Sequences
    ranks: Tensor
    target: Tensor
    margin: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class ProcessBatch(NamedTuple):
    """Completions whose steps were judged one by one, one completion per prompt.

    Attributes:
        sequences: the completions; ``supervised`` is True on the last token of each judged step and nowhere else.
        labels: for each completion the probability that each judged step is right, in order, each of shape (judged
            steps,); 0 or 1 for plain labels.
        weights: weight of each completion, shape (rows,).
        extras: slots by name, see the module's text; shape (rows,).
    """

    sequences: Sequences
    labels: tuple[Tensor, ...]
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class UnpairedBatch(NamedTuple):
    """Completions that were each judged alone, one per prompt.

    Attributes:
        sequences: the judged completions.
        mismatched: each prompt with a completion that was given to another one, paired when the data was made (KTO's
            estimate of how far the policy is from the reference); None where the module does not ask for it.
        desirable: bool, True where the completion was judged good, shape (rows,).
        weights: weight of each row, shape (rows,).
        extras: slots by name, see the module's text; shape (rows,).
    """

    sequences: Sequences
    mismatched: Sequences | None
    desirable: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class PromptBatch(NamedTuple):
    """Prompts to answer, and everything a scorer may want to know about them.

    Attributes:
        prompts: token ids of each prompt, rendered with the generation prompt; int64, each (prompt tokens,).
        texts: each prompt as the data gave it: plain text or messages.
        columns: the further columns of the data, each a list with one value per prompt (``answer``, ``category`` ...).
        episodes: number of each prompt's episode in the run; sampling is addressed by it. int64, shape (prompts,).
        group: index of the distinct prompt each row answers; equal for the samples of one group. int64, shape
            (prompts,).
        pretraining: text to mix into the policy's updates (PPO-ptx); None where none is mixed.
        extras: slots by name, see the module's text; shape (prompts,).
    """

    prompts: tuple[Tensor, ...]
    texts: tuple[Prompt, ...]
    columns: Mapping[str, list[Any]]
    episodes: Tensor
    group: Tensor
    pretraining: DemonstrationBatch | None = None
    row_ids: tuple[int, ...] = ()
    extras: Mapping[str, Tensor] = {}


class DataNeeds(NamedTuple):
    """What a module asks of the DataModule that feeds it; the defaults are those of use without a module.

    Attributes:
        batch_type: class of its batches; None takes the DataModule's first.
        columns: columns of numbers that arrive in ``extras``.
        ties: keep pairs whose completions were judged equal.
        mismatched: give each prompt another row's completion too.
        step_separator: text between two judged steps.
        packed: rows are laid end to end, so that the sum of their tokens bounds a micro-batch.
        predicts_prompts: prediction answers prompts; otherwise it scores completions.
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
    """A module that says what it asks of its DataModule."""

    @property
    def data_needs(self) -> DataNeeds:
        """What the module asks for."""
        ...


class MicroBatchLimits(NamedTuple):
    """Bounds of one forward and backward pass on a rank. They change memory and speed, and no gradient.

    Attributes:
        micro_batch_size: most rows (demonstrations, pairs, groups, episodes); None for no bound.
        max_tokens: most tokens, padding included where rows are not packed; a longer single row stands alone. None for
            no bound.
    """

    micro_batch_size: int | None = None
    max_tokens: int | None = None


NO_LIMITS = MicroBatchLimits()

Batch = TypeVar("Batch")


class Step(NamedTuple, Generic[Batch]):
    """What a DataLoader yields for one optimizer step: this rank's share, already cut into micro-batches.

    A step of prompts is one rollout. Its micro-batches hold prompts to sample for; the module cuts what it sampled by
    ``limits``.

    Attributes:
        micro_batches: batches that each fit in memory; every rank gets the same number.
        rows: rows (pairs, groups, prompts) of this step over all ranks and micro-batches.
        tokens: supervised completion tokens of this step over all ranks and micro-batches.
        row_ids: numbers of those rows, counted from 0 among the ones that the data kept; of prompts once each, however
            many samples they get; empty for a stream, which numbers nothing.
        limits: bounds of each forward pass; fixed data is cut by them already.
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
        extras: slots by name, see the module's text; shape (rows,) or (rows, length).
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
    """What a divergence of a student from its teacher may look at, for some completion tokens, over the vocabulary that
    both share.

    Attributes:
        student_logits: the student's logits of the next token, with gradient, fp32 or wider, shape (tokens,
            vocabulary).
        teacher_logits: the teacher's, without gradient, same shape.
        targets: id of each completion token, int64, shape (tokens,).
    """

    student_logits: Tensor
    teacher_logits: Tensor
    targets: Tensor


class PreferenceLogprobs(NamedTuple):
    """What a loss on preference pairs may look at. Token tensors are (pairs, length) and 0 under the mask.

    Attributes:
        policy_chosen_logprobs: the policy's log-probabilities of the chosen completions.
        policy_rejected_logprobs: the policy's log-probabilities of the rejected completions.
        reference_chosen_logprobs: the reference's, without gradient; None where the module has no reference.
        reference_rejected_logprobs: the reference's, without gradient; None where the module has no reference.
        chosen_mask: bool, True on the chosen completion's tokens.
        rejected_mask: bool, True on the rejected completion's tokens.
        target: probability that chosen is the better one, shape (pairs,).
        rated_margin: rated strength of the preference, 0 where unrated, shape (pairs,).
        weights: weight of each pair, shape (pairs,).
        extras: slots by name, see the module's text; shape (pairs,) or (pairs, length). Slots of one side are
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
        """Return the same pairs with chosen and rejected exchanged, slots of one side included; p becomes 1 - p."""
        fields = {_other_side(name): value for name, value in self._asdict().items()}
        extras = {_other_side(name): value for name, value in self.extras.items()}
        return PreferenceLogprobs(**{**fields, "target": 1 - self.target, "extras": extras})

    def where(self, kept: Tensor, other: PreferenceLogprobs) -> PreferenceLogprobs:
        """Return these pairs where ``kept`` is True, shape (pairs,), and the pairs of ``other`` elsewhere."""

        def chosen(own: Tensor | None, theirs: Tensor | None) -> Any:
            if own is None or theirs is None:
                return None
            return own.where(kept if own.dim() == 1 else kept.unsqueeze(-1), theirs)

        names = [name for name in self._fields if name != "extras"]
        fields = {name: chosen(getattr(self, name), getattr(other, name)) for name in names}
        extras = {name: chosen(values, other.extras[name]) for name, values in self.extras.items()}
        return PreferenceLogprobs(**fields, extras=extras)

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
        """log policy(chosen) - log reference(chosen), shape (pairs,); without a reference the first term alone."""
        policy = self.chosen_sequence_logprobs
        return policy if self.reference_chosen_logprobs is None else policy - self.reference_chosen_logprobs.sum(-1)

    @property
    def rejected_logratio(self) -> Tensor:
        """log policy(rejected) - log reference(rejected), shape (pairs,)."""
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
    """Return the name of the field or slot that has the same of the other completion of a pair."""
    sides = {"chosen": "rejected", "rejected": "chosen"}
    return "_".join(sides.get(word, word) for word in name.split("_"))


class UnpairedLogprobs(NamedTuple):
    """What a loss on completions judged alone may look at. Token tensors are (rows, length) and 0 under the mask.

    Attributes:
        policy_logprobs: the policy's log-probabilities of the completions.
        reference_logprobs: the reference's, without gradient; None where the module has no reference.
        completion_mask: bool, True on completion tokens.
        desirable: bool, True where the completion was judged good, shape (rows,).
        weights: weight of each row, shape (rows,).
        reference_point: what a row's reward is compared with, taken over the whole optimizer step without gradient
            (KTO's z0 in nats, BCO's delta in reward units), shape ().
        extras: slots by name, see the module's text; shape (rows,) or (rows, length).
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
        """log policy - log reference of each completion, shape (rows,); without a reference the first term alone."""
        policy = self.policy_logprobs.sum(-1)
        return policy if self.reference_logprobs is None else policy - self.reference_logprobs.sum(-1)


class RankedScores(NamedTuple):
    """What a loss on ranked completions may look at.

    Attributes:
        scores: the reward model's score of each completion, shape (completions,).
        group: index of the group (prompt) each completion belongs to, int64, shape (completions,).
        ranks: rank within the group, 0 is best, equal ranks are ties; int64, shape (completions,).
        target: probability that the better ranked of a pair is better, shape (groups,); used for groups of two.
        margin: rated strength of the preference, shape (groups,).
        weights: weight of each group, shape (groups,).
        extras: slots by name, see the module's text; shape (groups,).
    """

    scores: Tensor
    group: Tensor
    ranks: Tensor
    target: Tensor
    margin: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class ProcessScores(NamedTuple):
    """What a loss on judged steps may look at.

    Attributes:
        scores: the reward model's score of each step, read at its last token: log-odds that it is right; shape
            (steps,).
        labels: probability that each step is right, shape (steps,).
        row: index of the completion each step belongs to, int64, shape (steps,).
        position: number of each step among its completion's judged ones, 0 is the first; int64, shape (steps,).
        weights: weight of each completion, shape (rows,).
        extras: slots by name, see the module's text; shape (rows,).
    """

    scores: Tensor
    labels: Tensor
    row: Tensor
    position: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = {}


class Episode(NamedTuple):
    """A conversation between the policy and an environment, as far as it has come.

    Attributes:
        row: the data row that it began with.
        messages: the turns so far, the policy's last one included.
        ids: token ids after the first prompt: the policy's turns as it drew them, and the environment's replies.
        learned: for each of ``ids`` whether the policy drew it.
        number: number of the episode in the run; random numbers are addressed by it and the position in ``ids``.
    """

    row: Mapping[str, Any]
    messages: Sequence[Message]
    ids: Sequence[int]
    learned: Sequence[bool]
    number: int


class Reply(NamedTuple):
    """What an environment says after a turn of the policy.

    Attributes:
        text: the reply, rendered by the chat template; None where ``ids`` gives its tokens.
        ids: token ids of the reply; the policy sees them and does not learn them.
        reward: reward of the turn, added to the turn's last token.
        done: whether the episode ends here, without the reply.
    """

    text: str | None = None
    ids: Sequence[int] | None = None
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """What the policy acts in: prompts in, replies out."""

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Return the first prompt of an episode."""
        ...

    def reply(self, episode: Episode) -> Reply:
        """Return what comes back after the policy's turn."""
        ...


class Judgement(NamedTuple):
    """All that a scorer says of one completion. A scorer may return it in place of a number.

    Attributes:
        score: the completion's number; None where it cannot be judged.
        parts: further numbers by name (several rewards, costs ...), logged as ``rollout/score_NAME``.
        token_rewards: reward of each completion token, the end token included; fewer are filled up with 0. None where
            there are none. They are added to the rewards of the tokens; the score stays on the last token.
        feedback: the judgement in words.
    """

    score: float | None
    parts: Mapping[str, float] = {}
    token_rewards: Sequence[float] | None = None
    feedback: str | None = None


class LeftOut(NamedTuple):
    """Completions that were sampled and judged for a rollout, and that it does not learn from.

    Attributes:
        row_ids: number of the data row that each one's prompt comes from; empty for a stream.
        scores: the scorer's score of each, shape (completions,); NaN where it cannot be judged.
    """

    row_ids: tuple[int, ...]
    scores: Tensor


class Rollout(NamedTuple):
    """Completions sampled from the policy, and all that is known about them. Token tensors are (episodes, length).

    Attributes:
        sequences: prompts and sampled completions, ragged; one prompt per episode.
        completion_mask: bool, True on the policy's tokens up to and including the end token. False on padding, and on
            tokens that an environment wrote between the policy's turns.
        old_logprobs: the policy's log-probabilities at the rollout's start, by the trainer's forward.
        reference_logprobs: the reference's log-probabilities; None where the module has no reference.
        values: the critic's value of the state before each token; None where the module has no critic.
        scores: the scorer's score of each completion, shape (episodes,); NaN where it cannot be judged.
        finished: bool, True where the completion ended by itself (end token), shape (episodes,).
        group: index of the prompt each episode answers, int64, shape (episodes,).
        behaviour_logprobs: what the sampling engine drew with; None where nothing was sampled.
        episodes: number of each episode in the run, int64, shape (episodes,); None where nothing was sampled.
        baseline_scores: score that each episode's is compared with (ReMax: the greedy completion's), shape (episodes,);
            None in methods without.
        entropy: entropy of the policy's next-token distribution at the rollout's start, nats; None where unknown.
        parts: named scores of a `Judgement`, each of shape (episodes,); NaN where a completion has none.
        token_rewards: reward of each token by the scorer or the environment, beside the score; None without any.
        feedback: judgement in words of each completion; None where there is none.
        prompts: each prompt as the data gave it.
        texts: text of each completion, without the end token.
        columns: further columns of the data, each a list with one value per episode.
        row_ids: number of the data row that each episode's prompt comes from; empty for a stream.
        left_out: this rank's completions that dynamic sampling judged and dropped; None in methods that keep all.
        extras: slots by name, see the module's text; shape (episodes,) or (episodes, length).
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


class Pairs(NamedTuple):
    """Which samples of a rollout are compared. All have shape (pairs,).

    Attributes:
        chosen: episode that is the better one, int64.
        rejected: episode of the same prompt that is the worse one, int64.
        target: probability that chosen is the better one.
        rated_margin: how much higher chosen scored.
        weights: weight of each pair.
    """

    chosen: Tensor
    rejected: Tensor
    target: Tensor
    rated_margin: Tensor
    weights: Tensor

    def at(self, index: Tensor) -> Pairs:
        """Return the pairs at the given places."""
        return Pairs(*(part[index] for part in self))


class Advantages(NamedTuple):
    """What a rollout teaches.

    Attributes:
        advantages: shape (episodes, length), 0 under the mask.
        returns: the critic's regression target, shape (episodes, length); None without a critic.
        learned: bool, True on the tokens that are learned from, shape (episodes, length); None for all.
    """

    advantages: Tensor
    returns: Tensor | None
    learned: Tensor | None = None


class Aggregation(NamedTuple):
    """Weights of token losses, and what their weighted sum is divided by.

    Attributes:
        weights: weight of each token, shape (rows, length), 0 under the mask.
        divisor: of these rows, a scalar; summed over micro-batches and ranks before it divides.
    """

    weights: Tensor
    divisor: Tensor

    def weighted_sum(self, losses: Tensor) -> Tensor:
        """Return the weighted sum of token losses, a scalar; losses of weight 0 may be NaN."""
        return (losses.where(self.weights != 0, losses.new_zeros(())) * self.weights).sum()


class Minibatch(NamedTuple):
    """All episodes of one optimizer step, of all micro-batches and ranks, without gradient.

    For methods that select or rank tokens: the same view for any micro-batch size and number of ranks. Episodes are
    ordered by their number in the run. Token tensors are (episodes, length).

    Attributes:
        old_logprobs: the policy's log-probabilities at the rollout's start.
        entropy: entropy of the policy's next-token distribution at the rollout's start, nats.
        advantages: advantage of each token.
        completion_mask: bool, True on the policy's tokens.
        learned: bool, True on the tokens that are learned from.
        scores: score of each completion, shape (episodes,).
        group: number of the first episode of each completion's prompt, int64, shape (episodes,).
        rows: place of each row of the micro-batch among these episodes, int64, shape (rows,).
        behaviour_logprobs: what the sampling engine drew with; None where nothing was sampled.
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
    """What a policy-gradient loss may look at, for some rows of a rollout. Token tensors are (rows, length).

    Attributes:
        logprobs: the policy's log-probabilities now, with gradient, 0 under the mask.
        old_logprobs: the policy's at the rollout's start.
        reference_logprobs: the reference's; None where the module has no reference.
        entropy: entropy of the policy's next-token distribution in nats, with gradient; None unless asked for.
        advantages: advantage of each token.
        completion_mask: bool, True on the policy's tokens.
        behaviour_logprobs: what the sampling engine drew with; None where nothing was sampled.
        extras: slots by name, see the module's text; shape (rows,) or (rows, length).
        rollout: these rows of the rollout, cut to this micro-batch's length; None where there is no rollout.
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
    """What a value loss may look at, for some rows of a rollout. All tensors are (rows, length).

    Attributes:
        values: the critic's values now, with gradient.
        old_values: the critic's values when the rollout was collected.
        returns: regression target, advantages + old values.
        completion_mask: bool, True on completion tokens.
    """

    values: Tensor
    old_values: Tensor
    returns: Tensor
    completion_mask: Tensor


class Loss(NamedTuple):
    """What an objective returns when it has metrics of its own.

    Attributes:
        values: one loss per row, shape (rows,), or per token, shape (rows, length). Reduction over tokens,
            micro-batches and ranks belongs to the module, never to the objective.
        metrics: further values of either shape, reduced alike and logged under their names.
    """

    values: Tensor
    metrics: Mapping[str, Tensor] = {}


class EnumeratedProblem(NamedTuple):
    """A world so small that every completion of every prompt is listed: what an objective's exact solution is made of.

    Attributes:
        reference: the reference's probability of each completion, fp64, shape (prompts, completions); rows sum to 1.
        rewards: score of each completion, fp64, shape (prompts, completions).
        preference: probability that the first completion is preferred to the second, fp64, shape
            (prompts, completions, completions).
        lengths: tokens of each completion, int64, shape (prompts, completions).
        teacher: the teacher's probability of each completion, for objectives that have one; like ``reference``.
    """

    reference: Tensor
    rewards: Tensor
    preference: Tensor
    lengths: Tensor
    teacher: Tensor
