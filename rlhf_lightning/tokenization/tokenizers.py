"""Load a tokenizer with everything that training needs: a separate pad token, an end token, and a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.errors import MissingError, ModelError, SettingError, reason_of
from rlhf_lightning.tokenization.facts import STOP_STRINGS, STOP_TOKENS, end_token_ids
from rlhf_lightning.tokenization.templates import CHAT_TEMPLATES, set_template_args, template_args_of

PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")


RESERVED = re.compile(r"reserved|unused|placeholder|dummy|extra_\d", re.IGNORECASE)
"""Names of special tokens that a vocabulary reserves for users."""


def load_tokenizer(
    name_or_folder: str | Path,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    template_args: Mapping[str, Any] | None = None,
    new_tokens: Sequence[str] = (),
    stop_tokens: Sequence[str] = (),
    stop_strings: Sequence[str] = (),
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has a separate pad token and, if asked for, a chat template.

    The tokenizer's own pad token is kept unless it can end a completion. Otherwise the pad token is the first of
    ``<pad>``, ``<|pad|>``, ``[PAD]``, ``<|finetune_right_pad_id|>``, ``<|endoftext|>``, the unknown token and reserved
    special tokens that is in the vocabulary and ends no completion. If there is none, ``<|pad|>`` is added, and
    exported models get a row for it. Masks come from lengths, so the pad id never reaches a loss.

    Args:
        name_or_folder: name on the Hugging Face Hub, or a folder.
        chat_template: text of a Jinja template, path of a ``.jinja`` file, or the name of a shipped template:
            ``chatml``, ``plain``, or ``default``, which is the first of these two that the vocabulary allows. None
            keeps the tokenizer's own.
        trust_remote_code: run the tokenizer's own Python code, if any.
        template_args: variables of the template, such as ``enable_thinking``; added to those saved with the tokenizer,
            see `templates.set_template_args`.
        new_tokens: texts to add as tokens, if they are not tokens yet.
        stop_tokens: further tokens that end a completion; added to those of the folder's generation config.
        stop_strings: strings that end a completion; added to those of the folder's generation config.

    Raises:
        MissingError: there is no tokenizer under that name.
        ModelError: the tokenizer needs untrusted code, has no EOS token, or loses spaces.
        SettingError: the chat template is unknown, a stop token is not a single token, or a stop string is empty.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # the library may raise anything for a damaged file
        if isinstance(error, MemoryError):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                "custom-code",
                f"the tokenizer {str(name_or_folder)!r} needs its own Python code; if you trust it, "
                f"allow it with --model.trust_remote_code {name_or_folder}",
            ) from error
        reason = reason_of(error).partition(" from one of")[0]
        if "couldn't connect" in reason or "offline mode" in reason:
            raise MissingError(
                "hub-unreachable",
                f"{str(name_or_folder)!r} is neither a folder nor in the local cache, and the Hugging Face Hub cannot "
                "be reached: check the name, download it once online (and without HF_HUB_OFFLINE), or give a folder",
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
    _refuse_lost_spaces(tokenizer, name_or_folder)
    # Not marked special, so that texts of the data may contain them and decoded completions keep them.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in new_tokens])
    if chat_template is not None:
        tokenizer.chat_template = _template_text(tokenizer, chat_template)
    if args := {**template_args_of(tokenizer), **(template_args or {})}:
        set_template_args(tokenizer, args)
    _ensure_pad(tokenizer)
    if not all(stop_strings):
        raise SettingError("stop-string-empty", "a stop string is empty, and would end every completion; remove it")
    tokens, strings = _generation_ends(tokenizer, str(name_or_folder))
    tokens += [_single(tokenizer, stop) for stop in stop_tokens]
    for name, stops in ((STOP_TOKENS, tokens), (STOP_STRINGS, [*strings, *stop_strings])):
        if known := list(dict.fromkeys([*tokenizer.init_kwargs.get(name, ()), *stops])):
            tokenizer.init_kwargs[name] = known
    return tokenizer


def _refuse_lost_spaces(tokenizer: PreTrainedTokenizerBase, name: str | Path) -> None:
    """Refuse a tokenizer that its library rebuilt with wrong rules: every text would lose its spaces."""
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == "ab":
        raise ModelError(
            "tokenizer-loses-spaces",
            f"the tokenizer {str(name)!r} loses spaces ('a b' is read as 'ab'): its tokenizer.json does not match "
            "the tokenizer_class in tokenizer_config.json; set that to PreTrainedTokenizerFast",
        )


def _generation_ends(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[list[str], list[str]]:
    """Return the special tokens and the strings that end a completion according to a folder's generation config."""
    folder, file = Path(name), "generation_config.json"
    path: Any = folder / file if folder.is_dir() else try_to_load_from_cache(name, file)
    try:
        config = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        found, texts = config.get("eos_token_id"), config.get("stop_strings") or []
    except (OSError, ValueError, AttributeError):
        return [], []
    texts = [text for text in ([texts] if isinstance(texts, str) else texts) if isinstance(text, str) and text]
    ids = found if isinstance(found, list) else [found]
    other = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    known = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = [index for index in ids if isinstance(index, int) and index in known and index not in other]
    return [known[index].content for index in named], texts


def _single(tokenizer: PreTrainedTokenizerBase, stop: str) -> str:
    """Return a stop token as the vocabulary spells it.

    Raises:
        SettingError: it is not exactly one token of the vocabulary.
    """
    if stop in tokenizer.get_vocab():
        return stop
    ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise SettingError(
            "stop-token-unknown",
            f"the stop token {stop!r} is {len(ids)} tokens of this vocabulary, and must be one; name a single token",
        )
    return str(tokenizer.convert_ids_to_tokens(ids[0]))


def token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str | int]) -> list[int]:
    """Return the ids of tokens, given by name or id.

    Raises:
        SettingError: a token is not in the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary.get(token, -1) if isinstance(token, str) else int(token) for token in tokens]
    if missing := [token for token, index in zip(tokens, ids, strict=True) if index < 0]:
        raise SettingError(
            "unknown-token", f"{missing[0]!r} is not a token of {tokenizer.name_or_path!r}; add it with new_tokens"
        )
    return list(dict.fromkeys(ids))


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
