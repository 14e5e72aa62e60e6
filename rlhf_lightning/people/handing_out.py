"""Choose what each annotator is shown: next items, random sides, hidden repeats with sides swapped."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import dataclass

from rlhf_lightning.errors import check_range

COUNTED = "('ranking', 'tie', 'both_bad')"
"""Verdicts that give a label."""

Row = tuple[int, int, int, str]


@dataclass(frozen=True)
class Policy:
    """How items are handed out.

    Args:
        annotators: annotators for each item.
        repeats: share of hidden repeats among the items an annotator is shown.
        distance: minimum number of judgements between an item and its repeat.
        lease: seconds for which an item that was handed out counts as being judged.
        seed: seed of sides and repeats.
        salt: salt of sides and repeats in a new store. null draws a secret one, so that annotators cannot predict
            sides; an empty text makes simulated labelling reproducible.
    """

    annotators: int = 1
    repeats: float = 0.05
    distance: int = 10
    lease: float = 900.0
    seed: int = 0
    salt: str | None = None

    def __post_init__(self) -> None:
        check_range(self.annotators >= 1, "it must be 1 or more for each item", annotators=self.annotators)
        check_range(0 <= self.repeats < 1, "it must be in [0, 1)", repeats=self.repeats)


def open_assignment(db: sqlite3.Connection, annotator: str) -> Row | None:
    """The annotator's oldest assignment without a judgement; after an undo, the one taken back."""
    row: Row | None = db.execute(
        "SELECT id, item, repeat, shown FROM assignments a WHERE annotator = ? "
        "AND NOT EXISTS (SELECT 1 FROM live WHERE assignment = a.id) ORDER BY id LIMIT 1",
        [annotator],
    ).fetchone()
    return row


def fresh_item(db: sqlite3.Connection, annotator: str, policy: Policy, now: float) -> int | None:
    """An item that needs a judgement, is new to the annotator, and is not with enough others already.

    Items that were handed out before come first, then those with the highest selector value, then the others; ties are
    broken by the order in which items were added.
    """
    row = db.execute(
        "SELECT i.id, EXISTS (SELECT 1 FROM assignments WHERE item = i.id) AS begun "
        "FROM items i LEFT JOIN item_values v ON v.item = i.id WHERE "
        "i.id NOT IN (SELECT item FROM full_items) AND "
        "NOT EXISTS (SELECT 1 FROM assignments WHERE item = i.id AND annotator = :annotator) AND "
        "(SELECT count(*) FROM assignments a WHERE a.item = i.id AND a.repeat = 0 AND ("
        f"    EXISTS (SELECT 1 FROM live l WHERE l.assignment = a.id AND l.verdict IN {COUNTED}) OR "
        "    (a.given > :since AND NOT EXISTS (SELECT 1 FROM live l WHERE l.assignment = a.id)))) < :wanted "
        "ORDER BY begun DESC, iif(begun, NULL, v.value) DESC, i.id LIMIT 1",
        {"annotator": annotator, "since": now - policy.lease, "wanted": policy.annotators},
    ).fetchone()
    return None if row is None else int(row[0])


def note_full_items(db: sqlite3.Connection, policy: Policy, assignment: int | None = None) -> None:
    """Note whether the item of an assignment has enough labels; None notes it of all items.

    To count the labels of a whole store for each judgement would cost the square of the labels.
    """
    chosen = "" if assignment is None else "item = (SELECT item FROM assignments WHERE id = :assignment) AND "
    values = {"assignment": assignment, "wanted": policy.annotators}
    db.execute(f"DELETE FROM full_items WHERE {chosen}1", values)
    db.execute(
        f"INSERT INTO full_items SELECT item FROM live WHERE {chosen}repeat = 0 AND verdict IN {COUNTED} "
        "GROUP BY item HAVING count(*) >= :wanted",
        values,
    )


def repeat_item(db: sqlite3.Connection, annotator: str, policy: Policy, key: int | str) -> int | None:
    """An item that the annotator judged some time ago and is to judge again; usually None."""
    if policy.repeats == 0:
        return None
    (done,) = db.execute("SELECT count(*) FROM live WHERE annotator = ?", [annotator]).fetchone()
    if chance(key, "repeat", annotator, done) >= policy.repeats:
        return None
    rows = db.execute(
        "SELECT item FROM live l WHERE annotator = ? AND repeat = 0 AND verdict IN ('ranking', 'tie') AND "
        "NOT EXISTS (SELECT 1 FROM assignments WHERE annotator = l.annotator AND item = l.item AND repeat = 1) "
        "ORDER BY id",
        [annotator],
    ).fetchall()
    able = rows[: max(len(rows) - policy.distance, 0)]
    return int(able[int(chance(key, "which", annotator, done) * len(able))][0]) if able else None


def sides(db: sqlite3.Connection, annotator: str, item: int, repeat: bool, key: int | str) -> tuple[int, ...]:
    """The order in which the item's completions are shown; a repeat reverses the order of the first time."""
    if repeat:
        (shown,) = db.execute(
            "SELECT shown FROM assignments WHERE annotator = ? AND item = ? AND repeat = 0", [annotator, item]
        ).fetchone()
        return tuple(reversed(json.loads(shown)))
    (count,) = db.execute("SELECT count(*) FROM candidates WHERE item = ?", [item]).fetchone()
    return tuple(sorted(range(count), key=lambda place: chance(key, "side", annotator, item, place)))


def chance(*values: object) -> float:
    """A number in [0, 1) determined by the values, so that a restart changes nothing."""
    digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
