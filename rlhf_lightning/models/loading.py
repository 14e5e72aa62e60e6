"""From a name to a Hugging Face model: hub ids, folders, .gguf files, adapters and bare configs.

Every folder that a stage hands over carries ``backbone.json``: what the weights were trained from. An adapter is valid
on that very backbone only, and loading it anywhere else is an error rather than a silently different model.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import try_to_load_from_cache
from lightning.pytorch.utilities import rank_zero_info
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.utils import logging as transformers_logging

from rlhf_lightning.compat import bypasses_adapters
from rlhf_lightning.errors import MissingError, ModelError, SettingError
from rlhf_lightning.models.adapters import (
    REFERENCE,
    add_adapter,
    load_into_adapter,
    read_adapter,
    recomputation_contexts,
    refuse_other_adapter,
)
from rlhf_lightning.models.folders import (
    SAFETENSORS,
    check_folder,
    explained,
    read_json,
    reading,
    require_safetensors,
    trusts,
    weight_files,
)
from rlhf_lightning.models.low_rank import use_low_rank_products
from rlhf_lightning.models.quantization import Quantization, leave_the_file, quantization_config, use_one_arithmetic
from rlhf_lightning.models.scalar_head import initialise_head, text_config

BACKBONE_FILE = "backbone.json"
PROMPT_FORM = "rlhf_prompt_form"
"""Entry of a reward model's backbone.json: the form of the prompts it was trained on."""
SCORE_BIAS = "score_bias"
"""What a reward model's scores are reported relative to: its name in config.json and backbone.json."""
OUTPUT_NAMES = "score_outputs"
MEAN_VARIANCE = ("mean", "log_variance")
"""Outputs of a reward model whose scores are normal variables."""
STEP_SEPARATOR = "step_separator"
"""What stands between two steps of a process reward model's completions: its name in the same files."""


@dataclass
class LoraSettings:
    """Low-rank adaptation (Hu et al., 2106.09685): train ``B A`` of rank ``r`` added to each frozen weight.

    An adapter that is continued keeps its own settings, but for ``dropout``.

    Args:
        r: rank of the update.
        alpha: the update is scaled by ``alpha / r``.
        dropout: dropout on the adapter's input. Keep 0 for preference and RL stages, where ratios must start at 1.
        targets: names of the layers to adapt, or "all-linear" for every linear layer but the head.
        rslora: scale the update by ``alpha / sqrt(r)`` instead (rsLoRA, 2312.03732).
        dora: learn norm and direction of each row separately (DoRA, 2402.09353).
        rank_pattern: ranks of some layers, by the end of their name, as in {down_proj: 32}.
        alpha_pattern: alphas of some layers, likewise.
        target_parameters: names of weights outside of layers to adapt, such as fused experts [experts.down_proj].
        modules_to_save: names of modules to train whole, such as lm_head.
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
        SettingError: ``unsupported-lora``: the LoraConfig sets what `LoraSettings` does not have.
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
        raise SettingError(
            "unsupported-lora", "LoraConfig has trainable_token_indices by module; give them as one list"
        )
    targets = "all-linear" if values["targets"] is None else values["targets"]
    values["targets"] = targets if isinstance(targets, str) else sorted(targets)
    return LoraSettings(**{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class LoadSettings:
    """How weights are brought into memory.

    Args:
        from_scratch: draw new weights from the folder's config instead of reading any.
        dtype: precision of the weights, "float32" or "bfloat16".
        attn_implementation: attention kernel by transformers' name; None leaves the choice to transformers.
        activation_checkpointing: recompute activations in the backward pass instead of storing them.
        seed: seed of newly drawn weights.
        quantization: "nf4" or "int8" keeps the frozen backbone of an adapter in 4 or 8 bits; None in ``dtype``.
        frozen_dtype: precision of models that are never trained; None takes ``dtype``.
        device: where quantised weights are made; others move later.
        trust_remote_code: names of the models whose own Python code may be run.
        self_check: compare our forward with the model's own when it is loaded, see `models.self_check`.
        embeddings: fewest rows of the embeddings and of the LM head; missing ones are the mean of all others.

    Raises:
        SettingError: weights would be drawn from scratch and quantised: nothing could train them.
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

    def __post_init__(self) -> None:
        if self.quantization is not None and self.from_scratch:
            raise SettingError(
                "quantized-from-scratch",
                f"quantization is {self.quantization!r} and from_scratch true: quantized weights are "
                "frozen, and new weights must be trained; train from scratch without quantization "
                "first",
            )

    @property
    def is_exact(self) -> bool:
        """Whether two forwards of the same tokens agree to fp32 rounding, however they are batched."""
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


