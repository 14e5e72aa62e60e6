"""FlashAttention-3 is used where asked for, and refused where it is missing or wrong."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import refused

from rlhf_lightning.models import flash_attention
from rlhf_lightning.models.flash_attention import FlashAttention


def call(hook: Any, device: str = "cuda:0") -> None:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    hook(trainer, None, "fit")


def test_a_cpu_and_a_missing_package_are_refused() -> None:
    with refused("flash-attention-needs-gpu", "not on cpu"):
        call(FlashAttention().setup, "cpu")
    with refused("no-flash-attention", "flash_attn_interface"):
        call(FlashAttention().setup)
    with refused("no-flash-attention", "flash_attn.cute"):
        call(FlashAttention("FA4").setup)


def test_the_kernels_are_checked_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    active: list[str] = []
    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", active.append)
    monkeypatch.setattr("torch.nn.attention.restore_flash_attention_impl", active.clear)
    for right in (True, False):
        asked = functools.cache(lambda device, dtype, right=right: active == ["FA3"] and right)
        monkeypatch.setattr(flash_attention, "takes_lengths", asked)
        assert not asked(torch.device("cuda:0"), torch.bfloat16)  # kept from before the activation
        callback = FlashAttention()
        if right:
            call(callback.setup)
            assert active == ["FA3"]
            call(callback.teardown)
        else:
            with refused("flash-attention-differs", "cuda:0"):
                call(callback.setup)
        assert active == []
