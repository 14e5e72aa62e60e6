"""Tools for policies: Python functions that the policy calls in the format of its own chat template."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from rlhf_lightning.environments.calls import Call, CallError, calls_in
from rlhf_lightning.errors import DataError, MissingError, SettingError, check_choice
from rlhf_lightning.loading import load
from rlhf_lightning.types import Episode, Message, Prompt, Reply

EXAMPLES = {
    "auto": '<tool_call>{"name": NAME, "arguments": {...}}</tool_call>',
    "hermes": '<tool_call>{"name": NAME, "arguments": {...}}</tool_call>',
    "llama3": '{"name": NAME, "parameters": {...}}',
    "mistral": '[TOOL_CALLS][{"name": NAME, "arguments": {...}}]',
    "plain": "call: NAME(argument=value)",
}
"""Example of a call in each format."""

JSON_TYPES: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array", tuple: "array", dict: "object",
    type(None): "null",
}  # fmt: skip
LONGEST_RESULT = 4000
"""Maximum number of characters of a tool's result that the policy reads."""


class ToolEnvironment:
    """Environment with tools: the policy calls them, reads the results as turns of the role ``tool``, then answers.

    The descriptions of the tools come from the functions' signatures and docstrings, and are rendered by the model's
    own chat template. A turn without a call ends the episode: it is the answer, which the run's scorer judges. An
    invalid call gets an error message as its result. The calls of a turn are executed in order. If a tool has a method
    ``for_row(row)``, it is called for each data row and returns the row's tool, such as a `LookupTable` with a column.

    Args:
        tools: Python functions, also async functions, or their import paths; ``calculator`` is built in. An object with
            a ``__name__``, a docstring and a call signature works too, such as a `LookupTable`.
        reward: reward of a turn by its content: ``call`` for calls that worked, ``wrong`` for a wrong call; otherwise
            0.
        call_format: "auto" reads every format below; "hermes" ``<tool_call>{...}</tool_call>`` (Qwen, Hermes);
            "llama3" a bare JSON object; "mistral" ``[TOOL_CALLS][{...}]``; "plain" ``name(argument=value)`` on a line
            that begins with ``call:``.
        system: system turn added before the conversation; null adds none.
        describe: "template" leaves descriptions, calls and results to the chat template; "system" is for templates
            without tools: descriptions are in the system turn, and results come back as user turns.

    Raises:
        SettingError: a tool cannot be imported or described, or two tools have the same name.
    """

    def __init__(
        self,
        tools: Sequence[Any],
        reward: Mapping[str, float] | None = None,
        call_format: Literal["auto", "hermes", "llama3", "mistral", "plain"] = "auto",
        system: str | None = None,
        describe: Literal["template", "system"] = "template",
    ) -> None:
        unknown = set(reward or {}) - {"call", "wrong"}
        if unknown:
            raise SettingError("unknown-choice", f"reward names {sorted(unknown)}: it takes 'call' and 'wrong'")
        check_choice([*EXAMPLES], call_format=call_format)
        check_choice(("template", "system"), describe=describe)
        shipped = {"calculator": calculator, "LookupTable": LookupTable}
        loaded = [tool if callable(tool) else load(tool, Callable, shipped, "tool") for tool in tools]
        self.tools = {str(getattr(tool, "__name__", "")): tool for tool in loaded}
        if len(self.tools) < len(loaded) or "" in self.tools:
            raise SettingError("tool-names", f"the tools {[*self.tools]} need different names, one for each of {tools}")
        self.descriptions = [description_of(tool) for tool in loaded]
        self.rewards, self.call_format, self.by_template = dict(reward or {}), call_format, describe == "template"
        if not self.by_template:
            system = "\n\n".join([*([system] if system else []), self._manual()])
        self.system = system

    def _manual(self) -> str:
        """Return the descriptions of the tools for a system turn, with the format of a call."""
        functions = [json.dumps(one["function"], ensure_ascii=False) for one in self.descriptions]
        return "\n".join(["You may call these functions:", *functions, f"Write a call as {EXAMPLES[self.call_format]}"])

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Return the data's prompt as messages, with the descriptions of the tools."""
        prompt = row["prompt"]
        turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        if self.system is not None:
            turns = [{"role": "system", "content": self.system}, *turns]
        if not self.by_template:
            return turns
        return [{**turns[0], "tools": [*(turns[0].get("tools") or ()), *self.descriptions]}, *turns[1:]]

    def reply(self, episode: Episode) -> Reply:
        """Execute the calls of the policy's last turn; a turn without a call ends the episode."""
        try:
            content, calls = calls_in(episode.said, self.call_format)
        except CallError as error:
            return self._answer([_result(f"error: {error}")], self.rewards.get("wrong", 0.0))
        if not calls:
            return Reply(done=True)
        results = [self.call(call, episode.row) for call in calls]
        kind = "call" if all(works for works, _ in results) else "wrong"
        names = [f"call{episode.turn:02}{place:03}" for place in range(len(calls))]
        made = [
            {"type": "function", "id": name, "function": call._asdict()}
            for name, call in zip(names, calls, strict=True)
        ]
        replies = [_result(text, call.name, name) for (_, text), call, name in zip(results, calls, names, strict=True)]
        turn = {"role": "assistant", "content": content, "tool_calls": made}
        return self._answer(replies, self.rewards.get(kind, 0.0), turn)

    def _answer(self, results: list[Message], reward: float, turn: Message | None = None) -> Reply:
        """Return the results of a turn's calls as turns of the role ``tool``, or as one user turn."""
        faults = "\n".join(one["content"] for one in results if one["content"].startswith("error: ")) or None
        if self.by_template:
            return Reply(messages=results, reward=reward, turn=turn, feedback=faults)
        return Reply("\n".join(one["content"] for one in results), reward=reward, feedback=faults)

    def call(self, call: Call, row: Mapping[str, Any]) -> tuple[bool, str]:
        """Execute a call for a data row; return whether it worked, and the result or the error as text."""
        tool: Any = self.tools.get(call.name)
        if tool is None:
            return False, f"error: there is no tool {call.name!r}; the tools are {', '.join(self.tools)}"
        try:
            tool = tool.for_row(row) if hasattr(tool, "for_row") else tool
            inspect.signature(tool).bind(**call.arguments)
        except TypeError as error:
            return False, f"error: {call.name}: {error}"
        hints = hints_of(tool)
        for name, value in call.arguments.items():
            if not fits(value, hints.get(name, Any)):
                wanted = json.dumps(schema_of(hints[name]))
                return False, f"error: {call.name}: {name} is {json.dumps(value, default=str)[:100]}, not {wanted}"
        try:
            found = tool(**call.arguments)
            if inspect.iscoroutine(found):
                with ThreadPoolExecutor(1) as pool:  # the caller's thread may run an event loop, as in a notebook
                    found = pool.submit(asyncio.run, found).result()
            text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
            text[:LONGEST_RESULT].encode()
        except (Exception, SystemExit) as error:  # the policy may pass any arguments
            return False, f"error: {call.name}: {error or type(error).__name__}"[:LONGEST_RESULT]
        return True, text[:LONGEST_RESULT]


