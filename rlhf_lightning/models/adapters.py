"""Several adapters on one backbone; one or none is in use at a time.

peft's own switch also decides what is trainable: it freezes every adapter but the one that it turns on. A critic that
shares the policy's backbone would stop learning at the first look at the reference. Here a switch changes which adapter
the layers read and nothing else, and restores it even after an error.
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
"""Names of the adapters on a policy's backbone. The first is peft's own name for a model's only adapter."""


class AdapterWeights(NamedTuple):
    """An adapter as its folder holds it.

    Attributes:
        config: peft's settings of it.
        weights: low-rank matrices by their name in the folder.
        head: weight of the scalar head, shape (1, hidden size); None for a policy's adapter.
    """

    config: PeftConfig
    weights: dict[str, Tensor]
    head: Tensor | None


def read_adapter(folder: str | Path) -> AdapterWeights:
    """Read an adapter's folder, a reward model's head separately from the matrices of its trunk."""
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
    """Put a further adapter on a model that has one. What was trainable stays so, and the active adapter stays active.

    A frozen adapter gets no dropout: the model around it may be in train mode. ``weights`` are its matrices by name, as
    in a folder; without them A is drawn from ``seed`` and B is 0.

    Raises:
        ValueError: the weights belong to another architecture or rank.
    """
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    config = copy.deepcopy(config)
    # On the policy's backbone there is no module "score": the head of a scalar role is separate.
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
    """Give an adapter the matrices of a folder; a head of its own stays unchanged.

    Raises:
        ModelError: the weights belong to another architecture or rank.
    """
    expected = refuse_other_adapter(model, name, weights)
    set_peft_model_state_dict(model, {**expected, **weights}, adapter_name=name)


def refuse_other_adapter(model: Any, name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the matrices of a model's adapter; refuse those of a folder that differ in name or shape.

    Raises:
        ModelError: ``adapter-mismatch``.
    """
    expected = get_peft_model_state_dict(model, adapter_name=name)
    # peft keeps the head or the embeddings next to an adapter on them.
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
    """Whether an adapter adds a product to frozen layers and does nothing else."""
    further = ("use_dora", "target_parameters", "modules_to_save", "trainable_token_indices")
    return not any(getattr(config, name, None) for name in further)


def adapter_weights(model: Any, name: str) -> dict[str, Tensor]:
    """Return a copy of an adapter's matrices, named as in a folder."""
    return {key: value.detach().clone() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}


Switch = tuple[str | list[str], bool]
"""Which adapter layers read, and whether they read none."""


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _holds(layer: Any, names: str | list[str]) -> bool:
    """Whether an adapter has weights for a module that adapters train whole or in rows; without them it is bypassed."""
    name = names if isinstance(names, str) else names[0]
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return wrapper_holds(layer, name)
    return not isinstance(layer, TrainableTokensLayer) or name in layer.trainable_tokens_delta


@contextmanager
def switched(model: nn.Module, switch: Switch) -> Iterator[None]:
    """Set every adapted layer's switch, and each back to what it was, even after an error."""
    before = [(layer, adapter_switch(layer)) for layer in _layers(model)]
    try:
        for layer, _ in before:
            set_adapter_switch(layer, switch if _holds(layer, switch[0]) else (switch[0], True))
        yield
    finally:
        for layer, found in before:
            set_adapter_switch(layer, found)


def with_adapter(model: nn.Module, name: str | None) -> AbstractContextManager[None]:
    """Run a model with one of its adapters; None runs the bare backbone. No parameter's ``requires_grad`` changes."""
    return switched(model, ([name or POLICY], name is None))


def active_adapter(model: nn.Module) -> str | None:
    """Return the name of the adapter that a model's layers read; None where they read the bare backbone."""
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    if layer is None:
        return None
    active, disabled = adapter_switch(layer)
    if disabled:
        return None
    return active if isinstance(active, str) else active[0]


CHUNK_CELLS = 4096
"""Cells that an MLP reads at a time where layers are recomputed."""


def chunk_mlps(model: nn.Module) -> None:
    """Have dense MLPs of recomputed layers read long rows in chunks, each recomputed by itself in the backward pass.

    An MLP works cell by cell, and holds several times its input; of a long row that is more than all else of a layer.
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

    The backward pass runs long after a switch has been put back, so the block must be recomputed with the adapter that
    was active in its forward.
    """
    first = next((m for m in model.modules() if isinstance(m, LoraLayer)), None)
    if first is None:
        return nullcontext(), nullcontext()
    return nullcontext(), switched(model, adapter_switch(first))
