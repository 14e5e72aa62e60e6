"""Read pairs with known winners, and completions with known rewards, for ``rlhf evaluate-reward``."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rlhf_lightning.data.canonical import RowRefused
from rlhf_lightning.data.formats import preference_with_ties, prompt, read_row
from rlhf_lightning.data.sources import usable_rows
from rlhf_lightning.errors import DataError, SettingError
from rlhf_lightning.evaluation.completions import Row, written
from rlhf_lightning.evaluation.overoptimization import FEWEST
from rlhf_lightning.evaluation.reward_benchmarks import KnownList
from rlhf_lightning.evaluation.reward_models import KnownPair
from rlhf_lightning.sampling.conversation import context_of
from rlhf_lightning.scoring.scorer import load_gold_reward
from rlhf_lightning.types import Prompt

TIES_ROW = re.compile(r"(tied|ref):(\d+)")
"""The column id of RewardBench 2's subset Ties."""

NO_SUBSET = "none"
"""Subset of the rows without the column of subsets."""


def read_pairs(
    path: str, subset: str | None = None, as_chat: bool = False
) -> tuple[list[KnownPair], dict[int, KnownList]]:
    """Return the pairs of a file of preferences, and by row the lists of more than two completions.

    Args:
        path: file of preferences in any format that training reads.
        subset: column that names a row's subset.
        as_chat: put plain-text prompts into a user turn.

    Raises:
        MissingError: the file does not exist.
        DataError: no row can be used.
        SettingError: no row has the column of subsets.
    """
    pairs: list[KnownPair] = []
    lists: dict[int, KnownList] = {}
    for number, (whole, found) in enumerate(usable_rows(path, partial(_pairs_of, subset=subset, as_chat=as_chat))):
        pairs += [pair._replace(row=number) for pair in found]
        if whole.size != 2 or whole.tie:
            lists[number] = whole
    if subset is not None and all(pair.subset == NO_SUBSET for pair in pairs):
        raise SettingError("unknown-column", f"no row of {path} has a column {subset!r}, which subset names")
    if all(pair.tied for pair in pairs):
        raise DataError("no-usable-rows", f"{path} has no pair with a winner")
    return pairs, lists


def _pairs_of(raw: Any, subset: str | None, as_chat: bool) -> tuple[KnownList, list[KnownPair]]:
    """Return a row as a list, and all pairs of its completions, except pairs of two wrong ones."""
    listed = _as_list(raw)
    row = read_row(listed, preference_with_ties, as_chat)
    texts = [_text(completion) for completion in row.completions]
    assert row.prompt is not None
    name = "all" if subset is None else str(row.columns.get(subset, NO_SUBSET))
    alone, pairs = len(texts) == 2, []
    for a in range(len(texts)):
        for b in range(a + 1, len(texts)):
            better, worse = (a, b) if row.ranks[a] <= row.ranks[b] else (b, a)
            if alone and row.target < 0.5:
                better, worse = worse, better
            tied = row.ranks[a] == row.ranks[b] or (alone and row.target == 0.5)
            if tied and listed is not raw and row.ranks[a] > 0:
                continue  # both are wrong, but one may be worse
            pair = KnownPair(0, row.prompt, texts[better], texts[worse], name, tied, math.nan)
            pairs.append(pair._replace(position=_position(raw, pair, better < worse), styles=_styles(raw, pair)))
    tie = TIES_ROW.fullmatch(str(row.columns.get("id"))) if listed is not raw else None
    return KnownList(len(texts), name, (tie[1], tie[2]) if tie else None), pairs


def _as_list(raw: Any) -> Any:
    """Return a row with lists of right and wrong completions, as in RewardBench 2 and RM-Bench, as a ranked list."""
    row: Any = raw if isinstance(raw, Mapping) else {}
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not _are_texts(chosen) or not _are_texts(rejected):
        return raw
    ranked = {"completions": [*chosen, *rejected], "ranks": [0] * len(chosen) + [1] * len(rejected)}
    return {name: value for name, value in row.items() if name not in ("chosen", "rejected")} | ranked


