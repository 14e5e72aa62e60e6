"""Distillation: a student learns a teacher's distributions, on given completions or on its own."""

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
)
from rlhf_lightning.functional.logprobs import kl_k1
from rlhf_lightning.functional.policy_gradient import token_rewards
from rlhf_lightning.models.causal_lm import OverLogits
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.teacher import Teacher
from rlhf_lightning.sampling.counter_rng import uniform
from rlhf_lightning.sampling.engines import SamplingSettings, sample
from rlhf_lightning.scoring import Scorer
from rlhf_lightning.scoring.scorer import ZeroScorer
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import as_loss
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.training.on_policy import OnPolicyModule
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
"""Position at which the coin of an update is addressed: no completion is so long."""


class GKDModule(OfflineModule):
    r"""Generalized knowledge distillation: the divergence of the student's next-token distribution from the teacher's.

    loss = (1/N) \sum_{rows} w \sum_t D_beta(teacher || student)(. | x, y_{<t}) with D_beta = beta KL(P || M) +
    (1 - beta) KL(Q || M), P the teacher, Q the student and M = beta P + (1 - beta) Q (Agarwal et al., arXiv 2306.13649,
    Eq. 1 and Algorithm 1); beta 0 and 1 are KL(P || Q) and KL(Q || P). N are the completion tokens of the whole
    optimizer step. 0, and without gradient, where the student is the teacher.

    With probability ``on_policy_fraction`` an optimizer step learns on completions that the student samples for the
    step's prompts, without gradient through the sampling, otherwise on the data's. Which of the two is a function of
    seed and update, a sample one of seed, update and its row's own ids: neither sees ranks, micro-batches or where a
    run was resumed. Validation looks at the data's completions.

    Target: the teacher, wherever data or samples lead.

    Args:
        teacher: hub id or folder of the policy to learn from. It must have the student's tokenizer.
        beta: the teacher's share of the mixture, in [0, 1]: 0 covers all that the teacher says, 1 keeps to its modes.
        on_policy_fraction: probability that a step learns on the student's own samples (the paper's lambda).
        temperature: of the student's samples.
        softmax_temperature: of both distributions in the divergence.
        max_new_tokens: longest sampled completion, tokens.
        sampling_batch_size: completions decoded side by side; None decodes a micro-batch at once.
        chunk_tokens: tokens whose logits are held at a time.

    Raises:
        ValueError: the teacher has another tokenizer, or beta or on_policy_fraction is outside [0, 1].
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

    def __init__(
        self,
        teacher: str,
        beta: float = 0.5,
        on_policy_fraction: float = 0.5,
        temperature: float = 0.9,
        softmax_temperature: float = 1.0,
        max_new_tokens: int = 128,
        sampling_batch_size: int | None = None,
        chunk_tokens: int = 1024,
        learning_rate: float = 2e-5,
        lr_schedule: Literal["constant", "linear", "cosine"] = "cosine",
        warmup: float = 0.03,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, lr_schedule=lr_schedule, warmup=warmup, **kwargs)
        self.teacher_name, self.beta, self.on_policy_fraction = teacher, beta, on_policy_fraction
        self.softmax_temperature, self.chunk_tokens = softmax_temperature, chunk_tokens
        self.sampling = SamplingSettings(max_new_tokens, temperature, batch_size=sampling_batch_size)

    def load_models(self) -> None:
        """Load the student to train and the teacher frozen."""
        super().load_models()
        self.teacher = Teacher(self.teacher_name, self.tokenizer, self.load_settings)

    def frozen_models(self) -> Sequence[nn.Module]:
        """The teacher."""
        return self.teacher.models

    # -- the override points ------------------------------------------------------------------------------------------

    def teacher_sequences(self, sequences: Sequences) -> Sequences:
        """Return what the teacher reads for a micro-batch: the same completions, on these prompts or on others.

        Context distillation puts instructions before the prompt here, which the student does not see. Longer prompts
        make the teacher's forward pass larger than ``data.max_tokens``.

        Args:
            sequences: what the student reads.
        """
        return sequences

    def distillation_loss(self, logits: DistillationLogits) -> Tensor | Loss:
        """Return one loss per token, shape (tokens,).

        It sees a chunk of a micro-batch's completion tokens at a time, and is called once more in the backward pass.
        """
        return generalized_jsd(logits.student_logits, logits.teacher_logits, self.beta, self.softmax_temperature)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the teacher, where every divergence is 0."""
        return problem.teacher

    # -- whose completions --------------------------------------------------------------------------------------------

    def learns_from_samples(self, update: int) -> bool:
        """Whether an update is on the student's own samples; alike on every rank."""
        coin = uniform(self.seed, torch.tensor([update]), torch.tensor([COIN]))
        return bool(coin < self.on_policy_fraction)

    def training_step(self, step: Step[DemonstrationBatch], batch_idx: int) -> None:
        """Take one optimizer step, on the student's completions if the coin of this update says so."""
        if self.learns_from_samples(self.updates):
            step = self.with_samples(step)
        super().training_step(step, batch_idx)

    def with_samples(self, step: Step[DemonstrationBatch]) -> Step[DemonstrationBatch]:
        """Return the step with completions that the student has sampled for its prompts, and their count of tokens."""
        batches = tuple(batch._replace(sequences=self.sampled(batch.sequences)) for batch in step.micro_batches)
        tokens = torch.tensor(float(sum(len(ids) for batch in batches for ids in batch.sequences.completions)))
        everyone = self.trainer.strategy.reduce(tokens.to(self.device).double(), reduce_op="sum")
        return step._replace(micro_batches=batches, tokens=int(everyone))

    def sampled(self, sequences: Sequences) -> Sequences:
        """Return the prompts with a completion that the student has sampled for each."""
        prompts = tuple(sequences.prompts[parent] for parent in sequences.parents)
        rows = zip(prompts, sequences.completions, strict=True)
        episodes = torch.tensor([address_of(self.updates, *row) for row in rows], dtype=torch.long)
        ends = tokenization.end_token_ids(self.tokenizer)
        ids = sample(self.policy, prompts, episodes, self.sampling, self.seed, ends).ids
        supervised = tuple(torch.ones(len(completion), dtype=torch.bool) for completion in ids)
        return Sequences(prompts, ids, tuple(range(len(ids))), supervised)

    # -- one micro-batch ----------------------------------------------------------------------------------------------

    def loss_sum(self, batch: DemonstrationBatch, meter: Meter) -> Tensor:
        """Return the summed divergences of a micro-batch's completion tokens."""
        layout = self.lay_out(batch.sequences)
        teacher_states = self._teacher_states(batch.sequences, layout)
        asked = OverLogits(layout, self._of_chunk, (layout.targets, teacher_states), self.chunk_tokens)
        found: dict[str, Tensor] = self.policy(asked)
        row = layout.cells.div(layout.completion_mask.shape[1], rounding_mode="floor")
        losses = found.pop("loss") * batch.weights.to(self.device)[row]
        meter.add("loss", losses)
        for name, values in found.items():
            meter.add(name, values)
        return losses.sum()

    def _teacher_states(self, sequences: Sequences, layout: Layout) -> Tensor:
        """Return the teacher's state before each of the student's supervised tokens."""
        read = self.teacher_sequences(sequences)
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
        """Return loss and metrics of some tokens."""
        both = common_vocabulary(student_logits, self.teacher.logits(teacher_hidden))
        logits = DistillationLogits(*both, targets)
        loss = as_loss(self.distillation_loss(logits))
        with torch.no_grad():  # after the loss, so that the backward pass does not compute them again
            measured = {
                "distill/kl_forward": forward_kl(*both),
                "distill/kl_reverse": reverse_kl(*both),
                "distill/top1_agreement": top1_agreement(*both),
            }
        return {"loss": loss.values, **measured, **loss.metrics}


