"""Every objective on pairs, through its module: worked batch means, value at the reference, labels, gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning import modules
from rlhf_lightning.modules import DPOModule
from rlhf_lightning.training.module import as_loss
from rlhf_lightning.types import PreferenceLogprobs

S_CHOSEN, S_REJECTED = [-10.0, -13.0, -7.0], [-11.0, -12.6, -7.6]
R_CHOSEN, R_REJECTED = [-10.5, -12.8, -7.4], [-10.8, -13.0, -7.1]
N_CHOSEN, N_REJECTED = [5, 6, 4], [5, 4, 8]

WORKED: list[tuple[str, dict[str, Any], float]] = [
    ("DPOModule", {}, 0.67717200),
    ("ConservativeDPOModule", {"label_smoothing": 0.1}, 0.68050534),
    ("RobustDPOModule", {"flip_rate": 0.1}, 0.67300534),
    ("IPOModule", {}, 24.45737245),
    ("IPOModule", {"average": False}, 22.22),
    ("HingeModule", {"beta": 0.1}, 0.96666667),
    ("EXOModule", {"epsilon": 1e-3}, 2.70440658),
    ("NCAModule", {"beta": 0.1}, 1.37833600),
    ("BCOPairModule", {"beta": 0.1}, 1.36999155),
    ("SPPOModule", {"beta": 0.1}, 46.96666667),
    ("AOTModule", {"beta": 0.1}, 0.67675547),
    ("UnpairedAOTModule", {"beta": 0.1}, 0.67667216),
    ("APOZeroModule", {}, 0.99166840),
    ("APODownModule", {}, 0.99750468),
    ("DiscoPOPModule", {"beta": 0.1}, 0.85217624),
    ("LengthNormalizedDPOModule", {"beta": 0.1}, 0.69035431),
    ("LengthNormalizedDPOModule", {}, 0.61715494),
    ("ForwardKLDPOModule", {}, 0.67646007),
    ("JensenShannonDPOModule", {}, 0.68498004),
    ("AlphaDPOModule", {"alpha": 0.5}, 0.67698129),
    ("ReferenceFreeDPOModule", {}, 0.67378031),
    ("RPOModule", {}, 2.64939422),
    ("SimPOModule", {}, 1.34382294),
    ("ORPOModule", {}, 2.04784566),
]


def spread(totals: list[float], lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Tokens of unequal size that sum to the totals, and their mask."""
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


def values(module: DPOModule, logprobs: PreferenceLogprobs) -> Tensor:
    if not module.needs_reference:
        logprobs = logprobs._replace(reference_chosen_logprobs=None, reference_rejected_logprobs=None)
    logprobs = logprobs._replace(target=module.smoothed(logprobs.target))  # as the module does with its batches
    return as_loss(module.preference_loss(logprobs)).values


def swapped(parts: PreferenceLogprobs) -> PreferenceLogprobs:
    return parts._replace(
        policy_chosen_logprobs=parts.policy_rejected_logprobs,
        policy_rejected_logprobs=parts.policy_chosen_logprobs,
        reference_chosen_logprobs=parts.reference_rejected_logprobs,
        reference_rejected_logprobs=parts.reference_chosen_logprobs,
        chosen_mask=parts.rejected_mask,
        rejected_mask=parts.chosen_mask,
    )


@pytest.mark.parametrize(("name", "settings", "mean"), WORKED)
def test_worked_batch_means(name: str, settings: dict[str, Any], mean: float) -> None:
    losses = values(unloaded(name, **settings), fixture())
    assert losses.shape == (3,)
    assert float(losses.mean()) == pytest.approx(mean, rel=1e-6, abs=5e-9)


def test_cpo_takes_the_likelihood_per_sequence() -> None:
    nll = sum(-s / n for s, n in zip(S_CHOSEN, N_CHOSEN, strict=True)) / 3
    assert float(values(unloaded("CPOModule"), fixture()).mean()) == pytest.approx(0.67378031 + nll, rel=1e-7)


AT_REFERENCE: dict[str, float] = {
    **dict.fromkeys(
        "DPOModule ConservativeDPOModule RobustDPOModule LengthNormalizedDPOModule AOTModule UnpairedAOTModule "
        "ForwardKLDPOModule JensenShannonDPOModule AlphaDPOModule LDDPOModule BetaDPOModule TRDPOModule".split(),
        math.log(2),
    ),
    "NCAModule": 2 * math.log(2),
    "BCOPairModule": 2 * math.log(2),
    "HingeModule": 1.0,
    "APOZeroModule": 1.0,
    "APODownModule": 1.0,
    "IPOModule": 1 / (4 * 0.1**2),
    "SPPOModule": 1 / (2 * 0.001**2),
    "DiscoPOPModule": 0.84657359,
    "EXOModule": 2.76123071,
}


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_value_where_the_policy_is_the_reference(name: str) -> None:
    parts = fixture()
    parts = parts._replace(
        reference_chosen_logprobs=parts.policy_chosen_logprobs,
        reference_rejected_logprobs=parts.policy_rejected_logprobs,
    )
    expected = torch.full((3,), AT_REFERENCE[name], dtype=torch.float64)
    torch.testing.assert_close(values(unloaded(name), parts), expected, rtol=1e-8, atol=0)


