"""Train objectives from users' files, and compare their gradients with independent ones."""

import ast
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import one_thread, policy_folder
from tiny_models import (
    MetricsLog,
    demonstration_step,
    doubled,
    fit,
    gradients_of_step,
    preference_step,
    random_pairs,
    random_rows,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.types import Step

__all__ = ["one_thread", "policy_folder"]

USERS = Path(__file__).resolve().parents[1] / "experiments" / "objectives_of_users"


@pytest.fixture(autouse=True)
def users_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(USERS)])


def class_of(file: str, name: str) -> Any:
    return getattr(__import__(file), name)


def gradients(kind: Any, folder: str, step: Step[Any], **settings: Any) -> dict[str, Tensor]:
    """Return the gradients of one step in double precision, with the policy moved away from its reference, if any."""
    module = doubled(kind(init_from=folder, max_grad_norm=None, **settings))
    module.cache_reference = False
    load = module.load_models

    def load_and_move() -> None:
        load()
        if module.reference is not None:
            move(module.policy.model)

    module.load_models = load_and_move
    return gradients_of_step(module, step)


def move(model: Any) -> Any:
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            weight += 0.02 * noise
    return model


def plain_model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()


def distributions(model: Any, prompt: Any, completion: Any) -> Tensor:
    """Return log-probabilities over the vocabulary before each completion token of one unpadded sequence."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def assert_gradients(found: dict[str, Tensor], model: Any, prefix: str = "policy.model.") -> None:
    expected = {f"{prefix}{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-11)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-4


def falls(kind: Any, folder: str, step: Step[Any], metric: str = "train/loss", **settings: Any) -> list[float]:
    log = MetricsLog()
    fit(kind(init_from=folder, learning_rate=3e-3, lr_schedule="constant", warmup=0.0, **settings), [step] * 12,
        callbacks=[log])  # fmt: skip
    losses = log.column(metric)
    assert losses[-1] < losses[0]
    return losses


# -- dynamic fine-tuning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 1])
def test_dft_weights_tokens_by_their_probability(policy_folder: str, micro: int | None) -> None:
    kind, rows = class_of("dft", "DFTModule"), random_rows(3, seed=8)
    found = gradients(kind, policy_folder, demonstration_step(rows, micro))
    model = plain_model(policy_folder)
    losses = []
    for prompt, completion in rows:
        logprobs = distributions(model, prompt, completion)[range(len(completion)), completion]
        losses.append(-(logprobs.exp().detach() * logprobs))
    torch.cat(losses).mean().backward()
    assert_gradients(found, model)
    falls(kind, policy_folder, demonstration_step(rows), "train/negative_logprob")


# -- token-level DPO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 2])
def test_tdpo2_adds_the_sequential_kl_term(policy_folder: str, micro: int | None) -> None:
    kind, pairs, target = class_of("tdpo2", "TDPO2Module"), random_pairs(4, seed=5), [1.0, 0.75, 0.5, 0.875]
    step = preference_step(pairs, micro, target)
    found = gradients(kind, policy_folder, step, beta=0.7, alpha=0.4)
    model, reference = move(plain_model(policy_folder)), plain_model(policy_folder).requires_grad_(False)
    total = torch.zeros((), dtype=torch.float64)
    for (prompt, *completions), p in zip(pairs, target, strict=True):
        ratios, divergences = [], []
        for completion in completions:
            now, then = (distributions(one, prompt, completion) for one in (model, reference))
            places = (range(len(completion)), completion)
            ratios.append((now[places] - then[places]).sum())
            divergences.append(torch.nn.functional.kl_div(now, then, reduction="sum", log_target=True))
        for order, weight in (((0, 1), p), ((1, 0), 1 - p)):
            won, lost = order
            logit = ratios[won] - ratios[lost] - 0.4 * (divergences[lost] - divergences[won].detach())
            total = total + weight * torch.nn.functional.softplus(-0.7 * logit) / len(pairs)
    total.backward()
    assert_gradients(found, model)
    losses = falls(kind, policy_folder, preference_step(pairs))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the policy is still the reference


# -- pairs ------------------------------------------------------------------------------------------------------------


def alphapo(now: list[Tensor], then: list[Tensor]) -> Tensor:
    """Gupta et al., Eq. 4: r = beta (1 - pi^{-alpha / n}) / alpha; beta 2, gamma 0.5, alpha 0.3."""
    won, lost = (2.0 * (1 - 1 / one.sum().exp() ** (0.3 / len(one))) / 0.3 for one in now)
    return -torch.log(1 / (1 + torch.exp(-(won - lost - 0.5))))


def chi_po(now: list[Tensor], then: list[Tensor]) -> Tensor:
    """Huang et al., Algorithm 1: phi(z) = z + log z; beta 0.7, R 0.5 (no gradient beyond)."""
    ratios = [(one.sum() - other.sum()).exp() for one, other in zip(now, then, strict=True)]
    won, lost = (0.7 * (z + z.log()) for z in ratios)
    return -torch.log(1 / (1 + torch.exp(-(won - lost).clip(-1.0, 1.0))))


def mpo(now: list[Tensor], then: list[Tensor], delta: Tensor) -> Tensor:
    """Wang et al., Eq. 1 to 6: 0.5 DPO + 0.3 BCO + 2 NLL per token; beta 0.7."""
    won, lost = (0.7 * (one - other).sum() for one, other in zip(now, then, strict=True))
    dpo, good, bad = won - lost, won - delta, delta - lost
    entropies = [torch.log1p(torch.exp(-x)) for x in (dpo, good, bad)]
    return 0.5 * entropies[0] + 0.3 * (entropies[1] + entropies[2]) - 2.0 * now[0].mean()


PAIRED: dict[str, tuple[Any, str, dict[str, float]]] = {
    "alphapo": (alphapo, "AlphaPOModule", {"beta": 2.0, "gamma": 0.5, "alpha": 0.3}),
    "chi_po": (chi_po, "ChiPOModule", {"beta": 0.7, "max_reward": 0.5}),
    "mpo": (
        mpo, "MPOModule",
        {"beta": 0.7, "preference_weight": 0.5, "quality_weight": 0.3, "generation_weight": 2.0},
    ),
}  # fmt: skip
"""Loss of (chosen, rejected) token log-probabilities under policy and reference, by file."""


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("file", PAIRED)
def test_pair_losses_have_the_gradient_of_their_papers(policy_folder: str, file: str, micro: int | None) -> None:
    transcribed, name, settings = PAIRED[file]
    kind, pairs, target = class_of(file, name), random_pairs(5, seed=5), [1.0, 0.75, 0.5, 0.0, 0.875]
    found = gradients(kind, policy_folder, preference_step(pairs, micro, target), **settings)
    model, reference = plain_model(policy_folder), plain_model(policy_folder).requires_grad_(False)
    if kind.needs_reference:
        move(model)
    sides = []
    for prompt, *completions in pairs:
        both = [[distributions(one, prompt, c)[range(len(c)), c] for c in completions] for one in (model, reference)]
        sides.append(both)
    rewards = [0.7 * (now - then).sum() for both in sides for now, then in zip(*both, strict=True)]
    further = [torch.stack(rewards).mean().detach()] if file == "mpo" else []
    total = torch.zeros((), dtype=torch.float64)
    for (now, then), p in zip(sides, target, strict=True):
        agrees, disagrees = transcribed(now, then, *further), transcribed(now[::-1], then[::-1], *further)
        total = total + (p * agrees + (1 - p) * disagrees) / len(pairs)
    total.backward()
    assert_gradients(found, model)
    falls(kind, policy_folder, preference_step(pairs), **settings)


def test_chi_po_clips_some_pairs_and_declares_its_optimum() -> None:
    from rlhf_lightning.verification.contract import verify

    found = verify(class_of("chi_po", "ChiPOModule"))
    assert [check.name for check in found.checks if not check.held] == []
    assert found.convergence is not None
    assert found.convergence.source == "declared" and found.convergence.distance < 1e-3


@pytest.mark.parametrize("file", PAIRED)
def test_user_files_are_short_and_use_only_public_names(file: str) -> None:
    tree = ast.parse((USERS / f"{file}.py").read_text())
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    names += [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [name for name in names if name.startswith("_") and name != "__init__"]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.ClassDef):
            node.body = [one for one in node.body if getattr(one, "name", "") != "target_policy"]
    own = [line for line in ast.unparse(tree).splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(own) <= 40, len(own)
