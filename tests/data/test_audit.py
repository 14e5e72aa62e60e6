"""An audit finds planted problems in rows, and reports nothing on clean rows."""

import os
import signal
import time

import numpy as np
import pytest
from conftest import refused
from forked import forked
from tiny_models import tiny_tokenizer as word_tokenizer

from rlhf_lightning.data.audit import CHECKS, SHORTCUT, Audit
from rlhf_lightning.data.canonical import REASONS, Report
from rlhf_lightning.data.defects import NGrams, Preferences, SimilarTexts
from rlhf_lightning.data.files import UNREADABLE
from rlhf_lightning.data.formats import kind_of
from rlhf_lightning.data.tokenizing import encoder_for
from rlhf_lightning.runs.interruptions import has_ended
from rlhf_lightning.workers import in_forks


def pair(prompt, chosen, rejected, **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def turn(role, content):
    return {"role": role, "content": content}


def audited(kind, rows, **settings):
    audit = Audit(kind, **settings)
    list(audit.add(rows))
    return audit, {found.check: found.rows for found in audit.findings()}


def test_every_finding_has_a_description():
    assert not set(CHECKS) & set(REASONS)


def test_clean_rows_have_no_finding():
    rows = [pair(f"p{i}", "good"[: i % 3 + 1], "bad"[: (i + 1) % 3 + 1]) for i in range(30)]
    audit, found = audited("preference", rows)
    assert found == {} and (audit.read, audit.usable, audit.repeated_prompts) == (30, 30, 0)


def test_duplicates_are_exact_or_nearly_so():
    rows = [
        pair("p", "a b", "c"),
        pair("p", "a b", "c"),
        pair("P ", "A  b", "ｃ"),
        pair("p", "c", "a b"),
        pair("q", "a", "c"),
    ]
    audit, found = audited("preference", rows)
    assert found["duplicate"] == [2] and found["near_duplicate"] == [3] and audit.repeated_prompts == 3
    assert audit.found["duplicate"].first == [1]
    assert found["both_ways"] == [1, 2, 3, 4]


def test_rows_that_training_drops_are_named_by_reason():
    audit, found = audited("preference", [pair("p", "a", "a"), UNREADABLE, pair("p", "a", "A"), pair("", "a", "b")])
    assert found == {
        "unreadable_line": [2], "empty_prompt": [4], "identical_completions": [1], "near_identical": [3],
    }  # fmt: skip
    assert audit.usable == 1


def test_preference_cycles_are_found():
    rows = [pair("p", "a", "b"), pair("p", "b", "c"), pair("p", "c", "a"), pair("p", "a", "d"), pair("q", "c", "a")]
    assert audited("preference", rows)[1]["circle"] == [1, 2, 3]
    ranked = [{"prompt": "p", "completions": ["a", "b", "c"]}, {"prompt": "p", "completions": ["c", "d", "a"]}]
    found = audited("preference", ranked)[1]
    assert found["both_ways"] == [1, 2] and found["circle"] == [1, 2]
    tie = [pair("p", "a", "b", preference=0.5), pair("p", "b", "a")]
    assert "both_ways" not in audited("preference", tie)[1]
    soft = [pair("p", "a", "b", preference=0.2), pair("p", "b", "a")]
    assert "both_ways" not in audited("preference", soft)[1], "both say that b is better"


def test_long_ranked_lists_compare_only_neighbours():
    preferences = Preferences()
    preferences.add(1, 0, range(100), range(100))
    assert len(preferences.rows) == 99
    preferences.add(2, 0, [50, 49], [0, 1])
    assert preferences.contradictions() == ([1, 2], [])


def test_contradicting_labels_of_one_completion_are_found():
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, True, False)]
    found = audited("unpaired", rows)[1]
    assert found["both_ways"] == [1, 3] and found["duplicate"] == [2]


def test_length_that_predicts_the_label_is_found():
    long = [pair(f"p{i}", "longer", "short") for i in range(60)]
    audit, found = audited("preference", long)
    shortcut = audit.length_shortcut()
    assert found["longer_wins"] == [] and shortcut.accuracy == 1 and shortcut.low > SHORTCUT and shortcut.rows == 60
    assert "shorter_wins" in audited("preference", [pair(f"p{i}", "short", "longer") for i in range(60)])[1]
    assert (
        audited("preference", [pair(f"p{i}", "same", "size") for i in range(60)])[0].length_shortcut().accuracy == 0.5
    )
    ranked = [{"prompt": "p", "completions": ["aaa", "b", "cc"]}]
    assert audited("preference", ranked)[0].length_shortcut().accuracy == pytest.approx(2 / 3)


