# ruff: noqa: E501, SIM115
"""Hundreds of attacks and faults against the commands, each in a forked process with a time and a memory limit.

    python experiments/reliability/probes.py [--front NAME ...] [--only TEXT] [--out FILE.json]

A probe holds if the command ends in time and memory with one sentence that has a code (no traceback, no status 0 where
the input is unusable) and no planted code has run. Probes of processes send signals at counted moments; those of pages
and servers send requests and answers. The table counts held and broken probes for each front; every broken probe is
printed. The exit status is 1 if any probe broke. ``--every 12`` is a quick look of some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from probe_fronts import (
    VALUES,
    Judge,
    answers,
    ask,
    judge_signal,
    moments_of,
    numeric_settings,
    requests,
    score_by,
    with_signals,
)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

RESULTS = Path(__file__).parent / "results"
SECONDS, GIGABYTES = 40, 3
"""Limits of one probe: processor time, and memory on top of the imported process."""
WALL_SECONDS = 240
"""Limit of a probe that sleeps; it is long, so that a busy machine breaks no probe."""
RAN = "ran"
"""A file that planted code makes in the working directory."""
PLANTED = f"from pathlib import Path\nPath({RAN!r}).touch()\n"


class Probe(NamedTuple):
    """One attack or fault.

    Attributes:
        front: key of `FRONTS`.
        name: what is done.
        prepare: changes the probe's folder, which is the working directory, and returns the command line, or does the
            work and returns an exit status.
        may_succeed: whether ignoring the change is right too: the command then ends with status 0.
        typed: what stands on standard input.
        fresh: whether the command runs in a new process, which has imported nothing yet.
        judge: what judges the exit status and the output, where it is not the rule above.
    """

    front: str
    name: str
    prepare: Callable[[], list[str] | int]
    may_succeed: bool = False
    typed: bytes = b"w6 w7\n"
    fresh: bool = False
    judge: Judge | None = None


class Outcome(NamedTuple):
    """What became of a probe: None or why it broke, and what the command said."""

    broke: str | None
    said: str


# -- the world that is attacked ---------------------------------------------------------------------------------------


def build_world(root: Path) -> None:
    """Make a tiny model, an adapter of it, a reward model, data, and runs with checkpoints."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
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


def fit(name: str) -> list[str]:
    """Return a training command of four updates."""
    return [
        "fit", "--model", "SFTModule", "--model.init_from", "model", "--data", "SFTDataModule",
        "--data.source", "data.jsonl", "--data.batch_size", "2", "--run_name", name,
        "--trainer.accelerator", "cpu",
    ]  # fmt: skip


