"""Functions that tests run on ranks. Each is called on all ranks of a group, or alone, with the same arguments."""

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from faulty_environment import Talks
from lightning.pytorch.strategies import ModelParallelStrategy
from many_ends import ManyEnds
from tiny_models import (
    EOS,
    FIRST_WORD,
    StepData,
    demonstration_step,
    doubled,
    pair_sequences,
    preference_step,
    prompt_step,
    quiet_trainer,
    random_pairs,
    random_rows,
    ranked_pairs,
    ranked_step,
    sequences,
    within,
)
from torch import Tensor

from rlhf_lightning import modules
from rlhf_lightning.data.loader import StepLoader
from rlhf_lightning.errors import failure_sentence
from rlhf_lightning.functional.logprobs import chunked_logprobs
from rlhf_lightning.models import compiling
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.models.sharding import whole
from rlhf_lightning.runs import RankWatch
from rlhf_lightning.sampling.conversation import Turns
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.hand_over import FolderHandOver
from rlhf_lightning.sampling.own_logprobs import scored
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import (
    DemonstrationBatch,
    Judgement,
    Loss,
    MultiTurn,
    PolicyLogprobs,
    PreferenceBatch,
    PreferenceLogprobs,
    ProcessBatch,
    PromptBatch,
    RankedBatch,
    Step,
    UnpairedBatch,
)

ROWS = 7
"""Rows of an optimizer step; 2 or 4 ranks get unequal numbers of rows."""


def here() -> tuple[int, int]:
    """Return this rank and the world size."""
    distributed = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)


# -- data -------------------------------------------------------------------------------------------------------------


def shares(count: int, accumulation: int, rank: int, ranks: int) -> list[list[int]]:
    """Return this rank's micro-batches of rows ``0 .. count - 1``. All ranks have the same number, some
    of them empty.
    """
    size = -(-count // (ranks * accumulation))
    cuts = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    cuts += [[]] * (ranks * accumulation - len(cuts))
    return cuts[rank::ranks]


def offline_step(
    kind: type, seed: int, accumulation: int, rank: int, ranks: int, columns: Sequence[str] = ()
) -> Step[Any]:
    """Return this rank's part of a step of random rows.

    Args:
        kind: batch type.
        seed: random seed of the rows.
        accumulation: micro-batches of a step on each rank.
        rank: index of this rank.
        ranks: world size.
        columns: columns that the objective needs, with different values for each row and column.
    """
    pairs = random_pairs(ROWS, seed)
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs]
    weights = [1.0 + 0.25 * (index % 3) for index in range(ROWS)]
    targets = [1.0, 0.75, 1.0, 0.5, 1.0, 1.0, 0.25]
    batches: list[Any] = []
    for share in shares(ROWS, accumulation, rank, ranks):
        weight, mine = [weights[i] for i in share], [pairs[i] for i in share]
        target = [targets[i] for i in share]
        if kind is DemonstrationBatch:
            made = demonstration_step([rows[i] for i in share], weights=weight)
        elif kind is PreferenceBatch:
            made = preference_step(mine, target=target)
            bonus = {"bonus": torch.tensor([0.5 * i for i in share])}
            made = made._replace(micro_batches=tuple(one._replace(extras=bonus) for one in made.micro_batches))
        elif kind is ProcessBatch:
            batches.append(judged_steps([rows[i] for i in share], weight))
            continue
        elif kind is RankedBatch:
            made = ranked_step(ranked_pairs(mine), target=target, weights=weight)
        else:
            others = sequences([(rows[i][0], rows[i - 1][1]) for i in share])
            desirable = torch.tensor([i % 3 != 1 for i in share], dtype=torch.bool)
            batches.append(UnpairedBatch(sequences([rows[i] for i in share]), others, desirable, torch.tensor(weight)))
            continue
        batch = made.micro_batches[0] if made.micro_batches else empty(kind)
        numbers = {name: torch.tensor([column_value(i, place) for i in share]) for place, name in enumerate(columns)}
        batches.append(batch._replace(extras={**batch.extras, **numbers}))
    tokens = sum(len(completion) for _, completion in rows)
    return Step(tuple(batches), ROWS, tokens)


def column_value(row: int, place: int) -> float:
    """Return the value in [0, 1] of a row in the column at an index."""
    return (3 * row + 5 * place) % 8 / 7


