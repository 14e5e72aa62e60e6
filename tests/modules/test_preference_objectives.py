"""Every objective on pairs, through its module: worked batch means, value at the reference, labels, gradients."""

import math
from typing import Any

import pytest
import torch
from conftest import refused
from torch import Tensor

from rlhf_lightning import modules
from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.modules import DPOModule
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import Loss, PreferenceLogprobs

S_CHOSEN, S_REJECTED = [-10.0, -13.0, -7.0], [-11.0, -12.6, -7.6]
R_CHOSEN, R_REJECTED = [-10.5, -12.8, -7.4], [-10.8, -13.0, -7.1]
N_CHOSEN, N_REJECTED = [5, 6, 4], [5, 4, 8]


def spread(totals: list[float], lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Token log-probabilities of different sizes that sum to the totals, and their mask."""
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    shares = torch.where(mask, torch.arange(1.0, width + 1, dtype=torch.float64), 0.0)
    return torch.tensor(totals, dtype=torch.float64)[:, None] * shares / shares.sum(-1, keepdim=True), mask


def fixture(**changes: Any) -> PreferenceLogprobs:
    width = 9
    chosen, chosen_mask = spread(S_CHOSEN, N_CHOSEN, width)
    rejected, rejected_mask = spread(S_REJECTED, N_REJECTED, width)
    parts = PreferenceLogprobs(
        policy_chosen_logprobs=chosen,
        policy_rejected_logprobs=rejected,
        reference_chosen_logprobs=spread(R_CHOSEN, N_CHOSEN, width)[0],
        reference_rejected_logprobs=spread(R_REJECTED, N_REJECTED, width)[0],
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
        target=torch.ones(3, dtype=torch.float64),
        rated_margin=torch.zeros(3, dtype=torch.float64),
        weights=torch.ones(3, dtype=torch.float64),
    )
    return parts._replace(**changes)


def unloaded(name: str, **settings: Any) -> DPOModule:
    return getattr(modules, name)(init_from="nowhere", **settings)


SORTED = {"AOTModule", "UnpairedAOTModule"}
DRAWN = {"BetaDPOModule", "WPOModule"}  # draws pairs; reads a slot
PAIRED = [kind.__name__ for kind in objective_classes() if issubclass(kind, DPOModule)]
NAMES = sorted(set(PAIRED) - DRAWN)


def values(module: DPOModule, logprobs: PreferenceLogprobs) -> Tensor:
    if not module.needs_reference:
        logprobs = logprobs._replace(reference_chosen_logprobs=None, reference_rejected_logprobs=None)
    logprobs = logprobs._replace(target=module.smoothed(logprobs.target))  # as the module does with its batches
    return as_loss(module.preference_loss(logprobs)).values


def on_the_first_token(logprobs: PreferenceLogprobs) -> PreferenceLogprobs:
    """The same sums of log-probabilities, each on its completion's first token."""

    def first(grid: Tensor) -> Tensor:
        return torch.nn.functional.pad(grid.sum(-1, keepdim=True), (0, grid.shape[1] - 1))

    return logprobs._replace(**{name: first(getattr(logprobs, name)) for name in logprobs._fields[:4]})


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"LDDPOModule"}))
def test_losses_depend_only_on_sequence_logprobs(name: str) -> None:
    """The worked numbers of tests/functional use one token; this test extends them to any completion."""
    losses = values(unloaded(name), fixture())
    assert losses.shape == (3,)
    torch.testing.assert_close(values(unloaded(name), on_the_first_token(fixture())), losses)


def test_cpo_averages_the_likelihood_per_sequence() -> None:
    nll = sum(-s / n for s, n in zip(S_CHOSEN, N_CHOSEN, strict=True)) / 3
    assert float(values(unloaded("CPOModule"), fixture()).mean()) == pytest.approx(0.67378031 + nll, rel=1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if unloaded(name).value_at_reference is not None])
def test_the_loss_at_the_reference_has_its_declared_value(name: str) -> None:
    parts = fixture()
    parts = parts._replace(
        reference_chosen_logprobs=parts.policy_chosen_logprobs,
        reference_rejected_logprobs=parts.policy_rejected_logprobs,
    )
    expected = torch.full((3,), unloaded(name).value_at_reference, dtype=torch.float64)
    torch.testing.assert_close(values(unloaded(name), parts), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["RPOModule", "WPOModule", "SimPOModule", "ORPOModule", "CPOModule"])