def rlhf(argv: list[str]) -> int:
    """Run a command in this process and return its exit status."""
    from rlhf_lightning.cli import main

    try:
        return main(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


RUN, LORA_RUN = "runs/sft/version_0", "runs/lora/version_0"
CHAT = ["chat", "model", "--max_new_tokens", "3"]
CHAT_ADAPTER = ["chat", "adapter", "--max_new_tokens", "3"]
RESUME = ["fit", "--resume", RUN, "--trainer.max_epochs", "2"]


# -- running one ------------------------------------------------------------------------------------------------------


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
        return Outcome(_judged(probe, ended, text, (place / "w" / RAN).exists()), text[-1500:])
    finally:
        os.chdir(world)
        shutil.rmtree(place, ignore_errors=True)


def _attack(probe: Probe, folder: Path, said: Path) -> None:
    """The forked process: prepare, run, leave the status; never returns."""
    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ["RLHF_CACHE"] = str(folder.parent / "cache")
    output = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        (folder.parent / "typed").write_bytes(probe.typed)
        os.dup2(os.open(folder.parent / "typed", os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdin, sys.stdout = open(0), open(1, "w", buffering=1)
        sys.stderr = open(2, "w", buffering=1)
        used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        _record_uncoded()
        asked = probe.prepare()
        if probe.fresh and not isinstance(asked, int):
            repository = str(Path(__file__).resolve().parents[2])
            os.execve(
                sys.executable,
                [sys.executable, "-m", "rlhf_lightning", *asked],
                {**os.environ, "PYTHONPATH": repository, "PYTHONSAFEPATH": ""},
            )
        status = asked if isinstance(asked, int) else rlhf(asked)
        sys.stdout.flush()
    except BaseException:
        import traceback

        os.write(output, traceback.format_exc().encode())
        status = 70
    os._exit(status & 0xFF)


def _record_uncoded() -> None:
    """Say it where the sentence is a library's own, of an error without a code."""
    from rlhf_lightning.commands import failures
    from rlhf_lightning.errors import RlhfError

    before = failures.failure_sentence

    def recorded(error: Exception) -> str | None:
        coded = isinstance(error, RlhfError | MemoryError) or failures.is_out_of_memory(error)
        # jsonargparse makes a ValueError of what a class that it builds raises, and keeps the sentence.
        coded = coded or str(error).startswith("Does not validate against any of the Union subtypes")
        if not coded and type(error).__module__.split(".")[0] not in ("yaml", "sqlite3", "rlhf_lightning"):
            print(f"UNCODED {type(error).__name__}", file=sys.stderr)
        return before(error)

    failures.failure_sentence = recorded  # type: ignore[assignment]


def _wait(child: int) -> int | str:
    """Return the exit status of a process; "late" if it had to be killed, or the signal that ended it."""
    deadline = time.monotonic() + WALL_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.WIFEXITED(status):
                return os.WEXITSTATUS(status)
            used_up = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
            return "late" if used_up else f"signal {os.WTERMSIG(status)}"
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


def _judged(probe: Probe, ended: int | str, text: str, ran: bool) -> str | None:
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


# -- ways to damage things --------------------------------------------------------------------------------------------


def edited(file: str, argv: list[str], change: Callable[[Any], Any]) -> Callable[[], list[str]]:
    """Return what writes a JSON file anew, changed."""

    def prepare() -> list[str]:
        path = Path(file)
        found = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(change(found)))
        return argv

    return prepare


def replaced(file: str, argv: list[str], content: Callable[[bytes], bytes]) -> Callable[[], list[str]]:
    """Return what writes a file anew, changed as bytes."""

    def prepare() -> list[str]:
        path = Path(file)
        path.write_bytes(content(path.read_bytes() if path.is_file() else b""))
        return argv

    return prepare


ODD_VALUES: dict[str, Any] = {
    "null": None, "a text": "many", "a list": [1, 2], "an object": {"a": 1}, "0": 0, "-1": -1, "1e9": 10**9, "2.5": 2.5,
}  # fmt: skip
HTML = b"<!DOCTYPE html><html><body>404: not found</body></html>"
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut to half": lambda whole: whole[: len(whole) // 2],
    "cut to 7 bytes": lambda whole: whole[:7],
    "HTML": lambda whole: HTML,
    "zeros": lambda whole: bytes(len(whole)),
    "LFS pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "first bytes flipped": lambda whole: bytes(byte ^ 255 for byte in whole[:16]) + whole[16:],
    "huge header": lambda whole: struct.pack("<Q", 2**62) + whole[8:],
    "not UTF-8": lambda whole: b"\xff\xfe" + whole,
}


def _from_model(argv: list[str]) -> list[str]:
    """Return a command line as it is typed within the model's folder."""
    places = {
        "model": ".",
        **{name: f"../{name}" for name in ("adapter", "data.jsonl", "pairs.jsonl", RUN, "out.jsonl")},
    }
    return [places.get(word, word) for word in argv]


def code_probes() -> Iterator[Probe]:
    """Planted modules next to data and models, kernels named by configs, pickles."""
    modules = ("kernels", "brotli", "megatron", "deepspeed", "flash_attn", "triton", "xformers", "mamba_ssm", "apex",
               "bitsandbytes_extra", "pandas_extra", "zstandard", "sentencepiece", "tiktoken", "torchvision", "cupy",
               "auto_gptq", "awq", "hqq", "aqlm", "optimum", "neptune", "wandb", "comet_ml", "numba", "soundfile",
               "librosa", "google", "flax", "jax", "tensorflow", "mlx", "ninja", "uvloop", "orjson", "simplejson", "rich",
               "IPython", "tensorboardX", "peft_extra", "gguf", "mistral_common", "av", "cv2", "timm", "scipy")  # fmt: skip

    def planted(names: tuple[str, ...], argv: list[str], place: str = ".") -> Callable[[], list[str]]:
        def prepare() -> list[str]:
            os.chdir(place)
            for name in names:
                # Sources of installed modules are not shadowed: the working directory would come last anyway.
                Path(f"{name}.py").write_text(PLANTED.replace(repr(RAN), repr(str(Path.cwd() / RAN))))
            return argv

        return prepare

    commands = {
        "chat": CHAT, "chat adapter": CHAT_ADAPTER, "audit": ["audit", "pairs.jsonl"], "generate": [
            "generate", "model", "--prompts", "data.jsonl", "--out", "out.jsonl", "--max_new_tokens", "2"],
        "fit": fit("planted"), "resume": RESUME, "export": ["export", RUN, "--out", "exported"],
        "objectives": ["objectives"],
        "plan": ["plan", "--model", "SFTModule", "--model.init_from", "model", "--data", "SFTDataModule",
                 "--data.source", "data.jsonl"],
    }  # fmt: skip
    for name, argv in commands.items():
        for place in ("next to the data", "in the model's folder"):
            argv_there = argv if place == "next to the data" else _from_model(argv)
            yield Probe(
                "files",
                f"{len(modules)} planted modules {place}, rlhf {name}",
                planted(modules, argv_there, "." if place == "next to the data" else "model"),
                may_succeed=True,
                fresh=True,
            )
    for field, value in (
        ("_attn_implementation", "owner/kernel"), ("attn_implementation", "owner/kernel"),
        ("_attn_implementation_internal", "owner/kernel:fn"), ("_attn_implementation", "kernels-community/flash-attn"),
        ("attn_implementation", {"": "owner/kernel"}), ("attn_implementation", "paged|owner/kernel"),
        ("experts_implementation", "owner/kernel"), ("_experts_implementation", "owner/kernel"),
        ("attn_implementation", "flash_attention_2@owner/kernel"),
    ):  # fmt: skip
        yield Probe(
            "files",
            f"config.json: {field} {value}",
            edited("model/config.json", CHAT, lambda c, f=field, v=value: {**c, f: v}),
        )
    for corda in ("megatron_core", "megatron.core", "os", "my.module"):
        yield Probe("files", f"adapter_config: megatron_core {corda}", edited(
            "adapter/adapter_config.json", CHAT_ADAPTER, lambda c, v=corda: {**c, "megatron_core": v, "megatron_config": {}}
        ), may_succeed=True)  # fmt: skip
    for field, value in (("auto_map", {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}),
                         ("custom_pipelines", {"x": {"impl": "code.P"}}), ("tokenizer_class", "code.T")):  # fmt: skip

        def with_code(f: str = field, v: Any = value) -> list[str]:
            Path("model/code.py").write_text(PLANTED)
            Path("code.py").write_text(PLANTED)
            edited("model/config.json", CHAT, lambda c: {**c, f: v})()
            return CHAT

        yield Probe("files", f"config.json: {field}", with_code, may_succeed=True)
    for field, value in (("dtype", "os.system"), ("torch_dtype", "__import__('os')"), ("hidden_act", "os.system"),
                         ("model_type", "../../code"), ("architectures", ["os.system"])):  # fmt: skip
        yield Probe(
            "files",
            f"config.json: {field} {value}",
            edited("model/config.json", CHAT, lambda c, f=field, v=value: {**c, f: v}),
            may_succeed=field in ("architectures", "dtype", "torch_dtype"),
        )


def silence_probes() -> Iterator[Probe]:
    """What would go wrong without a word: indices that leave the folder, decoys, other weights, ranges."""

    def index(names: dict[str, str], extra: Callable[[], None] = lambda: None) -> Callable[[], list[str]]:
        def prepare() -> list[str]:
            from safetensors import safe_open

            with safe_open("model/model.safetensors", "pt") as weights:
                keys = list(weights.keys())
            os.rename("model/model.safetensors", "model/model-00001-of-00001.safetensors")
            found = dict.fromkeys(keys, "model-00001-of-00001.safetensors")
            found.update({key: names["*"] for key in keys[:2]} if "*" in names else names)
            Path("model/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": found}))
            extra()
            return CHAT

        return prepare

    def decoy() -> None:
        shutil.copy("model/model-00001-of-00001.safetensors", "model/decoy.safetensors")

    def outside() -> None:
        shutil.copy("model/model-00001-of-00001.safetensors", "outside.safetensors")

    for name, wanted, extra in (
        ("a .bin file", "pytorch_model.bin", lambda: Path("model/pytorch_model.bin").write_bytes(b"x")),
        ("a file outside", "../outside.safetensors", outside), ("an absolute path", str(Path("/tmp/o.safetensors")), outside),
        ("a missing file", "model-00002-of-00002.safetensors", lambda: None), ("a folder", ".", lambda: None),
        ("a sub-folder", "sub/m.safetensors", lambda: None), ("a number", 7, lambda: None), ("null", None, lambda: None),
    ):  # fmt: skip
        yield Probe("files", f"safetensors index names {name}", index({"*": wanted}, extra))
    yield Probe(
        "files", "a decoy next to the indexed file", index({}, decoy), may_succeed=True
    )  # not loaded, not hashed
    for name, content in (
        ("a list", "[]"),
        ("empty", ""),
        ("no map", "{}"),
        ("a map that is a list", '{"weight_map": []}'),
    ):

        def broken(text: str = content) -> list[str]:
            index({})()
            Path("model/model.safetensors.index.json").write_text(text)
            return CHAT

        yield Probe("files", f"safetensors index: {name}", broken)

    def linked() -> list[str]:
        shutil.move("model/model.safetensors", "elsewhere.safetensors")
        os.symlink("../elsewhere.safetensors", "model/model.safetensors")
        return CHAT

    yield Probe("files", "weights are a link (as in the Hub's cache)", linked, may_succeed=True)
    settings = {
        "max_grad_norm": (-1, 0), "learning_rate": (-1, "nan", "inf"), "weight_decay": (-1,), "adam_eps": (-1,),
        "betas": ("[0.9, 1.5]",), "lora.r": (0, -1), "lora.dropout": (1.5,), "warmup_fraction": (-1, 2),
    }  # fmt: skip
    for key, values in settings.items():
        for value in values:
            yield Probe("numbers", f"model.{key} {value}", lambda k=key, v=value: [*fit("x"), f"--model.{k}", str(v)])
    for flag in (["--model.seed", "7"], ["--data.seed", "7"], ["--seed_everything", "7"]):
        yield Probe(
            "files",
            f"--resume with {flag[0]}",
            lambda f=flag: [*RESUME, *f],
            may_succeed=flag[0] == "--seed_everything",
        )
    for key, value in (("learning_rate", "0.5"), ("weight_decay", "0.3"), ("betas", "[0.5, 0.6]"), ("adam_eps", "0.1")):
        yield Probe(
            "silence", f"--resume with {key}", lambda k=key, v=value: [*RESUME, f"--model.{k}", v], may_succeed=True
        )


