"""Record values of each held-out row: validation logs only means, but a confidence interval needs the rows.

Every objective has an override point that receives typed tuples of whole rows. The callback wraps this method during
validation, so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rlhf_lightning.functional.logprobs import kl_k1
from rlhf_lightning.functional.ranking import untied_pairs
from rlhf_lightning.tokenization import completion_text
from rlhf_lightning.types import PreferenceLogprobs, RankedScores, Rollout, TokenLogprobs

Rows = dict[str, list[Any]]


class HeldOutRows(Callback):
    """Record the rows of each validation pass.

    Attributes:
        passes: for each pass, lists of equal length with one entry per held-out row. The order is that of validation,
            which is the same in every pass of a run. With ``trainer.num_sanity_val_steps: -1``, the first pass is the
            model before training.
    """

    def __init__(self) -> None:
        self.passes: list[Rows] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the override points."""
        self.passes.append({})
        for owner, name, read in points_of(pl_module):
            setattr(owner, name, self._heard(getattr(owner, name), read, pl_module))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Record the token ids of each row's prompt, which identify the row."""
        step = args[1] if len(args) > 1 else kwargs["batch"]
        for batch in step.micro_batches:
            prompts = batch.prompts if hasattr(batch, "prompts") else batch.sequences.prompts
            self._keep({"prompt": [tuple(prompt.tolist()) for prompt in prompts]})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unwrap the override points."""
        for owner, name, _ in points_of(pl_module):
            vars(owner).pop(name, None)

    def _heard(self, method: Callable[..., Any], read: Callable[..., Rows], module: Any) -> Callable[..., Any]:
        def listened(*args: Any) -> Any:
            result = method(*args)
            self._keep(read(module, args[0], result))
            return result

        return listened

    def _keep(self, rows: Rows) -> None:
        for name, values in rows.items():
            self.passes[-1].setdefault(name, []).extend(values)


def read_demonstrations(module: Any, logprobs: TokenLogprobs, result: Any) -> Rows:
    """Return the negative log-likelihood (nats) and the number of tokens of each demonstration."""
    return {"negative_logprob": as_list(-logprobs.sequence_logprobs), "tokens": as_list(logprobs.lengths)}


def read_pairs(module: Any, logprobs: PreferenceLogprobs, result: Any) -> Rows:
    """Return the implicit rewards of chosen and of rejected, and the loss of each pair."""
    values = result if isinstance(result, Tensor) else result.values
    return {
        "chosen_reward": as_list(module.beta * logprobs.chosen_logratio),
        "rejected_reward": as_list(module.beta * logprobs.rejected_logratio),
        "loss": as_list(values),
    }


def read_scores(module: Any, scores: RankedScores, result: Any) -> Rows:
    """Return the score of the chosen minus the score of the rejected completion."""
    better, worse = untied_pairs(scores.group, scores.ranks)
    order = scores.group[better].argsort()
    return {"score_margin": as_list((scores.scores[better] - scores.scores[worse])[order])}


def read_raw_scores(module: Any, sequences: Any, result: Any) -> Rows:
    """Return the scorer's own score, before the penalty for unfinished completions."""
    return {"score": as_list(result.scores)}


def read_rollout(module: Any, batch: Any, rollout: Rollout) -> Rows:
    """Return the policy's completions, and the scores used for training."""
    kl = kl_k1(rollout.old_logprobs, rollout.reference_logprobs).sum(-1)
    return {
        "completion": [completion_text(module.tokenizer, ids.tolist()) for ids in rollout.sequences.completions],
        "ruled_score": as_list(rollout.scores),
        "kl": as_list(kl),
        "finished": as_list(rollout.finished),
        "length": as_list(rollout.completion_mask.sum(-1)),
    }


READERS: dict[str, Callable[..., Rows]] = {
    "token_loss": read_demonstrations,
    "preference_loss": read_pairs,
    "ranking_loss": read_scores,
    "collector.raw_judgements": read_raw_scores,
    "collect": read_rollout,
}
"""Method to wrap for each family, with its reader; the method may belong to an attribute of the module."""


def points_of(module: Any) -> list[tuple[Any, str, Callable[..., Rows]]]:
    """Return (owner, method name, reader) of each of these methods that the module has."""
    found = []
    for path, read in READERS.items():
        *owners, name = path.split(".")
        owner = module
        for part in owners:
            owner = getattr(owner, part, None)
        if hasattr(owner, name):
            found.append((owner, name, read))
    return found


def as_list(values: Tensor) -> list[float]:
    """Return a tensor of shape (rows,) as a list of numbers."""
    return values.detach().to(torch.float64).tolist()
