"""Test the store: assignments, judgements, and that no judgement is lost, duplicated or changed."""

import os
import random
import signal
import sqlite3
import time
from collections import Counter

import pytest
from conftest import refused
from starlette.testclient import TestClient

from rlhf_lightning.data.feedback.database import is_store, judgements_of, reading, snapshot_of, split_name
from rlhf_lightning.data.feedback.records import Answer, Item, JudgementRefused
from rlhf_lightning.data.feedback.rows import rows_of
from rlhf_lightning.people.handing_out import Policy, chance, open_assignment
from rlhf_lightning.people.server import make_app
from rlhf_lightning.people.store import FeedbackStore

from .conftest import LEFT, RIGHT, label, pair, prefer, ranked_item


def standing(store):
    with store.reading() as connection:
        return judgements_of(connection)


def test_an_item_is_stored_once(make_store):
    store = make_store(3)
    assert store.add([pair(1), pair(7)]) == 1
    assert store.waiting() == 4
    assert store.has_prompt("question 1") and not store.has_prompt("question 9")


def test_an_assignment_is_repeated_until_it_is_judged(make_store, tmp_path):
    store = make_store(3)
    first = store.next("ann")
    assert store.next("ann") == first
    store.close()
    again = FeedbackStore(tmp_path / "feedback.db", Policy(repeats=0.0))
    assert again.next("ann") == first, "not even a new server turns the sides"
    again.close()


def test_ranks_are_stored_in_item_order(make_store):
    store = make_store([ranked_item(0)])
    asked, _ = label(store, "ann", Answer("ranking", (2, 0, 1, 1)))
    (one,) = standing(store)
    assert [one.ranks[place] for place in asked.shown] == [2, 0, 1, 1]


def test_display_order_is_balanced_and_differs_between_annotators(make_store):
    store = make_store(400, annotators=2)
    sides = {name: [label(store, name, LEFT)[0].shown for _ in range(400)] for name in ("ann", "bob")}
    assert 0.4 < Counter(sides["ann"])[0, 1] / 400 < 0.6
    assert 0.3 < sum(a == b for a, b in zip(*sides.values(), strict=True)) / 400 < 0.7


def test_each_item_goes_to_the_requested_number_of_annotators(make_store):
    store = make_store(4, annotators=2)
    for name in ("ann", "bob", "cleo"):
        while store.next(name) is not None:
            label(store, name, LEFT)
    assert Counter(one.item for one in standing(store)) == {1: 2, 2: 2, 3: 2, 4: 2}
    assert len({(one.item, one.annotator) for one in standing(store)}) == 8
    assert store.progress("dan").left == 0


def test_an_item_being_judged_is_reserved_for_a_while(make_store):
    now = [1000.0]
    store = make_store(1, clock=lambda: now[0], lease=60)
    asked = store.next("ann")
    assert store.next("bob") is None
    now[0] += 61
    assert store.next("bob").item == asked.item, "ann has gone to lunch"


def test_a_skipped_item_goes_to_another_annotator(make_store):
    store = make_store(1)
    label(store, "ann", Answer("skip"))
    assert store.next("ann") is None and store.next("bob") is not None
    assert store.progress("ann").judged == 0


def test_a_repeated_request_counts_once(make_store):
    store = make_store(2)
    asked, number = label(store, "ann", LEFT, key="k" * 16)
    assert store.judge("ann", asked.id, "k" * 16, LEFT) == number
    assert len(standing(store)) == 1
    with refused("judged-already"):
        store.judge("ann", asked.id, "other key 1234567", RIGHT)
    with refused("not-asked"):
        store.judge("bob", asked.id, "third key 12345678", LEFT)
    with refused("other-judgements-key"):
        store.judge("bob", asked.id, "k" * 16, LEFT)


def test_undo_reassigns_the_item_and_keeps_the_row(make_store):
    store = make_store(3)
    first, _ = label(store, "ann", LEFT)
    second, number = label(store, "ann", LEFT)
    store.next("ann")
    assert store.undo("ann", "undo key 12345678") == number + 1
    assert store.undo("ann", "undo key 12345678") == number + 1, "sent twice, undone once"
    assert store.next("ann").id == second.id and [one.item for one in standing(store)] == [first.item.id]
    label(store, "ann", RIGHT, key="second thoughts 1")
    assert [one.ranks for one in standing(store) if one.item == second.item.id] != [
        one.ranks for one in judged_until(store, number) if one.item == second.item.id
    ]
    assert store.undo("bob", "nothing to undo 1") is None