def test_pair_dependent_losses_declare_no_value_at_reference(name: str) -> None:
    assert unloaded(name).value_at_reference is None


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SORTED])
def test_a_soft_label_is_the_expectation_over_both_orders(name: str) -> None:
    module, parts = unloaded(name), fixture()
    half = values(module, parts._replace(target=torch.full((3,), 0.3, dtype=torch.float64)))
    torch.testing.assert_close(
        half, 0.3 * values(module, parts) + 0.7 * values(module, parts.swapped()._replace(target=parts.target))
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_raises_chosen_relative_to_rejected(name: str) -> None:
    parts = fixture()
    if name == "DiscoPOPModule":  # not monotone about 0
        parts = parts._replace(policy_chosen_logprobs=parts.policy_chosen_logprobs - 20.0 * parts.chosen_mask)
    chosen, rejected = (x.clone().requires_grad_() for x in parts[:2])
    parts = parts._replace(policy_chosen_logprobs=chosen, policy_rejected_logprobs=rejected)
    values(unloaded(name), parts).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    pull = -chosen.grad.masked_select(parts.chosen_mask).sum() + rejected.grad.masked_select(parts.rejected_mask).sum()
    assert float(pull) > 0


def test_wpo_weights_pairs_by_policy_likelihood() -> None:
    parts = fixture()
    one = parts._replace(
        extras={
            "chosen_log_collisions": parts.policy_chosen_logprobs - math.log(2) * parts.chosen_mask,
            "rejected_log_collisions": parts.policy_rejected_logprobs,
        }
    )
    # Each chosen token has twice the collision probability, so the pair's weight is 2; it is capped at 1 by default.
    dpo = values(unloaded("DPOModule"), parts)
    torch.testing.assert_close(values(unloaded("WPOModule"), one), dpo)
    torch.testing.assert_close(values(unloaded("WPOModule", max_pair_weight=None), one), 2 * dpo)


def test_wpo_weighting_works_with_any_objective() -> None:
    class WPOSimPOModule(modules.WPOWeighting, modules.SimPOModule):
        max_pair_weight = None

    parts = fixture()
    parts = parts._replace(
        extras={
            "chosen_log_collisions": parts.policy_chosen_logprobs - math.log(3) * parts.chosen_mask,
            "rejected_log_collisions": parts.policy_rejected_logprobs,
        }
    )
    simpo = values(unloaded("SimPOModule"), parts)
    torch.testing.assert_close(values(WPOSimPOModule(init_from="nowhere"), parts), 3 * simpo)


def test_ld_dpo_weights_excess_tokens_by_alpha() -> None:
    parts = fixture()
    ratio = (parts.policy_rejected_logprobs - parts.reference_rejected_logprobs)[2]  # type: ignore[operator]
    margin = 0.4 - float(ratio[:4].sum() + 0.5 * ratio[4:].sum())
    losses = values(unloaded("LDDPOModule"), parts)
    assert float(losses[2]) == pytest.approx(math.log1p(math.exp(-0.1 * margin)), rel=1e-9)
    torch.testing.assert_close(values(unloaded("LDDPOModule", alpha=1.0), parts), values(unloaded("DPOModule"), parts))


def test_beta_dpo_adapts_beta_to_the_margins() -> None:
    module = unloaded("BetaDPOModule", keep=1.0, momentum=0.0)
    module.margin_mean = 5.0  # forgotten at momentum 0
    with torch.enable_grad():
        losses = as_loss(module.preference_loss(fixture()))
    # The moving mean is this step's own mean, so beta stays 0.1.
    assert float(losses.values.mean()) == pytest.approx(0.67717200, rel=1e-6)
    assert module.margin_mean == pytest.approx(1.0 / 3)
    module = unloaded("BetaDPOModule", keep=1.0, momentum=1.0)
    module.margin_mean = 0.2
    losses = as_loss(module.preference_loss(fixture()))
    assert float(losses.metrics["step_beta"][0]) == pytest.approx(0.108)
    assert float(losses.values.mean()) == pytest.approx(0.67595370, rel=1e-6)


def test_beta_dpo_ignores_non_finite_margins() -> None:
    """The update is skipped because of its gradient; the running margin statistics must not become NaN."""
    module = unloaded("BetaDPOModule", keep=0.67)
    module.margin_mean, module.margin_std = 0.2, 0.3
    spoilt = fixture()
    spoilt.policy_chosen_logprobs[1, 0] = torch.nan
    with torch.enable_grad():
        losses = as_loss(module.preference_loss(spoilt))
    assert losses.values.isnan().any() and (module.margin_mean, module.margin_std) == (0.2, 0.3)


def test_beta_dpo_filters_pairs_and_validation_keeps_its_statistics() -> None:
    module = unloaded("BetaDPOModule", keep=0.9)
    with torch.no_grad():
        values(module, fixture())
    assert (module.margin_mean, module.margin_std) == (0.0, 0.0)
    losses = values(module, fixture())
    assert int((losses == 0).sum()) == 1  # of 2.7 pairs two are kept
    again = unloaded("BetaDPOModule", keep=0.9)
    torch.testing.assert_close(values(again, fixture()), losses)


class OnlyOneOrder(DPOModule):
    """Its loss of the swapped pair and the gradient of that loss are infinite."""

    def pair_loss(self, pair: PreferenceLogprobs) -> Loss:
        loss = -torch.log(pair.margin.clamp_min(0.0))
        return Loss(loss, {"right": (pair.margin > 0).double()})


def test_a_zero_weight_order_may_have_an_infinite_loss() -> None:
    """0 * inf is NaN, in the loss and in its gradient: so that side must not be computed, or only with other values."""
    module = OnlyOneOrder(init_from="nowhere")
    margin = torch.tensor([0.5, -0.25, 2.0], dtype=torch.float64)
    for target in ([1.0, 0.0, 1.0], [1.0, 1.0, 1.0]):
        leaf = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
        wanted = torch.tensor([0.5, 0.25, 2.0] if 0.0 in target else [0.5, 0.5, 2.0], dtype=torch.float64)
        given = margin if 0.0 in target else wanted
        zeros, mask = torch.zeros(3, 1, dtype=torch.float64), torch.ones(3, 1, dtype=torch.bool)
        pairs = PreferenceLogprobs(
            leaf + given[:, None], zeros, zeros, zeros, mask, mask, torch.tensor(target, dtype=torch.float64),
            zeros[:, 0], torch.ones(3, dtype=torch.float64),
        )  # fmt: skip
        loss = as_loss(module.preference_loss(pairs))
        torch.testing.assert_close(loss.values, -wanted.log())
        assert loss.metrics["right"].tolist() == [1.0, 1.0, 1.0]
        (slope,) = torch.autograd.grad(loss.values.sum(), leaf)
        torch.testing.assert_close(slope[:, 0], -1 / given)


def test_metrics_of_a_soft_label_are_averaged_like_its_loss() -> None:
    module, parts = unloaded("RPOModule"), fixture()
    soft = as_loss(module.preference_loss(parts._replace(target=torch.full((3,), 0.3, dtype=torch.float64)))).metrics
    nll = [
        -side.sum(-1) / n.sum(-1) for side, n in zip(parts[:2], (parts.chosen_mask, parts.rejected_mask), strict=True)
    ]
    torch.testing.assert_close(soft["nll_loss"], 0.3 * nll[0] + 0.7 * nll[1])


def test_swapping_pairs_swaps_every_field_of_a_side() -> None:
    parts = fixture()._replace(
        target=torch.full((3,), 0.8), extras={"chosen_kl": S_CHOSEN, "rejected_kl": S_REJECTED, "worth": [1]}
    )
    other = parts.swapped()
    assert other.extras == {"chosen_kl": S_REJECTED, "rejected_kl": S_CHOSEN, "worth": [1]}
    torch.testing.assert_close(other.target, torch.full((3,), 0.2))
    torch.testing.assert_close(other.margin, -parts.margin)
    assert other.chosen_mask is parts.rejected_mask and other.weights is parts.weights
    back = other.swapped()
    assert all(
        getattr(back, name) is getattr(parts, name) for name in parts._fields if name not in ("target", "extras")
    )


@pytest.mark.parametrize(
    ("name", "settings", "interval"),
    [
        ("DPOModule", {"beta": 0.0}, "(0, inf)"),
        ("SimPOModule", {"beta": -2.0}, "(0, inf)"),
        ("XPOModule", {"beta": math.nan, "scorer": "nothing", "max_new_tokens": 4}, "(0, inf)"),
        ("DPOModule", {"label_smoothing": 0.5}, "[0, 0.5)"),
        ("RobustDPOModule", {"flip_rate": 0.5}, "[0, 0.5)"),
        ("AlphaDPOModule", {"alpha": 0.0}, "(0, inf)"),
        ("RPOModule", {"alpha": -1.0}, "[0, inf)"),
        ("LDDPOModule", {"alpha": 1.5}, "[0, 1]"),
        ("WPOModule", {"max_pair_weight": 0.0}, "(0, inf)"),
        ("DiscoPOPModule", {"temperature": 0.0}, "(0, inf)"),
        ("BetaDPOModule", {"keep": 0.0}, "(0, 1]"),
        ("BetaDPOModule", {"momentum": 1.1}, "[0, 1]"),
        ("TRDPOModule", {"reference_every": 0}, "[1, inf)"),
        ("TRDPOModule", {"alpha": 0.0}, "(0, 1]"),
    ],
)
def test_settings_outside_their_range_are_refused(name: str, settings: dict[str, Any], interval: str) -> None:
    setting, value = next(iter(settings.items()))
    with refused("setting-out-of-range", f"{setting} of {name} is {value}", f"it must lie in {interval}"):
        unloaded(name, **settings)
