"""What a class does wrong, in words: its gradient fitted on the gradients of known mistakes.

Each known mistake is the loss of the shipped class that the objective derives from, with one thing changed. The mistake
whose slopes are those of the class, up to a factor, is named; likewise for shaped rewards and advantages.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import pad

from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.errors import RlhfError
from rlhf_lightning.functional.logprobs import masked_whiten
from rlhf_lightning.functional.policy_gradient import generalized_advantages
from rlhf_lightning.training.collector import select_episodes
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import AlignmentModule, as_loss
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.types import (
    CriticValues,
    PolicyLogprobs,
    PreferenceLogprobs,
    ProcessBatch,
    RankedScores,
    Rollout,
    Step,
    UnpairedLogprobs,
)
from rlhf_lightning.verification.exact import PairPopulation
from rlhf_lightning.verification.mistakes import (
    Losses,
    changed,
    first_token,
    known_mistakes,
    last_token,
    mean_over_tokens,
    settings_of,
    with_gap,
)
from rlhf_lightning.verification.offline_checks import cut, some_rows
from rlhf_lightning.verification.on_policy_checks import Case
from rlhf_lightning.verification.reward_checks import some_judged_rows
from rlhf_lightning.verification.subject import Subject, differentiated, has_outputs, known_statistics

FITS = 1e-6
"""Relative residual below which slopes are those of a mistake."""


ODD = {"beta": 0.37, "label_smoothing": 0.0, "desirable_weight": 1.3, "undesirable_weight": 0.8}
"""Settings while slopes are fitted, at which no mistake looks like another one."""


OPTIMIZER = ("learning_rate", "warmup", "adam_eps", "weight_decay", "max_grad_norm", "router_aux_loss_coef")
"""Settings that no loss reads."""


# -- slopes -----------------------------------------------------------------------------------------------------------


def slopes(losses: Losses, given: Any, with_reference: bool = True) -> Tensor:
    """Return the slopes of the summed losses by all log-probabilities, scores or logits of an input, flattened."""
    names = ["values"] if isinstance(given, CriticValues) else [*differentiated(given)]
    if with_reference:
        names += [n for n in given._fields if n.startswith("reference_") and n.endswith("logprobs")]
    leaves = {n: getattr(given, n).detach().clone().requires_grad_() for n in names if getattr(given, n) is not None}
    values = losses(given._replace(**leaves))
    mask = getattr(given, "completion_mask", None)
    if mask is not None and values.shape == mask.shape:
        values = torch.where(mask, values, 0.0)
    if not values.requires_grad:
        return torch.zeros(sum(leaf.numel() for leaf in leaves.values()), dtype=torch.float64)
    found = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
    parts = []
    for (name, leaf), slope in zip(leaves.items(), found, strict=True):
        own = mask_of(given, name)
        slope = torch.zeros_like(leaf) if slope is None else slope
        parts.append(slope if own is None or own.shape != leaf.shape else torch.where(own, slope, 0.0))
    return torch.cat([part.flatten() for part in parts]).double()


def mask_of(given: Any, name: str) -> Tensor | None:
    """Return the mask of a field's tokens; None for fields without one."""
    side = next((side for side in ("chosen", "rejected") if side in name), "completion")
    found: Tensor | None = getattr(given, f"{side}_mask", None)
    return found


def misfit(measured: Tensor, candidate: Tensor) -> tuple[float, float]:
    """Return the factor of a candidate that fits best, and the relative residual of the fit."""
    size = float(candidate @ candidate)
    if size == 0 or not bool(candidate.isfinite().all()):
        return 0.0, float("inf")
    factor = float(measured @ candidate) / size
    return factor, float((measured - factor * candidate).norm() / measured.norm())


# -- the fit ----------------------------------------------------------------------------------------------------------