def cache_folder() -> Path:
    """Where converted models and preprocessed data are kept: $RLHF_CACHE, else ~/.cache/rlhf_lightning."""
    return Path(os.environ.get("RLHF_CACHE") or Path.home() / ".cache" / "rlhf_lightning")


def resolve_folder(name: str) -> str:
    """Return a name that transformers loads: hub ids and folders as they are, a .gguf file converted once.

    Raises:
        MissingError: ``name`` looks like a path and nothing is there.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MissingError("no-model", f"there is no file {name}; check the path")
        return str(converted_gguf(path))
    if path.is_dir():
        if (export := newest_export(path)) is not None:
            raise MissingError("no-model", f"{name} is a run; its model is {export}")
        check_folder(path)
        return str(path)
    if path.is_absolute() or name.startswith((".", "~", "runs/")) or name.count("/") != 1:
        if name.count("/") == 0 and not name.startswith((".", "~")):
            return name  # a hub id without an owner, such as "gpt2"
        raise MissingError(
            "no-model", f"there is no model folder {name}; check the path, or give a Hub id (owner/name)"
        )
    return name


def newest_export(path: Path) -> Path | None:
    """Return the newest model that a run's folder holds; None if it is another folder."""
    if (path / "config.json").is_file() or is_adapter(str(path)):
        return None
    exports = [*path.glob("model/"), *path.glob("version_*/model/")]
    return max(exports, key=lambda model: int(model.parent.name.partition("version_")[2] or 0), default=None)


def saved_folder(given: Any) -> str:
    """Return a name as text, or the cache's folder of a loaded model or tokenizer, written there once."""
    if isinstance(given, str | Path):
        return str(given)
    if not hasattr(given, "save_pretrained"):
        raise SettingError(
            "wrong-kind", f"a {type(given).__name__} is neither a name, a folder nor a loaded model or tokenizer"
        )
    objects = cache_folder() / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=objects))
    given.save_pretrained(partial)
    digest = hashlib.sha256()
    for file in sorted(path for path in partial.rglob("*") if path.is_file()):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    folder = objects / digest.hexdigest()[:32]
    if folder.exists():
        shutil.rmtree(partial)
    else:
        partial.rename(folder)
    return str(folder)


def converted_gguf(path: Path) -> Path:
    """Convert a .gguf file to a folder of fp32 safetensors in the cache, once, and return the folder."""
    with path.open("rb") as file:
        tag = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_folder() / "models" / f"{path.stem}-{tag}"
    if (folder / "config.json").is_file():
        return folder
    options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    refuse_odd_gguf(path)
    with reading(str(path), "file"):
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    # The weights are dequantised now; what remains of the quantisation would make save_pretrained refuse them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return folder


def refuse_odd_gguf(path: Path) -> None:
    """Refuse a .gguf file whose header counts more entries than the file has bytes.

    Raises:
        ModelError: ``unreadable-model``.
    """
    with path.open("rb") as file:
        header, size = file.read(24), path.stat().st_size
    counts = struct.unpack("<QQ", header[8:]) if len(header) == 24 else (size, size)
    if header[:4] != b"GGUF" or max(counts) > size // 8:
        raise ModelError("unreadable-model", f"{path} is truncated or not a .gguf file; download it again")


def is_adapter(name: str) -> bool:
    """Whether a folder holds an adapter rather than whole weights."""
    return (Path(name) / "adapter_config.json").is_file()


