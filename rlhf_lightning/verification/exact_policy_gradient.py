"""An on-policy objective on exact expectations: all groups of completions there are, weighted by their probability."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.training.module import as_loss
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.types import PolicyLogprobs, Rollout
from rlhf_lightning.verification.world import END, EnumerableWorld


class PolicyGradient:
    """The exact expectation of an on-policy module's loss, as a function whose gradient is the estimator's mean.

    Every group of ``group_size`` completions of every prompt is one group of a rollout, weighted by its probability
    under the policy of the moment. Statistics over a whole rollout (whitening) see all groups alike.

    Args:
        module: the module.
        world: the world.
        shuffled: scores that say nothing.
    """

    def __init__(self, module: OnPolicyModule, world: EnumerableWorld, shuffled: bool = False) -> None:
        self.module, self.world = module, world
        self.group_size = 2 if getattr(module, "needs_group", False) else 1
        count, prompts = len(world.completions), world.config.prompts
        groups = list(itertools.product(range(count), repeat=self.group_size))
        self.rows = [(prompt, index) for prompt in range(prompts) for group in groups for index in group]
        self.group = torch.arange(prompts * len(groups)).repeat_interleave(self.group_size)
        self.sequences = world.sequences(self.rows)
        self.index = (torch.tensor([p for p, _ in self.rows]), torch.tensor([i for _, i in self.rows]))
        rewards = torch.zeros_like(world.rewards) if shuffled else world.rewards
        self.scores, self.rewards = rewards[self.index], rewards
        ended = torch.tensor([completion[-1] == END for completion in world.completions])
        self.finished = ended[self.index[1]]

    def loss(self) -> Tensor:
        """Return the expected loss; its value is of no interest, its gradient is the mean of the estimator's."""
        module, layout = self.module, padded_layout(self.sequences)
        outputs = module.policy_outputs(layout, with_entropy=module.entropy_coef != 0)
        old, mask = outputs.logprobs.detach(), layout.completion_mask
        reference = None if module.reference is None else module.reference.logprobs(layout, module.sampling.temperature)
        rollout = Rollout(
            self.sequences, mask, old, reference, torch.zeros_like(old), self.scores, self.finished, self.group,
            behaviour_logprobs=old, episodes=torch.arange(len(self.rows)), baseline_scores=self.baseline_scores(),
        )  # fmt: skip
        rewards = module.shape_rewards(rollout)
        values = rewards.new_zeros(rewards.shape)
        advantages = module.advantages(rollout._replace(values=values), rewards)
        logprobs = PolicyLogprobs(
            outputs.logprobs, old, reference, outputs.entropy, advantages.advantages, mask, behaviour_logprobs=old
        )
        loss = as_loss(module.policy_loss(logprobs)).values
        learned = mask if advantages.learned is None else advantages.learned
        aggregation = module.aggregation(learned)
        per_row = (torch.where(learned, loss, 0.0) * aggregation.weights).sum(-1)
        return (self.likelihood(old.sum(-1)) * per_row).sum() / (self.group_size * self.world.config.prompts)

    def likelihood(self, sequence_logprobs: Tensor) -> Tensor:
        """Return the probability of each row's group, that of all its members, shape (rows,)."""
        total = torch.zeros(int(self.group[-1]) + 1, dtype=sequence_logprobs.dtype)
        return total.index_add(0, self.group, sequence_logprobs).exp()[self.group]

    def baseline_scores(self) -> Tensor:
        """Score of the likeliest token after token, for each row's prompt."""
        with torch.no_grad():
            policy: Any = self.module.policy
            table = policy.model.model.table.weight
        transitions, index = self.world.config.transitions(), {c: i for i, c in enumerate(self.world.completions)}
        found = []
        for prompt in range(self.world.config.prompts):
            ids: list[int] = []
            prefix = int(transitions[0, 1 + self.world.config.tokens + prompt])
            while len(ids) < self.world.config.max_new_tokens and END not in ids:
                ids.append(int(table[prefix].argmax()))
                prefix = int(transitions[prefix, ids[-1]])
            found.append(self.rewards[prompt, index[tuple(ids)]])
        return torch.stack(found)[self.index[0]]
