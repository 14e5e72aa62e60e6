"""``rlhf``: the table of commands. Only the chosen command's module is imported, so that help is fast."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.metadata
import os
import signal
import sys
import threading
import traceback
from collections.abc import Collection, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

from rlhf_lightning import deprecation, working_directory
from rlhf_lightning.errors import SettingError, TerminatedError, failure_sentence, printable


class Command(NamedTuple):
    """A command: the module whose ``main(argv)`` runs it, and its line in ``rlhf --help``.

    For training commands argv starts with the command's name.
    """

    module: str
    help: str


TRAINING = "rlhf_lightning.commands.train"
TRAINING_COMMANDS = {
    "fit": Command(TRAINING, "train: SFT, reward model, PPO, DPO or your own objective"),
    "validate": Command(TRAINING, "compute the metrics of the held-out rows, as val/"),
    "test": Command(TRAINING, "compute the metrics of the held-out rows, as test/"),
    "predict": Command(TRAINING, "write completions or scores to predictions.jsonl"),
}
TOOL_COMMANDS = {
    "quickstart": Command(
        "rlhf_lightning.commands.quickstart", "run the whole pipeline on a small built-in world, in minutes"
    ),
    "init": Command("rlhf_lightning.commands.init", "write a project with an objective, a scorer, data and tests"),
    "audit": Command("rlhf_lightning.commands.audit", "find problems in a data set before training"),
    "show": Command("rlhf_lightning.commands.show", "print the tokens of each row, and which are trained on"),
    "plan": Command("rlhf_lightning.planning.plan", "estimate the memory and compute of a run before it starts"),
    "annotate": Command("rlhf_lightning.people.annotate", "collect human comparisons of completions in the browser"),
    "loop": Command("rlhf_lightning.people.loop", "run rounds of sampling, labelling, training and evaluation"),
    "chat": Command("rlhf_lightning.commands.chat", "chat with a policy in the terminal"),
    "generate": Command("rlhf_lightning.commands.generate", "sample completions for a file of prompts"),
    "serve-vllm": Command("rlhf_lightning.commands.serve_vllm", "start a vLLM server for the rollouts of a run"),
    "rollout-worker": Command(
        "rlhf_lightning.commands.rollout_worker", "sample rollouts for a run on another GPU or host"
    ),
    "best-of-n": Command(
        "rlhf_lightning.commands.best_of_n", "sample, score, and keep the best completions as demonstrations"
    ),
    "serve": Command("rlhf_lightning.commands.serve", "serve a policy over the OpenAI API, for evaluation tools"),
    "sweep": Command("rlhf_lightning.commands.sweep", "train a grid of settings over seeds, as a folder of runs"),
    "compare": Command("rlhf_lightning.commands.compare", "compare runs over seeds: curves, tests, a report"),
    "evaluate": Command("rlhf_lightning.commands.evaluate", "compare policies on held-out prompts, with intervals"),
    "evaluate-reward": Command(
        "rlhf_lightning.commands.evaluate_reward", "test reward models on pairs, with intervals and baselines"
    ),
    "critique": Command(
        "rlhf_lightning.constitution.critique", "sample, critique and revise completions under a constitution"
    ),
    "label": Command(
        "rlhf_lightning.constitution.label", "label pairs with a judge model under a constitution (AI feedback)"
    ),
    "export": Command("rlhf_lightning.commands.export", "write a checkpoint or an adapter as a Hugging Face folder"),
    "objectives": Command("rlhf_lightning.commands.objectives", "list the objectives with their papers and data"),
    "verify": Command("rlhf_lightning.verification.verify", "test that an objective, shipped or your own, is correct"),
}
LIKELY = {
    **dict.fromkeys(("train", "finetune", "run"), "fit"),
    **dict.fromkeys(("infer", "inference", "sample"), "generate"),
    **dict.fromkeys(("doctor", "preprocess"), "audit"),
    **dict.fromkeys(("web", "ui"), "annotate"),
    "resume": "fit --resume RUN",
    "eval": "evaluate",
    "merge": "export --merge",
    "convert": "export",
    "vllm": "serve-vllm",
    "list": "objectives",
}
"""Command names of other tools, and the corresponding commands here."""
QUICK_HELP = (*TRAINING_COMMANDS, "plan", "loop")
"""Commands whose help and unknown flags are answered from an index, since their parsers import torch."""
USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
COMMAND_LINE_CODES = ("unknown-recipe", "no-class-to-set")
"""Error codes that mean a wrong command line: the exit status is 2."""


def help_text() -> str:
    """Return the text of ``rlhf --help``."""

    def rows(commands: dict[str, Command]) -> list[str]:
        return [f"  {name:<17}{command.help}" for name, command in commands.items()]

    return "\n".join(
        [
            "usage: rlhf COMMAND [options]",
            "",
            "Learning from human feedback with PyTorch Lightning.",
            "",
            "training (settings from --config FILE.yaml, from flags such as --model.beta 0.2, or both):",
            *rows(TRAINING_COMMANDS),
            "",
            "tools:",
            *rows(TOOL_COMMANDS),
            "",
            "`rlhf COMMAND --help` lists the options of a command,",
            "`rlhf fit --model.help DPOModule` those of a class.",
            "Exit status: 0 done, 1 failed, 2 wrong command line, 75 stopped with a checkpoint, 130 interrupted.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rlhf`` and return its exit status: 0 for success, 1 for a failure, 2 for a wrong command line.

    A failure is printed as one sentence; RLHF_DEBUG=1 in the environment shows the traceback instead. The status is 130
    after Ctrl-C, 75 if a run was stopped and can be resumed, and 128 + n after another signal n.
    """
    prepare_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Set before importing the libraries that read these variables: the data here is often private.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        try:
            print(help_text(), flush=True)
        except BrokenPipeError:  # `rlhf --help | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(f"rlhf-lightning {importlib.metadata.version('rlhf-lightning')}")
        return 0
    name, commands = arguments[0], {**TRAINING_COMMANDS, **TOOL_COMMANDS}
    if name not in commands:
        return _fail(f"there is no command {name!r}: {_likely(name, commands)}", USAGE_ERROR)
    received: list[int] = []
    with terminable(received):
        status = _run(name, commands[name], arguments)
    return 128 + received[0] if received and status == 0 else status