def fingerprint(folder: str) -> str | None:
    """Identify weights by a sample of every tensor, rounded to bf16, so that loading in another precision keeps it.

    Reads a few kilobytes for models of any size. None for names that are not local folders of safetensors.
    """
    digest, files = hashlib.sha256(), weight_files(Path(folder)) if Path(folder).is_dir() else []
    if not files:
        return None
    with reading(folder), contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        # Over all files at once: the same weights may be stored in other shards.
        tensors = [(name, file) for file in opened for name in file.keys()]  # noqa: SIM118
        for name, weights in sorted(tensors, key=itemgetter(0)):
            part = weights.get_slice(name)
            shape = part.get_shape()
            sample = part[: min(4, shape[0])] if shape else weights.get_tensor(name)
            digest.update(f"{name}{shape}".encode())
            digest.update(sample.flatten()[:64].to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def content_hash(name: str) -> str | None:
    """Hash all of a model's weights, for what is derived from them and kept; an adapter's with its backbone's.

    Unlike `fingerprint` it reads every byte. None for names whose weights are not on this machine yet.
    """
    folder = Path(name)
    if not folder.is_dir():
        config = try_to_load_from_cache(name, "config.json")
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    files = weight_files(folder)
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if is_adapter(name):
        digest.update((content_hash(load_base_of_adapter(name)) or "").encode())
    return digest.hexdigest() if files else None


def load_hf_model(name: str, kind: Any, settings: LoadSettings, **config_changes: Any) -> Any:
    """Load or build a Hugging Face model of ``kind`` (AutoModelForCausalLM, AutoModelForSequenceClassification).

    Raises:
        FileNotFoundError: the folder has no weights and ``from_scratch`` was not asked for.
        ModelError: its weights are pickles, or it needs code of its own that was not named.
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
    """Give embeddings and LM head at least so many rows, never fewer than they have; new rows are the mean of others.

    Args:
        model: a Hugging Face model.
        rows: fewest rows.
    """
    have = model.get_input_embeddings().weight.shape[0]
    if rows <= have:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for weight in () if module is None else module.parameters(recurse=False):
            weight[have:] = weight[:have].float().mean(0).to(weight)


def _refuse_encoder_decoder(name: str, trusted: bool) -> None:
    """Refuse a model whose completions are decoded from an encoder's states: only half of it would be loaded."""
    with reading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            "encoder-decoder",
            f"{name} is an encoder-decoder ({config.model_type}): without its encoder its decoder is another model; "
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
        model, report = kind.from_pretrained(
            name, dtype=settings.torch_dtype, output_loading_info=True, use_safetensors=True, **options
        )
    missing = set(report["missing_keys"]) if report["missing_keys"] else set()
    if any(key.startswith("score.") for key in missing):
        initialise_head(model.score, text_config(model).hidden_size, settings.seed)
        missing = {key for key in missing if not key.startswith("score.")}
        rank_zero_info(f"{name} has no score head: a new one is drawn with seed {settings.seed}.")
    if missing:
        few = ", ".join(sorted(missing)[:3])
        raise ModelError(
            "incomplete-weights",
            f"{name} lacks weights for {few}: it is not a whole {kind.__name__} model; name a complete model",
        )
    use_one_arithmetic(model)
    if settings.quantization is not None:
        leave_the_file(model)
    return model


def _refuse_larger_than_memory(name: str, described: nn.Module) -> None:
    """Refuse a new model that does not fit into this machine's memory, before any of it is taken.

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
    """Silence transformers' table of missing weights, which are refused or named in a sentence of ours."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def refuse_nonfinite_weights(model: nn.Module, name: str) -> None:
    """Refuse a model with NaN or infinity in its weights: sampled or scored with, it gives nonsense in silence.

    Raises:
        ModelError: a weight is not finite.
    """
    for key, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            continue
        # The sum reads each weight once and copies none; it may overflow where no weight is infinite.
        if not bool(weight.detach().sum(dtype=torch.float32).isfinite()) and not bool(weight.isfinite().all()):
            raise ModelError(
                "non-finite-weights",
                f"{name} has NaN or infinity in its weights ({key}); use an earlier checkpoint, or train with a "
                "lower learning rate",
            )


def backbone_record(folder: str | Path) -> dict[str, Any]:
    """Return what a stage's folder says of the backbone it was trained from; nothing where it says nothing."""
    record = Path(folder) / BACKBONE_FILE
    found = read_json(record) if record.is_file() else {}
    for key in ("source", "fingerprint", "quantization"):
        if not isinstance(found.get(key), str | None):
            raise ModelError(
                "unreadable-model", f"{record} has the {key} {found[key]!r}, which is not a text; copy it again"
            )
    return found


UNREAD = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Settings of adapters whose forward depends on more than the input of a layer."""


def adapter_settings(folder: str | Path) -> dict[str, Any]:
    """Return what adapter_config.json says, checked for what this package reads.

    Raises:
        ModelError: ``unreadable-model``, or ``unsupported-adapter``: it is not a LoRA adapter.
    """
    file = Path(folder) / "adapter_config.json"
    found = read_json(file)
    if found.get("peft_type") != "LORA":
        raise ModelError(
            "unsupported-adapter",
            f"{file} has the peft_type {found.get('peft_type')!r}: only LORA adapters can be used; merge it into its "
            "backbone with peft (merge_and_unload), and name the merged folder",
        )
    if unread := [name for name in UNREAD if found.get(name)]:
        raise ModelError(
            "unsupported-adapter",
            f"{file} sets {', '.join(unread)}, which changes how a model is forwarded; merge the adapter into its "
            "backbone with peft (merge_and_unload), and name the merged folder",
        )
    ranks = found.get("rank_pattern") or {}
    for rank in (found.get("r", 8), *(ranks.values() if isinstance(ranks, dict) else [None])):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= LARGEST_RANK:
            raise ModelError("unreadable-model", f"{file} has the rank {rank!r}; copy the adapter again")
    if found.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ModelError("unreadable-model", f"{file} has the bias {found['bias']!r}; copy the adapter again")
    base = found.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            "unreadable-model",
            f"{file} has the base_model_name_or_path {base!r}: write the backbone's folder or Hub id",
        )
    return found


def refuse_slow_patterns(folder: str, model: nn.Module) -> None:
    """Refuse an adapter whose patterns of layer names are invalid, or take seconds to match.

    Python cannot interrupt a match everywhere, so a process of its own tries them.

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
    """Return the regular expressions that peft makes of an adapter's settings."""
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
LARGEST_RANK = 2**16
"""Rank of a LoRA adapter above which its config is taken for damaged."""


def load_base_of_adapter(folder: str, base: str | None = None) -> str:
    """Return the backbone an adapter folder belongs to, checked by its fingerprint.

    Raises:
        FileNotFoundError: the backbone is not where it was when the adapter was trained.
        ModelError: the backbone's weights are not those the adapter was trained on.
    """
    require_safetensors(folder)
    config = adapter_settings(folder)
    name = resolve_folder(base or config["base_model_name_or_path"])
    expected, found = backbone_record(folder).get("fingerprint"), fingerprint(name)
    if expected and found and expected != found:
        raise ModelError(
            "other-backbone",
            f"the adapter in {folder} was trained on another backbone: its fingerprint is {expected[:8]}, "
            f"that of {name} is {found[:8]}; give the backbone it was trained on, or train the "
            "adapter anew",
        )
    return name


def refuse_reward_adapter(name: str) -> None:
    """Refuse to start a policy from a reward model's adapter.

    Raises:
        ModelError: ``name`` is the folder of such an adapter.
    """
    if is_adapter(name) and adapter_settings(name).get("task_type") == "SEQ_CLS":
        raise ModelError(
            "reward-model",
            f"the adapter in {name} is a reward model's: it scores completions and cannot generate "
            "them; name an adapter of a causal language model",
        )


def refuse_other_quantization(folder: str, quantization: str | None) -> None:
    """Refuse to go on with an adapter on a backbone of another quantisation: those are other weights.

    Raises:
        ModelError: the adapter in ``folder`` was trained on another one.
    """
    record = backbone_record(folder)
    trained = record.get("quantization")
    if record and trained != quantization:
        raise ModelError(
            "other-quantization",
            f"the adapter in {folder} was trained on a backbone in {trained or 'full precision'}, "
            f"and is to be used on one in {quantization or 'full precision'}; set quantization "
            f"to {trained or 'null'}, or merge the adapter first (rlhf export --merge true) and "
            "start from the merged folder",
        )


def load_weights(name: str, kind: Any, settings: LoadSettings, **config_changes: Any) -> Any:
    """Load whole weights, an adapter folder merged into its backbone; on a quantised backbone it stays unmerged.

    Merging is in fp32 for every requested precision: a small update would be lost in rounding.
    """
    if not is_adapter(name):
        return load_hf_model(name, kind, settings, **config_changes)
    if settings.quantization is not None:
        refuse_other_quantization(name, settings.quantization)
    whole = settings if settings.quantization else replace(settings, dtype="float32")
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
        model.requires_grad_(True)  # peft has frozen the backbone, and merging leaves it so
    return model


def untie_adapted(model: Any, adapter: str) -> None:
    """Untie embeddings and LM head where an adapter changes one of them: merged into a shared matrix it would change
    the other one too.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    tied = [name for name, module in model.named_modules() if module is head or module is embedding]
    changed = [key for key in read_adapter(adapter).weights if ".token_adapter." not in key]  # rows of both alike
    if any(f".{name}." in f".{key}" for key in changed for name in tied):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = text_config(model).tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def add_lora(model: Any, lora: LoraSettings, task_type: str, start_from: str | None = None, seed: int = 0) -> Any:
    """Wrap a model with a trainable adapter, drawn from ``seed`` or continued from an adapter folder.

    A continued policy also keeps the adapter it started from, frozen under the name "reference".
    """
    if task_type == "SEQ_CLS":
        model.score.float()  # trained whole with the adapter, and in bf16 its small updates would vanish
    if start_from is not None:
        return continued_lora(model, lora, task_type, start_from)
    refuse_impossible_lora(model, lora)
    whole = [*lora.modules_to_save, *(["score"] if task_type == "SEQ_CLS" else [])]
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        exclude_modules=unadaptable(model) if lora.targets == "all-linear" else None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        target_parameters=list(lora.target_parameters) or None,
        trainable_token_indices=_token_rows(model, lora.trained_tokens),
        task_type=task_type,
        modules_to_save=whole or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    use_low_rank_products(adapted)
    if line := left_out_experts(adapted, lora):
        rank_zero_info(line)
    return adapted


def refuse_impossible_lora(model: Any, lora: LoraSettings) -> None:
    """Refuse settings of an adapter that name nothing in a model, or that cannot go together.

    Raises:
        SettingError: ``impossible-lora``.
    """
    modules = [name for name, _ in model.named_modules()]
    weights = [name for name, _ in model.named_parameters()]
    named = [(key, list(getattr(lora, key)), modules) for key in ("rank_pattern", "alpha_pattern", "modules_to_save")]
    for setting, wanted, found in (*named, ("target_parameters", lora.target_parameters, weights)):
        for one in wanted:
            if not _ends_any(one, found):
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
            f"lora.modules_to_save trains {', '.join(lora.modules_to_save)} whole, in {model.dtype}, where small "
            "updates would vanish; set dtype: float32",
        )


def _ends_any(pattern: str, names: list[str]) -> bool:
    """Whether a pattern is the end of a name, as peft matches it."""
    try:
        ends = re.compile(rf"(.*\.)?({pattern})")
    except re.error:
        return False
    return any(ends.fullmatch(name) for name in names)


def _token_rows(model: Any, tokens: list[str | int]) -> list[int] | dict[str, list[int]] | None:
    """Return the ids whose rows are trained, for peft: of a head with its own weights under both modules' names.

    Raises:
        SettingError: ``impossible-lora``: a token is a name, or has no row.
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
    """Return a line on fused experts, whose weights are no layers, that "all-linear" leaves frozen."""
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
        f"{type(inner).__name__}: all-linear adapts no fused experts, which stay as they are; to adapt them too, set "
        f"lora.target_parameters: [{', '.join(sorted(fused))}]"
    )


