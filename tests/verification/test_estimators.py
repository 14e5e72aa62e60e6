"""The mean of every policy-gradient estimator equals its exact expectation over all rollouts.

Each module samples rollouts with its own code. Their mean gradient is taken at the sampling weights, and at other
weights as in a later update. One multivariate test compares it with the sum over all rollouts of a second transcription
of the paper's loss.
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from scipy.stats import kstest
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rlhf_lightning import modules
from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.modules import CriticFreeModule, PPOModule
from rlhf_lightning.verification.convergence import prepare
from rlhf_lightning.verification.table_model import IMPOSSIBLE
from rlhf_lightning.verification.world import EnumerableWorld
from verification import paper_estimators as paper
from verification.estimators import mean_test, questions_of, rollout_gradients, trained
from verification.paper_estimators import ESTIMATORS, Every, Formula, Settings, every_rollout, these_rollouts

SAMPLES = 3
ROLLOUTS = {"RLOOModule": 700}
"""Rollouts of a case, 250 unless listed: enough to reject every mistake below. A forgotten KL needs the most."""
SETTINGS = Settings(kl_coef=0.3, clip=0.1, clip_high=0.1, cap=0.8, value_coef=0.5, value_clip=0.1)
FURTHER: dict[str, dict[str, Any]] = {
    "CISPOModule": {"cispo_high": SETTINGS.cap},
    "DAPOModule": {"overlong_buffer": 1, "clip_high": 2 * SETTINGS.clip},
    "GSPOModule": {"clip_high": None},
    "PPOModule": {"value_coef": SETTINGS.value_coef, "value_clip": SETTINGS.value_clip},
}
CASES = {name: (name, FURTHER.get(name, {})) for name in ESTIMATORS}
CASES["PPOModule, shared critic"] = ("PPOModule", {**FURTHER["PPOModule"], "critic": "shared"})
cases = pytest.mark.parametrize("name", CASES)
updates = pytest.mark.parametrize("update", ["first", "later"])


def moved(weights: list[Tensor], scale: float, seed: int) -> Tensor:
    """Return the flattened weights after a fixed random step, without changes to impossible tokens or to values."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for weight in weights:
        step = scale * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
        step = torch.where(weight < IMPOSSIBLE / 2, 0.0, step)
        if weight.shape == (1, 6):  # head of a critic on a row of logits
            step[:, [0, 4, 5]] = 0.0
        parts.append(weight.detach() + step)
    return parameters_to_vector(parts)


class Case:
    """A module, its sampling weights, the weights of a later update, and gradients of rollouts at both."""

    def __init__(self, name: str, folder: Path) -> None:
        kind, settings = CASES[name]
        self.formula, self.rollouts = ESTIMATORS[kind], ROLLOUTS.get(name, 250)
        self.world = EnumerableWorld(prompts=2, tokens=3, max_new_tokens=2, reference_scale=0.2)
        if kind == "PPOModule":
            settings = {"critic_init": self.world.write_reward_model(folder / "reward"), **settings}
        module = getattr(modules, kind)(
            self.world.score, init_from=self.world.write(folder / "policy"), max_new_tokens=2, ppo_epochs=1,
            **{"kl_coef": SETTINGS.kl_coef, "clip": SETTINGS.clip, **settings},
        )  # fmt: skip
        self.module: Any = prepare(module)
        vector_to_parameters(moved(trained(module), 0.25, 1), trained(module))
        self.weights = {
            "first": parameters_to_vector(trained(module)).detach().clone(),
            "later": moved(trained(module), 0.15, 2),
        }

    @cache  # noqa: B019 - cases live as long as the test session
    def gradients(self, update: str) -> Tensor:
        """Return the gradients of many independent rollouts."""
        at = None if update == "first" else self.weights[update]
        return rollout_gradients(self.module, self.world, self.rollouts, SAMPLES, at)

    def expectation(self, update: str, formula: Formula | None = None) -> Tensor:
        """Return the sum over all rollouts of probability times gradient."""
        formula = formula or self.formula

        def loss(weights: Tensor) -> Tensor:
            every = every_rollout(self.world, SAMPLES, *self.tables(weights))
            return (every.probability * formula(every, SETTINGS)).sum()

        return gradient_of(loss, self.weights[update])

    def tables(self, weights: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return logits and values of each prefix, for the given weights and for the sampling weights."""
        named = {"now": self.named(weights), "old": self.named(self.weights["first"].double())}
        policy = {at: those["policy.model.model.table.weight"] for at, those in named.items()}
        policy["reference"] = self.world.reference_table.float()
        values = {}
        for at, those in named.items():
            if "critic.model.score.weight" in those:
                values[at] = those["critic.model.model.table.weight"] @ those["critic.model.score.weight"][0]
            elif "policy.value_head.weight" in those:
                values[at] = policy[at] @ those["policy.value_head.weight"][0] + those["policy.value_head.bias"]
        return policy, values

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """Return weights by name, from a flat vector."""
        names = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        parts = weights.split([p.numel() for _, p in names])
        return {name: part.view_as(p) for (name, p), part in zip(names, parts, strict=True)}


JUDGED_OTHERWISE = {"NashMDModule"}
"""Rollouts of these classes depend on an opponent; their contracts enumerate it."""


def gradient_of(loss: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    leaf = weights.double().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return cache(lambda name: Case(name, tmp_path_factory.mktemp("estimator")))


def test_every_on_policy_objective_is_tested():
    shipped = {kind.__name__ for kind in objective_classes() if issubclass(kind, CriticFreeModule | PPOModule)}
    assert {kind for kind, _ in CASES.values()} | JUDGED_OTHERWISE == shipped


@cases
def test_all_rollouts_are_enumerated(name: str, case_of: Callable[[str], Case]):
    case = case_of(name)
    every = every_rollout(case.world, SAMPLES, *case.tables(case.weights["first"]))
    assert len(every.probability) == math.comb(7 + SAMPLES - 1, SAMPLES) ** 2
    assert float(every.probability.sum()) == pytest.approx(1.0, abs=1e-12)


@cases
@updates
def test_each_rollout_gradient_equals_the_formula(name: str, update: str, case_of: Callable[[str], Case]):
    """Exact test: a random combination of the rollouts' gradients equals that of their transcribed losses."""
    case = case_of(name)
    drawn = case.module.collect(questions_of(case.world, case.rollouts, SAMPLES)).sequences.completions
    index = {ids: place for place, ids in enumerate(case.world.completions)}
    completions = torch.tensor([index[tuple(ids.tolist())] for ids in drawn]).view(case.rollouts, -1)
    chosen = torch.randn(case.rollouts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(weights: Tensor) -> Tensor:
        these = these_rollouts(case.world, completions, SAMPLES, *case.tables(weights))
        return (chosen * case.formula(these, SETTINGS)).sum()

    expected = gradient_of(loss, case.weights[update])
    found = chosen @ case.gradients(update)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))


