"""Probes of untrusted files, and of settings that name them."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from probing import CHAT, CHAT_ADAPTER, PLANTED, RAN, RESUME, RUN, Probe, fit

# -- kinds of damage --------------------------------------------------------------------------------------------------


def edited(file: str, argv: list[str], change: Callable[[Any], Any]) -> Callable[[], list[str]]:
    """Return a function that changes a JSON file and returns the command line."""

    def prepare() -> list[str]:
        path = Path(file)
        found = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(change(found)))
        return argv

    return prepare


def replaced(file: str, argv: list[str], content: Callable[[bytes], bytes]) -> Callable[[], list[str]]:
    """Return a function that changes a file as bytes and returns the command line."""

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
    """Return the command line with paths relative to the model folder."""
    places = {
        "model": ".",
        **{name: f"../{name}" for name in ("adapter", "data.jsonl", "pairs.jsonl", RUN, "out.jsonl")},
    }
    return [places.get(word, word) for word in argv]


def code_probes() -> Iterator[Probe]:
    """Planted modules next to data and models, attention kernels named in configs, pickles."""
    modules = ("kernels", "brotli", "megatron", "deepspeed", "flash_attn", "triton", "xformers", "mamba_ssm", "apex",
               "bitsandbytes_extra", "pandas_extra", "zstandard", "sentencepiece", "tiktoken", "torchvision", "cupy",
               "auto_gptq", "awq", "hqq", "aqlm", "optimum", "neptune", "wandb", "comet_ml", "numba", "soundfile",
               "librosa", "google", "flax", "jax", "tensorflow", "mlx", "ninja", "uvloop", "orjson", "simplejson",
               "rich",
               "IPython", "tensorboardX", "peft_extra", "gguf", "mistral_common", "av", "cv2", "timm",
               "scipy")  # fmt: skip

    def planted(names: tuple[str, ...], argv: list[str], place: str = ".") -> Callable[[], list[str]]:
        def prepare() -> list[str]:
            os.chdir(place)
            for name in names:
                # Sources of installed modules are not shadowed: the working directory would come last in any case.
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
            "adapter/adapter_config.json", CHAT_ADAPTER, lambda c,
            v=corda: {**c, "megatron_core": v, "megatron_config": {}}
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
    """Inputs that could be used silently: indices that leave the folder, decoys, other weights, ranges."""

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
        ("a file outside", "../outside.safetensors", outside),
        ("an absolute path", str(Path("/tmp/o.safetensors")), outside),
        ("a missing file", "model-00002-of-00002.safetensors", lambda: None), ("a folder", ".", lambda: None),
        ("a sub-folder", "sub/m.safetensors", lambda: None), ("a number", 7, lambda: None),
        ("null", None, lambda: None),
    ):  # fmt: skip
        yield Probe("files", f"safetensors index names {name}", index({"*": wanted}, extra))
    yield Probe(
        "files", "a decoy next to the indexed file", index({}, decoy), may_succeed=True
    )  # neither loaded nor hashed
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
            "files", f"--resume with {key}", lambda k=key, v=value: [*RESUME, f"--model.{k}", v], may_succeed=True
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
    """Endless files, decompression bombs, regular expressions, counts."""

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
                may_succeed=field == "exclude_modules",  # a quick pattern excludes nothing
            )
        yield Probe(
            "files",
            f"adapter_config rank_pattern {pattern}",
            edited("adapter/adapter_config.json", CHAT_ADAPTER, lambda c, p=pattern: {**c, "rank_pattern": {p: 4}}),
            may_succeed=True,  # a quick pattern matches no layer
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
    for template in ("{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
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
        "alias of itself": "model: &m\n  x: *m\n", "50,000 brackets": "[" * 50_000,
        "50,000 closed brackets": "a:\n " + "[" * 50_000 + "]" * 50_000,
        "50,000 braces": "a: " + "{a: " * 50_000, "50,000 dashes": "- " * 50_000 + "a\n",
        "50,000 keys": "? " * 50_000 + "a\n",
        "5,000 braces": "a: " + "{a: " * 5_000 + "}" * 5_000 + "\n",
        "2,000 brackets": "a: " + "[" * 2000 + "]" * 2000 + "\n",
        "a number of 1e6 digits": "model: " + "9" * 10**6 + "\n", "a key of 1e7 characters": "k" * 10**7 + ": 1\n",
        "merge bomb": "a: &a {x: 1}\n" + "".join(
            f"b{i}: &b{i}\n  <<: [{', '.join(['*a' if i == 0 else f'*b{i - 1}'] * 10)}]\n" for i in range(12)),
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

    for name, opener in (("x.jsonl.gz", gzip.open), ("x.jsonl.bz2", bz2.open), ("x.json.gz", gzip.open),
        ("x.csv.gz", gzip.open),
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
    """Damaged files that must end with one sentence, without a traceback."""
    files = {
        "model/model.safetensors": CHAT, "model/config.json": CHAT, "model/tokenizer.json": CHAT,
        "model/tokenizer_config.json": CHAT, "model/generation_config.json": CHAT,
        "adapter/adapter_model.safetensors": CHAT_ADAPTER,
        "adapter/adapter_config.json": CHAT_ADAPTER, "adapter/backbone.json": CHAT_ADAPTER,
        f"{RUN}/checkpoints/update_000004.ckpt": RESUME, f"{RUN}/checkpoints/last.ckpt": RESUME,
        f"{RUN}/config.yaml": RESUME, f"{RUN}/manifest.json": RESUME,
        f"{RUN}/model/model.safetensors": ["chat", f"{RUN}/model", "--max_new_tokens", "2"],
        "one.gguf": ["chat", "one.gguf"], "data.jsonl": fit("x"), "one.parquet": ["audit", "one.parquet"],
        "one.json": ["audit", "one.json"], "one.csv": ["audit", "one.csv"], "one.jsonl.gz": ["audit", "one.jsonl.gz"],
        "one.arrow": ["audit", "one.arrow"], "c.yaml": ["fit", "--config", "c.yaml"], "template.jinja": [*CHAT[:2]],
    }  # fmt: skip
    loose = ("tokenizer_config", "generation_config", "backbone.json", "manifest.json", "data.jsonl", "one.csv",
        "template",
             "one.json", "update_0000", "last.ckpt")  # fmt: skip
    for file, argv in files.items():
        for name, damage in DAMAGE.items():
            yield Probe(
                "files",
                f"{file}: {name}",
                replaced(file, argv, damage),
                may_succeed=any(part in file for part in loose) or "c.yaml" in file,
            )
    for key in ("num_attention_heads", "vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "dtype",
        "model_type", "architectures",
                "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "num_key_value_heads", "head_dim",
                "eos_token_id",
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
    for key in ("base_model_name_or_path", "peft_type", "r", "lora_alpha", "target_modules", "task_type",
        "modules_to_save", "bias",
                "lora_dropout", "fan_in_fan_out", "rank_pattern", "layers_to_transform", "use_dora",
                "init_lora_weights"):  # fmt: skip
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
    yield Probe("files", "adapter_config is a list", edited("adapter/adapter_config.json", CHAT_ADAPTER, lambda c: [c]))
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
    for text in ("a: [", "a: 'b", "model: {class_path: 7}", "model: []", "model: text", "trainer: 7", "7", "[]",
        "a:\tb", "model:\n  class_path: SFTModule\n  init_args: 7",
                 "data: {class_path: 7}", "trainer:\n  callbacks: 7", "trainer:\n  callbacks: [7]",
                 "trainer:\n  callbacks: [{class_path: os.system}]",
                 "trainer:\n  logger: {class_path: os.system}", "model: {class_path: os.system}",
                 "model: !!python/object/apply:os.system [touch ran]",
                 "seed_everything: x", "checkpoint: 7", "? [a]\n: b", "\x00", "%YAML 9.9\n---\na: 1", "--- a\n--- b",
                 "*x", "a: !x b"):  # fmt: skip
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
        "transposed": lambda found: {key: value.T.contiguous() if value.dim() == 2 else value for key,
        value in found.items()},
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
        "files", "more tokens than positions (chat)", lambda: CHAT, typed=b"w6 " * 500 + b"\n", may_succeed=True
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

    keys = ("state_dict", "optimizer_states", "pytorch-lightning_version", "loops", "callbacks", "lr_schedulers",
        "epoch", "global_step",
            "hyper_parameters", "progress", "random", "trained", "started_from", "skipped_in_a_row", "asked",
            "sharded", "trainable")  # fmt: skip
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
        "moments of other shapes": lambda s: {**s, "optimizer_states": [{**s["optimizer_states"][0],
        "state": {k: {n: torch.ones(1) for n in v} for k, v in s["optimizer_states"][0]["state"].items()}}]},
        "progress is negative": lambda s: {**s, "progress": {k: -5 for k in s["progress"]}},
        "progress are texts": lambda s: {**s, "progress": dict.fromkeys(s["progress"], "x")},
        "progress lacks updates": lambda s: {**s, "progress": {}},
        "random is empty": lambda s: {**s, "random": []},
        "random of texts": lambda s: {**s, "random": ["x"]},
        "hyper-parameter unknown": lambda s: {**s, "hyper_parameters": {**s["hyper_parameters"], "wrong": 1}},
        "init_from gone": lambda s: {**s, "hyper_parameters": {**s["hyper_parameters"], "init_from": "gone"}},
        "class unknown": lambda s: {**s, "hyper_parameters": {**s["hyper_parameters"],
        "_class_path": "rlhf_lightning.modules.NoModule"}},
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

        yield Probe("files", f"resume: {name}", packed, may_succeed=True)  # an earlier checkpoint is intact


def file_probes() -> Iterator[Probe]:
    """Return all probes of untrusted files, and of settings that name them."""
    for kind in (code_probes, silence_probes, leak_probes, hang_probes, traceback_probes):
        yield from (probe for probe in kind() if probe.front == "files")
