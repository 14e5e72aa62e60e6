"""A model's sizes by name: from its folder, its config, a table of published architectures, or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import cached_file

from rlhf_lightning.errors import DataError, MissingError
from rlhf_lightning.models.loading import is_adapter

_LLAMA_3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072}
_SMOLLM2 = {"head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}
_SMALL = {"tie_word_embeddings": True}

PUBLISHED: dict[str, dict[str, Any]] = {
    # Dubey et al. 2024 (2407.21783), Table 3.
    "Llama-3.1-8B": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-3.1-70B": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    # The models' own cards.
    "Llama-3.2-1B": _LLAMA_3
    | _SMALL
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"head_dim": 64},
    "Llama-3.2-3B": _LLAMA_3
    | _SMALL
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    # Allal et al. 2025 (2502.02737) and the models' cards.
    "SmolLM2-135M": _SMOLLM2
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3},
    "SmolLM2-360M": _SMOLLM2
    | {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15}
    | {"num_key_value_heads": 5},
    "SmolLM2-1.7B": _SMOLLM2
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
    | {"num_key_value_heads": 32},
    # Qwen team 2025 (2412.15115) and the model's card.
    "Qwen2.5-1.5B": _SMALL
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 131072, "model_type": "qwen2"},
}
"""Architectures by the name of their base model, of transformers' "llama" family unless they say otherwise."""


def published(name: str) -> dict[str, Any] | None:
    """Return the config of a published architecture, whoever owns the hub id and however it was tuned; else None."""
    short = name.rpartition("/")[2].removesuffix("-Instruct")
    return {"model_type": "llama", **PUBLISHED[short]} if short in PUBLISHED else None


def config_text(name: str) -> str:
    """Return a model's Hugging Face config as JSON; no weight is read.

    Args:
        name: a config as JSON text (of the family "llama" where it names none) or as a .json file; a folder, whole
            weights or an adapter, whose backbone's config is meant; a .gguf file; a published architecture; a hub id.

    Raises:
        MissingError: nothing says what the sizes of ``name`` are.
        DataError: the text is no JSON object.
    """
    if name.lstrip().startswith("{"):
        try:
            return _as_text(json.loads(name))
        except json.JSONDecodeError as error:
            raise DataError(
                "invalid-json",
                f'the config {name!r} is not JSON: {error}; give an object, as {{"hidden_size": 4096, ...}}',
            ) from error
    path = Path(name).expanduser()
    if path.is_dir() and is_adapter(name):
        return config_text(json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"])
    if path.suffix == ".json" or (path / "config.json").is_file():
        return _as_text(json.loads((path / "config.json" if path.is_dir() else path).read_text()))
    if path.suffix == ".gguf" and path.is_file():
        return _as_text(AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False).to_dict())
    known = published(name)
    if known is not None:
        return _as_text(known)
    try:
        found = cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise MissingError(
            "no-model",
            f"the sizes of {name} are not known here: give them with --plan.config, as a config.json, as "
            f"'{{\"hidden_size\": 4096, ...}}', or by one of the names {', '.join(PUBLISHED)}",
        ) from error
    return _as_text(json.loads(Path(found).read_text()))


def _as_text(config: Any) -> str:
    if not isinstance(config, dict):
        raise DataError(
            "invalid-json", f'the config {config!r} is not a JSON object: give one, as {{"hidden_size": 4096, ...}}'
        )
    kept = {name: value for name, value in config.items() if name not in ("quantization_config", "dtype")}
    return json.dumps({"model_type": "llama", **kept}, sort_keys=True, default=str)
