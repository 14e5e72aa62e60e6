"""Kernels of liger-kernel replace a family's modules; with the package installed, results stay the same."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import refused

from rlhf_lightning.models.liger import LigerKernels
from rlhf_lightning.modules import SFTModule


def with_package(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, Any] | None) -> None:
    """Install a stand-in for liger-kernel, or for None none at all."""
    name = "liger_kernel.transformers.monkey_patch"
    for part in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, part, None if kernels is None else ModuleType(part))
    module: Any = ModuleType(name)
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = kernels
    monkeypatch.setitem(sys.modules, name, None if kernels is None else module)


def set_up(folder: str) -> None:
    trainer: Any = SimpleNamespace()
    LigerKernels().setup(trainer, SFTModule(init_from=folder), "fit")


def test_the_kernels_of_losses_are_left_out(policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, bool]] = []

    def replace(rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True) -> None:
        given.append({"rope": rope, "losses": cross_entropy or fused_linear_cross_entropy})

    with_package(monkeypatch, {"llama": replace})
    set_up(policy_folder)
    assert given == [{"rope": True, "losses": False}]


def test_a_missing_package_and_an_unknown_family_are_refused(
    policy_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_package(monkeypatch, {})
    with refused("no-kernels-for-family", "llama"):
        set_up(policy_folder)
    with_package(monkeypatch, None)
    with refused("no-liger-kernel", "liger-kernel and triton"):
        set_up(policy_folder)
