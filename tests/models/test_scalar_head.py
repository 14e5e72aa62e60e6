import math

import pytest
import torch
from tiny_models import random_rows, sequences
from torch import nn
from transformers import AutoModelForSequenceClassification

from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import LoadSettings, load_reward_hf_model
from rlhf_lightning.models.scalar_head import ScalarModel, initialise_head

ROWS = random_rows(6, seed=8)


@pytest.fixture(scope="module")
def reward_model(reward_folder: str) -> ScalarModel:
    return ScalarModel(load_reward_hf_model(reward_folder, LoadSettings()))


def test_scores_equal_those_of_transformers(reward_model: ScalarModel, reward_folder: str) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32)
    with torch.no_grad():
        scores = reward_model(padded_layout(sequences(ROWS)))
        expected = [plain(torch.tensor([prompt + completion])).logits.item() for prompt, completion in ROWS]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert float(scores.std()) > 0.1


def test_values_equal_the_scores_of_prefixes(reward_model: ScalarModel) -> None:
    layout = padded_layout(sequences(ROWS)).with_end_state()
    with torch.no_grad():
        values = reward_model(layout, per_token=True)
        for row, (prompt, completion) in enumerate(ROWS):
            prefixes = [prompt + completion[:t] for t in range(len(completion) + 1)]
            expected = torch.cat([reward_model(padded_layout(sequences([([], ids)]))) for ids in prefixes])
            torch.testing.assert_close(values[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
            assert values[row, len(expected) :].abs().sum() == 0


def test_the_score_is_read_at_the_last_token_even_if_unsupervised(reward_model: ScalarModel) -> None:
    prompt, completion = ROWS[0]
    flags = [[True] * (len(completion) - 1) + [False]]
    with torch.no_grad():
        found = reward_model(padded_layout(sequences([(prompt, completion)], flags)))
        expected = reward_model(padded_layout(sequences([(prompt, completion)])))
    assert torch.equal(found, expected)


def test_a_new_head_has_variance_one_over_width_plus_one() -> None:
    head = nn.Linear(20_000, 1)
    initialise_head(head, 20_000, seed=4)
    weights = head.weight.detach().flatten()
    assert float(weights.std()) * math.sqrt(20_001) == pytest.approx(1.0, abs=0.02)
    assert float(weights.mean()) * math.sqrt(20_001) == pytest.approx(0.0, abs=0.03)
    assert float(head.bias) == 0.0
    again = nn.Linear(20_000, 1)
    initialise_head(again, 20_000, seed=4)
    assert torch.equal(head.weight, again.weight)
    initialise_head(again, 20_000, seed=5)
    assert not torch.equal(head.weight, again.weight)