def _likely(name: str, commands: Collection[str]) -> str:
    """Return a hint at the command that an unknown name probably means; it may be a recipe, as in ``rlhf dpo``."""
    recipe = name.lower().replace("-", "_")
    if name not in LIKELY and recipe in importlib.import_module("rlhf_lightning.recipes").recipe_names():
        return f"did you mean `rlhf fit --config recipe:{recipe}`?"
    near = LIKELY.get(name) or "".join(difflib.get_close_matches(name, commands, n=1))
    return f"did you mean {near}?" if near else f"the commands are {', '.join(commands)}"


def _run(name: str, command: Command, arguments: Sequence[str]) -> int:
    """Run a command and return its exit status; print failures and signals as one sentence."""
    working_directory.install()
    deprecation.show_warnings()
    try:
        if name in QUICK_HELP:  # help and wrong flags, without importing torch
            found = importlib.import_module("rlhf_lightning.commands.flag_index").quick_answer(arguments)
            if found is not None:
                print(found.text, file=sys.stderr if found.status else sys.stdout, flush=True)
                return int(found.status)
        refuse_odd_ranks()
        module = importlib.import_module(command.module)
        return int(module.main(arguments if name in TRAINING_COMMANDS else arguments[1:]) or 0)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except TerminatedError as error:
        return _fail(str(error), 128 + error.signal)
    except BrokenPipeError:
        # The process that reads the pipe has exited (`rlhf generate ... | head`); the flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's trainer exits with status 1 after Ctrl-C
            return _fail("interrupted", INTERRUPTED)
        place = _foreign_exit(error)
        if place is None:
            raise
        return _fail(
            f"{place} called sys.exit({error.code!r}) in the middle of `rlhf {name}`; raise an exception there instead",
            FAILURE,
        )
    except Exception as error:
        signalled = _signal_behind(error)
        if isinstance(signalled, TerminatedError):
            return _fail(str(signalled), 128 + signalled.signal)
        if signalled is not None:
            return _fail("interrupted", INTERRUPTED)
        sentence = failure_sentence(error)
        if sentence is None or os.environ.get("RLHF_DEBUG"):
            raise
        return _fail(sentence, USAGE_ERROR if getattr(error, "code", "") in COMMAND_LINE_CODES else FAILURE)


def refuse_odd_ranks() -> None:
    """Refuse a launcher's environment variables that are not numbers: Lightning reads some of them when imported.

    Raises:
        SettingError: ``odd-rank``.
    """
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"):
        if not (os.environ.get(name) or "0").isdecimal():
            raise SettingError(
                "odd-rank",
                f"the environment variable {name} is {os.environ[name]!r}, which is not a number; unset it, or let "
                "torchrun or srun set it",
            )


def _signal_behind(error: BaseException | None) -> BaseException | None:
    """Return the signal that an error followed; for example, a signal during the release of a lock breaks the lock."""
    while error is not None and not isinstance(error, KeyboardInterrupt | TerminatedError):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def terminable(received: list[int]) -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise TerminatedError, so that partial files are removed; a second signal kills.

    Args:
        received: list to which the number of a signal is appended if its exception may be suppressed or discarded.
    """
    process = os.getpid()
    before: dict[int, Any] = {}

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a forked worker dies as if there were no handler
            os.kill(os.getpid(), number)
        received.append(number)
        raise TerminatedError(number)

    def unraisable(failure: sys.UnraisableHookArgs) -> None:
        """Send a signal again that arrived in a destructor or callback: Python discards their exceptions."""
        error = failure.exc_value
        if not isinstance(error, KeyboardInterrupt | TerminatedError):
            return hook(failure)
        number = error.signal if isinstance(error, TerminatedError) else signal.SIGINT
        if number in before:
            signal.signal(number, terminate)
        received.append(number)  # the command may end before it is sent again
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        return None

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    numbers = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    with contextlib.suppress(ValueError):  # handlers belong to the main thread
        # Keep handlers that were set elsewhere, and ignore SIGHUP under nohup.
        usual = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
        before.update({number: signal.signal(number, terminate) for number in usual})
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare_streams() -> None:
    """Open closed streams on the null device; write characters that the terminal's encoding lacks as escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # as after `>&-`, or in a service
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # closed, or not a stream of this kind
            stream.reconfigure(errors=errors)  # type: ignore[union-attr]


def _foreign_exit(error: SystemExit) -> str | None:
    """Return file and line of a sys.exit in a user's or another package's code; it must not end a command as a success.

    None if the exit comes from this package or its parsers.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = [frame for frame in frames if frame.f_globals.get("__name__") != "_sitebuiltins"]
    package = str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] if frames else ""
    if package in ("rlhf_lightning", "jsonargparse", "argparse"):
        return None
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame is frames[-1]]
    return f"{frames[-1].f_code.co_filename}:{lines[-1]}"


def _fail(sentence: str, status: int) -> int:
    print(f"rlhf: {printable(sentence)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
