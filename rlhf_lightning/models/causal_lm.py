"""The policy and its reference: a forward that returns log-probabilities of completions without storing all logits.

Only the hidden states at positions that predict completion tokens pass through the LM head, in chunks. A tensor of
shape [rows, width, vocabulary] never exists.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf_lightning.errors import StateError
from rlhf_lightning.functional.distillation import chunked_over_tokens, head_logits
from rlhf_lightning.functional.logprobs import (
    at_least_float32,
    chunk_size,
    chunked_logprobs,
    token_entropy,
    token_logprobs,
)
from rlhf_lightning.models.adapters import REFERENCE, with_adapter
from rlhf_lightning.models.compiling import uncompiled
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.packing import PackedRow
from rlhf_lightning.models.recording import kept_states
from rlhf_lightning.models.scalar_head import (
    cells_of,
    head_dtype,
    hidden_states,
    reads_trees,
    text_config,
    trunk,
    unwrapped,
)


class TokenOutputs(NamedTuple):
    """Outputs of one forward, on the (completions, length) grid, 0 where the mask is False.

    Attributes:
        logprobs: log-probability of each completion token at the requested temperature.
        entropy: entropy of the next-token distribution, nats; None unless asked for.
        values: the shared critic's values; None unless the model has a value head and values were asked for.
        extras: further requested statistics by name; ``hidden_N`` is the state of layer N that predicts each token,
            without gradient, shape (completions, length, hidden size).
    """

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None
    extras: Mapping[str, Tensor] = {}


class DecodingStep(NamedTuple):
    """Input of one decoding step: the next token of each row is drawn after it.

    Attributes:
        input_ids: int64, shape (rows, width): prompts with left padding, or one token per row if the cache is filled.
        attention_mask: int64, shape (rows, cached + width), 0 on padding; or bool, shape (rows, 1, width, cached +
            width). None if no row is padded.
        positions: position of each token of ``input_ids`` in its text; None lets the model count the positions.
        cache: KV cache of the earlier tokens, extended by the forward; an `OwnCache` is created by the model. None
            disables caching.
        packed: attention pattern of a single row that packs several texts; None if each text has its own row.
        last: cells of a packed row whose next tokens are wanted, int64.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    cache: Any = None
    packed: PackedRow | None = None
    last: Tensor | None = None


class OwnCache:
    """A cache that the model creates in its first forward: keys and values, recurrent states, or both."""

    def __init__(self) -> None:
        self.kept: Any = None

    def reorder_cache(self, rows: Tensor) -> None:
        """Select and reorder rows of the cache; a row may occur several times."""
        self.kept.reorder_cache(rows)


class OverLogits(NamedTuple):
    """A function of complete next-token distributions, applied in the forward to one chunk of logits at a time.

    Attributes:
        layout: sequences in rows; None if the hidden states are given.
        function: called with the logits of a chunk of supervised tokens, fp32 or wider, shape (chunk, vocabulary), and
            the same chunk of each further tensor. Returns values per token by name, see `chunked_over_tokens`.
        further: tensors of shape (tokens, ...) that are split into the same chunks as the logits.
        chunk_tokens: maximum number of tokens whose logits are in memory, see `functional.logprobs.chunk_size`.
    """

    layout: Layout | None
    function: Callable[..., Mapping[str, Tensor]]
    further: tuple[Tensor, ...] = ()
    chunk_tokens: int = 1024


class PredictingStates(NamedTuple):
    """Request to a forward for the hidden states that predict supervised tokens; the LM head runs elsewhere."""

    layout: Layout


LogitsPath = Literal["product", "head", "forward"]
"""How logits are computed. ``product``: hidden states times the LM head's weight, with the config's softcap and scale.
``head``: the model's own forward, with given hidden states instead of its trunk's, so that its own head computes the
logits. ``forward``: the model's own forward on whole sequences; all logits are in memory at once."""


Decoding = Literal["slots", "batches", "equal", "uncached"]
"""How completions are decoded. ``slots``: continuous batching, where rows enter and leave a running batch. ``batches``:
prompts start together, with left padding. ``equal``: only prompts of the same length start together, without padding.
``uncached``: like ``equal``, but every token is computed from its whole text, without a KV cache."""


class OwnLogits(NamedTuple):
    """Request for the logits of the model's own forward of one sequence; our forward is compared with them."""

    input_ids: Tensor