def _result(text: str, name: str = "", identifier: str = "") -> Message:
    named = {"name": name, "tool_call_id": identifier} if name else {}
    return {"role": "tool", "content": text, **named}


def description_of(tool: Callable[..., Any]) -> dict[str, Any]:
    """Describe a function for chat templates: name, docstring, and a JSON schema of its arguments.

    The docstring's first paragraph describes the function; lines of the form ``name: text`` describe arguments.

    Raises:
        SettingError: ``tool-undescribed``: the function has no docstring, or an argument has no name, no type, or a
            type that JSON cannot represent.
    """
    name, text = str(getattr(tool, "__name__", tool)), inspect.getdoc(tool) or ""
    if not text.strip():
        raise SettingError("tool-undescribed", f"the tool {name} has no docstring; add one: the policy reads it")
    about = dict(re.findall(r"^\s*(\w+)(?:\s*\([^)]*\))?:[ \t]+(.+)$", text, re.MULTILINE))
    try:
        hints, arguments = hints_of(tool), inspect.signature(tool).parameters.values()
    except (NameError, TypeError, ValueError) as error:
        raise SettingError("tool-undescribed", f"the tool {name} has no readable signature: {error}") from error
    properties: dict[str, Any] = {}
    required = []
    for argument in arguments:
        if argument.kind not in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
            raise SettingError(
                "tool-undescribed",
                f"the tool {name} takes {argument} without a name, but the policy names each argument: list them as "
                "named arguments",
            )
        if argument.name not in hints:
            raise SettingError("tool-undescribed", f"the argument {argument.name} of the tool {name} needs a type")
        if not is_json(hints[argument.name]):
            raise SettingError(
                "tool-undescribed",
                f"the argument {argument.name} of the tool {name} is a {hints[argument.name]}, which a call cannot "
                "express: use str, int, float, bool, list, dict, Literal, or a union of them",
            )
        properties[argument.name] = {**schema_of(hints[argument.name]), **_about(about, argument.name)}
        if argument.default is argument.empty:
            required.append(argument.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    summary = " ".join(text.split("\n\n")[0].split())
    return {"type": "function", "function": {"name": name, "description": summary, "parameters": parameters}}


def _about(about: Mapping[str, str], name: str) -> dict[str, str]:
    return {"description": about[name].strip()} if name in about else {}


def hints_of(tool: Callable[..., Any]) -> dict[str, Any]:
    """Return the type hints of a function, or of an object's ``__call__``."""
    return typing.get_type_hints(tool if inspect.isroutine(tool) else type(tool).__call__)


def is_json(hint: Any) -> bool:
    """Whether JSON can represent the type of a hint."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or origin is typing.Literal:
        return True
    if origin is dict:
        return inner[0] is str
    return (origin in (typing.Union, types.UnionType) or (origin or hint) in JSON_TYPES) and all(
        map(is_json, (one for one in inner if one is not ...))
    )


def fits(value: Any, hint: Any) -> bool:
    """Whether a value parsed from a call has the type of a hint."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in inner
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    kind: Any = {float: (int, float), tuple: list}.get(origin or hint, origin or hint)
    if not isinstance(value, kind) or (isinstance(value, bool) and (origin or hint) is not bool):
        return False
    return origin is not list or all(fits(one, inner[0]) for one in value)


def schema_of(hint: Any) -> dict[str, Any]:
    """Return the JSON schema of a type hint: plain types, lists, dicts, Literal, and unions with None."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin is typing.Literal:
        return {"type": JSON_TYPES.get(type(inner[0]), "string"), "enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        some = [schema_of(one) for one in inner if one is not type(None)]
        return some[0] if len(some) == 1 else {"anyOf": some}
    if origin in (list, tuple) and inner:
        return {"type": "array", "items": schema_of(inner[0])}
    return {"type": JSON_TYPES[origin or hint]}


# ---- built-in tools -------------------------------------------------------------------------------------------------

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip
LONGEST_EXPRESSION, LARGEST_NUMBER, LARGEST_POWER = 200, 1e100, 64


def calculator(expression: str) -> str:
    """Compute an arithmetic expression with + - * / // % ** and parentheses.

    Args:
        expression: the expression, such as (17 + 4) * 2.

    Raises:
        ValueError: it is something else, or its value is too large.
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"the expression has more than {LONGEST_EXPRESSION} characters")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
        value = _value(tree.body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is not an arithmetic expression") from None
    except OverflowError:
        raise ValueError("the value is too large") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr) -> int | float:
    """Evaluate a tree of numbers and operators; other nodes are refused, so no code can run."""
    value: Any = None
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, power = _value(node.left), _value(node.right)
        if abs(power) > LARGEST_POWER:
            raise ValueError(f"powers above {LARGEST_POWER} are not supported")
        value = base**power
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if not isinstance(value, int | float):
        raise ValueError("only numbers and the operators + - * / // % ** are supported")
    if not abs(value) <= LARGEST_NUMBER:
        raise ValueError("the value is too large")
    return value


