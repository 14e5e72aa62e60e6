"""Exact expectations of on-policy and online preference objectives, summed over all completions."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import root
from scipy.special import expit, log_softmax
from torch import Tensor

from rlhf_lightning.functional.logprobs import nash_md_logits
from rlhf_lightning.functional.policy_gradient import discounted_returns
from rlhf_lightning.models.layout import Layout, padded_layout
from rlhf_lightning.modules.online_opponents import NashMDModule, XPOModule
from rlhf_lightning.modules.online_preference import OnlineDPOModule
from rlhf_lightning.modules.self_distillation import SelfDistillationModule
from rlhf_lightning.training.gathering import whole_minibatch
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.training.returned_loss import loss_of
from rlhf_lightning.training.rollout import RolloutModule
from rlhf_lightning.types import Advantages, Minibatch, PolicyLogprobs, Rollout
from rlhf_lightning.verification.world import END, EnumerableWorld


class PolicyGradient:
    """The exact expectation of an on-policy module's loss. Its gradient is the mean of the sampled gradient estimator.

    Every group of ``group_size`` completions of every prompt is one group of a rollout. Groups are weighted by their
    probability under the current policy. Statistics over a whole rollout (whitening) weight all groups equally.

    Args:
        module: the module.
        world: the world.
        shuffled: replace all scores by 0, so that they carry no information.
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

    @cached_property
    def layout(self) -> Layout:
        """Layout of all rows, the same in every update."""
        return padded_layout(self.sequences)

    @cached_property
    def transitions(self) -> Tensor:
        """State after each state and token."""
        return self.world.config.transitions()

    def loss(self) -> Tensor:
        """Return the expected loss. Only its gradient is meaningful: it equals the mean of the gradient estimator."""
        module, layout = self.module, self.layout
        outputs = module.policy_outputs(layout, module.sampling.temperature, with_entropy=True)
        old, mask = outputs.logprobs.detach(), layout.completion_mask
        assert outputs.entropy is not None
        reference = None if module.reference is None else module.reference.logprobs(layout, module.sampling.temperature)
        rollout = Rollout(
            self.sequences, mask, old, reference, torch.zeros_like(old), self.scores, self.finished, self.group,
            behaviour_logprobs=old, episodes=torch.arange(len(self.rows)), baseline_scores=self.baseline_scores(),
            entropy=outputs.entropy.detach(), extras={name: part.detach() for name, part in outputs.extras.items()},
        )  # fmt: skip
        rewards = module.shape_rewards(rollout)
        rollout = rollout._replace(values=self.values(rewards.detach(), old))
        advantages = module.advantages(rollout, rewards)
        logprobs = PolicyLogprobs(
            outputs.logprobs, old, reference, outputs.entropy, advantages.advantages, mask, behaviour_logprobs=old,
            extras=outputs.extras, rollout=rollout, minibatch=minibatch_of(module, rollout, advantages),
        )  # fmt: skip
        loss = loss_of(module.policy_loss, logprobs, like=mask).values
        learned = mask if advantages.learned is None else advantages.learned
        aggregation = module.aggregation(learned)
        per_row = (torch.where(learned, loss, 0.0) * aggregation.weights).sum(-1)
        return (self.likelihood(old.sum(-1)) * per_row).sum() / (self.group_size * self.world.config.prompts)

    def values(self, rewards: Tensor, logprobs: Tensor) -> Tensor:
        """Return the exact value of the state before each token under the policy, shape of ``rewards``.

        Values are 0 for groups, without a critic, and in states after the end token.
        """
        module, nothing = self.module, torch.zeros_like(rewards)
        if self.group_size > 1 or not hasattr(module, "value_loss") or rewards.shape != logprobs.shape:
            return nothing
        world, length = self.world, rewards.shape[1]
        prompts, texts = world.config.prompts, world.completions
        togo = discounted_returns(rewards, torch.ones_like(rewards, dtype=torch.bool), module.gamma)
        togo, chance = togo.view(prompts, len(texts), length), logprobs.sum(-1).exp().view(prompts, -1)
        found = torch.zeros_like(togo)
        for place in range(length):
            alike = torch.tensor(
                [[min(len(a), len(b)) > place and a[:place] == b[:place] for b in texts] for a in texts]
            ).to(chance)
            reached = torch.einsum("ij,pj->pi", alike, chance).clamp_min(1e-300)
            found[:, :, place] = torch.einsum("ij,pj,pj->pi", alike, chance, togo[:, :, place]) / reached
        return found.view(-1, length)

    def likelihood(self, sequence_logprobs: Tensor) -> Tensor:
        """Return for each row the probability that all members of its group are drawn, shape (rows,)."""
        total = torch.zeros(int(self.group[-1]) + 1, dtype=sequence_logprobs.dtype)
        return total.index_add(0, self.group, sequence_logprobs).exp()[self.group]

    def baseline_scores(self) -> Tensor:
        """Return the score of the greedily decoded completion of each row's prompt."""
        with torch.no_grad():
            policy: Any = self.module.policy
            table = policy.model.model.table.weight
        transitions, index = self.transitions, {c: i for i, c in enumerate(self.world.completions)}
        found = []
        for prompt in range(self.world.config.prompts):
            ids: list[int] = []
            prefix = int(transitions[0, 1 + self.world.config.tokens + prompt])
            while len(ids) < self.world.config.max_new_tokens and END not in ids:
                ids.append(int(table[prefix].argmax()))
                prefix = int(transitions[prefix, ids[-1]])
            found.append(self.rewards[prompt, index.get(tuple(ids), 0)])  # weights that are NaN decode to nothing
        return torch.stack(found)[self.index[0]]