def address_of(update: int, prompt: Tensor, completion: Tensor) -> int:
    """Return an episode's number for the sample of a row: a hash of the update and of all that the row says.

    Rows are cut and dealt to ranks by length, so that a place in the batch would not do.
    """
    ids = torch.cat([torch.tensor([update, len(prompt)]), prompt, completion]).long()
    digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class OnPolicyDistillationModule(OnPolicyModule):
    r"""On-policy distillation by samples: each token that the student draws is judged by the teacher's log-probability.

    A_t = log teacher(y_t | x, y_{<t}) - log student(y_t | x, y_{<t}), detached, in a policy-gradient loss, mean over
    tokens, without baseline: the k1 estimate of KL(student || teacher) token by token, no token paying for those after
    it (Lu et al. 2025, "On-Policy Distillation"). Of either model one log-probability a token is all that is needed,
    never a whole distribution. Where the student is the teacher every advantage is 0.

    The teacher stands where other on-policy modules have their reference: ``rollout/kl`` is KL(student || teacher) of
    whole completions, ``distill/kl_reverse`` the same per token.

    Target: the teacher, where every advantage is 0.

    Args:
        teacher: hub id or folder of the policy to learn from. It must have the student's tokenizer.
        scorer: measures completions (``rollout/score``), which nothing is learned from; null measures none.

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
        given = ZeroScorer() if scorer is None else scorer
        super().__init__(
            scorer=given, ppo_epochs=ppo_epochs, learning_rate=learning_rate, kl_coef=0.0, kl_target=None, **kwargs
        )
        self.teacher_name, self.scores_nothing = teacher, scorer is None

    def load_models(self) -> None:
        """Load the student to train and the teacher frozen, in the reference's place."""
        super().load_models()
        self.teacher = Teacher(self.teacher_name, self.tokenizer, self.load_settings)
        self.reference = self.teacher  # type: ignore[assignment]

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        """Return the score on the last token of each completion, which is logged and not learned from."""
        return token_rewards(rollout.scores, self.reward_kl(rollout), rollout.completion_mask, self.kl_coef)

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        """Return what the teacher thinks of each token beyond what the student does."""
        assert rollout.reference_logprobs is not None
        mask = rollout.completion_mask
        return Advantages(distillation_advantages(rollout.reference_logprobs, rollout.old_logprobs, mask), None)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the teacher, where every advantage is 0."""
        return problem.teacher

    def measure_rollout(self, rollout: Rollout, meter: Meter) -> None:
        """Add the reverse KL per token, and leave out scores where nothing gives any."""
        super().measure_rollout(rollout, meter)
        assert rollout.reference_logprobs is not None
        meter.add(
            "distill/kl_reverse", kl_k1(rollout.old_logprobs, rollout.reference_logprobs), rollout.completion_mask
        )
        if self.scores_nothing:
            for name in ("score", "score_squared", "score_missing"):
                meter.forget(f"rollout/{name}")

    def check_rollout(self, rollout: Rollout) -> None:
        """Check the rollout; what it is compared with is no copy of the policy, so the first KL may be anything."""
        self.invariants.check_lengths(rollout)
        self.invariants.check_sampler(rollout)
