"""Test every objective on pairs in whole training steps: splits, ranks, references, checkpoints, and learning."""

import inspect
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import (
    EOS,
    FIRST_WORD,
    LastGradients,
    MetricsLog,
    assert_same,
    evaluate,
    fit,
    preference_step,
    random_pairs,
    save_policy,
    weights_of,
)
from torch import Tensor
from training.test_module_checkpoints import Snapshot
from training.test_updates import in_double

from rlhf_lightning import modules
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules import DPOModule
from rlhf_lightning.training import offline
from rlhf_lightning.training.pairs import whole_step
from rlhf_lightning.types import PreferenceLogprobs, Step

FAMILY = sorted(
    name for name, kind in vars(modules).items() if inspect.isclass(kind) and issubclass(kind, DPOModule)
)  # fmt: skip
PAIRS = random_pairs(7, seed=61)
TARGET = [1.0, 0.75, 1.0, 0.5, 1.0, 0.25, 1.0]
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 3.0]
LEARNING: dict[str, Any] = {"learning_rate": 1e-2, "warmup": 0, "lr_schedule": "constant"}


def made(name: str, policy_folder: str, **settings: Any) -> Any:
    return getattr(modules, name)(init_from=policy_folder, **settings)


def moved(module: Any) -> Any:
    """Load in fp64 and move the policy away from its reference by a fixed random step."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in in_double(module).parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


# -- cuts -------------------------------------------------------------------------------------------------------------


class WPOBCOPairModule(modules.WPOWeighting, modules.BCOPairModule):
    """Weights pairs by the policy and couples them: the statistics that WPO requests must reach a coupled step."""


def labelled(kind: type[DPOModule], micro: int | None) -> Step[Any]:
    plain = {} if kind.weighs_rows else {"target": None, "weights": None}
    return preference_step(PAIRS, micro, **{"target": TARGET, "weights": WEIGHTS, **plain})


@pytest.mark.parametrize("kind", [getattr(modules, name) for name in FAMILY] + [WPOBCOPairModule])
def test_micro_batches_change_neither_gradient_nor_metrics(kind: type[DPOModule], policy_folder: str) -> None:
    empty = preference_step([]).micro_batches
    found = []
    for micro in (None, 3):
        step = labelled(kind, micro)
        if micro is not None:  # one rank may be left without a row while others have two micro-batches
            step = step._replace(micro_batches=(*step.micro_batches[:1], *empty, *step.micro_batches[1:]))
        kept, logged = LastGradients(), MetricsLog()
        fit(moved(kind(init_from=policy_folder, max_grad_norm=None)), [step], callbacks=[kept, logged])
        found.append((kept.gradients, logged.rows[0]))
    scale = max(float(gradient.abs().max()) for gradient in found[0][0].values())
    assert scale > 0
    assert_same(found[1][0], found[0][0], rtol=0, atol=1e-9 * scale)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in FAMILY if getattr(modules, name).batch_coupled])
def test_coupled_losses_validate_all_pairs_of_a_step_together(name: str, policy_folder: str) -> None:
    found = []
    for micro in (None, 2):
        found.append(evaluate(moved(made(name, policy_folder)), [preference_step(PAIRS, micro)]))
    assert found[1] == pytest.approx(found[0], rel=1e-9, abs=1e-12)
    assert found[0]["val/reward_margin"] != 0


@pytest.mark.parametrize("micro", [None, 2])
def test_a_nan_coupled_loss_is_detected_even_with_a_finite_gradient(micro: int | None, policy_folder: str) -> None:
    class Masked(modules.AOTModule):
        def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor:
            loss = super().preference_loss(logprobs)
            assert isinstance(loss, Tensor)
            return loss + math.nan if self.updates == 1 else loss

    module = Masked(init_from=policy_folder, **LEARNING)
    fit(module, [preference_step(PAIRS, micro)] * 3)
    assert (module.updates, module.skipped_updates) == (3, 1)


# -- ranks ------------------------------------------------------------------------------------------------------------


def some_logprobs(pairs: int, width: int, seed: int) -> PreferenceLogprobs:
    generator = torch.Generator().manual_seed(seed)

    def grid() -> Tensor:
        return torch.rand(pairs, width, generator=generator)

    ones = torch.ones(pairs)
    slots = {"chosen_kl": grid(), "rejected_kl": grid(), "worth": torch.rand(pairs, generator=generator)}
    return PreferenceLogprobs(
        grid(), grid(), grid(), grid(), grid() > 0.5, grid() > 0.5, ones, ones * seed, ones, slots
    )


def test_ranks_with_different_numbers_of_pairs_gather_the_same_step() -> None:
    """Collectives need equal shapes: ranks have 3 + 0 and 1 + 4 pairs, and completions of different lengths."""
    parts = [[some_logprobs(3, 4, 1), some_logprobs(0, 1, 2)], [some_logprobs(1, 2, 3), some_logprobs(4, 6, 4)]]
    table: list[Any] = [None, None]
    barrier = threading.Barrier(2, timeout=20)

    def run(rank: int) -> Any:
        def all_gather(values: Tensor) -> Tensor:
            table[rank] = values
            barrier.wait()
            both = torch.stack(table)  # raises where shapes differ, as ranks would hang
            barrier.wait()
            return both

        trainer = SimpleNamespace(world_size=2)
        module: Any = SimpleNamespace(
            trainer=trainer, global_rank=rank, device="cpu", device_mesh=None, all_gather=all_gather
        )
        return whole_step(module, parts[rank])

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, (0, 1))
    assert first.rows == (slice(0, 3), slice(3, 3)) and second.rows == (slice(3, 4), slice(4, 8))
    fields, others = ({**w.logprobs._asdict(), **w.logprobs.extras} for w in (first, second))
    assert set(fields) == set(others) >= {"chosen_kl", "rejected_kl", "worth"}
    for name in set(fields) - {"extras"}:
        assert torch.equal(fields[name], others[name])
    assert first.logprobs.rated_margin.tolist() == [1, 1, 1, 3, 4, 4, 4, 4]
    assert first.logprobs.chosen_mask.shape == (8, 6)
    for rank, whole in enumerate((first, second)):
        for part, rows in zip(parts[rank], whole.rows, strict=True):
            width = part.chosen_mask.shape[1]
            mine = whole.logprobs.policy_rejected_logprobs[rows]
            assert torch.equal(mine[:, :width], part.policy_rejected_logprobs) and not mine[:, width:].any()
            assert torch.equal(whole.logprobs.rejected_mask[rows, :width], part.rejected_mask)
            assert torch.equal(whole.logprobs.extras["chosen_kl"][rows, :width], part.extras["chosen_kl"])
            assert torch.equal(whole.logprobs.extras["worth"][rows], part.extras["worth"])


# -- labels and weights -----------------------------------------------------------------------------------------------


def test_label_smoothing_works_for_every_objective(policy_folder: str) -> None:
    swapped = [(prompt, rejected, chosen) for prompt, chosen, rejected in PAIRS]
    right, wrong, mixed = (
        evaluate(moved(made("SimPOModule", policy_folder, label_smoothing=s)), [preference_step(pairs)])["val/loss"]
        for pairs, s in ((PAIRS, 0.0), (swapped, 0.0), (PAIRS, 0.125))
    )
    assert mixed == pytest.approx(0.875 * right + 0.125 * wrong, rel=1e-6)
    assert abs(right - wrong) > 0.1


def test_metrics_are_weighted_over_pairs(policy_folder: str) -> None:
    weights = [0.0, 1.0, 0.0, 3.0, 0.0, 0.0, 0.0]
    found = evaluate(moved(made("DPOModule", policy_folder)), [preference_step(PAIRS, 3, weights=weights)])
    alone = [
        evaluate(moved(made("DPOModule", policy_folder)), [preference_step([PAIRS[index]])]) for index in (1, 3)
    ]  # fmt: skip
    for name in ("reward_margin", "chosen_logprob", "length_difference", "reward_accuracy"):
        values = [metrics[f"val/{name}"] for metrics in alone]
        assert found[f"val/{name}"] == pytest.approx((values[0] + 3 * values[1]) / 4, rel=1e-6)
    # The loss is what training minimises: a sum over all pairs of the step, divided by their count.
    losses = [metrics["val/loss"] for metrics in alone]
    assert found["val/loss"] == pytest.approx((losses[0] + 3 * losses[1]) / 7, rel=1e-6)


@pytest.mark.parametrize("name", ["AOTModule", "UnpairedAOTModule"])
def test_sorted_losses_refuse_weights_and_label_smoothing(name: str, policy_folder: str) -> None:
    with refused("pairs-without-weights", f"{name} matches pairs by rank"):
        fit(made(name, policy_folder), [preference_step(PAIRS, 3, weights=WEIGHTS)])
    with refused("labels-are-certain", f"{name} treats labels as certain"):
        made(name, policy_folder, label_smoothing=0.1)


OWN_REWARDS: dict[str, Any] = {
    "DPOModule": lambda s, r, n: 0.1 * (s - r),
    "IPOModule": lambda s, r, n: 0.1 * (s - r) / n,
    "LengthNormalizedDPOModule": lambda s, r, n: 5.0 * (s - r) / n,
    "ForwardKLDPOModule": lambda s, r, n: 0.1 * (1 - math.exp(r - s)),
    "SimPOModule": lambda s, r, n: 2.0 * s / n,
    "ReferenceFreeDPOModule": lambda s, r, n: 0.1 * s,
    "ORPOModule": lambda s, r, n: s / n - math.log(1 - math.exp(s / n)),
}
"""Implicit reward of a completion of n tokens, from the log-probabilities of policy and reference."""


@pytest.mark.parametrize("name", OWN_REWARDS)
def test_reward_metrics_use_the_objectives_own_rewards(name: str, policy_folder: str) -> None:
    free = not getattr(modules, name).needs_reference
    module = moved(made(name, policy_folder))
    found = evaluate(module, [preference_step(PAIRS, 3)])
    with torch.no_grad():
        plain = moved(made("DPOModule", policy_folder, cache_reference=False))
        given = plain.preference_logprobs(preference_step(PAIRS).micro_batches[0])
    rewards = []
    for side in ("chosen", "rejected"):
        policy, reference = (getattr(given, f"{who}_{side}_logprobs").sum(-1) for who in ("policy", "reference"))
        lengths = getattr(given, f"{side}_lengths")
        rows = zip(policy.tolist(), reference.tolist(), lengths.tolist(), strict=True)
        rewards.append([OWN_REWARDS[name](*row) for row in rows])
    margins = [chosen - rejected for chosen, rejected in zip(*rewards, strict=True)]
    assert module.reference is None if free else module.reference is not None
    assert found["val/chosen_reward"] == pytest.approx(sum(rewards[0]) / 7, rel=1e-6)
    assert found["val/rejected_reward"] == pytest.approx(sum(rewards[1]) / 7, rel=1e-6)
    assert found["val/reward_margin"] == pytest.approx(sum(margins) / 7, rel=1e-6)
    assert found["val/reward_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 7)


# -- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_a_reference_is_loaded_only_if_needed(name: str, policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"ReferenceFreeDPOModule", "SimPOModule", "ORPOModule", "CPOModule"}
    asked = []

    class Watched(offline.Reference):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            asked.append(args)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(offline, "Reference", Watched)
    module = made(name, policy_folder)
    module.configure_model()
    assert len(asked) == (name not in free)
    assert len(module.frozen_models()) == (name not in free)


def tr_dpo(policy_folder: str, lora: LoraSettings | None, **settings: Any) -> Any:
    return made("TRDPOModule", policy_folder, lora=lora, **{**LEARNING, "beta": 0.3, "warmup": 0.0, **settings})


def reference_weights(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.reference.copy.model.named_parameters()}


LORAS = pytest.mark.parametrize("lora", [None, LoraSettings(r=2, alpha=6, targets=["q_proj"])])
QUERY = "model.layers.1.self_attn.q_proj.weight"


@LORAS
def test_the_reference_moves_by_alpha_every_reference_every_updates(
    policy_folder: str, lora: LoraSettings | None
) -> None:
    module = tr_dpo(policy_folder, lora, alpha=0.75, reference_every=2)
    module.configure_model()
    start = reference_weights(module)
    fit(module, [preference_step(PAIRS)])
    assert_same(reference_weights(module), start, rtol=0, atol=0)
    module.updates = 1
    fit(module, [preference_step(PAIRS)])
    trained = module.policy.model
    if lora is None:
        policy = {name: p.detach() for name, p in trained.named_parameters()}
    else:
        layer = trained.base_model.model.model.layers[1].self_attn.q_proj
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        policy = {**start, QUERY: (start[QUERY] + 3.0 * product).detach()}  # alpha / r = 3
        first = trained.base_model.model.model.layers[0].self_attn.q_proj
        policy[QUERY.replace("1", "0")] = (
            first.base_layer.weight + 3.0 * first.lora_B["default"].weight @ first.lora_A["default"].weight
        ).detach()
    expected = {name: 0.75 * policy[name] + 0.25 * start[name] for name in start}
    assert_same(reference_weights(module), expected, rtol=0, atol=1e-7)
    assert float((expected[QUERY] - start[QUERY]).abs().max()) > 1e-3


@LORAS
def test_replacing_the_reference_resets_the_loss_to_log_2(policy_folder: str, lora: LoraSettings | None) -> None:
    logged = MetricsLog()
    module = tr_dpo(policy_folder, lora, alpha=1.0, reference_every=2)
    fit(module, [preference_step(PAIRS, 3)] * 4, callbacks=[logged])
    losses = logged.column("train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[2] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[1] < 0.69 and losses[3] < 0.69


# -- checkpoints ------------------------------------------------------------------------------------------------------

STEPS = [preference_step(random_pairs(4, seed=70 + index), 2) for index in range(3)]


def run(module: Any, path: Path | None = None, **settings: Any) -> Any:
    fit(module, STEPS, ckpt_path=None if path is None else str(path), max_epochs=2, **settings)
    return module


@LORAS
def test_a_resumed_tr_dpo_run_restores_its_reference(
    policy_folder: str, tmp_path: Path, lora: LoraSettings | None
) -> None:
    path = tmp_path / "epoch.ckpt"
    settings: dict[str, Any] = {"alpha": 0.5, "reference_every": 2}
    whole = run(tr_dpo(policy_folder, lora, **settings), callbacks=[Snapshot(3, path)])
    resumed = run(tr_dpo(policy_folder, lora, **settings), path)
    assert_same(weights_of(resumed), weights_of(whole), rtol=0, atol=1e-7)
    assert_same(reference_weights(resumed), reference_weights(whole), rtol=0, atol=1e-7)
    saved = torch.load(path, weights_only=True)
    queries = {QUERY, QUERY.replace("1", "0")}  # nothing else of the reference moves with this adapter
    assert set(saved["reference"]) == (queries if lora else set(reference_weights(whole)))
    # The check can fail: without its reference the run gives another result.
    del saved["reference"]
    torch.save(saved, path)
    forgetful = run(tr_dpo(policy_folder, lora, **settings), path)
    assert max(float((weights_of(forgetful)[n] - w).abs().max()) for n, w in weights_of(whole).items()) > 1e-5


def test_an_unmoved_reference_is_not_in_checkpoints(policy_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "early.ckpt"
    run(tr_dpo(policy_folder, None, reference_every=4), callbacks=[Snapshot(3, path)])
    assert "reference" not in torch.load(path, weights_only=True)


def test_a_tr_dpo_checkpoint_can_be_exported_without_its_reference(policy_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "late.ckpt"
    whole = run(tr_dpo(policy_folder, None, reference_every=2), callbacks=[Snapshot(6, path)])
    module = tr_dpo(policy_folder, None, reference_every=2)
    module.needs_reference = False  # as `rlhf export` does
    module.configure_model()
    saved = torch.load(path, weights_only=True)
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"])
    assert module.frozen_models() == ()
    assert_same(weights_of(module), weights_of(whole), rtol=0, atol=0)


def test_a_resumed_beta_dpo_run_restores_its_margin_statistics(policy_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "epoch.ckpt"
    settings: dict[str, Any] = {**LEARNING, "beta": 0.3, "keep": 0.75}
    whole = run(made("BetaDPOModule", policy_folder, **settings), callbacks=[Snapshot(3, path)])
    resumed = run(made("BetaDPOModule", policy_folder, **settings), path)
    assert (resumed.margin_mean, resumed.margin_std) == pytest.approx((whole.margin_mean, whole.margin_std), rel=1e-5)
    assert whole.margin_mean > 0.1 and whole.margin_std > 0.1
    assert_same(weights_of(resumed), weights_of(whole), rtol=0, atol=1e-7)
    saved = torch.load(path, weights_only=True)
    saved["margins"] = [0.0, 0.0]
    torch.save(saved, path)
    forgetful = run(made("BetaDPOModule", policy_folder, **settings), path)
    assert abs(forgetful.margin_mean - whole.margin_mean) > 1e-2


# -- it learns --------------------------------------------------------------------------------------------------------

WORDS = 24
WORTH = torch.randn(WORDS, generator=torch.Generator().manual_seed(17))
"""Value of each word; an answer is better if its words have a higher total value."""


def judged_pairs(count: int, seed: int, told: bool = True) -> list[Any]:
    """Pairs of answers of four words; ``told``: whether the label follows their value or is random."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        both = torch.randint(0, WORDS, (2, 4), generator=generator)
        first, second = ([*(FIRST_WORD + side).tolist(), EOS] for side in both)
        coin = bool(torch.rand((), generator=generator) < 0.5)
        better = bool(WORTH[both[0]].sum() > WORTH[both[1]].sum()) if told else coin
        pairs.append(([FIRST_WORD + WORDS], *((first, second) if better else (second, first))))
    return pairs


