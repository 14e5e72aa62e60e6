"""What is read of a model's folder: settings as JSON, weights as safetensors; Python only where the user named it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_lightning.errors import ModelError

SAFETENSORS = "*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
"""Weights in these may run code when they are read."""


def trusts(name: str, trusted: Sequence[str]) -> bool:
    """Whether the Python files that a model brings along may be run: its very name was given."""
    return str(Path(name).expanduser()) in {str(Path(one).expanduser()) for one in trusted}


def require_safetensors(name: str) -> None:
    """Refuse a folder whose only weights are pickles. Anything that is no folder is left to transformers.

    Raises:
        ModelError: it has weights, and not as safetensors.
    """
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob(SAFETENSORS)):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            "pickled-weights",
            f"the weights in {name} are a pickle ({pickles[0]}), which can run code when it is "
            "read, and there are no safetensors; if you trust it, load and save it once with "
            "transformers (save_pretrained writes safetensors)",
        )


def explained(name: str, error: Exception) -> str | None:
    """Return what to do about transformers' refusal to run a model's own code; None for another error."""
    if "trust_remote_code" not in str(error):
        return None
    return f"{name} needs Python code of its own, which is run only where it is named: --model.trust_remote_code {name}"
