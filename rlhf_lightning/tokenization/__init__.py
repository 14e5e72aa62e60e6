"""Convert text to token ids in one way for all stages, so that training sees the tokens that sampling produces.

The text of a prompt and its completion is the chat template's rendering of the conversation. The ids are the same as in
serving: the prompt is rendered with its generation prompt and encoded, then the rest is encoded separately. A rendering
already contains its BOS token, so none is added.

A completion made of messages ends with the template's end-of-turn token, a plain-text completion with EOS. Text that a
template writes after that token (often a line break) is not part of the completion, because sampling stops at the
token.

Text is data, never control: if a message, a plain prompt or a completion spells a control token, it is encoded as plain
characters. Only plain text that was written by a template (``rendered``) keeps its control tokens. The template itself
is untrusted code, and runs within the limits of `sandbox`.
"""

from rlhf_lightning.tokenization.continuation import Rendered, Span
from rlhf_lightning.tokenization.encoding import (
    Encoded,
    all_cores,
    completion_text,
    completion_texts,
    encode_completion,
    encode_prompt,
    encode_rendered,
    encode_reply,
    encode_steps,
    joined_steps,
    truncate,
    turn_text,
)
from rlhf_lightning.tokenization.facts import Ends, end_token_ids, facts_of, opening_ids, settled, tokenizer_fingerprint
from rlhf_lightning.tokenization.rendering import (
    RenderedTurn,
    render_answers,
    render_completion,
    render_prompt,
    render_steps,
    render_turns,
)
from rlhf_lightning.tokenization.templates import (
    CHAT_TEMPLATES,
    PINNED_DATE,
    ChatTemplateError,
    TurnsRefused,
    set_template_args,
    template_args_of,
)
from rlhf_lightning.tokenization.tokenizers import load_tokenizer, token_ids

__all__ = [
    "CHAT_TEMPLATES", "PINNED_DATE", "ChatTemplateError", "Encoded", "Ends", "Rendered", "RenderedTurn", "Span",
    "TurnsRefused", "all_cores", "completion_text", "completion_texts", "encode_completion", "encode_prompt",
    "encode_rendered", "encode_reply", "encode_steps", "end_token_ids", "facts_of", "joined_steps", "load_tokenizer",
    "opening_ids", "render_answers", "render_completion", "render_prompt", "render_steps", "render_turns",
    "set_template_args", "settled", "template_args_of", "token_ids", "tokenizer_fingerprint", "truncate", "turn_text",
]  # fmt: skip
