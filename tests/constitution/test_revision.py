"""Test rounds of critique and revision: the requests, the excluded answers, and independence of how work is split."""

import pytest
from conftest import refused

from rlhf_lightning.constitution.principles import ComparingPrinciple, Constitution, RevisingPrinciple
from rlhf_lightning.constitution.revision import (
    REASONS,
    RevisionSettings,
    Written,
    demonstrations,
    drawn_principle,
    refusal_of,
    revise,
    revision_report,
)

RULES = Constitution("t", 1, "en", tuple(RevisingPrinciple(n, f"Criticise {n}.", f"Revise {n}.") for n in "abc"))
PROMPTS = [[{"role": "user", "content": f"question {number}"}] for number in range(4)]


class Echo:
    """Writes the request that it got and its episode number."""

    name = "echo"

    def __init__(self, **spoilt: Written | None) -> None:
        self.spoilt = spoilt
        self.asked: list[tuple] = []

    def __call__(self, prompts, episodes):
        written = []
        for prompt, episode in zip(prompts, episodes, strict=True):
            said = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            self.asked.append((said, episode))
            last = said.rstrip(":").splitlines()[-1]  # the last line of a transcript is the header of the text to write
            kind = "critique" if last.startswith("Crit") else "revision" if last.startswith("Revis") else "answer"
            written.append(self.spoilt.get(kind, Written(f" {kind} in episode {episode} ", True)))
        return written


def test_each_round_revises_the_previous_revision():
    writer = Echo()
    (chain,) = revise(writer, RULES, PROMPTS[:1], RevisionSettings(rounds=2))
    assert chain.answer == "answer in episode 0"
    first, second = chain.rounds
    assert (first.parent, first.critique, first.revision) == (
        "answer in episode 0", "critique in episode 1", "revision in episode 2",
    )  # fmt: skip
    assert (second.parent, second.revision) == ("revision in episode 2", "revision in episode 4") and chain.last
    assert [episode for _, episode in writer.asked] == [0, 1, 2, 3, 4]
    assert [said for said, _ in writer.asked[1:]] == [
        f"Criticise {first.principle}.", f"Revise {first.principle}.",
        f"Criticise {second.principle}.", f"Revise {second.principle}.",
    ]  # fmt: skip


def test_without_critique_only_the_revision_is_requested():
    writer = Echo()
    (chain,) = revise(writer, RULES, PROMPTS[:1], RevisionSettings(rounds=1, critique=False))
    assert [episode for _, episode in writer.asked] == [0, 2] and chain.rounds[0].critique is None
    assert chain.rounds[0].revision == "revision in episode 2", "the episode is the same as with a critique"


def test_revising_in_chunks_equals_revising_at_once():
    settings = RevisionSettings(rounds=3, seed=7)
    whole = revise(Echo(), RULES, PROMPTS, settings)
    parts = revise(Echo(), RULES, PROMPTS[:1], settings) + revise(Echo(), RULES, PROMPTS[1:], settings, start=1)
    assert whole == parts
    assert len({chain.last for chain in whole}) == 4


def test_principles_are_drawn_without_replacement():
    drawn = [[drawn_principle(RULES, 0, number, turn).id for turn in range(1, 7)] for number in range(300)]
    assert all(sorted(one[:3]) == sorted(one[3:]) == ["a", "b", "c"] for one in drawn)
    assert all(abs(sum(one[0] == name for one in drawn) / 300 - 1 / 3) < 0.1 for name in "abc")
    assert drawn[0] != [drawn_principle(RULES, 1, 0, turn).id for turn in range(1, 7)] or drawn[1] != drawn[0]


GOOD = Written("A better answer.", True)


@pytest.mark.parametrize(
    ("critique", "revision", "reason"),
    [
        ("Harsh.", GOOD, ""),
        ("Harsh.", Written("", True), "empty"),
        ("", GOOD, "empty"),
        ("I'm sorry, but I will not.", GOOD, "refused"),
        ("**I’m sorry**", GOOD, "refused"),
        ("As an AI I find it harsh.", GOOD, "refused"),
        ("Harsh.", Written("Revision: a better answer.", True), "meta"),
        ("Harsh.", Written("Here's the revised answer: ...", True), "meta"),
        ("Harsh.", Written("*Revised answer* ...", True), "meta"),
        ("Harsh.", Written("The  first\nanswer.", True), "unchanged"),
        ("Harsh.", Written("A better ans", False), "unfinished"),
        ("Harsh.", None, "too_long"),
        (None, GOOD, "too_long"),
        ("Harsh.", Written("Sorrel is a plant. Heretics wrote of it.", True), ""),
    ],
)
def test_unusable_revisions_are_rejected_with_a_reason(critique, revision, reason):
    settings = RevisionSettings()
    assert refusal_of(RULES, "The first answer.", critique, revision, settings) == reason
    assert reason in {"", *REASONS}
    if reason == "unfinished":
        assert not refusal_of(RULES, "The first answer.", critique, revision, RevisionSettings(keep_unfinished=True))


