"""The contracts of scoring: text in, scores out; a learned scorer with the policy's tokenizer also takes ids."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.types import Prompt


class Scorer:
    """A callable that scores completions. Any function with this signature serves as well.

    A subclass that needs a device or weights overrides ``to``.
    """

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

    def to(self, device: torch.device) -> Scorer:
        """Move what the scorer holds to ``device``."""
        return self


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


def load_scorer(spec: Any) -> Scorer:
    """Return the scorer that ``spec`` names.

    Args:
        spec: a Scorer or function; a reward model's folder or hub id; or an import path such as
            ``my_scores.brevity`` of a function or of a Scorer class without required arguments.

    Raises:
        ValueError: the import path names nothing callable, or a class that needs arguments.
        FileNotFoundError: there is no such folder.
    """
    from rlhf_lightning.scoring.learned import LearnedScorer

    if isinstance(spec, Scorer):
        return spec
    if callable(spec):
        return FunctionScorer(spec)
    if Path(spec).expanduser().is_dir() or "/" in spec:
        return LearnedScorer(spec)
    module_name, _, attribute = str(spec).rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"scorer {spec!r} is neither a reward model's folder nor an importable function: {error}"
        ) from error
    try:
        made = found() if isinstance(found, type) else found
    except TypeError as error:
        raise ValueError(f"scorer {spec!r} is a class that cannot be made without arguments: {error}") from error
    if not callable(made):
        raise ValueError(f"scorer {spec!r} is a {type(made).__name__}: it cannot be called with (prompts, completions)")
    return made if isinstance(made, Scorer) else FunctionScorer(made)


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
