r"""Compute memory (activations saved by autograd, logits, KV cache) and FLOPs of a Llama-like transformer.

A block is: norm, projections q k v o around attention, norm, a gated MLP. Autograd saves for each operation:

    norm         its input, always in fp32; the normalised input if the norm's weight is trained
    linear       its input, if its weight or an adapter on it is trained; nothing for a frozen weight
    attention    q, k, v, the output, one fp32 number per head and token: fused kernels hold no length x length matrix
    gated MLP    gate, silu(gate) and up, for two elementwise products

The tests compare the sums with what autograd saves in the real model, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_lightning.functional.logprobs import KEPT_LOGITS

FP32, BF16 = 4, 2
"""Bytes per element."""

CHUNK_TOKENS = 1024
"""Tokens per chunk of logits, see `functional.logprobs.chunked_logprobs`."""

QKV, OUT, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
"""The block's projections, grouped by their input tensor."""

PROJECTIONS = (*QKV, *OUT, *GATE_UP, *DOWN)


@dataclass(frozen=True)
class DecoderSizes:
    """Sizes of a decoder."""

    layers: int  # number of blocks
    hidden: int  # width of the residual stream
    intermediate: int  # width of the MLP
    queries: int  # total width of the query heads
    keys: int  # total width of the key heads, and of the value heads
    heads: int  # number of query heads
    vocabulary: int  # size of the vocabulary

    @classmethod
    def of(cls, config: Any) -> DecoderSizes:
        """Read the sizes from a Hugging Face config."""
        config = config.get_text_config()
        heads, hidden = config.num_attention_heads, config.hidden_size
        size = getattr(config, "head_dim", None) or hidden // heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            intermediate=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
            queries=heads * size,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
            heads=heads,
            vocabulary=config.vocab_size,
        )

    def width_in(self, projection: str) -> int:
        """Return the input width of a projection."""
        return {"o_proj": self.queries, "down_proj": self.intermediate}.get(projection, self.hidden)

    def width_out(self, projection: str) -> int:
        """Return the output width of a projection."""
        if projection in GATE_UP:
            return self.intermediate
        return {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}.get(projection, self.hidden)

    @property
    def matrices(self) -> int:
        """Number of weights in one block's seven projections."""
        return sum(self.width_in(name) * self.width_out(name) for name in PROJECTIONS)


@dataclass(frozen=True)
class Pass:
    """Settings of a forward pass."""

    weight_bytes: int = FP32  # per element of the backbone's weights
    autocast: bool = False  # whether linear layers cast their inputs to bf16, each into its own copy
    rank: int | None = None  # rank of the adapter; None if all weights are trained
    targets: frozenset[str] = frozenset(PROJECTIONS)  # projections with an adapter
    adapter_bytes: int = FP32  # per element of the adapter
    checkpointing: bool = False  # save only each block's input and recompute the rest
    # completions share their prompt: attention runs in blocks with saved masks and repeats key heads to query heads
    masked: bool = False
    eager: bool = False  # attention without fused kernels, with length x length probabilities
    # frozen matrices are in 4 or 8 bits and dequantised one at a time
    quantized: bool = False

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of the outputs of linear layers."""
        return BF16 if self.autocast or self.weight_bytes == BF16 else FP32

    @property
    def input_bytes(self) -> int:
        """Bytes per element of the inputs saved for a weight's gradient."""
        if self.rank is None:
            return self.compute_bytes
        return BF16 if self.autocast else self.adapter_bytes

    @property
    def copies_inputs(self) -> bool:
        """Whether each linear layer casts its own input, so that q, k and v save three copies of one tensor."""
        if self.rank is None:
            return self.autocast and self.weight_bytes == FP32
        return self.adapter_bytes != self.weight_bytes and not self.autocast

    @property
    def casts_adapted(self) -> bool:
        """Whether adapted layers cast their frozen matrix for each product, see `models.low_rank`."""
        return self.rank is not None and self.autocast and self.weight_bytes == FP32 and not self.quantized


# -- activations ------------------------------------------------------------------------------------------------------


