"""The one-page PPO script computes the module's own update, and trains as a script."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import fit, prompt_step, random_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.modules import PPOModule
from rlhf_lightning.types import PromptBatch, Rollout

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "ppo_on_one_page.py"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ppo_on_one_page", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorded(PPOModule):
    """PPO that keeps its first rollout."""

    rollout: Rollout | None = None

    def learn(self, rollout: Rollout, batch: PromptBatch, meter: Any) -> float:
        self.rollout = rollout
        return super().learn(rollout, batch, meter)


def lengths(prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
    """Score a completion by its length in characters."""
    return [len(text) / 10 - 1 for text in completions]


def episodes_of(page: ModuleType, rollout: Rollout) -> Any:
    """Right-pad the rollout's sequences as the page wants them."""
    rows = []
    sequences = rollout.sequences
    for prompt, completion in zip(sequences.prompts, sequences.completions, strict=True):
        rows.append((prompt.tolist(), completion.tolist()))
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention, mask = torch.zeros_like(ids), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        ids[row, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        attention[row, : len(prompt) + len(completion)] = 1
        mask[row, len(prompt) : len(prompt) + len(completion)] = True
    return page.Episodes(ids, attention, mask[:, 1:], rollout.scores)


def test_the_one_page_script_takes_the_modules_update(page: ModuleType, policy_folder: str) -> None:
    """Two epochs over one rollout of six episodes of unequal length: the same weights"""
    prompts = [prompt for prompt, _ in random_rows(6, seed=3)]
    settings = page.Settings(kl_coef=0.3, value_coef=0.4, ppo_epochs=2, lam=0.9, temperature=0.8)
    module = Recorded(
        lengths, init_from=policy_folder, max_new_tokens=6, mini_batch_size=6, learning_rate=1e-2, adam_eps=1e-5,
        lr_schedule="constant", weight_decay=0.0, missing_eos_score=None, on_violation="warn",
        temperature=settings.temperature, kl_coef=settings.kl_coef, value_coef=settings.value_coef,
        ppo_epochs=settings.ppo_epochs, lam=settings.lam, gamma=settings.gamma, clip=settings.clip,
        value_clip=settings.value_clip, max_grad_norm=settings.max_grad_norm,
    )  # fmt: skip
    fit(module, [prompt_step(prompts, first_episode=0)])
    assert module.rollout is not None and module.critic is not None

    policy, reference = (AutoModelForCausalLM.from_pretrained(policy_folder).eval() for _ in range(2))
    critic = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=1).eval()
    torch.nn.init.zeros_(critic.score.weight)
    optimizer = torch.optim.AdamW(
        [*policy.parameters(), *critic.parameters()], lr=1e-2, betas=module.betas, eps=1e-5, weight_decay=0.0
    )
    page.ppo_update(policy, critic, reference, optimizer, episodes_of(page, module.rollout), settings)

    moved = 0.0
    started = dict(reference.named_parameters())
    for name, theirs in module.policy.model.named_parameters():
        ours = dict(policy.named_parameters())[name]
        moved = max(moved, float((ours - started[name]).abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert moved > 1e-3
    for name, theirs in module.critic.model.named_parameters():
        torch.testing.assert_close(dict(critic.named_parameters())[name], theirs, rtol=1e-4, atol=2e-5)


def test_the_one_page_script_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 150


def test_the_script_trains(policy_folder: str, reward_folder: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "abc", "b")))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--policy", policy_folder, "--reward", reward_folder, "--prompts",
         str(tmp_path / "prompts.jsonl"), "--rollouts", "2", "--episodes", "3", "--max-new-tokens", "4"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rollout") == 2
