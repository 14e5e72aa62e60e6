"""Slips of a first class of one's own: a loss that is averaged already, and a method with a misspelt name."""

from typing import Any

import pytest
import torch
from tiny_models import fit, preference_step, random_pairs, save_policy

from rlhf_lightning import modules
from rlhf_lightning.errors import ContractError
from rlhf_lightning.modules import DPOModule
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.training.user_classes import misnamed_methods
from rlhf_lightning.verification.contract import verify

POINTS = {
    "DPOModule": "pair_loss",
    "KTOModule": "unpaired_loss",
    "SFTModule": "token_loss",
    "RewardModule": "ranking_loss",
    "ProcessRewardModule": "process_loss",
    "PPOModule": "value_loss",
    "GRPOModule": "objective",
    "RLOOModule": "policy_loss",
    "GKDModule": "distillation_loss",
    "OnlineDPOModule": "preference_loss",
}


def returning(base: str, change: Any) -> Any:
    """Return a subclass whose losses are changed."""
    kind, point = getattr(modules, base), POINTS[base]

    def changed(self: Any, *given: Any) -> Any:
        return change(as_loss(getattr(kind, point)(self, *given)).values)

    changed.__qualname__ = f"Own.{point}"
    return type("Own", (kind,), {point: changed})


@pytest.mark.parametrize("base", POINTS)
def test_a_loss_of_another_shape_is_refused(base: str) -> None:
    """A mean would be averaged again; (rows, 1) would be broadcast with weights of shape (rows,)."""
    for change, found in (
        (torch.mean, "a tensor of shape ()"),
        (lambda losses: losses.unsqueeze(-1), ", 1)"),
        (lambda losses: None, "NoneType"),
    ):
        with pytest.raises(ContractError) as error:
            verify(returning(base, change), with_convergence=False)
        assert error.value.code == "loss-shape" and f"Own.{POINTS[base]} returned" in str(error.value)
        assert found in str(error.value) and "without mean() or sum()" in str(error.value)


@pytest.mark.parametrize("soft", [False, True])
def test_training_refuses_it_too(tmp_path: Any, soft: bool) -> None:
    step = preference_step(random_pairs(4, seed=0), None)
    if soft:
        batches = [part._replace(target=torch.full_like(part.target, 0.8)) for part in step.micro_batches]
        step = step._replace(micro_batches=tuple(batches))
    with pytest.raises(ContractError, match=r"Own\.pair_loss returned a tensor of shape \(\), expected shape \(4,\)"):
        fit(returning("DPOModule", torch.mean)(init_from=save_policy(tmp_path)), [step])


class Misspelt(DPOModule):
    """Trains as DPO: nothing calls the method."""

    def pair_los(self, pair: Any) -> Any:
        return -self.reward_margin(pair)


class OfAnotherLibrary(DPOModule):
    """Overrides nothing."""

    def compute(self, batch: Any) -> Any:
        return batch


class WithHelper(DPOModule):
    """Its own method has a user."""

    def pair_losses(self, pair: Any) -> Any:
        return -self.reward_margin(pair)

    def pair_loss(self, pair: Any) -> Any:
        return self.pair_losses(pair)


def test_methods_that_nothing_uses_are_reported(tmp_path: Any) -> None:
    """`rlhf verify` fails, and training warns."""
    sentence = "Misspelt.pair_los overrides nothing, and nothing uses it: did you mean pair_loss?"
    assert misnamed_methods(Misspelt) == {"pair_los": sentence}
    assert list(misnamed_methods(OfAnotherLibrary)) == ["compute"]
    assert misnamed_methods(WithHelper) == misnamed_methods(DPOModule) == {}
    (failed,) = [check for check in verify(Misspelt, with_convergence=False).checks if not check.held]
    assert (failed.name, failed.advice) == ("methods meant", sentence)
    with pytest.warns(UserWarning, match=sentence[:-1]):
        fit(Misspelt(init_from=save_policy(tmp_path)), [preference_step(random_pairs(4, seed=0), None)])
