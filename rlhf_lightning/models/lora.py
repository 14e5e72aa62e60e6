"""LoRA adapters, new or continued: settings, and checks that a model supports them."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from rlhf_lightning.compat import bypasses_adapters
from rlhf_lightning.errors import ModelError, SettingError
from rlhf_lightning.models.adapters import REFERENCE, add_adapter, load_into_adapter, read_adapter, refuse_other_adapter
from rlhf_lightning.models.folders import reading
from rlhf_lightning.models.low_rank import use_low_rank_products
from rlhf_lightning.models.resolving import SCORE_BIAS, adapter_settings, backbone_record
from rlhf_lightning.models.scalar_head import text_config


@dataclass
class LoraSettings:
    """Low-rank adaptation (Hu et al., 2106.09685): add a trainable product ``B A`` of rank ``r`` to each frozen weight.

    A continued adapter keeps its own settings, except for ``dropout``.

    Args:
        r: rank of the update.
        alpha: the update is scaled by ``alpha / r``.
        dropout: dropout on the adapter's input. Keep 0 for preference and RL stages, where ratios must start at 1.
        targets: names of the layers to adapt, or "all-linear" for every linear layer except the head.
        rslora: scale the update by ``alpha / sqrt(r)`` instead (rsLoRA, 2312.03732).
        dora: learn norm and direction of each row separately (DoRA, 2402.09353).
        rank_pattern: ranks of some layers, by the end of their name, as in {down_proj: 32}.
        alpha_pattern: alphas of some layers, by the end of their name.
        target_parameters: names of weights outside of linear layers to adapt, such as fused experts
            [experts.down_proj].
        modules_to_save: names of modules to train fully, such as lm_head.
        trained_tokens: tokens whose rows of the embeddings and of the head are trained too.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    target_parameters: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    trained_tokens: list[str | int] = field(default_factory=list)

    theirs: ClassVar[Mapping[str, str]] = {
        "r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules",
        "rslora": "use_rslora", "dora": "use_dora", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
        "target_parameters": "target_parameters", "modules_to_save": "modules_to_save",
        "trained_tokens": "trainable_token_indices",
    }  # fmt: skip
    """peft's name of each setting."""

    ranges: ClassVar[Mapping[str, str]] = {"r": "[1, inf)", "alpha": "(0, inf)", "dropout": "[0, 1)"}


def lora_settings(given: Any) -> LoraSettings | None:
    """Return the settings of an adapter from a mapping or a ``peft.LoraConfig``.

    Raises:
        SettingError: ``unsupported-lora``: the LoraConfig sets an option that `LoraSettings` does not have.
    """
    if isinstance(given, Mapping):
        return LoraSettings(**given)
    if not isinstance(given, LoraConfig):
        return given
    known = LoraSettings.theirs
    plain = LoraConfig(peft_type=given.peft_type, task_type=given.task_type)
    free = {*known.values(), "task_type", "inference_mode", "base_model_name_or_path"}
    other = [name for name, value in vars(plain).items() if name not in free and getattr(given, name) != value]
    if other:
        raise SettingError(
            "unsupported-lora", f"LoraConfig sets {', '.join(other)}; supported are {', '.join(known.values())}"
        )
    values = {name: getattr(given, theirs) for name, theirs in known.items()}
    if isinstance(values["trained_tokens"], Mapping):
        raise SettingError("unsupported-lora", "LoraConfig has trainable_token_indices per module; give one list")
    targets = "all-linear" if values["targets"] is None else values["targets"]
    values["targets"] = targets if isinstance(targets, str) else sorted(targets)
    return LoraSettings(**{name: value for name, value in values.items() if value is not None})


def refuse_slow_patterns(folder: str, model: nn.Module) -> None:
    """Refuse an adapter with layer-name patterns that are invalid regular expressions or take seconds to match.

    Python cannot always interrupt a match, so the patterns are tried in a separate process.

    Raises:
        ModelError: ``hostile-pattern``.
    """
    with reading(folder, "adapter"):
        patterns = _patterns(adapter_settings(folder))
    if not any(set(one) & set("*+{(|[") for one in patterns):
        return
    try:
        names = [name for name, _ in model.named_modules()]
        done = subprocess.run(
            [sys.executable, "-I", "-c", MATCHING], input=json.dumps([patterns, names]), text=True, capture_output=True,
            timeout=PATTERN_SECONDS, check=False,
        )  # fmt: skip
        reason = "is not a regular expression" if done.returncode else None
    except subprocess.TimeoutExpired:
        reason = f"takes more than {PATTERN_SECONDS} s to match"
    if reason:
        raise ModelError(
            "hostile-pattern",
            f"{folder}/adapter_config.json: a pattern of layers ({', '.join(patterns)[:200]}) {reason}; list "
            "the names of the layers in target_modules",
        )


def _patterns(found: Mapping[str, Any]) -> list[str]:
    """Return the regular expressions that peft builds from an adapter's settings."""
    patterns = [value for key in ("target_modules", "exclude_modules") if isinstance(value := found.get(key), str)]
    patterns = [one for one in patterns if one != "all-linear"]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns += [rf"(.*\.)?({one})$" for one in found.get(key) or {}]
    kept = [*(found.get("modules_to_save") or []), *(found.get("layers_pattern") or [])]
    patterns += [rf"(^|.*\.){one}($|\..*)" for one in kept if isinstance(one, str)]
    return patterns