def judged_until(store, upto):
    with store.reading() as connection:
        return judgements_of(connection, upto)


def test_rows_cannot_be_changed_or_deleted(make_store):
    store = make_store(1)
    label(store, "ann", LEFT)
    store.close()
    connection = sqlite3.connect(store.path)
    for statement in ("DELETE FROM judgements", "UPDATE judgements SET annotator = 'bob'", "DELETE FROM candidates"):
        with pytest.raises(sqlite3.IntegrityError, match="never changed"):
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer("ranking"), "ranks are allowed only with the verdict"),
        (Answer("tie", (0, 1)), "ranks are allowed only with the verdict"),
        (Answer("ranking", (0, 0)), "all ranks are equal"),
        (Answer("ranking", (0, 2)), "without gaps"),
        (Answer("ranking", (0, 1, 2)), "one for each of 2"),
        (Answer("better", (0, 1)), "the verdict 'better' is unknown; choose one of"),
        (Answer("ranking", (0, 1), strength=5), "between 1 and 4"),
        (Answer("tie", strength=2), "a strength is allowed only for a choice"),
        (Answer("tie", edited="as it should be"), "and its position"),
        (Answer("tie", edited=" ", edited_place=0), "is empty"),
        (Answer("tie", edited="x" * 100_001, edited_place=0), "more than 100,000"),
        (Answer("tie", edited="x", edited_place=2), "the edited place is 2: it must be between 0 and 1"),
        (Answer("tie", seconds=float("nan")), "the seconds spent are nan"),
    ],
)
def test_invalid_answers_are_refused(make_store, answer, reason):
    store = make_store(1)
    with pytest.raises(JudgementRefused, match=reason):
        label(store, "ann", answer)
    assert not standing(store)


def test_items_need_two_to_nine_completions():
    with refused("number-of-completions", "1 completions"):
        Item("question", pair(0).candidates[:1])


def test_hidden_repeats_come_later_with_swapped_order(make_store):
    store = make_store(200, repeats=0.3, distance=5)
    given = []
    while (asked := store.next("ann")) is not None and len(given) < 150:
        given.append(asked)
        label(store, "ann", prefer(0))
    repeats = [(n, asked) for n, asked in enumerate(given) if asked.repeat]
    assert 0.15 < len(repeats) / 150 < 0.45
    for n, asked in repeats:
        (first,) = [m for m, other in enumerate(given) if other.item == asked.item and not other.repeat]
        assert n - first > 5 and asked.shown == given[first].shown[::-1]
    assert max(Counter(asked.item.id for asked in given).values()) == 2


def unlinked(path):
    path.unlink()


def replaced(path):
    (path.parent / "other").write_bytes(path.read_bytes())
    (path.parent / "other").replace(path)


def emptied(path):
    path.write_bytes(b"")


def folder_moved(path):
    path.parent.rename(path.parent.with_name("moved"))


def log_unlinked(path):
    path.with_name(f"{path.name}-wal").unlink()


@pytest.mark.parametrize("harm", [unlinked, replaced, emptied, folder_moved, log_unlinked])
def test_labels_are_not_confirmed_if_the_file_was_deleted(tmp_path, harm):
    (tmp_path / "labels").mkdir()
    store = FeedbackStore(tmp_path / "labels" / "feedback.db", Policy(repeats=0.0))
    store.add([pair(0), pair(1)])
    asked, _ = label(store, "ann", LEFT)
    following = store.next("ann")
    harm(store.path)
    with refused("store-removed", "stop the server"):
        store.judge("ann", following.id, "k" * 16, LEFT)
    with refused("store-removed"):
        store.next("bob")


