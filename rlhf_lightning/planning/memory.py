r"""What a llama-like transformer holds in memory, from its sizes alone: what autograd keeps, logits, KV cache.

Pure arithmetic on shapes; no weight is read. A block is: norm, projections q k v o around attention, norm, a gated MLP.
Of each operation autograd keeps what its derivative needs, and nothing twice:

    norm         its input, in fp32 whatever the precision; the normalised input where the norm's weight trains
    product      its input, where its weight trains or an adapter reads it; never for a frozen weight
    attention    q, k, v, the output, one fp32 number a head and token: the fused kernels never hold length x length
    gated MLP    gate, silu(gate) and up, for two elementwise products

The tests compare the sums with what autograd keeps in the real model, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_lightning.functional.logprobs import KEPT_LOGITS

FP32, BF16 = 4, 2
"""Bytes of an element."""

CHUNK_TOKENS = 1024
"""Tokens whose logits the head holds at a time, see `functional.logprobs.chunked_logprobs`."""

QKV, OUT, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
"""The block's projections, those together that read the same tensor."""

PROJECTIONS = (*QKV, *OUT, *GATE_UP, *DOWN)


@dataclass(frozen=True)
class DecoderSizes:
    """Sizes of a decoder.

    Args:
        layers: blocks.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        queries: width of all query heads together.
        keys: width of all key heads together, and of all value heads.
        heads: query heads.
        vocabulary: tokens the head tells apart.
    """

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    heads: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> DecoderSizes:
        """Read the sizes from a Hugging Face config, under the names that most families use."""
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
        """Elements that a projection reads of each token."""
        return {"o_proj": self.queries, "down_proj": self.intermediate}.get(projection, self.hidden)

    def width_out(self, projection: str) -> int:
        """Elements that a projection gives of each token."""
        if projection in GATE_UP:
            return self.intermediate
        return {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}.get(projection, self.hidden)

    @property
    def matrices(self) -> int:
        """Weights of one block's seven products."""
        return sum(self.width_in(name) * self.width_out(name) for name in PROJECTIONS)


@dataclass(frozen=True)
class Pass:
    """How a forward pass is made.

    Args:
        weight_bytes: of an element of the frozen or trained backbone as the products find it.
        autocast: whether products cast what they read to bf16; each keeps its own copy.
        rank: of the adapter; None where every weight trains.
        targets: projections that the adapter hangs on.
        adapter_bytes: of an element of the adapter.
        checkpointing: keep each block's input alone and recompute the rest.
        masked: whether completions share their prompt: attention runs in blocks whose masks are kept, and the kernels
            then want as many key heads as query heads.
        eager: whether attention is written out, with its length x length probabilities.
        quantized: whether the frozen matrices are in 4 or 8 bits: they are expanded for each product, one at a time.
    """

    weight_bytes: int = FP32
    autocast: bool = False
    rank: int | None = None
    targets: frozenset[str] = frozenset(PROJECTIONS)
    adapter_bytes: int = FP32
    checkpointing: bool = False
    masked: bool = False
    eager: bool = False
    quantized: bool = False

    @property
    def compute_bytes(self) -> int:
        """Of what products give."""
        return BF16 if self.autocast or self.weight_bytes == BF16 else FP32

    @property
    def input_bytes(self) -> int:
        """Of the inputs that are kept for a weight's gradient."""
        if self.rank is None:
            return self.compute_bytes
        return BF16 if self.autocast else self.adapter_bytes

    @property
    def copies_inputs(self) -> bool:
        """Whether each product casts its input for itself, so that q, k and v keep three of one tensor."""
        if self.rank is None:
            return self.autocast and self.weight_bytes == FP32
        return self.adapter_bytes != self.weight_bytes or (self.autocast and self.adapter_bytes == FP32)


# -- activations ------------------------------------------------------------------------------------------------------


def block_bytes(block: DecoderSizes, how: Pass, width: int) -> int:
    r"""Bytes that autograd keeps of one block for each cell, without checkpointing.

    With h hidden, q and k the widths of query and key heads, m the MLP's, n heads, c bytes of the computation and all
    weights trained in fp32, this is

        4 (6 h + 2 q + 2 k + 4 m + n + 2)

    h: both norms' inputs, normalised inputs and outputs (which q, k, v and gate, up read); q: queries and attention's
    output; k: keys and values; m: gate, silu, up and their product; n: attention's normalisers; 2: the norms' scales.
    A frozen backbone drops the normalised inputs and adds 7 r for an adapter of rank r; under autocast what products
    read is 2 bytes wide and 5 h instead of 2 h, since each casts for itself.

    Args:
        block: sizes.
        how: precision, adapter, mask.
        width: cells of a row; a mask keeps one element for each of them, written-out attention one a head.
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
    """Bytes of the products' inputs for each cell, attention's output left to attention where it is not copied."""
    read = frozenset(PROJECTIONS) if how.rank is None else how.targets

    def of(names: tuple[str, ...]) -> int:
        count = len(read & set(names))
        return block.width_in(names[0]) * (count if how.copies_inputs else min(count, 1))

    kept = of(QKV) + of(GATE_UP) + of(DOWN)
    if how.rank is not None:
        kept += how.rank * len(read) + (of(OUT) if how.copies_inputs else 0)
    if how.masked and not how.eager and (how.rank is None or not how.copies_inputs):
        kept += of(OUT)  # the blocks' outputs put together again
    return how.input_bytes * kept


def cast_bytes(block: DecoderSizes, how: Pass) -> int:
    """Bytes of the bf16 copies of one block's fp32 weights that autocast makes, and backward needs, in every pass."""
    if not how.autocast:
        return 0
    whole = block.matrices if how.weight_bytes == FP32 and not how.quantized else 0
    return BF16 * (whole + (adapter_size(block, how) if how.adapter_bytes == FP32 else 0))


