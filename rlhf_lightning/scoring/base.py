"""The contracts of scoring: text in, scores out; a learned scorer with the policy's tokenizer also takes ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.types import Prompt


class Scorer:
    """A callable that scores completions. Any function with this signature serves as well.

    A subclass that needs a device or weights overrides ``to`` and ``load_beside``, and one that holds networks names
    them in ``models``.
    """

    @property
    def models(self) -> Sequence[nn.Module]:
        """The networks it scores with, whose weights a sharded run cuts over its ranks."""
        return ()

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float] | Tensor:
        """Return one score per completion.

        Args:
            prompts: each prompt as the data gave it.
            completions: text of each completion, without the end token.
            columns: further columns of the data, one value per completion.
        """
        raise AttributeError(f"{type(self).__name__} must define '__call__'")

    def load_beside(self, policy: CausalLM, settings: LoadSettings) -> None:
        """Load what scoring needs, beside the policy whose completions are scored.

        A scorer made of others passes this on to them: a learned one may share the policy's backbone.
        """

    def to(self, device: torch.device) -> Scorer:
        """Move what the scorer holds to ``device``."""
        return self


class ZeroScorer(Scorer):
    """Scores every completion 0: for objectives that learn from something else than scores."""

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float] | Tensor:
        """Return a 0 for each completion."""
        return [0.0] * len(completions)


class FunctionScorer(Scorer):
    """A plain function as a scorer.

    Args:
        function: called as ``function(prompts, completions, **columns)``.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float] | Tensor:
        """Return the function's scores."""
        return self.function(prompts, completions, **columns)


def checked_scores(scores: Sequence[float] | Tensor, count: int, name: str) -> Tensor:
    """Return scores as fp32, shape (count,), on the CPU.

    Raises:
        ValueError: there are more or fewer scores than completions, or one is NaN or infinite.
    """
    try:
        values = torch.as_tensor(scores, dtype=torch.float32).detach().cpu().flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must return one number for each completion: {error}") from error
    if len(values) != count:
        raise ValueError(f"{name} returned {len(values)} scores for {count} completions: it must return one for each")
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        value = values[bad[0]].item()
        raise ValueError(f"{name} returned {value} for completion {bad[0]}; {len(bad)} of {count} are not finite")
    return values
