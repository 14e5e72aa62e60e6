"""Feedback store as one SQLite file: tables, connections, items, judgements and snapshots."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf_lightning.data.feedback.records import (
    Answer,
    Candidate,
    Item,
    JudgementRefused,
    Snapshot,
    StoredJudgement,
    encoded,
)
from rlhf_lightning.errors import DataError, MissingError

SUFFIX = ".db"

MARK = 0x524C4846  # "RLHF"
"""Application id in the file header; it distinguishes a feedback store from other SQLite databases."""

VERSION = 2

TABLES = """
-- One row. The id identifies this store; the salt makes display order and repeats unpredictable.
CREATE TABLE store (id TEXT NOT NULL, salt TEXT NOT NULL) STRICT;

CREATE TABLE items (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    prompt TEXT NOT NULL,
    prompt_key TEXT NOT NULL,
    columns TEXT NOT NULL,
    added TEXT NOT NULL
) STRICT;
CREATE INDEX items_of_a_prompt ON items (prompt_key);

CREATE TABLE candidates (
    item INTEGER NOT NULL REFERENCES items (id),
    place INTEGER NOT NULL,
    completion TEXT NOT NULL,
    model TEXT,
    sampling TEXT,
    seed INTEGER,
    episode INTEGER,
    PRIMARY KEY (item, place)
) STRICT, WITHOUT ROWID;

CREATE TABLE assignments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    annotator TEXT NOT NULL,
    item INTEGER NOT NULL REFERENCES items (id),
    repeat INTEGER NOT NULL,
    shown TEXT NOT NULL,
    given REAL NOT NULL,
    UNIQUE (annotator, item, repeat)
) STRICT;
CREATE INDEX assignments_of_an_item ON assignments (item);

-- A judgement, or (with undoes) the withdrawal of one. The key makes a repeated request count once.
CREATE TABLE judgements (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    annotator TEXT NOT NULL,
    assignment INTEGER NOT NULL REFERENCES assignments (id),
    undoes INTEGER UNIQUE REFERENCES judgements (id),
    verdict TEXT,
    ranks TEXT,
    strength INTEGER,
    reasons TEXT NOT NULL DEFAULT '[]',
    flags TEXT NOT NULL DEFAULT '[]',
    edited TEXT,
    edited_place INTEGER,
    seconds REAL NOT NULL DEFAULT 0,
    judged TEXT NOT NULL,
    CHECK ((verdict IS NULL) = (undoes IS NOT NULL))
) STRICT;
CREATE INDEX judgements_of_an_assignment ON judgements (assignment);
CREATE INDEX judgements_of_an_annotator ON judgements (annotator);

-- Judgements that were not undone. The plus stops the planner from using the index of undoes, which it assumes to be
-- unique for NULL too.
CREATE VIEW live AS
    SELECT j.*, a.item, a.repeat, a.shown
    FROM judgements j JOIN assignments a ON a.id = j.assignment
    WHERE +j.undoes IS NULL AND NOT EXISTS (SELECT 1 FROM judgements u WHERE u.undoes = j.id);