def minibatch_of(module: OnPolicyModule, rollout: Rollout, advantages: Advantages) -> Minibatch | None:
    """Return the whole rollout as one minibatch for losses that read the minibatch; None for other losses."""
    if not (module.needs_minibatch or module.needs_minibatch_logprobs):
        return None
    rows = list(range(len(rollout.scores)))
    now = rollout.old_logprobs if module.needs_minibatch_logprobs else None  # the current policy is the sampling policy
    return whole_minibatch(module, rollout, advantages, rows, now)


def expectation_of(module: RolloutModule) -> Any:
    """Return the class that computes the expectation of a module's loss."""
    if isinstance(module, OnlineDPOModule):
        return PairPopulation
    if isinstance(module, SelfDistillationModule):
        return SelfTaught
    return Tournament if isinstance(module, NashMDModule) else PolicyGradient


class PairPopulation(PolicyGradient):
    """The exact expectation over two samples per prompt, each drawn by the policy or, in its turn, by the reference.

    Groups with tied scores are included; the module decides how to treat them.
    """

    module: Any

    def __init__(self, module: Any, world: EnumerableWorld, shuffled: bool = False) -> None:
        super().__init__(module, world, shuffled)
        prompts, count = world.config.prompts, len(world.completions)
        self.listed = padded_layout(world.sequences(list(itertools.product(range(prompts), range(count)))))
        self.place = self.index[0] * count + self.index[1]
        self.calls, self.varies = 0, False
        self.kept: Any = None

    def pairs(self, rollout: Rollout) -> Any:
        """Return the module's pairs of a rollout.

        Pairs that do not depend on the policy are cached, and two calls in ten recompute them.
        """
        again = self.varies or self.kept is None or self.calls % 10 < 2
        self.calls += 1
        if again:
            before, self.kept = self.kept, self.module.pairs(rollout)
            if before is not None:
                both = zip(before, self.kept, strict=True)
                self.varies |= any(one.shape != other.shape or bool((one != other).any()) for one, other in both)
        return self.kept

    def rollout(self) -> Rollout:
        """Return every pair of completions of every prompt as one rollout, from the module's own forward pass."""
        with torch.no_grad():
            grids = self.module.forward_statistics(self.listed)
        old, reference = grids["logprobs"][self.place], grids.get("reference_logprobs")
        reference = None if reference is None else reference[self.place]
        drawn = old
        if reference is not None:
            drawn = torch.where(self.module.by_reference(self.group).unsqueeze(-1), reference, old)
        mask = grids["completion_mask"][self.place]
        return Rollout(
            self.sequences, mask, old, reference, None, self.scores, self.finished, self.group,
            behaviour_logprobs=drawn, episodes=torch.arange(len(self.rows)),
        )  # fmt: skip

    def loss(self) -> Tensor:
        """Return the expected loss. Only its gradient is meaningful: it equals the mean of the gradient estimator."""
        module, rollout = self.module, self.rollout()
        pairs = self.pairs(rollout)
        if not len(pairs.chosen):
            return 0.0 * torch.stack([p.sum() for p in module.parameters() if p.requires_grad]).sum()
        logprobs = module.preference_logprobs(rollout, pairs)
        values = loss_of(module.preference_loss, logprobs, like=logprobs.target).values * logprobs.weights
        assert rollout.behaviour_logprobs is not None
        chance = self.likelihood(rollout.behaviour_logprobs.sum(-1))[pairs.chosen]
        return (chance * values).sum() / self.world.config.prompts


