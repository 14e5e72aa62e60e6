"""Choose the next item of each annotator, with random sides, and hidden repeats with sides swapped."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import dataclass

from rlhf_lightning.errors import check_range

COUNTED = "('ranking', 'tie', 'both_bad')"
"""Verdicts that count as labels."""

Row = tuple[int, int, int, str]

COUNTS = f"""
CREATE TEMP TABLE stock (
    item INTEGER PRIMARY KEY, begun INTEGER NOT NULL, value REAL, labels INTEGER NOT NULL,
    wanting INTEGER GENERATED ALWAYS AS (labels < {{wanted}}) STORED
) STRICT;
CREATE INDEX temp.order_of_items ON stock (wanting, begun DESC, value DESC, item);
CREATE TEMP TABLE open (
    assignment INTEGER PRIMARY KEY, annotator TEXT NOT NULL, item INTEGER NOT NULL, repeat INTEGER NOT NULL,
    given REAL NOT NULL
) STRICT;
CREATE INDEX temp.open_of_an_annotator ON open (annotator);
CREATE INDEX temp.open_of_an_item ON open (item);
CREATE TEMP TABLE seen (
    annotator TEXT NOT NULL, item INTEGER NOT NULL, judged INTEGER NOT NULL, skipped INTEGER NOT NULL,
    seconds REAL NOT NULL, PRIMARY KEY (annotator, item)
) STRICT, WITHOUT ROWID;

INSERT INTO stock (item, begun, labels)
    SELECT id, EXISTS (SELECT 1 FROM assignments WHERE item = i.id), 0 FROM items i;
UPDATE stock SET labels = found.labels FROM (
    SELECT item, count(*) AS labels FROM live WHERE repeat = 0 AND verdict IN {COUNTED} GROUP BY item
) AS found WHERE found.item = stock.item;
INSERT INTO open SELECT id, annotator, item, repeat, given FROM assignments a
    WHERE NOT EXISTS (SELECT 1 FROM live WHERE assignment = a.id);
INSERT INTO seen SELECT annotator, item, sum(verdict IN {COUNTED}), sum(verdict = 'skip'),
    sum(iif(verdict IN {COUNTED}, seconds, 0)) FROM live GROUP BY annotator, item;

CREATE TEMP TRIGGER item_added AFTER INSERT ON main.items BEGIN
    INSERT INTO stock (item, begun, labels) VALUES (NEW.id, 0, 0);
END;
CREATE TEMP TRIGGER item_given AFTER INSERT ON main.assignments BEGIN
    INSERT INTO open VALUES (NEW.id, NEW.annotator, NEW.item, NEW.repeat, NEW.given);
    UPDATE stock SET begun = 1, value = NULL WHERE item = NEW.item;
END;
CREATE TEMP TRIGGER item_judged AFTER INSERT ON main.judgements WHEN NEW.undoes IS NULL BEGIN
    UPDATE stock SET labels = labels + 1 WHERE NEW.verdict IN {COUNTED}
        AND item = (SELECT item FROM open WHERE assignment = NEW.assignment AND repeat = 0);
    INSERT INTO seen SELECT NEW.annotator, item, NEW.verdict IN {COUNTED}, NEW.verdict = 'skip',
        iif(NEW.verdict IN {COUNTED}, NEW.seconds, 0) FROM open WHERE assignment = NEW.assignment
        ON CONFLICT DO UPDATE SET judged = seen.judged + excluded.judged, skipped = seen.skipped + excluded.skipped,
        seconds = seen.seconds + excluded.seconds;
    DELETE FROM open WHERE assignment = NEW.assignment;
