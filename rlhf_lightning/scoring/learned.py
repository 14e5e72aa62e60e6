"""A trained reward model as a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.models.layout import cut_rows, free_layout, padded_layout, select
from rlhf_lightning.models.loading import LoadSettings, load_reward_hf_model, prepare_for_training, resolve_folder
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.sharding import in_step
from rlhf_lightning.scoring.base import Scorer
from rlhf_lightning.types import Prompt, Sequences


class LearnedScorer(Scorer):
    """Scores completions with a reward model's folder, relative to the demonstrations' mean score stored in it.

    Args:
        folder: Hugging Face folder with a scalar head, whole or an adapter on its backbone.
        max_tokens: cells of one forward pass, rows times the longest row.
        dtype: precision of the weights.
    """

    def __init__(self, folder: str, max_tokens: int = 16_384, dtype: str = "float32") -> None:
        self.folder, self.max_tokens = resolve_folder(folder), max_tokens
        self.tokenizer = tokenization.load_tokenizer(self.folder)
        settings = LoadSettings(dtype=dtype)
        model = load_reward_hf_model(self.folder, settings, pad_token_id=self.tokenizer.pad_token_id)
        prepare_for_training(model, settings)
        self.model = ScalarModel(model, bias=float(getattr(model.config, "score_bias", 0.0)))
        self.model.requires_grad_(False).eval()

    @property
    def models(self) -> Sequence[nn.Module]:
        """The reward model."""
        return (self.model,)

    def to(self, device: torch.device) -> LearnedScorer:
        """Move the reward model."""
        self.model.to(device)
        return self

    def shares_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether token ids mean the same to both, so that completions need no decoding and encoding again."""
        mine, theirs = self.tokenizer, tokenizer
        return mine.chat_template == theirs.chat_template and mine.get_vocab() == theirs.get_vocab()

    @torch.no_grad()
    def score_sequences(self, sequences: Sequences) -> Tensor:
        """Score tokenized completions, fp32, shape (completions,)."""
        device = next(self.model.parameters()).device
        scores = torch.zeros(len(sequences.completions))
        with in_step(self.model, partial(self.model, free_layout().to(device))) as before_pass:
            for rows in cut_rows(sequences.lengths, max_tokens=self.max_tokens):
                layout = padded_layout(select(sequences, rows)).to(device)
                before_pass()
                scores[rows] = (self.model(layout) - self.model.bias).to(scores)
        return scores

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float] | Tensor:
        """Score completions given as text."""
        encoded = [
            tokenization.encode_completion(self.tokenizer, completion, prompt)[0]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        ids = tuple(torch.tensor(completion, dtype=torch.long) for completion in encoded)
        sequences = Sequences(
            prompts=tuple(torch.tensor(tokenization.encode_prompt(self.tokenizer, prompt)) for prompt in prompts),
            completions=ids,
            parents=tuple(range(len(ids))),
            supervised=tuple(torch.ones(len(completion), dtype=torch.bool) for completion in ids),
        )
        return self.score_sequences(sequences)
