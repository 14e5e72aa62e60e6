"""Read settings, weights and shard metadata of a checkpoint without running code from it."""

from __future__ import annotations

import io
import pickle
import re
import traceback
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from jsonargparse import Namespace
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from rlhf_lightning.compat import memory_format_encoding
from rlhf_lightning.deprecation import current_settings
from rlhf_lightning.errors import DataError, RlhfError, SettingError
from rlhf_lightning.loading import import_path
from rlhf_lightning.training.checkpoint_state import ANOTHER_STRATEGY, COUNTERS

SHARDED_META = "meta.pt"
"""The file in a sharded checkpoint's folder that holds everything except tensors."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or the settings of a sharded one; tensors are memory-mapped.

    Raises:
        DataError: it is not a checkpoint, or contains more than plain tensors and settings.
    """
    file = path / SHARDED_META if path.is_dir() else path
    if file.exists() and not file.is_file():
        raise DataError("unreadable-checkpoint", f"{file} is a pipe, a device or a folder, not a checkpoint")
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        # torch's message mostly explains how to load the file anyway; one line of it says what is wrong.
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "Unsupported" in line), lines[0]).partition(". Please")[0].strip()
        if file.is_file() and not zipfile.is_zipfile(file):
            reason = "it is damaged, or not a .ckpt file of a run"
        raise DataError(
            "unreadable-checkpoint", f"{path} cannot be read as a checkpoint of plain tensors and settings: {reason}"
        ) from error


WHOLE: dict[str, type | tuple[type, ...]] = {
    "state_dict": dict, "hyper_parameters": dict, "progress": dict, "started_from": dict, "trained": list,
    "random": list, "skipped_in_a_row": int,
}  # fmt: skip
"""Entries of every checkpoint of an AlignmentModule."""
RESUMABLE: dict[str, type | tuple[type, ...]] = {
    "loops": dict, "optimizer_states": list, "lr_schedulers": list, "callbacks": dict, "epoch": int, "global_step": int,
    "pytorch-lightning_version": str,
}  # fmt: skip
"""Further entries that a run needs to resume."""


def check_contents(path: Path, resumes: bool) -> None:
    """Refuse a checkpoint in which an entry is missing or has the wrong type.

    Raises:
        DataError: ``incomplete-checkpoint``.
    """
    state: Any = read_checkpoint(path)
    wrong = None if isinstance(state, Mapping) else f"it is a {type(state).__name__}"
    for key, kind in (
        {**WHOLE, **(RESUMABLE if resumes else {})} if wrong is None and not path.is_dir() else {}
    ).items():
        if key not in state:
            wrong = wrong or f"{key} is missing"
        elif not isinstance(state[key], kind) or isinstance(state[key], bool):
            wrong = wrong or f"{key} is a {type(state[key]).__name__}"
    if wrong is None and not path.is_dir():
        wrong = next(_wrong_parts(state, resumes), None)
    if wrong is not None:
        raise DataError(
            "incomplete-checkpoint",
            f"{path} is not a whole checkpoint of `rlhf fit` ({wrong}); use another checkpoint of the run",
        )


def _wrong_parts(state: Mapping[str, Any], resumes: bool) -> Iterator[str]:
    if not all(isinstance(value, Tensor) for value in state["state_dict"].values()):
        yield "state_dict contains more than tensors"
    for name in COUNTERS:
        count = state["progress"].get(name)
        if not isinstance(count, int) or count < 0:
            yield f"progress has {name} {count!r}"
    if not {"backbone", "adapter", "quantization"} <= set(state["started_from"]):
        yield "started_from lacks fingerprints"
    if not all(isinstance(name, str) for name in state["trained"]):
        yield "trained is not a list of names"
    trainable = state.get("trainable", state["trained"])
    if not isinstance(trainable, list) or not trainable or not all(name in state["trained"] for name in trainable):
        yield "trainable is not a list of names in trained"
    if state.get("asked") is not None and not _are_settings(state["asked"]):
        yield "asked has no settings of an optimizer and its scheduler"
    if not resumes:
        return
    if not state["random"] or not all(isinstance(one, Mapping) for one in state["random"]):
        yield "random has no random states"
    if not all(isinstance(one, Mapping) for one in state["callbacks"].values()):
        yield "a callback's state is not a mapping"
    optimizers = state["optimizer_states"]
    if len(optimizers) != 1 or not isinstance(optimizers[0], Mapping) or not optimizers[0].get("param_groups"):
        yield "optimizer_states is not the state of one optimizer"
    loop = state["loops"].get("fit_loop")
    if not isinstance(loop, Mapping) or not {"epoch_loop.batch_progress", "epoch_progress"} <= set(loop):
        yield "loops lacks the position of training"


