"""Sample completions and score them; select, join and gather their statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.policy_gradient import group_means, missing_eos_scores
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.layout import select
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.sampling.conversation import Transcript, turns_of
from rlhf_lightning.sampling.decoding import Mixture
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingRequest, SamplingSettings, refuse_empty
from rlhf_lightning.sampling.slot_engine import load_engine
from rlhf_lightning.scoring import LearnedScorer, Scorer, load_scorer
from rlhf_lightning.scoring.scorer import Judgements, ask_scorer, checked_judgements
from rlhf_lightning.training.gathering import gathered_rows
from rlhf_lightning.training.judgements import ScoreRule, with_objective
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.token_rewards import ENVIRONMENT, placed, with_environment
from rlhf_lightning.types import Advantages, LeftOut, PromptBatch, Rollout, Sequences


class Samples(NamedTuple):
    """Prompts, one sampled completion for each, and its judgement. Tensors are fp32 of shape (episodes,).

    Attributes:
        batch: the prompts, one per completion.
        completions: the completions, with their texts.
        scores: score of each completion; NaN if it cannot be judged.
        parts: named scores of a `Judgement`; NaN if a completion lacks a part.
        token_rewards: reward of each token, one tensor per completion; empty if there are none.
        feedback: judgement in words of each completion; empty if there is none.
        baseline_scores: score subtracted from each completion's score; None in methods without such a baseline.
        left_out: completions that were judged and dropped; None in methods that keep all.
    """

    batch: PromptBatch
    completions: Completions
    scores: Tensor
    parts: Mapping[str, Tensor] = {}
    token_rewards: tuple[Tensor, ...] = ()
    feedback: tuple[str | None, ...] = ()
    baseline_scores: Tensor | None = None
    left_out: LeftOut | None = None

    @property
    def sequences(self) -> Sequences:
        """Prompts and completions, one prompt per completion."""
        return self.completions.after(self.batch.prompts)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens sampled from the policy in each completion, shape (episodes,)."""
        return torch.tensor(self.completions.lengths)

    @property
    def turns(self) -> Tensor | None:
        """Number of the policy's turns in each episode, shape (episodes,); None without an environment."""
        if self.batch.multi_turn is None:
            return None
        return torch.tensor([len(one.ends) for one in self.completions.transcripts], dtype=torch.long)


