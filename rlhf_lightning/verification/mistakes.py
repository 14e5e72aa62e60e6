"""Known mistakes, each as the loss of a shipped class with one thing changed.

`diagnosis` fits the slopes of an objective on those of the mistakes here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

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

Losses = Callable[[Any], Tensor]
Mistake = tuple[str, Any]
"""Words, and the losses of the mistake as a function of the shipped loss, the input and the shipped module."""


CERTAIN = (
    "wrong sign", "sign is wrong", "sign is flipped", "sign of the margin is lost", "sign of the advantage is lost",
    "sign of the score is lost", "sign of the loss", "the label is ignored", "is rounded", "turned round",
    "the label is taken through a sigmoid", "the label is squared", "both labels count alike", "no gradient passes",
    "left out of the margin", "chosen and rejected", "the rated margin is added", "the rated margin divides",
    "without the first token", "without the last token", "of the first token alone", "of the last token alone",
    "cumulated", "divided by the padded width", "length less one", "length plus one", "added in place of subtracted",
    "mean of the batch", "its place in the batch", "weight of each row counts twice", "clamped at 0",
    "are exchanged", "over the batch", "counts as desirable", "teach nothing",
    "beta counts twice in the reference point", "labels are those of", "only the student's logits",
    "only the teacher's logits", "label smoothing counts twice", "the other side's length", "passes a gradient",
    "sigmoid is taken twice", "multiplies the gap", "the advantage is squared", "over the micro-batch",
    "the advantage has a gradient", "ratio is inverted", "the probability stands in place of its logarithm",
    "to the reference in place of the old policy", "the smaller of", "only the clipped ratio counts",
    "the ratio counts twice", "negative advantages are dropped", "padding too", "the score is left out",
    "multiplied by the length", "drawn to the old values", "error is not squared", "rows of its micro-batch",
    "weights of the rows", "the step counts", "is minus",
)  # fmt: skip
"""Words of the mistakes that no method makes by design. The others, such as a reference that is left out or a margin
with a constant, are losses of some paper: they are named where a check fails, and fail none by themselves."""


def is_certain(words: str) -> bool:
    """Whether no method makes a mistake by design."""
    return any(part in words for part in CERTAIN)


# -- changes of an input ----------------------------------------------------------------------------------------------

PAIR_SIDES = (("chosen", "chosen_mask"), ("rejected", "rejected_mask"))


def sides_of(given: Any) -> tuple[tuple[str, str, str], ...]:
    """Return (policy, reference, mask) field names of an input."""
    if isinstance(given, PreferenceLogprobs):
        return tuple((f"policy_{s}_logprobs", f"reference_{s}_logprobs", mask) for s, mask in PAIR_SIDES)
    if isinstance(given, UnpairedLogprobs):
        return (("policy_logprobs", "reference_logprobs", "completion_mask"),)
    return (("logprobs", "", "completion_mask"),)


def changed(given: Any, change: Callable[[Tensor, Tensor], Tensor], models: str = "both", sides: str = "both") -> Any:
    """Return an input with changed log-probabilities: of policy, reference or both, and of some sides."""
    fields = {}
    for policy, reference, mask in sides_of(given):
        if sides != "both" and sides not in mask:
            continue
        for kind, name in (("policy", policy), ("reference", reference)):
            if models in (kind, "both") and name and getattr(given, name) is not None:
                fields[name] = change(getattr(given, name), getattr(given, mask))
    return given._replace(**fields)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Return values divided by the tokens of their row."""
    return values / mask.sum(-1, keepdim=True).clamp_min(1)


def first_token(mask: Tensor) -> Tensor:
    """Return True on the first token of each row."""
    return mask & (mask.cumsum(-1) == 1)


def last_token(mask: Tensor) -> Tensor:
    """Return True on the last token of each row."""
    return mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))


