"""Active selection of the next item: a selector gives each item a value, and the item with the highest value is next.

Your own selector is a class with one method: ``rlhf annotate --select my_selection.LongestSelector``.
"""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rlhf_lightning.data.feedback.records import Item
from rlhf_lightning.errors import DataError, SettingError
from rlhf_lightning.functional.selection import disagreement, farthest_first, uncertainty
from rlhf_lightning.loading import load_class
from rlhf_lightning.people.handing_out import chance
from rlhf_lightning.scoring.learned import load_scorer
from rlhf_lightning.scoring.scorer import ask_scorer

FEATURES = 512
"""Hash buckets of n-grams."""


class EnsembleScores(Protocol):
    """Reward models that score the completions of items; ``len`` is their number."""

    def __len__(self) -> int:
        """Number of reward models."""

    def __call__(self, items: Sequence[Item]) -> Sequence[Tensor]:
        """Return the scores of each item's completions, shape (members, completions) each."""


class Selector(ABC):
    """Base class of selectors.

    Args:
        ensemble: reward models trained on the judgements so far; None if there are none.
        seed: seed of random choices.

    Raises:
        SettingError: there are fewer reward models than `members`.
    """

    members: ClassVar[int] = 0
    """Minimum number of reward models."""

    def __init__(self, ensemble: EnsembleScores | None = None, seed: int = 0) -> None:
        given = 0 if ensemble is None else len(ensemble)
        if given < self.members:
            wanted = "a reward model" if self.members == 1 else f"{self.members} reward models or more"
            raise SettingError(
                "too-few-reward-models",
                f"--select {short_name(type(self))} needs {wanted}, trained on labels made before, and "
                f"{given or 'none'} {'are' if given > 1 else 'is'} given: name the folders with --ensemble DIR DIR ...",
            )
        self._ensemble, self.seed = ensemble, seed

    @property
    def ensemble(self) -> EnsembleScores:
        """The reward models."""
        assert self._ensemble is not None, f"{type(self).__name__} must set members"
        return self._ensemble

    @abstractmethod
    def values(self, items: Sequence[Item], given: Sequence[Item]) -> Sequence[float]:
        """Return a value for each item; the item with the highest value is judged first. Called when items are added.

        Args:
            items: items that were never assigned.
            given: items that were assigned, in the order of assignment.
        """


class RandomSelector(Selector):
    """Random order: the baseline of the other selectors."""

    def values(self, items: Sequence[Item], given: Sequence[Item]) -> Sequence[float]:
        """Return a pseudo-random number in [0, 1) per item, determined by seed and texts."""
        return [chance(self.seed, "select", item.key) for item in items]


class UncertaintySelector(Selector):
    """Items whose mean preference probability is nearest to 0.5 (`functional.selection.uncertainty`)."""

    members = 1

    def values(self, items: Sequence[Item], given: Sequence[Item]) -> Sequence[float]:
        """Return the uncertainty of each item: 1 at a mean preference probability of 0.5, 0 at 0 or 1."""
        return [float(uncertainty(scores)) for scores in self.ensemble(items)]


class DisagreementSelector(Selector):
    """Items on which the reward models disagree most (`functional.selection.disagreement`)."""

    members = 2

    def values(self, items: Sequence[Item], given: Sequence[Item]) -> Sequence[float]:
        """Return the variance of the preference probability over the reward models."""
        return [float(disagreement(scores)) for scores in self.ensemble(items)]


class DiversitySelector(Selector):
    """Items least similar to the assigned items, by n-grams of prompt and completions; needs no reward model."""

    def values(self, items: Sequence[Item], given: Sequence[Item]) -> Sequence[float]:
        """Return the negative rank in the order of `functional.selection.farthest_first`."""
        order = farthest_first(ngram_features(items), ngram_features(given))
        values = torch.empty(len(items))
        values[order] = -torch.arange(len(items), dtype=values.dtype)
        return values.tolist()


def ngram_features(items: Sequence[Item]) -> Tensor:
    """Return hashed counts of words and bigrams, log(1 + count), normalized to length 1, shape (items, `FEATURES`).

    Prompt and completions are counted separately.
    """
    counts = torch.zeros(len(items), FEATURES)
    for row, item in enumerate(items):
        prompt = item.prompt if isinstance(item.prompt, str) else "\n".join(turn["content"] for turn in item.prompt)
        texts = [("prompt", prompt), *(("completion", candidate.text) for candidate in item.candidates)]
        buckets = [_bucket(part, gram) for part, text in texts for gram in _ngrams(text)]
        counts[row] = torch.bincount(torch.tensor(buckets, dtype=torch.int64), minlength=FEATURES)
    return torch.nn.functional.normalize(counts.log1p(), dim=1)


def _ngrams(text: str) -> list[str]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [*words, *(f"{first} {second}" for first, second in zip(words, words[1:], strict=False))]


def _bucket(part: str, gram: str) -> int:
    return zlib.crc32(f"{part} {gram}".encode()) % FEATURES


def short_name(kind: type[Selector]) -> str:
    """Return the name of a selector on the command line: ``uncertainty`` for `UncertaintySelector`."""
    return kind.__name__.removesuffix("Selector").lower()


def shipped_selectors() -> dict[str, type[Selector]]:
    """Return the selectors of this file by their short names."""
    return {short_name(kind): kind for kind in Selector.__subclasses__() if kind.__module__ == __name__}


class RewardModels:
    """Scores items with several scorers; each item is scored once and cached."""

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
            DataError: a scorer gave no score for a completion.
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
        judged = ask_scorer(self.scorers[name], prompts, texts, columns, f"scorer {name!r}")
        scores = [one.score for one in judged.plain()]
        if None in scores:
            raise DataError(
                "no-score",
                f"scorer {name!r} gave no score for some completions: selection needs all scores",
            )
        return [score for score in scores if score is not None]


def load_selector(name: str, ensemble: Sequence[str], seed: int) -> Selector:
    """Return the selector of a short name such as ``uncertainty``, or of an import path such as ``my_file.MySelector``.

    Raises:
        SettingError: the name is unknown (see `loading.load_class`), or the selector needs more reward models.
    """
    return selector_class(name)(RewardModels(ensemble) if ensemble else None, seed)


def selector_class(name: str) -> type[Selector]:
    """Return the class of a short name or an import path."""
    return load_class(name, Selector, shipped_selectors(), "selector")