def diagnose(given: Any, losses: Losses, right: Losses, module: Any) -> str:
    """Return the mistake whose slopes are those of a loss; empty where the loss is right or no known mistake fits.

    Soft labels and the reference's slopes tell most; where they hide a mistake, it is looked for without them.

    Args:
        given: input of the override point.
        losses: the loss under verification.
        right: the shipped loss.
        module: the shipped module, whose settings mistakes may change.
    """
    if has_outputs(given):  # mistakes are changes of scores
        return ""
    plain = slopes(losses, given)
    if bool(plain.isfinite().all()) and not bool(plain.any()):
        return "no gradient passes the loss"
    factor, residual = misfit(plain, slopes(right, given))
    if residual < FITS and factor > 0:
        return "" if abs(factor - 1) < FITS else f"the loss is {factor:.4g} times the shipped one"
    certain = given._replace(target=torch.ones_like(given.target)) if hasattr(given, "target") else given
    attempts = [(given, True), (certain, True), (certain, False)]
    for place, (one, with_reference) in enumerate(attempts):
        fit = Fit(one, losses, right, module, with_reference)
        factor, residual = fit.misfit(right)
        if residual < FITS and factor > 0:  # what is wrong does not show here
            continue
        words = fit.of_a_mistake() or (fit.of_a_number() or fit.of_a_term() if place else "")
        if words:
            return words
    return ""


