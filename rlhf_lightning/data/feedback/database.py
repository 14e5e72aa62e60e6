"""The tables of a feedback store, and connections to them.

SQLite from the standard library: one file, transactions, readers beside a writer, nothing to install or to run. Tables
are few and their statements short, so that a layer between would be longer than what it hides.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from rlhf_lightning.errors import DataError, MissingError

MARK = 0x524C4846  # "RLHF"
"""Application id in the file's header: tells a feedback store from any other database."""

VERSION = 1

TABLES = """
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

-- A judgement, or (with undoes) the taking back of one. The key makes a request that is sent twice count once.
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

-- Judgements that stand. The plus keeps the planner from the index of undoes, which it takes to be unique for NULL too.
CREATE VIEW live AS
    SELECT j.*, a.item, a.repeat, a.shown
    FROM judgements j JOIN assignments a ON a.id = j.assignment
    WHERE +j.undoes IS NULL AND NOT EXISTS (SELECT 1 FROM judgements u WHERE u.undoes = j.id);
"""

FOREVER = "".join(
    f"CREATE TRIGGER {table}_stay_{verb} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, 'rows of {table} are never changed'); END;\n"
    for table in ("items", "candidates", "judgements")
    for verb in ("UPDATE", "DELETE")
)
"""What people said cannot be changed, by this package or by a slip in a database shell."""


VALUES = "CREATE TEMP TABLE item_values (item INTEGER PRIMARY KEY, value REAL NOT NULL) STRICT"
"""What a selector said of items: this process's opinion, and no part of the file."""


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open a store, made now if there is none.

    Write-ahead logging lets training read while people label. With ``synchronous`` FULL a commit returns when the log
    is on the disk: a label that was confirmed outlives the process, and the power.

    Raises:
        DataError: the file is no feedback store.
    """
    new = not path.exists() or path.stat().st_size == 0
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    if path.is_dir():
        raise DataError("not-a-store", f"{path} is a folder, not a feedback store; name a .db file")
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
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{TABLES}\n{FOREVER}\nPRAGMA application_id = {MARK};\n"
                f"PRAGMA user_version = {VERSION};\nCOMMIT;"
            )
        connection.execute(VALUES)
    except BaseException:
        connection.close()
        raise
    return connection


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a store that is there, to read it; people may go on labelling.

    Raises:
        MissingError: there is none.
        ValueError: the file is no feedback store.
    """
    if not path.is_file():
        raise MissingError("no-store", f"there is no feedback store {path} (in {Path.cwd()}); check the path")
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=30)
    try:
        _check(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


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
            f"{path} is a feedback store of version {version}, and this release reads version "
            f"{VERSION}; use the release that wrote it",
        )
