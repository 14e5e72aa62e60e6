"""Length and repetition penalties by value."""

import pytest
from conftest import refused
from tiny_models import tiny_tokenizer

from rlhf_lightning.scoring import LengthPenalty, RepetitionPenalty


def score(scorer, *texts):
    return scorer(["p"] * len(texts), list(texts))


def test_length_penalty_counts_words():
    assert score(LengthPenalty(coef=0.5), "", "one", "don't stop, now!") == [0.0, -0.5, -1.5]


def test_length_penalty_with_target_and_tolerance():
    scorer = LengthPenalty(coef=2.0, target=3, tolerance=1)
    assert score(scorer, "a", "a b", "a b c", "a b c d", "a b c d e f") == [-2.0, 0.0, 0.0, 0.0, -4.0]


def test_length_penalty_counts_tokens_with_a_tokenizer(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    assert score(LengthPenalty(coef=1.0, tokenizer=str(tmp_path)), "w20 w21 w22", "w20") == [-3.0, -1.0]


def test_repetition_penalty_is_the_fraction_of_repeated_ngrams():
    assert score(RepetitionPenalty(n=1), "a b c", "a a a a", "A, a b.", "") == pytest.approx([0, -0.75, -1 / 3, 0])
    # bigrams: ab ba ab ba ab -> 2 distinct of 5
    assert score(RepetitionPenalty(n=2, coef=10.0), "a b a b a b") == [pytest.approx(-6.0)]
    assert score(RepetitionPenalty(n=3), "a b") == [0.0]


def test_invalid_settings_are_refused():
    with refused("setting-out-of-range", "n is 0"):
        RepetitionPenalty(n=0)
    with refused("setting-out-of-range", "target is -1"):
        LengthPenalty(target=-1)
