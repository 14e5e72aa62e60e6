"""Convert values of a row to texts and turns, and find the prompt that two completions share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlhf_lightning.data.canonical import ROLES, Row, RowRefused
from rlhf_lightning.loading import SCALARS, is_too_deep
from rlhf_lightning.tokenization.facts import THOUGHT_KEYS
from rlhf_lightning.tokenization.templates import CALL_ARGS
from rlhf_lightning.types import Message, Prompt

FLAGS = ("weight", "train", "trainable", "loss_mask", "loss")
"""Keys of a turn that set its weight in the loss."""

TURN_KEYS = {
    "role", "from", "content", "value", "name", "tool_calls", "function_call", "tool_call_id", "tools",
    "template_args", *THOUGHT_KEYS, *FLAGS,
}  # fmt: skip
"""Keys of a turn that are read."""

MEDIA = frozenset(["image", "images", "video", "videos", "audio", "audios"])
"""Names of columns, turn keys and content-part types that hold media instead of text."""

TEXTS = ("text", "input_text", "output_text")
THOUGHTS = ("thinking", "reasoning")
"""Types of content parts that are read as thoughts; `TEXTS` are read as text."""

LARGEST = 1e6
"""Maximum weight, and maximum absolute margin: with larger values a loss in fp32 is not finite."""

_JSON_TURNS = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""")


def text_of(value: Any, reason: str) -> str:
    """Return a text that is not blank; refuse any other value with ``reason``."""
    if not isinstance(value, str) or not value.strip():
        raise RowRefused(reason)
    return value


def spells_turns(value: Any) -> bool:
    """Return whether a text looks like a list of messages in JSON or in Python's notation."""
    return isinstance(value, str) and _JSON_TURNS.match(value) is not None


