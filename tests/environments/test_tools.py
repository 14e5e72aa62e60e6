"""Test tools: their descriptions, parsing of calls, messages for wrong calls, and a whole episode of tokens."""

import asyncio
import math
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import END, make_tiny_tokenizer, refused

from rlhf_lightning.environments import (
    FaultTolerantEnvironment,
    GuessTheNumber,
    ToolEnvironment,
    calculator,
    conversing,
)
from rlhf_lightning.environments.calls import Call, CallError, calls_in
from rlhf_lightning.environments.tool_use import LookupTable, description_of
from rlhf_lightning.errors import ContractError
from rlhf_lightning.sampling.conversation import Turns
from rlhf_lightning.types import Episode, Message, MultiTurn, Reply

TOOLS = (
    "{% if tools %}{{ '<|system|>\n' + tools | tojson + '<|end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + ('user' if message.role == 'tool' else message.role) + '|>\n' + "
    "message.content + (message.tool_calls | tojson if message.tool_calls else '') + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def weather(city: str, unit: Literal["C", "F"] = "C", days: int | None = None, tags: list[str] | None = None) -> str:
    """Tell the weather
    of a city.

    Args:
        city: name of the city.
        unit: of the temperature.
    """
    return f"{city}: 7 {unit}"


def test_tool_descriptions_come_from_signature_and_docstring() -> None:
    assert description_of(weather)["function"] == {
        "name": "weather",
        "description": "Tell the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "name of the city."},
                "unit": {"type": "string", "enum": ["C", "F"], "description": "of the temperature."},
                "days": {"type": "integer"},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
        },
    }
    assert description_of(LookupTable({"a": 1}, "ages", "Look up an age."))["function"]["name"] == "ages"


def test_tools_without_docstring_or_types_are_refused() -> None:
    with refused("tool-undescribed", "no docstring"):
        description_of(lambda x: x)

    def untyped(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """Say nothing."""

    with refused("tool-undescribed", "the argument x of the tool untyped needs a type"):
        ToolEnvironment([untyped])
    with refused("tool-names"):
        ToolEnvironment([calculator, "calculator"])
    with refused("unknown-choice", "'wins'"):
        ToolEnvironment([calculator], reward={"wins": 1.0})


ADD = Call("add", {"a": 1, "b": "x"})


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ('so <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x"}}\n</tool_call>', "so"),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": \\"x\\"}"}', ""),
        ('{"name": "add", "parameters": {"a": 1, "b": "x"}}', ""),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": "x"}}<|eom_id|>', ""),
        ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": "x"}, "id": "123456789"}]</s>', ""),
        ('hm[TOOL_CALLS]add[ARGS]{"a": 1, "b": "x"}', "hm"),
        ('I add.\ncall: add(a=1, b="x")', "I add."),
        ('<think>call: f()</think>\ncall: add(a=1, b="x")', "<think>call: f()</think>"),
        ('{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}', ""),
    ],
)
def test_tool_calls_are_read_in_every_template_format(text: str, before: str) -> None:
    assert calls_in(text) == (before, [ADD])


