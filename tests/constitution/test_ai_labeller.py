"""Test a judge as labeller: its preferences are stored and do not depend on the order."""

from pathlib import Path

from rlhf_lightning.constitution.labelling import AILabeller
from rlhf_lightning.data.feedback.records import Candidate, Item
from rlhf_lightning.people.handing_out import Policy
from rlhf_lightning.people.store import FeedbackStore
from rlhf_lightning.scoring.judges.judge import JudgeAnswer as Said

WORTH = {"best": 0.9, "good": 0.6, "fair": 0.55, "poor": 0.1}


def worth(prompt: object, completion: str) -> float:
    return WORTH[completion]


def labelled(path: Path, labeller: AILabeller, *pairs: tuple[str, str], count: int | None = None) -> list[tuple]:
    with FeedbackStore(path, Policy(annotators=1, repeats=0.0)) as store:
        store.add(Item(f"prompt {n}", (Candidate(a), Candidate(b))) for n, (a, b) in enumerate(pairs))
        labeller.label(store, len(pairs) if count is None else count, lambda: False)
        with store.reading() as db:
            rows = db.execute("SELECT verdict, ranks, strength FROM live ORDER BY item")
            return [tuple(row) for row in rows]


def judge(**settings: object) -> AILabeller:
    return AILabeller("SimulatedJudge", {"gold_reward": worth, "scale": 5.0, **settings})


def test_the_better_completion_is_ranked_first_with_graded_strength(tmp_path: Path) -> None:
    found = labelled(tmp_path / "f.db", judge(), ("good", "poor"), ("poor", "best"), ("good", "fair"))
    assert found == [("ranking", "[0,1]", 3), ("ranking", "[1,0]", 4), ("ranking", "[0,1]", 1)]


def test_a_position_biased_judge_gives_a_tie(tmp_path: Path) -> None:
    (found,) = labelled(tmp_path / "f.db", judge(position_bias=2.0), ("good", "fair"))
    assert found[0] == "tie"


def test_a_second_call_resumes_where_the_first_stopped(tmp_path: Path) -> None:
    pairs = [("good", "poor"), ("poor", "best"), ("fair", "poor"), ("fair", "best")]
    whole = labelled(tmp_path / "whole.db", judge(noise=1.0), *pairs)
    labelled(tmp_path / "cut.db", judge(noise=1.0), *pairs, count=2)
    assert labelled(tmp_path / "cut.db", judge(noise=1.0), *pairs) == whole


def test_no_answer_is_stored_as_a_skip(tmp_path: Path) -> None:
    labeller = judge()
    labeller.judge = type("Mute", (), {
        "name": "mute", "__call__": lambda self, asked: [Said(0.0, 0.0, failure="refused")] * len(asked),
    })()  # fmt: skip
    assert labelled(tmp_path / "f.db", labeller, ("good", "poor")) == [("skip", None, None)]
