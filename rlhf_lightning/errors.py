"""Errors with a stable code, which programs, tests and docs match; the sentence may change.

This file imports nothing heavy: `rlhf` prints every failure with `failure_sentence`.
"""

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
    """An invalid setting, or an invalid combination of settings."""


class DataError(RlhfError, ValueError):
    """Data rows or files that cannot be used."""


class ModelError(RlhfError, ValueError):
    """A model, tokenizer or adapter that cannot be used."""


class MissingError(RlhfError, FileNotFoundError):
    """A file, folder or run that does not exist."""


class StateError(RlhfError, RuntimeError):
    """A request that the state of a run, checkpoint or process does not allow."""


class PackageError(RlhfError, ModuleNotFoundError):
    """An optional package that is needed but not installed."""


class ContractError(RlhfError, TypeError):
    """A user's class or function that breaks its contract."""


class LackingError(RlhfError, AttributeError):
    """An attribute that an object lacks, or does not have yet; ``hasattr`` is False."""


class TerminatedError(BaseException):
    """This process was told to end by a signal. Like KeyboardInterrupt, ``except Exception`` does not catch it.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.signal = number


def check_range(holds: bool, rule: str, **settings: object) -> None:
    """Refuse settings that are out of range; ``rule`` states the condition, as in "each must be positive".

    Raises:
        SettingError: ``setting-out-of-range``.
    """
    if not holds:
        (first, value), *others = settings.items()
        said = [f"{first} is {value}", *(f"{name} {other}" for name, other in others)]
        raise SettingError("setting-out-of-range", f"{_listed(said, 'and')}: {rule}")


def check_choice(choices: Sequence[str], **setting: object) -> None:
    """Refuse a setting that is not among the choices.

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
    r"""Escape characters that could act on a terminal, for messages that quote files, models, servers and people.

    Control, format and direction characters, surrogates and unassigned code points are written as ``\x1b`` or
    ``\u202e``. Letters of every script, spaces, tabs and line feeds are kept.
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
    """Return whether memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def is_lost_rank(error: Exception) -> bool:
    """Return whether a collective failed because another rank died or hangs."""
    text = str(error)
    return type(error).__name__.startswith("Dist") or "/gloo/" in text or "NCCL" in text


LOWER = (
    "lower data.micro_batch_size, data.max_tokens or data.max_length (on-policy also model.max_new_tokens or "
    "model.sampling_batch_size), or set model.activation_checkpointing=true or model.lora; `rlhf plan` shows the "
    "memory of each part"
)


def failure_sentence(error: Exception) -> str | None:
    """Return one sentence about a failure; None for an unexpected error, which needs its traceback."""
    name, text = type(error).__name__, str(error).strip()
    first = reason_of(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if isinstance(error.__context__, OSError):  # the full disk prevented a report of the first error
            return failure_sentence(error.__context__)
        return f"the disk is full ({error}): free some space, and `rlhf fit --resume RUN` continues the run"
    if is_out_of_memory(error):
        return f"out of memory ({first}): {LOWER}"
    if is_lost_rank(error):
        who = "".join(f": {note}" for note in getattr(error, "__notes__", ()))
        return (
            f"another rank does not respond{who} ({first}). Its process, its host or the network failed; "
            "`rlhf fit --resume RUN` continues from the last checkpoint once all ranks are back"
        )
    if type(error).__module__ == "sqlite3":
        return f"the feedback store cannot be read or written ({first}): check the permissions of its file and folder"
    if type(error).__module__.split(".")[0] == "yaml":
        return f"invalid YAML: {' '.join(text.split())}"
    if text.startswith("Does not validate against any of the Union subtypes"):  # a class that refused its arguments
        errors = [line.strip().removeprefix("- ") for line in text.partition("Errors:\n")[2].splitlines()]
        of_parser = ("Not a valid subclass", "Expected a", "Subclass types expect", "a class path", "a dict ")
        return next((line for line in errors if line and not line.startswith(of_parser)), text)
    if text.startswith("No supported gpu backend") or "Accelerator` can not run on your system" in text:
        return "trainer.accelerator asks for a GPU, but torch finds none: set trainer.accelerator to cpu or auto"
    if text.startswith(("`Trainer(devices=", "`devices` selected with `CPUAccelerator`")):
        return "trainer.devices must be the number of GPUs, or of processes on the CPU: give 1 or more"
    if text.startswith("Problem with given class_path") and text.endswith(":"):
        why = reason_of(error.__cause__ or error.__context__ or error)
        return f"{text.split(chr(39))[1].rpartition('.')[2]} cannot be made: {why}; install its package with pip"
    if text.startswith("Early stopping conditioned on metric"):
        metric, known = text.split("`")[1], text.partition("following: ")[2].replace("`", "")
        remedy = f"set its monitor to one of {known}"
        if metric.startswith("val/") and "val/" not in known:
            remedy = f"give held-out rows (data.eval_rows), or {remedy}"
        return f"EarlyStopping monitors {metric}, which this run does not log: {remedy}"
    # Errors of this package are written for users. Lightning's error is matched by name: Lightning is not imported.
    own = type(error).__module__.split(".")[0] == __name__.split(".")[0]
    foreseen = own or isinstance(error, ValueError | OSError | ImportError) or name == "MisconfigurationException"
    return text or name if foreseen else None