SORTED = {"AOTModule", "UnpairedAOTModule"}
NAMES = sorted({name for name, _, _ in WORKED} | {"CPOModule", "LDDPOModule"})


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SORTED])
def test_a_soft_label_is_the_expectation_over_both_orders(name: str) -> None:
    module, parts = unloaded(name), fixture()
    half = values(module, parts._replace(target=torch.full((3,), 0.3, dtype=torch.float64)))
    torch.testing.assert_close(half, 0.3 * values(module, parts) + 0.7 * values(module, swapped(parts)))


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_lifts_chosen_against_rejected(name: str) -> None:
    parts = fixture()
    if name == "DiscoPOPModule":  # not monotone about 0
        parts = parts._replace(policy_chosen_logprobs=parts.policy_chosen_logprobs - 20.0 * parts.chosen_mask)
    chosen, rejected = (x.clone().requires_grad_() for x in parts[:2])
    parts = parts._replace(policy_chosen_logprobs=chosen, policy_rejected_logprobs=rejected)
    values(unloaded(name), parts).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    pull = -chosen.grad.masked_select(parts.chosen_mask).sum() + rejected.grad.masked_select(parts.rejected_mask).sum()
    assert float(pull) > 0


def test_wpo_weighs_pairs_by_their_likelihood_under_the_policy() -> None:
    parts = fixture()
    one = parts._replace(
        extras={
            "chosen_log_collisions": parts.policy_chosen_logprobs - math.log(2) * parts.chosen_mask,
            "rejected_log_collisions": parts.policy_rejected_logprobs,
        }
    )
    # Each chosen token is twice as likely as two draws agree, so the pair's weight is 2: capped at 1 unless asked not.
    dpo = values(unloaded("DPOModule"), parts)
    torch.testing.assert_close(values(unloaded("WPOModule"), one), dpo)
    torch.testing.assert_close(values(unloaded("WPOModule", max_pair_weight=None), one), 2 * dpo)


def test_wpo_weighs_any_objective() -> None:
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


def test_ld_dpo_counts_the_longer_side_s_rest_by_alpha() -> None:
    parts = fixture()
    ratio = (parts.policy_rejected_logprobs - parts.reference_rejected_logprobs)[2]  # type: ignore[operator]
    margin = 0.4 - float(ratio[:4].sum() + 0.5 * ratio[4:].sum())
    losses = values(unloaded("LDDPOModule"), parts)
    assert float(losses[2]) == pytest.approx(math.log1p(math.exp(-0.1 * margin)), rel=1e-9)
    torch.testing.assert_close(values(unloaded("LDDPOModule", alpha=1.0), parts), values(unloaded("DPOModule"), parts))


def test_beta_dpo_follows_the_margins() -> None:
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


def test_beta_dpo_forgets_margins_that_are_no_numbers() -> None:
    """The update is skipped for its gradient; what moves with the margins must not be NaN from then on."""
    module = unloaded("BetaDPOModule", keep=0.67)
    module.margin_mean, module.margin_std = 0.2, 0.3
    spoilt = fixture()
    spoilt.policy_chosen_logprobs[1, 0] = torch.nan
    with torch.enable_grad():
        losses = as_loss(module.preference_loss(spoilt))
    assert losses.values.isnan().any() and (module.margin_mean, module.margin_std) == (0.2, 0.3)


def test_beta_dpo_drops_pairs_and_measures_without_moving() -> None:
    module = unloaded("BetaDPOModule", keep=0.67)
    with torch.no_grad():
        values(module, fixture())
    assert (module.margin_mean, module.margin_std) == (0.0, 0.0)
    losses = values(module, fixture())
    assert int((losses == 0).sum()) == 1  # two of three pairs are kept
    again = unloaded("BetaDPOModule", keep=0.67)
    torch.testing.assert_close(values(again, fixture()), losses)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("RobustDPOModule", {"flip_rate": 0.5}, "flip_rate is 0.5"),
        ("EXOModule", {"epsilon": 0.0}, "epsilon is 0.0"),
        ("AlphaDPOModule", {"alpha": 0.0}, "its limit 0 is DPOModule"),
        ("BetaDPOModule", {"keep": 0.0}, "keep is 0.0"),
        ("TRDPOModule", {"reference_every": 0}, "reference_every is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        unloaded(name, **settings)
