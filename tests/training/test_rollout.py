"""Test the data that a rollout passes to the loss and to the hooks at its end."""

from typing import Any

import pytest
import torch
from tiny_models import MetricsLog, fit, prompt_step, random_rows, within
from torch import Tensor

from rlhf_lightning.modules import CriticFreeModule, PPOModule, ReinforcePlusPlusModule
from rlhf_lightning.scoring import Scorer
from rlhf_lightning.training.collector import last_learned, select_episodes
from rlhf_lightning.types import Judgement, PolicyLogprobs, Rollout, Step

PROMPTS = [prompt for prompt, _ in random_rows(3, seed=81) for _ in range(2)]
SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "learning_rate": 1e-3, "lr_schedule": "constant"}


def step(**columns: list[Any]) -> Step[Any]:
    (batch,) = prompt_step(PROMPTS, **columns).micro_batches
    batch = batch._replace(group=torch.arange(6) // 2, row_ids=(7, 7, 8, 8, 9, 9))
    return Step((batch,), 6, 0)


class Careful(Scorer):
    """Scores by a column, and records its hook calls."""

    def __init__(self) -> None:
        self.told: list[dict[str, float]] = []
        self.calls = 0

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        self.calls += 1
        return [
            Judgement(float(row) + columns["bonus"][row], {"cost": 2.0 * row}, [0.0, 1.0], f"row {row}")
            for row in range(len(completions))
        ]

    def on_rollout_end(self, rollout: Rollout, means: Any) -> None:
        self.told.append(dict(means))

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Any) -> None:
        self.calls = state["calls"]


class Keeps(ReinforcePlusPlusModule):
    """Records the inputs of its loss."""

    needs_minibatch = True
    needs_minibatch_logprobs = True

    def policy_loss(self, logprobs: PolicyLogprobs) -> Any:
        self.__dict__.setdefault("seen", []).append(logprobs)
        return super().policy_loss(logprobs)

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        self.__dict__.setdefault("shaped", []).append(0.5 * super().shape_rewards(rollout))
        return self.shaped[-1]

    def on_rollout_end(self, rollout: Rollout, means: Any) -> None:
        self.__dict__.setdefault("ended", []).append((rollout, dict(means)))


def run(folder: str, micro: int | None = None, **settings: Any) -> Any:
    log = MetricsLog()
    module = Keeps(init_from=folder, scorer=Careful(), kl_coef=0.0, **{**SETTINGS, **settings})
    fit(module, within([step(bonus=[0.0, 1.0] * 3)], micro), callbacks=[log])
    module.__dict__["row"] = log.rows[0]
    return module


