"""Train policy-gradient objectives from users' files, and compare their gradients with independent ones.

The references implement the papers' loss over a whole minibatch in fp64, from the rollout collected by the module.
"""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_folders import one_thread, policy_folder
from tiny_models import MetricsLog, fit, gradients_of_step, plain_logprobs, prompt_step, random_rows, within
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.types import Rollout

__all__ = ["one_thread", "policy_folder"]

USERS = Path(__file__).resolve().parents[1] / "experiments" / "objectives_of_users"
NAMES = {
    "gmpo": "GMPOModule",
    "gfpo": "GFPOModule",
    "high_entropy_tokens": "HighEntropyModule",
    "kl_cov": "KLCovModule",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "gmpo": {"log_clip": 0.05},
    "gfpo": {"kept": 2, "kl_coef": 0.0},
    "high_entropy_tokens": {"share": 0.3, "dynamic_sampling": False},
    "kl_cov": {"share": 0.2, "penalty": 0.7, "dynamic_sampling": False},
}
PROMPTS = [prompt for prompt, _ in random_rows(3, seed=17) for _ in range(4)]
files = pytest.mark.parametrize("file", NAMES)


@pytest.fixture(autouse=True)
def users_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(USERS)])


def low_words(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    words = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in completions]
    return [sum(w < 60 for w in many) / max(len(many), 1) for many in words]


def step(first: int = 0, **limits: Any) -> Any:
    made = prompt_step(PROMPTS, first_episode=first)
    batch = made.micro_batches[0]._replace(group=torch.arange(len(PROMPTS)) // 4)
    return within([made._replace(micro_batches=(batch,))], **limits)[0]


def module_of(file: str, folder: str, **settings: Any) -> Any:
    """Return the module in double precision, so that gradients can be compared exactly."""
    kind = getattr(__import__(file), NAMES[file])
    defaults = {"max_new_tokens": 6, "lr_schedule": "constant", "max_grad_norm": None, **SETTINGS[file]}
    module = kind(init_from=folder, scorer=low_words, **{**defaults, **settings})
    load = module.load_models

    def load_in_double() -> None:
        load()
        module.double()

    module.load_models = load_in_double
    return module


# -- transcriptions ---------------------------------------------------------------------------------------------------


def standardised(scores: Tensor) -> Tensor:
    groups = scores.view(-1, 4)
    return ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)).flatten()


def gmpo(now: list[Tensor], old: list[Tensor], rollout: Rollout) -> Tensor:
    losses = []
    for lp, before, a in zip(now, old, standardised(rollout.scores.double()), strict=True):
        d = lp - before
        d = torch.minimum(d, torch.tensor(0.05)) if a > 0 else torch.maximum(d, torch.tensor(-0.05))
        losses.append(-a * d.mean().exp())
    return torch.stack(losses).mean()


def gfpo(now: list[Tensor], old: list[Tensor], rollout: Rollout) -> Tensor:
    advantages = torch.zeros(len(now), dtype=torch.float64)
    for first in range(0, len(now), 4):
        shortest = sorted(range(first, first + 4), key=lambda row: len(now[row]))[:2]
        scores = rollout.scores[shortest].double()
        advantages[shortest] = (scores - scores.mean()) / (scores.std() + 1e-4)
    losses = [clipped(lp, before, a, 0.2) for lp, before, a in zip(now, old, advantages, strict=True)]
    return torch.stack([loss.mean() for loss in losses]).mean()


def clipped(lp: Tensor, before: Tensor, a: Tensor, high: float) -> Tensor:
    ratio = (lp - before).exp()
    return -torch.minimum(ratio * a, ratio.clamp(0.8, 1 + high) * a)


def high_entropy_tokens(now: list[Tensor], old: list[Tensor], rollout: Rollout) -> Tensor:
    advantages = standardised(rollout.scores.double())
    losses = torch.cat([clipped(lp, before, a, 0.28) for lp, before, a in zip(now, old, advantages, strict=True)])
    assert rollout.entropy is not None
    entropy = torch.cat([row[: len(lp)] for row, lp in zip(rollout.entropy, now, strict=True)])
    count = max(round(0.3 * len(entropy)), 1)
    kept = torch.zeros(len(entropy)).index_fill(0, entropy.argsort(descending=True)[:count], 1.0)
    return (losses * kept).sum() / len(losses)