def test_a_format_reads_only_its_own_calls() -> None:
    assert calls_in('call: add(a=1, b="x")', "hermes")[1] == []
    for text in ("the sum is 3", "{1, 2}", "we call: it", "", "<think>call: f()</think> 3"):
        assert calls_in(text) == (text, [])
    both = "<tool_call>" + '{"name": "f"}' + "</tool_call>" + '\n<tool_call>{"name": "g"}</tool_call>'
    assert [call.name for call in calls_in(both)[1]] == ["f", "g"]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>add(1)</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        "[TOOL_CALLS]hello",
        "call: add(1)",
        "call: __import__('os').system('x')",
        "call: f(a=g())",
        '{"name": "f", "parameters"',
        "<tool_call>" + "[" * 5000,
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "' + "f" * 201 + '"}</tool_call>',
        '{"name": "f", "arguments": {"a": ' + "[" * 400 + "]" * 400 + "}}",
        *(
            f"call: f(a={value})"
            for value in ("1j", "b'x'", "{1, 2}", "{(1, 2): 3}", "...", "1e999", "[" * 90 + "]" * 90)
        ),
        *(f"{start}{' ' * 200_000}x" for start in ("<tool_call>", "[TOOL_CALLS]f")),
    ],
)
def test_a_malformed_call_raises_a_call_error(text: str) -> None:
    with pytest.raises(CallError):
        calls_in(text)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(17 + 4) * 2", "42"),
        ("10 / 4", "2.5"),
        ("7 // 2 - -1", "4"),
        ("2 ** 10", "1024"),
        ("1 / 3", "0.3333333333"),
        ("4 / 2", "2"),
    ],
)
def test_the_calculator_evaluates_expressions(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "9**9**9",
        "1/0",
        "True+1",
        "1e99*1e99",
        "(-8)**0.5",
        "x",
        "",
        "1+" * 300,
        "(" * 150,
        "1e90**64",
        "[1]*9",
        "'a'*9",
        "1 if 1 else 2",
        "10.0**64**2",
        "0**-1",
    ],
)
def test_the_calculator_refuses_other_expressions(expression: str) -> None:
    with pytest.raises(ValueError, match=r"^[\w'(]"):
        calculator(expression)


def episode(text: str, turn: int = 0) -> Episode:
    return Episode({}, [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}], [], [], 3, turn)


def test_invalid_calls_get_a_reply_and_a_penalty() -> None:
    tools = ToolEnvironment([calculator, LookupTable({"a": 1})], reward={"call": 0.1, "wrong": -0.2})
    told = {
        'call: calculator(expression="1+1")': ("2", 0.1),
        'call: lookup(key="a")': ("1", 0.1),
        'call: lookup(key="b")': ("error: lookup: there is no 'b' in the table", -0.2),
        "call: search(q=1)": ("error: there is no tool 'search'; the tools are calculator, lookup", -0.2),
        "call: lookup(name=1)": ("error: lookup: missing a required argument: 'key'", -0.2),
        "call: lookup(": ('error: write a call as call: NAME(argument="value")', -0.2),
    }
    for text, (result, reward) in told.items():
        reply = tools.reply(episode(text))
        (message,) = reply.messages
        assert (message["role"], message["content"], reply.reward, reply.done) == ("tool", result, reward, False)
    assert tools.reply(episode("it is 2")).done and tools.reply(episode("it is 2")).reward == 0.0


def test_without_template_support_tools_are_listed_in_the_system_turn(tiny_tokenizer: Any) -> None:
    tools = ToolEnvironment([calculator], call_format="plain", system="Be exact.", describe="system")
    turns: Any = tools.reset({"prompt": "1 + 1?"})
    assert [turn["role"] for turn in turns] == ["system", "user"] and "tools" not in turns[0]
    assert turns[0]["content"].startswith("Be exact.") and turns[0]["content"].endswith("call: NAME(argument=value)")
    conversation = Turns(conversing(tools), tiny_tokenizer, [turns], {}, [0])
    said = tiny_tokenizer('call: calculator(expression="1+1")').input_ids
    assert conversation.replies([0], [[*said, END]], [True]) == [True]
    assert tiny_tokenizer.decode(conversation.ids(0)).endswith("<|user|>\n2<|end|>\n<|assistant|>\n")
    with refused("unknown-choice", "describe is 'both'"):
        ToolEnvironment([calculator], describe="both")  # type: ignore[arg-type]


def test_tool_results_that_are_not_json_get_an_error_reply() -> None:
    def odd(kind: str) -> object:
        """Return something.

        Args:
            kind: what.
        """
        circle: list[object] = []
        circle.append(circle)
        return {"circle": circle, "surrogate": "\ud800", "keys": {(1, 2): 3}}[kind]

    tools = ToolEnvironment([odd])
    for kind in ("circle", "surrogate", "keys", "\ud800"):
        works, text = tools.call(Call("odd", {"kind": kind}), {})
        assert not works and text.startswith("error: odd: ") and text.encode()


def test_a_long_tool_result_is_truncated() -> None:
    tools = ToolEnvironment([LookupTable({"a": "x" * 9000})])
    assert len(tools.reply(episode('call: lookup(key="a")')).messages[0]["content"]) == 4000


