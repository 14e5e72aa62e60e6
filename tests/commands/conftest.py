"""Run each test in an empty folder, as a user would, with models that take milliseconds."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_tokenizer
from tiny_run import BASIC
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.commands.train import run


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Every run sets this; setting it here restores it for the following tests.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.delenv("RLHF_DEBUG", raising=False)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]  # a test's own objective must not replace another test's objective of the same name


@pytest.fixture(scope="session")
def slope_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a SlopeModule once; return the folder of its run."""
    folder = tmp_path_factory.mktemp("slope")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("RLHF_CACHE", str(folder / "cache"))
        run(["fit", *BASIC])
    return folder / "runs"


@pytest.fixture
def trained(slope_runs: Path, own_folder: Path) -> Path:
    """Return a copy of the finished run runs/slope/version_0, as if this test had trained it."""
    copies: dict[int, str] = {}

    def copy(source: str, target: str) -> None:
        """Copy a file; names of the same file stay names of the same file."""
        inode = os.stat(source).st_ino
        os.link(copies[inode], target) if inode in copies else shutil.copy2(source, target)
        copies.setdefault(inode, target)

    shutil.copytree(slope_runs, "runs", copy_function=copy)
    return Path("runs/slope/version_0")


def save(folder: Path, kind: Any, template: bool = True, seed: int = 0) -> str:
    """Write a tiny byte-level Llama with its tokenizer; large weights keep its distributions far from uniform."""
    settings = make_tiny_tokenizer() if template else make_tiny_tokenizer(template=None)
    config = LlamaConfig(
        vocab_size=len(settings), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, num_labels=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    settings.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("policy") / "model", LlamaForCausalLM)


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a policy whose tokenizer has no chat template."""
    return save(tmp_path_factory.mktemp("plain") / "model", LlamaForCausalLM, template=False)


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("reward") / "model", LlamaForSequenceClassification, seed=1)