def judged_steps(rows: Sequence[Any], weights: list[float]) -> ProcessBatch:
    """Return steps that end at every second token and at the last token; a step is right if the token's id is even."""
    made, labels, supervised = sequences(rows), [], []
    for completion in made.completions:
        ends = torch.arange(len(completion)) % 2 == 1
        ends[-1] = True
        supervised.append(ends)
        labels.append((completion[ends] % 2 == 0).float())
    return ProcessBatch(made._replace(supervised=tuple(supervised)), tuple(labels), torch.tensor(weights))


def empty(kind: type) -> Any:
    none = torch.zeros(0)
    if kind is DemonstrationBatch:
        return DemonstrationBatch(sequences([]), none)
    if kind is PreferenceBatch:
        return PreferenceBatch(pair_sequences([]), none, none, none, {"bonus": none})
    return RankedBatch(sequences([]), torch.zeros(0, dtype=torch.long), none, none, none)


PROMPTS, SAMPLES = 4, 2


def rollout_step(index: int, rank: int, ranks: int, multi_turn: MultiTurn | None = None) -> Step[PromptBatch]:
    """Return this rank's prompts of a rollout with all samples of each prompt, and text to pretrain on."""
    prompts = [prompt for prompt, _ in random_rows(PROMPTS, seed=300 + index)]
    mine = list(range(PROMPTS))[rank::ranks]
    episodes = [index * PROMPTS * SAMPLES + i * SAMPLES + k for i in mine for k in range(SAMPLES)]
    text = random_rows(3, seed=400 + index)[rank::ranks]
    batch = PromptBatch(
        prompts=tuple(torch.tensor(prompts[i]) for i in mine for _ in range(SAMPLES)),
        texts=tuple(f"prompt {i}" for i in mine for _ in range(SAMPLES)),
        columns={},
        episodes=torch.tensor(episodes, dtype=torch.long),
        group=torch.arange(len(mine)).repeat_interleave(SAMPLES),
        pretraining=DemonstrationBatch(sequences(text), torch.ones(len(text))),
        multi_turn=multi_turn,
    )
    return Step((batch,), PROMPTS * SAMPLES, 0)


