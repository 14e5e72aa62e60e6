"""Test `rlhf`: the table of commands, lazy imports, and error messages."""

import importlib.util
import io
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import refused

from rlhf_lightning import cli
from rlhf_lightning.atomic_files import write_text
from rlhf_lightning.cli import Command, main
from rlhf_lightning.errors import failure_sentence

ALL = {**cli.TRAINING_COMMANDS, **cli.TOOL_COMMANDS}


@pytest.fixture
def command(monkeypatch):
    """Add the command ``try``, whose function can be set; return the list of its calls."""
    calls: list = []
    module = types.ModuleType("tried")
    module.main = lambda argv: calls.append(argv)
    monkeypatch.setitem(sys.modules, "tried", module)
    monkeypatch.setitem(cli.TOOL_COMMANDS, "try", Command("tried", "for a test"))
    monkeypatch.delenv("RLHF_DEBUG", raising=False)

    def does(function):
        module.main = function
        return main(["try", "--flag"])

    does.calls = calls
    return does


def test_help_lists_each_command_on_a_line(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, row in ALL.items():
        assert f"  {name:<17}{row.help}" in lines
    assert {"fit", "validate", "test", "predict", "quickstart", "chat", "generate", "export"} <= set(ALL)
    assert max(map(len, lines)) <= 100


def test_no_arguments_print_help_and_exit_2(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: rlhf COMMAND")


@pytest.mark.parametrize("name", sorted(ALL))
def test_each_command_has_a_module(name):
    assert importlib.util.find_spec(ALL[name].module) is not None


@pytest.mark.parametrize(
    ("given", "hint"),
    [("fti", "did you mean fit?"), ("generat", "did you mean generate?"), ("zzz", "the commands are fit")],
)
def test_an_unknown_command_suggests_the_nearest(given, hint, capsys):
    assert main([given]) == 2
    assert capsys.readouterr().err.startswith(f"rlhf: there is no command {given!r}: {hint}")


def test_a_command_gets_its_arguments_and_returns_its_status(command):
    assert command(lambda argv: 0 if argv == ["--flag"] else 9) == 0
    assert command(lambda argv: 3) == 3
    assert command(lambda argv: None) == 0


@pytest.mark.parametrize(
    "error",
    [
        ValueError("beta is -1"),
        FileNotFoundError("there is no file x"),
        type("MisconfigurationException", (Exception,), {})("no"),
    ],
)
def test_expected_errors_print_one_sentence(command, error, capsys):
    def fail(argv):
        raise error

    assert command(fail) == 1
    assert capsys.readouterr().err == f"rlhf: {error}\n"


def test_unexpected_errors_keep_their_traceback(command):
    def fail(argv):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        command(fail)


def test_rlhf_debug_shows_every_traceback(command, monkeypatch):
    def fail(argv):
        raise ValueError("beta is -1")

    monkeypatch.setenv("RLHF_DEBUG", "1")
    with pytest.raises(ValueError, match="beta is -1"):
        command(fail)


def test_interrupts_and_closed_pipes_print_no_traceback(command, capfd):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert command(interrupted) == 130
    assert capfd.readouterr().err == "rlhf: interrupted\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
def test_unencodable_characters_do_not_end_a_command(encoding, command, monkeypatch):
    screens = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, screen in screens.items():
        monkeypatch.setattr(sys, name, screen)

    def says(argv):
        print("\u65e5 \ud800 caf\u00e9")
        raise ValueError("beta is \u03b2")

    assert command(says) == 1
    for screen in screens.values():
        screen.flush()
    assert "\\ud800" in screens["stdout"].buffer.getvalue().decode(encoding)
    assert "beta is" in screens["stderr"].buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_closed_standard_streams_do_not_end_a_command(name, command, monkeypatch):
    monkeypatch.setattr(sys, name, None)

    def uses(argv):
        print(sys.stdin.isatty(), sys.stdout.isatty(), sys.stderr.isatty())
        print("heard", file=sys.stderr)

    assert command(uses) == 0
    getattr(sys, name).close()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS"])
def test_a_non_numeric_rank_variable_is_named(name, command, monkeypatch, capsys):
    monkeypatch.setenv(name, "two")
    assert command(print) == 1
    assert f"the environment variable {name} is 'two'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "long", "NUL", "link to a pipe"])
def test_atomic_writes_refuse_pipes_and_folders(kind, tmp_path):
    place = tmp_path / "out"
    make = {"pipe": os.mkfifo, "folder": os.mkdir}
    if kind in make:
        make[kind](place)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        place.symlink_to("pipe")
    before = place.lstat() if place.exists() else None
    place = {"device": Path("/dev/fresh"), "long": tmp_path / ("o" * 300), "NUL": tmp_path / "a\0b"}.get(kind, place)
    with refused("not-a-file"):
        write_text(place, "x")
    assert before is None or place.lstat() == before


def test_out_of_memory_names_the_settings_to_lower():
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.\nmore")
    sentence = failure_sentence(error)
    assert "lower data.micro_batch_size, data.max_tokens or data.max_length" in sentence and "more" not in sentence
    assert "out of memory" in failure_sentence(type("OutOfMemoryError", (RuntimeError,), {})("CUDA"))
    assert failure_sentence(MemoryError()).startswith("out of memory (MemoryError): lower")
    assert "out of memory" in failure_sentence(OSError(12, "Cannot allocate memory"))


def test_help_imports_neither_torch_nor_lightning(tmp_path):
    """Run in a separate process, because this process has already imported the packages."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = (
        "import os, sys; from rlhf_lightning.cli import main; status = main(['--help']); "
        "heavy = {'torch', 'lightning', 'transformers', 'numpy', 'jsonargparse'} & set(sys.modules); "
        "print(status, os.environ['HF_HUB_DISABLE_TELEMETRY'], sorted(heavy))"
    )
    environment = {**os.environ, "PYTHONPATH": root}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert shown.stdout.splitlines()[-1] == "0 1 []"
    result = subprocess.run(
        [sys.executable, "-m", "rlhf_lightning", "nonsense"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert result.returncode == 2 and "there is no command 'nonsense'" in result.stderr
    light = (
        "import sys; from rlhf_lightning.cli import main\n"
        "try: main(['chat', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert shown.stdout.splitlines()[-1] == "[]"


def test_error_output_is_printable(monkeypatch, capsys):
    """Quoted text may come from a model folder, a file or a server, also through another package."""

    def fails(argv):
        raise ValueError("cannot read \x1b[2J\u202eevil\u200b")

    monkeypatch.setattr("rlhf_lightning.commands.generate.main", fails)
    assert main(["generate"]) == 1
    assert "cannot read \\x1b[2J\\u202eevil\\u200b" in capsys.readouterr().err
