"""Self-distillation: the teacher is the policy with extra context: feedback, a demonstration or an instruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from string import Formatter
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from rlhf_lightning import tokenization
from rlhf_lightning.errors import DataError, SettingError
from rlhf_lightning.models.frozen import CurrentPolicy, Teacher
from rlhf_lightning.models.layout import cut_sequences, select
from rlhf_lightning.models.limits import limits_of
from rlhf_lightning.models.sharding import most_passes
from rlhf_lightning.modules.distillation import DivergenceObjective
from rlhf_lightning.scoring import Scorer
from rlhf_lightning.scoring.scorer import ZeroScorer
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.rollout import RolloutModule
from rlhf_lightning.types import EnumeratedProblem, Message, Prompt, PromptBatch, Rollout, Sequences

FEEDBACK = "Feedback on an earlier answer:\n{feedback}\n\nAnswer again."
"""Default text that is added to the teacher's prompt."""


class SelfDistillationModule(DivergenceObjective, RolloutModule):
    r"""Self-distillation: the policy learns to write what it would write with feedback or instructions in its prompt.

    loss = (1/N) \sum_{rows} \sum_t KL(policy(. | x, y_{<t}) || teacher(. | x, c, y_{<t})) on the policy's samples y,
    without gradient through sampling and teacher. By default the teacher is the policy itself. The context c is a text
    that only the teacher reads. It can be what the scorer or the environment says about y (SDPO, 2601.20802, Eq. 1), a
    column of the data such as a demonstration (SDFT, Shenfeld et al. 2026, 2601.19897), or a constant (context
    distillation, Snell et al. 2022, 2209.15189). N counts the tokens of all completions with a context; completions
    without context are skipped. If c is empty and the teacher is the policy, loss and gradient are 0.

    ``distill/taught`` is the share of completions with a context. The teacher's prompts are longer than the student's,
    so micro-batches are sized by the teacher's sequences.

    Target: the teacher with its context, on every prefix that the policy samples.

    Args:
        context: text added to the teacher's prompt, or a list of texts; a text is used if all its fields are known.
            Fields in braces: ``feedback`` (the judgement in words), ``solution`` (the best other completion of the
            prompt with a score of at least ``success``), ``completion`` (the policy's own), and columns of the data.
        place: "after" adds the text to the prompt's last user turn; "system" to its system turn.
        teacher: "policy" for the current policy; "ema" for its moving average; "start" for the model that training
            started from; or the hub id or folder of a model with the same tokenizer.
        ema_decay: weight of the old moving average in each update.
        success: minimum score of a completion to be a ``solution`` for others.
        beta: the teacher's share of the mixture in the divergence: 1 is KL(policy || teacher), 0 KL(teacher || policy).
        top_k: number of the policy's likeliest tokens to compare, with all others merged into one; null compares all.
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
        super().__init__(
            scorer=ZeroScorer() if scorer is None else scorer, ppo_epochs=ppo_epochs, learning_rate=learning_rate,
            early_stop_kl=None, **kwargs,
        )  # fmt: skip
        if place not in ("after", "system"):
            raise SettingError("unknown-choice", f"place is {place!r}; choose 'after' or 'system'")
        self.templates = {text: fields_of(text) for text in ([context] if isinstance(context, str) else context)}
        if not self.templates:
            raise SettingError("missing-setting", "context has no text: set the text that the teacher reads")
        self.place, self.teacher_kind, self.ema_decay, self.success = place, teacher, ema_decay, success
        self.beta, self.top_k, self.chunk_tokens = beta, top_k, chunk_tokens
        self.softmax_temperature = self.sampling.temperature
        self.teacher_name = None if teacher in ("policy", "ema", "start") else teacher

    @property
    def samples_ahead(self) -> bool:
        return True

    @property
    def holds_reference(self) -> bool:
        """Whether the teacher is a copy of the policy: a moving average or the starting weights."""
        return self.teacher_kind in ("ema", "start")

    @property
    def reference_moves(self) -> bool:  # type: ignore[override]
        """Whether the teacher is the policy's moving average."""
        return self.teacher_kind == "ema"

    def load_reference_and_scorer(self) -> None:
        """Load teacher and scorer; a teacher with the policy's own weights is also the reference."""
        super().load_reference_and_scorer()
        own = CurrentPolicy(self.policy) if self.reference is None else self.reference
        named = self.teacher_name
        self.teacher = own if named is None else Teacher(named, self.tokenizer, self.load_settings)

    def frozen_models(self) -> Sequence[nn.Module]:
        named = self.teacher.models if isinstance(self.teacher, Teacher) else ()
        return (*super().frozen_models(), *named)

    # -- the teacher's context ----------------------------------------------------------------------------------------

    def contexts(self, rollout: Rollout) -> list[str | None]:
        """Return the text that is added to the teacher's prompt for each completion; None if there is none."""
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
        """Return the teacher's sequences, and the rows to learn from.

        A row is left out if it has no context, its prompt has no token, or its sequence exceeds the model's positions.
        """
        texts, prompts = self.contexts(rollout), list(rollout.sequences.prompts)
        most, taught = limits_of(self.policy.model).positions, []
        for row, text in enumerate(texts):
            if text is None:
                continue
            told = with_context(rollout.prompts[row], text, self.place)
            ids = torch.tensor(tokenization.encode_prompt(self.tokenizer, told))
            if len(ids) and (most is None or len(ids) + len(rollout.sequences.completions[row]) <= most):
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
                "The teacher has no text for any completion of the first rollout, so the policy is not trained on it: "
                f"the scorer gives no feedback, or no completion scores {self.success:g} (model.context, "
                "model.success)."
            )
        for rows in self.minibatches(rollout, meter):
            mine = sorted(set(rows) & set(taught))
            count = self.sum_over_ranks(rollout.completion_mask[mine].sum())
            norm = self.update(self._losses(rollout, read, mine, meter), count, meter)
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
        """Record the rollout's metrics, and on held-out prompts also the divergences."""
        super().measure_rollout(rollout, meter)
        if meter is self._evaluation:
            for loss in self._losses(rollout, *self.read_by_teacher(rollout), meter):
                loss()

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return problem.teacher if self.teacher_name is not None else None