def test_tools_are_in_the_first_prompt() -> None:
    tools = ToolEnvironment(["calculator"], system="Use tools.")
    first, second = tools.reset({"prompt": "1 + 1?"})  # type: ignore[misc]
    assert first["role"] == "system" and first["tools"] == tools.descriptions  # type: ignore[index]
    assert second == {"role": "user", "content": "1 + 1?"}
    given = [{"role": "user", "content": "1?", "tools": [description_of(weather)]}]
    (only,) = ToolEnvironment([calculator]).reset({"prompt": given})  # type: ignore[misc]
    assert [tool["function"]["name"] for tool in only["tools"]] == ["weather", "calculator"]  # type: ignore[index]


def test_tool_turns_are_rendered_as_the_template_renders_them() -> None:
    tokenizer = make_tiny_tokenizer(TOOLS)
    rules = conversing({"class_path": "ToolEnvironment", "init_args": {"tools": ["calculator"]}}, max_turns=3)
    prompt = rules.environment.reset({"prompt": "2 * 3?"})
    turns = Turns(rules, tokenizer, [prompt], {"answer": ["6"]}, [7])

    def say(text: str) -> bool:
        return turns.replies([0], [[*tokenizer(text).input_ids, END]], [True])[0]

    assert say('<tool_call>{"name": "calculator", "arguments": {"expression": "2 * 3"}}</tool_call>')
    said = tokenizer.decode(turns.ids(0))
    assert said.endswith("<|end|>\n<|user|>\n6<|end|>\n<|assistant|>\n")
    assert not say("it is 6")
    (transcript,) = turns.transcripts()
    assert transcript.finished and transcript.rewards == (0.0, 0.0)
    roles: list[tuple[str, Any]] = [(turn["role"], turn["content"]) for turn in transcript.messages]
    assert roles == [("assistant", ""), ("tool", "6"), ("assistant", "it is 6")]
    asked: list[Message] = transcript.asked(prompt)  # type: ignore[assignment]
    assert [turn["role"] for turn in asked] == ["user", "assistant", "tool"]
    learned = [index for index, mask in zip(turns.ids(0), transcript.learned, strict=True) if mask]
    assert tokenizer.decode(learned).count("<|end|>") == 2 and "<|user|>" not in tokenizer.decode(learned)


@pytest.mark.parametrize("reward", ["turn", "final"])
def test_the_guessing_game_replies_and_rewards(reward: Any) -> None:
    game, row = GuessTheNumber(16, reward=reward), {"secret": 11, "prompt": "guess"}
    messages: list[Message] = [{"role": "user", "content": "guess"}]
    heard, paid = [], []
    for guess in ("8", "12 or", "3", "no", "11"):
        messages.append({"role": "assistant", "content": guess})
        reply = game.reply(Episode(row, messages, [], [], 0))
        heard.append(reply.text)
        paid.append(reply.reward)
    assert heard == ["higher", "lower", "higher", "answer with a number from 1 to 16", "right"] and reply.done
    expected = [0.1, 0.1, 0.0, 0.0, 1.0]
    assert paid == pytest.approx(expected if reward == "turn" else [0.0] * 4 + [sum(expected)])
    cut = game.reply(Episode(row, messages[:2], [], [], 0, last=True))
    assert cut.reward == pytest.approx(0.1)
    with refused("missing-data-column", "secret", "prompt"):
        game.reply(Episode({"prompt": "guess"}, messages, [], [], 0))


# -- tools written by users -------------------------------------------------------------------------------------------


def many(*numbers: int) -> int:
    """Add numbers."""
    return sum(numbers)


def placed(a: int, /) -> int:
    """Return a number."""
    return a


def handles(file: Path) -> str:
    """Read a file."""
    return str(file)


def lost(a: "Missing") -> str:  # type: ignore[name-defined]  # noqa: F821
    """Return nothing."""
    return ""


@pytest.mark.parametrize(
    ("tool", "words"),
    [(many, "*numbers"), (placed, "named arguments"), (handles, "pathlib.Path"), (lost, "no readable signature")],
)
def test_tool_arguments_without_a_json_type_are_refused(tool: Any, words: str) -> None:
    with refused("tool-undescribed", words):
        ToolEnvironment([tool])


