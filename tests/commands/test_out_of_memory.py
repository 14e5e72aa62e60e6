"""Run out of memory for real: one line says which setting to lower."""

import resource
from pathlib import Path

import pytest
from forked import forked
from tiny_run import BASIC

from rlhf_lightning.cli import main as rlhf

ROOM = 2**28
"""Bytes beyond the current size of the process."""


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_out_of_memory_prints_one_line_with_the_settings_to_lower(kind: str, tmp_path: Path) -> None:
    def starve() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        model = ["--model", "tiny_run.HungryModule", "--model.kind", kind]
        return rlhf(["fit", *model, *BASIC[2:]])

    status, said = forked(starve, tmp_path / "said")
    line = said.strip().splitlines()[-1]
    assert status == 1 and "Traceback" not in said
    assert line.startswith("rlhf: out of memory (")
    for word in ("data.micro_batch_size", "data.max_tokens", "data.max_length", "model.lora", "rlhf plan",
                 "model.activation_checkpointing", "model.sampling_batch_size"):  # fmt: skip
        assert word in line