def low_words(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Score a completion by its fraction of words with a number below 60."""
    words = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in completions]
    return [sum(w < 60 for w in many) / max(len(many), 1) for many in words]


def share_of_words(text: str, low: int, high: int) -> float:
    """Return the fraction of a text's words from ``low`` up to but excluding ``high``."""
    words = [int(word[1:]) for word in text.split() if word.startswith("w")]
    return sum(low <= word < high for word in words) / max(len(words), 1)


def low_words_with_feedback(prompts: Any, completions: Sequence[str], **columns: Any) -> list[Judgement]:
    """Score a completion by its fraction of words below 60; give feedback with its first word if the score is below
    0.5.
    """
    scores = low_words(prompts, list(completions))
    return [
        Judgement(score, feedback=text.split()[0] if score < 0.5 and text.split() else None)
        for score, text in zip(scores, completions, strict=True)
    ]


def low_words_at_a_cost(prompts: Any, completions: Sequence[str], **columns: Any) -> list[Judgement]:
    """Score a completion by its fraction of words below 60; the fraction of words from 30 to 89 is its cost."""
    parts = [{"low": share_of_words(text, 0, 60), "cost": share_of_words(text, 30, 90)} for text in completions]
    return [Judgement(one["low"], one) for one in parts]


# -- training ---------------------------------------------------------------------------------------------------------


class Recorder(pl.Callback):
    """Records the full gradients of the first update and the drawn completions."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        if not self.gradients:
            named = module.named_parameters()
            self.gradients = {name: whole(p.grad).cpu().clone() for name, p in named if p.grad is not None}


def strategy_of(name: str, ranks: int, **settings: Any) -> Any:
    if name == "fsdp":
        return ModelParallelStrategy(**{"data_parallel_size": ranks, "tensor_parallel_size": 1} | settings)
    return name if ranks > 1 else "auto"


def trainer_of(strategy: str, ranks: int, sharding: dict[str, Any] | None = None, **settings: Any) -> pl.Trainer:
    return quiet_trainer(
        devices=ranks, strategy=strategy_of(strategy, ranks, **sharding or {}), **{"limit_val_batches": 0} | settings
    )


class ForgetfulModule(modules.DPOModule):
    """A loss over the whole batch, in a class that does not declare that it couples pairs."""

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor:
        margin = logprobs.margin
        return -torch.nn.functional.logsigmoid(margin - margin.detach().mean() + torch.arange(len(margin)))


class Looking:
    """Reads the full distributions of policy and reference, and the hidden states of a layer."""

    needs_reference_logits = True
    hidden_layers = (0,)

    def token_statistics(self, policy_logits: Tensor, reference_logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        policy, reference = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
        return {"kl": (reference.exp() * (reference - policy)).sum(-1), "largest": policy_logits.amax(-1)}


class LookingDPOModule(Looking, modules.DPOModule):
    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor:
        slots = logprobs.extras
        far = slots["chosen_kl"].sum(-1) - slots["rejected_largest"].sum(-1) + slots["bonus"]
        seen = slots["chosen_hidden_0"].sum((-1, -2))
        return -torch.nn.functional.logsigmoid(logprobs.margin - far + seen)


class LookingMeanModule(LookingDPOModule):
    """Couples the pairs of a step by a mean that carries gradients."""

    batch_coupled = True

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor:
        slots = logprobs.extras
        sure, unsure = (slots[f"{side}_largest"].sum(-1) for side in ("chosen", "rejected"))
        far = slots["rejected_kl"].sum(-1)
        return torch.nn.functional.softplus(0.1 * (sure.mean() - unsure) + far + slots["bonus"] - logprobs.margin)


class LookingGRPOModule(Looking, modules.GRPOModule):
    def policy_loss(self, logprobs: PolicyLogprobs) -> Any:
        loss = super().policy_loss(logprobs)
        assert logprobs.rollout is None or "kl" in logprobs.rollout.extras
        return loss._replace(values=loss.values + logprobs.extras["kl"] + 0.1 * logprobs.extras["largest"])


class ExploringModule(modules.OnlineDPOModule):
    """Draws all samples from the reference."""

    def by_reference(self, group: Tensor) -> Tensor:
        return torch.ones_like(group, dtype=torch.bool)


class OwnForward:
    """Computes logits by the model's own forward pass of whole sequences."""

    policy: Any

    def load_models(self) -> None:
        super().load_models()  # type: ignore[misc]
        self.policy.logits_path = "forward"


class OwnForwardDPOModule(OwnForward, modules.DPOModule):
    """DPO with the model's own forward pass."""


class OwnForwardPPOModule(OwnForward, modules.PPOModule):
    """PPO with the model's own forward pass."""


OWN = {
    one.__name__: one
    for one in (
        ForgetfulModule, LookingDPOModule, LookingMeanModule, LookingGRPOModule, OwnForwardDPOModule,
        OwnForwardPPOModule, ExploringModule,
    )
}  # fmt: skip


USERS = Path(__file__).resolve().parents[1] / "experiments" / "objectives_of_users"


def kind_of(name: str) -> Any:
    """Return a class of this file, of the package, or of a user's file given as ``file.Class``."""
    if "." in name:
        file, _, kind = name.partition(".")
        with patch.object(sys, "path", [*sys.path, str(USERS)]):
            return getattr(importlib.import_module(file), kind)
    return OWN.get(name) or getattr(modules, name)


ENDS = (EOS, *range(FIRST_WORD, FIRST_WORD + 30))
"""Tokens that end a completion. They are drawn often, so completion lengths differ between ranks."""


def module_of(name: str, folder: str, double: bool = True, sgd: float | None = 0.05, **settings: Any) -> Any:
    """Return a module in double precision with plain gradient descent, so that ranks can be compared to 1e-9."""
    kind = kind_of(name)
    if issubclass(kind, modules.RolloutModule):
        settings = {"scorer": low_words, "max_new_tokens": 6, "ppo_epochs": 3} | settings
    settings = {"max_grad_norm": 0.5, "lr_schedule": "constant", "warmup": 0.0} | settings
    if isinstance(settings.get("lora"), dict):
        settings["lora"] = LoraSettings(**settings["lora"])
    module = kind(init_from=folder, **settings)
    if double:
        doubled(module)
    if sgd is not None:
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=sgd)
    return module


