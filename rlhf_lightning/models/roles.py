"""Load models for their roles: policy, reference, reward model and critic, separately or on the policy's backbone.

With an adapter, the frozen backbone is loaded once. Without adapters it is the reference. A reward model that was
trained on the same backbone is a further adapter with a scalar head, and so is a critic. Frozen weights are registered
only with the policy: they move to the device with it and are in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lightning.errors import ModelError, SettingError
from rlhf_lightning.models.adapters import (
    CRITIC,
    POLICY,
    REWARD,
    AdapterWeights,
    adapter_weights,
    add_adapter,
    read_adapter,
    with_adapter,
)
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.folders import reading
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.loading import (
    LoadSettings,
    load_hf_model,
    load_reward_hf_model,
    load_weights,
    prepare_for_training,
    refuse_nonfinite_weights,
)
from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.models.quantization import quantization_of, refuse_quantized_file
from rlhf_lightning.models.resolving import (
    SCORE_BIAS,
    adapter_settings,
    backbone_record,
    classifier_labels,
    fingerprint,
    is_adapter,
    load_base_of_adapter,
    output_names,
    refuse_other_quantization,
    resolve_folder,
)
from rlhf_lightning.models.scalar_head import ScalarModel, text_config, unwrapped
from rlhf_lightning.models.self_check import check_class


def load_policy(
    init_from: str,
    settings: LoadSettings | None = None,
    lora: LoraSettings | None = None,
    value_head: bool = False,
    frozen: bool = False,
) -> CausalLM:
    """Load a causal language model to train or to sample from.

    Args:
        init_from: Hub id, folder (whole weights or an adapter) or .gguf file.
        settings: precision, attention kernel, activation checkpointing.
        lora: train an adapter on the frozen backbone; None trains every weight.
        value_head: add a critic's head on the trunk.
        frozen: whether the model is only sampled from, so that its file may hold quantised weights.

    Raises:
        MissingError: the folder or its weights do not exist.
        ModelError: an adapter's backbone is not the one it was trained on, or has another quantisation; or the adapter
            is a reward model's.
    """
    settings = settings or LoadSettings()
    name = resolve_folder(init_from)
    refuse_reward_model(name)
    continued = name if lora is not None and is_adapter(name) else None
    source = load_base_of_adapter(name) if continued else name
    if continued:
        refuse_other_quantization(continued, settings.quantization)
        model = load_hf_model(source, AutoModelForCausalLM, settings)
    else:
        model = load_weights(name, AutoModelForCausalLM, settings)
    if not frozen:
        refuse_quantized_file(model, init_from, settings.quantization)
    with reading(init_from):
        prepare_for_training(model, settings)
        if lora is not None:
            _refuse_growth(model, source, settings)
            model = add_lora(model, lora, "CAUSAL_LM", start_from=continued, seed=settings.seed)
        refuse_nonfinite_weights(model, init_from)
        policy = CausalLM(model, value_head, source)
        if settings.self_check:
            check_class(policy, lora)
    return policy


def _refuse_growth(model: Any, source: str, settings: LoadSettings) -> None:
    """Refuse an adapter on embeddings that were given new rows: its folder holds no backbone, so they would be lost."""
    rows = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config(decoder=True).vocab_size
    if settings.embeddings > rows:
        raise SettingError(
            "new-tokens-need-rows",
            f"{source} has {rows} embeddings, and the new tokens need {settings.embeddings}, which an adapter folder "
            f"cannot store; write a backbone with them first (rlhf export {source} --out FOLDER --new_tokens ...), and "
            "start from that folder",
        )


def refuse_reward_model(name: str) -> None:
    """Refuse to sample from a reward model, whole or adapter: loaded as a policy, it would get a random LM head.

    Raises:
        ModelError: ``name`` is the folder of a reward model.
    """
    what = ""
    if is_adapter(name) and adapter_settings(name).get("task_type") == "SEQ_CLS":
        what = f"the adapter in {name} is a reward model's"
    elif (Path(name) / "config.json").is_file() and classifier_labels(name):
        what = f"{name} is a reward model"
    if what:
        raise ModelError(
            "reward-model", f"{what}: it scores completions and cannot generate them; name a causal language model"
        )


def load_reference(init_from: str, settings: LoadSettings | None = None) -> CausalLM:
    """Load a frozen copy as the reference of a KL penalty, without gradients and in eval mode."""
    policy = load_policy(init_from, settings_for_inference(settings or LoadSettings()), frozen=True)
    return policy.requires_grad_(False).eval()


def load_frozen(name: str, dtype: str = "float32") -> CausalLM:
    """Load a frozen policy to sample from or to judge with, in eval mode on the best available device.

    Raises:
        MissingError: the folder or its weights do not exist.
        ModelError: it is a reward model.
    """
    refuse_reward_model(resolve_folder(name))
    policy = load_policy(name, LoadSettings(dtype=dtype), frozen=True).requires_grad_(False).eval()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return policy.to(accelerator or "cpu")


def settings_for_inference(settings: LoadSettings) -> LoadSettings:
    """Return the settings of a frozen model: its own precision, and no activation checkpointing."""
    return replace(settings, activation_checkpointing=False, dtype=settings.frozen_dtype or settings.dtype)


class AdapterScalar(ScalarModel):
    """A scalar role (reward model or critic) on the policy's backbone, made of an adapter and a head.

    Sharing the backbone saves memory, not time. The adapter's matrices are parameters of the policy, the head is a
    parameter of this module: nothing is registered twice.

    Args:
        policy: the policy with the shared backbone; it already holds the adapter.
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
        """The policy with the shared backbone."""
        return self._policy[0]

    @property
    def reads_trees(self) -> bool:  # type: ignore[override]
        """Whether the policy's backbone supports packed rows with tree attention."""
        return self.policy.reads_trees

    @property
    def pads_rows(self) -> bool:  # type: ignore[override]
        """Whether the policy's backbone pads rows of different lengths and forwards them together."""
        return self.policy.pads_rows

    @property
    def model(self) -> Any:
        """The Hugging Face model that all roles share."""
        return self.policy.model

    @property
    def head(self) -> nn.Module:
        return self.score

    def forward(self, layout: Layout, per_token: bool = False) -> Tensor:
        """Score completions or states with this role's adapter; the policy's adapter is restored afterwards."""
        with with_adapter(self.model, self.adapter):
            return super().forward(layout, per_token)


