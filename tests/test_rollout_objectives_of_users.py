"""Train REBEL and VAPO from users' files, and compare their gradients with independent ones.

The references implement the papers' losses over a whole rollout in fp64, from the samples and the critic's values.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import refused
from rank_cases import share_of_words
from tiny_folders import one_thread, policy_folder
from tiny_models import (
    MetricsLog,
    doubled,
    fit,
    gradients_of_step,
    plain_logprobs,
    prompt_step,
    random_rows,
    weights_of,
    within,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.types import Rollout

__all__ = ["one_thread", "policy_folder"]

USERS = Path(__file__).resolve().parents[1] / "experiments" / "objectives_of_users"
NAMES = {"rebel": "REBELModule", "vapo": "VAPOModule"}
ETA, ALPHA, MU = 0.7, 0.5, 0.3
SETTINGS: dict[str, dict[str, Any]] = {
    "rebel": {"eta": ETA, "temperature": 1.0},
    "vapo": {"alpha": ALPHA, "nll_coef": MU, "missing_eos_score": None},
}
PROMPTS = [prompt for prompt, _ in random_rows(4, seed=17) for _ in range(2)]
files = pytest.mark.parametrize("file", NAMES)


@pytest.fixture(autouse=True)
def users_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(USERS)])


def low_words(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:
    return [share_of_words(text, 0, 60) for text in completions]


def right_or_wrong(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:
    return [1.0 if share_of_words(text, 0, 60) > 0.5 else -1.0 for text in completions]


SCORERS = {"rebel": low_words, "vapo": right_or_wrong}


def step(first: int = 0, **limits: Any) -> Any:
    made = prompt_step(PROMPTS, first_episode=first)
    batch = made.micro_batches[0]._replace(group=torch.arange(len(PROMPTS)) // 2)
    return within([made._replace(micro_batches=(batch,))], **limits)[0]


def module_of(file: str, folder: str, **settings: Any) -> Any:
    """Return the module in double precision, so that gradients can be compared exactly."""
    kind = getattr(__import__(file), NAMES[file])
    defaults = {"max_new_tokens": 6, "lr_schedule": "constant", "max_grad_norm": None, **SETTINGS[file]}
    module = kind(init_from=folder, **{"scorer": SCORERS[file], **defaults, **settings})
    return doubled(module)


# -- transcriptions ---------------------------------------------------------------------------------------------------


def at_end(reward: float, rewards: Tensor) -> Tensor:
    return torch.cat([rewards[:-1], rewards[-1:] + reward])


def gae(rewards: Tensor, values: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of a completion, computed as sums over later TD errors."""
    errors = rewards + torch.cat([values[1:], values.new_zeros(1)]) - values
    count = range(len(values))
    advantages = torch.stack([sum(lam ** (s - t) * errors[s] for s in count if s >= t) for t in count])
    return advantages, advantages + values


def whitened(rows: list[Tensor]) -> list[Tensor]:
    every = torch.cat(rows)
    return [(row - every.mean()) / (every.var(correction=0) + 1e-8).sqrt() for row in rows]


def clipped(now: list[Tensor], old: list[Tensor], advantages: list[Tensor], high: float) -> Tensor:
    ratio, a = (torch.cat(now) - torch.cat(old)).exp(), torch.cat(advantages)
    return -torch.minimum(ratio * a, ratio.clamp(0.8, 1 + high) * a).mean()


def critic_loss(now: list[Tensor], old: list[Tensor], returns: list[Tensor]) -> Tensor:
    values, before, wanted = torch.cat(now), torch.cat(old), torch.cat(returns)
    bounded = before + (values - before).clamp(-0.2, 0.2)
    return 0.1 * torch.maximum((values - wanted) ** 2, (bounded - wanted) ** 2).mean() / 2


Rows = list[Tensor]


def rebel(now: Rows, old: Rows, reference: Rows, values: Rows, before: Rows, texts: Sequence[str]) -> Tensor:
    losses = []
    for first in range(0, len(now), 2):
        moved = [(now[row] - old[row]).sum() for row in (first, first + 1)]
        rewards = [share_of_words(texts[row], 0, 60) for row in (first, first + 1)]
        losses.append(((moved[0] - moved[1]) / ETA - (rewards[0] - rewards[1])) ** 2)
    return torch.stack(losses).mean()


def vapo(now: Rows, old: Rows, reference: Rows, values: Rows, before: Rows, texts: Sequence[str]) -> Tensor:
    scores = right_or_wrong(None, texts)
    assert len(set(scores)) == 2 and len({len(row) for row in now}) > 1
    adaptive = [
        gae(at_end(r, torch.zeros_like(v)), v, max(0.0, 1 - 1 / (ALPHA * len(v))))[0]
        for r, v in zip(scores, before, strict=True)
    ]
    returns = [torch.full_like(v, r) for r, v in zip(scores, before, strict=True)]
    right = torch.cat([row for row, score in zip(now, scores, strict=True) if score > 0])
    return clipped(now, old, whitened(adaptive), 0.28) + critic_loss(values, before, returns) - MU * right.mean()


