"""Selectors by name, and the reward models that they ask."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_lightning.commands.messages import nearest
from rlhf_lightning.data.feedback.records import Item
from rlhf_lightning.people.selectors import Selector, shipped_selectors
from rlhf_lightning.scoring import load_scorer
from rlhf_lightning.scoring.scorer import plain_scores


class RewardModels:
    """The scores of items by several scorers; each item is scored once.

    Args:
        names: each what `load_scorer` takes: a reward model's folder, or the import path of a function.
    """

    def __init__(self, names: Sequence[str]) -> None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.scorers = {name: load_scorer(name).to(device or torch.device("cpu")) for name in names}
        self._scores: dict[str, Tensor] = {}

    def __len__(self) -> int:
        """Number of scorers."""
        return len(self.scorers)

    def __call__(self, items: Sequence[Item]) -> Sequence[Tensor]:
        """Return the scores of each item's completions, shape (members, completions) each.

        Raises:
            ValueError: a scorer has no score for a completion.
        """
        new = list({item.key: item for item in items if item.key not in self._scores}.values())
        if new:
            table = torch.tensor([self._of(name, new) for name in self.scorers], dtype=torch.float64)
            parts = table.split([len(item.candidates) for item in new], dim=1)
            self._scores |= {item.key: part for item, part in zip(new, parts, strict=True)}
        return [self._scores[item.key] for item in items]

    def _of(self, name: str, items: Sequence[Item]) -> list[float]:
        prompts = [item.prompt for item in items for _ in item.candidates]
        texts = [candidate.text for item in items for candidate in item.candidates]
        owners = [item.columns for item in items for _ in item.candidates]
        columns = {key: [owner.get(key) for owner in owners] for key in set().union(*owners)}
        scores = plain_scores(self.scorers[name](prompts, texts, **columns), len(texts), f"scorer {name!r}")
        if None in scores:
            raise ValueError(f"scorer {name!r} has no score for some completions, by which items could be selected")
        return [score for score in scores if score is not None]


def load_selector(name: str, ensemble: Sequence[str], seed: int) -> Selector:
    """Return the selector of a short name such as ``uncertainty``, or of an import path such as ``my_file.MySelector``.

    Args:
        name: the name.
        ensemble: reward models, each as `load_scorer` takes it.
        seed: of whatever is drawn.

    Raises:
        ValueError: the name names no selector, or it needs more reward models.
    """
    return selector_class(name)(RewardModels(ensemble) if ensemble else None, seed)


def selector_class(name: str) -> type[Selector]:
    """Return the class of a short name or an import path.

    Raises:
        ValueError: it names no selector.
    """
    shipped = shipped_selectors()
    if name in shipped:
        return shipped[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        near = nearest(name, shipped)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(shipped)}, or the import path of your own"
        raise ValueError(f"--select {name} is no selector: {hint}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--select {name} cannot be imported: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, Selector)):
        raise ValueError(f"--select {name} is no subclass of rlhf_lightning.people.selectors.Selector")
    return found
