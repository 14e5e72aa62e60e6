"""The gold reward of the assistant world: the score of any text by a grader who knows all sentences of the world.

::

    gold = clarity * (0.30 subject + 0.25 kind + 0.20 detail + 0.15 courtesy + 0.10 brevity)        in [0, 1]

    clarity   words in recognised, unrepeated sentences / all words                     (0 for an empty completion)
    subject   mentions of the asked subject / mentions of any subject                          (0 without a mention)
    kind      core sentences that answer the asked kind / core sentences                              (0 without one)
    detail    detail sentences of the asked kind / detail sentences                                   (0 without one)
    courtesy  clip((1 + courteous parts (opening, closing; at most one each) - 2 curt sentences) / 3, 0, 1)
    brevity   clip((28 - words) / 12, 0, 1): full marks up to 16 words

A sentence of the world is recognised with any subject, case and spacing. Parts are shares, not counts, so hedging does
not pay: an answer for all kinds and subjects earns as much as an answer to a random prompt.
"""

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from rlhf_lightning.errors import DataError
from rlhf_lightning.worlds import _assistant_text as text

WEIGHTS = {"subject": 0.30, "kind": 0.25, "detail": 0.20, "courtesy": 0.15, "brevity": 0.10}


class Request(NamedTuple):
    """Kind and subject of a request."""

    kind: str
    subject: str


class CompletionFacts(NamedTuple):
    """Facts about a completion, independent of the prompt."""

    words: int
    recognised_words: int
    subjects: Counter[str]
    cores: Counter[str]
    details: Counter[str]
    courteous: int
    curt: int


_SUBJECTS = frozenset(text.SUBJECTS)


def _key(tokens: Iterable[str]) -> tuple[str, ...]:
    return tuple("{s}" if token in _SUBJECTS else token for token in tokens)


def sentence_key(sentence: str) -> tuple[str, ...]:
    """Return the words and marks of a sentence with its subject as a placeholder; equal for all spellings."""
    return _key(_tokens(sentence))


def sentences(completion: str) -> list[tuple[str, ...]]:
    """Return the keys of a text's sentences."""
    return [_key(sentence) for sentence in _parted(_tokens(completion)) if sentence]


def _parted(tokens: Iterable[str]) -> list[list[str]]:
    """Split words and marks into sentences; text after the last mark is a sentence too."""
    parts: list[list[str]] = [[]]
    for token in tokens:
        parts[-1].append(token)
        if token in ".!?":
            parts.append([])
    return parts


def _tokens(words: str) -> list[str]:
    return text.WORD_OR_MARK.findall(words.lower())


def _sentence_table() -> dict[tuple[str, ...], tuple[str, str]]:
    """Map every sentence of the world, with its subject as a placeholder, to (part, kind or manner)."""
    some_subject = text.SUBJECTS[0]
    parts: list[tuple[str, str, tuple[str, ...]]] = [
        ("opening", "courteous", text.COURTEOUS_OPENINGS),
        ("opening", "curt", text.CURT_OPENINGS),
        ("closing", "courteous", text.COURTEOUS_CLOSINGS),
        ("closing", "curt", text.CURT_CLOSINGS),
        ("filler", "", text.FILLERS),
    ]
    for name, kind in text.KINDS.items():
        parts += [("core", name, kind.cores), ("detail", name, kind.details)]
    return {_key(_tokens(s.replace("{s}", some_subject))): (part, tag) for part, tag, many in parts for s in many}


_SENTENCES = _sentence_table()
_REQUESTS = {
    _key(_tokens(request.replace("{s}", text.SUBJECTS[0]))): name
    for name, kind in text.KINDS.items()
    for request in kind.requests
}


@lru_cache(maxsize=65536)
def read_request(prompt: str) -> Request:
    """Return the kind and subject that ``prompt`` asks for.

    Raises:
        DataError: the prompt does not belong to this world.
    """
    tokens = _tokens(prompt)
    kind = _REQUESTS.get(_key(tokens))
    if kind is None:
        raise DataError(
            "unknown-prompt",
            f"the prompt {prompt!r} is not a request of the assistant world, so it has no gold "
            "reward; use prompts of its data",
        )
    return Request(kind, next(token for token in tokens if token in _SUBJECTS))


@lru_cache(maxsize=65536)
def read_completion(completion: str) -> CompletionFacts:
    """Return the facts of any text: recognised sentences by part, subjects, words."""
    tokens = _tokens(completion)
    seen: set[tuple[str, ...]] = set()
    parts: Counter[tuple[str, str]] = Counter()
    recognised = 0
    for sentence in _parted(tokens):
        key = _key(sentence)
        if key in _SENTENCES and key not in seen:
            seen.add(key)
            parts[_SENTENCES[key]] += 1
            recognised += sum(token.isalnum() for token in sentence)
    return CompletionFacts(
        words=sum(token.isalnum() for token in tokens),
        recognised_words=recognised,
        subjects=Counter(token for token in tokens if token in _SUBJECTS),
        cores=Counter({tag: n for (part, tag), n in parts.items() if part == "core"}),
        details=Counter({tag: n for (part, tag), n in parts.items() if part == "detail"}),
        courteous=len({part for part, tag in parts if tag == "courteous"}),
        curt=sum(n for (_, tag), n in parts.items() if tag == "curt"),
    )


def gold_parts(prompt: str, completion: str) -> dict[str, float]:
    """Return the parts of the gold reward, including ``clarity``, each in [0, 1]."""
    asked, facts = read_request(prompt), read_completion(completion)

    def share(counts: Counter[str], name: str) -> float:
        return counts[name] / counts.total() if counts else 0.0

    return {
        "clarity": facts.recognised_words / facts.words if facts.words else 0.0,
        "subject": share(facts.subjects, asked.subject),
        "kind": share(facts.cores, asked.kind),
        "detail": share(facts.details, asked.kind),
        "courtesy": min(max((1 + facts.courteous - 2 * facts.curt) / 3, 0.0), 1.0),
        "brevity": min(max((28 - facts.words) / 12, 0.0), 1.0),
    }


def gold_reward(prompt: str, completion: str) -> float:
    """Return the gold reward in [0, 1] of any ``completion`` to a ``prompt`` of this world."""
    parts = gold_parts(prompt, completion)
    return parts["clarity"] * sum(weight * parts[name] for name, weight in WEIGHTS.items())
