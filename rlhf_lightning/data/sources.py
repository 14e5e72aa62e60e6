"""Read rows from the Hub, files, folders written by ``save_to_disk``, reasoning-gym, and weighted mixtures of these.

A source is a string (a Hub name, a file, a glob or a folder), or a mapping with ``path`` and any of ``weight``,
``rows``, ``split``, ``name`` (configuration on the Hub), ``columns``, ``labels``, ``annotators`` and ``max_row_bytes``.
Several sources are a list of these.

``feedback.db`` is a store of judgements, and ``feedback.db@1200`` its snapshot at row 1200. A store without a row
number is pinned to its current row when it is first read, so that later judgements do not change a run.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, get_args

from rlhf_lightning.atomic_files import complete_file
from rlhf_lightning.compat import dataset_fingerprint
from rlhf_lightning.data.canonical import REASONS, RowRefused
from rlhf_lightning.data.feedback.database import is_store, reading, snapshot_of, split_name
from rlhf_lightning.data.feedback.rows import Labels, RowKind, rows_of
from rlhf_lightning.data.files import LONGEST_ROW, RawRow, Unreadable, read_file, without_filled_nulls
from rlhf_lightning.data.finding import bounds_of, files_of, split_of
from rlhf_lightning.environments.games import GYM, reasoning_rows
from rlhf_lightning.errors import DataError, MissingError, SettingError, reason_of

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Attributes:
        path: Hub name, file, glob, or folder written by ``save_to_disk``.
        weight: how often each row is used in one epoch: 1 once, 2 twice, 0.5 a new random half each epoch.
        rows: read only the first ``rows`` rows.
        split: split of a Hub name or of a folder, with or without a slice: ``test``, ``train[:10%]``, ``train[100:]``.
        name: configuration of a Hub name.
        columns: new names of columns, instead of the DataModule's ``columns``.
        labels: for a feedback store: how several judgements of a pair become its label, ``mean`` or ``reliability``.
        annotators: for a feedback store: whose judgements count; all by default. Training on some people and evaluating
            on others tests whether the model learned more than the taste of these people.
        max_row_bytes: maximum bytes of a row of a file; longer rows are dropped and counted.
        kind: for a feedback store: the kind of rows that its judgements become; the DataModule sets it.
    """

    path: str
    weight: float = 1.0
    rows: int | None = None
    split: str = "train"
    name: str | None = None
    columns: dict[str, str] | None = None
    labels: Labels = "mean"
    annotators: list[str] | None = None
    max_row_bytes: int = LONGEST_ROW
    kind: RowKind = "preference"

    def __str__(self) -> str:
        return self.path


def parse_sources(source: Any, kind: RowKind = "preference") -> tuple[Source, ...]:
    """Parse the argument ``source`` of a DataModule; judgements of a feedback store become rows of ``kind``.

    Raises:
        SettingError: the source is neither a path, nor a mapping with known keys, nor a list of these.
    """
    items = source if isinstance(source, list | tuple) else [source]
    if not items:
        raise SettingError("no-source", "source is an empty list; name at least one file, folder or Hub name")
    sources = [_one(item) for item in items]
    return tuple(replace(one, path=at_snapshot(one.path), kind=kind) if is_store(one.path) else one for one in sources)


def refuse_objects(source: Any) -> None:
    """Refuse objects that hold rows in an unsupported form, and name the form to use instead.

    Raises:
        SettingError: ``invalid-source``.
    """
    kind = type(source).__name__
    remedy = None
    if type(source).__module__.partition(".")[0] in ("pandas", "polars"):
        remedy = "datasets.Dataset.from_pandas(frame) or a list of dicts"
    elif kind in ("DatasetDict", "IterableDatasetDict"):
        remedy = "one of its splits, such as dataset['train']"
    elif isinstance(source, Iterator):
        remedy = "list(rows)"
    elif isinstance(source, dict) and "path" not in source and all(isinstance(one, list) for one in source.values()):
        remedy = "datasets.Dataset.from_dict(columns) or a list of dicts"
    if remedy is not None:
        raise SettingError("invalid-source", f"a {kind} cannot be a source: give {remedy}")


