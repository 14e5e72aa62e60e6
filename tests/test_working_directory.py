"""The working directory is importable for names that the user typed, and for nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.working_directory import DOTTED

RUN = (
    "import sys; sys.path[:] = [p for p in sys.path if p not in ('', {here!r})]\n"
    "from rlhf_lightning.cli import main\nfrom rlhf_lightning.working_directory import FINDER\n"
    "try: status = main({argv!r})\nexcept SystemExit as end: status = end.code\n"
    "print('LOOKED FOR', FINDER.looked_for, 'STATUS', status, 'ON PATH', {here!r} in sys.path)"
)
PLANTED = "raise SystemExit('planted code ran')\n"
OPTIONAL = (
    "kernels",
    "brotli",
    "megatron",
    "deepspeed",
    "flash_attn",
    "triton_kernels",
    "sentencepiece",
    "tiktoken",
    "av",
)


def looked_for(argv: list[str], folder: Path) -> str:
    """Run a command in a fresh process; return the modules that were looked up in the working directory."""
    for name in OPTIONAL:
        (folder / f"{name}.py").write_text(PLANTED)
    code = RUN.format(argv=argv, here=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=240,
        input="w6\n", env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert "planted code ran" not in done.stdout + done.stderr, done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a model folder that is the working directory."""
    config = LlamaConfig(
        vocab_size=120, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    rows = [json.dumps({"prompt": f"w{6 + n}", "completion": "w8"}) for n in range(4)]
    (tmp_path / "brotli.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.mark.parametrize("argv", [["chat", ".", "--max_new_tokens", "2"], ["audit", "brotli.jsonl"]])
def test_without_a_user_module_name_nothing_is_searched(argv: list[str], folder: Path) -> None:
    assert looked_for(argv, folder) == "LOOKED FOR [] STATUS 0 ON PATH False"


def test_a_named_user_module_and_its_imports_are_found(folder: Path) -> None:
    (folder / "my_objective.py").write_text(
        "import my_helpers\nfrom rlhf_lightning.modules import SFTModule\nclass Mine(SFTModule): ...\n"
    )
    (folder / "my_helpers.py").touch()
    argv = [
        "fit", "--model", "my_objective.Mine", "--model.init_from", ".", "--data", "SFTDataModule", "--data.source",
        "brotli.jsonl", "--data.batch_size", "2", "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    assert looked_for(argv, folder) == "LOOKED FOR ['my_objective', 'my_helpers'] STATUS 0 ON PATH False"


def test_python_m_does_not_search_the_working_directory(folder: Path) -> None:
    (folder / "sentencepiece.py").write_text(PLANTED)
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_lightning", "audit", "brotli.jsonl"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("my_file.Scorer", ["my_file"]),
        ("{class_path: a.b.C, init_args: {x: 1.5}}", ["a"]), ("[a.B, c.D]", ["a", "c"]),
        ("runs/x.y/model", []), ("./a.b", []), ("0.5", []), ("http://a.b/c", []), ("plain", []),
    ],
)  # fmt: skip
def test_import_paths_are_found_in_texts(text: str, names: list[str]) -> None:
    assert [found[1] for found in DOTTED.finditer(text)] == names
