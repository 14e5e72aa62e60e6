"""Parse tool calls from text, in the formats that chat templates write."""

from __future__ import annotations

import ast
import json
import re
from typing import Any, NamedTuple

from rlhf_lightning.loading import is_too_deep


class Call(NamedTuple):
    """A tool call."""

    name: str  # name of the tool
    arguments: dict[str, Any]  # arguments by name


class CallError(ValueError):
    """A text begins like a call but is invalid; the message is shown to the policy."""


HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*(.*)", re.DOTALL)
NAMED = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\][\w-]*\s*)?\[ARGS\]\s*")
LLAMA3 = re.compile(r"\A\s*(?:<\|python_tag\|>\s*)?(?=\{)", re.DOTALL)
PLAIN = re.compile(r"^call:\s*(.*)$", re.MULTILINE)
THOUGHT = re.compile(r"\A.*</think(?:ing)?>|\A.*\[/THINK\]", re.DOTALL)
CONTROL = re.compile(r"<\|[\w-]+\|>|</?s>")


def calls_in(text: str, form: str = "auto") -> tuple[str, list[Call]]:
    """Return the text before the calls, and the calls; without a call, the whole text and an empty list.

    Calls inside a thought at the beginning are ignored.

    Args:
        text: a turn of the policy, with the control tokens that mark calls.
        form: "hermes", "llama3", "mistral", "plain", or "auto" for any of them.

    Raises:
        CallError: a call begins but cannot be parsed.
    """
    thought = THOUGHT.match(text)
    start = thought.end() if thought else 0
    said = text[start:]
    for name, read in READERS.items():
        if form in ("auto", name) and (found := read(said)) is not None:
            place, calls = found
            _check(calls)
            return text[: start + place].rstrip(), calls
    return text, []


LONGEST_NAME = 200


def _check(calls: list[Call]) -> None:
    """Refuse long names, and arguments that cannot be written as JSON in UTF-8, as templates and logs need."""
    if any(len(call.name) > LONGEST_NAME for call in calls):
        raise CallError(f"the name of a tool has at most {LONGEST_NAME} characters")
    arguments = [call.arguments for call in calls]
    try:
        if not is_too_deep(arguments):
            json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
            return
    except (TypeError, ValueError):
        pass
    raise CallError("the arguments of a call must be plain JSON values in valid Unicode")


def _hermes(text: str) -> tuple[int, list[Call]] | None:
    found = list(HERMES.finditer(text))
    return (found[0].start(), [_call(_json(one[1])) for one in found]) if found else None


def _mistral(text: str) -> tuple[int, list[Call]] | None:
    found = MISTRAL.search(text)
    if found is None:
        return None
    written = CONTROL.sub("", found[1]).strip()
    if written.startswith("["):
        listed = _json(written)
        return found.start(), [_call(one) for one in listed if isinstance(listed, list)]
    calls = []
    for part in written.split("[TOOL_CALLS]"):  # newer templates: name[ARGS]{...}
        named = NAMED.match(part.strip())
        if named is None:
            raise CallError('a call is written [TOOL_CALLS][{"name": NAME, "arguments": {...}}]')
        calls.append(_call({"name": named[1], "arguments": _json(part.strip()[named.end() :])}))
    return found.start(), calls


def _llama3(text: str) -> tuple[int, list[Call]] | None:
    found = LLAMA3.match(text)
    if found is None or '"name"' not in text:
        return None
    written = CONTROL.sub("", text[found.end() :]).strip()
    return 0, [_call(_json(one)) for one in re.split(r"(?<=\})\s*;\s*(?=\{)", written)]


def _plain(text: str) -> tuple[int, list[Call]] | None:
    found = list(PLAIN.finditer(text))
    return (found[0].start(), [_written(one[1].strip()) for one in found]) if found else None


def _written(text: str) -> Call:
    """Parse ``name(argument=value)``; values are literals."""
    try:
        node = ast.parse(text, mode="eval").body
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args
        return Call(node.func.id, {str(one.arg): ast.literal_eval(one.value) for one in node.keywords if one.arg})
    except (AssertionError, SyntaxError, ValueError, RecursionError, MemoryError):
        raise CallError('write a call as call: NAME(argument="value")') from None


def _json(text: str) -> Any:
    try:
        return json.loads(CONTROL.sub("", text))
    except (ValueError, RecursionError) as error:
        raise CallError(f"the call is not valid JSON ({error})") from None


def _call(read: Any) -> Call:
    if isinstance(read, dict) and isinstance(read.get("function"), dict):
        read = read["function"]
    if not isinstance(read, dict) or not isinstance(read.get("name"), str):
        raise CallError('a call is a JSON object {"name": NAME, "arguments": {...}}')
    arguments = read.get("arguments", read.get("parameters", {}))
    arguments = _json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise CallError("the arguments of a call must be a JSON object")
    return Call(read["name"], arguments)


READERS = {"hermes": _hermes, "mistral": _mistral, "llama3": _llama3, "plain": _plain}
"""Parsers by format, in the order in which they are tried."""
