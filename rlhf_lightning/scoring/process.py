"""A process reward model as a scorer: completions are split into steps, and their scores made one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning import tokenization
from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.process import aggregated_steps
from rlhf_lightning.micro_batches import cut_micro_batches
from rlhf_lightning.models.layout import padded_layout, select
from rlhf_lightning.models.loading import BACKBONE_FILE, STEP_SEPARATOR, resolve_folder
from rlhf_lightning.scoring.learned import LearnedScorer
from rlhf_lightning.scoring.scorer import Scorer
from rlhf_lightning.types import MicroBatchLimits, Prompt, Sequences


class ProcessScorer(Scorer):
    """Scores a completion by its steps' probabilities of being right: the least, their product, or the last.

    The product is the probability that every step is right if errors are independent (arXiv 2305.20050, Appendix F);
    the least does not fall with the number of steps. An empty completion has one empty step.

    Args:
        folder: process reward model's folder.
        aggregate: how step probabilities become one score: "min", "product" or "last".
        separator: where completions are split; None takes what the folder was trained with.
        max_tokens: cells of one forward pass, rows times the longest row.
        dtype: precision of the weights.

    Raises:
        SettingError: there is no such aggregate, or the folder names no separator and none is given.
    """

    def __init__(
        self,
        folder: str,
        aggregate: Literal["min", "product", "last"] = "min",
        separator: str | None = None,
        max_tokens: int = 16_384,
        dtype: str = "float32",
    ) -> None:
        found = stored_separator(folder) if separator is None else separator
        if not found:
            raise SettingError(
                "no-separator", f"{folder} is not the folder of a process reward model; give the separator of its steps"
            )
        if aggregate not in ("min", "product", "last"):
            raise SettingError("unknown-choice", f"aggregate is {aggregate!r}; choose 'min', 'product' or 'last'")
        self.separator, self.aggregate = found, aggregate
        self.learned = LearnedScorer(folder, max_tokens, dtype)
        self.folder, self.max_tokens = self.learned.folder, max_tokens

    def to(self, device: torch.device) -> ProcessScorer:
        """Move the reward model."""
        self.learned.to(device)
        return self

    def steps_of(self, completion: str) -> list[str]:
        """Return the steps of a completion; separators in a row leave no empty step between them."""
        return [part for part in completion.split(self.separator) if part.strip()] or [completion]

    @torch.no_grad()
    def step_scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the log-odds of each step, fp32, shape (steps,), and the completion each belongs to, on the CPU."""
        sequences = self._encoded(prompts, completions)
        device = next(self.learned.model.parameters()).device
        scores: dict[int, Tensor] = {}
        for cut in cut_micro_batches(sequences.lengths, MicroBatchLimits(max_tokens=self.max_tokens)):
            layout = padded_layout(select(sequences, cut)).to(device)
            grid = self.learned.model(layout._replace(predictors=layout.predictors + 1), per_token=True).float().cpu()
            for place, number in enumerate(cut):
                scores[number] = grid[place, layout.completion_mask[place].cpu()]
        ordered = [scores[number] for number in range(len(scores))]
        counts = torch.tensor([len(part) for part in ordered], dtype=torch.long)
        return torch.cat([torch.zeros(0), *ordered]), torch.arange(len(ordered)).repeat_interleave(counts)

    def _encoded(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Sequences:
        """Return the completions with a flag on each step's last token, encoded as they were in training."""
        tokenizer = self.learned.tokenizer
        encoded = [
            tokenization.encode_steps(tokenizer, self.steps_of(completion), self.separator, prompt)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return Sequences(
            prompts=tuple(torch.tensor(tokenization.encode_prompt(tokenizer, prompt)) for prompt in prompts),
            completions=tuple(torch.tensor(ids, dtype=torch.long) for ids, _ in encoded),
            parents=tuple(range(len(encoded))),
            supervised=tuple(torch.tensor(ends, dtype=torch.bool) for _, ends in encoded),
        )

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float] | Tensor:
        """Return the aggregate of each completion's step probabilities, in [0, 1]."""
        scores, row = self.step_scores(prompts, completions)
        return aggregated_steps(torch.nn.functional.logsigmoid(scores), row, len(completions), self.aggregate).exp()


def stored_separator(folder: str) -> str | None:
    """Return the separator that a process reward model's folder was trained with; None of other folders."""
    record = Path(resolve_folder(folder)) / BACKBONE_FILE
    return json.loads(record.read_text()).get(STEP_SEPARATOR) if record.is_file() else None
