"""Fit the gradient of a loss on the gradients of known mistakes, and name the mistake that matches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from rlhf_lightning.errors import RlhfError
from rlhf_lightning.types import (
    CriticValues,
    DistillationLogits,
    PolicyLogprobs,
    PreferenceLogprobs,
    ProcessScores,
    RankedScores,
    TokenLogprobs,
    UnpairedLogprobs,
)
from rlhf_lightning.verification.mistakes import (
    COMMON,
    Losses,
    Mistake,
    changed,
    is_certain,
    judgement_mistakes,
    logit_mistakes,
    pair_mistakes,
    score_mistakes,
    settings_of,
    step_mistakes,
    token_mistakes,
    with_gap,
)
from rlhf_lightning.verification.policy_mistakes import policy_mistakes, value_mistakes
from rlhf_lightning.verification.subject import differentiate, differentiated, has_outputs

FITS = 1e-6
"""Largest relative residual at which a gradient matches that of a mistake."""


UNFIT = (RuntimeError, TypeError, AttributeError, ValueError, KeyError, AssertionError, RlhfError)
"""Errors of known mistakes that need a field which an input lacks."""

OPTIMIZER = ("learning_rate", "warmup", "adam_eps", "weight_decay", "max_grad_norm", "router_aux_loss_coef")
"""Settings that no loss uses."""


# -- slopes -----------------------------------------------------------------------------------------------------------


def slopes(losses: Losses, given: Any, with_reference: bool = True) -> Tensor:
    """Return the gradient of the summed losses by all log-probabilities, scores or logits of an input, flattened."""
    names = ["values"] if isinstance(given, CriticValues) else [*differentiated(given)]
    if with_reference:
        names += [n for n in given._fields if n.startswith("reference_") and n.endswith("logprobs")]
    slopes = masked_slopes(losses, given, names)[1]
    return torch.cat([slope.flatten() for slope in slopes.values()]).double()


def masked_slopes(losses: Losses, given: Any, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return losses and gradients as `differentiate` does, with masked positions set to 0."""
    grid = getattr(given, "completion_mask", None)

    def masked(one: Any) -> Tensor:
        values = losses(one)
        return torch.where(grid, values, 0.0) if grid is not None and values.shape == grid.shape else values

    values, slopes = differentiate(masked, given, names)
    for name, slope in slopes.items():
        own = mask_of(given, name)
        if own is not None and own.shape == slope.shape:
            slopes[name] = torch.where(own, slope, 0.0)
    return values, slopes


def mask_of(given: Any, name: str) -> Tensor | None:
    """Return the mask of a field's tokens; None for fields without a mask."""
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

FAMILY_MISTAKES: dict[type, Callable[[Any], Iterator[Mistake]]] = {
    PreferenceLogprobs: pair_mistakes,
    UnpairedLogprobs: judgement_mistakes,
    RankedScores: score_mistakes,
    ProcessScores: step_mistakes,
    DistillationLogits: logit_mistakes,
    PolicyLogprobs: policy_mistakes,
    CriticValues: value_mistakes,
}


def known_mistakes(given: Any) -> Iterator[Mistake]:
    """Yield all mistakes to try on an input."""
    yield from COMMON.items()
    yield from FAMILY_MISTAKES.get(type(given), lambda one: iter(()))(given)
    if isinstance(given, PreferenceLogprobs | UnpairedLogprobs | TokenLogprobs):
        yield from token_mistakes(given)


