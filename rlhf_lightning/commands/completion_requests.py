"""Parse and validate requests of the OpenAI-compatible API."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.data.canonical import RowRefused
from rlhf_lightning.data.turns import TURN_KEYS, messages_of, tools_of, unused_keys
from rlhf_lightning.errors import SettingError, printable
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.similar_names import nearest
from rlhf_lightning.tokenization.rendering import render_prompt

MOST_COMPLETIONS = 256
"""Maximum number of completions of one request (prompts times n)."""

MOST_STOPS, LONGEST_STOP = 16, 256
MOST_TOP = 20
"""Maximum number of most probable tokens reported per token."""

MOST_TEMPLATE_ARGS = 8
"""Number of sets of template arguments for which a tokenizer is cached."""

ANSWER_KEYS = {"refusal", "annotations", "audio"}
"""Keys of an answer that clients send back with the conversation and that no chat template reads."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,), "logit_bias": ({},),
    "suffix": ("",), "best_of": (1,), "response_format": ({"type": "text"},), "use_beam_search": (False,),
    "length_penalty": (1,), "min_tokens": (0,), "functions": ([],), "function_call": ("none",),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "structured_outputs": (),
    "include_stop_str_in_output": (False,), "spaces_between_special_tokens": (True,),
}  # fmt: skip
"""Fields of other servers, with the values that have no effect; null never has an effect."""

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
           "priority", "request_id", "reasoning_effort", "verbosity"}  # fmt: skip
"""Fields that are accepted and ignored, because they change no token."""

COMMON = {"model", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stop_token_ids", "ignore_eos",
          "skip_special_tokens", "logprobs", "prompt_logprobs", "stream", "stream_options", "return_token_ids",
          "return_tokens_as_token_ids", "add_special_tokens"}  # fmt: skip
COMPLETION_FIELDS = COMMON | {"prompt", "echo"}
CHAT_FIELDS = COMMON | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
                        "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}  # fmt: skip


class BadRequest(SettingError):
    """A request with an invalid field."""

    def __init__(self, field: str, fault: str) -> None:
        super().__init__("bad-request", f"{field} {fault}")
        self.field = printable(field)


@dataclass(frozen=True)
class Asked:
    """A parsed request."""

    prompts: tuple[Tensor, ...]  # token ids of each prompt, int64
    prompt_texts: tuple[str, ...]  # the prompts as text, for ``echo``
    settings: SamplingSettings | None  # sampling settings; None if no token is requested
    n: int  # completions of each prompt
    seed: int | None  # seed of the request; None: the server chooses a seed
    stops: tuple[str, ...]  # stop strings
    end_ids: frozenset[int]  # stop tokens
    top: int | None  # most probable tokens reported with each token of a completion; None reports no log-probabilities
    prompt_top: int | None  # the same for the tokens of the prompts
    chat: bool  # whether the answer is a message
    echo: bool  # whether the text of the prompt comes first
    stream: bool  # whether the answer is streamed
    usage_at_end: bool  # whether the last chunk of a stream has the token counts
    token_ids: bool  # whether token ids are returned
    tokens_as_ids: bool  # whether tokens are written as ``token_id:17``
    skip_special: bool  # whether special tokens are left out of the text
    to_the_end_token: bool  # whether the text ends at the tokenizer's end token
    tools: bool  # whether the answer is searched for tool calls


class Text:
    """The tokenizer behind a lock, because two threads must not use it at the same time.

    Args:
        tokenizer: the policy's tokenizer.
        vocabulary: number of token ids that the model accepts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.lock = threading.RLock()
        self.with_args: dict[str, PreTrainedTokenizerBase] = {}
        self.names: dict[int, str] = {}

    def for_args(self, args: Mapping[str, Any] | None) -> PreTrainedTokenizerBase:
        """Return a tokenizer that passes further arguments to its chat template."""
        if not args:
            return self.tokenizer
        key = json.dumps(args, sort_keys=True)
        if key not in self.with_args:
            made = deepcopy(self.tokenizer)
            tokenization.set_template_args(made, {**tokenization.template_args_of(made), **args})
            if len(self.with_args) >= MOST_TEMPLATE_ARGS:
                del self.with_args[next(iter(self.with_args))]
            self.with_args[key] = made
        return self.with_args[key]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Decode token ids."""
        with self.lock:
            return self.tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def completion(self, ids: Sequence[int]) -> str:
        """Decode a completion up to its first end token."""
        with self.lock:
            return tokenization.completion_text(self.tokenizer, ids, strings=False)

    def name(self, index: int, as_id: bool = False) -> str:
        """Return a token as text; a token that is only a part of a character is written as ``token_id:17``."""
        if as_id:
            return f"token_id:{index}"
        if index not in self.names:
            text = self.decode([index])
            self.names[index] = f"token_id:{index}" if "\ufffd" in text else text
        return self.names[index]


