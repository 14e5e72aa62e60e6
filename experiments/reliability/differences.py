"""Compare two runs bit for bit: checkpoints, exported weights, curves, samples."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning.runs.checkpoint_metadata import read_checkpoint, sharded_metadata

LEFT_OUT = {"loops", "pytorch-lightning_version"}
"""Checkpoint keys to ignore; Lightning's loop counters include killed attempts."""


def differences(whole: Path, cut: Path) -> list[str]:
    """Return the differences between the folders of two runs, one sentence each."""
    last = Path("checkpoints") / "last.ckpt"
    found = unequal("checkpoint", contents(whole / last), contents(cut / last))
    found += unequal("model", weights(whole / "model"), weights(cut / "model"))
    found += unequal("TensorBoard", curves(whole), curves(cut))
    found += unequal("samples.jsonl", samples(whole), samples(cut))
    leftovers = [path.name for path in (cut / "checkpoints").iterdir() if path.name.startswith(".")]
    return [*found, *(f"{name} was left behind" for name in leftovers)]


def contents(checkpoint: Path) -> dict[str, Any]:
    """Return the checkpoint contents that a resumed run should have too, with shards merged."""
    held = {name: value for name, value in read_checkpoint(checkpoint).items() if name not in LEFT_OUT}
    # A resumed run has more event files, named by their creation time; their contents are compared as curves.
    held["records"] = {name: size for name, size in held.get("records", {}).items() if "events.out" not in name}
    if checkpoint.is_dir():
        parts = sharded_metadata(checkpoint).state_dict_metadata
        tensors = {
            name: torch.empty(part.size, dtype=part.properties.dtype)
            for name, part in parts.items()
            if hasattr(part, "size")
        }
        distributed_checkpoint.load(tensors, checkpoint_id=checkpoint, no_dist=True)
        held["shards"] = tensors
    return held


def weights(model: Path) -> dict[str, Any]:
    """Return the weights in a model's folder."""
    return {f"{file.name}: {name}": w for file in model.glob("*.safetensors") for name, w in load_file(file).items()}


def samples(run: Path) -> bytes:
    """Return the sampled completions of the policy; empty for stages without sampling."""
    file = run / "samples.jsonl"
    return file.read_bytes() if file.is_file() else b""


def curves(run: Path) -> dict[str, Any]:
    """Return all curves except speed as (step, value) points, and the steps at which texts were logged."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    points: dict[str, Any] = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"] if "perf/" not in tag
    }
    return points | {tag: [e.step for e in events.Tensors(tag)] for tag in tags["tensors"]}


def unequal(name: str, one: Any, other: Any) -> list[str]:
    """Return where two nested values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        only = [f"{name}: {key} is in one alone" for key in one.keys() ^ other.keys()]
        return only + [
            line for key in one.keys() & other.keys() for line in unequal(f"{name}.{key}", one[key], other[key])
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.shape == other.shape and torch.equal(one, other)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [line for i, pair in enumerate(zip(one, other, strict=True)) for line in unequal(f"{name}[{i}]", *pair)]
    else:
        same = one == other or (one != one and other != other)
    return [] if same else [f"{name} differs: {short(one)} and {short(other)}"]


def short(value: Any) -> str:
    """Return a value as text of at most 60 characters."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
