"""The policy's own log-probabilities of completions that were sampled elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf_lightning.models.causal_lm import CausalLM, inference_mode_of
from rlhf_lightning.models.layout import cut_sequences, padded_layout, select
from rlhf_lightning.models.sharding import in_step
from rlhf_lightning.sampling.decoding import idle_pass
from rlhf_lightning.types import MicroBatchLimits, Sequences

MAX_TOKENS = 8192
"""Maximum number of positions in a forward pass over prompts."""


def scored(
    model: CausalLM,
    prompts: Sequence[Tensor],
    completions: Sequence[Tensor],
    temperature: float,
    learned: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Return the policy's own log-probability of each token of each completion.

    All ranks of a sharded policy must call this; their numbers of completions may differ.

    Args:
        model: the policy.
        prompts: token ids of each prompt.
        completions: token ids of each completion.
        temperature: logits are divided by it.
        learned: bool, one mask per completion: False on tokens whose value is 0 instead; None has none.
    """
    rows = tuple(range(len(completions)))
    supervised = tuple(learned or (torch.ones(len(ids), dtype=torch.bool) for ids in completions))
    sequences = Sequences(tuple(prompts), tuple(completions), rows, supervised)
    device, found = next(model.parameters()).device, dict[int, Tensor]()
    with inference_mode_of(model), in_step(model, partial(idle_pass, model, None)) as before_pass:
        for cut in cut_sequences(sequences, limits=MicroBatchLimits(max_tokens=MAX_TOKENS)):
            before_pass()
            grid = model(padded_layout(select(sequences, cut)).to(device), temperature).logprobs.cpu()
            found |= {row: grid[place, : len(completions[row])] for place, row in enumerate(cut)}
    return tuple(found[row] for row in rows)