def _are_texts(side: Any) -> bool:
    return isinstance(side, list) and bool(side) and all(isinstance(text, str) for text in side)


def _styles(raw: Any, pair: KnownPair) -> tuple[tuple[int, int], ...]:
    """Return the places of both texts in lists with a completion of each style (RM-Bench); empty for other rows."""
    chosen, rejected = raw.get("chosen"), raw.get("rejected")
    if not _are_texts(chosen) or not _are_texts(rejected) or not len(chosen) == len(rejected) > 1:
        return ()
    cells = ((i, j) for i, a in enumerate(chosen) for j, b in enumerate(rejected) if (a, b) == pair[2:4])
    return tuple(cells)


def _position(raw: Any, pair: KnownPair, earlier: bool) -> float:
    if "completion_1" in raw:
        return 1.0 if raw["completion_1"] == pair.chosen else -1.0
    return (1.0 if earlier else -1.0) if "ranks" in raw else math.nan


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) != 1 or not isinstance(completion[0].get("content"), str):
        raise RowRefused("a completion has several turns")
    return str(completion[0]["content"])


def read_samples(path: str, gold: str, as_chat: bool = False) -> list[list[Row]]:
    """Return the completions of each prompt with their known true reward.

    A row has ``prompt``, ``completion``, ``gold``, and ``asked``, the context of the completion, which a scorer gets.
    The context is the prompt; in an episode with ``turns`` it also has the turns before the last one.

    Args:
        path: file with a row for each completion or episode, as `rlhf generate` writes, or a list ``completions`` in
            each row.
        gold: import path of a function ``(prompt, completion) -> reward``, or the column with the reward, or with the
            list of rewards.
        as_chat: put plain-text prompts into a user turn.

    Raises:
        MissingError: the file does not exist.
        DataError: no row can be used, or no prompt has `FEWEST` completions.
    """
    reward = load_gold_reward(gold) if "." in gold else None

    def read(raw: Any) -> list[Row]:
        asked, row = read_row(raw, prompt, as_chat).prompt, raw
        assert asked is not None
        if "completions" not in raw:
            row = {"completions": [raw.get("completion")], gold: [raw.get(gold)]}
        texts, known, turns = row["completions"], row.get(gold), raw.get("turns")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RowRefused("its completions are not texts")
        found: list[Row] = [{"prompt": asked, "asked": asked, "completion": text} for text in texts]
        if turns is not None:
            found = [{**found[0], "asked": _context(asked, turns, texts), "turns": turns}]
        if reward is not None:
            known = [float(reward(asked, written(one))) for one in found]
        if not isinstance(known, list) or len(known) != len(texts) or not all(map(_is_finite, known)):
            raise RowRefused(f"{gold} is not a finite number for each completion")
        return [{**one, "gold": value} for one, value in zip(found, known, strict=True)]

    groups: dict[str, list[Row]] = {}
    for rows in usable_rows(path, read, "no completions with a gold reward"):
        for row in rows:
            groups.setdefault(json.dumps(row["prompt"], sort_keys=True), []).append(row)
    found = [group for group in groups.values() if len(group) >= FEWEST]
    if few := len(groups) - len(found):
        print(f"{path}: left out {few} prompts with fewer than {FEWEST} completions", file=sys.stderr)
    if not found:
        raise DataError(
            "no-usable-rows", f"{path} has no prompt with {FEWEST} completions: rlhf generate --samples 8 writes 8 each"
        )
    return found


def _context(asked: Prompt, turns: Any, texts: Sequence[str]) -> Prompt:
    """Return the prompt and the turns of an episode before the last one, which is the only text."""
    messages = (
        [turn for turn in turns if isinstance(turn, dict) and "content" in turn] if isinstance(turns, list) else []
    )
    if not messages or len(messages) < len(turns) or [messages[-1]["content"]] != texts:
        raise RowRefused("its turns do not end with its completion")
    return context_of(asked, messages[:-1])


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