TOKENS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "averaged over tokens in place of summed": mean_over_tokens,
    "divided by the padded width": lambda v, m: v / v.shape[1],
    "multiplied by the length": lambda v, m: v * m.sum(-1, keepdim=True),
    "divided by the square root of the length": lambda v, m: v / m.sum(-1, keepdim=True).clamp_min(1).sqrt(),
    "divided by the length less one": lambda v, m: v / (m.sum(-1, keepdim=True) - 1).clamp_min(1),
    "divided by the length plus one": lambda v, m: v / (m.sum(-1, keepdim=True) + 1),
    "taken without the first token": lambda v, m: v * ~first_token(m),
    "taken without the last token (the end token)": lambda v, m: v * ~last_token(m),
    "taken of the first token alone": lambda v, m: v * first_token(m),
    "taken of the last token alone": lambda v, m: v * last_token(m),
    "turned into probabilities": lambda v, m: torch.where(m, v.exp(), 0.0),
    "cumulated over the tokens": lambda v, m: torch.where(m, v.cumsum(-1), 0.0),
}
"""What people do to the tokens of a completion; the log-probabilities of policy, reference or both are ..."""


def token_mistakes(given: Any) -> Iterator[Mistake]:
    """Yield mistakes in how tokens become a completion's number."""
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
                    f"{whose['both']} {words}, of {side} alone",
                    lambda f, g, m, c=change, s=side: f(changed(g, c, "both", s)),
                )
    for words, change in (
        ("the reference is left out", lambda v, m: 0 * v),
        ("the reference's log-probability is added in place of subtracted", lambda v, m: -v),
        ("the reference counts twice", lambda v, m: 2 * v),
        ("the reference counts half", lambda v, m: v / 2),
    ):
        if not has_reference:
            break
        yield words, lambda f, g, m, c=change: f(changed(g, c, "reference"))
        for side in ("chosen", "rejected") if isinstance(given, PreferenceLogprobs) else ():
            yield f"{words}, of {side} alone", lambda f, g, m, c=change, s=side: f(changed(g, c, "reference", s))
    yield "no gradient passes the policy's log-probabilities", lambda f, g, m: f(changed(g, _detach, "policy"))


def _detach(values: Tensor, mask: Tensor) -> Tensor:
    return values.detach()


# -- mistakes by family -----------------------------------------------------------------------------------------------


def _whole_batch(f: Losses, g: Any, m: Any) -> Tensor:
    values = f(g)
    return values.mean().expand(len(values))


COMMON: tuple[Mistake, ...] = (
    ("the sign of the loss is flipped", lambda f, g, m: -f(g)),
    ("each loss is the mean of the batch", _whole_batch),
    ("each loss is weighted by its place in the batch", lambda f, g, m: f(g) * torch.arange(1.0, 1 + len(f(g)))),
    ("the loss is squared", lambda f, g, m: f(g) ** 2),
    ("the loss is exponentiated", lambda f, g, m: f(g).exp()),
    ("the logarithm of the loss is taken", lambda f, g, m: f(g).abs().log()),
    ("the loss is weighted by itself, without gradient", lambda f, g, m: f(g).detach() * f(g)),
    ("the weight of each row counts twice", lambda f, g, m: f(g) * g.weights if f(g).dim() == 1 else f(g)),
)