def test_turns_out_of_order_are_found():
    ask, say, rule = turn("user", "q"), turn("assistant", "a"), turn("system", "s")
    rows = [
        {"prompt": [ask, say], "completion": "c"},
        {"prompt": [ask, rule], "completion": "c"},
        {"prompt": [ask, turn("user", "r")], "completion": "c"},
        {"prompt": [turn("user", "x\nAssistant: y")], "completion": "c"},
        {"prompt": [rule, ask], "completion": "c"},
    ]
    assert audited("sft", rows)[1] == {
        "open_prompt": [1], "no_question": [2], "repeated_role": [3], "late_system": [2], "second_speaker": [4],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("a\ufffdb", "replacement"), ("cafÃ©", "mojibake"), ("itâ€™s", "mojibake"), ("a\x07", "control"),
        ("a\x9f", "control"), ("a\u202eb", "invisible"), ("a\U000e0041", "invisible"), ("a<|im_end|>", "control_token"),
    ],
)  # fmt: skip
def test_damaged_text_is_found(text, check):
    assert audited("sft", [{"prompt": text, "completion": "café – ça va?\t\n"}])[1] == {check: [1]}


@pytest.mark.parametrize(
    "filler", ["\n", " ", "\t\n", "<", "<|", "[", "</", "#", "Human", "Human :", "\u200b", "Ã", "â€"]
)
def test_long_repetitive_texts_are_audited_in_linear_time(filler):
    began, text = time.monotonic(), filler * (400_000 // len(filler))
    audited("sft", [{"prompt": [turn("user", f"x{text}x")], "completion": f"x{text}x"}], similar=0.8)
    assert time.monotonic() - began < 20


def test_unknown_tokens_are_counted():
    """Also those of the chat template's own words; the report of training counts the same."""
    tokenizer = word_tokenizer()
    rows = [{"prompt": "w10 w11", "completion": "w12"}, {"prompt": "w10 new", "completion": "w12 newer"}]
    audit, found = audited("sft", rows, tokenizer=tokenizer)
    assert found["unknown_token"] == [2] and (audit.tokens, audit.unknown_tokens) == (9, 2)
    report = Report()
    encoder_for("sft").counted(tokenizer, rows, report)
    assert "; 1 contain tokens unknown to the tokenizer (22.2 % of all tokens)" in report.describe("rows")
    assert report.metrics["data/unknown_tokens"] == 2
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "{{ bos_token }}Today ")
    chats = [{"messages": [turn("user", "w10"), turn("assistant", "w11")]}]
    assert audited("sft", chats, tokenizer=tokenizer)[1] == {"unknown_token": [1]}


def test_truncated_tokens_are_counted(tiny_tokenizer):
    rows = [
        {"prompt": "p" * 6, "completion": "c" * 5},  # 12 tokens including the end token
        {"prompt": "p" * 30, "completion": "c" * 3},
        {"prompt": "p" * 30, "completion": "c" * 10},
        {"prompt": "p", "completion": "<eos>"},
    ]
    audit, found = audited("sft", rows, tokenizer=tiny_tokenizer, max_length=12)
    assert found["prompt_cut"] == [2, 3] and found["completion_cut"] == [3] and found["control_token"] == [4]
    assert audit.quantiles((0.0, 1.0)) == [7, 41]
    _, found = audited("sft", rows[1:2], tokenizer=tiny_tokenizer, max_length=12, max_prompt_length=10)
    assert found["prompt_crowds_out"] == found["completion_cut"] == [1]
    _, found = audited("prompt", rows[:2], tokenizer=tiny_tokenizer, max_length=12)
    assert found == {"prompt_cut": [2]}


def test_evaluation_rows_in_the_training_data_are_found():
    train, _ = audited("preference", [pair("p", "a", "b"), pair("q", "a", "b")])
    audit = Audit("preference")
    audit.compare([pair("p", "A", "b"), pair("Q", "x", "y"), pair("r", "a", "b"), UNREADABLE], train)
    found = {one.check: one.rows for one in audit.findings()}
    assert found == {"leaked_row": [1], "leaked_prompt": [2], "unreadable_line": [4]}


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ("prompt completions labels", "process"), ("prompt completions", "preference"),
        ("chosen rejected", "preference"), ("prompt completion label", "unpaired"), ("prompt completion", "sft"),
        ("messages id", "sft"), ("prompt", "prompt"),
    ],
)  # fmt: skip
def test_columns_determine_the_kind_of_data(columns, kind):
    assert kind_of(columns.split(), "rows") == kind


def test_unknown_columns_are_named():
    with refused("no-accepted-form", "rows has the columns 'promt'", "Did you mean 'prompt' by 'promt'?"):
        kind_of(["promt"], "rows")


def words(lot, count):
    return [f"word{lot.integers(0, 5000)}" for _ in range(count)]