MATCHING = (
    "import json, re, sys\npatterns, names = json.load(sys.stdin)\n"
    "for pattern in patterns:\n for name in names:\n  re.fullmatch(pattern, name)\n"
)
PATTERN_SECONDS = 5


def untie_adapted(model: Any, adapter: str) -> None:
    """Untie embeddings and LM head if an adapter changes one of them. Merging the adapter into a shared matrix would
    change the other one too.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    tied = [name for name, module in model.named_modules() if module is head or module is embedding]
    changed = [key for key in read_adapter(adapter).weights if ".token_adapter." not in key]  # trained rows change both
    if any(f".{name}." in f".{key}" for key in changed for name in tied):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = text_config(model).tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def add_lora(model: Any, lora: LoraSettings, task_type: str, start_from: str | None = None, seed: int = 0) -> Any:
    """Add a trainable adapter to a model, drawn from ``seed`` or continued from an adapter folder.

    A continued policy also keeps a frozen copy of the adapter it started from, under the name "reference".
    """
    if task_type == "SEQ_CLS":
        model.score.float()  # the head is trained fully, and small updates would vanish in bf16
    if start_from is not None:
        adapter_settings(start_from)
        refuse_slow_patterns(start_from, model)
        with reading(start_from, "adapter"):
            return _continued(model, lora, task_type, start_from)
    refuse_impossible_lora(model, lora)
    whole = [*lora.modules_to_save, *(["score"] if task_type == "SEQ_CLS" else [])]
    settings = {theirs: copy.copy(getattr(lora, name)) for name, theirs in LoraSettings.theirs.items()}
    settings |= {
        "exclude_modules": unadaptable(model) if lora.targets == "all-linear" else None,
        "target_parameters": list(lora.target_parameters) or None,
        "trainable_token_indices": _token_rows(model, lora.trained_tokens),
        "modules_to_save": whole or None,
    }
    config = LoraConfig(task_type=task_type, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    use_low_rank_products(adapted)
    if line := left_out_experts(adapted, lora):
        rank_zero_info(line)
    return adapted


def refuse_impossible_lora(model: Any, lora: LoraSettings) -> None:
    """Refuse adapter settings that match nothing in a model, or that contradict each other.

    Raises:
        SettingError: ``impossible-lora``.
    """
    modules = [name for name, _ in model.named_modules()]
    weights = [name for name, _ in model.named_parameters()]
    named = [(key, list(getattr(lora, key)), modules) for key in ("rank_pattern", "alpha_pattern", "modules_to_save")]
    if not isinstance(lora.targets, str):
        named.append(("targets", list(lora.targets), modules))
    elif lora.targets != "all-linear" and not _any_match(lora.targets, modules):
        raise SettingError(
            "impossible-lora",
            f"lora.targets is the regular expression {lora.targets!r}, which matches no full layer name; give a "
            "list of names, such as '[q_proj, v_proj]'",
        )
    for setting, wanted, found in (*named, ("target_parameters", lora.target_parameters, weights)):
        for one in wanted:
            if not _any_match(rf"(.*\.)?({one})", found):
                raise SettingError(
                    "impossible-lora",
                    f"lora.{setting} names {one!r}, which {type(model).__name__} does not have; it has "
                    f"{', '.join(sorted({name.rpartition('.')[2] for name in found if name})[:12])}",
                )
    if lora.target_parameters and (lora.dropout or lora.dora):
        raise SettingError(
            "impossible-lora", "lora.target_parameters excludes dropout and dora: set dropout: 0 and dora: false"
        )
    if lora.modules_to_save and model.dtype != torch.float32:
        raise SettingError(
            "impossible-lora",
            f"lora.modules_to_save fully trains {', '.join(lora.modules_to_save)} in {model.dtype}, where small "
            "updates would vanish; set dtype: float32",
        )


def _any_match(pattern: str, names: list[str]) -> bool:
    """Return whether a regular expression matches any whole name, as peft matches it."""
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error:
        return False


def _token_rows(model: Any, tokens: list[str | int]) -> list[int] | dict[str, list[int]] | None:
    """Return the ids of the trained token rows for peft; if the head is not tied, under the names of both modules.

    Raises:
        SettingError: ``impossible-lora``: a token is given by name, or has no row.
    """
    if not tokens:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = sorted({int(token) for token in tokens if isinstance(token, int)})
    if any(isinstance(token, str) for token in tokens) or rows[-1] >= embedding.weight.shape[0]:
        raise SettingError(
            "impossible-lora",
            f"lora.trained_tokens is {tokens}: give the ids of tokens below {embedding.weight.shape[0]}, or their "
            "names in a stage that has a tokenizer",
        )
    if head is None or head.weight is embedding.weight:
        return rows
    return {name: rows for name, module in model.named_modules() if module is embedding or module is head}


def left_out_experts(adapted: Any, lora: LoraSettings) -> str:
    """Return a message about fused experts, which are not linear layers and which "all-linear" leaves frozen."""
    if lora.targets != "all-linear" or lora.target_parameters:
        return ""
    inner = adapted.get_base_model()
    seen = {id(layer.get_param()) for layer in inner.modules() if isinstance(layer, ParamWrapper)}
    fused = {
        f"{name.rpartition('.')[2]}.{key}"
        for name, module in inner.named_modules()
        if "expert" in f"{name}.{type(module).__name__}".lower()
        for key, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and id(weight) not in seen and not weight.requires_grad
    }
    if not fused:
        return ""
    return (
        f"{type(inner).__name__}: all-linear does not adapt fused experts; to adapt them too, set "
        f"lora.target_parameters: [{', '.join(sorted(fused))}]"
    )


def unadaptable(model: Any) -> list[str] | None:
    """Return linear layers that cannot take an adapter.

    Some routers return more than a tensor. Some fused recurrent kernels read a layer's weight directly, bypassing the
    adapter.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name, module in layers if bypasses_adapters(model, name) or not _returns_tensor(module)] or None