def unadaptable(model: Any) -> list[str] | None:
    """Return linear layers that no adapter fits: those that return more than a tensor, as some routers do, and those
    whose weight a fused recurrent kernel reads past the adapter.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name, module in layers if bypasses_adapters(model, name) or not _returns_tensor(module)] or None


def _returns_tensor(layer: nn.Linear) -> bool:
    """Whether a linear layer returns a tensor; a class of its own is called once to see."""
    if not type(layer).__module__.startswith("transformers.models.") or layer.weight.is_meta:
        return True
    with torch.no_grad():
        return isinstance(layer(layer.weight.new_zeros(1, layer.in_features)), torch.Tensor)


def continued_lora(model: Any, lora: LoraSettings, task_type: str, start_from: str) -> Any:
    """Wrap a model with the adapter of a folder, to be trained on; a policy's may become a reward model's."""
    adapter_settings(start_from)
    refuse_slow_patterns(start_from, model)
    with reading(start_from, "adapter"):
        return _continued(model, lora, task_type, start_from)


CHANGES_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to draw an adapter that take what they draw out of the backbone."""


def _refuse_other_lora(lora: LoraSettings, config: Any, start_from: str) -> None:
    """Refuse settings that a continued adapter does not have, and say which of its own differ from those given.

    Raises:
        SettingError: ``continued-lora``.
        ModelError: ``unsupported-adapter``: it changes the backbone, so that no reference would be left.
    """
    if config.bias != "none":
        raise ModelError(
            "unsupported-adapter",
            f"the adapter in {start_from} trains biases of its backbone (bias: {config.bias}), which would then be no "
            "reference; merge it first (rlhf export --merge true)",
        )
    if str(config.init_lora_weights).startswith(CHANGES_BACKBONE):
        raise ModelError(
            "unsupported-adapter",
            f"the adapter in {start_from} was drawn by {config.init_lora_weights}, which changes its backbone, so that "
            "no other adapter and no reference could share it; merge it first (rlhf export --merge true)",
        )
    own = {name: getattr(config, theirs) for name, theirs in LoraSettings.theirs.items()}
    fresh = LoraSettings()
    for name in ("rslora", "dora", "rank_pattern", "alpha_pattern", "target_parameters", "modules_to_save"):
        asked = getattr(lora, name)
        if asked != getattr(fresh, name) and asked != own[name]:
            raise SettingError(
                "continued-lora",
                f"lora.{name} is {asked}, but the adapter in {start_from} was trained with {own[name]}, which it "
                f"keeps; remove lora.{name}, or merge the adapter first (rlhf export --merge true)",
            )
    given = {"r": lora.r, "alpha": lora.alpha}
    if any(own[name] != value for name, value in given.items()):
        rank_zero_info(f"the adapter in {start_from} keeps its r={own['r']} and alpha={own['alpha']}")