"""

IMMUTABLE = "".join(
    f"CREATE TRIGGER {table}_stay_{verb} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, 'rows of {table} are never changed'); END;\n"
    for table in ("store", "items", "candidates", "judgements")
    for verb in ("UPDATE", "DELETE")
)
"""Triggers that prevent changes to judgements, by this package or in a database shell."""

STANDING = (
    "SELECT j.id, j.annotator, a.item, a.repeat, a.shown, j.verdict, j.ranks, j.strength, j.reasons, j.flags, "
    "j.edited, j.edited_place, j.seconds, j.judged, (SELECT count(*) FROM candidates c WHERE c.item = a.item) "
    "FROM judgements j JOIN assignments a ON a.id = j.assignment WHERE j.undoes IS NULL AND j.id <= :upto AND "
    "NOT EXISTS (SELECT 1 FROM judgements u WHERE u.undoes = j.id AND u.id <= :upto) ORDER BY j.id"
)
"""Query of judgements that were not withdrawn by row ``upto``."""

NO_LIMIT = 2**62
"""A row number larger than any store has."""


# ---- connections -----------------------------------------------------------------------------------------------------


def open_for_writing(path: Path, salt: str | None = None) -> sqlite3.Connection:
    """Open a store for writing; create it if the file does not exist.

    Write-ahead logging lets training read while people label. With ``synchronous`` FULL, a commit returns when the log
    is on disk, so a confirmed judgement survives a killed process and a power failure. A new store gets a random secret
    salt unless one is given.

    Raises:
        DataError: the file is not a feedback store, or cannot be written safely.
    """
    new = not path.exists() or path.stat().st_size == 0
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    if path.is_dir():
        raise DataError("not-a-store", f"{path} is a folder, not a feedback store; name a .db file")
    if path.stat().st_nlink > 1:
        raise DataError(
            "store-not-writable",
            f"{path} has {path.stat().st_nlink} hard links, and SQLite loses data written through two of them; label "
            "in a copy of the file",
        )
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    try:
        if not new:
            _check(connection, path)
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise DataError(
                "store-not-writable",
                f"{path} cannot be written safely: its file system does not support SQLite's write-ahead "
                "log; move it to a local disk",
            )
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        if new:
            salt = secrets.token_hex(16) if salt is None else salt
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{TABLES}\n{IMMUTABLE}\nINSERT INTO store VALUES ('{secrets.token_hex(8)}', "
                f"CAST(X'{salt.encode().hex()}' AS TEXT));\n"
                f"PRAGMA application_id = {MARK};\nPRAGMA user_version = {VERSION};\nCOMMIT;"
            )
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a store read-only with a consistent view: rows that are added later stay invisible.

    Raises:
        MissingError: the file does not exist.
        DataError: the file is not a feedback store.
    """
    if not path.is_file():
        raise MissingError("no-store", f"there is no feedback store {path} (in {Path.cwd()}); check the path")
    address = f"{path.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, isolation_level=None, timeout=30)) as connection:
        _check(connection, path)
        connection.execute("BEGIN")
        yield connection


def _check(connection: sqlite3.Connection, path: Path) -> None:
    try:
        mark, version = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
    except sqlite3.DatabaseError as error:
        raise DataError("not-a-store", f"{path} is not a feedback store: {error}") from error
    if mark != MARK:
        raise DataError("not-a-store", f"{path} is a database, but not a feedback store")
    if version != VERSION:
        raise DataError(
            "store-version",
            f"{path} is a feedback store of version {version}, but this release reads version "
            f"{VERSION}; use the release that wrote it",
        )


def is_store(name: str) -> bool:
    """Return whether a data source is named like a feedback store: ``feedback.db`` or ``feedback.db@1200``."""
    return split_name(name)[0].suffix == SUFFIX


def split_name(name: str) -> tuple[Path, int | None]:
    """Split ``feedback.db@1200`` into the file and the row number (None if not given)."""
    found = re.fullmatch(rf"(.*\{SUFFIX})@(\d+)", name)
    return (Path(found[1]).expanduser(), int(found[2])) if found else (Path(name).expanduser(), None)


# ---- contents --------------------------------------------------------------------------------------------------------


def item_of(connection: sqlite3.Connection, number: int) -> Item:
    """Read an item by its number.

    Raises:
        DataError: the store holds no such item, or a damaged one.
    """
    where = f"item {number}"
    row = connection.execute("SELECT prompt, columns FROM items WHERE id = ?", [number]).fetchone()
    if row is None:
        raise _damaged(where, "is missing, but a judgement refers to it")
    prompt, columns = _text_or_turns(row[0], where, "prompt"), _plain(row[1], where, "columns")
    if not isinstance(columns, dict):
        raise _damaged(where, "has columns that are not a mapping of names to values")
    rows = connection.execute(
        "SELECT completion, model, sampling, seed, episode FROM candidates WHERE item = ? ORDER BY place", [number]
    )
    candidates = tuple(
        Candidate(
            _text_or_turns(text, where, "a completion"), model,
            None if sampling is None else _plain(sampling, where, "sampling"), seed, episode,
        )
        for text, model, sampling, seed, episode in rows
    )  # fmt: skip
    return Item(prompt, candidates, columns, number)