def block_bytes(block: DecoderSizes, how: Pass, width: int) -> int:
    r"""Return the bytes that autograd saves per token (padding included) in one block, without checkpointing.

    With hidden size h, query and key widths q and k, MLP width m, n heads, and all weights trained in fp32:

        4 (6 h + 2 q + 2 k + 4 m + n + 2)

    h: inputs, normalised inputs and outputs of both norms (the inputs of q, k, v and of gate, up); q: queries and
    attention's output; k: keys and values; m: gate, silu, up and their product; n: attention's normalisers; 2: the
    norms' scales. A frozen backbone has no normalised inputs, and 7 r for an adapter of rank r. Under autocast the
    inputs of linear layers take 2 bytes, and without an adapter 5 h instead of 2 h since each layer casts its own.

    ``width`` is the length of a row: a mask has one element per row token, eager attention one per head as well.
    """
    h, q, m, c = block.hidden, block.queries, block.intermediate, how.compute_bytes
    norms = FP32 * (2 * h + 2) + (2 * h * how.weight_bytes if how.rank is None else 0)
    keys = q if how.masked or how.eager else block.keys
    attention = c * (2 * q + 2 * keys) + (c * width if how.masked and not how.eager else 0)
    if how.eager:
        attention += block.heads * width * (FP32 + (c if c != FP32 else 0))
    else:
        attention += FP32 * block.heads
    return norms + attention + 3 * m * c + _input_bytes(block, how)


def _input_bytes(block: DecoderSizes, how: Pass) -> int:
    """Return the bytes of the linear layers' inputs per token; attention's output counts only if it is copied."""
    read = frozenset(PROJECTIONS) if how.rank is None else how.targets

    def of(names: tuple[str, ...]) -> int:
        count = len(read & set(names))
        return block.width_in(names[0]) * (count if how.copies_inputs else min(count, 1))

    kept = of(QKV) + of(GATE_UP) + of(DOWN)
    copied = how.rank is not None and how.copies_inputs  # to the precision of the adapter
    if how.rank is not None:
        kept += how.rank * len(read) + (of(OUT) if copied else 0)
    if how.masked and not how.eager and not copied:
        kept += of(OUT)  # the joined outputs of the attention blocks
    return how.input_bytes * kept


def cast_bytes(block: DecoderSizes, how: Pass) -> int:
    """Return the bytes of one block's bf16 weight copies that autocast makes and the backward pass needs."""
    if not how.autocast:
        return 0
    casts = how.weight_bytes == FP32 and not how.quantized
    return BF16 * (
        (_saved_weights(block, how, PROJECTIONS) if casts else 0)
        + (adapter_size(block, how) if how.adapter_bytes == FP32 else 0)
    )


def _saved_weights(block: DecoderSizes, how: Pass, names: tuple[str, ...]) -> int:
    """Return the number of weights in those named projections that have no adapter; their cast copies are kept."""
    kept = set(names) - (set() if how.rank is None else how.targets)
    return sum(block.width_in(name) * block.width_out(name) for name in kept)


def adapter_size(block: DecoderSizes, how: Pass) -> int:
    """Return the number of adapter weights in one block: r (in + out) per adapted projection."""
    return (how.rank or 0) * sum(block.width_in(name) + block.width_out(name) for name in how.targets)


def kept_bytes(block: DecoderSizes, how: Pass, rows: int, width: int) -> int:
    r"""Return the bytes that autograd saves of the whole trunk between forward and backward pass.

    Without checkpointing: layers * (tokens * `block_bytes` + `cast_bytes`); with it: layers * tokens * h in the
    precision of the residual stream. Outside the blocks are token ids, the last norm and the rotary table. With an
    adapter on a frozen backbone these cancel with the first block, whose input has no gradient.

    The micro-batch has ``rows`` rows of ``width`` tokens, padding included.
    """
    cells, last_norm = rows * width, FP32 * (block.hidden + 1)
    if how.checkpointing:
        around = last_norm + (8 + block.hidden * how.weight_bytes if how.rank is None else 0)
        return cells * (block.layers * block.hidden * how.weight_bytes + around)
    table = 2 * block.queries // block.heads * how.weight_bytes * width * (rows if how.masked else 1)
    around = 8 + last_norm + block.hidden * how.weight_bytes if how.rank is None else 0
    per_layer = cells * block_bytes(block, how, width) + cast_bytes(block, how)
    return block.layers * per_layer - _spared_bytes(block, how) + cells * around + table


