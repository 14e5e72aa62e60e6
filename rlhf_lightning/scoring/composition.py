"""Scores made of scores: weighted sums, and ensembles that distrust what their members disagree on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import SettingError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.scoring.instructions import words
from rlhf_lightning.scoring.scorer import Measured, Scorer, Scores, checked_judgements, load_scorer
from rlhf_lightning.types import Judgement, Prompt, Rollout


class ScorerGroup(Scorer):
    """Base of scorers that ask other scorers: each one's raw score is a part of the judgement, under its name.

    Parts of a member are parts as ``<name>/<part>``. Its metrics come along, shares such as ``score_failed`` as the
    share of completions on which any member failed.

    Args:
        scorers: each a Scorer or what `load_scorer` takes, by name.

    Raises:
        SettingError: there is none.
    """

    def __init__(self, scorers: Mapping[str, Any]) -> None:
        if not scorers:
            raise SettingError("no-scorers", f"{type(self).__name__} needs at least one scorer; name one")
        self.scorers = {str(name): load_scorer(spec) for name, spec in scorers.items()}

    def member_judgements(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Judgement]]:
        """Return every member's judgement of each completion, by the member's name.

        Raises:
            ValueError: a member returned another number of judgements than completions, or a score that is not finite.
        """
        count = len(completions)
        given = [
            checked_judgements(scorer(prompts, completions, **columns), count, f"scorer {name!r}").plain()
            for name, scorer in self.scorers.items()
        ]
        return [dict(zip(self.scorers, row, strict=True)) for row in zip(*given, strict=True)]

    def combined(
        self, score: float | None, members: Mapping[str, Judgement], weights: Mapping[str, float]
    ) -> Judgement:
        """Return one judgement made of the members': their scores as parts, weighted token rewards, all feedback."""
        parts: dict[str, float] = {}
        for name, member in members.items():
            parts[name] = math.nan if member.score is None else member.score
            parts |= {f"{name}/{part}": value for part, value in member.parts.items()}
        rewards = [
            [weights[name] * reward for reward in member.token_rewards]
            for name, member in members.items()
            if member.token_rewards is not None
        ]
        said = [f"{name}: {member.feedback}" for name, member in members.items() if member.feedback is not None]
        return Judgement(
            score,
            parts,
            [sum(column) for column in zip_longest(*rewards, fillvalue=0.0)] if rewards else None,
            "\n".join(said) or None,
        )

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Tell every member, with the means of its own score and parts under the names that it knows."""
        for name, scorer in self.scorers.items():
            prefix = f"score_{name}"
            own = {
                f"score_{key.removeprefix(f'{prefix}/')}" if key.startswith(f"{prefix}/") else key: value
                for key, value in means.items()
            }
            scorer.on_rollout_end(rollout, own | ({"score": means[prefix]} if prefix in means else {}))

    @property
    def models(self) -> Sequence[nn.Module]:
        """The networks of all members."""
        return [model for scorer in self.scorers.values() for model in scorer.models]

    def load_beside(self, policy: CausalLM | None, settings: LoadSettings) -> None:
        """Load every member, each on the policy's backbone where it was trained on that."""
        for scorer in self.scorers.values():
            scorer.load_beside(policy, settings)

    def to(self, device: torch.device) -> Scorer:
        """Move every member."""
        self.scorers = {name: scorer.to(device) for name, scorer in self.scorers.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return what members that learn while they score have learned."""
        states = {name: scorer.state_dict() for name, scorer in self.scorers.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hand it back to them."""
        for name, mine in state.items():
            self.scorers[name].load_state_dict(mine)

    def take_metrics(self) -> dict[str, Tensor]:
        """Return what the members measured themselves."""
        taken: dict[str, Tensor] = {}
        for scorer in self.scorers.values():
            for key, values in scorer.take_metrics().items():
                taken[key] = torch.fmax(taken[key], values) if key in taken else values
        return taken


class WeightedSum(ScorerGroup):
    r"""The weighted sum of scores: sum_k weights_k * score_k.

    Args:
        scorers: each a Scorer or what `load_scorer` takes, by name.
        weights: of each, by name; those left out, and None, weigh 1.
        missing: what the sum is where a scorer has no score: "drop" gives no score either, since siblings could not be
            compared with it; "skip" leaves the term out, for mixtures in which each scorer judges its own rows.

    Raises:
        SettingError: a weight belongs to no scorer.
    """

    def __init__(
        self,
        scorers: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
        missing: Literal["drop", "skip"] = "drop",
    ) -> None:
        super().__init__(scorers)
        unknown = sorted(set(weights or {}) - set(self.scorers))
        if unknown:
            raise SettingError(
                "unknown-scorer", f"weights names {', '.join(unknown)}, but the scorers are {', '.join(self.scorers)}"
            )
        if missing not in ("drop", "skip"):
            raise SettingError("unknown-choice", f"missing is {missing!r}; choose 'drop' or 'skip'")
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in self.scorers}
        self.missing = missing

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return the sum for each completion, and its terms before weighting as parts."""
        rows = self.member_judgements(prompts, completions, columns)
        return [self.combined(self._sum([one.score for one in row.values()]), row, self.weights) for row in rows]

    def _sum(self, row: Sequence[float | None]) -> float | None:
        terms = [w * score for w, score in zip(self.weights.values(), row, strict=True) if score is not None]
        lacking = len(terms) < len(row) if self.missing == "drop" else not terms
        return None if lacking else sum(terms)


class Ensemble(ScorerGroup):
    r"""A lower confidence bound: mean_k score_k - penalty * std_k score_k over the members.

    Where reward models that were trained alike disagree, they are guessing, and a policy that is trained against their
    mean finds out where; the deviation charges for it (Coste et al., 2310.02743, subtract the variance; Eisenstein et
    al., 2312.09244). The deviation divides by the number of members and is the metric ``score/std``. With ``penalty``
    0, or members that agree, this is the mean.

    Args:
        scorers: the members by name, or a list of them; each a Scorer or what `load_scorer` takes.
        penalty: deviations below the mean.

    Raises:
        SettingError: there are fewer than two members, or one is called std.
    """

    def __init__(self, scorers: Mapping[str, Any] | Sequence[Any], penalty: float = 1.0) -> None:
        named = scorers if isinstance(scorers, Mapping) else {str(index): spec for index, spec in enumerate(scorers)}
        if len(named) < 2 or "std" in named:
            raise SettingError(
                "invalid-ensemble",
                f"an ensemble needs at least two members, and the name std is reserved; found {list(named)}",
            )
        super().__init__(named)
        self.penalty = penalty
        self._deviations = Measured("score/std")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return the bound for each completion, no score where a member has none, and the members' scores as parts."""
        rows = self.member_judgements(prompts, completions, columns)
        found = [_mean_and_std([member.score for member in row.values()]) for row in rows]
        self._deviations.add("score/std", [None if moments is None else moments[1] for moments in found])
        equal = dict.fromkeys(self.scorers, 1 / len(self.scorers))
        bounds = [None if moments is None else moments[0] - self.penalty * moments[1] for moments in found]
        return [self.combined(bound, row, equal) for bound, row in zip(bounds, rows, strict=True)]

    def take_metrics(self) -> dict[str, Tensor]:
        """Return the members' deviation, and what they measured themselves."""
        return {**super().take_metrics(), **self._deviations.take()}


