"""Find the files of a source: a file, a glob, or a folder with files of one format and split."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf_lightning.errors import DataError, MissingError, SettingError
from rlhf_lightning.similar_names import nearest

COMPRESSED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
"""Suffixes of compressed files, and the magic bytes at the beginning of such a file."""


FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv",
    ".txt": "txt", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
"""The format of a file by its suffix, in lower case and without a compression suffix."""


SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation",
    "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation", "heldout": "validation",
}  # fmt: skip
"""Words in file names, and the split that each names."""


DOCUMENTS = re.compile(
    r"(licen[cs]e|copying|notice|readme|changelog|authors|citation|requirements|dataset_infos?|state)\b", re.IGNORECASE
)
"""Names of files that accompany data and hold no rows."""


SLICE = re.compile(r"([^\[\]+]+)(?:\[(-?[0-9]+%?)?:(-?[0-9]+%?)?\])?\Z")


def format_of(file: Path) -> str | None:
    """Return the format of a file by its name, a value of `FORMATS`; None if the suffix is unknown."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in (*COMPRESSED, ".zstd"):
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def refuse_device(file: Path) -> None:
    """Refuse a pipe or a device, because reading it may never end.

    Raises:
        DataError: ``not-a-file``.
    """
    if file.exists() and not file.is_file() and not file.is_dir():
        raise DataError("not-a-file", f"{file} is a pipe or a device, which may never end; copy it to a file first")


def files_of(given: str, split: str = "train") -> list[Path] | None:
    """Return the files of a source, in order; None for a Hub name or a folder written by ``save_to_disk``.

    For a folder these are the files of the split, found by the words in their names. Licences and similar files are
    left out.

    Raises:
        MissingError: the name looks like a file or a glob, but no file exists.
        DataError: a folder or a glob mixes formats or splits.
    """
    path = Path(given).expanduser()
    if "://" in given:
        raise MissingError("no-data", f"{given!r} is an address, from which no rows are read; give a downloaded file")
    refuse_device(path)
    if path.exists():
        bounds_of(split, 0)
    if path.is_file():
        _check_no_split(given, split)
        return [path]
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return None
        return _files_in(path, split_of(split))
    if any(mark in given for mark in "*?["):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        whole, _, part = given.removesuffix("]").partition("[")
        if not found and ":" in part and Path(whole).is_file():
            told = f"{given!r} is not a file; for a slice of its rows give '{{path: {whole}, split: 'train[{part}]'}}'"
            raise MissingError("no-data", f"{told}, or data.rows")
        if not found:
            raise MissingError("no-data", f"no file matches {given!r} (in {Path.cwd()}); check the pattern")
        _check_no_split(given, split)
        splits = {_split_in_name(file) for file in found}
        if len(splits) > 1:
            raise DataError(
                "mixed-files", f"{given!r} matches files of several splits: {_names(found)}; narrow the pattern"
            )
        return found
    suffix = format_of(path) is not None
    if suffix or given.count("/") > 1 or given.startswith((".", "~", "/")):
        folder = path.parent if path.parent.is_dir() else None
        alike = [one.name for one in folder.iterdir() if nearest(path.stem, [one.stem])] if folder else []
        near = nearest(path.name, alike)
        hint = f"the nearest is {str(folder / near)!r}" if folder and near else "check the path"
        raise MissingError("no-data", f"there is no file {given!r} (in {Path.cwd()}); {hint}")
    return None


def split_of(split: str) -> str:
    """Return the name of a split without its slice."""
    found = SLICE.match(split)
    return found[1] if found else split


def _check_no_split(given: str, split: str) -> None:
    if split_of(split) != "train":
        raise SettingError(
            "split-of-a-file",
            f"split of {given} is {split!r}, but a file is not divided into splits; name the file of that "
            "split, or take a slice such as train[:10%]",
        )


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files[:8]) + (", ..." if len(files) > 8 else "")


def _split_in_name(file: Path) -> str | None:
    folder = file.parent.name.lower()
    words = re.split(r"[^a-z]+", f"{folder * (folder in SPLIT_WORDS)} {file.name.lower()}")
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _files_in(folder: Path, split: str) -> list[Path]:
    """Return a folder's files of one format and split; look in the folder, in data/ and in one folder per split."""
    places = [folder, folder / "data", *(one for one in sorted(folder.iterdir()) if one.name.lower() in SPLIT_WORDS)]
    files: list[Path] = []
    for place in places:
        if place.is_dir() and (place != folder / "data" or not files):
            files += [file for file in sorted(place.iterdir()) if file.is_file() and _is_data(file)]
    if any(format_of(file) != "txt" for file in files):
        files = [file for file in files if format_of(file) != "txt"]
    if not files:
        raise MissingError(
            "no-data", f"the folder {folder} holds no saved dataset and no {', '.join(FORMATS)} file; check the path"
        )
    if len({format_of(file) for file in files}) > 1:
        raise DataError("mixed-files", f"the folder {folder} mixes formats: {_names(files)}; name the files by a glob")
    splits = {file: _split_in_name(file) for file in files}
    asked = SPLIT_WORDS.get(split.lower(), split)
    found = [file for file in files if splits[file] == asked]
    others = [file for file in files if splits[file] is None]
    if found and others:
        raise DataError(
            "mixed-files",
            f"the folder {folder} has files of the split {split!r} ({_names(found)}) and others ({_names(others)}); "
            "name the files by a glob",
        )
    found = others if not found and asked == "train" else found
    if not found:
        known = ", ".join(sorted({one or "train" for one in splits.values()}))
        raise DataError("no-such-split", f"{folder} has no split {split!r}; choose one of {known}")
    return found


def _is_data(file: Path) -> bool:
    hidden = file.name.startswith((".", "_"))
    return format_of(file) is not None and not hidden and DOCUMENTS.match(file.name) is None


def bounds_of(split: str, count: int) -> tuple[int, int]:
    """Return the first row of a split's slice and the row after its last, as in ``train[10%:20%]``.

    Raises:
        SettingError: the split or its slice is malformed.
    """
    found = SLICE.match(split)
    if found is None:
        raise SettingError(
            "bad-split",
            f"split is {split!r}; write a name, or a name and a slice such as train[:100] or train[10%:20%]",
        )
    places = []
    for given, default in ((found[2], 0), (found[3], count)):
        place = default if given is None else int(given.removesuffix("%"))
        place = round(place * count / 100) if given is not None and given.endswith("%") else place
        places.append(min(max(place + count if place < 0 else place, 0), count))
    return places[0], max(places)
