"""Frozen policies that others are measured from: log-probabilities and whole distributions, without gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM, PredictingStates
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.sharding import is_sharded, whole


class FrozenPolicy(ABC):
    """Base of reference and teacher."""

    moved: bool = False
    """Whether its weights have followed the policy's."""

    _whole_head: tuple[Tensor, Tensor | None] | None = None

    @abstractmethod
    def as_model(self) -> AbstractContextManager[CausalLM]:
        """Give the language model, to sample from or to forward."""

    @property
    @abstractmethod
    def head_owner(self) -> CausalLM:
        """The model whose LM head makes the logits."""

    @torch.no_grad()
    def logprobs(self, layout: Layout, temperature: float = 1.0) -> Tensor:
        """Return log-probabilities of the layout's completions, shape (completions, length)."""
        with self.as_model() as model:
            return model(layout, temperature).logprobs

    @torch.no_grad()
    def predicting_states(self, layout: Layout) -> Tensor:
        """Return the states that predict the layout's supervised tokens, shape (tokens, hidden size)."""
        owner = self.head_owner
        if is_sharded(owner) and owner.logits_path != "product":
            raise ModelError(
                "sharded-own-logits",
                f"{type(owner.model).__name__} computes logits in its own forward, which cannot be called on states "
                "while its weights are sharded; train without sharding, or with an objective that needs no whole "
                "distributions",
            )
        if self._whole_head is None and is_sharded(owner):
            # Ranks ask for different numbers of chunks of logits, and gathering a weight takes all ranks at once.
            weight, bias = owner.head()
            self._whole_head = whole(weight.detach()), None if bias is None else whole(bias.detach())
        with self.as_model() as model:
            return model(PredictingStates(layout))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits of hidden states, fp32 or wider, shape (tokens, vocabulary)."""
        if self.head_owner.logits_path == "product":
            return self.head_owner.logits(hidden, self._whole_head)
        with self.as_model() as model:
            return model.logits(hidden)
