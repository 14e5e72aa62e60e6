"""Effects of losses and their settings: one stage of training on the world's pairs, or on a score that is known."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from arms import (  # in this folder
    GOLD,
    GOLD_REWARD,
    KL,
    Arguments,
    Config,
    Effect,
    Panel,
    end,
    final,
    from_start,
    held_out,
    held_out_rows,
    over_updates,
    sized,
    start_of,
    varied,
    world_file,
)

from rlhf_lightning.evaluation.report import write_markdown
from rlhf_lightning.evaluation.run_curves import FinishedRun
from rlhf_lightning.loading import read_records

FLIPPED = 0.3
BETA = 0.1
KL_COEF = 0.1


def pairs_config(arguments: Arguments, source: Path, rows: int) -> Config:
    """Return the config of a run on pairs."""
    return {
        "model": {"class_path": "DPOModule", "init_args": {
            "init_from": str(start_of(arguments)), "learning_rate": 5e-4, "lr_schedule": "cosine", "beta": BETA}},
        "data": {"class_path": "PreferenceDataModule", "init_args": {
            "source": str(source), "rows": sized(arguments, rows, 128), "batch_size": 32, "micro_batch_size": 16,
            "eval_source": held_out_rows(arguments, "pairs_test", 200)}},
        "trainer": {"max_epochs": 1, "val_check_interval": 0.25},
    }  # fmt: skip


def clean_pairs(arguments: Arguments, rows: int = 1600) -> Config:
    """Return the config on the world's own pairs."""
    return pairs_config(arguments, world_file(arguments, "pairs_train"), rows)


def flipped_pairs(arguments: Arguments) -> Config:
    """Return the config with randomly flipped training labels; validation pairs keep their labels."""
    target = Path(arguments.out) / "flipped.jsonl"
    lot, lines = random.Random(0), []
    for row in read_records(world_file(arguments, "pairs_train"))[:3200]:
        if lot.random() < FLIPPED:
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        lines.append(json.dumps(row))
    write_markdown(target, "\n".join(lines) + "\n")
    return pairs_config(arguments, target, 3200)


def rollouts(arguments: Arguments, class_path: str, count: int, **model: Any) -> Config:
    """Return the config of a policy gradient with 8 completions of each of 8 prompts in a rollout."""
    return {
        "model": {"class_path": class_path, "init_args": {
            "init_from": str(start_of(arguments)), "lr_schedule": "constant", "max_new_tokens": 64, **model}},
        "data": {"class_path": "PromptDataModule", "init_args": {
            "source": str(world_file(arguments, "prompts_train")), "batch_size": 64, "samples_per_prompt": 8,
            "rollouts": sized(arguments, count, 4)}},
        "trainer": {"max_epochs": 1},
    }  # fmt: skip


def binary(arguments: Arguments) -> Config:
    """Return the config of GRPO on answers with a binary score."""
    return rollouts(
        arguments, "GRPOModule", 30, learning_rate=5e-4, kl_coef=0.0, scorer="experiments.effects.scores.answered"
    )


def penalised(arguments: Arguments) -> Config:
    """Return the config of a policy gradient on the gold reward with a KL penalty, one update for each rollout."""
    return rollouts(
        arguments, "CriticFreeModule", 50, learning_rate=1e-3, kl_coef=KL_COEF, scorer=GOLD,
        aggregation="sequence_mean_token_sum",
    )  # fmt: skip


def by_tag(tag: str, name: str, scale: float = 1.0) -> tuple[Any, tuple[Panel, ...]]:
    """Return measures and plot of an effect on one metric, next to the gold reward."""

    def measures(arm: str, run: FinishedRun, arguments: Arguments) -> dict[str, float]:
        gold = held_out(run.folder / "model", arguments)[GOLD_REWARD]
        return {name: scale * final(run, tag), GOLD_REWARD: gold}

    return measures, (Panel("updates", name, over_updates(tag, scale)),)


