"""The teacher of a distillation: a frozen policy that must read the student's token ids as the student means them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.models.causal_lm import CausalLM, PredictingStates, load_reference
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.loading import LoadSettings, resolve_folder
from rlhf_lightning.models.sharding import is_sharded, whole


class Teacher:
    """A frozen policy: in eval mode, without gradient, and in no checkpoint.

    Args:
        name: hub id or folder, whole weights or an adapter.
        tokenizer: the student's.
        settings: how weights are brought into memory.

    Raises:
        FileNotFoundError: there is no such folder, or no weights in it.
        ValueError: the teacher has another tokenizer.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, settings: LoadSettings) -> None:
        check_same_vocabulary(tokenizer, tokenization.load_tokenizer(resolve_folder(name)), name)
        self.model = load_reference(name, replace(settings, from_scratch=False))
        self._whole_head: tuple[Tensor, Tensor | None] | None = None

    @property
    def models(self) -> tuple[CausalLM, ...]:
        """The model: it moves to the device by hand, and into no checkpoint or optimizer."""
        return (self.model,)

    @torch.no_grad()
    def logprobs(self, layout: Layout, temperature: float = 1.0) -> Tensor:
        """Return log-probabilities of the layout's completions, without gradient, shape (completions, length)."""
        return self.model(layout, temperature).logprobs

    @torch.no_grad()
    def predicting_states(self, layout: Layout) -> Tensor:
        """Return the states that predict the layout's supervised tokens, shape (tokens, hidden size)."""
        if self._whole_head is None and is_sharded(self.model):
            # Ranks ask for other numbers of chunks of logits, and whatever gathers weights takes all of them together.
            weight, bias = self.model.head()
            self._whole_head = whole(weight.detach()), None if bias is None else whole(bias.detach())
        return self.model(PredictingStates(layout))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits of hidden states, fp32 or wider, shape (tokens, vocabulary)."""
        return self.model.logits(hidden, self._whole_head)


def check_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Check that an id means one token to both. A vocabulary may go on behind the other's end.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.
        name: what the teacher is called in the error.

    Raises:
        ValueError: an id that both have is another token to the teacher; the first such is named.
    """
    mine, theirs = ({index: token for token, index in one.get_vocab().items()} for one in (student, teacher))
    common = min(max(mine), max(theirs)) + 1
    other = [index for index in range(common) if mine.get(index) != theirs.get(index)]
    if other:
        first = other[0]
        raise ValueError(
            f"the teacher {name} has another tokenizer than the student: id {first} is {theirs.get(first)!r} to the "
            f"teacher and {mine.get(first)!r} to the student, and {len(other):,} of {common:,} ids differ. "
            "Distillation compares distributions over the same tokens: take a teacher of the student's family"
        )