@pytest.fixture(scope="module")
def short_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a weak model: one layer, small weights."""
    return save_policy(tmp_path_factory.mktemp("short") / "policy", num_hidden_layers=1, initializer_range=0.02)


HELD_OUT = judged_pairs(192, seed=1)
TAUGHT = {
    "DiscoPOPModule": {"temperature": 1.0},  # at its default setting it first shrinks margins, see its docstring
    "SPPOModule": {"beta": 0.1},
    "APODownModule": {"learning_rate": 1e-2},  # chosen falls too, so that margins grow slowly
}


@pytest.mark.parametrize("name", FAMILY)
def test_held_out_accuracy_rises_only_with_true_labels(name: str, short_folder: str) -> None:
    accuracy = {}
    for told in (True, False):
        rows = judged_pairs(800, seed=2, told=told)
        steps = [preference_step(rows[start : start + 40]) for start in range(0, 800, 40)]
        settings = {"learning_rate": 5e-3, "lr_schedule": "linear", "warmup": 0, **TAUGHT.get(name, {})}
        fit(module := made(name, short_folder, **settings), steps)
        accuracy[told] = evaluate(module, [preference_step(HELD_OUT)])["val/reward_accuracy"]
    # Random guesses on 192 pairs have a standard error of 0.036; the pairs share words, so errors are correlated.
    assert accuracy[True] > 0.75, accuracy
    assert 0.3 < accuracy[False] < 0.7, accuracy
