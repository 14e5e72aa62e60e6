"""Rollouts: an object that samples and scores completions, owned by every module that learns from its own samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.functional.policy_gradient import missing_eos_scores
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.layout import Layout, select
from rlhf_lightning.sampling.decoding import Mixture
from rlhf_lightning.sampling.engines import SamplingEngine, SamplingSettings, load_engine
from rlhf_lightning.scoring import LearnedScorer, Scorer, checked_scores, load_scorer
from rlhf_lightning.training.gathering import gathered_rows
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import Advantages, PromptBatch, Rollout, Sequences


class Samples(NamedTuple):
    """Completions drawn for the prompts of a batch, in its order.

    Attributes:
        sequences: prompts and completions, one prompt per completion.
        finished: bool, True where the end token was reached, shape (episodes,).
        logprobs: the sampler's log-probability of each drawn token at its temperature, one tensor per completion.
        entropies: entropy that each token was drawn at, nats, where all were drawn from the policy in this process;
            then it is known what a forward pass of the policy would say. None otherwise.
    """

    sequences: Sequences
    finished: Tensor
    logprobs: tuple[Tensor, ...]
    entropies: tuple[Tensor, ...] | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, shape (episodes,)."""
        return torch.tensor([len(ids) for ids in self.sequences.completions])


class Drawn(NamedTuple):
    """Prompts, the completions drawn for them, and their scores.

    Attributes:
        batch: the prompts, one per completion.
        samples: the completions.
        scores: fp32, shape (episodes,); NaN where the scorer had nothing to say.
        baseline_scores: score that each completion's is compared with, shape (episodes,); None in methods without.
    """

    batch: PromptBatch
    samples: Samples
    scores: Tensor
    baseline_scores: Tensor | None = None


class RolloutCollector:
    """Draws completions from a policy and has them scored.

    The completions of episode e are a function of the policy's weights, the seed and e alone: not of the batch they
    are drawn in, of the ranks, or of where a run was resumed.

    Args:
        scorer: a Scorer, a function, or what `scoring.load_scorer` finds by name.
        sampling: how completions are drawn.
        seed: seed of the run.
        missing_eos_score: score of a completion that did not end by itself, in place of the scorer's.
        missing_eos_penalty: subtracted from the score of a completion that did not end by itself.
        engine: what draws, or what `load_engine` makes one of.

    Raises:
        ValueError: samples are not the policy's own distribution, or both rules for a missing end are given.
    """

    def __init__(
        self,
        scorer: Scorer | str | dict[str, Any],
        sampling: SamplingSettings,
        seed: int,
        missing_eos_score: float | None = None,
        missing_eos_penalty: float | None = None,
        engine: SamplingEngine | Mapping[str, Any] | None = None,
    ) -> None:
        if not sampling.is_pure:
            raise ValueError(
                f"temperature is {sampling.temperature}: a policy gradient needs samples, so it must be positive"
            )
        if missing_eos_score is not None and missing_eos_penalty is not None:
            raise ValueError(
                f"missing_eos_score is {missing_eos_score} and missing_eos_penalty {missing_eos_penalty}: one replaces "
                "the scorer's score and the other lowers it, so one of them must be null"
            )
        self.scorer_spec, self.sampling, self.seed = scorer, sampling, seed
        self.missing_eos_score, self.missing_eos_penalty = missing_eos_score, missing_eos_penalty
        self.engine = load_engine(engine)
        self._scorer: Scorer | None = None

    @property
    def scorer(self) -> Scorer:
        """What scores completions; loaded on first use."""
        if self._scorer is None:
            self._scorer = load_scorer(self.scorer_spec)
        return self._scorer

    def draw(self, policy: CausalLM, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch) -> Drawn:
        """Draw a completion for each prompt and have it scored."""
        samples = self.sample(policy, tokenizer, batch)
        return Drawn(batch, samples, self.score(tokenizer, samples, batch))

    def sample(
        self,
        policy: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        sampling: SamplingSettings | None = None,
        mixture: Mixture | None = None,
    ) -> Samples:
        """Draw one completion for each prompt of the batch, from its episode's random numbers."""
        ends = tokenization.end_token_ids(tokenizer)
        settings = sampling or self.sampling
        drawn = self.engine.sample(policy, batch.prompts, batch.episodes, settings, self.seed, ends, mixture=mixture)
        sequences = Sequences(
            prompts=batch.prompts,
            completions=drawn.ids,
            parents=tuple(range(len(drawn.ids))),
            supervised=tuple(torch.ones(len(ids), dtype=torch.bool) for ids in drawn.ids),
        )
        return Samples(sequences, drawn.finished, drawn.logprobs, drawn.entropies)

    def score(self, tokenizer: PreTrainedTokenizerBase, samples: Samples, batch: PromptBatch) -> Tensor:
        """Return the score of each completion, the rule for a missing end applied; fp32, (episodes,), on the CPU."""
        scores = self.raw_scores(tokenizer, samples, batch)
        ruled = missing_eos_scores(scores, samples.finished, self.missing_eos_penalty, self.missing_eos_score)
        return torch.where(scores.isnan(), scores, ruled)

    def raw_scores(self, tokenizer: PreTrainedTokenizerBase, samples: Samples, batch: PromptBatch) -> Tensor:
        """Return the scorer's own score of each completion, fp32, shape (episodes,), on the CPU; NaN where it has none.

        Raises:
            ValueError: the scorer returned another number of scores, or one that is not finite.
        """
        scorer, sequences = self.scorer, samples.sequences
        count = len(sequences.completions)
        if count == 0 and not getattr(scorer, "models", ()):
            return torch.zeros(0)  # of no rows not even the columns are known that it may ask for
        name = f"scorer {self.scorer_spec!r}" if isinstance(self.scorer_spec, str) else type(scorer).__name__
        if isinstance(scorer, LearnedScorer) and scorer.shares_tokenizer(tokenizer):
            return checked_scores(scorer.score_sequences(sequences), count, name)
        texts = [tokenization.completion_text(tokenizer, ids.tolist()) for ids in sequences.completions]
        given = scorer(list(batch.texts), texts, **batch.columns)
        return checked_scores(given, count, name)