def jaccard(one, other):
    sets = [{tuple(text[place : place + 5]) for place in range(len(text) - 4)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_minhash_estimates_the_jaccard_similarity():
    lot, texts = np.random.default_rng(0), SimilarTexts(0.8)
    for changed in (0, 3, 10, 40):
        errors = []
        for _ in range(20):
            one = words(lot, 200)
            other = [*one[:-changed], *words(lot, changed)] if changed else list(one)
            agreement = (texts.signature(" ".join(one)) == texts.signature(" ".join(other))).mean()
            errors.append(agreement - jaccard(one, other))
        assert abs(np.mean(errors)) < 0.03 and np.max(np.abs(errors)) < 0.17


def test_only_similar_rows_are_found():
    lot, rows, planted = np.random.default_rng(1), [], []
    for number in range(120):
        text = words(lot, 120)
        if number % 10 == 9:
            text = [*rows[number - 5].split()[:-4], *words(lot, 4)]
            planted.append(number + 1)
        rows.append(" ".join(text))
    audit, found = audited("sft", [{"text": row} for row in rows], similar=0.8)
    assert found["similar"] == planted
    assert audit.found["similar"].first == [number - 5 for number in planted]
    assert "similar" not in audited("sft", [{"text": row} for row in rows])[1]
    repeated = [{"text": rows[0]}, {"text": rows[0]}, {"text": rows[0].upper()}]
    assert set(audited("sft", repeated, similar=0.8)[1]) == {"duplicate", "near_duplicate"}


def test_evaluation_rows_that_overlap_with_the_training_data():
    lot = np.random.default_rng(2)
    train = [words(lot, 80) for _ in range(30)]
    shared = [*words(lot, 40), *train[7][20:33], *words(lot, 40)]
    twelve = [*words(lot, 40), *train[8][20:32], *words(lot, 40)]
    near = [*train[3][:-2], "other", "end"]
    settings = {"similar": 0.8, "overlap": 13}
    trained, _ = audited("sft", [{"text": " ".join(row)} for row in train], **settings)
    audit = Audit("sft", **settings)
    audit.compare([{"text": " ".join(row)} for row in (shared, twelve, near, words(lot, 90), train[5])], trained)
    found = {one.check: one.rows for one in audit.findings()}
    assert found == {"overlap": [1, 3, 5], "leaked_similar": [3], "leaked_row": [5]}


def test_ngram_overlap_by_hand():
    grams = NGrams(2)
    assert grams.share("a b") == 0.0
    grams.add("a b c")
    assert grams.share("a b d") == 0.5 and grams.share("b c") == 1.0 and grams.share("a") == 0.0
    grams.add("b d")
    assert grams.share("a b d") == 1.0


def test_forked_workers_find_the_same_as_one_process(tiny_tokenizer, monkeypatch):
    lot = np.random.default_rng(3)
    said = ["good", "Good", "bad\u200b", "a longer answer", "<eos>"]
    rows = [pair(f"p{a}", said[b], said[c]) for a, b, c in lot.integers([40, 5, 5], size=(300, 3))]
    rows[70] = UNREADABLE
    rows[90] = pair([turn("user", "q"), turn("assistant", "a")], "x\nHuman: y", "z")
    settings = {"tokenizer": tiny_tokenizer, "max_length": 12, "similar": 0.8}
    alone, found = audited("preference", rows, **settings)
    monkeypatch.setattr("rlhf_lightning.data.audit.CHUNK", 16)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    forked, also = audited("preference", rows, **settings)
    assert also == found and len(found) > 6
    assert forked.quantiles() == alone.quantiles() and forked.length_shortcut() == alone.length_shortcut()


def test_forked_workers_return_results_in_order_and_exit():
    here = os.getpid()
    found = list(in_forks(lambda number: (number * number, os.getpid()), range(50), 3))
    assert [square for square, _ in found] == [number * number for number in range(50)]
    workers = {process for _, process in found} - {here}
    assert len(workers) == 3 and all(map(has_ended, workers))
    begun = in_forks(lambda number: os.getpid(), range(50), 3)
    workers = {next(begun) for _ in range(9)} - {here}
    begun.close()
    assert workers and all(map(has_ended, workers))


def test_forked_workers_exit_with_their_parent(tmp_path):
    def killed():
        begun = in_forks(lambda number: os.getpid(), range(50), 3)
        workers = {next(begun) for _ in range(9)} - {os.getpid()}
        (tmp_path / "workers").write_text(" ".join(map(str, workers)))
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(killed, tmp_path / "said")[0] == -signal.SIGKILL
    workers, deadline = list(map(int, (tmp_path / "workers").read_text().split())), time.monotonic() + 20
    while not all(map(has_ended, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(workers) == 3


def test_work_of_a_killed_worker_is_done_by_the_parent():
    here = os.getpid()

    def work(number):
        if number == 20 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 40:
            raise ValueError("the 40th")
        return number

    assert list(in_forks(work, range(40), 2)) == list(range(40))
    with pytest.raises(ValueError, match="the 40th"):
        list(in_forks(work, range(50), 2))
    unpicklable = in_forks(lambda number: lambda: number, range(10), 2)
    assert [one() for one in unpicklable] == list(range(10))
    parts = [(lambda n=n: n) for n in range(10)]
    assert list(in_forks(lambda part: part(), parts, 2)) == list(range(10))
