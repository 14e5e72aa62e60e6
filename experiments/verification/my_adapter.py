"""Losses of one's own as adapters: `rlhf verify --foreign experiments/verification/my_adapter.py:MyDPO --beta 0.3`."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlhf_lightning.modules import DPOModule, HingeModule
from rlhf_lightning.types import PreferenceLogprobs
from rlhf_lightning.verification.foreign import compared_with


def their_loss(won: Tensor, lost: Tensor, won_reference: Tensor, lost_reference: Tensor, beta: float) -> Tensor:
    """Stand for a function of your package: sums of log-probabilities in, the mean loss of the batch out."""
    return -logsigmoid(beta * (won - lost - won_reference + lost_reference)).mean()


@compared_with({"sigmoid": DPOModule, "hinge": HingeModule}, by="loss_type")
def MyDPO(pairs: PreferenceLogprobs, loss_type: Literal["sigmoid", "hinge"] = "sigmoid", beta: float = 0.1) -> Tensor:
    """Call the function with what the test gives."""
    if loss_type == "hinge":
        return relu(1 - beta * pairs.margin)  # one loss per pair is as good as their mean
    assert pairs.reference_chosen_logprobs is not None and pairs.reference_rejected_logprobs is not None
    return their_loss(
        pairs.chosen_sequence_logprobs,
        pairs.rejected_sequence_logprobs,
        pairs.reference_chosen_logprobs.sum(-1),
        pairs.reference_rejected_logprobs.sum(-1),
        beta,
    )
