"""Test that adapter forms, and models with their own logits, train on several ranks as on one."""

from pathlib import Path
from typing import Any

import pytest
import rank_cases
from rank_pool import RankPool
from tiny_models import tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from strategies.test_ranks import assert_equal

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("DPOModule", {"lora": {"r": 2, "dora": True}}),
    "rslora": ("GRPOModule", {"lora": {"r": 2, "rslora": True, "rank_pattern": {"down_proj": 4}}}),
    "rows": ("DPOModule", {"lora": {"r": 2, "trained_tokens": [7, 9, 30]}}),
    "rows-sampled": ("GRPOModule", {"lora": {"r": 2, "trained_tokens": [7, 9, 30]}}),
    "head": ("DPOModule", {"lora": {"r": 2, "modules_to_save": ["lm_head"]}}),
    "adapted-head": ("DPOModule", {"lora": {"r": 2, "targets": ["lm_head", "q_proj"]}}),
    "adapted-head-sampled": ("GRPOModule", {"lora": {"r": 2, "targets": ["lm_head", "q_proj"]}}),
    "own-forward": ("OwnForwardDPOModule", {}),
    "own-forward-sampled": ("OwnForwardPPOModule", {"critic": "shared"}),
}


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_an_encoder_scores_the_same_on_two_ranks(
    pool: RankPool, policy_folder: str, tmp_path: Path, strategy: str
) -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=120, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=1, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = {"scorer": str(tmp_path), "missing_eos_score": None, "updates": 2}
    expected = rank_cases.train("PPOModule", policy_folder, "auto", **settings)
    run = {"name": "PPOModule", "folder": policy_folder, "strategy": strategy, **settings}
    assert_equal(pool.run(2, "train", **run), expected, bound=1e-5)


@pytest.mark.parametrize(("strategy", "accumulation"), [("fsdp", 4), ("ddp", 1)])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_form_trains_identically_on_two_ranks(
    pool: RankPool, policy_folder: str, form: str, strategy: str, accumulation: int
) -> None:
    name, settings = FORMS[form]
    expected = rank_cases.train(name, policy_folder, "auto", **settings)
    run = {"name": name, "folder": policy_folder, "strategy": strategy, "accumulation": accumulation, **settings}
    assert_equal(pool.run(2, "train", **run), expected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_form_trains_identically_on_more_ranks(
    pool: RankPool, policy_folder: str, form: str, strategy: str, ranks: int
) -> None:
    name, settings = FORMS[form]
    expected = rank_cases.train(name, policy_folder, "auto", **settings)
    run = {"name": name, "folder": policy_folder, "strategy": strategy, **settings}
    assert_equal(pool.run(ranks, "train", **run), expected)
