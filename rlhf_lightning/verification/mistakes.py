"""Known mistakes, each written as a shipped loss with one change.

`diagnosis` fits the gradient of an objective on the gradients of these mistakes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.types import (
    DistillationLogits,
    PreferenceLogprobs,
    ProcessScores,
    RankedScores,
    UnpairedLogprobs,
)

Losses = Callable[[Any], Tensor]
Mistake = tuple[str, Any]
"""Description of a mistake, and its losses as a function of the shipped loss, the input and the shipped module."""


CERTAIN = (
    "wrong sign", "sign is wrong", "sign is flipped", "sign of the margin is lost", "sign of the advantage is lost",
    "sign of the score is lost", "sign of the loss", "the label is ignored", "is rounded", "is inverted", "are "
    "inverted", "is reversed", "are reversed", "swapped pair is added",
    "a sigmoid is applied to the label", "the label is squared", "both labels count alike", "no gradient flows through",
    "left out of the margin", "chosen and rejected", "the rated margin is added", "the rated margin divides",
    "without the first token", "without the last token", "from the first token only", "from the last token only",
    "summed cumulatively", "divided by the padded width", "length minus one", "length plus one", "added instead of "
    "subtracted",
    "mean of the batch", "its place in the batch", "weight of each row counts twice", "clamped at 0",
    "are exchanged", "over the batch", "counts as desirable", "steps are ignored",
    "beta counts twice in the reference point", "labels are those of", "only the student's logits",
    "only the teacher's logits", "label smoothing counts twice", "the other side's length", "by the chosen length",
    "by the rejected length", "lets a gradient through",
    "sigmoid is applied twice", "multiplies the gap", "the advantage is squared", "over the micro-batch",
    "the advantage has a gradient", "ratio is inverted", "the probability is used instead of its logarithm",
    "to the reference instead of the old policy", "the smaller of", "only the clipped ratio counts",
    "the ratio counts twice", "negative advantages are dropped", "including padding", "the score is left out",
    "multiplied by the length", "regressed on the old values", "error is not squared", "rows of its micro-batch",
    "weights of the rows", "the step counts", "is minus", "is exchanged with", "is taken for",
    "which makes it",
    ", which is beta", ", which is 1 / beta", "beta is squared", "beta is inverted", "sum past rewards",
    "own reward", "side of the clip is missing",
)  # fmt: skip
"""Parts of the descriptions of mistakes that no method makes by design. The other mistakes, such as a missing reference
or a margin with a constant, are losses of some paper: they are named if a check fails, but are no failure by
themselves.
"""


def is_certain(words: str) -> bool:
    """Return whether no method makes a mistake by design."""
    return any(part in words for part in CERTAIN)


# -- changes to an input ----------------------------------------------------------------------------------------------

PAIR_SIDES = (("chosen", "chosen_mask"), ("rejected", "rejected_mask"))


def sides_of(given: Any) -> tuple[tuple[str, str, str], ...]:
    """Return (policy, reference, mask) field names of an input."""
    if isinstance(given, PreferenceLogprobs):
        return tuple((f"policy_{s}_logprobs", f"reference_{s}_logprobs", mask) for s, mask in PAIR_SIDES)
    if isinstance(given, UnpairedLogprobs):
        return (("policy_logprobs", "reference_logprobs", "completion_mask"),)
    return (("logprobs", "", "completion_mask"),)


def changed(given: Any, change: Callable[[Tensor, Tensor], Tensor], models: str = "both", sides: str = "both") -> Any:
    """Return an input with changed log-probabilities of the policy, the reference or both, for some or all sides."""
    fields = {}
    for policy, reference, mask in sides_of(given):
        if sides != "both" and sides not in mask:
            continue
        for kind, name in (("policy", policy), ("reference", reference)):
            if models in (kind, "both") and name and getattr(given, name) is not None:
                fields[name] = change(getattr(given, name), getattr(given, mask))
    return given._replace(**fields)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Return values divided by the number of tokens of their row."""
    return values / mask.sum(-1, keepdim=True).clamp_min(1)


def first_token(mask: Tensor) -> Tensor:
    """Return a mask of the first token of each row."""
    return mask & (mask.cumsum(-1) == 1)


def last_token(mask: Tensor) -> Tensor:
    """Return a mask of the last token of each row."""
    return mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))


