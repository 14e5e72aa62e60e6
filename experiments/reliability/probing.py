"""Run a probe in a forked process with time and memory limits, in a copy of a small world, and judge it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]  # this checkout, not an installed package
SECONDS, GIGABYTES = 40, 3
"""Limits of one probe: CPU time, and memory beyond that of the imported process."""
WALL_SECONDS, IDLE_SECONDS = 300, 60
"""Limits of a probe that sleeps; long enough that a busy machine breaks no probe."""
RAN = "ran"
"""File that planted code creates in the working directory."""
PLANTED = f"from pathlib import Path\nPath({RAN!r}).touch()\n"

Judge = Callable[[int, str], str | None]
"""Function of exit status and output that returns why a probe broke; None if it held."""


IMPORTED = (
    "starlette.testclient", "uvicorn.protocols.http.h11_impl", "rlhf_lightning.people.server",
    "rlhf_lightning.commands.serve", "rlhf_lightning.commands.completion_api", "rlhf_lightning.evaluation.report",
    "rlhf_lightning.sampling.live_batch", "rlhf_lightning.verification.verify", "rlhf_lightning.commands.sweep",
)  # fmt: skip
"""Late imports of commands: done once here, instead of in every fork."""


class Probe(NamedTuple):
    """One attack or fault.

    Attributes:
        front: key of `probes.FRONTS`.
        name: description of the attack or fault.
        prepare: changes the probe's folder, which is the working directory, and returns the command line. It may
            instead run the whole probe and return an exit status.
        may_succeed: whether the command may also ignore the change and end with status 0.
        typed: standard input.
        fresh: whether the command runs in a new process without preloaded imports.
        judge: judge of exit status and output; None for `judged`.
    """

    front: str
    name: str
    prepare: Callable[[], list[str] | int]
    may_succeed: bool = False
    typed: bytes = b"w6 w7\n"
    fresh: bool = False
    judge: Judge | None = None


class Outcome(NamedTuple):
    """Outcome of a probe: None or why it broke, and the output."""

    broke: str | None
    said: str


# -- the world under attack -------------------------------------------------------------------------------------------


def build_world(root: Path) -> None:
    """Create a tiny model, an adapter for it, data, and runs with checkpoints. This also imports every command."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tiny_models import tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=120, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = "model"
    adapted.save_pretrained(root / "adapter")
    tiny_tokenizer().save_pretrained(root / "adapter")
    (root / "adapter" / "backbone.json").write_text(json.dumps({"source": "model", "fingerprint": None}))
    turns = [{"prompt": f"w{6 + i} w7", "completion": f"w{8 + i} w9"} for i in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    pairs = [{"prompt": f"w{6 + i}", "chosen": "w8 w9", "rejected": "w9"} for i in range(8)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    os.chdir(root)
    for argv in (fit("sft"), [*fit("lora"), "--model.lora.r", "2"]):
        if rlhf(argv) != 0:
            raise RuntimeError(f"the world's own run failed: {argv}")
    generated = ["generate", "--model", "model", "--prompts", "data.jsonl", "--max_new_tokens", "3", "--out"]
    for argv in ([*generated, "out.jsonl"], ["audit", "pairs.jsonl"], ["compare", RUN]):
        if rlhf(argv) != 0:
            raise RuntimeError(f"the world's own command failed: {argv}")
    (root / "out.jsonl").unlink()
    shutil.rmtree(root / "comparison")
    for name in IMPORTED:
        importlib.import_module(name)


def fit(name: str) -> list[str]:
    """Return a training command of four updates."""
    return [
        "fit", "--model", "SFTModule", "--model.init_from", "model", "--data", "SFTDataModule",
        "--data.source", "data.jsonl", "--data.batch_size", "2", "--run_name", name,
        "--trainer.accelerator", "cpu",
    ]  # fmt: skip


def rlhf(argv: Sequence[str]) -> int:
    """Run a command in this process and return its exit status."""
    from rlhf_lightning.cli import main

    try:
        return main(list(argv))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


RUN, LORA_RUN = "runs/sft/version_0", "runs/lora/version_0"
CHAT = ["chat", "model", "--max_new_tokens", "3"]
CHAT_ADAPTER = ["chat", "adapter", "--max_new_tokens", "3"]
RESUME = ["fit", "--resume", RUN, "--trainer.max_epochs", "2"]


# -- running a probe --------------------------------------------------------------------------------------------------


def run_probe(probe: Probe, world: Path) -> Outcome:
    """Run a probe in a forked process within a copy of the world."""
    place = Path(tempfile.mkdtemp(prefix="probe"))
    try:
        shutil.copytree(world, place / "w", symlinks=True)
        said = place / "said"
        child = os.fork()
        if child == 0:
            _attack(probe, place / "w", said)
        ended = _wait(child)
        text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
        os.chdir(place / "w")
        return Outcome(judged(probe, ended, text, (place / "w" / RAN).exists()), text[-1500:])
    finally:
        os.chdir(world)
        shutil.rmtree(place, ignore_errors=True)


def take_streams(typed: Path, output: int) -> None:
    """Redirect standard input to a file, and the output to another."""
    os.dup2(os.open(typed, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(place, "w", buffering=1, closefd=False) for place in (1, 2))


def _attack(probe: Probe, folder: Path, said: Path) -> None:
    """Prepare and run the probe in the forked process, and exit with its status; never returns."""
    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ["RLHF_CACHE"] = str(folder.parent / "cache")
    output = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        for number in (signal.SIGINT, signal.SIGHUP):  # background jobs and nohup ignore them
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        (folder.parent / "typed").write_bytes(probe.typed)
        take_streams(folder.parent / "typed", output)
        size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + GIGABYTES * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        _record_uncoded()
        asked = probe.prepare()
        if probe.fresh and not isinstance(asked, int):
            os.execve(
                sys.executable,
                [sys.executable, "-m", "rlhf_lightning", *asked],
                {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": ""},
            )
        status = asked if isinstance(asked, int) else rlhf(asked)
        sys.stdout.flush()
    except BaseException:
        import traceback

        os.write(output, traceback.format_exc().encode())
        status = 70
    os._exit(status & 0xFF)


def _record_uncoded() -> None:
    """Print a marker if the message is that of a library's error without a code."""
    from rlhf_lightning import cli
    from rlhf_lightning.errors import RlhfError, is_out_of_memory

    before = cli.failure_sentence

    def recorded(error: Exception) -> str | None:
        coded = isinstance(error, RlhfError | MemoryError) or is_out_of_memory(error)
        # jsonargparse converts errors of the classes it builds to ValueError, and keeps the message.
        coded = coded or str(error).startswith("Does not validate against any of the Union subtypes")
        if not coded and type(error).__module__.split(".")[0] not in ("yaml", "sqlite3", "rlhf_lightning"):
            print(f"UNCODED {type(error).__name__}", file=sys.stderr)
        return before(error)

    cli.failure_sentence = recorded  # type: ignore[assignment]


def _wait(child: int) -> int | str:
    """Return the exit status of a process, "late" if it had to be killed, or the signal that ended it."""
    began = moved = time.monotonic()
    used: list[str] = []
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.WIFEXITED(status):
                return os.WEXITSTATUS(status)
            used_up = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
            return "late" if used_up else f"signal {os.WTERMSIG(status)}"
        now, (state, *times) = time.monotonic(), _used(child)
        if state == "R" or times != used:
            moved, used = now, times
        if now - began > WALL_SECONDS or now - moved > IDLE_SECONDS:
            break
        time.sleep(0.01 if now - began < 2 else 0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


def _used(process: int) -> list[str]:
    """Return the state of a process, and the CPU time of it and its ended children."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return [fields[0], *fields[11:15]]


def judged(probe: Probe, ended: int | str, text: str, ran: bool) -> str | None:
    """Return why a probe broke. The right outcome is one sentence with a code and a non-zero status."""
    if ran:
        return "planted code ran"
    if isinstance(ended, str):
        return None if ended == f"signal {int(signal.SIGTERM)}" and "twice" in probe.name else ended
    if probe.judge is not None:
        return probe.judge(ended, text)
    if "Traceback (most recent" in text:
        return "traceback"
    if "UNCODED" in text:
        return "a library's sentence"
    if ended == 0:
        return None if probe.may_succeed else "status 0"
    if "out of memory" in text:
        return "out of memory"
    return None if ended in (1, 2, 130) and "rlhf" in text else f"status {ended}"


# -- signals at counted moments ---------------------------------------------------------------------------------------


class Moments:
    """A profiler that counts calls of Python functions and signals this process at some of them.

    Args:
        signals: pairs of a call number and the signal to send at this call.
    """

    def __init__(self, signals: Sequence[tuple[int, int]] = ()) -> None:
        self.calls, self.left = 0, dict(signals)

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            self.calls += 1
            if self.calls in self.left:
                number = self.left.pop(self.calls)
                if not self.left:
                    sys.setprofile(None)  # continue at full speed
                os.kill(os.getpid(), number)


NOT_REACHED = "the command ended before the signal"


def with_signals(argv: Sequence[str], signals: Sequence[tuple[int, int]] = ()) -> tuple[int, int]:
    """Run a command with signals at some calls; return its status and the number of calls.

    The number of calls varies slightly, so a late moment may not be reached: `NOT_REACHED` is printed then.
    """
    moments = Moments(signals)
    sys.setprofile(moments)
    try:
        return rlhf(argv), moments.calls
    finally:
        sys.setprofile(None)
        if len(moments.left) == len(signals) > 0:
            print(NOT_REACHED, file=sys.stderr)


def calls_of(argv: Sequence[str]) -> int:
    """Count the calls of Python functions in a command, in a fork and a copy of the folder; cached for all probes."""
    known = Path(tempfile.gettempdir()) / f"calls{os.getppid()}"
    known.mkdir(exist_ok=True)
    file = known / hashlib.sha256(json.dumps(list(argv)).encode()).hexdigest()[:16]
    if not file.exists():
        place = Path(tempfile.mkdtemp(prefix="calls"))
        shutil.copytree(Path.cwd(), place / "w", symlinks=True)
        child = os.fork()
        if child == 0:
            try:
                os.chdir(place / "w")
                (place / "typed").write_bytes(b"w6 w7\n")
                take_streams(place / "typed", os.open(file.with_suffix(".said"), os.O_CREAT | os.O_WRONLY))
                file.write_text(str(with_signals(argv)[1]))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        shutil.rmtree(place, ignore_errors=True)
    return int(file.read_text())
