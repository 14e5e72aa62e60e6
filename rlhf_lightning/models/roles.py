"""Who plays which part: reference, reward model and critic, as models of their own or on the policy's backbone.

With an adapter the frozen backbone is loaded once. Adapters off it is the reference; a reward model that was trained on
it is a further adapter with a scalar head; a critic likewise. What is frozen is registered with the policy alone, so it
moves with it and lands in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ModelError, SettingError
from rlhf_lightning.models.adapters import (
    CRITIC,
    POLICY,
    REWARD,
    AdapterWeights,
    adapter_weights,
    add_adapter,
    is_low_rank_alone,
    read_adapter,
    with_adapter,
)
from rlhf_lightning.models.causal_lm import CausalLM, adapted_weights, load_reference
from rlhf_lightning.models.frozen import FrozenPolicy
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.loading import (
    LoadSettings,
    load_reward_hf_model,
    prepare_for_training,
    refuse_nonfinite_weights,
)
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.quantization import quantization_of
from rlhf_lightning.models.resolving import SCORE_BIAS, backbone_record, fingerprint, is_adapter, output_names
from rlhf_lightning.models.scalar_head import ScalarModel, text_config, unwrapped
from rlhf_lightning.models.self_check import check_class
from rlhf_lightning.models.sharding import cut_like, whole


class Reference(FrozenPolicy):
    """The frozen model that training started from. Where the policy is an adapter, its backbone is the reference.

    Args:
        policy: the policy in training.
        init_from: what it started from.
        settings: how a copy is loaded.
        own: load a copy in every case, in fp32, for a reference that will move.

    Raises:
        SettingError: the reference will move, and its weights would be quantised, or cannot follow the adapter's.
    """

    def __init__(self, policy: CausalLM, init_from: str, settings: LoadSettings, own: bool = False) -> None:
        if own and settings.quantization is not None:
            raise SettingError(
                "quantized-moving-reference",
                f"a reference that moves cannot be in {settings.quantization}; set quantization to null",
            )
        self.policy = policy
        if own and policy.has_adapter and not is_low_rank_alone(policy.model.peft_config[POLICY]):
            raise SettingError(
                "moving-reference-adapter",
                "a reference that moves cannot follow an adapter with dora, target_parameters, modules_to_save or "
                "trained_tokens; train every weight (lora: null), or a plain adapter",
            )
        if own:
            settings = replace(settings, frozen_dtype="float32")
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

    @property
    def head_owner(self) -> CausalLM:
        """The copy, or the policy, whose head an adapter leaves unchanged."""
        return self.policy if self.copy is None else self.copy

    # -- a reference that moves ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, alpha: float = 1.0) -> None:
        """Mix the policy's weights into the copy's: alpha policy + (1 - alpha) reference; 1 replaces it."""
        for _, reference, policy in self._followed():
            reference.copy_(torch.lerp(reference, policy.to(reference), alpha))
        self.moved, self._whole_head = True, None

    def moved_weights(self) -> dict[str, Tensor]:
        """Return the copy's weights that follow the policy's, for a checkpoint."""
        return {name: whole(reference.detach()) for name, reference, _ in self._followed()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Put the copy where a checkpoint had it."""
        for name, reference, _ in self._followed():
            reference.copy_(cut_like(weights[name], reference))
        self.moved, self._whole_head = True, None

    def _followed(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yield name, reference's and policy's value of each weight that moves: with an adapter the adapted ones."""
        assert self.copy is not None, "a reference moves that is a model of its own"
        model = self.policy.model
        for name, weight in adapted_weights(model) if self.policy.has_adapter else model.named_parameters():
            yield name, self.copy.model.get_parameter(name), weight


class AdapterScalar(ScalarModel):
    """A scalar role on the policy's backbone: an adapter of its own and a head. It saves memory, not time.

    The adapter's matrices are the policy's parameters, the head is this module's: nothing is registered twice.

    Args:
        policy: whose backbone it runs on; it holds the adapter already.
        adapter: name of the adapter.
        head: weight of the head, shape (outputs, hidden size).
        bias: constant that scores are reported relative to, in score units.
    """

    def __init__(self, policy: CausalLM, adapter: str, head: Tensor, bias: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.adapter, self.bias = adapter, bias
        self._policy = (policy,)  # in a tuple, so that it is not registered here too
        self.score = nn.Linear(head.shape[-1], len(head), bias=False, dtype=torch.float32, device=head.device)
        with torch.no_grad():
            self.score.weight.copy_(head)

    @property
    def policy(self) -> CausalLM:
        """Whose backbone it runs on."""
        return self._policy[0]

    @property
    def reads_trees(self) -> bool:  # type: ignore[override]
        """Whether the policy's backbone reads rows of several sequences."""
        return self.policy.reads_trees

    @property
    def pads_rows(self) -> bool:  # type: ignore[override]
        """Whether the policy's backbone is forwarded on rows of different lengths together."""
        return self.policy.pads_rows

    @property
    def model(self) -> Any:
        """The Hugging Face model that all roles share."""
        return self.policy.model

    @property
    def head(self) -> nn.Module:
        """The scalar head."""
        return self.score

    def forward(self, layout: Layout, per_token: bool = False) -> Tensor:
        """Score completions or value states with this role's adapter; the policy's is active again afterwards."""
        with with_adapter(self.model, self.adapter):
            return super().forward(layout, per_token)


def backbone_dtype(policy: CausalLM) -> torch.dtype:
    """Precision of what is not quantised on a policy's backbone."""
    return unwrapped(policy.model).get_input_embeddings().weight.dtype


def belongs_to(policy: CausalLM, folder: str) -> bool:
    """Whether a folder holds an adapter that was trained on the policy's very backbone, quantised alike."""
    if not (policy.has_adapter and is_adapter(folder)):
        return False
    if isinstance(policy.model.peft_config[POLICY].trainable_token_indices, Mapping):
        return False  # peft keeps no second adapter without rows of the head
    record, mine = backbone_record(folder), fingerprint(policy.source)
    alike = record.get("quantization") == quantization_of(unwrapped(policy.model))
    return alike and mine is not None and record.get("fingerprint") == mine


def load_reward_model(folder: str, settings: LoadSettings, policy: CausalLM | None = None, **changes: Any) -> Any:
    """Load a frozen reward model: on the policy's backbone where it was trained on that, else a model of its own.

    An adapter on a backbone of its own is quantised as it was trained.

    Args:
        folder: a reward model's, whole or an adapter.
        settings: its precision and where it is placed.
        policy: a policy in memory that it may share the backbone of.
        **changes: of the Hugging Face config, where it is loaded on its own.

    Returns:
        The reward model as a ScalarModel, in eval mode.
    """
    shared = policy is not None and belongs_to(policy, folder) and backbone_dtype(policy) == settings.torch_dtype
    if shared:
        assert policy is not None
        start = read_adapter(folder)
        if start.head is not None:
            name = free_name(policy, REWARD)
            add_adapter(policy.model, name, start.config, start.weights)
            model: ScalarModel = AdapterScalar(policy, name, start.head, _bias(folder))
            refuse_nonfinite_weights(policy.model, folder)
            refuse_nonfinite_weights(model, folder)
            return model.requires_grad_(False).eval()
    record = backbone_record(folder) if is_adapter(folder) else {}
    settings = replace(settings, quantization=record.get("quantization"), from_scratch=False, embeddings=0)
    hf = load_reward_hf_model(folder, settings, max(len(output_names(folder)), 1), **changes)
    refuse_nonfinite_weights(hf, folder)
    prepare_for_training(hf, replace(settings, activation_checkpointing=False))
    return scalar_model(hf, settings).requires_grad_(False).eval()


def scalar_model(hf: Any, settings: LoadSettings) -> ScalarModel:
    """Return a Hugging Face model with a scalar head as a ScalarModel, its forward checked against the model's own."""
    model = ScalarModel(hf, bias=float(getattr(hf.config, SCORE_BIAS, 0.0)))
    if settings.self_check:
        check_class(model)
    return model


def add_critic(policy: CausalLM, lora: LoraSettings, start_from: str | None = None) -> AdapterScalar:
    """Put a trainable critic on the policy's backbone.

    Args:
        policy: the policy, an adapter.
        lora: the run's settings; dropout is taken from them, the rest from where the critic starts.
        start_from: folder of an adapter on the same backbone, whose head is taken over too; None starts from the
            policy itself, with a head of zeros.

    Raises:
        ModelError: ``start_from`` is not an adapter on the policy's backbone.
        SettingError: the policy trains modules of the backbone whole.
    """
    if start_from is not None and not belongs_to(policy, start_from):
        raise ModelError(
            "other-backbone",
            f"critic='adapter' cannot start from {start_from}: this is not an adapter trained "
            "on the policy's backbone; use critic='separate', or leave critic_init out to start "
            "from the policy",
        )
    model = policy.model
    if whole := model.peft_config[POLICY].modules_to_save:
        raise SettingError(
            "adapter-critic-whole-modules",
            f"critic='adapter' cannot share a backbone whose {', '.join(whole)} the policy trains whole; use "
            "critic='separate'",
        )
    start = AdapterWeights(model.peft_config[POLICY], adapter_weights(model, POLICY), None)
    if start_from is not None:
        start = read_adapter(start_from)
    start.config.lora_dropout = lora.dropout
    name = free_name(policy, CRITIC)
    add_adapter(model, name, start.config, start.weights, trainable=True)
    zeros = torch.zeros(1, text_config(model).hidden_size)
    bias = 0.0 if start_from is None else _bias(start_from)
    return AdapterScalar(policy, name, zeros if start.head is None else start.head, bias)


def free_name(policy: CausalLM, role: str) -> str:
    """Return the role's name for a further adapter, numbered where several play it."""
    taken = sum(name == role or name.startswith(f"{role}_") for name in policy.model.peft_config)
    return f"{role}_{taken + 1}" if taken else role


def _bias(folder: str) -> float:
    return float(backbone_record(folder).get(SCORE_BIAS, 0.0))
