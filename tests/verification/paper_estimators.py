"""Policy-gradient estimators as printed in their papers, over all rollouts of a small world at once.

This second transcription shares no code with the package. Losses are fp64 of shape (rollouts, episodes, length). Their
gradient, weighted by the probabilities of the rollouts, is the exact expectation of a module's update.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.verification.world import END, EnumerableWorld


class Every(NamedTuple):
    """All rollouts, up to the order of samples, with their probabilities.

    Token tensors have shape (rollouts, episodes, length) and are 0 after a completion's end. The number of episodes is
    prompts times samples.
    """

    probability: Tensor
    now: Tensor
    old: Tensor
    reference: Tensor
    mask: Tensor
    scores: Tensor
    ended: Tensor
    greedy: Tensor
    values: Tensor
    old_values: Tensor
    samples: int

    def grouped(self, per_episode: Tensor) -> Tensor:
        """Reshape (rollouts, episodes) to (rollouts, prompts, samples)."""
        return per_episode.view(len(per_episode), -1, self.samples)


class Settings(NamedTuple):
    """Settings of the module."""

    kl_coef: float
    clip: float
    clip_high: float
    cap: float
    value_coef: float
    value_clip: float
    lam: float = 0.95
    epsilon: float = 1e-4
    longest: int = 2


Formula = Callable[[Every, Settings], Tensor]
"""Function that returns the loss of each rollout, shape (rollouts,)."""


def every_rollout(
    world: EnumerableWorld, samples: int, tables: dict[str, Tensor], values: dict[str, Tensor] | None = None
) -> Every:
    """List all rollouts of ``samples`` completions per prompt.

    Args:
        world: the world.
        samples: completions per prompt.
        tables: logits of each prefix, by "now", "old" and "reference".
        values: the critic's value of each prefix, by "now" and "old".
    """
    one_prompt = list(itertools.combinations_with_replacement(range(len(world.completions)), samples))
    orders = torch.tensor([float(math.factorial(samples)) / _repeats(chosen) for chosen in one_prompt])
    picks = torch.tensor(list(itertools.product(range(len(one_prompt)), repeat=world.config.prompts)))
    listed = these_rollouts(world, torch.tensor(one_prompt)[picks].flatten(1), samples, tables, values)
    return listed._replace(probability=orders.double()[picks].prod(-1) * listed.probability)


def these_rollouts(
    world: EnumerableWorld,
    completion: Tensor,
    samples: int,
    tables: dict[str, Tensor],
    values: dict[str, Tensor] | None = None,
) -> Every:
    """Look up rollouts by the indices of their completions, shape (rollouts, episodes)."""
    prefixes, tokens, present = world.walks
    prompt = torch.arange(world.config.prompts).repeat_interleave(samples).expand_as(completion)
    logprobs = {
        name: torch.where(present, torch.log_softmax(table.double(), -1)[prefixes, tokens], 0.0)[prompt, completion]
        for name, table in tables.items()
    }
    mask, old = present[prompt, completion], logprobs["old"].detach()
    zeros = torch.zeros_like(old)
    states = {name: torch.where(mask, of[prefixes[prompt, completion]], 0.0) for name, of in (values or {}).items()}
    return Every(
        probability=old.sum((-1, -2)).exp(),
        now=logprobs["now"],
        old=old,
        reference=logprobs["reference"].detach(),
        mask=mask,
        scores=world.rewards.float().double()[prompt, completion],
        ended=torch.tensor([ids[-1] == END for ids in world.completions])[completion],
        greedy=_greedy_scores(world, tables["old"])[prompt],
        values=states.get("now", zeros),
        old_values=states.get("old", zeros).detach(),
        samples=samples,
    )


def _repeats(chosen: tuple[int, ...]) -> int:
    return math.prod(math.factorial(count) for count in Counter(chosen).values())


def _greedy_scores(world: EnumerableWorld, table: Tensor) -> Tensor:
    """Return the score of each prompt's greedy completion."""
    prefixes, tokens, mask = world.walks
    likeliest = (table.argmax(-1)[prefixes] == tokens) | ~mask
    return world.rewards.float().double()[likeliest.all(-1)]


# -- advantages -------------------------------------------------------------------------------------------------------


