"""Critique and revision in rounds, from prompts to demonstrations (Constitutional AI, arXiv 2212.08073, section 3).

In each round a principle is drawn, the answer is criticised and revised by this principle, and the revision replaces
the answer. An unusable revision (see `REASONS`) is dropped, and the next round starts from the answer before it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rlhf_lightning.constitution.principles import (
    Constitution,
    RevisingPrinciple,
    critique_prompt,
    revision_prompt,
    spaced,
)
from rlhf_lightning.errors import check_range
from rlhf_lightning.scoring.judges.judge import Writer, Written, first_paragraphs
from rlhf_lightning.types import Prompt

MOST_ROUNDS = 31
"""Maximum number of rounds of a prompt; each round uses two of the prompt's 64 episode numbers."""

REASONS = {
    "empty": "the critique or the revision is empty",
    "refused": "the critique is a refusal",
    "meta": "the revision talks about itself instead of answering",
    "unchanged": "the revision equals the answer to be revised",
    "unfinished": "the revision reached the maximum length",
    "too_long": "the prompt does not fit into the model's context",
    "no_answer": "the first answer is empty",
}
"""Reasons why a revision is dropped."""


@dataclass(frozen=True)
class RevisionSettings:
    """How answers are revised.

    Args:
        rounds: number of revisions of each answer.
        critique: ask for a critique before each revision.
        keep_unfinished: also keep revisions that reached the maximum length.
        seed: seed of the drawn principles.
    """

    rounds: int = 4
    critique: bool = True
    keep_unfinished: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(1 <= self.rounds <= MOST_ROUNDS, f"it must be between 1 and {MOST_ROUNDS}", rounds=self.rounds)


@dataclass(frozen=True)
class Round:
    """One revision."""

    principle: str  # id of the principle
    parent: str  # the answer before the revision
    critique: str | None  # the critique; None without critiques
    revision: str  # the revised answer
    refused: str = ""  # reason for dropping it, a key of `REASONS`; empty if it is kept


@dataclass(frozen=True)
class Chain:
    """A prompt, its first answer, and the rounds of revision."""

    prompt: Prompt
    answer: str
    rounds: tuple[Round, ...]

    @property
    def last(self) -> str:
        """Return the answer after all rounds."""
        return next((one.revision for one in reversed(self.rounds) if not one.refused), self.answer)


def revise(
    writer: Writer, constitution: Constitution, prompts: Sequence[Prompt], settings: RevisionSettings, start: int = 0
) -> list[Chain]:
    """Answer prompts and revise the answers, each round for all prompts together.

    For prompt p, the answer is episode 64 p, the critique of round r is episode 64 p + 2 r - 1, and its revision is
    episode 64 p + 2 r. Rows therefore do not depend on how prompts are batched. A prompt gets every principle once
    before it gets any principle twice.

    Args:
        writer: writes answers, critiques and revisions.
        constitution: principles, examples and wording.
        prompts: prompts to answer.
        settings: number of rounds, and which revisions are kept.
        start: index of the first prompt.

    Raises:
        ConstitutionError: the constitution has no revising principles.
    """
    constitution.require("revising")
    numbers = [start + place for place in range(len(prompts))]
    answers = _write(writer, constitution, prompts, [_episode(number, 0) for number in numbers])
    current = [one.text if one is not None else "" for one in answers]
    rounds: list[list[Round]] = [[] for _ in prompts]
    live = [place for place, text in enumerate(current) if text]
    for turn in range(1, settings.rounds + 1):
        asked = [
            _Asked(
                drawn_principle(constitution, settings.seed, numbers[place], turn), prompts[place], current[place],
                _episode(numbers[place], 2 * turn),
            )
            for place in live
        ]  # fmt: skip
        for place, done in zip(live, _round(writer, constitution, asked, settings), strict=True):
            rounds[place].append(done)
            if not done.refused:
                current[place] = done.revision
    return [
        Chain(prompt, one.text if one is not None else "", tuple(of_prompt))
        for prompt, one, of_prompt in zip(prompts, answers, rounds, strict=True)
    ]


def drawn_principle(constitution: Constitution, seed: int, number: int, turn: int) -> RevisingPrinciple:
    """Return the principle of a round of prompt ``number``; each prompt has its own random order of principles."""
    order = random.Random(f"{seed}/revising/{number}").sample(constitution.revising, len(constitution.revising))
    return order[(turn - 1) % len(order)]


class _Asked(NamedTuple):
    principle: RevisingPrinciple
    prompt: Prompt
    parent: str
    episode: int


def _episode(number: int, call: int) -> int:
    return number * 2 * (MOST_ROUNDS + 1) + call


