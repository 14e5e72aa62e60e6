"""Decode steps whose tensors keep their addresses, so that CUDA replays them as graphs.

For a small batch, the host takes longer to launch the kernels of a step than the GPU to run them. A captured graph is
launched at once, and always reads and writes the same addresses. Therefore a step has fixed input tensors, and its
attention reads a fixed number of columns of the KV cache, under a mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rlhf_lightning.models.causal_lm import CausalLM, DecodingStep
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.models.transfer import to_device

STRIDE = 256
"""Attention reads a multiple of so many columns: each multiple needs a graph, whose capture costs about a step."""


def is_replayable(model: CausalLM) -> bool:
    """Return whether steps of a model can be captured: on a GPU, whole weights, full attention in all layers."""
    return next(model.parameters()).is_cuda and model.reads_trees and not is_sharded(model)


class StaticStep:
    """A decode step of a fixed number of rows and columns.

    Args:
        model: the policy.
        cache: its KV cache, with a `SlotLayer` for each layer.
        rows: number of rows in use.
        width: number of columns that attention reads, from the first column of the buffers.
        captures: whether to capture the second step as a graph, and to replay it from then on. The first step runs
            eagerly, since kernels initialise their libraries.
    """

    def __init__(self, model: CausalLM, cache: Any, rows: int, width: int, captures: bool) -> None:
        self.model, self.cache, self.width, self.captures = model, cache, width, captures
        device = cache.layers[0].keys.device
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.counts = torch.zeros(rows + 1, dtype=torch.long, device=device)  # lengths of rows; the column to write
        self.graph: Any = None
        self.logits: Tensor | None = None

    def run(self, tokens: Tensor, lengths: np.ndarray, column: int) -> Tensor:
        """Decode one token in each row, and write its keys and values to a column; return the next logits."""
        self.ids.copy_(tokens.unsqueeze(-1))
        self.counts.copy_(to_device(torch.from_numpy(np.append(lengths, column)), self.counts.device))
        if self.captures and self.logits is not None and self.graph is None:
            self._capture()
        if self.graph is None:
            self.logits = self._forward()
        else:
            self.graph.replay()
        assert self.logits is not None
        return self.logits

    def _forward(self) -> Tensor:
        lengths, column = self.counts[:-1, None], self.counts[-1:]
        places = torch.arange(self.width, device=self.counts.device)
        seen = (places <= column) & (places > column - lengths)
        for layer in self.cache.layers:
            layer.fixed = column, self.width
        try:
            logits: Tensor = self.model(DecodingStep(self.ids, seen[:, None, None], lengths - 1, self.cache))
        finally:
            for layer in self.cache.layers:
                layer.fixed = None
        return logits

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Weights cast during a capture hold no values yet: without a cache no other operation can use them.
        autocast = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        try:
            with autocast, torch.cuda.graph(graph):
                self.logits = self._forward()
        except RuntimeError as error:
            self.captures = False
            rank_zero_warn(f"CUDA cannot capture a decode step of this model, so steps run eagerly: {error}")
        else:
            self.graph = graph


class StaticSteps:
    """The steps of a running batch; a new number of rows or columns, or a moved buffer, begins another step.

    On a CPU nothing is captured.

    Args:
        model: the policy.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model, self.captures = model, next(model.parameters()).is_cuda
        self.shape: tuple[int, int, int] | None = None
        self.step: StaticStep | None = None

    def run(self, cache: Any, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        """Decode one token in each row; see `decoding.Decoder.step`."""
        for layer in cache.layers:
            layer.reserve(layer.get_seq_length(), 1)
        first = cache.layers[0]
        width = min(-(-(first.stop + 1) // STRIDE) * STRIDE, first.keys.shape[-2])
        shape = len(tokens), width, first.keys.data_ptr()
        if self.step is None or shape != self.shape:
            self.shape, self.step = shape, StaticStep(self.model, cache, len(tokens), width, self.captures)
        logits = self.step.run(tokens, lengths, first.stop)
        self.captures = self.step.captures
        for layer in cache.layers:
            layer.stop += 1
        return logits
