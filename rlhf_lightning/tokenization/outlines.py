"""Render a chat template once for all conversations with the same roles, if it only copies the contents of turns.

Most templates copy each content unchanged, or without the spaces around it. Such a template is rendered with `Unknown`
contents, which can be joined to texts and written, but not read. If that succeeds, nothing in the rendering depends on
the contents, and its text is an outline to fill in. Otherwise every conversation is rendered by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from types import FunctionType
from typing import Any, NamedTuple

from jinja2 import Template
from jinja2.runtime import Context

from rlhf_lightning.errors import RlhfError
from rlhf_lightning.tokenization import sandbox
from rlhf_lightning.tokenization.sandbox import CHARACTERS, FILTERS, BoundedEnvironment, OutOfBounds, compiled
from rlhf_lightning.types import Message

MOST_TURNS = 64
"""Maximum number of turns of a conversation that is rendered by an outline."""

Part = str | tuple[int, bool]
"""Literal text, or the number of a turn with whether the spaces around its content are removed."""


class Outline(NamedTuple):
    """The text of a conversation with gaps for its contents.

    Attributes:
        parts: literal texts and gaps.
        literal: number of characters that the rendering created, without contents.
        copies: number of copies of contents that the rendering created.
    """

    parts: tuple[Part, ...]
    literal: int
    copies: int

    def filled(self, contents: Sequence[str]) -> str | None:
        """Return the text with these contents; None if the rendering might exceed the limit of text."""
        if self.literal + self.copies * max(map(len, contents)) > CHARACTERS:
            return None
        return "".join(
            part if isinstance(part, str) else contents[part[0]].strip() if part[1] else contents[part[0]]
            for part in self.parts
        )


class ContentReadError(RlhfError):
    """A template reads the content of a turn."""

    def __init__(self) -> None:
        super().__init__("content-read", "the chat template reads the content of a turn")


class Unknown:
    """A text that holds contents: it is not blank, and nothing else about it is known."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.parts = parts

    def __add__(self, other: Any) -> Unknown:
        return Unknown((*self.parts, *_parts_of(other))) if isinstance(other, str | Unknown) else NotImplemented

    def __radd__(self, other: Any) -> Unknown:
        return Unknown((*_parts_of(other), *self.parts)) if isinstance(other, str) else NotImplemented

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        raise ContentReadError()

    def __hash__(self) -> int:
        raise ContentReadError()

    def __repr__(self) -> str:  # also str() and format(), through which a text would leave the rendering unseen
        raise ContentReadError()

    @property
    def trimmed(self) -> Unknown:
        """The text without the spaces around it."""
        match self.parts:
            case ((int(turn), _),):
                return Unknown(((turn, True),))
        raise ContentReadError()


