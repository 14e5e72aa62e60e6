"""Online DPO: preference pairs sampled from the policy and labelled by a scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.selection import best_and_worst
from rlhf_lightning.micro_batches import cut_micro_batches
from rlhf_lightning.models.layout import select
from rlhf_lightning.models.sharding import most_passes
from rlhf_lightning.training.checkpoint_state import of_all_ranks
from rlhf_lightning.training.collector import Samples, merged_completions, select_episodes, select_prompts
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.pairs import PairObjective, stacked_pairs
from rlhf_lightning.training.returned_loss import loss_of
from rlhf_lightning.training.rollout import RolloutModule
from rlhf_lightning.types import (
    EnumeratedProblem,
    Pairs,
    PolicyLogprobs,
    PreferenceLogprobs,
    PromptBatch,
    Rollout,
)


class OnlineDPOModule(PairObjective, RolloutModule):
    r"""Online DPO: of the policy's samples for each prompt, the best is chosen and the worst rejected.

    loss = -log sigmoid(x), x = beta [log policy(y_w)/reference(y_w) - log policy(y_l)/reference(y_l)], both sampled
    from the policy (Guo et al., 2402.04792, Eq. 4). When policy = reference, the loss is log 2. Samples with equal
    scores form no pair. With ``soft_labels`` the label of a pair is p = sigmoid(score_w - score_l) instead of 1.

    A subclass changes the objective by overriding ``pair_loss`` or ``implicit_reward``, as for a `DPOModule`.

    Target: with ``soft_labels`` reference * exp(score / beta), normalised, which is optimal for every pair, however
    it was sampled. Hard labels always reward larger margins, so no policy is optimal.

    Args:
        beta: KL penalty coefficient; the implicit reward is beta * log(policy / reference).
        soft_labels: read scores as log-odds: chosen is better with probability sigmoid(score difference).
        mini_batch_size: episodes per optimizer step over all ranks, a multiple of the samples per prompt; null uses
            the whole rollout.

    Raises:
        SettingError: a prompt has a single sample, or a minibatch would split the samples of a prompt.
    """

    paper = "Guo et al. 2024, arXiv 2402.04792"
    needs_group: ClassVar[bool] = True
    """Whether the objective compares completions of the same prompt."""

    def __init__(
        self, scorer: Any, beta: float = 0.1, soft_labels: bool = False, temperature: float = 0.9, ppo_epochs: int = 1,
        learning_rate: float = 5e-7, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            scorer=scorer, temperature=temperature, ppo_epochs=ppo_epochs, learning_rate=learning_rate, **kwargs
        )
        self.beta, self.soft_labels = beta, soft_labels

    # -- override points ----------------------------------------------------------------------------------------------

    def pairs(self, rollout: Rollout) -> Pairs:
        """Return the pairs of a rollout: best and worst sample of each prompt, if their scores differ."""
        chosen, rejected = best_and_worst(rollout.scores, rollout.group)
        gap = rollout.scores[chosen] - rollout.scores[rejected]
        ones = torch.ones_like(gap)
        return Pairs(chosen, rejected, torch.sigmoid(gap) if self.soft_labels else ones, gap, ones)

    def by_reference(self, group: Tensor) -> Tensor:
        """Return a mask of the samples drawn from the reference, bool, shape (episodes,); by default all False.

        Args:
            group: prompt index of each sample, int64, shape (episodes,).
        """
        return torch.zeros_like(group, dtype=torch.bool)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(score / beta), normalised; known for soft labels at temperature 1.

        At this policy x equals the score difference of every pair, so the gradient is 0. At any other policy,
        every pair with the completion of the largest beta log(policy / reference) - score lowers that completion.
        """
        known = self.soft_labels and self.sampling.temperature == 1
        return super().target_policy(problem) if known else None

    # -- one rollout --------------------------------------------------------------------------------------------------

    def draw(self, batches: Sequence[PromptBatch]) -> Samples:
        """Sample and score a completion for each prompt, from the policy or the reference."""
        batch = batches[0]
        explores = self.by_reference(batch.group)
        if self.reference is None or not any(of_all_ranks(self, bool(explores.any()))):
            return super().draw(batches)
        own, theirs = (turn.nonzero().squeeze(-1).tolist() for turn in (~explores, explores))
        with self.reference.as_model() as reference:
            explored = self.collector.sample(reference, self.tokenizer, select_prompts(batch, theirs))
        sampled = self.collector.sample(self.policy, self.tokenizer, select_prompts(batch, own))
        both = merged_completions([(sampled, range(len(own))), (explored, range(len(theirs)))])
        places = torch.tensor([*own, *theirs]).argsort().tolist()
        return self.collector.judge(self.tokenizer, merged_completions([(both, places)]), batch)

    def learn(self, rollout: Rollout, batch: PromptBatch, meter: Meter) -> float:
        """Pair the samples and make one update per minibatch; return the last gradient norm."""
        self.check_groups(rollout)
        self.check_rollout(rollout)
        self.measure_rollout(rollout, meter)
        pairs = self.pairs(rollout)
        prompts = len(groups_of(rollout))
        meter.add_ratio("rollout/frac_ties", prompts - len(pairs.chosen), prompts)
        norm = 0.0
        for rows in self.minibatches(rollout, meter):
            norm = self.learn_pairs(rollout, pairs, rows, batch, meter)
        return norm

    def minibatch_units(self, rollout: Rollout) -> dict[int, list[int]]:
        """Return the rows of each prompt by its first episode number; a minibatch never splits these rows."""
        return groups_of(rollout)

    def learn_pairs(self, rollout: Rollout, pairs: Pairs, rows: list[int], batch: PromptBatch, meter: Meter) -> float:
        """Take one optimizer step on the pairs whose chosen sample is in the given rows of the rollout."""
        mine = torch.isin(pairs.chosen, torch.tensor(rows, device=pairs.chosen.device)).nonzero().squeeze(-1)
        count = float(self.sum_over_ranks(torch.tensor(float(len(mine)), device=self.device)))
        lengths = rollout.sequences.lengths
        sides = zip(pairs.chosen[mine].tolist(), pairs.rejected[mine].tolist(), strict=True)
        cells = [2 * max(lengths[chosen], lengths[rejected]) for chosen, rejected in sides]
        size = self.limits.micro_batch_size
        limits = self.limits._replace(micro_batch_size=None if size is None else max(size // 2, 1))
        parts = [pairs.at(mine[torch.tensor(cut)]) for cut in cut_micro_batches(cells, limits)]
        # Pairs of weight 0 let a rank without pairs take part in the collectives.
        parts += [no_pair(rollout)] * (max(most_passes(self.policy, len(parts)), 1) - len(parts))
        losses: list[Callable[[], Tensor]] = [partial(self.pair_loss_sum, rollout, part, meter) for part in parts]
        return self.update(losses + self.further_losses(batch, count, meter), count, meter)

    def preference_logprobs(self, rollout: Rollout, pairs: Pairs) -> PreferenceLogprobs:
        """Compute the policy's log-probabilities of some pairs; the reference's are taken from the rollout."""
        rows = torch.cat([pairs.chosen, pairs.rejected])
        layout = self.lay_out(select(rollout.sequences, rows.tolist()))
        outputs = self.policy_outputs(layout, self.sampling.temperature)
        mask = layout.completion_mask
        reference = None if rollout.reference_logprobs is None else rollout.reference_logprobs[rows, : mask.shape[1]]
        found = stacked_pairs(outputs.logprobs, reference, mask, outputs.extras)
        by_reference = self.by_reference(rollout.group)
        extras = {
            "chosen_by_reference": by_reference[pairs.chosen],
            "rejected_by_reference": by_reference[pairs.rejected],
        }
        return found._replace(
            target=pairs.target,
            rated_margin=pairs.rated_margin,
            weights=pairs.weights,
            extras={**found.extras, **extras},
        )

    def pair_loss_sum(self, rollout: Rollout, pairs: Pairs, meter: Meter) -> Tensor:
        """Return the sum of the losses of a micro-batch's pairs; the update divides it by the minibatch's count."""
        logprobs = self.preference_logprobs(rollout, pairs)
        moved = _moved(rollout, pairs, logprobs)
        if self._untouched:
            self.invariants.check_ratio(moved, meter)
        loss = loss_of(self.preference_loss, logprobs, like=logprobs.target)
        self.measure_pairs(logprobs, loss, int((pairs.weights > 0).sum()), meter)
        self.measure_update(moved, meter)
        return (loss.values * logprobs.weights).sum()

    # -- checks and metrics -------------------------------------------------------------------------------------------

    def check_groups(self, rollout: Rollout) -> None:
        """Refuse prompts with a single sample, and minibatches that would split the samples of a prompt."""
        samples = int(torch.bincount(rollout.group).min())
        if samples < 2:
            raise SettingError(
                "samples-per-prompt",
                f"{type(self).__name__} compares completions of one prompt, but each prompt has only one: set "
                "data.samples_per_prompt to 2 or more",
            )
        if self.mini_batch_size is not None and self.mini_batch_size % samples:
            raise SettingError(
                "parts-groups",
                f"mini_batch_size is {self.mini_batch_size}, which would split the {samples} samples of a prompt: set "
                "it to a multiple of data.samples_per_prompt",
            )

    def check_rollout(self, rollout: Rollout) -> None:
        """Check each sample against the model that it was drawn from."""
        explored = self.by_reference(rollout.group).unsqueeze(-1)
        if rollout.reference_logprobs is not None:
            drawn = torch.where(explored, rollout.reference_logprobs, rollout.old_logprobs)
            rollout = rollout._replace(old_logprobs=drawn)
        super().check_rollout(rollout)

    def measure_rollout(self, rollout: Rollout, meter: Meter) -> None:
        """Record the metrics of the samples drawn from the policy."""
        own = (~self.by_reference(rollout.group)).nonzero().squeeze(-1).tolist()
        super().measure_rollout(select_episodes(rollout, own), meter)


def groups_of(rollout: Rollout) -> dict[int, list[int]]:
    """Return the rows of each prompt's samples, keyed by the number of the prompt's first episode."""
    assert rollout.episodes is not None
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(rollout.group.tolist()):
        rows.setdefault(group, []).append(row)
    episodes = rollout.episodes.tolist()
    return {min(episodes[row] for row in members): members for members in rows.values()}


def no_pair(rollout: Rollout) -> Pairs:
    """Return a pair of weight 0 for a rank without pairs; it adds 0 to the loss and to all metrics."""
    row = torch.zeros(1, dtype=torch.long, device=rollout.scores.device)
    nothing = torch.zeros_like(rollout.scores[row])
    return Pairs(row, row, torch.ones_like(nothing), nothing, nothing)


def _moved(rollout: Rollout, pairs: Pairs, logprobs: PreferenceLogprobs) -> PolicyLogprobs:
    """Return the log-probabilities of both completions of each pair, under the current policy and when sampled."""
    rows = torch.cat([pairs.chosen, pairs.rejected])
    now = torch.cat([logprobs.policy_chosen_logprobs, logprobs.policy_rejected_logprobs])
    mask = torch.cat([logprobs.chosen_mask, logprobs.rejected_mask]) & (pairs.weights > 0).repeat(2).unsqueeze(-1)
    old = rollout.old_logprobs[rows, : mask.shape[1]]
    return PolicyLogprobs(now, old, None, None, torch.zeros_like(old), mask)