def adapter_size(block: DecoderSizes, how: Pass) -> int:
    """Weights of the adapter on one block: r (in + out) for each projection it hangs on."""
    return (how.rank or 0) * sum(block.width_in(name) + block.width_out(name) for name in how.targets)


def kept_bytes(block: DecoderSizes, how: Pass, rows: int, width: int) -> int:
    r"""Bytes that autograd keeps of a whole trunk from forward to backward.

    Without checkpointing layers * (cells * `block_bytes` + `cast_bytes`), with it layers * cells * h of the residual
    stream's precision. Around the blocks: token ids and the last norm, of which an adapter on a frozen backbone keeps
    no more than its first block, whose input has no gradient, lacks; and the rotary table.

    Args:
        block: sizes.
        how: precision, adapter, checkpointing.
        rows: rows of the micro-batch.
        width: cells of a row, pads included.
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
    """Bytes of the first block's casts that nobody needs: behind it is a frozen embedding, which has no gradient."""
    if how.rank is None or not how.autocast:
        return 0
    casts = how.weight_bytes == FP32 and not how.quantized
    whole = block.hidden * (block.queries + 2 * block.keys) if casts else 0
    adapted = how.rank * block.hidden * len(how.targets & set(QKV)) if how.adapter_bytes == FP32 else 0
    return BF16 * (whole + adapted)


def backward_bytes(block: DecoderSizes, how: Pass, rows: int, width: int) -> int:
    """Bytes in flight in one block's backward pass: gradients of the MLP's three inner tensors and of two residual
    ones, and with checkpointing the block's own activations, recomputed.
    """
    again = rows * width * block_bytes(block, how, width) + cast_bytes(block, how) if how.checkpointing else 0
    elements = rows * width * (3 * block.intermediate + 2 * block.hidden)
    return again + how.compute_bytes * (elements + _expanded(block, how))


def forward_bytes(block: DecoderSizes, how: Pass, rows: int, width: int) -> int:
    """Bytes in flight in one block's forward pass without gradient: the MLP's inner tensors and the residual stream."""
    elements = rows * width * (3 * block.intermediate + 3 * block.hidden) + _expanded(block, how)
    return how.compute_bytes * elements + (rows * width * width if how.masked else 0)


def _expanded(block: DecoderSizes, how: Pass) -> int:
    """Weights of the largest matrix, which stands beside its quantised form while it is multiplied."""
    return block.hidden * block.intermediate if how.quantized else 0


# -- logits and cache -------------------------------------------------------------------------------------------------


def head_bytes(block: DecoderSizes, tokens: int, trained: bool, gradient: bool = True) -> int:
    r"""Bytes of the chunked head at its fullest, v the vocabulary and t = min(tokens, `CHUNK_TOKENS`), all in fp32.

    A chunk's logits, their log-softmax and one slope: 3 t v. A head that trains makes a fourth, keeps tokens * v where
    that is at most `KEPT_LOGITS`, and adds v h up in a sum and a summand.

    Args:
        block: sizes.
        tokens: supervised tokens of the micro-batch.
        trained: whether the head's weight trains.
        gradient: whether there is a backward pass at all.
    """
    chunk = min(tokens, CHUNK_TOKENS) * block.vocabulary
    if not (trained and gradient):
        return FP32 * 3 * chunk
    kept = tokens * block.vocabulary
    return FP32 * (4 * chunk + (kept if kept <= KEPT_LOGITS else 0) + 2 * block.vocabulary * block.hidden)


def sampling_bytes(block: DecoderSizes, rows: int) -> int:
    """Bytes of one decoding step's distributions: logits and log-probabilities in fp32, exponentials and their running
    sum in fp64, for each row and token of the vocabulary.
    """
    return rows * block.vocabulary * (3 * FP32 + 2 * 8)


def cache_bytes(block: DecoderSizes, rows: int, tokens: int, element_bytes: int) -> int:
    """Bytes of keys and values of so many rows of so many tokens: 2 * layers * k for each token."""
    return 2 * block.layers * block.keys * element_bytes * rows * tokens


# -- work -------------------------------------------------------------------------------------------------------------


def forward_flops(block: DecoderSizes, cells: int, width: int) -> int:
    """Floating-point operations of the trunk's forward pass: 2 a weight and cell; attention under a causal mask, half
    of length x length for scores and for values, 2 q length a cell.
    """
    return cells * block.layers * (2 * block.matrices + 2 * block.queries * width)


def backward_flops(block: DecoderSizes, cells: int, width: int, how: Pass) -> int:
    """Floating-point operations of the backward pass: twice the forward's, once where the weights are frozen, and the
    forward once more where activations are recomputed.
    """
    times = (2 if how.rank is None else 1) + how.checkpointing
    adapters = 0 if how.rank is None else cells * block.layers * 4 * adapter_size(block, how)
    return times * forward_flops(block, cells, width) + adapters


def head_flops(block: DecoderSizes, tokens: int, trained: bool, gradient: bool = True) -> int:
    """Floating-point operations of the head: one product forward; one more for a frozen head's stored directions; of a
    head that trains the logits again and two gradients.
    """
    products = (4 if trained else 2) if gradient else 1
    return products * 2 * tokens * block.vocabulary * block.hidden