def _are_settings(asked: Any) -> bool:
    """Whether a value has the form that `optimization.asked` returns."""
    if not isinstance(asked, Mapping) or not {"optimizer", "groups", "scheduler", "schedule"} <= set(asked):
        return False
    groups = asked["groups"]
    rated = isinstance(groups, list) and all(
        isinstance(group, Mapping) and isinstance(group.get("lr"), int | float) for group in groups
    )
    return rated and isinstance(asked["schedule"], Mapping)


RESTORING = ("checkpoint_connector.py", "checkpoint_state.py", "checkpoint_metadata.py")
"""Files whose frames in a traceback show that a checkpoint was being restored."""


def refuse_misfit(error: Exception, path: Path) -> None:
    """Raise a one-sentence error if parts of the checkpoint do not fit the run; return if something else failed.

    Raises:
        DataError: ``incomplete-checkpoint``.
    """
    if isinstance(error, RlhfError | MemoryError | OSError):
        return
    frames = traceback.extract_tb(error.__traceback__)
    if not any(frame.filename.endswith(RESTORING) for frame in frames):
        return
    reason = next(iter(str(error).strip().splitlines()), "")[:300]
    raise DataError(
        "incomplete-checkpoint",
        f"{path} does not fit this run ({type(error).__name__}: {reason}); use another checkpoint of the run, or start "
        "a new run from its exported model (model.init_from)",
    ) from error


def weights_in(path: Path) -> dict[str, Tensor]:
    """Return the trained weights of a checkpoint; shards are joined.

    Raises:
        DataError: it is not a checkpoint, or contains more than plain tensors and settings.
    """
    if not path.is_dir():
        return read_checkpoint(path)["state_dict"]
    prefix, parts = "state_dict.", sharded_metadata(path).state_dict_metadata
    sizes = {name: part for name, part in parts.items() if name.startswith(prefix)}
    state = {name: torch.empty(part.size, dtype=part.properties.dtype) for name, part in sizes.items()}
    distributed_checkpoint.load(state, checkpoint_id=path, no_dist=True)
    return {name.removeprefix(prefix): weight for name, weight in state.items()}


def refused_checkpoint(path: Path, sharded: bool, resumes: bool) -> str | None:
    """Return why a checkpoint cannot be loaded under a strategy; None if it can.

    Args:
        path: the checkpoint.
        sharded: whether the strategy shards weights.
        resumes: whether training continues from the checkpoint, which needs the optimizer's state too.

    Raises:
        DataError: it is not a checkpoint of plain tensors and settings.
    """
    if path.is_dir():
        sharded_metadata(path)
        if sharded:
            return None
        return (
            f"{path} is a folder of shards, which only ModelParallelStrategy can load: resume with it "
            "(recipe:hardware/fsdp), or write the weights as a model folder with `rlhf export`"
        )
    state: Any = read_checkpoint(path)
    written_sharded = isinstance(state, Mapping) and bool(state.get("sharded", False))
    return f"{path}: {ANOTHER_STRATEGY}" if sharded and resumes and not written_sharded else None


def is_same_class(written: str, asked: str) -> bool:
    """Whether a checkpoint's class is the requested one, possibly under another import path.

    Only the package of the requested class is imported, never another package that the checkpoint names.
    """
    if written == asked or written.partition(".")[0] != asked.partition(".")[0]:
        return written == asked
    try:
        return import_path(written) is import_path(asked)
    except SettingError:
        return False


def checkpoint_hparams(path: Path) -> dict[str, Any]:
    """Return the hyper-parameters in a checkpoint, with their class under ``_class_path``."""
    state: Any = read_checkpoint(path)
    if not isinstance(state, Mapping) or not isinstance(state.get("hyper_parameters", {}), Mapping):
        raise DataError("incomplete-checkpoint", f"{path} is not a checkpoint of `rlhf fit`; give another file")
    hparams = dict(state.get("hyper_parameters", {}))
    hparams.pop("_instantiator", None)
    hparams.pop("trust_remote_code", None)  # the user decides each time which code may run
    current: dict[str, Any] = current_settings(hparams, "model")
    return current


def inside_run(checkpoint: Path, run: Path) -> Path:
    """Return a run's checkpoint if it lies in the run's folder.

    Raises:
        DataError: it is a link to another location, where other users may be able to write.
    """
    if not checkpoint.resolve().is_relative_to(run.resolve()):
        raise DataError(
            "link-out-of-run",
            f"{checkpoint} is a symlink to {checkpoint.resolve()}, outside its run: give that checkpoint as "
            "--ckpt_path if you trust it",
        )
    return checkpoint


