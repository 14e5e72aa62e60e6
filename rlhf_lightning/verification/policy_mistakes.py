"""Known mistakes in policy-gradient losses and in value losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.types import CriticValues, PolicyLogprobs
from rlhf_lightning.verification.mistakes import Losses, Mistake, mean_over_tokens, put, with_setting


def _advantages(change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    return put(
        advantages=lambda g: torch.where(g.completion_mask, change(g.advantages, g.completion_mask), 0.0),
    )


def _ratio(change: Callable[[Tensor], Tensor]) -> Any:
    def of(losses: Losses, one: Any, module: Any) -> Tensor:
        found = module.ratio
        return with_setting(losses, one, module, ratio=lambda logprobs: change(found(logprobs)))

    return of


def _objective(loss: Callable[[Tensor, Any, Any], Tensor]) -> Any:
    def of(losses: Losses, one: Any, module: Any) -> Tensor:
        return with_setting(losses, one, module, objective=lambda r, logprobs: loss(r, logprobs, module))

    return of


def _held(r: Tensor, m: Any) -> Tensor:
    return r.clamp(1 - m.clip, 1 + (m.clip_high or m.clip))


def _turned_kl(losses: Losses, given: Any, module: Any) -> Tensor:
    """Return the loss with KL(reference || policy), estimated on the policy's samples, as its KL loss."""
    turned = given._replace(logprobs=given.reference_logprobs, reference_logprobs=given.logprobs)
    return with_setting(losses, given, module, kl_coef=0.0) + module.kl_coef * module.kl_loss(turned)


def policy_mistakes(given: PolicyLogprobs) -> Iterator[Mistake]:
    """Yield mistakes in policy-gradient losses."""
    yield from {
        "the advantage has the wrong sign": _advantages(lambda a, k: -a),
        "the sign of the advantage is lost": _advantages(lambda a, k: a.abs()),
        "negative advantages are clamped at 0": _advantages(lambda a, k: a.clamp_min(0)),
        "the advantage is squared": _advantages(lambda a, k: a**2),
        "the advantage is centred over the micro-batch": _advantages(lambda a, k: a - a.mean()),
        "the advantage is divided by the completion's length": _advantages(mean_over_tokens),
        "the advantage has a gradient": _objective(lambda r, g, m: -(g.advantages + g.logprobs) * r),
        "the ratio is inverted (old / policy)": _ratio(torch.reciprocal),
        "no gradient flows through the ratio": _ratio(torch.detach),
        "the ratio is squared": _ratio(torch.square),
        "the logarithm of the ratio is used instead of the ratio": _ratio(torch.log),
        "the ratio is averaged over the completion": _ratio(lambda r: r.mean(-1, keepdim=True).expand_as(r)),
        "the probability is used instead of its logarithm": _objective(
            lambda r, g, m: -g.advantages * g.logprobs.exp()
        ),
        "the ratio is taken to the reference instead of the old policy": put(
            old_logprobs=lambda g: g.reference_logprobs
        ),
        "nothing is clipped": _objective(lambda r, g, m: -g.advantages * r),
        "the ratio is left out": _objective(lambda r, g, m: -g.advantages * g.logprobs),
        "the smaller of the clipped and the unclipped loss is taken, instead of the larger": _objective(
            lambda r, g, m: torch.minimum(-g.advantages * r, -g.advantages * _held(r, m))
        ),
        "the weight of the log-probability lets a gradient through": _objective(
            lambda r, g, m: -r.clamp(max=m.cispo_high) * g.advantages * g.logprobs
        ),
        "only the clipped ratio counts": _objective(lambda r, g, m: -g.advantages * _held(r, m)),
        "the lower side of the clip is missing": _objective(
            lambda r, g, m: torch.maximum(-g.advantages * r, -g.advantages * r.clamp(max=1 + (m.clip_high or m.clip)))
        ),
        "the logarithm of the ratio is clipped": _objective(
            lambda r, g, m: torch.maximum(-g.advantages * r, -g.advantages * r.log().clamp(-m.clip, m.clip).exp())
        ),
        "the ratio counts twice, once without gradient": _objective(
            lambda r, g, m: torch.maximum(-g.advantages * r, -g.advantages * _held(r, m)) * r.detach()
        ),
        "the KL loss is reversed: KL(reference || policy) of the policy's samples": _turned_kl,
    }.items()
    for words, factor in {"has the wrong sign": -1, "is left out": 0, "counts twice": 2, "counts half": 0.5}.items():
        yield f"the KL loss {words}", lambda f, g, m, k=factor: with_setting(f, g, m, kl_coef=k * m.kl_coef)
    for name in ("k1", "k2", "k3"):
        yield f"the KL loss is {name}", lambda f, g, m, k=name: with_setting(f, g, m, kl_estimator=k)
    levels = {
        "of each token": "token",
        "of the completion's geometric mean": "sequence",
        "of the whole completion": "sequence_product",
    }
    for words, level in levels.items():
        yield f"the ratio is that {words}", lambda f, g, m, k=level: with_setting(f, g, m, ratio_name=k)


def _clipped_value(g: CriticValues, m: Any) -> Tensor:
    return g.old_values + (g.values - g.old_values).clamp(-m.value_clip, m.value_clip)


def value_mistakes(given: CriticValues) -> Iterator[Mistake]:
    """Yield mistakes in value losses."""
    yield from {
        "the smaller of the clipped and the unclipped value loss is taken": lambda f, g, m: (
            0.5 * torch.minimum((g.values - g.returns) ** 2, (_clipped_value(g, m) - g.returns) ** 2)
        ),
        "values are regressed on the old values instead of the returns": put(returns=lambda g: g.old_values),
        "the value loss is not clipped": lambda f, g, m: 0.5 * (g.values - g.returns) ** 2,
        "the error is not squared": lambda f, g, m: g.values - g.returns,
    }.items()
