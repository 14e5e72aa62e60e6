"""Per-token statistics: equal to those of dense distributions for every cut, without all logits at once."""

from typing import Any

import pytest
import torch
from tiny_models import (
    VOCABULARY,
    fit,
    gradients_of_step,
    preference_step,
    prompt_step,
    random_pairs,
    random_rows,
    sequences,
    within,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from rlhf_lightning import modules
from rlhf_lightning.functional import logprobs as logprobs_module
from rlhf_lightning.models.frozen import ReferenceCache
from rlhf_lightning.models.layout import lay_out
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.types import PolicyLogprobs

LORA = LoraSettings(r=2)


class KLModule(modules.DPOModule):
    needs_reference_logits = True

    def token_statistics(self, policy_logits: Tensor, reference_logits: Any, targets: Tensor) -> dict[str, Tensor]:
        policy, reference = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
        return {"kl": (policy.exp() * (policy - reference)).sum(-1)}

    def preference_loss(self, logprobs: Any) -> Tensor:
        return logprobs.extras["chosen_kl"].sum(-1) - 0.5 * logprobs.extras["rejected_kl"].sum(-1) - logprobs.margin


class SeenGRPOModule(modules.GRPOModule):
    hidden_layers = (0, -1)
    needs_reference_logits = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[PolicyLogprobs] = []
        self.kept: list[Any] = []

    def token_statistics(self, policy_logits: Tensor, reference_logits: Any, targets: Tensor) -> dict[str, Tensor]:
        places = (range(len(targets)), targets)
        return {"own": policy_logits.log_softmax(-1)[places], "theirs": reference_logits.log_softmax(-1)[places]}

    def advantages(self, rollout: Any, rewards: Tensor) -> Any:
        self.kept.append(rollout)
        return super().advantages(rollout, rewards)

    def policy_loss(self, logprobs: PolicyLogprobs) -> Any:
        self.seen.append(logprobs)
        return super().policy_loss(logprobs)


class Widest(TorchDispatchMode):
    """Records the maximum number of rows of any tensor of vocabulary width."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.shape[:-1].numel())
        return result


@pytest.mark.parametrize("lora", [None, LORA])
def test_no_pass_materialises_all_logits(policy_folder: str, monkeypatch: Any, lora: Any) -> None:
    monkeypatch.setattr(logprobs_module, "CHUNK_LOGITS", 3 * VOCABULARY)
    monkeypatch.setattr(logprobs_module, "KEPT_LOGITS", 0)
    step, widest = preference_step(random_pairs(6, seed=3)), Widest()
    module = KLModule(init_from=policy_folder, lora=lora)
    loss_sum = module.loss_sum

    def watched(*given: Any) -> Tensor:
        with widest:
            return loss_sum(*given)

    backward = module.manual_backward

    def watched_backward(loss: Tensor, *given: Any, **named: Any) -> None:
        with widest:
            backward(loss, *given, **named)

    module.loss_sum, module.manual_backward = watched, watched_backward  # type: ignore[method-assign]
    fit(module, [step])
    # A gradient of the head or of the embeddings has a row for each of the 32 dimensions, not one for each token.
    assert 3 <= widest.rows <= 3 + 32 < step.tokens


def test_the_reference_cache_is_not_used(policy_folder: str, monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))

    def read(*_: Any) -> None:
        raise AssertionError("the cache was asked")

    monkeypatch.setattr(ReferenceCache, "read", read)
    fit(KLModule(init_from=policy_folder), [preference_step(random_pairs(2))])
    with pytest.raises(AssertionError, match="the cache was asked"):
        fit(modules.DPOModule(init_from=policy_folder), [preference_step(random_pairs(2))])


def test_an_adapter_is_compared_with_its_backbone(policy_folder: str) -> None:
    """At the start both are equal: the KL and its gradient are 0, so the loss depends only on the margin."""
    step = preference_step(random_pairs(4, seed=9))
    found = gradients_of_step(KLModule(init_from=policy_folder, lora=LORA, max_grad_norm=None), step)

    class Margin(modules.DPOModule):
        def preference_loss(self, logprobs: Any) -> Tensor:
            return -logprobs.margin

    plain = gradients_of_step(Margin(init_from=policy_folder, lora=LORA, max_grad_norm=None), step)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def words(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("lora", [None, LORA])
def test_rollouts_and_updates_get_statistics_at_the_temperature(
    policy_folder: str, micro: int | None, lora: Any
) -> None:
    prompts = [prompt for prompt, _ in random_rows(3, seed=4) for _ in range(2)]
    step = prompt_step(prompts)
    batch = step.micro_batches[0]
    slots = {"budget": torch.arange(6.0)}
    grouped = batch._replace(group=torch.arange(6) // 2, extras=slots)
    (step,) = within([step._replace(micro_batches=(grouped,))], micro)
    module = SeenGRPOModule(
        init_from=policy_folder, scorer=words, temperature=0.7, max_new_tokens=5, learning_rate=1e-2, ppo_epochs=2,
        lr_schedule="constant", kl_coef=0.1, reuse_behaviour_logprobs=True, lora=lora,
    )  # fmt: skip
    fit(module, [step])
    (rollout,) = module.kept
    mask = rollout.completion_mask
    torch.testing.assert_close(rollout.extras["own"], rollout.old_logprobs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rollout.extras["theirs"], rollout.reference_logprobs, atol=1e-5, rtol=1e-4)
    assert rollout.extras["budget"].tolist() == slots["budget"].tolist()
    assert rollout.extras["hidden_0"].shape[:2] == mask.shape
    budgets = []
    for seen in module.seen:
        torch.testing.assert_close(seen.extras["own"], seen.logprobs, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen.extras["theirs"], seen.reference_logprobs, atol=1e-5, rtol=1e-4)
        assert seen.extras["own"].requires_grad and not seen.extras["theirs"].requires_grad
        assert not seen.extras["hidden_-1"].requires_grad
        budgets += seen.extras["budget"].tolist()
    assert sorted(budgets) == sorted(2 * slots["budget"].tolist())


@pytest.mark.parametrize("pack", [False, True])
def test_hidden_states_are_at_the_predicting_positions(policy_folder: str, pack: bool) -> None:
    rows = random_rows(3, seed=6)
    policy = load_policy(policy_folder)
    with torch.no_grad():
        layout = lay_out(sequences(rows), pack)
        found = policy(layout, hidden_layers=(0, -1)).extras
        plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
        for row, (prompt, completion) in enumerate(rows):
            states = plain(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states
            span = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
            kept = found["hidden_0"][row, : len(completion)]
            torch.testing.assert_close(kept, states[1][0, span], rtol=1e-4, atol=1e-5)
            assert not found["hidden_0"][row, len(completion) :].any()
        assert found["hidden_-1"].shape == found["hidden_0"].shape
