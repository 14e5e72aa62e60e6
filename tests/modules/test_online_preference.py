"""Test on-policy preferences: pairs by value, gradients for every split, rounds and references, opponents."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import (
    MetricsLog,
    assert_same,
    evaluate,
    fit,
    gradients_of_step,
    plain_logprobs,
    prompt_step,
    quiet_trainer,
    random_rows,
    weights_of,
    within,
)
from torch import Tensor
from training.test_module_checkpoints import Snapshot
from transformers import AutoModelForCausalLM

from rlhf_lightning import modules
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules import OnlineDPOModule
from rlhf_lightning.modules.online_opponents import OPPONENTS
from rlhf_lightning.sampling.decoding import Mixture
from rlhf_lightning.sampling.slot_engine import sample
from rlhf_lightning.tokenization.facts import Facts
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import PreferenceLogprobs, PromptBatch, Rollout, Sequences, Step

PROMPTS = [prompt for prompt, _ in random_rows(4, seed=81)]
NAMES = ["OnlineDPOModule", "IterativeDPOModule", "XPOModule", "NashMDModule"]
ON_PAIRS = NAMES[:3]
LORAS = pytest.mark.parametrize("lora", [None, LoraSettings(r=2, alpha=6, targets=["q_proj"])])


def low_words(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    words = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in completions]
    return [sum(w < 60 for w in many) / max(len(many), 1) for many in words]


def level(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def made(name: str, folder: str = "nowhere", **settings: Any) -> Any:
    defaults: dict[str, Any] = {"max_new_tokens": 6, "learning_rate": 1e-3, "lr_schedule": "constant"}
    module = getattr(modules, name)(init_from=folder, **{"scorer": low_words, **defaults, **settings})
    module.trainer = quiet_trainer()
    return module


def questions(samples: int = 2, first_episode: int = 0) -> Step[PromptBatch]:
    step = prompt_step([p for p in PROMPTS for _ in range(samples)], first_episode)
    batch = step.micro_batches[0]
    return step._replace(micro_batches=(batch._replace(group=torch.arange(len(batch.prompts)) // samples),))


def kept_rollout(module: Any, step: Step[PromptBatch], **trainer: Any) -> Rollout:
    kept: list[Rollout] = []
    collect = module.collect
    module.collect = lambda *batches: kept.append(found := collect(*batches)) or found
    fit(module, [step], **trainer)
    return kept[0]


# -- pairs ------------------------------------------------------------------------------------------------------------


def rollout_of(scores: list[float], group: list[int]) -> Rollout:
    rows, length = len(scores), 2
    mask, grid = torch.ones(rows, length, dtype=torch.bool), torch.full((rows, length), -1.0, dtype=torch.float64)
    ids = tuple(torch.arange(length) for _ in scores)
    sequences = Sequences(tuple(torch.ones(1, dtype=torch.long) for _ in scores), ids, tuple(range(rows)), ids)
    values = torch.tensor(scores, dtype=torch.float64)
    return Rollout(sequences, mask, grid, grid, None, values, mask[:, 0], torch.tensor(group), None, torch.arange(rows))


def test_pairs_are_best_against_worst_without_ties() -> None:
    rollout = rollout_of([0.5, 2.0, 1.0, 3.0, 3.0, 3.0, math.nan, 0.0, -1.0], [0, 0, 0, 1, 1, 1, 2, 2, 2])
    hard = made("OnlineDPOModule").pairs(rollout)
    assert (hard.chosen.tolist(), hard.rejected.tolist()) == ([1, 7], [0, 8])
    assert hard.target.tolist() == [1.0, 1.0] and hard.rated_margin.tolist() == [1.5, 1.0]
    soft = made("OnlineDPOModule", soft_labels=True).pairs(rollout)
    torch.testing.assert_close(soft.target, torch.tensor([0.81757448, 0.73105858], dtype=torch.float64))


def logprobs_of(by_reference: bool = False) -> PreferenceLogprobs:
    """A pair with margin 0.7, policy log-probabilities -10 (chosen) and -11 (rejected), and label 0.8."""
    columns = [torch.tensor([[value]], dtype=torch.float64) for value in (-10.0, -11.0, -10.5, -10.8)]
    mask, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    by = torch.tensor([by_reference])
    slots = {"chosen_by_reference": by, "rejected_by_reference": ~by}
    return PreferenceLogprobs(*columns, mask, mask, 0.8 * one, 0 * one, one, slots)


def test_losses_by_hand() -> None:
    """-0.8 log sigmoid(0.07) - 0.2 log sigmoid(-0.07), and XPO's bonus on the side that the reference wrote."""
    expected = 0.67275956
    assert float(as_loss(made("OnlineDPOModule").preference_loss(logprobs_of())).values) == pytest.approx(
        expected, abs=1e-8
    )
    xpo = made("XPOModule", alpha=0.01)
    assert float(xpo.preference_loss(logprobs_of(False)).values) == pytest.approx(expected - 0.11, abs=1e-8)
    assert float(xpo.preference_loss(logprobs_of(True)).values) == pytest.approx(expected - 0.10, abs=1e-8)


