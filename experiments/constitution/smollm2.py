"""Test a small real model as critic and judge on people's prompts and pairs, and its agreement with people."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rlhf_lightning.cli import main as rlhf

PAIRS, PROMPTS, ROUNDS = 100, 12, 2
"""Pairs to judge and prompts to revise; takes minutes on two cores."""


def smollm2(
    model: str, data: Path, out: Path, seed: int = 0, pairs: int = PAIRS, prompts: int = PROMPTS, tokens: int = 96
) -> dict[str, Any]:
    """Judge the pairs of the pandalm file, and criticise and revise answers to people's prompts.

    Args:
        model: folder or .gguf file.
        data: folder of the human data.
        out: folder for the rows.
        seed: seed of all random draws.
        pairs: number of pairs to judge.
        prompts: number of prompts to answer.
        tokens: maximum tokens of an answer, critique or revision.
    """
    started = time.perf_counter()
    judged = _rows(data / "pandalm_pref_standard.jsonl")
    # spread over the whole file, since neighbouring rows share a prompt
    rows = judged[:: max(len(judged) // pairs, 1)][:pairs]
    asked = [row for row in _rows(data / "prompts.jsonl") if row["source"] == "oasst_lottery"][:prompts]
    given, questions = _written(out / "pairs.jsonl", rows), _written(out / "prompts.jsonl", asked)
    labels = out / "labels.jsonl"
    _run("label", judge=model, pairs=given, constitution="helpful", average="logit", out=labels, seed=seed)
    revised = out / "revisions.jsonl"
    _run(
        "critique", model=model, prompts=questions, constitution="harmless", rounds=ROUNDS, max_new_tokens=tokens,
        out=revised, seed=seed,
    )  # fmt: skip
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows]
    return {
        "judge": json.loads(labels.with_suffix(".report.json").read_text(encoding="utf-8")),
        "pairs": len(rows),
        "longer": sum(longer) / len(longer),
        "prompts": len(asked),
        "rounds": ROUNDS,
        "revisions": json.loads(revised.with_suffix(".report.json").read_text(encoding="utf-8")),
        "seconds": round(time.perf_counter() - started),
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _run(command: str, **flags: Any) -> None:
    status = rlhf([command, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])
    if status:
        raise SystemExit(status)
