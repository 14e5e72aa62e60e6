"""Test properties of the exact sampler correction table that hold in every world."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments" / "engines"))

import corrections


@pytest.fixture(scope="module")
def scenes():
    return corrections.scenes(prompts=2, tokens=3, length=3)


def of(scene, name):
    return scene.moments(corrections.CORRECTIONS[name](scene.drawn))


def test_only_sequence_level_weights_are_unbiased(scenes):
    for name, scene in scenes.items():
        assert (of(scene, "sequence, no bound").bias < 1e-9) == (name != "top_p 0.9")
    assert of(scenes["lag 4"], "token, no bound").bias > 0.05
    assert of(scenes["lag 4"], "none").bias > of(scenes["lag 4"], "token, no bound").bias


def test_exact_mean_and_variance_equal_sampled_ones(scenes):
    """Compare with a million draws of one prompt's completions."""
    scene = scenes["4 bits (noise 0.3)"]
    weights = corrections.CORRECTIONS["`token_truncate`, 2"](scene.drawn)
    count = len(scene.drawn.chance) // 2
    size = torch.where(scene.mask, weights * scene.drawn.advantages, 0.0)
    rows = torch.multinomial(scene.drawn.chance[:count], 200_000, True, generator=torch.Generator().manual_seed(0))
    total = torch.zeros_like(scene.policy)
    own = torch.nn.functional.one_hot(scene.tokens, total.shape[1]) - scene.policy.exp()[scene.prefixes]
    parts = size.unsqueeze(-1) * own
    total.index_put_((scene.prefixes[rows],), parts[rows], accumulate=True)
    mean, _ = scene._means(weights, torch.cat([scene.drawn.chance[:count], torch.zeros(count, dtype=torch.float64)]))
    torch.testing.assert_close(total / len(rows), mean, atol=5e-3, rtol=0)


def test_no_correction_removes_the_bias_of_truncated_sampling(scenes):
    assert min(of(scenes["top_p 0.9"], name).bias for name in corrections.CORRECTIONS) > 0.05
