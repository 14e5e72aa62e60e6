"""Constitutions (arXiv 2212.08073): principles for critique, revision and comparison, as versioned YAML; their prompts.

A file holds plain values. Each value is checked, and labels store the fingerprint of the whole file::

    name: harmless
    version: 1
    language: en
    revising:              # principles for critique and revision
      - id: danger
        critique: Say where your last answer could ...
        revision: Rewrite your last answer so that ...
    comparing:             # principles for comparison
      - id: danger
        question: Which answer is less likely to ...?
    revision_examples: [{prompt, completion, principle, critique, revision}, ...]
    comparison_examples: [{prompt, first, second, principle, answer: A or B}, ...]
    wording: {...}         # text around the principles, see `Wording`; English by default
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from rlhf_lightning.data.feedback.records import digest, text_of
from rlhf_lightning.errors import MissingError
from rlhf_lightning.scoring.judges.judge import ComparingPrinciple, ConstitutionError, Wording, as_text
from rlhf_lightning.types import Message, Prompt

SHIPPED = Path(__file__).parent / "constitutions"
LARGEST_FILE = 1_000_000
"""Maximum bytes of a constitution."""

Letter = Literal["A", "B"]


@dataclass(frozen=True)
class RevisingPrinciple:
    """A principle for critique and revision: its id, the request for a critique and the request for a revision."""

    id: str
    critique: str
    revision: str


@dataclass(frozen=True)
class RevisionExample:
    """A few-shot example: a prompt, its completion, the id of a principle, the critique and the revision."""

    prompt: str
    completion: str
    principle: str
    critique: str
    revision: str


@dataclass(frozen=True)
class ComparisonExample:
    """A few-shot example: a prompt, answers (A) and (B), the id of a principle, and the letter of the better answer."""

    prompt: str
    first: str
    second: str
    principle: str
    answer: Letter


@dataclass(frozen=True)
class Constitution:
    """Principles, few-shot examples and wording."""

    name: str  # name of the constitution
    version: int  # version number
    language: str  # language of its texts, such as ``en``
    revising: tuple[RevisingPrinciple, ...] = ()  # principles for critique and revision
    comparing: tuple[ComparingPrinciple, ...] = ()  # principles for comparison
    revision_examples: tuple[RevisionExample, ...] = ()  # examples shown before a critique
    comparison_examples: tuple[ComparisonExample, ...] = ()  # examples shown before a comparison
    wording: Wording = field(default_factory=Wording)  # text around the principles

    def __post_init__(self) -> None:
        if not (self.revising or self.comparing):
            raise ConstitutionError("no-principles", "it has no principles: list some under revising or comparing")
        for name in ("revising", "comparing"):
            ids = [principle.id for principle in getattr(self, name)]
            twice = next((one for one in ids if ids.count(one) > 1), None)
            if twice is not None:
                raise ConstitutionError("duplicate-id", f"{name} has the duplicate id {twice!r}")
        self._check_examples("revision_examples", self.revision_examples, self.revising)
        self._check_examples("comparison_examples", self.comparison_examples, self.comparing)

    def _check_examples(self, name: str, examples: tuple[Any, ...], principles: tuple[Any, ...]) -> None:
        known = {principle.id for principle in principles}
        for place, example in enumerate(examples):
            if example.principle not in known:
                raise ConstitutionError(
                    "unknown-principle",
                    f"{name}[{place}] names the principle {example.principle!r}, which does not exist",
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the whole content."""
        return digest(dataclasses.asdict(self))

    @property
    def title(self) -> str:
        """Name, version and start of the fingerprint."""
        return f"{self.name} v{self.version} ({self.fingerprint[:8]})"

    def require(self, kind: Literal["revising", "comparing"], count: int = 1) -> None:
        """Refuse a constitution with fewer principles of a kind than must be drawn.

        Raises:
            ConstitutionError: ``too-few-principles``.
        """
        there, verb = len(getattr(self, kind)), kind.removesuffix("ing") + "e"
        if there < count:
            asked = f", and principles is {count}" if count > 1 else ""
            raise ConstitutionError(
                "too-few-principles",
                f"the constitution {self.name} has {there or 'no'} principles to {verb} by{asked}: list more in {kind}",
            )

    def revising_principle(self, id: str) -> RevisingPrinciple:
        """Return the revising principle with this id."""
        return next(principle for principle in self.revising if principle.id == id)

    def comparing_principle(self, id: str) -> ComparingPrinciple:
        """Return the comparing principle with this id."""
        return next(principle for principle in self.comparing if principle.id == id)


