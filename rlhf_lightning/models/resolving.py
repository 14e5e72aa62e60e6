"""Resolve a model's name to a folder (Hub ids, folders, .gguf files, adapters), and read the folder's metadata.

Every exported folder has a ``backbone.json``, which records the weights that training started from. An adapter is valid
only on that backbone. Loading it on another backbone is an error, because the result would be a different model.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import struct
import tempfile
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.atomic_files import complete_folder
from rlhf_lightning.errors import MissingError, ModelError, SettingError
from rlhf_lightning.loading import cache_folder
from rlhf_lightning.models.folders import check_folder, read_json, reading, require_safetensors, weight_files

BACKBONE_FILE = "backbone.json"
PROMPT_FORM = "rlhf_prompt_form"
"""Entry of a reward model's backbone.json: the form of the prompts it was trained on."""
SCORE_BIAS = "score_bias"
"""Key in config.json and backbone.json: the constant that a reward model's scores are reported relative to."""
OUTPUT_NAMES = "score_outputs"
MEAN_VARIANCE = ("mean", "log_variance")
"""Outputs of a reward model whose scores are normally distributed."""
STEP_SEPARATOR = "step_separator"
"""Key in the same files: the text between two steps of a process reward model's completions."""


def resolve_folder(name: str) -> str:
    """Return a name that transformers can load: Hub ids and folders unchanged, a .gguf file converted once.

    Raises:
        MissingError: ``name`` looks like a path, but nothing exists there.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MissingError("no-model", f"there is no file {name}; check the path")
        return str(converted_gguf(path))
    if path.is_file():
        raise MissingError(
            "no-model",
            f"{name} is a file; give the model's folder. A run exports one (runs/NAME/version_N/model); `rlhf "
            "export` writes one from a checkpoint",
        )
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
    """Return the newest exported model in a run's folder; None if the folder is not a run with a model."""
    if (path / "config.json").is_file() or is_adapter(str(path)):
        return None
    exports = [*path.glob("model/"), *path.glob("version_*/model/")]
    return max(exports, key=lambda model: int(model.parent.name.partition("version_")[2] or 0), default=None)


def saved_folder(given: Any) -> str:
    """Return a name as text; a loaded model or tokenizer is saved to the cache once, and its folder is returned."""
    if isinstance(given, str | Path):
        return str(given)
    if not hasattr(given, "save_pretrained"):
        raise SettingError(
            "wrong-kind", f"expected a name, a folder, or a loaded model or tokenizer; found a {type(given).__name__}"
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
    # The weights are dequantised now; leftover quantisation settings would make save_pretrained refuse them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with complete_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
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
    """Return whether a folder holds an adapter instead of whole weights."""
    return (Path(name) / "adapter_config.json").is_file()


def fingerprint(folder: str) -> str | None:
    """Identify weights by a sample of every tensor, rounded to bf16, so that the precision of storage does not matter.

    Reads only a few kilobytes for models of any size. None for names that are not local folders of safetensors.
    """
    digest, files = hashlib.sha256(), weight_files(Path(folder)) if Path(folder).is_dir() else []
    if not files:
        return None
    with reading(folder), contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        # Sort over all files together: the same weights may be sharded differently.
        tensors = [(name, file) for file in opened for name in file.keys()]  # noqa: SIM118
        for name, weights in sorted(tensors, key=itemgetter(0)):
            part = weights.get_slice(name)
            shape = part.get_shape()
            sample = part[: min(4, shape[0])] if shape else weights.get_tensor(name)
            digest.update(f"{name}{shape}".encode())
            digest.update(sample.flatten()[:64].to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def content_hash(name: str) -> str | None:
    """Hash all of a model's weights, as a key for cached results; for an adapter, include its backbone's weights.

    Unlike `fingerprint`, this reads every byte. None for names whose weights are not on this machine yet.
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


def backbone_record(folder: str | Path) -> dict[str, Any]:
    """Return the metadata of an exported folder about the backbone it was trained from; empty if there is none."""
    record = Path(folder) / BACKBONE_FILE
    found = read_json(record) if record.is_file() else {}
    for key in ("source", "fingerprint", "quantization"):
        if not isinstance(found.get(key), str | None):
            raise ModelError(
                "unreadable-model", f"{record} has the {key} {found[key]!r}, which is not text; copy it again"
            )
    return found


UNREAD = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Adapter settings whose forward depends on more than the input of a layer; such adapters are refused."""


def adapter_settings(folder: str | Path) -> dict[str, Any]:
    """Return the settings in adapter_config.json, after checking those that this package reads.

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
            f"{file} sets {', '.join(unread)}, which changes the model's forward pass; merge the adapter into its "
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


LARGEST_RANK = 2**16
"""Rank of a LoRA adapter above which its config is considered damaged."""


def load_base_of_adapter(folder: str, base: str | None = None) -> str:
    """Return the backbone of an adapter folder, verified by its fingerprint.

    Raises:
        MissingError: the backbone was moved or deleted since the adapter was trained.
        ModelError: the backbone's weights are not those that the adapter was trained on.
    """
    require_safetensors(folder)
    config = adapter_settings(folder)
    try:
        name = resolve_folder(base or config["base_model_name_or_path"])
    except MissingError as error:
        raise MissingError(
            "no-model",
            f"{error}; it is the backbone of the adapter in {folder}: set base_model_name_or_path in its "
            "adapter_config.json to its folder or Hub id on this machine",
        ) from None
    expected, found = backbone_record(folder).get("fingerprint"), fingerprint(name)
    if expected and found and expected != found:
        raise ModelError(
            "other-backbone",
            f"the adapter in {folder} was trained on another backbone: its fingerprint is {expected[:8]}, that of "
            f"{name} is {found[:8]}; give the backbone it was trained on, or train a new adapter",
        )
    return name


def refuse_other_quantization(folder: str, quantization: str | None) -> None:
    """Refuse to use an adapter on a backbone with another quantisation, since its weights differ.

    Raises:
        ModelError: the adapter in ``folder`` was trained with another quantisation.
    """
    record = backbone_record(folder)
    trained = record.get("quantization")
    if record and trained != quantization:
        raise ModelError(
            "other-quantization",
            f"the adapter in {folder} was trained on a backbone in {trained or 'full precision'}, but is used on one "
            f"in {quantization or 'full precision'}; set quantization to {trained or 'null'}, or merge the adapter "
            "first (rlhf export --merge true) and start from the merged folder",
        )


def output_names(folder: str | Path) -> tuple[str, ...]:
    """Return the output names of a reward model or the labels of a foreign classifier; empty for a single output."""
    if (Path(folder) / BACKBONE_FILE).is_file():
        return tuple(backbone_record(folder).get(OUTPUT_NAMES, ()))
    labels = classifier_labels(folder)
    return labels if len(labels) > 1 else ()


def classifier_labels(folder: str | Path) -> tuple[str, ...]:
    """Return the labels of a folder or Hub id whose config names a sequence classifier; empty for other models."""
    if is_adapter(str(folder)):
        return ()
    file = Path(folder) / "config.json"
    with reading(str(folder)):
        # This also reads models with custom code, before it is known whether their code may run.
        if file.is_file() and "SequenceClassification" not in str(read_json(file).get("architectures")):
            return ()
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if not any("SequenceClassification" in kind for kind in config.architectures or ()):
            return ()
        return tuple(str(config.id2label[place]) for place in range(config.num_labels))