def diagnose(given: Any, losses: Losses, right: Losses, module: Any) -> str:
    """Return the mistake whose gradient matches a loss; empty if the loss is right or no known mistake fits.

    Soft labels and the gradient by the reference are the most informative. If they hide a mistake, the search is
    repeated without them.

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
        return "no gradient flows through the loss"
    factor, residual = misfit(plain, slopes(right, given))
    if residual < FITS and factor > 0:
        return "" if abs(factor - 1) < FITS else f"the loss is {factor:.4g} times the shipped one"
    certain = given._replace(target=torch.ones_like(given.target)) if hasattr(given, "target") else given
    attempts = [(given, True), (certain, True), (certain, False)]
    for place, (one, with_reference) in enumerate(attempts):
        fit = Fit(one, losses, right, module, with_reference)
        factor, residual = fit.misfit(right)
        if residual < FITS and factor > 0:  # the loss is right at this input
            continue
        words = fit.of_a_mistake() or (fit.of_a_number() or fit.of_a_term() if place else "")
        if words:
            return words
    return ""


class Fit:
    """Gradient of a loss at an input, and the search for a matching mistake.

    Args:
        given: the input.
        losses: the loss under verification.
        right: the shipped loss.
        module: the shipped module.
        with_reference: whether the gradient by the reference counts.
    """

    def __init__(self, given: Any, losses: Losses, right: Losses, module: Any, with_reference: bool) -> None:
        self.given, self.right, self.module, self.with_reference = given, right, module, with_reference
        self.measured = self.slopes(losses)

    def slopes(self, losses: Losses) -> Tensor:
        """Return the gradient of a loss at the input."""
        return slopes(losses, self.given, self.with_reference)

    def misfit(self, losses: Losses) -> tuple[float, float]:
        """Return factor and relative residual of a loss; an infinite residual if it cannot be computed."""
        try:
            return misfit(self.measured, self.slopes(losses))
        except UNFIT:
            return 0.0, float("inf")

    def of_a_mistake(self) -> str:
        """Return the mistake that fits; a mistake with a flipped sign only if no other fits."""
        flipped = ""
        for words, change in known_mistakes(self.given):
            factor, residual = self.misfit(partial(self._mistaken, change))
            if residual < FITS and factor > 0:
                return words
            if residual < FITS and "sign" not in words:
                flipped = flipped or f"{words} and the sign is flipped"
        numbers = {name: value for name, value in self._numbers() if self._counts(name)}
        for name, words, value in wrong_settings(numbers):
            with settings_of(self.module, **{name: value}):
                factor, residual = self.misfit(self.right)
            if residual < FITS and factor > 0:
                return words
        for (one, first), (other, second) in itertools.permutations(numbers.items(), 2):
            for words, values in (
                (f"{one} and {other} are exchanged", {one: second, other: first}),
                (f"{other} is taken for {one}", {one: second}),
            ):
                if first != second:
                    with settings_of(self.module, **values):
                        factor, residual = self.misfit(self.right)
                    if residual < FITS and factor > 0:
                        return words
        return flipped

    def _counts(self, name: str) -> bool:
        """Return whether the shipped loss depends on a setting."""
        before = self.slopes(self.right)
        with settings_of(self.module, **{name: 1.7 * getattr(self.module, name) + 0.1}), contextlib.suppress(*UNFIT):
            return misfit(before, self.slopes(self.right))[1] > FITS
        return False

    def _mistaken(self, change: Any, given: Any) -> Tensor:
        losses: Tensor = change(self.right, given, self.module)
        return losses

    def _numbers(self) -> Iterator[tuple[str, float]]:
        """Yield name and value of the numeric settings that a loss may use wrongly."""
        for name, value in dict(self.module.hparams).items():
            if isinstance(value, float) and hasattr(self.module, name) and name not in OPTIMIZER:
                yield name, getattr(self.module, name)

    def of_a_number(self) -> str:
        """Fit mistakes with a number: a factor on log-ratios or scores, or a constant in the margin."""
        forms: list[tuple[str, Callable[[float], Losses]]] = []
        if isinstance(self.given, PreferenceLogprobs | UnpairedLogprobs):
            words = "log-ratios are multiplied by {:.4g}: look at beta"
            forms.append((words, lambda k: lambda g: self.right(changed(g, lambda v, m: k * v))))
            words = "the reference is multiplied by {:.4g}"
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
            if best.fun < 1e-5 and abs(float(best.x)) > 1e-6:  # at 0 every loss is linear
                return words.format(float(best.x)) + self._by_beta(float(best.x))
        return ""

    def _by_beta(self, factor: float) -> str:
        """Say whether a factor is beta or its inverse."""
        beta = getattr(self.module, "beta", None)
        if beta is None:
            return ""
        for words, value in (("beta", beta), ("1 / beta", 1 / beta)):
            if abs(factor - value) < 1e-4 * abs(value):
                return f", which is {words}"
        return ""

    def of_a_term(self) -> str:
        """Fit the shipped loss plus an additional term."""
        base, further = self.slopes(self.right), {}
        for words, (term, _) in TERMS.items():
            with contextlib.suppress(AttributeError, RuntimeError):
                further[words] = self.slopes(term)
        for count in (1, 2):
            for names in itertools.combinations(further, count):
                both = torch.stack([base, *(further[name] for name in names)], -1)
                found = torch.linalg.lstsq(both, self.measured.unsqueeze(-1)).solution.squeeze(-1)
                residual = float((both @ found - self.measured).norm() / self.measured.norm())
                if residual < FITS and float(found[0]) > 0:
                    shares = (found[1:] / found[0]).tolist()
                    told = (_share(name, share) for name, share in zip(names, shares, strict=True))
                    return f"added to the loss: {'; '.join(told)}"
        for words, change in known_mistakes(self.given):
            if not is_certain(words):
                continue
            with contextlib.suppress(*UNFIT):
                wrong = self.slopes(partial(self._mistaken, change))
                for name, slopes in further.items():
                    if "squared" in name:  # two squares differ by a square
                        continue
                    found = torch.linalg.lstsq(torch.stack([wrong, slopes], -1), self.measured.unsqueeze(-1)).solution
                    rest = found[0, 0] * wrong + found[1, 0] * slopes - self.measured
                    if float(rest.norm() / self.measured.norm()) < FITS and float(found[0, 0]) > 0:
                        return f"{words}; added to the loss: {_share(name, float(found[1, 0] / found[0, 0]))}"
        return ""


def wrong_settings(numbers: dict[str, float]) -> Iterator[tuple[str, str, float]]:
    """Yield (setting, description, value) of common mistakes in settings."""
    for name, value in numbers.items():
        yield name, f"{name} has the wrong sign", -value
        yield name, f"{name} counts twice", 2 * value
        yield name, f"{name} counts half", value / 2
        yield name, f"{name} is left out", 0.0
        yield name, f"{name} is taken as 1", 1.0
        if 0 < value < 1:
            yield name, f"{name} is exchanged with 1 - {name}", 1 - value
        if value:
            yield name, f"{name} is inverted", 1 / value
            yield name, f"{name} is squared", value**2


def _share(name: str, share: float) -> str:
    """Describe the weight of an added term, and the harm if its sign is wrong for every method."""
    wrong = TERMS[name][1]
    harm = {1: ", which makes it less likely", -1: ", which makes it more likely"}[wrong] if share * wrong > 0 else ""
    return f"{name}, {share:.4g} times{harm}"


def squared_gaps(given: RankedScores) -> Tensor:
    """Return the squared difference of the two scores of each pair, shape (groups,)."""
    signed = torch.where(given.ranks == 0, given.scores, -given.scores)
    return torch.zeros_like(given.target).to(signed).index_add(0, given.group, signed) ** 2


TERMS: dict[str, tuple[Callable[[Any], Tensor], int]] = {
    "the log-probability of chosen": (lambda g: g.chosen_sequence_logprobs, 1),
    "the mean log-probability of chosen": (lambda g: g.chosen_sequence_logprobs / g.chosen_lengths.clamp_min(1), 1),
    "the log-probability of rejected": (lambda g: g.rejected_sequence_logprobs, -1),
    "the mean log-probability of rejected": (
        lambda g: g.rejected_sequence_logprobs / g.rejected_lengths.clamp_min(1),
        -1,
    ),
    "the log-probability of chosen over the other side's length": (
        lambda g: g.chosen_sequence_logprobs / g.rejected_lengths.clamp_min(1),
        1,
    ),
    "the log-probability of rejected over the other side's length": (
        lambda g: g.rejected_sequence_logprobs / g.chosen_lengths.clamp_min(1),
        -1,
    ),
    "the squared margin": (lambda g: g.margin**2, 0),
    "the log-probability": (lambda g: g.logprobs.sum(-1), 1),
    "the squared scores": (lambda g: g.scores**2, 0),
    "the squared difference of scores": (squared_gaps, 0),
}
"""Additional terms of a loss, and the sign that contradicts the family's purpose; 0 for none."""
