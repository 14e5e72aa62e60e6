"""Memory that is freed between blocks that are still used goes back to the system."""

import subprocess
import sys

import pytest

CODE = """
import torch
from rlhf_lightning.models.allocator import return_freed_blocks

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

return_freed_blocks()
del [torch.ones(2**21)][0]  # glibc's own threshold would now exceed blocks of 8 MiB
before = resident()
blocks = [torch.ones(2**21) for _ in range(20)]
assert resident() - before > 150
del blocks[::2]
assert resident() - before < 110, resident() - before
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_blocks_are_returned() -> None:
    """In a process of its own, since the setting cannot be taken back."""
    subprocess.run([sys.executable, "-c", CODE], check=True)
    kept = CODE.replace("\nreturn_freed_blocks()\n", "\n")
    assert kept != CODE and subprocess.run([sys.executable, "-c", kept], check=False, capture_output=True).returncode
    chosen = CODE.replace("import torch", "import os, torch; os.environ['MALLOC_MMAP_THRESHOLD_'] = ''")
    assert (
        chosen != CODE and subprocess.run([sys.executable, "-c", chosen], check=False, capture_output=True).returncode
    )
