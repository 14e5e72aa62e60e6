"""Render chat templates, which are untrusted programs, in Jinja's sandbox with limits on time and text.

Jinja's own sandbox keeps a template from Python's internals, but not from looping forever or filling the memory. Here
every loop iteration, every call and every operator checks the processor time of the rendering. Every text that is
created counts towards a limit. Operations that create large values from small ones (``'x' * 10 ** 9``, ``**``) are
measured before they run. Only the attributes, filters and functions that chat templates use are available. A rendering
is one call on one thread, so stopping it leaves nothing behind.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, wraps
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from rlhf_lightning.types import Message

SECONDS = 5.0
"""Processor time of one rendering in seconds, plus a millisecond per turn."""
CHARACTERS = 1 << 22
"""Maximum number of characters that one rendering may create, plus 64 per input character."""
TICKS = 64
"""Number of steps between two checks of the clock."""
TEMPLATE_CHARACTERS = 1 << 20
LARGEST_POWER = 256
ITEMS = 200_000
"""Maximum number of items of a list, including nested lists."""

FILTERS = (
    "abs capitalize count d default dictsort e escape first float groupby int items last length list lower map max min "
    "reject rejectattr reverse safe select selectattr sort string title trim unique upper"
).split()
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold count endswith find format index isalnum isalpha isdecimal isdigit islower isnumeric "
        "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition "
        "rsplit rstrip split splitlines startswith strip swapcase title upper".split()
    ),
    dict: frozenset(["get", "items", "keys", "values", "copy"]),
    list: frozenset(["index", "count", "copy"]),
    tuple: frozenset(["index", "count"]),
}
"""Methods that chat templates use, by type. Methods and filters that only pad or repeat text are left out."""
WIDTH = re.compile(r"[0-9]{3,}|\*|\{[^{}]*\{")


class OutOfBounds(Exception):
    """A template used more time or text than allowed."""


_shared = threading.local()


@contextmanager
def shared_time() -> Iterator[None]:
    """Let all renderings of this thread inside the block share the processor time of one rendering."""
    _shared.deadline = time.thread_time() + SECONDS
    try:
        yield
    finally:
        del _shared.deadline


class Budget:
    """The remaining time and text of one rendering.

    Args:
        turns: number of turns of the conversation.
        characters: number of characters of the conversation.
    """

    def __init__(self, turns: int = 0, characters: int = 0) -> None:
        self.seconds = SECONDS + turns / 1000
        self.deadline = 0.0  # set at the first check of the clock; most renderings end before it
        self.ticks = 0
        self.characters = self.whole = CHARACTERS + 64 * characters

    def tick(self) -> None:
        """Check every few steps whether time is left: reading the clock is slower than a step."""
        self.ticks += 1
        if self.ticks % TICKS == 0:
            self.deadline = self.deadline or min(
                time.thread_time() + self.seconds, getattr(_shared, "deadline", math.inf)
            )
            if time.thread_time() > self.deadline:
                raise OutOfBounds("it runs for too long, as if it looped for ever")

    def spend(self, characters: int) -> None:
        """Count characters that are created, before creating them if their number is known."""
        self.characters -= characters
        if self.characters < 0:
            raise OutOfBounds("it generates too much text")

    def made(self, value: Any) -> Any:
        """Count a created value and return it."""
        if isinstance(value, str | list | tuple | dict):
            self.spend(len(value))
            if not isinstance(value, str):
                self.measure(value)
        elif isinstance(value, int) and value.bit_length() > LARGEST_POWER:
            raise OutOfBounds("it computes too large a number")
        return value

    def measure(self, value: Any) -> None:
        """Refuse a value that is too large to be printed: a short list may contain one list many times."""
        items, characters, left = 0, 0, [value]
        while left:
            one = left.pop()
            items += 1
            characters += len(one) if isinstance(one, str) else 1
            if items + len(left) > ITEMS or characters > self.whole:
                raise OutOfBounds("it builds too large a list")
            if isinstance(one, dict):
                left += one.values()
            elif isinstance(one, list | tuple):
                left += one


class QuietNamespace(Namespace):
    """Jinja's namespace without private attributes, and without printing its contents."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named self: an attribute may be called self
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class GenerationBlocks(Extension):
    """``{% generation %}`` marks the assistant's text; here it is rendered like any other text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the content between the two tags."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Counting(NodeTransformer):
    """Wrap loop iterables, concatenated texts and new lists in counting filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes).set_lineno(node.lineno), "written")

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        return _filtered(self.generic_visit(node), "made")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx == "store" else _filtered(node, "made")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that renders its templates within a `Budget`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=self._printed,
            extensions=[loopcontrols, GenerationBlocks],
        )  # fmt: skip
        self._thread = threading.local()
        self.given_up = ""
        """Reason to refuse all further renderings; empty if there is none."""
        offered: dict[str, Any] = {name: self._counted(self.filters[name]) for name in FILTERS}
        own = {"join": self._joined, "replace": self._replaced, "indent": self._indented, "tojson": self._to_json}
        hooks = {"each": self._each, "written": self.concat, "made": lambda value: self.budget.made(value)}
        self.filters = {**offered, **own, **hooks}
        functions = {"dict": dict, "namespace": QuietNamespace, "raise_exception": _raise}
        self.globals = {"range": self.globals["range"], **functions}

    @property
    def budget(self) -> Budget:
        """The budget of this thread's rendering."""
        return self._thread.budget

    def begin(self, turns: int = 0, characters: int = 0) -> None:
        """Begin a rendering on this thread."""
        self._thread.budget = Budget(turns, characters)

    def bounded(self, text: str) -> Template:
        """Compile a template.

        Raises:
            OutOfBounds: the template is too long.
            SecurityError: the template includes or imports another file.
        """
        if len(text) > TEMPLATE_CHARACTERS:
            raise OutOfBounds("it is too long")
        self.begin()
        tree = self.parse(text)
        if any(tree.find(kind) for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise SecurityError("it asks for another file")
        code = self.compile(_Counting().visit(tree))
        return Template.from_code(self, code, self.make_globals(None))

    def concat(self, parts: Iterable[Any]) -> str:
        """Join pieces of text, written by the template or by its macros and blocks."""
        budget, pieces = self.budget, []
        for part in parts:
            budget.tick()
            pieces.append(part if isinstance(part, str) else str(part))
            budget.spend(len(pieces[-1]))
        return "".join(pieces)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow the attributes that chat templates use: of texts, lists, dictionaries, and Jinja's loops and macros."""
        for kind, methods in METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return isinstance(obj, LoopContext | Macro | Namespace) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Measure the result of an operator before computing it."""
        budget = self.budget
        budget.tick()
        if operator == "+" and type(left) is type(right) is str:  # the most frequent operation of templates
            budget.spend(len(left) + len(right))
            return left + right
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    self.budget.spend(len(many) * max(times, 0))
        elif operator == "**" and abs(right) > LARGEST_POWER:
            raise OutOfBounds("it computes too large a number")
        elif operator == "%" and isinstance(left, str):
            self._measure_format(left, "%", right if isinstance(right, tuple) else (right,))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, list | tuple):  # its items were measured in the operands
            self.budget.spend(len(result))
            return result
        return self.budget.made(result)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the template; measure the results of string methods first."""
        self.budget.tick()
        name = getattr(__obj, "__name__", "")
        text = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(text, str):
            if name in ("format", "format_map"):
                self._measure_format(text, "{", [*args, *kwargs.values()])
            elif name == "join":
                return self._joined(args[0], text)
            elif name == "replace":
                return self._replaced(text, *args)
        return self.budget.made(super().call(__context, __obj, *args, **kwargs))

    def _measure_format(self, text: str, mark: str, values: Sequence[Any]) -> None:
        if WIDTH.search(text):
            raise OutOfBounds("it pads a text to an unreasonable width")
        for value in values:
            self.budget.measure(value)
        self.budget.spend(text.count(mark) * max((len(str(value)) for value in values), default=0))

    def _printed(self, value: Any) -> Any:
        if isinstance(value, str):
            return value
        text = str(value)
        self.budget.spend(len(text))
        return text

    def _each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.tick()
            yield item

    def _counted(self, function: Any) -> Any:
        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.budget.tick()
            return self.budget.made(function(*args, **kwargs))

        return counted

    def _joined(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        pieces = []
        for one in self._each(value):
            found = one if attribute is None else self.getitem(one, attribute)
            pieces.append(found if isinstance(found, str) else str(found))
            self.budget.spend(len(pieces[-1]) + len(d))
        return d.join(pieces)

    def _replaced(self, s: str, old: str, new: str, count: int | None = None) -> str:
        s, old, new = str(s), str(old), str(new)
        self.budget.spend(len(s) + s.count(old) * len(new))
        return s.replace(old, new, -1 if count is None else count)

    def _indented(self, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        margin = width if isinstance(width, str) else " " * min(width, 100)
        lines = str(s).split("\n")
        self.budget.spend(len(lines) * len(margin) + len(s))
        later = [margin + line if line or blank else line for line in lines[1:]]
        return "\n".join([margin + lines[0] if first else lines[0], *later])

    def _to_json(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        self.budget.measure(value)
        margin = None if indent is None else min(int(indent), 16)
        marks = None if separators is None else (str(separators[0])[:16], str(separators[1])[:16])
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=margin, separators=marks, sort_keys=sort_keys)
        self.budget.spend(len(text))
        return text


@lru_cache(maxsize=64)
def compiled(text: str) -> tuple[BoundedEnvironment, Template]:
    """Return a template, compiled once, and the sandbox that it runs in."""
    environment = BoundedEnvironment()
    return environment, environment.bounded(text)


def render(text: str, messages: Sequence[Message], **variables: Any) -> str:
    """Render a chat template.

    Args:
        text: the template.
        messages: the turns.
        variables: further variables of the template.

    Raises:
        OutOfBounds: the rendering exceeds its limit of time or text.
        SecurityError: the template accesses something that is not allowed.
    """
    environment, template = compiled(text)
    if environment.given_up:
        raise OutOfBounds(environment.given_up)
    environment.begin(len(messages), characters_in([messages, variables]))
    return template.render(**{"tools": None, "documents": None, **variables, "messages": messages})


def give_up(text: str, reason: str) -> None:
    """Refuse all further renderings of a template."""
    with suppress(OutOfBounds):  # a template that is too long is refused anyway
        compiled(text)[0].given_up = reason


def characters_in(value: Any) -> int:
    """Count the characters of all texts in nested lists and dictionaries."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters_in, value)) + sum(map(characters_in, value.values()))
    return sum(map(characters_in, value)) if isinstance(value, list | tuple) else 0


@lru_cache(maxsize=64)
def literal_text(text: str) -> str:
    """Return all literal text of a template: its text and its string constants, separated by NULs."""
    tree = BoundedEnvironment().parse(text)
    data = [node.data for node in tree.find_all(nodes.TemplateData)]
    return "\0".join([*data, *(str(node.value) for node in tree.find_all(nodes.Const))])


def _filtered(node: Any, name: str) -> nodes.Filter:
    made = nodes.Filter(node, name, [], [], None, None)
    made.set_lineno(node.lineno)
    return made


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute {name!r}")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
