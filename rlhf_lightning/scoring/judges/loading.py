"""From what a user names to a judge: a model's folder, a server's address, a class with arguments."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_lightning.scoring.judges.judge import Judge
from rlhf_lightning.scoring.judges.local import LocalJudge
from rlhf_lightning.scoring.judges.remote import RemoteJudge
from rlhf_lightning.scoring.judges.simulated import SimulatedJudge

OWN = {kind.__name__: kind for kind in (LocalJudge, RemoteJudge, SimulatedJudge)}


def load_judge(spec: str | Judge, arguments: Mapping[str, Any] | None = None) -> Judge:
    """Return the judge that ``spec`` names.

    Args:
        spec: a judge; a model's folder, .gguf file or hub id (`LocalJudge`); the address of an OpenAI-compatible server
            (`RemoteJudge`, whose argument ``model`` is needed); the name of a class of this room; or the import path of
            a class, such as ``my_judge.MyJudge``, whose objects answer a sequence of questions.
        arguments: of its class.

    Raises:
        ValueError: the import path names no judge, or a class that its arguments do not fit.
    """
    given = dict(arguments or {})
    if not isinstance(spec, str):
        return spec
    if spec.startswith(("http://", "https://")):
        return _made(RemoteJudge, spec, {"url": spec, **given})
    if spec in OWN:
        return _made(OWN[spec], spec, given)
    if Path(spec).expanduser().exists() or "/" in spec or spec.endswith(".gguf"):
        return _made(LocalJudge, spec, {"model": spec, **given})
    return _made(_imported(spec), spec, given)


def _imported(path: str) -> type:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"judge {path!r} is neither a model's folder, a server's address nor a class: {error}"
        ) from error
    # Looked at before it is made: a class that judges nothing may do anything.
    if not (isinstance(found, type) and any("__call__" in vars(kind) for kind in found.__mro__)):
        raise ValueError(f"judge {path!r} is no class whose objects can be called with questions")
    return found


def _made(kind: type, spec: str, arguments: dict[str, Any]) -> Judge:
    try:
        made = kind(**arguments)
    except TypeError as error:
        named = f"with the arguments {', '.join(arguments)}" if arguments else "without arguments"
        raise ValueError(f"judge {spec!r} cannot be made {named}: {error}") from error
    if not isinstance(getattr(made, "name", None), str):
        raise ValueError(f"judge {spec!r} has no name: labels say which judge they come from")
    return made
