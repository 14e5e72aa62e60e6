"""The canonical row that all forms are converted to, the reasons to refuse a row, and counts of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf_lightning.errors import DataError, RlhfError
from rlhf_lightning.types import Message, Prompt

Row = Mapping[str, Any]

ROLES = {
    "user": "user", "human": "user", "system": "system", "developer": "developer",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant",
}  # fmt: skip
"""Accepted roles, and the canonical role of each. Others are refused, because a role becomes part of the prompt."""

REASONS = {
    "unreadable_line": "the line is not a JSON object in UTF-8, or not a row of its table",
    "duplicate_key": "an object has a duplicate key",
    "row_too_large": "the row has more bytes than max_row_bytes of its source (8 MiB unless set) allows",
    "too_deep": "lists or objects are nested deeper than 64 levels",
    "broken_text": "the text is not valid Unicode: invalid UTF-8, or a lone surrogate",
    "missing_columns": "a required column is missing",
    "empty_prompt": "the prompt is empty, or not text",
    "empty_completion": "a completion is empty, or not text",
    "empty_turn": "a turn is empty",
    "no_messages": "the list of messages is empty",
    "malformed_messages": "the messages are not a list of {role, content}",
    "json_text": "a column holds messages as JSON text that cannot be read, or only some columns do; store lists",
    "media": "it has images, audio or video, which are not read; remove them, or rename their column",
    "unknown_role": "a role is not one of " + ", ".join(sorted(set(ROLES.values()))),
    "bad_tool_call": "a tool call or the description of a tool is not {name, arguments}, or not valid JSON, or tools "
    "are described in two ways, or in a later turn than the first",
    "tools_without_messages": "tools are described, but the prompt is plain text; use messages, or set as_chat",
    "bad_template_args": "chat_template_kwargs is not an object of variables of the chat template; tools have a column "
    "of their own, and documents are a list of objects",
    "bad_turn_weight": "weight, train, trainable, loss_mask or loss of a turn is not true, false or a number from 0 "
    "up; in preferences, and in answers that the prompt begins, it is true or false",
    "trained_turn": "a turn that is not the assistant's is marked as trained, which is not supported",
    "two_systems": "the system column and a system turn differ",
    "bad_history": "history is not a list of messages, or of pairs of a question and an answer",
    "no_user_turn": "the prompt has no user turn",
    "no_assistant_turn": "the conversation has no assistant turn",
    "no_learned_turn": "every assistant turn is marked as not trained",
    "prompts_differ": "chosen and rejected answer different prompts",
    "turns_do_not_alternate": "a transcript's turns do not alternate",
    "inline_role_marker": "a transcript's turn holds another role marker",
    "identical_completions": "chosen equals rejected, as text or as tokens",
    "identical_after_truncation": "truncation makes chosen and rejected equal; raise max_length",
    "bad_label": "the label must be one of true, false, 1, 0 and -1",
    "bad_vote": "a vote on two completions must be one of 1, 2, 0 and tie",
    "bad_step_labels": "the labels are not one number between 0 and 1, or null, for each step",
    "bad_number": "preference, margin, weight or a rank is not a number in its range",
    "bad_data_column": "a column that the objective asks for does not hold a number",
    "single_completion": "a ranked list needs at least two completions",
    "too_many_completions": "a ranked list has more than 256 completions",
    "all_tied": "all completions of a ranked list have the same rank",
    "template_refuses": "the chat template refuses the turns",
    "turn_after_answer": "the chat template writes earlier turns after the answer",
    "turns_merged": "the chat template merges two consecutive assistant turns; join them",
    "turn_left_out": "the chat template leaves out a turn",
    "thought_left_out": "the chat template leaves out the thought of a trained turn",
    "thought_closed": "the generation prompt closes the thinking block, but the turn has a thought; "
    "see enable_thinking in template_args",
    "tools_left_out": "the chat template leaves out the descriptions of tools",
    "documents_left_out": "the chat template leaves out documents; rename their column if the prompt needs none",
    "tool_calls_left_out": "the chat template leaves out tool calls",
    "prompt_not_continued": "the chat template renders the answer so that it does not continue its prompt",
    "control_token_read": "a turn contains a control token that the chat template acts on",
    "nothing_supervised": "no supervised token is left after truncation",
}
"""The meaning of each reason for dropping a row."""


class RowRefused(RlhfError):
    """A row cannot be used.

    Args:
        reason: a key of `REASONS`, which is the error's code.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason, REASONS.get(reason, reason))
        self.args = (reason,)  # unpickling calls the constructor with these


@dataclass(slots=True)
class CanonicalRow:
    """A row of any form, in canonical form.

    Attributes:
        prompt: plain text or messages; None if the completion is the whole text.
        completions: answers to the prompt, each plain text or messages; empty for a prompt without answers. For a
            completion judged step by step: its steps.
        ranks: rank of each completion, 0 is best.
        target: probability that the better ranked of two completions is better.
        margin: rated strength of the preference, 0 where unrated.
        weight: weight of the row.
        columns: the columns that are not part of the form. For judged steps also their ``labels``, None for a step
            that was not judged.
        unused: keys of turns that are not used.
        rendered_with: columns that the chat template reads.
    """

    prompt: Prompt | None
    completions: list[str | list[Message]] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    target: float = 1.0
    margin: float = 0.0
    weight: float = 1.0
    columns: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    rendered_with: tuple[str, ...] = ()