def centred(r: Every, scores: Tensor) -> Tensor:
    """r - mean_g."""
    groups = r.grouped(scores)
    return (groups - groups.mean(-1, keepdim=True)).flatten(1)


def standardised(r: Every, scores: Tensor, s: Settings) -> Tensor:
    """(r - mean_g) / (std_g + epsilon), with the unbiased std."""
    deviation = r.grouped(scores).std(-1, keepdim=True)
    return (r.grouped(centred(r, scores)) / (deviation + s.epsilon)).flatten(1)


def whitened(r: Every, advantages: Tensor) -> Tensor:
    """Zero mean and unit variance over all tokens of the rollout, with the biased variance."""
    tokens = r.mask.sum((-1, -2), keepdim=True)
    mean = torch.where(r.mask, advantages, 0.0).sum((-1, -2), keepdim=True) / tokens
    variance = torch.where(r.mask, (advantages - mean) ** 2, 0.0).sum((-1, -2), keepdim=True) / tokens
    return torch.where(r.mask, (advantages - mean) / torch.sqrt(variance + 1e-8), 0.0)


def kl_rewards(r: Every, s: Settings) -> Tensor:
    """-beta k1 of each token."""
    return -s.kl_coef * (r.old - r.reference)


def with_score(r: Every, rewards: Tensor, scores: Tensor) -> Tensor:
    """Add the score on the last token."""
    length = r.mask.sum(-1, keepdim=True)
    last = torch.arange(r.mask.shape[-1]) == length - 1
    return rewards + torch.where(last, scores.unsqueeze(-1), 0.0)


def penalised(r: Every, s: Settings) -> Tensor:
    """score - beta sum_t k1."""
    return r.scores + kl_rewards(r, s).sum(-1)


def to_go(rewards: Tensor) -> Tensor:
    """Sum of the rewards from each token to the end."""
    return rewards.flip(-1).cumsum(-1).flip(-1)


