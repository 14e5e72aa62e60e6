"""Sample tables: completions of a few fixed prompts during training, for loggers and samples.jsonl."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.compat import attached_datamodule
from rlhf_lightning.errors import check_range
from rlhf_lightning.runs.loggers import log_table
from rlhf_lightning.runs.run import aligned, check_period, passes_multiple, run_folder, updates_of
from rlhf_lightning.sampling.engines import Completions, SamplingSettings
from rlhf_lightning.sampling.json_server import ServerError
from rlhf_lightning.scoring.faults import ScorerFailedError
from rlhf_lightning.scoring.judges.judge import turn_text
from rlhf_lightning.scoring.scorer import BadScoresError, MissingColumnError, ask_scorer, unmoved
from rlhf_lightning.types import Prompt

UNSCORABLE = (TypeError, KeyError, BadScoresError, MissingColumnError, ScorerFailedError, ServerError)
LONGEST_CELL = 600
"""Maximum characters of a prompt or completion in the table; samples.jsonl has the full text."""


class SampleTable(Callback):
    """Sample completions of the same few prompts before, during and after training.

    Random numbers depend on (seed, episode, position) only, so tables differ only by the policy. The prompts are
    held-out rows if there are any. Stages without a policy have no table.

    Args:
        prompts: number of prompts; 0 turns the table off.
        every_n_updates: also sample every this many updates (in addition to start, validations and end).
        max_new_tokens: longest completion in tokens; null uses the module's limit.
        temperature: softmax temperature, 0 for greedy decoding; null uses the module's temperature.
        seed: seed of the sampling.
    """

    def __init__(
        self,
        prompts: int = 4,
        every_n_updates: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range(prompts >= 0, "give 0 (off) or more", **{"samples.prompts": prompts})
        check_period("samples.every_n_updates", every_n_updates)
        length, heat = {"samples.max_new_tokens": max_new_tokens}, {"samples.temperature": temperature}
        check_range(max_new_tokens is None or 1 <= max_new_tokens < 2**31, "give 1 or more, below 2147483648", **length)
        check_range(temperature is None or temperature >= 0, "give 0 (greedy) or more", **heat)
        self.count = prompts
        self.every_n_updates = every_n_updates
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self.prompts: list[Prompt] = []
        self.columns: dict[str, list[Any]] = {}
        self._sampled_at: int | None = None
        self._resumed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample before the first update."""
        datamodule = attached_datamodule(trainer)
        if self.count == 0 or not aligned(pl_module).has_policy or not hasattr(datamodule, "examples"):
            return
        examples = datamodule.examples(self.count)
        self.prompts = [prompt for prompt, _ in examples]
        names = dict.fromkeys(name for _, columns in examples for name in columns)
        self.columns = {name: [columns.get(name) for _, columns in examples] for name in names}
        if not self._resumed:
            self.sample(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the update at which the policy was last sampled."""
        if self.prompts:
            checkpoint["samples"] = {"sampled_at": self._sampled_at}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore this update on every rank, because all ranks must sample together."""
        if "samples" in checkpoint:
            self._sampled_at, self._resumed = checkpoint["samples"]["sampled_at"], True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample when the period has passed."""
        sampled_at = self._sampled_at
        if sampled_at is not None and passes_multiple(sampled_at, updates_of(pl_module), self.every_n_updates):
            self.sample(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample from the validated weights."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample from the final policy."""
        self.sample(trainer, pl_module)

    def sample(self, trainer: Trainer, module: LightningModule) -> None:
        """Sample and log, at most once per update. Every rank samples, because a sharded policy needs all ranks."""
        updates = updates_of(module)
        if not self.prompts or updates == self._sampled_at:
            return
        self._sampled_at = updates
        rules = getattr(attached_datamodule(trainer), "multi_turn", None)
        conversation = {} if rules is None else {"multi_turn": rules, "columns": self.columns}
        settings = self.settings(aligned(module).sampling)
        answers = aligned(module).answer(self.prompts, settings, self.seed, **conversation)
        scores = self._scores(module, answers)
        finished, lengths = map(bool, answers.finished), answers.lengths
        columns = zip(self.prompts, answers.texts, scores, finished, lengths, strict=True)
        names = ("prompt", "completion", "score", "finished", "length")
        rows: list[dict[str, Any]] = [{"update": updates, **dict(zip(names, row, strict=True))} for row in columns]
        for row, one in zip(rows, answers.transcripts, strict=False):
            row |= {"completion": as_text(list(one.messages)), "turns": len(one.ends), "messages": list(one.messages)}
        folder = run_folder(trainer)
        if folder.writes:
            folder.samples.append(rows)
            shown = [{**row, "prompt": as_text(row["prompt"])} for row in rows]
            for logger in trainer.loggers:
                log_table(logger, "samples", shown, as_table(rows), updates)

    def settings(self, own: SamplingSettings) -> SamplingSettings:
        """Return the module's sampling settings, with this callback's settings applied."""
        given: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        return replace(own, **{name: value for name, value in given.items() if value is not None})

    def _scores(self, module: LightningModule, answers: Completions) -> list[float | None]:
        """Return the scores including the environment's rewards; None for a completion without a score."""
        scorer, texts = aligned(module).scorer, list(answers.texts)
        if scorer is None:
            return [None] * len(texts)
        try:
            with unmoved(scorer):
                asked = answers.asked(self.prompts)
                found = ask_scorer(scorer, asked, texts, self.columns, type(scorer).__name__)
        except UNSCORABLE:
            return [None] * len(texts)
        rewards = [one.reward for one in answers.transcripts] or [0.0] * len(texts)
        both = zip(found.scores.tolist(), rewards, strict=True)
        return [None if math.isnan(score + paid) else score + paid for score, paid in both]


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    lines = ["| prompt | completion | score | finished | length |", "|---|---|---|---|---|"]
    for row in rows:
        score = "" if row["score"] is None else f"{row['score']:.3f}"
        finished = "yes" if row["finished"] else "no"
        cells = (cell(as_text(row["prompt"])), cell(row["completion"]), score, finished, str(row["length"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_text(prompt: Prompt) -> str:
    """Return a prompt as text, with one line for each turn of a conversation."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn_text(turn)}" for turn in prompt)


def cell(text: str) -> str:
    """Return text as a table cell: shortened, and escaped for Markdown and HTML."""
    if len(text) > LONGEST_CELL:
        text = text[: LONGEST_CELL - 1] + "…"
    text = re.sub(r"([\\`*_{}\[\]()#+\-.!|~])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"\r\n|\r|\n", "<br>", text) or "(empty)"
