"""Errors carry a code that survives a process boundary, for every builtin base class."""

import pickle

import pytest
from conftest import refused

from rlhf_lightning import errors
from rlhf_lightning.recipes import resolve_recipe

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RlhfError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_code_and_message_survive_pickling(kind):
    again = pickle.loads(pickle.dumps(kind("some-code", "beta is -1: it must be positive")))
    assert type(again) is kind and again.code == "some-code" and str(again) == "beta is -1: it must be positive"


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with refused("unknown-recipe", "dop", "did you mean dpo"):
        resolve_recipe("recipe:dop")
