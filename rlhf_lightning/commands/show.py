"""``rlhf show``: show the tokens of rows, which of them are trained on, and why rows are dropped."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rlhf_lightning.commands.audit import load, peek
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import DataError, SettingError, check_range

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_lightning.data.tokenizing import EncodedRow, Outcome

COLOURS = {"seen": "", "learned": "32", "control": "36", "learned control": "1;32;4", "cut": "9;31"}
"""ANSI codes by the state of a token."""

MEANINGS = {
    "seen": "input only, not in the loss",
    "learned": "in the loss",
    "control": "control token that is not in the loss",
    "learned control": "control token in the loss, such as the end of a turn",
    "cut": "lost by truncation",
}


class Shown(NamedTuple):
    """A token, or several tokens that can only be decoded together."""

    text: str  # decoded text
    ids: tuple[int, ...]  # token ids
    state: str  # key of `MEANINGS`


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf show``."""
    return run_function(show, argv, "rlhf show", positional=["data"])


def show(
    data: str,
    tokenizer: str,
    row: int | None = None,
    rows: int = 5,
    kind: Literal["sft", "preference", "unpaired", "process", "prompt"] | None = None,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    chat_template: str | None = None,
    template_args: dict[str, Any] | None = None,
    as_chat: bool = False,
    rendered: bool = False,
    last_turn_only: bool = False,
    columns: dict[str, str] | None = None,
    environment: dict[str, Any] | str | None = None,
    split: str = "train",
    html: str | None = None,
) -> int:
    """Show the tokens of rows, coloured by whether they are trained on, with weights, truncation and dropped rows.

    Args:
        data: a file, glob, folder or Hub name, as for training.
        tokenizer: folder or Hub name of a tokenizer or model.
        row: show only the row of this number (from 1, in the order of the data).
        rows: number of rows to show, from the first.
        kind: type of the rows; by default derived from their columns.
        max_length: maximum tokens of prompt and completion, as in training; null for no limit.
        max_prompt_length: maximum tokens of the prompt, as in training.
        chat_template: template to use instead of the tokenizer's own.
        template_args: variables of the chat template, as in '{enable_thinking: false}'.
        as_chat: read plain text as a user turn and an assistant turn.
        rendered: plain text was rendered by a chat template, so control tokens in it are encoded as control tokens.
        last_turn_only: learn only the last turn of the assistant.
        columns: new names of columns, as in --columns '{question: prompt, answer: completion}'.
        environment: show the first prompts of this environment's episodes, by class_path and init_args.
        split: split of a Hub name or of a folder, with or without a slice.
        html: write a page with every token and its id to this file instead.
    """
    from rlhf_lightning.data.canonical import Report
    from rlhf_lightning.data.prompts import FirstPrompt
    from rlhf_lightning.data.tokenizing import encoder_for
    from rlhf_lightning.environments import load_environment

    check_range(
        all(0 < n < 2**31 for n in (rows, 1 if row is None else row)),
        "both count from 1 to 2147483647",
        row=row,
        rows=rows,
    )
    found, taken = peek(data, split, row or rows, kind, columns)
    numbered = enumerate(taken, 1)
    chosen = [(number, one) for number, one in islice(numbered, row or rows) if row is None or number == row]
    if not chosen:
        raise DataError("no-such-row", f"{data} has fewer than {row} rows")
    loaded = load(tokenizer, chat_template, template_args)
    encoder = encoder_for(
        found, columns=columns or {}, as_chat=as_chat, rendered=rendered, last_turn_only=last_turn_only
    )
    if environment is not None:
        if found != "prompt":
            raise SettingError(
                "environment-of-prompts", f"environment opens prompts, and kind is {found}: set kind prompt"
            )
        encoder = replace(encoder, read=FirstPrompt(load_environment(environment)))
    report = Report()
    outcomes = encoder.counted(loaded, [one for _, one in chosen], report)
    limits = (max_length, max_prompt_length) if found != "prompt" else (None, max_prompt_length or max_length)
    parts = [
        (f"row {number}: {headline(found, outcome)}", list(sequences(loaded, found, outcome, *limits)))
        for (number, _), outcome in zip(chosen, outcomes, strict=True)
    ]
    if html is not None:
        from rlhf_lightning.evaluation.report import write_page

        notes = ["Hover over a token to see its id."]
        shown = {"parts": parts, "meanings": MEANINGS, "summary": report.describe(data)}
        write_page(Path(html), "show.html.jinja", title=data, notes=notes, **shown)
        print(f"wrote {html}")
        return 0
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print("\n".join(as_text(parts, coloured)))
    print(report.describe(data))
    return 0