END;
CREATE TEMP TRIGGER judgement_undone AFTER INSERT ON main.judgements WHEN NEW.undoes IS NOT NULL BEGIN
    INSERT INTO open SELECT id, annotator, item, repeat, given FROM assignments WHERE id = NEW.assignment;
    UPDATE stock SET labels = labels - 1 FROM judgements j, open o WHERE j.id = NEW.undoes AND j.verdict IN {COUNTED}
        AND o.assignment = NEW.assignment AND o.repeat = 0 AND stock.item = o.item;
    UPDATE seen SET judged = seen.judged - (j.verdict IN {COUNTED}), skipped = skipped - (j.verdict = 'skip'),
        seconds = seen.seconds - iif(j.verdict IN {COUNTED}, j.seconds, 0) FROM judgements j, open o
        WHERE j.id = NEW.undoes AND o.assignment = NEW.assignment AND seen.annotator = o.annotator
        AND seen.item = o.item;
    DELETE FROM seen WHERE annotator = NEW.annotator AND judged = 0 AND skipped = 0
        AND item = (SELECT item FROM open WHERE assignment = NEW.assignment);
END;
"""
"""Tables of the open work, updated by triggers, because queries over all judgements become slow as a store grows.

The tables belong to the writing connection. ``stock``: number of labels of each item, whether it was assigned, and its
selector value until then. ``open``: assignments without a judgement. ``seen``: each annotator's standing judgements.
"""


@dataclass(frozen=True)
class Policy:
    """How items are assigned to annotators.

    Args:
        annotators: number of annotators for each item.
        repeats: share of hidden repeats among the items of an annotator.
        distance: minimum number of judgements between an item and its repeat.
        lease: seconds for which an assigned item counts as being judged.
        seed: seed of sides and repeats.
        salt: salt of sides and repeats in a new store. null draws a secret salt, so that annotators cannot predict
            sides; an empty text makes simulated labelling reproducible.
    """

    annotators: int = 1
    repeats: float = 0.05
    distance: int = 10
    lease: float = 900.0
    seed: int = 0
    salt: str | None = None

    def __post_init__(self) -> None:
        check_range(self.annotators >= 1, "it must be 1 or more", annotators=self.annotators)
        check_range(0 <= self.repeats < 1, "it must be in [0, 1)", repeats=self.repeats)


def open_assignment(db: sqlite3.Connection, annotator: str) -> Row | None:
    """Return the annotator's oldest assignment without a judgement; after an undo, the undone assignment."""
    row: Row | None = db.execute(
        "SELECT a.id, a.item, a.repeat, a.shown FROM open o JOIN assignments a ON a.id = o.assignment "
        "WHERE o.annotator = ? ORDER BY o.assignment LIMIT 1",
        [annotator],
    ).fetchone()
    return row


def fresh_item(db: sqlite3.Connection, annotator: str, policy: Policy, now: float) -> int | None:
    """Return an item that needs a judgement, is new to the annotator, and is not assigned to enough others already.

    Items that were assigned before come first, then items with the highest selector value, then the rest. Ties are
    broken by the order in which items were added.
    """
    row = db.execute(
        "SELECT s.item FROM stock s WHERE wanting = 1 AND "
        "NOT EXISTS (SELECT 1 FROM assignments WHERE item = s.item AND annotator = :annotator) AND labels + "
        "(SELECT count(*) FROM open o WHERE o.item = s.item AND o.repeat = 0 AND o.given > :since) < :wanted "
        "ORDER BY begun DESC, value DESC, item LIMIT 1",
        {"annotator": annotator, "since": now - policy.lease, "wanted": policy.annotators},
    ).fetchone()
    return None if row is None else int(row[0])


def repeat_item(db: sqlite3.Connection, annotator: str, policy: Policy, key: int | str) -> int | None:
    """Return an item that the annotator judged some time ago and should judge again; usually None."""
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
    """Return the order in which the item's completions are shown; a repeat reverses the first order."""
    if repeat:
        (shown,) = db.execute(
            "SELECT shown FROM assignments WHERE annotator = ? AND item = ? AND repeat = 0", [annotator, item]
        ).fetchone()
        return tuple(reversed(json.loads(shown)))
    (count,) = db.execute("SELECT count(*) FROM candidates WHERE item = ?", [item]).fetchone()
    return tuple(sorted(range(count), key=lambda place: chance(key, "side", annotator, item, place)))


def chance(*values: object) -> float:
    """Return a pseudo-random number in [0, 1) determined by the values, so that a restart changes nothing."""
    digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
