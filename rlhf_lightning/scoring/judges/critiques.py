"""Load judges by name, and a judge that reads critiques or a debate before it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import SettingError, check_range
from rlhf_lightning.loading import load
from rlhf_lightning.models.resolving import resolve_folder
from rlhf_lightning.models.roles import load_frozen
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.scoring.judges.judge import Judge, JudgeAnswer, Question, SimulatedJudge, Writer, as_text, as_turns
from rlhf_lightning.scoring.judges.local import LocalJudge, LocalWriter
from rlhf_lightning.scoring.judges.remote import RemoteJudge
from rlhf_lightning.tokenization import load_tokenizer


def load_judge(spec: str | Judge, arguments: Mapping[str, Any] | None = None) -> Judge:
    """Return the judge that ``spec`` describes.

    Args:
        spec: a judge; a model's folder, .gguf file or hub id (`LocalJudge`); the address of an OpenAI-compatible server
            (`RemoteJudge`, which needs the argument ``model``); a class of this package; or the import path of a class
            such as ``my_judge.MyJudge`` with instances that answer a sequence of questions.
        arguments: arguments of the class.

    Raises:
        SettingError: see `loading.load`.
    """
    shipped = {kind.__name__: kind for kind in (CritiqueJudge, LocalJudge, RemoteJudge, SimulatedJudge)}
    given = dict(arguments or {})
    if isinstance(spec, str) and spec not in shipped:
        if spec.startswith(("http://", "https://")):
            spec, given = "RemoteJudge", {"url": spec, **given}
        elif Path(spec).expanduser().exists() or "/" in spec or spec.endswith(".gguf"):
            spec, given = "LocalJudge", {"model": spec, **given}
    made = load({"class_path": spec, "init_args": given} if isinstance(spec, str) else spec, Callable, shipped, "judge")
    if not isinstance(getattr(made, "name", None), str):
        raise SettingError(
            "wrong-kind", f"judge {spec!r} has no name, which labels record; give its class an attribute 'name'"
        )
    return made


CRITIQUE = """\
{conversation}

Here is an answer to the end of this conversation:

{answer}

Name the faults of the answer in two sentences."""

ARGUMENT = """\
{conversation}

Two answers to the end of this conversation are compared.

(A) {first}

(B) {second}

{said}Argue in two sentences that ({letter}) is the better answer."""


class CritiqueJudge:
    """Judge that first reads critiques of both answers, or a debate about them, written by a model.

    Without rounds the writer lists the faults of each answer (arXiv 2206.05802). With rounds it argues for (A) and for
    (B) in each round, and reads the earlier arguments (debate, arXiv 1805.00899). It decodes greedily. If the context
    length leaves no room to write, the judge reads only the answers.

    Args:
        judge: the judge, as a spec for `load_judge`.
        writer: the writer: a folder, .gguf file or hub id; or an object that continues prompts, see `judge.Writer`.
        judge_args: arguments of the judge's class.
        rounds: rounds of the debate; 0 for critiques.
        max_new_tokens: maximum length of a critique or argument, tokens.
        dtype: precision of the writer's weights.
    """

    def __init__(
        self, judge: str | Judge, writer: str | Writer, judge_args: dict[str, Any] | None = None, rounds: int = 0,
        max_new_tokens: int = 64, dtype: str = "float32",
    ) -> None:  # fmt: skip
        check_range(rounds >= 0, "it must be at least 0, for critiques", rounds=rounds)
        self.judge, self.rounds = load_judge(judge, judge_args), rounds
        if isinstance(writer, str):
            settings = SamplingSettings(max_new_tokens, 0.0)
            tokenizer = load_tokenizer(resolve_folder(writer))
            writer = LocalWriter(load_frozen(writer, dtype), tokenizer, settings, 0, writer)
        self.writer = writer
        self.name = (
            f"{self.judge.name} after {f'{rounds} rounds of debate' if rounds else 'critiques'} by {writer.name}"
        )

    def __call__(self, questions: Sequence[Question]) -> Sequence[JudgeAnswer]:
        """Return the judge's answers to the questions, each with the writer's text about it."""
        said = self._debated(questions) if self.rounds else self._criticised(questions)
        return self.judge([self._with(one, text) for one, text in zip(questions, said, strict=True)])

    @staticmethod
    def _with(question: Question, said: str) -> Question:
        *before, last = question.messages
        content = f"{last['content']}\n\n{said}{question.wording.conclusion}" if said else last["content"]
        return question._replace(messages=[*before, {**last, "content": content}])

    def _written(self, asked: Sequence[str]) -> list[str]:
        found = self.writer([[{"role": "user", "content": text}] for text in asked], [0] * len(asked))
        return ["" if one is None else one.text.strip() for one in found]

    def _criticised(self, questions: Sequence[Question]) -> list[str]:
        pairs = [(_conversation(one), answer) for one in questions for answer in (one.first, one.second)]
        distinct = list(dict.fromkeys(pairs))  # both orders show the same answers
        texts = self._written([CRITIQUE.format(conversation=told, answer=answer) for told, answer in distinct])
        critiques = dict(zip(distinct, texts, strict=True))
        heads = (f"{one.wording.critique} ({letter})" for one in questions for letter in "AB")
        said = [
            f"{head}: {critiques[pair]}\n\n" if critiques[pair] else "" for head, pair in zip(heads, pairs, strict=True)
        ]
        return [first + second for first, second in zip(said[::2], said[1::2], strict=True)]

    def _debated(self, questions: Sequence[Question]) -> list[str]:
        said = [""] * len(questions)
        for _ in range(self.rounds):
            asked = [
                ARGUMENT.format(
                    conversation=_conversation(one), first=one.first, second=one.second, said=before, letter=letter
                )
                for one, before in zip(questions, said, strict=True)
                for letter in "AB"
            ]
            told = [f"({'AB'[place % 2]}): {one}\n\n" if one else "" for place, one in enumerate(self._written(asked))]
            said = [before + a + b for before, a, b in zip(said, told[::2], told[1::2], strict=True)]
        return said


def _conversation(question: Question) -> str:
    wording = question.wording
    return as_text(as_turns(question.prompt), wording).removesuffix(f"\n\n{wording.assistant}:")