def _write(
    writer: Writer, constitution: Constitution, prompts: Sequence[Prompt], episodes: list[int]
) -> list[Written | None]:
    drawn = writer(prompts, episodes)
    return [_tidy(one, prompt, constitution) for one, prompt in zip(drawn, prompts, strict=True)]


def _round(writer: Writer, constitution: Constitution, asked: list[_Asked], settings: RevisionSettings) -> list[Round]:
    """Criticise and revise one answer of each prompt."""
    critiques: list[Written | None] = [None] * len(asked)
    if settings.critique:
        read = [critique_prompt(constitution, one.principle, one.prompt, one.parent) for one in asked]
        critiques = _write(writer, constitution, read, [one.episode - 1 for one in asked])
    wanted = [(place, one) for place, one in enumerate(asked) if not settings.critique or critiques[place] is not None]
    read = [
        revision_prompt(constitution, one.principle, one.prompt, one.parent, _text(critiques[place]))
        for place, one in wanted
    ]
    drawn = _write(writer, constitution, read, [one.episode for _, one in wanted])
    revised = {place: revision for (place, _), revision in zip(wanted, drawn, strict=True)}
    rounds = []
    for place, one in enumerate(asked):
        critique, revision = _text(critiques[place]), revised.get(place)
        reason = refusal_of(constitution, one.parent, critique, revision, settings)
        rounds.append(Round(one.principle.id, one.parent, critique, _text(revision) or "", reason))
    return rounds


def _text(written: Written | None) -> str | None:
    return None if written is None else written.text


def _tidy(written: Written | None, prompt: Prompt, constitution: Constitution) -> Written | None:
    """Strip a text; truncate a transcript if the writer continues with another speaker's turn."""
    if written is None or not isinstance(prompt, str):
        return written and Written(written.text.strip(), written.finished)
    own = first_paragraphs(written.text, constitution.wording)
    return Written(own.strip(), written.finished or own != written.text)


def refusal_of(
    constitution: Constitution, parent: str, critique: str | None, revision: Written | None, settings: RevisionSettings
) -> str:
    """Return the reason for dropping a revision, a key of `REASONS`; empty if it is kept."""
    wording = constitution.wording
    if revision is None or (settings.critique and critique is None):
        return "too_long"
    if not revision.text or critique == "":
        return "empty"
    if critique is not None and _begins(critique, wording.refusals):
        return "refused"
    if _begins(revision.text, wording.meta):
        return "meta"
    if revision.text.split() == parent.split():
        return "unchanged"
    return "" if revision.finished or settings.keep_unfinished else "unfinished"


def _begins(text: str, beginnings: Sequence[str]) -> bool:
    plain = text.lstrip("*#_\"' \n").replace("’", "'").casefold()
    return any(plain.startswith(one.casefold()) for one in beginnings)


Mix = Literal["last", "all"]


def demonstrations(chain: Chain, mix: Mix) -> Iterator[dict[str, Any]]:
    """Yield the rows of a prompt: its last revision, or all revisions; no rows if every revision was dropped.

    A row has prompt and completion, which SFTDataModule reads, and principle, round, parent and critique.
    """
    kept = [(turn, one) for turn, one in enumerate(chain.rounds, start=1) if not one.refused]
    for turn, one in kept if mix == "all" else kept[-1:]:
        about = {"principle": one.principle, "round": turn, "parent": one.parent, "critique": one.critique}
        yield {"prompt": chain.prompt, "completion": spaced(chain.prompt, one.revision), **about}


def revision_report(chains: Sequence[Chain]) -> dict[str, Any]:
    """Count the revisions by round and reason, with the length ratio of revision to answer."""
    turns = max((len(chain.rounds) for chain in chains), default=0)
    rounds = []
    for turn in range(turns):
        done = [chain.rounds[turn] for chain in chains if len(chain.rounds) > turn]
        kept = [one for one in done if not one.refused]
        rounds.append({
            "round": turn + 1,
            "revisions": len(done),
            "kept": len(kept),
            "refused": dict(Counter(one.refused for one in done if one.refused)),
            "length_ratio": _mean([len(one.revision) / max(len(one.parent), 1) for one in kept]),
        })  # fmt: skip
    revised = [chain for chain in chains if any(not one.refused for one in chain.rounds)]
    return {
        "prompts": len(chains),
        "no_answer": sum(not chain.answer for chain in chains),
        "revised_prompts": len(revised),
        "length_ratio": _mean([len(chain.last) / max(len(chain.answer), 1) for chain in revised]),
        "rounds": rounds,
        "by_principle": dict(Counter(one.principle for c in chains for one in c.rounds if not one.refused)),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
