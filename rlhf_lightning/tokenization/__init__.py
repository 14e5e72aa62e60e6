"""Text to token ids: one way for every stage, so that what is trained is what is sampled.

A prompt and its completion are encoded apart and joined (``ids = prompt ids ++ completion ids``), which is what the
policy sees when it answers: it continues the prompt's ids and never re-encodes them. A conversation is rendered by the
tokenizer's chat template; its text already carries the BOS token, so nothing is added to it.

What a completion ends with: the template's end-of-turn token for messages, EOS for plain text. Whatever a template
writes after it (often a line break) is no part of the completion, since a sampled completion stops at its end token.

Text is data, never control: what spells a control token, in a message, a plain prompt or a completion, is encoded as
the characters it is made of. So who speaks, and what a loss looks at, never depends on what is said. Only where a
template has written plain text before, and the caller says so (``rendered``), are its control tokens control. A
template itself is a stranger's program, and runs within the bounds of `sandbox`.
"""

from rlhf_lightning.tokenization.encoding import (
    Encoded,
    completion_text,
    encode_completion,
    encode_prompt,
    encode_rendered,
    encode_steps,
    joined_steps,
    truncate,
)
from rlhf_lightning.tokenization.facts import end_token_ids, opening_ids, tokenizer_fingerprint
from rlhf_lightning.tokenization.rendering import (
    Rendered,
    Span,
    render_completion,
    render_prompt,
    render_steps,
)
from rlhf_lightning.tokenization.templates import CHAT_TEMPLATES, ChatTemplateError, TurnsRefused
from rlhf_lightning.tokenization.tokenizers import load_tokenizer

__all__ = [
    "CHAT_TEMPLATES", "ChatTemplateError", "Encoded", "Rendered", "Span", "TurnsRefused", "completion_text",
    "encode_completion", "encode_prompt", "encode_rendered", "encode_steps", "end_token_ids", "joined_steps",
    "load_tokenizer", "opening_ids", "render_completion", "render_prompt", "render_steps", "tokenizer_fingerprint",
    "truncate",
]  # fmt: skip