def steps_of(
    module: Any, count: int, accumulation: int, together: int = 1, max_tokens: int | None = None
) -> list[Step[Any]]:
    """Return this rank's part of some steps. On-policy modules split their rollouts themselves, by the step's limits.

    Args:
        module: module that will be trained.
        count: number of steps.
        accumulation: micro-batches per step.
        together: number of ranks that hold one model jointly and read the same rows.
        max_tokens: maximum tokens of a micro-batch of a rollout.
    """
    rank, ranks = (place // together for place in here())
    if module.batch_type is PromptBatch:
        size = -(-PROMPTS * SAMPLES // (ranks * accumulation)) if accumulation > 1 else None
        talks = MultiTurn(Talks(), 3) if isinstance(module.engine, ManyEnds) else None
        return within([rollout_step(index, rank, ranks, talks) for index in range(count)], size, max_tokens)
    kind, columns = module.batch_type, module.data_columns
    return [offline_step(kind, index, accumulation, rank, ranks, columns) for index in range(count)]


def weights_of(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: whole(p.detach()).cpu().clone() for name, p in module.named_parameters() if p.requires_grad}


class Drawn(pl.Callback):
    """Records the completions of each episode drawn by this rank."""

    def __init__(self, module: Any) -> None:
        self.completions: dict[int, list[int]] = {}
        collect = getattr(module, "collect", None)

        def kept(*batches: PromptBatch) -> Any:
            assert collect is not None
            rollout = collect(*batches)
            for episode, ids in zip(rollout.episodes.tolist(), rollout.sequences.completions, strict=True):
                self.completions[episode] = ids.tolist()
            return rollout

        if collect is not None:
            module.collect = kept


def train(
    name: str,
    folder: str,
    strategy: str,
    accumulation: int = 1,
    updates: int = 5,
    sharding: dict[str, Any] | None = None,
    precision: str = "32-true",
    accelerator: str = "cpu",
    max_tokens: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Run some updates; return the first gradients, the final weights, the drawn completions and the logged metrics."""
    module = module_of(name, folder, **settings)
    recorder, drawn = Recorder(), Drawn(module)
    training_steps = -(-updates // getattr(module, "ppo_epochs", 1))  # a rollout has one or more updates per epoch
    steps = steps_of(module, training_steps, accumulation, (sharding or {}).get("tensor_parallel_size", 1), max_tokens)
    trainer = trainer_of(
        strategy, here()[1], sharding, callbacks=[recorder], precision=precision, accelerator=accelerator
    )
    # Writing kernels takes longer than the training; graphs and their backward passes are the same.
    with patch.object(compiling, "BACKEND", "aot_eager"), patch("rlhf_lightning.tokenization.facts.Facts.ends", ENDS):
        trainer.fit(module, StepData(steps))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found = {"gradients": recorder.gradients, "weights": weights_of(module), "drawn": drawn.completions, "log": logged}
    return found | {"multipliers": module.score_rule.state_dict() if hasattr(module, "score_rule") else {}}


class Poisoned(modules.DPOModule):
    """The loss of the last rank's pairs is NaN at some updates."""

    poison: tuple[int, ...] = ()
    masked = False
    """Whether only the loss is NaN and the gradient is valid."""

    def preference_loss(self, pairs: PreferenceLogprobs) -> Loss:
        loss = as_loss(super().preference_loss(pairs))
        rank, ranks = here()
        if rank != ranks - 1 or self.updates not in self.poison:
            return loss
        return loss._replace(values=loss.values + float("nan") if self.masked else loss.values * float("nan"))


def skip(folder: str, strategy: str, poison: Sequence[int], masked: bool, updates: int = 6) -> dict[str, Any]:
    """Run updates, some of them spoiled by one rank; return the weights, the skipped updates and the reason for the
    run's end.
    """
    module = Poisoned(init_from=folder, learning_rate=1e-3, lr_schedule="constant")
    module.poison, module.masked = tuple(poison), masked
    failure = ""
    try:
        trainer_of(strategy, here()[1]).fit(module, StepData(steps_of(module, updates, 1)))
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    weights = {} if failure else weights_of(module)
    return {"weights": weights, "skipped": module.skipped_updates, "updates": module.updates, "failure": failure}


class Killing(pl.Callback):
    """Kills one rank before a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step and here()[0] == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def lose(name: str, folder: str, strategy: str, rank: int) -> str:
    """Train until a rank is killed; return the error message of a surviving rank."""
    module = module_of(name, folder, double=False)
    callbacks: list[pl.Callback] = [RankWatch(), Killing(rank, 1)]
    try:
        trainer_of(strategy, here()[1], callbacks=callbacks).fit(module, StepData(steps_of(module, 4, 1)))
    except Exception as error:
        return failure_sentence(error) or f"{type(error).__name__}: {error}"
    return "nothing was missed"


def validate(name: str, folder: str, strategy: str, prompts: int = 3, **settings: Any) -> dict[str, float]:
    """Return the metrics of held-out rows; there may be fewer prompts than ranks."""
    module = module_of(name, folder, **settings)
    rank, ranks = here()
    if module.batch_type is PromptBatch:
        mine = random_rows(prompts, seed=500)[rank::ranks]
        batch = prompt_step([prompt for prompt, _ in mine], first_episode=0).micro_batches[0]
        steps = [Step((batch._replace(episodes=torch.arange(prompts)[rank::ranks]),), prompts, 0)]
    else:
        steps = steps_of(module, 1, 4)
    with patch("rlhf_lightning.tokenization.facts.Facts.ends", ENDS):
        trainer = trainer_of(strategy, ranks, limit_val_batches=1.0)
        return trainer.validate(module, StepData(steps, steps), verbose=False)[0]


def answer(folder: str, strategy: str, prompts: Sequence[Sequence[str]]) -> list[Any]:
    """Return the policy's answers to this rank's prompts, in single precision."""
    answers: list[Any] = []

    class Asks(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
            if (
                module.device_mesh is None
            ):  # tensors read from a file have odd memory addresses, where matrix products round differently
                for weight in module.parameters():
                    weight.data = weight.data.clone()
            sampling = SamplingSettings(max_new_tokens=12, batch_size=2)
            with patch("rlhf_lightning.tokenization.facts.Facts.ends", ENDS):
                found = module.answer(prompts[here()[0]], sampling, seed=3)
                answers.extend(
                    (text, ids.tolist(), logprobs.tolist())
                    for text, ids, logprobs in zip(found.texts, found.ids, found.logprobs, strict=True)
                )

    module = module_of("SFTModule", folder, double=False)
    trainer_of(strategy, here()[1], callbacks=[Asks()]).fit(module, StepData(steps_of(module, 1, 1)))
    return answers


class Converses(pl.Callback):
    """Samples episodes before and after training, on ranks with different numbers of turns and prompts."""

    def __init__(self) -> None:
        self.gaps: list[float] = []  # largest differences from the policy's own log-probabilities
        self.turns: list[list[int]] = []

    def converse(self, module: Any, prompts: Sequence[Tensor]) -> None:
        rules, episodes = MultiTurn(Talks(), 1 if here()[0] else 3), torch.arange(len(prompts))
        turns = Turns(rules, module.tokenizer, ["w9"] * len(prompts), {}, episodes.tolist())
        drawn = module.complete(prompts, episodes, SamplingSettings(4), 3, turns)
        own = scored(module.policy, prompts, drawn.ids, 1.0, drawn.learned)
        pairs = zip(own, drawn.logprobs, strict=True)
        self.gaps.append(max((float((one - other).abs().max()) for one, other in pairs), default=0.0))
        self.turns.append([len(one.ends) for one in drawn.transcripts])

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.converse(module, [torch.tensor([20 + n, 21]) for n in range(1 if here()[0] else 3)])

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.converse(module, [torch.tensor([20 + n, 21]) for n in range(0 if here()[0] else 3)])


def converse(name: str, folder: str, strategy: str, **settings: Any) -> tuple[list[float], list[list[int]]]:
    """Return the gaps and turns of `Converses`."""
    module, callback = module_of(name, folder, **settings), Converses()
    with patch("rlhf_lightning.tokenization.facts.Facts.ends", ENDS):
        trainer_of(strategy, here()[1], callbacks=[callback]).fit(module, StepData(steps_of(module, 1, 1)))
    return callback.gaps, callback.turns


def hand_over_late(folder: str, shared: str, arrived: str) -> list[bool]:
    """Transfer weights while the second rank is late; return whether it had arrived when the servers were told."""
    told: list[bool] = []
    model = load_policy(folder)
    if here()[0]:
        time.sleep(0.5)
        Path(arrived).touch()
    FolderHandOver(Path(shared)).hand_over(model, lambda _: told.append(Path(arrived).exists()))
    return told


def reference_left(folder: str, strategy: str) -> tuple[int, int]:
    """Return the number of the reference's weights held by this rank, and the total number."""
    module = module_of("DPOModule", folder, double=False)
    trainer_of(strategy, here()[1]).fit(module, StepData(steps_of(module, 1, 1)))
    weights = list(module.reference.copy.parameters())
    local = sum(w.to_local().numel() if hasattr(w, "to_local") else w.numel() for w in weights)
    return local, sum(weight.numel() for weight in weights)


# -- checkpoints and exports ------------------------------------------------------------------------------------------


class Snapshot(pl.Callback):
    """Saves a checkpoint after some training steps."""

    def __init__(self, step: int, path: str) -> None:
        self.left, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


def resume(name: str, folder: str, path: str, strategy: str, steps: int = 4, **settings: Any) -> dict[str, Any]:
    """Train without interruption, and again from a checkpoint in the middle; return weights and
    counters of both runs.
    """
    sharding = settings.pop("sharding", None)
    found: dict[str, Any] = {}
    for kind in ("whole", "resumed"):
        module = module_of(name, folder, sgd=None, learning_rate=1e-2, **settings)
        callbacks = [Snapshot(steps // 2, path)] if kind == "whole" else []
        trainer = trainer_of(strategy, here()[1], sharding, callbacks=callbacks)
        taken = steps_of(module, steps, 2)
        trainer.fit(module, ResumableData(taken), ckpt_path=path if kind == "resumed" else None, weights_only=True)
        found[kind] = weights_of(module)
        found[f"{kind}_counters"] = module.progress()
        found[f"{kind}_multiplier"] = module.score_rule.state_dict() if hasattr(module, "score_rule") else None
    return found


class Killed(Exception):
    """Raised to stop a run in the middle."""


class Dies(Snapshot):
    """Saves a checkpoint after some training steps and stops the run one step later."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_batch_end(trainer)
        if self.left == -1:
            raise Killed


def together(
    name: str,
    folder: str,
    strategy: str,
    path: str | None,
    chunk_tokens: int | None = None,
    accumulation: int = 1,
    steps: int = 4,
    max_tokens: int | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Train with all options combined; return the weights.

    Args:
        name: class name.
        folder: folder of the initial policy.
        strategy: strategy of the calling ranks.
        path: checkpoint path of a run that is killed and resumed; None does not kill the run.
        chunk_tokens: tokens per chunk of logits.
        accumulation: micro-batches per step.
        steps: number of steps.
        max_tokens: maximum tokens of a micro-batch of a rollout.
        settings: settings of the class.
    """

    def fit(callbacks: list[pl.Callback], checkpoint: str | None) -> dict[str, Tensor]:
        module = module_of(name, folder, sgd=None, learning_rate=1e-3, **settings)
        trainer = trainer_of(strategy, here()[1], callbacks=callbacks)
        data = ResumableData(steps_of(module, steps, accumulation, max_tokens=max_tokens))
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return weights_of(module)

    forward = "rlhf_lightning.models.causal_lm.chunked_logprobs"
    chunked = partial(chunked_logprobs, **{} if chunk_tokens is None else {"chunk_tokens": chunk_tokens})
    with patch("rlhf_lightning.tokenization.facts.Facts.ends", ENDS), patch(forward, chunked):
        if path is None:
            return fit([], None)
        try:
            fit([Dies(steps // 2, path)], None)
        except Killed:
            return fit([], path)
        raise AssertionError("the run did not die")


class ResumableData(StepData):
    """Serves steps through the package's own loader."""

    def train_dataloader(self) -> StepLoader:  # type: ignore[override]
        return StepLoader(lambda epoch: self.steps, len(self.steps), "tiny")


def export(name: str, folder: str, out: str, strategy: str, **settings: Any) -> dict[str, Tensor]:
    """Train briefly and export; return the weights that the folder should have."""
    module = module_of(name, folder, double=False, **settings)
    trainer = trainer_of(strategy, here()[1])
    trainer.fit(module, StepData(steps_of(module, 2, 1)))
    weights = weights_of(module)
    if trainer.is_global_zero or module.device_mesh is not None:
        module.export(out)
    trainer.strategy.barrier()
    return weights


def fails(name: str, folder: str, path: str, strategy: str, **settings: Any) -> str:
    """Return the error of a resume that must fail."""
    module = module_of(name, folder, sgd=None, **settings)
    try:
        trainer_of(strategy, here()[1]).fit(
            module, ResumableData(steps_of(module, 4, 2)), ckpt_path=path, weights_only=True
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
