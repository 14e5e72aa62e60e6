"""Mixed preference optimisation: `rlhf fit --config experiments/objectives_of_users/mpo.yaml`."""

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.modules import BCOPairModule
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import Loss, PreferenceLogprobs


class MPOModule(BCOPairModule):
    """Mixed preference optimisation: a weighted sum of preference, quality and generation losses on the same pairs.

    loss = preference_weight DPO + quality_weight BCO + generation_weight NLL of the chosen completion per token (Wang
    et al., 2411.10442, Eq. 1 to 6). BCO's reference point is the mean implicit reward of the step.

    Args:
        preference_weight: weight of DPO.
        quality_weight: weight of BCO.
        generation_weight: weight of the negative log-likelihood.
    """

    paper = "Wang et al. 2024, arXiv 2411.10442"
    no_target = "no closed form: three losses are mixed"
    ranges = {name: "[0, inf)" for name in ("preference_weight", "quality_weight", "generation_weight")}

    def __init__(
        self,
        beta: float = 0.1,
        preference_weight: float = 0.8,
        quality_weight: float = 0.2,
        generation_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(beta=beta, **kwargs)
        self.mixture = (preference_weight, quality_weight, generation_weight)

    def pair_loss(self, pair: PreferenceLogprobs) -> Loss | Tensor:
        """Return one loss per pair, shape (pairs,), and its three parts as metrics."""
        parts = {
            "preference_loss": -logsigmoid(self.reward_margin(pair)),
            "quality_loss": as_loss(super().pair_loss(pair)).values,
            "generation_loss": -pair.chosen_sequence_logprobs / pair.chosen_lengths,
        }
        values = [weight * part for weight, part in zip(self.mixture, parts.values(), strict=True)]
        return Loss(values[0] + values[1] + values[2], parts)
