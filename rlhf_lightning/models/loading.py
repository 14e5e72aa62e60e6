"""Load Hugging Face models from folders: whole weights, adapters merged into their backbone, or bare configs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from rlhf_lightning.errors import MissingError, ModelError, SettingError
from rlhf_lightning.models.adapters import chunk_mlps, read_adapter, recomputation_contexts, refuse_other_adapter
from rlhf_lightning.models.allocator import return_freed_blocks
from rlhf_lightning.models.folders import SAFETENSORS, explained, reading, require_safetensors, trusts
from rlhf_lightning.models.lora import refuse_slow_patterns, untie_adapted
from rlhf_lightning.models.quantization import Quantization, leave_the_file, quantization_config, use_one_arithmetic
from rlhf_lightning.models.resolving import (
    SCORE_BIAS,
    backbone_record,
    is_adapter,
    load_base_of_adapter,
    refuse_other_quantization,
)
from rlhf_lightning.models.scalar_head import initialise_head, text_config


@dataclass(frozen=True)
class LoadSettings:
    """How weights are loaded.

    Args:
        from_scratch: draw new weights from the folder's config instead of reading any.
        dtype: precision of the weights, "float32" or "bfloat16".
        attn_implementation: attention kernel by transformers' name; None leaves the choice to transformers.
        activation_checkpointing: recompute activations in the backward pass instead of storing them.
        seed: seed of newly drawn weights.
        quantization: "nf4" or "int8" keeps the frozen backbone of an adapter in 4 or 8 bits; None keeps ``dtype``.
        frozen_dtype: precision of models that are never trained; None takes ``dtype``.
        device: device on which quantised weights are created; other weights are moved later.
        trust_remote_code: names of the models whose own Python code may be run.
        self_check: compare our forward with the model's own when it is loaded, see `models.self_check`.
        embeddings: minimum number of rows of embeddings and LM head; added rows are the mean of the existing rows.
        says_new_head: print a line if a new score head is drawn; false where an adapter's head replaces it.

    Raises:
        SettingError: ``quantized-from-scratch``: new weights must be trained, and quantised weights are frozen.
    """

    from_scratch: bool = False
    dtype: str = "float32"
    attn_implementation: str | None = None
    activation_checkpointing: bool = False
    seed: int = 0
    quantization: Quantization | None = None
    frozen_dtype: str | None = None
    device: str = "cpu"
    trust_remote_code: tuple[str, ...] = ()
    self_check: bool = True
    embeddings: int = 0
    says_new_head: bool = True

    def __post_init__(self) -> None:
        if self.quantization is not None and self.from_scratch:
            raise SettingError(
                "quantized-from-scratch",
                f"quantization is {self.quantization!r} and from_scratch true: quantized weights are frozen, but new "
                "weights must be trained; train from scratch without quantization first",
            )

    @property
    def is_exact(self) -> bool:
        """Whether two forwards of the same tokens agree to fp32 rounding, independently of batching."""
        return self.dtype == "float32" and self.quantization != "int8"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision as torch names it.

        Raises:
            SettingError: ``dtype`` is neither "float32" nor "bfloat16".
        """
        if self.dtype not in ("float32", "bfloat16"):
            raise SettingError(
                "unknown-choice", f"dtype is {self.dtype!r}; choose 'float32' or 'bfloat16' for trainable weights"
            )
        return getattr(torch, self.dtype)


def load_hf_model(name: str, kind: Any, settings: LoadSettings, **config_changes: Any) -> Any:
    """Load or build a Hugging Face model of ``kind`` (AutoModelForCausalLM, AutoModelForSequenceClassification).

    Raises:
        MissingError: the folder has no weights and ``from_scratch`` is false.
        ModelError: its weights are pickles, or it needs custom code that was not named as trusted.
    """
    trusted = trusts(name, settings.trust_remote_code)
    options: dict[str, Any] = {**config_changes, "trust_remote_code": trusted}
    try:
        if kind is AutoModelForCausalLM:
            _refuse_encoder_decoder(name, trusted)
        with reading(name):
            model = _load_hf_model(name, kind, settings, options)
            make_room(model, settings.embeddings)
        if kind is AutoModelForSequenceClassification and not isinstance(getattr(model, "score", None), nn.Module):
            raise ModelError(
                "no-score-head",
                f"{name}: {type(model).__name__} has no head named score on the state of the last token (it is an "
                "encoder); start a reward model from a causal language model",
            )
        return model
    except (ModelError, ValueError) as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        if "Unrecognized configuration class" in str(cause):
            raise ModelError(
                "unsupported-class",
                f"{name}: transformers has no {kind.__name__.removeprefix('AutoModelFor')} class for a "
                f"{AutoConfig.from_pretrained(name, trust_remote_code=trusted).model_type} model; name a model of "
                "another family",
            ) from error
        refusal = explained(name, cause)
        if refusal is None:
            raise
        raise ModelError("custom-code", refusal) from error


