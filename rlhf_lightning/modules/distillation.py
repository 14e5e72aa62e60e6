"""Distillation: a student learns a teacher's distributions, on given completions or on its own samples.

The teacher is another model, or the policy itself after it has read more: feedback, a demonstration, an instruction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from string import Formatter
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from rlhf_lightning import tokenization
from rlhf_lightning.errors import ContractError, DataError, SettingError
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
from rlhf_lightning.models.frozen import CurrentPolicy, FrozenPolicy, Teacher
from rlhf_lightning.models.layout import Layout, cut_sequences, select
from rlhf_lightning.models.limits import limits_of
from rlhf_lightning.models.sharding import most_passes
from rlhf_lightning.sampling.drawing import uniform
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import sample
from rlhf_lightning.scoring import Scorer
from rlhf_lightning.scoring.scorer import ZeroScorer
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import AlignmentModule, as_loss
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.training.rollout import RolloutModule
from rlhf_lightning.types import (
    Advantages,
    DemonstrationBatch,
    DistillationLogits,
    EnumeratedProblem,
    Loss,
    Message,
    Prompt,
    PromptBatch,
    Rollout,
    Sequences,
    Step,
)

FEEDBACK = "Feedback on an earlier answer:\n{feedback}\n\nAnswer again."
"""What a teacher reads by default."""

COIN = 2**32 - 1
"""Position that addresses an update's coin; no completion is that long."""


class DivergenceObjective(AlignmentModule):
    """Base of objectives on whole next-token distributions of student and teacher. Subclasses set the attributes."""

    beta: float
    softmax_temperature: float
    chunk_tokens: int
    top_k: int | None = None
    teacher: FrozenPolicy

    def distillation_loss(self, logits: DistillationLogits) -> Tensor | Loss:
        """Return one loss per token, shape (tokens,).

        It is called with a chunk of a micro-batch's completion tokens, and once more in the backward pass.
        """
        student, teacher, temperature = logits.student_logits, logits.teacher_logits, self.softmax_temperature
        if self.top_k is None:
            return generalized_jsd(student, teacher, self.beta, temperature)
        return generalized_jsd(*top_k_and_rest(student, teacher, self.top_k, temperature), self.beta)

    def divergence_sum(self, sequences: Sequences, read: Sequences, weights: Tensor, meter: Meter) -> Tensor:
        """Return the weighted sum of the losses of completions.

        Args:
            sequences: what the student reads.
            read: what the teacher reads: the same completions, with the same or other prompts.
            weights: of each completion, shape (completions,).
            meter: gets loss and divergences, means over tokens.
        """
        layout = self.lay_out(sequences)
        asked = OverLogits(
            layout, self._of_chunk, (layout.targets, self._teacher_states(sequences, read, layout)), self.chunk_tokens
        )
        policy: Any = self.model
        found: dict[str, Tensor] = policy(asked)
        row = layout.cells.div(layout.completion_mask.shape[1], rounding_mode="floor")
        losses = found.pop("loss") * weights.to(self.device)[row]
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
        """Return loss and metrics of some tokens."""
        both = common_vocabulary(student_logits, self.teacher.logits(teacher_hidden))
        logits = DistillationLogits(*both, targets)
        loss = as_loss(self.distillation_loss(logits))
        with torch.no_grad():  # after the loss, so that the backward pass does not recompute them
            measured = {
                "distill/kl_forward": forward_kl(*both),
                "distill/kl_reverse": reverse_kl(*both),
                "distill/top1_agreement": top1_agreement(*both),
            }
        return {"loss": loss.values, **measured, **loss.metrics}


