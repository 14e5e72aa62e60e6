"""Choose a model's decoding method by comparing sampled log-probabilities on a small copy with uncached forwards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM, Decoding
from rlhf_lightning.models.scalar_head import unwrapped
from rlhf_lightning.models.self_check import CLOSE, EXAMPLES, check_key, found_once, own_logprobs, working_copy
from rlhf_lightning.sampling.decoding import default_decoding
from rlhf_lightning.sampling.engines import Completions, SamplingSettings

TOLD: dict[Decoding, str] = {
    "slots": "in slots that are refilled",
    "batches": "in batches that start together",
    "equal": "in batches of prompts of the same length",
    "uncached": "without a cache, each token from the whole text before it",
}


ENDS = tuple(range(5, 20))
"""Ids that end completions in the check; there are many, so that rows end at different times."""


def settle_decoding(model: CausalLM, sample: Callable[..., Completions]) -> None:
    """Set a model's decoding to the first method that agrees with its own forward pass; log if it is a slower one.

    ``sample`` is `SamplingEngine.sample` of the engine that decodes.

    Raises:
        ModelError: no method agrees.
    """
    if model.decoding is not None or not model.self_check:
        return
    first = default_decoding(model, checked=True)
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    depends_on = [first, model.pads_rows, model.reads_trees, model.logits_path, hashlib.sha256(code).hexdigest()]
    key = check_key(model.model, "decoding", *depends_on)
    found, line = found_once(key, lambda: _examined(model, first, sample), lambda values: (values[0], values[1]))
    if found is None:
        raise ModelError("self-check-failed", line)
    if line:
        rank_zero_info(line)
    model.decoding = found


def _examined(model: CausalLM, first: Decoding, sample: Callable[..., Completions]) -> tuple[Decoding | None, str]:
    """Return the first decoding method that agrees on a small copy (None if none does), and a message for the user."""
    name = type(unwrapped(model.model)).__name__
    hf, unusable = working_copy(unwrapped(model.model))
    if unusable is not None:
        return default_decoding(model), ""  # the check at loading has reported it
    small = CausalLM(hf).eval()
    small.pads_rows, small.logits_path, small.reads_trees = model.pads_rows, model.logits_path, model.reads_trees
    ways: tuple[Decoding, ...] = get_args(Decoding)
    reason, known = "", dict[bytes, Tensor]()
    for way in ways[ways.index(first) :]:
        small.decoding = way
        gap = _gap(small, known, sample)
        if gap <= CLOSE:
            return way, f"{name}: {reason}; it decodes {TOLD[way]}" if reason else ""
        told = "fails" if gap == float("inf") else f"is wrong by {gap:.2g} nats"
        reason = reason or f"decoding {TOLD[way]} {told}"
    return None, f"{name}: {reason}, and every other way to decode too; sample with another model"


def _gap(small: CausalLM, known: dict[bytes, Tensor], sample: Callable[..., Completions]) -> float:
    """Return the largest difference between sampled log-probabilities and the model's own forward pass, nats.

    The check stops at the first run with a too large difference. ``known`` caches the model's own log-probabilities,
    since every batch samples the same completions.
    """
    prompts = [EXAMPLES.prompts[parent] for parent in (0, 1, 1, 2, 1)]
    runs: list[tuple[list[Any], int | None]] = [(prompts, None), (prompts, 2), (prompts[:1], None)]
    largest = 0.0
    try:
        for asked, slots in runs:
            settings = SamplingSettings(max_new_tokens=7, batch_size=slots)
            drawn = sample(small, asked, torch.arange(len(asked)), settings, 0, ENDS)
            for prompt, ids, logprobs in zip(asked, drawn.ids, drawn.logprobs, strict=True):
                key = torch.cat([prompt, ids]).numpy().tobytes()
                if key not in known:
                    known[key] = own_logprobs(small.model, prompt, ids)
                largest = max(largest, float((logprobs - known[key]).abs().nan_to_num(torch.inf).max()))
            if largest > CLOSE:
                break
    except Exception:  # an unsupported decoding method fails in many ways
        return float("inf")
    return largest
