"""What a user-defined class adds to the shipped class that it derives from, and which of its methods nothing calls."""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
from collections.abc import Iterable
from functools import cached_property
from itertools import takewhile
from typing import Any

from rlhf_lightning.similar_names import hint_at


def own_bases(kind: type) -> list[type]:
    """Return a user-defined class and its bases below the shipped class that it derives from."""
    return list(takewhile(lambda base: not base.__module__.startswith("rlhf_lightning."), kind.__mro__))


def nodes_of(kinds: Iterable[type]) -> list[ast.AST]:
    """Return the syntax of the files that define classes; nothing if one cannot be read, as in a notebook."""
    try:
        texts = {inspect.getsource(sys.modules[kind.__module__]) for kind in kinds}
        return [node for text in texts for node in ast.walk(ast.parse(text))]
    except (KeyError, OSError, TypeError, SyntaxError):
        return []


def misnamed_methods(kind: type) -> dict[str, str]:
    """Return the methods of a user-defined class that look written to override another, each with a sentence.

    A method is suspect if no base has its name, no code of its file uses it, and it either resembles the name of a
    base's method or the class overrides nothing: then it computes what its base computes.
    """
    own = own_bases(kind)
    inherited = {name: value for base in reversed(kind.__mro__[len(own) :]) for name, value in vars(base).items()}
    methods = {name for base in own for name, value in vars(base).items() if _is_method(value) and name[0] != "_"}
    nodes = nodes_of(own)
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    alone = methods - inherited.keys() - used if nodes else set()
    known = {name for name, value in inherited.items() if _is_method(value)}
    overrides = any(name in inherited for base in own for name in vars(base) if name[:2] != "__")
    suspects = [name for name in sorted(alone) if not overrides or difflib.get_close_matches(name, known, 1, 0.8)]
    sentence = "{}.{} overrides nothing, and nothing uses it: {}"
    return {name: sentence.format(kind.__name__, name, hint_at(name, known)) for name in suspects}


def _is_method(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, property | cached_property)