# -- objectives and aggregations --------------------------------------------------------------------------------------


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """max(-A rho, -A clip(rho))."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def token_ratio(r: Every) -> Tensor:
    """pi / pi_old of each token."""
    return torch.exp(r.now - r.old)


def k3(r: Every) -> Tensor:
    """e^-d - 1 + d."""
    d = r.now - r.reference
    return torch.exp(-d) - 1 + d


def over_tokens(r: Every, losses: Tensor) -> Tensor:
    """Token mean (TM)."""
    return torch.where(r.mask, losses, 0.0).sum((-1, -2)) / r.mask.sum((-1, -2))


def over_means(r: Every, losses: Tensor) -> Tensor:
    """Sequence mean of token means (SMTM)."""
    return (torch.where(r.mask, losses, 0.0).sum(-1) / r.mask.sum(-1)).mean(-1)


def over_sums(r: Every, losses: Tensor) -> Tensor:
    """Sequence mean of token sums (SMTS)."""
    return torch.where(r.mask, losses, 0.0).sum(-1).mean(-1)


# -- methods ----------------------------------------------------------------------------------------------------------


def critic_free(r: Every, s: Settings) -> Tensor:
    """Group mean as baseline, KL in the reward, clip, token mean."""
    advantages = centred(r, penalised(r, s)).unsqueeze(-1)
    return over_tokens(r, clipped(token_ratio(r), advantages, s.clip, s.clip_high))


def grpo(r: Every, s: Settings) -> Tensor:
    """2402.03300."""
    advantages = standardised(r, r.scores, s).unsqueeze(-1)
    return over_means(r, clipped(token_ratio(r), advantages, s.clip, s.clip_high) + s.kl_coef * k3(r))


def dr_grpo(r: Every, s: Settings) -> Tensor:
    """2503.20783, with the KL in the reward."""
    losses = clipped(token_ratio(r), centred(r, penalised(r, s)).unsqueeze(-1), s.clip, s.clip_high)
    return torch.where(r.mask, losses, 0.0).sum((-1, -2)) / (r.mask.shape[1] * s.longest)


def dapo(r: Every, s: Settings) -> Tensor:
    """2503.14476: completions of maximum length lose 1, and the upper clip is wider."""
    overlong = torch.where(r.mask.sum(-1) == s.longest, -1.0, 0.0)
    advantages = standardised(r, r.scores + overlong, s).unsqueeze(-1)
    return over_tokens(r, clipped(token_ratio(r), advantages, s.clip, 2 * s.clip) + s.kl_coef * k3(r))


def lite_ppo(r: Every, s: Settings) -> Tensor:
    """2508.08221."""
    scores = penalised(r, s)
    advantages = centred(r, scores) / (scores.std(-1, keepdim=True) + s.epsilon)
    return over_tokens(r, clipped(token_ratio(r), advantages.unsqueeze(-1), s.clip, s.clip_high))


def gspo(r: Every, s: Settings) -> Tensor:
    """2507.18071, one value per completion."""
    ratio = torch.exp((r.now - r.old).sum(-1) / r.mask.sum(-1))
    losses = clipped(ratio, standardised(r, r.scores, s), s.clip, s.clip_high)
    return losses.mean(-1) + over_means(r, s.kl_coef * k3(r))


def cispo(r: Every, s: Settings) -> Tensor:
    """2506.13585."""
    weight = token_ratio(r).detach().clamp(max=s.cap)
    losses = -weight * standardised(r, r.scores, s).unsqueeze(-1) * r.now
    return over_tokens(r, losses + s.kl_coef * k3(r))


def rloo(r: Every, s: Settings) -> Tensor:
    """2402.14740, with the ratio of the whole completion."""
    groups = r.grouped(penalised(r, s))
    others = (groups.sum(-1, keepdim=True) - groups) / (r.samples - 1)
    ratio = torch.exp((r.now - r.old).sum(-1))
    return clipped(ratio, (groups - others).flatten(1), s.clip, s.clip_high).mean(-1)


def reinforce_plus_plus(r: Every, s: Settings) -> Tensor:
    """2501.03262."""
    advantages = whitened(r, to_go(with_score(r, kl_rewards(r, s), r.scores)))
    return over_tokens(r, clipped(token_ratio(r), advantages, s.clip, s.clip_high))


def reinforce_plus_plus_baseline(r: Every, s: Settings) -> Tensor:
    """2501.03262, Section 3: k2 as a loss."""
    advantages = whitened(r, centred(r, r.scores).unsqueeze(-1).expand(r.mask.shape))
    k2 = (r.now - r.reference) ** 2 / 2
    return over_tokens(r, clipped(token_ratio(r), advantages, s.clip, s.clip_high) + s.kl_coef * k2)


def remax(r: Every, s: Settings) -> Tensor:
    """2310.10505."""
    return over_sums(r, -(penalised(r, s) - r.greedy).unsqueeze(-1) * r.now)


def ppo(r: Every, s: Settings) -> Tensor:
    """1707.06347 with the rewards of 1909.08593; unfinished completions score -1."""
    rewards = with_score(r, kl_rewards(r, s), torch.where(r.ended, r.scores, -1.0))
    following = torch.cat([r.old_values[..., 1:], torch.zeros_like(r.old_values[..., :1])], -1)
    errors = torch.where(r.mask, rewards + following - r.old_values, 0.0)
    advantages, carried = torch.zeros_like(errors), torch.zeros_like(errors[..., 0])
    for t in reversed(range(errors.shape[-1])):
        carried = errors[..., t] + s.lam * carried
        advantages[..., t] = carried
    returns = advantages + r.old_values
    near = torch.maximum(torch.minimum(r.values, r.old_values + s.value_clip), r.old_values - s.value_clip)
    value_loss = torch.maximum((r.values - returns) ** 2, (near - returns) ** 2) / 2
    policy_loss = clipped(token_ratio(r), whitened(r, advantages), s.clip, s.clip_high)
    return over_tokens(r, policy_loss + s.value_coef * value_loss)


ESTIMATORS: dict[str, Formula] = {
    "CriticFreeModule": critic_free,
    "GRPOModule": grpo,
    "DrGRPOModule": dr_grpo,
    "DAPOModule": dapo,
    "LitePPOModule": lite_ppo,
    "GSPOModule": gspo,
    "CISPOModule": cispo,
    "RLOOModule": rloo,
    "ReinforcePlusPlusModule": reinforce_plus_plus,
    "ReinforcePlusPlusBaselineModule": reinforce_plus_plus_baseline,
    "ReMaxModule": remax,
    "PPOModule": ppo,
}
"""Formula by class name."""
