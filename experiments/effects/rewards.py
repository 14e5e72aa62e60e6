"""Effects of learned rewards: reward models are trained first, then the policies that maximise them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from arms import (  # in this folder
    GOLD,
    GOLD_REWARD,
    KL,
    SAMPLING,
    Arguments,
    Config,
    Curve,
    Effect,
    Panel,
    against,
    end,
    final,
    from_start,
    held_out,
    held_out_prompts,
    held_out_rows,
    needed,
    over_updates,
    recipe,
    sized,
    start_of,
    varied,
    world_file,
)

from rlhf_lightning.atomic_files import write_lines
from rlhf_lightning.evaluation.completions import grouped
from rlhf_lightning.evaluation.differences import mean_interval
from rlhf_lightning.evaluation.overoptimization import best_of_n_by, policy_points
from rlhf_lightning.evaluation.policies import sample_and_score
from rlhf_lightning.evaluation.report import interval, write_json
from rlhf_lightning.evaluation.run_curves import FinishedRun
from rlhf_lightning.loading import read_record, read_records
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.scoring import LearnedScorer
from rlhf_lightning.scoring.scorer import ask_scorer
from rlhf_lightning.tokenization import load_tokenizer
from rlhf_lightning.worlds.assistant import gold_of_conversation, make_config, make_tokenizer

PAIRS, FEW, FRESH = 20_000, 8_000, 8_000
"""Pairs of most reward models, of those with little data, and the pairs after the first `PAIRS` that they label."""
MANY, LITTLE, SMALL = f"{PAIRS:,} pairs", f"{FEW:,} pairs", f"{PAIRS:,} pairs, small model"
"""The kinds of reward models."""
SAMPLES = 64
ROLLOUTS = 16
MEMBERS = 3
AT_KL = 2.0
PROXY, VAL_GOLD = "val/score_proxy", "val/score_gold"


# -- reward models ----------------------------------------------------------------------------------------------------


def small_start(arguments: Arguments) -> Path:
    """Return an SFT policy with 32 instead of 96 hidden units, trained as the quickstart's; trained on first use."""
    folder = Path(arguments.out) / "small_model"
    if not folder.is_dir():
        make_tokenizer().save_pretrained(folder)
        make_config(hidden_size=32, intermediate_size=64).save_pretrained(folder)
    rows = sized(arguments, 10_000, 64)
    data = {"source": [{"path": str(world_file(arguments, "demonstrations")), "rows": rows}], "eval_rows": 16}
    run = needed(Path(arguments.out) / "small_start", recipe("sft", {"init_from": str(folder)}, data), 0)
    return run.folder / "model"


def reward_model(kind: str, seed: int, arguments: Arguments) -> FinishedRun:
    """Return the run of a reward model, trained on first use."""
    start = small_start(arguments) if kind == SMALL else start_of(arguments)
    data = {
        "source": str(world_file(arguments, "pairs_train")),
        "rows": sized(arguments, FEW if kind == LITTLE else PAIRS, 128),
        "eval_source": held_out_rows(arguments, "pairs_test", 1000),
    }
    folder = Path(arguments.out) / "reward_models" / kind.replace(" ", "_").replace(",", "")
    return needed(folder, recipe("reward", {"init_from": str(start)}, data), seed)


def scored_by(scorer: Any, critic: FinishedRun) -> dict[str, str]:
    """Return the settings of PPO on a scorer: the gold reward is logged, and the critic starts from a reward model."""
    parts = {"scorers": {"proxy": scorer, "gold": GOLD}, "weights": {"gold": 0.0}}
    spec = {"class_path": "WeightedSum", "init_args": parts}
    return {"model.scorer": json.dumps(spec), "model.critic_init": str(critic.folder / "model")}


def proxy(kind: str, seed: int, arguments: Arguments) -> dict[str, str]:
    """Return the settings of PPO on one reward model."""
    reward = reward_model(kind, seed, arguments)
    return scored_by(str(reward.folder / "model"), reward)


