"""An enumerable world: it lists every completion of every prompt, so that an objective's optimum is known exactly.

The rewards are a table, the reference is any policy, and preferences are Bradley-Terry in the rewards. Expectations
over completions, pairs and groups are finite sums. The policy that maximises E[reward] - beta KL(policy || reference)
is reference * exp(reward / beta), normalised.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.types import (
    DemonstrationBatch,
    EnumeratedProblem,
    Judgement,
    PreferenceBatch,
    ProcessBatch,
    PromptBatch,
    RankedBatch,
    Sequences,
    UnpairedBatch,
)
from rlhf_lightning.verification.table_model import (
    IMPOSSIBLE,
    TabularConfig,
    TabularForCausalLM,
    TabularForSequenceClassification,
    make_tokenizer,
)

END = 1
"""Id of the end token."""


class EnumerableWorld:
    """World with prompts p0, p1, ... and answers of letters, each answer ended by the end token or by the length limit.

    Args:
        prompts: number of prompts.
        tokens: number of answer tokens, including the end token.
        max_new_tokens: maximum length of an answer, in tokens.
        seed: seed of rewards and reference.
        reward_scale: standard deviation of the rewards.
        reference_scale: standard deviation of the reference's logits; 0 makes every next token equally likely.
    """

    def __init__(
        self,
        prompts: int = 4,
        tokens: int = 6,
        max_new_tokens: int = 4,
        seed: int = 0,
        reward_scale: float = 1.0,
        reference_scale: float = 0.5,
    ) -> None:
        self.config = TabularConfig(prompts, tokens, max_new_tokens)
        generator = torch.Generator().manual_seed(seed)
        self.completions = self._listed()
        shape = (prompts, len(self.completions))
        self.rewards = reward_scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        transitions = self.config.transitions()
        table = reference_scale * torch.randn(
            len(transitions), self.config.vocab_size, generator=generator, dtype=torch.float64
        )
        table[:, 0] = IMPOSSIBLE
        table[:, 1 + tokens :] = IMPOSSIBLE
        self.reference_table = table
        self.costs = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.signed_columns, self.rates_pairs = True, False

    def _listed(self) -> list[tuple[int, ...]]:
        """List every completion: those with an end token, shortest first, then those truncated at the length limit."""
        letters, longest = range(2, self.config.tokens + 1), self.config.max_new_tokens
        ended = [(*middle, END) for length in range(longest) for middle in itertools.product(letters, repeat=length)]
        return ended + list(itertools.product(letters, repeat=longest))

    # -- exact facts --------------------------------------------------------------------------------------------------

    @cached_property
    def walks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix before each token, the token, and the mask, each of shape (prompts, completions, length)."""
        transitions = self.config.transitions()
        longest = self.config.max_new_tokens
        shape = (self.config.prompts, len(self.completions), longest)
        prefixes, tokens = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.bool)
        for prompt in range(self.config.prompts):
            for index, completion in enumerate(self.completions):
                prefix = int(transitions[0, 1 + self.config.tokens + prompt])
                for position, token in enumerate(completion):
                    prefixes[prompt, index, position], tokens[prompt, index, position] = prefix, token
                    mask[prompt, index, position] = True
                    prefix = int(transitions[prefix, token])
        return prefixes, tokens, mask

    def probabilities(self, table: Tensor) -> Tensor:
        """Return the probability of each completion under a table of logits, shape (prompts, completions)."""
        prefixes, tokens, mask = self.walks
        logprobs = torch.log_softmax(table.double(), -1)[prefixes, tokens]
        return torch.where(mask, logprobs, 0.0).sum(-1).exp()

    @cached_property
    def problem(self) -> EnumeratedProblem:
        """Reference, rewards, Bradley-Terry preferences, lengths and teacher."""
        lengths = self.walks[2].sum(-1)
        preference = torch.sigmoid(self.rewards[:, :, None] - self.rewards[:, None, :])
        reference, teacher = (self.probabilities(table) for table in (self.reference_table, self.teacher_table))
        return EnumeratedProblem(reference, self.rewards, preference, lengths, teacher)

    @cached_property
    def teacher_table(self) -> Tensor:
        """Logits of the teacher policy, which maximises E[reward] - KL(policy || reference)."""
        prefixes, tokens, mask = self.walks
        mass = torch.zeros_like(self.reference_table)
        best = torch.softmax(self.probabilities(self.reference_table).log() + self.rewards, -1)
        visits = best.unsqueeze(-1).expand_as(mask)[mask]
        mass.index_put_((prefixes[mask], tokens[mask]), visits, accumulate=True)
        visited = mass.sum(-1, keepdim=True) > 0
        return torch.where(visited, mass.log().clamp_min(IMPOSSIBLE), self.reference_table)

    def expected_reward(self, policy: Tensor) -> float:
        """Return the mean over prompts of the policy's expected reward."""
        return float((policy * self.rewards).sum(-1).mean())

    def kl(self, policy: Tensor) -> float:
        """Return the mean over prompts of KL(policy || reference), nats."""
        logs = torch.where(policy > 0, (policy / self.problem.reference).log(), 0.0)
        return float((policy * logs).sum(-1).mean())

    def score(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        """Return the reward of completions given as text; used as the scorer in sampled training."""
        spelt = {self.text_of(ids): index for index, ids in reversed(list(enumerate(self.completions)))}
        rows = [int(str(prompt)[1:]) for prompt in prompts]
        return [float(self.rewards[row, spelt[text]]) for row, text in zip(rows, completions, strict=True)]

    def judge(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[Judgement]:
        """Return rewards as scores of completions given as text, with their costs as the part ``cost``."""
        scores, table = self.score(prompts, completions), self.rewards.flatten().tolist()
        costs = [float(self.costs.flatten()[table.index(score)]) for score in scores]
        return [Judgement(score, {"cost": cost}) for score, cost in zip(scores, costs, strict=True)]

    def text_of(self, ids: Sequence[int]) -> str:
        """Return a completion's text without the end token."""
        return " ".join(chr(ord("a") + token - 2) for token in ids if token != END)

    @cached_property
    def safe(self) -> Tensor:
        """Whether each completion is safe: its reward is above the prompt's mean; bool, (prompts, completions)."""
        return self.rewards > self.rewards.mean(-1, keepdim=True)

    # -- folders ------------------------------------------------------------------------------------------------------

    def write(self, folder: str | Path) -> str:
        """Write the reference as a policy folder with its tokenizer; return the folder."""
        return self._write_policy(self.reference_table, folder)

    def write_teacher(self, folder: str | Path) -> str:
        """Write the teacher as a policy folder with its tokenizer; return the folder."""
        return self._write_policy(self.teacher_table, folder)

    def _write_policy(self, table: Tensor, folder: str | Path) -> str:
        model = TabularForCausalLM(self.config)
        model.model.table.weight.data.copy_(table)
        return self._write(model, folder)

    def write_reward_model(self, folder: str | Path, scores: Tensor | None = None, outputs: int = 1) -> str:
        """Write a reward model folder: the first output is each completion's reward, and 0 for other prefixes.

        Args:
            folder: folder to write.
            scores: scores to return instead of the rewards, shape (prompts, completions).
            outputs: number of outputs of the head; all outputs after the first are 0.
        """
        scores = self.rewards if scores is None else scores
        model = TabularForSequenceClassification(TabularConfig(**self.config.sizes, num_labels=outputs))
        prefixes, tokens, mask = self.walks
        transitions, last = self.config.transitions(), mask.sum(-1, keepdim=True) - 1
        ends = transitions[prefixes.gather(-1, last), tokens.gather(-1, last)].squeeze(-1)
        model.model.table.weight.data.zero_()
        model.model.table.weight.data[ends.flatten(), 0] = scores.flatten().float()
        model.score.weight.data.copy_(torch.eye(self.config.vocab_size)[:outputs])
        return self._write(model, folder)

    def _write(self, model: Any, folder: str | Path) -> str:
        model.save_pretrained(folder)
        make_tokenizer(self.config).save_pretrained(folder)
        return str(folder)

    # -- populations: all rows, weighted by their probability ---------------------------------------------------------

    def prompt_ids(self, prompt: int) -> Tensor:
        """Return the ids of a prompt."""
        return torch.tensor([1 + self.config.tokens + prompt])

    def sequences(self, rows: Sequence[tuple[int, int]]) -> Sequences:
        """Return sequences for (prompt, completion) indices, one prompt per row."""
        completions = tuple(torch.tensor(self.completions[completion]) for _, completion in rows)
        return Sequences(
            prompts=tuple(self.prompt_ids(prompt) for prompt, _ in rows),
            completions=completions,
            parents=tuple(range(len(rows))),
            supervised=tuple(torch.ones(len(ids), dtype=torch.bool) for ids in completions),
        )

    def places_of(self, sequences: Sequences) -> tuple[list[int], list[int]]:
        """Return the prompt index and the completion index of each row."""
        prompts = [int(sequences.prompts[parent][0]) - 1 - self.config.tokens for parent in sequences.parents]
        return prompts, [self.completions.index(tuple(ids.tolist())) for ids in sequences.completions]

    def values_of(self, sequences: Sequences, table: Tensor) -> Tensor:
        """Look up each row's completion in a table (prompts, completions); return values of shape (rows,)."""
        return table[self.places_of(sequences)]

    def _pairs(self) -> list[tuple[int, int, int]]:
        count = len(self.completions)
        return [
            (prompt, first, second)
            for prompt in range(self.config.prompts)
            for first, second in itertools.permutations(range(count), 2)
        ]

    def preferences(self, copies: int | None = None, informative: bool = True) -> PreferenceBatch:
        """Return all ordered pairs, each weighted by the probability of its label; the mean weight is 1.

        Args:
            copies: repeat each pair about 2 * ``copies`` times the probability of its label (rounded) and set all
                weights to 1. For losses that sort, which cannot weight rows.
            informative: whether labels follow the rewards; otherwise both orders of a pair are equally likely.
        """
        pairs = self._pairs()
        if copies is not None:
            often = [
                round(2 * copies * (float(self.problem.preference[pair]) if informative else 0.5)) for pair in pairs
            ]
            pairs = [pair for pair, count in zip(pairs, often, strict=True) for _ in range(count)]
        chosen = self.sequences([(prompt, first) for prompt, first, _ in pairs])
        rejected = self.sequences([(prompt, second) for prompt, _, second in pairs])
        sequences = Sequences(
            prompts=chosen.prompts,
            completions=chosen.completions + rejected.completions,
            parents=chosen.parents * 2,
            supervised=chosen.supervised + rejected.supervised,
        )
        weights = torch.stack([2 * self.problem.preference[pair] for pair in pairs])
        if copies is not None or not informative:
            weights = torch.ones_like(weights)
        gaps = [(self.rewards[prompt, first] - self.rewards[prompt, second]).abs() for prompt, first, second in pairs]
        margin = torch.stack(gaps) * self.rates_pairs
        return PreferenceBatch(sequences, torch.ones_like(weights), margin, weights)

    def rankings(self) -> RankedBatch:
        """Return all ordered pairs as groups of two, weighted as in `preferences`."""
        pairs = self._pairs()
        both = self.sequences([(prompt, index) for prompt, first, second in pairs for index in (first, second)])
        sequences = both._replace(
            prompts=both.prompts[::2], parents=tuple(index // 2 for index in range(len(both.completions)))
        )
        weights = torch.stack([2 * self.problem.preference[pair] for pair in pairs])
        ranks = torch.tensor([0, 1] * len(pairs))
        return RankedBatch(sequences, ranks, torch.ones_like(weights), torch.zeros_like(weights), weights)

    def judgements(self) -> UnpairedBatch:
        """Return every completion as desirable (weight: its mean win rate) and as undesirable (weight: 1 minus it).

        Weights are scaled to mean 1. The mismatched completions are the same texts, since every prompt has the same
        completions.
        """
        count = len(self.completions)
        rows = [(prompt, index) for prompt in range(self.config.prompts) for index in range(count)]
        wins = self.problem.preference.mean(-1).flatten()
        sequences = self.sequences(rows * 2)
        desirable = torch.tensor([True] * len(rows) + [False] * len(rows))
        return UnpairedBatch(sequences, sequences, desirable, 2 * torch.cat([wins, 1 - wins]))

    def judged_steps(self) -> ProcessBatch:
        """Return every completion with each token as a step.

        The log-odds of a step's label are the mean reward of all completions that begin with the tokens up to that
        step.
        """
        rows = [(p, index) for p in range(self.config.prompts) for index in range(len(self.completions))]
        labels = []
        for prompt, index in rows:
            ids = self.completions[index]
            onwards = [
                [float(self.rewards[prompt, i]) for i, other in enumerate(self.completions) if other[:end] == ids[:end]]
                for end in range(1, len(ids) + 1)
            ]
            means = [sum(rewards) / len(rewards) for rewards in onwards]
            labels.append(torch.sigmoid(torch.tensor(means, dtype=torch.float64)))
        return ProcessBatch(self.sequences(rows), tuple(labels), torch.ones(len(rows), dtype=torch.float64))

    def demonstrations(self, policy: Tensor) -> DemonstrationBatch:
        """Return every completion, weighted by its probability under ``policy``, shape (prompts, completions)."""
        rows = [(p, index) for p in range(self.config.prompts) for index in range(len(self.completions))]
        return DemonstrationBatch(self.sequences(rows), policy.flatten() * len(self.completions))

    def questions(self, samples: int, first_episode: int = 0) -> PromptBatch:
        """Return every prompt, repeated ``samples`` times in a row."""
        prompts = [prompt for prompt in range(self.config.prompts) for _ in range(samples)]
        return PromptBatch(
            prompts=tuple(self.prompt_ids(prompt) for prompt in prompts),
            texts=tuple(f"p{prompt}" for prompt in prompts),
            columns={},
            episodes=torch.arange(first_episode, first_episode + len(prompts)),
            group=torch.tensor(prompts),
        )