def items_of(connection: sqlite3.Connection) -> Iterator[Item]:
    """Yield all items in the order in which they were added."""
    for (number,) in connection.execute("SELECT id FROM items ORDER BY id").fetchall():
        yield item_of(connection, number)


def judgements_of(connection: sqlite3.Connection, upto: int = NO_LIMIT) -> list[StoredJudgement]:
    """Return the judgements that were valid at row ``upto``, in the order in which they were made.

    Raises:
        DataError: a judgement is damaged.
    """
    return [_judgement(row) for row in connection.execute(STANDING, {"upto": upto})]


def _judgement(row: tuple[Any, ...]) -> StoredJudgement:
    number, annotator, item, repeat, shown, verdict, ranks, strength, reasons, flags, *rest, count = row
    where = f"judgement {number}"
    order = _list_of(int, shown, where, "shown")
    levels = None if ranks is None else _list_of(int, ranks, where, "ranks")
    said = _list_of(str, reasons, where, "reasons"), _list_of(str, flags, where, "flags")
    edited, place, seconds, judged = rest
    try:
        Answer(verdict, levels, strength, *said, edited, place, seconds).check(count)
        datetime.fromisoformat(judged)
    except (JudgementRefused, TypeError, ValueError, AttributeError) as error:
        raise _damaged(where, f"is invalid ({error})") from None
    if sorted(order) != list(range(count)):
        raise _damaged(where, f"does not fit the {count} completions of item {item}")
    return StoredJudgement(
        number, annotator, item, bool(repeat), order, verdict, levels, strength, *said, edited, place, seconds, judged
    )  # fmt: skip


def identity_of(connection: sqlite3.Connection) -> tuple[str, str]:
    """Return the id and the salt of a store.

    Raises:
        DataError: the store does not have exactly one of each.
    """
    rows = connection.execute("SELECT id, salt FROM store").fetchall()
    if len(rows) != 1 or not all(isinstance(value, str) for value in rows[0]):
        raise _damaged("the table store", "does not hold one id and one salt")
    return rows[0][0], rows[0][1]


def _damaged(where: str, what: str) -> DataError:
    return DataError("damaged-store", f"the feedback store is damaged: {where} {what}; restore it from a copy")


def _plain(text: Any, where: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise _damaged(where, f"has {name} that cannot be read as JSON") from None


def _list_of(kind: type, text: Any, where: str, name: str) -> tuple[Any, ...]:
    value = _plain(text, where, name)
    if not isinstance(value, list) or not all(type(one) is kind for one in value):
        raise _damaged(where, f"has {name} that are not a list of {kind.__name__}")
    return tuple(value)


def _text_or_turns(text: Any, where: str, name: str) -> Any:
    value = _plain(text, where, name)
    turns = value if isinstance(value, list) else [{"role": "", "content": value}]
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(part), str) for part in ("role", "content")):
            raise _damaged(where, f"has {name} that is neither text nor a list of messages")
    return value


def snapshot_of(connection: sqlite3.Connection, upto: int | None = None) -> Snapshot:
    """Hash the judgements up to a row and the items they judge; later judgements do not change the hash.

    Raises:
        DataError: the store does not have that row yet.
    """
    (last,) = connection.execute("SELECT coalesce(max(id), 0) FROM judgements").fetchone()
    if upto is not None and upto > last:
        raise DataError(
            "no-such-snapshot",
            f"the store has {last} rows of judgements, so there is no row number {upto}; choose a number up to {last}",
        )
    upto = last if upto is None else upto
    hashed = hashlib.blake2b(digest_size=16)
    rows = connection.execute(
        "SELECT j.id, j.annotator, i.key, a.repeat, a.shown, j.undoes, j.verdict, j.ranks, j.strength, j.reasons, "
        "j.flags, j.edited, j.edited_place, j.seconds, j.judged FROM judgements j "
        "JOIN assignments a ON a.id = j.assignment JOIN items i ON i.id = a.item WHERE j.id <= ? ORDER BY j.id",
        [upto],
    )
    for row in rows:
        hashed.update(encoded(row).encode())
    return Snapshot(upto, hashed.hexdigest())
