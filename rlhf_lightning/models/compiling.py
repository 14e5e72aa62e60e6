"""Compile decoder layers with torch.compile: one graph for all layers and all batch shapes.

Each layer is compiled, not the whole model: all layers are alike, so the graph of the first layer serves the rest.
Number of rows and width are symbolic, so a new shape needs no recompilation. A further graph is compiled only where the
arithmetic differs: with or without gradient, one row or several, with or without a mask for shared prompts, adapters on
or off.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rlhf_lightning.compat import allow_graphs
from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.sharding import decoder_layers

MOST_GRAPHS = 32
"""Graphs per layer above which torch falls back to eager mode with a warning; the kinds of pass above are few."""


BACKEND = "inductor"
"""Backend of torch.compile that turns graphs into kernels."""


def missing_compiler(device: str) -> str | None:
    """Describe what torch.compile lacks on this machine; None if nothing is known to be missing.

    Args:
        device: type of the device that the model runs on, "cpu" or "cuda".
    """
    if device == "cpu":
        names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
        if not any(name and shutil.which(name) for name in names):
            return "torch.compile writes C++ for the CPU, and no C++ compiler was found (CXX, g++, clang++)"
    elif device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile writes Triton for the GPU, and the package triton is not installed"
    return None


def compile_layers(model: Any) -> None:
    """Compile the decoder layers of a CausalLM or ScalarModel in place; parameter names and weights do not change.

    Raises:
        ModelError: the model has no list of layers to compile.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ModelError(
            "no-decoder-layers",
            f"{type(model.model).__name__} has no list of decoder layers to compile; turn compilation off",
        )
    allow_graphs(MOST_GRAPHS)
    for layer in layers:
        layer.compile(dynamic=True, backend=BACKEND)
    model.is_compiled = True


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled layers in eager mode: while decoding, every length of the KV cache would need its own graph."""
    if not getattr(model, "is_compiled", False):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
