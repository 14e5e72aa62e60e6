"""From what a user names to a scorer: a reward model's folder, an import path, a function, a Scorer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from rlhf_lightning.scoring.base import FunctionScorer, Scorer
from rlhf_lightning.scoring.learned import LearnedScorer
from rlhf_lightning.scoring.process import ProcessScorer, stored_separator


def load_scorer(spec: Any) -> Scorer:
    """Return the scorer that ``spec`` names.

    Args:
        spec: a Scorer or function; a reward model's folder or hub id, or a process reward model's folder; or an import
            path such as ``my_scores.brevity`` of a function or of a Scorer class without required arguments.

    Raises:
        ValueError: the import path names nothing callable, or a class that needs arguments.
        FileNotFoundError: there is no such folder.
    """
    if isinstance(spec, Scorer):
        return spec
    if callable(spec):
        return FunctionScorer(spec)
    if Path(spec).expanduser().is_dir() or "/" in spec:
        return ProcessScorer(spec) if stored_separator(spec) else LearnedScorer(spec)
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
