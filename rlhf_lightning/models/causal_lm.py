"""The policy and its reference: one forward that gives log-probabilities of completions and nothing larger.

Hidden states are gathered at the positions that predict completion tokens before they meet the LM head, and the head
runs in chunks: [rows, width, vocabulary] never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf_lightning.functional.logprobs import (
    at_least_float32,
    chunked_log_collisions,
    chunked_logprobs,
    chunked_matches,
)
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.loading import (
    LoadSettings,
    LoraSettings,
    add_lora,
    is_adapter,
    load_base_of_adapter,
    load_hf_model,
    load_weights,
    prepare_for_training,
    refuse_reward_adapter,
    resolve_folder,
)
from rlhf_lightning.models.scalar_head import trunk, unwrapped


class TokenOutputs(NamedTuple):
    """What one forward gives, on the (completions, length) grid, 0 under the mask.

    Attributes:
        logprobs: log-probability of each completion token at the temperature asked for.
        entropy: entropy of the next-token distribution, nats; None unless asked for.
        values: the shared critic's values; None unless the model has a value head and values were asked for.
        matches: 1 where the token is the model's likeliest; None unless asked for.
        collisions: log-probability that two draws from the next-token distribution agree, without gradient; None unless
            asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None
    matches: Tensor | None
    collisions: Tensor | None = None


class CausalLM(nn.Module):
    """A causal language model, with an optional value head on the same trunk.

    Args:
        model: the Hugging Face model, possibly wrapped by peft.
        value_head: give it a scalar head, initialised to zero, for a critic that shares the trunk.
        source: the folder or hub id the backbone came from.
    """

    def __init__(self, model: Any, value_head: bool = False, source: str = "") -> None:
        super().__init__()
        self.model = model
        self.source = source
        self.value_head: nn.Linear | None = None
        if value_head:
            self.value_head = nn.Linear(model.config.hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def has_adapter(self) -> bool:
        """Whether the policy is an adapter on a frozen backbone."""
        return hasattr(self.model, "peft_config")

    def forward(
        self,
        layout: Layout,
        temperature: float = 1.0,
        with_entropy: bool = False,
        value_layout: Layout | None = None,
        with_matches: bool = False,
        with_collisions: bool = False,
    ) -> TokenOutputs:
        """Return log-probabilities of the layout's completion tokens, and what else is asked for.

        Args:
            layout: sequences in rows.
            temperature: logits are divided by it.
            with_entropy: also return the entropy of each next-token distribution.
            value_layout: the same rows with the states to value; None gives no values.
            with_matches: also return whether each token is the likeliest one; costs the head's product again.
            with_collisions: also return how likely two draws agree at each token; costs the head's product again.
        """
        states = trunk(self.model)(input_ids=layout.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden = states[layout.predictors]
        head, config = unwrapped(self.model).get_output_embeddings(), self.model.config
        softcap, scale = getattr(config, "final_logit_softcapping", None), logit_scale(config)
        logprobs, entropy = chunked_logprobs(
            hidden,
            head.weight,
            layout.targets,
            bias=head.bias,
            temperature=temperature,
            with_entropy=with_entropy,
            softcap=softcap,
            scale=scale,
        )
        values = None
        if value_layout is not None and self.value_head is not None:
            values = value_layout.scatter(
                self.value_head(at_least_float32(states[value_layout.predictors])).squeeze(-1)
            )
        matches = chunked_matches(hidden, head.weight, layout.targets, head.bias) if with_matches else None
        collisions = None
        if with_collisions:
            collisions = chunked_log_collisions(hidden, head.weight, head.bias, temperature, softcap, scale)
        return TokenOutputs(
            layout.scatter(logprobs),
            None if entropy is None else layout.scatter(entropy),
            values,
            None if matches is None else layout.scatter(matches.float()),
            None if collisions is None else layout.scatter(collisions),
        )

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Run the frozen model that training started from: adapters off, or the adapter as it was loaded.

        Raises:
            ValueError: the model has no adapter, so it holds no second model.
        """
        if not self.has_adapter:
            raise ValueError("only a model with an adapter holds its own reference")
        if "reference" in self.model.peft_config:
            self.model.set_adapter("reference")
            try:
                yield
            finally:
                self.model.set_adapter("default")
        else:
            with self.model.disable_adapter():
                yield


def logit_scale(config: Any) -> float:
    """Factor between the head's product and the logits: Cohere multiplies by it, Granite divides."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def load_policy(
    init_from: str,
    settings: LoadSettings | None = None,
    lora: LoraSettings | None = None,
    value_head: bool = False,
) -> CausalLM:
    """Load a causal language model to train or to sample from.

    Args:
        init_from: hub id, folder (whole weights or an adapter) or .gguf file.
        settings: precision, attention kernel, checkpointing.
        lora: train an adapter on the frozen backbone; None trains every weight.
        value_head: add a critic's head on the trunk.

    Raises:
        FileNotFoundError: there is no such folder, or no weights in it.
        ValueError: an adapter's backbone is not the one it was trained on, or the adapter is a reward model's.
    """
    settings = settings or LoadSettings()
    name = resolve_folder(init_from)
    refuse_reward_adapter(name)
    continued = name if lora is not None and is_adapter(name) else None
    source = load_base_of_adapter(name) if continued else name
    if continued:
        model = load_hf_model(source, AutoModelForCausalLM, settings)
    else:
        model = load_weights(name, AutoModelForCausalLM, settings)
    prepare_for_training(model, settings)
    if lora is not None:
        model = add_lora(model, lora, "CAUSAL_LM", start_from=continued, seed=settings.seed)
    return CausalLM(model, value_head, source)


def load_reference(init_from: str, settings: LoadSettings | None = None) -> CausalLM:
    """Load a frozen copy for the KL to be measured from, without gradients and in eval mode."""
    settings = settings or LoadSettings()
    policy = load_policy(init_from, settings=settings_for_inference(settings))
    return policy.requires_grad_(False).eval()


def adapted_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each adapted weight merged, under its name in the backbone: base + scaling * B A."""
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "base_layer"):
            base = layer.base_layer.weight
            yield f"{name.removeprefix('base_model.model.')}.weight", base + layer.get_delta_weight("default").to(base)


def settings_for_inference(settings: LoadSettings) -> LoadSettings:
    """The same settings without activation checkpointing, which a frozen model never needs."""
    return replace(settings, activation_checkpointing=False)


def trainable_fraction(model: nn.Module) -> float:
    """Share of a model's parameters that training changes."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained / max(total, 1)


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients, and every submodule back as it was.

    In train mode with activation checkpointing, generation drops its cache and samples garbage without an error.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