def test_judgements_reach_rollout_rewards_and_metrics(policy_folder: str) -> None:
    module = run(policy_folder)
    ((rollout, means),) = module.ended
    assert rollout.scores.tolist() == [0.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert rollout.parts["cost"].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert rollout.feedback == tuple(f"row {row}" for row in range(6))
    assert rollout.row_ids == (7, 7, 8, 8, 9, 9) and rollout.columns["bonus"] == [0.0, 1.0] * 3
    assert len(rollout.texts) == len(rollout.prompts) == 6 and rollout.entropy is not None
    (rewards,) = module.shaped  # once in a rollout, and may be scaled
    expected = torch.zeros_like(rewards)
    expected[torch.arange(6), last_learned(rollout.completion_mask)] = 0.5 * rollout.scores
    expected[:, 1] += 0.5
    torch.testing.assert_close(rewards.detach(), expected)
    assert means["score"] == 3.0 and means["score_cost"] == 5.0 == module.row["rollout/score_cost"]
    assert module.scorer.told == [means]


def test_validation_calls_no_hooks_and_changes_no_state(policy_folder: str) -> None:
    module = run(policy_folder)
    told, calls = len(module.scorer.told), module.scorer.calls
    module.on_validation_epoch_start()
    module.validation_step(step(bonus=[0.0] * 6), 0)
    assert (len(module.scorer.told), module.scorer.calls) == (told, calls)
    assert len(module.ended) == 1


def test_policy_loss_sees_the_whole_minibatch(policy_folder: str) -> None:
    whole, parted = run(policy_folder), run(policy_folder, 2)
    assert len(whole.seen) == 1 and len(parted.seen) == 3
    (view,) = [logprobs.minibatch for logprobs in whole.seen]
    torch.testing.assert_close(view.logprobs, view.old_logprobs, rtol=1e-4, atol=1e-5)
    for logprobs in parted.seen:
        found, rows = logprobs.minibatch, logprobs.minibatch.rows
        for name in ("old_logprobs", "entropy", "advantages", "scores", "group", "logprobs"):
            torch.testing.assert_close(getattr(found, name), getattr(view, name), rtol=1e-4, atol=1e-5)
        length = logprobs.completion_mask.shape[1]
        assert logprobs.rollout.scores.tolist() == found.scores[rows].tolist()
        assert torch.equal(logprobs.old_logprobs, found.old_logprobs[rows, :length])
        assert logprobs.rollout.feedback == tuple(
            f"row {int(score // 1)}" for score in logprobs.rollout.parts["cost"] / 2
        )
        assert logprobs.rollout.old_logprobs.shape == logprobs.logprobs.shape


class Holes:
    """Return samples whose third token was written by an environment."""

    def draw(self, batches: Any) -> Any:
        samples = super().draw(batches)  # type: ignore[misc]
        learned = tuple(torch.arange(len(ids)) != 2 for ids in samples.completions.ids)
        logprobs = tuple(
            torch.where(mask, values, 0.0) for mask, values in zip(learned, samples.completions.logprobs, strict=True)
        )
        return samples._replace(completions=samples.completions._replace(learned=learned, logprobs=logprobs))


@pytest.mark.parametrize("settings", [{}, {"reward_slot": "after_eos"}])
def test_masks_with_gaps_work_in_rewards_advantages_and_invariants(
    policy_folder: str, settings: dict[str, Any]
) -> None:
    made: dict[str, Any] = {**SETTINGS, "scorer": Careful(), "init_from": policy_folder}
    if settings:

        class WithCritic(Holes, PPOModule):  # type: ignore[misc]
            on_rollout_end = Keeps.on_rollout_end

        module: Any = WithCritic(missing_eos_score=None, **made, **settings)
    else:

        class Without(Holes, Keeps):  # type: ignore[misc]
            pass

        module = Without(kl_coef=0.0, **made)
    fit(module, [step(bonus=[0.0] * 6)])
    ((rollout, _),) = module.ended
    mask = rollout.completion_mask
    assert not mask[:, 2].any() and mask[:, 3].any()
    assert (rollout.old_logprobs[:, 2] == 0).all() and (rollout.behaviour_logprobs[:, 2] == 0).all()
    rewards = module.checked_rewards(rollout)
    advantages = module.advantages(rollout, rewards)
    assert (advantages.advantages[:, 2] == 0).all() and (rewards[:, 2] == 0).all()
    assert torch.equal(module.aggregation(mask).weights != 0, mask)
    module.invariants.check_lengths(rollout)


def test_select_episodes_selects_every_field(policy_folder: str) -> None:
    ((rollout, _),) = run(policy_folder).ended
    part = select_episodes(rollout, [1, 4], 2)
    assert part.texts == (rollout.texts[1], rollout.texts[4]) and part.row_ids == (7, 9)
    assert part.old_logprobs.shape == (2, 2) and part.columns["bonus"] == [1.0, 0.0]
    assert part.parts["cost"].tolist() == [2.0, 8.0]


def test_without_overrides_the_minibatch_is_not_gathered(policy_folder: str) -> None:
    class Plain(CriticFreeModule):
        def policy_loss(self, logprobs: PolicyLogprobs) -> Any:
            assert logprobs.minibatch is None and logprobs.rollout is not None
            return super().policy_loss(logprobs)

    fit(Plain(init_from=policy_folder, scorer=Careful(), kl_coef=0.0, **SETTINGS), [step(bonus=[0.0] * 6)])
