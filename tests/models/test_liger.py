"""Kernels of liger-kernel replace a family's modules; with the package installed, results stay the same."""

import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
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


COMPARED = """
import sys, torch
from types import SimpleNamespace
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.liger import LigerKernels
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.modules import SFTModule
from rlhf_lightning.types import Sequences

ids, flags = torch.arange(4, 12), torch.ones(5, dtype=torch.bool)
layout = padded_layout(Sequences((ids[:3], ids[2:4]), (ids[3:], ids[1:6]), (0, 1), (flags, flags))).to("cuda")
found = []
for kernels in (False, True):
    if kernels:
        LigerKernels().setup(SimpleNamespace(), SFTModule(init_from=sys.argv[1]), "fit")
    policy = load_policy(sys.argv[1]).cuda()
    assert kernels == any("Liger" in type(part).__name__ for part in policy.modules())
    logprobs = policy(layout).logprobs
    logprobs.sum().backward()
    found.append([logprobs.detach(), *(weight.grad for weight in policy.parameters())])
for one, other in zip(*found, strict=True):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
print("EQUAL")
"""


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None,
    reason="no GPU that PyTorch sees, or liger-kernel is not installed; Triton's interpreter cannot run its norms",
)
def test_the_packages_kernels_give_the_same_log_probabilities_and_gradients(policy_folder: str) -> None:
    """In a process of its own, since they replace transformers' classes."""
    command = [sys.executable, "-c", COMPARED, policy_folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("EQUAL\n"), done.stderr


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
