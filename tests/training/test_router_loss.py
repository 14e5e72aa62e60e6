"""The load-balancing loss of mixtures of experts."""

from pathlib import Path

import pytest
import torch
from conftest import refused
from models.families import build
from tiny_models import EOS, VOCABULARY, demonstration_step, fit, preference_step, save_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlhf_lightning.functional.logprobs import load_balancing_loss
from rlhf_lightning.modules import BCOPairModule, GRPOModule, SFTModule


def mixture(folder: Path) -> str:
    model = build("qwen3_moe", AutoModelForCausalLM, vocab_size=VOCABULARY, eos_token_id=EOS, bos_token_id=2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_router_loss_equals_transformers() -> None:
    logits = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(11) < 8
    expected = load_balancing_loss_func((logits[:8],), 4, 2)
    torch.testing.assert_close(load_balancing_loss(logits, 2, mask), expected)
    torch.testing.assert_close(load_balancing_loss(torch.zeros(6, 4), 2), torch.tensor(2.0))  # equal probabilities
    one_sided = torch.tensor([[9.0, 0.0, 0.0, 0.0]]).repeat(5, 1).requires_grad_()
    load_balancing_loss(one_sided, 1).backward()
    assert float(load_balancing_loss(one_sided, 1)) > 3.9 and bool((one_sided.grad[:, 0] > 0).all())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_router_loss_is_logged_and_balances_the_router(tmp_path: Path, micro_batches: int) -> None:
    rows = [([5, 6, 7], [8, 9, 10, EOS]), ([11], [12, EOS])]
    found = {}
    for coef in (0.0, 1.0):
        module = SFTModule(
            init_from=mixture(tmp_path / str(coef)), router_aux_loss_coef=coef, learning_rate=0.02, warmup=0,
            lr_schedule="constant", max_grad_norm=None,
        )  # fmt: skip
        step = demonstration_step(rows, 1 if micro_batches == 2 else None)
        trainer = fit(module, [step] * 12)
        found[coef] = module, trainer
    module, _ = found[1.0]
    ids = torch.tensor([rows[0][0] + rows[0][1]])
    balance = []
    for trained, _ in found.values():
        with torch.no_grad():
            logits = trained.policy.model(ids, output_router_logits=True).router_logits
            balance.append(float(torch.stack([load_balancing_loss(one, 2) for one in logits]).mean()))
    assert balance[1] < balance[0]
    assert module.trainer.callback_metrics["train/router_aux_loss"] > 0


def test_router_loss_works_with_coupled_losses(tmp_path: Path) -> None:
    module = BCOPairModule(init_from=mixture(tmp_path), router_aux_loss_coef=1.0)
    fit(module, [preference_step([([5, 6], [7, EOS], [8, EOS]), ([9], [10, EOS], [11, EOS])], 1)])
    assert module.trainer.callback_metrics["train/router_aux_loss"] > 0


def test_router_loss_is_refused_where_unsupported(tmp_path: Path) -> None:
    module = SFTModule(init_from=save_policy(tmp_path / "dense"), router_aux_loss_coef=0.01)
    with refused("no-router", "records no router logits; set router_aux_loss_coef to 0"):
        fit(module, [demonstration_step([([5, 6], [7, EOS])])])
    with refused("router-loss-in-rl", "set it to 0"):
        GRPOModule(init_from=str(tmp_path / "dense"), scorer="length", router_aux_loss_coef=0.01)
