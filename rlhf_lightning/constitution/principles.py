"""Constitutions: written principles to criticise, revise and compare by, as versioned YAML (arXiv 2212.08073).

A file holds plain values alone, each is checked, and the whole has a fingerprint that goes wherever its labels go::

    name: harmless
    version: 1
    language: en
    revising:              # principles to criticise and to revise by
      - id: danger
        critique: Say where your last answer could ...
        revision: Rewrite your last answer so that ...
    comparing:             # principles to compare by
      - id: danger
        question: Which answer is less likely to ...?
    revision_examples: [{prompt, completion, principle, critique, revision}, ...]
    comparison_examples: [{prompt, first, second, principle, answer: A or B}, ...]
    wording: {...}         # what is said around them, see `Wording`; English where it is left out
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from rlhf_lightning.data.feedback.records import digest
from rlhf_lightning.errors import MissingError
from rlhf_lightning.scoring.judges.judge import ComparingPrinciple, ConstitutionError, Wording

SHIPPED = Path(__file__).parent / "constitutions"
LARGEST_FILE = 1_000_000
"""Bytes of a constitution: principles are read by people."""

Letter = Literal["A", "B"]


@dataclass(frozen=True)
class RevisingPrinciple:
    """A principle to criticise and to revise an answer by.

    Attributes:
        id: short name, unique in its list.
        critique: the request for a critique.
        revision: the request for a revision.
    """

    id: str
    critique: str
    revision: str


@dataclass(frozen=True)
class RevisionExample:
    """An answer that was criticised and revised, shown before the one at hand.

    Attributes:
        prompt: what was asked.
        completion: what was answered.
        principle: id of the principle.
        critique: what is wrong with it.
        revision: the better answer.
    """

    prompt: str
    completion: str
    principle: str
    critique: str
    revision: str


@dataclass(frozen=True)
class ComparisonExample:
    """Two answers that were compared, shown before those at hand.

    Attributes:
        prompt: what was asked.
        first: the answer shown as (A).
        second: the answer shown as (B).
        principle: id of the principle.
        answer: the letter of the better one.
    """

    prompt: str
    first: str
    second: str
    principle: str
    answer: Letter


@dataclass(frozen=True)
class Constitution:
    """Principles and the words that they are put in.

    Attributes:
        name: what it is called.
        version: counts its editions.
        language: of everything in it, such as ``en``.
        revising: principles to criticise and revise by.
        comparing: principles to compare by.
        revision_examples: shown before a critique.
        comparison_examples: shown before a comparison.
        wording: what is said around the principles.
    """

    name: str
    version: int
    language: str
    revising: tuple[RevisingPrinciple, ...] = ()
    comparing: tuple[ComparingPrinciple, ...] = ()
    revision_examples: tuple[RevisionExample, ...] = ()
    comparison_examples: tuple[ComparisonExample, ...] = ()
    wording: Wording = field(default_factory=Wording)

    def __post_init__(self) -> None:
        if not (self.revising or self.comparing):
            raise ConstitutionError("no-principles", "it has no principles: neither revising nor comparing lists one")
        for name in ("revising", "comparing"):
            ids = [principle.id for principle in getattr(self, name)]
            twice = next((one for one in ids if ids.count(one) > 1), None)
            if twice is not None:
                raise ConstitutionError("duplicate-id", f"{name} has the id {twice!r} twice")
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
        """Hash of everything in it: two constitutions with equal fingerprints ask the same."""
        return digest(dataclasses.asdict(self))

    @property
    def title(self) -> str:
        """Name, version and the beginning of the fingerprint."""
        return f"{self.name} v{self.version} ({self.fingerprint[:8]})"

    def revising_principle(self, id: str) -> RevisingPrinciple:
        """The principle to revise by of that id."""
        return next(principle for principle in self.revising if principle.id == id)

    def comparing_principle(self, id: str) -> ComparingPrinciple:
        """The principle to compare by of that id."""
        return next(principle for principle in self.comparing if principle.id == id)


def shipped() -> list[str]:
    """Names of the constitutions that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_constitution(spec: str) -> Constitution:
    """Read a constitution.

    Args:
        spec: name of a shipped one, or the path of a YAML file.

    Raises:
        MissingError: there is none of that name, and no such file.
        ConstitutionError: the file is no constitution; the message names the place.
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
    """Judges and critics asked half in English would answer in either language."""
    if not isinstance(content, dict) or str(content.get("language")).split("-")[0] == "en":
        return
    given = content.get("wording")
    missing = [one.name for one in dataclasses.fields(Wording) if not isinstance(given, dict) or one.name not in given]
    if missing:
        raise ConstitutionError(
            "wording-incomplete",
            f"its language is {content.get('language')!r}, and the default wording is English: "
            f"wording must say {', '.join(missing)}",
        )


class _PlainLoader(yaml.SafeLoader):
    """Plain values without aliases, each key once: what a reader of the file sees is what is used."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name): write the text out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} is there twice (line {node.start_mark.line + 1})")
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
    """Check one value against a type: text, a whole number, one of some texts, a list or a dataclass."""
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