def pair_mistakes(given: PreferenceLogprobs) -> Iterator[Mistake]:
    """Yield mistakes in losses on pairs."""

    def target(change: Callable[[Tensor], Tensor]) -> Callable[[Losses, Any, Any], Tensor]:
        return lambda f, g, m: f(g._replace(target=change(g.target)))

    yield "chosen and rejected are exchanged", lambda f, g, m: f(g.swapped()._replace(target=g.target))
    yield "the label is ignored", target(torch.ones_like)
    yield "the label is rounded", target(torch.round)
    yield "the label is turned round", target(lambda p: 1 - p)
    yield "the label is taken through a sigmoid", target(torch.sigmoid)
    yield "the label is squared", target(lambda p: p**2)
    yield "both labels count alike", target(lambda p: 0 * p + 0.5)
    for side in ("chosen", "rejected"):
        yield (
            f"no gradient passes {side}",
            lambda f, g, m, s=side: f(changed(g, _detach, "policy", s)),
        )
        yield (
            f"{side} is left out of the margin",
            lambda f, g, m, s=side: f(changed(g, lambda v, k: 0 * v, "both", s)),
        )
    yield (
        "chosen and rejected of the reference are exchanged",
        lambda f, g, m: f(
            g._replace(
                reference_chosen_logprobs=g.reference_rejected_logprobs,
                reference_rejected_logprobs=g.reference_chosen_logprobs,
            )
        ),
    )
    lengths = {side: getattr(given, f"{side}_mask").sum(-1, keepdim=True) for side in ("chosen", "rejected")}
    for words, divisors in (
        ("each side is divided by the other side's length", ("rejected", "chosen")),
        ("both sides are divided by the chosen length", ("chosen", "chosen")),
        ("both sides are divided by the rejected length", ("rejected", "rejected")),
    ):
        for own in (False, True):  # the shipped loss divides by its own length or not
            yield words, partial(_divided, divisors=[lengths[side] for side in divisors], own=own)
    yield (
        "the label smoothing counts twice",
        lambda f, g, m: f(g._replace(target=g.target * (1 - 2 * m.label_smoothing) + m.label_smoothing)),
    )
    yield "the margin is added to itself turned round", lambda f, g, m: f(g) + f(g.swapped()._replace(target=g.target))
    yield "the rated margin is added to the margin", lambda f, g, m: f(with_gap(g, g.rated_margin / m.beta))
    yield "the rated margin is subtracted, scaled by beta", lambda f, g, m: f(with_gap(g, -g.rated_margin))
    yield "the rated margin weighs the loss", lambda f, g, m: f(g) * g.rated_margin
    yield "the rated margin divides the loss", lambda f, g, m: f(g) / (1 + g.rated_margin)
    yield (
        "the log-ratio is replaced by the ratio",
        lambda f, g, m: f(_as_margin(g, lambda a: a.exp())),
    )
    yield "the sigmoid is taken twice", lambda f, g, m: f(_margin(g, lambda x: (m.beta * x).sigmoid() / m.beta))
    yield "the margin is squared", lambda f, g, m: f(_margin(g, lambda x: x**2))
    yield "the sign of the margin is lost", lambda f, g, m: f(_margin(g, torch.abs))
    yield "the margin is clamped at 0", lambda f, g, m: f(_margin(g, lambda x: x.clamp_min(0)))
    yield "an exponential loss stands in place of the logistic one", lambda f, g, m: (-m.beta * g.margin).exp()
    yield "a sigmoid stands in place of its logarithm", lambda f, g, m: torch.sigmoid(-m.beta * g.margin)
    yield "the margin is centred over the batch", lambda f, g, m: f(_margin(g, lambda x: x - x.mean()))
    yield "the margin is divided by its deviation over the batch", lambda f, g, m: f(_margin(g, lambda x: x / x.std()))
    yield "a squared error stands in place of the logistic loss", lambda f, g, m: (m.beta * g.margin - 1) ** 2


def with_gap(given: PreferenceLogprobs, gap: Tensor) -> PreferenceLogprobs:
    """Return pairs whose margin is larger by a gap in nats, added to the first token of chosen."""
    first = first_token(given.chosen_mask)
    return given._replace(policy_chosen_logprobs=given.policy_chosen_logprobs + first * gap.unsqueeze(-1))


def _margin(given: PreferenceLogprobs, change: Callable[[Tensor], Tensor]) -> PreferenceLogprobs:
    return with_gap(given, change(given.margin) - given.margin)


