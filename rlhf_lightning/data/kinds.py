"""What kind of rows a table holds, seen from its columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rlhf_lightning.data import formats
from rlhf_lightning.data.formats import Form, Reader


class Kind(NamedTuple):
    """Rows of one kind.

    Attributes:
        read: reads a row of any form of that kind.
        forms: the forms it reads.
    """

    read: Reader
    forms: tuple[Form, ...]


KINDS = {
    "process": Kind(formats.process, formats.PROCESS_FORMS),
    "preference": Kind(formats.preference_with_ties, formats.PREFERENCE_FORMS),
    "unpaired": Kind(formats.unpaired, formats.UNPAIRED_FORMS[:2]),
    "sft": Kind(formats.demonstration, formats.DEMONSTRATION_FORMS),
    "prompt": Kind(formats.prompt, formats.PROMPT_FORMS),
}
"""Kinds by the name of their DataModule, those whose forms ask for more columns first."""


def kind_of(columns: Iterable[str], where: str) -> str:
    """Name of the first kind, one of whose forms the columns hold.

    Args:
        columns: names of columns.
        where: what has them, for the message.

    Raises:
        ValueError: they hold no form, with the nearest right names.
    """
    found = list(dict.fromkeys(columns))
    for name, kind in KINDS.items():
        if any(set(form) <= set(found) for form in kind.forms):
            return name
    raise formats.no_form(found, tuple(dict.fromkeys(form for kind in KINDS.values() for form in kind.forms)), where)
