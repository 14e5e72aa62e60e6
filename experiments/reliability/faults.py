"""Inject faults into tiny runs, and check that each run behaves as promised.

python experiments/reliability/faults.py [--out runs/faults.json] [--only WORD]

Prints one line per fault, and lists the failures in the last line. The exit status is the number of failures.
"""

import argparse
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import injected  # noqa: E402
import torch  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

import rlhf_lightning.commands.train  # noqa: E402, F401  imported once, for all the forks
from rlhf_lightning.cli import main as rlhf  # noqa: E402
from rlhf_lightning.worlds.assistant import write_world  # noqa: E402

WITHIN = 120.0
"""Timeout in seconds after which a run counts as hanging."""

TINY = ["--model.init_from", "world/model", "--model.from_scratch", "true", "--samples.prompts", "0",
        "--data.batch_size", "8", "--data.max_length", "128"]  # fmt: skip
SFT = ["--data", "SFTDataModule", "--data.source", "world/demonstrations.jsonl", *TINY,
       "--checkpoint.every_n_updates", "1"]  # fmt: skip
ON_POLICY = ["--data", "PromptDataModule", "--data.source", "world/prompts_train.jsonl", *TINY,
             "--data.rollouts", "4", "--model.max_new_tokens", "8"]  # fmt: skip
PPO = ["fit", "--model", "PPOModule", *ON_POLICY]


class Ended(NamedTuple):
    """How a run ended: exit status (negative: the signal that ended it), output, seconds."""

    status: int
    said: str
    seconds: float

    @property
    def line(self) -> str:
        """The last line of output that begins with ``rlhf``."""
        return next((line for line in reversed(self.said.splitlines()) if line.startswith("rlhf")), "")


class Result(NamedTuple):
    """A fault, the promised behaviour, whether it held, and what was observed."""

    fault: str
    promise: str
    held: bool
    seconds: float
    seen: str


# -- runs in forks ----------------------------------------------------------------------------------------------------