def free_ppo(arguments: Arguments) -> Config:
    """Return the config of PPO without KL penalty, validated on held-out prompts 8 times."""
    count = sized(arguments, ROLLOUTS, 4)
    model = {"init_from": str(start_of(arguments)), "scorer": GOLD, "kl_coef": 0.0, "kl_target": None}
    data = {
        "source": str(world_file(arguments, "prompts_train")), "rollouts": count,
        "batch_size": sized(arguments, 128, 16), "eval_source": held_out_rows(arguments, "prompts_test", 100),
    }  # fmt: skip
    trainer = {"max_epochs": 1, "val_check_interval": max(count // 8, 1)}
    return recipe("ppo", {**model, "early_stop_kl": None}, data, trainer=trainer)


def root_kl(run: FinishedRun, arguments: Arguments) -> Curve:
    """Return the gold reward of held-out prompts over the square root of the KL, from the SFT policy on."""
    places, kl = run.scalars["val/kl"]
    start = held_out(start_of(arguments), arguments)[GOLD_REWARD]
    gold = run.scalars[VAL_GOLD][1]
    return Curve(np.r_[0, places], np.sqrt(np.r_[0, kl.clip(0)]), np.r_[start, gold])


# -- over-optimisation ------------------------------------------------------------------------------------------------


def best_of_n(model: Path, arguments: Arguments) -> dict[str, Any]:
    """Return the gold reward of best-of-n of the SFT policy by a reward model, with its fit; kept next to the model."""
    kept, samples = model.with_name("best_of_n.json"), sized(arguments, SAMPLES, 4)
    if not kept.is_file():
        rows = sft_samples(samples, arguments)
        texts = [row["prompt"] for row in rows], [row["completion"] for row in rows]
        scores = ask_scorer(LearnedScorer(str(model)), *texts, {}, str(model)).scores.tolist()
        write_json(kept, best_of_n_by(scores, grouped(rows, samples)))
    return read_record(kept)


def sft_samples(samples: int, arguments: Arguments) -> list[dict[str, Any]]:
    """Return completions of the SFT policy for the held-out prompts, with gold rewards; sampled on first use."""
    kept = Path(arguments.out) / f"samples_{samples}.jsonl"
    if not kept.is_file():
        policy, tokenizer = (load(str(start_of(arguments))) for load in (load_policy, load_tokenizer))
        prompts = held_out_prompts(arguments)
        found = sample_and_score(
            policy.eval(), tokenizer, prompts, SAMPLING, 1, samples, gold_reward=gold_of_conversation
        )
        assert found.gold is not None
        drawn = zip(found.prompts, found.completions, found.gold.tolist(), strict=True)
        write_lines(kept, ({"prompt": prompt, "completion": said, "gold": gold} for prompt, said, gold in drawn))
    return read_records(kept)


def best_of_n_curve(run: FinishedRun, arguments: Arguments) -> Curve:
    """Return the gold reward of best-of-n by the run's reward model over the square root of the KL."""
    points = best_of_n(Path(run.settings["model.critic_init"]), arguments)["points"]
    n, kl = (np.array([point[name] for point in points], dtype=float) for name in ("n", "kl"))
    return Curve(n, np.sqrt(kl), np.array([point["gold"]["mean"] for point in points]))


def overoptimization(arm: str, run: FinishedRun, arguments: Arguments) -> dict[str, float]:
    """Return the measures of best-of-n and of PPO by one reward model, with the fits of Gao et al."""
    reward = reward_model(arm, run.seed, arguments)
    best, curve = best_of_n(reward.folder / "model", arguments), root_kl(run, arguments)
    fit = policy_points((curve.x**2).tolist(), curve.y.tolist()) or {"alpha": math.nan, "beta": math.nan}
    proxy = run.scalars[PROXY][1]
    return {
        "accuracy": final(reward, "val/accuracy"),
        f"gold, best of {SAMPLES}": best["points"][-1]["gold"]["mean"],
        "alpha, best of n": best["alpha"], "beta, best of n": best["beta"],
        "highest gold, PPO": float(curve.y.max()), "last gold, PPO": float(curve.y[-1]),
        "alpha, PPO": fit["alpha"], "beta, PPO": fit["beta"],
        "rise of the proxy score, PPO": float(proxy[-1] - proxy[0]),
    }  # fmt: skip


# -- ensembles --------------------------------------------------------------------------------------------------------

ENSEMBLES: dict[str, float | None] = {"one reward model": None, "mean of three": 0.0, "mean - deviation of three": 1.0}
"""Standard deviations that are subtracted from the mean of the members' scores; None for a single reward model."""


def ensemble(arm: str, seed: int, arguments: Arguments) -> dict[str, str]:
    """Return the settings of PPO on one reward model, or on an ensemble of it and the next two seeds."""
    members = [reward_model(LITTLE, (seed + place) % arguments.seeds, arguments) for place in range(MEMBERS)]
    folders, penalty = [str(one.folder / "model") for one in members], ENSEMBLES[arm]
    spec = {"class_path": "Ensemble", "init_args": {"scorers": folders, "penalty": penalty}}
    return scored_by(folders[0] if penalty is None else spec, members[0])


def hacked(arm: str, run: FinishedRun, arguments: Arguments) -> dict[str, float]:
    """Return the highest gold reward of a run, the last, and the last KL."""
    curve = root_kl(run, arguments)
    return {"highest gold": float(curve.y.max()), **end(arm, run, arguments)}


# -- DPO and PPO ------------------------------------------------------------------------------------------------------


def frontier(arguments: Arguments) -> dict[str, Config]:
    """Return DPO and PPO with the quickstart's settings, exported on the way; both learn from the same pairs."""
    rows = sized(arguments, PAIRS, 128)
    model = {"init_from": str(start_of(arguments))}
    pairs = {"source": str(world_file(arguments, "pairs_train")), "rows": rows,
             "eval_source": held_out_rows(arguments, "pairs_test", 200)}  # fmt: skip
    prompts = {"source": str(world_file(arguments, "prompts_train")), "rollouts": sized(arguments, 30, 2),
               "batch_size": sized(arguments, 128, 16), "eval_source": None}  # fmt: skip
    ppo = recipe("ppo", {**model, "scorer": GOLD}, prompts, export={"every_n_updates": sized(arguments, 40, 4)})
    return {
        "DPO": recipe("dpo", model, pairs, export={"every_n_updates": max(rows // 32 // 6, 1)}),
        "PPO": ppo, "PPO on the gold reward": ppo,
    }  # fmt: skip


def reward_of(arm: str, seed: int, arguments: Arguments) -> dict[str, str]:
    """Return the reward model of PPO."""
    return {"model.scorer": str(reward_model(MANY, seed, arguments).folder / "model")} if arm == "PPO" else {}


def on_frontier(arm: str, run: FinishedRun, arguments: Arguments) -> dict[str, float]:
    """Return the gold reward at a KL of `AT_KL` nats on the way, NaN if the run stays below, and the last values."""
    curve = from_start(run, arguments)
    kl = np.maximum.accumulate(curve.x)
    passed = float(np.interp(AT_KL, kl, curve.y)) if kl[-1] >= AT_KL else math.nan
    return {f"gold at {AT_KL:g} nats": passed, "highest gold": float(curve.y.max()), **end(arm, run, arguments)}


# -- weak to strong ---------------------------------------------------------------------------------------------------

CEILING, WEAK, FLOOR = "strong policy, true labels", "strong policy, weak labels", "weak policy, true labels"


def fresh_pairs(arguments: Arguments) -> list[dict[str, Any]]:
    """Return the pairs that no reward model was trained on."""
    first = sized(arguments, PAIRS, 128)
    return read_records(world_file(arguments, "pairs_train"))[first : first + sized(arguments, FRESH, 128)]


def labelled(arm: str, seed: int, arguments: Arguments) -> dict[str, str]:
    """Return the start and the pairs of a policy; the small reward model of the same seed gives the weak labels."""
    rows, path = fresh_pairs(arguments), Path(arguments.out) / "true_labels.jsonl"
    if arm == WEAK:
        path = path.with_name(f"weak_labels_{seed}.jsonl")
        folder = str(reward_model(SMALL, seed, arguments).folder / "model")
        rows = rows if path.is_file() else relabelled(rows, LearnedScorer(folder))
    if not path.is_file():
        write_lines(path, rows)
    start = small_start(arguments) if arm == FLOOR else start_of(arguments)
    return {"data.source": str(path), "model.init_from": str(start)}


def relabelled(rows: list[dict[str, Any]], scorer: Any) -> list[dict[str, Any]]:
    """Return pairs in which the completion with the higher score is the chosen one."""
    sides = ("chosen", "rejected")
    asked = [row["prompt"] for row in rows]
    chosen, rejected = (
        ask_scorer(scorer, asked, [row[side][-1]["content"] for row in rows], {}, "weak reward model").scores
        for side in sides
    )
    return [
        {**row, **dict(zip(sides, (row[side] for side in (sides if gap >= 0 else sides[::-1])), strict=True))}
        for row, gap in zip(rows, (chosen - rejected).tolist(), strict=True)
    ]


def students(arguments: Arguments) -> dict[str, Config]:
    """Return DPO with the quickstart's settings for every arm; start and pairs come from `labelled`."""
    rows = sized(arguments, FRESH, 128)
    data = {"source": "by seed", "rows": rows, "eval_source": held_out_rows(arguments, "pairs_test", 1000)}
    shared = recipe(
        "dpo", {"init_from": "by seed"}, data, trainer={"max_epochs": 1, "val_check_interval": max(rows // 32 // 4, 1)}
    )
    return varied(shared, {arm: {} for arm in (CEILING, WEAK, FLOOR)})


def taught(arm: str, run: FinishedRun, arguments: Arguments) -> dict[str, float]:
    """Return gold reward and accuracy of a policy."""
    gold = end(arm, run, arguments)[GOLD_REWARD]
    return {GOLD_REWARD: gold, "accuracy of the implicit reward": final(run, "val/reward_accuracy")}


def gap_recovered(values: dict[str, dict[str, dict[int, float]]]) -> str:
    """Return a sentence about the performance gap recovered, of each measure, with its interval over seeds."""
    told = []
    for measure, arms in values.items():
        seeds = sorted(set.intersection(*(set(found) for found in arms.values())))
        floor, weak, ceiling = (np.array([arms[arm][seed] for seed in seeds]) for arm in (FLOOR, WEAK, CEILING))
        if (ceiling <= floor).any():
            told.append(f"undefined by {measure}, since a seed has no gap")
            continue
        mean, low, high = mean_interval(((weak - floor) / (ceiling - floor)).tolist())
        told.append(f"{mean:.2f} {interval([low, high], 2)} by {measure}")
    return f"Performance gap recovered, (weak labels - weak policy) / (true labels - weak policy): {', '.join(told)}."


EFFECTS = {
    "overoptimization": Effect(
        "Over-optimisation against reward-model size and data",
        "Gao et al. (arXiv 2210.10760): with d the square root of the KL, the gold reward gains d (alpha - beta d) "
        "under best-of-n and d (alpha - beta log d) under reinforcement learning, while the proxy score keeps rising. "
        "Larger reward models, and reward models with more data, are over-optimised later.",
        f"Best-of-n of the SFT policy, n up to {SAMPLES}, and PPO without KL penalty, {ROLLOUTS} rollouts of 128, each "
        f"by one reward model for each seed: of the policy's size (0.26 M parameters) on {PAIRS:,} or {FEW:,} pairs, "
        f"or with 32 instead of 96 hidden units on {PAIRS:,} pairs. The fits are per seed.",
        lambda arguments: varied(free_ppo(arguments), {kind: {} for kind in (MANY, LITTLE, SMALL)}),
        overoptimization,
        (Panel("square root of the KL, best of n", GOLD_REWARD, best_of_n_curve),
         Panel("square root of the KL, PPO", GOLD_REWARD, root_kl),
         Panel("KL of PPO, nats", "proxy score", against("val/kl", PROXY))),
        proxy,
    ),
    "frontier": Effect(
        "DPO against PPO on the reward-KL frontier",
        "Rafailov et al. (arXiv 2305.18290, Fig. 2): at equal KL, DPO reaches a higher reward than PPO, even than PPO "
        "on the gold reward. Xu et al. (2404.10719): well-tuned PPO surpasses DPO.",
        f"DPO on {PAIRS:,} pairs, PPO on a reward model of the same pairs, and PPO on the gold reward, with the "
        "quickstart's settings (DPO: beta 0.5; PPO: 30 rollouts of 128, KL target 6). Points are checkpoints of a "
        "run. A run that stays below 2 nats has no gold reward there.",
        frontier,
        on_frontier,
        (Panel(KL, GOLD_REWARD, from_start),),
        reward_of,
    ),
    "ensembles": Effect(
        "Ensembles of reward models against hacking",
        "Coste et al. (arXiv 2310.02743): PPO on the mean of an ensemble is over-optimised less than PPO on one of "
        "its members, and on a score that subtracts their disagreement still less. Eisenstein et al. (2312.09244): "
        "ensembles mitigate hacking and do not end it, because the members share errors.",
        f"PPO without KL penalty, {ROLLOUTS} rollouts of 128, on reward models of {FEW:,} pairs that differ by seed. "
        "Seed s uses the reward models s, s + 1 and s + 2 modulo 5; so the seeds of an ensemble share members.",
        lambda arguments: varied(free_ppo(arguments), {arm: {} for arm in ENSEMBLES}),
        hacked,
        (Panel("square root of the KL", GOLD_REWARD, root_kl), Panel("updates", "KL, nats", over_updates("val/kl"))),
        ensemble,
    ),
    "weak_to_strong": Effect(
        "Weak-to-strong: a weak reward model's labels, a stronger policy",
        "Burns et al. (arXiv 2312.09390): a strong model trained on a weak model's labels does better than the weak "
        "model, and recovers a part of the gap to the strong model trained on true labels.",
        f"DPO on {FRESH:,} pairs, beta 0.5. The weak labels are those of a reward model with 32 hidden units that was "
        f"trained on {PAIRS:,} other pairs. The strong policy has 96 hidden units, the weak policy 32; each starts "
        "from SFT of its own size. Accuracy is on held-out pairs with true labels.",
        students,
        taught,
        (Panel("updates", "accuracy of the implicit reward", over_updates("val/reward_accuracy")),),
        labelled,
        gap_recovered,
    ),
}  # fmt: skip