class GKDModule(DivergenceObjective, OfflineModule):
    r"""Generalized knowledge distillation: the divergence of the student's next-token distribution from the teacher's.

    loss = (1/N) \sum_{rows} w \sum_t D_beta(teacher || student)(. | x, y_{<t}) with D_beta = beta KL(P || M) + (1 -
    beta) KL(Q || M), P the teacher, Q the student and M = beta P + (1 - beta) Q (Agarwal et al., arXiv 2306.13649, Eq.
    1 and Algorithm 1); beta 0 and 1 are KL(P || Q) and KL(Q || P). N is the number of completion tokens of the whole
    optimizer step. When the student equals the teacher, loss and gradient are 0.

    With probability ``on_policy_fraction`` an optimizer step learns on completions that the student samples for the
    step's prompts, without gradient through the sampling; otherwise it learns on the data's completions. This choice
    depends on seed and update alone, and a sample on seed, update and its row's ids. So ranks, micro-batches and
    resuming do not change them. Validation uses the data's completions.

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

        Context distillation adds instructions to the prompt here, which the student does not see. Longer prompts make
        the teacher's forward pass larger than ``data.max_tokens``.
        """
        return sequences

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return problem.teacher

    # -- whose completions --------------------------------------------------------------------------------------------

    def learns_from_samples(self, update: int) -> bool:
        """Whether an update learns on the student's own samples; every rank decides alike."""
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
        """Return the prompts with a completion that the student samples for each."""
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
    """Return the episode number of a row's sample: a hash of the update and the row's ids.

    The row's place in the batch would depend on ranks and micro-batches.
    """
    ids = torch.cat([torch.tensor([update, len(prompt)]), prompt, completion]).long()
    digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class OnPolicyDistillationModule(OnPolicyModule):
    r"""On-policy distillation: the advantage of each token that the student samples is the teacher's log-ratio.

    A_t = log teacher(y_t | x, y_{<t}) - log student(y_t | x, y_{<t}), without gradient, in a policy-gradient loss, mean
    over tokens, without baseline (Lu et al. 2025, "On-Policy Distillation"). It is minus the k1 estimate of
    KL(student || teacher) of each token; later tokens do not enter. It needs one log-probability per token, not whole
    distributions. When the student equals the teacher, every advantage is 0.

    The teacher takes the place of the reference: ``rollout/kl`` is KL(student || teacher) of whole completions, and
    ``distill/kl_reverse`` the same per token.

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
        given = ZeroScorer() if scorer is None else scorer
        super().__init__(
            scorer=given, ppo_epochs=ppo_epochs, learning_rate=learning_rate, kl_coef=0.0, kl_target=None,
            kl_horizon=1, kl_place="reward", kl_estimator="k1", kl_times_ratio=False, kl_clamp=None,
            overlong_buffer=None, **kwargs,
        )  # fmt: skip
        self.teacher_name, self.scores_nothing = teacher, scorer is None

    def load_models(self) -> None:
        """Load the student to train and, in the reference's place, the frozen teacher."""
        super().load_models()
        self.teacher = Teacher(self.teacher_name, self.tokenizer, self.load_settings)
        self.reference = self.teacher  # type: ignore[assignment]

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        """Return the score on the last token of each completion, for the metrics alone."""
        return token_rewards(rollout.scores, self.reward_kl(rollout), rollout.completion_mask, self.kl_coef)

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        assert rollout.reference_logprobs is not None
        mask = rollout.completion_mask
        return Advantages(distillation_advantages(rollout.reference_logprobs, rollout.old_logprobs, mask), None)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return problem.teacher

    def measure_rollout(self, rollout: Rollout, meter: Meter) -> None:
        """Add the reverse KL per token, and drop scores where there is no scorer."""
        super().measure_rollout(rollout, meter)
        assert rollout.reference_logprobs is not None
        meter.add(
            "distill/kl_reverse", kl_k1(rollout.old_logprobs, rollout.reference_logprobs), rollout.completion_mask
        )
        if self.scores_nothing:
            for name in ("score", "score_squared", "score_missing"):
                meter.forget(f"rollout/{name}")

    def check_rollout(self, rollout: Rollout) -> None:
        """Check lengths and sampler; the first KL may have any value, as the teacher is not a copy of the policy."""
        self.invariants.check_lengths(rollout)
        self.invariants.check_sampler(rollout)