TOKENS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "averaged over tokens instead of summed": mean_over_tokens,
    "divided by the padded width": lambda v, m: v / v.shape[1],
    "multiplied by the length": lambda v, m: v * m.sum(-1, keepdim=True),
    "divided by the square root of the length": lambda v, m: v / m.sum(-1, keepdim=True).clamp_min(1).sqrt(),
    "divided by the length minus one": lambda v, m: v / (m.sum(-1, keepdim=True) - 1).clamp_min(1),
    "divided by the length plus one": lambda v, m: v / (m.sum(-1, keepdim=True) + 1),
    "taken without the first token": lambda v, m: v * ~first_token(m),
    "taken without the last token (the end token)": lambda v, m: v * ~last_token(m),
    "taken from the first token only": lambda v, m: v * first_token(m),
    "taken from the last token only": lambda v, m: v * last_token(m),
    "turned into probabilities": lambda v, m: torch.where(m, v.exp(), 0.0),
    "summed cumulatively over the tokens": lambda v, m: torch.where(m, v.cumsum(-1), 0.0),
}
"""Common mistakes in the tokens of a completion; each completes "the log-probabilities of ... are"."""


def token_mistakes(given: Any) -> Iterator[Mistake]:
    """Yield mistakes in how token values are reduced to one value per completion."""
    has_reference = any(r and getattr(given, r) is not None for _, r, _ in sides_of(given))
    whose = {"both": "log-ratios are" if has_reference else "log-probabilities are"}
    if has_reference:
        whose |= {"policy": "the policy's log-probabilities are", "reference": "the reference's log-probabilities are"}
    for models, subject in whose.items():
        for words, change in TOKENS.items():
            yield f"{subject} {words}", lambda f, g, m, c=change, w=models: f(changed(g, c, w))
    if isinstance(given, PreferenceLogprobs):
        for side in ("chosen", "rejected"):
            for words, change in TOKENS.items():
                yield (
                    f"{whose['both']} {words}, for {side} only",
                    lambda f, g, m, c=change, s=side: f(changed(g, c, "both", s)),
                )
    for words, change in (
        ("the reference is left out", lambda v, m: 0 * v),
        ("the reference's log-probability is added instead of subtracted", lambda v, m: -v),
        ("the reference counts twice", lambda v, m: 2 * v),
        ("the reference counts half", lambda v, m: v / 2),
    ):
        if not has_reference:
            break
        yield words, lambda f, g, m, c=change: f(changed(g, c, "reference"))
        for side in ("chosen", "rejected") if isinstance(given, PreferenceLogprobs) else ():
            yield f"{words}, for {side} only", lambda f, g, m, c=change, s=side: f(changed(g, c, "reference", s))
    yield "no gradient flows through the policy's log-probabilities", lambda f, g, m: f(changed(g, _detach, "policy"))


def _detach(values: Tensor, mask: Tensor) -> Tensor:
    return values.detach()


# -- mistakes by family -----------------------------------------------------------------------------------------------


def put(**changes: Callable[[Any], Any]) -> Any:
    """Return the mistake of a loss that gets changed fields."""
    return lambda f, g, m: f(g._replace(**{name: change(g) for name, change in changes.items()}))


def _whole_batch(f: Losses, g: Any, m: Any) -> Tensor:
    values = f(g)
    return values.mean().expand(len(values))


COMMON: dict[str, Any] = {
    "the sign of the loss is flipped": lambda f, g, m: -f(g),
    "each loss is the mean of the batch": _whole_batch,
    "each loss is weighted by its place in the batch": lambda f, g, m: f(g) * torch.arange(1.0, 1 + len(f(g))),
    "the loss is squared": lambda f, g, m: f(g) ** 2,
    "the loss is exponentiated": lambda f, g, m: f(g).exp(),
    "the logarithm of the loss is taken": lambda f, g, m: f(g).abs().log(),
    "the loss is weighted by itself, without gradient": lambda f, g, m: f(g).detach() * f(g),
    "the weight of each row counts twice": lambda f, g, m: f(g) * g.weights if f(g).dim() == 1 else f(g),
}


