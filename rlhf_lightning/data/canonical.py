"""What rows of every form are read into, and the reasons for which one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.errors import RlhfError
from rlhf_lightning.types import Message, Prompt

Row = Mapping[str, Any]

ROLES = {
    "user": "user", "human": "user", "system": "system", "developer": "developer", "tool": "tool",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
"""Roles known, and the role each is read as. No other passes: a role becomes part of the template's own text."""

REASONS = {
    "unreadable_line": "the line is not a JSON object in UTF-8, nor a row of its table",
    "duplicate_key": "an object has a key twice",
    "too_deep": "lists or objects are nested deeper than 64 levels",
    "broken_text": "it is no valid Unicode: broken UTF-8, or half a surrogate pair",
    "missing_columns": "a column of its form is missing",
    "empty_prompt": "the prompt is empty, or no text",
    "empty_completion": "a completion is empty, or no text",
    "empty_turn": "a turn says nothing",
    "malformed_messages": "the messages are not a list of {role, content}",
    "unknown_role": "a role is none of " + ", ".join(sorted(set(ROLES.values()))),
    "no_user_turn": "the prompt has no user turn",
    "no_assistant_turn": "the conversation has no assistant turn",
    "prompts_differ": "chosen and rejected answer different prompts",
    "turns_do_not_alternate": "a transcript's turns do not alternate",
    "inline_role_marker": "a transcript's turn holds another role marker",
    "identical_completions": "chosen equals rejected",
    "bad_label": "the label is none of true, false, 1, 0 and -1",
    "bad_vote": "a vote on two completions is none of 1, 2, 0 and tie",
    "bad_step_labels": "the labels are not one number between 0 and 1, or null, for each step",
    "bad_number": "preference, margin, weight or a rank is no number in its range",
    "bad_data_column": "a column that the objective asks for holds no number",
    "single_completion": "a ranked list needs two completions",
    "too_many_completions": "a ranked list has more than 256 completions",
    "all_tied": "all completions of a ranked list have the same rank",
    "template_refuses": "the chat template refuses the turns",
    "nothing_supervised": "no supervised token is left after truncation",
}
"""What each reason for dropping a row means."""


class RowRefused(RlhfError):
    """A row cannot be used.

    Args:
        reason: a key of `REASONS`, which is the error's code.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason, REASONS.get(reason, reason))
        self.args = (reason,)  # what unpickling makes the error from


@dataclass(slots=True)
class CanonicalRow:
    """A row of any form.

    Attributes:
        prompt: plain text or messages; None where the completion is the whole text.
        completions: answers to the prompt, each plain text or messages; none for a prompt alone; of a completion that
            was judged step by step its steps.
        ranks: rank of each completion, 0 is best.
        target: probability that the better ranked of two is better.
        margin: rated strength of the preference, 0 where unrated.
        weight: weight of the row.
        columns: the columns that are no part of the form; and the labels of steps, None where one was not judged.
    """

    prompt: Prompt | None
    completions: list[str | list[Message]] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    target: float = 1.0
    margin: float = 0.0
    weight: float = 1.0
    columns: dict[str, Any] = field(default_factory=dict)
