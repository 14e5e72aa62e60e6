"""Chat templates: those that ship, and how any is applied."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2.exceptions import SecurityError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import ModelError
from rlhf_lightning.tokenization import sandbox
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
"""Templates that ship with the package. ``default`` is ``chatml`` where its two tokens are known, else ``plain``."""


CUT = "\ue002"
"""Marks where the last turn is left open; a private-use character that templates do not trim."""

LARGE_TURNS, LARGE_CHARACTERS = 1000, 1_000_000
"""A conversation larger than this may itself be why a template takes too long; of a smaller one the template is."""


class ChatTemplateError(ModelError):
    """There is no chat template, or none that can be used."""


class TurnsRefused(ChatTemplateError):
    """The chat template cannot render these turns; others it may."""


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a tokenizer's chat template; of several, the one for conversations without tools.

    Raises:
        ChatTemplateError: if it has none.
    """
    template = tokenizer.chat_template
    if not template:
        raise ChatTemplateError(
            "no-chat-template",
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, and this data is "
            "conversational (messages); give chat_template the text of a Jinja template, the "
            "path of a .jinja file, or 'default'",
        )
    return template if isinstance(template, str) else tokenizer.get_chat_template()


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation: bool, open_turn: bool = False
) -> str:
    """Text of some messages.

    Args:
        tokenizer: its template is applied.
        messages: the turns.
        generation: whether the assistant's next turn is opened at the end.
        open_turn: whether the last turn is left open.

    Raises:
        ChatTemplateError: if there is no template, or it breaks the bounds of `sandbox`.
        TurnsRefused: if it refuses these messages.
    """
    template = template_of(tokenizer)
    turns = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + CUT}] if open_turn else messages
    try:
        text = sandbox.render(template, turns, add_generation_prompt=generation, **tokenizer.special_tokens_map)
    except (SecurityError, TemplateSyntaxError, OverflowError, MemoryError, RecursionError) as error:
        raise ChatTemplateError(
            "chat-template-refused",
            f"the chat template is refused: {str(error).rstrip('.')}; fix the template, or choose "
            "another with chat_template",
        ) from error
    except sandbox.OutOfBounds as error:
        large = len(messages) > LARGE_TURNS or sum(len(m["content"]) for m in messages) > LARGE_CHARACTERS
        raise (TurnsRefused if large else ChatTemplateError)(
            "chat-template-refused",
            f"the chat template is refused: {str(error).rstrip('.')}; fix the template, or choose "
            "another with chat_template",
        ) from error
    except Exception as error:  # a template is a stranger's program: it may raise anything
        roles = ", ".join(message["role"] for message in messages[:8])
        raise TurnsRefused("turns-refused", f"the chat template refuses the turns ({roles}): {error}") from error
    return text.rpartition(CUT)[0] if open_turn else text