class _Written(str):
    """An `Unknown` on its way to the output, which Jinja passes through ``str``."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, text: Unknown) -> _Written:
        """Wrap an unknown text."""
        written = cls()
        written.parts = text.parts
        return written

    def __str__(self) -> str:
        return self


class OutlineEnvironment(BoundedEnvironment):
    """A sandbox that refuses everything that depends on an `Unknown` text."""

    def __init__(self) -> None:
        super().__init__()
        printed: Any = self.finalize
        self.finalize = lambda value: _Written.of(value) if isinstance(value, Unknown) else printed(value)
        self.filters |= {name: self._refusing(name, self.filters[name]) for name in FILTERS}
        self.tests |= {name: _true_of_texts(self.tests[name]) for name in ("string", "iterable", "sequence")}

    def begin(self, turns: int = 0, characters: int = 0) -> None:
        """Begin a rendering on this thread."""
        super().begin(turns, characters)
        self._thread.copies = 0

    def counted(self, value: Any) -> Any:
        """Count an `Unknown` text that the template created, and return it."""
        if isinstance(value, Unknown):
            self.budget.spend(sum(len(part) for part in value.parts if isinstance(part, str)))
            self._thread.copies += sum(not isinstance(part, str) for part in value.parts)
        return value

    def outline(self, template: Template, variables: Mapping[str, Any], roles: Sequence[str]) -> Outline:
        """Render unknown contents."""
        self.begin(len(roles))
        messages = [{"role": role, "content": Unknown(((turn, False),))} for turn, role in enumerate(roles)]
        text: Any = template.render(**variables, messages=messages)
        return Outline(_parts_of(text), CHARACTERS - self.budget.characters, self._thread.copies)

    def concat(self, parts: Iterable[Any]) -> Any:
        """Join pieces of text; the result is unknown if a piece is."""
        pieces = list[Part]()
        for part in parts:
            self.budget.tick()
            text = self.counted(Unknown(_parts_of(part)))
            pieces += text.parts
        texts = [piece for piece in pieces if isinstance(piece, str)]
        return "".join(texts) if len(texts) == len(pieces) else Unknown(tuple(pieces))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator; only ``+`` accepts an unknown text."""
        return self.counted(super().call_binop(context, operator, left, right))

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the template, such as a macro, which may return an unknown text."""
        return self.counted(super().call(__context, __obj, *args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Refuse the methods of an unknown text."""
        return super().getattr(_known(obj), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Refuse the characters of an unknown text, and an unknown text as a key."""
        return super().getitem(_known(obj), _known(argument))

    def _refusing(self, name: str, function: Any) -> Any:
        """Let a filter refuse unknown texts, except that ``trim`` removes the spaces around a content."""

        @wraps(function)
        def known(*args: Any, **kwargs: Any) -> Any:
            if name == "trim" and len(args) == 1 and not kwargs and isinstance(args[0], Unknown):
                return self.counted(args[0].trimmed)
            return function(*map(_known, args), **{key: _known(value) for key, value in kwargs.items()})

        return known


def render(text: str, messages: Sequence[Message], generation: bool, variables: Mapping[str, Any]) -> str:
    """Render a chat template, by an outline if all messages are plain and the variables are texts.

    Args:
        text: the template.
        messages: the turns.
        generation: whether to open the assistant's next turn at the end.
        variables: further variables of the template.

    Raises:
        OutOfBounds: the rendering exceeds its limit of time or text.
        SecurityError: the template accesses something that is not allowed.
    """
    given = {"add_generation_prompt": generation, **variables}
    simple = 0 < len(messages) <= MOST_TURNS and all(map(_is_plain, messages))
    if simple and SIMPLE.issuperset(map(type, given.values())) and not compiled(text)[0].given_up:
        roles = tuple(message["role"] for message in messages)
        outline = _outline(text, roles, tuple((name, type(value), value) for name, value in given.items()))
        filled = None if outline is None else outline.filled([message["content"] for message in messages])
        if filled is not None:
            return filled
    return sandbox.render(text, messages, **given)


SIMPLE = frozenset((str, int, float, bool, type(None), FunctionType))
"""Types of variables that an outline may depend on."""


@lru_cache(maxsize=64)
def _compiled(text: str) -> tuple[OutlineEnvironment, Template]:
    environment = OutlineEnvironment()
    return environment, environment.bounded(text)


@lru_cache(maxsize=1024)
def _outline(text: str, roles: tuple[str, ...], variables: tuple[tuple[str, type, Any], ...]) -> Outline | None:
    """Return the outline of conversations with these roles; None if the template reads their contents."""
    environment, template = _compiled(text)
    given = {name: value for name, _, value in variables}
    try:
        return environment.outline(template, {"tools": None, "documents": None, **given}, roles)
    except OutOfBounds:
        raise
    except Exception:  # noqa: BLE001 - rendering the real contents tells what is wrong
        return None


def _is_plain(message: Message) -> bool:
    """Return whether a message is a role and a text that is not blank, in this order."""
    content = message.get("content")
    return tuple(message) == ("role", "content") and isinstance(content, str) and content.strip() != ""


def _parts_of(text: Any) -> tuple[Part, ...]:
    if isinstance(text, Unknown | _Written):
        return text.parts
    return (text if isinstance(text, str) else str(text),)


def _known(value: Any) -> Any:
    if isinstance(value, Unknown):
        raise ContentReadError()
    return value


def _true_of_texts(test: Any) -> Any:
    return lambda value: isinstance(value, Unknown) or test(value)
