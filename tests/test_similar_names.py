"""Test which known name an unknown name is resolved to, and the hints when none is similar."""

import pytest

from rlhf_lightning.similar_names import FEW, hint_at, nearest

SETTINGS = ["learning_rate", "max_epochs", "batch_size", "beta", "label_smoothing", "val/loss"]
MANY = [f"Kind{number}Module" for number in range(FEW + 1)]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("lr", "learning_rate"),
        ("epochs", "max_epochs"),
        ("batchsize", "batch_size"),
        ("betta", "beta"),
        ("ls", "label_smoothing"),
        ("lab", "label_smoothing"),
        ("loss", "val/loss"),
        ("b", None),
        ("wholly_different", None),
    ],
)
def test_nearest_knows_initials_words_beginnings_and_spelling(name: str, found: str | None) -> None:
    assert nearest(name, SETTINGS) == found


def test_nothing_is_near_without_names() -> None:
    assert nearest("x", []) is None and hint_at("x", []) == "there are none."


def test_of_many_names_a_hint_shows_those_that_resemble() -> None:
    assert hint_at("kind7", MANY) == "did you mean Kind7Module?"
    assert hint_at("zz", SETTINGS) == f"there are {', '.join(sorted(SETTINGS))}."
    assert hint_at("Kindly", MANY) == f"the nearest of {len(MANY)}: Kind0Module, Kind1Module, Kind2Module."
    assert hint_at("nope", MANY) == f"none of {len(MANY)} names resembles it."
