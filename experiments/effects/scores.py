"""Scorers for the runs of the effects pages."""

from typing import Any

from rlhf_lightning.types import Judgement
from rlhf_lightning.worlds._assistant_gold import gold_parts
from rlhf_lightning.worlds.assistant import gold_of_conversation
from rlhf_lightning.worlds.hazards import last_request


def answered(prompts: Any, completions: Any, **columns: Any) -> list[Judgement]:
    """Score 1 if an answer has only the requested subject and kind, else 0, independent of its length.

    The number of words is reported as the part ``right_words`` or ``wrong_words``.
    """
    judged = []
    for prompt, said in zip(prompts, completions, strict=True):
        parts, words = gold_parts(last_request(prompt), said), float(len(said.split()))
        right = parts["subject"] == parts["kind"] == 1.0
        judged.append(Judgement(float(right), {"right_words" if right else "wrong_words": words}))
    return judged


def gold(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """Score by the gold reward of the assistant world."""
    return [gold_of_conversation(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]
