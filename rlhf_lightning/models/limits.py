"""Check data against a model's limits before training: token ids with embeddings, and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.scalar_head import rope_switch, ropes_of, text_config, trunk, unwrapped, vocabulary_rows


class Limits(NamedTuple):
    """Limits on the input of a model.

    Attributes:
        name: name of the model's class.
        tokens: number of embeddings; larger or equal token ids have none.
        positions: maximum row length by learned position embeddings; None without such embeddings.
        trained: row length that the rotary positions were trained on; None if the config does not state it.
        switch: row length above which the rotation of all positions changes; None for most models.
        rescales: whether that rotation depends on the longest row forwarded so far, and so on other rows.
    """

    name: str
    tokens: int
    positions: int | None
    trained: int | None
    switch: int | None = None
    rescales: bool = False


def limits_of(model: Any) -> Limits:
    """Return the limits of a Hugging Face model."""
    inner, config = unwrapped(model), text_config(model)
    longest = getattr(config, "max_position_embeddings", None)
    layers = trunk(model)
    text = (layers.get_decoder() if isinstance(layers, PreTrainedModel) else None) or layers
    parts = [
        (f"{name}.", one.config) for name, one in text.named_modules() if isinstance(one, PreTrainedModel) and name
    ]
    towers = tuple(name for name, of_part in parts if type(of_part) is not type(config))  # image parts have positions
    tables = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in text.named_modules()
        if isinstance(module, nn.Embedding)
        and ("position" in name or name.endswith("wpe"))
        and not name.startswith(towers)
    ]
    rows = vocabulary_rows(inner)
    positions, trained = min(tables, default=None), None if tables else longest
    rescales = any("dynamic" in str(rope.get("rope_type")) for rope in ropes_of(config))
    return Limits(type(inner).__name__, rows, positions, trained, rope_switch(config), rescales)


def check_prompts(model: Any, prompts: Sequence[torch.Tensor], new_tokens: int) -> None:
    """Refuse prompts that a Hugging Face model cannot continue by ``new_tokens`` tokens.

    Raises:
        ModelError: a token has no embedding, or a completion may go beyond the model's learned positions.
    """
    limits = limits_of(model)
    largest = max((int(prompt.max()) for prompt in prompts), default=0)
    if largest >= limits.tokens:
        raise ModelError(
            "tokenizer-larger-than-model",
            f"a prompt holds token id {largest}, but {limits.name} has {limits.tokens} embeddings: the tokenizer "
            "belongs to another model; use the model's own",
        )
    longest = max(map(len, prompts), default=0) + new_tokens
    if limits.positions is not None and longest > limits.positions:
        raise ModelError(
            "positions-exceeded",
            f"a prompt and its completion may take {longest} tokens, but {limits.name} has {limits.positions} "
            "positions; shorten the prompts, or sample fewer new tokens",
        )


def room_after(model: Any, prompts: Sequence[torch.Tensor]) -> list[int | None]:
    """Return how many tokens a Hugging Face model can read after each prompt; None for any number.

    The limit is that of learned positions, or the length at which the rotation of all positions changes.
    """
    limits = limits_of(model)
    ends = [end for end in (limits.positions, limits.switch) if end is not None]
    return [min((end - len(prompt) for end in ends if end > len(prompt)), default=None) for prompt in prompts]


def check_rows(
    limits: Limits, tokenizer: PreTrainedTokenizerBase, largest_id: int, lengths: torch.Tensor, sampled: int = 0
) -> None:
    """Refuse rows that a model cannot read, and warn about rows longer than it was trained on.

    Args:
        limits: limits of the model.
        tokenizer: tokenizer of the rows' ids.
        largest_id: largest token id of all rows.
        lengths: tokens of each row, plus the longest completion to be sampled after it, shape (rows,).
        sampled: maximum length of that completion; 0 if nothing is sampled.

    Raises:
        ModelError: a token has no embedding, a row is longer than the model's positions, or the rotation of a row's
            positions would change with other rows or within a sampled completion.
    """
    if largest_id >= limits.tokens:
        raise ModelError(
            "tokenizer-larger-than-model",
            f"the data holds token {tokenizer.convert_ids_to_tokens(largest_id)!r} (id {largest_id}), but "
            f"{limits.name} has {limits.tokens} embeddings: the tokenizer ({len(tokenizer)} tokens) is another "
            "model's; use the model's own",
        )
    longest = int(lengths.max()) if len(lengths) else 0
    if limits.positions is not None and longest > limits.positions:
        count = int((lengths > limits.positions).sum())
        raise ModelError(
            "positions-exceeded",
            f"{count} rows are longer than the {limits.positions} positions of {limits.name} (longest: {longest} "
            f"tokens); set data.max_length to at most {limits.positions}, or fewer new tokens",
        )
    if limits.rescales and limits.switch is not None and longest > limits.switch:
        raise ModelError(
            "rope-rescales",
            f"rows of up to {longest} tokens are longer than the {limits.switch} at which {limits.name} begins to "
            "rescale its rotary positions by the longest row so far, so that log-probabilities would depend on other "
            f"rows; set data.max_length to at most {limits.switch}, or fewer new tokens",
        )
    switch = longest if limits.switch is None else limits.switch
    if sampled and bool(((lengths > switch) & (lengths - sampled <= switch)).any()):
        raise ModelError(
            "rope-switch",
            f"{limits.name} rotates all positions of a row otherwise once it is longer than {limits.switch} tokens, so "
            "that tokens sampled before have other log-probabilities afterwards; set data.max_prompt_length and "
            f"max_new_tokens so that rows end within {limits.switch} tokens",
        )
    if limits.trained is not None and longest > limits.trained:
        count = int((lengths > limits.trained).sum())
        rank_zero_warn(
            f"{count} rows are longer than the {limits.trained} tokens that {limits.name} was trained on (longest: "
            f"{longest}); set data.max_length to at most that, or expect worse predictions"
        )