@torch.no_grad()
def make_room(model: Any, rows: int) -> None:
    """Grow embeddings and LM head of a model to at least ``rows`` rows; new rows are the mean of the others."""
    have = model.get_input_embeddings().weight.shape[0]
    if rows <= have:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for weight in () if module is None else module.parameters(recurse=False):
            weight[have:] = weight[:have].float().mean(0).to(weight)


def _refuse_encoder_decoder(name: str, trusted: bool) -> None:
    """Refuse an encoder-decoder model: a causal class would load only its decoder."""
    with reading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            "encoder-decoder",
            f"{name} is an encoder-decoder ({config.model_type}): without its encoder it is not a language model; "
            "name a causal language model",
        )


def _load_hf_model(name: str, kind: Any, settings: LoadSettings, options: dict[str, Any]) -> Any:
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    if settings.quantization is not None:
        options["quantization_config"] = quantization_config(settings.quantization, settings.torch_dtype)
        options["device_map"] = {"": settings.device}
    if settings.from_scratch:
        config = AutoConfig.from_pretrained(name, **options)
        further = {k: v for k, v in options.items() if k in ("attn_implementation", "trust_remote_code")}
        with torch.random.fork_rng():
            with torch.device("meta"):
                _refuse_larger_than_memory(name, kind.from_config(config, dtype=settings.torch_dtype, **further))
            torch.manual_seed(settings.seed)
            model = kind.from_config(config, dtype=settings.torch_dtype, **further)
        if hasattr(model, "score"):
            initialise_head(model.score, text_config(model).hidden_size, settings.seed)
        return model
    require_safetensors(name)
    if Path(name).is_dir() and not any(Path(name).glob(SAFETENSORS)):
        raise MissingError(
            "no-weights",
            f"{name} has no weights (no .safetensors file); name a trained model's folder, or "
            "set from_scratch=true to draw new weights from its config.json",
        )
    with _without_load_report():
        options |= {"dtype": settings.torch_dtype, "output_loading_info": True, "use_safetensors": True}
        model, report = _from_pretrained(name, kind, options)
    missing = set(report["missing_keys"]) if report["missing_keys"] else set()
    _refuse_foreign_weights(name, model, sorted(report["unexpected_keys"] or ()))
    if any(key.startswith("score.") for key in missing):
        initialise_head(model.score, text_config(model).hidden_size, settings.seed)
        missing = {key for key in missing if not key.startswith("score.")}
        if settings.says_new_head:
            rank_zero_info(f"{name} has no score head: a new one is drawn with seed {settings.seed}.")
    if missing:
        few = ", ".join(sorted(missing)[:3])
        raise ModelError(
            "incomplete-weights",
            f"{name} lacks weights for {few}: it is not a complete {kind.__name__} model; name a complete one",
        )
    use_one_arithmetic(model)
    if settings.quantization is not None:
        leave_the_file(model)
    return model


