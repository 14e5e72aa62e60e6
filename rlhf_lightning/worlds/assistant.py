r"""The assistant world: requests about hobbies, answers of mixed quality, and a gold reward that is known.

A request is a (kind, subject, phrasing): 14 kinds (what does it cost, is it safe, ...) times 40 subjects times 6
phrasings. An answer is a sequence of sentences: an opening, a core that answers some kind for some subject, a concrete
detail of some kind, fillers, a closing. Careful writers mostly answer what was asked; careless ones answer another
question, about another subject, at length or rudely.

**Gold reward** of (prompt, completion), in [0, 1], from exact sentences only, so that any text has one::

    gold = clarity * (0.30 subject + 0.25 kind + 0.20 detail + 0.15 courtesy + 0.10 brevity)

    clarity   words in recognised, unrepeated sentences / all words                     (0 for an empty completion)
    subject   mentions of the asked subject / mentions of any subject                          (0 without a mention)
    kind      core sentences that answer the asked kind / core sentences                              (0 without one)
    detail    detail sentences of the asked kind / detail sentences                                   (0 without one)
    courtesy  clip((1 + courteous parts (opening, closing; at most one each) - 2 curt sentences) / 3, 0, 1)
    brevity   clip((28 - words) / 12, 0, 1): full marks up to 16 words

Shares, not counts, make hedging worthless: an answer for all kinds about all subjects earns what one kind about one
subject earns from a random prompt. **Annotators** prefer a to b with probability sigmoid(scale (gold_a - gold_b)).

Why it is a real problem: 75 % of the gold reward asks for the right subject and kind, which only the prompt tells, so
the best completion that ignores the prompt earns 0.25 + 0.30 / 40 + 0.45 / 14 = 0.29, and words without the prompt
tell a pair classifier little; and writers make enough mistakes that imitating them earns about 0.45.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_lightning.worlds import _assistant_text as text

Split = Literal["train", "test"]
Row = dict[str, Any]

TEST_PROMPTS = 400
ANNOTATOR_SCALE = 12.0  # sharpness of the annotators' Bradley-Terry choice, in log-odds per unit of gold reward
EDITED_SHARE = 0.7  # of the pairs: an answer beside its own edit
EDITS = {"kind": 4, "subject": 2, "detail": 1, "opening": 1, "closing": 1, "fillers": 1}  # relative frequencies
WEIGHTS = {"subject": 0.30, "kind": 0.25, "detail": 0.20, "courtesy": 0.15, "brevity": 0.10}


class Care(NamedTuple):
    """How a writer writes: probabilities of doing each thing right (or, for manners, courteous and curt)."""

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


class Request(NamedTuple):
    """What a prompt asks for."""

    kind: str
    subject: str


class Facts(NamedTuple):
    """What the grader reads in a completion, whatever was asked."""

    words: int
    recognised_words: int
    subjects: Counter[str]
    cores: Counter[str]
    details: Counter[str]
    courteous: int
    curt: int


@dataclass(frozen=True)
class Answer:
    """An answer before it is worded. ``None`` leaves a part out; ``manners`` are courteous, curt or None.

    ``wording`` holds one number in [0, 1) a part, which picks that part's sentence: an edited answer keeps the words of
    everything that was not edited.
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


_TOKEN = re.compile(r"\w+|[^\w\s]")
_SUBJECTS = frozenset(text.SUBJECTS)


def _key(tokens: Iterable[str]) -> tuple[str, ...]:
    return tuple("{s}" if token in _SUBJECTS else token for token in tokens)


def _tokens(words: str) -> list[str]:
    return _TOKEN.findall(words.lower())


def _sentence_table() -> dict[tuple[str, ...], tuple[str, str]]:
    """Every sentence of the world, its subject left open -> (part, kind or manner)."""
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
    """Return what ``prompt`` asks for.

    Raises:
        ValueError: if the prompt is not one of this world's.
    """
    tokens = _tokens(prompt)
    kind = _REQUESTS.get(_key(tokens))
    if kind is None:
        raise ValueError(f"The prompt {prompt!r} is not a request of the assistant world, so it has no gold reward.")
    return Request(kind, next(token for token in tokens if token in _SUBJECTS))


@lru_cache(maxsize=65536)
def read_completion(completion: str) -> Facts:
    """Return what the grader sees in any text: recognised sentences by part, subjects, words."""
    tokens = _tokens(completion)
    sentences: list[list[str]] = [[]]
    for token in tokens:
        sentences[-1].append(token)
        if token in ".!?":
            sentences.append([])
    seen: set[tuple[str, ...]] = set()
    parts: Counter[tuple[str, str]] = Counter()
    recognised = 0
    for sentence in sentences:
        key = _key(sentence)
        if key in _SENTENCES and key not in seen:
            seen.add(key)
            parts[_SENTENCES[key]] += 1
            recognised += sum(token.isalnum() for token in sentence)
    return Facts(
        words=sum(token.isalnum() for token in tokens),
        recognised_words=recognised,
        subjects=Counter(token for token in tokens if token in _SUBJECTS),
        cores=Counter({tag: n for (part, tag), n in parts.items() if part == "core"}),
        details=Counter({tag: n for (part, tag), n in parts.items() if part == "detail"}),
        courteous=len({part for part, tag in parts if tag == "courteous"}),
        curt=sum(n for (_, tag), n in parts.items() if tag == "curt"),
    )