async def later(a: int = 2) -> int:
    """Add one, later."""
    await asyncio.sleep(0)
    return a + 1


def typed(a: int | list[float] = 1, b: bool | None = None, c: Any = 0, d: Literal["x", 3] = "x") -> str:
    """Return the arguments."""
    return f"{a} {b} {c} {d}"


def leaves() -> str:
    """Leave."""
    raise SystemExit(0)


def test_async_tools_are_awaited_and_sys_exit_is_an_error() -> None:
    environment = ToolEnvironment([later, leaves])
    assert environment.call(Call("later", {}), {}) == (True, "3")

    async def from_a_loop() -> Any:
        return environment.call(Call("later", {"a": 5}), {})

    assert asyncio.run(from_a_loop()) == (True, "6")
    assert environment.call(Call("leaves", {}), {})[0] is False


@pytest.mark.parametrize(
    ("arguments", "works"),
    [
        ({}, True),
        ({"a": 3, "b": None, "c": {"x": [1]}, "d": 3}, True),
        ({"a": [1, 2.5]}, True),
        ({"a": "3"}, False),
        ({"a": [1, "2"]}, False),
        ({"a": True}, False),
        ({"b": "yes"}, False),
        ({"d": "y"}, False),
    ],
)
def test_arguments_of_the_wrong_type_get_an_error_reply(arguments: dict[str, Any], works: bool) -> None:
    (worked, text) = ToolEnvironment([typed]).call(Call("typed", arguments), {})
    assert worked == works and text.startswith("error: typed: ") != works


def test_a_row_without_its_table_is_refused() -> None:
    environment = ToolEnvironment([LookupTable(name="price", about="Look up.", column="prices")])
    for row in ({"answer": 1}, {"prices": None}):
        with refused("missing-data-column", "prices"):
            environment.call(Call("price", {"key": "a"}), row)


class Replies:
    """An environment that replies with what it is given."""

    def __init__(self, reply: Any) -> None:
        self.given = reply

    def reset(self, row: Any) -> Any:
        return row["prompt"]

    def reply(self, episode: Episode) -> Any:
        return self.given


WRONG: list[Any] = [
    None, "text", ("text", 1.0), Reply(5), Reply("a", reward=None), Reply("a", reward="1"), Reply("a", reward=math.nan),  # type: ignore[arg-type]
    Reply(messages=["a"]), Reply(messages="a"), Reply(messages=[{"content": "a"}]), Reply(ids=["1"]), Reply(ids=[-1]),  # type: ignore[arg-type, list-item]
    Reply(ids=[10**6]), Reply("a", turn="b"), Reply("a", feedback=3), Reply(""), Reply(ids=[]),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize("reply", WRONG, ids=repr)
def test_replies_of_the_wrong_type_are_refused(reply: Any) -> None:
    turns = Turns(MultiTurn(Replies(reply), 3), make_tiny_tokenizer(), ["Hi"], {}, [0])
    with pytest.raises(ContractError) as found:
        turns.replies([0], [[10, END]], [True])
    assert found.value.code in ("bad-reply", "empty-reply") and "Replies" in str(found.value)


@pytest.mark.parametrize("reply", WRONG[:12], ids=repr)
def test_on_fault_drop_drops_episodes_with_invalid_replies(reply: Any) -> None:
    tolerant = FaultTolerantEnvironment(Replies(reply), on_fault="drop")
    assert tolerant.reply(Episode({}, [], [11], [True], 0)) is None


def test_environments_that_exit_or_return_no_reply_are_refused() -> None:
    class Exits(Replies):
        def reply(self, episode: Episode) -> Any:
            raise SystemExit(0)

    class Forgets(Replies):
        def reply_all(self, episodes: Any) -> Any:
            return self.given

    for environment, code in (
        (Exits(None), "environment-exits"),
        (Forgets(None), "bad-reply"),
        (Forgets([]), "bad-reply"),
    ):
        turns = Turns(MultiTurn(environment, 3), make_tiny_tokenizer(), ["Hi"], {}, [0])
        with refused(code, type(environment).__name__):
            turns.replies([0], [[10, END]], [True])
