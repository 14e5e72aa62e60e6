"""Adapters for losses of TRL: ``rlhf verify --foreign trl:DPO --loss-type sigmoid``.

TRL's losses are methods of trainers that run their models. They are called here unmodified, on an object with the
settings that they read and with a model that returns the log-probabilities of the test.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.errors import PackageError
from rlhf_lightning.loading import import_path
from rlhf_lightning.modules import (
    AOTModule,
    APODownModule,
    APOZeroModule,
    CISPOModule,
    CPOModule,
    CriticFreeModule,
    DiscoPOPModule,
    DPOModule,
    DrGRPOModule,
    EXOModule,
    ForwardKLDPOModule,
    GKDModule,
    GRPOModule,
    GSPOModule,
    HingeModule,
    IPOModule,
    JensenShannonDPOModule,
    KTOModule,
    LDDPOModule,
    LengthNormalizedDPOModule,
    NCAModule,
    RLOOModule,
    RobustDPOModule,
    SimPOModule,
    SPPOModule,
    UnpairedAOTModule,
)
from rlhf_lightning.types import DistillationLogits, PolicyLogprobs, PreferenceLogprobs, UnpairedLogprobs
from rlhf_lightning.verification.foreign import RunsAs, compared_with

PACKAGE = "trl"

PairLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm",
]  # fmt: skip


class _Metrics(dict[str, Any]):
    """Metrics that a loss writes; never read."""

    def __missing__(self, key: str) -> Any:
        return self.setdefault(key, [] if key not in ("train", "eval") else _Metrics())


def _trainer(path: str) -> Any:
    try:
        return import_path(f"trl.{path}")
    except Exception as error:
        raise PackageError("not-installed", f"TRL cannot be used: {error}; pip install trl") from error


def _trainer_with(kind: Any, **settings: Any) -> Any:
    """Return an uninitialised trainer with the attributes that its loss reads."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        is_main_process=False,
        sync_gradients=True,
        gather=lambda values: values,
        gather_for_metrics=lambda values: values,
        reduce=lambda values, reduction="sum": values,
    )
    common = {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "_metrics": _Metrics(),
        "aux_loss_enabled": False,
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    found = kind.__new__(kind)
    vars(found).update({**common, **settings})
    return found


def _answering(logprobs: Tensor) -> Any:
    """Return a model that outputs these log-probabilities, shape (rows, length)."""
    nothing = torch.zeros_like(logprobs)
    output = SimpleNamespace(
        log_probs=logprobs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), log_sum_sq_probs=nothing
    )
    return lambda **inputs: output


