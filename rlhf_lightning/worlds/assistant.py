"""The assistant world: requests about hobbies, answers of mixed quality, and a known gold reward.

A request is a (kind, subject, phrasing): 12 kinds (cost, safety, ...) x 40 subjects x 3 phrasings; 400 of the 1,440
are held out. An answer is a sequence of sentences: an opening, a core for some kind and subject, a detail of some kind,
fillers, a closing. Careful writers mostly answer the request. Careless writers answer another question, write about
another subject, write long or rude answers, or say nothing useful.

The **gold reward** of (prompt, completion) is known for any text and not used in training::

    gold = clarity * (0.30 subject + 0.25 kind + 0.20 detail + 0.15 courtesy + 0.10 brevity)        in [0, 1]

`_assistant_gold` defines the parts. **Annotators** prefer a to b with probability sigmoid(12 (gold_a - gold_b)), so the
Bayes accuracy, mean max(p, 1 - p), is about 0.87.

Tests measure the properties that make the problem realistic:

* 75 % of the gold reward depends on the prompt. The best completion that ignores the prompt earns courtesy, brevity and
  matches by chance: 0.25 + 0.30 / 40 + 0.45 / 12 = 0.30.
* A bag of words recovers less than 60 % of the information in the pairs: words show manners, length and the presence
  of a detail, but not whether it is the right detail.
* Demonstrations, and a model that imitates them, earn about 0.5. Yet each part of an excellent answer is common, so
  preferences can lead to such answers at a modest KL.
"""

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_lightning.atomic_files import write_lines
from rlhf_lightning.types import Prompt
from rlhf_lightning.worlds import _assistant_text as text
from rlhf_lightning.worlds._assistant_gold import gold_parts, gold_reward, read_request
from rlhf_lightning.worlds._assistant_text import make_config, make_tokenizer, vocabulary

__all__ = [
    "ANNOTATOR_SCALE",
    "AssistantWorld",
    "gold_of_conversation",
    "gold_parts",
    "gold_reward",
    "make_config",
    "make_tokenizer",
    "read_request",
    "vocabulary",
    "write_world",
]

Split = Literal["train", "test"]
Row = dict[str, Any]

TEST_PROMPTS = 400
ANNOTATOR_SCALE = 12.0  # sharpness of the annotators' Bradley-Terry choice, in log-odds per unit of gold reward
EDITED_SHARE = 0.7  # share of pairs that compare an answer with its own edit
EDITS = {"kind": 4, "subject": 2, "detail": 1, "opening": 1, "closing": 1, "fillers": 1}  # relative frequencies


class Care(NamedTuple):
    """A writer's care: the probability of each part being right (for manners: of being courteous and curt)."""

    weight: float
    subject: float
    kind: float
    core: float
    detail: float
    courteous: float
    curt: float
    brief: float


CARES = (
    Care(0.30, subject=0.45, kind=0.35, core=0.85, detail=0.25, courteous=0.15, curt=0.30, brief=0.35),
    Care(0.40, subject=0.60, kind=0.50, core=0.95, detail=0.40, courteous=0.35, curt=0.15, brief=0.55),
    Care(0.30, subject=0.75, kind=0.65, core=1.00, detail=0.55, courteous=0.55, curt=0.05, brief=0.75),
)
EXPERT = Care(0.0, subject=0.9, kind=0.9, core=1.0, detail=0.7, courteous=0.6, curt=0.1, brief=0.7)


@dataclass(frozen=True)
class AnswerPlan:
    """Content of an answer before it is worded. None leaves a part out; manners are courteous, curt or None.

    ``wording`` has one number in [0, 1) per part that selects its sentence, so an edit keeps the words of all other
    parts.
    """

    subject: str
    kind: str | None
    detail: str | None
    opening: str | None
    closing: str | None
    fillers: int
    wording: tuple[float, float, float, float, float]

    def render(self) -> str:
        """Return the answer's text."""
        openings = {"courteous": text.COURTEOUS_OPENINGS, "curt": text.CURT_OPENINGS, None: ()}
        closings = {"courteous": text.COURTEOUS_CLOSINGS, "curt": text.CURT_CLOSINGS, None: ()}
        first = int(self.wording[3] * len(text.FILLERS))
        fillers = [text.FILLERS[(first + i) % len(text.FILLERS)] for i in range(self.fillers)]
        sentences = [
            *_worded(openings[self.opening], self.wording[0]),
            *_worded(text.KINDS[self.kind].cores if self.kind else (), self.wording[1]),
            *_worded(text.KINDS[self.detail].details if self.detail else (), self.wording[2]),
            *fillers,
            *_worded(closings[self.closing], self.wording[4]),
        ]
        return " ".join(sentences).replace("{s}", self.subject)


