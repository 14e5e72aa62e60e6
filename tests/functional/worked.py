"""Worked numbers: the result of each function on inputs small enough to follow by hand.

Every test module of this folder lists its own in ``WORKED``; each is asserted in float64 and again in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from torch import Tensor

MakeTensor = Callable[[Any], Tensor]

property_test = settings(derandomize=True, max_examples=25, deadline=None)


class Worked(NamedTuple):
    """A number to reproduce.

    Attributes:
        name: name of the number.
        compute: function that gets a tensor constructor of the tested dtype and returns the value.
        expected: expected value, to the printed digits.
    """

    name: str
    compute: Callable[[MakeTensor], Tensor]
    expected: Any


def each(cases: Sequence[Worked]) -> pytest.MarkDecorator:
    """Parametrize a test over worked numbers and dtypes."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two worked numbers share a name"
    grid = [(case, dtype) for dtype in (torch.float64, torch.float32) for case in cases]
    return pytest.mark.parametrize(("case", "dtype"), grid, ids=[f"{c.name}-{str(d)[6:]}" for c, d in grid])


def check(case: Worked, dtype: torch.dtype) -> None:
    """Assert one worked number."""
    rtol, atol = (1e-6, 1e-8) if dtype == torch.float64 else (1e-5, 1e-6)
    found = case.compute(partial(torch.tensor, dtype=dtype))
    torch.testing.assert_close(found.double(), torch.tensor(case.expected).double(), rtol=rtol, atol=atol)


def normal(seed: int, *shape: int) -> Tensor:
    """Return standard normal numbers in float64 that depend only on the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def right_padded_mask(seed: int, rows: int, length: int, least: int = 1) -> Tensor:
    """Return a bool mask of random lengths from ``least`` to ``length``."""
    lengths = torch.randint(least, length + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(length) < lengths


def gradient(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return gradients of the summed function at detached copies of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves).sum(), leaves)