@cases
@updates
def test_the_mean_gradient_equals_the_exact_expectation(name: str, update: str, case_of: Callable[[str], Case]):
    case = case_of(name)
    found = mean_test(case.gradients(update), case.expectation(update))
    assert found.p_value > 1e-3, found
    assert found.unvarying < 1e-9, found
    assert found.degrees >= 12, found  # two prompts, three prefixes, two free logits each


# -- power: the same test against wrong expectations -------------------------------------------------------------------


def scaled(formula: Formula) -> Formula:
    return lambda r, s: 1.3 * formula(r, s)


def deviation_left_out(r: Every, s: Settings) -> Tensor:
    losses = paper.clipped(paper.token_ratio(r), paper.centred(r, r.scores).unsqueeze(-1), s.clip, s.clip_high)
    return paper.over_means(r, losses + s.kl_coef * paper.k3(r))


def deviation_of_the_rollout(r: Every, s: Settings) -> Tensor:
    advantages = paper.centred(r, r.scores) / (r.scores.std(-1, keepdim=True) + s.epsilon)
    losses = paper.clipped(paper.token_ratio(r), advantages.unsqueeze(-1), s.clip, s.clip_high)
    return paper.over_means(r, losses + s.kl_coef * paper.k3(r))


def deviation_of_the_group(r: Every, s: Settings) -> Tensor:
    advantages = paper.standardised(r, paper.penalised(r, s), s).unsqueeze(-1)
    return paper.over_tokens(r, paper.clipped(paper.token_ratio(r), advantages, s.clip, s.clip_high))


def deviation_biased(r: Every, s: Settings) -> Tensor:
    advantages = paper.standardised(r, r.scores, s).unsqueeze(-1) * (SAMPLES / (SAMPLES - 1)) ** 0.5
    losses = paper.clipped(paper.token_ratio(r), advantages, s.clip, s.clip_high)
    return paper.over_means(r, losses + s.kl_coef * paper.k3(r))


def whitened_by_prompt(r: Every, s: Settings) -> Tensor:
    to_go = paper.to_go(paper.with_score(r, paper.kl_rewards(r, s), r.scores))
    halves = [
        paper.whitened(r._replace(mask=r.mask[:, rows]), to_go[:, rows])
        for rows in (slice(0, SAMPLES), slice(SAMPLES, None))
    ]
    return paper.over_tokens(r, paper.clipped(paper.token_ratio(r), torch.cat(halves, 1), s.clip, s.clip_high))


def with_other(formula: Formula, **changes: float) -> Formula:
    return lambda r, s: formula(r, s._replace(**changes))


def penalty_reversed(formula: Formula) -> Formula:
    return lambda r, s: formula(r._replace(reference=2 * r.old - r.reference), s)