def shipped() -> list[str]:
    """Return the names of the shipped constitutions."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_constitution(spec: str) -> Constitution:
    """Read a constitution.

    Args:
        spec: name of a shipped constitution, or the path of a YAML file.

    Raises:
        MissingError: neither a shipped constitution nor a file has this name.
        ConstitutionError: the file is not a constitution; the message names the place.
    """
    path = SHIPPED / f"{spec}.yaml" if spec in shipped() else Path(spec).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(spec, shipped(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped())}"
        raise MissingError("no-constitution", f"there is no constitution {spec!r}, and no such file: {hint}")
    if path.stat().st_size > LARGEST_FILE:
        raise ConstitutionError(
            "file-too-large", f"{spec} is not a constitution: it has more than {LARGEST_FILE:,} bytes"
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
        _require_wording(content)
        return _read(Constitution, content, "")
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConstitutionError("invalid-yaml", f"{spec} is invalid YAML: {' '.join(str(error).split())}") from None
    except ConstitutionError as error:
        raise ConstitutionError(error.code, f"{spec}: {error}") from None


def _require_wording(content: Any) -> None:
    """Require complete wording in another language, because a judge asked half in English may answer in English."""
    if not isinstance(content, dict) or str(content.get("language")).split("-")[0] == "en":
        return
    given = content.get("wording")
    missing = [one.name for one in dataclasses.fields(Wording) if not isinstance(given, dict) or one.name not in given]
    if missing:
        raise ConstitutionError(
            "wording-incomplete",
            f"its language is {content.get('language')!r}, and the default wording is English: "
            f"wording must define {', '.join(missing)}",
        )


class _PlainLoader(yaml.SafeLoader):
    """Loads plain values only; refuses aliases and duplicate keys, which could hide content from a reader."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name): write the text out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} occurs twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


Kind = TypeVar("Kind")