class SelfTaught(PolicyGradient):
    """The exact expectation over the policy's completions, each compared with a teacher that reads a longer prompt."""

    module: Any

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """Return every completion of every prompt as one rollout."""
        world, layout = self.world, self.layout
        old, mask = self.module.policy_outputs(layout).logprobs, layout.completion_mask
        texts = tuple(world.text_of(world.completions[index]) for _, index in self.rows)
        return Rollout(
            self.sequences, mask, old, None, None, self.scores, self.finished, self.group,
            prompts=tuple(f"p{prompt}" for prompt, _ in self.rows), texts=texts,
        )  # fmt: skip

    def loss(self) -> Tensor:
        """Return the expected loss."""
        rollout = self.rollout()
        read, _ = self.module.read_by_teacher(rollout)
        chance = self.likelihood(rollout.old_logprobs.sum(-1)) / (self.group_size * self.world.config.prompts)
        return self.module.divergence_sum(self.sequences, read, chance, Meter())


class Tournament(PolicyGradient):
    """The exact expectation over all pairs of a completion of the policy and a completion of the opponent."""

    module: Any

    def __init__(self, module: Any, world: EnumerableWorld, shuffled: bool = False) -> None:
        super().__init__(module, world, shuffled)
        count, prompts = len(world.completions), world.config.prompts
        games = list(itertools.product(range(prompts), range(count), range(count)))
        self.rows = [(prompt, own) for prompt, own, _ in games]
        self.group = torch.arange(len(games))
        self.sequences = world.sequences(self.rows)
        self.index = (torch.tensor([p for p, _ in self.rows]), torch.tensor([i for _, i in self.rows]))
        self.theirs = (self.index[0], torch.tensor([other for _, _, other in games]))
        ended, self.scores = self.finished[:count], self.rewards[self.index]
        self.finished = ended[self.index[1]]

    def likelihood(self, sequence_logprobs: Tensor) -> Tensor:
        """Return the probability of each game, shape (rows,)."""
        return sequence_logprobs.exp() * opponent_of(self.module, self.world)[self.theirs]

    def baseline_scores(self) -> Tensor:
        """Return the score of each game's opponent."""
        return self.rewards[self.theirs]


@torch.no_grad()
def opponent_of(module: Any, world: EnumerableWorld) -> Tensor:
    """Return the probability of each completion of Nash-MD's opponent, shape (prompts, completions).

    Next-token logits are mixed row by row, as the opponent is sampled token by token.
    """
    table = module.policy.model.model.table.weight
    return world.probabilities(nash_md_logits(table, world.reference_table.to(table), module.mixture))


def rest_of(module: Any, world: EnumerableWorld) -> Tensor | None:
    """Return the stationary policy of a shipped class that declares no closed form; None if no source gives it."""
    if not type(module).__module__.startswith("rlhf_lightning."):
        return None
    if type(module) is XPOModule and module.soft_labels:
        found = [xpo_rest(world, prompt, module) for prompt in range(world.config.prompts)]
        solved = [policy for policy in found if policy is not None]
        return torch.tensor(np.array(solved)) if len(solved) == len(found) else None
    if type(module) is NashMDModule and module.kl_coef:
        return module.best_response(world.problem, opponent_of(module, world))
    return None


def xpo_rest(world: EnumerableWorld, prompt: int, module: Any) -> np.ndarray | None:
    """Solve for the policy at which XPO's expected gradient vanishes (2405.21046), in fp64 with SciPy.

    A pair is one sample of the policy and one of the reference; labels are Bradley-Terry in the scores. Return None if
    no stationary point exists: the gradient of the pairs is bounded, and the bonus outweighs it.
    """
    reference = world.problem.reference[prompt].numpy()
    scores, beta, alpha = world.rewards[prompt].numpy(), module.beta, module.alpha
    wanted = expit(scores[:, None] - scores[None, :])

    def slope(logits: np.ndarray) -> np.ndarray:
        logp = log_softmax(logits)
        policy, ratio = np.exp(logp), logp - np.log(reference)
        met = policy[:, None] * reference[None, :] + reference[:, None] * policy[None, :]
        residual = expit(beta * (ratio[:, None] - ratio[None, :])) - wanted
        bonus = alpha * reference * (1 - policy)  # two identical samples form no pair
        by_completion = beta * (met * residual).sum(-1) + bonus
        return by_completion - policy * by_completion.sum() + logits.mean()

    start = np.log(reference) + scores / beta
    found = root(slope, start - start.mean(), tol=1e-13)
    still = np.abs(slope(found.x)).max() < 1e-10
    return np.exp(log_softmax(found.x)) if still else None