def belongs_to(policy: CausalLM, folder: str) -> bool:
    """Return whether a folder holds an adapter trained on the policy's backbone with the same quantisation."""
    if not (policy.has_adapter and is_adapter(folder)):
        return False
    if isinstance(policy.model.peft_config[POLICY].trainable_token_indices, Mapping):
        return False  # peft supports no second adapter unless it trains head rows, too
    record, mine = backbone_record(folder), fingerprint(policy.source)
    alike = record.get("quantization") == quantization_of(unwrapped(policy.model))
    return alike and mine is not None and record.get("fingerprint") == mine


def load_reward_model(folder: str, settings: LoadSettings, policy: CausalLM | None = None, **changes: Any) -> Any:
    """Load a frozen reward model: on the policy's backbone if it was trained on that, else as a separate model.

    A separate adapter's backbone is quantised as in its training.

    Args:
        folder: folder of a reward model, whole or an adapter.
        settings: precision and device.
        policy: a loaded policy whose backbone the reward model may share.
        **changes: changes of the Hugging Face config, for a separate model.
    """
    if policy is not None and belongs_to(policy, folder):
        start = read_adapter(folder)
        dtype = unwrapped(policy.model).get_input_embeddings().weight.dtype  # embeddings are never quantised
        if start.head is not None and dtype == settings.torch_dtype:
            name = _free_name(policy, REWARD)
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
    """Wrap a Hugging Face model with a scalar head as a ScalarModel, and check its forward against the model's own."""
    model = ScalarModel(hf, bias=float(getattr(hf.config, SCORE_BIAS, 0.0)))
    if settings.self_check:
        check_class(model)
    return model


def add_critic(policy: CausalLM, lora: LoraSettings, start_from: str | None = None) -> AdapterScalar:
    """Add a trainable critic to the policy's backbone.

    Args:
        policy: the policy, an adapter.
        lora: the run's settings; only ``dropout`` is used, the rest comes from the adapter that the critic starts from.
        start_from: folder of an adapter on the same backbone; the critic also takes its head. None starts from the
            policy's adapter, with a head of zeros.

    Raises:
        ModelError: ``start_from`` is not an adapter on the policy's backbone.
        SettingError: the policy trains modules of the backbone fully.
    """
    if start_from is not None and not belongs_to(policy, start_from):
        raise ModelError(
            "other-backbone",
            f"critic='adapter' cannot start from {start_from}: it is not an adapter trained on the policy's "
            "backbone; use critic='separate', or leave critic_init out to start from the policy",
        )
    model = policy.model
    if whole := model.peft_config[POLICY].modules_to_save:
        raise SettingError(
            "adapter-critic-whole-modules",
            f"critic='adapter' cannot share a backbone in which the policy fully trains {', '.join(whole)}; use "
            "critic='separate'",
        )
    start = AdapterWeights(model.peft_config[POLICY], adapter_weights(model, POLICY), None)
    if start_from is not None:
        start = read_adapter(start_from)
    start.config.lora_dropout = lora.dropout
    name = _free_name(policy, CRITIC)
    add_adapter(model, name, start.config, start.weights, trainable=True)
    zeros = torch.zeros(1, text_config(model).hidden_size)
    bias = 0.0 if start_from is None else _bias(start_from)
    return AdapterScalar(policy, name, zeros if start.head is None else start.head, bias)


def _free_name(policy: CausalLM, role: str) -> str:
    """Return an adapter name for the role, numbered if the role has several adapters."""
    taken = sum(name == role or name.startswith(f"{role}_") for name in policy.model.peft_config)
    return f"{role}_{taken + 1}" if taken else role


def _bias(folder: str) -> float:
    return float(backbone_record(folder).get(SCORE_BIAS, 0.0))
