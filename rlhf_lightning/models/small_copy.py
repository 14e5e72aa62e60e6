"""Build a small model with another model's class and config, and random weights; a wrong forward shows in both.

The copy keeps each kind of layer, the ratios of heads, and every switch of the config. Widths shrink, and so do limits
(attention windows, chunks, the number of cells an indexer picks, the length at which RoPE is rescaled), so that a
sequence of a dozen tokens exceeds all of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rlhf_lightning.compat import attention_kernel, new_model
from rlhf_lightning.models.scalar_head import rope_switch

VOCABULARY = 64
HEADS, HEAD_SIZE = 4, 16
WIDTH = HEADS * HEAD_SIZE
LIMIT = 4
"""Number of tokens that a window, chunk or selection of the copy covers."""
POSITIONS = 128

FIXED: tuple[tuple[str, int], ...] = (
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length", POSITIONS),
    (r"max_(source|target)_positions", POSITIONS),
    (r".*sliding_window(_size)?|.*window_size|attention_chunk_size|local_attention|.*window_len", LIMIT),
    (r"index_topk|index_block_size|(mamba_)?chunk_size|block_size", LIMIT),
    (r"index_topk_blocks", 2),
    (r"index_n_heads", 16),  # a ReLU of few heads gives ties, which a selection breaks depending on the row width
    (r".*original_max_position_embeddings|log_scaling_n_floor|floor_scale|rel_extent", 2 * LIMIT),
    (r"(num_)?(en|de)coder_layers|num_layers_per_stack", 2),
    (r"rotary_dim|qk_rope_head_dim", HEAD_SIZE // 2),
    (r".*head_dim|d_head|dim_head|mamba_headdim|mamba_d_head|attention_head_size|kv_channels|d_kv", HEAD_SIZE),
    (r".*_rank|hc_lowrank|d_rel|router_hidden_size|.*state_size|mamba_d_state", 8),
    (r"(n_routed_|num_local_|num_|moe_num_|zero_)experts?(_num)?", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"n_groups?|topk_group|num_expert_groups?|mamba_n_?groups|o_groups", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|attn_layer_offset", 1),
    (r"\w+_layer_(period|interval)|full_attention_interval|interleave_moe_layer_step", 2),
    (r"(image|audio|video)_size", 32),
    (r"patch_size", 8),
)
"""Maximum value of config fields in the copy, by a regular expression of their names."""


def small_config(config: Any, each: int = 1) -> Any:
    """Return a config of the same class whose model runs in milliseconds, with ``each`` layers of each kind.

    Raises:
        Exception: the config's class refuses the combination of settings.
    """
    fields = _small(config.to_dict(), getattr(config, "attribute_map", {}), each)
    fields.pop("quantization_config", None)
    if rope_switch(config) is not None and "original_max_position_embeddings" in fields:
        fields["original_max_position_embeddings"] = POSITIONS
    return type(config).from_dict(fields)


def _small(given: Mapping[str, Any], names: Mapping[str, str], each: int = 1) -> dict[str, Any]:
    """Return the fields of a small config; ``names`` maps common field names to the class's own names."""

    def key_of(*keys: str) -> str:
        found = (names.get(key, key) for key in keys)
        return next((key for key in found if isinstance(given.get(key), int)), "")

    heads = given.get(key_of("num_attention_heads", "n_heads", "num_heads", "n_head", "attention_heads"), 0)
    width = given.get(key_of("hidden_size", "d_model", "emb_dim", "n_embd"), 0)
    depth = key_of("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_blocks", "decoder_layers")
    kept = _kept_layers(given, given.get(depth, 0), each)
    found = copy.deepcopy(dict(given))
    for key, old in given.items():
        if key == depth or (key == "num_blocks" and old == given.get(depth)):
            found[key] = len(kept)
        elif isinstance(old, list | tuple | Mapping):
            found[key] = _small_group(key, old, kept, given.get(depth, 0))
        elif isinstance(old, bool) or not isinstance(old, int):
            continue
        elif "vocab" in key:
            found[key] = VOCABULARY
        elif key.endswith(("token_id", "token_index")):
            found[key] = 0 if key == "pad_token_id" else min(old, VOCABULARY - 1)
        elif re.fullmatch(r"(?!.*d_head|dim_head|index).*heads?(_per_layer)?|num_query_groups", key) and heads:
            found[key] = min(old, max(1, round(HEADS * old / heads)))
        elif (rule := next((small for name, small in FIXED if re.fullmatch(name, key)), None)) is not None:
            found[key] = min(old, rule)
        elif width and old >= WIDTH and re.search(r"size|dim|ffn|width|embd|inner|dff|d_model|d_ff", key):
            found[key] = WIDTH * max(1, min(4, round(old / width))) if old % width == 0 or old > width else WIDTH
    return found | _products(found, given)


