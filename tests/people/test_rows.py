"""Test conversion of judgements to rows, and of a store to batches and runs."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import refused
from tiny_folders import policy_folder, reward_folder  # noqa: F401

from rlhf_lightning.data import PreferenceDataModule, PromptDataModule, SFTDataModule, UnpairedDataModule
from rlhf_lightning.data.feedback.database import reading
from rlhf_lightning.data.feedback.records import Answer, Candidate, Item
from rlhf_lightning.data.feedback.rows import rows_of
from rlhf_lightning.data.files import read_file
from rlhf_lightning.data.sources import at_snapshot, parse_sources
from rlhf_lightning.people.annotate import export
from rlhf_lightning.people.results import annotator_results, judgements_of
from rlhf_lightning.types import PreferenceBatch, RankedBatch

from .conftest import LEFT, label, pair, prefer, ranked_item

NEITHER = Answer("tie")


def rows(store, kind="preference", **how):
    with reading(store.path) as connection:
        return list(rows_of(connection, kind, **how))


def test_one_judgement_becomes_one_preference_row(make_store):
    store = make_store([pair(0), pair(1)])
    label(store, "ann", prefer(1, strength=3, flags=("harmful",)))
    (row,) = rows(store)
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("question 0", "poor 0", "good 0")
    assert (row["preference"], row["margin"]) == (1.0, pytest.approx(2 / 3))
    assert (row["item"], row["judgements"], row["flags"], row["topic"]) == (1, 1, ["harmful"], "t0")
    assert row["models"] == ["models/b", "models/a"]


FORM_COLUMNS = [
    "messages", "prompt", "completion", "instruction", "output", "input", "text", "chosen", "rejected", "completions",
    "completion_1", "completion_2", "label", "labels", "ranks", "preference", "margin", "weight",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["preference", "unpaired", "demonstration", "prompt"])
@pytest.mark.parametrize("count", [2, 3])
def test_prompt_columns_cannot_overwrite_label_columns(make_store, ready, kind, count):
    """Columns of the prompt file never change labels or the training of a row."""
    plain, filled = ({"topic": "t"}, {"topic": "t", **{name: "from the file" for name in FORM_COLUMNS}})
    filled |= {"weight": 9.0, "margin": 3.0, "preference": 0.1, "label": False, "ranks": [1, 0, 0], "labels": [0]}
    modules = {"preference": PreferenceDataModule, "unpaired": UnpairedDataModule, "demonstration": SFTDataModule}
    seen = []
    for name, columns in (("plain.db", plain), ("filled.db", filled)):
        candidates = tuple(Candidate(f"answer {n}") for n in range(count))
        store = make_store([Item(f"q {n}", candidates, columns) for n in range(4)], name=name, salt="")
        for _ in range(4):
            label(store, "ann", lambda asked: Answer("ranking", tuple(asked.shown), edited="e", edited_place=0))
        seen.append((rows(store, kind), batches(ready(modules.get(kind, PromptDataModule)(str(store.path))))))
    assert seen[0][0] == seen[1][0] and all(row["topic"] == "t" for row in seen[1][0])
    assert repr(seen[0][1]) == repr(seen[1][1])


def test_several_judgements_of_a_pair_are_averaged(make_store):
    store = make_store([pair(0)], annotators=4)
    for name, answer in (("a", prefer(0, strength=4)), ("b", prefer(0, strength=2)), ("c", prefer(1, strength=4)),
                         ("d", NEITHER)):  # fmt: skip
        label(store, name, answer)
    (row,) = rows(store)
    assert row["chosen"] == "good 0" and row["preference"] == pytest.approx(2.5 / 4)
    assert row["margin"] == pytest.approx((1 + 1 / 3 - 1) / 4), "strength 4 is 1, 2 is a third, against is negative"


@pytest.mark.parametrize("answer", [NEITHER, Answer("both_bad")])
def test_ties_are_half_a_preference(make_store, answer):
    store = make_store([pair(0)])
    label(store, "ann", answer)
    assert [(row["preference"], row["margin"]) for row in rows(store)] == [(0.5, 0.0)]


def test_skips_repeats_and_undone_judgements_are_left_out(make_store):
    store = make_store(30, repeats=0.5, distance=1)
    asked = []
    while store.next("ann") is not None and len(asked) < 40:
        asked.append(label(store, "ann", Answer("skip") if not asked else prefer(len(asked) % 2))[0])
    store.undo("ann", "undo key 12345678")
    first = [one for one in asked[:-1] if not one.repeat]
    assert len(rows(store)) == len(first) - 1 and any(one.repeat for one in asked)


def test_rankings_share_the_weight_of_their_item(make_store):
    store = make_store([ranked_item(0)], annotators=2)
    label(store, "ann", lambda asked: Answer("ranking", tuple(asked.shown)))
    label(store, "bob", lambda asked: Answer("ranking", tuple(int(place > 0) for place in asked.shown)))
    first, second = rows(store)
    assert (first["ranks"], second["ranks"]) == ([0, 1, 2, 3], [0, 1, 1, 1])
    assert first["weight"] == second["weight"] == 0.5
    assert first["completions"] == ["answer 0", "answer 1", "answer 2", "answer 3"]


def test_single_completions_become_unpaired_rows(make_store):
    store = make_store([pair(0), pair(1), pair(2), ranked_item(3, 3)], annotators=2)
    for answers in ((prefer(0), Answer("both_bad"), NEITHER), (prefer(0), NEITHER, NEITHER)):
        name = f"annotator-{len(answers)}-{id(answers)}"
        for answer in answers:
            label(store, name, answer)
        label(store, name, lambda asked: Answer("ranking", tuple(asked.shown)))
    found = [(row["completion"], row["label"], row["weight"]) for row in rows(store, "unpaired")]
    assert found == [
        ("good 0", True, 1.0), ("poor 0", False, 1.0),
        ("good 1", False, 0.5), ("poor 1", False, 0.5),  # of two annotators, one said bad and one had no opinion
        ("answer 0", True, 1.0), ("answer 2", False, 1.0),  # the middle one carries no information, like ties
    ]  # fmt: skip


def test_edited_completions_become_demonstrations(make_store):
    store = make_store([pair(0), ranked_item(1)])
    label(store, "ann", Answer("skip", edited="much better", edited_place=0))
    label(store, "ann", Answer("tie", edited="best", edited_place=3))
    first, second = rows(store, "demonstration")
    assert (first["prompt"], first["completion"]) == ("question 0", "much better")
    assert second["completion"] == [{"role": "assistant", "content": "best"}]


def test_reliability_downweights_random_annotators(make_store):
    """Four annotators agree on every item; the fifth contradicts them half of the time, without changing the result."""
    store = make_store(24, annotators=5)
    for n in range(24):
        for name in "abcd":
            label(store, name, prefer(0))
        label(store, "random", prefer(n % 2))
    with reading(store.path) as connection:
        known = {one.name: one.reliability for one in annotator_results(judgements_of(connection))}
    assert known["random"] == pytest.approx(0.5, abs=0.05) and min(known[name] for name in "abcd") > 0.95
    plain, aware = rows(store), rows(store, labels="reliability")
    assert sorted({row["preference"] for row in plain}) == [0.8, 1.0]
    assert min(row["preference"] for row in aware) > 0.99


def test_labels_can_be_filtered_by_annotator(make_store, ready, tmp_path):
    """Train on some annotators and evaluate on others."""
    store = make_store(2, annotators=3)
    for _ in range(2):
        for name, answer in (("ann", prefer(0)), ("bob", prefer(1)), ("cat", prefer(1))):
            label(store, name, answer)
    assert [row["chosen"] for row in rows(store, annotators=["ann"])] == ["good 0", "good 1"]
    assert [row["judgements"] for row in rows(store, annotators=["bob", "cat"])] == [2, 2]
    with refused("unknown-annotator", "dan", "ann, bob, cat"):
        rows(store, annotators=["dan"])
    path = str(store.path)
    data = ready(PreferenceDataModule([{"path": path, "annotators": ["ann"]}],
                                      eval_source=[{"path": path, "annotators": ["bob", "cat"]}]))  # fmt: skip
    other = ready(PreferenceDataModule([{"path": path, "annotators": ["bob"]}]))
    assert data.fingerprint != other.fingerprint
    with refused("annotators-without-store", "pairs.jsonl"):
        PreferenceDataModule([{"path": "pairs.jsonl", "annotators": ["ann"]}])
    out = tmp_path / "bob.jsonl"
    assert export(path, str(out), annotators="bob, cat") == 0
    assert {json.loads(line)["chosen"] for line in out.read_text().splitlines()} == {"poor 0", "poor 1"}


def test_consistency_and_side_bias_are_measured(make_store):
    store = make_store(60, repeats=0.4, distance=2)
    while store.next("left") is not None:
        label(store, "left", LEFT)
    with reading(store.path) as connection:
        (one,) = annotator_results(judgements_of(connection))
    assert one.left.share == 1 and one.left.low > 0.9 and one.left.size == one.judged
    assert one.consistency.share == 0 and one.consistency.size > 10, (
        "always left is the other one when sides are swapped"
    )


# ---- training ----


@pytest.fixture
def labelled(make_store):
    store = make_store([*(pair(n) for n in range(6)), ranked_item(9)], annotators=2)
    for name in ("ann", "bob"):
        for n in range(6):
            label(store, name, prefer(0, strength=4) if n < 5 or name == "ann" else NEITHER)
        label(
            store, name, lambda asked: Answer("ranking", tuple(asked.shown), edited="as it should be", edited_place=0)
        )
    return store


def batches(data):
    return [batch for step in data.train_dataloader() for batch in step.micro_batches]


def test_datamodules_read_a_store(labelled, ready):
    store = str(labelled.path)
    (pairs,) = batches(ready(PreferenceDataModule(store), batch_type=PreferenceBatch))
    assert len(pairs.target) == 6 + 2 * 6, "two rankings of four are six pairs each"
    assert sorted(pairs.target.tolist()) == pytest.approx([0.75] + [1.0] * 17)
    assert sorted(pairs.margin.tolist()) == pytest.approx([0.0] * 12 + [0.5] + [1.0] * 5)
    (groups,) = batches(ready(PreferenceDataModule(store), batch_type=RankedBatch))
    assert groups.weights.sum() == 7
    (alone,) = batches(ready(UnpairedDataModule(store)))
    assert alone.desirable.sum() == 8 and len(alone.desirable) == 16
    demonstrations = ready(SFTDataModule(store))
    assert len(demonstrations.store) == 2 and demonstrations.report.unused == {}, "the store's own record is not noise"
    assert len(ready(PromptDataModule(store)).store) == 7


def test_new_labels_do_not_change_a_started_run(labelled, ready):
    source = at_snapshot(str(labelled.path))
    assert source.endswith(f"feedback.db@{labelled.snapshot().upto}") and at_snapshot(source) == source
    (by_itself,) = parse_sources(str(labelled.path))
    assert by_itself.path == source
    before = ready(PreferenceDataModule(source))
    labelled.undo("ann", "undo key 12345678")
    after = ready(PreferenceDataModule(source))
    assert (after.fingerprint, after.snapshots) == (before.fingerprint, before.snapshots)
    newer = ready(PreferenceDataModule(str(labelled.path)))
    assert newer.fingerprint != before.fingerprint and newer.snapshots != before.snapshots
    other = ready(PreferenceDataModule([{"path": source, "labels": "reliability"}]))
    assert other.fingerprint != before.fingerprint and other.snapshots == before.snapshots


def test_invalid_stores_are_refused(tmp_path, labelled):
    with refused("no-store"):
        PreferenceDataModule(str(tmp_path / "absent.db"))
    with refused("not-with-streaming", "feedback store"):
        PreferenceDataModule(str(labelled.path), streaming=True, steps_per_epoch=1)
    with refused("unknown-choice", "'median'"):
        PreferenceDataModule([{"path": str(labelled.path), "labels": "median"}])


def test_exported_files_give_the_same_batches_as_the_store(labelled, ready, tmp_path):
    for kind, module in (("preference", PreferenceDataModule), ("unpaired", UnpairedDataModule)):
        out = str(tmp_path / f"{kind}.jsonl")
        assert export(str(labelled.path), out, kind) == 0
        (mine,), (theirs,) = batches(ready(module(out))), batches(ready(module(str(labelled.path))))
        assert torch.equal(mine.weights, theirs.weights)
        assert [ids.tolist() for ids in mine.sequences.completions] == [
            ids.tolist() for ids in theirs.sequences.completions
        ]


def test_plain_pairs_are_exported_to_parquet(make_store, tmp_path):
    store = make_store(3)
    label(store, "ann", prefer(0))
    out = tmp_path / "pairs.parquet"
    assert export(str(store.path), str(out)) == 0
    (row,) = read_file(out)
    assert (row["chosen"], row["models"]) == ("good 0", ["models/a", "models/b"])
    assert export(str(store.path), str(tmp_path / "raw.jsonl"), "judgement") == 0
    raw = json.loads((tmp_path / "raw.jsonl").read_text())
    assert (raw["annotator"], raw["verdict"]) == ("ann", "ranking")
    store.add([ranked_item(7)])
    for _ in range(3):
        label(store, "ann", NEITHER)
    with refused("not-tabular", "do not fit one table", "write .jsonl instead"):
        export(str(store.path), str(out))  # a text and a list of messages in one column
    with refused("no-usable-rows", "no labels of kind demonstration"):
        export(str(store.path), str(out), "demonstration")
    with refused("wrong-file-ending", "pairs.csv does not end in .jsonl or .parquet"):
        export(str(store.path), "pairs.csv")


def test_reward_model_and_dpo_train_from_the_store(make_store, policy_folder, tmp_path, monkeypatch):  # noqa: F811
    """config.yaml has the row number and the manifest the fingerprint, so a later rerun gives the same result."""
    from rlhf_lightning.commands.train import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    labelled = make_store([pair(n, "w10", "w11") for n in range(6)])  # words that the tiny model knows
    for _ in range(6):
        label(labelled, "bob", prefer(0, strength=4))
    upto, fingerprint = labelled.snapshot()
    common = ["--model.init_from", policy_folder, "--data", "PreferenceDataModule", "--data.source", "feedback.db",
              "--data.batch_size", "4", "--samples.prompts", "0", "--trainer.accelerator", "cpu"]  # fmt: skip
    losses = []
    for model in ("DPOModule", "RewardModule"):
        first = run(["fit", "--model", model, *common])
        config = yaml.safe_load((first.folder / "config.yaml").read_text())
        assert config["data"]["init_args"]["source"] == f"feedback.db@{upto}"
        manifest = json.loads((first.folder / "manifest.json").read_text())
        assert manifest["data"]["snapshots"] == {f"feedback.db@{upto}": fingerprint}
        losses.append((first.folder, first.trainer.callback_metrics["train/loss"]))
    labelled.undo("bob", "undo key 12345678")
    for folder, loss in losses:
        again = run(["fit", "--config", str(Path(folder) / "config.yaml")])
        assert again.trainer.callback_metrics["train/loss"] == loss
