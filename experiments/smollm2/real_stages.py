"""Row budgets, data and `rlhf fit` command lines of the stages of the real run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FILES = {
    "demonstrations": "sft_instruct_train.jsonl",
    "demonstrations_test": "sft_instruct_test.jsonl",
    "truthful": "truthfulqa_pref.jsonl",
    "harmless": "hh_harmless_train.jsonl",
    "harmless_test": "hh_harmless_test.jsonl",
}


@dataclass(frozen=True)
class Budget:
    """Rows, lengths and updates of each stage.

    Attributes:
        sft_rows: number of training demonstrations, the first of the file with at most ``sft_characters``.
        sft_eval_rows: number of evaluation demonstrations, chosen in the same way from the test file.
        sft_characters: maximum length of a demonstration, in characters over all turns.
        reward_rows: number of training pairs of the reward model, the first of the file. PPO uses their prompts too.
        reward_eval_rows: number of its evaluation pairs, the last of the file.
        reward_epochs: passes over the pairs.
        dpo_rows: number of training pairs of DPO, the first of the file with at most ``dpo_characters``.
        dpo_eval_rows: number of its evaluation pairs, chosen in the same way from the test file.
        dpo_characters: maximum length of a training pair, in characters of its prompt and its longer completion.
        dpo_eval_characters: maximum length of an evaluation pair.
        dpo_prompts: number of held-out questions that DPO's policy answers, to measure its KL.
        rollouts: number of PPO rollouts.
        episodes: completions per rollout.
        ppo_eval_rows: number of held-out prompts answered before and after PPO, the first of the reward model's.
        max_new_tokens: maximum length of a sampled completion, in tokens.
        batch_size: rows per update in the stages on fixed data.
        mini_batch_size: episodes per update in PPO.
        shown: number of prompts whose answers are in the report.
    """

    sft_rows: int = 112
    sft_eval_rows: int = 30
    sft_characters: int = 400
    reward_rows: int = 240
    reward_eval_rows: int = 260
    reward_epochs: int = 3
    dpo_rows: int = 304
    dpo_eval_rows: int = 172
    dpo_characters: int = 300
    dpo_eval_characters: int = 600
    dpo_prompts: int = 32
    rollouts: int = 4
    episodes: int = 48
    ppo_eval_rows: int = 80
    max_new_tokens: int = 32
    batch_size: int = 16
    mini_batch_size: int = 16
    shown: int = 4


FULL = Budget()
SMOKE = Budget(
    sft_rows=16,
    sft_eval_rows=8,
    sft_characters=300,
    reward_rows=32,
    reward_eval_rows=24,
    reward_epochs=1,
    dpo_rows=16,
    dpo_eval_rows=8,
    dpo_characters=250,
    dpo_eval_characters=250,
    dpo_prompts=4,
    rollouts=2,
    episodes=8,
    ppo_eval_rows=12,
    max_new_tokens=12,
    batch_size=8,
    mini_batch_size=8,
    shown=2,
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def characters_of(row: dict[str, Any]) -> int:
    """Return the characters of a conversation, or of a pair's prompt and its longer completion."""
    turns = {name: sum(len(turn["content"]) for turn in row[name]) for name in row if isinstance(row[name], list)}
    if "messages" in turns:
        return turns["messages"]
    return turns["prompt"] + max(turns["chosen"], turns["rejected"])


def first_short(rows: Iterable[dict[str, Any]], count: int, characters: int) -> list[dict[str, Any]]:
    """Return the first rows with at most the given number of characters."""
    return list(islice((row for row in rows if characters_of(row) <= characters), count))