def _read(kind: type[Kind], value: Any, where: str) -> Kind:
    """Read a mapping as a dataclass, each value checked against its field's type."""
    if not isinstance(value, dict):
        raise ConstitutionError("wrong-value", f"{where or 'the file'} must be a mapping of names to values")
    hints = typing.get_type_hints(kind)
    fields = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in value:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f": did you mean {near[0]}?" if near else f"; known are {', '.join(fields)}"
            raise ConstitutionError("unknown-name", f"{_at(where, name)} is not known{hint}")
    for name, one in fields.items():
        needed = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if needed and name not in value:
            raise ConstitutionError("missing-name", f"{where or 'the file'} has no {name}")
    return kind(**{name: _value(hints[name], item, _at(where, name)) for name, item in value.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """Check one value against a type: text, integer, one of several texts, list or dataclass."""
    if dataclasses.is_dataclass(hint):
        return _read(hint, value, where)  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConstitutionError("wrong-value", f"{where} must be a list")
        return tuple(_value(typing.get_args(hint)[0], item, f"{where}[{place}]") for place, item in enumerate(value))
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ConstitutionError("wrong-value", f"{where} must be {' or '.join(typing.get_args(hint))}")
        return value
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConstitutionError("wrong-value", f"{where} must be a whole number, 1 or more")
        return value
    if not isinstance(value, str) or not value.strip():
        raise ConstitutionError("wrong-value", f"{where} must be text")
    return value.strip()


def _at(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def answered(prompt: Prompt, completion: str | list[Message]) -> Prompt:
    """Return a prompt and its completion as one text or conversation, in the form of the prompt."""
    if isinstance(prompt, str):
        return prompt + spaced(prompt, text_of(completion))
    turns = completion if isinstance(completion, list) else [_turn("assistant", completion)]
    if prompt and prompt[-1]["role"] == "assistant":  # an unfinished assistant turn, to be continued
        return [*prompt[:-1], _turn("assistant", prompt[-1]["content"] + turns[0]["content"]), *turns[1:]]
    return [*prompt, *turns]


def spaced(prompt: Prompt, completion: str) -> str:
    """Prepend a space to a completion if neither it nor the plain prompt before it has one."""
    apart = not isinstance(prompt, str) or not prompt or prompt[-1].isspace() or completion[:1].isspace()
    return completion if apart else f" {completion}"


def critique_prompt(
    constitution: Constitution, principle: RevisingPrinciple, prompt: Prompt, completion: str
) -> Prompt:
    """Return the prompt of a critique: examples, conversation, request."""
    wording, whole = constitution.wording, answered(prompt, completion)
    if isinstance(whole, str):
        opened = f"\n\n{wording.critique_request}: {principle.critique}\n\n{wording.critique}:"
        return _examples_in_text(constitution) + whole + opened
    return _after_examples(constitution, whole, with_critique=True) + [_turn("user", principle.critique)]


def revision_prompt(
    constitution: Constitution, principle: RevisingPrinciple, prompt: Prompt, completion: str, critique: str | None
) -> Prompt:
    """Return the prompt of a revision; without a critique the request follows the answer."""
    wording, whole = constitution.wording, answered(prompt, completion)
    if isinstance(whole, str):
        asked = f"\n\n{wording.revision_request}: {principle.revision}\n\n{wording.revision}:"
        if critique is None:
            return _examples_in_text(constitution, with_critique=False) + whole + asked
        return f"{critique_prompt(constitution, principle, prompt, completion)} {critique}{asked}"
    turns = _after_examples(constitution, whole, with_critique=critique is not None)
    if critique is not None:
        turns += [_turn("user", principle.critique), _turn("assistant", critique)]
    return [*turns, _turn("user", principle.revision)]


def comparison_messages(
    constitution: Constitution, principle: ComparingPrinciple, prompt: Prompt, first: str, second: str
) -> list[Message]:
    """Return the messages to a judge: examples with their answers, then the question."""
    turns: list[Message] = []
    for example in constitution.comparison_examples:
        shown = constitution.comparing_principle(example.principle)
        turns.append(_turn("user", _filled(constitution.wording, shown, example.prompt, example.first, example.second)))
        turns.append(_turn("assistant", _verdict(constitution.wording, example)))
    return [*turns, _turn("user", _filled(constitution.wording, principle, prompt, first, second))]


def _filled(wording: Wording, principle: ComparingPrinciple, prompt: Prompt, first: str, second: str) -> str:
    """Fill the placeholders of the question; inserted text is not searched for placeholders."""
    values = {
        "conversation": _transcript(wording, prompt),
        "question": principle.question,
        "first": first.strip(),
        "second": second.strip(),
    }
    return re.sub(r"\{(\w+)\}", lambda place: values[place.group(1)], wording.comparison)


def _transcript(wording: Wording, prompt: Prompt) -> str:
    """Return a prompt as a transcript; plain text that already is a transcript is unchanged."""
    if isinstance(prompt, str):
        told = re.search(rf"^\s*(?:Human|{re.escape(wording.human)}):", prompt)
        return prompt.strip() if told else f"{wording.human}: {prompt.strip()}"
    return as_text(prompt, wording).removesuffix(f"\n\n{wording.assistant}:")


def _verdict(wording: Wording, example: ComparisonExample) -> str:
    return f"{wording.answer}{example.answer}{')' if wording.answer.endswith('(') else ''}"


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _after_examples(constitution: Constitution, conversation: list[Message], with_critique: bool) -> list[Message]:
    """Insert the turns of the examples after the system turns of a conversation."""
    shown: list[Message] = []
    for example in constitution.revision_examples:
        principle = constitution.revising_principle(example.principle)
        shown += [_turn("user", example.prompt), _turn("assistant", example.completion)]
        if with_critique:
            shown += [_turn("user", principle.critique), _turn("assistant", example.critique)]
        shown += [_turn("user", principle.revision), _turn("assistant", example.revision)]
    systems = next((place for place, turn in enumerate(conversation) if turn["role"] != "system"), 0)
    return [*conversation[:systems], *shown, *conversation[systems:]]


def _examples_in_text(constitution: Constitution, with_critique: bool = True) -> str:
    wording, parts = constitution.wording, []
    for example in constitution.revision_examples:
        principle = constitution.revising_principle(example.principle)
        said = [(wording.human, example.prompt), (wording.assistant, example.completion)]
        if with_critique:
            said += [(wording.critique_request, principle.critique), (wording.critique, example.critique)]
        said += [(wording.revision_request, principle.revision), (wording.revision, example.revision)]
        parts.append("\n\n".join(f"{head}: {text}" for head, text in said) + "\n\n---\n\n")
    return "".join(parts)
