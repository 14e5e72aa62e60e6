"""What a sharded checkpoint says of itself, read so that no code is run from it.

torch describes the shards in a pickle, ``.metadata``, and reads what is no tensor (a learning rate, a step) by an
unpickler that runs code. Lightning's strategy reads both; nothing here lets it before they were read the safe way.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from rlhf_lightning.compat import memory_format_encoding
from rlhf_lightning.errors import DataError


def sharded_metadata(path: Path) -> Any:
    """Return what a sharded checkpoint says of its tensors, all of it known to be plain.

    Raises:
        DataError: a file names anything but tensors and plain values, or lies outside the checkpoint.
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
    """Check that an entry lies in the checkpoint, and that one that is no tensor is a plain value."""
    file = path / str(place.relative_path)
    if file.resolve().parent != path.resolve():
        raise pickle.UnpicklingError(f"it keeps {place.relative_path} outside its folder")
    if getattr(place, "transform_descriptors", None):
        raise pickle.UnpicklingError(f"{place.relative_path} is encoded in a way that is not read here")
    if plain:
        with file.open("rb") as stream:
            stream.seek(place.offset)
            torch.load(io.BytesIO(stream.read(place.length)), weights_only=True)


def _member(kind: Any, name: str) -> Any:
    """Stands for ``getattr``, with which an enumeration's member is pickled, and reads nothing else."""
    if kind is not memory_format_encoding() or name not in kind.__members__:
        raise pickle.UnpicklingError(f"it asks for {name} of {kind}")
    return kind[name]


class _TensorDescriptions(pickle.Unpickler):
    """Reads the classes that describe tensors and where they lie, each by its whole name, and nothing else.

    A module that is known as a whole would give away all that it imports: names may have dots.
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