class LookupTable:
    """Tool that looks up a key in a table.

    Args:
        table: the table, or a JSON file with an object; null with a column.
        name: name of the tool.
        about: description of the tool, which the policy reads.
        column: data column with each row's own table; null uses the same table for all rows.

    Raises:
        MissingError: the file does not exist.
        SettingError: both a table and a column are given, or neither.
    """

    def __init__(
        self,
        table: Mapping[str, Any] | str | None = None,
        name: str = "lookup",
        about: str = "Look up a key in the table.",
        column: str | None = None,
    ) -> None:
        if (table is None) == (column is None):
            raise SettingError("conflicting-settings", f"table is {table} and column {column}: give one of them")
        if isinstance(table, str) and not Path(table).is_file():
            raise MissingError("no-file", f"there is no file {table}")
        found = json.loads(Path(table).read_text(encoding="utf-8")) if isinstance(table, str) else table or {}
        self.table, self.__name__, self.__doc__ = {str(key): value for key, value in found.items()}, name, about
        self.column = column

    def for_row(self, row: Mapping[str, Any]) -> LookupTable:
        """Return the tool for a data row."""
        if self.column is None:
            return self
        if not isinstance(row.get(self.column), Mapping):
            raise DataError(
                "missing-data-column",
                f"the tool {self.__name__} needs the data column {self.column} with an object; the row has "
                f"{', '.join(map(str, row))}",
            )
        return LookupTable(row[self.column], self.__name__, self.__doc__ or "")

    def __call__(self, key: str) -> str:
        """Return the value of a key.

        Raises:
            ValueError: the key is not in the table.
        """
        if str(key) not in self.table:
            raise ValueError(f"there is no {key!r} in the table")
        return str(self.table[str(key)])