def headline(kind: str, outcome: "Outcome") -> str:
    """Return a one-line summary of a row's outcome."""
    from rlhf_lightning.data.canonical import REASONS

    if outcome.reason is not None:
        return f"dropped, {outcome.reason}: {REASONS[outcome.reason]}"
    notes = [f"{kind} data"]
    notes += [f"{len(outcome.encoded)} rows, one for each trained turn"] if outcome.split else []
    notes += ["only the last turn is trained on"] if outcome.last_turn else []
    notes += ["turns before the first user turn are context"] if outcome.assistant_first else []
    notes += ["turns after the first 256 trained turns are left out"] if outcome.turns_cut else []
    notes += ["text that spells control tokens is plain text"] if outcome.escaped else []
    notes += ["prompt and completion would be tokenized differently as one text"] if outcome.merged else []
    notes += [f"{outcome.unknown} tokens are unknown to the tokenizer"] if outcome.unknown else []
    notes += [f"not used: {', '.join(outcome.unused)}"] if outcome.unused else []
    return "; ".join(notes)


def sequences(
    tokenizer: "PreTrainedTokenizerBase", kind: str, outcome: "Outcome", limit: int | None, most: int | None
) -> Iterator[tuple[str, list[Shown]]]:
    """Yield a title and the tokens of each prompt and completion of a row."""
    from rlhf_lightning.tokenization import facts_of, opening_ids, truncate

    control, opening = facts_of(tokenizer).control_ids, opening_ids(tokenizer)
    for row in outcome.encoded:
        keep = len(opening) if tuple(row.prompt[: len(opening)]) == opening else 0
        prompt, completions = truncate(row.prompt, row.completions, limit, most, keep)
        keep, lost = min(keep, len(prompt)), len(row.prompt) - len(prompt)
        states = ["cut" if keep <= place < keep + lost else "seen" for place in range(len(row.prompt))]
        weight = "" if row.weight == 1 else f", weight {row.weight:g}"
        yield f"prompt, {len(prompt)} tokens{weight}", merged(tokenizer, row.prompt, states, control)
        for place, (ids, flags, kept) in enumerate(zip(row.completions, row.supervised, completions, strict=True)):
            states = ["learned" if flag else "seen" for flag in flags[: len(kept)]] + ["cut"] * (len(ids) - len(kept))
            learned = sum(flags[: len(kept)])
            title = f"{title_of(kind, row, place)}, {len(kept)} tokens, {learned} in the loss"
            yield title, merged(tokenizer, ids, states, control)


def title_of(kind: str, row: "EncodedRow", place: int) -> str:
    """Return the role of a completion in its row."""
    if kind == "preference":
        return ("chosen", "rejected")[place] if len(row.completions) == 2 else f"rank {row.ranks[place]}"
    return ("desirable", "undesirable")[row.ranks[place] > 0] if kind == "unpaired" else "completion"


def merged(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], states: Sequence[str], control: frozenset[int]
) -> list[Shown]:
    """Join tokens that can only be decoded together, such as the bytes of a character."""
    found: list[Shown] = []
    held: list[int] = []
    for place, index in enumerate(ids):
        held.append(index)
        text = text_after(tokenizer, ids[place - len(held)] if place >= len(held) else None, held)
        if text.endswith("\ufffd") and len(held) < 4 and place + 1 < len(ids) and states[place + 1] == states[place]:
            continue
        state = states[place]
        if index in control and state != "cut":
            state = "learned control" if state == "learned" else "control"
        found.append(Shown(text, tuple(held), state))
        held = []
    return found


def text_after(tokenizer: "PreTrainedTokenizerBase", before: int | None, ids: list[int]) -> str:
    """Decode ids in the context of the token before them: some tokenizers add a space only between two tokens."""
    alone = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if before is None:
        return alone
    first = tokenizer.decode([before], clean_up_tokenization_spaces=False)
    both = tokenizer.decode([before, *ids], clean_up_tokenization_spaces=False)
    return both[len(first) :] if both.startswith(first) and "\ufffd" not in first else alone


def as_text(parts: list[tuple[str, list[tuple[str, list[Shown]]]]], coloured: bool) -> Iterator[str]:
    """Yield lines for a terminal; without colours, one line for each run of tokens of the same state."""
    if coloured:
        yield "  ".join(painted(state, f"{state}: {meaning}") for state, meaning in MEANINGS.items())
    for head, shown in parts:
        yield from ("", head)
        for title, tokens in shown:
            yield f"  {title}"
            if coloured:
                text = "".join(painted(one.state, visible(one.text)) for one in tokens)
                yield "\n".join(f"    {line}" for line in text.split("\n"))
                continue
            yield from (f"    {state:<16}{text!r}" for state, text in runs(tokens))
    yield ""


def runs(tokens: Sequence[Shown]) -> Iterator[tuple[str, str]]:
    """Yield the joined text of neighbouring tokens of the same state."""
    state, texts = "", [""]
    for one in tokens:
        if one.state != state and any(texts):
            yield state, "".join(texts)
            texts = []
        state = one.state
        texts.append(one.text)
    if any(texts):
        yield state, "".join(texts)


def visible(text: str) -> str:
    """Make line breaks visible, and replace characters that would control a terminal."""
    kept = "".join(one if one == "\n" or one.isprintable() else f"\\x{ord(one):02x}" for one in text)
    return kept.replace("\n", "\u21b5\n")


def painted(state: str, text: str) -> str:
    """Colour a text line by line, so that each line can be indented."""
    code = COLOURS[state]
    return "\n".join(f"\033[{code}m{line}\033[0m" if code and line else line for line in text.split("\n"))
