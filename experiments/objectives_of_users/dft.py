"""Dynamic fine-tuning: `rlhf fit --config experiments/objectives_of_users/dft.yaml`."""

from torch import Tensor

from rlhf_lightning.modules import SFTModule
from rlhf_lightning.types import TokenLogprobs


class DFTModule(SFTModule):
    r"""Supervised fine-tuning that weights each token by its probability: loss = -sg(p) log p (Wu et al., 2508.05629).

    Where SFT's gradient is that of a policy gradient with the reward 1/p, this one's reward is 1.
    """

    paper = "Wu et al. 2025, arXiv 2508.05629"
    no_target = "no closed form: the weights are the policy's own probabilities"

    def token_loss(self, logprobs: TokenLogprobs) -> Tensor:
        """Return one loss per token, shape (rows, length)."""
        return logprobs.logprobs.detach().exp() * super().token_loss(logprobs)