def _continued(model: Any, lora: LoraSettings, task_type: str, start_from: str) -> Any:
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
                f"the adapter in {start_from} trains {', '.join(kept)} whole, which a reward model cannot take over; "
                "merge it first (rlhf export --merge true)",
            )
        if isinstance(rows := start.config.trainable_token_indices, Mapping):  # of a head too, which is gone
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


def prepare_for_training(model: Any, settings: LoadSettings | None = None, dropout: float = 0.0) -> None:
    """Set dropout, activation checkpointing and the padding embedding the way every stage needs them.

    Dropout is off unless asked for, in every form that models have it: modules, numbers that they keep, fields of the
    config that they read when called, and noise on a router's inputs. A policy that drops units gives a ratio other
    than 1 before any update. Embeddings lose their ``padding_idx``: masks come from lengths, and where pad and end
    token share an id the end token's embedding would silently never be trained.
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
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()


def _set_dropout(holder: Any, dropout: float) -> None:
    """Set the numbers of a module or config that are probabilities to drop something, or the size of a noise."""
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and (DROPOUT.search(name) or NOISE.search(name)):
            whole = "layerdrop" in name or NOISE.search(name)  # what drops whole layers is never asked for
            setattr(holder, name, 0.0 if whole else dropout)


DROPOUT = re.compile(r"drop(out|_prob|_rate)?|pdrop|layerdrop")
NOISE = re.compile(r"jitter")


def load_reward_hf_model(name: str, settings: LoadSettings, outputs: int = 1, **config_changes: Any) -> Any:
    """Load a model with a head of one or several outputs; a causal language model's folder gets a new head."""
    return load_weights(name, AutoModelForSequenceClassification, settings, num_labels=outputs, **config_changes)


def output_names(folder: str | Path) -> tuple[str, ...]:
    """Return the names of a reward model's outputs, a foreign classifier's labels; empty if it has a single output."""
    if (Path(folder) / BACKBONE_FILE).is_file():
        return tuple(backbone_record(folder).get(OUTPUT_NAMES, ()))
    labels = classifier_labels(folder)
    return labels if len(labels) > 1 else ()


def classifier_labels(folder: str | Path) -> tuple[str, ...]:
    """Return the labels of a folder or hub id whose config names a sequence classifier; empty for other models."""
    if is_adapter(str(folder)):
        return ()
    with reading(str(folder)):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    if not any("SequenceClassification" in kind for kind in config.architectures or ()):
        return ()
    return tuple(str(config.id2label[place]) for place in range(config.num_labels))
