"""Values of a row to texts and turns: one spelling of roles, no empty turn, a user in every prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_lightning.data.canonical import ROLES, RowRefused
from rlhf_lightning.types import Message, Prompt


def text_of(value: Any, reason: str) -> str:
    """Text that says something; anything else is refused for that reason."""
    if not isinstance(value, str) or not value.strip():
        raise RowRefused(reason)
    return value


def messages_of(value: Any) -> list[Message]:
    """Turns of a list of messages, with the roles of `ROLES`; no turn is empty."""
    if not isinstance(value, list | tuple) or not value:
        raise RowRefused("malformed_messages")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise RowRefused("malformed_messages")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list):  # parts, of which only text can be learned from
            texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            content = "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else content
        if not isinstance(role, str) or not (content is None or isinstance(content, str)):
            raise RowRefused("malformed_messages")
        if role.lower() not in ROLES:
            raise RowRefused("unknown_role")
        if content is None or not content.strip():
            if ROLES[role.lower()] == "system":
                continue  # an empty system prompt says nothing, and is often a mere placeholder
            raise RowRefused("empty_turn")
        turns.append({"role": ROLES[role.lower()], "content": content})
    return turns


def with_user(turns: list[Message]) -> list[Message]:
    """The turns, if there is a user's among them."""
    if not any(turn["role"] == "user" for turn in turns):
        raise RowRefused("no_user_turn")
    return turns


def prompt_of(value: Any) -> Prompt:
    """A prompt: text, or turns with a user's among them."""
    if isinstance(value, list | tuple) and value:
        return with_user(messages_of(value))
    return text_of(value, "empty_prompt")


def completion_of(value: Any) -> str | list[Message]:
    """A completion: text, or turns up to the assistant's last."""
    if isinstance(value, list | tuple) and value:
        turns = messages_of(value)
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
        if not turns:
            raise RowRefused("no_assistant_turn")
        return turns
    return text_of(value, "empty_completion")


def parted(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """The turns before the first of the assistant, and the rest up to its last."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise RowRefused("no_assistant_turn")
    return with_user(turns[: answers[0]]), turns[answers[0] : answers[-1] + 1]


def one_style(prompt: Prompt, completions: list[Any], as_chat: bool) -> tuple[Prompt, list[Any]]:
    """Make the prompt messages if a completion is, or if asked to; completions of messages begin with the assistant."""
    turned = [c for c in completions if isinstance(c, list)]
    if isinstance(prompt, str) and (as_chat or turned):
        prompt = [{"role": "user", "content": prompt}]
    if any(c[0]["role"] != "assistant" for c in turned):
        raise RowRefused("prompts_differ")
    return prompt, completions
