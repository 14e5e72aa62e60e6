"""Train on multi-turn episodes: the rollout, credit assignment, and failing environments."""

from typing import Any

import pytest
import torch
from conftest import refused
from faulty_environment import Faulty, Talks
from many_ends import ManyEnds
from tiny_models import (
    VOCABULARY,
    MetricsLog,
    fit,
    prompt_step,
    quiet_trainer,
    random_rows,
    save_policy,
    tiny_tokenizer,
    within,
)
from torch import Tensor

from rlhf_lightning.data import PromptDataModule
from rlhf_lightning.environments import FaultTolerantEnvironment, conversing
from rlhf_lightning.functional.policy_gradient import (
    generalized_advantages,
    last_turn_lengths,
    turn_discounts,
    turn_returns,
)
from rlhf_lightning.modules import CriticFreeModule, GRPOModule, PPOModule
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.types import Episode, Judgement, MultiTurn, Reply, Rollout, Step

PROMPTS = [prompt for prompt, _ in random_rows(3, seed=81) for _ in range(2)]
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 5, "learning_rate": 1e-3, "lr_schedule": "constant", "scorer": "ZeroScorer", "kl_coef": 0.0,
}  # fmt: skip


def step(environment: Any = None, **limits: Any) -> Step[Any]:
    (batch,) = prompt_step(PROMPTS).micro_batches
    rules = MultiTurn(environment or Talks(), **{"max_turns": 3, **limits})
    return Step((batch._replace(group=torch.arange(6) // 2, multi_turn=rules),), 6, 0)


def run(kind: Any, folder: str, environment: Any = None, micro: int | None = None, **settings: Any) -> Any:
    class Keeps(kind):  # type: ignore[misc, valid-type]
        def on_rollout_end(self, rollout: Rollout, means: Any) -> None:
            self.__dict__.setdefault("ended", []).append((rollout, dict(means)))

        def shape_rewards(self, rollout: Rollout) -> Tensor:
            self.__dict__["shaped"] = super().shape_rewards(rollout)
            return self.shaped

    log = MetricsLog()
    module = Keeps(init_from=folder, engine=ManyEnds(), **{**SETTINGS, **settings})
    fit(module, within([step(environment)], micro), callbacks=[log])
    module.__dict__["row"] = log.rows[0]
    return module


@pytest.mark.parametrize("kind", [PPOModule, GRPOModule])
def test_an_episode_is_one_row_with_masked_replies_and_turn_rewards(policy_folder: str, kind: Any) -> None:
    module = run(kind, policy_folder, **({"missing_eos_score": None} if kind is PPOModule else {}))
    ((rollout, means),) = module.ended
    mask, expected = rollout.completion_mask, torch.zeros(rollout.completion_mask.shape)
    turns = []
    for row, ids in enumerate(rollout.sequences.completions):
        learned = rollout.sequences.supervised[row]
        ends = [t for t in range(len(ids)) if learned[t] and (t + 1 == len(ids) or not learned[t + 1])]
        expected[row, ends] = ids[ends] / 10
        turns.append(len(ends))
        for end in ends[:-1]:  # the reply is read as it was written, and encoded by itself
            assert ids[end + 1 : end + 3].tolist() == [int(ids[end]), 7]
    torch.testing.assert_close(module.shaped.detach(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.scores, expected.sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.parts["environment"], rollout.scores)
    assert rollout.turns.tolist() == turns and max(turns) == 3 and min(turns) == 1
    assert means["turns"] == pytest.approx(sum(turns) / 6) == module.row["rollout/turns"]
    assert means["score"] == pytest.approx(float(rollout.scores.mean()))
    assert means["completion_length"] == float(mask.sum()) / 6
    if kind is PPOModule:
        assert rollout.values is not None and bool((rollout.values[~mask] == 0).all())


def test_micro_batches_do_not_change_the_update(policy_folder: str) -> None:
    whole, parted = (run(GRPOModule, policy_folder, micro=micro) for micro in (None, 2))
    assert whole.row["train/grad_norm"] == pytest.approx(parted.row["train/grad_norm"], rel=1e-4)
    assert whole.row["rollout/score"] == parted.row["rollout/score"]


# -- credit -----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 1], [1, 0, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)


def test_turn_discounts_apply_at_the_ends_of_turns() -> None:
    found = turn_discounts(MASK, 0.5, 0.9)
    assert found[0].tolist() == pytest.approx([0.9, 0.45, 0.9, 0.9, 0.45, 0.9, 0.9, 0.45])


def test_gae_discounts_between_turns_and_skips_replies() -> None:
    rewards = torch.tensor([[0.0, 1.0, 9.0, 9.0, 2.0, 9.0, 0.0, 4.0]])
    values = torch.tensor([[0.5, 0.25, 7.0, 7.0, 1.0, 7.0, 2.0, 3.0]])
    discounts = turn_discounts(MASK[:1], 0.5)
    _, returns = generalized_advantages(rewards, values, MASK[:1], discounts, lam=1.0)
    assert returns[0].tolist() == pytest.approx([3.0, 3.0, 0.0, 0.0, 4.0, 0.0, 4.0, 4.0])
    advantages, _ = generalized_advantages(rewards, values, MASK[:1], discounts, lam=0.0)
    assert advantages[0].tolist() == pytest.approx([-0.25, 1.25, 0.0, 0.0, 2.0, 0.0, 1.0, 1.0])


def test_turn_returns_are_rewards_to_go_of_whole_turns() -> None:
    rewards = torch.tensor([[0.5, 0.5, 9.0, 9.0, 2.0, 9.0, 0.0, 4.0], [1.0, 9.0, 3.0, 0, 0, 0, 0, 0]])
    returns, turn = turn_returns(rewards, MASK, 0.5)
    torch.testing.assert_close(returns, torch.tensor([[3.0, 4.0, 4.0], [2.5, 3.0, torch.nan]]), equal_nan=True)
    assert turn[0, MASK[0]].tolist() == [0, 0, 1, 2, 2] and turn[1, MASK[1]].tolist() == [0, 1]


@pytest.mark.parametrize("parts", [None, {"normalize": "batch"}])
def test_only_the_last_turn_can_be_overlong(policy_folder: str, parts: Any) -> None:
    module = run(GRPOModule, policy_folder, overlong_buffer=4, parts=parts)
    ((rollout, _),) = module.ended
    turns = [int(last) for last in last_turn_lengths(rollout.completion_mask)]
    expected = rollout.parts["environment"] + torch.tensor([min(max((1 - last) / 4, -1), 0) for last in turns])
    torch.testing.assert_close(rollout.scores, expected)
    assert rollout.turns.max() > 1 and len(set(turns)) > 1


def test_turn_credit_compares_equal_turn_numbers_within_a_group(policy_folder: str) -> None:
    module = run(CriticFreeModule, policy_folder, credit="turn", gamma=0.5)
    ((rollout, _),) = module.ended
    returns, turn = turn_returns(module.shaped.detach(), rollout.completion_mask, 0.5)
    found = module.advantages(rollout, module.shaped.detach()).advantages
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)):
        for t in rollout.completion_mask[row].nonzero().flatten().tolist():
            pair = torch.stack([returns[row, turn[row, t]], returns[other, turn[row, t]]])
            expected = pair[0] - pair.nanmean()
            assert float(found[row, t]) == pytest.approx(float(expected), abs=1e-5)
    assert bool((found[~rollout.completion_mask] == 0).all()) and bool(found.any())


def test_turn_credit_with_a_greedy_baseline_is_refused(policy_folder: str) -> None:
    with refused("greedy-turns", "credit is turn"):
        CriticFreeModule(init_from=policy_folder, scorer="ZeroScorer", credit="turn", baseline="greedy")


class EveryToken(SlotEngine):
    """Slots in which every token ends a turn."""

    def sample(self, model: Any, prompts: Any, episodes: Any, settings: Any, seed: int, ends: Any, *args: Any,
               **further: Any) -> Any:  # fmt: skip
        return super().sample(model, prompts, episodes, settings, seed, tuple(range(VOCABULARY)), *args, **further)


class Even:
    """A game of six turns, each won by a token with an even id; pays each turn, or all of them at the end."""

    def __init__(self, when: str) -> None:
        self.when = when

    def reset(self, row: Any) -> Any:
        return row["prompt"]

    def reply(self, episode: Episode) -> Reply:
        won = [float(index % 2 == 0) for index, mask in zip(episode.ids, episode.learned, strict=True) if mask]
        return Reply(ids=[30 + episode.turn], reward=won[-1] if self.when == "turn" else sum(won) * episode.last)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_turn_rewards_learn_faster_than_a_final_reward(tmp_path: Any, seed: int) -> None:
    folder, earned = save_policy(tmp_path / "policy", seed=seed), {}
    for when, credit, gamma in (("turn", "turn", 0.0), ("final", "completion", 1.0)):
        scores: list[float] = []

        class Keeps(CriticFreeModule):
            def on_rollout_end(self, rollout: Rollout, means: Any, scores: list[float] = scores) -> None:
                scores.append(means["score"])

        settings = {**SETTINGS, "learning_rate": 3e-3, "max_new_tokens": 1}
        module = Keeps(init_from=folder, engine=EveryToken(), credit=credit, gamma=gamma, seed=seed, **settings)
        steps = []
        for number in range(14):
            (batch,) = prompt_step([[10, 11]] * 24, first_episode=24 * number).micro_batches
            rules, group = MultiTurn(Even(when), max_turns=6), torch.zeros(24, dtype=torch.long)
            steps.append(Step((batch._replace(group=group, multi_turn=rules),), 24, 0))
        fit(module, steps)
        earned[when] = scores
    assert earned["turn"][0] == earned["final"][0] < 3.5  # by chance half of the turns are won
    assert sum(earned["turn"][-3:]) / 3 > 5 and sum(earned["turn"][-3:]) > sum(earned["final"][-3:])


# -- faults -----------------------------------------------------------------------------------------------------------


def test_an_environment_exception_stops_the_run_unchanged(policy_folder: str) -> None:
    with pytest.raises(OSError, match="the simulator is away"):
        run(GRPOModule, policy_folder, Faulty())


def test_faults_stop_the_run_or_drop_their_episodes(policy_folder: str) -> None:
    with refused("no-reply", "Faulty", "turn 0", "OSError: the simulator is away"):
        run(GRPOModule, policy_folder, FaultTolerantEnvironment(Faulty()))
    module = run(GRPOModule, policy_folder, FaultTolerantEnvironment(Faulty(), on_fault="drop", threads=3))
    ((rollout, means),) = module.ended
    assert rollout.scores.isnan().tolist() == [False, True] * 3 and means["score_missing"] == 0.5
    assert means["environment_failed"] == 0.5 == module.row["rollout/environment_failed"]
    assert float(module.row["train/grad_norm"]) == 0.0  # one scored sample per prompt has no baseline


def test_a_part_named_like_the_environments_reward_is_refused(policy_folder: str) -> None:
    def scorer(prompts: Any, completions: Any, **columns: Any) -> list[Judgement]:
        return [Judgement(0.0, {"environment": 1.0}) for _ in completions]

    with refused("reserved-part", "'environment'"):
        run(GRPOModule, policy_folder, scorer=scorer)


@pytest.mark.parametrize(
    "kind, discounts", [(PPOModule, {"turn_gamma": 0.9}), (GRPOModule, {"credit": "turn", "gamma": 0.9})]
)
@pytest.mark.parametrize(
    "rescaled", [{"parts": {"weights": {"environment": 2.0}}}, {"constraints": {"environment": 0.5}}]
)
def test_rescaled_scores_and_discounted_turn_rewards_exclude_each_other(
    policy_folder: str, kind: Any, discounts: dict[str, Any], rescaled: dict[str, Any]
) -> None:
    with refused("discounted-token-rewards"):
        run(kind, policy_folder, **discounts, **rescaled)
    run(kind, policy_folder, **discounts, parts={"weights": {"environment": 1.0}})
    run(kind, policy_folder, **dict.fromkeys(discounts.keys() - {"credit"}, 1.0), **rescaled)


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_reply_processes_are_killed_at_their_time_limit(how: str) -> None:
    spec = {"class_path": "faulty_environment.Faulty", "init_args": {"how": how}}
    tolerant = FaultTolerantEnvironment(spec, on_fault="drop", seconds=1.5, workers=2)
    episodes = [Episode({}, [], [11], [True], number) for number in range(3)]
    try:
        assert [reply is None for reply in tolerant.reply_all(episodes)] == [False, True, False]
    finally:
        tolerant.close()


def test_too_many_consecutive_faults_stop_the_run() -> None:
    tolerant = FaultTolerantEnvironment(Faulty(), on_fault="drop", most_in_a_row=2)
    with refused("environment-keeps-failing", "2 times in a row"):
        tolerant.reply_all([Episode({}, [], [11], [True], number) for number in (1, 3)])


def test_failed_replies_are_retried() -> None:
    class Later(Talks):
        calls = 0

        def reply(self, episode: Episode) -> Reply:
            self.calls += 1
            if self.calls == 1:
                raise OSError("away")
            return super().reply(episode)

    tolerant = FaultTolerantEnvironment(Later(), retries=1, wait=0.0)
    assert tolerant.reply(Episode({}, [], [11], [True], 0)) == Reply("w11 w7", reward=1.1)


def test_a_changed_environment_resumes_without_cached_prompts(tmp_path: Any) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w10"}\n')

    def data(environment: Any) -> Any:
        made = PromptDataModule(str(tmp_path / "rows.jsonl"), environment=environment, batch_size=1)
        made.tokenizer = tiny_tokenizer()
        made.setup("validate")
        return made

    class Opens(Talks):
        word = "w50"

        def __init__(self) -> None:
            self.opening = self.word

        def reset(self, row: Any) -> Any:
            return f"{self.opening} {row['prompt']}"

    before = data(Opens())
    Opens.word = "w60"
    after = data(Opens())
    assert before.fingerprint == after.fingerprint
    assert [made.store.record(0)["prompt"] for made in (before, after)] == ["w50 w10", "w60 w10"]


def test_episodes_sampled_ahead_keep_their_turns(policy_folder: str, tmp_path: Any) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "w{10 + number}"}}\n' for number in range(4)))
    seen: list[Rollout] = []

    class Keeps(GRPOModule):
        def on_rollout_end(self, rollout: Rollout, means: Any) -> None:
            seen.append(rollout)

    module = Keeps(
        init_from=policy_folder,
        engine=ManyEnds(),
        lag=1,
        sampler_correction="token_truncate",
        **{**SETTINGS, "seed": 0},
    )
    data = PromptDataModule(
        str(tmp_path / "rows.jsonl"), environment=Talks(), max_turns=3, batch_size=8, samples_per_prompt=4, rollouts=3
    )
    quiet_trainer(limit_val_batches=0).fit(module, data)
    assert len(seen) == 3 and all(rollout.turns is not None for rollout in seen)
    for rollout in seen:
        assert any(not bool(mask.all()) for mask in rollout.sequences.supervised)
        holes = ~rollout.completion_mask
        assert rollout.behaviour_logprobs is not None and not rollout.behaviour_logprobs[holes].any()


def test_limits_and_names_are_checked() -> None:
    with refused("setting-out-of-range", "max_turns is 0"):
        conversing(Talks(), 0)
    with refused("unknown-name", "GuessTheNumber"):
        conversing("GuesTheNumber")
    with refused("wrong-kind"):
        conversing({"class_path": "collections.OrderedDict"})