def leak_probes() -> Iterator[Probe]:
    """Loss and leaks: half-written folders, names that leave the runs folder, links."""
    for name in ("../x", "/tmp/x", "a/../../x", "", ".", "x\ny", "a" * 300, "con\x00"):
        yield Probe(
            "files", f"run_name {name[:9]!r}", lambda n=name: [*fit("x"), "--run_name", n], may_succeed=not name
        )

    def half(signal_number: int, moment: float) -> Callable[[], list[str]]:
        def prepare() -> list[str]:
            with open("data.jsonl", "w") as file:
                for row in range(4000):
                    file.write(json.dumps({"prompt": f"w{6 + row % 100} w7", "completion": "w8 w9"}) + "\n")
            signal.setitimer(signal.ITIMER_REAL, moment)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal_number))
            return [*fit("killed"), "--trainer.max_steps", "2"]

        return prepare

    for moment in (0.05, 0.2, 0.5, 0.8, 1.2):
        yield Probe("processes", f"Ctrl-C after {moment} s", half(signal.SIGINT, moment), may_succeed=True)


def hang_probes() -> Iterator[Probe]:
    """Files without an end, bombs of every kind, regexes, counts."""

    def special(make: Callable[[str], None], place: str, argv: list[str]) -> Callable[[], list[str]]:
        def prepare() -> list[str]:
            path = Path(place)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            make(place)
            return argv

        return prepare

    kinds: dict[str, Callable[[str], None]] = {
        "FIFO": os.mkfifo,
        "link to /dev/zero": lambda place: os.symlink("/dev/zero", place),
        "link to /dev/urandom": lambda place: os.symlink("/dev/urandom", place),
        "link to itself": lambda place: os.symlink(Path(place).name, place),
        "socket": _socket_at,
    }
    places = {
        "folder/x.jsonl": ["audit", "folder"], "x.jsonl": ["audit", "*.jsonl"], "one.jsonl": ["audit", "one.jsonl"],
        "one.json": ["audit", "one.json"], "one.csv": ["audit", "one.csv"], "one.parquet": ["audit", "one.parquet"],
        "one.txt": ["audit", "one.txt"], "one.jsonl.gz": ["audit", "one.jsonl.gz"],
        "model/config.json": CHAT, "model/tokenizer.json": CHAT, "model/tokenizer_config.json": CHAT,
        "model/model.safetensors": CHAT, "model/generation_config.json": CHAT, "model/chat_template.jinja": CHAT,
        "adapter/adapter_config.json": CHAT_ADAPTER, "adapter/adapter_model.safetensors": CHAT_ADAPTER,
        "adapter/backbone.json": CHAT_ADAPTER, f"{RUN}/manifest.json": RESUME, f"{RUN}/config.yaml": RESUME,
        f"{RUN}/checkpoints/last.ckpt": RESUME, "one.gguf": ["chat", "one.gguf"],
    }  # fmt: skip
    for kind, make in kinds.items():
        for place, argv in places.items():
            loose = (
                place in ("x.jsonl", "folder/x.jsonl")
                or place.startswith(RUN)
                or "generation" in place
                or "template" in place
                or ("backbone" in place and kind == "link to itself")
            )
            yield Probe("files", f"{place} is a {kind}", special(make, place, argv), may_succeed=loose)
    for pattern in (
        "(a|a)*$",
        "(.*)*!",
        "(.*.*.*.*.*.*.*.*.*.*)!x",
        "((a+)+)+$|(.+)+x",
        "(model|.)+!",
        "(",
        "[z-a]",
        "(?P<x>",
    ):
        for field in ("target_modules", "exclude_modules"):
            yield Probe(
                "files",
                f"adapter_config {field} {pattern}",
                edited("adapter/adapter_config.json", CHAT_ADAPTER, lambda c, p=pattern, f=field: {**c, f: p}),
                may_succeed=field == "exclude_modules",  # one that is quick excludes nothing
            )
        yield Probe(
            "files",
            f"adapter_config rank_pattern {pattern}",
            edited("adapter/adapter_config.json", CHAT_ADAPTER, lambda c, p=pattern: {**c, "rank_pattern": {p: 4}}),
            may_succeed=True,  # one that is quick matches no layer
        )
    for key in (
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "max_position_embeddings",
    ):
        for value in (10**9, 10**12, 10**30):
            yield Probe(
                "files",
                f"config.json {key} {value:.0e}",
                edited("model/config.json", CHAT, lambda c, k=key, v=value: {**c, k: v}),
                may_succeed=key == "max_position_embeddings",
            )
            if key != "max_position_embeddings":
                yield Probe(
                    "files",
                    f"from scratch: config.json {key} {value:.0e}",
                    edited(
                        "model/config.json",
                        [*fit("x"), "--model.from_scratch", "true"],
                        lambda c, k=key, v=value: {**c, k: v},
                    ),
                )

    def tokenizer(change: Callable[[dict[str, Any]], None]) -> Callable[[], list[str]]:
        def changed(found: dict[str, Any]) -> dict[str, Any]:
            change(found)
            return found

        return edited("model/tokenizer.json", CHAT, changed)

    def multiplier(times: int, steps: int, kind: str = "Replace") -> Callable[[dict[str, Any]], None]:
        step = {"type": kind, "pattern": {"String": "w"}, "content": "w" * times} if kind == "Replace" else {
            "type": "Prepend", "prepend": "w" * times}  # fmt: skip
        return lambda found: found.update(normalizer={"type": "Sequence", "normalizers": [step] * steps})

    for times, steps in ((10, 8), (1000, 3), (10**6, 1), (10**6, 2), (3, 18), (2, 30)):
        yield Probe("files", f"tokenizer: normalizer x{times}, {steps} times", tokenizer(multiplier(times, steps)))
    yield Probe("files", "tokenizer: prepends 10 MB", tokenizer(multiplier(10**7, 2, "Prepend")))
    yield Probe(
        "files",
        "tokenizer: post-processor repeats",
        tokenizer(
            lambda found: found.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 100_000,
                    "pair": [],
                    "special_tokens": {},
                }
            )
        ),
    )
    for template in ("{% for i in range(10**9) %}{% endfor %}", "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
                     "{{ 'x' * 10**10 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 9**9**9 }}",
                     "{{ ('x' * 99999999)|replace('x', 'y' * 999) }}"):  # fmt: skip
        yield Probe(
            "files",
            f"template {template[:30]}",
            replaced("model/chat_template.jinja", CHAT, lambda _, t=template: t.encode()),
        )
    aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    configs = {
        "alias bomb": aliases, "alias bomb in model": "model:\n  class_path: SFTModule\n  init_args:\n" + "".join(
            f"    {line}\n" for line in aliases.splitlines()),
        "alias bomb in data": "data:\n" + "".join(f"  {line}\n" for line in aliases.splitlines()),
        "alias of itself": "model: &m\n  x: *m\n", "50,000 brackets": "[" * 50_000, "50,000 closed brackets": "a:\n " + "[" * 50_000 + "]" * 50_000,
        "50,000 braces": "a: " + "{a: " * 50_000, "50,000 dashes": "- " * 50_000 + "a\n", "50,000 keys": "? " * 50_000 + "a\n",
        "5,000 braces": "a: " + "{a: " * 5_000 + "}" * 5_000 + "\n", "2,000 brackets": "a: " + "[" * 2000 + "]" * 2000 + "\n",
        "a number of 1e6 digits": "model: " + "9" * 10**6 + "\n", "a key of 1e7 characters": "k" * 10**7 + ": 1\n",
        "merge bomb": "a: &a {x: 1}\n" + "".join(f"b{i}: &b{i}\n  <<: [{', '.join(['*a' if i == 0 else f'*b{i - 1}'] * 10)}]\n" for i in range(12)),
    }  # fmt: skip
    for name, text in configs.items():
        yield Probe(
            "files",
            f"--config: {name}",
            replaced("c.yaml", ["fit", "--config", "c.yaml"], lambda _, t=text: t.encode()),
        )
        yield Probe(
            "files",
            f"config.yaml of a run: {name}",
            replaced(f"{RUN}/config.yaml", RESUME, lambda _, t=text: t.encode()),
        )
    for flag in ("--model.learning_rate", "--data.source", "--model", "--trainer.callbacks"):
        for text in ("[" * 20_000, "{a: " * 20_000, "[" * 3_000 + "]" * 3_000):
            yield Probe("files", f"{flag} {text[:4]} x{len(text)}", lambda f=flag, t=text: [*fit("x"), f, t])
    yield from _big_rows()