class SelfDistillationModule(DivergenceObjective, RolloutModule):
    r"""Self-distillation: the policy learns to write what it would write after reading feedback or instructions.

    loss = (1/N) \sum_{rows} \sum_t KL(policy(. | x, y_{<t}) || teacher(. | x, c, y_{<t})) on the policy's samples y,
    without gradient through sampling and teacher. The teacher is by default the policy itself, and c a text that only
    the teacher reads: what the scorer or the environment says about y (SDPO, 2601.20802, Eq. 1), a column of the data
    such as a demonstration (SDFT, Shenfeld et al. 2026, 2601.19897), or a constant (context distillation, Snell et al.
    2022, 2209.15189). N counts the tokens of all completions with such a text; the others are not learned from. If c
    is empty and the teacher is the policy, loss and gradient are 0.

    ``distill/taught`` is the share of completions with a text. The teacher reads prompts that are longer than the
    student's; micro-batches are cut by what the teacher reads.

    Target: the teacher with its text, on every prefix that the policy samples.

    Args:
        context: what the teacher reads in addition: one text, or several; a text applies where its fields are known.
            Fields in braces: ``feedback`` (the judgement in words), ``solution`` (the best other completion of the
            prompt with a score of at least ``success``), ``completion`` (the policy's own), and columns of the data.
        place: "after" adds the text to the prompt's last turn of the user; "system" to its system turn.
        teacher: "policy" for the policy of now; "ema" for its moving average; "start" for the model that training
            started from; or the hub id or folder of a model with the same tokenizer.
        ema_decay: share of the moving average that an update keeps.
        success: score from which a completion is a ``solution`` for others.
        beta: the teacher's share of the mixture in the divergence: 1 is KL(policy || teacher), 0 KL(teacher || policy).
        top_k: likeliest ids of the policy to compare one by one, all others counting as one; null for all.
        chunk_tokens: tokens whose logits are in memory at a time.
        scorer: judges completions, see `RolloutModule`; null for no judgements.

    Raises:
        SettingError: ``context`` has no text, or a field in braces has a wrong name.
    """

    paper = "Hübotter et al. 2026, arXiv 2601.20802"
    ranges = {
        "beta": "[0, 1]", "ema_decay": "[0, 1]", "success": "(-inf, inf)", "top_k": "[1, inf)",
        "chunk_tokens": "[1, inf)",
    }  # fmt: skip
    needs_reference = False
    sampler_correction = "bypass"  # the loss needs no old log-probabilities
    headline_metrics = ("rollout/score", "distill/kl_reverse", "val/score", "val/distill/kl_reverse")

    def __init__(
        self, context: str | list[str] = FEEDBACK, place: Literal["after", "system"] = "after",
        teacher: str = "policy", ema_decay: float = 0.95, success: float = 1.0, beta: float = 1.0,
        top_k: int | None = None, chunk_tokens: int = 1024, scorer: Scorer | str | None = None,
        ppo_epochs: int = 1, learning_rate: float = 1e-6, **kwargs: Any,
    ) -> None:  # fmt: skip
        given = ZeroScorer() if scorer is None else scorer
        super().__init__(scorer=given, ppo_epochs=ppo_epochs, learning_rate=learning_rate, early_stop_kl=None, **kwargs)
        if place not in ("after", "system"):
            raise SettingError("unknown-choice", f"place is {place!r}; choose 'after' or 'system'")
        self.templates = {text: fields_of(text) for text in ([context] if isinstance(context, str) else context)}
        if not self.templates:
            raise SettingError("missing-setting", "context has no text: set what the teacher reads")
        self.place, self.teacher_kind, self.ema_decay, self.success = place, teacher, ema_decay, success
        self.beta, self.top_k, self.chunk_tokens = beta, top_k, chunk_tokens
        self.softmax_temperature, self.scores_nothing = self.sampling.temperature, scorer is None
        self.teacher_name = None if teacher in ("policy", "ema", "start") else teacher

    @property
    def samples_ahead(self) -> bool:
        return True

    @property
    def holds_reference(self) -> bool:
        """Whether the teacher is a copy of the policy that follows it or stays where it started."""
        return self.teacher_kind in ("ema", "start")

    @property
    def reference_moves(self) -> bool:  # type: ignore[override]
        """Whether the teacher is the policy's moving average."""
        return self.teacher_kind == "ema"

    def load_reference_and_scorer(self) -> None:
        """Load teacher and scorer; a teacher of the policy's own weights is the reference too."""
        super().load_reference_and_scorer()
        own = CurrentPolicy(self.policy) if self.reference is None else self.reference
        named = self.teacher_name
        self.teacher = own if named is None else Teacher(named, self.tokenizer, self.load_settings)

    def frozen_models(self) -> Sequence[nn.Module]:
        named = self.teacher.models if isinstance(self.teacher, Teacher) else ()
        return (*super().frozen_models(), *named)

    # -- what the teacher reads ---------------------------------------------------------------------------------------

    def contexts(self, rollout: Rollout) -> list[str | None]:
        """Return the text that the teacher reads beyond the prompt of each completion; None if there is none."""
        solutions = solutions_of(rollout, self.success)
        found: list[str | None] = []
        for row, text in enumerate(rollout.texts):
            given = {name: values[row] for name, values in rollout.columns.items()}
            feedback = rollout.feedback[row] if rollout.feedback else None
            given |= {"completion": text, "solution": solutions[row], "feedback": feedback}
            known = [one for one, fields in self.templates.items() if all(_known(given, name) for name in fields)]
            silent = any(self.templates.values()) and not any(self.templates[one] for one in known)
            found.append(None if silent else "\n\n".join(one.format(**given) for one in known))
        return found

    def read_by_teacher(self, rollout: Rollout) -> tuple[Sequences, list[int]]:
        """Return what the teacher reads, and the rows that it has a text for and enough positions."""
        texts, prompts = self.contexts(rollout), list(rollout.sequences.prompts)
        most, taught = limits_of(self.policy.model).positions, []
        for row, text in enumerate(texts):
            if text is None:
                continue
            told = with_context(rollout.prompts[row], text, self.place)
            ids = torch.tensor(tokenization.encode_prompt(self.tokenizer, told))
            if most is None or len(ids) + len(rollout.sequences.completions[row]) <= most:
                prompts[row] = ids
                taught.append(row)
        return rollout.sequences._replace(prompts=tuple(prompts)), taught

    # -- one rollout --------------------------------------------------------------------------------------------------

    def learn(self, rollout: Rollout, batch: PromptBatch, meter: Meter) -> float:
        self.check_rollout(rollout)
        self.measure_rollout(rollout, meter)
        read, taught = self.read_by_teacher(rollout)
        everyone, norm = torch.zeros(len(rollout.texts), dtype=torch.float64, device=self.device), 0.0
        everyone[taught] = 1.0
        meter.add("distill/taught", everyone)
        if self.rollouts == 0 and not float(self.sum_over_ranks(everyone.sum())):
            rank_zero_warn(
                "The teacher has no text for any completion of the first rollout, so nothing is learned from it: the "
                f"scorer gives no feedback, or no completion scores {self.success:g} (model.context, model.success)."
            )
        for rows in self.minibatches(rollout, meter):
            mine = sorted(set(rows) & set(taught))
            count = float(self.sum_over_ranks(rollout.completion_mask[mine].sum()))
            norm = self.update(self._losses(rollout, read, mine, meter), count)
            if self.teacher_kind == "ema" and self.reference is not None:
                self.reference.follow(1 - self.ema_decay)
        return norm

    def _losses(self, rollout: Rollout, read: Sequences, rows: list[int], meter: Meter) -> list[Callable[[], Tensor]]:
        """Return the summed loss of each micro-batch as a function; a rank without rows makes passes of weight 0."""

        def loss(cut: list[int], weight: float, meter: Meter) -> Tensor:
            student, teacher = (select(sequences, cut) for sequences in (rollout.sequences, read))
            return self.divergence_sum(student, teacher, torch.full((len(cut),), weight), meter)

        cuts = cut_sequences(read, rows, self.limits, self.packs_rows) if rows else []
        unused, missing = Meter(), max(most_passes(self.policy, len(cuts)), 1) - len(cuts)

        def nothing() -> Tensor:
            value = loss([0], 0.0, unused)
            meter.add_nothing(unused)
            return value

        return [nothing] * missing + [partial(loss, cut, 1.0, meter) for cut in cuts]

    def measure_rollout(self, rollout: Rollout, meter: Meter) -> None:
        """Add divergences of held-out prompts, and drop scores where there is no scorer."""
        super().measure_rollout(rollout, meter)
        if meter is self._evaluation:
            for loss in self._losses(rollout, *self.read_by_teacher(rollout), meter):
                loss()
        if self.scores_nothing and "environment" not in rollout.parts:
            for name in ("score", "score_squared"):
                meter.forget(f"rollout/{name}")

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return problem.teacher if self.teacher_name is not None else None