class Run:
    """A command in a fork of this process; the imports are shared."""

    def __init__(self, argv: list[str], name: str, prepare: Callable[[], None] = lambda: None) -> None:
        self.output, self.began = Path(f"{name}.log"), time.monotonic()
        self.process = os.fork()
        if self.process == 0:
            status = 70
            try:
                target = os.open(self.output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(target, 1)
                os.dup2(target, 2)
                prepare()
                status = rlhf([*argv, "--run_name", name])
            except SystemExit as end:
                status = int(end.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def ended(self, within: float = WITHIN) -> Ended:
        """Wait for the process; a hanging process is killed."""
        deadline = self.began + within
        while True:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                break
            if time.monotonic() > deadline:
                os.kill(self.process, signal.SIGKILL)
            time.sleep(0.02)
        said = self.output.read_text(errors="replace")
        return Ended(os.waitstatus_to_exitcode(status), said, time.monotonic() - self.began)


def run(argv: list[str], name: str, prepare: Callable[[], None] = lambda: None) -> Ended:
    """Run a command and wait for it."""
    return Run(argv, name, prepare).ended()


def last(name: str, tag: str) -> float:
    """Return the last value of a run's metric."""
    events = EventAccumulator(f"runs/{name}/version_0")
    events.Reload()
    return float(events.Scalars(tag)[-1].value)


def total(name: str, tag: str) -> float:
    """Return the mean of a run's metric over its steps."""
    events = EventAccumulator(f"runs/{name}/version_0")
    events.Reload()
    values = [event.value for event in events.Scalars(tag)]
    return float(sum(values) / len(values))


def scorer(kind: str, **arguments: Any) -> list[str]:
    """Return the flag that sets a scorer of this package."""
    return ["--model.scorer", json.dumps({"class_path": f"rlhf_lightning.scoring.{kind}", "init_args": arguments})]


class Server:
    """A separate process that serves scores and completions."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.process = f"http://127.0.0.1:{self.port}", None

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        self.process = subprocess.Popen([sys.executable, "-S", str(HERE / "injected.py"), str(self.port)])
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill the server."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def goes_and_comes_back(self, name: str) -> None:
        """Kill the server after a run's first checkpoint, and restart it a second later."""

        def watch() -> None:
            events = Path(f"runs/{name}/version_0")
            while not list(events.glob("checkpoints/update_*.ckpt")):
                time.sleep(0.02)
            self.kill()
            time.sleep(1.0)
            self.start()

        threading.Thread(target=watch, daemon=True).start()


# -- the faults -------------------------------------------------------------------------------------------------------


def scorer_faults() -> list[Result]:
    """Inject scorers that fail on a fifth of the completions, which PPO has to drop."""
    results = []
    for fault in injected.FAULTS:
        name = fault.replace(" ", "_")
        bounds = {"seconds": 2.0} if fault in ("hangs", "dies") else {}
        ended = run(
            [*PPO, *scorer("FaultTolerant", scorer=f"injected.{name.lower()}", on_fault="drop", **bounds)], name
        )
        dropped = total(name, "rollout/score_missing") if ended.status == 0 else 0.0
        results.append(
            Result(
                f"a scorer that {fault}", "the completions are dropped and counted, the run finishes",
                ended.status == 0 and 0 < dropped < 1, ended.seconds, f"{100 * dropped:.0f} % dropped",
            )
        )  # fmt: skip
    ended = run([*PPO, *scorer("FaultTolerant", scorer="injected.raises")], "fails")
    results.append(ends("a scorer that raises, on_fault: raise", ended, "the judge had a bad day"))
    return results


def score_server() -> list[Result]:
    """Inject outages of a score server."""
    server = Server()
    server.start()
    patient = scorer("RemoteScorer", url=f"{server.url}/score", retries=8, wait=0.2)
    saved = ["--checkpoint.every_n_rollouts", "1"]
    server.goes_and_comes_back("score_server_back")
    ended = run([*PPO, *patient, *saved], "score_server_back")
    back = finishes("a score server that is killed and comes back", ended)
    server.kill()
    hasty = scorer("RemoteScorer", url=f"{server.url}/score", retries=2, wait=0.1)
    ended = run([*PPO, *hasty], "score_server_gone")
    return [back, ends("a score server that is gone", ended, "gave no answer in 3 attempts")]


def rollout_server() -> list[Result]:
    """Inject outages of a completion server."""
    server = Server()
    server.start()

    def command(**settings: Any) -> list[str]:
        given = {"url": server.url, "model": "base", "shared_folder": "adapters", **settings}
        engine = {"class_path": "rlhf_lightning.sampling.remote_engine.RemoteEngine", "init_args": given}
        return ["fit", "--model", "GRPOModule", *ON_POLICY, "--model.engine", json.dumps(engine), "--model.scorer",
                "injected.length", "--model.sampler_correction",
                "token_truncate", "--data.samples_per_prompt", "4", "--model.lora.r", "2",
                "--model.init_from", "policy", "--model.from_scratch", "false",
                "--checkpoint.every_n_rollouts", "1"]  # fmt: skip

    run(["fit", "--model", "SFTModule", *SFT, "--trainer.max_steps", "1"], "policy")
    shutil.copytree("runs/policy/version_0/model", "policy")
    server.goes_and_comes_back("rollout_server_back")
    ended = run(command(retries=8, wait=0.2), "rollout_server_back")
    back = finishes("a rollout server that is killed and comes back", ended)
    server.kill()
    ended = run(command(retries=2, wait=0.1), "rollout_server_gone")
    return [back, ends("a rollout server that is gone", ended, "gave no answer in 3 attempts")]


def divergence() -> list[Result]:
    """Inject NaN losses, occasionally and permanently."""
    command = ["fit", "--model", "injected.SpoiltModule", *SFT, "--trainer.max_steps", "8"]
    ended = run([*command, "--model.spoilt", "[2, 5]"], "nan_twice")
    skipped = last("nan_twice", "train/skipped_updates") if ended.status == 0 else 0.0
    once = finishes("a loss that is NaN twice", ended, f"{skipped:.0f} updates skipped", skipped == 2)
    ended = run([*command, "--model.spoilt", "[4, 5, 6]"], "nan_for_good")
    stopped = ends("a loss that is NaN three times in a row", ended, "the last good checkpoint is runs/nan_for_good")
    rows = Path("runs/nan_for_good/version_0/skipped_updates.jsonl")
    named = rows.is_file() and len(rows.read_text().splitlines()) == 3
    stopped = stopped._replace(held=stopped.held and named)
    ended = run(["fit", "--resume", "runs/nan_for_good", "--model.spoilt", "[]"], "resumed")
    return [once, stopped, finishes("the same run, resumed from the checkpoint it named", ended)]


def memory() -> list[Result]:
    """Inject an update that runs out of memory."""

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + 2**30, pages + 2**30))

    ended = run(["fit", "--model", "injected.HungryModule", *SFT, "--trainer.max_steps", "4"], "memory", limit)
    return [ends("a step that runs out of memory", ended, "lower data.micro_batch_size")]