def as_file(source: Any, cache: Path) -> Any:
    """Write a ``datasets.Dataset`` or a list of rows to a cache file and return its path; else return ``source``.

    The file is named by its content, so that caches, ranks and resumed runs find the same rows. The rows of
    ``reasoning_gym:TASK`` are generated, see `environments.games.reasoning_rows`.

    Raises:
        SettingError: ``not-json``: a row has values that JSON does not support; ``loader-as-source``: the source is a
            DataLoader.
    """
    if type(source).__module__.startswith("torch.utils.data"):
        raise SettingError(
            "loader-as-source",
            f"a {type(source).__name__} cannot be a source: give its rows as the source (loader.dataset: a "
            "datasets.Dataset or a list of dicts), or a DataLoader of Steps to trainer.fit(train_dataloaders=loader)",
        )
    if isinstance(source, str) and source.startswith(GYM):
        return as_file(reasoning_rows(source), cache)
    if isinstance(source, dict) and str(source.get("path", "")).startswith(GYM):
        return {**source, "path": as_file(source["path"], cache)}
    of_rows = isinstance(source, list) and bool(source) and all(isinstance(r, dict) and "path" not in r for r in source)
    if not of_rows and type(source).__module__.partition(".")[0] != "datasets":
        return [as_file(one, cache) for one in source] if isinstance(source, list) else source
    try:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in source]
    except (TypeError, AttributeError) as error:
        raise SettingError("not-json", f"source has rows that cannot be written as JSON ({error})") from error
    text = "".join(lines).encode("utf-8", "surrogatepass")  # a row with half a surrogate is dropped when it is read
    file = cache / "sources" / f"{hashlib.blake2b(text, digest_size=16).hexdigest()}.jsonl"
    if not file.is_file():
        with complete_file(file) as partial:
            partial.write_bytes(text)
    return str(file)


def at_snapshot(source: Any) -> Any:
    """Return ``source`` with the current row number appended to every feedback store that has none.

    Raises:
        MissingError: there is no such store.
        DataError: the file is not a feedback store.
    """
    if isinstance(source, list | tuple):
        return [at_snapshot(item) for item in source]
    if isinstance(source, dict):
        return {**source, "path": at_snapshot(source["path"])} if "path" in source else source
    if not isinstance(source, str) or not is_store(source) or split_name(source)[1] is not None:
        return source
    with reading(split_name(source)[0]) as connection:
        return f"{source}@{snapshot_of(connection).upto}"


def _one(item: Any) -> Source:
    if isinstance(item, Source):
        return item
    if isinstance(item, str | Path):
        if not str(item):
            raise SettingError("no-source", "source is an empty text; give a file, a folder or a Hub name")
        return Source(str(item))
    if not isinstance(item, dict):
        raise SettingError(
            "invalid-source", f"a source is a path or a mapping with 'path', not {type(item).__name__}: {item!r}"
        )
    known = [name for name in Source.__dataclass_fields__ if name != "kind"]
    unknown = [key for key in item if key not in known]
    if unknown or "path" not in item:
        found = ", ".join(map(str, item))
        raise SettingError(
            "invalid-source", f"a source has the keys {', '.join(known)} ('path' is required); found {found}"
        )
    one = Source(**{**item, "path": str(item["path"])})
    if one.labels not in get_args(Labels):
        raise SettingError(
            "unknown-choice", f"labels of {one.path} is {one.labels!r}; choose one of {', '.join(get_args(Labels))}"
        )
    if one.annotators is not None and not is_store(one.path):
        raise SettingError(
            "annotators-without-store",
            f"annotators applies only to feedback stores (*.db), and {one.path} is not one; leave annotators out",
        )
    if one.weight <= 0:
        raise SettingError("setting-out-of-range", f"weight of {one.path} is {one.weight}: it must be above 0")
    for name in ("rows", "max_row_bytes"):
        bound = getattr(one, name)
        if bound is not None and (not isinstance(bound, int) or bound < 1):
            raise SettingError("setting-out-of-range", f"{name} of {one.path} is {bound!r}: it must be at least 1")
    return one


def load_hub(source: Source, streaming: bool = False) -> Any:
    """Load the `datasets` object of a Hub name or of a folder written by ``save_to_disk``."""
    import datasets  # takes a second to import, and files do not need it

    if Path(source.path).expanduser().is_dir():
        data = datasets.load_from_disk(str(Path(source.path).expanduser()))
        name = split_of(source.split)
        if isinstance(data, datasets.DatasetDict):
            if name not in data:
                raise DataError(
                    "no-such-split", f"{source.path} has no split {name!r}; choose one of {', '.join(data)}"
                )
            data = data[name]
        data = data.select(range(*bounds_of(source.split, len(data))))
        return data.to_iterable_dataset(num_shards=min(64, max(len(data), 1))) if streaming else data
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split, streaming=streaming)
    except (FileNotFoundError, ConnectionError, OSError) as error:
        raise MissingError(
            "no-data", f"{source.path!r} is not a file here, and the Hub did not provide it: {reason_of(error)}"
        ) from error


