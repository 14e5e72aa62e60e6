"""How a model decodes, checked on a small copy: sampled log-probabilities against its own forward without a cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM, Decoding, inference_mode_of
from rlhf_lightning.models.layout import padded_layout, select
from rlhf_lightning.models.resolving import cache_folder
from rlhf_lightning.models.scalar_head import unwrapped
from rlhf_lightning.models.self_check import (
    CLOSE,
    CLOSE_BY_DTYPE,
    EXAMPLES,
    check_key,
    own_logprobs,
    working_copy,
    write_finding,
)
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.sampling.decoding import default_decoding
from rlhf_lightning.sampling.engines import Completions, SamplingRequest, SamplingSettings, SlotEngine

TOLD: dict[Decoding, str] = {
    "slots": "in slots that are refilled",
    "batches": "in batches that start together",
    "equal": "in batches of prompts of the same length",
    "uncached": "without a cache, each token from the whole text before it",
}


ENDS = tuple(range(5, 20))
"""Ids that end completions of the check: so many that rows end at different times."""


def settle_decoding(model: CausalLM) -> None:
    """Set how a model decodes to the first way that agrees with its own forward; a line says what is slower.

    Raises:
        ModelError: no way agrees.
    """
    if model.decoding is not None or not model.self_check:
        return
    first = default_decoding(model, checked=True)
    found, line = _decoding_once(model, first)
    if found is None:
        raise ModelError("self-check-failed", line)
    if line:
        rank_zero_info(line)
    model.decoding = found


_found: dict[str, tuple[Decoding | None, str]] = {}


def _decoding_once(model: CausalLM, first: Decoding) -> tuple[Decoding | None, str]:
    """Return the finding for a model's class and config, from this process or from the cache."""
    key = check_key(model.model, "decoding", first, model.pads_rows, model.reads_trees, model.logits_path, _code())
    if key not in _found:
        file = cache_folder() / "self_check" / f"{key}.json"
        try:
            _found[key] = tuple(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            _found[key] = examine_decoding(model, first)
            write_finding(file, _found[key])
    return _found[key]


def _code() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def examine_decoding(model: CausalLM, first: Decoding) -> tuple[Decoding | None, str]:
    """Return the first way to decode that agrees on a small copy, None if none does, and what to tell the user."""
    name = type(unwrapped(model.model)).__name__
    hf, unusable = working_copy(unwrapped(model.model))
    if unusable is not None:
        return default_decoding(model), ""  # the check at loading has said so
    small = CausalLM(hf).eval()
    small.pads_rows, small.logits_path, small.reads_trees = model.pads_rows, model.logits_path, model.reads_trees
    ways: tuple[Decoding, ...] = get_args(Decoding)
    reason, known = "", dict[bytes, Tensor]()
    for way in ways[ways.index(first) :]:
        small.decoding = way
        apart = _apart(small, known)
        if apart <= CLOSE:
            return way, f"{name}: {reason}; it decodes {TOLD[way]}" if reason else ""
        told = "fails" if apart == float("inf") else f"is wrong by {apart:.2g} nats"
        reason = reason or f"decoding {TOLD[way]} {told}"
    return None, f"{name}: {reason}, and every other way to decode too; sample with another model"


def _apart(small: CausalLM, known: dict[bytes, Tensor]) -> float:
    """Return how far log-probabilities of sampled tokens are from the model's own forward, nats; at least, if wrong.

    Args:
        small: the small copy.
        known: its own log-probabilities of completions seen before; any batch samples the same.
    """
    prompts = [EXAMPLES.prompts[parent] for parent in (0, 1, 1, 2, 1)]
    runs: list[tuple[list[Any], int | None]] = [(prompts, None), (prompts, 2), (prompts[:1], None)]
    largest = 0.0
    try:
        for asked, slots in runs:
            settings = SamplingSettings(max_new_tokens=7, batch_size=slots)
            drawn = SlotEngine().sample(small, asked, torch.arange(len(asked)), settings, 0, ENDS)
            for prompt, ids, logprobs in zip(asked, drawn.ids, drawn.logprobs, strict=True):
                key = torch.cat([prompt, ids]).numpy().tobytes()
                if key not in known:
                    known[key] = own_logprobs(small.model, prompt, ids)
                largest = max(largest, float((logprobs - known[key]).abs().nan_to_num(torch.inf).max()))
            if largest > CLOSE:
                break
    except Exception:  # a way that a class was not made for fails in many ways
        return float("inf")
    return largest


@torch.no_grad()
def check_first_row(model: CausalLM, request: SamplingRequest, drawn: Completions) -> None:
    """Warn where log-probabilities of the first completion that a model samples are not those of its forward."""
    if is_sharded(model):
        return  # other ranks may have no row to forward
    row = drawn.after(request.prompts)
    layout = padded_layout(select(row, [0])).to(next(model.parameters()).device)
    with inference_mode_of(model):
        expected = model(layout, request.settings.temperature or 1.0).logprobs[0].cpu()
    apart = float((drawn.logprobs[0] - expected[: len(drawn.logprobs[0])]).abs().mean())
    if not apart <= CLOSE_BY_DTYPE.get(next(model.parameters()).dtype, CLOSE):
        rank_zero_warn(
            f"{type(unwrapped(model.model)).__name__}: log-probabilities of sampled tokens differ from the model's "
            f"forward by {apart:.2g} nats on average in the first completion; its samples are not the model's"
        )