class Fit:
    """Slopes of a loss at an input, and what fits them.

    Args:
        given: the input.
        losses: the loss under verification.
        right: the shipped loss.
        module: the shipped module.
        with_reference: whether the reference's slopes count.
    """

    def __init__(self, given: Any, losses: Losses, right: Losses, module: Any, with_reference: bool) -> None:
        self.given, self.right, self.module, self.with_reference = given, right, module, with_reference
        self.measured = self.slopes(losses)

    def slopes(self, losses: Losses) -> Tensor:
        """Return the slopes of a loss at the input."""
        return slopes(losses, self.given, self.with_reference)

    def misfit(self, losses: Losses) -> tuple[float, float]:
        """Return factor and relative residual of a loss; an infinite residual where it cannot be computed."""
        try:
            return misfit(self.measured, self.slopes(losses))
        except (RuntimeError, TypeError, AttributeError, ValueError, KeyError, RlhfError):  # no such field
            return 0.0, float("inf")

    def of_a_mistake(self) -> str:
        """Return the mistake that fits; one whose sign is flipped besides only where no other does."""
        flipped = ""
        for words, change in known_mistakes(self.given):
            factor, residual = self.misfit(partial(self._mistaken, change))
            if residual < FITS and factor > 0:
                return words
            if residual < FITS and "sign" not in words:
                flipped = flipped or f"{words} and the sign is flipped"
        for name, words, value in self._settings():
            with settings_of(self.module, **{name: value}):
                factor, residual = self.misfit(self.right)
            if residual < FITS and factor > 0:
                return words
        numbers = {name: getattr(self.module, name) for name, _, _ in self._settings()}
        for (one, first), (other, second) in itertools.combinations(numbers.items(), 2):
            if first != second:
                with settings_of(self.module, **{one: second, other: first}):
                    factor, residual = self.misfit(self.right)
                if residual < FITS and factor > 0:
                    return f"{one} and {other} are exchanged"
        return flipped

    def _mistaken(self, change: Any, given: Any) -> Tensor:
        losses: Tensor = change(self.right, given, self.module)
        return losses

    def _settings(self) -> Iterator[tuple[str, str, float]]:
        """Yield (setting, words, value) of settings that a loss may have wrong."""
        for name, value in dict(self.module.hparams).items():
            if not isinstance(value, float) or not hasattr(self.module, name) or name in OPTIMIZER:
                continue
            yield name, f"{name} has the wrong sign", -value
            yield name, f"{name} counts twice", 2 * value
            yield name, f"{name} counts half", value / 2
            yield name, f"{name} is left out", 0.0
            yield name, f"{name} is taken as 1", 1.0
            if value:
                yield name, f"{name} is inverted", 1 / value
                yield name, f"{name} is squared", value**2

    def of_a_number(self) -> str:
        """Fit mistakes that have a number: beta, or a gap in the margin."""
        forms: list[tuple[str, Callable[[float], Losses]]] = []
        if isinstance(self.given, PreferenceLogprobs | UnpairedLogprobs):
            words = "log-ratios are multiplied by {:.4g}: look at beta"
            forms.append((words, lambda k: lambda g: self.right(changed(g, lambda v, m: k * v))))
            words = "the reference counts {:.4g} times"
            forms.append((words, lambda k: lambda g: self.right(changed(g, lambda v, m: k * v, "reference"))))
        if isinstance(self.given, PreferenceLogprobs):
            words = "the margin has a constant of {:.4g} nats added"
            forms.append((words, lambda k: lambda g: self.right(with_gap(g, torch.full_like(g.target, k)))))
        if isinstance(self.given, RankedScores):
            words = "scores are multiplied by {:.4g}"
            forms.append((words, lambda k: lambda g: self.right(g._replace(scores=k * g.scores))))
        for words, form in forms:

            def cost(k: float, form: Any = form) -> float:
                return self.misfit(form(k))[1]

            start = min((-6.0, -4, -2, -1, -0.5, 0.05, 0.1, 0.3, 0.5, 0.7, 1.5, 2, 3, 4, 6, 10, 20), key=cost)
            best = minimize_scalar(cost, bracket=(0.8 * start, 1.2 * start), tol=1e-12)
            if best.fun < 1e-5:
                return words.format(float(best.x)) + self._by_beta(float(best.x))
        return ""

    def _by_beta(self, factor: float) -> str:
        """Say where a factor is beta or its inverse."""
        beta = getattr(self.module, "beta", None)
        if beta is None:
            return ""
        for words, value in (("beta", beta), ("1 / beta", 1 / beta)):
            if abs(factor - value) < 1e-4 * abs(value):
                return f", which is {words}"
        return ""

    def of_a_term(self) -> str:
        """Fit the shipped loss plus a further term."""
        base, further = self.slopes(self.right), {}
        for words, term in TERMS.items():
            with contextlib.suppress(AttributeError, RuntimeError):
                further[words] = self.slopes(term)
        for count in (1, 2):
            for names in itertools.combinations(further, count):
                both = torch.stack([base, *(further[name] for name in names)], -1)
                found = torch.linalg.lstsq(both, self.measured.unsqueeze(-1)).solution.squeeze(-1)
                residual = float((both @ found - self.measured).norm() / self.measured.norm())
                if residual < FITS and float(found[0]) > 0:
                    shares = (found[1:] / found[0]).tolist()
                    told = (f"{name}, {share:.4g} times" for name, share in zip(names, shares, strict=True))
                    return f"added to the loss: {'; '.join(told)}"
        return ""


TERMS: dict[str, Callable[[Any], Tensor]] = {
    "the log-probability of chosen": lambda g: g.chosen_sequence_logprobs,
    "the mean log-probability of chosen": lambda g: g.chosen_sequence_logprobs / g.chosen_lengths.clamp_min(1),
    "the log-probability of rejected": lambda g: g.rejected_sequence_logprobs,
    "the squared margin": lambda g: g.margin**2,
    "the mean log-probability of rejected": lambda g: g.rejected_sequence_logprobs / g.rejected_lengths.clamp_min(1),
    "the log-probability": lambda g: g.logprobs.sum(-1),
    "the squared scores": lambda g: g.scores**2,
    "the squared difference of scores": lambda g: squared_gaps(g),
}


def squared_gaps(given: RankedScores) -> Tensor:
    """Return the squared difference of the two scores of each pair, shape (groups,)."""
    signed = torch.where(given.ranks == 0, given.scores, -given.scores)
    return torch.zeros_like(given.target).to(signed).index_add(0, given.group, signed) ** 2