def select_prompts(batch: PromptBatch, rows: Sequence[int]) -> PromptBatch:
    """Return the named rows of a batch; groups are numbered anew."""
    index = torch.tensor(list(rows), dtype=torch.long)
    group = batch.group[index]
    return batch._replace(
        prompts=tuple(batch.prompts[row] for row in rows),
        texts=tuple(batch.texts[row] for row in rows),
        columns={name: [values[row] for row in rows] for name, values in batch.columns.items()},
        episodes=batch.episodes[index],
        group=torch.unique(group, return_inverse=True)[1] if len(group) else group,
        extras={name: values[index] for name, values in batch.extras.items()},
    )


def joined(parts: Sequence[tuple[Drawn, Sequence[int]]]) -> Drawn:
    """Put the named rows of several draws together; groups are numbered on."""
    batches = [select_prompts(drawn.batch, rows) for drawn, rows in parts]
    groups, first = [], 0
    for batch in batches:
        groups.append(batch.group + first)
        first += int(batch.group.max()) + 1 if len(batch.group) else 0
    picked = [(drawn, row) for drawn, rows in parts for row in rows]
    prompts = tuple(prompt for batch in batches for prompt in batch.prompts)
    sequences = Sequences(
        prompts=prompts,
        completions=tuple(drawn.samples.sequences.completions[row] for drawn, row in picked),
        parents=tuple(range(len(prompts))),
        supervised=tuple(drawn.samples.sequences.supervised[row] for drawn, row in picked),
    )
    names = batches[0].columns
    batch = batches[0]._replace(
        prompts=prompts,
        texts=tuple(text for batch in batches for text in batch.texts),
        columns={name: [value for batch in batches for value in batch.columns[name]] for name in names},
        episodes=torch.cat([batch.episodes for batch in batches]),
        group=torch.cat(groups),
        extras={name: torch.cat([batch.extras[name] for batch in batches]) for name in batches[0].extras},
    )
    finished = torch.cat([drawn.samples.finished[list(rows)] for drawn, rows in parts])
    logprobs = tuple(drawn.samples.logprobs[row] for drawn, row in picked)
    known = all(drawn.samples.entropies is not None for drawn, _ in picked)
    entropies = tuple(drawn.samples.entropies[row] for drawn, row in picked if drawn.samples.entropies is not None)
    samples = Samples(sequences, finished, logprobs, entropies if known else None)
    return Drawn(batch, samples, torch.cat([drawn.scores[list(rows)] for drawn, rows in parts]))


def merged_samples(parts: Sequence[tuple[Samples, Sequence[int]]]) -> Samples:
    """Put samples of several models back in the order of their prompts.

    Args:
        parts: each model's samples, and the place of each of them.
    """
    found = {row: (part, index) for part, rows in parts for index, row in enumerate(rows)}
    picked = [found[row] for row in range(len(found))]
    sequences = Sequences(
        prompts=tuple(part.sequences.prompts[index] for part, index in picked),
        completions=tuple(part.sequences.completions[index] for part, index in picked),
        parents=tuple(range(len(picked))),
        supervised=tuple(part.sequences.supervised[index] for part, index in picked),
    )
    finished = torch.stack([part.finished[index] for part, index in picked])
    return Samples(sequences, finished, tuple(part.logprobs[index] for part, index in picked))


