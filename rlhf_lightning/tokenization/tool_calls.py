"""Tool calls in the text of a completion, in the forms that templates write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
"""A call of Hermes, Qwen and SmolLM3."""


def read_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the text around the tool calls, and the calls as ``{"name": ..., "arguments": {...}}``.

    Read are JSON objects between ``<tool_call>`` tags, and a text that is a JSON object (Llama 3) or list (Mistral) of
    calls and nothing more. Where a call cannot be read, the text is returned whole, with no calls.

    Args:
        text: text of a completion without special tokens.
    """
    tagged = TAGGED.findall(text)
    found = [_calls(part) for part in tagged] if tagged else [_calls(text)]
    if not all(found):
        return text, []
    rest = TAGGED.sub("", text).strip() if tagged else ""
    return rest, [call for calls in found for call in calls]


def _calls(text: str) -> list[dict[str, Any]]:
    """Return the calls that a JSON text consists of; none if it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call is not None] if None not in calls else []


def _call(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return {"name": value["name"], "arguments": dict(arguments)} if isinstance(arguments, Mapping) else None
