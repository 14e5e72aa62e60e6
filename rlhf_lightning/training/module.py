"""The base class of every stage: tokenizer, models, optimizer step, logging, checkpoints, export."""

from __future__ import annotations

import inspect
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import deprecation, tokenization
from rlhf_lightning.compat import (
    attached_datamodule,
    attached_trainer,
    call_before_zero_grad,
    logged_batch,
    set_logged_step,
)
from rlhf_lightning.errors import ContractError, LackingError, SettingError, StateError, undefined
from rlhf_lightning.functional.logprobs import token_logprobs
from rlhf_lightning.loading import check_ranges
from rlhf_lightning.models.causal_lm import CausalLM, OverLogits, TokenOutputs
from rlhf_lightning.models.compiling import compile_layers
from rlhf_lightning.models.export import push_folder
from rlhf_lightning.models.folders import trusts
from rlhf_lightning.models.frozen import Reference
from rlhf_lightning.models.layout import Layout, lay_out
from rlhf_lightning.models.limits import check_rows, limits_of
from rlhf_lightning.models.loading import LoadSettings, refuse_nonfinite_weights
from rlhf_lightning.models.lora import LoraSettings, lora_settings
from rlhf_lightning.models.resolving import fingerprint, is_adapter, load_base_of_adapter, resolve_folder, saved_folder
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.self_check import check_weights
from rlhf_lightning.models.sharding import decoder_layers, shard
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.sampling.conversation import Turns, turns_of
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingSettings
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.scoring import Scorer
from rlhf_lightning.training import checkpoint_state, optimization, trainer_checks
from rlhf_lightning.training.compatibility import check, refused_strategy, settled_precision
from rlhf_lightning.training.gathering import data_ranks
from rlhf_lightning.training.meter import Meter, TokenClock, log_scalars, log_to_tensorboard, peak_flops
from rlhf_lightning.training.muon import mark_layers
from rlhf_lightning.types import DataNeeds, EnumeratedProblem, MultiTurn, Prompt, Sequences, Step

NEED_WEIGHTS = (BaseFinetuning, ModelPruning)
"""Callbacks that read the weights in their ``setup``, so the weights must be loaded before it."""


