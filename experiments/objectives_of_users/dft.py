"""Dynamic fine-tuning: `rlhf fit --config experiments/objectives_of_users/dft.yaml`."""

from torch import Tensor

from rlhf_lightning.modules import SFTModule
from rlhf_lightning.types import TokenLogprobs


class DFTModule(SFTModule):
    """Supervised fine-tuning with each token weighted by its probability: loss = -sg(p) log p (Wu et al., 2508.05629).

    SFT's gradient is a policy gradient with reward 1/p; this loss has reward 1.
    """

    paper = "Wu et al. 2025, arXiv 2508.05629"
    no_target = "no closed form: the weights are the policy's own probabilities"

    def token_loss(self, logprobs: TokenLogprobs) -> Tensor:
        """Return one loss per token, shape (rows, length)."""
        return logprobs.logprobs.detach().exp() * super().token_loss(logprobs)