PACKAGE = __name__.partition(".")[0]
SPECS = ("scorer", "scorers", "engine", "optimizer", "lr_scheduler", "class_path")
"""Settings that name a class or a function."""
OPTIMIZER_SETTINGS = ("optimizer", "lr_scheduler")
"""Settings that may name optimizers and schedulers of torch."""


def own_code(settings: Mapping[str, Any], named: str = PACKAGE) -> Iterator[tuple[str, str]]:
    """Yield the settings of a checkpoint that name foreign code, each with the import path.

    A checkpoint is only data: importing such a name would let the file import any module.

    Args:
        settings: settings of the checkpoint.
        named: class or module that the user named; its package may be imported too.
    """
    for setting, value in settings.items():
        for path in _paths(value, setting in SPECS):
            if setting in OPTIMIZER_SETTINGS and re.fullmatch(r"torch\.optim\.(\w+\.)?[A-Z]\w*", path):
                continue
            if "." in path and path.partition(".")[0] not in (PACKAGE, named.partition(".")[0]):
                yield setting, path


def _paths(value: Any, spec: bool) -> Iterator[str]:
    """Yield the strings in a setting that name code; folders and hub ids are skipped, because they hold weights.

    ``spec`` is true if the value belongs to a setting in `SPECS`.
    """
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, Mapping):
        for key, item in value.items():
            arguments = item if key == "init_args" and isinstance(item, Mapping) else None
            if arguments is None:
                yield from _paths(item, spec or key in SPECS)
            else:
                yield from (path for name, one in arguments.items() for path in _paths(one, name in SPECS))
    elif isinstance(value, list | tuple):
        yield from (path for item in value for path in _paths(item, spec))
    elif spec and isinstance(value, str) and not (Path(value).expanduser().is_dir() or "/" in value):
        yield value


def as_plain(value: Any) -> Any:
    """Return parsed settings as dicts, lists and plain values."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, list | tuple) else value


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``under`` updated with ``over``, nested settings key by key."""
    result = dict(under)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if nested else value
    return result


def sharded_metadata(path: Path) -> Any:
    """Return the metadata of a sharded checkpoint, after checking that it contains only plain values.

    torch describes the shards in a pickle, ``.metadata``. It also stores values that are not tensors (a learning rate,
    a step) in pickles. Lightning's strategy unpickles both in a way that can run code, so they are checked first.

    Raises:
        DataError: a file contains more than tensors and plain values, or lies outside the checkpoint.
    """
    try:
        with (path / ".metadata").open("rb") as file:
            found = _TensorDescriptions(file).load()
        for index, place in found.storage_data.items():
            plain = isinstance(found.state_dict_metadata.get(index.fqn), BytesStorageMetadata)
            _check(path, place, plain)
    except (OSError, pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, TypeError) as error:
        raise DataError(
            "unreadable-checkpoint", f"{path} cannot be read as a sharded checkpoint of plain tensors: {error}"
        ) from error
    return found


def _check(path: Path, place: Any, plain: bool) -> None:
    """Check that an entry lies inside the checkpoint and, if it is not a tensor, is a plain value."""
    file = path / str(place.relative_path)
    if file.resolve().parent != path.resolve():
        raise pickle.UnpicklingError(f"{place.relative_path} lies outside its folder")
    if getattr(place, "transform_descriptors", None):
        raise pickle.UnpicklingError(f"{place.relative_path} has an unsupported encoding")
    if plain:
        with file.open("rb") as stream:
            stream.seek(place.offset)
            torch.load(io.BytesIO(stream.read(place.length)), weights_only=True)


def _member(kind: Any, name: str) -> Any:
    """Replace ``getattr`` in pickles; only members of an enumeration are allowed."""
    if kind is not memory_format_encoding() or name not in kind.__members__:
        raise pickle.UnpicklingError(f"it accesses the attribute {name} of {kind}")
    return kind[name]


class _TensorDescriptions(pickle.Unpickler):
    """Unpickler that allows only classes that describe tensors and their locations, each by its full name.

    Whole modules are not allowed, because a dotted name could then reach everything that they import.
    """

    KNOWN = frozenset({
        *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.Size", "torch.serialization._get_layout", "collections.OrderedDict",
        "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath", "pathlib._local.PurePosixPath",
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        found = getattr(torch, name, None) if module == "torch" else None
        plain = f"{module}.{name}" in self.KNOWN or isinstance(found, torch.dtype | torch.layout | torch.memory_format)
        if "." in name or not plain:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
