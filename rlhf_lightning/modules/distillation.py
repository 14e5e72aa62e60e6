"""Distillation: a student learns a teacher's next-token distributions, on given completions or its own samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_lightning import tokenization
from rlhf_lightning.errors import ContractError
from rlhf_lightning.functional.distillation import (
    common_vocabulary,
    distillation_advantages,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    top1_agreement,
    top_k_and_rest,
)
from rlhf_lightning.functional.logprobs import kl_k1
from rlhf_lightning.functional.policy_gradient import token_rewards
from rlhf_lightning.models.causal_lm import OverLogits
from rlhf_lightning.models.frozen import FrozenPolicy, Teacher
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.sampling.drawing import uniform
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import sample
from rlhf_lightning.scoring import Scorer
from rlhf_lightning.scoring.scorer import ZeroScorer
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.training.returned_loss import loss_of
from rlhf_lightning.types import (
    Advantages,
    DemonstrationBatch,
    DistillationLogits,
    EnumeratedProblem,
    Loss,
    Rollout,
    Sequences,
    Step,
)

COIN = 2**32 - 1
"""Position that seeds an update's random choice; it is beyond the length of any completion."""


class DivergenceObjective(AlignmentModule):
    """Base of objectives on full next-token distributions of student and teacher. Subclasses set the attributes."""

    beta: float
    softmax_temperature: float
    chunk_tokens: int
    top_k: int | None = None
    teacher: FrozenPolicy

    def distillation_loss(self, logits: DistillationLogits) -> Tensor | Loss:
        """Return one loss per token, shape (tokens,).

        It is called for each chunk of a micro-batch's completion tokens, and again in the backward pass.
        """
        student, teacher, temperature = logits.student_logits, logits.teacher_logits, self.softmax_temperature
        if self.top_k is None:
            return generalized_jsd(student, teacher, self.beta, temperature)
        return generalized_jsd(*top_k_and_rest(student, teacher, self.top_k, temperature), self.beta)

    def divergence_sum(self, sequences: Sequences, read: Sequences, weights: Tensor, meter: Meter) -> Tensor:
        """Return the weighted sum of the losses of completions.

        Args:
            sequences: the student's sequences.
            read: the teacher's sequences: the same completions, with the same or other prompts.
            weights: weight of each completion, shape (completions,).
            meter: records loss and divergences, means over tokens.
        """
        layout = self.lay_out(sequences)
        asked = OverLogits(
            layout, self._of_chunk, (layout.targets, self._teacher_states(sequences, read, layout)), self.chunk_tokens
        )
        policy: Any = self.model
        found: dict[str, Tensor] = policy(asked)
        row = layout.cells.div(layout.completion_mask.shape[1], rounding_mode="floor")
        losses = found.pop("loss") * to_device(weights, self.device)[row]
        meter.add("loss", losses)
        for name, values in found.items():
            meter.add(name, values)
        return losses.sum()

    def _teacher_states(self, sequences: Sequences, read: Sequences, layout: Layout) -> Tensor:
        """Return the teacher's hidden state that predicts each of the student's supervised tokens."""
        if read is sequences:
            return self.teacher.predicting_states(layout)
        same = read.parents == sequences.parents and len(read.completions) == len(sequences.completions)
        if not same or not all(map(torch.equal, read.completions, sequences.completions)):
            raise ContractError(
                "teacher-completions",
                f"{type(self).__name__}.teacher_sequences changed the completions or their order: change only prompts",
            )
        theirs = self.lay_out(read)
        return self.teacher.predicting_states(theirs)[torch.searchsorted(theirs.cells, layout.cells)]

    def _of_chunk(self, student_logits: Tensor, targets: Tensor, teacher_hidden: Tensor) -> dict[str, Tensor]:
        """Return loss and metrics of a chunk of tokens."""
        both = common_vocabulary(student_logits, self.teacher.logits(teacher_hidden))
        logits = DistillationLogits(*both, targets)
        loss = loss_of(self.distillation_loss, logits, like=targets)
        with torch.no_grad():  # after the loss, so that the backward pass does not recompute these metrics
            measured = {
                "distill/kl_forward": forward_kl(*both),
                "distill/kl_reverse": reverse_kl(*both),
                "distill/top1_agreement": top1_agreement(*both),
            }
        return {"loss": loss.values, **measured, **loss.metrics}