# -- rewards and advantages -------------------------------------------------------------------------------------------


def reward_mistake(case: Any) -> str:
    """Say how shaped rewards differ from the score on the last token less the KL; empty where they do not."""
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
    """Split values into few known parts; say where the parts are others than expected."""
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
    """Return the shipped class's advantages where row k is taken to answer prompt k modulo the number of prompts."""
    tiled = torch.arange(len(rollout.group)) % (int(rollout.group.max()) + 1)
    return torch.as_tensor(right.advantages(rollout._replace(group=tiled), rewards).advantages).detach()


def return_mistake(case: Any, right: Any) -> str:
    """Say how the critic's targets differ from the shipped class's; empty where they do not or nothing fits."""
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
        "returns are the values that the critic has": values,
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
    """Say how advantages differ from the shipped class's; empty where they do not or no known mistake fits."""
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
        "advantages are divided by the group's biased deviation": lambda: over(
            (total - mean) / ((spread / size).sqrt() + 1e-4)
        ),
        "advantages are divided by the group's variance": lambda: over((total - mean) / (spread / (size - 1) + 1e-4)),
        "advantages are divided by the length": lambda: mean_over_tokens(wanted, mask),
        "advantages are multiplied by the length": lambda: wanted * mask.sum(-1, keepdim=True),
        "advantages are cumulated over the tokens": lambda: torch.where(mask, wanted.cumsum(-1), 0.0),
        "the KL is left out of the reward": lambda: of(right, scores, last),
        "scores are clamped": lambda: of(right, scores, rewards - last + last.clamp(-1, 1)),
        "the sign of the score is lost": lambda: of(right, scores, rewards - last + last.abs()),
        "only the sign of the advantage counts": lambda: wanted.sign(),
        "negative advantages are dropped": lambda: wanted.clamp_min(0),
        "the score is left out": lambda: of(right, scores, rewards - last),
        "advantages are centred over all cells, padding too": lambda: wanted - wanted.mean(),
        "completions are grouped as if prompts were tiled, not repeated": lambda: tiled_advantages(
            right, rollout, rewards
        ),
    }
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
            if unlike < FITS and same > 0:  # no mistake in this family
                continue
        except (RuntimeError, ValueError, RlhfError):
            continue
        if residual < FITS and (factor > 0 or "sign" not in words):
            return words if factor > 0 else f"{words}, and their sign is wrong"
    factor, residual = misfit(measured.flatten(), wanted.flatten())
    return f"advantages are {factor:.4g} times the shipped class's" if residual < FITS else ""


# -- all together -----------------------------------------------------------------------------------------------------


def shipped_base(kind: type[AlignmentModule]) -> type[AlignmentModule] | None:
    """Return the nearest shipped objective that a class derives from; None for none, or for a shipped class."""
    shipped = set(objective_classes())
    return next((base for base in kind.__mro__[1:] if base in shipped), None)


def mistakes_of(subject: Subject) -> list[str]:
    """Return the mistakes of a class in words, as far as a known one fits what it does."""
    base = shipped_base(subject.kind)
    if base is None or (hasattr(subject.kind, "adapter") and issubclass(base, OnPolicyModule)):
        return []
    try:
        theirs = Subject(base, subject.world, subject.folder, subject.settings_for(base))
        right = theirs.fresh(moved=True)
    except (RlhfError, TypeError, ValueError):
        return []
    found = statistic_mistakes(subject.module)
    # Only words are lost here, no check: a class may lack what a known mistake would change.
    with contextlib.suppress(RlhfError, RuntimeError, AttributeError, KeyError, IndexError, NotImplementedError):
        found += _of_rollouts(subject, right) if issubclass(base, OnPolicyModule) else _of_batches(subject, right)
    return list(dict.fromkeys(words for words in found if words))


