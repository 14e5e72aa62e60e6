"""Teachers of a distillation: a frozen policy that must read the student's token ids alike, or the student itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM, inference_mode_of, load_reference
from rlhf_lightning.models.frozen import FrozenPolicy
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.resolving import resolve_folder


class Teacher(FrozenPolicy):
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

    @property
    def models(self) -> tuple[CausalLM, ...]:
        """The model: it moves to the device by hand, and into no checkpoint or optimizer."""
        return (self.model,)

    @contextmanager
    def as_model(self) -> Iterator[CausalLM]:
        """Give the teacher, to sample from or to forward."""
        yield self.model

    @property
    def head_owner(self) -> CausalLM:
        """The teacher."""
        return self.model


class CurrentPolicy(FrozenPolicy):
    """The policy in training as its own teacher: the weights of now, in eval mode and without gradient."""

    def __init__(self, policy: CausalLM) -> None:
        self.policy = policy

    @contextmanager
    def as_model(self) -> Iterator[CausalLM]:
        """Give the policy."""
        with inference_mode_of(self.policy):
            yield self.policy

    @property
    def head_owner(self) -> CausalLM:
        """The policy."""
        return self.policy

    def predicting_states(self, layout: Layout) -> Tensor:
        """Return the states that predict the layout's supervised tokens, shape (tokens, hidden size)."""
        self._whole_head = None  # the head moves with every update
        return super().predicting_states(layout)


def check_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Check that an id means one token to both. A vocabulary may go on behind the other's end.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.
        name: what the teacher is called in the error.

    Raises:
        ModelError: an id that both have is another token to the teacher; the first such is named.
    """
    mine, theirs = ({index: token for token, index in one.get_vocab().items()} for one in (student, teacher))
    common = min(max(mine), max(theirs)) + 1
    other = [index for index in range(common) if mine.get(index) != theirs.get(index)]
    if other:
        first = other[0]
        raise ModelError(
            "other-tokenizer",
            f"the teacher {name} has another tokenizer than the student: id {first} is {theirs.get(first)!r} "
            f"to the teacher and {mine.get(first)!r} to the student, and {len(other):,} of {common:,} "
            "ids differ; distillation compares distributions over the same tokens, so choose "
            "a teacher of the student's family",
        )