def source_fingerprint(source: Source) -> str:
    """Hash the content of a source: the bytes of its files, or the fingerprint of its dataset."""
    digest = hashlib.blake2b(digest_size=16)
    if is_store(source.path):
        file, upto = split_name(source.path)
        with reading(file) as connection:
            taken = snapshot_of(connection, upto).fingerprint
            digest.update(json.dumps([taken, source.kind, source.labels, source.annotators]).encode())
        return digest.hexdigest()
    files = files_of(source.path, source.split)
    if files is None:
        digest.update(dataset_fingerprint(load_hub(source)).encode())
    if files is not None and "[" in source.split:
        digest.update(source.split.encode())
    if source.max_row_bytes != LONGEST_ROW:
        digest.update(str(source.max_row_bytes).encode())
    for file in files or []:
        digest.update("".join(file.suffixes).encode())
        status = file.stat()
        digest.update(_content_hash(file, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _content_hash(file: Path, size: int, changed: int) -> bytes:
    """Hash a file's bytes; cached by size and modification time."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()


def source_stamp(source: Source) -> str:
    """Return names and sizes of a source's files, to identify streams that are too large to hash."""
    sizes = [(file.name, file.stat().st_size) for file in files_of(source.path, source.split) or []]
    return json.dumps([source.path, source.split, source.name, sizes])


def read_rows(source: Source) -> Iterator[RawRow]:
    """Yield rows of a source in order; an invalid line becomes a `files.Unreadable`, so that every line is counted."""
    rows: Iterator[RawRow]
    if is_store(source.path):
        rows = _judged_rows(source)
    elif (files := files_of(source.path, source.split)) is None:
        rows = map(without_filled_nulls, load_hub(source))
    else:

        def of_files() -> Iterator[RawRow]:
            return (row for file in files for row in read_file(file, source.max_row_bytes))

        rows = of_files()
        if "[" in source.split:
            count = sum(1 for _ in of_files()) if "%" in source.split or "-" in source.split else 0
            start, stop = bounds_of(source.split, count or sys.maxsize)
            rows = islice(rows, start, stop)
    for count, row in enumerate(rows):
        if source.rows is not None and count >= source.rows:
            return
        yield row


def _judged_rows(source: Source) -> Iterator[RawRow]:
    file, upto = split_name(source.path)
    with reading(file) as connection:
        upto = snapshot_of(connection, upto).upto
        yield from rows_of(connection, source.kind, upto, source.labels, source.annotators)


def snapshots_of(sources: Sequence[Source]) -> dict[str, str]:
    """Return the fingerprint of the judgements in each feedback store, by its name with the row number."""
    found = {}
    for source in sources:
        if is_store(source.path):
            file, upto = split_name(source.path)
            with reading(file) as connection:
                found[source.path] = snapshot_of(connection, upto).fingerprint
    return found


def usable_rows(path: str, read: Callable[[Any], T], lack: str = "nothing to compare") -> list[T]:
    """Read each row of a file with a function; count and report the rows that it refuses.

    Args:
        path: file, folder or feedback store.
        read: converts a row to the caller's form, or raises `RowRefused`.
        lack: description, for the message, of a file without a usable row.

    Raises:
        MissingError: the file does not exist.
        DataError: no row can be used.
    """
    if not Path(path).exists():
        raise MissingError("no-file", f"there is no file {path}")
    found: list[T] = []
    columns: set[str] = set()
    refused = Counter[str]()
    for row in read_rows(Source(path)):
        columns.update(() if isinstance(row, Unreadable) else row)
        try:
            found.append(read(row))
        except RowRefused as error:
            refused[error.code] += 1
    said = "; ".join(f"{count} rows: {REASONS.get(reason, reason)}" for reason, count in refused.items())
    if not found:
        names = ", ".join(sorted(columns)) or "none"
        raise DataError("no-usable-rows", f"{path} has {lack} ({said or 'it is empty'}); its columns are {names}")
    if said:
        print(f"{path}: left out {said}", file=sys.stderr)
    return found