def fields_of(text: str) -> list[str]:
    """Return the field names in braces of a text.

    Raises:
        SettingError: a field name is not an identifier, or the braces are not balanced.
    """
    try:
        fields = [name for _, name, form, change in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise SettingError("wrong-context", f"context is {text!r}: {error}; write a literal brace twice") from error
    for name in fields:
        if not name.isidentifier():
            raise SettingError(
                "wrong-context",
                f"context is {text!r}, and {{{name}}} is empty: write {{feedback}}, {{solution}}, {{completion}} "
                "or the name of a column; write a literal brace twice",
            )
    return fields


def _known(given: Mapping[str, Any], name: str) -> bool:
    if name not in given:
        raise DataError(
            "missing-data-column",
            f"context names {{{name}}}, which is not feedback, solution, completion or a data column "
            f"({', '.join(sorted(set(given) - {'feedback', 'solution', 'completion'})) or 'it has none'})",
        )
    return given[name] not in (None, "")


def solutions_of(rollout: Rollout, success: float) -> list[str | None]:
    """Return for each completion the best other completion of its prompt that scores at least ``success``, or None."""
    scores, group = rollout.scores.tolist(), rollout.group.tolist()
    found: list[str | None] = []
    for row, mine in enumerate(group):
        others = [other for other, its in enumerate(group) if its == mine and other != row and scores[other] >= success]
        found.append(rollout.texts[max(others, key=lambda other: scores[other])] if others else None)
    return found


def with_context(prompt: Prompt, text: str, place: str) -> Prompt:
    """Return the prompt with a text added to its last user turn ("after") or to its system turn ("system")."""
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
