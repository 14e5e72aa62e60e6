from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PAD, random_rows, save_reward_model, sequences, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from rlhf_lightning.models.export import export_reward_model
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import LoadSettings, load_reward_hf_model
from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.scoring import LearnedScorer

PROMPTS = ["w20 w21 w22", [{"role": "user", "content": "w23 w24"}], "w25"]
COMPLETIONS = ["w30 w31", "w32", "w33 w34 w35 w36"]
IDS = [([20, 21, 22], [30, 31, 3]), ([2, 4, 23, 24, 5], [32, 3]), ([25], [33, 34, 35, 36, 3])]


@pytest.fixture(scope="module")
def biased_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("biased") / "reward", score_bias=0.5)


@pytest.fixture(scope="module")
def scorer(biased_folder: str) -> LearnedScorer:
    return LearnedScorer(biased_folder)


def test_text_scores_equal_transformers_minus_the_bias(scorer: LearnedScorer, biased_folder: str) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(biased_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.tensor([plain(torch.tensor([p + c])).logits.item() - 0.5 for p, c in IDS])
    scores = scorer(PROMPTS, COMPLETIONS, answer=["unused"] * 3)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert float(expected.std()) > 0.1


def test_text_and_ids_give_the_same_scores(scorer: LearnedScorer) -> None:
    by_ids = scorer.score_sequences(sequences(IDS))
    torch.testing.assert_close(scorer(PROMPTS, COMPLETIONS), by_ids, atol=1e-6, rtol=0)


def test_scores_do_not_depend_on_micro_batches(scorer: LearnedScorer, biased_folder: str) -> None:
    batch = sequences(random_rows(9, seed=5))
    expected = scorer.score_sequences(batch)
    for limit in (1, 20, 45):
        cut = LearnedScorer(biased_folder, max_tokens=limit).score_sequences(batch)
        torch.testing.assert_close(cut, expected, atol=1e-5, rtol=0)


def test_ids_are_reused_only_with_an_identical_tokenizer(scorer: LearnedScorer) -> None:
    assert scorer.shares_tokenizer(tiny_tokenizer())
    other_template = tiny_tokenizer()
    other_template.chat_template = "{{ messages[0]['content'] }}"
    assert not scorer.shares_tokenizer(other_template)
    more_words = tiny_tokenizer()
    more_words.add_tokens(["w200"])
    assert not scorer.shares_tokenizer(more_words)


def test_the_reward_model_is_frozen_and_in_eval_mode(scorer: LearnedScorer) -> None:
    assert not scorer.model.training
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
    assert scorer.to(torch.device("cpu")) is scorer


def test_an_exported_adapter_scores_as_the_trained_model(policy_folder: str, tmp_path: Path) -> None:
    hf = add_lora(load_reward_hf_model(policy_folder, LoadSettings(), pad_token_id=PAD), LoraSettings(r=4), "SEQ_CLS")
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(3), std=0.1)
    trained: Any = ScalarModel(hf, bias=0.25)
    folder = export_reward_model(trained, tiny_tokenizer(), tmp_path / "adapter", policy_folder)
    loaded = LearnedScorer(str(folder))
    batch = sequences(IDS)
    with torch.no_grad():
        expected = trained(padded_layout(batch)) - 0.25
    torch.testing.assert_close(loaded.score_sequences(batch), expected, atol=1e-4, rtol=1e-4)


def test_an_empty_answer_is_scored_at_its_end_token(scorer: LearnedScorer) -> None:
    scores = scorer(["w20 w21"], [""])
    torch.testing.assert_close(scores, scorer.score_sequences(sequences([([20, 21], [3])])))