class RolloutCollector:
    """Sample completions from a policy and score them.

    The completion of episode e depends only on the policy's weights, the seed and e, not on the batch, the ranks or the
    point of resuming. The settings are those of `RolloutModule`. Scores are computed in this order: ``score_rule``
    combines parts, then ``shape`` changes the scores, then the rule for a missing end token applies.

    Raises:
        SettingError: samples would not follow the policy's distribution, or both rules for a missing end token are set.
    """

    def __init__(
        self,
        scorer: Scorer | str | dict[str, Any],
        sampling: SamplingSettings,
        seed: int,
        missing_eos_score: float | None = None,
        missing_eos_penalty: float | None = None,
        engine: SamplingEngine | Mapping[str, Any] | None = None,
        shape: Callable[[Judgements], Judgements] = lambda judged: judged,
        score_rule: ScoreRule | None = None,
    ) -> None:
        if not sampling.is_pure:
            raise SettingError(
                "setting-out-of-range",
                f"temperature is {sampling.temperature}: a policy gradient needs samples, so it must be positive",
            )
        if missing_eos_score is not None and missing_eos_penalty is not None:
            raise SettingError(
                "conflicting-settings",
                f"missing_eos_score is {missing_eos_score} and missing_eos_penalty {missing_eos_penalty}: one replaces "
                "the scorer's score and the other lowers it, so one of them must be null",
            )
        self.scorer_spec, self.sampling, self.seed = scorer, sampling, seed
        self.missing_eos_score, self.missing_eos_penalty = missing_eos_score, missing_eos_penalty
        self.engine, self.shape, self.score_rule = load_engine(engine), shape, score_rule or ScoreRule()
        self._scorer: Scorer | None = None
        self.started: dict[tuple[int, ...], Callable[[], Completions]] = {}

    @property
    def scorer(self) -> Scorer:
        """The scorer of completions, loaded on first use."""
        if self._scorer is None:
            self._scorer = load_scorer(self.scorer_spec)
        return self._scorer

    def draw(self, policy: CausalLM, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch) -> Samples:
        """Sample a completion for each prompt and score it."""
        return self.judge(tokenizer, self.sample(policy, tokenizer, batch), batch)

    def sample(
        self,
        policy: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        sampling: SamplingSettings | None = None,
        mixture: Mixture | None = None,
    ) -> Completions:
        """Sample one completion or episode for each prompt, with the random numbers of its episode.

        Episodes started earlier by `start` were sampled with the policy's weights at that time.
        """
        ends = tokenization.end_token_ids(tokenizer)
        settings = sampling or self.sampling
        begun = None if mixture or sampling else self.started.pop(tuple(batch.episodes.tolist()), None)
        if begun is not None:
            drawn = begun()
        else:
            given = (batch.prompts, batch.episodes, settings, self.seed, ends)
            drawn = self.engine.sample(policy, *given, mixture=mixture, turns=turns_of(batch, tokenizer))
        return drawn.decoded(tokenizer)

    def start(self, policy: CausalLM, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch) -> None:
        """Start sampling with the policy's current weights; a later `sample` returns these episodes' completions.

        Episodes with an environment are sampled immediately.
        """
        key = tuple(batch.episodes.tolist())
        if not key or key in self.started:
            return
        if batch.multi_turn is not None:
            self.started[key] = partial(_unchanged, self.sample(policy, tokenizer, batch))
            return
        refuse_empty(batch.prompts)
        ends = tokenization.end_token_ids(tokenizer)
        request = SamplingRequest(batch.prompts, batch.episodes, self.sampling, self.seed, ends, None, None)
        begun = self.engine.start(policy, request)
        self.started[key] = lambda: begun().cut(ends)

    def started_episodes(self) -> dict[int, dict[str, Any]]:
        """Wait for all started episodes, and return each as plain values for a checkpoint."""
        found = {}
        for key, begun in self.started.items():
            drawn = begun()
            self.started[key] = partial(_unchanged, drawn)
            for row, episode in enumerate(key):
                one = {"ids": drawn.ids[row], "logprobs": drawn.logprobs[row], "finished": bool(drawn.finished[row])}
                one |= {} if drawn.entropies is None else {"entropies": drawn.entropies[row]}
                found[episode] = {**one, "transcript": drawn.transcripts[row]._asdict()} if drawn.transcripts else one
        return found

    def restore_episodes(self, batch: PromptBatch, episodes: Mapping[int, Mapping[str, Any]]) -> None:
        """Use completions from a checkpoint for a batch, if the checkpoint has all its episodes."""
        key = tuple(batch.episodes.tolist())
        if not key or not all(episode in episodes for episode in key):
            return
        rows = [episodes[episode] for episode in key]
        entropies = tuple(row["entropies"] for row in rows) if all("entropies" in row for row in rows) else None
        finished = torch.tensor([row["finished"] for row in rows], dtype=torch.bool)
        drawn = Completions(tuple(r["ids"] for r in rows), tuple(r["logprobs"] for r in rows), finished, entropies)
        if batch.multi_turn is not None:
            whole = tuple(Transcript(**row["transcript"]) for row in rows)
            drawn = drawn._replace(transcripts=whole, learned=tuple(one.learned for one in whole))
        self.started[key] = partial(_unchanged, drawn)

    def judge(self, tokenizer: PreTrainedTokenizerBase, completions: Completions, batch: PromptBatch) -> Samples:
        """Judge completions and apply the rule for a missing end token to their scores."""
        judged = placed(self.raw_judgements(tokenizer, completions, batch), completions, tokenizer)
        judged = with_environment(judged, completions)
        judged = self.shape(self.score_rule.judged(judged, batch.columns)) if completions.ids else judged
        scores, parts = self.ruled(judged.scores, completions.finished), judged.parts
        if self.score_rule.is_plain and self.score_rule.normalizes:  # the rule applies again after normalization
            parts = with_objective(parts, judged.scores)
        return Samples(batch, completions, scores, parts, judged.token_rewards, judged.feedback)

    def ruled(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Return scores after the rule for a missing end token; NaN scores stay NaN."""
        ruled = missing_eos_scores(scores, finished, self.missing_eos_penalty, self.missing_eos_score)
        return torch.where(scores.isnan(), scores, ruled)

    def raw_judgements(
        self, tokenizer: PreTrainedTokenizerBase, completions: Completions, batch: PromptBatch
    ) -> Judgements:
        """Return the scorer's own judgements.

        Raises:
            ContractError: the scorer returned a wrong number of judgements, or a non-finite number.
        """
        scorer, count = self.scorer, len(completions.ids)
        if count == 0 and not scorer.models:
            return Judgements(torch.zeros(0))  # without rows, the columns that the scorer may need are unknown
        name = f"scorer {self.scorer_spec!r}" if isinstance(self.scorer_spec, str) else type(scorer).__name__
        if isinstance(scorer, LearnedScorer) and scorer.shares_tokenizer(tokenizer):
            sequences = completions.after(batch.prompts)
            if scorer.has_rows_for(sequences):
                return checked_judgements(scorer.judge_sequences(sequences), count, name)
        return ask_scorer(scorer, completions.asked(batch.texts), list(completions.texts), batch.columns, name)


def _unchanged(completions: Completions) -> Completions:
    return completions


PER_PROMPT = ("prompts", "texts", "columns", "episodes", "group", "row_ids", "extras")
"""Fields of a `PromptBatch` with one value for each prompt."""


def _rows(values: Any, rows: Sequence[int]) -> Any:
    """Return some rows of a tensor, tuple or list, or of each member of a mapping; empty values stay empty."""
    if isinstance(values, Tensor):
        return values[to_device(torch.tensor(list(rows), dtype=torch.long), values.device)]
    if isinstance(values, Mapping):
        return {name: _rows(member, rows) for name, member in values.items()}
    return type(values)(values[row] for row in rows) if values else values


def _concatenated(parts: Sequence[Any]) -> Any:
    """Concatenate the rows of several tensors, tuples, lists or mappings."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    if isinstance(parts[0], Mapping):
        return {name: _concatenated([part[name] for part in parts]) for name in parts[0]}
    return type(parts[0])(row for part in parts for row in part)


def select_prompts(batch: PromptBatch, rows: Sequence[int]) -> PromptBatch:
    """Return some rows of a batch; groups are renumbered."""
    chosen = {name: _rows(getattr(batch, name), rows) for name in PER_PROMPT}
    return batch._replace(**{**chosen, "group": torch.unique(chosen["group"], return_inverse=True)[1]})


def joined(parts: Sequence[tuple[Samples, Sequence[int]]]) -> Samples:
    """Join selected rows of several draws; group numbers continue across draws."""
    batches, first = [], 0
    for samples, rows in parts:
        chosen = select_prompts(samples.batch, rows)
        batches.append(chosen._replace(group=chosen.group + first))
        first += len(chosen.group.unique())
    fields = {name: _concatenated([getattr(batch, name) for batch in batches]) for name in PER_PROMPT}
    batch = batches[0]._replace(**fields)
    names = dict.fromkeys(name for samples, _ in parts for name in samples.parts)
    return Samples(
        batch,
        merged_completions([(samples.completions, rows) for samples, rows in parts]),
        _concatenated([_rows(samples.scores, rows) for samples, rows in parts]),
        {name: _concatenated([_rows(_part(samples, name), rows) for samples, rows in parts]) for name in names},
        _picked(parts, "token_rewards", torch.zeros(0)),
        _picked(parts, "feedback", None),
    )


def _part(samples: Samples, name: str) -> Tensor:
    return samples.parts.get(name, torch.full_like(samples.scores, torch.nan))


def _picked(parts: Sequence[tuple[Samples, Sequence[int]]], field: str, missing: Any) -> tuple[Any, ...]:
    """Return a field of selected rows; each draw has the field for all of its rows or for none."""
    if not any(getattr(samples, field) for samples, _ in parts):
        return ()
    return tuple((getattr(samples, field) or {row: missing})[row] for samples, rows in parts for row in rows)


def merged_completions(parts: Sequence[tuple[Completions, Sequence[int]]]) -> Completions:
    """Concatenate selected rows of several calls' completions.

    Args:
        parts: completions with the rows to take.
    """
    picked = [(part, row) for part, rows in parts for row in rows]

    def every(field: str) -> Any:
        known = all(getattr(part, field) is not None for part, _ in picked)
        return tuple(getattr(part, field)[row] for part, row in picked) if known else None

    finished = torch.cat([part.finished[list(rows)] for part, rows in parts])
    return Completions(
        every("ids"), every("logprobs"), finished, every("entropies"), every("texts") or (), every("learned"),
        every("transcripts") if all(part.transcripts for part, _ in picked) else (),
    )  # fmt: skip


def prompts_of(rollout: Rollout, batch: PromptBatch) -> PromptBatch:
    """Return the prompts that a rollout answers, with the pretraining text of ``batch``.

    They differ from the batch's own prompts if a method chooses among candidates.
    """
    assert rollout.episodes is not None
    return batch._replace(
        prompts=rollout.sequences.prompts,
        texts=rollout.prompts,
        columns=rollout.columns,
        episodes=rollout.episodes,
        group=rollout.group.cpu(),
        row_ids=rollout.row_ids,
    )


def last_learned(mask: Tensor) -> Tensor:
    """Return the index of the last True of each row, int64, shape (rows,); masks may have holes."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, places, 0).amax(-1) if mask.shape[1] else mask.sum(-1)


def select_episodes(rollout: Rollout, rows: Sequence[int], length: int | None = None) -> Rollout:
    """Return selected episodes of a rollout; groups keep their numbers.

    Args:
        rollout: the rollout.
        rows: indices of the episodes.
        length: number of completion tokens to keep; None keeps all. Tensors with more positions per row, such as values
            after the end token, keep the additional positions.
    """
    width = rollout.completion_mask.shape[1]

    def cut(values: Any) -> Any:
        if isinstance(values, Mapping):
            return {name: cut(member) for name, member in values.items()}
        if length is None or not isinstance(values, Tensor) or values.dim() < 2:
            return values
        return values[:, : length + values.shape[1] - width]

    whole: dict[str, Any] = {"sequences": select(rollout.sequences, rows), "left_out": rollout.left_out}
    fields = {name: cut(_rows(values, rows)) for name, values in rollout._asdict().items() if name not in whole}
    return Rollout(**whole, **fields)


def without_unscored(rollout: Rollout, advantages: Advantages) -> Advantages:
    """Exclude completions without a score from all losses."""
    scored = ~rollout.scores.isnan().unsqueeze(-1)
    learned = rollout.completion_mask if advantages.learned is None else advantages.learned
    returns = None if advantages.returns is None else torch.where(scored, advantages.returns, 0.0)
    kept = torch.where(scored, advantages.advantages, 0.0)
    return advantages._replace(advantages=kept, returns=returns, learned=learned & scored)


def gathered_numbers(module: LightningModule, numbers: Sequence[int]) -> list[int]:
    """Gather integers from all ranks; counts may differ between ranks."""
    mine = torch.tensor(list(numbers), dtype=torch.long, device=module.device)
    return gathered_rows(module, mine).tolist()


def on_grid(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Pad one tensor per row with 0 to the shape of ``like``, (rows, length)."""
    grid = torch.zeros(like.shape, dtype=rows[0].dtype if rows else torch.float32)
    for index, values in enumerate(rows):
        grid[index, : len(values)] = values
    return to_device(grid, like.device)


def measure_samples(meter: Meter, rollout: Rollout, scored: bool = True) -> None:
    """Record scores (if ``scored``, or if an environment rewards), their parts, end tokens and lengths."""
    scores, finished, lengths = rollout.scores, rollout.finished, rollout.completion_mask.sum(-1)
    known = ~scores.isnan()
    for name, values in rollout.parts.items():
        meter.add(f"rollout/score_{name}", values, ~values.isnan())
        meter.add_interval(f"rollout/score_{name}", group_means(values, rollout.group))
    if scored or ENVIRONMENT in rollout.parts:
        meter.add("rollout/score", scores, known)
        meter.add("rollout/score_squared", scores.square(), known)
        meter.add("rollout/score_missing", (~known).double())
    meter.add("rollout/eos_rate", finished.double())
    meter.add("rollout/completion_length", lengths.double())
    if rollout.turns is not None:
        meter.add("rollout/turns", rollout.turns.double())
    if ENVIRONMENT in rollout.parts:
        meter.add("rollout/environment_failed", rollout.parts[ENVIRONMENT].isnan().double())


def with_score_std(means: dict[str, float], prefix: str = "rollout/") -> dict[str, Any]:
    """Replace the mean square of the scores by the standard deviation."""
    if f"{prefix}score_squared" in means:
        spread = means.pop(f"{prefix}score_squared") - means[f"{prefix}score"] ** 2
        means[f"{prefix}score_std"] = max(spread, 0.0) ** 0.5
    return means
