"""Test sampling commands with an environment: generate, best-of-n, evaluate, chat, and the sample table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_environment import Talks
from many_ends import ManyEnds
from tiny_folders import policy_folder
from tiny_models import fit, prompt_step, quiet_trainer

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.chat import Conversation
from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.data import PromptDataModule, SFTDataModule
from rlhf_lightning.modules import GRPOModule, SFTModule
from rlhf_lightning.runs.samples import as_text
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.types import MultiTurn, Step

__all__ = ["policy_folder"]

ENVIRONMENT = '{"class_path": "faulty_environment.Talks"}'
FLAGS = ["--environment", ENVIRONMENT, "--engine", "many_ends.ManyEnds", "--max_turns", "3",
         "--max_new_tokens", "5", "--batch_size", "3"]  # fmt: skip


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    rows = [{"prompt": f"w{10 + number}", "kind": number % 2} for number in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "prompts.jsonl")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_generate_writes_whole_episodes(policy_folder: str, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    given = ["generate", "--model", policy_folder, "--prompts", prompts, "--out", str(out), "--samples", "2", *FLAGS]
    assert rlhf([*given, "--scorer", "faulty_environment.words_of_prompts"]) == 0
    rows = lines(out)
    assert len(rows) == 8 and len({len(row["turns"]) for row in rows}) > 1
    for row in rows:
        said = [turn["content"] for turn in row["turns"] if turn["role"] == "assistant"]
        assert row["turns"][-1] == {"role": "assistant", "content": said[-1]} and row["kind"] in (0, 1)
        asked = row["prompt"] + "".join(turn["content"] for turn in row["turns"][:-1])
        assert row["score"] == pytest.approx(row["reward"] + len(asked.split()))
    whole = tmp_path / "whole.jsonl"
    assert rlhf([*given[:5], "--out", str(whole), "--samples", "2", *FLAGS[:-1], "8"]) == 0
    assert [row["turns"] for row in lines(whole)] == [row["turns"] for row in rows]
    assert [row["score"] for row in lines(whole)] == [row["reward"] for row in rows]


def test_best_of_n_writes_demonstrations_of_all_turns(policy_folder: str, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "demonstrations.jsonl"
    arguments = ["best-of-n", "--model", policy_folder, "--prompts", prompts, "--out", str(out), "--n", "3"]
    chat = ["--as_chat", "true", "--keep_unfinished", "true"]
    assert rlhf([*arguments, "--scorer", "ZeroScorer", *chat, *FLAGS]) == 0
    rows = lines(out)
    assert rows and any(len(row["completion"]) > 1 for row in rows)
    module = SFTModule(init_from=policy_folder)
    quiet_trainer(limit_train_batches=1, limit_val_batches=0).fit(module, SFTDataModule(str(out), batch_size=2))


def test_chat_prints_environment_replies(policy_folder: str) -> None:
    policy, tokenizer = SamplingArguments().load(policy_folder)
    talk = Conversation(policy, tokenizer, SamplingSettings(5), engine=ManyEnds(), rules=MultiTurn(Talks(), 3, None))
    shown = "".join("".join(talk.answer(f"w{word}")) for word in range(20, 26))
    assert "\n[user: w" in shown
    assert [turn["role"] for turn in talk.turns[:2]] == ["user", "assistant"]


def test_sample_tables_and_predictions_contain_the_conversation(policy_folder: str, prompts: str) -> None:
    module = GRPOModule(
        init_from=policy_folder, scorer="ZeroScorer", engine=ManyEnds(), max_new_tokens=5, kl_coef=0.0, seed=1
    )
    (batch,) = prompt_step([[10, 11]] * 2).micro_batches
    fit(module, [Step((batch._replace(group=torch.zeros(2, dtype=torch.long)),), 2, 0)])
    rules = MultiTurn(Talks(), 3)
    drawn = module.answer(["w10", "w11", "w12"], module.sampling, multi_turn=rules, columns={"kind": [0, 1, 0]})
    assert len(drawn.transcripts) == 3 and as_text(list(drawn.transcripts[0].messages)).startswith("assistant: ")
    data = PromptDataModule(prompts, environment=json.loads(ENVIRONMENT), max_turns=3, batch_size=2)
    found = quiet_trainer().predict(module, data)
    assert found is not None and len([row for part in found for row in part]) == 4


def test_rlhf_show_prints_the_first_prompt_of_an_environment(
    policy_folder: str, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["show", prompts, "--tokenizer", policy_folder, "--rows", "1"]
    opened = ["--environment", '{"class_path": "faulty_environment.Opens"}']
    assert rlhf([*command, "--kind", "prompt", *opened]) == 0
    assert "w99" in capsys.readouterr().out
    assert rlhf([*command, "--kind", "sft", *opened]) != 0


def test_a_call_is_shown_with_its_arguments() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    assert as_text(turns) == 'assistant: add({"a": 1})\ntool: 2'
