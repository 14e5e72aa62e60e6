"""Text to token ids: one way for every stage, so that what is trained is what is sampled.

A prompt and its completion are encoded apart and joined (``ids = prompt ids ++ completion ids``), which is what the
policy sees when it answers: it continues the prompt's ids and never re-encodes them. A conversation is rendered by the
tokenizer's chat template; its text already carries the BOS token, so nothing is added to it.

What a completion ends with: the template's end-of-turn token for messages, EOS for plain text. Whatever a template
writes after it (often a line break) is no part of the completion, since a sampled completion stops at its end token.

Text is data, never control: a special-token string inside a message is encoded as the plain characters it is made of.
Plain-text prompts and completions stand as they are, since they may have been rendered by a template before.
"""

from rlhf_lightning.tokenization.encoding import (
    completion_text,
    encode_completion,
    encode_prompt,
    encode_rendered,
    encode_steps,
    joined_steps,
    truncate,
)
from rlhf_lightning.tokenization.facts import end_token_ids, opening_ids, tokenizer_fingerprint
from rlhf_lightning.tokenization.loading import load_tokenizer
from rlhf_lightning.tokenization.rendering import (
    Rendered,
    Span,
    render_completion,
    render_prompt,
    render_steps,
)
from rlhf_lightning.tokenization.templates import CHAT_TEMPLATES, ChatTemplateError

__all__ = [
    "CHAT_TEMPLATES", "ChatTemplateError", "Rendered", "Span", "completion_text", "encode_completion",
    "encode_prompt", "encode_rendered", "encode_steps", "end_token_ids", "joined_steps", "load_tokenizer",
    "opening_ids", "render_completion", "render_prompt", "render_steps", "tokenizer_fingerprint", "truncate",
]  # fmt: skip
