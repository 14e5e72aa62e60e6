"""Diagnosis of shaped rewards, advantages and returns: fits on those of known mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_lightning.errors import RlhfError
from rlhf_lightning.functional.logprobs import masked_whiten
from rlhf_lightning.functional.policy_gradient import generalized_advantages
from rlhf_lightning.training.collector import select_episodes
from rlhf_lightning.types import Rollout
from rlhf_lightning.verification.fit import FITS, misfit
from rlhf_lightning.verification.mistakes import first_token, last_token, mean_over_tokens


def reward_mistake(case: Any) -> str:
    """Describe how shaped rewards differ from the score on the last token minus the KL penalty; empty if equal."""
    module, rollout = case.module, case.rollout
    mask, rewards = rollout.completion_mask, case.rewards
    if rewards.shape != mask.shape or module.score_slots(rollout) is None:
        return ""
    score = rollout.scores.to(rewards).unsqueeze(-1)
    parts = {
        "score on the last token": torch.where(last_token(mask), score, 0.0),
        "score on every token": torch.where(mask, score, 0.0),
        "score on the first token": torch.where(first_token(mask), score, 0.0),
        "score one token before the last": torch.where(last_token(mask), score, 0.0).roll(-1, 1),
        "score over the length": torch.where(last_token(mask), score / mask.sum(-1, keepdim=True), 0.0),
        "score over the length on every token": torch.where(mask, score / mask.sum(-1, keepdim=True), 0.0),
        "constant on padding": (~mask).double(),
        "constant on every token": mask.double(),
    }
    if rollout.reference_logprobs is not None:
        d = torch.where(mask, rollout.old_logprobs - rollout.reference_logprobs, 0.0)
        parts |= {"KL (k1)": d, "KL (k2)": d**2 / 2, "KL (k3)": (-d).exp() - 1 + d, "KL without its sign": d.abs()}
        parts["KL of the whole completion on the last token"] = torch.where(
            last_token(mask), d.sum(-1, keepdim=True), 0.0
        )
    expected = {"score on the last token": 1.0}
    if module.kl_place == "reward" and module.kl_coef and rollout.reference_logprobs is not None:
        expected["KL (k1)"] = -float(module.kl_coef)
    early = torch.stack([value * parts[name] for name, value in expected.items()]).sum(0)
    if float((rewards - early.roll(-1, 1)).abs().max()) < 1e-9:
        return "rewards are one token early"
    if float((rewards - early.roll(1, 1)).abs().max()) < 1e-9:
        return "rewards are one token late"
    return _in_parts(rewards, parts, expected, "rewards hold")


def _in_parts(measured: Tensor, parts: dict[str, Tensor], expected: dict[str, float], say: str) -> str:
    """Decompose values into a few known parts; describe the parts if they differ from the expected ones."""
    names = list(expected)
    for further in (None, *[name for name in parts if name not in expected]):
        chosen = [*names, further] if further is not None else names
        for used in (chosen, *[[n for n in chosen if n != left] for left in names]):
            if not used:
                continue
            matrix = torch.stack([parts[name].flatten() for name in used], -1)
            found = torch.linalg.lstsq(matrix, measured.flatten().unsqueeze(-1)).solution.squeeze(-1)
            if float((matrix @ found - measured.flatten()).norm()) > 1e-8 * float(measured.norm()):
                continue
            shares = {name: float(value) for name, value in zip(used, found, strict=True) if abs(float(value)) > 1e-9}
            same = shares.keys() == expected.keys() and all(abs(shares[n] - expected[n]) < 1e-8 for n in expected)
            if same:
                return ""
            told = ", ".join(f"{value:.4g} x {name}" for name, value in shares.items())
            right = ", ".join(f"{value:.4g} x {name}" for name, value in expected.items())
            return f"{say} {told}; they should hold {right}"
    return ""


def in_groups_of_four(rollout: Rollout) -> Rollout:
    """Return four groups of four different completions: in groups of two, methods that select look like mistakes."""
    half = len(rollout.scores) // 2
    rows = [side * half + row for side in (0, 1) for row in (1, 3, 5, 7, 9, 11, 13, 5)]
    chosen = select_episodes(rollout, rows)
    return chosen._replace(group=torch.arange(16) // 4, episodes=torch.arange(16))


def tiled_advantages(right: Any, rollout: Rollout, rewards: Tensor) -> Tensor:
    """Return the shipped class's advantages if row k is assigned to prompt k modulo the number of prompts."""
    tiled = torch.arange(len(rollout.group)) % (int(rollout.group.max()) + 1)
    return torch.as_tensor(right.advantages(rollout._replace(group=tiled), rewards).advantages).detach()