def _socket_at(place: str) -> None:
    import socket

    here = os.getcwd()
    os.chdir(Path(place).parent)
    socket.socket(socket.AF_UNIX).bind(Path(place).name)
    os.chdir(here)


def _big_rows() -> Iterator[Probe]:
    def jsonl(size: int) -> Callable[[], list[str]]:
        def prepare() -> list[str]:
            row = json.dumps({"prompt": "w6", "completion": "w7 " * (size // 3)})
            Path("data.jsonl").write_text(Path("data.jsonl").read_text() + row + "\n")
            return [*fit("big"), "--data.max_length", "64"]

        return prepare

    for size in (40 << 20, 105 << 20):
        yield Probe("files", f"one JSONL row of {size >> 20} MB", jsonl(size), may_succeed=True)

    def compressed(opener: Callable[[str, str], Any], name: str, size: int) -> Callable[[], list[str]]:
        def prepare() -> list[str]:
            with opener(name, "wb") as file:
                file.write(b'{"prompt": "w6", "chosen": "')
                for _ in range(size >> 20):
                    file.write(b"w" * (1 << 20))
                file.write(b'", "rejected": "w7"}\n')
            return ["audit", name]

        return prepare

    import bz2
    import lzma

    for name, opener in (("x.jsonl.gz", gzip.open), ("x.jsonl.bz2", bz2.open), ("x.json.gz", gzip.open), ("x.csv.gz", gzip.open),
                         ("x.txt.gz", gzip.open), ("x.jsonl.xz", lzma.open)):  # fmt: skip
        yield Probe("files", f"{name} of 600 MB", compressed(opener, name, 600), may_succeed=True)  # the row is counted

    def parquet(rows: int, size: int, nested: bool) -> Callable[[], list[str]]:
        def prepare() -> list[str]:
            import pyarrow
            import pyarrow.parquet

            text = "w" * size
            dictionary = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), [text])
            column: Any = dictionary
            if nested:
                column = pyarrow.array([[{"role": "user", "content": text}]] * rows)
            table = pyarrow.table({"prompt": column, "chosen": column, "rejected": dictionary})
            pyarrow.parquet.write_table(table, "x.parquet", compression="zstd")
            return ["audit", "x.parquet"]

        return prepare

    for rows, size, nested in (
        (1000, 4 << 20, False),
        (100_000, 1 << 16, False),
        (20, 50 << 20, False),
        (500, 1 << 20, True),
    ):
        yield Probe(
            "files",
            f"Parquet of {rows} x {size >> 10} kB{' nested' if nested else ''}",
            parquet(rows, size, nested),
            may_succeed=size * rows * 3 < 4 << 30,
        )


def traceback_probes() -> Iterator[Probe]:
    """Damaged files where a sentence is promised."""
    files = {
        "model/model.safetensors": CHAT, "model/config.json": CHAT, "model/tokenizer.json": CHAT,
        "model/tokenizer_config.json": CHAT, "model/generation_config.json": CHAT, "adapter/adapter_model.safetensors": CHAT_ADAPTER,
        "adapter/adapter_config.json": CHAT_ADAPTER, "adapter/backbone.json": CHAT_ADAPTER,
        f"{RUN}/checkpoints/update_000004.ckpt": RESUME, f"{RUN}/checkpoints/last.ckpt": RESUME, f"{RUN}/config.yaml": RESUME, f"{RUN}/manifest.json": RESUME,
        f"{RUN}/model/model.safetensors": ["chat", f"{RUN}/model", "--max_new_tokens", "2"],
        "one.gguf": ["chat", "one.gguf"], "data.jsonl": fit("x"), "one.parquet": ["audit", "one.parquet"],
        "one.json": ["audit", "one.json"], "one.csv": ["audit", "one.csv"], "one.jsonl.gz": ["audit", "one.jsonl.gz"],
        "one.arrow": ["audit", "one.arrow"], "c.yaml": ["fit", "--config", "c.yaml"], "template.jinja": [*CHAT[:2]],
    }  # fmt: skip
    loose = ("tokenizer_config", "generation_config", "backbone.json", "manifest.json", "data.jsonl", "one.csv", "template",
             "one.json", "update_0000", "last.ckpt")  # fmt: skip
    for file, argv in files.items():
        for name, damage in DAMAGE.items():
            yield Probe(
                "files",
                f"{file}: {name}",
                replaced(file, argv, damage),
                may_succeed=any(part in file for part in loose) or "c.yaml" in file,
            )
    for key in ("num_attention_heads", "vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "dtype", "model_type", "architectures",
                "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "num_key_value_heads", "head_dim", "eos_token_id",
                "max_position_embeddings", "layer_types", "quantization_config", "attention_dropout", "pad_token_id",
                "id2label", "text_config", "transformers_version", "initializer_range"):  # fmt: skip
        for name, value in ODD_VALUES.items():
            yield Probe(
                "files",
                f"config.json {key} is {name}",
                edited("model/config.json", CHAT, lambda c, k=key, v=value: {**c, k: v}),
                may_succeed=True,
            )
    yield Probe("files", "config.json is a list", edited("model/config.json", CHAT, lambda c: [c]))
    for key in ("base_model_name_or_path", "peft_type", "r", "lora_alpha", "target_modules", "task_type", "modules_to_save", "bias",
                "lora_dropout", "fan_in_fan_out", "rank_pattern", "layers_to_transform", "use_dora", "init_lora_weights"):  # fmt: skip
        for name, value in ODD_VALUES.items():
            yield Probe(
                "files",
                f"adapter_config {key} is {name}",
                edited("adapter/adapter_config.json", CHAT_ADAPTER, lambda c, k=key, v=value: {**c, k: v}),
                may_succeed=True,
            )
        yield Probe(
            "files",
            f"adapter_config without {key}",
            edited(
                "adapter/adapter_config.json", CHAT_ADAPTER, lambda c, k=key: {n: v for n, v in c.items() if n != k}
            ),
            may_succeed=True,
        )
    for kind in ("PROMPT_TUNING", "PREFIX_TUNING", "IA3", "NONSENSE", "LOHA", "POLY", ["LORA"], "P_TUNING", "BONE"):
        yield Probe(
            "files",
            f"adapter_config peft_type {kind}",
            edited("adapter/adapter_config.json", CHAT_ADAPTER, lambda c, v=kind: {**c, "peft_type": v}),
            may_succeed=kind == "BONE",
        )
    yield Probe(
        "tracebacks", "adapter_config is a list", edited("adapter/adapter_config.json", CHAT_ADAPTER, lambda c: [c])
    )
    for name, value in ODD_VALUES.items():
        yield Probe(
            "files",
            f"backbone.json is {name}",
            edited("adapter/backbone.json", CHAT_ADAPTER, lambda c, v=value: v),
            may_succeed=name == "an object",
        )
        for key in ("fingerprint", "source", "quantization"):
            yield Probe(
                "files",
                f"backbone.json {key} is {name}",
                edited("adapter/backbone.json", CHAT_ADAPTER, lambda c, k=key, v=value: {**c, k: v}),
                may_succeed=True,
            )
    yield from _weights()
    yield from _checkpoints()

    def folder_at_last() -> list[str]:
        last = Path(f"{RUN}/checkpoints/last.ckpt")
        last.unlink()
        last.mkdir()
        return RESUME

    yield Probe("files", "last.ckpt is a folder", folder_at_last, may_succeed=True)

    def full_folder_at_last() -> list[str]:
        folder_at_last()
        Path(f"{RUN}/checkpoints/last.ckpt/notes").write_text("mine")
        return RESUME

    yield Probe("files", "last.ckpt is a folder with files", full_folder_at_last, may_succeed=True)
    for count in (2**63, 2**40, 10**6):

        def gguf(n: int = count) -> list[str]:
            Path("one.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, n, n) + b"\x01" * 64)
            return ["chat", "one.gguf"]

        yield Probe("files", f"gguf that counts {count:.0e}", gguf)
    for text in ("a: [", "a: 'b", "model: {class_path: 7}", "model: []", "model: text", "trainer: 7", "7", "[]", "a:\tb", "model:\n  class_path: SFTModule\n  init_args: 7",
                 "data: {class_path: 7}", "trainer:\n  callbacks: 7", "trainer:\n  callbacks: [7]", "trainer:\n  callbacks: [{class_path: os.system}]",
                 "trainer:\n  logger: {class_path: os.system}", "model: {class_path: os.system}", "model: !!python/object/apply:os.system [touch ran]",
                 "seed_everything: x", "checkpoint: 7", "? [a]\n: b", "\x00", "%YAML 9.9\n---\na: 1", "--- a\n--- b", "*x", "a: !x b"):  # fmt: skip
        yield Probe(
            "files",
            f"--config {text[:40]!r}",
            replaced("c.yaml", ["fit", "--config", "c.yaml"], lambda _, t=text: t.encode()),
        )


def _weights() -> Iterator[Probe]:
    def tensors(file: str, argv: list[str], change: Callable[[dict[str, Any]], Any]) -> Callable[[], list[str]]:
        def prepare() -> list[str]:
            from safetensors.torch import load_file, save_file

            found = load_file(file)
            save_file(change(found) or found, file, metadata={"format": "pt"})
            return argv

        return prepare

    import torch

    def shapes(found: dict[str, Any]) -> Any:
        return {key: value[..., :1].contiguous() for key, value in found.items()}

    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "other shapes": shapes,
        "one other shape": lambda found: {**found, sorted(found)[0]: torch.ones(3, 3)},
        "one tensor missing": lambda found: {key: found[key] for key in sorted(found)[1:]},
        "no tensors": lambda found: {"x": torch.ones(1)},
        "NaN": lambda found: {key: value * float("nan") for key, value in found.items()},
        "infinite": lambda found: {key: value + float("inf") for key, value in found.items()},
        "integers": lambda found: {key: torch.ones_like(value, dtype=torch.int64) for key, value in found.items()},
        "scalars": lambda found: {key: torch.tensor(1.0) for key in found},
        "empty tensors": lambda found: {key: torch.zeros(0) for key in found},
        "renamed": lambda found: {f"x.{key}": value for key, value in found.items()},
        "transposed": lambda found: {key: value.T.contiguous() if value.dim() == 2 else value for key, value in found.items()},
        "rank 3": lambda found: {key: value.unsqueeze(0) for key, value in found.items()},
        "one element more": lambda found: {key: torch.cat([value, value[:1]]) for key, value in found.items()},
    }  # fmt: skip
    for name, change in changes.items():
        yield Probe(
            "files",
            f"model weights: {name}",
            tensors("model/model.safetensors", CHAT, change),
            may_succeed=name == "integers",
        )
        yield Probe(
            "files",
            f"adapter weights: {name}",
            tensors("adapter/adapter_model.safetensors", CHAT_ADAPTER, change),
            may_succeed=name == "integers",
        )

    def tokenizer_larger() -> list[str]:
        found = json.loads(Path("model/tokenizer.json").read_text())
        found["model"]["vocab"] |= {f"w{n}": n for n in range(120, 160)}
        Path("model/tokenizer.json").write_text(json.dumps(found))
        return CHAT

    yield Probe("files", "tokenizer larger than the model", tokenizer_larger, typed=b"w150 w151\n")
    yield Probe(
        "tracebacks", "more tokens than positions (chat)", lambda: CHAT, typed=b"w6 " * 500 + b"\n", may_succeed=True
    )

    def long_rows() -> list[str]:
        Path("data.jsonl").write_text(json.dumps({"prompt": "w6 " * 500, "completion": "w7 " * 500}) + "\n")
        return [*fit("long"), "--data.max_length", "4096"]

    yield Probe("files", "more tokens than positions (fit)", long_rows, may_succeed=True)


def _checkpoints() -> Iterator[Probe]:
    def tampered(change: Callable[[dict[str, Any]], Any], argv: list[str], run: str) -> Callable[[], list[str]]:
        def prepare() -> list[str]:
            import torch

            path = Path(run) / "checkpoints" / "last.ckpt"
            state = torch.load(path, weights_only=True)
            state = change(state) or state
            for other in list(path.parent.glob("*.ckpt")):
                other.unlink()
            torch.save(state, path)
            return argv

        return prepare

    def without(key: str) -> Callable[[dict[str, Any]], Any]:
        return lambda state: {name: value for name, value in state.items() if name != key}

    def with_value(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda state: {**state, key: value}

    import torch

    keys = ("state_dict", "optimizer_states", "pytorch-lightning_version", "loops", "callbacks", "lr_schedulers", "epoch", "global_step",
            "hyper_parameters", "progress", "random", "trained", "started_from", "skipped_in_a_row", "asked", "sharded", "trainable")  # fmt: skip
    odd: dict[str, Any] = {
        "a list": [1],
        "a text": "x",
        "null": None,
        "a number": 7,
        "empty": {},
        "a list of texts": ["x"],
    }
    commands = {"resume": RESUME, "export": ["export", RUN, "--out", "exported"]}
    for command, argv in commands.items():
        for key in keys:
            yield Probe(
                "files",
                f"{command}: checkpoint without {key}",
                tampered(without(key), argv, RUN),
                may_succeed=command == "export"
                or key
                in (
                    "asked",
                    "trainable",
                    "callbacks",
                    "epoch",
                    "global_step",
                    "sharded",
                    "hyper_parameters",
                    "lr_schedulers",
                    "pytorch-lightning_version",
                ),
            )
            for name, value in odd.items():
                if command == "resume" or key in ("state_dict", "hyper_parameters", "started_from", "progress"):
                    yield Probe(
                        "files",
                        f"{command}: checkpoint's {key} is {name}",
                        tampered(with_value(key, value), argv, RUN),
                        may_succeed=True,
                    )
    deep: dict[str, Callable[[dict[str, Any]], Any]] = {
        "wrong shapes": lambda s: {**s, "state_dict": {k: torch.ones(1) for k in s["state_dict"]}},
        "weights are numbers": lambda s: {**s, "state_dict": dict.fromkeys(s["state_dict"], 1.0)},
        "a weight missing": lambda s: {**s, "state_dict": dict(list(s["state_dict"].items())[1:])},
        "NaN weights": lambda s: {**s, "state_dict": {k: v * float("nan") for k, v in s["state_dict"].items()}},
        "callbacks' states are texts": lambda s: {**s, "callbacks": dict.fromkeys(s["callbacks"], "x")},
        "callbacks' states are empty": lambda s: {**s, "callbacks": {k: {} for k in s["callbacks"]}},
        "loops are texts": lambda s: {**s, "loops": dict.fromkeys(s["loops"], "x")},
        "loops' parts missing": lambda s: {**s, "loops": {"fit_loop": {}}},
        "optimizer is a text": lambda s: {**s, "optimizer_states": ["x"]},
        "two optimizers": lambda s: {**s, "optimizer_states": s["optimizer_states"] * 2},
        "optimizer without groups": lambda s: {**s, "optimizer_states": [{"state": {}, "param_groups": []}]},
        "moments of other shapes": lambda s: {**s, "optimizer_states": [{**s["optimizer_states"][0], "state": {k: {n: torch.ones(1) for n in v} for k, v in s["optimizer_states"][0]["state"].items()}}]},
        "progress is negative": lambda s: {**s, "progress": {k: -5 for k in s["progress"]}},
        "progress are texts": lambda s: {**s, "progress": dict.fromkeys(s["progress"], "x")},
        "progress lacks updates": lambda s: {**s, "progress": {}},
        "random is empty": lambda s: {**s, "random": []},
        "random of texts": lambda s: {**s, "random": ["x"]},
        "hyper-parameter unknown": lambda s: {**s, "hyper_parameters": {**s["hyper_parameters"], "wrong": 1}},
        "init_from gone": lambda s: {**s, "hyper_parameters": {**s["hyper_parameters"], "init_from": "gone"}},
        "class unknown": lambda s: {**s, "hyper_parameters": {**s["hyper_parameters"], "_class_path": "rlhf_lightning.modules.NoModule"}},
        "class a number": lambda s: {**s, "hyper_parameters": {**s["hyper_parameters"], "_class_path": 7}},
        "a list": lambda s: [s],
        "version 99": lambda s: {**s, "pytorch-lightning_version": "99.0"},
    }  # fmt: skip
    for name, change in deep.items():
        for command, argv in commands.items():
            yield Probe("files", f"{command}: {name}", tampered(change, argv, RUN), may_succeed=True)
    for name in ("empty zip", "zip of a text"):

        def packed(empty: bool = name == "empty zip") -> list[str]:
            path = next(Path(RUN).glob("checkpoints/update_*.ckpt"))
            path.unlink()
            content = io.BytesIO()
            with zipfile.ZipFile(content, "w") as file:
                if not empty:
                    file.writestr("x.txt", "x")
            path.write_bytes(content.getvalue())
            return RESUME

        yield Probe("files", f"resume: {name}", packed)


def file_probes() -> Iterator[Probe]:
    """All probes of files that others wrote, and of settings that name them."""
    for kind in (code_probes, silence_probes, leak_probes, hang_probes, traceback_probes):
        yield from (probe for probe in kind() if probe.front == "files")


def process_probes() -> Iterator[Probe]:
    """Signals at moments from the first import to the last export."""
    yield from (probe for probe in leak_probes() if probe.front == "processes")
    few = ["--max_new_tokens", "3"]
    commands = {
        "fit": [*fit("cut"), "--checkpoint.every_n_updates", "2"], "fit --resume": RESUME, "chat": CHAT,
        "generate": ["generate", "--model", "model", "--prompts", "data.jsonl", "--out", "out.jsonl", *few],
        "audit": ["audit", "pairs.jsonl", "--json", "report.json"], "validate": ["validate", RUN, "--data.eval_rows", "2"],
        "export": ["export", RUN, "--out", "exported"],
    }  # fmt: skip
    for name, argv, signals in moments_of(commands, _calls_of):
        yield Probe(
            "processes",
            name,
            lambda a=argv, s=signals: with_signals(a, s, rlhf),
            judge=judge_signal(signals[0][1], len(signals) > 1, Path.cwd),
        )


def _calls_of(argv: list[str]) -> int:
    """Count the calls of Python functions in a command, in a fork within a copy of the world."""
    place = Path(tempfile.mkdtemp(prefix="calls"))
    shutil.copytree(Path.cwd(), place / "w", symlinks=True)
    child = os.fork()
    if child == 0:
        os.chdir(place / "w")
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(0, 2)
        count = 0

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(profile)
        with contextlib.suppress(BaseException):
            rlhf(argv)
        sys.setprofile(None)
        (place / "calls").write_text(str(count))
        os._exit(0)
    os.waitpid(child, 0)
    count = int((place / "calls").read_text())
    shutil.rmtree(place, ignore_errors=True)
    return count


def _sound(status: int, text: str) -> str | None:
    return "traceback" if "Traceback (most recent" in text else None if status == 0 else text.strip()[-200:]


def page_probes() -> Iterator[Probe]:
    """Requests that no page sends: each gets an answer below 500 with the page's headers, and the page still works."""
    for name, send in requests():
        yield Probe("page", name, lambda s=send: ask(s), judge=_sound)


def server_probes() -> Iterator[Probe]:
    """Answers that no server gives: each is taken as finite scores, or refused in a printable sentence."""
    for name, answer in answers():
        yield Probe("servers", f"a score server answers: {name}", lambda a=answer: score_by(a), judge=_sound)


def number_probes() -> Iterator[Probe]:
    """Numbers that are none, or far out of range: refused, or trained with to a finite loss."""

    def finite(status: int, text: str) -> str | None:
        if "Traceback (most recent" in text:
            return "traceback"
        return "a loss that is not finite, and status 0" if status == 0 and "loss nan" in text else None

    yield from (probe for probe in silence_probes() if probe.front == "numbers")
    for _, name in numeric_settings(["SFTModule", "SFTDataModule"]):
        for value in VALUES:
            yield Probe("numbers", f"--{name} {value}", lambda n=name, v=value: [*fit("x"), f"--{n}={v}"], judge=finite)


FRONTS: dict[str, Callable[[], Iterator[Probe]]] = {
    "page": page_probes, "files": file_probes, "processes": process_probes, "servers": server_probes,
    "numbers": number_probes,
}  # fmt: skip


def main() -> int:
    """Run the probes, print the table and the broken ones, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--front", nargs="*", default=list(FRONTS), choices=list(FRONTS))
    parser.add_argument("--only", default="", help="run the probes whose name contains this text")
    parser.add_argument("--every", type=int, default=1, help="run each n-th probe only: a quick look")
    parser.add_argument("--out", type=Path, default=RESULTS / "probes_all.json")
    parser.add_argument("--note", default="", help="a sentence for the page, on the machine and the code")
    parser.add_argument("--verbose", action="store_true", help="print what broken probes said")
    given = parser.parse_args()
    world = Path(tempfile.mkdtemp(prefix="world"))
    here = Path.cwd()
    build_world(world)
    os.chdir(world)
    counts: dict[str, Counter[str]] = {front: Counter() for front in given.front}
    broken: list[dict[str, str]] = []
    every = [p for front in given.front for p in FRONTS[front]()]
    probes = [p for p in every if given.only in p.name][:: given.every]
    began = time.monotonic()
    for probe in probes:
        outcome = run_probe(probe, world)
        counts[probe.front]["held" if outcome.broke is None else "broke"] += 1
        if outcome.broke is not None:
            broken.append({"front": probe.front, "probe": probe.name, "broke": outcome.broke})
            print(f"BROKE {probe.front}: {probe.name}: {outcome.broke}", flush=True)
            if given.verbose:
                print("    " + "\n    ".join(outcome.said.strip().splitlines()[-6:]), flush=True)
    for front, count in counts.items():
        print(f"{front:<12}{count['held']:>5} held {count['broke']:>5} broke")
    print(f"{len(probes)} probes in {time.monotonic() - began:.0f} s")
    os.chdir(here)
    table = {front: {"held": count["held"], "broke": count["broke"]} for front, count in counts.items()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps({"total": len(every), "note": given.note, "fronts": table, "broken": broken}, indent=2) + "\n"
    )
    shutil.rmtree(world, ignore_errors=True)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
