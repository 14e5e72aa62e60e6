"""A backbone with a scalar head: reward models score completions with it, critics estimate the value of states."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.compat import is_stateful, uses_sdpa
from rlhf_lightning.errors import ModelError
from rlhf_lightning.functional.logprobs import at_least_float32
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.packing import CAUSAL_ROWS, SEES_NOTHING
from rlhf_lightning.models.transfer import to_device


class ScalarModel(nn.Module):
    """A transformer with a scalar head, like transformers' ``AutoModelForSequenceClassification(num_labels=1)``.

    The head of a reward model may have several outputs.

    Args:
        model: the Hugging Face model, possibly wrapped by peft. Its head is ``score``: hidden size -> outputs, no bias.
        bias: constant that scores are reported relative to (the mean score of the demonstrations), in score units.
    """

    def __init__(self, model: Any, bias: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.bias = bias
        self.reads_trees = reads_trees(model)
        """Whether the model supports packed rows with tree attention, see `models.layout.packed_layout`."""
        self.pads_rows = True
        """Whether rows of different lengths are padded and forwarded together; otherwise each length is separate."""

    @property
    def head(self) -> nn.Module:
        """The scalar head."""
        return unwrapped(self.model).score

    def forward(self, layout: Layout, per_token: bool = False) -> Tensor:
        """Score each completion at its last token, or estimate the value of the state before each completion token.

        Args:
            layout: sequences in rows.
            per_token: return values, shape (completions, length), 0 where the mask is False, instead of scores.

        Returns:
            Scores, fp32, shape (completions,), before ``bias`` is subtracted; or values. With several outputs the shape
            is (completions, outputs) or (completions, length, outputs).
        """
        hidden = hidden_states(self.model, layout, self.pads_rows, self.reads_trees)
        wanted = hidden[layout.predictors if per_token else layout.last]
        head = self.head
        found = at_least_float32(head(wanted.to(head_dtype(head))))
        scalars = found.squeeze(-1) if found.shape[-1] == 1 else found
        return layout.scatter(scalars) if per_token else scalars


def hidden_states(model: Any, layout: Layout, pads_rows: bool = True, takes_patterns: bool = False) -> Tensor:
    """Return the last hidden state of each of the layout's cells, shape (rows * width, hidden size), see `cells_of`."""
    return cells_of(trunk(model), layout, "last_hidden_state", pads_rows, takes_patterns)


def cells_of(module: nn.Module, layout: Layout, name: str, pads_rows: bool, takes_patterns: bool = False) -> Tensor:
    """Forward a layout and return the output ``name`` for each of its cells, shape (rows * width, ...).

    Without ``pads_rows`` only rows of the same length are forwarded together. ``takes_patterns`` says whether the
    module hands attention patterns to its attention, see `reads_trees`.
    """
    rows, width = layout.input_ids.shape
    switch = rope_switch(getattr(module, "config", None))
    if layout.packed is not None or (pads_rows and (switch is None or width <= switch)):
        options: dict[str, Any] = {}
        if layout.packed is not None or takes_patterns:
            nothing = to_device(SEES_NOTHING, layout.input_ids.device)
            options = {"attention_mask": nothing, "packed": layout.packed or CAUSAL_ROWS}
        if layout.packed is not None:
            options["position_ids"] = layout.positions
        return _read(module, layout.input_ids, **options)[name].flatten(0, 1)
    lengths = layout.last % width + 1 if len(layout.last) else torch.full((rows,), width)
    groups = lengths
    if pads_rows and switch is not None:  # all rows of a batch get the rotation of the longest row
        groups = torch.where(lengths > switch, width, lengths.clamp_max(switch).where(lengths <= switch, 0).max())
    found: Tensor | None = None
    for length in groups.unique().tolist():
        (members,) = (groups == length).nonzero(as_tuple=True)
        part = _read(module, layout.input_ids[members, :length])[name]
        if found is None:
            found = part.new_zeros(rows, width, part.shape[-1])
        padded = torch.nn.functional.pad(part, (0, 0, 0, width - length))
        found = found.index_copy(0, members, padded)
    assert found is not None
    return found.flatten(0, 1)