def return_mistake(case: Any, right: Any) -> str:
    """Describe how the critic's targets differ from the shipped class's; empty if equal or nothing fits."""
    rollout, rewards = case.rollout, right.shape_rewards(case.rollout).detach()
    own, theirs = (one.advantages(rollout, rewards) for one in (case.module, right))
    if own.returns is None or theirs.returns is None or rollout.values is None:
        return ""
    if float((own.returns - theirs.returns).abs().max()) < 1e-9:
        return ""
    states, gamma, lam = right.critic_states(rollout), right.gamma, right.lam
    width = own.advantages.shape[1]
    values = torch.where(states, rollout.values, 0.0)
    candidates = {
        "returns are whitened advantages plus values": theirs.advantages + values[:, :width],
        "returns are the class's own advantages plus values": own.advantages + values[:, :width],
        "returns are advantages, without the values": theirs.returns - values,
        "returns are advantages minus values": theirs.returns - 2 * values,
        "returns are the rewards of each token alone": rewards,
        "returns are the critic's values": values,
        "lambda is 0 in the returns": generalized_advantages(rewards, rollout.values, states, gamma, 0.0)[1],
        "gamma is left out of the returns": generalized_advantages(rewards, rollout.values, states, 1.0, lam)[1],
    }
    for words, candidate in candidates.items():
        if candidate.shape == own.returns.shape:
            factor, residual = misfit(
                torch.where(states, own.returns, 0.0).flatten(), torch.where(states, candidate, 0.0).flatten()
            )
            if residual < FITS and abs(factor - 1) < FITS:
                return words
    return ""


