"""Requests to and responses of servers that only handle text, such as ``transformers serve``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import DataError
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.tokenization import Ends


def generation_config(settings: SamplingSettings, end_ids: Ends) -> dict[str, Any]:
    """Return settings for ``transformers serve``, which otherwise uses the model's own generation config."""
    config = {"do_sample": settings.temperature > 0, "eos_token_id": list(end_ids), "pad_token_id": end_ids[0]}
    if settings.temperature > 0:
        config |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return config


def text_of(tokenizer: PreTrainedTokenizerBase, prompt: Tensor) -> str:
    """Return the text of a prompt; refuse a prompt if encoding its text gives other tokens."""
    text = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if tokenizer(text)["input_ids"] != prompt.tolist():
        raise DataError(
            "prompt-text-differs",
            f"the server would encode the prompt's text to other tokens: {text[:200]!r}; use a server that takes "
            "token ids",
        )
    return text


def read_text(tokenizer: PreTrainedTokenizerBase, choice: Mapping[str, Any], limit: int, end_ids: Ends) -> Tensor:
    """Return the tokens of a completion received as text; add an end token if it ended by itself."""
    if not isinstance(choice["text"], str):
        raise ValueError("the text is missing")
    ids = tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
    ids = [*ids[: next((i for i, token in enumerate(ids) if token in end_ids), len(ids))]]
    if choice["finish_reason"] == "stop" and len(ids) < limit:
        ids.append(tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else end_ids[0])
    if not ids:
        raise ValueError("an empty completion")
    return torch.tensor(ids[:limit])