def fields_of(text: str) -> list[str]:
    """Return the names in braces of a text.

    Raises:
        SettingError: a field has a wrong name.
    """
    try:
        fields = [name for _, name, form, change in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise SettingError("wrong-context", f"context is {text!r}: {error}; write a literal brace twice") from error
    for name in fields:
        if not name.isidentifier():
            raise SettingError(
                "wrong-context",
                f"context is {text!r}, and {{{name}}} names nothing: write {{feedback}}, {{solution}}, {{completion}} "
                "or the name of a column; write a literal brace twice",
            )
    return fields


def _known(given: Mapping[str, Any], name: str) -> bool:
    if name not in given:
        raise DataError(
            "missing-data-column",
            f"context names {{{name}}}, which is neither feedback, solution, completion nor a column of the data "
            f"({', '.join(sorted(set(given) - {'feedback', 'solution', 'completion'})) or 'it has none'})",
        )
    return given[name] not in (None, "")


def solutions_of(rollout: Rollout, success: float) -> list[str | None]:
    """Return for each completion the best other one of its prompt that scores ``success`` or more; None without one."""
    scores, group = rollout.scores.tolist(), rollout.group.tolist()
    found: list[str | None] = []
    for row, mine in enumerate(group):
        others = [other for other, its in enumerate(group) if its == mine and other != row and scores[other] >= success]
        found.append(rollout.texts[max(others, key=lambda other: scores[other])] if others else None)
    return found


def with_context(prompt: Prompt, text: str, place: str) -> Prompt:
    """Return a prompt with further text after its last turn of the user, or in its system turn."""
    if isinstance(prompt, str):
        return f"{prompt}\n\n{text}" if place == "after" else f"{text}\n\n{prompt}"
    turns = [dict(turn) for turn in prompt]
    role = "user" if place == "after" else "system"
    at = max((index for index, turn in enumerate(turns) if turn["role"] == role), default=None)
    if at is None:
        tools = {"tools": turns[0].pop("tools")} if "tools" in turns[0] else {}
        first: list[Message] = [{"role": role, "content": text, **tools}]
        return first + turns if place == "system" else turns + first
    turns[at]["content"] = f"{turns[at]['content']}\n\n{text}"
    return turns