EFFECTS = {
    "length_bias": Effect(
        "Length bias of the mean over sequences of means over tokens",
        "Dr. GRPO (Liu et al., arXiv 2503.20783): the mean over completions of means over tokens penalises a long "
        "wrong completion less per token than a short one, so wrong completions grow; a constant divisor does not "
        "do so.",
        "GRPO on answers that are right (subject and kind) or wrong; length plays no role in the score. 30 rollouts "
        "of 64 completions. The arms differ by `model.aggregation` alone.",
        lambda arguments: varied(
            binary(arguments),
            {name: {"aggregation": name} for name in ("constant", "token_mean", "sequence_mean_token_mean")},
        ),
        *by_tag("rollout/score_wrong_words", "words of wrong completions"),
    ),
    "chosen_logprob": Effect(
        "The log-probability of chosen completions under DPO",
        "Pang et al. (arXiv 2404.19733) and Rafailov et al. (2404.12358): under DPO the log-probability of the "
        "chosen completions themselves falls; a term of their likelihood (RPO) keeps it up. APO-zero "
        "(D'Oosterlinck et al., 2408.06266) raises it by its form.",
        f"1,600 pairs, beta {BETA}. The metric is the mean of log policy - log reference of held-out chosen "
        "completions.",
        lambda arguments: varied(
            clean_pairs(arguments),
            {"DPO": {}, "RPO": {"class_path": "RPOModule", "alpha": 1.0}, "APO-zero": {"class_path": "APOZeroModule"}},
        ),
        *by_tag("val/chosen_reward", "change of the chosen log-probability, nats", 1 / BETA),
    ),
    "label_noise": Effect(
        "Flipped labels and robust losses",
        "Robust DPO (Chowdhury et al., arXiv 2403.00409): with a known flip rate an unbiased estimate of the "
        "clean loss learns from noisy labels what DPO does not; conservative DPO only softens the labels.",
        f"3,200 pairs; {FLIPPED:.0%} of them have flipped labels, on top of the world's own noise; both robust losses "
        "know the rate. Accuracy is on held-out pairs without flips.",
        lambda arguments: varied(
            flipped_pairs(arguments),
            {"DPO": {}, "conservative DPO": {"class_path": "ConservativeDPOModule", "label_smoothing": FLIPPED},
             "robust DPO": {"class_path": "RobustDPOModule", "flip_rate": FLIPPED}},
        ),
        *by_tag("val/reward_accuracy", "accuracy of the implicit reward"),
    ),
    "beta": Effect(
        "Beta of DPO",
        "Rafailov et al. (arXiv 2305.18290): beta is the coefficient of the KL penalty in the objective whose optimum "
        "DPO learns, so a smaller beta allows a larger KL. The best beta lies between too little change and "
        "over-optimisation.",
        "3,200 pairs, one epoch; the arms differ by beta alone. The plot joins the SFT policy to the trained policy.",
        lambda arguments: varied(
            clean_pairs(arguments, 3200), {f"beta {beta}": {"beta": beta} for beta in (0.5, 0.1, 2.0)}
        ),
        end,
        (Panel(KL, GOLD_REWARD, from_start),),
    ),
    "kl_place": Effect(
        "The place of the KL penalty",
        "Liu et al. (arXiv 2510.01555): with d = log policy - log reference, d in the reward (k1, as in PPO) and "
        "d^2 / 2 in the loss (k2) have the same expected gradient, that of the reverse KL, if every update is "
        "on-policy; exp(-d) - 1 + d in the loss (k3, as in GRPO) is a biased first-order approximation of it.",
        f"REINFORCE on the gold reward with a group baseline, KL coefficient {KL_COEF}, and one update for each of 50 "
        "rollouts of 64 completions. The arms differ by `model.kl_place` and `model.kl_estimator` alone.",
        lambda arguments: varied(
            penalised(arguments),
            {"k1 in the reward": {}, **{f"{name} in the loss": {"kl_place": "loss", "kl_estimator": name}
                                        for name in ("k2", "k3")}},
        ),
        end,
        (Panel("updates", "KL on training prompts, nats", over_updates("rollout/kl")),
         Panel("updates", "gold reward on training prompts", over_updates("rollout/score"))),
    ),
}  # fmt: skip
