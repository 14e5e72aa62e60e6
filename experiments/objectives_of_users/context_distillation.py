"""Context distillation: `rlhf fit --config experiments/objectives_of_users/context_distillation.yaml`."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import DataError
from rlhf_lightning.modules import GKDModule
from rlhf_lightning.tokenization import encode_prompt
from rlhf_lightning.types import Sequences


class ContextDistillationModule(GKDModule):
    r"""The student learns to answer as a teacher that reads a system text before the prompt (Snell et al., 2209.15189).

    loss = mean over tokens of KL(student(. | x, y_<t) || teacher(. | c, x, y_<t)), the teacher by default the student's
    own start, on the student's own samples. ``beta`` 0 is the forward KL, ``on_policy_fraction`` 0 learns on the data's
    completions, as the paper does. Needs a chat template that writes a system turn.

    Args:
        context: the system text c.
        teacher: hub id or folder; None is ``init_from``.

    Raises:
        DataError: a prompt begins in another way than the template does, as with a system turn of its own.
    """

    paper = "Snell et al. 2022, arXiv 2209.15189"

    def __init__(
        self,
        context: str,
        init_from: str,
        teacher: str | None = None,
        beta: float = 1.0,
        on_policy_fraction: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher=teacher or init_from,
            init_from=init_from,
            beta=beta,
            on_policy_fraction=on_policy_fraction,
            **kwargs,
        )
        self.context = context

    @cached_property
    def beginnings(self) -> tuple[Tensor, Tensor]:
        """Token ids that the template writes before a user's first turn, without and with the context."""
        user, system = {"role": "user", "content": "?"}, {"role": "system", "content": self.context}
        short, long = (torch.tensor(encode_prompt(self.tokenizer, turns)) for turns in ([user], [system, user]))
        width = min(len(short), len(long))
        shared = int((short[-width:] == long[-width:]).flip(0).long().cumprod(0).sum())
        return short[: len(short) - shared], long[: len(long) - shared]

    def teacher_sequences(self, sequences: Sequences) -> Sequences:
        """Return the sequences with the context before each prompt."""
        short, long = self.beginnings
        if not all(torch.equal(prompt[: len(short)], short) for prompt in sequences.prompts):
            raise DataError("no-place-for-context", "a prompt begins in another way than the chat template does")
        return sequences._replace(prompts=tuple(torch.cat([long, one[len(short) :]]) for one in sequences.prompts))
