"""Combine scorers: weighted sums, ensembles that penalise disagreement, and rule-based penalties."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import SettingError, check_choice, check_range
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.scoring.instructions import words
from rlhf_lightning.scoring.learned import load_scorer
from rlhf_lightning.scoring.scorer import Measured, Scorer, Scores, ask_scorer
from rlhf_lightning.types import Judgement, Prompt, Rollout


class ScorerGroup(Scorer):
    """Base of scorers that contain other scorers; each member's raw score is a part of the judgement, under its name.

    A member's own parts become ``<name>/<part>``. The members' metrics are included; shares such as ``score_failed``
    count completions on which any member failed.

    Args:
        scorers: each a Scorer or a spec for `load_scorer`, by name; a list names them "0", "1" ...

    Raises:
        SettingError: there are no scorers.
    """

    def __init__(self, scorers: Mapping[str, Any] | Sequence[Any]) -> None:
        named = _named(scorers, f"scorers of {type(self).__name__}", "a scorer")
        if not named:
            raise SettingError("no-scorers", f"{type(self).__name__} needs at least one scorer; name one")
        self.scorers = {str(name): load_scorer(spec) for name, spec in named.items()}

    def weights_hash(self) -> str | None:
        """Return an identifier of the weights of all members that have weights."""
        found = {name: one for name, scorer in self.scorers.items() if (one := scorer.weights_hash()) is not None}
        return str(sorted(found.items())) if found else None

    def member_judgements(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Judgement]]:
        """Return the judgements of each completion by all members, keyed by member name.

        Raises:
            BadScoresError: a member returned a wrong number of judgements, or a non-finite score.
        """
        given = [
            ask_scorer(scorer, prompts, completions, columns, f"scorer {name!r}").plain()
            for name, scorer in self.scorers.items()
        ]
        return [dict(zip(self.scorers, row, strict=True)) for row in zip(*given, strict=True)]

    def combined(
        self, score: float | None, members: Mapping[str, Judgement], weights: Mapping[str, float]
    ) -> Judgement:
        """Return one judgement from the members': scores as parts, weighted token and span rewards, all feedback."""
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
        spans = [
            (start, end, weights[name] * reward)
            for name, member in members.items()
            for start, end, reward in member.span_rewards
        ]
        return Judgement(
            score,
            parts,
            [sum(column) for column in zip_longest(*rewards, fillvalue=0.0)] if rewards else None,
            "\n".join(said) or None,
            spans or (),
        )

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Notify every member, with the means of its own score and parts under its own names."""
        for name, scorer in self.scorers.items():
            prefix = f"score_{name}"
            own = {
                f"score_{key.removeprefix(f'{prefix}/')}" if key.startswith(f"{prefix}/") else key: value
                for key, value in means.items()
            }
            scorer.on_rollout_end(rollout, own | ({"score": means[prefix]} if prefix in means else {}))

    @property
    def models(self) -> Sequence[nn.Module]:
        return [model for scorer in self.scorers.values() for model in scorer.models]

    def load_beside(self, policy: CausalLM | None, settings: LoadSettings) -> None:
        for scorer in self.scorers.values():
            scorer.load_beside(policy, settings)

    def to(self, device: torch.device) -> Scorer:
        self.scorers = {name: scorer.to(device) for name, scorer in self.scorers.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        states = {name: scorer.state_dict() for name, scorer in self.scorers.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, mine in state.items():
            self.scorers[name].load_state_dict(mine)

    def take_metrics(self) -> dict[str, Tensor]:
        taken: dict[str, Tensor] = {}
        for scorer in self.scorers.values():
            for key, values in scorer.take_metrics().items():
                taken[key] = torch.fmax(taken[key], values) if key in taken else values
        return taken | super().take_metrics()


def _named(values: Any, what: str, of: str) -> dict[Any, Any]:
    """Return a mapping unchanged, and a list as a mapping keyed by position."""
    if isinstance(values, Mapping):
        return dict(values)
    if isinstance(values, Sequence) and not isinstance(values, str):
        return {str(place): value for place, value in enumerate(values)}
    raise SettingError(
        "wrong-arguments", f"{what} must be a mapping from names, or a list, each {of}; found {values!r}"
    )


class WeightedSum(ScorerGroup):
    """Weighted sum of scores: sum_k weights_k * score_k.

    Args:
        scorers: each a Scorer or a spec for `load_scorer`, by name; a list names them "0", "1" ...
        weights: weight of each scorer, by name or as a list; missing weights and null are 1.
        missing: how to handle a scorer without a score. "drop" gives no sum, since completions could not be compared;
            "skip" leaves the term out, for mixtures in which each scorer judges its own rows.

    Raises:
        SettingError: a weight names an unknown scorer.
    """

    def __init__(
        self,
        scorers: Mapping[str, Any] | Sequence[Any],
        weights: Mapping[str, float] | Sequence[float] | None = None,
        missing: Literal["drop", "skip"] = "drop",
    ) -> None:
        super().__init__(scorers)
        weights = {str(name): weight for name, weight in _named(weights or {}, "weights", "a number").items()}
        unknown = sorted(set(weights) - set(self.scorers))
        if unknown:
            raise SettingError(
                "unknown-scorer", f"weights names {', '.join(unknown)}, but the scorers are {', '.join(self.scorers)}"
            )
        check_choice(("drop", "skip"), missing=missing)
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < math.inf:
                raise SettingError("not-a-number", f"weights.{name} is {weight!r}; it must be a finite number")
        self.weights = {name: float(weights.get(name, 1.0)) for name in self.scorers}
        self.missing = missing

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        rows = self.member_judgements(prompts, completions, columns)
        return [self.combined(self._sum([one.score for one in row.values()]), row, self.weights) for row in rows]

    def _sum(self, row: Sequence[float | None]) -> float | None:
        terms = [w * score for w, score in zip(self.weights.values(), row, strict=True) if score is not None]
        lacking = len(terms) < len(row) if self.missing == "drop" else not terms
        return None if lacking else sum(terms)


class Ensemble(ScorerGroup):
    """Lower confidence bound of the members' scores: mean_k score_k - penalty * std_k score_k.

    Where similarly trained reward models disagree, their scores are unreliable, and a policy trained on the mean
    exploits this. The penalty subtracts standard deviations (Coste et al., 2310.02743, subtract the variance;
    Eisenstein et al., 2312.09244). The standard deviation divides by the number of members and is the metric
    ``score/std``. With ``penalty`` 0 the score is the mean.

    Args:
        scorers: the members by name, or a list of them; each a Scorer or a spec for `load_scorer`.
        penalty: number of standard deviations to subtract.

    Raises:
        SettingError: there are fewer than two members, or a member is named std.
    """

    def __init__(self, scorers: Mapping[str, Any] | Sequence[Any], penalty: float = 1.0) -> None:
        named = _named(scorers, "scorers of Ensemble", "a scorer")
        if len(named) < 2 or "std" in named:
            raise SettingError(
                "invalid-ensemble",
                f"an ensemble needs at least two members, and the name std is reserved; found {list(named)}",
            )
        super().__init__(named)
        self.penalty = penalty
        self.measured = Measured("score/std")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        rows = self.member_judgements(prompts, completions, columns)
        found = [_mean_and_std([member.score for member in row.values()]) for row in rows]
        self.measured.add("score/std", [None if moments is None else moments[1] for moments in found])
        equal = dict.fromkeys(self.scorers, 1 / len(self.scorers))
        bounds = [None if moments is None else moments[0] - self.penalty * moments[1] for moments in found]
        return [self.combined(bound, row, equal) for bound, row in zip(bounds, rows, strict=True)]


def _mean_and_std(row: Sequence[float | None]) -> tuple[float, float] | None:
    if None in row:
        return None
    values = torch.tensor(row, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


class LengthPenalty(Scorer):
    """Penalty on length: -coef * max(|length - target| - tolerance, 0).

    With ``target`` 0 every word or token costs ``coef``, to counter reward models that favour long answers.

    Args:
        coef: score units per word or token.
        target: length without penalty.
        tolerance: distance from the target without penalty.
        tokenizer: folder or hub id of the tokenizer that counts tokens; null counts words.
    """

    def __init__(self, coef: float = 0.01, target: int = 0, tolerance: int = 0, tokenizer: str | None = None) -> None:
        check_range(min(target, tolerance) >= 0, "each must be at least 0", target=target, tolerance=tolerance)
        self.coef, self.target, self.tolerance, self.tokenizer_name = coef, target, tolerance, tokenizer

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that counts tokens, loaded on first use."""
        assert self.tokenizer_name is not None
        return tokenization.load_tokenizer(self.tokenizer_name)

    def length(self, text: str) -> int:
        """Return the number of words or tokens of a text, without an end token."""
        if self.tokenizer_name is None:
            return len(words(text))
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        off = [abs(self.length(text) - self.target) - self.tolerance for text in completions]
        return [-self.coef * max(distance, 0) for distance in off]