def split_pairs(
    rows: Sequence[dict[str, Any]], train: int, held_out: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the first and the last rows.

    Raises:
        ValueError: the two parts overlap, or a prompt is in both.
    """
    if train + held_out > len(rows):
        raise ValueError(f"{train} training rows and {held_out} held-out rows overlap: the file has {len(rows)}")
    first, last = list(rows[:train]), list(rows[len(rows) - held_out :])
    shared = {json.dumps(row["prompt"]) for row in first} & {json.dumps(row["prompt"]) for row in last}
    if shared:
        raise ValueError(f"{len(shared)} prompts are in the training and in the held-out part")
    return first, last


def write_data(folder: Path, private: Path, data: Path, budget: Budget) -> dict[str, str]:
    """Write the training and evaluation rows of each stage; return the path of each part.

    Args:
        folder: folder to write.
        private: folder for the harmlessness pairs, which have offensive prompts and are kept out of reports.
        data: folder of the human data.
        budget: number of rows.
    """

    def short(name: str, count: int, characters: int) -> list[dict[str, Any]]:
        return first_short(read_rows(data / FILES[name]), count, characters)

    pairs, unseen = split_pairs(read_rows(data / FILES["truthful"]), budget.reward_rows, budget.reward_eval_rows)
    parts = {
        folder / "sft.jsonl": short("demonstrations", budget.sft_rows, budget.sft_characters),
        folder / "sft_test.jsonl": short("demonstrations_test", budget.sft_eval_rows, budget.sft_characters),
        folder / "truthful.jsonl": pairs,
        folder / "truthful_test.jsonl": unseen,
        private / "harmless.jsonl": short("harmless", budget.dpo_rows, budget.dpo_characters),
        private / "harmless_test.jsonl": short("harmless_test", budget.dpo_eval_rows, budget.dpo_eval_characters),
    }
    for path, rows in parts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {path.stem: str(path) for path in parts}


def stage_flags(stage: str, budget: Budget, paths: dict[str, str]) -> dict[str, Any]:
    """Return a stage's deviations from its YAML file: paths of the rows, and its budget."""
    if stage == "sft":
        return {
            "data.source": paths["sft"],
            "data.eval_source": paths["sft_test"],
            "data.batch_size": budget.batch_size,
        }
    if stage == "reward":
        return {
            "data.source": paths["truthful"],
            "data.eval_source": paths["truthful_test"],
            "data.batch_size": budget.batch_size,
            "trainer.max_epochs": budget.reward_epochs,
            "trainer.check_val_every_n_epoch": budget.reward_epochs,
            # Before training, the score is that of a random head, so there is no evaluation to compare with.
            "trainer.num_sanity_val_steps": 0,
        }
    if stage == "dpo":
        return {
            "data.source": paths["harmless"],
            "data.eval_source": paths["harmless_test"],
            "data.batch_size": budget.batch_size,
            # There is time for only about 20 updates, so the learning rate is high.
            "model.learning_rate": 5e-4,
            # These prompts are offensive: they are used for training, but never shown.
            "samples.prompts": 0,
            # Before training, the policy equals the reference: every margin is exactly 0.
            "trainer.num_sanity_val_steps": 0,
        }
    held_out = [{"path": paths["truthful_test"], "rows": budget.ppo_eval_rows}]
    return {
        "data.source": paths["truthful"],
        "data.eval_source": json.dumps(held_out),
        "data.batch_size": budget.episodes,
        "data.rollouts": budget.rollouts,
        "model.mini_batch_size": budget.mini_batch_size,
        "model.max_new_tokens": budget.max_new_tokens,
    }


def command(
    stage: str, budget: Budget, paths: dict[str, str], start: str, out: Path, seed: int, scorer: str | None = None
) -> list[str]:
    """Return the command line of a stage, without `rlhf`.

    Args:
        stage: name of the YAML file.
        budget: rows and lengths.
        paths: paths of the rows.
        start: folder or hub id of the start model.
        out: folder of the runs.
        seed: global seed.
        scorer: folder of the reward model, for PPO.
    """
    flags: dict[str, Any] = {
        "config": f"recipe:{stage}",
        "seed_everything": seed,
        "runs_folder": out,
        "run_name": stage,
        "model.init_from": start,
        "model.seed": seed,
        "data.seed": seed,
        "data.eval_rows": 0,
        "samples.prompts": 2,
        "samples.max_new_tokens": budget.max_new_tokens,
        # Evaluate all held-out rows before training, for comparison.
        "trainer.num_sanity_val_steps": -1,
        "trainer.callbacks": json.dumps([{"class_path": "held_out.HeldOutRows"}]),
        # The next stage starts from the exported folder; checkpoints with Adam's moments would take gigabytes.
        "trainer.enable_checkpointing": "false",
        "trainer.accelerator": "cpu",
        **stage_flags(stage, budget, paths),
    }
    if scorer is not None:
        flags["model.scorer"] = scorer
    return ["fit", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
