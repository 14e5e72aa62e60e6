"""Chat templates: those that ship, and how any is applied."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

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


class ChatTemplateError(ValueError):
    """The chat template cannot render these messages, or there is none."""


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
        ChatTemplateError: if there is no template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template, and this data is conversational "
            "(messages): give chat_template the text of a Jinja template, the path of a .jinja file, or 'default'."
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation, continue_final_message=open_turn
        )
    except Exception as error:  # a template is a stranger's program: it may raise anything
        roles = ", ".join(message["role"] for message in messages[:8])
        raise ChatTemplateError(f"The chat template refuses the turns ({roles}): {error}") from error