def _read(module: nn.Module, ids: Tensor, **options: Any) -> Any:
    """Forward rows of token ids.

    Raises:
        ModelError: a token has no embedding, or a row exceeds the learned positions. This is detected only on the CPU;
            `limits.check_rows` compares rows with a model before training.
    """
    try:
        return module(input_ids=ids, use_cache=False, **options)
    except IndexError as error:
        if not str(error).startswith("index out of range in self"):  # the error of an embedding
            raise
        name, rows, largest = type(module).__name__, vocabulary_rows(module), int(ids.max())
        if largest >= rows:
            raise ModelError(
                "tokenizer-larger-than-model",
                f"a row holds token id {largest}, but {name} has {rows} embeddings: the tokenizer belongs to another "
                "model; use the model's own",
            ) from error
        positions = options.get("position_ids")
        length = ids.shape[1] if positions is None else int(positions.max()) + 1
        raise ModelError(
            "positions-exceeded",
            f"a row of {length} tokens exceeds the positions of {name}; lower data.max_length or the number of "
            "new tokens, or shorten the texts",
        ) from error


def ropes_of(config: Any) -> list[Mapping[str, Any]]:
    """Return the settings of a config's rotary positions; some configs have one entry per kind of layer."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, Mapping):
        return []
    return [found] if "rope_type" in found else [one for one in found.values() if isinstance(one, Mapping)]


def rope_switch(config: Any) -> int | None:
    """Return the row length above which the rotation of all positions changes; None for a fixed rotation."""
    switches = [
        rope.get("original_max_position_embeddings", getattr(config, "max_position_embeddings", None))
        for rope in ropes_of(config)
        if "dynamic" in str(rope.get("rope_type")) or rope.get("rope_type") == "longrope"
    ]
    return min((int(switch) for switch in switches if switch), default=None)


def reads_trees(model: Any) -> bool:
    """Return whether a model supports packed rows with tree attention, where several completions share a prompt.

    The model must accept position ids, and pass on to its attention which cells attend to each other. Unsupported are
    kernels that make their own masks (flash, flex), sliding windows, recurrent layers, position biases (ALiBi) and
    rotations that depend on the longest row.
    """
    inner = unwrapped(model)
    config = text_config(inner)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    takes_positions = "position_ids" in inspect.signature(trunk(model).forward).parameters
    return bool(
        takes_positions
        and uses_sdpa(inner)
        and all(_hands_on(module) for module in inner.modules() if type(module).__name__.endswith("Attention"))
        and kinds == {"full_attention"}
        and not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))
        and not getattr(config, "alibi", False)
        and rope_switch(config) is None
        and not is_stateful(inner)
        and not getattr(config, "is_encoder_decoder", False)
    )


def _hands_on(module: nn.Module) -> bool:
    """Return whether a module's forward accepts arbitrary keyword arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def unwrapped(model: Any) -> Any:
    """Return the Hugging Face model itself, with adapters, without peft's outer wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vocabulary_rows(model: Any) -> int:
    """Return the number of embeddings; works for sharded embeddings too, whose adapters cannot be merged."""
    embedding = unwrapped(model).get_input_embeddings()
    while (below := getattr(embedding, "base_layer", None) or getattr(embedding, "original_module", None)) is not None:
        embedding = below
    return int(embedding.weight.shape[0])


def text_config(model: Any) -> Any:
    """Return the config of the text model; in a multimodal config it is nested."""
    return unwrapped(model).config.get_text_config(decoder=True)


def trunk(model: Any) -> nn.Module:
    """Return the transformer below the head: token ids in, hidden states out."""
    inner = unwrapped(model)
    found = inner.base_model
    if found is inner:  # the class stores its trunk under another name than its base_model_prefix
        found = next((part for part in inner.children() if isinstance(part, PreTrainedModel)), inner)
    return found


def head_dtype(head: nn.Module) -> torch.dtype:
    """Return the precision of a head's weights; under autocast the product itself may use a lower one."""
    return next(head.parameters()).dtype


def initialise_head(head: nn.Module, hidden_size: int, seed: int = 0) -> None:
    """Draw the head from N(0, 1/(hidden_size + 1)), so that scores start near zero (Stiennon et al., 2009.01325)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        values = torch.randn(parameter.shape, generator=generator) / math.sqrt(hidden_size + 1)
        with torch.no_grad():
            parameter.copy_(values if parameter.dim() > 1 else torch.zeros_like(values))
