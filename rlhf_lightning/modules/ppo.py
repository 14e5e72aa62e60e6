"""Proximal policy optimisation with a learned critic and a KL penalty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.logprobs import masked_whiten
from rlhf_lightning.functional.policy_gradient import (
    clipped_value_loss,
    generalized_advantages,
    rewards_after_end,
    token_rewards,
    turn_discounts,
    value_clip_fraction,
)
from rlhf_lightning.loading import refuse_contradictions
from rlhf_lightning.models.causal_lm import TokenOutputs
from rlhf_lightning.models.layout import Layout, cut_sequences, select
from rlhf_lightning.models.loading import load_reward_hf_model, prepare_for_training
from rlhf_lightning.models.resolving import resolve_folder
from rlhf_lightning.models.roles import add_critic, belongs_to, load_policy, scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel, vocabulary_rows
from rlhf_lightning.models.sharding import most_passes
from rlhf_lightning.scoring.encoders import EncoderScorer
from rlhf_lightning.training.collector import Samples, last_learned
from rlhf_lightning.training.judgements import OBJECTIVE
from rlhf_lightning.training.meter import Meter, moments_over_ranks
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.training.returned_loss import loss_of
from rlhf_lightning.training.token_rewards import with_token_rewards
from rlhf_lightning.types import (
    Advantages,
    CriticValues,
    Loss,
    PromptBatch,
    Rollout,
)


class PPOModule(OnPolicyModule):
    r"""Proximal policy optimisation: maximise E[score] - kl_coef * KL(policy || reference) with a learned critic.

    Rewards are -kl_coef (log policy - log reference) per token, with the score added at the end token (Ziegler et al.,
    1909.08593, Eq. 2). Advantages are generalised advantage estimates (GAE), whitened over the rollout. The losses are
    the clipped policy and value losses (Schulman et al., 1707.06347, Eq. 7 and 9), means over the tokens of a
    minibatch. Settings and defaults follow Huang et al. (2403.17031). Before the first update the ratio is 1 and the
    policy loss is minus the mean advantage, which is 0 after whitening.

    Target: reference * exp(score / kl_coef), normalised. With discounting, whitened rewards or no KL penalty, it has no
    closed form.

    Args:
        critic: "separate" trains a separate network; "shared" a zero-initialised head on the policy's trunk, with one
            forward pass for both; "adapter" a separate adapter and head on the policy's backbone, which saves memory
            but not time.
        critic_init: folder that a separate or adapter critic starts from; null uses the reward model's folder if the
            scorer has one (for "adapter": only if it is on the policy's backbone), else the policy's.
        cost_critics: train one more critic for each of ``constraints`` (Dai et al., 2310.12773), A = (A_objective -
            sum lambda A_cost) / (1 + sum lambda); false trains one critic on the constrained score.
        value_coef: weight of the value loss.
        value_clip: maximum change of a value since the rollout in the clipped value loss; null does not clip.
        gamma: discount per token.
        turn_gamma: additional discount from one turn of the policy to the next, in an environment.
        lam: GAE lambda: 0 bootstraps fully from the critic, 1 uses Monte-Carlo returns.
        whiten_advantages: give advantages zero mean and unit variance over the rollout.
        whiten_rewards: give rewards unit variance over the rollout, keeping their mean.
        reward_slot: position of the score: "end" is the last completion token; "after_eos" is a separate position after
            it, whose hidden state includes the end token (Huang et al.).
        pretraining_coef: weight of the language-model loss on the data's ``pretraining`` text (PPO-ptx); InstructGPT
            uses 27.8.

    Raises:
        SettingError: a setting is outside its range, or two settings contradict each other.
    """

    learns_unscored = False
    paper = "Ziegler et al. 2019, arXiv 1909.08593"
    ranges = {
        "value_coef": "[0, inf)", "value_clip": "(0, inf)", "gamma": "[0, 1]", "turn_gamma": "[0, 1]", "lam": "[0, 1]",
        "pretraining_coef": "[0, inf)",
    }  # fmt: skip

    def __init__(
        self, scorer: Any, critic: Literal["separate", "adapter", "shared"] = "separate",
        critic_init: str | None = None, cost_critics: bool = False, value_coef: float = 0.1,
        value_clip: float | None = 0.2, gamma: float = 1.0, turn_gamma: float = 1.0, lam: float = 0.95,
        whiten_advantages: bool = True, whiten_rewards: bool = False,
        reward_slot: Literal["end", "after_eos"] = "end", pretraining_coef: float = 0.0,
        missing_eos_score: float | None = -1.0, learning_rate: float = 3e-6, adam_eps: float = 1e-5, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            scorer=scorer, missing_eos_score=missing_eos_score, learning_rate=learning_rate, adam_eps=adam_eps, **kwargs
        )  # fmt: skip
        if critic not in ("separate", "adapter", "shared"):
            raise SettingError("unknown-critic", f"critic is {critic!r}: it must be 'separate', 'adapter' or 'shared'")
        if critic == "adapter" and self.lora is None:
            raise SettingError(
                "adapter-critic-without-lora",
                "critic is 'adapter', but the policy trains every weight: set lora, or critic='separate'",
            )
        if reward_slot not in ("end", "after_eos"):
            raise SettingError(
                "unknown-reward-slot", f"reward_slot is {reward_slot!r}: it must be 'end' or 'after_eos'"
            )
        self.critic_kind, self.critic_init, self.reward_slot = critic, critic_init, reward_slot
        self.cost_critics = cost_critics
        self.value_coef, self.value_clip, self.lam = value_coef, value_clip, lam
        self.gamma, self.turn_gamma = gamma, turn_gamma
        self.whiten_advantages, self.whiten_rewards = whiten_advantages, whiten_rewards
        self.pretraining_coef = pretraining_coef
        self.critic: ScalarModel | None = None
        refuse_contradictions(_contradictions(self))

    def load_models(self) -> None:
        """Load policy and critic for training, and reference and scorer frozen."""
        self.policy = load_policy(
            self.init_from, self.load_settings, self.lora, value_head=self.critic_kind == "shared"
        )
        self.load_reference_and_scorer()
        if self.critic_kind == "separate":
            self.critic = self._load_critic(self.critic_init or self._start_from(self._objective_scorer()))
        for place, name in enumerate(self.score_rule.multipliers if self.cost_critics else ()):
            member = getattr(self.scorer, "scorers", {}).get(name)
            self.add_module(f"cost_critic_{place}", self._load_critic(self._start_from(member), -1.0))
        if self.critic_kind == "adapter":
            self.critic = self._add_critic()

    def _objective_scorer(self) -> Any:
        """Return the scorer; of a combined scorer with constraints, the only member whose score is not a cost."""
        costs, members = self.score_rule.multipliers, getattr(self.scorer, "scorers", {})
        rest = [member for name, member in members.items() if name not in costs]
        return rest[0] if costs and len(rest) == 1 else self.scorer

    def _add_critic(self) -> ScalarModel:
        """Add the critic to the policy's backbone; it starts from the reward model if that shares the backbone."""
        assert self.lora is not None
        start = None if self.critic_init is None else resolve_folder(self.critic_init)
        folder = getattr(self.scorer, "folder", None)
        if start is None and folder is not None and belongs_to(self.policy, folder):
            start = folder
        return add_critic(self.policy, self.lora, None if start == resolve_folder(self.init_from) else start)

    def _cost_critics(self) -> dict[str, ScalarModel]:
        """Return the critic of each constrained part; it predicts minus the part's cost."""
        names = self.score_rule.multipliers if self.cost_critics else ()
        return {name: getattr(self, f"cost_critic_{place}") for place, name in enumerate(names)}

    def _load_critic(self, start: str | None, sign: float = 1.0) -> ScalarModel:
        """Load a critic from a reward model with its head, or from the policy with a zero head.

        Args:
            start: the reward model's folder; None loads the policy.
            sign: -1 for a critic that predicts minus the model's score.
        """
        start = start or self.init_from
        own = start == self.init_from
        # All critic weights are trained, so they are in fp32 and not quantised, unlike the policy's backbone. The
        # critic must accept every id that the policy can sample, including padding rows of the vocabulary.
        rows = vocabulary_rows(self.policy.model)
        whole = replace(self.load_settings, quantization=None, dtype="float32", embeddings=rows)
        settings = whole if own else replace(whole, from_scratch=False)
        model = load_reward_hf_model(resolve_folder(start), settings)
        if own:
            torch.nn.init.zeros_(model.score.weight)
        with torch.no_grad():
            model.score.weight.mul_(sign)
        prepare_for_training(model, settings)
        critic = scalar_model(model, self.load_settings)
        critic.bias = sign * critic.bias
        return critic

    def _start_from(self, scorer: Any) -> str | None:
        """Return the reward model's folder if a critic can start from it: a decoder with the policy's tokenizer."""
        folder = getattr(scorer, "folder", None)
        tokenizer = getattr(getattr(scorer, "learned", scorer), "tokenizer", None)
        if folder is None or tokenizer is None:
            return folder
        if isinstance(scorer, EncoderScorer) or tokenizer.get_vocab() != self.tokenizer.get_vocab():
            rank_zero_info(
                f"the critic starts from {self.init_from}, since the reward model {folder} has another tokenizer than "
                "the policy"
            )
            return None
        return str(folder)

    @property
    def discounts(self) -> bool:
        return self.gamma != 1 or self.turn_gamma != 1

    # -- override points ----------------------------------------------------------------------------------------------

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        mask, kl = rollout.completion_mask, self.reward_kl(rollout)
        if self.reward_slot == "after_eos":
            rewards, mask = rewards_after_end(rollout.scores, kl, mask, self.kl_coef)
        else:
            rewards = token_rewards(rollout.scores, kl, mask, self.kl_coef)
        rewards = with_token_rewards(rewards, rollout)
        if not self.whiten_rewards:
            return rewards
        mask = mask & _scored(rollout)
        mean, variance = moments_over_ranks(self.trainer.strategy, rewards, mask)
        return masked_whiten(rewards, mask, shift_mean=False, mean=mean, var=variance)

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        """Return GAE advantages, whitened over the tokens of all ranks, and the critic's targets."""
        assert rollout.values is not None
        cost_returns: dict[str, Tensor] = {}
        if self.cost_critics:
            advantages, returns, cost_returns = self._constrained_estimates(rollout)
        else:
            advantages, returns = self._estimates(rollout, rewards, rollout.values)
        tokens = rollout.completion_mask & _scored(rollout)
        advantages = torch.where(tokens, advantages[:, : tokens.shape[1]], 0.0)  # no action is taken after the end
        if self.whiten_advantages:
            mean, variance = moments_over_ranks(self.trainer.strategy, advantages, tokens)
            advantages = masked_whiten(advantages, tokens, mean=mean, var=variance)
        return Advantages(advantages, returns, cost_returns=cost_returns)

    def _estimates(self, rollout: Rollout, rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return GAE advantages before whitening, and the critic's targets."""
        mask, lam = self._value_mask(rollout), self.gae_lambda(rollout)
        gamma = self.gamma if self.turn_gamma == 1 else turn_discounts(mask, self.turn_gamma, self.gamma)
        advantages, returns = generalized_advantages(rewards, values, mask, gamma, self.lam)
        if lam is not self.lam:
            advantages, _ = generalized_advantages(rewards, values, mask, gamma, lam)
        return advantages, returns

    def _constrained_estimates(self, rollout: Rollout) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the combined advantages of the objective's and the costs' critics, and the targets of each critic.

        Every reward includes the KL penalty, and the weighted mean includes it once. The rules for a missing end token
        and for long completions change only the objective's reward.
        """
        assert rollout.values is not None
        scores = self.scores_after_rules(rollout.parts[OBJECTIVE], rollout)
        rewards = self.shape_rewards(rollout._replace(scores=scores))
        total, returns = self._estimates(rollout, rewards, rollout.values)
        cost_returns: dict[str, Tensor] = {}
        for name, multiplier in self.score_rule.multipliers.items():
            rewards = self.shape_rewards(rollout._replace(scores=-rollout.parts[name], token_rewards=None))
            found, of_cost = self._estimates(rollout, rewards, rollout.extras[f"cost_values_{name}"])
            total, cost_returns[name] = total + multiplier.value * found, torch.nan_to_num(of_cost)
        return total / (1 + sum(one.value for one in self.score_rule.multipliers.values())), returns, cost_returns

    def gae_lambda(self, rollout: Rollout) -> float | Tensor:
        """Return the lambda of the policy's advantages, a number or shape (episodes,).

        The critic's targets always use ``lam``.
        """
        return self.lam

    def value_loss(self, values: CriticValues) -> Tensor | Loss:
        """Return the clipped value loss of each state, shape (rows, states)."""
        return clipped_value_loss(values.values, values.old_values, values.returns, self.value_clip)

    def score_slots(self, rollout: Rollout) -> Tensor | None:
        if self.whiten_rewards:  # spreads every score over all positions
            return None
        last = last_learned(rollout.completion_mask)
        return last + 1 if self.reward_slot == "after_eos" else last

    def reaches_kl_optimum(self) -> bool:
        return super().reaches_kl_optimum() and self.gamma == self.turn_gamma == 1 and not self.whiten_rewards

    # -- the critic ---------------------------------------------------------------------------------------------------

    def _value_layout(self, layout: Layout) -> Layout:
        """Return the states that have a value: before each token, and with ``after_eos`` also after the end token."""
        return layout.with_end_state() if self.reward_slot == "after_eos" else layout

    def _value_mask(self, rollout: Rollout) -> Tensor:
        """Return True on states that have a value, shape (episodes, states)."""
        mask = rollout.completion_mask
        if self.reward_slot == "end":
            return mask
        end = last_learned(mask).unsqueeze(-1) + 1
        return torch.nn.functional.pad(mask, (0, 1)).scatter(1, end, True)

    def policy_outputs(self, layout: Layout, temperature: float = 1.0, **asked: Any) -> TokenOutputs:
        """Run the policy's forward pass; with a shared trunk it also returns the critic's values."""
        shared = self._value_layout(layout) if self.critic is None else None
        return super().policy_outputs(layout, temperature, value_layout=shared, **asked)

    def _values(self, layout: Layout, shared_values: Tensor | None, critic: ScalarModel | None = None) -> Tensor:
        """Return a critic's values of the layout's states."""
        critic = critic or self.critic
        if critic is None:
            assert shared_values is not None
            return shared_values
        states = self._value_layout(layout)
        # Scores have the reward model's bias subtracted, so the same bias is subtracted from its critic's values.
        values: Tensor = critic(states, per_token=True)
        self.muted([values])
        return values - critic.bias * states.completion_mask

    def sampler_stats_suffice(self, samples: Samples) -> bool:
        """Whether sampling provided all statistics; a critic on a shared trunk still needs a forward pass."""
        return self.critic is not None and super().sampler_stats_suffice(samples)

    def forward_statistics(self, layout: Layout, with_policy: bool = True) -> dict[str, Tensor]:
        """Add the critic's values."""
        grids = super().forward_statistics(layout, with_policy)
        if self.critic is not None:
            grids["values"] = self._values(layout, None)
        for name, critic in self._cost_critics().items():
            grids[f"cost_values_{name}"] = self._values(layout, None, critic)
        return grids

    def critic_states(self, rollout: Rollout) -> Tensor:
        return self._value_mask(rollout) & _scored(rollout)

    def critic_loss(self, layout: Layout, rows: Tensor, rollout: Rollout, advantages: Advantages, outputs: Any) -> Loss:
        states = self._value_layout(layout)
        mask, count = states.completion_mask & _scored(rollout)[rows], states.completion_mask.shape[1]
        assert rollout.values is not None and advantages.returns is not None
        critics = [("", self._values(layout, outputs.values), rollout.values, advantages.returns)]
        for name, critic in self._cost_critics().items():
            known = rollout.extras[f"cost_values_{name}"], advantages.cost_returns[name]
            critics.append((f"_{name}", self._values(layout, None, critic), *known))
        total, metrics = torch.zeros_like(critics[0][1]), {}
        for suffix, now, old, returns in critics:
            values = CriticValues(now, old[rows, :count], returns[rows, :count], mask)
            loss = loss_of(self.value_loss, values, like=mask)
            masked = torch.where(mask, loss.values, 0.0)
            total, metrics[f"value_loss{suffix}"] = total + masked, masked
            if self.value_clip is not None:
                bounds = (values.old_values, values.returns, self.value_clip)
                metrics[f"value_clip_fraction{suffix}"] = value_clip_fraction(now.detach(), *bounds)
        return Loss(self.value_coef * total, metrics)

    def measure_rollout(self, rollout: Rollout, meter: Meter) -> None:
        """Record the critic's values."""
        super().measure_rollout(rollout, meter)
        if rollout.values is not None:
            meter.add("rollout/value", rollout.values, self._value_mask(rollout))

    def measure_advantages(self, rollout: Rollout, advantages: Advantages, meter: Meter) -> None:
        """Record the explained variance of the returns: 1 is perfect, 0 is as good as their mean."""
        mask = self._value_mask(rollout) & _scored(rollout)
        assert rollout.values is not None and advantages.returns is not None
        mean, _ = moments_over_ranks(self.trainer.strategy, advantages.returns, mask)
        missed = torch.where(mask, advantages.returns - rollout.values, 0.0).square().sum()
        total = torch.where(mask, advantages.returns - mean, 0.0).square().sum()
        meter.add_ratio("rollout/explained_variance", total - missed, total)

    # -- pretraining mix ----------------------------------------------------------------------------------------------

    def further_losses(self, batch: PromptBatch, count: float | Tensor, meter: Meter) -> list[Callable[[], Tensor]]:
        """Return the language-model loss on the pretraining text: its mean over tokens, times ``pretraining_coef``."""
        if not self.pretraining_coef or batch.pretraining is None:
            return []
        sequences = batch.pretraining.sequences
        tokens = float(self.sum_over_ranks(torch.tensor(sum(int(mask.sum()) for mask in sequences.supervised))))
        scale = self.pretraining_coef * count / max(tokens, 1.0)

        def loss(rows: list[int]) -> Tensor:
            layout = self.lay_out(select(sequences, rows))
            outputs: TokenOutputs = self.policy(layout)
            negative = -outputs.logprobs
            meter.add("pretraining_loss", negative, layout.completion_mask)
            return torch.as_tensor(scale, dtype=negative.dtype) * negative.sum()

        cuts = cut_sequences(sequences, None, self.limits)
        cuts += [[]] * (max(most_passes(self.policy, len(cuts)), 1) - len(cuts))  # a rank may have no text
        return [partial(loss, cut) for cut in cuts]


def _contradictions(m: PPOModule) -> dict[str, tuple[bool, str]]:
    """Return, by error code, whether two settings contradict each other, and the message."""
    return {
        "cost-critics": (
            m.cost_critics and (not m.score_rule.multipliers or m.critic_kind != "separate"),
            "cost_critics trains a critic for each constrained score part: name a part in constraints, and set critic "
            "separate",
        ),
        "whitened-costs": (
            m.cost_critics and (m.whiten_rewards or m.score_rule.normalizes),
            "cost_critics weights objective and costs after computing their advantages: set whiten_rewards false and "
            "parts.normalize sum_then_group",
        ),
    }


def _scored(rollout: Rollout) -> Tensor:
    """Return a mask of completions that have a score, shape (episodes, 1)."""
    return ~rollout.scores.isnan().unsqueeze(-1)
