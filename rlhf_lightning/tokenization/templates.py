"""Chat templates: the shipped ones, and applying any template to messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from jinja2.exceptions import SecurityError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import ModelError, SettingError
from rlhf_lightning.tokenization import outlines, sandbox
from rlhf_lightning.types import Message

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{{ eos_token + '\n\n' if message['role'] == 'assistant' else '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
CHAT_TEMPLATES = {"chatml": CHATML, "plain": PLAIN}
"""Templates that ship with the package. ``default`` is ``chatml`` if the vocabulary has its two tokens, else ``plain``.
"""

CUT = "\ue002"
"""Marks the end of a last turn that is left open; a private-use character that templates do not trim."""

LARGE_TURNS, LARGE_CHARACTERS = 1000, 1_000_000
"""Limits above which a slow rendering is blamed on the conversation, and below which it is blamed on the template."""

PINNED_DATE = "2025-01-01"
"""Date that ``strftime_now`` returns to a template, unless ``template_args`` has ``now``."""

RESERVED_ARGS = ("messages", "add_generation_prompt", "continue_final_message", "strftime_now")

CALL_ARGS = (
    *RESERVED_ARGS, "conversation", "chat_template", "tools", "tokenize", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
)  # fmt: skip
"""Arguments of transformers' ``apply_chat_template`` that are no variables of a template."""


class ChatTemplateError(ModelError):
    """The chat template is missing or cannot be used."""


class TurnsRefused(ChatTemplateError):
    """The chat template cannot render these turns; it may render others."""


def template_of(tokenizer: PreTrainedTokenizerBase, tools: bool = False) -> str:
    """Return a tokenizer's chat template; if it has several, the default one or the one for tool use.

    Raises:
        ChatTemplateError: the tokenizer has no chat template.
    """
    template = tokenizer.chat_template
    if not template:
        raise ChatTemplateError(
            "no-chat-template",
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, and this data is conversational "
            "(messages); give chat_template the text of a Jinja template, the path of a .jinja file, or 'default'",
        )
    return template if isinstance(template, str) else tokenizer.get_chat_template(tools=[{}] if tools else None)


def template_args_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the variables passed to every rendering of this tokenizer's template."""
    found = tokenizer.init_kwargs.get("template_args")
    return found if isinstance(found, dict) else {}


def set_template_args(tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any]) -> None:
    """Set the variables passed to every rendering; they are saved with the tokenizer.

    Args:
        tokenizer: the tokenizer to change.
        given: e.g. ``enable_thinking``, ``date_string``, ``tools``, ``documents``; null leaves a variable out. ``now``
            is the date (ISO 8601) that the template's ``strftime_now`` writes.

    Raises:
        SettingError: a name is reserved, or ``now`` is not a date.
    """
    made = {name: value.isoformat() if isinstance(value, date) else value for name, value in given.items()}
    made = {name: value for name, value in made.items() if value is not None}
    for name in made:
        if name in RESERVED_ARGS:
            raise SettingError("reserved-template-arg", f"template_args cannot set {name!r}; remove it")
    _clock(str(made.get("now") or PINNED_DATE))
    tokenizer.init_kwargs["template_args"] = made


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    generation: bool,
    open_turn: bool = False,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Render messages that are already in the form for the template (see `Facts.for_template`).

    Args:
        tokenizer: its template is applied, with its ``template_args``.
        messages: the turns.
        generation: whether to open the assistant's next turn at the end.
        open_turn: whether to leave the last turn open.
        tools: tool descriptions; None takes those of ``template_args``.
        variables: further variables, which override those in ``template_args``.

    Raises:
        ChatTemplateError: the template is missing, or exceeds the limits of `sandbox`.
        TurnsRefused: the template refuses these messages.
    """
    args = dict(template_args_of(tokenizer))
    clock = _clock(str(args.pop("now", None) or PINNED_DATE))
    args |= variables
    if tools:
        args["tools"] = tools
    template = template_of(tokenizer, bool(args.get("tools")))
    turns = [*messages[:-1], _left_open(messages[-1])] if open_turn else messages
    settings = {**tokenizer.special_tokens_map, **args, "strftime_now": clock}
    try:
        text = outlines.render(template, turns, generation, settings)
    except (SecurityError, TemplateSyntaxError, OverflowError, MemoryError, RecursionError) as error:
        raise _refused(ChatTemplateError, error) from error
    except sandbox.OutOfBounds as error:
        large = len(messages) > LARGE_TURNS or sandbox.characters_in(messages) > LARGE_CHARACTERS
        if not large:  # the next rendering would take just as long
            sandbox.give_up(template, str(error))
        raise _refused(TurnsRefused if large else ChatTemplateError, error) from error
    except Exception as error:  # a template is untrusted code and may raise anything
        roles = ", ".join(message["role"] for message in messages[:8])
        raise TurnsRefused("turns-refused", f"the chat template refuses the turns ({roles}): {error}") from error
    return text.rpartition(CUT)[0] if open_turn else text


def _left_open(message: Message) -> Message:
    content = message["content"]
    if isinstance(content, list):
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + CUT}]}
    return {**message, "content": (content or "") + CUT}


def _refused(kind: type[ChatTemplateError], error: Exception) -> ChatTemplateError:
    reason = str(error).rstrip(".")
    return kind(
        "chat-template-refused",
        f"the chat template is refused: {reason}; fix the template, or choose another with chat_template",
    )


@lru_cache(maxsize=64)
def _clock(now: str) -> Callable[[str], str]:
    try:
        moment = datetime.fromisoformat(now)
    except ValueError:
        raise SettingError(
            "bad-template-date", f"now in template_args is {now!r}; write a date such as {PINNED_DATE}"
        ) from None
    return lambda format: moment.strftime(format[:100])