def itself_in_the_baseline(r: Every, s: Settings) -> Tensor:
    return (SAMPLES - 1) / SAMPLES * paper.rloo(r, s)


def token_mean_for_constant(r: Every, s: Settings) -> Tensor:
    advantages = paper.centred(r, paper.penalised(r, s)).unsqueeze(-1)
    return paper.over_tokens(r, paper.clipped(paper.token_ratio(r), advantages, s.clip, s.clip_high))


def scores_ungated(r: Every, s: Settings) -> Tensor:
    return paper.ppo(r._replace(ended=torch.ones_like(r.ended)), s)


def product_for_mean(r: Every, s: Settings) -> Tensor:
    ratio = torch.exp((r.now - r.old).sum(-1))
    losses = paper.clipped(ratio, paper.standardised(r, r.scores, s), s.clip, s.clip_high)
    return losses.mean(-1) + paper.over_means(r, s.kl_coef * paper.k3(r))


MISTAKES: dict[str, tuple[str, str, Formula]] = {
    "scaled advantage": ("GRPOModule", "first", scaled(paper.grpo)),
    "deviation left out": ("GRPOModule", "first", deviation_left_out),
    "deviation of the rollout for the group's": ("GRPOModule", "first", deviation_of_the_rollout),
    "deviation of the group for the rollout's": ("LitePPOModule", "first", deviation_of_the_group),
    "deviation biased": ("GRPOModule", "first", deviation_biased),
    "whitened by prompt": ("ReinforcePlusPlusModule", "first", whitened_by_prompt),
    "KL in the reward of the wrong sign": ("CriticFreeModule", "first", penalty_reversed(paper.critic_free)),
    "KL forgotten": ("RLOOModule", "first", with_other(paper.rloo, kl_coef=0.0)),
    "its own score in the baseline": ("RLOOModule", "first", itself_in_the_baseline),
    "token mean for a constant": ("DrGRPOModule", "first", token_mean_for_constant),
    "an unfinished completion keeps its score": ("PPOModule", "first", scores_ungated),
    "no critic's gradient": ("PPOModule, shared critic", "first", with_other(paper.ppo, value_coef=0.0)),
    "no clip": ("RLOOModule", "later", with_other(paper.rloo, clip=9.0, clip_high=9.0)),
    "no cap": ("CISPOModule", "later", with_other(paper.cispo, cap=9.0)),
    "product of ratios for their mean": ("GSPOModule", "later", product_for_mean),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_gradient_is_rejected(mistake: str, case_of: Callable[[str], Case]):
    name, update, formula = MISTAKES[mistake]
    case = case_of(name)
    found = mean_test(case.gradients(update), case.expectation(update, formula))
    assert found.p_value < 1e-3, found


def test_a_baseline_does_not_change_the_mean_gradient(case_of: Callable[[str], Case]):
    """ReMax without its greedy score has the same expectation."""
    case = case_of("ReMaxModule")

    def without(r: Every, s: Settings) -> Tensor:
        return paper.remax(r._replace(greedy=torch.zeros_like(r.greedy)), s)

    torch.testing.assert_close(case.expectation("first", without), case.expectation("first"))


# -- properties of the test -------------------------------------------------------------------------------------------


def test_p_values_are_uniform_under_the_null_and_detect_a_shift():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0, 0.0, 3.0, 5.0], dtype=torch.float64)
    draws = [torch.randn(60, 3, generator=generator, dtype=torch.float64) @ mixing + mean for _ in range(400)]
    tests = [mean_test(samples, mean) for samples in draws]
    assert {found.degrees for found in tests} == {3}
    assert max(found.unvarying for found in tests) < 1e-12
    assert kstest([found.p_value for found in tests], "uniform").pvalue > 1e-3
    assert mean_test(draws[0] + 2 * mixing[0], mean).p_value < 1e-6
    aside = torch.linalg.svd(mixing).Vh[-1]  # a direction without variance
    assert mean_test(draws[0] + aside, mean).unvarying > 1e-3


def test_constant_directions_must_match_and_too_few_samples_are_refused():
    samples = torch.ones(5, 2, dtype=torch.float64)
    assert mean_test(samples, torch.ones(2, dtype=torch.float64)) == (1.0, 0, 0.0)
    assert mean_test(samples, torch.tensor([1.0, 2.0], dtype=torch.float64)).unvarying == 0.5
    with refused("too-few-samples", "3 samples differ in 2 directions"):
        mean_test(torch.eye(4, dtype=torch.float64)[:3, :3], torch.zeros(3, dtype=torch.float64))


def test_rollout_gradients_restores_the_weights(case_of: Callable[[str], Case]):
    case = case_of("GRPOModule")
    rollout_gradients(case.module, case.world, 2, SAMPLES, case.weights["later"])
    assert torch.equal(parameters_to_vector(trained(case.module)), case.weights["first"])
    assert "update" not in vars(case.module)