@dataclass
class Report:
    """Counts of rows; always ``read == kept + sum(dropped.values())``.

    Attributes:
        read: rows read.
        kept: rows kept.
        dropped: rows dropped, by reason (see `REASONS`).
        truncated: kept rows whose ``prompt`` or ``completion`` lost tokens.
        tokens: supervised tokens of the kept rows.
        escaped: kept rows whose text spells a control token, which is encoded as plain characters.
        merged: kept rows whose prompt and completion the tokenizer would encode differently if joined.
        split: kept conversations that became one row per trained turn, because the template rewrites earlier turns.
        last_turn: kept rows with several assistant turns, if only the last is used.
        turns_cut: kept conversations with more than 256 trained turns; later turns are left out.
        assistant_first: kept rows that begin with the assistant; turns before the first user turn are context.
        unknown: kept rows with tokens that stand for text that the tokenizer does not know.
        unknown_tokens: these tokens.
        encoded_tokens: tokens of the kept rows, before truncation.
        unused: kept rows with a column, or a key of a turn, that is not used; by its name.
    """

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    escaped: int = 0
    merged: int = 0
    split: int = 0
    last_turn: int = 0
    turns_cut: int = 0
    assistant_first: int = 0
    unknown: int = 0
    unknown_tokens: int = 0
    encoded_tokens: int = 0
    unused: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Count a row that is dropped."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def leave_unused(self, names: Iterable[str]) -> None:
        """Count a kept row with columns or keys that are not used."""
        for name in names:
            self.unused[name] = self.unused.get(name, 0) + 1

    def __add__(self, other: Report) -> Report:
        summed: dict[str, Any] = {}
        for name, value in vars(self).items():
            other_value = vars(other)[name]
            both = isinstance(value, dict)
            summed[name] = dict(Counter(value) + Counter(other_value)) if both else value + other_value
        return Report(**summed)

    @property
    def metrics(self) -> dict[str, float]:
        """The counts as ``data/...`` metrics."""
        counts = {"read": self.read, "kept": self.kept, "dropped": sum(self.dropped.values()), "tokens": self.tokens}
        rare = {"escaped": self.escaped, "boundary_mismatch": self.merged, "split": self.split}
        rare |= {name: vars(self)[name] for name in ("last_turn", "turns_cut", "assistant_first", "unknown_tokens")}
        counts |= {name: count for name, count in rare.items() if count}
        counts |= {f"dropped_{reason}": count for reason, count in self.dropped.items()}
        counts |= {f"truncated_{part}": count for part, count in self.truncated.items()}
        return {f"data/{name}": float(count) for name, count in counts.items()}

    def describe(self, where: str) -> str:
        """Describe the rows of ``where`` in one sentence, with the reason of every row dropped."""
        text = f"{where}: {self.read:,} rows read, {self.kept:,} kept"
        if self.dropped:
            reasons = sorted(self.dropped.items(), key=lambda item: -item[1])
            text += ", dropped: " + ", ".join(f"{count:,} {reason} ({REASONS[reason]})" for reason, count in reasons)
        if self.truncated:
            text += "; truncated: " + ", ".join(f"{count:,} {part}s" for part, count in sorted(self.truncated.items()))
        unknown = 100 * self.unknown_tokens / max(self.encoded_tokens, 1)
        for count, meaning in (
            (self.escaped, "spell control tokens, which stay plain text (rendered: true if a template wrote the data)"),
            (self.merged, "would be tokenized differently if prompt and completion were encoded together"),
            (self.split, "became one row for each trained turn, because the chat template rewrites earlier turns"),
            (self.last_turn, "have several assistant turns; only the last turn is trained on"),
            (self.turns_cut, "have more than 256 trained turns; the later turns are left out"),
            (self.assistant_first, "begin with the assistant, whose turns before the first user turn are context"),
            (self.unknown, f"contain tokens unknown to the tokenizer ({unknown:.3g} % of all tokens)"),
        ):
            text += f"; {count:,} {meaning}" if count else ""
        if self.unused:
            text += "; not used: " + ", ".join(f"{name} ({count:,} rows)" for name, count in self.unused.items())
        return text + "."

    def to_dict(self) -> dict[str, Any]:
        """Return a copy in plain values."""
        return asdict(self)

    def restore(self, values: dict[str, Any]) -> None:
        """Restore the counts that `to_dict` returned."""
        vars(self).update(asdict(Report(**values)))


def no_rows(report: Report, where: str) -> DataError:
    """Return the error for a source without usable rows."""
    if report.read == 0:
        return DataError("no-rows", f"{where} is empty: it holds no row")
    return DataError("no-usable-rows", f"no usable row: {report.describe(where)}")