def advantage_mistake(case: Any, right: Any) -> str:
    """Describe how advantages differ from the shipped class's; empty if equal or no known mistake fits."""
    module, rollout = case.module, case.rollout
    if getattr(module, "needs_group", False):
        rollout = in_groups_of_four(rollout)
    mask = rollout.completion_mask

    def of(one: Any, scores: Tensor, rewards: Tensor | None = None) -> Tensor:
        changed_rollout = rollout._replace(scores=scores)
        shaped = one.shape_rewards(changed_rollout) if rewards is None else rewards
        return torch.as_tensor(one.advantages(changed_rollout, shaped.detach()).advantages).detach()

    rewards = right.shape_rewards(rollout).detach()
    measured, wanted = of(module, rollout.scores, rewards), of(right, rollout.scores, rewards)
    if float((measured - wanted).abs().max()) < 1e-9:
        return ""
    scores = rollout.scores
    last = torch.where(last_token(mask), scores.to(rewards).unsqueeze(-1), 0.0)

    def over(values: Tensor) -> Tensor:
        return torch.where(mask, values.unsqueeze(-1), 0.0)

    group = rollout.group
    total = rewards.sum(-1)
    size = torch.bincount(group)[group]
    mean = torch.zeros(int(group.max()) + 1).to(total).index_add(0, group, total)[group] / size
    spread = torch.zeros(int(group.max()) + 1).to(total).index_add(0, group, (total - mean) ** 2)[group]
    candidates: dict[str, Callable[[], Tensor]] = {
        "advantages have the wrong sign": lambda: -wanted,
        "the baseline is left out": lambda: over(total),
        "the baseline is the mean of the rollout, not of the group": lambda: over(total - total.mean()),
        "the baseline is the group's mean": lambda: over(total - mean),
        "advantages are standardised over the rollout, not the group": lambda: over(
            (total - total.mean()) / (total.std() + 1e-4)
        ),
        "advantages are divided by the group's biased standard deviation": lambda: over(
            (total - mean) / ((spread / size).sqrt() + 1e-4)
        ),
        "advantages are divided by the group's variance": lambda: over((total - mean) / (spread / (size - 1) + 1e-4)),
        "advantages are divided by the length": lambda: mean_over_tokens(wanted, mask),
        "advantages are multiplied by the length": lambda: wanted * mask.sum(-1, keepdim=True),
        "advantages are summed cumulatively over the tokens": lambda: torch.where(mask, wanted.cumsum(-1), 0.0),
        "advantages sum past rewards instead of future rewards": lambda: torch.where(mask, rewards.cumsum(-1), 0.0),
        "the KL is left out of the reward": lambda: of(right, scores, last),
        "scores are clamped": lambda: of(right, scores, rewards - last + last.clamp(-1, 1)),
        "the sign of the score is lost": lambda: of(right, scores, rewards - last + last.abs()),
        "only the sign of the advantage counts": lambda: wanted.sign(),
        "negative advantages are dropped": lambda: wanted.clamp_min(0),
        "the score is left out": lambda: of(right, scores, rewards - last),
        "advantages are centred over all positions, including padding": lambda: wanted - wanted.mean(),
        "completions are grouped as if prompts were tiled instead of repeated": lambda: tiled_advantages(
            right, rollout, rewards
        ),
    }
    if getattr(right, "baseline", None) == "leave_one_out":
        best = torch.full_like(total, -torch.inf).scatter_reduce(0, group, total, "amax")[group]
        words = "the baseline is the best reward of the group, including the completion's own reward"
        candidates[words] = lambda: over(total - best)
    if rollout.values is not None and hasattr(module, "lam"):
        gamma, lam, values = module.gamma, module.lam, rollout.values

        def gae(g: float, k: float, paid: Tensor = rewards, valued: Tensor = values, whitened: bool = True) -> Tensor:
            found = generalized_advantages(paid, valued, mask, g, k)[0]
            return masked_whiten(found, mask) if whitened and module.whiten_advantages else found

        width = mask.shape[1]
        again = torch.where(last_token(mask), gamma * values[:, :width], 0.0)
        candidates |= {
            "advantages are not whitened": lambda: gae(gamma, lam, whitened=False),
            "the critic's values are left out": lambda: gae(gamma, lam, valued=0 * values),
            "lambda is left out of the advantages": lambda: gae(gamma, 1.0),
            "gamma is left out of the advantages": lambda: gae(1.0, lam),
            "lambda is 0 in the advantages": lambda: gae(gamma, 0.0),
            "rewards are taken one token early": lambda: gae(gamma, lam, pad(rewards[:, 1:], (0, 1))),
            "rewards are taken one token late": lambda: gae(gamma, lam, pad(rewards[:, :-1], (1, 0))),
            "the last state bootstraps from its own value": lambda: gae(gamma, lam, rewards + again),
        }
    for words, candidate in candidates.items():
        try:
            values = candidate().flatten().double()
            factor, residual = misfit(measured.flatten(), values)
            same, unlike = misfit(wanted.flatten(), values)
            if unlike < FITS and same > 0:  # equals the right advantages in this family
                continue
        except (RuntimeError, ValueError, RlhfError):
            continue
        if residual < FITS and (factor > 0 or "sign" not in words):
            return words if factor > 0 else f"{words}, and their sign is wrong"
    factor, residual = misfit(measured.flatten(), wanted.flatten())
    return f"advantages are {factor:.4g} times the shipped class's" if residual < FITS else ""