def from_json(value: str, reason: str) -> Any:
    """Parse JSON text; refuse invalid text with ``reason``."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowRefused(reason) from None


def messages_of(value: Any) -> list[Message]:
    """Read a list of messages, and map their roles by `ROLES`; empty turns are refused."""
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list | tuple) or not value:
        raise RowRefused("no_messages" if isinstance(value, list | tuple) else "malformed_messages")
    turns = [made for turn in value if (made := _message(turn)) is not None]
    tools, *later = [tools_of(turn.get("tools")) for turn in value]
    if any(later):  # such tools would apply only from that turn on
        raise RowRefused("bad_tool_call")
    if turns and tools:
        turns[0]["tools"] = tools
    if turns and (args := template_args_in(value[0].get("template_args"))):
        turns[0]["template_args"] = args
    return turns


def _message(turn: Any) -> Message | None:
    if not isinstance(turn, Mapping):
        raise RowRefused("malformed_messages")
    name, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(name, str):
        raise RowRefused("malformed_messages")
    if name.lower() not in ROLES:
        raise RowRefused("unknown_role")
    role = ROLES[name.lower()]
    if not MEDIA.isdisjoint(turn) and any(turn.get(key) for key in MEDIA):
        raise RowRefused("media")
    content, thought = _text_of_parts(content)
    calls = _calls_of(turn, name, content)
    made: Message = {"role": role, "content": "" if name == "function_call" else content or ""}
    for key in THOUGHT_KEYS:
        if turn.get(key) is not None and not isinstance(turn[key], str):
            raise RowRefused("malformed_messages")
        thought = thought or turn.get(key) or ""
    if thought.strip() and role == "assistant":
        made["reasoning_content"] = thought
    if calls:
        made["tool_calls"] = calls
    made |= {key: str(turn[key]) for key in ("name", "tool_call_id") if isinstance(turn.get(key), str | int)}
    if (weight := _weight_of(turn, role)) != 1:
        made["weight"] = weight
    if not made["content"].strip() and not calls and role != "tool":
        if role == "system":
            return None  # an empty system prompt is often a mere placeholder
        raise RowRefused("empty_turn")
    return made


def _text_of_parts(content: Any) -> tuple[str | None, str]:
    """Return the text and the thought of a content, which may be a list of parts."""
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list | tuple):
        raise RowRefused("malformed_messages")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if str(kind).removeprefix("input_").removesuffix("_url") in MEDIA:
            raise RowRefused("media")
        text = part.get(kind, part.get("text")) if isinstance(part, Mapping) else part
        if not isinstance(text, str) or kind not in (*TEXTS, *THOUGHTS):
            raise RowRefused("malformed_messages")
        (thoughts if kind in THOUGHTS else texts).append(text)
    return "".join(texts), "".join(thoughts)


def _calls_of(turn: Mapping[str, Any], name: str, content: str | None) -> list[dict[str, Any]]:
    calls = turn.get("tool_calls") or turn.get("function_call")
    if name == "function_call":
        calls = text_of(content, "bad_tool_call")
    elif not calls:
        return []
    calls = from_json(calls, "bad_tool_call") if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list | tuple) or is_too_deep(calls) or (calls and ROLES[name.lower()] != "assistant"):
        raise RowRefused("bad_tool_call")
    return [_call(one) for one in calls]


def _call(value: Any) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowRefused("bad_tool_call")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = from_json(arguments, "bad_tool_call") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise RowRefused("bad_tool_call")
    made: dict[str, Any] = {"type": "function"}
    if isinstance(value.get("id"), str | int):
        made["id"] = str(value["id"])
    return {**made, "function": {"name": function["name"], "arguments": dict(arguments)}}


def _weight_of(turn: Mapping[str, Any], role: str) -> float:
    weight = 1.0
    given = [turn[key] for key in FLAGS if turn.get(key) is not None]
    for value in given:
        if not isinstance(value, bool | int | float) or not 0 <= value <= LARGEST:
            raise RowRefused("bad_turn_weight")
        weight *= float(value)
    if role != "assistant":
        if any(given):
            raise RowRefused("trained_turn")
        return 1.0
    return weight


def tools_of(value: Any) -> list[Any]:
    """Read tool descriptions: a list of objects, or JSON text."""
    if isinstance(value, str):
        value = from_json(value, "bad_tool_call") if value.strip() else []
    if value is None:
        return []
    if not isinstance(value, list | tuple) or is_too_deep(value):
        raise RowRefused("bad_tool_call")
    found = [_without_nulls(one) for one in value]  # tables fill in nulls for keys of other rows' tools
    functions = [one.get("function", one) if isinstance(one, Mapping) else None for one in found]
    if not all(isinstance(one, Mapping) and isinstance(one.get("name"), str) for one in functions):
        raise RowRefused("bad_tool_call")
    return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list | tuple) else value


def template_args_in(given: Any, documents: Any = None) -> dict[str, Any]:
    """Read a row's variables of the chat template, an object or JSON text, and documents, which are a list of objects.

    Documents of any other form belong to no template, and are not read.
    """
    if given is None and documents is None:
        return {}
    if isinstance(given, str):
        given = from_json(given, "bad_template_args") if given.strip() else None
    if not isinstance(given, Mapping | None) or is_too_deep(given):
        raise RowRefused("bad_template_args")
    args: dict[str, Any] = _without_nulls(given or {})
    if _are_documents(documents):
        found = _without_nulls(documents)
        if args.setdefault("documents", found) != found:
            raise RowRefused("bad_template_args")
    if not _are_documents(args.get("documents", [{}])) or not {str(name) for name in args}.isdisjoint(CALL_ARGS):
        raise RowRefused("bad_template_args")
    return args


def _are_documents(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, Mapping) for one in value)


def history_of(value: Any) -> list[Message]:
    """Read earlier turns: messages, or pairs of a question and an answer; as a list, or JSON text."""
    if isinstance(value, str):
        value = from_json(value, "bad_history") if value.strip() else None
    if value is None or (isinstance(value, list | tuple) and not value):
        return []
    if not isinstance(value, list | tuple):
        raise RowRefused("bad_history")
    if all(isinstance(one, Mapping) for one in value):
        return messages_of(value)
    turns: list[Message] = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowRefused("bad_history")
        asked, said = (text_of(one, "bad_history") for one in pair)
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return turns


def unused_keys(values: Iterable[Any]) -> Iterator[str]:
    """Yield the keys of turns that are not used, from the columns of a row."""
    for value in values:
        if isinstance(value, SCALARS):
            continue
        for turn in value if isinstance(value, list | tuple) else (value,):
            if isinstance(turn, Mapping) and ("role" in turn or "from" in turn):
                thinks = ROLES.get(str(turn.get("role", turn.get("from"))).lower()) == "assistant"
                read = TURN_KEYS if thinks else TURN_KEYS.difference(THOUGHT_KEYS)
                yield from (str(key) for key, one in turn.items() if key not in read and one not in (None, "", []))


def with_user(turns: list[Message]) -> list[Message]:
    """Return the turns; refuse them if there is no user turn."""
    if not any(turn["role"] == "user" for turn in turns):
        raise RowRefused("no_user_turn")
    return turns


def prompt_of(value: Any) -> Prompt:
    """Read a prompt: text, or turns that include a user turn."""
    if not isinstance(value, str) and isinstance(value, list | tuple | Mapping) and value:
        return with_user(messages_of(value))
    if spells_turns(value):
        raise RowRefused("json_text")
    return text_of(value, "empty_prompt")


def completion_of(value: Any) -> str | list[Message]:
    """Read a completion: text, or turns up to the assistant's last turn."""
    if not isinstance(value, str) and isinstance(value, list | tuple | Mapping) and value:
        turns = messages_of(value)
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
        if not turns:
            raise RowRefused("no_assistant_turn")
        if all(turn.get("weight", 1) == 0 for turn in turns if turn["role"] == "assistant"):
            raise RowRefused("no_learned_turn")
        if "tools" in turns[0]:  # tools belong to the prompt
            raise RowRefused("bad_tool_call")
        return turns
    if spells_turns(value):
        raise RowRefused("json_text")
    return text_of(value, "empty_completion")


