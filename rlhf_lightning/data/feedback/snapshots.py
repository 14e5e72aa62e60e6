"""Reading a store: items, the judgements that stand, and the snapshot that a run was trained on."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import combinations
from pathlib import Path

import torch

from rlhf_lightning.data.feedback.database import open_for_reading
from rlhf_lightning.data.feedback.records import Candidate, Item, Snapshot, StoredJudgement, encoded
from rlhf_lightning.errors import DataError
from rlhf_lightning.functional.agreement import annotator_reliability

SUFFIX = ".db"

STANDING = (
    "SELECT j.id, j.annotator, a.item, a.repeat, a.shown, j.verdict, j.ranks, j.strength, j.reasons, j.flags, "
    "j.edited, j.edited_place, j.seconds, j.judged FROM judgements j JOIN assignments a ON a.id = j.assignment "
    "WHERE j.undoes IS NULL AND j.id <= :upto AND "
    "NOT EXISTS (SELECT 1 FROM judgements u WHERE u.undoes = j.id AND u.id <= :upto) ORDER BY j.id"
)
"""Judgements that were not taken back by the time of row ``upto``."""

FOREVER = 2**62
"""A row number that no store reaches."""


def is_store(name: str) -> bool:
    """Whether a source of rows is named like a feedback store: ``feedback.db``, or ``feedback.db@1200``."""
    return split_name(name)[0].suffix == SUFFIX


def split_name(name: str) -> tuple[Path, int | None]:
    """The file that ``feedback.db@1200`` names, and the row number, None without one."""
    found = re.fullmatch(rf"(.*\{SUFFIX})@(\d+)", name)
    return (Path(found[1]).expanduser(), int(found[2])) if found else (Path(name).expanduser(), None)


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees the store as it is now, whatever is added meanwhile.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no feedback store.
    """
    with closing(open_for_reading(path)) as connection:
        connection.execute("BEGIN")
        yield connection


def item_of(connection: sqlite3.Connection, number: int) -> Item:
    """An item by its number."""
    prompt, columns = connection.execute("SELECT prompt, columns FROM items WHERE id = ?", [number]).fetchone()
    rows = connection.execute(
        "SELECT completion, model, sampling, seed, episode FROM candidates WHERE item = ? ORDER BY place", [number]
    )
    candidates = tuple(
        Candidate(json.loads(text), model, None if sampling is None else json.loads(sampling), seed, episode)
        for text, model, sampling, seed, episode in rows
    )
    return Item(json.loads(prompt), candidates, json.loads(columns), number)


def items_of(connection: sqlite3.Connection) -> Iterator[Item]:
    """All items in the order in which they came."""
    for (number,) in connection.execute("SELECT id FROM items ORDER BY id").fetchall():
        yield item_of(connection, number)


def judgements_of(connection: sqlite3.Connection, upto: int = FOREVER) -> list[StoredJudgement]:
    """The judgements that stood at row ``upto``, in the order in which they were made."""
    return [_judgement(row) for row in connection.execute(STANDING, {"upto": upto})]


def _judgement(row: tuple) -> StoredJudgement:
    number, annotator, item, repeat, shown, verdict, ranks, strength, reasons, flags, *rest = row
    return StoredJudgement(
        number, annotator, item, bool(repeat), tuple(json.loads(shown)), verdict,
        None if ranks is None else tuple(json.loads(ranks)), strength, tuple(json.loads(reasons)),
        tuple(json.loads(flags)), *rest,
    )  # fmt: skip


def snapshot_of(connection: sqlite3.Connection, upto: int | None = None) -> Snapshot:
    """The judgements up to a row, and a hash of them and of the items they judge: later labels do not change it.

    Args:
        connection: to the store.
        upto: number of the last row; None for the last there is.

    Raises:
        DataError: the store has no such row yet.
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


PairVotes = dict[tuple[int, int, int], dict[str, float]]


def pair_votes(judgements: Iterable[StoredJudgement]) -> PairVotes:
    """Votes of each annotator on every two completions of an item: 1 for the first, 0 for the second, 0.5 for none."""
    votes: PairVotes = {}
    for one in judgements:
        if one.repeat or one.verdict == "skip":
            continue
        ranks = one.ranks or (0,) * len(one.shown)
        for a, b in combinations(range(len(ranks)), 2):
            value = 0.5 + 0.5 * ((ranks[a] < ranks[b]) - (ranks[a] > ranks[b]))
            votes.setdefault((one.item, a, b), {})[one.annotator] = value
    return votes


def vote_table(votes: PairVotes) -> tuple[list[str], torch.Tensor]:
    """Annotators by name, and their votes, NaN where there is none, shape (annotators, pairs)."""
    names = sorted({name for given in votes.values() for name in given})
    table = [[given.get(name, float("nan")) for given in votes.values()] for name in names]
    return names, torch.tensor(table, dtype=torch.float64).reshape(len(names), len(votes))


def reliabilities(judgements: Iterable[StoredJudgement]) -> dict[str, float]:
    """Probability that each annotator's choice is right, by `annotator_reliability` on all pairs of completions."""
    names, table = vote_table(pair_votes(judgements))
    if not names:
        return {}
    rates, _ = annotator_reliability(table)
    return dict(zip(names, rates.tolist(), strict=True))
