"""Feedback store opened for labelling: add items, assign them, record judgements. Rows are never deleted."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from rlhf_lightning.data.feedback.database import identity_of, item_of, open_for_writing, snapshot_of
from rlhf_lightning.data.feedback.records import (
    Answer,
    Assignment,
    Conflict,
    Item,
    JudgementRefused,
    NotAsked,
    Snapshot,
    digest,
    encoded,
    in_item_order,
)
from rlhf_lightning.errors import ContractError, StateError
from rlhf_lightning.people.handing_out import COUNTS, Policy, fresh_item, open_assignment, repeat_item, sides
from rlhf_lightning.types import Prompt

if TYPE_CHECKING:
    from rlhf_lightning.people.selectors import Selector

WAITING = "stock WHERE NOT begun"


class Progress(NamedTuple):
    """Progress of an annotator."""

    judged: int  # judgements of this annotator, without skipped items
    skipped: int  # items that this annotator skipped
    left: int  # items of the store that still need this annotator's judgement
    seconds: float  # mean time of a judgement, seconds; 0 before the first


class FeedbackStore:
    """A store opened for labelling. Training may read it at the same time, see `database.reading`.

    One process at a time may open it; its threads share it.

    Args:
        path: the file; created if missing. Symbolic links are resolved.
        policy: how items are assigned.
        clock: returns seconds since 1970.

    Raises:
        StateError: another process has the store open.
        DataError: the file is not a feedback store.
    """

    def __init__(self, path: str | Path, policy: Policy | None = None, clock: Callable[[], float] = time.time) -> None:
        # Resolved, because two names of one file must share one lock and one write-ahead log.
        self.path, self.policy, self.clock = Path(path).resolve(), policy or Policy(), clock
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{self.path}.lock", blocking=False, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise StateError(
                "store-locked",
                f"{self.path} is open in another process that collects labels: use its page, or stop it",
            ) from None
        self._turn = threading.RLock()
        try:
            self._connection = open_for_writing(self.path, self.policy.salt)
            self.id, salt = identity_of(self._connection)
            self._connection.executescript(COUNTS.format(wanted=self.policy.annotators))
            self._inode = self.path.stat().st_ino
        except BaseException:
            self._lock.release()
            raise
        self._key: int | str = f"{salt}/{self.policy.seed}" if salt else self.policy.seed

    def close(self) -> None:
        """Close the store and release its lock."""
        with self._turn:
            self._connection.close()
            self._lock.release()

    def __enter__(self) -> FeedbackStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one durable transaction."""
        with self._turn:
            self._require_file()
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
            self._require_file("-wal")

    def _require_file(self, *suffixes: str) -> None:
        """Raise an error if the file was deleted: SQLite would continue to write to the deleted file silently."""
        found = self.path.stat() if self.path.exists() else None
        names = [f"{self.path}{suffix}" for suffix in suffixes]
        if found is None or found.st_ino != self._inode or found.st_size == 0 or not all(map(os.path.exists, names)):
            raise StateError(
                "store-removed",
                f"{self.path} was removed or replaced while it was open, so no label can be kept: stop the server, "
                "restore the file, and start again",
            )

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection, for read-only statements."""
        with self._turn:
            yield self._connection

    # ---- items ------------------------------------------------------------------------------------------------------

    def add(self, items: Iterable[Item]) -> int:
        """Add the items that the store does not have yet; return their number."""
        with self._transaction() as db:
            return sum(self._add(db, item) for item in items)

    def _add(self, db: sqlite3.Connection, item: Item) -> bool:
        row = (item.key, encoded(item.prompt), digest(item.prompt), encoded(item.columns), self._now())
        cursor = db.execute(
            "INSERT INTO items (key, prompt, prompt_key, columns, added) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (key) DO NOTHING",
            row,
        )
        if cursor.rowcount == 0:
            return False
        places = [
            (
                cursor.lastrowid, place, encoded(one.completion), one.model,
                None if one.sampling is None else encoded(one.sampling), one.seed, one.episode,
            )
            for place, one in enumerate(item.candidates)
        ]  # fmt: skip
        db.executemany("INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?)", places)
        return True

    def has_prompt(self, prompt: Prompt) -> bool:
        """Whether the store has an item of this prompt."""
        return bool(self._count("SELECT count(*) FROM items WHERE prompt_key = ?", digest(prompt)))

    def waiting(self) -> int:
        """Count the items that were never assigned."""
        return self._count(f"SELECT count(*) FROM {WAITING}")

    def rank(self, selector: Selector) -> None:
        """Let a selector order the items that were never assigned; annotators are not blocked meanwhile."""
        given, waiting = (
            "SELECT item FROM assignments WHERE repeat = 0 GROUP BY item ORDER BY min(id)",
            f"SELECT item FROM {WAITING} ORDER BY item",
        )
        with self._turn:
            known, asked = (
                [item_of(self._connection, number) for (number,) in self._connection.execute(which).fetchall()]
                for which in (given, waiting)
            )
        values = [float(value) for value in selector.values(asked, known)]
        if len(values) != len(asked):
            raise ContractError(
                "wrong-number",
                f"{type(selector).__name__} returned {len(values)} values for {len(asked)} items: return one for each",
            )
        if not all(map(math.isfinite, values)):
            raise ContractError(
                "not-finite",
                f"{type(selector).__name__} returned a value that is NaN or infinite: return finite numbers",
            )
        with self._transaction() as db:
            rows = [{"item": item.id, "value": value} for item, value in zip(asked, values, strict=True)]
            db.executemany("UPDATE stock SET value = :value WHERE item = :item AND NOT begun", rows)

    def take_over(self, item: Item, answers: Iterable[tuple[str, Answer]]) -> int:
        """Import an item with answers from another tool; return the number of new answers.

        An annotator's second answer about an item, and an answer that was imported before, are left out.

        Args:
            item: the item; it may already be in the store.
            answers: pairs of annotator name and answer; completions are numbered as in the item.
        """
        taken = 0
        with self._transaction() as db:
            self._add(db, item)
            number = int(db.execute("SELECT id FROM items WHERE key = ?", [item.key]).fetchone()[0])
            shown = list(range(len(item.candidates)))
            for annotator, answer in answers:
                answer.check(len(shown))
                cursor = db.execute(
                    "INSERT INTO assignments (annotator, item, repeat, shown, given) VALUES (?, ?, 0, ?, ?) "
                    "ON CONFLICT (annotator, item, repeat) DO NOTHING",
                    (annotator, number, encoded(shown), self.clock()),
                )
                if cursor.rowcount and cursor.lastrowid is not None:
                    self._insert(db, annotator, cursor.lastrowid, digest([item.key, annotator]), answer, shown)
                    taken += 1
        return taken

    # ---- annotating -------------------------------------------------------------------------------------------------

    def next(self, annotator: str) -> Assignment | None:
        """Return the annotator's next assignment; None if there is nothing to judge now.

        Until it is judged, the assignment and its sides stay the same, so that reloading the page changes nothing.
        """
        with self._transaction() as db:
            found = open_assignment(db, annotator)
            if found is None:
                repeat = repeat_item(db, annotator, self.policy, self._key)
                item = repeat if repeat is not None else fresh_item(db, annotator, self.policy, self.clock())
                if item is None:
                    return None
                shown = sides(db, annotator, item, repeat is not None, self._key)
                cursor = db.execute(
                    "INSERT INTO assignments (annotator, item, repeat, shown, given) VALUES (?, ?, ?, ?, ?)",
                    (annotator, item, int(repeat is not None), encoded(shown), self.clock()),
                )
                assert cursor.lastrowid is not None
                found = (cursor.lastrowid, item, int(repeat is not None), encoded(shown))
            number, item, repeats, shown_text = found
            return Assignment(number, item_of(db, item), tuple(json.loads(shown_text)), bool(repeats))

    def judge(self, annotator: str, assignment: int, key: str, answer: Answer) -> int:
        """Record a judgement and return its row number. When this returns, the judgement is on disk.

        Args:
            annotator: name of the annotator.
            assignment: number of the assignment.
            key: idempotency key, new for each judgement; a repeated request with the same key counts once.
            answer: the judgement.

        Raises:
            Conflict: the assignment was already judged under another key.
            NotAsked: the assignment belongs to another annotator.
            JudgementRefused: the answer does not fit the assignment.
            StateError: the store's file was removed.
        """
        with self._transaction() as db:
            if (known := self._known(db, annotator, key, assignment)) is not None:
                return known
            row = db.execute(
                "SELECT shown FROM assignments WHERE id = ? AND annotator = ?", [assignment, annotator]
            ).fetchone()
            if row is None:
                raise NotAsked("not-asked", "this item is not assigned to you")
            shown = json.loads(row[0])
            answer.check(len(shown))
            if db.execute("SELECT 1 FROM live WHERE assignment = ?", [assignment]).fetchone():
                raise Conflict("judged-already", "you have already judged this item")
            return self._insert(db, annotator, assignment, key, answer, shown)

    def _insert(
        self, db: sqlite3.Connection, annotator: str, assignment: int, key: str, answer: Answer, shown: list[int]
    ) -> int:
        ranks = None if answer.ranks is None else in_item_order(answer.ranks, shown)
        cursor = db.execute(
            "INSERT INTO judgements (key, annotator, assignment, verdict, ranks, strength, reasons, flags, edited, "
            "edited_place, seconds, judged) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                key, annotator, assignment, answer.verdict, None if ranks is None else encoded(ranks), answer.strength,
                encoded(answer.reasons), encoded(answer.flags), answer.edited,
                None if answer.edited_place is None else shown[answer.edited_place], float(answer.seconds),
                self._now(),
            ),
        )  # fmt: skip
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def undo(self, annotator: str, key: str, judgement: int | None = None) -> int | None:
        """Undo a judgement of the annotator, so that the item is shown again; return the number of the new row.

        The judgement stays in the store, and a new row records the undo. Returns None if there is nothing to undo.

        Args:
            annotator: name of the annotator.
            key: idempotency key of the request.
            judgement: number of the judgement; None means the last judgement.

        Raises:
            JudgementRefused: the annotator has no such judgement, or it was undone before.
        """
        with self._transaction() as db:
            if (known := self._known(db, annotator, key, None)) is not None:
                return known
            last = db.execute(
                "SELECT id, assignment FROM live WHERE annotator = :annotator AND (:number IS NULL OR id = :number) "
                "ORDER BY id DESC LIMIT 1",
                {"annotator": annotator, "number": judgement},
            ).fetchone()
            if last is None and judgement is not None:
                raise JudgementRefused("no-such-judgement", f"you have no label {judgement}, or it is already undone")
            if last is None:
                return None
            cursor = db.execute(
                "INSERT INTO judgements (key, annotator, assignment, undoes, judged) VALUES (?, ?, ?, ?, ?)",
                (key, annotator, last[1], last[0], self._now()),
            )
            return cursor.lastrowid

    def _known(self, db: sqlite3.Connection, annotator: str, key: str, assignment: int | None) -> int | None:
        """Return the row that an earlier request with this key wrote; None if there is none."""
        row = db.execute("SELECT id, annotator, assignment, undoes FROM judgements WHERE key = ?", [key]).fetchone()
        if row is None:
            return None
        same_kind = (row[3] is not None) == (assignment is None)
        if row[1] != annotator or not same_kind or (assignment is not None and row[2] != assignment):
            raise JudgementRefused("other-judgements-key", "the key belongs to another judgement")
        return int(row[0])

    # ---- counts -----------------------------------------------------------------------------------------------------

    def progress(self, annotator: str) -> Progress:
        """Count the annotator's judgements and the items left."""
        with self._turn:
            judged, skipped, seconds = self._connection.execute(
                "SELECT coalesce(sum(judged), 0), coalesce(sum(skipped), 0), sum(seconds) FROM seen "
                "WHERE annotator = ?",
                [annotator],
            ).fetchone()
            (left,) = self._connection.execute(
                "SELECT (SELECT count(*) FROM stock WHERE wanting = 1) - "
                "(SELECT count(*) FROM seen JOIN stock USING (item) WHERE annotator = ? AND wanting = 1)",
                [annotator],
            ).fetchone()
        return Progress(judged, skipped, left, seconds / judged if judged else 0.0)

    def labels(self) -> int:
        """Count the labels: judgements, excluding hidden repeats and skipped items."""
        return self._count("SELECT coalesce(sum(labels), 0) FROM stock")

    def being_judged(self) -> int:
        """Count the items that somebody is judging now."""
        since = self.clock() - self.policy.lease
        return self._count("SELECT count(*) FROM open WHERE repeat = 0 AND given > ?", since)

    def last(self) -> tuple[int, str]:
        """Return number and annotator of the last row of judgements; 0 and an empty name if there is none."""
        with self._turn:
            row = self._connection.execute("SELECT id, annotator FROM judgements ORDER BY id DESC LIMIT 1").fetchone()
            return (0, "") if row is None else (int(row[0]), str(row[1]))

    def snapshot(self) -> Snapshot:
        """Return a snapshot of all judgements so far."""
        with self._turn:
            return snapshot_of(self._connection)

    def _count(self, query: str, *values: Any) -> int:
        with self._turn:
            return int(self._connection.execute(query, values).fetchone()[0])

    def _now(self) -> str:
        return datetime.fromtimestamp(self.clock(), UTC).isoformat(timespec="milliseconds")


def counts(connection: sqlite3.Connection) -> dict[str, Any]:
    """Count items, standing judgements and annotators."""
    queries = {
        "items": "count(*) FROM items", "judgements": "count(*) FROM live",
        "annotators": "count(DISTINCT annotator) FROM live",
    }  # fmt: skip
    return {name: connection.execute(f"SELECT {query}").fetchone()[0] for name, query in queries.items()}