def gold_parts(prompt: str, completion: str) -> dict[str, float]:
    """Return the parts of the gold reward (see the module's equation), each in [0, 1], ``clarity`` among them."""
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


class AssistantWorld:
    """Prompts, demonstrations and preference pairs of the assistant world, the same for the same seed.

    Args:
        seed: decides which prompts are held out and everything that is drawn.
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
        """Return the requests of a split. No (kind, subject, phrasing) is in both; every kind and subject is."""
        return list(self._prompts[split])

    def gold_reward(self, prompt: str, completion: str) -> float:
        """Return the gold reward in [0, 1] (the module's :func:`gold_reward`)."""
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

        Some pairs are two independent answers by writers as in the demonstrations; most (``EDITED_SHARE``) are an
        expert's answer beside the same answer with one part changed, as edits show best what matters.
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
        """Return the expected accuracy, on ``pairs``, of whoever knows the gold reward: mean of max(p, 1 - p)."""
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


def _draw(prompt: str, rng: random.Random, care: Care | None = None) -> Answer:
    """Draw one answer to ``prompt`` by a writer of some care (a random one's if not given)."""
    asked = read_request(prompt)
    care = care or rng.choices(CARES, [c.weight for c in CARES])[0]
    kind = asked.kind if rng.random() < care.kind else _other(text.KINDS, asked.kind, rng)
    return Answer(
        subject=asked.subject if rng.random() < care.subject else _other(text.SUBJECTS, asked.subject, rng),
        kind=kind if rng.random() < care.core else None,
        detail=kind if rng.random() < care.detail else None,
        opening=_manner(care, rng),
        closing=_manner(care, rng),
        fillers=0 if rng.random() < care.brief else rng.choice((1, 2)),
        wording=(rng.random(), rng.random(), rng.random(), rng.random(), rng.random()),
    )


def _edit(answer: Answer, prompt: str, rng: random.Random) -> Answer:
    """Change one part of ``answer``, mostly for the worse."""
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


# ------------------------------------------------------------------------------------------------- model and files

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('The roles of this chat template are system, user and assistant; found ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")


def vocabulary() -> list[str]:
    """Return every word and mark of the world, sorted, after the special tokens."""
    said = [*text.SUBJECTS, *text.COURTEOUS_OPENINGS, *text.CURT_OPENINGS, *text.FILLERS]
    said += [*text.COURTEOUS_CLOSINGS, *text.CURT_CLOSINGS]
    for kind in text.KINDS.values():
        said += [*kind.requests, *kind.cores, *kind.details]
    words = {token for sentence in said for token in _TOKEN.findall(sentence.replace("{s}", ""))}
    return [*SPECIAL_TOKENS, *sorted(words)]


def make_tokenizer() -> Any:
    """Return the world's word-level tokenizer, a ``PreTrainedTokenizerFast`` with a chat template.

    Words outside the world become ``<|unk|>``; text of the world survives encoding and decoding unchanged.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    backend.decoder = decoders.WordPiece(cleanup=True)  # joins words by spaces, none before a mark
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_config(hidden_size: int = 96, layers: int = 2, heads: int = 4, intermediate_size: int = 256) -> Any:
    """Return a Llama configuration for training from scratch on this world."""
    from transformers import LlamaConfig

    tokenizer = make_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=128,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def write_world(
    folder: str | Path, seed: int = 0, demonstrations: int = 10000, pairs_train: int = 24000, pairs_test: int = 1000
) -> dict[str, Any]:
    """Write the world's files to ``folder`` and return the facts that ``world.json`` holds.

    Writes demonstrations.jsonl, pairs_train.jsonl, pairs_test.jsonl, prompts_train.jsonl, prompts_test.jsonl,
    world.json, and model/ (configuration and tokenizer with its chat template, no weights).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    world = AssistantWorld(seed)
    rows = {
        "demonstrations": world.demonstrations(demonstrations),
        "pairs_train": world.pairs(pairs_train, "train"),
        "pairs_test": world.pairs(pairs_test, "test"),
        "prompts_train": [{"prompt": _user(prompt)} for prompt in world.prompts("train")],
        "prompts_test": [{"prompt": _user(prompt)} for prompt in world.prompts("test")],
    }
    for name, many in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    facts = {
        "seed": seed,
        "sizes": {name: len(many) for name, many in rows.items()},
        "bayes_accuracy": world.bayes_accuracy(rows["pairs_test"]),
        "demonstrations_gold": world.demonstrations_gold(rows["demonstrations"]),
        "annotator_scale": ANNOTATOR_SCALE,
    }
    (folder / "world.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    make_tokenizer().save_pretrained(folder / "model")
    make_config().save_pretrained(folder / "model")
    return facts
