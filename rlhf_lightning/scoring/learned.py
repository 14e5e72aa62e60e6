"""A trained reward model as a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.models.causal_lm import CausalLM, settings_for_inference
from rlhf_lightning.models.layout import cut_sequences, free_layout, lay_out, select
from rlhf_lightning.models.loading import LoadSettings, output_names, resolve_folder
from rlhf_lightning.models.roles import AdapterScalar, load_reward_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.sharding import in_step
from rlhf_lightning.scoring.scorer import Scorer, Scores
from rlhf_lightning.types import Judgement, MicroBatchLimits, Prompt, Sequences


class LearnedScorer(Scorer):
    """Scores completions with a reward model's folder, relative to the demonstrations' mean score stored in it.

    An adapter's folder is scored on its backbone, quantised as it was trained; beside a policy on the very same
    backbone it needs none of its own.

    Args:
        folder: Hugging Face folder with a scalar head, whole or an adapter on its backbone.
        max_tokens: cells of one forward pass, rows times the longest row.
        dtype: precision of the weights; None takes that of the run it scores for, and fp32 on its own.
    """

    def __init__(self, folder: str, max_tokens: int = 16_384, dtype: str | None = None) -> None:
        self.folder, self.max_tokens, self.dtype = resolve_folder(folder), max_tokens, dtype
        self.tokenizer = tokenization.load_tokenizer(self.folder)
        self.output_names = output_names(self.folder)
        self._model: ScalarModel | None = None

    @property
    def model(self) -> ScalarModel:
        """The reward model, frozen; loaded on first use."""
        if self._model is None:
            self._model = self._load(LoadSettings())
        return self._model

    def _load(self, settings: LoadSettings, policy: CausalLM | None = None) -> ScalarModel:
        settings = replace(settings, dtype=self.dtype or settings.dtype)
        return load_reward_model(self.folder, settings, policy, pad_token_id=self.tokenizer.pad_token_id)

    def load_beside(self, policy: CausalLM | None, settings: LoadSettings) -> None:
        """Load the reward model, on the policy's backbone where it was trained on that."""
        if self._model is None or isinstance(self._model, AdapterScalar):
            self._model = self._load(settings_for_inference(settings), policy)

    @property
    def models(self) -> Sequence[nn.Module]:
        """The reward model, unless it is an adapter on the policy's backbone and cut with that."""
        return () if isinstance(self.model, AdapterScalar) else (self.model,)

    def to(self, device: torch.device) -> LearnedScorer:
        """Move the reward model."""
        self.model.to(device)
        return self

    def shares_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether token ids mean the same to both, so that completions need no decoding and encoding again."""
        mine, theirs = self.tokenizer, tokenizer
        return mine.chat_template == theirs.chat_template and mine.get_vocab() == theirs.get_vocab()

    def score_of(self, outputs: Tensor) -> Tensor:
        """Return the score of a reward model of several outputs, shape (completions,): their first.

        Args:
            outputs: in the order of ``output_names``, shape (completions, outputs).
        """
        return outputs[:, 0]

    def score_sequences(self, sequences: Sequences) -> Tensor:
        """Score tokenized completions, fp32, shape (completions,)."""
        outputs = self.outputs_of(sequences)
        return (self.score_of(outputs) if self.output_names else outputs) - self.model.bias

    def judge_sequences(self, sequences: Sequences) -> Tensor | list[Judgement]:
        """Judge tokenized completions: scores, or with several outputs judgements whose parts they are."""
        if not self.output_names:
            return self.score_sequences(sequences)
        outputs = self.outputs_of(sequences)
        scores = (self.score_of(outputs) - self.model.bias).tolist()
        parts = [dict(zip(self.output_names, row, strict=True)) for row in outputs.tolist()]
        return [Judgement(score, named) for score, named in zip(scores, parts, strict=True)]

    @torch.no_grad()
    def outputs_of(self, sequences: Sequences) -> Tensor:
        """Return the head's outputs for tokenized completions, fp32, shape (completions,) or (completions, outputs)."""
        device = next(self.model.parameters()).device
        shape = (len(sequences.completions), len(self.output_names))
        scores = torch.zeros(shape if self.output_names else shape[:1])
        share = self.model.reads_trees
        with in_step(self.model, partial(self.model, free_layout().to(device))) as before_pass:
            for rows in cut_sequences(sequences, limits=MicroBatchLimits(max_tokens=self.max_tokens), pack_rows=share):
                layout = lay_out(select(sequences, rows), share).to(device)
                before_pass()
                scores[rows] = self.model(layout).to(scores)
        return scores

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
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
        found: Any = self.judge_sequences(sequences)
        return found