def _inputs(mask: Tensor) -> dict[str, Tensor]:
    """Return a batch with one prompt token before each completion."""
    whole = torch.nn.functional.pad(mask, (1, 0), value=False)
    ids = torch.ones_like(whole, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": whole.long()}


@compared_with(
    {
        "sigmoid": DPOModule,
        "hinge": HingeModule,
        "ipo": IPOModule,
        "exo_pair": EXOModule,
        "nca_pair": NCAModule,
        "robust": RobustDPOModule,
        "sppo_hard": SPPOModule,
        "aot": AOTModule,
        "aot_unpaired": UnpairedAOTModule,
        "apo_zero": APOZeroModule,
        "apo_down": APODownModule,
        "discopop": DiscoPOPModule,
        "sigmoid_norm": LengthNormalizedDPOModule,
    },
    by="loss_type",
)
def DPO(
    pairs: PreferenceLogprobs,
    loss_type: PairLoss = "sigmoid",
    beta: float = 0.1,
    noise: float | None = None,
    discopop_tau: float = 0.05,
) -> Tensor:
    """Call the loss of ``DPOTrainer``; ``noise`` is its label_smoothing, by default the value of its paper."""
    noise = {"exo_pair": 1e-3, "robust": 0.1}.get(loss_type, 0.0) if noise is None else noise
    return _pairwise(pairs, beta, loss_types=[loss_type], label_smoothing=noise, tau=discopop_tau)


@compared_with({"forward_kl": ForwardKLDPOModule, "js_divergence": JensenShannonDPOModule}, by="f_divergence")
def FDPO(
    pairs: PreferenceLogprobs,
    f_divergence: Literal["forward_kl", "js_divergence", "alpha_divergence"] = "forward_kl",
    beta: float = 0.1,
) -> Tensor:
    """Call the loss of ``DPOTrainer`` with another divergence."""
    return _pairwise(pairs, beta, f_divergence_type=f_divergence)


@compared_with(LDDPOModule)
def LDDPO(pairs: PreferenceLogprobs, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """Call the loss of ``DPOTrainer`` with ``ld_alpha``."""
    return _pairwise(pairs, beta, ld_alpha=alpha)


def _pairwise(pairs: PreferenceLogprobs, beta: float, tau: float = 0.05, **changes: Any) -> Tensor:
    trainer = _trainer("trainer.dpo_trainer.DPOTrainer")
    mask = torch.cat([pairs.chosen_mask, pairs.rejected_mask])
    assert pairs.reference_chosen_logprobs is not None and pairs.reference_rejected_logprobs is not None
    policy = torch.cat([pairs.policy_chosen_logprobs, pairs.policy_rejected_logprobs])
    reference = torch.cat([pairs.reference_chosen_logprobs, pairs.reference_rejected_logprobs])
    settings: dict[str, Any] = {
        "beta": beta,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
        "use_weighting": False,
        "precompute_ref_logps": False,
        "ref_model": _answering(reference),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=tau),
    }
    ready = _trainer_with(trainer, **{**settings, **changes, "model": _Frozen()})
    return ready.compute_loss(_answering(policy), _inputs(mask))


class _Frozen(torch.nn.Module):
    """A model stub: the loss reads only its training mode and whether gradient checkpointing is on."""

    is_gradient_checkpointing = False


@compared_with({"kto": KTOModule}, by="loss_type")
def KTO(
    rows: UnpairedLogprobs,
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Call the loss of ``KTOTrainer``; the KL estimate is the reference point of the test."""
    trainer = _trainer("trainer.kto_trainer.KTOTrainer")
    assert rows.reference_logprobs is not None
    policy, reference = _answering(rows.policy_logprobs), _answering(rows.reference_logprobs)
    point = rows.reference_point.expand(1)
    ready = _trainer_with(
        trainer,
        model=_Frozen(),
        beta=beta,
        loss_type=loss_type,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        calculate_KL=loss_type == "kto",
        precompute_ref_logps=False,
        ref_model=reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _compute_kl_logps=lambda model, batch: 0 * point if model is reference else point,
    )
    return ready.compute_loss(policy, {**_inputs(rows.completion_mask), "label": rows.desirable})


@compared_with({"cpo": CPOModule, "simpo": SimPOModule}, by="loss_type")
def CPO(
    pairs: PreferenceLogprobs,
    loss_type: Literal["simpo"] = "simpo",
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """Call the loss of ``CPOTrainer``, which takes mean log-probabilities for SimPO."""
    trainer = _trainer("experimental.cpo.CPOTrainer")
    chosen = pairs.chosen_sequence_logprobs / pairs.chosen_lengths
    rejected = pairs.rejected_sequence_logprobs / pairs.rejected_lengths
    ready = _trainer_with(trainer, alpha=0.0, beta=beta, loss_type=loss_type, simpo_gamma=gamma, label_smoothing=0.0)
    return ready.cpo_loss(chosen, rejected)[0]


PolicyLoss = Literal["grpo", "gspo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]

_TOKENS = {"aggregation": "token_mean"}


@compared_with(
    {
        "grpo": GRPOModule,
        "gspo": (GSPOModule, {"clip": 0.2, "clip_high": None}),
        "bnpo": (GRPOModule, _TOKENS),
        "dapo": (GRPOModule, _TOKENS),
        "dr_grpo": (DrGRPOModule, {"kl_place": "loss", "kl_estimator": "k3", "kl_coef": 0.5}),
        "cispo": (CISPOModule, {"kl_place": "loss", "kl_estimator": "k3", "kl_coef": 0.5, "cispo_high": 5.0}),
        "sapo": (GRPOModule, {"objective": "soft_gate"}),
        "luspo": RunsAs(GRPOModule, {"aggregation": "sequence_mean_token_sum"}),
        "vespo": RunsAs(GRPOModule, _TOKENS),
    },
    by="loss_type",
)
def GRPO(
    logprobs: PolicyLogprobs,
    loss_type: PolicyLoss = "grpo",
    kl_coef: float = 0.0,
    clip: float = 0.2,
    kl_times_ratio: bool = False,
) -> Tensor:
    """Call the loss of ``GRPOTrainer``; "gspo" is its grpo loss with sequence-level importance sampling."""
    args = SimpleNamespace(report_to=[], delta=None, use_bias_correction_kl=kl_times_ratio, steps_per_generation=1)
    args.sapo_temperature_pos, args.sapo_temperature_neg = 1.0, 1.05
    args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg = 2.0, 3.0, 3.0, 2.0
    high = 5.0 if loss_type == "cispo" else clip
    name = "grpo" if loss_type == "gspo" else loss_type
    level = "sequence" if loss_type in ("gspo", "luspo") else "token"
    trainer = _trainer("trainer.grpo_trainer.GRPOTrainer")
    return _policy_gradient(
        trainer, logprobs, kl_coef, loss_type=name, importance_sampling_level=level, epsilon_low=clip,
        epsilon_high=high, args=args,
    )  # fmt: skip


@compared_with(RLOOModule)
def RLOO(logprobs: PolicyLogprobs, clip: float = 0.2) -> Tensor:
    """Call the loss of ``RLOOTrainer``, which takes one advantage per completion."""
    trainer = _trainer("trainer.rloo_trainer.RLOOTrainer")
    return _policy_gradient(trainer, logprobs, 0.0, epsilon_low=clip, epsilon_high=clip)


@compared_with(RunsAs(CriticFreeModule, {"aggregation": "sequence_mean_token_mean"}))
def GMPO(logprobs: PolicyLogprobs, log_clip: float = 0.4) -> Tensor:
    """Call the loss of ``GMPOTrainer``; at ratio 1 it is a policy gradient, but no shipped class clips in this way."""
    trainer = _trainer("experimental.gmpo.GMPOTrainer")
    return _policy_gradient(trainer, logprobs, 0.0, epsilon_low=log_clip, epsilon_high=log_clip)


def _policy_gradient(trainer: Any, logprobs: PolicyLogprobs, kl_coef: float, **changes: Any) -> Tensor:
    mask = logprobs.completion_mask
    by_completion = logprobs.advantages.gather(1, mask.long().argmax(-1, keepdim=True)).squeeze(1)
    entropy = torch.zeros_like(logprobs.logprobs)
    settings: dict[str, Any] = {
        "args": SimpleNamespace(report_to=[]),
        "beta": kl_coef,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": 2,  # maximum length in the small world
        "_entropy_bonus_enabled": False,
        "_get_per_token_logps_and_entropies": lambda *a, **k: (logprobs.logprobs, entropy, None),
    }
    ids = torch.ones_like(mask, dtype=torch.long)
    inputs: dict[str, Any] = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": by_completion,
        "old_per_token_logps": logprobs.old_logprobs,
        "old_logps": logprobs.old_logprobs.sum(-1),
        "num_items_in_batch": mask.sum(),
    }
    if logprobs.reference_logprobs is not None:
        inputs["ref_per_token_logps"] = logprobs.reference_logprobs
    return _trainer_with(trainer, **{**settings, **changes}).compute_loss(None, inputs)


@compared_with(GKDModule)
def GKD(logits: DistillationLogits, beta: float = 0.5) -> Tensor:
    """Call the generalised Jensen-Shannon divergence of ``GKDTrainer``, one value per token."""
    trainer = _trainer("experimental.gkd.GKDTrainer")
    found = trainer.generalized_jsd_loss(
        logits.student_logits[:, None], logits.teacher_logits[:, None], beta=beta, reduction="none"
    )
    return found.sum(-1).squeeze(1)