TRANSCRIPTIONS = {"rebel": rebel, "vapo": vapo}


# -- tests ------------------------------------------------------------------------------------------------------------


def second_gradients(file: str, folder: str, **limits: Any) -> tuple[dict[str, Tensor], Rollout, dict[str, Tensor]]:
    """Return the gradients of a rollout's second update, where ratios differ from 1; the rollout; and the initial
    weights.
    """
    module = module_of(file, folder, ppo_epochs=2, learning_rate=0.05, adam_eps=1.0)
    rollouts: list[Rollout] = []
    collect, update = module.collect, module.update
    weights: dict[str, Tensor] = {}

    def collecting(*batches: Any) -> Rollout:
        rollouts.append(collect(*batches))
        return rollouts[-1]

    def updating(*args: Any) -> Any:
        weights.update(weights_of(module))
        return update(*args)

    module.collect, module.update = collecting, updating
    return gradients_of_step(module, step(**limits)), rollouts[0], weights


def loaded(kind: Any, folder: str, weights: dict[str, Tensor], prefix: str, **settings: Any) -> Any:
    """Return a plain transformers model in fp64 with the named weights."""
    plain = kind.from_pretrained(folder, dtype=torch.float64, **settings)
    own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    plain.load_state_dict({**plain.state_dict(), **own})
    return plain


def plain_values(critic: Any, prompt: Tensor, ids: Tensor) -> Tensor:
    hidden = critic.model(input_ids=torch.cat([prompt, ids])[None]).last_hidden_state[0]
    return critic.score(hidden[len(prompt) - 1 : -1]).squeeze(-1)


@files
def test_the_gradient_equals_that_of_the_papers_formula(policy_folder: str, file: str) -> None:
    found, rollout, weights = second_gradients(file, policy_folder)
    policy = loaded(AutoModelForCausalLM, policy_folder, weights, "policy.model.")
    rows = list(zip(rollout.sequences.prompts, rollout.sequences.completions, strict=True))
    plain = {"policy.model.": policy}

    def ragged(grid: Tensor | None) -> Rows:
        return [row[: len(ids)].double() for row, (_, ids) in zip(grid, rows, strict=True)] if grid is not None else []

    now = [plain_logprobs(policy, prompt, ids) for prompt, ids in rows]
    old = ragged(rollout.old_logprobs)
    assert max(float((a - b).detach().abs().max()) for a, b in zip(now, old, strict=True)) > 1e-3
    values: Rows = []
    if rollout.values is not None:
        critic = loaded(AutoModelForSequenceClassification, policy_folder, weights, "critic.model.", num_labels=1)
        plain["critic.model."] = critic
        values = [plain_values(critic, prompt, ids) for prompt, ids in rows]
    reference = ragged(rollout.reference_logprobs)
    TRANSCRIPTIONS[file](now, old, reference, values, ragged(rollout.values), rollout.texts).backward()
    for prefix, model in plain.items():
        slopes = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        largest = max(float(slope.abs().max()) for slope in slopes.values())
        assert largest > 1e-4
        for name, slope in slopes.items():
            torch.testing.assert_close(found[prefix + name], slope, rtol=1e-5, atol=1e-6 * largest)


@files
def test_micro_batches_do_not_change_the_gradient(policy_folder: str, file: str) -> None:
    whole = second_gradients(file, policy_folder)[0]
    for limits in ({"micro_batch_size": 2}, {"max_tokens": 30}):
        cut = second_gradients(file, policy_folder, **limits)[0]
        for name, gradient in whole.items():
            torch.testing.assert_close(cut[name], gradient, rtol=1e-6, atol=1e-10)


@files
def test_training_raises_scores(policy_folder: str, file: str) -> None:
    logged = MetricsLog()
    settings = {"learning_rate": 6e-3, "max_new_tokens": 4, "max_grad_norm": 1.0, "ppo_epochs": 2}
    if file == "rebel":
        settings |= {"eta": 5.0}  # a step size that works with this learning rate
    fit(module_of(file, policy_folder, **settings), [step(8 * i) for i in range(32)], callbacks=[logged])
    scores = logged.column("rollout/score")
    assert sum(scores[-8:]) / 8 > sum(scores[:8]) / 8 + 0.1, scores


def test_rebel_needs_exactly_two_samples(policy_folder: str) -> None:
    made = step()
    batch = made.micro_batches[0]._replace(group=torch.arange(len(PROMPTS)) // 4)
    with refused("rebel-pairs", "two samples"):
        fit(module_of("rebel", policy_folder), [made._replace(micro_batches=(batch,))])


@files
def test_each_file_is_small_and_has_a_recipe(file: str) -> None:
    config = yaml.safe_load((USERS / f"{file}.yaml").read_text())
    assert config["model"]["class_path"] == f"{file}.{NAMES[file]}"
    text = (USERS / f"{file}.py").read_text()
    own = [line for line in "".join(text.split('"""')[::2]).splitlines() if line.strip()]
    assert len([line for line in own if not re.match(r"(from|import) ", line)]) <= 40
    assert not re.search(r"\._(?!_|replace)", text), "no private name"