def test_after_a_rejected_revision_the_next_round_revises_the_last_good_answer():
    class Once(Echo):
        def __call__(self, prompts, episodes):
            drawn = super().__call__(prompts, episodes)
            return [
                Written("Revision: of mine", True) if e == 2 else one for one, e in zip(drawn, episodes, strict=True)
            ]

    (chain,) = revise(Once(), RULES, PROMPTS[:1], RevisionSettings(rounds=2))
    assert [one.refused for one in chain.rounds] == ["meta", ""]
    assert chain.rounds[1].parent == chain.answer
    assert [(row["round"], row["completion"]) for row in demonstrations(chain, "all")] == [(2, "revision in episode 4")]


def test_mix_last_gives_one_row_and_all_one_per_round():
    (chain,) = revise(Echo(), RULES, PROMPTS[:1], RevisionSettings(rounds=3))
    (last,), every = list(demonstrations(chain, "last")), list(demonstrations(chain, "all"))
    assert last == every[-1] and [row["round"] for row in every] == [1, 2, 3]
    assert every[0] == {
        "prompt": PROMPTS[0], "completion": "revision in episode 2", "principle": chain.rounds[0].principle,
        "round": 1, "parent": "answer in episode 0", "critique": "critique in episode 1",
    }  # fmt: skip


def test_empty_and_overlong_answers_are_not_revised():
    for first in (Written("  ", True), None):
        (chain,) = revise(Echo(answer=first), RULES, PROMPTS[:1], RevisionSettings(rounds=2))
        assert chain.rounds == () and not list(demonstrations(chain, "all"))
        report = revision_report([chain])
        assert (report["no_answer"], report["revised_prompts"], report["rounds"]) == (1, 0, [])


def test_an_overlong_critique_leaves_the_answer_unchanged():
    writer = Echo(critique=None)
    (chain,) = revise(writer, RULES, PROMPTS[:1], RevisionSettings(rounds=1))
    assert chain.rounds[0].refused == "too_long" and chain.last == chain.answer
    assert [episode for _, episode in writer.asked] == [0, 1], "no revision is asked for"


def test_a_plain_completion_is_truncated_at_the_next_speaker():
    long = Written(" Fine.\n\nHuman: And?\n\nAssistant: More", False)
    (chain,) = revise(Echo(revision=long), RULES, ["plain question"], RevisionSettings(rounds=1))
    assert chain.rounds[0].revision == "Fine." and not chain.rounds[0].refused, "it ended by itself"
    (row,) = demonstrations(chain, "last")
    assert row["prompt"] + row["completion"] == "plain question Fine."


def test_report_values_by_hand():
    chains = revise(Echo(), RULES, PROMPTS[:2], RevisionSettings(rounds=2))
    chains += revise(Echo(revision=Written("", True)), RULES, PROMPTS[2:], RevisionSettings(rounds=2), start=2)
    report = revision_report(chains)
    assert (report["prompts"], report["revised_prompts"], report["no_answer"]) == (4, 2, 0)
    first = report["rounds"][0]
    assert (first["revisions"], first["kept"], first["refused"]) == (4, 2, {"empty": 2})
    ratios = [len(one.rounds[0].revision) / len(one.answer) for one in chains[:2]]
    assert first["length_ratio"] == pytest.approx(sum(ratios) / 2)
    assert sum(report["by_principle"].values()) == 4


def test_invalid_settings_are_refused():
    for rounds in (0, 32):
        with refused("setting-out-of-range", f"rounds is {rounds}", "it must be between 1 and 31"):
            RevisionSettings(rounds=rounds)
    bare = Constitution("bare", 1, "en", comparing=(ComparingPrinciple("a", "Which?"),))
    with refused("too-few-principles", "the constitution bare has no principles to revise by"):
        revise(Echo(), bare, PROMPTS, RevisionSettings())