def kl_cov(now: list[Tensor], old: list[Tensor], rollout: Rollout) -> Tensor:
    lp, before = torch.cat(now), torch.cat(old)
    lengths = torch.tensor([len(row) for row in now])
    a = standardised(rollout.scores.double()).repeat_interleave(lengths)
    covariance = (lp.detach() - lp.detach().mean()) * (a - a.mean())
    chosen = covariance.argsort(descending=True)[: int(0.2 * len(lp))]
    losses = -a * (lp - before).exp()
    return (losses.sum() + 0.7 * (lp - before)[chosen].abs().sum()) / len(lp)


TRANSCRIPTIONS: dict[str, Callable[[list[Tensor], list[Tensor], Rollout], Tensor]] = {
    "gmpo": gmpo,
    "gfpo": gfpo,
    "high_entropy_tokens": high_entropy_tokens,
    "kl_cov": kl_cov,
}


# -- tests ------------------------------------------------------------------------------------------------------------


def second_gradients(file: str, folder: str, **limits: Any) -> tuple[dict[str, Tensor], Rollout, dict[str, Tensor]]:
    """Return the gradients of a rollout's second update, where ratios differ from 1; the rollout; and the initial
    weights.
    """
    module = module_of(file, folder, ppo_epochs=2, learning_rate=0.05, adam_eps=1.0)
    untouched: list[Rollout] = []
    collect = module.collect

    def collecting(*batches: Any) -> Any:
        found = collect(*batches)
        untouched.append(found[0] if not isinstance(found, Rollout) else found)
        return found

    module.collect = collecting
    weights: dict[str, Tensor] = {}
    update = module.update

    def updating(*args: Any) -> Any:
        weights.update({name: p.detach().clone() for name, p in module.policy.model.named_parameters()})
        return update(*args)

    module.update = updating
    found = gradients_of_step(module, step(**limits))
    return found, untouched[0], weights


@files
def test_the_gradient_equals_that_of_the_papers_formula(policy_folder: str, file: str) -> None:
    found, rollout, weights = second_gradients(file, policy_folder)
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float64)
    plain.load_state_dict({**plain.state_dict(), **weights})
    rows = list(zip(rollout.sequences.prompts, rollout.sequences.completions, strict=True))
    now = [plain_logprobs(plain, prompt, ids) for prompt, ids in rows]
    old = [row[: len(ids)].double() for row, (_, ids) in zip(rollout.old_logprobs, rows, strict=True)]
    assert max(float((a - b).detach().abs().max()) for a, b in zip(now, old, strict=True)) > 1e-3
    TRANSCRIPTIONS[file](now, old, rollout).backward()
    largest = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    assert largest > 1e-4
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                found[f"policy.model.{name}"],
                parameter.grad,
                rtol=1e-6,
                atol=1e-8 * largest,
            )


@files
def test_micro_batches_do_not_change_the_gradient(policy_folder: str, file: str) -> None:
    whole = second_gradients(file, policy_folder)[0]
    for limits in ({"micro_batch_size": 1}, {"max_tokens": 30}):
        cut = second_gradients(file, policy_folder, **limits)[0]
        for name, gradient in whole.items():
            torch.testing.assert_close(cut[name], gradient, rtol=1e-6, atol=1e-10)


@files
def test_training_raises_scores(policy_folder: str, file: str) -> None:
    logged = MetricsLog()
    settings = {"learning_rate": 6e-3, "kl_coef": 0.0, "max_new_tokens": 4, "max_grad_norm": 1.0}
    share = {"high_entropy_tokens": {"share": 0.5}}.get(file, {})
    module = module_of(file, policy_folder, **settings, **({"log_clip": 0.4} if file == "gmpo" else {}), **share)
    fit(module, [step(first=12 * i) for i in range(24)], callbacks=[logged])
    scores = [row["rollout/score"] for row in logged.rows]
    assert all(math.isfinite(row["train/loss"]) for row in logged.rows)
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 0.1, scores


@files
def test_each_file_is_small_and_has_a_recipe(file: str) -> None:
    config = yaml.safe_load((USERS / f"{file}.yaml").read_text())
    assert config["model"]["class_path"] == f"{file}.{NAMES[file]}"
    text = (USERS / f"{file}.py").read_text()
    own = [line for line in "".join(text.split('"""')[::2]).splitlines() if line.strip()]
    assert len(own) <= 40, len(own)
    assert not re.search(r"\._(?!_|replace)", text), "no private name"
