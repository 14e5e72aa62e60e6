"""Who plays which part: the reference that a policy is held against, as a model of its own or inside the policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.adaptive_preference import mixed_reference
from rlhf_lightning.models.causal_lm import CausalLM, adapted_weights, load_reference
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.loading import LoadSettings


class Reference:
    """The frozen model that training started from. Where the policy is an adapter, its backbone is the reference.

    Args:
        policy: the policy in training.
        init_from: what it started from.
        settings: how a copy is loaded.
        own: load a copy in every case, for a reference that will move.
    """

    def __init__(self, policy: CausalLM, init_from: str, settings: LoadSettings, own: bool = False) -> None:
        self.policy = policy
        self.copy = load_reference(init_from, settings) if own or not policy.has_adapter else None

    @property
    def models(self) -> tuple[CausalLM, ...]:
        """The copy, if there is one: it moves to the device by hand, and into no checkpoint or optimizer."""
        return () if self.copy is None else (self.copy,)

    @contextmanager
    def as_model(self) -> Iterator[CausalLM]:
        """The reference as a language model, to sample from or to forward."""
        if self.copy is not None:
            yield self.copy
        else:
            with self.policy.as_reference():
                yield self.policy

    @torch.no_grad()
    def logprobs(self, layout: Layout, temperature: float = 1.0) -> Tensor:
        """Return log-probabilities of the layout's completions, without gradient, shape (completions, length)."""
        with self.as_model() as model:
            return model(layout, temperature).logprobs

    # -- a reference that moves ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, alpha: float = 1.0) -> None:
        """Mix the policy's weights into the copy's: alpha policy + (1 - alpha) reference; 1 replaces it."""
        for _, reference, policy in self._followed():
            reference.copy_(mixed_reference(reference, policy.to(reference), alpha))

    def moved_weights(self) -> dict[str, Tensor]:
        """Return the copy's weights that follow the policy's, for a checkpoint."""
        return {name: reference.detach() for name, reference, _ in self._followed()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Put the copy where a checkpoint had it."""
        for name, reference, _ in self._followed():
            reference.copy_(weights[name])

    def _followed(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yield name, reference's and policy's value of each weight that moves: with an adapter the adapted ones."""
        assert self.copy is not None, "a reference moves that is a model of its own"
        model = self.policy.model
        for name, weight in adapted_weights(model) if self.policy.has_adapter else model.named_parameters():
            yield name, self.copy.model.get_parameter(name), weight
