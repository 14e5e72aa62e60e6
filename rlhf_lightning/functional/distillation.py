"""Distil a teacher into a student on the same ids: divergences of full distributions, and sampled advantages.

Logits have shape (..., vocabulary) and are already shifted. Functions return one value per token, shape (...), which
the caller masks and reduces. Both models must share a tokenizer. The caller detaches the teacher's tensors.
``temperature`` applies to both softmaxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.logprobs import at_least_float32, kl_k1, require_shape


def common_vocabulary(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Truncate both logits to the smaller vocabulary; models of one tokenizer may pad their vocabulary differently."""
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    return student_logits[..., :size], teacher_logits[..., :size]


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return KL(teacher || student) of each token in nats: mass-covering, the student must cover the teacher."""
    student, teacher = _log_softmaxes(student_logits, teacher_logits, temperature)
    return _kl(teacher, student)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return KL(student || teacher) of each token in nats: mode-seeking, the student avoids unlikely tokens."""
    student, teacher = _log_softmaxes(student_logits, teacher_logits, temperature)
    return _kl(student, teacher)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    r"""Return GKD's generalized Jensen-Shannon divergence of each token (Agarwal et al., arXiv 2306.13649, Eq. 1).

    It is beta KL(P || M) + (1 - beta) KL(Q || M) with P the teacher, Q the student and M = beta P + (1 - beta) Q,
    computed in log space. It is symmetric at beta 0.5. At both ends of beta the divergence tends to 0 and is
    proportional to a KL. By convention this KL is returned there: `forward_kl` for beta 0, `reverse_kl` for beta 1.

    Raises:
        SettingError: beta is outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise SettingError("setting-out-of-range", f"beta is {beta}: it must be in [0, 1]")
    if beta in (0, 1):
        return (forward_kl if beta == 0 else reverse_kl)(student_logits, teacher_logits, temperature)
    student, teacher = _log_softmaxes(student_logits, teacher_logits, temperature)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _log_softmaxes(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    require_shape("...", student_logits=student_logits, teacher_logits=teacher_logits)
    student, teacher = (
        (at_least_float32(logits) / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits)
    )
    # An impossible token must add 0 * finite, not 0 * inf.
    return student.clamp(min=torch.finfo(student.dtype).min), teacher.clamp(min=torch.finfo(teacher.dtype).min)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) over the last dimension, given log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def top_k_and_rest(
    student_logits: Tensor, teacher_logits: Tensor, k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the student's k likeliest ids and of all other ids combined; each (..., k + 1).

    They define both distributions over fewer classes, so every divergence between them is a lower bound of the
    divergence of the full distributions (data-processing inequality). If k is at least the vocabulary size, nothing is
    reduced.
    """
    student, teacher = _log_softmaxes(student_logits, teacher_logits, temperature)
    if k >= student.shape[-1]:
        return student, teacher
    top = student.detach().topk(k).indices
    lowest = torch.finfo(student.dtype).min

    def reduced(logprobs: Tensor) -> Tensor:
        rest = logprobs.scatter(-1, top, lowest).logsumexp(-1, keepdim=True)
        return torch.cat([logprobs.gather(-1, top), rest.clamp(min=lowest)], -1)

    return reduced(student), reduced(teacher)


def distillation_advantages(teacher_logprobs: Tensor, logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    r"""Return the advantage of each sampled token, log teacher - log student, without gradient; 0 under the mask.

    With a policy-gradient loss this is on-policy distillation: the reverse KL by the k1 estimator for each token. All
    tensors have shape (rows, length).
    """
    require_shape("rows length", teacher_logprobs=teacher_logprobs, logprobs=logprobs, mask=completion_mask)
    return torch.where(completion_mask, kl_k1(teacher_logprobs, logprobs).detach(), 0.0)


def top1_agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return 1 for each token where student and teacher have the same most likely id, else 0; shape (...)."""
    require_shape("...", student_logits=student_logits, teacher_logits=teacher_logits)
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float()


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """Return logits of an LM head, softcap * tanh(scale * (hidden W^T + bias) / softcap), in float32 or wider.

    The arguments are those of `logprobs.chunked_logprobs`.
    """
    logits = at_least_float32(F.linear(hidden.type_as(weight), weight, bias)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def chunked_over_tokens(
    function: Callable[..., Mapping[str, Tensor]], *tensors: Tensor, chunk_tokens: int = 1024
) -> dict[str, Tensor]:
    """Call a function on one chunk of tokens at a time; return its values by name, each of shape (tokens,).

    With gradient, only the inputs are stored, and each chunk is recomputed in the backward pass. So neither pass holds
    more than one chunk of intermediate values. The function should compute values without gradient last, because
    recomputation stops once it has everything that the gradient needs.

    Args:
        function: called with a chunk of each tensor; returns values per token by name, each of shape (chunk,). Weights
            in its closure get gradients too. It must draw no random numbers.
        tensors: each of shape (tokens, ...).
        chunk_tokens: number of tokens per chunk.
    """
    parts = []
    for chunk in zip(*(tensor.split(chunk_tokens) for tensor in tensors), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(function(*chunk))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