class CausalLM(nn.Module):
    """A causal language model, with an optional value head on the same trunk.

    ``reads_trees``, ``pads_rows``, ``logits_path`` and ``decoding`` select how the model is forwarded.
    `models.self_check` sets them to values that agree with the model's own forward.

    Args:
        model: the Hugging Face model, possibly wrapped by peft.
        value_head: add a scalar head, initialised to zero, for a critic that shares the trunk.
        source: the folder or Hub id of the backbone.
    """

    def __init__(self, model: Any, value_head: bool = False, source: str = "") -> None:
        super().__init__()
        self.model = model
        self.source = source
        self.reads_trees = reads_trees(model)
        """Whether the model supports packed rows with tree attention, see `models.layout.packed_layout`."""
        self.pads_rows = True
        """Whether rows of different lengths are padded and forwarded together; otherwise each length is separate."""
        self.decoding: Decoding | None = None
        self.self_check = False
        """Whether to check decoding when the model first samples."""
        self.sampling_checked = False
        self.logits_path: LogitsPath = "product"
        if isinstance(unwrapped(model).get_output_embeddings(), BaseTunerLayer | AuxiliaryTrainingWrapper):
            self.logits_path = "head"  # with an adapter, the head is more than one weight
        self.value_head: nn.Linear | None = None
        if value_head:
            self.value_head = nn.Linear(text_config(model).hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def has_adapter(self) -> bool:
        """Whether the policy is an adapter on a frozen backbone."""
        return hasattr(self.model, "peft_config")

    def forward(self, layout: Any, *args: Any, **kwargs: Any) -> Any:
        """Forward a Layout (see `logprobs`), a DecodingStep (see `next_token_logits`), an OverLogits (see
        `over_logits`), PredictingStates (see `predicting_states`) or OwnLogits.

        All requests enter here because FSDP gathers sharded weights only when this module is called.
        """
        if isinstance(layout, DecodingStep):
            return self.next_token_logits(layout, *args, **kwargs)
        if isinstance(layout, OverLogits):
            return self.over_logits(layout, *args, **kwargs)
        if isinstance(layout, PredictingStates):
            return self.predicting_states(layout.layout)
        if isinstance(layout, OwnLogits):
            return unwrapped(self.model)(input_ids=layout.input_ids.unsqueeze(0), use_cache=False).logits[0]
        return self.logprobs(layout, *args, **kwargs)

    def next_token_logits(self, step: DecodingStep) -> Tensor:
        """Return logits of the next token of each row, fp32, shape (rows, vocabulary); the cache grows by the step."""
        read = unwrapped(self.model) if self.logits_path == "forward" else trunk(self.model)
        options = {"attention_mask": step.attention_mask, "position_ids": step.positions, "packed": step.packed}
        options = {name: value for name, value in options.items() if value is not None}
        keyword = "past_key_values"
        if not takes(read, keyword) and takes(read, "cache_params"):
            keyword = "cache_params"
        own = isinstance(step.cache, OwnCache)
        options[keyword] = step.cache.kept if own else step.cache
        if options[keyword] is None:
            del options[keyword]
        with uncompiled(self):
            found = read(input_ids=step.input_ids, use_cache=step.cache is not None, **options)
        if own:
            step.cache.kept = found[keyword]
        states = found.logits if self.logits_path == "forward" else found.last_hidden_state
        return self.logits(states[:, -1] if step.last is None else states[0, step.last])

    def logprobs(
        self,
        layout: Layout,
        temperature: float = 1.0,
        with_entropy: bool = False,
        value_layout: Layout | None = None,
        statistics: OverLogits | None = None,
        hidden_layers: Sequence[int] = (),
    ) -> TokenOutputs:
        """Return log-probabilities of the layout's completion tokens, and further requested statistics.

        Args:
            layout: sequences in rows.
            temperature: logits are divided by it.
            with_entropy: also return the entropy of each next-token distribution.
            value_layout: the same rows, with the states to evaluate by the value head; None returns no values.
            statistics: also apply this function to the layout's logits divided by ``temperature``. This repeats the
                LM head's product.
            hidden_layers: also return the states of these layers; -1 is the last.
        """
        with kept_states(self, hidden_layers, layout) as kept:
            states = self._states(layout)
        hidden = states[layout.predictors]
        logprobs, entropy = self._token_logprobs(hidden, layout.targets, temperature, with_entropy)
        values = None
        if value_layout is not None and self.value_head is not None:
            if self.logits_path == "forward":
                states = hidden_states(self.model, layout, self.pads_rows, self.reads_trees)
            valued = states[value_layout.predictors].to(head_dtype(self.value_head))
            values = value_layout.scatter(at_least_float32(self.value_head(valued)).squeeze(-1))
        found = {} if statistics is None else self.over_states(hidden, statistics, temperature)
        return TokenOutputs(
            layout.scatter(logprobs),
            None if entropy is None else layout.scatter(entropy),
            values,
            {name: layout.scatter(per_token) for name, per_token in {**found, **kept}.items()},
        )

    def _token_logprobs(
        self, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probability and entropy of each target, given the hidden states that predict it."""
        if self.logits_path == "product":
            weight, bias = self.head()
            config = text_config(self.model)
            return chunked_logprobs(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature,
                with_entropy=with_entropy,
                softcap=getattr(config, "final_logit_softcapping", None),
                scale=logit_scale(config),
            )

        def of_chunk(logits: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
            found = {"logprobs": token_logprobs(logits, targets)}
            return found | {"entropy": token_entropy(logits)} if with_entropy else found

        found = self.over_states(hidden, OverLogits(None, of_chunk, (targets,)), temperature)
        return found["logprobs"], found.get("entropy")

    def over_logits(self, asked: OverLogits) -> dict[str, Tensor]:
        """Apply a function to the logits of each supervised token; return its values by name, of shape (tokens,)."""
        assert asked.layout is not None
        return self.over_states(self.predicting_states(asked.layout), asked)

    def over_states(self, hidden: Tensor, asked: OverLogits, temperature: float = 1.0) -> dict[str, Tensor]:
        """Apply a function to the logits of given hidden states, divided by ``temperature``."""

        def of_chunk(hidden: Tensor, *further: Tensor) -> Mapping[str, Tensor]:
            return asked.function(self.logits(hidden) / temperature, *further)

        if not len(hidden):  # a rank without rows
            return {name: value[:0] for name, value in of_chunk(hidden, *asked.further).items()}
        size = chunk_size(asked.chunk_tokens, text_config(self.model).vocab_size)
        return chunked_over_tokens(of_chunk, hidden, *asked.further, chunk_tokens=size)

    def predicting_states(self, layout: Layout) -> Tensor:
        """Return the last hidden states that predict the layout's supervised tokens, shape (tokens, hidden size).

        On the logits path ``forward`` logits are returned instead of hidden states.
        """
        return self._states(layout)[layout.predictors]

    def _states(self, layout: Layout) -> Tensor:
        """Return the input of `logits` for each cell of the layout."""
        if self.logits_path == "forward":
            return cells_of(unwrapped(self.model), layout, "logits", self.pads_rows, self.reads_trees)
        return hidden_states(self.model, layout, self.pads_rows, self.reads_trees)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the LM head."""
        head = unwrapped(self.model).get_output_embeddings()
        return head.weight, head.bias

    def logits(self, hidden: Tensor, head: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """Return the next-token logits of hidden states, fp32 or wider, shape (tokens, vocabulary).

        ``head`` holds weight and bias of the LM head, for a model whose own head is sharded.
        """
        if self.logits_path == "forward":
            return at_least_float32(hidden)
        if self.logits_path == "head":
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            with returning(trunk(self.model), hidden.unsqueeze(0)):
                return at_least_float32(unwrapped(self.model)(input_ids=ids, use_cache=False).logits[0])
        (weight, bias), config = head or self.head(), text_config(self.model)
        return head_logits(hidden, weight, bias, getattr(config, "final_logit_softcapping", None), logit_scale(config))

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Run the frozen model that training started from: adapters off, or the adapter as it was loaded.

        Raises:
            StateError: the model has no adapter, so it holds no reference.
        """
        if not self.has_adapter:
            raise StateError(
                "no-adapter",
                "the model has no adapter, so it holds no reference of its own; load a separate reference model",
            )
        with with_adapter(self.model, REFERENCE if REFERENCE in self.model.peft_config else None):
            yield


def takes(module: nn.Module, name: str) -> bool:
    """Return whether a module's forward has an argument of this name."""
    kind: Any = type(module)
    return name in _arguments(kind)


@functools.cache
def _arguments(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


class TrunkOutput(BaseModelOutputWithPast):
    """Output of a trunk whose hidden states were given; every other attribute is None."""

    def __getattr__(self, name: str) -> Any:
        return object.__getattribute__(self, name) if name.startswith("__") else None


@contextmanager
def returning(module: nn.Module, states: Tensor) -> Iterator[None]:
    """Replace a trunk's forward by one that returns ``states``, so that its model computes their logits."""
    own = module.__dict__.get("forward")
    module.forward = lambda *_, **__: TrunkOutput(last_hidden_state=states)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def logit_scale(config: Any) -> float:
    """Return the factor from the LM head's product to the logits: Cohere multiplies by a scale, Granite divides."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients, and restore the mode of every submodule afterwards.

    In train mode with activation checkpointing, generation drops its KV cache and samples garbage without an error.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