def _worded(options: tuple[str, ...], number: float) -> list[str]:
    return [options[int(number * len(options))]] if options else []


class AssistantWorld:
    """Prompts, demonstrations and preference pairs of the assistant world; the same seed gives the same rows.

    Args:
        seed: determines the held-out prompts and all random numbers.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        everything = [
            (name, subject, phrasing)
            for name, kind in text.KINDS.items()
            for subject in text.SUBJECTS
            for phrasing in range(len(kind.requests))
        ]
        random.Random(f"{seed}/split").shuffle(everything)
        prompts = [text.KINDS[name].requests[i].replace("{s}", subject) for name, subject, i in everything]
        self._prompts = {"test": prompts[:TEST_PROMPTS], "train": prompts[TEST_PROMPTS:]}

    def prompts(self, split: Split = "train") -> list[str]:
        """Return the requests of a split; the splits are disjoint, and each has every kind and subject."""
        return list(self._prompts[split])

    def gold_reward(self, prompt: str, completion: str) -> float:
        """Return the gold reward in [0, 1]."""
        return gold_reward(prompt, completion)

    def demonstrations(self, n: int) -> list[Row]:
        """Return ``n`` conversational rows ``{"prompt", "completion"}`` on training prompts, of mixed quality."""
        rng = random.Random(f"{self.seed}/demonstrations")
        rows = []
        for _ in range(n):
            prompt = rng.choice(self._prompts["train"])
            rows.append({"prompt": _user(prompt), "completion": _assistant(_draw(prompt, rng).render())})
        return rows

    def pairs(self, n: int, split: Split = "train") -> list[Row]:
        """Return ``n`` conversational rows ``{"prompt", "chosen", "rejected"}``, labelled by noisy annotators.

        A share ``EDITED_SHARE`` compares an expert's answer with the same answer after one edit. The other pairs
        compare two independent answers.
        """
        rng = random.Random(f"{self.seed}/pairs/{split}")
        rows: list[Row] = []
        while len(rows) < n:
            prompt = rng.choice(self._prompts[split])
            if rng.random() >= EDITED_SHARE:
                answers = [_draw(prompt, rng), _draw(prompt, rng)]
            else:
                expert = _draw(prompt, rng, EXPERT)
                answers = [expert, _edit(expert, prompt, rng)]
            first, second = (answer.render() for answer in answers)
            if first == second:
                continue
            gap = gold_reward(prompt, first) - gold_reward(prompt, second)
            if rng.random() >= _sigmoid(ANNOTATOR_SCALE * gap):
                first, second = second, first
            rows.append({"prompt": _user(prompt), "chosen": _assistant(first), "rejected": _assistant(second)})
        return rows

    def bayes_accuracy(self, pairs: Iterable[Row]) -> float:
        """Return the expected accuracy on ``pairs`` of a judge that knows the gold reward: mean of max(p, 1 - p)."""
        chances = []
        for row in pairs:
            prompt = row["prompt"][-1]["content"]
            chosen, rejected = (gold_reward(prompt, row[side][-1]["content"]) for side in ("chosen", "rejected"))
            chances.append(_sigmoid(ANNOTATOR_SCALE * abs(chosen - rejected)))
        return sum(chances) / len(chances)

    def demonstrations_gold(self, demonstrations: Iterable[Row]) -> float:
        """Return the mean gold reward of ``demonstrations``."""
        golds = [gold_reward(row["prompt"][-1]["content"], row["completion"][-1]["content"]) for row in demonstrations]
        return sum(golds) / len(golds)


def gold_of_conversation(prompt: Prompt, completion: str) -> float:
    """Return the gold reward of a completion; the last turn of a conversation is the request."""
    return gold_reward(prompt if isinstance(prompt, str) else prompt[-1]["content"], completion)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _assistant(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def _other(options: Iterable[str], but: str | None, rng: random.Random) -> str:
    return rng.choice([option for option in options if option != but])


def _manner(care: Care, rng: random.Random) -> str | None:
    u = rng.random()
    return "courteous" if u < care.courteous else "curt" if u < care.courteous + care.curt else None


def _draw(prompt: str, rng: random.Random, care: Care | None = None) -> AnswerPlan:
    """Return a random answer to ``prompt`` by a writer with the given level of care, or a random one."""
    asked = read_request(prompt)
    care = care or rng.choices(CARES, [c.weight for c in CARES])[0]
    kind = asked.kind if rng.random() < care.kind else _other(text.KINDS, asked.kind, rng)
    return AnswerPlan(
        subject=asked.subject if rng.random() < care.subject else _other(text.SUBJECTS, asked.subject, rng),
        kind=kind if rng.random() < care.core else None,
        detail=kind if rng.random() < care.detail else None,
        opening=_manner(care, rng),
        closing=_manner(care, rng),
        fillers=0 if rng.random() < care.brief else rng.choice((1, 2)),
        wording=(rng.random(), rng.random(), rng.random(), rng.random(), rng.random()),
    )


def _edit(answer: AnswerPlan, prompt: str, rng: random.Random) -> AnswerPlan:
    """Return ``answer`` with one part changed, mostly for the worse."""
    asked = read_request(prompt)
    part = rng.choices(*zip(*EDITS.items(), strict=True))[0]
    if part == "subject":
        wrong = answer.subject != asked.subject
        return replace(answer, subject=asked.subject if wrong else _other(text.SUBJECTS, asked.subject, rng))
    if part == "kind":
        kind = asked.kind if answer.kind != asked.kind else _other(text.KINDS, asked.kind, rng)
        return replace(answer, kind=kind, detail=kind if answer.detail else None)
    if part == "detail":
        return replace(answer, detail=None if answer.detail else answer.kind or asked.kind)
    if part == "fillers":
        return replace(answer, fillers=0 if answer.fillers else rng.choice((1, 2)))
    manner = _other(("courteous", "curt", "none"), getattr(answer, part), rng)
    changed: Any = {part: None if manner == "none" else manner}
    return replace(answer, **changed)


def write_world(
    folder: str | Path, seed: int = 0, demonstrations: int = 10000, pairs_train: int = 30000, pairs_test: int = 1000
) -> dict[str, Any]:
    """Write the world's files to ``folder`` and return the facts that ``world.json`` holds.

    Files: demonstrations.jsonl, pairs_train.jsonl, pairs_test.jsonl, prompts_train.jsonl, prompts_test.jsonl,
    world.json, and model/ (configuration, tokenizer, chat template; no weights).
    """
    world = AssistantWorld(seed)
    rows = {
        "demonstrations": world.demonstrations(demonstrations),
        "pairs_train": world.pairs(pairs_train, "train"),
        "pairs_test": world.pairs(pairs_test, "test"),
        "prompts_train": [{"prompt": _user(prompt)} for prompt in world.prompts("train")],
        "prompts_test": [{"prompt": _user(prompt)} for prompt in world.prompts("test")],
    }
    facts = {
        "seed": seed,
        "bayes_accuracy": world.bayes_accuracy(rows["pairs_test"]),
        "demonstrations_gold": world.demonstrations_gold(rows["demonstrations"]),
        "annotator_scale": ANNOTATOR_SCALE,
    }
    return write_files(folder, rows, facts)


def write_files(
    folder: str | Path, rows: Mapping[str, list[Row]], facts: Mapping[str, Any], further: Sequence[str] = ()
) -> dict[str, Any]:
    """Write a world: each list of rows as JSON lines, world.json with the facts and sizes, and model/ without weights.

    Args:
        folder: created if missing.
        rows: lists of rows by file name without suffix.
        facts: contents of world.json other than ``sizes``.
        further: sentences beyond the assistant world's, for the vocabulary.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, many in rows.items():
        write_lines(folder / f"{name}.jsonl", many)
    found = {**facts, "sizes": {name: len(many) for name, many in rows.items()}}
    (folder / "world.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    make_tokenizer(further).save_pretrained(folder / "model")
    make_config(further=further).save_pretrained(folder / "model")
    return found
