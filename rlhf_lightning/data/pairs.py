"""Chosen and rejected apart from the prompt that both answer, which many sets repeat in both."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rlhf_lightning.data.canonical import Row, RowRefused
from rlhf_lightning.data.turns import completion_of, messages_of, prompt_of, text_of, with_user
from rlhf_lightning.types import Message, Prompt


def pair_of(row: Row, explicit: bool) -> tuple[Prompt, list[Any]]:
    """The prompt of a pair, and its two completions, chosen first.

    Args:
        row: has ``chosen`` and ``rejected``, and ``prompt`` if it is explicit.
        explicit: whether the prompt has a column of its own; otherwise it is what both sides begin with.

    Raises:
        RowRefused: if the two sides do not answer one prompt.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        both = [messages_of(chosen), messages_of(rejected)]
        if explicit and all(turns and turns[0]["role"] == "assistant" for turns in both):
            return prompt_of(row["prompt"]), [completion_of(turns) for turns in both]
        return _common_turns(*both)  # some sets repeat the prompt in both columns
    if explicit:
        return prompt_of(row["prompt"]), [completion_of(chosen), completion_of(rejected)]
    texts = [text_of(chosen, "empty_completion"), text_of(rejected, "empty_completion")]
    if any(_MARKER.search("\n\n" + text.lstrip()) for text in texts):
        return _transcripts(*texts)
    return _common_text(*texts)


def _common_turns(chosen: list[Message], rejected: list[Message]) -> tuple[Prompt, list[Any]]:
    if chosen == rejected:
        raise RowRefused("identical_completions")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None or any(turns[same]["role"] != "assistant" for turns in (chosen, rejected)):
        raise RowRefused("prompts_differ")
    return with_user(chosen[:same]), [completion_of(chosen[same:]), completion_of(rejected[same:])]


def _common_text(chosen: str, rejected: str) -> tuple[Prompt, list[Any]]:
    if chosen == rejected:
        raise RowRefused("identical_completions")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None:
        same = min(len(chosen), len(rejected))
    if same and chosen[same - 1] == " ":
        same -= 1  # the space belongs to the word after it
    prompt = text_of(chosen[:same], "empty_prompt")
    return prompt, [text_of(chosen[same:], "empty_completion"), text_of(rejected[same:], "empty_completion")]


_MARKER = re.compile(r"\n\n(Human|Assistant):")
_INLINE = re.compile(r"\b(Human|Assistant) ?:")


def _transcripts(chosen: str, rejected: str) -> tuple[Prompt, list[Any]]:
    """Turns of two whole transcripts that share all but their last turn."""
    both = []
    for text in (chosen, rejected):
        head, *rest = _MARKER.split("\n\n" + text.lstrip())
        if head.strip():
            raise RowRefused("no_user_turn")
        roles = {"Human": "user", "Assistant": "assistant"}
        pairs = zip(rest[::2], rest[1::2], strict=True)
        both.append([{"role": roles[role], "content": content.strip()} for role, content in pairs])
    turns = both[0] + both[1]
    if any(not turn["content"] for turn in turns):
        raise RowRefused("empty_turn")
    if both[0][:-1] != both[1][:-1]:
        raise RowRefused("prompts_differ")
    for one in both:
        if [turn["role"] for turn in one] != ["user", "assistant"] * (len(one) // 2) or not one:
            raise RowRefused("turns_do_not_alternate")
    if any(_INLINE.search(turn["content"]) for turn in turns):
        raise RowRefused("inline_role_marker")
    return both[0][:-1], [[both[0][-1]], [both[1][-1]]]


WHOLE_LISTS = 32
"""Completions of a ranked list up to which all its pairs are compared; of longer ones those of neighbouring ranks."""


class Preferences:
    """Preferences between completions, as a directed graph: 32 bytes for each pair, whatever its texts are."""

    def __init__(self) -> None:
        self.prompts, self.better, self.worse, self.rows = array("q"), array("q"), array("q"), array("q")

    def add(self, row: int, prompt: int, completions: Sequence[int], ranks: Sequence[int]) -> None:
        """Take in a row's preferences.

        Args:
            row: its number.
            prompt: hash of the prompt.
            completions: hash of each completion.
            ranks: rank of each completion, 0 is best.
        """
        near = len(completions) > WHOLE_LISTS
        for one, rank in zip(completions, ranks, strict=True):
            for other, lower in zip(completions, ranks, strict=True):
                if rank < lower and one != other and (not near or lower == rank + 1):
                    for column, value in zip(
                        (self.prompts, self.better, self.worse, self.rows), (prompt, one, other, row), strict=True
                    ):
                        column.append(value)

    def contradictions(self) -> tuple[list[int], list[int]]:
        """Rows with a pair that another row judges the other way round, and rows on a longer circle."""
        if not self.rows:
            return [], []
        prompts, better, worse, rows = (
            np.frombuffer(column, dtype=np.int64) for column in (self.prompts, self.better, self.worse, self.rows)
        )
        ends = np.concatenate([np.stack([prompts, better], 1), np.stack([prompts, worse], 1)])
        nodes = np.unique(ends, axis=0, return_inverse=True)[1].reshape(-1)
        count = int(nodes.max()) + 1
        start, stop = nodes[: len(rows)], nodes[len(rows) :]
        both = np.isin(start * count + stop, stop * count + start)
        graph = coo_array((np.ones(len(rows), dtype=np.int8), (start, stop)), shape=(count, count))
        _, component = connected_components(graph.tocsr(), directed=True, connection="strong")
        circle = (component[start] == component[stop]) & ~both
        return np.unique(rows[both]).tolist(), np.unique(rows[circle]).tolist()
