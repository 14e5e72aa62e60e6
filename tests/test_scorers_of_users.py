"""Train with scorers and data from users' files, and check their values."""

import ast
import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_folders import one_thread, policy_folder
from tiny_models import (
    assert_same,
    quiet_trainer,
    weights_of,
)

from rlhf_lightning.modules import GRPOModule
from rlhf_lightning.types import Rollout

__all__ = ["one_thread", "policy_folder"]

USERS = Path(__file__).resolve().parents[1] / "experiments" / "objectives_of_users"
FILES = ["success_curriculum"]


@pytest.fixture(autouse=True)
def users_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(USERS)])


class Rollouts(pl.Callback):
    """Records every training rollout."""

    def __init__(self) -> None:
        self.kept: list[Rollout] = []

    def on_rollout_end(self, trainer: Any, module: Any, rollout: Rollout, means: Any) -> None:
        self.kept.append(rollout)


# -- a curriculum -----------------------------------------------------------------------------------------------------


def solved(prompts: Any, completions: list[str], **columns: Any) -> list[float | None]:
    """Score prompts that are always, never or sometimes solved, by their kind; a few completions have no score."""
    by_text = [sum(map(ord, text)) for text in completions]
    chance = {"always": lambda n: 1.0, "never": lambda n: 0.0, "sometimes": lambda n: None if n % 7 == 0 else n % 2}
    return [chance[kind](n) for kind, n in zip(columns["kind"], by_text, strict=True)]


KINDS = ["always", "never", "never", "sometimes"] * 4


def curriculum(
    folder: str, tmp_path: Path, rollouts: int, resume: str | None = None, callbacks: Any = (), **trainer: Any
) -> Any:
    """Return the rollouts, weights and DataModule of a run."""
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"w{20 + n} w9", "kind": kind}) + "\n" for n, kind in enumerate(KINDS)]
    file.write_text("".join(lines))
    kind = __import__("success_curriculum").SuccessCurriculum
    data = kind(
        str(file), decay=0.25, floor=0.02, batch_size=16, samples_per_prompt=4, rollouts=rollouts,
        cache_dir=str(tmp_path / "cache"), seed=3,
    )  # fmt: skip
    kept = Rollouts()
    module = GRPOModule(
        scorer=solved, init_from=folder, learning_rate=1e-3, lr_schedule="constant", max_new_tokens=4, kl_coef=0.0
    )
    trained = quiet_trainer(callbacks=[kept, *callbacks], limit_val_batches=0, **trainer)
    trained.fit(module, data, ckpt_path=resume)
    return kept.kept, weights_of(module), data


def test_partly_solved_prompts_are_sampled_more_often(policy_folder: str, tmp_path: Path) -> None:
    rollouts, _, data = curriculum(policy_folder, tmp_path, 40)
    rates = [0.5] * len(KINDS)
    for rollout in rollouts:
        judged = [(row, s) for row, s in zip(rollout.row_ids, rollout.scores.tolist(), strict=True) if s == s]
        for row in {row for row, _ in judged}:
            own = [score for other, score in judged if other == row]
            rates[row] = 0.25 * rates[row] + 0.75 * sum(own) / len(own)
    assert [data.rates.get(row, 0.5) for row in range(len(KINDS))] == pytest.approx(rates, abs=1e-6)
    taken = [KINDS[row] for rollout in rollouts[10:] for row in rollout.row_ids[::4]]
    assert len(taken) == 30 * 4
    assert taken.count("sometimes") > 0.5 * len(taken), "a quarter of the prompts"
    assert all(kind in taken for kind in KINDS), "no prompt is given up"


def test_prompts_are_sampled_proportionally_to_learnability(policy_folder: str, tmp_path: Path) -> None:
    _, _, data = curriculum(policy_folder, tmp_path, 1)
    data.rates = {row: row / 15 for row in range(16)}
    weights = [row / 15 * (1 - row / 15) + 0.02 for row in range(16)]
    drawn = [int(data.choose_rows(n, 1)[0]) for n in range(4000)]
    for row, weight in enumerate(weights):
        expected = weight / sum(weights)
        assert drawn.count(row) / 4000 == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000)), row


def test_a_resumed_curriculum_is_bit_identical(policy_folder: str, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    whole, weights, data = curriculum(policy_folder, tmp_path, 8, callbacks=[saves], enable_checkpointing=True)
    rest, resumed, again = curriculum(policy_folder, tmp_path, 8, resume=str(tmp_path / "step=5.ckpt"))
    assert len(rest) == 3
    assert [rollout.row_ids for rollout in rest] == [rollout.row_ids for rollout in whole[5:]]
    assert_same(resumed, weights, rtol=0, atol=0)
    assert again.rates == data.rates


# -- how much a user writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_user_files_are_short_and_use_only_public_names(file: str) -> None:
    tree = ast.parse((USERS / f"{file}.py").read_text())
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    names += [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [name for name in names if name.startswith("_") and name not in ("__init__", "__call__", "_replace")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    own = [line for line in ast.unparse(tree).splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(own) <= 40, len(own)