def pair_mistakes(given: PreferenceLogprobs) -> Iterator[Mistake]:
    """Yield mistakes in losses on pairs."""
    yield from {
        "chosen and rejected are exchanged": lambda f, g, m: f(g.swapped()._replace(target=g.target)),
        "the label is ignored": put(target=lambda g: torch.ones_like(g.target)),
        "the label is rounded": put(target=lambda g: g.target.round()),
        "the label is inverted": put(target=lambda g: 1 - g.target),
        "a sigmoid is applied to the label": put(target=lambda g: g.target.sigmoid()),
        "the label is squared": put(target=lambda g: g.target**2),
        "both labels count alike": put(target=lambda g: 0 * g.target + 0.5),
        "chosen and rejected of the reference are exchanged": put(
            reference_chosen_logprobs=lambda g: g.reference_rejected_logprobs,
            reference_rejected_logprobs=lambda g: g.reference_chosen_logprobs,
        ),
    }.items()
    for side in ("chosen", "rejected"):
        yield f"no gradient flows through {side}", lambda f, g, m, s=side: f(changed(g, _detach, "policy", s))
        yield (
            f"{side} is left out of the margin",
            lambda f, g, m, s=side: f(changed(g, lambda v, k: 0 * v, "both", s)),
        )
    for name, values in given.extras.items():
        if values.dtype == torch.bool:
            turned = {**given.extras, name: ~values}
            yield f"the data column {name} is inverted", lambda f, g, m, e=turned: f(g._replace(extras=e))
    lengths = {side: getattr(given, f"{side}_mask").sum(-1, keepdim=True) for side in ("chosen", "rejected")}
    for words, divisors in (
        ("each side is divided by the other side's length", ("rejected", "chosen")),
        ("both sides are divided by the chosen length", ("chosen", "chosen")),
        ("both sides are divided by the rejected length", ("rejected", "rejected")),
    ):
        for own in (False, True):  # the shipped loss may divide by its own length or not
            yield words, partial(_divided, divisors=[lengths[side] for side in divisors], own=own)
    yield (
        "the label smoothing counts twice",
        lambda f, g, m: f(g._replace(target=g.target * (1 - 2 * m.label_smoothing) + m.label_smoothing)),
    )
    yield from {
        "the loss of the swapped pair is added": lambda f, g, m: f(g) + f(g.swapped()._replace(target=g.target)),
        "the rated margin is added to the margin": lambda f, g, m: f(with_gap(g, g.rated_margin / m.beta)),
        "the rated margin is subtracted, scaled by beta": lambda f, g, m: f(with_gap(g, -g.rated_margin)),
        "the rated margin multiplies the loss": lambda f, g, m: f(g) * g.rated_margin,
        "the rated margin divides the loss": lambda f, g, m: f(g) / (1 + g.rated_margin),
        "the log-ratio is replaced by the ratio": lambda f, g, m: f(_as_margin(g, torch.exp)),
        "the sigmoid is applied twice": lambda f, g, m: f(_margin(g, lambda x: (m.beta * x).sigmoid() / m.beta)),
        "the margin is squared": lambda f, g, m: f(_margin(g, torch.square)),
        "the sign of the margin is lost": lambda f, g, m: f(_margin(g, torch.abs)),
        "the margin is clamped at 0": lambda f, g, m: f(_margin(g, torch.relu)),
        "an exponential loss is used instead of the logistic one": lambda f, g, m: (-m.beta * g.margin).exp(),
        "a sigmoid is used instead of its logarithm": lambda f, g, m: torch.sigmoid(-m.beta * g.margin),
        "the margin is centred over the batch": lambda f, g, m: f(_margin(g, lambda x: x - x.mean())),
        "the margin is divided by its standard deviation over the batch": lambda f, g, m: f(
            _margin(g, lambda x: x / x.std())
        ),
        "a squared error is used instead of the logistic loss": lambda f, g, m: (m.beta * g.margin - 1) ** 2,
    }.items()


def with_gap(given: PreferenceLogprobs, gap: Tensor) -> PreferenceLogprobs:
    """Return pairs with a margin that is larger by ``gap`` nats, added to the first token of chosen."""
    first = first_token(given.chosen_mask)
    return given._replace(policy_chosen_logprobs=given.policy_chosen_logprobs + first * gap.unsqueeze(-1))


def _margin(given: PreferenceLogprobs, change: Callable[[Tensor], Tensor]) -> PreferenceLogprobs:
    return with_gap(given, change(given.margin) - given.margin)


def _divided(losses: Losses, given: Any, module: Any, divisors: list[Tensor], own: bool) -> Tensor:
    """Return the losses of pairs whose sides are divided by the given lengths instead of their own or none."""
    for (side, mask), divisor in zip(PAIR_SIDES, divisors, strict=True):
        length = getattr(given, mask).sum(-1, keepdim=True) if own else torch.ones_like(divisor)
        given = changed(given, partial(_times, length / divisor.clamp_min(1)), "both", side)
    return losses(given)