# ---- reading a request -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestLimits:
    """Defaults and limits of requests."""

    settings: SamplingSettings  # default sampling settings
    longest: int | None  # maximum tokens of prompt plus completion; None if the model has no limit


def read_request(body: Mapping[str, Any], chat: bool, text: Text, limits: RequestLimits) -> Asked:
    """Parse a request.

    Raises:
        RlhfError: the request is invalid or not supported; ``bad-request`` names the field.
    """
    _check_fields(body, CHAT_FIELDS if chat else COMPLETION_FIELDS)
    given = {name: value for name, value in body.items() if value is not None}
    echo = _flag(given, "echo")
    with text.lock:
        prompts, texts = _messages(given, text) if chat else _prompts(given, text, echo)
        ends = tokenization.Ends() if _flag(given, "ignore_eos") else tokenization.end_token_ids(text.tokenizer)
    n = _whole(given, "n", 1, 1, MOST_COMPLETIONS)
    if len(prompts) * n > MOST_COMPLETIONS:
        raise BadRequest("n", f"asks for {len(prompts) * n} completions; a request may have at most {MOST_COMPLETIONS}")
    stream, prompt_top = _flag(given, "stream"), _top(given, "prompt_logprobs")
    top = _chat_top(given) if chat else _top(given, "logprobs")
    if echo and top is not None:
        prompt_top = max(prompt_top or 0, top)
    if stream and (echo or prompt_top is not None):
        raise BadRequest("stream", "cannot be combined with echo and prompt_logprobs: leave stream out")
    options = given.get("stream_options", {})
    if not isinstance(options, Mapping):
        raise BadRequest("stream_options", "is not an object")
    return Asked(
        prompts, texts, _settings(given, chat, prompts, limits), n,
        _whole(given, "seed", None, -(2**63), 2**63 - 1), (*_stops(given), *ends.strings),
        frozenset(ends) | frozenset(token_ids(given.get("stop_token_ids", []), "stop_token_ids", text.vocabulary)),
        top, prompt_top, chat, echo, stream, _flag(options, "include_usage"), _flag(given, "return_token_ids"),
        _flag(given, "return_tokens_as_token_ids"), _flag(given, "skip_special_tokens", True),
        not _flag(given, "ignore_eos"), bool(given.get("tools")) and given.get("tool_choice") != "none",
    )  # fmt: skip


def _check_fields(body: Mapping[str, Any], known: set[str]) -> None:
    for name, value in body.items():
        if value is None or name in known or name in IGNORED:
            continue
        if name in NEUTRAL:
            if value in NEUTRAL[name] and not (isinstance(value, bool) and value not in (False, True)):
                continue
            raise BadRequest(name, f"is {shortened(value)}, which this server does not support: leave it out")
        near = nearest(str(name)[:100], known)
        raise BadRequest(
            str(name)[:100], "is not a field of this request" + (f"; did you mean {near}?" if near else "")
        )


def shortened(value: Any) -> str:
    """Return a value as text for an error message, at most 100 characters."""
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= 100 else text[:97] + "..."