def _mean_and_std(row: Sequence[float | None]) -> tuple[float, float] | None:
    if None in row:
        return None
    values = torch.tensor(row, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


class LengthPenalty(Scorer):
    r"""-coef * max(|length - target| - tolerance, 0): a price on length, or a pull towards one.

    With ``target`` 0 every word or token costs ``coef``; a reward model that favours long answers is held back by it.
    0 within the tolerance of the target.

    Args:
        coef: score units per word or token.
        target: length that costs nothing.
        tolerance: how far from it costs nothing either.
        tokenizer: folder or hub id of the tokenizer that counts tokens; None counts words.
    """

    def __init__(self, coef: float = 0.01, target: int = 0, tolerance: int = 0, tokenizer: str | None = None) -> None:
        if target < 0 or tolerance < 0:
            raise SettingError(
                "setting-out-of-range", f"target is {target} and tolerance {tolerance}: each must be at least 0"
            )
        self.coef, self.target, self.tolerance, self.tokenizer_name = coef, target, tolerance, tokenizer

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What counts tokens; loaded on first use."""
        assert self.tokenizer_name is not None
        return tokenization.load_tokenizer(self.tokenizer_name)

    def length(self, text: str) -> int:
        """Return the words or tokens of a text, without an end token."""
        if self.tokenizer_name is None:
            return len(words(text))
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return one score per completion, 0 or below."""
        off = [abs(self.length(text) - self.target) - self.tolerance for text in completions]
        return [-self.coef * max(distance, 0) for distance in off]


class RepetitionPenalty(Scorer):
    r"""-coef * (1 - distinct n-grams / n-grams): the share of a completion's n-grams that it has said before.

    One less distinct-n (Li et al., 1510.03055), over words without regard to case and punctuation. 0 where every n-gram
    is new or there is none; close to -coef for one word said over and over.

    Args:
        n: words of an n-gram.
        coef: score of a text that only repeats itself, with the sign turned.
    """

    def __init__(self, n: int = 3, coef: float = 1.0) -> None:
        if n < 1:
            raise SettingError("setting-out-of-range", f"n is {n}: it must be at least 1 word")
        self.n, self.coef = n, coef

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return one score per completion, between -coef and 0."""
        return [-self.coef * repeated_share(words(text), self.n) for text in completions]


def repeated_share(text: Sequence[str], n: int) -> float:
    """Return 1 - distinct n-grams / n-grams of a list of words; 0 where there is no n-gram."""
    grams = list(zip(*(text[start:] for start in range(n)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