def parted(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """Split turns before the first assistant turn that answers a user, and after the last assistant turn."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise RowRefused("no_assistant_turn")
    asked = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
    answers = [i for i in answers if i > asked] or answers
    if all(turns[i].get("weight", 1) == 0 for i in answers):
        raise RowRefused("no_learned_turn")
    return with_user(turns[: answers[0]]), turns[answers[0] : answers[-1] + 1]


def one_style(prompt: Prompt, completions: list[Any], as_chat: bool) -> tuple[Prompt, list[Any]]:
    """Convert the prompt to messages if a completion is messages, or if asked to; such completions must start with the
    assistant.
    """
    turned = [c for c in completions if isinstance(c, list)]
    if isinstance(prompt, str) and (as_chat or turned):
        prompt = [{"role": "user", "content": prompt}]
    if any(c[0]["role"] != "assistant" for c in turned):
        raise RowRefused("prompts_differ")
    return prompt, completions


def context_of(row: Row) -> set[str]:
    """Return which of the columns ``system``, ``history``, ``tools`` and ``functions`` a row has."""
    systems = {"system"} if not isinstance(row.get("system", 0), int | float) else set()
    return systems | {name for name in ("history", "tools", "functions") if name in row}


def in_context(row: Row, prompt: Prompt) -> Prompt:
    """Add a row's ``system``, ``history`` and ``tools`` (or ``functions``) to its prompt, which becomes messages."""
    context = context_of(row)
    if not context:
        return prompt
    system, _ = _text_of_parts(row["system"] if "system" in context else None)
    history = history_of(row.get("history"))
    if context - {"tools", "functions"}:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system and system.strip():
            first = prompt[0] if prompt[0]["role"] == "system" else None
            if first is not None and first["content"].strip() != system.strip():
                raise RowRefused("two_systems")
            prompt = prompt if first is not None else [{"role": "system", "content": system}, *prompt]
        begins = 1 if prompt[0]["role"] == "system" else 0
        prompt = [*prompt[:begins], *history, *prompt[begins:]]
    if tools := tools_of(row.get("tools")) or tools_of(row.get("functions")):
        if isinstance(prompt, str):
            raise RowRefused("tools_without_messages")
        if any(turn.get("tools", tools) != tools for turn in prompt):
            raise RowRefused("bad_tool_call")
        prompt = [{**prompt[0], "tools": tools}, *prompt[1:]]
    return prompt


# ---- pairs ----------------------------------------------------------------------------------------------------------


def pair_of(row: Row, explicit: bool) -> tuple[Prompt, list[Any]]:
    """Read the prompt of a pair and its two completions, chosen first.

    Args:
        row: has ``chosen`` and ``rejected``, and ``prompt`` if ``explicit``.
        explicit: whether the prompt has its own column; otherwise it is the common beginning of both sides.

    Raises:
        RowRefused: the two sides do not answer the same prompt.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list | Mapping) and isinstance(rejected, list | Mapping):
        both = [messages_of(chosen), messages_of(rejected)]
        if explicit and all(turns and turns[0]["role"] == "assistant" for turns in both):
            return prompt_of(row["prompt"]), [completion_of(chosen), completion_of(rejected)]
        prompt, completions = _common_turns(*both)  # some data sets repeat the prompt in both columns
        return _agreed(row["prompt"], prompt) if explicit else prompt, completions
    if explicit:
        return prompt_of(row["prompt"]), [completion_of(chosen), completion_of(rejected)]
    texts = [text_of(chosen, "empty_completion"), text_of(rejected, "empty_completion")]
    if any(map(spells_turns, texts)):
        raise RowRefused("json_text")
    if any(_MARKER.search("\n\n" + text.lstrip()) for text in texts):
        return _transcripts(*texts)
    return _common_text(*texts)


def _common_turns(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Any]]:
    if chosen == rejected:
        raise RowRefused("identical_completions")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None or any(turns[same]["role"] != "assistant" for turns in (chosen, rejected)):
        raise RowRefused("prompts_differ")
    return with_user(chosen[:same]), [completion_of(chosen[same:]), completion_of(rejected[same:])]


def _agreed(given: Any, shared: list[Message]) -> list[Message]:
    """Return the turns that both sides begin with, or those of the prompt column if it has earlier turns too."""
    if not given:
        return shared
    if isinstance(given, str):
        texts = [turn["content"].strip() for turn in shared]
        if any(given.strip() in text or text in given for text in texts):
            return shared
    elif (turns := messages_of(given))[-len(shared) :] == shared:
        return turns
    elif turns in (shared[: len(turns)], shared[-len(turns) :]):
        return shared
    raise RowRefused("prompts_differ")


def _common_text(chosen: str, rejected: str) -> tuple[Prompt, list[Any]]:
    if chosen == rejected:
        raise RowRefused("identical_completions")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None:
        same = min(len(chosen), len(rejected))
    if same and chosen[same - 1] == " ":
        same -= 1  # the space belongs to the word after it
    prompt = text_of(chosen[:same], "empty_prompt")
    return prompt, [text_of(chosen[same:], "empty_completion"), text_of(rejected[same:], "empty_completion")]


_MARKER = re.compile(r"\n\n(Human|Assistant):")
_INLINE = re.compile(r"\b(Human|Assistant) ?:")


def _transcripts(chosen: str, rejected: str) -> tuple[Prompt, list[Any]]:
    """Read the turns of two transcripts that differ only in their last turn."""
    both = []
    for text in (chosen, rejected):
        head, *rest = _MARKER.split("\n\n" + text.lstrip())
        if head.strip():
            raise RowRefused("no_user_turn")
        roles = {"Human": "user", "Assistant": "assistant"}
        pairs = zip(rest[::2], rest[1::2], strict=True)
        both.append([{"role": roles[role], "content": content.strip()} for role, content in pairs])
    turns = both[0] + both[1]
    if any(not turn["content"] for turn in turns):
        raise RowRefused("empty_turn")
    if both[0][:-1] != both[1][:-1]:
        raise RowRefused("prompts_differ")
    for one in both:
        if [turn["role"] for turn in one] != ["user", "assistant"] * (len(one) // 2) or not one:
            raise RowRefused("turns_do_not_alternate")
    if any(_INLINE.search(turn["content"]) for turn in turns):
        raise RowRefused("inline_role_marker")
    return both[0][:-1], [[both[0][-1]], [both[1][-1]]]