def _times(factor: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return values * factor


def _as_margin(given: PreferenceLogprobs, change: Callable[[Tensor], Tensor]) -> PreferenceLogprobs:
    wanted = change(given.chosen_logratio) - change(given.rejected_logratio)
    return with_gap(given, wanted - given.margin)


def judgement_mistakes(given: UnpairedLogprobs) -> Iterator[Mistake]:
    """Yield mistakes in losses on unpaired completions."""
    yield from {
        "desirable and undesirable are exchanged": put(desirable=lambda g: ~g.desirable),
        "every row counts as desirable": put(desirable=lambda g: torch.ones_like(g.desirable)),
        "the reference point is left out": put(reference_point=lambda g: 0 * g.reference_point),
        "the reference point has the wrong sign": put(reference_point=lambda g: -g.reference_point),
        "beta is left out of the reference point": lambda f, g, m: f(
            g._replace(reference_point=g.reference_point / m.beta)
        ),
        "beta counts twice in the reference point": lambda f, g, m: f(
            g._replace(reference_point=g.reference_point * m.beta)
        ),
    }.items()
    for words, flag in (("undesirable", False), ("desirable", True)):
        yield f"{words} rows teach nothing", lambda f, g, m, k=flag: torch.where(g.desirable == k, 0 * f(g), f(g))


def score_mistakes(given: RankedScores) -> Iterator[Mistake]:
    """Yield mistakes in losses on ranked scores."""
    yield from {
        "ranks are reversed: rank 0 is the best": put(ranks=lambda g: g.ranks.max() - g.ranks),
        "the rated margin is added to the gap": put(margin=lambda g: -g.margin),
        "the rated margin is ignored": put(margin=lambda g: 0 * g.margin),
        "the rated margin counts twice": put(margin=lambda g: 2 * g.margin),
        "the rated margin multiplies the gap": put(
            scores=lambda g: g.scores * g.margin[g.group], margin=lambda g: 0 * g.margin
        ),
        "the label is ignored": put(target=lambda g: torch.ones_like(g.target)),
        "the label is inverted": put(target=lambda g: 1 - g.target),
        "the label is squared": put(target=lambda g: g.target**2),
        "the label is rounded": put(target=lambda g: g.target.round()),
        "scores are squared": put(scores=lambda g: g.scores**2),
        "a sigmoid is applied to the scores": put(scores=lambda g: g.scores.sigmoid()),
        "tanh is applied to the scores": put(scores=lambda g: g.scores.tanh()),
        "scores are centred and scaled over the batch": put(
            scores=lambda g: (g.scores - g.scores.mean()) / g.scores.std()
        ),
        "no gradient flows through the better completion": put(
            scores=lambda g: torch.where(g.ranks == 0, g.scores.detach(), g.scores)
        ),
        "no gradient flows through the worse completion": put(
            scores=lambda g: torch.where(g.ranks == 0, g.scores, g.scores.detach())
        ),
    }.items()


def step_mistakes(given: ProcessScores) -> Iterator[Mistake]:
    """Yield mistakes in losses on labelled steps."""
    yield from {
        "labels are inverted": put(labels=lambda g: 1 - g.labels),
        "labels are rounded": put(labels=lambda g: g.labels.round()),
        "the sigmoid is applied twice": put(scores=lambda g: g.scores.sigmoid()),
        "labels are those of the next step": put(labels=lambda g: g.labels.roll(-1)),
        "labels are those of the step before": put(labels=lambda g: g.labels.roll(1)),
        "labels are those of the step before, where there is one": put(
            labels=lambda g: torch.where(g.position > 0, g.labels.roll(1), g.labels)
        ),
        "a squared error of the log-odds is used instead of the cross-entropy": lambda f, g, m: (
            (g.scores - g.labels) ** 2
        ),
        "a squared error of the probability is used instead of the cross-entropy": lambda f, g, m: (
            (g.scores.sigmoid() - g.labels) ** 2
        ),
        "wrong steps are ignored": lambda f, g, m: -g.labels * torch.nn.functional.logsigmoid(g.scores),
    }.items()


def kl(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(first || second) of distributions given as logits, shape (tokens,)."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def logit_mistakes(given: DistillationLogits) -> Iterator[Mistake]:
    """Yield mistakes in divergences."""
    yield from {
        "student and teacher are exchanged": put(
            student_logits=lambda g: g.teacher_logits.detach(), teacher_logits=lambda g: g.student_logits
        ),
        "the divergence is KL(student || teacher)": lambda f, g, m: kl(g.student_logits, g.teacher_logits),
        "the divergence is KL(teacher || student)": lambda f, g, m: kl(g.teacher_logits, g.student_logits),
        "only the sampled token counts": lambda f, g, m: _likelihood(g.student_logits, g.targets),
        "only the teacher's likeliest token counts": lambda f, g, m: _likelihood(
            g.student_logits, g.teacher_logits.argmax(-1)
        ),
    }.items()
    for heat in (0.5, 2.0):
        words = "only the {}'s logits are divided by {:g}".format
        yield words("student", heat), lambda f, g, m, t=heat: kl(g.teacher_logits, g.student_logits / t)
        yield words("teacher", heat), lambda f, g, m, t=heat: kl(g.teacher_logits / t, g.student_logits)


@contextlib.contextmanager
def settings_of(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of a module or a world within a block."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def with_setting(losses: Losses, given: Any, module: Any, **settings: Any) -> Tensor:
    """Return losses with changed attributes of the module."""
    with settings_of(module, **settings):
        return losses(given)