def _flag(given: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(name, f"is {shortened(value)}: it must be true or false")
    return default if value is None else value


def _whole(given: Mapping[str, Any], name: str, default: Any, least: int, most: int) -> Any:
    value = given.get(name, default)
    if value is default:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise BadRequest(name, f"is {shortened(value)}: it must be a whole number from {least} to {most}")
    return value


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise BadRequest(name, f"is {shortened(value)}: it must be a number")
    return float(value)


def _top(given: Mapping[str, Any], name: str) -> int | None:
    if given.get(name) is False:
        return None
    return 1 if given.get(name) is True else _whole(given, name, None, 0, MOST_TOP)


def _chat_top(given: Mapping[str, Any]) -> int | None:
    top = _whole(given, "top_logprobs", 0, 0, MOST_TOP)
    if not _flag(given, "logprobs"):
        if top:
            raise BadRequest("top_logprobs", "needs logprobs: true")
        return None
    return int(top)


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    stops = given.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise BadRequest("stop", f"must be a text, or a list of at most {MOST_STOPS} texts")
    stops = [stop for stop in stops if stop not in (None, "")]
    if not all(isinstance(stop, str) and len(stop) <= LONGEST_STOP for stop in stops):
        raise BadRequest("stop", f"must be texts of at most {LONGEST_STOP} characters")
    return tuple(dict.fromkeys(stops))


def token_ids(value: Any, name: str, vocabulary: int) -> list[int]:
    """Validate and return a list of token ids; ``name`` is the field of the request."""
    if not isinstance(value, list) or not all(type(index) is int and 0 <= index < vocabulary for index in value):
        raise BadRequest(name, f"must be a list of token ids from 0 to {vocabulary - 1}")
    return value


def _settings(
    given: Mapping[str, Any], chat: bool, prompts: Sequence[Tensor], limits: RequestLimits
) -> SamplingSettings | None:
    longest = max(len(prompt) for prompt in prompts)
    name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    asked = _whole(given, name, None, 0, 2**31)
    room = 2**31 if limits.longest is None else limits.longest - longest
    if room < (1 if asked is None else asked):
        raise BadRequest(
            ("messages" if chat else "prompt") if asked is None else name,
            f"asks for too many tokens: a prompt has {longest}, {asked or 1} more are asked for, and prompt and "
            f"completion have at most {limits.longest} together",
        )
    tokens = min(limits.settings.max_new_tokens, room) if asked is None else asked
    if tokens == 0:
        if chat or not (given.get("echo") or "prompt_logprobs" in given):
            raise BadRequest(name, "is 0, which gives nothing without echo or prompt_logprobs")
        return None
    top_k = _whole(given, "top_k", limits.settings.top_k, -1, 2**31)
    temperature = _number(given, "temperature", limits.settings.temperature)
    top_p = _number(given, "top_p", limits.settings.top_p)
    try:
        return replace(
            limits.settings, max_new_tokens=tokens, temperature=temperature, top_p=top_p, top_k=max(top_k, 0)
        )
    except SettingError as error:
        raise BadRequest(str(error).partition(" ")[0], str(error).partition(" ")[2]) from None


def _prompts(given: Mapping[str, Any], text: Text, echo: bool) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Encode the prompts of a text completion: texts (control tokens in them are encoded as such), or token ids."""
    value = given.get("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRequest("prompt", "must be a text, token ids, or a list of texts or of lists of token ids")
    if len(value) > MOST_COMPLETIONS:
        raise BadRequest("prompt", f"has {len(value)} prompts; a request may have at most {MOST_COMPLETIONS}")
    rows = []
    for one in value:
        if isinstance(one, str):
            _check_unicode("prompt", one)
            rendered = render_prompt(text.tokenizer, one, rendered=True)
            if not _flag(given, "add_special_tokens", True):
                rendered = rendered._replace(opening=())
            ids = tokenization.encode_rendered(text.tokenizer, [rendered])[0].ids
        else:
            ids = token_ids(one, "prompt", text.vocabulary)
        if not ids:
            raise BadRequest("prompt", "is empty, but the first token is predicted from the prompt")
        rows.append(ids)
    texts = [one if isinstance(one, str) else text.decode(one) for one in value] if echo else []
    return tuple(torch.tensor(ids) for ids in rows), tuple(texts)


def encoded(body: Mapping[str, Any], text: Text) -> list[int]:
    """Return the token ids of a request's ``prompt``, or of its ``messages`` with the generation prompt."""
    _check_fields(body, {"model", "prompt", "add_special_tokens"} | (CHAT_FIELDS - COMMON))
    given = {name: value for name, value in body.items() if value is not None}
    with text.lock:
        (ids, *others), _ = _messages(given, text) if "messages" in given else _prompts(given, text, False)
    if others:
        raise BadRequest("prompt", "must be one text")
    return ids.tolist()


def _check_unicode(field: str, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeError, RecursionError):
        raise BadRequest(field, "is not valid Unicode: a lone surrogate, or too deep") from None


def _messages(given: Mapping[str, Any], text: Text) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Render and encode the messages of a chat; control tokens that their texts spell are encoded as plain text."""
    value, args = given.get("messages"), given.get("chat_template_kwargs")
    if not isinstance(value, list) or not value:
        raise BadRequest("messages", "must be a list of {role, content}")
    if args is not None and not isinstance(args, Mapping):
        raise BadRequest("chat_template_kwargs", "is not an object")
    if given.get("tool_choice", "auto") not in ("auto", "none"):
        raise BadRequest("tool_choice", "must be auto or none: the model is not forced to call a tool")
    _check_unicode("messages", [value, args, given.get("tools")])
    others = [key for key in unused_keys([value]) if key not in ANSWER_KEYS]
    if others:
        raise BadRequest("messages", f"have the key {shortened(others[0])}, which is not read; known: "
                                      f"{', '.join(sorted(TURN_KEYS))}")  # fmt: skip
    try:
        turns = messages_of(value)
        tools = tools_of(given.get("tools")) if given.get("tool_choice") != "none" else []
    except RowRefused as error:
        raise BadRequest("messages", f"cannot be read: {error}") from None
    if not turns:
        raise BadRequest("messages", "are empty")
    open_turn = _flag(given, "continue_final_message")
    if (turns[-1]["role"] == "assistant") is not open_turn or open_turn and given.get("add_generation_prompt"):
        raise BadRequest(
            "continue_final_message",
            "must be true, and add_generation_prompt false, where the last message is the assistant's, and only there",
        )
    if given.get("add_generation_prompt") is False and not open_turn:
        raise BadRequest("add_generation_prompt", "is false: ask /v1/completions to continue a rendered text")
    if tools:
        turns = [{**turns[0], "tools": tools}, *turns[1:]]
    ids = tokenization.encode_prompt(text.for_args(args), turns)
    return (torch.tensor(ids),), ("",)