def _divided(losses: Losses, given: Any, module: Any, divisors: list[Tensor], own: bool) -> Tensor:
    """Return the losses of pairs whose sides are divided by some lengths, in place of their own or of none."""
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
    """Yield mistakes in losses on completions judged alone."""
    yield "desirable and undesirable are exchanged", lambda f, g, m: f(g._replace(desirable=~g.desirable))
    yield "every row counts as desirable", lambda f, g, m: f(g._replace(desirable=torch.ones_like(g.desirable)))
    yield "the reference point is left out", lambda f, g, m: f(g._replace(reference_point=0 * g.reference_point))
    yield "the reference point has the wrong sign", lambda f, g, m: f(g._replace(reference_point=-g.reference_point))
    yield (
        "beta is left out of the reference point",
        lambda f, g, m: f(g._replace(reference_point=g.reference_point / m.beta)),
    )
    yield (
        "beta counts twice in the reference point",
        lambda f, g, m: f(g._replace(reference_point=g.reference_point * m.beta)),
    )
    for words, flag in (("undesirable", False), ("desirable", True)):
        yield f"{words} rows teach nothing", lambda f, g, m, k=flag: torch.where(g.desirable == k, 0 * f(g), f(g))


def score_mistakes(given: RankedScores) -> Iterator[Mistake]:
    """Yield mistakes in losses on ranked scores."""
    yield "ranks are turned round: rank 0 is the best", lambda f, g, m: f(g._replace(ranks=g.ranks.max() - g.ranks))
    yield "the rated margin is added to the gap", lambda f, g, m: f(g._replace(margin=-g.margin))
    yield "the rated margin is ignored", lambda f, g, m: f(g._replace(margin=0 * g.margin))
    yield "the rated margin counts twice", lambda f, g, m: f(g._replace(margin=2 * g.margin))
    yield (
        "the rated margin multiplies the gap",
        lambda f, g, m: f(g._replace(scores=g.scores * g.margin[g.group], margin=0 * g.margin)),
    )
    yield "the label is ignored", lambda f, g, m: f(g._replace(target=torch.ones_like(g.target)))
    yield "the label is turned round", lambda f, g, m: f(g._replace(target=1 - g.target))
    yield "the label is squared", lambda f, g, m: f(g._replace(target=g.target**2))
    yield "the label is rounded", lambda f, g, m: f(g._replace(target=g.target.round()))
    yield "scores are squared", lambda f, g, m: f(g._replace(scores=g.scores**2))
    yield "scores are taken through a sigmoid", lambda f, g, m: f(g._replace(scores=g.scores.sigmoid()))
    yield "scores are taken through tanh", lambda f, g, m: f(g._replace(scores=g.scores.tanh()))
    yield (
        "scores are centred and scaled over the batch",
        lambda f, g, m: f(g._replace(scores=(g.scores - g.scores.mean()) / g.scores.std())),
    )
    for words, best in (("better", True), ("worse", False)):
        yield (
            f"no gradient passes the {words} completion",
            lambda f, g, m, k=best: f(g._replace(scores=torch.where((g.ranks == 0) == k, g.scores.detach(), g.scores))),
        )


def step_mistakes(given: ProcessScores) -> Iterator[Mistake]:
    """Yield mistakes in losses on judged steps."""
    yield "labels are turned round", lambda f, g, m: f(g._replace(labels=1 - g.labels))
    yield "labels are rounded", lambda f, g, m: f(g._replace(labels=g.labels.round()))
    yield "the sigmoid is taken twice", lambda f, g, m: f(g._replace(scores=g.scores.sigmoid()))
    yield "labels are those of the next step", lambda f, g, m: f(g._replace(labels=g.labels.roll(-1)))
    yield "labels are those of the step before", lambda f, g, m: f(g._replace(labels=g.labels.roll(1)))
    yield (
        "labels are those of the step before, where there is one",
        lambda f, g, m: f(g._replace(labels=torch.where(g.position > 0, g.labels.roll(1), g.labels))),
    )
    yield (
        "a squared error of the log-odds stands in place of the cross-entropy",
        lambda f, g, m: (g.scores - g.labels) ** 2,
    )
    yield (
        "a squared error of the probability stands in place of the cross-entropy",
        lambda f, g, m: (g.scores.sigmoid() - g.labels) ** 2,
    )
    yield "wrong steps teach nothing", lambda f, g, m: -g.labels * torch.nn.functional.logsigmoid(g.scores)