def _from_pretrained(name: str, kind: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Load a model; if a weight's shape differs from the config, name the first such weight."""
    try:
        return kind.from_pretrained(name, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        on_meta = {**options, "device_map": "meta"}  # the wrong shapes may be too large for the memory
        found = "the shapes of the weights differ from config.json"
        with contextlib.suppress(MemoryError, RuntimeError):
            _, report = kind.from_pretrained(name, ignore_mismatched_sizes=True, **on_meta)
            key, had, wanted = min(report["mismatched_keys"])
            found = f"the weight {key} has the shape {tuple(had)}, but config.json says {tuple(wanted)}"
        raise ModelError("unreadable-model", f"{name}: {found}; use the config of these weights") from error


def _refuse_foreign_weights(name: str, model: Any, unread: list[str]) -> None:
    """Refuse unused weights that belong to an existing layer, and report other unused weights.

    Unused weights of a layer, such as a bias, a scale or an adapter, mean that the file holds a different model.

    Raises:
        ModelError: ``foreign-weights``.
    """
    layers = {key for key, module in model.named_modules() if key and next(module.children(), None) is None}
    for key in unread:
        if not layers.isdisjoint(accumulate(key.split(".")[:-1], lambda outer, inner: f"{outer}.{inner}")):
            raise ModelError(
                "foreign-weights",
                f"{name} has the weight {key}, and that layer of a {type(model).__name__} does not use it: its "
                "config.json describes another model; use the config of these weights, or save them merged and "
                "unquantized",
            )
    others = [key for key in unread if not key.startswith("lm_head.")]  # a reward model does not use the LM head
    if others:
        few = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        rank_zero_info(f"{name} has weights that a {type(model).__name__} does not use: {few}.")


def _refuse_larger_than_memory(name: str, described: nn.Module) -> None:
    """Refuse a new model that does not fit into this machine's memory, before allocating it.

    Raises:
        ModelError: ``model-too-large``.
    """
    needed = sum(weight.numel() * weight.element_size() for weight in described.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > memory:
        raise ModelError(
            "model-too-large",
            f"the config of {name} describes weights of {needed / 2**30:,.0f} GiB, and this machine has "
            f"{memory / 2**30:,.0f} GiB of memory; correct its sizes, or use a larger machine",
        )


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence transformers' table of missing weights: this module refuses or reports them itself.

    The handlers are filtered: changing a level clears the caches of all loggers, 0.4 ms each time.
    """
    handlers = list(transformers_logging.get_logger().handlers)
    for handler in handlers:
        handler.addFilter(_is_error)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def refuse_nonfinite_weights(model: nn.Module, name: str) -> None:
    """Refuse a model with NaN or infinity in its weights: its samples or scores would silently be nonsense.

    Raises:
        ModelError: a weight is not finite.
    """
    for key, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            continue
        # The sum reads each weight once without a copy; it may overflow although every weight is finite.
        if not bool(weight.detach().sum(dtype=torch.float32).isfinite()) and not bool(weight.isfinite().all()):
            raise ModelError(
                "non-finite-weights",
                f"{name} has NaN or infinite weights ({key}); use an earlier checkpoint, or train with a "
                "lower learning rate",
            )


def load_weights(name: str, kind: Any, settings: LoadSettings, **config_changes: Any) -> Any:
    """Load whole weights, or an adapter merged into its backbone; on a quantised backbone it stays unmerged.

    Merging is always done in fp32, for any requested precision: rounding would lose a small update.
    """
    if not is_adapter(name):
        return load_hf_model(name, kind, settings, **config_changes)
    if settings.quantization is not None:
        refuse_other_quantization(name, settings.quantization)
    whole = settings if settings.quantization else replace(settings, dtype="float32")
    whole = replace(whole, says_new_head=read_adapter(name).head is None)
    model = load_hf_model(load_base_of_adapter(name), kind, whole, **config_changes)
    refuse_slow_patterns(name, model)
    with reading(name, "adapter"):
        model = _merged(name, kind, model, settings)
    facts = backbone_record(name)
    if SCORE_BIAS in facts:
        setattr(model.config, SCORE_BIAS, facts[SCORE_BIAS])
    return model


def _merged(name: str, kind: Any, model: Any, settings: LoadSettings) -> Any:
    """Put an adapter on its backbone, and merge it unless the backbone is quantized."""
    config = PeftConfig.from_pretrained(name)
    if kind is not AutoModelForCausalLM and config.task_type == "CAUSAL_LM":
        config.task_type = None  # a policy's adapter fits the trunk, but peft would look for an LM head
    if settings.quantization is None:
        untie_adapted(model, name)
    model = PeftModel.from_pretrained(model, name, config=config)
    refuse_other_adapter(model, "default", read_adapter(name).weights)
    if settings.quantization is None:
        model = model.merge_and_unload().to(settings.torch_dtype)
        model.requires_grad_(True)  # peft froze the backbone, and merging does not unfreeze it
    return model


def prepare_for_training(model: Any, settings: LoadSettings | None = None, dropout: float = 0.0) -> None:
    """Set dropout, activation checkpointing and the padding embedding as every stage needs them.

    Dropout is off unless asked for, in all its forms: modules, numbers stored in modules, config fields that are read
    in the forward, and noise on a router's inputs. With dropout, a policy's ratio would differ from 1 before any
    update. Embeddings lose their ``padding_idx``, because masks come from lengths. If pad and end token share an id,
    a ``padding_idx`` would silently keep the end token's embedding from being trained.
    """
    configs = {id(model.config): model.config}
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            configs[id(module.config)] = module.config
        if type(module).__module__ == nn.Dropout.__module__:
            module.p = dropout
        else:
            _set_dropout(module, dropout)
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    for config in configs.values():
        _set_dropout(config, dropout)
    if settings is not None and settings.activation_checkpointing:
        kwargs = {"use_reentrant": False, "context_fn": partial(recomputation_contexts, model)}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        chunk_mlps(model)
        return_freed_blocks()
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()


def _set_dropout(holder: Any, dropout: float) -> None:
    """Set the drop probabilities and noise sizes of a module or config."""
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and (DROPOUT.search(name) or NOISE.search(name)):
            whole = "layerdrop" in name or NOISE.search(name)  # dropping whole layers is always off
            setattr(holder, name, 0.0 if whole else dropout)


DROPOUT = re.compile(r"drop(out|_prob|_rate)?|pdrop|layerdrop")
NOISE = re.compile(r"jitter")


def load_reward_hf_model(name: str, settings: LoadSettings, outputs: int = 1, **config_changes: Any) -> Any:
    """Load a model with a head of one or several outputs; a folder of a causal language model gets a new head."""
    return load_weights(name, AutoModelForSequenceClassification, settings, num_labels=outputs, **config_changes)