def _returns_tensor(layer: nn.Linear) -> bool:
    """Return whether a linear layer returns a tensor; a layer of a custom class is called once to find out."""
    if not type(layer).__module__.startswith("transformers.models.") or layer.weight.is_meta:
        return True
    with torch.no_grad():
        return isinstance(layer(layer.weight.new_zeros(1, layer.in_features)), torch.Tensor)


CHANGES_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of an adapter that also change its backbone."""


def _refuse_other_lora(lora: LoraSettings, config: Any, start_from: str) -> None:
    """Refuse settings that contradict a continued adapter, and report if its r or alpha differs from the given one.

    Raises:
        SettingError: ``continued-lora``.
        ModelError: ``unsupported-adapter``: the adapter changes the backbone, so no reference would be left.
    """
    if config.bias != "none":
        raise ModelError(
            "unsupported-adapter",
            f"the adapter in {start_from} trains biases of its backbone (bias: {config.bias}), so the backbone could "
            "not be the reference; merge it first (rlhf export --merge true)",
        )
    if str(config.init_lora_weights).startswith(CHANGES_BACKBONE):
        raise ModelError(
            "unsupported-adapter",
            f"the adapter in {start_from} was drawn by {config.init_lora_weights}, which changes its backbone, so no "
            "other adapter or reference could share it; merge it first (rlhf export --merge true)",
        )
    own = {name: getattr(config, theirs) for name, theirs in LoraSettings.theirs.items()}
    fresh = LoraSettings()
    for name in ("rslora", "dora", "rank_pattern", "alpha_pattern", "target_parameters", "modules_to_save"):
        asked = getattr(lora, name)
        if asked != getattr(fresh, name) and asked != own[name]:
            raise SettingError(
                "continued-lora",
                f"lora.{name} is {asked}, but the adapter in {start_from} was trained with {own[name]}, which cannot "
                f"be changed; remove lora.{name}, or merge the adapter first (rlhf export --merge true)",
            )
    given = {"r": lora.r, "alpha": lora.alpha}
    if any(own[name] != value for name, value in given.items()):
        rank_zero_info(f"the adapter in {start_from} keeps its r={own['r']} and alpha={own['alpha']}")


def _continued(model: Any, lora: LoraSettings, task_type: str, start_from: str) -> Any:
    """Continue training the adapter of a folder on a model; a policy's adapter may become a reward model's."""
    start = read_adapter(start_from)
    _refuse_other_lora(lora, start.config, start_from)
    start.config.lora_dropout = lora.dropout
    if task_type == start.config.task_type:
        model = PeftModel.from_pretrained(model, start_from, is_trainable=True, config=copy.deepcopy(start.config))
        refuse_other_adapter(model, "default", start.weights)
    else:
        if kept := start.config.modules_to_save:
            raise ModelError(
                "unsupported-adapter",
                f"the adapter in {start_from} trains {', '.join(kept)} in full, which a reward model cannot inherit; "
                "merge it first (rlhf export --merge true)",
            )
        if isinstance(rows := start.config.trainable_token_indices, Mapping):  # includes the LM head, which is gone
            modules = {name for name, _ in model.named_modules()}
            start.config.trainable_token_indices = {name: ids for name, ids in rows.items() if name in modules}
            gone = [f".{name}.token_adapter." for name in rows if name not in modules]
            for key in [key for key in start.weights if any(name in key for name in gone)]:
                del start.weights[key]
        start.config.task_type, start.config.modules_to_save = task_type, ["score"]
        start.config.inference_mode = False
        with torch.random.fork_rng():
            model = get_peft_model(model, start.config)
        load_into_adapter(model, "default", start.weights)
    use_low_rank_products(model)
    facts = backbone_record(start_from)
    if SCORE_BIAS in facts:
        setattr(model.config, SCORE_BIAS, facts[SCORE_BIAS])
    if task_type == "CAUSAL_LM":
        add_adapter(model, REFERENCE, start.config, start.weights)
    return model