class GKDModule(DivergenceObjective, OfflineModule):
    r"""Generalized knowledge distillation: a divergence between the next-token distributions of student and teacher.

    loss = (1/N) \sum_{rows} w \sum_t D_beta(teacher || student)(. | x, y_{<t}) with D_beta = beta KL(P || M) + (1 -
    beta) KL(Q || M), P the teacher, Q the student and M = beta P + (1 - beta) Q (Agarwal et al., arXiv 2306.13649, Eq.
    1 and Algorithm 1). beta 0 and 1 are KL(P || Q) and KL(Q || P). N is the number of completion tokens of the whole
    optimizer step. When the student equals the teacher, loss and gradient are 0.

    With probability ``on_policy_fraction`` an optimizer step learns on completions that the student samples for the
    step's prompts, without gradient through the sampling. Otherwise it learns on the data's completions. This choice
    depends only on seed and update, and each sample only on seed, update and the ids of its row. Therefore ranks,
    micro-batches and resuming do not change them. Validation uses the data's completions.

    Target: the teacher, on every prefix that data or samples contain.

    Args:
        teacher: hub id or folder of the policy to learn from. It must have the student's tokenizer.
        beta: the teacher's share of the mixture; 0 covers the whole teacher distribution, 1 seeks its modes.
        on_policy_fraction: probability that a step learns on the student's own samples (the paper's lambda).
        temperature: sampling temperature of the student.
        softmax_temperature: temperature of both distributions in the divergence.
        max_new_tokens: longest sampled completion, tokens.
        sampling_batch_size: completions decoded in parallel; null decodes a micro-batch at once.
        chunk_tokens: tokens whose logits are in memory at a time.

    Raises:
        SettingError: a setting is outside its range, or the teacher has another tokenizer.
    """

    paper = "Agarwal et al. 2024, arXiv 2306.13649"
    ranges = {
        "beta": "[0, 1]",
        "on_policy_fraction": "[0, 1]",
        "temperature": "(0, inf)",
        "softmax_temperature": "(0, inf)",
        "max_new_tokens": "[1, inf)",
        "sampling_batch_size": "[1, inf)",
        "chunk_tokens": "[1, inf)",
    }
    batch_type = DemonstrationBatch
    counts_tokens = True
    headline_metrics = ("val/loss", "val/distill/kl_forward", "val/distill/kl_reverse")

    teacher_name: str  # never None here
    teacher: Teacher

    def __init__(
        self, teacher: str, beta: float = 0.5, on_policy_fraction: float = 0.5, temperature: float = 0.9,
        softmax_temperature: float = 1.0, max_new_tokens: int = 128, sampling_batch_size: int | None = None,
        chunk_tokens: int = 1024, learning_rate: float = 2e-5,
        lr_schedule: Literal["constant", "linear", "cosine"] = "cosine", warmup: float = 0.03, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate=learning_rate, lr_schedule=lr_schedule, warmup=warmup, **kwargs)
        self.teacher_name, self.beta, self.on_policy_fraction = teacher, beta, on_policy_fraction
        self.softmax_temperature, self.chunk_tokens = softmax_temperature, chunk_tokens
        self.sampling = SamplingSettings(max_new_tokens, temperature, batch_size=sampling_batch_size)

    def load_models(self) -> None:
        super().load_models()
        self.teacher = Teacher(self.teacher_name, self.tokenizer, self.load_settings)

    def frozen_models(self) -> Sequence[nn.Module]:
        return self.teacher.models

    # -- the override points ------------------------------------------------------------------------------------------

    def teacher_sequences(self, sequences: Sequences) -> Sequences:
        """Return the teacher's sequences for the student's: the same completions, with the same or other prompts.

        Override it for context distillation: add instructions to the prompt that only the teacher reads. Longer prompts
        make the teacher's forward pass larger than ``data.max_tokens``.
        """
        return sequences

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return problem.teacher

    # -- the student's own samples ------------------------------------------------------------------------------------

    def learns_from_samples(self, update: int) -> bool:
        """Whether an update learns on the student's own samples; the same on every rank."""
        coin = uniform(self.seed, torch.tensor([update]), torch.tensor([COIN]))
        return bool(coin < self.on_policy_fraction)

    def training_step(self, step: Step[DemonstrationBatch], batch_idx: int) -> Any:
        """Take one optimizer step, on the student's samples or on the data's completions."""
        if self.learns_from_samples(self.updates):
            step = self.with_samples(step)
        return super().training_step(step, batch_idx)

    def with_samples(self, step: Step[DemonstrationBatch]) -> Step[DemonstrationBatch]:
        """Return the step with completions that the student samples for its prompts, and their token count."""
        batches = tuple(batch._replace(sequences=self.sampled(batch.sequences)) for batch in step.micro_batches)
        tokens = torch.tensor(float(sum(len(ids) for batch in batches for ids in batch.sequences.completions)))
        everyone = self.trainer.strategy.reduce(tokens.to(self.device).double(), reduce_op="sum")
        return step._replace(micro_batches=batches, tokens=int(everyone))

    def sampled(self, sequences: Sequences) -> Sequences:
        """Return the prompts, each with a completion sampled from the student."""
        prompts = tuple(sequences.prompts[parent] for parent in sequences.parents)
        rows = zip(prompts, sequences.completions, strict=True)
        episodes = torch.tensor([address_of(self.updates, *row) for row in rows], dtype=torch.long)
        ends = tokenization.end_token_ids(self.tokenizer)
        ids = sample(self.policy, prompts, episodes, self.sampling, self.seed, ends).ids
        supervised = tuple(torch.ones(len(completion), dtype=torch.bool) for completion in ids)
        return Sequences(prompts, ids, tuple(range(len(ids))), supervised)

    # -- one micro-batch ----------------------------------------------------------------------------------------------

    def loss_sum(self, batch: DemonstrationBatch, meter: Meter) -> Tensor:
        read = self.teacher_sequences(batch.sequences)
        return self.divergence_sum(batch.sequences, read, batch.weights, meter)


