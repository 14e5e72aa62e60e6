"""High-entropy tokens as a user's file: `rlhf fit --config high_entropy_tokens.yaml --model.scorer ...`."""

from typing import Any

from torch import Tensor

from rlhf_lightning.modules import DAPOModule
from rlhf_lightning.types import Loss, PolicyLogprobs


class HighEntropyModule(DAPOModule):
    """DAPO restricted to the tokens of highest entropy, a fixed fraction of the minibatch.

    loss = mean over tokens of 1[H_t >= tau] max(-A ratio, -A clip(ratio)), tau the (1 - share) quantile of the entropy
    at the rollout's start over the trained tokens of the minibatch, on all ranks (Wang et al., 2506.01939, Eq. 5).

    Target: no closed form: the selection depends on the minibatch.

    Args:
        share: fraction of the minibatch's tokens that has a loss.
    """

    paper = "Wang et al. 2025, arXiv 2506.01939"
    no_target = "no closed form: which tokens are learned from depends on the minibatch"
    needs_minibatch = True

    def __init__(self, scorer: Any, share: float = 0.2, **kwargs: Any) -> None:
        super().__init__(scorer=scorer, **kwargs)
        self.share = share

    def objective(self, ratio: Tensor, logprobs: PolicyLogprobs) -> Loss:
        """Return the loss of each token, shape (rows, length); 0 where its entropy is low."""
        loss, batch = super().objective(ratio, logprobs), logprobs.minibatch
        assert isinstance(loss, Loss) and batch is not None
        entropy = batch.entropy[batch.learned]
        threshold = entropy.topk(max(round(self.share * len(entropy)), 1)).values[-1]
        kept = (batch.entropy[batch.rows, : ratio.shape[1]] >= threshold).type_as(ratio)
        metrics = {name: values * kept for name, values in loss.metrics.items()}
        return Loss(loss.values * kept, {**metrics, "high_entropy": kept})