def logit_mistakes(given: DistillationLogits) -> Iterator[Mistake]:
    """Yield mistakes in divergences."""

    def kl(first: Tensor, second: Tensor) -> Tensor:
        p, q = first.log_softmax(-1), second.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    yield (
        "student and teacher are exchanged",
        lambda f, g, m: f(g._replace(student_logits=g.teacher_logits.detach(), teacher_logits=g.student_logits)),
    )
    yield "the divergence is KL(student || teacher)", lambda f, g, m: kl(g.student_logits, g.teacher_logits)
    yield "the divergence is KL(teacher || student)", lambda f, g, m: kl(g.teacher_logits, g.student_logits)
    yield (
        "only the sampled token counts",
        lambda f, g, m: -g.student_logits.log_softmax(-1).gather(-1, g.targets.unsqueeze(-1)).squeeze(-1),
    )
    yield (
        "only the teacher's likeliest token counts",
        lambda f, g, m: (
            -g.student_logits.log_softmax(-1).gather(-1, g.teacher_logits.argmax(-1, keepdim=True)).squeeze(-1)
        ),
    )
    for heat in (0.5, 2.0):
        yield (
            f"only the student's logits are divided by {heat:g}",
            lambda f, g, m, t=heat: kl(g.teacher_logits, g.student_logits / t),
        )
        yield (
            f"only the teacher's logits are divided by {heat:g}",
            lambda f, g, m, t=heat: kl(g.teacher_logits / t, g.student_logits),
        )