class AlignmentModule(LightningModule):
    """Base of every stage. One item of the DataLoader is one optimizer step, split into micro-batches.

    The module uses manual optimization. The loss of a micro-batch is its sum divided by the count over all
    micro-batches and ranks, so the split does not change the gradient. Checkpoints are taken only between two steps.

    A subclass may override any public name; docs/extending.md lists the intended override points. An overridden
    Lightning hook must call ``super()`` first.

    Args:
        init_from: hub id, model folder, adapter folder or .gguf file to start from.
        tokenizer: hub id or folder of a tokenizer that replaces the model's own.
        chat_template: Jinja text or file that renders messages as a prompt; null keeps the tokenizer's template.
        template_args: variables of the chat template, such as enable_thinking, documents, tools, or now (the current
            date); they are saved with the tokenizer.
        new_tokens: texts that become single tokens, with new embeddings if the model has no spare ones; an adapter
            trains their embedding rows too.
        stop_tokens: additional tokens that end a completion; EOS, the template's end-of-turn token and the stop tokens
            of the model's generation config always end it.
        stop_strings: texts that end a completion, such as "\\nUser:"; the tokens include the stop string, the text ends
            before it.
        from_scratch: initialise new weights from the config in ``init_from`` instead of loading weights.
        trust_remote_code: hub ids or folders whose custom modelling code may be executed; other models that need
            custom code are refused.
        self_check: compare our log-probabilities with the model's own forward pass, on a small copy and on two short
            sequences; a path that disagrees falls back to a slower path, with a message.
        lora: train a low-rank adapter on the frozen backbone; null trains every weight.
        quantization: quantize an adapter's frozen backbone to 4 bits ("nf4") or 8 bits ("int8"); null keeps ``dtype``.
        dtype: precision of the weights; "bfloat16" is for an adapter's frozen weights, and trained weights stay fp32.
        frozen_dtype: precision of reference and reward model; null uses ``dtype``.
        attn_implementation: transformers' name of the attention kernel; null lets transformers choose.
        compile_layers: compile the decoder layers with torch.compile for training; needs a C++ compiler on the CPU and
            Triton on a GPU. Changes results only by rounding.
        activation_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        pack_rows: pack sequences into rows, and compute a prompt once for all its completions, if this costs less than
            padding and the model supports it. Changes results only by rounding.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts (Switch Transformer,
            2101.03961), averaged over layers and micro-batches; stages that sample refuse it.
        learning_rate: peak learning rate of AdamW.
        betas: AdamW's decay rates of the two moments.
        adam_eps: AdamW's epsilon.
        weight_decay: AdamW's decoupled weight decay, on matrices only.
        lr_schedule: learning-rate schedule after warm-up, over the updates of the whole run.
        warmup: updates of linear warm-up; a number below 1 is a share of all updates.
        fused_optimizer: use the fused AdamW kernel; the same step up to rounding.
        optimizer: another optimizer, by class_path and init_args; null uses AdamW with the settings above. Those
            settings are refused with another optimizer. Its weight decay covers all weights.
        lr_scheduler: another learning-rate scheduler; null uses ``lr_schedule`` and ``warmup``. It is stepped once
            per update, ReduceLROnPlateau once per validation.
        max_grad_norm: clip the gradient's global norm to this; null does not clip.
        max_skipped_updates: stop after this many consecutive updates with a non-finite loss or gradient; such updates
            are skipped.
        seed: seed of new weights and of sampling; null uses the seed of ``seed_everything``, or 0 without it.
    """

    paper: ClassVar[str] = ""
    """Source of the objective: authors, year, arXiv number."""

    batch_type: ClassVar[type]
    has_policy: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    batch_coupled: ClassVar[bool] = False
    reference_moves: ClassVar[bool] = False
    """Whether the reference changes during training (TR-DPO), so that its log-probabilities cannot be cached."""

    teacher_name: str | None = None
    """Model that the policy is distilled from; None without a teacher."""

    critic_kind: str | None = None
    """PPO's kind of critic; None without a critic."""

    weighs_rows: ClassVar[bool] = True
    """Whether the loss of each row can be multiplied by a weight."""

    has_centred_loss: bool = False
    """Whether the loss is near 0 by construction, because advantages sum to 0; progress shows in the score instead."""

    headline_metrics: ClassVar[tuple[str, ...]] = ("val/loss",)
    ranges: ClassVar[Mapping[str, str]] = {
        "router_aux_loss_coef": "[0, inf)",
        "learning_rate": "(0, inf)",
        "betas": "[0, 1)",
        "adam_eps": "[0, inf)",
        "weight_decay": "[0, inf)",
        "warmup": "[0, inf)",
        "max_grad_norm": "(0, inf)",
        "max_skipped_updates": "[1, inf)",
        "seed": "(-inf, inf)",
    }
    """Interval of each setting that this class adds, such as "(0, inf)"; the intervals of its bases apply too."""

    def __init__(
        self,
        init_from: str,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        template_args: dict[str, Any] | None = None,
        new_tokens: list[str] | None = None,
        stop_tokens: list[str] | None = None,
        stop_strings: list[str] | None = None,
        from_scratch: bool = False,
        trust_remote_code: list[str] | None = None,
        self_check: bool = True,
        lora: LoraSettings | None = None,
        quantization: Literal["nf4", "int8"] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        frozen_dtype: Literal["float32", "bfloat16"] | None = None,
        attn_implementation: str | None = None,
        compile_layers: bool = False,
        activation_checkpointing: bool = False,
        pack_rows: bool = True,
        router_aux_loss_coef: float = 0.0,
        learning_rate: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        lr_schedule: Literal["constant", "linear", "cosine"] = "linear",
        warmup: float = 0.0,
        fused_optimizer: bool = True,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        max_skipped_updates: int = 3,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attribute .* is an instance of `nn.Module`")  # a loaded model
            self.save_hyperparameters()
        init_from, lora = saved_folder(init_from), lora_settings(lora)
        tokenizer = None if tokenizer is None else saved_folder(tokenizer)
        self.hparams.update(seed=seed, init_from=init_from, tokenizer=tokenizer, lora=lora)
        self.save_hyperparameters(checkpoint_state.plain(dict(self.hparams)))  # loadable without running code
        check_ranges(type(self), self.hparams)
        self.init_from, self.tokenizer_name, self.chat_template = init_from, tokenizer, chat_template
        self.template_args, self.new_tokens = template_args, new_tokens
        self.stop_tokens, self.stop_strings = stop_tokens, stop_strings
        trusted = tuple(trust_remote_code or ())
        self.load_settings = LoadSettings(
            from_scratch, dtype, attn_implementation, activation_checkpointing, seed, quantization, frozen_dtype,
            trust_remote_code=trusted,
            self_check=self_check,
        )  # fmt: skip
        self.lora = lora
        if self.lora is not None:
            check_ranges(LoraSettings, vars(self.lora))
        self.pack_rows, self.compile_layers = pack_rows, compile_layers
        self.router_aux_loss_coef = router_aux_loss_coef
        self.fused_optimizer = fused_optimizer
        self.learning_rate, self.betas, self.adam_eps, self.weight_decay = learning_rate, betas, adam_eps, weight_decay
        self.lr_schedule, self.warmup, self.max_grad_norm, self.seed = lr_schedule, warmup, max_grad_norm, seed
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        optimization.refuse_both(type(self), vars(self))
        self.resume_state = checkpoint_state.ResumeState()
        self.register_state_dict_post_hook(checkpoint_state.drop_untrained)  # type: ignore[no-untyped-call]  # torch gives it no types
        excuse = checkpoint_state.excuse_untrained
        self.register_load_state_dict_post_hook(excuse)  # type: ignore[no-untyped-call]  # torch gives it no types
        self.updates = self.episodes = self.tokens = self.rollouts = 0
        self.max_skipped_updates, self.skipped_updates, self.skipped_in_a_row = max_skipped_updates, 0, 0
        self.steps, self._learning_rate_used = 0, learning_rate
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.reference: Reference | None = None
        self._evaluation = Meter()
        self.speed = TokenClock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle.

        Raises:
            SettingError: ``spawned-ranks``: the Trainer would send the module to processes that it spawns.
        """
        if get_spawning_popen() is not None:
            raise SettingError("spawned-ranks", str(refused_strategy("ddp_spawn")))
        state: dict[str, Any] = super().__getstate__()
        return state

    def __getattr__(self, name: str) -> Any:
        """Find parameters and submodules, and report an AttributeError raised inside a property.

        Without this method torch would report the property itself as missing.

        Raises:
            ContractError: ``failing-property``.
            LackingError: ``weights-not-loaded`` or ``no-generate``.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            kept = inspect.getattr_static(type(self), name, None)
            if name == "generate":
                raise LackingError(
                    "no-generate",
                    f"{type(self).__name__} has no generate: sample with answer(prompts, module.sampling), or export a "
                    "folder for transformers",
                ) from None
            if name in ("policy", "critic") and not self._models_loaded:
                raise LackingError(
                    "weights-not-loaded",
                    f"{type(self).__name__} has no {name} yet: a Trainer or configure_model() loads it",
                ) from None
            if not isinstance(kept, property | cached_property):
                raise
        try:
            return kept.__get__(self, type(self))
        except AttributeError as error:
            later = (
                "" if self._models_loaded else "; the models are not loaded yet: a Trainer or configure_model() does"
            )
            raise ContractError("failing-property", f"{type(self).__name__}.{name}: {error}{later}") from error

    @property
    def data_needs(self) -> DataNeeds:
        """Requirements of this module on the DataModule."""
        return DataNeeds(self.batch_type, self.data_columns, packed=self.packs_rows, predicts_prompts=self.has_policy)

    # -- models -------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run, loaded on first use."""
        if self._tokenizer is None:
            name = self.tokenizer_name or resolve_folder(self.init_from)
            trusted = trusts(name, self.load_settings.trust_remote_code)
            self._tokenizer = tokenization.load_tokenizer(
                name,
                self.chat_template,
                trusted,
                self.template_args,
                self.new_tokens or (),
                self.stop_tokens or (),
                self.stop_strings or (),
            )
        return self._tokenizer

    @property
    def model(self) -> nn.Module:
        """The model that this stage trains and exports."""
        raise undefined(self, "model")

    @property
    def scorer(self) -> Scorer | None:
        """The scorer of completions; None without a scorer."""
        return None

    @property
    def holds_reference(self) -> bool:
        """Whether the settings require a reference model."""
        return self.needs_reference

    @property
    def packs_rows(self) -> bool:
        """Whether sequences are packed into rows: ``pack_rows`` is set and all models support packed layouts."""
        if not self.pack_rows or not self._models_loaded:
            return False
        models = (*self.children(), *self.frozen_models())
        readers = [model.reads_trees for model in models if hasattr(model, "reads_trees")]
        return bool(readers) and all(readers)

    def lay_out(self, sequences: Sequences) -> Layout:
        """Arrange sequences into the model's input layout, on its device."""
        return lay_out(sequences, self.packs_rows).to(self.device)

    def slots_of(self, batch: Any) -> dict[str, Tensor]:
        """Return the slots of a batch (its additional tensors) on the module's device."""
        return {name: to_device(values, self.device) for name, values in batch.extras.items()}

    def load_models(self) -> None:
        """Load the models of the stage, once, and register the trained ones as submodules."""
        raise undefined(self, "load_models")

    def frozen_models(self) -> Sequence[nn.Module]:
        """Return the models that are not trained; they are not submodules, so checkpoints and optimizers omit them."""
        return () if self.reference is None else self.reference.models

    def configure_model(self) -> None:
        """Load the models at Lightning's first call, and shard them if there is a device mesh."""
        if not self._models_loaded:
            # Heads and adapters are initialised on the CPU: the accelerator would draw other random numbers.
            with torch.device("cpu"):
                self._load_once()
        if self.device_mesh is not None:
            self._shard(self.device_mesh)

    def _settle_precision(self) -> None:
        trains, fits = self.lora is not None, self.trainer.state.fn == "fit"
        self.load_settings = settled_precision(self.trainer, self.load_settings, trains, fits)

    def _load_once(self) -> None:
        if attached_trainer(self) is not None:  # some callbacks need the weights before `setup`
            self._settle_precision()
        self._settle_vocabulary()
        self.load_models()
        if attached_trainer(self) is not None and self.trainer.state.fn == "fit":
            self.train()  # transformers loads weights in eval mode, which Lightning's summary would warn about
        self._models_loaded = True
        self.resume_state.trained(self)  # a callback may freeze weights later, after training has changed them
        self.fingerprints = self.started_from()  # the folder may be gone when a checkpoint is written

    def _settle_vocabulary(self) -> None:
        """Set the number of embedding rows for new tokens, and the token rows that an adapter trains."""
        named = [*(self.lora.trained_tokens if self.lora else ()), *(self.new_tokens or ())]
        if self.new_tokens:
            self.load_settings = replace(self.load_settings, embeddings=len(self.tokenizer))
        if self.lora is not None and named:
            self.lora = replace(self.lora, trained_tokens=[*tokenization.token_ids(self.tokenizer, named)])

    def _readers(self, frozen: bool = True) -> list[CausalLM | ScalarModel]:
        """Return the models that take layouts: trained models, and frozen models if ``frozen``."""
        models = (*self.children(), *(self.frozen_models() if frozen else ()))
        return [model for model in models if isinstance(model, CausalLM | ScalarModel)]

    def _shard(self, mesh: DeviceMesh) -> None:
        for model in (*self._readers(frozen=False), *self.frozen_models()):
            shard(model, mesh, str(self.trainer.precision))
        # The strategy would expect frozen and tied weights in a checkpoint; `on_load_checkpoint` checks the names.
        self.strict_loading = False
        # Weights that are gathered for the first time in inference mode could not be trained.
        trainer, validation = self.trainer, self.trainer.fit_loop.epoch_loop.val_loop
        for loop in (validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False

    _models_loaded = False
    _stepped = 0
    _validated_at: int | None = None
    _weights_checked = False
    fingerprints: Mapping[str, str | None] = MappingProxyType({})
    """Fingerprints of the weights that training started from, computed when they were loaded."""

    def configure_callbacks(self) -> list[Callback]:
        """Refuse unsupported trainer settings, and load the weights if a callback freezes some in its ``setup``.

        This is the first hook that Lightning calls. Callbacks that a subclass returns are added to the trainer's.

        Raises:
            SettingError: a setting of the trainer, or a callback, does not work with this module.
            ContractError: ``hook-without-super``: a subclass's hook replaces this package's own.
        """
        trainer_checks.check_hooks(self)
        if self.trainer.state.fn == "fit":
            trainer_checks.check_trainer(self.trainer, self)
            if any(isinstance(callback, NEED_WEIGHTS) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
                self.configure_model()
        return []

    def setup(self, stage: str) -> None:
        """Check that data, strategy and precision fit this objective, before any weight is loaded.

        Raises:
            IncompatibleError: strategy, precision, devices and batch do not work together.
            ContractError: ``wrong-batch-type``: the DataModule yields another kind of batch.
            SettingError: trained weights would be in bf16 or quantized.
        """
        trainer_checks.check_length(self.trainer, stage)
        self._settle_precision()
        trainer_checks.check_evaluation_loaders(self.trainer)
        datamodule = attached_datamodule(self.trainer)
        check(self.trainer, self, datamodule, fits=stage == "fit")
        trainer_checks.check_datamodule(datamodule, self, stage)

    def on_fit_start(self) -> None:
        """Set train mode, and place the frozen models in eval mode."""
        self.train()
        self.place_frozen_models()
        if self.compile_layers:
            for model in self._readers():
                compile_layers(model)

    def on_train_start(self) -> None:
        """On resuming, apply changed optimizer settings, and restore the data position and random state."""
        trainer_checks.check_optimizers(self.trainer)
        trainer_checks.check_loader(self.trainer, self)
        trainer_checks.check_progress(self.trainer, self)
        state = self.resume_state
        if state.asked_before is not None and state.asked is not None:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            optimization.take_new_settings(optimizer, self.lr_schedulers(), state.asked, state.asked_before)
        state.asked_before = None
        state.begin(self, self.seed, self.updates)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Record the optimizer's step count."""
        self._stepped = self.trainer.global_step
        return None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Refuse a ``training_step`` that returned a loss without an optimizer step.

        Raises:
            ContractError: ``loss-without-update``.
        """
        trainer_checks.check_stepped(self.trainer, self, outputs, self._stepped)

    def on_fit_end(self) -> None:
        """Restore the random state that the caller had before the resumed run."""
        self.resume_state.end(self)

    def on_train_end(self) -> None:
        """Report if ``max_steps`` ended the run without validating the last weights."""
        ended = 0 < self.trainer.max_steps <= self.trainer.global_step
        if ended:
            self.trainer.should_stop = False  # set by `log_training`; a tuner's next trial must run
        if ended and self.trainer.enable_validation and self._validated_at != self.updates:
            rank_zero_info(
                f"max_steps={self.trainer.max_steps} ended the run after update {self.updates}, which was not "
                f"validated: check_val_every_n_epoch={self.trainer.check_val_every_n_epoch}"
            )

    def on_validation_start(self) -> None:
        """Place the frozen models, since validation may run without a fit."""
        untrained = not self.updates and self.trainer.ckpt_path is None
        if self.holds_reference and untrained and self.trainer.state.fn != "fit":
            rank_zero_warn(
                f"No checkpoint is given, so the policy is its own reference ({self.init_from}), and comparisons with "
                "the reference are meaningless: `rlhf validate RUN` takes a run's checkpoint and the reference of "
                "training."
            )
        self.refuse_nonfinite_weights()  # first: the self-check would only report that forward passes disagree
        self.place_frozen_models()

    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        """Refuse non-finite weights of a checkpoint, and check the model's forward pass."""
        self.refuse_nonfinite_weights()
        self._check_weights(frozen=False)

    def refuse_nonfinite_weights(self) -> None:
        """Refuse to evaluate a checkpoint with NaN or infinite weights; training has its own check.

        Raises:
            ModelError: a weight is not finite.
        """
        if self.trainer.state.fn != "fit":
            refuse_nonfinite_weights(self, "the checkpoint")

    def place_frozen_models(self) -> None:
        """Move the frozen models to the device, in eval mode."""
        for model in self.frozen_models():
            model.to(self.device).eval()
        self._check_data()
        self._check_weights()

    def _check_weights(self, frozen: bool = True) -> None:
        """Compare the models' forward passes on their real weights with the original implementation, once."""
        if not self.load_settings.self_check or self._weights_checked:
            return
        self._weights_checked = True
        for model in self._readers(frozen):
            check_weights(model, self.trainer.precision_plugin.forward_context())

    def _check_data(self) -> None:
        """Refuse, before the first step, rows with ids or lengths that exceed a model's embeddings or positions."""
        limits = [limits_of(model.model) for model in self._readers()]
        new = getattr(getattr(self, "sampling", None), "max_new_tokens", 0)
        datamodule = attached_datamodule(self.trainer)
        rules = getattr(datamodule, "multi_turn", None)
        new = new if rules is None or rules.max_tokens is None else rules.max_tokens
        for store in getattr(datamodule, "stores", {}).values():
            lengths = torch.from_numpy(store.row_lengths + np.where(store.has_completions, 0, new))
            largest = int(store.arrays["ids"].max(initial=0))
            sampled = 0 if store.has_completions.all() else new
            for limit in limits:
                check_rows(limit, self.tokenizer, largest, lengths, sampled)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Keep ragged batches on the CPU, where layouts are computed; only the layout moves to the device.

        Raises:
            ContractError: ``no-step``: the DataLoader yields something other than a `types.Step`.
        """
        trainer_checks.check_step(batch, self)
        if self.trainer.training:  # Lightning counted the last batch as one update; callbacks log next
            set_logged_step(self.trainer, self.updates)
        return batch

    # -- target of the objective --------------------------------------------------------------------------------------

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the policy that minimises this objective exactly, shape (prompts, completions); None if unknown.

        ``rlhf verify`` compares it with the module trained on an enumerable world. A stage without a policy returns
        its scores instead.
        """
        return None

    target_of: ClassVar[type[AlignmentModule] | None] = None
    """Shipped class that has the same target as this class, for ``rlhf verify``."""

    no_target: ClassVar[str] = ""
    """Reason why no target can be stated; ``rlhf verify`` shows it instead of a comparison."""

    means_it: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Checks of ``rlhf verify`` that this objective fails by design, each with its reason: {"clip": "the bound is on
    probabilities (Eq. 7)"}. They count as advice if the target is reached, or if ``no_target`` gives a reason."""

    contract: ClassVar[Callable[[Any], list[Any]] | None] = None
    """Custom checks of a family for ``rlhf verify``: a static method that takes a `Subject` and returns a list of
    `Check`. A class with its own batch type also defines ``expected_loss(world, shuffled)``, which returns the
    population loss as a function without arguments."""

    @property
    def value_at_reference(self) -> float | None:
        """Loss of each row when policy = reference; None if it depends on the row or is unknown."""
        return None

    # -- inputs of the objective --------------------------------------------------------------------------------------

    data_columns: ClassVar[tuple[str, ...]] = ()
    """Numeric data columns that the objective receives as slots, one value per row, pair, group or prompt. Rows without
    a number in such a column are dropped and counted."""

    needs_reference_logits: ClassVar[bool] = False
    """Whether ``token_statistics`` needs the reference's logits, which cost a forward pass."""

    hidden_layers: ClassVar[tuple[int, ...]] = ()
    """Layers whose hidden states the objective receives as slots ``hidden_N``, at the positions that predict each
    token, without gradient, shape (rows, length, hidden size); -1 is the last layer."""

    def token_statistics(
        self, policy_logits: Tensor, reference_logits: Tensor | None, targets: Tensor
    ) -> Mapping[str, Tensor]:
        """Return statistics of full next-token distributions; the objective finds them in ``extras`` by name.

        Called for a chunk of tokens at a time, and again in the backward pass, so that no tensor of shape (all tokens,
        vocabulary) is kept. Values may carry a gradient to the policy's logits; compute values without gradient last.
        Statistics of pairs are named ``chosen_NAME`` and ``rejected_NAME``. ``Rollout.extras`` has the values before
        the rollout's updates, ``PolicyLogprobs.extras`` the values during an update.

        Args:
            policy_logits: divided by the temperature, fp32 or wider, shape (tokens, vocabulary).
            reference_logits: the reference's logits, without gradient; None unless ``needs_reference_logits``.
            targets: id of each token, int64, shape (tokens,).

        Returns:
            Values by name, each of shape (tokens,).
        """
        return {}

    def statistics_asked(self, layout: Layout, temperature: float = 1.0) -> OverLogits | None:
        """Return the statistics that the policy's forward pass computes; None if there are none.

        With ``needs_reference_logits`` they include the reference's log-probabilities, as ``reference_logprobs``.
        """
        if type(self).token_statistics is AlignmentModule.token_statistics:
            return None
        reference = self.reference
        if not self.needs_reference_logits or reference is None:
            return OverLogits(layout, lambda logits, ids: self.token_statistics(logits, None, ids), (layout.targets,))

        def compared(logits: Tensor, ids: Tensor, hidden: Tensor) -> Mapping[str, Tensor]:
            theirs = reference.logits(hidden) / temperature
            found = self.token_statistics(logits, theirs, ids)
            return {**found, "reference_logprobs": token_logprobs(theirs, ids)}

        return OverLogits(layout, compared, (layout.targets, reference.predicting_states(layout)))

    def policy_outputs(self, layout: Layout, temperature: float = 1.0, **asked: Any) -> TokenOutputs:
        """Run the policy's forward pass and compute the objective's statistics."""
        statistics = self.statistics_asked(layout, temperature)
        outputs: TokenOutputs = self.model(
            layout, temperature, statistics=statistics, hidden_layers=self.hidden_layers, **asked
        )
        return outputs

    # -- optimization -------------------------------------------------------------------------------------------------

    @property
    def updates_per_step(self) -> int:
        """Number of optimizer steps per training step; on-policy modules make several per rollout."""
        return 1

    def total_updates(self) -> int:
        """Return the number of optimizer steps of the whole run, the length of the learning-rate schedule.

        Raises:
            SettingError: ``endless-schedule``: the run has no limit, and the schedule is not constant.
            StateError: ``no-trainer``: the module is not attached to a Trainer.
        """
        if attached_trainer(self) is None:
            raise StateError(
                "no-trainer",
                f"{type(self).__name__} has no Trainer yet, so the length of its learning-rate schedule is "
                "unknown: call trainer.fit(module, data), or module.make_optimizer() for the optimizer alone",
            )
        total = optimization.updates_of_run(self.trainer, self.updates_per_step)
        if total is None and self.lr_schedule != "constant":
            raise SettingError(
                "endless-schedule",
                f"lr_schedule={self.lr_schedule!r} needs an end: set trainer.max_epochs or max_steps",
            )
        return total or 1

    def configure_optimizers(self) -> Any:
        """Create the optimizer of the trainable weights and its scheduler; `update` steps both.

        Raises:
            SettingError: ``no-optimizer``: ``optimizer`` or ``lr_scheduler`` returns another type of object.
            StateError: ``another-optimizer``: the resumed checkpoint was trained with another optimizer class.
        """
        optimizer = self.make_optimizer()
        scheduler: LRScheduler | None = None
        if self.lr_scheduler is None:
            total = self.total_updates()
            factor = partial(optimization.schedule_factor, total=total, warmup=self.warmup, schedule=self.lr_schedule)
            scheduler = optimization.RateSchedule(optimizer, factor)
        else:
            scheduler = optimization.made(self.lr_scheduler, "lr_scheduler", optimizer, optimization.SCHEDULERS)
        asked, before = optimization.asked(optimizer, scheduler), self.resume_state.asked_before
        self.resume_state.asked = asked
        if before is not None:
            optimization.check_same_kinds(asked, before)
        if isinstance(scheduler, ReduceLROnPlateau):
            optimization.monitored(scheduler)  # refuses now rather than after the first epoch
        named = {"scheduler": scheduler, "interval": "step", "name": "learning_rate"}  # for LearningRateMonitor
        return {"optimizer": optimizer, "lr_scheduler": named}

    def make_optimizer(self) -> Optimizer:
        """Create the optimizer of the trainable weights: ``optimizer``, or by default AdamW.

        Raises:
            StateError: ``weights-not-loaded``.
        """
        checkpoint_state.refuse_unloaded(self)
        if self.optimizer is not None:
            mark_layers(layer for model in self._readers(frozen=False) for layer in decoder_layers(model))
            trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return optimization.made(self.optimizer, "optimizer", trainable, (Optimizer,))
        groups = optimization.parameter_groups(self, self.weight_decay)
        return torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=self.betas, eps=self.adam_eps, fused=self.fused_optimizer or None
        )

    def on_before_clip(self) -> None:
        """Read or change the gradients, summed over micro-batches and ranks, before clipping. Override point."""

    def update(
        self, losses: Sequence[Callable[[], Tensor]], count: float | Tensor, meter: Meter | None = None
    ) -> float:
        """Take one optimizer step, unless the loss or its gradient is non-finite on any rank.

        A skipped update changes neither weights nor moments. It still counts as an update, so that the schedule and all
        random numbers seeded by the update stay in place.

        Args:
            losses: one function per micro-batch of this rank that returns its summed loss; each is called once, and its
                graph is freed before the next call.
            count: rows or tokens of the step over all ranks and micro-batches; divides the summed loss.
            meter: metrics to read together with loss and norm: each read waits for the device.

        Returns:
            Norm of the gradient before clipping.

        Raises:
            DivergenceError: ``max_skipped_updates`` consecutive updates were skipped.
        """
        optimizer: Any = self.optimizers()
        call_before_zero_grad(self.trainer, optimizer.optimizer)
        optimizer.zero_grad()
        # Strategies average gradients over data-parallel ranks; the factor makes the average a sum.
        shares = data_ranks(self)[1]
        scale = shares / count.clamp_min(1) if isinstance(count, Tensor) else shares / max(count, 1)
        total = optimization.accumulate_gradients(self, losses, scale)
        self.on_before_clip()
        length = optimization.clip_by_global_norm(self.parameters(), self.max_grad_norm)
        self._learning_rate_used = optimizer.param_groups[0]["lr"]
        # Norm and loss are over all ranks, so all ranks decide alike. The loss can be non-finite while its gradient is
        # finite, for example if a mask removes the non-finite part.
        total_loss, norm = (Meter() if meter is None else meter).read(self.trainer.strategy, total, length)
        finite = math.isfinite(total_loss) and math.isfinite(norm)
        if not finite:
            optimizer.zero_grad()  # a step without gradients changes no weight but advances Lightning's counters
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        self.updates += 1
        self.skipped_updates += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.max_skipped_updates:
            raise optimization.divergence(self, self.max_skipped_updates, self.updates)
        return norm

    # -- logging ------------------------------------------------------------------------------------------------------

    def log_training(self, meter: Meter, **further: float) -> dict[str, Tensor]:
        """Log the metrics and counters of one training step at x = updates; every rank must call it.

        If ``training_step`` returns the result, it becomes ``outputs`` of ``on_train_batch_end``, with the loss as
        ``loss``.

        The metrics go directly to the loggers and ``trainer.callback_metrics``. ``self.log`` would take a sixth of a
        small model's training time, and its x-axis counts batches.
        """
        found = {**meter.means(self.trainer.strategy), **further}
        metrics = {name if "/" in name else f"train/{name}": value for name, value in found.items()}
        metrics["train/learning_rate"] = self._learning_rate_used
        metrics["train/skipped_updates"] = float(self.skipped_updates)
        metrics = deprecation.with_old_tags(metrics | self.progress())
        # ModelCheckpoint uses "step" in file names; without this it would use the step of the last validation.
        now = {**metrics, "step": float(self.updates)}
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in now.items()})
        set_logged_step(self.trainer, self.updates)
        if 0 < self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True  # so that the run ends with a validation, also within an epoch
        self.steps += 1
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.steps % max(every, 1) == 0:
            log_scalars(self.loggers, metrics | self.performance(), self.updates)
            self._log_over_work(metrics)
            if "train/loss" in metrics:  # losses of different objectives would flatten each other in one chart
                log_to_tensorboard(self.loggers, {f"loss/{type(self).__name__}": metrics["train/loss"]}, self.updates)
        loss = {"loss": torch.tensor(metrics["train/loss"])} if "train/loss" in metrics else {}
        return {**loss, **{name: torch.tensor(value) for name, value in metrics.items()}}

    def log(self, *args: Any, **settings: Any) -> None:
        """Log a value as Lightning does; epoch means weight each step by its number of rows."""
        trainer = attached_trainer(self)
        step = None if trainer is None else logged_batch(trainer)
        if settings.get("batch_size") is None and isinstance(step, Step):
            settings["batch_size"] = step.rows
        super().log(*args, **settings)

    def log_evaluation(self, prefix: str, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a whole validation or test pass under ``prefix``."""
        metrics = deprecation.with_old_tags({f"{prefix}/{name}": value for name, value in metrics.items()})
        # Lightning uses "step" as the x-axis; its default would count batches.
        self.log_dict({**metrics, "step": float(self.updates)}, on_step=False, on_epoch=True)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._log_over_work(metrics)

    def _log_over_work(self, metrics: Mapping[str, float]) -> None:
        """Log the headline metrics also against episodes and tokens, to compare objectives with different updates."""
        headline = {name: metrics[name] for name in ("train/loss", *self.headline_metrics) if name in metrics}
        for axis, position in (("episodes", self.episodes), ("tokens", self.tokens)):
            log_to_tensorboard(self.loggers, {f"vs_{axis}/{name}": headline[name] for name in headline}, position)

    def performance(self) -> dict[str, float]:
        """Return the speed since the last call as metrics. Only loggers get them, since they differ between runs."""
        peak = peak_flops(self.device, str(self.trainer.precision))
        share = self.flops_per_token / peak if peak else 0.0
        return self.speed.since_last(self.tokens, self.trainer.world_size, data_ranks(self)[1], share)

    @cached_property
    def flops_per_token(self) -> float:
        """FLOPs per token of an update in matrix products of policy and critics: 2 per weight in the forward pass, and
        4 in the backward pass (2 if it is frozen). Attention and lookups are left out; a tied LM head is counted.
        """
        looked_up, multiplied = (
            {id(part.weight) for part in self.modules() if isinstance(part, kind)} for kind in (nn.Embedding, nn.Linear)
        )
        left_out = looked_up - multiplied
        matrices = [one for one in self.parameters() if one.dim() > 1 and id(one) not in left_out]
        return float(sum(one.numel() * (6 if one.requires_grad else 4) for one in matrices))

    def progress(self) -> dict[str, float]:
        """Return the run's counters as metrics."""
        names = ("updates", "episodes", "tokens", "rollouts")
        return {f"progress/{name}": float(getattr(self, name)) for name in names}

    def test_step(self, step: Step[Any], batch_idx: int) -> None:
        """Evaluate a test batch in the same way as a validation batch."""
        self.validation_step(step, batch_idx)

    def on_validation_epoch_start(self) -> None:
        """Reset the evaluation metrics."""
        self._evaluation = Meter()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics, and step ReduceLROnPlateau with them."""
        metrics = self.evaluation_metrics()
        self._validated_at = self.updates
        self.log_evaluation("val", metrics)
        scheduler: Any = self.lr_schedulers() if self.trainer.state.fn == "fit" else None
        if isinstance(scheduler, ReduceLROnPlateau) and not self.trainer.sanity_checking:
            named = {f"val/{name}": value for name, value in metrics.items()}
            optimization.step_plateau(scheduler, {**self.trainer.callback_metrics, **named})

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self.log_evaluation("test", self.evaluation_metrics())

    def evaluation_metrics(self) -> dict[str, float]:
        """Return the metrics of the current evaluation."""
        return self._evaluation.means(self.trainer.strategy)

    # -- use ----------------------------------------------------------------------------------------------------------

    def answer(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSettings,
        seed: int = 0,
        first_episode: int = 0,
        multi_turn: MultiTurn | None = None,
        columns: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    ) -> Completions:
        """Sample one completion for each prompt from the policy, or one episode with an environment.

        Args:
            prompts: the prompts; with an environment, the first prompt of each episode.
            sampling: sampling settings.
            seed: seed of the sampling.
            first_episode: episode number of the first prompt.
            multi_turn: the environment; None samples completions.
            columns: data columns that the environment reads, each with one value per prompt.
        """
        encoded = tuple(torch.tensor(tokenization.encode_prompt(self.tokenizer, prompt)) for prompt in prompts)
        episodes = torch.arange(first_episode, first_episode + len(encoded))
        turns = None
        if multi_turn is not None:
            turns = Turns(multi_turn, self.tokenizer, prompts, columns, episodes.tolist())
        return self.complete(encoded, episodes, sampling, seed, turns)

    def complete(
        self,
        prompts: Sequence[Tensor],
        episodes: Tensor,
        sampling: SamplingSettings,
        seed: int,
        turns: Turns | None = None,
    ) -> Completions:
        """Sample a completion or an episode for each tokenized prompt from the policy, with the module's engine."""
        policy = self.model
        if not isinstance(policy, CausalLM):
            raise ContractError(
                "writes-no-completions", f"{type(self).__name__} scores completions; it does not generate them"
            )
        ends = tokenization.end_token_ids(self.tokenizer)
        return self.engine.sample(policy, prompts, episodes, sampling, seed, ends, turns=turns).decoded(self.tokenizer)

    sampling = SamplingSettings()
    """Sampling settings of ``predict``; on-policy modules set their own."""

    engine: SamplingEngine = SlotEngine()
    """The sampling engine; on-policy modules set their own."""

    def predict_step(self, step: Step[Any], batch_idx: int) -> list[dict[str, Any]]:
        """Sample a completion for each prompt; return one row per completion with its summed log-probability."""
        rows = []
        for batch in step.micro_batches:
            turns = turns_of(batch, self.tokenizer)
            found = self.complete(batch.prompts, batch.episodes, self.sampling, self.seed, turns)
            answers = zip(found.asked(batch.texts), found.texts, found.logprobs, found.finished.tolist(), strict=True)
            for prompt, text, logprobs, finished in answers:
                row = {"prompt": prompt, "completion": text}
                rows.append(row | {"logprob": sum(logprobs.tolist()), "finished": finished})
        return rows

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Refuse the call, since the module holds several models, each with its own name.

        Raises:
            ContractError: ``no-forward``.
        """
        raise ContractError(
            "no-forward",
            f"{type(self).__name__} holds several models and has no forward method: sample with .answer(prompts, "
            "sampling), or write a folder with .export(folder) and load it with transformers",
        )

    def half(self) -> Any:
        """Refuse to train weights in half precision.

        Raises:
            SettingError: ``half-weights``.
        """
        raise SettingError(
            "half-weights",
            f"the weights of {type(self).__name__} are trained in fp32, since small updates vanish in half precision: "
            "set Trainer(precision='bf16-mixed'), or dtype='bfloat16' with lora",
        )

    bfloat16 = half
    to_torchscript = to_onnx = to_tensorrt = forward  # Lightning's exports trace a forward pass

    def export(self, folder: str | Path) -> Path:
        """Write the trained model as a Hugging Face folder for the next stage."""
        raise undefined(self, "export")

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the trained model like `export`, under the method name of transformers."""
        return self.export(folder)

    def push_to_hub(self, repo_id: str, private: bool = True) -> str:
        """Export the trained model to the Hugging Face Hub (private by default) and return its address."""
        with tempfile.TemporaryDirectory() as folder:
            return push_folder(self.export(Path(folder) / "model"), repo_id, private)

    def backbone_source(self) -> str:
        """Return the folder or hub id of the backbone below this run's adapter."""
        name = resolve_folder(self.init_from)
        return load_base_of_adapter(name) if is_adapter(name) else name

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the weights of a checkpoint.

        Raises:
            StateError: ``checkpoint-does-not-fit``: a trainable weight is missing or has another shape, or a weight is
                unknown.
        """
        if strict:
            self.resume_state.check_names(self, set(state_dict))
        try:
            return super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:  # torch's error has a line for each weight
            first = " ".join("\n".join(str(error).splitlines()[1:2]).split())
            raise StateError(
                "checkpoint-does-not-fit", f"the checkpoint does not fit {type(self).__name__}: {first}"
            ) from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the module's state other than weights. An override calls this method and adds its own state."""
        checkpoint |= self.resume_state.saved(self)
        checkpoint["progress"] = {name: getattr(self, name) for name in checkpoint_state.COUNTERS}
        checkpoint["skipped_in_a_row"] = self.skipped_in_a_row
        checkpoint["started_from"] = dict(self.fingerprints)
        if self.reference is not None and self.reference.moved:
            checkpoint["reference"] = self.reference.moved_weights()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the module's state other than weights.

        Raises:
            StateError: the checkpoint belongs to another model, other frozen weights or another strategy, or holds only
                weights.
        """
        trainer = attached_trainer(self)
        # A sharded checkpoint stores the optimizer's state in its shards, not in this dictionary.
        if trainer is not None and trainer.state.fn == "fit" and "lr_schedulers" not in checkpoint:
            raise StateError(
                "weights-alone",
                "the checkpoint has only weights (save_weights_only), but resuming needs the optimizer's state: "
                f"load it with {type(self).__name__}.load_from_checkpoint(path) and fit without ckpt_path",
            )
        self.resume_state.restore(self, checkpoint)
        for name in checkpoint_state.COUNTERS:
            setattr(self, name, checkpoint["progress"][name])
        self.skipped_in_a_row = checkpoint["skipped_in_a_row"]
        frozen = self.lora is not None or self.reference is not None
        checkpoint_state.check_start(checkpoint["started_from"], self.fingerprints, self.init_from if frozen else None)
        if self.reference is not None and "reference" in checkpoint:
            self.reference.restore(checkpoint["reference"])

    def started_from(self) -> dict[str, str | None]:
        """Return fingerprints of the weights that training starts from: backbone and adapter."""
        name = resolve_folder(self.init_from)
        return {
            "backbone": fingerprint(self.backbone_source()),
            "adapter": fingerprint(name) if is_adapter(name) else None,
            "quantization": self.load_settings.quantization,
            "scorer": self.scorer.weights_hash() if isinstance(self.scorer, Scorer) else None,
        }


def prompt_form(module: AlignmentModule) -> str | None:
    """Return the form of the data's prompts, "plain text" or "messages"; None without a DataModule with examples."""
    trainer = attached_trainer(module)
    data: Any = None if trainer is None else attached_datamodule(trainer)
    shown = data.examples(1) if hasattr(data, "store") and hasattr(data, "examples") else []
    if not shown or shown[0][0] is None:
        return None
    return "plain text" if isinstance(shown[0][0], str) else "messages"