def _products(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, int]:
    """Return fields that are products or sums of other fields: recurrent heads, and the parts of a head's size."""
    found = {}
    expand = config.get("mamba_expand", config.get("expand", 2))
    if "head_dim" in config and config["head_dim"] is None:
        found["head_dim"] = HEAD_SIZE
    if given.get("head_dim") is not None and given.get("head_dim") == given.get("qk_rope_head_dim"):
        found["head_dim"] = config["qk_rope_head_dim"]
    if "qk_nope_head_dim" in config and "qk_head_dim" in config:
        found["qk_head_dim"] = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    if "expand" in config and "num_heads" in config:
        found["num_heads"] = expand * WIDTH // HEAD_SIZE
    for key in {"mamba_n_heads", "n_mamba_heads", "mamba_num_heads"} & set(config):
        found[key] = expand * WIDTH // HEAD_SIZE
    if isinstance(config.get("mamba_d_head"), int):
        found["mamba_d_head"] = HEAD_SIZE
    if "mamba_d_ssm" in config:
        found["mamba_d_ssm"] = expand * WIDTH
    for key in {"mamba_dt_rank", "time_step_rank"} & set(config):
        found[key] = WIDTH // 16
    return found


def _indices(key: str, value: Any, layers: int) -> bool:
    """Return whether a list holds layer indices, instead of one value per layer."""
    return bool(
        re.search(r"(ids|idxs|indices|_layers)$", key)
        and all(isinstance(one, int) and one < layers for one in value)
        and all(a < b for a, b in zip(value, value[1:], strict=False))
    )


def _kept_layers(config: Mapping[str, Any], layers: int, each: int) -> list[int]:
    """Return the indices of layers to keep: some of each kind, and at least two."""
    kinds: dict[str, list[int]] = {}
    lists = {
        key: value
        for key, value in config.items()
        if isinstance(value, list | tuple) or (isinstance(value, dict) and "per_layer" in key)
    }
    for index in range(layers):
        kind = []
        for key, value in lists.items():
            if isinstance(value, dict):
                kind.append(value.get(index, value.get(str(index))))
            elif value and _indices(key, value, layers):
                kind.append(index in value)
            elif value is not None and len(value) == layers:
                kind.append(value[index])
        kinds.setdefault(str(kind), []).append(index)
    patterns = [len(value) for key, value in lists.items() if key == "block_types"]
    kept = [index for members in kinds.values() for index in members[:each]]
    least = min(layers, max([2, *patterns]))
    kept += [index for index in range(layers) if index not in kept][: max(0, least - len(kept))]
    if config.get("num_kv_shared_layers"):
        kept += [index for index in range(layers) if index not in kept][-len(kept) :]
    return sorted(kept)


def _small_group(key: str, old: Any, kept: list[int], layers: int) -> Any:
    """Reduce a list with one value per layer, a list of layer indices, or a mapping of settings to the kept layers."""
    if isinstance(old, Mapping):
        if old and all(str(name).isdigit() for name in old):
            numbered = {int(name): value for name, value in old.items()}
            small = {kept.index(n): value for n, value in numbered.items() if n in kept}
            return {n: _small(v, {}) if isinstance(v, Mapping) else v for n, v in small.items()}
        return _small_rope(old) if "rope" in key else _small(old, {})
    if layers and _indices(key, old, layers):
        return [kept.index(index) for index in old if index in kept]
    if layers and len(old) == layers:
        chosen = [old[index] for index in kept]
        return [_small({key: v}, {})[key] for v in chosen]
    return old


def _small_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of rotary embeddings whose rescaling begins after a few tokens.

    A switch between two rotations is placed out of reach: `cells_of` forwards rows below and above it separately.
    """
    found: dict[str, Any] = {}
    switches = rope.get("rope_type") == "longrope" or "dynamic" in str(rope.get("rope_type"))
    for key, value in rope.items():
        if isinstance(value, Mapping):
            found[key] = _small_rope(value)
        elif key == "original_max_position_embeddings":
            found[key] = POSITIONS if switches else 2 * LIMIT
        elif key in ("short_factor", "long_factor"):
            found[key] = value[: HEAD_SIZE // 2]
        elif key == "mrope_section":
            found[key] = [2, 3, 3]
        else:
            found[key] = value
    return found


def small_copy(model: Any, seed: int = 0) -> Any:
    """Build a small model of a model's class on the CPU, in fp32 and eval mode, with weights that reveal mistakes."""
    for each in (1, 2):  # some classes share weights between two layers of a kind and need two
        try:
            return _build(model, small_config(model.config, each), seed)
        except Exception:
            if each == 2:
                raise


def _build(model: Any, config: Any, seed: int) -> Any:
    kernel = attention_kernel(model.config)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        small = new_model(type(model), config, kernel if kernel in ("sdpa", "eager") else "eager").float().eval()
        for module in small.modules():
            for name, weight in module.named_parameters(recurse=False):
                redraw(module, name, weight)
    return small


@torch.no_grad()
def redraw(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Draw weight matrices large enough that next-token distributions are far from uniform."""
    if isinstance(module, nn.Embedding):
        weight.normal_()
    elif weight.dim() >= 2 and min(weight.shape[-2:]) > 1:
        weight.normal_(std=weight.shape[-1] ** -0.5)
    elif name == "bias":
        weight.normal_(std=0.1)