def policy_mistakes(given: PolicyLogprobs) -> Iterator[Mistake]:
    """Yield mistakes in policy-gradient losses."""

    def advantages(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Losses, Any, Any], Tensor]:
        return lambda f, g, m: f(
            g._replace(advantages=torch.where(g.completion_mask, change(g.advantages, g.completion_mask), 0.0))
        )

    def ratio(change: Callable[[Tensor], Tensor]) -> Callable[[Losses, Any, Any], Tensor]:
        def of(losses: Losses, one: Any, module: Any) -> Tensor:
            found = module.ratio
            with settings_of(module, ratio=lambda logprobs: change(found(logprobs))):
                return losses(one)

        return of

    def objective(loss: Callable[[Tensor, Any, Any], Tensor]) -> Callable[[Losses, Any, Any], Tensor]:
        def of(losses: Losses, one: Any, module: Any) -> Tensor:
            with settings_of(module, objective=lambda r, logprobs: loss(r, logprobs, module)):
                return losses(one)

        return of

    def held(r: Tensor, m: Any) -> Tensor:
        return r.clamp(1 - m.clip, 1 + (m.clip_high or m.clip))

    yield "the advantage has the wrong sign", advantages(lambda a, k: -a)
    yield "the sign of the advantage is lost", advantages(lambda a, k: a.abs())
    yield "negative advantages are clamped at 0", advantages(lambda a, k: a.clamp_min(0))
    yield "the advantage is squared", advantages(lambda a, k: a**2)
    yield "the advantage is centred over the micro-batch", advantages(lambda a, k: a - a.mean())
    yield "the advantage is divided by its completion's length", advantages(mean_over_tokens)
    yield "the advantage has a gradient", objective(lambda r, g, m: -(g.advantages + g.logprobs) * r)
    yield "the ratio is inverted (old / policy)", ratio(torch.reciprocal)
    yield "no gradient passes the ratio", ratio(lambda r: r.detach())
    yield "the ratio is squared", ratio(torch.square)
    yield "the logarithm of the ratio stands in place of the ratio", ratio(torch.log)
    yield "the ratio is averaged over the completion", ratio(lambda r: r.mean(-1, keepdim=True).expand_as(r))
    yield (
        "the probability stands in place of its logarithm",
        objective(lambda r, g, m: -g.advantages * g.logprobs.exp()),
    )
    yield (
        "the ratio is taken to the reference in place of the old policy",
        lambda f, g, m: f(g._replace(old_logprobs=g.reference_logprobs)),
    )
    yield "nothing is clipped", objective(lambda r, g, m: -g.advantages * r)
    yield "the ratio is left out", objective(lambda r, g, m: -g.advantages * g.logprobs)
    yield (
        "the smaller of the clipped and the plain loss is taken, in place of the larger",
        objective(lambda r, g, m: torch.minimum(-g.advantages * r, -g.advantages * held(r, m))),
    )
    yield (
        "the weight of the log-probability passes a gradient",
        objective(lambda r, g, m: -r.clamp(max=m.cispo_high) * g.advantages * g.logprobs),
    )
    yield "only the clipped ratio counts", objective(lambda r, g, m: -g.advantages * held(r, m))
    yield (
        "the logarithm of the ratio is clipped",
        objective(
            lambda r, g, m: torch.maximum(-g.advantages * r, -g.advantages * r.log().clamp(-m.clip, m.clip).exp())
        ),
    )
    yield (
        "the ratio counts twice, once without gradient",
        objective(lambda r, g, m: torch.maximum(-g.advantages * r, -g.advantages * held(r, m)) * r.detach()),
    )
    for words, factor in {
        "has the wrong sign": -1.0,
        "is left out": 0.0,
        "counts twice": 2.0,
        "counts half": 0.5,
    }.items():
        yield f"the KL loss {words}", lambda f, g, m, k=factor: _with_setting(f, g, m, kl_coef=k * m.kl_coef)
    yield (
        "the KL loss is turned round: KL(reference || policy) of the policy's samples",
        lambda f, g, m: (
            f(g._replace(advantages=0 * g.advantages)) * 0
            + _with_setting(f, g, m, kl_coef=0.0)
            + m.kl_coef * m.kl_loss(g._replace(logprobs=g.reference_logprobs, reference_logprobs=g.logprobs))
        ),
    )
    for name in ("k1", "k2", "k3"):
        yield f"the KL loss is {name}", lambda f, g, m, k=name: _with_setting(f, g, m, kl_estimator=k)
    levels = {
        "of each token": "token",
        "of the completion's geometric mean": "sequence",
        "of the whole completion": "sequence_product",
    }
    for words, level in levels.items():
        yield f"the ratio is that {words}", lambda f, g, m, k=level: _with_setting(f, g, m, ratio_name=k)


@contextlib.contextmanager
def settings_of(module: Any, **values: Any) -> Iterator[None]:
    """Give a module other attributes within a block."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _with_setting(losses: Losses, given: Any, module: Any, **settings: Any) -> Tensor:
    with settings_of(module, **settings):
        return losses(given)


def value_mistakes(given: CriticValues) -> Iterator[Mistake]:
    """Yield mistakes in value losses."""
    yield (
        "the smaller of the clipped and the plain value loss is taken",
        lambda f, g, m: (
            0.5
            * torch.minimum(
                (g.values - g.returns) ** 2,
                (g.old_values + (g.values - g.old_values).clamp(-m.value_clip, m.value_clip) - g.returns) ** 2,
            )
        ),
    )
    yield (
        "values are drawn to the old values in place of the returns",
        lambda f, g, m: 0.5 * (g.values - g.old_values) ** 2,
    )
    yield "the value loss is not clipped", lambda f, g, m: 0.5 * (g.values - g.returns) ** 2
    yield "the error is not squared", lambda f, g, m: g.values - g.returns


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
    """Yield all mistakes that are tried on an input."""
    yield from COMMON
    yield from FAMILY_MISTAKES.get(type(given), lambda one: iter(()))(given)
    if isinstance(given, PreferenceLogprobs | UnpairedLogprobs | TokenLogprobs):
        yield from token_mistakes(given)