def statistic_mistakes(module: Any) -> list[str]:
    """Say which statistic of tokens is a divergence or an entropy of the wrong sign."""
    return [
        f"the statistic {name} is minus {words}" for name, (words, sign) in known_statistics(module).items() if sign < 0
    ]


def probe_input(subject: Subject, module: Any) -> Any:
    """Return an input of a module's override point at which settings, labels, margins and ratios all matter."""
    if issubclass(subject.kind, OnPolicyModule):
        return _rollout_probe(subject)[1]
    if hasattr(module, "pair_loss_sum"):
        rollout = PairPopulation(module, subject.world).rollout()
        given = module.preference_logprobs(rollout, module.pairs(rollout))
    else:
        judged = subject.kind.batch_type is ProcessBatch
        batch = some_judged_rows(subject) if judged else some_rows(subject)
        given = subject.seen(module, lambda: module.loss_sum(batch, Meter()))
    if given is None:
        return None
    if isinstance(given, PreferenceLogprobs):
        given = given._replace(rated_margin=torch.linspace(0.2, 1.3, len(given.target), dtype=torch.float64))
    elif isinstance(given, RankedScores):
        given = given._replace(margin=torch.linspace(0.2, 1.3, len(given.target), dtype=torch.float64))
    elif isinstance(given, UnpairedLogprobs):
        given = given._replace(reference_point=torch.tensor(0.37, dtype=torch.float64))
    # Three columns of padding, so that the width of the grid equals nothing else.
    plain = {n: p.detach() for n, p in given._asdict().items() if isinstance(p, Tensor)}
    wide = {n: pad(p, (0, 3)) for n, p in plain.items() if p.dim() == 2}
    if not hasattr(given, "extras") or isinstance(given, RankedScores):
        return given._replace(**plain)
    slots = {n: pad(p, (0, 3)) if p.dim() == 2 else p for n, p in given.extras.items()}
    return given._replace(**{**plain, **wide}, extras=slots)


def _rollout_probe(subject: Subject) -> tuple[Case, PolicyLogprobs]:
    """Return a rollout of every group, and its policy loss's input where the policy has moved from the rollout's."""
    case = Case(subject, subject.module)
    mask = case.rollout.completion_mask
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    old = torch.where(mask, case.rollout.old_logprobs + 0.5 * noise, 0.0)
    return case, case.logprobs(old_logprobs=old, behaviour_logprobs=old)


def value_input(subject: Subject) -> CriticValues | None:
    """Return an input of a value loss whose values have moved from the rollout's, some beyond the clip."""
    case, given = _rollout_probe(subject)
    mask, returns = case.rollout.completion_mask, case.advantages.returns
    if case.rollout.values is None or returns is None:
        return None
    width = mask.shape[1]
    old = case.rollout.values[:, :width]
    moved = torch.where(mask, old + case.rollout.old_logprobs - given.old_logprobs, 0.0).detach()
    return CriticValues(moved, old, returns[:, :width].detach(), mask)


def _of_batches(subject: Subject, right: Any) -> list[str]:
    given = probe_input(subject, right)
    if given is None:
        return []
    found = [input_mistake(given, probe_input(subject, subject.module)), *step_mistakes_of(subject, right)]

    def of(module: Any) -> Losses:
        return lambda one: subject.values(module, one)

    odd = {name: value for name, value in ODD.items() if _alike(subject.module, right, name)}
    smoothed = bool(getattr(right, "label_smoothing", 0.0))
    for settings in (odd, {**odd, "label_smoothing": right.label_smoothing}) if smoothed else (odd,):
        with settings_of(subject.module, **settings), settings_of(right, **settings):
            found.append(diagnose(given, of(subject.module), of(right), right))
    return found


def _alike(module: Any, right: Any, name: str) -> bool:
    return isinstance(getattr(right, name, None), float) and getattr(module, name, None) == getattr(right, name)


