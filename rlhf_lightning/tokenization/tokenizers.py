"""A tokenizer with what training needs: a pad token of its own, an end, and the chat template that was asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.errors import MissingError, ModelError, SettingError
from rlhf_lightning.tokenization.facts import end_token_ids
from rlhf_lightning.tokenization.templates import CHAT_TEMPLATES, set_template_args, template_args_of

PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")


RESERVED = re.compile(r"reserved|unused|placeholder|dummy|extra_\d", re.IGNORECASE)
"""Names of special tokens that a vocabulary keeps free."""


def load_tokenizer(
    name_or_folder: str | Path,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    template_args: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has a pad token of its own and, if asked for, a chat template.

    The pad token is the tokenizer's own unless a completion may end with it; else the first of ``<pad>``, ``<|pad|>``,
    ``[PAD]``, ``<|finetune_right_pad_id|>``, ``<|endoftext|>``, the unknown token and reserved special tokens that is
    in the vocabulary and ends no completion. Without any, ``<|pad|>`` is added, and exported models get a row for it.
    Masks come from lengths, so its id never reaches a loss.

    Args:
        name_or_folder: name on the Hugging Face Hub, or a folder.
        chat_template: text of a Jinja template, path of a ``.jinja`` file, or the name of a shipped one: ``chatml``,
            ``plain``, or ``default``, which is the first of those two that the vocabulary allows. None keeps the
            tokenizer's own.
        trust_remote_code: run the Python code that the tokenizer brings along, if any.
        template_args: variables of the template, such as ``enable_thinking``; added to those saved with the tokenizer,
            see `templates.set_template_args`.

    Raises:
        MissingError: if there is no tokenizer under that name.
        ModelError: if the template is not found, or there is no EOS token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises anything over a damaged file
        if isinstance(error, MemoryError):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                "custom-code",
                f"the tokenizer {str(name_or_folder)!r} needs its own Python code; if you trust it, "
                f"allow it with --model.trust_remote_code {name_or_folder}",
            ) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "couldn't connect" in reason or "offline mode" in reason:
            raise MissingError(
                "hub-unreachable",
                f"{str(name_or_folder)!r} is neither a folder nor in the local cache, and the Hugging Face Hub cannot "
                "be reached: check the name, download it once online (and without HF_HUB_OFFLINE), or give a "
                "folder",
            ) from error
        raise MissingError(
            "no-tokenizer",
            f"no tokenizer in {str(name_or_folder)!r} ({reason}); give a Hub name or a folder with tokenizer.json",
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "no-eos-token",
            f"the tokenizer {str(name_or_folder)!r} has no EOS token, so completions could not end; set its eos_token",
        )
    if chat_template is not None:
        tokenizer.chat_template = _template_text(tokenizer, chat_template)
    if args := {**template_args_of(tokenizer), **(template_args or {})}:
        set_template_args(tokenizer, args)
    _ensure_pad(tokenizer)
    return tokenizer


def _template_text(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> str:
    vocabulary = tokenizer.get_vocab()
    if chat_template == "default":
        chat_template = "chatml" if {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys() else "plain"
    if chat_template in CHAT_TEMPLATES:
        if chat_template == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys():
            raise SettingError(
                "chat-template-tokens",
                "chat_template 'chatml' needs the tokens <|im_start|> and <|im_end|>, which the vocabulary "
                "lacks; use 'plain'",
            )
        text = CHAT_TEMPLATES[chat_template]
        return text if tokenizer.bos_token else text.replace("{{ bos_token }}", "")
    if "{" in chat_template:
        return chat_template
    if not Path(chat_template).is_file():
        raise SettingError(
            "unknown-chat-template",
            f"chat_template {chat_template!r} is neither a Jinja text, nor a file, nor one of "
            f"{', '.join(['default', *CHAT_TEMPLATES])}",
        )
    return Path(chat_template).read_text(encoding="utf-8")


def _ensure_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    ends = set(end_token_ids(tokenizer))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return
    vocabulary = tokenizer.get_vocab()
    reserved = sorted(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and RESERVED.search(token.content) and token.content not in (tokenizer.chat_template or "")
    )
    for candidate in (*PAD_CANDIDATES, tokenizer.unk_token, *reserved):
        if candidate is not None and vocabulary.get(candidate, tokenizer.eos_token_id) not in ends:
            tokenizer.pad_token = candidate
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
