"""Test what the comparison of engines over seeds decides, and that its second first update is that of the trainer."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_rows, save_policy

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments" / "engines"))

import seeds

from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import SlotEngine


def runs(score: float = 0.0, loss: float = 0.0) -> list[dict[str, Any]]:
    """Return finished runs, with some differences of vLLM."""
    found = []
    for objective in seeds.OBJECTIVES:
        for seed in range(3):
            row = {"objective": objective, "seed": seed, "score": 0.5 + 0.01 * seed, "curve": [0.4, 0.5], "seconds": 1}
            found.append({**row, "engine": "SlotEngine"})
            first = {"loss": [0.1 + loss, 0.1], "norm": [1.0, 1.0], "sync_error": 1e-5}
            found.append({**row, "engine": "vLLM", "score": row["score"] + score, **first})
    return found


@pytest.mark.parametrize(
    ("score", "loss", "within"), [(0.07, 9e-5, True), (0.09, 0.0, False), (-0.09, 0.0, False), (0.0, 2e-4, False)]
)
def test_both_bounds_decide(tmp_path: Path, score: float, loss: float, within: bool) -> None:
    page = tmp_path / "page.md"
    given = Namespace(objectives=list(seeds.OBJECTIVES), model="model", held_out=48, page=page)
    assert seeds.write_page(runs(score, loss), given) == within
    assert f"{score:+.3f}" in page.read_text()


def test_the_score_is_the_share_of_short_words() -> None:
    assert seeds.short_words([], ["a cat sleeps here", "", "sleeping"]) == [0.5, 0.0, 0.0]


def test_completions_drawn_before_get_the_trainers_logprobs(tmp_path: Path) -> None:
    policy = load_policy(save_policy(tmp_path / "policy"))
    prompts = [torch.tensor(prompt) for prompt, _ in random_rows(3, seed=5, prompt=6)]
    given = (policy, prompts, torch.arange(3), SamplingSettings(5, 1.0), 7, [1])
    drawn = SlotEngine().sample(*given)
    again = seeds.Again([ids.tolist() for ids in drawn.ids]).sample(*given)
    assert torch.equal(again.finished, drawn.finished)
    for found, expected in zip(again.logprobs, drawn.logprobs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