def input_mistake(right: Any, own: Any) -> str:
    """Say how what reaches a loss differs from what reaches the shipped one; empty where it does not."""
    if own is None or type(own) is not type(right):
        return ""
    for name in right._fields:
        wanted, given = getattr(right, name), getattr(own, name)
        if not isinstance(wanted, Tensor) or not isinstance(given, Tensor):
            continue
        label = name.replace("_", " ")
        if wanted.shape != given.shape:
            return (
                f"{label} has the shape {tuple(given.shape)} in place of {tuple(wanted.shape)}: tokens too many or few"
            )
        if wanted.dtype == torch.bool:
            if bool((wanted != given).any()):
                return f"{label} differs: tokens too many or few"
            continue
        if float((wanted - given).abs().max()) < 1e-9:
            continue
        for other in right._fields:
            values = getattr(right, other)
            alike = isinstance(values, Tensor) and values.shape == given.shape and values.dtype == given.dtype
            if other != name and alike and float((values - given).abs().max()) < 1e-9:
                return f"{label} is {other.replace('_', ' ')}"
        if name == "target" and bool(((given > 0) & (given < 1) & (wanted > 0) & (wanted < 1)).all()):
            factor, residual = misfit(torch.logit(given).double(), torch.logit(wanted).double())
            if residual < FITS:
                return f"the log-odds of the labels are {factor:.4g} times what they should be"
        factor, residual = misfit(given.flatten().double(), wanted.flatten().double())
        return (
            f"{label} is {factor:.4g} times what it should be"
            if residual < FITS
            else f"{label} is not what it should be"
        )
    return ""


def step_mistakes_of(subject: Subject, right: Any) -> list[str]:
    """Say how a micro-batch's loss and a step's count differ from the shipped ones."""
    module = subject.module
    if not hasattr(module, "loss_sum") or hasattr(module, "pair_loss_sum"):
        return []
    batch = some_judged_rows(subject) if subject.kind.batch_type is ProcessBatch else some_rows(subject)
    shares = []
    for size in (2, 4):
        part = cut(batch, [size])[0]
        own, theirs = (subject.gradients(one, partial(one.loss_sum, part, Meter())) for one in (module, right))
        shares.append(misfit(own, theirs))
    found = []
    if all(residual < 1e-5 for _, residual in shares):
        for words, power in (("divided", -1), ("multiplied", 1)):
            factors = [factor for factor, _ in shares]
            if abs(factors[1] / factors[0] - 2.0**power) < 1e-6:
                found.append(f"loss_sum is {words} by the rows of its micro-batch")
    even = batch._replace(weights=torch.ones_like(batch.weights))
    if subject.kind.weighs_rows:
        twice = batch._replace(weights=batch.weights**2)
        own = subject.gradients(module, partial(module.loss_sum, batch, Meter()))
        for words, other in (("are ignored", even), ("count twice", twice)):
            factor, residual = misfit(own, subject.gradients(right, partial(right.loss_sum, other, Meter())))
            if residual < 1e-7 and factor > 0:
                found.append(f"the weights of the rows {words}")
    step = Step((cut(batch, [1])[0],), 1000, 5000)
    counted, wanted = module.loss_count(step), right.loss_count(step)
    if counted != wanted:
        found.append(f"the step counts {counted:g} where all ranks and micro-batches hold {wanted:g}")
    return found


def _of_rollouts(subject: Subject, right: Any) -> list[str]:
    case, given = _rollout_probe(subject)
    found = [reward_mistake(case)]
    with contextlib.suppress(RlhfError, RuntimeError):
        found.append(advantage_mistake(case, right))
        found.append(return_mistake(case, right))
    found.append(
        diagnose(given, lambda one: subject.values(case.module, one), lambda one: subject.values(right, one), right)
    )
    values = value_input(subject) if hasattr(right, "value_loss") else None
    if values is not None:

        def of(module: Any) -> Losses:
            return lambda one: as_loss(module.value_loss(one)).values

        found.append(diagnose(values, of(case.module), of(right), right))
    return found
