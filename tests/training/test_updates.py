"""Compare one optimizer step of each stage, for every split, with the same step in plain PyTorch."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    LastGradients,
    MetricsLog,
    assert_same,
    demonstration_step,
    fit,
    gradients_of_step,
    plain_logprobs,
    preference_step,
    random_pairs,
    random_rows,
    ranked_step,
    weights_of,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.types import PreferenceLogprobs

OPTIMIZER: dict[str, Any] = {
    "learning_rate": 1e-2,
    "betas": (0.8, 0.95),
    "adam_eps": 1e-3,
    "weight_decay": 0.1,
    "lr_schedule": "linear",
    "warmup": 0.0,
    "max_grad_norm": 0.5,
}
"""A large epsilon keeps Adam from amplifying rounding errors."""


def in_double(module: pl.LightningModule) -> Any:
    """Load a module's models in double precision, so that comparisons hold to 1e-9."""
    module.configure_model()
    module.double()
    for frozen in module.frozen_models():
        frozen.double()
    return module


def plain_updates(model: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> None:
    """Take AdamW steps with the settings above in plain PyTorch: clip at 0.5, learning rate linear to 0."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-3)
    for update, loss in enumerate(losses):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - update / len(losses))
        optimizer.zero_grad()
        loss().backward()
        norm = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
        for parameter in model.parameters():
            parameter.grad.mul_(min(1.0, 0.5 / (norm + 1e-6)))
        optimizer.step()


def assert_same_weights(trained: nn.Module, plain: nn.Module, start: nn.Module, tolerance: float) -> None:
    moved = 0.0
    pairs = zip(trained.parameters(), plain.parameters(), start.parameters(), strict=True)
    for found, expected, before in pairs:
        torch.testing.assert_close(found, expected.to(found.dtype), atol=tolerance, rtol=0)
        moved = max(moved, float((expected - before).detach().abs().max()))
    assert moved > 1e-3


# -- SFT --------------------------------------------------------------------------------------------------------------

ROWS = [random_rows(7, seed=1), random_rows(7, seed=2)]
FLAGS = [[[i % 3 != 1 for i in range(len(c))] for _, c in rows] for rows in ROWS]
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 3.0]


@pytest.mark.parametrize("micro", [1, 3, None])
def test_sft_updates_equal_plain_pytorch_for_any_micro_batches(policy_folder: str, micro: int | None) -> None:
    module = in_double(SFTModule(init_from=policy_folder, **OPTIMIZER))
    start = copy.deepcopy(module.policy.model)
    steps = [demonstration_step(rows, micro, WEIGHTS, flags) for rows, flags in zip(ROWS, FLAGS, strict=True)]
    fit(module, steps)

    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float64)

    def loss(rows: Any, flags: Any) -> Tensor:
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for row, flag, weight in zip(rows, flags, WEIGHTS, strict=True):
            total = total - weight * plain_logprobs(plain, *row)[torch.tensor(flag)].sum()
            tokens += sum(flag)
        return total / tokens

    plain_updates(plain, [lambda r=r, f=f: loss(r, f) for r, f in zip(ROWS, FLAGS, strict=True)])
    assert_same_weights(module.policy.model, plain, start, 1e-9)


def test_adapter_gradients_do_not_depend_on_micro_batches(policy_folder: str) -> None:
    found = []
    for micro in (None, 2):
        settings = OPTIMIZER | {"max_grad_norm": None}
        module = in_double(SFTModule(init_from=policy_folder, lora=LoraSettings(r=4), **settings))
        found.append(gradients_of_step(module, demonstration_step(ROWS[0], micro, WEIGHTS, FLAGS[0])))
    assert all("lora_" in name for name in found[0])
    assert_same(found[1], found[0])


# -- the reward model -------------------------------------------------------------------------------------------------

GROUPS = [
    (prompt, [first, second, third], ranks)
    for (prompt, first), (_, second), (_, third), ranks in zip(
        random_rows(7, seed=3),
        random_rows(7, seed=4),
        random_rows(7, seed=5),
        [[0, 1, 2], [1, 0, 1], [0, 0, 0], [2, 1, 0], [0, 1, 1], [1, 2, 0], [0, 0, 1]],
        strict=True,
    )
]


@pytest.mark.parametrize("micro", [1, 3, None])
def test_reward_updates_equal_plain_pytorch_for_any_micro_batches(reward_folder: str, micro: int | None) -> None:
    module = RewardModule(init_from=reward_folder, centering=0.01, **OPTIMIZER)
    module.configure_model()
    start = copy.deepcopy(module.reward_model.model)
    fit(module, [ranked_step(GROUPS, micro, weights=WEIGHTS)] * 2)

    plain = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32)

    def loss() -> Tensor:
        total = torch.zeros(())
        for (prompt, completions, ranks), weight in zip(GROUPS, WEIGHTS, strict=True):
            scores = [plain(torch.tensor([prompt + c])).logits[0, 0] for c in completions]
            pairs = [(scores[i], scores[j]) for i in range(3) for j in range(3) if ranks[i] < ranks[j]]
            losses = [
                torch.log(1 + torch.exp(worse - better)) + 0.01 * (better + worse) ** 2 for better, worse in pairs
            ]
            if losses:
                total = total + weight * sum(losses) / len(losses)
        return total / 7

    plain_updates(plain, [loss, loss])
    assert_same_weights(module.reward_model.model, plain, start, 2e-6)


# -- DPO --------------------------------------------------------------------------------------------------------------

PAIRS = random_pairs(7, seed=6)
TARGET = [1.0, 0.75, 1.0, 0.5, 1.0, 0.25, 1.0]  # exact in fp32


def dpo_by_hand(plain: Any, reference: Any, smoothing: float = 0.125, beta: float = 0.5) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for (prompt, chosen, rejected), target, weight in zip(PAIRS, TARGET, WEIGHTS, strict=True):
        with torch.no_grad():
            base = [plain_logprobs(reference, prompt, c).sum() for c in (chosen, rejected)]
        now = [plain_logprobs(plain, prompt, c).sum() for c in (chosen, rejected)]
        margin = beta * ((now[0] - base[0]) - (now[1] - base[1]))
        p = (1 - smoothing) * target + smoothing * (1 - target)
        total = total + weight * (p * F.softplus(-margin) + (1 - p) * F.softplus(margin))
    return total / 7


@pytest.mark.parametrize("micro", [1, 3, None])
def test_dpo_updates_equal_plain_pytorch_for_any_micro_batches(policy_folder: str, micro: int | None) -> None:
    module = in_double(DPOModule(init_from=policy_folder, beta=0.5, label_smoothing=0.125, **OPTIMIZER))
    start = copy.deepcopy(module.policy.model)
    fit(module, [preference_step(PAIRS, micro, TARGET, weights=WEIGHTS)] * 2)
    plain, reference = (AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float64) for _ in range(2))
    plain_updates(plain, [lambda: dpo_by_hand(plain, reference)] * 2)
    assert_same_weights(module.policy.model, plain, start, 1e-9)


class SortedMarginsModule(DPOModule):
    """A loss of the whole batch: margins are matched to reference margins by rank (as in AOT)."""

    batch_coupled = True

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor:
        assert logprobs.reference_chosen_logprobs is not None and logprobs.reference_rejected_logprobs is not None
        policy = logprobs.policy_chosen_logprobs.sum(-1) - logprobs.policy_rejected_logprobs.sum(-1)
        reference = logprobs.reference_chosen_logprobs.sum(-1) - logprobs.reference_rejected_logprobs.sum(-1)
        return -F.logsigmoid(self.beta * (policy.sort().values - reference.sort().values.flip(0)))


@pytest.mark.parametrize("micro", [1, 2, 3, None])
def test_a_coupled_loss_is_computed_over_the_whole_step(policy_folder: str, micro: int | None) -> None:
    settings = OPTIMIZER | {"max_grad_norm": None}
    module = in_double(SortedMarginsModule(init_from=policy_folder, beta=0.5, **settings))
    found = gradients_of_step(module, preference_step(PAIRS, micro, weights=WEIGHTS))

    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float64)
    margins = [plain_logprobs(plain, p, c).sum() - plain_logprobs(plain, p, r).sum() for p, c, r in PAIRS]
    order = sorted(range(7), key=lambda i: margins[i].item())
    ordered, references = [margins[i] for i in order], [margins[i].detach() for i in reversed(order)]
    pairs = zip(ordered, references, WEIGHTS, strict=True)
    (sum(w * F.softplus(-0.5 * (now - base)) for now, base, w in pairs) / 7).backward()
    assert_same(found, {f"policy.model.{name}": p.grad for name, p in plain.named_parameters()}, rtol=1e-8, atol=1e-10)


class ForgetfulModule(SortedMarginsModule):
    """The same loss in a class that does not declare that it couples pairs."""

    batch_coupled = False


def test_an_undeclared_coupled_loss_depends_on_micro_batches(policy_folder: str) -> None:
    found = []
    for micro in (None, 2):
        module = ForgetfulModule(init_from=policy_folder, beta=0.5, **OPTIMIZER)
        fit(module, [preference_step(PAIRS, micro)])
        found.append(weights_of(module))
    assert max(float((found[0][n] - found[1][n]).abs().max()) for n in found[0]) > 1e-4


# -- the step itself --------------------------------------------------------------------------------------------------


def test_gradients_are_clipped_and_the_unclipped_norm_is_logged(policy_folder: str) -> None:
    norms = {}
    for limit in (None, 0.25, 1e6):
        module = SFTModule(init_from=policy_folder, max_grad_norm=limit)
        kept, logged = LastGradients(), MetricsLog()
        fit(module, [demonstration_step(ROWS[0])], callbacks=[kept, logged])
        used = sum(float(gradient.square().sum()) for gradient in kept.gradients.values()) ** 0.5
        norms[limit] = (logged.column("train/grad_norm")[0], used)
    own = norms[None][1]
    assert own > 0.5
    assert norms[None][0] == norms[1e6][0] == pytest.approx(own, rel=1e-5)
    assert norms[1e6][1] == pytest.approx(own, rel=1e-5)
    assert norms[0.25] == (pytest.approx(own, rel=1e-5), pytest.approx(0.25, rel=1e-4))


def test_empty_micro_batches_do_not_change_the_update(policy_folder: str) -> None:
    whole, found = demonstration_step(ROWS[0]), []
    silent = demonstration_step(ROWS[1], supervised=[[False] * len(c) for _, c in ROWS[1]])
    empty = demonstration_step([])
    for further in ((), silent.micro_batches, empty.micro_batches):
        module = SFTModule(init_from=policy_folder, **OPTIMIZER | {"max_grad_norm": None})
        found.append(gradients_of_step(module, whole._replace(micro_batches=(*whole.micro_batches, *further))))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_counters_count_updates_rows_and_tokens(policy_folder: str) -> None:
    module = SFTModule(init_from=policy_folder)
    trainer = fit(module, [demonstration_step(rows, 3) for rows in ROWS], max_epochs=2)
    tokens = 2 * sum(len(c) for rows in ROWS for _, c in rows)
    assert (module.updates, module.episodes, module.tokens, module.rollouts) == (4, 28, tokens, 0)
    assert trainer.global_step == 4
    logged = {name: float(trainer.callback_metrics[f"progress/{name}"]) for name in ("updates", "episodes", "tokens")}
    assert logged == {"updates": 4, "episodes": 28, "tokens": tokens}


# -- the optimizer ----------------------------------------------------------------------------------------------------


def test_a_fused_optimizer_gives_the_same_updates(policy_folder: str) -> None:
    steps = [demonstration_step(rows, 3, WEIGHTS, flags) for rows, flags in zip(ROWS, FLAGS, strict=True)]
    modules = [SFTModule(init_from=policy_folder, fused_optimizer=fused, **OPTIMIZER) for fused in (False, True)]
    for module in modules:
        fit(module, steps)
    plain, fused = (module.optimizers().optimizer for module in modules)  # type: ignore[union-attr]
    assert fused.defaults["fused"] is True and not plain.defaults["fused"]
    assert_same(weights_of(modules[1]), weights_of(modules[0]), 1e-5, 1e-7)
