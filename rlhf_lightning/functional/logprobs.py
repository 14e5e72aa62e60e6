"""Log-probabilities of tokens, and the masked arithmetic that every objective uses.

Three numerical rules hold throughout. Logits are widened to float32 before any exponential. A log-probability is the
gathered logit minus a logsumexp. Masked values are replaced by `torch.where` before they are multiplied or
exponentiated, because 0 * NaN is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_lightning.errors import DataError, SettingError

KLEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to plus or minus this value before `exp`: e^20 = 4.9e8 is accurate enough in float32."""

KEPT_LOGITS = 2**24
"""Maximum number of logits that `chunked_logprobs` stores for the backward pass (64 MiB in float32)."""


CHUNK_LOGITS = 2**26
"""Maximum number of logits of a chunk (256 MiB in float32), for any vocabulary."""


def chunk_size(chunk_tokens: int, vocabulary: int) -> int:
    """Return the number of tokens of a chunk of logits: ``chunk_tokens``, or fewer to stay within `CHUNK_LOGITS`.

    The result is at least 1. With 1,024 tokens, a chunk's memory stops growing at a vocabulary of 65,536.
    """
    return max(min(chunk_tokens, CHUNK_LOGITS // vocabulary), 1)


def require_shape(shape: str, **tensors: Tensor | None) -> None:
    """Require that all given tensors share one shape, written like ``"rows length"``; ``"..."`` allows any rank.

    Raises:
        DataError: the shapes differ; the error names each tensor with its shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    dimensions = shape.split()
    if len(set(shapes.values())) > 1 or (shape != "..." and any(len(s) != len(dimensions) for s in shapes.values())):
        found = ", ".join(f"{name} {size}" for name, size in shapes.items())
        raise DataError(
            "shape-mismatch", f"expected one shape ({', '.join(dimensions)}) for all of these, found {found}"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or unchanged in float64: bfloat16 sums stop growing after 256 terms."""
    return x if x.dtype == torch.float64 else x.float()


def masked_sum(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = -1) -> Tensor:
    """Sum ``x`` where ``mask``, bool of the same shape, is True; 0 if the mask is False everywhere.

    Masked elements may be NaN. ``dim`` None sums over all dimensions.
    """
    require_shape("...", x=x, mask=mask)
    return torch.where(mask, at_least_float32(x), 0.0).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Average ``x`` where ``mask`` is True, sum(mask * x) / max(sum(mask), 1); arguments as for `masked_sum`."""
    return masked_sum(x, mask, dim) / mask.sum(dim).clamp(min=1)


def masked_whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, mean: Tensor | None = None, var: Tensor | None = None
) -> Tensor:
    r"""Scale unmasked elements to unit variance and zero mean: (x - mean) / \sqrt{var + 1e-8}; 0 under the mask.

    The variance is the biased one (Huang et al. 2024, arXiv 2403.17031).

    Args:
        shift_mean: False adds the mean back, as for rewards, whose sign has a meaning.
        mean: mean to use instead of this tensor's, a scalar, so that whitening can include other ranks.
        var: biased variance to use instead of this tensor's, a scalar.
    """
    x = at_least_float32(x)
    mean = masked_mean(x, mask) if mean is None else mean
    var = masked_mean((x - mean) ** 2, mask) if var is None else var
    whitened = (x - mean) * torch.rsqrt(var + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return the log-probability of each id, z_{id} - logsumexp(z) with z = logits / temperature, in fp32 or wider.

    Args:
        logits: shape (..., vocabulary); row t scores ``ids[..., t]``, so the caller must shift them first.
        ids: int64, shape (...).
        temperature: softmax temperature, the same as in sampling the ids.

    Raises:
        RlhfError: the leading shapes differ, or the temperature is not positive.
    """
    require_shape("...", logits_without_vocabulary=logits[..., 0], ids=ids)
    scaled = _scaled(logits, temperature)
    return scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def load_balancing_loss(logits: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    r"""Return E \sum_e f_e P_e of one layer of E experts (Switch Transformer, 2101.03961, Eq. 4 to 6).

    f_e is the mean number of times that a token chooses expert e, without gradient. P_e is the mean probability of
    expert e. Balanced routing gives ``top_k``, the minimum for uniform probabilities.

    Args:
        logits: router logits, shape (tokens, experts).
        top_k: number of experts that a token chooses.
        mask: bool, tokens that count, shape (tokens,); None for all.
    """
    probabilities = logits.float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k, -1).indices, 1.0)
    weights = torch.ones_like(probabilities[:, :1]) if mask is None else mask.unsqueeze(-1).float()
    total = weights.sum().clamp_min(1.0)
    shares, means = ((values * weights).sum(0) / total for values in (chosen, probabilities))
    return logits.shape[-1] * (shares * means).sum()


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return the entropy of the next-token distribution in nats, logsumexp(z) - \sum_v softmax(z)_v z_v.

    z = logits / temperature, in float32 or wider.

    Args:
        logits: shape (..., vocabulary); minus infinity marks tokens that cannot occur.
        temperature: softmax temperature.
    """
    scaled = _scaled(logits, temperature)
    scaled = scaled.clamp(min=torch.finfo(scaled.dtype).min)  # 0 * -inf is NaN, 0 * the smallest float is 0
    return scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    _require_positive(temperature)
    return at_least_float32(logits) / temperature


def _require_positive(temperature: float) -> None:
    if temperature <= 0:
        raise SettingError(
            "setting-out-of-range",
            f"temperature is {temperature}: it must be positive; greedy decoding has no log-probabilities",
        )


def nash_md_logits(policy_logits: Tensor, reference_logits: Tensor, mixture: float = 0.5) -> Tensor:
    r"""Return logits of Nash-MD's opponent, the geometric mixture policy^{1-c} reference^c (arXiv 2312.00886).

    Munos et al.; ``mixture`` is c, the share of the reference.
    """
    require_shape("...", policy_logits=policy_logits, reference_logits=reference_logits)
    return torch.lerp(at_least_float32(policy_logits), at_least_float32(reference_logits), mixture)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - e^x) for log-probabilities x without cancellation (Maechler 2012); x is clamped below 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    # The inner `where` keeps the unused branch away from its pole, where its gradient would be NaN.
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate the KL per token by k1 = log policy - log reference, see `kl_estimate`; both have the same shape."""
    require_shape("...", logprobs=logprobs, reference_logprobs=reference_logprobs)
    return at_least_float32(logprobs) - at_least_float32(reference_logprobs)


def kl_estimate(
    logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator, clamp: float | None = MAX_LOG_RATIO
) -> Tensor:
    """Estimate KL(policy || reference) per token in nats, after Schulman (2020), "Approximating KL divergence".

    With d = log policy - log reference:

    - k1 = d: unbiased, signed. As a loss its expected gradient is 0; use it in a reward.
    - k2 = d^2 / 2: biased, never negative. As a loss its gradient is that of the reverse KL.
    - k3 = e^(-d) - 1 + d: unbiased, never negative (GRPO, arXiv 2402.03300, Eq. 4). As a loss its gradient is that of
      KL(reference || policy).

    The tokens must be samples of the policy. d is clamped to plus or minus ``clamp``; clamped values have no gradient.
    None does not clamp.
    """
    d = kl_k1(logprobs, reference_logprobs)
    if clamp is not None:
        d = d.clamp(-clamp, clamp)
    if estimator == "k1":
        return d
    return d.square() / 2 if estimator == "k2" else torch.expm1(-d) + d


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_tokens: int = 1024,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    r"""Return `token_logprobs` of an LM head without ever holding more than one chunk of logits.

    z = softcap * tanh(scale * (hidden W^T + bias) / softcap) / temperature, and the log-probability is
    z_{target} - logsumexp(z). Neither pass holds (tokens, vocabulary) elements, unless that is at most `KEPT_LOGITS`
    and the head is trainable. With a frozen head, the forward stores d logprob / d hidden, one row of width d per
    token, and the backward pass recomputes nothing. With a trainable head, the backward pass recomputes each chunk.

    Args:
        hidden: last hidden states at the positions that predict ``targets``, shape (tokens, d).
        weight: weight of the head, shape (vocabulary, d).
        targets: int64, shape (tokens,).
        bias: bias of the head, shape (vocabulary,).
        temperature: softmax temperature; applied last.
        with_entropy: also return the entropy of each distribution, with gradient.
        chunk_tokens: maximum number of tokens per chunk, see `chunk_size`.
        softcap: bound of the logits (Gemma 2); None for no bound.
        scale: factor on the logits (Cohere, Granite); applied first.

    Returns:
        Log-probabilities in float32 or wider, shape (tokens,), and entropies of the same shape and type, or None.
    """
    require_shape("tokens", hidden_without_width=hidden[:, 0], targets=targets)
    _require_positive(temperature)
    if torch.is_autocast_enabled(hidden.device.type):  # cast here: the Function's backward runs without autocast
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.type(dtype), weight.type(dtype), None if bias is None else bias.type(dtype)
    size = chunk_size(chunk_tokens, len(weight))
    head = _Head(temperature, softcap, scale, size, with_entropy, torch.is_grad_enabled())
    apply = _ChunkedLogprobs.apply
    logprobs, entropy = apply(hidden, weight, bias, targets, head)  # type: ignore[no-untyped-call]  # torch gives it no types
    return logprobs, entropy if with_entropy else None


class _Head(NamedTuple):
    """Settings of `chunked_logprobs`, and the logits that they produce."""

    temperature: float
    softcap: float | None
    scale: float
    chunk_tokens: int
    with_entropy: bool
    grad_enabled: bool

    def chunks(self, tokens: int) -> Iterator[slice]:
        return (slice(start, start + self.chunk_tokens) for start in range(0, tokens, self.chunk_tokens))

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = at_least_float32(F.linear(hidden, weight, bias))  # a chunk is large: later operations are in place
        if self.softcap is None:
            factor = self.scale / self.temperature
            return logits if factor == 1 else logits.mul_(factor)
        return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def through(self, slope: Tensor, logits: Tensor) -> Tensor:
        """Turn a gradient of z, in place, into one of hidden W^T + bias."""
        linear = self.scale / self.temperature
        if self.softcap is None:
            return slope if linear == 1 else slope.mul_(linear)
        return slope.mul_(linear * (1 - (logits * self.temperature / self.softcap) ** 2))


def _logprob_slope(log_softmax: Tensor, targets: Tensor, out: Tensor | None) -> Tensor:
    """Return the derivative of log softmax(z)_{target} with respect to z: onehot(target) - p.

    ``out`` is overwritten with it; it may be ``log_softmax``, if that is not needed any more.
    """
    slope = torch.exp(log_softmax, out=out).neg_()
    return slope.scatter_add_(-1, targets.unsqueeze(-1), slope.new_ones(len(targets), 1))


def _entropy_slope(log_softmax: Tensor) -> Tensor:
    """Return the derivative of the entropy H with respect to z: -p (log p + H)."""
    p = log_softmax.exp()
    p_log_p = p * log_softmax
    return p.mul_(p_log_p.sum(-1, keepdim=True)).sub_(p_log_p)


def _store_chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head, into: list[Tensor | None]
) -> Tensor:
    """Fill one chunk's log-probabilities, entropies and directions, except those that are None.

    Return what the backward pass can use again: the log-softmax, or with a softcap the logits, since its slope depends
    on them.
    """
    logprobs, entropy, logprob_directions, entropy_directions = into
    logits = head.logits(hidden, weight, bias)
    log_softmax = logits.log_softmax(-1)  # (chunk, vocabulary)
    if head.softcap is None:
        logits = log_softmax  # frees the logits, which no slope depends on
    if logprobs is not None:
        logprobs.copy_(log_softmax.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
    if entropy is not None:
        entropy.copy_(-log_softmax.exp().mul_(log_softmax).sum(-1))
    if entropy_directions is not None:
        entropy_directions.copy_(head.through(_entropy_slope(log_softmax), logits).type_as(weight) @ weight)
    if logprob_directions is not None:  # the backward pass then needs only directions
        slope = _logprob_slope(log_softmax, targets, out=log_softmax)
        logprob_directions.copy_(head.through(slope, logits).type_as(weight) @ weight)
    return logits


class _ChunkedLogprobs(torch.autograd.Function):
    """See `chunked_logprobs`. The backward pass uses stored directions (frozen head) or recomputes each chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor | None]:
        ctx.head = head
        ctx.set_materialize_grads(False)
        ctx.trainable = head.grad_enabled and any(ctx.needs_input_grad[1:3])
        store = head.grad_enabled and not ctx.trainable and ctx.needs_input_grad[0]
        keep = ctx.trainable and len(targets) * len(weight) <= KEPT_LOGITS
        logprobs = at_least_float32(hidden.new_empty(len(targets)))
        entropy = torch.empty_like(logprobs) if head.with_entropy else None
        logprob_directions = torch.empty_like(hidden) if store else None
        entropy_directions = torch.empty_like(hidden) if store and head.with_entropy else None
        kept = at_least_float32(hidden.new_empty(len(targets), len(weight))) if keep else None
        for rows in head.chunks(len(targets)):
            outputs = (logprobs, entropy, logprob_directions, entropy_directions)
            into = [None if x is None else x[rows] for x in outputs]
            computed = _store_chunk(hidden[rows], weight, bias, targets[rows], head, into)
            if kept is not None:
                kept[rows] = computed
            del computed  # frees the memory before the next chunk's is computed
        if store:
            ctx.save_for_backward(logprob_directions, entropy_directions)
        elif ctx.trainable:
            ctx.save_for_backward(hidden, weight, bias, targets, kept)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = (grad_logprobs, grad_entropy)
        if ctx.trainable:
            return (*_through_logits(ctx, *upstream), None, None)
        directions = ctx.saved_tensors
        grad_hidden = torch.zeros_like(directions[0])
        for grad, direction in zip(upstream, directions, strict=True):
            if grad is not None:
                grad_hidden = grad_hidden + grad.unsqueeze(-1) * direction
        return grad_hidden.type_as(directions[0]), None, None, None, None


def _through_logits(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return gradients of hidden, weight and bias, chunk by chunk; weight and bias accumulate in float32 or wider."""
    hidden, weight, bias, targets, kept = ctx.saved_tensors
    inputs = (hidden, weight, bias)
    grads = [
        at_least_float32(torch.zeros_like(tensor)) if needed else None
        for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    ]
    for rows in ctx.head.chunks(len(targets)):
        logits = ctx.head.logits(hidden[rows], weight, bias) if kept is None else kept[rows]
        stored = kept is not None and ctx.head.softcap is None
        log_softmax = logits if stored else logits.log_softmax(-1)
        if ctx.head.softcap is None:
            logits = log_softmax
        slopes = []
        if grad_entropy is not None:
            slopes.append(_entropy_slope(log_softmax).mul_(grad_entropy[rows, None]))
        if grad_logprobs is not None:
            out = None if stored else log_softmax
            slopes.append(_logprob_slope(log_softmax, targets[rows], out).mul_(grad_logprobs[rows, None]))
        if not slopes:
            continue
        slope = slopes[0] if len(slopes) == 1 else slopes[0].add_(slopes[1])
        _add_chunk(grads, rows, ctx.head.through(slope, logits).type_as(weight), hidden[rows], weight)
        del logits, log_softmax, slopes, slope  # frees the memory before the next chunk's are computed
    return tuple(None if g is None else g.type_as(x) for g, x in zip(grads, inputs, strict=True))


def _add_chunk(grads: list[Tensor | None], rows: slice, slope: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Add one chunk's part to the gradients of hidden, weight and bias; slope has shape (chunk, vocabulary)."""
    grad_hidden, grad_weight, grad_bias = grads
    if grad_hidden is not None:
        grad_hidden[rows] = slope @ weight
    if grad_weight is not None and grad_weight.dtype == slope.dtype:
        grad_weight.addmm_(slope.T, hidden)  # without a second matrix of the head's size
    elif grad_weight is not None:
        grad_weight += slope.T @ hidden
    if grad_bias is not None:
        grad_bias += slope.sum(0)