def select_episodes(rollout: Rollout, rows: Sequence[int], length: int | None = None) -> Rollout:
    """Return some episodes of a rollout; groups keep their numbers.

    Args:
        rollout: the rollout.
        rows: the episodes, by their place.
        length: completion tokens that token tensors are cut to; None keeps them all. Grids with further slots, such as
            values after the end token, keep these.
    """
    index, width = torch.tensor(list(rows), dtype=torch.long), rollout.completion_mask.shape[1]

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            chosen = value[index.to(value.device)]
            return chosen if length is None or value.dim() < 2 else chosen[:, : length + value.shape[1] - width]
        if isinstance(value, Mapping):
            return {name: part(member) for name, member in value.items()}
        return [value[row] for row in rows] if isinstance(value, list) else value

    fields = {name: part(value) for name, value in rollout._asdict().items() if name != "sequences"}
    for name in ("feedback", "prompts", "texts", "row_ids"):
        fields[name] = tuple(fields[name][row] for row in rows) if fields[name] else ()
    return Rollout(sequences=select(rollout.sequences, rows), **fields)


def without_unscored(rollout: Rollout, advantages: Advantages) -> Advantages:
    """Leave completions without a score out of all that is learned."""
    scored = ~rollout.scores.isnan().unsqueeze(-1)
    learned = rollout.completion_mask if advantages.learned is None else advantages.learned
    returns = None if advantages.returns is None else torch.where(scored, advantages.returns, 0.0)
    return Advantages(torch.where(scored, advantages.advantages, 0.0), returns, learned & scored)


def gathered_numbers(module: LightningModule, numbers: Sequence[int]) -> list[int]:
    """Return the numbers of all ranks, of which each may have another count."""
    mine = torch.tensor(list(numbers), dtype=torch.long, device=module.device)
    return gathered_rows(module, mine).tolist()


def gather_grids(
    sequences: Sequences,
    cuts: Sequence[Sequence[int]],
    forward: Callable[[Layout], Mapping[str, Tensor | None]],
    lay_out: Callable[[Sequences], Layout],
) -> dict[str, Tensor]:
    """Run ``forward`` over micro-batches of the sequences and put what it returns on one (rows, length) grid each.

    Args:
        sequences: prompts and completions.
        cuts: rows of each micro-batch.
        forward: returns per-token tensors of a layout, shape (rows of it, its length or more); None ones are left out.
        lay_out: arranges a micro-batch for the model.
    """
    rows, length = len(sequences.completions), max((len(ids) for ids in sequences.completions), default=1)
    grids: dict[str, Tensor] = {}
    for cut in cuts or [[]]:  # a rank without rows has grids too
        layout = lay_out(select(sequences, cut))
        for name, part in forward(layout).items():
            if part is None:
                continue
            if name not in grids:
                width = length + part.shape[1] - layout.completion_mask.shape[1]
                grids[name] = part.new_zeros(rows, width, *part.shape[2:])
            grids[name][list(cut), : part.shape[1]] = part
    return grids


def on_grid(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Put one tensor per row on the grid of ``like``, shape (rows, length), 0 behind each row's end."""
    grid = torch.zeros(like.shape, dtype=rows[0].dtype if rows else torch.float32)
    for index, values in enumerate(rows):
        grid[index, : len(values)] = values
    return grid.to(like.device)


def measure_samples(meter: Meter, scores: Tensor, finished: Tensor, lengths: Tensor) -> None:
    """Add what every rollout is described by: its scores, how many ended by themselves, how long they are."""
    known = ~scores.isnan()
    meter.add("rollout/score", scores, known)
    meter.add("rollout/score_squared", scores.square(), known)
    meter.add("rollout/eos_rate", finished.double())
    meter.add("rollout/completion_length", lengths.double())


def with_score_std(means: dict[str, float], prefix: str = "rollout/") -> dict[str, Any]:
    """Replace the mean square of the scores by their standard deviation."""
    if f"{prefix}score_squared" in means:
        spread = means.pop(f"{prefix}score_squared") - means[f"{prefix}score"] ** 2
        means[f"{prefix}score_std"] = max(spread, 0.0) ** 0.5
    return means