def address_of(update: int, prompt: Tensor, completion: Tensor) -> int:
    """Return the episode number that seeds a row's sample: a hash of the update and the row's ids.

    The row's position in the batch would depend on ranks and micro-batches.
    """
    ids = torch.cat([torch.tensor([update, len(prompt)]), prompt, completion]).long()
    digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class OnPolicyDistillationModule(OnPolicyModule):
    r"""On-policy distillation: the advantage of each token sampled by the student is log teacher - log student.

    A_t = log teacher(y_t | x, y_{<t}) - log student(y_t | x, y_{<t}), without gradient, in a policy-gradient loss, mean
    over tokens, without baseline (Lu et al. 2025, "On-Policy Distillation"). It is minus the k1 estimate of KL(student
    || teacher) per token; the KL of later tokens is ignored. It needs one log-probability per token, not full
    distributions. When the student equals the teacher, every advantage is 0.

    The teacher replaces the reference: ``rollout/kl`` is KL(student || teacher) per completion, and
    ``distill/kl_reverse`` the same KL per token.

    Target: the teacher, where every advantage is 0.

    Args:
        teacher: hub id or folder of the policy to learn from. It must have the student's tokenizer.
        scorer: scores completions for the metric ``rollout/score``, without effect on training; null for no scores.

    Raises:
        SettingError: the teacher has another tokenizer.
    """

    paper = "Lu et al. 2025, Thinking Machines Lab"
    needs_reference = False
    headline_metrics = ("rollout/kl", "distill/kl_reverse", "val/kl", "val/distill/kl_reverse")

    teacher_name: str  # never None here

    def __init__(
        self,
        teacher: str,
        scorer: Scorer | str | None = None,
        ppo_epochs: int = 1,
        learning_rate: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            scorer=ZeroScorer() if scorer is None else scorer, ppo_epochs=ppo_epochs, learning_rate=learning_rate,
            kl_coef=0.0, kl_target=None, kl_horizon=1, kl_place="reward", kl_estimator="k1", kl_times_ratio=False,
            kl_clamp=None, overlong_buffer=None, **kwargs,
        )  # fmt: skip
        self.teacher_name = teacher

    def load_models(self) -> None:
        """Load the student, and the frozen teacher as the reference."""
        super().load_models()
        self.teacher = Teacher(self.teacher_name, self.tokenizer, self.load_settings)
        self.reference = self.teacher  # type: ignore[assignment]

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        """Return the score on the last token of each completion, used only for metrics."""
        return token_rewards(rollout.scores, self.reward_kl(rollout), rollout.completion_mask, self.kl_coef)

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        assert rollout.reference_logprobs is not None
        mask = rollout.completion_mask
        return Advantages(distillation_advantages(rollout.reference_logprobs, rollout.old_logprobs, mask), None)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return problem.teacher

    def measure_rollout(self, rollout: Rollout, meter: Meter) -> None:
        """Record the reverse KL per token."""
        super().measure_rollout(rollout, meter)
        assert rollout.reference_logprobs is not None
        kl = kl_k1(rollout.old_logprobs, rollout.reference_logprobs)
        meter.add("distill/kl_reverse", kl, rollout.completion_mask)

    def check_rollout(self, rollout: Rollout) -> None:
        """Check lengths and sampler. The first KL may have any value, since the teacher is not a copy of the policy."""
        self.invariants.check_lengths(rollout)
        self.invariants.check_sampler(rollout)
