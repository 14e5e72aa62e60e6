"""From what a user names to a scorer, a gold reward or a judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import SettingError
from rlhf_lightning.loading import load, shipped_classes
from rlhf_lightning.models.resolving import resolve_folder
from rlhf_lightning.scoring.encoders import EncoderScorer, is_encoder
from rlhf_lightning.scoring.judges.judge import Judge, SimulatedJudge
from rlhf_lightning.scoring.judges.local import CritiqueJudge, LocalJudge
from rlhf_lightning.scoring.judges.remote import RemoteJudge
from rlhf_lightning.scoring.learned import LearnedScorer, ProcessScorer, stored_separator
from rlhf_lightning.scoring.scorer import FunctionScorer, Scorer


def load_scorer(spec: Any) -> Scorer:
    """Return the scorer that ``spec`` describes.

    Args:
        spec: folder or hub id of a reward model or process reward model; or what `loading.load` takes: a Scorer or a
            function, a class of this room such as ``MathAnswerScorer``, an import path such as ``my_scores.brevity``,
            or ``{"class_path": ..., "init_args": {...}}``.

    Raises:
        SettingError: see `loading.load`.
        MissingError: there is no such folder.
    """
    spec = str(spec) if isinstance(spec, Path) else spec
    if isinstance(spec, str) and ".py" in (Path(spec).suffix, Path(spec.partition(":")[0]).suffix):
        module = Path(spec.partition(":")[0]).stem
        raise SettingError(
            "file-as-scorer", f"{spec!r} is a file: name its function by module and name, such as {module}.score"
        )
    if isinstance(spec, str) and (Path(spec).expanduser().is_dir() or "/" in spec):
        if stored_separator(spec):
            return ProcessScorer(spec)
        return EncoderScorer(spec) if is_encoder(resolve_folder(spec)) else LearnedScorer(spec)
    found = load(spec, Callable, shipped_classes("rlhf_lightning.scoring", Scorer), "scorer")
    return found if isinstance(found, Scorer) else FunctionScorer(found)


def load_judge(spec: str | Judge, arguments: Mapping[str, Any] | None = None) -> Judge:
    """Return the judge that ``spec`` names.

    Args:
        spec: a judge; a model's folder, .gguf file or hub id (`LocalJudge`); the address of an OpenAI-compatible server
            (`RemoteJudge`, which needs the argument ``model``); a class of this room; or the import path of a class,
            such as ``my_judge.MyJudge``, whose objects answer a sequence of questions.
        arguments: arguments of the class.

    Raises:
        SettingError: see `loading.load`.
    """
    shipped = {kind.__name__: kind for kind in (CritiqueJudge, LocalJudge, RemoteJudge, SimulatedJudge)}
    given = dict(arguments or {})
    if isinstance(spec, str) and spec not in shipped:
        if spec.startswith(("http://", "https://")):
            spec, given = "RemoteJudge", {"url": spec, **given}
        elif Path(spec).expanduser().exists() or "/" in spec or spec.endswith(".gguf"):
            spec, given = "LocalJudge", {"model": spec, **given}
    made = load({"class_path": spec, "init_args": given} if isinstance(spec, str) else spec, Callable, shipped, "judge")
    if not isinstance(getattr(made, "name", None), str):
        raise SettingError(
            "wrong-kind", f"judge {spec!r} has no name, which labels record; give its class an attribute 'name'"
        )
    return made