def test_two_paths_of_one_file_share_a_lock(tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    store = FeedbackStore(folder / "feedback.db")
    (tmp_path / "file.db").symlink_to(folder / "feedback.db")
    (tmp_path / "chain.db").symlink_to(tmp_path / "file.db")
    (tmp_path / "folder").symlink_to(folder)
    for name in ("file.db", "chain.db", "folder/feedback.db", "labels/../labels/feedback.db"):
        with refused("store-locked"):
            FeedbackStore(tmp_path / name)
    store.close()
    with FeedbackStore(tmp_path / "chain.db") as again:
        assert again.path == (folder / "feedback.db").resolve()
    os.link(folder / "feedback.db", tmp_path / "hard.db")
    for path in (tmp_path / "hard.db", folder / "feedback.db"):
        with refused("store-not-writable", "has 2 hard links"):
            FeedbackStore(path)


def test_display_order_and_repeats_are_unpredictable(make_store, tmp_path):
    """The order depends on the seed, the name and the item numbers; a store keeps its salt."""

    def shown(name, **policy):
        store = make_store(64, name=name, **policy)
        found = [label(store, "ann", LEFT)[0] for _ in range(64)]
        store.close()
        return [(one.item.id, one.repeat, one.shown) for one in found]

    policy = {"repeats": 0.3, "distance": 1, "seed": 5}
    first, second = shown("a.db", **policy), shown("b.db", **policy)
    assert first != second and shown("c.db", salt="", **policy) == shown("d.db", salt="", **policy)
    calculated = [
        tuple(sorted(range(2), key=lambda place: chance(5, "side", "ann", item, place))) for item in range(1, 65)
    ]
    assert [one for _, repeat, one in first if not repeat] != calculated[
        : len([1 for _, repeat, _ in first if not repeat])
    ]
    with FeedbackStore(tmp_path / "a.db", Policy(salt="")) as again, again.reading() as connection:
        (salt,) = connection.execute("SELECT salt FROM store").fetchone()
    assert len(salt) == 32


DAMAGE = {
    "item missing": "DELETE FROM items",
    "completions missing": "DELETE FROM candidates",
    "columns are a list": "UPDATE items SET columns = '[1, 2]'",
    "columns are no JSON": "UPDATE items SET columns = '{'",
    "prompt is a number": "UPDATE items SET prompt = '7'",
    "prompt is a mapping": "UPDATE items SET prompt = '{}'",
    "turns without content": """UPDATE items SET prompt = '[{"role": "user"}]'""",
    "completion is a list of numbers": "UPDATE candidates SET completion = '[1]'",
    "sampling is invalid JSON": "UPDATE candidates SET sampling = 'x'",
    "ranks are lists": "UPDATE judgements SET ranks = '[[0], [1]]'",
    "ranks are a mapping": "UPDATE judgements SET ranks = '{}'",
    "ranks are texts": """UPDATE judgements SET ranks = '["0", "1"]'""",
    "ranks are too many": "UPDATE judgements SET ranks = '[0, 1, 2]'",
    "ranks are missing": "UPDATE judgements SET ranks = NULL",
    "sides are twice the same": "UPDATE assignments SET shown = '[0, 0]'",
    "sides are a number": "UPDATE assignments SET shown = '0'",
    "reasons are a number": "UPDATE judgements SET reasons = '1'",
    "flags are lists": "UPDATE judgements SET flags = '[[]]'",
    "deep JSON": f"UPDATE items SET columns = '{'[' * 100_000}'",
    "another verdict": "UPDATE judgements SET verdict = 'best'",
    "ranks with gaps": "UPDATE judgements SET ranks = '[0, 5]'",
    "a strength beyond the scale": "UPDATE judgements SET strength = 99",
    "seconds before the start": "UPDATE judgements SET seconds = -1",
    "an edit of no completion": "UPDATE judgements SET edited = 'x', edited_place = 7",
    "a time that is none": "UPDATE judgements SET judged = 'noon'",
}


@pytest.mark.parametrize("statement", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_store_is_refused(make_store, statement):
    store = make_store(1)
    label(store, "ann", prefer(0))
    store.close()
    connection = sqlite3.connect(store.path)
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {name}")
    connection.execute(statement)
    connection.commit()
    connection.close()
    kinds = ("preference", "unpaired", "judgement")
    for kind in kinds:
        with refused("damaged-store", "restore it from a copy"), reading(store.path) as connection:
            list(rows_of(connection, kind))
    with FeedbackStore(store.path, Policy(repeats=0.0)) as again:
        client = TestClient(make_app(again), base_url="http://localhost:1")
        client.post("/api/enter", json={"name": "bob"})
        client.post("/api/enter", json={"name": "ann"})
        for answer in (client.get("/api/item"), client.get("/results")):
            assert answer.status_code in (200, 500) and "Traceback" not in answer.text
            assert answer.status_code == 200 or "is damaged" in answer.text


@pytest.mark.parametrize("statement", ["DELETE FROM store", "INSERT INTO store VALUES ('a', 'b')"])
def test_a_store_without_its_id_is_refused(make_store, statement):
    store = make_store(1)
    store.close()
    connection = sqlite3.connect(store.path)
    connection.execute("DROP TRIGGER store_stay_DELETE")
    connection.execute(statement)
    connection.commit()
    connection.close()
    with refused("damaged-store"):
        FeedbackStore(store.path)
    with FeedbackStore(store.path.with_name("other.db")):
        pass


def test_a_second_process_is_refused(make_store, tmp_path):
    make_store(1)
    with refused("store-locked", "is open in another process"):
        FeedbackStore(tmp_path / "feedback.db")


def test_files_that_are_not_stores_are_refused(tmp_path):
    (tmp_path / "text.db").write_text("no database at all, but long enough to have a header" * 20)
    sqlite3.connect(tmp_path / "other.db").executescript("CREATE TABLE t (x); PRAGMA user_version = 1;")
    for name, reason in (("text.db", "is not a feedback store"), ("other.db", "a database, but not a feedback store")):
        with refused("not-a-store", reason):
            FeedbackStore(tmp_path / name)
        with refused("not-a-store", reason), reading(tmp_path / name):
            pass
    with refused("no-store"), reading(tmp_path / "absent.db"):
        pass
    assert not (tmp_path / "absent.db").exists()


def test_a_snapshot_is_not_changed_by_later_labels(make_store):
    store = make_store(4)
    label(store, "ann", LEFT)
    _, second = label(store, "ann", RIGHT)
    before = store.snapshot()
    assert before.upto == second
    label(store, "ann", LEFT)
    store.undo("ann", "undo key 12345678")
    store.undo("ann", "undo key 87654321")
    with reading(store.path) as connection:
        assert snapshot_of(connection, second) == before
        assert snapshot_of(connection).fingerprint != before.fingerprint
        assert len(judgements_of(connection, second)) == 2 and len(judgements_of(connection)) == 1
        with refused("no-such-snapshot", "5 rows", "99"):
            snapshot_of(connection, 99)


def test_the_same_labels_have_the_same_fingerprint(make_store):
    prints = set()
    for name, answer in (("a.db", LEFT), ("b.db", LEFT), ("c.db", RIGHT)):
        store = make_store(2, name=name, clock=lambda: 1000.0, salt="")
        label(store, "ann", answer)
        prints.add(store.snapshot().fingerprint)
    assert len(prints) == 2


def test_store_names_and_revisions_are_parsed():
    assert is_store("runs/feedback.db") and is_store("feedback.db@12") and not is_store("pairs.jsonl")
    assert split_name("a/feedback.db@12")[1] == 12 and str(split_name("a/feedback.db@12")[0]) == "a/feedback.db"
    assert split_name("me@home.db")[1] is None


def test_confirmed_labels_survive_a_kill(make_store, tmp_path):
    """A process labels and reports each label through a pipe, until it is killed."""
    make_store(2000).close()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        store = FeedbackStore(tmp_path / "feedback.db", Policy(repeats=0.0))
        while True:
            _, number = label(store, "ann", LEFT)
            os.write(writer, f"{number}\n".encode())
    os.close(writer)
    confirmed = b""
    while confirmed.count(b"\n") < 25:
        confirmed += os.read(reader, 65536)
    time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 65536):
        confirmed += more
    os.close(reader)
    with reading(tmp_path / "feedback.db") as connection:
        kept = {one.id for one in judgements_of(connection)}
    said = {int(line) for line in confirmed.split()}
    assert said <= kept and len(kept - said) <= 1
    store = FeedbackStore(tmp_path / "feedback.db", Policy(repeats=0.0))
    label(store, "ann", LEFT)
    assert store.progress("ann").judged == len(kept) + 1, "and the next process continues"
    store.close()


@pytest.mark.parametrize("asked", [FeedbackStore.next, FeedbackStore.progress, FeedbackStore.labels])
def test_request_cost_grows_at_most_linearly_with_labels(asked, make_store):
    """Cost is counted in steps of SQLite's virtual machine, which other processes do not affect."""

    def steps(labels: int) -> int:
        store = make_store(labels + 1, annotators=2)
        for _ in range(labels):
            label(store, "ann", LEFT)
        taken = [0]

        def count() -> int:
            taken[0] += 1
            return 0

        with store.reading() as connection:
            connection.set_progress_handler(count, 10)
            asked(store, "ann") if asked is not FeedbackStore.labels else asked(store)
            connection.set_progress_handler(None, 0)
        store.close()
        store.path.unlink()
        return taken[0]

    assert steps(400) < 5 * max(steps(100), 20)


COUNTED_ANEW = """
SELECT (SELECT count(*) FROM live WHERE annotator = :who AND verdict IN ('ranking', 'tie', 'both_bad')),
    (SELECT count(*) FROM live WHERE annotator = :who AND verdict = 'skip'),
    (SELECT count(*) FROM items WHERE id NOT IN (SELECT item FROM live WHERE annotator = :who) AND id NOT IN
        (SELECT item FROM live WHERE repeat = 0 AND verdict IN ('ranking', 'tie', 'both_bad')
         GROUP BY item HAVING count(*) >= :wanted)),
    (SELECT count(*) FROM live WHERE repeat = 0 AND verdict IN ('ranking', 'tie', 'both_bad')),
    (SELECT count(*) FROM assignments a WHERE repeat = 0 AND NOT EXISTS (SELECT 1 FROM live WHERE assignment = a.id)),
    (SELECT min(id) FROM assignments a WHERE annotator = :who AND
        NOT EXISTS (SELECT 1 FROM live WHERE assignment = a.id))
"""


@pytest.mark.parametrize("seed", range(3))
def test_incremental_counts_equal_recounted_ones(tmp_path, seed):
    drawn, names, made = random.Random(seed), ("ann", "bob", "eve"), 0
    policy = Policy(annotators=2, repeats=0.3, distance=2)
    store = FeedbackStore(tmp_path / "s.db", policy)
    for step in range(150):
        who = drawn.choice(names)
        action = drawn.random()
        if action < 0.15:
            made += 2
            store.add([pair(made - 1), pair(made)])
        elif action < 0.25:
            store.undo(who, f"undo------------{step}")
        elif action < 0.3:
            store.close()
            store = FeedbackStore(tmp_path / "s.db", policy)
        elif (asked := store.next(who)) is not None and drawn.random() < 0.9:
            verdict = drawn.choice(("ranking", "tie", "both_bad", "skip"))
            ranks = (0, 1) if verdict == "ranking" else None
            store.judge(who, asked.id, f"judge-----------{step}", Answer(verdict, ranks, seconds=1.0))
        for name in names:
            with store.reading() as db:
                anew = db.execute(COUNTED_ANEW, {"who": name, "wanted": 2}).fetchone()
                open_one = open_assignment(db, name)
            now = store.progress(name)
            kept = (now.judged, now.skipped, now.left, store.labels(), store.being_judged(), open_one and open_one[0])
            assert kept == anew, (step, name)
            assert now.seconds == (1.0 if now.judged else 0.0)
    store.close()


def test_the_cost_of_a_judgement_does_not_grow_with_the_store(tmp_path):
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    with FeedbackStore(tmp_path / "s.db", Policy(annotators=2, repeats=0.0)) as store:
        store.add(pair(number) for number in range(700))
        work = []
        for number in range(1300):
            who = f"ann{number % 4}"
            if number in (100, 1200):
                with store.reading() as db:
                    db.set_progress_handler(count, 10)
            label(store, who, Answer("tie"))
            store.progress(who)
            if number in (140, 1240):
                with store.reading() as db:
                    db.set_progress_handler(None, 0)
                work.append(steps)
                steps = 0
    assert work[1] < 3 * work[0]
