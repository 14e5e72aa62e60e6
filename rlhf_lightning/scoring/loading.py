"""From what a user names to a scorer: a reward model's folder, an import path, a class with arguments, a function."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from rlhf_lightning.scoring.learned import LearnedScorer
from rlhf_lightning.scoring.process import ProcessScorer, stored_separator
from rlhf_lightning.scoring.scorer import FunctionScorer, Scorer

ROOM = "rlhf_lightning.scoring"


def load_scorer(spec: Any) -> Scorer:
    """Return the scorer that ``spec`` names.

    Args:
        spec: a Scorer or function; a reward model's folder or hub id, or a process reward model's folder; an import
            path such as ``my_scores.brevity`` of a function or of a class without required arguments; or
            ``{"class_path": ..., "init_args": {...}}`` as YAML writes a class with arguments. The classes of this room
            need no path: ``MathAnswerScorer``; the outermost class_path of a YAML file is written in full all the same,
            ``rlhf_lightning.scoring.WeightedSum``.

    Raises:
        ValueError: the import path names nothing callable, or a class that its arguments do not fit.
        FileNotFoundError: there is no such folder.
    """
    if isinstance(spec, Scorer):
        return spec
    if isinstance(spec, Namespace):  # a mapping as the command line's parser hands it over
        spec = spec.as_dict()
    if isinstance(spec, Mapping):
        return _from_mapping(spec)
    if callable(spec):
        return FunctionScorer(spec)
    if Path(spec).expanduser().is_dir() or "/" in spec:
        return ProcessScorer(spec) if stored_separator(spec) else LearnedScorer(spec)
    return _made(str(spec), {})


def _from_mapping(spec: Mapping[str, Any]) -> Scorer:
    unknown = sorted(set(spec) - {"class_path", "init_args"})
    path, arguments = spec.get("class_path"), spec.get("init_args") or {}
    if unknown or not isinstance(path, str) or not isinstance(arguments, Mapping):
        raise ValueError(f"a scorer is written {{class_path: NAME, init_args: {{...}}}}; found {dict(spec)}")
    return _made(path, arguments)


def _made(path: str, arguments: Mapping[str, Any]) -> Scorer:
    """Import what ``path`` names, make it if it is a class, and see that it can score."""
    found = _imported(path)
    if arguments and not isinstance(found, type):
        raise ValueError(f"scorer {path!r} is no class: init_args {sorted(arguments)} have nowhere to go")
    # Looked at before it is made: a class that scores nothing may do anything.
    if isinstance(found, type) and not any("__call__" in vars(kind) for kind in found.__mro__):
        raise ValueError(f"scorer {path!r} is a class whose objects cannot be called with (prompts, completions)")
    try:
        made = found(**arguments) if isinstance(found, type) else found
    except TypeError as error:
        given = f"with the arguments {', '.join(arguments)}" if arguments else "without arguments"
        raise ValueError(f"scorer {path!r} is a class that cannot be made {given}: {error}") from error
    if not callable(made):
        raise ValueError(f"scorer {path!r} is a {type(made).__name__}: it cannot be called with (prompts, completions)")
    return made if isinstance(made, Scorer) else FunctionScorer(made)


def _imported(path: str) -> Any:
    module_name, _, attribute = path.rpartition(".")
    room = importlib.import_module(ROOM)
    if not module_name and attribute in room.__all__:
        return getattr(room, attribute)
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"scorer {path!r} is neither a reward model's folder nor an importable function: {error}"
        ) from error
