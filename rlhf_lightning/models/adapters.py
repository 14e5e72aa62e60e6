"""Manage several adapters on one backbone; at most one adapter is active at a time.

peft's own switch also decides what is trainable: it freezes every adapter except the one that it activates. A critic
that shares the policy's backbone would stop learning after the first forward of the reference. Here a switch changes
only which adapter the layers use. The previous adapter is restored even after an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.compat import adapter_switch, set_adapter_switch, wrapper_holds
from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.folders import reading, require_safetensors

POLICY, REFERENCE, REWARD, CRITIC = "default", "reference", "reward", "critic"
"""Names of the adapters on a policy's backbone. "default" is peft's own name for a model's only adapter."""


class AdapterWeights(NamedTuple):
    """An adapter as stored in its folder.

    Attributes:
        config: peft's settings of the adapter.
        weights: low-rank matrices by their name in the folder.
        head: weight of the scalar head, shape (1, hidden size); None for a policy's adapter.
    """

    config: PeftConfig
    weights: dict[str, Tensor]
    head: Tensor | None


def read_adapter(folder: str | Path) -> AdapterWeights:
    """Read an adapter's folder; the head of a reward model is returned separately from the trunk's matrices."""
    require_safetensors(str(folder))
    with reading(str(folder), "adapter"):
        weights = load_peft_weights(str(folder), device="cpu")
        heads = [name for name in weights if name.endswith("score.weight")]
        head = weights.pop(heads[0]) if heads else None
        return AdapterWeights(PeftConfig.from_pretrained(str(folder)), weights, head)


def add_adapter(
    model: Any,
    name: str,
    config: PeftConfig,
    weights: Mapping[str, Tensor] | None = None,
    trainable: bool = False,
    seed: int = 0,
) -> None:
    """Add a further adapter to a model that has one. The active adapter and the set of trainable weights stay the same.

    A frozen adapter gets no dropout, because the model around it may be in train mode. ``weights`` are the adapter's
    matrices by name, as in a folder; without ``weights``, A is drawn from ``seed`` and B is 0.

    Raises:
        ModelError: ``adapter-mismatch``: the weights belong to another architecture or rank.
    """
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    config = copy.deepcopy(config)
    # The policy's backbone has no module "score": a scalar role keeps its head separately.
    whole = [module for module in config.modules_to_save or () if module != "score"]
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", whole or None, not trainable
    if not trainable:
        config.lora_dropout = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(name, config)
    if weights is not None:
        load_into_adapter(model, name, weights)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(before.get(key, trainable))


def load_into_adapter(model: Any, name: str, weights: Mapping[str, Tensor]) -> None:
    """Load the matrices of a folder into an adapter; the adapter's own head stays unchanged.

    Raises:
        ModelError: the weights belong to another architecture or rank.
    """
    expected = refuse_other_adapter(model, name, weights)
    set_peft_model_state_dict(model, {**expected, **weights}, adapter_name=name)


def refuse_other_adapter(model: Any, name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the matrices of a model's adapter; refuse folder weights that differ from them in name or shape.

    Raises:
        ModelError: ``adapter-mismatch``.
    """
    expected = get_peft_model_state_dict(model, adapter_name=name)
    # If an adapter is on the head or the embeddings, peft stores these modules next to it.
    given = {key for key in weights if ".base_layer." not in key}
    whole = [f".{module}." for module in model.peft_config[name].modules_to_save or () if module != "score"]
    marks = ("lora_", ".token_adapter.", *whole)
    wrong = given ^ {key for key in expected if ".base_layer." not in key and any(mark in key for mark in marks)}
    wrong |= {key for key in weights if key in expected and weights[key].shape != expected[key].shape}
    if wrong:
        few = ", ".join(sorted(wrong)[:2])
        raise ModelError(
            "adapter-mismatch",
            f"the adapter does not fit the backbone: {len(wrong)} weights differ in name or shape "
            f"({few}); load it on the backbone that it was trained on",
        )
    return expected


def is_low_rank_alone(config: Any) -> bool:
    """Return whether an adapter only adds low-rank products to frozen layers."""
    further = ("use_dora", "target_parameters", "modules_to_save", "trainable_token_indices")
    return not any(getattr(config, name, None) for name in further)


def adapter_weights(model: Any, name: str) -> dict[str, Tensor]:
    """Return a copy of an adapter's matrices, named as in a folder."""
    return {key: value.detach().clone() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}


Switch = tuple[str | list[str], bool]
"""The names of the active adapters, and whether all adapters are disabled."""


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _holds(layer: Any, names: str | list[str]) -> bool:
    """Return whether an adapter has weights for a module trained fully or in some rows; otherwise it is bypassed."""
    name = names if isinstance(names, str) else names[0]
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return wrapper_holds(layer, name)
    return not isinstance(layer, TrainableTokensLayer) or name in layer.trainable_tokens_delta


@contextmanager
def switched(model: nn.Module, switch: Switch) -> Iterator[None]:
    """Set the switch of every adapted layer, and restore each layer's switch afterwards, even after an error."""
    before = [(layer, adapter_switch(layer)) for layer in _layers(model)]
    try:
        for layer, _ in before:
            set_adapter_switch(layer, switch if _holds(layer, switch[0]) else (switch[0], True))
        yield
    finally:
        for layer, found in before:
            set_adapter_switch(layer, found)


def with_adapter(model: nn.Module, name: str | None) -> AbstractContextManager[None]:
    """Run a model with one of its adapters; None runs the bare backbone. ``requires_grad`` does not change."""
    return switched(model, ([name or POLICY], name is None))


def active_adapter(model: nn.Module) -> str | None:
    """Return the name of the active adapter; None if the layers run the bare backbone."""
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    if layer is None:
        return None
    active, disabled = adapter_switch(layer)
    if disabled:
        return None
    return active if isinstance(active, str) else active[0]


CHUNK_CELLS = 4096
"""Number of cells that an MLP processes at a time with activation checkpointing."""


def chunk_mlps(model: nn.Module) -> None:
    """Have dense MLPs of checkpointed layers process long rows in chunks, each recomputed in the backward pass.

    An MLP treats each cell separately, and its activations are several times larger than its input. For a long row they
    exceed all other activations of a layer.
    """
    for name, module in model.named_modules():
        if name.endswith("mlp") and all(
            isinstance(part, nn.Linear) or not any(True for _ in part.parameters(recurse=False))
            for part in module.modules()
        ):
            contexts = partial(recomputation_contexts, model)
            module.forward = partial(_in_chunks, module.forward, contexts)


def _in_chunks(forward: Callable[[Tensor], Tensor], contexts: Callable[[], Any], hidden: Tensor) -> Tensor:
    if hidden.shape[:-1].numel() <= CHUNK_CELLS:
        return forward(hidden)
    parts = hidden.reshape(1, -1, hidden.shape[-1]).split(CHUNK_CELLS, dim=1)
    if torch.is_grad_enabled():
        found = [checkpoint(forward, part, use_reentrant=False, context_fn=contexts) for part in parts]
    else:
        found = [forward(part) for part in parts]
    return torch.cat(found, dim=1).view(*hidden.shape[:-1], -1)


def recomputation_contexts(model: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a checkpointed block's forward and of its recomputation in the backward pass.

    The backward pass runs long after a switch has been restored, so the block must be recomputed with the adapter that
    was active in its forward.
    """
    first = next((m for m in model.modules() if isinstance(m, LoraLayer)), None)
    if first is None:
        return nullcontext(), nullcontext()
    return nullcontext(), switched(model, adapter_switch(first))
