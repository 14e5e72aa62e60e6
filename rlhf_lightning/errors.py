"""Errors with a stable code, which programs, tests and docs match; the sentence may be rewritten."""

from __future__ import annotations

import errno
import signal
import unicodedata
from collections.abc import Sequence

OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's allocator on the CPU
    "out of memory",  # CUDA outside torch's own allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",  # mapping a file of weights
    "std::bad_alloc",
)


class RlhfError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        code: stable name of the mistake in kebab-case, such as ``unknown-recipe``.
        sentence: what is wrong, with the value and the place, and what to do.
    """

    def __init__(self, code: str, sentence: str) -> None:
        sentence = printable(sentence)
        super().__init__(code, sentence)
        self.code, self.sentence = code, sentence

    def __str__(self) -> str:
        return self.sentence


class SettingError(RlhfError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(RlhfError, ValueError):
    """Rows or files of data that cannot be used."""


class ModelError(RlhfError, ValueError):
    """A model, tokenizer or adapter that cannot be used."""


class MissingError(RlhfError, FileNotFoundError):
    """A file, folder or run that does not exist."""


class StateError(RlhfError, RuntimeError):
    """A request that the state of a run, checkpoint or process does not allow."""


class PackageError(RlhfError, ModuleNotFoundError):
    """An optional package that is needed and not installed."""


class ContractError(RlhfError, TypeError):
    """A user's class or function that breaks its contract."""


class TerminatedError(BaseException):
    """This process was told to end by a signal; like KeyboardInterrupt, it passes every ``except Exception``.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.signal = number


def check_range(holds: bool, rule: str, **settings: object) -> None:
    """Refuse settings that are out of range; ``rule`` says what is wanted, as in "each must be positive".

    Raises:
        SettingError: ``setting-out-of-range``.
    """
    if not holds:
        (first, value), *others = settings.items()
        said = [f"{first} is {value}", *(f"{name} {other}" for name, other in others)]
        raise SettingError("setting-out-of-range", f"{_listed(said, 'and')}: {rule}")


def check_choice(choices: Sequence[str], **setting: object) -> None:
    """Refuse a setting that is none of the choices.

    Raises:
        SettingError: ``unknown-choice``.
    """
    for name, value in setting.items():
        if value not in choices:
            raise SettingError("unknown-choice", f"{name} is {value!r}; choose {_listed([*map(repr, choices)], 'or')}")


def _listed(words: Sequence[str], last: str) -> str:
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def undefined(thing: object, name: str) -> ContractError:
    """Return the error for a subclass that lacks a required method or property."""
    return ContractError("undefined-method", f"{type(thing).__name__} must define {name!r}")


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(text: str) -> str:
    r"""Return a text that cannot act on a terminal, for messages that quote files, models, servers and people.

    Control, format and direction characters, surrogates and unassigned code points are written as ``\x1b`` or
    ``\u202e``. Letters of every script, spaces, tabs and line feeds stay.
    """
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def is_lost_rank(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone or hangs."""
    text = str(error)
    return type(error).__name__.startswith("Dist") or "/gloo/" in text or "NCCL" in text