class RepetitionPenalty(Scorer):
    """Penalty on repetition: -coef * (1 - distinct n-grams / n-grams).

    The factor is 1 minus distinct-n (Li et al., 1510.03055), over words, ignoring case and punctuation. The score is 0
    if every n-gram is new or there is none; it is close to -coef for a single repeated word.

    Args:
        n: number of words of an n-gram.
        coef: penalty of a text that only repeats itself.
    """

    def __init__(self, n: int = 3, coef: float = 1.0) -> None:
        check_range(n >= 1, "it must be at least 1 word", n=n)
        self.n, self.coef = n, coef

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        return [-self.coef * repeated_share(words(text), self.n) for text in completions]


class SpanScorer(Scorer):
    """Score matches of regular expressions: the score is the sum; each reward is on the last token of its match.

    Args:
        patterns: reward of each match, by regular expression (syntax of ``re``, with ^ and $ at every line).

    Raises:
        SettingError: an expression is invalid, or a reward is not a finite number.
    """

    def __init__(self, patterns: Mapping[str, float]) -> None:
        try:
            self.patterns = {re.compile(one, re.MULTILINE): float(reward) for one, reward in patterns.items()}
        except (re.error, TypeError, ValueError) as error:
            raise SettingError("wrong-pattern", f"patterns {dict(patterns)!r}: {error}") from error
        if not self.patterns or not all(map(math.isfinite, self.patterns.values())):
            raise SettingError("wrong-pattern", f"patterns is {dict(patterns)!r}: give finite rewards by expression")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        found = [
            [
                (*match.span(), reward)
                for pattern, reward in self.patterns.items()
                for match in pattern.finditer(text)
                if match.group()
            ]
            for text in completions
        ]
        return [Judgement(math.fsum(reward for *_, reward in spans), span_rewards=spans) for spans in found]


def repeated_share(text: Sequence[str], n: int) -> float:
    """Return 1 - distinct n-grams / n-grams of a list of words; 0 if there is no n-gram."""
    grams = list(zip(*(text[start:] for start in range(n)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