def _spared_bytes(block: DecoderSizes, how: Pass) -> int:
    """Return the bytes of casts that the first block does not save: its input, a frozen embedding, has no gradient."""
    if how.rank is None or not how.autocast:
        return 0
    casts = how.weight_bytes == FP32 and not how.quantized
    return BF16 * _saved_weights(block, how, QKV) if casts else 0


def backward_bytes(block: DecoderSizes, how: Pass, rows: int, width: int) -> int:
    """Return the temporary bytes of one block's backward pass.

    These are the gradients of the MLP's three inner tensors and of two residual tensors; with checkpointing also the
    block's recomputed activations.
    """
    again = rows * width * block_bytes(block, how, width) + cast_bytes(block, how) if how.checkpointing else 0
    elements = rows * width * (3 * block.intermediate + 2 * block.hidden)
    return again + how.compute_bytes * (elements + _expanded(block, how))


def forward_bytes(block: DecoderSizes, how: Pass, rows: int, width: int) -> int:
    """Return the temporary bytes of one block's forward pass without gradient: MLP tensors and residual stream."""
    elements = rows * width * (3 * block.intermediate + 3 * block.hidden) + _expanded(block, how)
    return how.compute_bytes * elements + (rows * width * width if how.masked else 0)


def _expanded(block: DecoderSizes, how: Pass) -> int:
    """Return the weights of the largest matrix, which is dequantised or cast for its product."""
    return block.hidden * block.intermediate if how.quantized or how.casts_adapted else 0


# -- logits and cache -------------------------------------------------------------------------------------------------


def head_bytes(block: DecoderSizes, tokens: int, trained: bool, gradient: bool = True) -> int:
    r"""Return the peak bytes of the chunked LM head, with vocabulary v and t = min(tokens, `CHUNK_TOKENS`), in fp32.

    A chunk's logits, their log-softmax and one derivative: 3 t v. A trained head has a fourth, saves tokens * v if
    that is at most `KEPT_LOGITS`, and sums its gradient in 2 v h.

    Args:
        block: sizes.
        tokens: supervised tokens of the micro-batch.
        trained: whether the head's weight is trained.
        gradient: whether there is a backward pass.
    """
    chunk = min(tokens, CHUNK_TOKENS) * block.vocabulary
    if not (trained and gradient):
        return FP32 * 3 * chunk
    kept = tokens * block.vocabulary
    return FP32 * (4 * chunk + (kept if kept <= KEPT_LOGITS else 0) + 2 * block.vocabulary * block.hidden)


def sampling_bytes(block: DecoderSizes, rows: int) -> int:
    """Return the bytes of one decoding step's distributions, per row and vocabulary entry.

    Counts logits and log-probabilities in fp32, and exponentials and their cumulative sum in fp64.
    """
    return rows * block.vocabulary * (3 * FP32 + 2 * 8)


def cache_bytes(block: DecoderSizes, rows: int, tokens: int, element_bytes: int) -> int:
    """Return the bytes of a KV cache: 2 * layers * k elements per token."""
    return 2 * block.layers * block.keys * element_bytes * rows * tokens


# -- compute ----------------------------------------------------------------------------------------------------------


def forward_flops(block: DecoderSizes, cells: int, width: int) -> int:
    """Return the FLOPs of the trunk's forward pass on ``cells`` tokens in rows of ``width``.

    Counts 2 per weight and token. Causal attention computes half of length x length for scores and for values:
    2 q length per token.
    """
    return cells * block.layers * (2 * block.matrices + 2 * block.queries * width)


def backward_flops(block: DecoderSizes, cells: int, width: int, how: Pass) -> int:
    """Return the FLOPs of the backward pass.

    Twice the forward pass, or once if the weights are frozen; with checkpointing plus one forward pass.
    """
    times = (2 if how.rank is None else 1) + how.checkpointing
    adapters = 0 if how.rank is None else cells * block.layers * 4 * adapter_size(block, how)
    return times * forward_flops(block, cells, width) + adapters


def head_flops(block: DecoderSizes, tokens: int, trained: bool, gradient: bool = True) -> int:
    """Return the FLOPs of the LM head.

    One product in the forward pass. For the gradient one more if the head is frozen, or three more (recomputed logits
    and two gradients) if it is trained.
    """
    products = (4 if trained else 2) if gradient else 1
    return products * 2 * tokens * block.vocabulary * block.hidden