def test_xpo_without_bonus_is_online_dpo_and_nash_md_rewards_win_probability() -> None:
    plain = made("XPOModule", alpha=0.0).preference_loss(logprobs_of()).values
    torch.testing.assert_close(plain, made("OnlineDPOModule").preference_loss(logprobs_of()).values)
    module = made("NashMDModule", kl_coef=0.1)
    rollout = rollout_of([2.0, math.nan], [0, 1])._replace(baseline_scores=torch.tensor([0.5, 0.5]).double())
    rollout = rollout._replace(reference_logprobs=rollout.old_logprobs - 0.2)
    found = module.advantages(rollout, module.shape_rewards(rollout)).advantages
    torch.testing.assert_close(found[0], torch.full((2,), 0.81757448 - 0.5 - 0.1 * 0.4).double())
    assert found[1].tolist() == [0.0, 0.0]


# -- whole steps ------------------------------------------------------------------------------------------------------


def test_the_first_gradient_equals_plain_pytorch(policy_folder: str) -> None:
    """Mean over pairs of -log sigmoid(beta d), from unpadded sequences at the temperature of the samples."""
    module, logged = made("OnlineDPOModule", policy_folder, max_grad_norm=None, beta=0.3), MetricsLog()
    kept: list[Rollout] = []
    collect = module.collect
    module.collect = lambda *batches: kept.append(found := collect(*batches)) or found
    found = gradients_of_step(module, questions())
    rollout, plain = kept[0], AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    scores = rollout.scores.view(-1, 2)
    differ = [g for g in range(4) if scores[g, 0] != scores[g, 1]]
    loss = torch.zeros(())
    for g in differ:
        best = 2 * g + int(scores[g].argmax())
        sides = [
            plain_logprobs(plain, rollout.sequences.prompts[row], rollout.sequences.completions[row], 0.9).sum()
            for row in (best, best ^ 1)
        ]
        margin = sides[0] - sides[0].detach() - sides[1] + sides[1].detach()
        loss = loss - torch.nn.functional.logsigmoid(0.3 * margin) / len(differ)
    loss.backward()
    expected = {f"policy.model.{n}": p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert_same(found, expected, rtol=1e-3, atol=1e-5)
    assert float(loss.detach()) == pytest.approx(math.log(2)) and len(differ) > 0
    fit(made("OnlineDPOModule", policy_folder), [questions()], callbacks=[logged])
    assert logged.rows[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logged.rows[0]["rollout/frac_ties"] == 1 - len(differ) / 4


@pytest.mark.parametrize("name", NAMES)
def test_gradients_do_not_depend_on_micro_batches(policy_folder: str, name: str) -> None:
    def gradients(**limits: int) -> dict[str, Tensor]:
        (step,) = within([questions()], **limits)
        return gradients_of_step(made(name, policy_folder, max_grad_norm=None), step)

    whole = gradients()
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-6
    assert_same(gradients(micro_batch_size=2), whole, rtol=1e-4, atol=1e-6)
    assert_same(gradients(max_tokens=30), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_scores_rise_and_constant_scores_change_nothing(policy_folder: str, name: str) -> None:
    logged = MetricsLog()
    settings: dict[str, Any] = {"max_new_tokens": 4, "learning_rate": 4e-3}
    settings |= {"kl_coef": 0.01} if name == "NashMDModule" else {"beta": 0.3}
    steps = [questions(2, 8 * i) for i in range(24)]
    wide = [Step((_repeated(step.micro_batches[0], 4),), 32, 0) for step in steps]
    fit(made(name, policy_folder, **settings), wide, callbacks=[logged])
    scores = logged.column("rollout/score")
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 0.15, scores
    module = made(name, policy_folder, scorer=level, weight_decay=0.0, **settings)
    before = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    fit(module, wide[:2])
    moved = [(module.policy.model.get_parameter(n) - p).abs().max() for n, p in before.named_parameters()]
    assert float(max(moved)) < 1e-6


def _repeated(batch: PromptBatch, times: int) -> PromptBatch:
    """The same questions several times, each with its own episodes and groups."""
    count, groups = len(batch.prompts), int(batch.group.max()) + 1
    return batch._replace(
        prompts=batch.prompts * times,
        texts=batch.texts * times,
        episodes=torch.cat([times * batch.episodes[0] + i * count + torch.arange(count) for i in range(times)]),
        group=torch.cat([batch.group + i * groups for i in range(times)]),
    )


def test_a_rank_without_pairs_joins_every_update(policy_folder: str) -> None:
    logged = MetricsLog()
    module = made("OnlineDPOModule", policy_folder, scorer=level, mini_batch_size=4, ppo_epochs=2)
    fit(module, [questions()], callbacks=[logged])
    assert module.updates == 4
    row = logged.rows[0]
    assert row["rollout/frac_ties"] == 1.0 and row["train/loss"] == row["train/grad_norm"] == 0.0
    assert "invariant/sampler" in row and not {"train/ratio", "train/reward_margin", "train/reward_accuracy"} & set(row)


def test_minibatches_keep_the_samples_of_a_prompt_together(policy_folder: str) -> None:
    module = made("IterativeDPOModule", policy_folder, mini_batch_size=6)
    rollout = kept_rollout(module, questions(3))
    batches = list(module.minibatches(rollout, Meter()))
    assert [len(rows) for rows in batches] == [6, 6] and module.updates == 2
    assert sorted(row for rows in batches for row in rows) == list(range(12))
    assert all({row // 3 for row in rows} == {row // 3 for row in rows[::3]} for rows in batches)


@pytest.mark.parametrize("name", ON_PAIRS)
def test_rollouts_that_cannot_be_paired_are_refused(policy_folder: str, name: str) -> None:
    with refused("samples-per-prompt", name):
        fit(made(name, policy_folder), [questions(1)])
    with refused("parts-groups", "mini_batch_size is 3"):
        fit(made(name, policy_folder, mini_batch_size=3), [questions(2)])
    with pytest.raises(TypeError, match="kl_coef"):
        made(name, policy_folder, kl_coef=0.1)


def test_xpo_needs_exactly_two_samples_per_prompt(policy_folder: str) -> None:
    with refused("samples-per-prompt", "a prompt has 4"):
        fit(made("XPOModule", policy_folder), [questions(4)])


def test_an_unfinished_completion_is_penalised(policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Facts, "ends", tuple(range(20, 35)))
    rollout = kept_rollout(made("OnlineDPOModule", policy_folder, missing_eos_penalty=5.0), questions())
    assert 0 < int(rollout.finished.sum()) < 8
    assert bool(((rollout.scores < 0) == ~rollout.finished).all())


class OnlineIPOModule(OnlineDPOModule):
    """IPO on the policy's own samples."""

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor:
        return (pair.margin - 1 / (2 * self.beta)) ** 2


def test_a_custom_online_objective_trains(policy_folder: str) -> None:
    logged = MetricsLog()
    module = OnlineIPOModule(init_from=policy_folder, scorer=low_words, max_new_tokens=6, beta=0.5)
    fit(module, [questions()], callbacks=[logged])
    assert logged.rows[0]["train/loss"] == pytest.approx(1.0, abs=1e-5)  # 1 / (4 beta^2) at the reference
    assert module.target_policy(None) is None  # type: ignore[arg-type]
    assert module.value_at_reference == pytest.approx(1.0)


def test_validation_samples_only_from_the_policy(policy_folder: str) -> None:
    for name in NAMES:
        found = evaluate(made(name, policy_folder), [questions(1)])
        assert abs(found["val/kl"]) < 1e-4 and 0 <= found["val/score"] <= 1
        assert "val/reward" not in found


# -- rounds -----------------------------------------------------------------------------------------------------------


def reference_weights(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.reference.copy.model.named_parameters()}


STEPS = [questions(3, 12 * index) for index in range(5)]
ROUNDS: dict[str, Any] = {"rollouts_per_round": 2, "beta": 0.3, "learning_rate": 5e-3}


@LORAS
def test_each_round_takes_the_previous_policy_as_reference(policy_folder: str, lora: Any) -> None:
    module, logged = made("IterativeDPOModule", policy_folder, lora=lora, **ROUNDS), MetricsLog()
    moments: list[int] = []
    begin = module.begin_round

    def watched() -> None:
        moments.append(len(module.optimizers().optimizer.state))
        begin()
        moments.append(len(module.optimizers().optimizer.state))

    module.begin_round = watched
    fit(module, STEPS, callbacks=[logged])
    trained = len(weights_of(module))
    assert moments == [trained, 0, trained, 0]
    kl = logged.column("rollout/kl")
    assert [abs(value) < 1e-4 for value in kl] == [True, False, True, False, True]
    losses = logged.column("train/loss")
    assert losses[2] == pytest.approx(math.log(2), abs=1e-5) and abs(losses[1] - math.log(2)) > 1e-4
    assert "invariant/first_kl" in logged.rows[2]


def test_reference_of_round_start_keeps_the_initial_reference(policy_folder: str) -> None:
    module, logged = made("IterativeDPOModule", policy_folder, reference_of_round="start", **ROUNDS), MetricsLog()
    fit(module, STEPS, callbacks=[logged])
    assert [abs(value) < 1e-4 for value in logged.column("rollout/kl")] == [True, False, False, False, False]
    with refused("unknown-choice", "reference_of_round is 'first'"):
        made("IterativeDPOModule", reference_of_round="first")
    with refused("setting-out-of-range", "rollouts_per_round", "0"):
        made("IterativeDPOModule", rollouts_per_round=0)


@LORAS
def test_a_resumed_run_restores_the_reference_of_its_round(policy_folder: str, tmp_path: Path, lora: Any) -> None:
    path = tmp_path / "epoch.ckpt"

    def run(ckpt_path: Path | None = None, **trainer: Any) -> Any:
        module = made("IterativeDPOModule", policy_folder, lora=lora, **ROUNDS)
        fit(module, STEPS, ckpt_path=None if ckpt_path is None else str(ckpt_path), max_epochs=2, **trainer)
        return module

    whole, resumed = run(callbacks=[Snapshot(5, path)]), run(path)
    assert (resumed.rollouts, resumed.updates) == (whole.rollouts, whole.updates) == (10, 10)
    assert_same(weights_of(resumed), weights_of(whole), rtol=0, atol=1e-7)
    assert_same(reference_weights(resumed), reference_weights(whole), rtol=0, atol=1e-7)
    # The check can fail: without its reference the run gives another result.
    saved = torch.load(path, weights_only=True)
    assert saved["reference"].keys() <= reference_weights(whole).keys() and len(saved["reference"])
    del saved["reference"]
    torch.save(saved, path)
    forgetful = run(path)
    assert max(float((weights_of(forgetful)[n] - w).abs().max()) for n, w in weights_of(whole).items()) > 1e-5


def resumed_from(module: Any, path: Path, saved: dict[str, Any]) -> None:
    """Load a checkpoint as the Trainer does before the first step of a resumed fit."""
    module.configure_model()
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"])


def test_an_export_omits_the_reference(policy_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "late.ckpt"
    whole = made("IterativeDPOModule", policy_folder, **ROUNDS)
    fit(whole, STEPS, callbacks=[Snapshot(5, path)])
    module = made("IterativeDPOModule", policy_folder, **ROUNDS)
    module.needs_reference = False  # as `rlhf export` does
    resumed_from(module, path, torch.load(path, weights_only=True))
    assert module.frozen_models() == ()
    assert_same(weights_of(module), weights_of(whole), rtol=0, atol=0)


# -- opponents --------------------------------------------------------------------------------------------------------


@LORAS
def test_xpo_draws_the_second_sample_from_the_reference(policy_folder: str, lora: Any) -> None:
    module = made("XPOModule", policy_folder, lora=lora, learning_rate=2e-2)
    fit(module, [questions()])
    step, collector = questions(2, 100).micro_batches[0], module.collector
    drawn = module.draw([step])
    with module.reference.as_model() as reference:
        theirs = collector.sample(reference, module.tokenizer, step).ids
    own = collector.sample(module.policy, module.tokenizer, step).ids
    expected = [(own, theirs)[row % 2][row].tolist() for row in range(8)]
    assert [ids.tolist() for ids in drawn.sequences.completions] == expected
    assert [ids.tolist() for ids in own] != [ids.tolist() for ids in theirs]
    fit(module, [questions(2, 200)])  # the invariants compare each sample with the model that sampled it


@LORAS
def test_nash_md_draws_the_opponent_from_the_mixture(policy_folder: str, lora: Any) -> None:
    module = made("NashMDModule", policy_folder, lora=lora, learning_rate=2e-2, mixture=0.25)
    logged = MetricsLog()
    fit(module, [questions()], callbacks=[logged])
    assert 0 < logged.rows[0]["rollout/win_rate"] < 1
    batch, ends = questions(1, 7).micro_batches[0], (3,)
    episodes = batch.episodes + OPPONENTS
    mixture = Mixture(module.reference.as_model, lambda own, other: 0.75 * own + 0.25 * other)
    drawn = sample(module.policy, batch.prompts, episodes, module.sampling, module.seed, ends, mixture=mixture)
    texts = [module.tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in drawn.ids]
    torch.testing.assert_close(module.opponent_scores(batch), torch.tensor(low_words(None, texts)))
    for prompt, ids, found in zip(batch.prompts, drawn.ids, drawn.logprobs, strict=True):
        whole = torch.cat([prompt, ids])[None]
        own = module.policy.model(whole).logits[0]
        with module.reference.as_model() as reference:
            other = reference.model(whole).logits[0]
        mixed = torch.log_softmax((0.75 * own + 0.25 * other) / 0.9, -1)[len(prompt) - 1 : -1]
        torch.testing.assert_close(found, mixed.gather(-1, ids[:, None])[:, 0].detach(), rtol=1e-4, atol=1e-4)
    with refused("setting-out-of-range", "mixture", "1.5"):
        made("NashMDModule", mixture=1.5)
