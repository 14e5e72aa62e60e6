"""Token-level DPO: `rlhf fit --config experiments/objectives_of_users/tdpo2.yaml`."""

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.modules import DPOModule
from rlhf_lightning.types import PreferenceLogprobs


class TDPO2Module(DPOModule):
    """DPO with an additional penalty on the difference of the two completions' sequential KL (Zeng et al., 2404.11999,
    Eq. 17).

    loss = -log sigmoid(beta (d - alpha (K_l - sg(K_w)))), where d is the margin of log-ratios and K the sum over a
    completion's tokens of KL(reference||policy) over the vocabulary. Policy = reference gives log 2.

    Args:
        alpha: weight of the KL difference.
    """

    paper = "Zeng et al. 2024, arXiv 2404.11999"
    no_target = "no closed form: the margin holds a detached KL of each completion"
    needs_reference_logits = True

    def __init__(self, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha

    def token_statistics(
        self, policy_logits: Tensor, reference_logits: Tensor | None, targets: Tensor
    ) -> dict[str, Tensor]:
        """Return KL(reference || policy) of each token's distribution, nats."""
        assert reference_logits is not None
        policy, reference = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
        return {"kl": (reference.exp() * (reference - policy)).sum(-1)}

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor:
        """Return one loss per pair, shape (pairs,)."""
        won, lost = (pair.extras[f"{side}_kl"].sum(-1) for side in ("chosen", "rejected"))
        return -logsigmoid(self.beta * (pair.margin - self.alpha * (lost - won.detach())))
