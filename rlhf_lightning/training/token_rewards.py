"""Rewards of single tokens: from spans of a completion's text, from scorers, and from an environment's turns."""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import ContractError
from rlhf_lightning.sampling.engines import Completions
from rlhf_lightning.scoring.scorer import Judgements
from rlhf_lightning.types import Rollout

ENVIRONMENT = "environment"
"""Name of the part that holds the sum of the environment's rewards; NaN if it failed."""


def placed(judged: Judgements, completions: Completions, tokenizer: PreTrainedTokenizerBase) -> Judgements:
    """Convert span rewards to token rewards, and shift the last turn's token rewards behind the earlier turns.

    A span's reward is added at the token with the span's last character, and subtracted from the completion's last
    token. That token carries the score, and the score already includes the span rewards.
    """
    if not judged.span_rewards and not (judged.token_rewards and completions.transcripts):
        return judged
    rewards = []
    for row, (ids, start) in enumerate(zip(completions.ids, completions.starts, strict=True)):
        grid, said = torch.zeros(len(ids)), ids[start:].tolist()
        own = judged.token_rewards[row][: len(said)] if judged.token_rewards else torch.zeros(0)
        grid[start : start + len(own)] = own
        for _, end, reward in judged.span_rewards[row] if judged.span_rewards else ():
            read = range(1, len(said))  # search the first token after which the text is long enough
            place = bisect_left(read, end, key=lambda count: len(tokenization.completion_text(tokenizer, said[:count])))
            grid[start + place] += reward
            grid[-1] -= reward
        rewards.append(grid)
    return judged._replace(token_rewards=tuple(rewards), span_rewards=())


def with_environment(judged: Judgements, completions: Completions) -> Judgements:
    """Add an environment's rewards: the sum is added to the score, and token rewards move it to the turns.

    The sum is the part ``environment``. An episode in which the environment failed has no score. The environment's
    feedback is placed before the scorer's.

    Raises:
        ContractError: ``reserved-part``: a part of the scorer has this name.
    """
    if not completions.transcripts:
        return judged
    if ENVIRONMENT in judged.parts:
        raise ContractError(
            "reserved-part", f"the scorer calls a part {ENVIRONMENT!r}, the name of the environment's reward: rename it"
        )
    total = torch.tensor([one.reward for one in completions.transcripts], dtype=torch.float32)
    given = judged.token_rewards or (torch.zeros(0),) * len(total)
    moved = [one.token_rewards() for one in completions.transcripts]
    rewards = tuple(
        own + torch.nn.functional.pad(row[: len(own)], (0, len(own) - len(row[: len(own)])))
        for own, row in zip(moved, given, strict=True)
    )
    parts = {**judged.parts, ENVIRONMENT: total}
    pairs = zip([one.feedback for one in completions.transcripts], judged.feedback or (None,) * len(total), strict=True)
    said = tuple("\n".join(filter(None, pair)) or None for pair in pairs)
    return judged._replace(
        scores=judged.scores + total, parts=parts, token_rewards=rewards, feedback=said if any(said) else ()
    )


def with_token_rewards(rewards: Tensor, rollout: Rollout) -> Tensor:
    """Add the token rewards that a scorer or an environment gave."""
    given = rollout.token_rewards
    if given is None:
        return rewards
    return rewards + torch.nn.functional.pad(given, (0, rewards.shape[1] - given.shape[1])).to(rewards)
