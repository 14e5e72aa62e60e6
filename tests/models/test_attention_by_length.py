"""Test variable-length attention with a kernel in plain PyTorch: the lengths of a packed row suffice."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import sequences
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models.test_packing import PAIR, model_of
from rlhf_lightning.models import packing
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.layout import packed_layout, padded_layout
from rlhf_lightning.models.packing import trees_of

KERNEL = "torch.nn.attention.varlen.varlen_attn"
CPU = torch.device("cpu")
LONE = sequences([([5, 6], [7, 8, 3]), ([9], [4]), ([8, 8, 8], [2, 6])])


def by_lengths(
    query: Tensor, key: Tensor, value: Tensor, asking: Tensor, seen: Tensor, longest_asking: int, longest_seen: int, *,
    scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False, at_the_end: bool = True,
) -> Tensor:  # fmt: skip
    """A kernel as documented; with ``at_the_end`` false, queries and keys of a piece are aligned at their start."""
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    assert int(asking.diff().max()) == longest_asking and int(seen.diff().max()) == longest_seen
    parts = []
    for q, k, v in zip(
        query.split(asking.diff().tolist()), key.split(seen.diff().tolist()), value.split(seen.diff().tolist()),
        strict=True,
    ):  # fmt: skip
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q) if at_the_end else 0)
        states = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        found = scaled_dot_product_attention(*states, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        parts.append(found.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def by_lengths_head_by_head(*states: Any, scale: float | None, window_size: tuple[int, int]) -> Tensor:
    """An older kernel that needs as many key heads as query heads."""
    return by_lengths(*states, scale=scale, window_size=window_size)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace PyTorch's kernel by the given one."""
    packing.takes_lengths.cache_clear()

    def put(found: Any) -> None:
        monkeypatch.setattr(KERNEL, found)

    return put


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("batch", [PAIR, LONE], ids=["prompts shared", "each alone"])
@pytest.mark.parametrize("attends", [by_lengths, by_lengths_head_by_head])
def test_variable_length_attention_equals_padded_rows(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., None], attends: Any, family: str, batch: Any
) -> None:
    kernel(attends)
    monkeypatch.setattr(packing, "half_precision_of", lambda query: query.dtype)
    policy = CausalLM(model_of(family))
    found = []
    for layout in (padded_layout(batch), packed_layout(batch, list(trees_of(batch)))):
        policy.zero_grad()
        logprobs = policy(layout).logprobs
        (logprobs * torch.arange(1.0, logprobs.numel() + 1).view_as(logprobs).cos()).sum().backward()
        found.append([logprobs, *(p.grad for p in policy.parameters() if p.grad is not None)])
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=2e-5)


def test_a_variable_length_kernel_is_tested_before_use(kernel: Callable[..., None]) -> None:
    assert not packing.takes_lengths(CPU, torch.bfloat16)  # PyTorch's own runs on no CPU
    packing.takes_lengths.cache_clear()
    kernel(by_lengths)
    assert packing.takes_lengths(CPU, torch.bfloat16)
    packing.takes_lengths.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # where it is first asked for in mixed precision
        assert packing.takes_lengths(CPU, torch.bfloat16)
    packing.takes_lengths.cache_clear()
    kernel(functools.partial(by_lengths, at_the_end=False))
    assert not packing.takes_lengths(CPU, torch.bfloat16)
    packing.takes_lengths.cache_clear()


def test_a_cpu_has_no_half_precision_kernel() -> None:
    assert packing.half_precision_of(torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16)) is None