def lost_rank() -> list[Result]:
    """Kill one of two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def be(rank: int) -> Callable[[], None]:
        return lambda: os.environ.update({
            "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "TORCHELASTIC_RUN_ID": "drill", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        })  # fmt: skip

    command = ["fit", "--model", "injected.MortalModule", *SFT, "--trainer.devices", "2", "--trainer.accelerator",
               "cpu", "--trainer.strategy", "ddp", "--trainer.max_steps", "6"]  # fmt: skip
    ranks = [Run(command, "lost_rank", be(rank)) for rank in (1, 0)]
    killed, ended = (one.ended() for one in ranks)
    result = ends("one of two ranks is killed (SIGKILL)", ended, "rank 1 (process")
    return [result._replace(held=result.held and killed.status == -signal.SIGKILL)]


def bombs() -> list[Result]:
    """Inject files that would execute code."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (Path("exploded"),)

    torch.save({"hyper_parameters": {"x": Bomb()}}, "bomb.ckpt")
    Path("tagged.yaml").write_text("model: !!python/object/apply:os.system ['touch exploded']\n")
    shutil.copytree("world/model", "pickled")
    Path("pickled/pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    fit = ["fit", "--model", "SFTModule", *SFT]
    cases = {
        "a checkpoint that is a pickle bomb": ([*fit, "--ckpt_path", "bomb.ckpt"], "no checkpoint of plain tensors"),
        "a config with a Python tag": (["fit", "--config", "tagged.yaml"], "no YAML"),
        "a model whose weights are a pickle bomb": (
            [*fit, "--model.init_from", "pickled", "--model.from_scratch", "false"], "are a pickle",
        ),
    }  # fmt: skip
    results = []
    for fault, (argv, words) in cases.items():
        result = ends(fault, run(argv, "bomb"), words)
        results.append(result._replace(held=result.held and not Path("exploded").exists()))
    return results


def finishes(fault: str, ended: Ended, seen: str = "", held: bool = True) -> Result:
    """Return the result of a run that must finish."""
    held = held and ended.status == 0
    return Result(fault, "the run finishes", held, ended.seconds, seen if held else ended.line or f"{ended.status}")


def ends(fault: str, ended: Ended, words: str) -> Result:
    """Return the result of a run that must end with one line that states the reason, without a traceback."""
    held = ended.status in (1, 2) and words in ended.line and "Traceback" not in ended.said
    return Result(fault, "the run ends, and one line says why", held, ended.seconds, ended.line or f"{ended.status}")


GROUPS = (scorer_faults, score_server, rollout_server, divergence, memory, lost_rank, bombs)


def main() -> int:
    """Inject every fault; return the number of broken promises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file with the counts and every result")
    parser.add_argument("--only", default="", help="only the groups of faults whose name has this word")
    arguments = parser.parse_args()
    out, results = arguments.out and arguments.out.absolute(), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["RLHF_CACHE"] = str(Path(folder) / "cache")
        sys.path.append(str(HERE))
        torch.set_num_threads(1)
        write_world("world", demonstrations=64, pairs_train=64, pairs_test=8)
        for group in GROUPS:
            if arguments.only not in group.__name__:
                continue
            for result in group():
                results.append(result)
                verdict = "held    " if result.held else "NOT HELD"
                print(f"{verdict} {result.seconds:6.1f} s  {result.fault}: {result.promise}. {result.seen}", flush=True)
        os.chdir("/")
    lost = [result.fault for result in results if not result.held]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        counts = {"injected": len(results), "held": len(results) - len(lost), "not_survived": lost}
        out.write_text(json.dumps({**counts, "faults": [result._asdict() for result in results]}, indent=2) + "\n")
    print(f"{len(results)} faults injected; not survived: {', '.join(lost) or 'none'}")
    return len(lost)


if __name__ == "__main__":
    raise SystemExit(main())
