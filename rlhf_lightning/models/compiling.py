"""Decoder layers compiled by torch.compile: one graph for all layers, and for batches of every shape.

Each layer is compiled rather than the whole model, because all are alike: the first one's graph serves the rest. Rows
and width are symbols in it, so that a new shape compiles nothing. What makes a graph of its own is what changes the
arithmetic: with or without gradient, one row or several, a prompt-sharing mask or none, adapters on or off.
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
"""Graphs of a layer beyond which torch runs it uncompiled, with a warning: there are few kinds of pass, see above."""


BACKEND = "inductor"
"""What torch.compile turns graphs into kernels with."""


def missing_compiler(device: str) -> str | None:
    """Say what torch.compile lacks on this machine; None where nothing is known to be missing.

    Args:
        device: kind of device that the model runs on, "cpu" or "cuda".
    """
    if device == "cpu":
        names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
        if not any(name and shutil.which(name) for name in names):
            return "torch.compile writes C++ for the CPU, and no C++ compiler was found (CXX, g++, clang++)"
    elif device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile writes Triton for the GPU, and the package triton is not installed"
    return None


def compile_layers(model: Any) -> None:
    """Compile the decoder layers of a CausalLM or ScalarModel in place: names and weights stay what they are.

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
    """Run compiled layers uncompiled: decoding fills a cache that grows by a token, each length a graph of its own."""
    if not getattr(model, "is_compiled", False):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
