"""Test which item comes next: the selectors, the resulting order, and the error if a selector lacks an input."""

import math
import time

import pytest
import torch
from conftest import refused

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.errors import StateError
from rlhf_lightning.people.candidates import SamplingAhead
from rlhf_lightning.people.selectors import (
    DisagreementSelector,
    DiversitySelector,
    RandomSelector,
    RewardModels,
    Selector,
    UncertaintySelector,
    load_selector,
    ngram_features,
)

from .conftest import LEFT, label, pair, ranked_item


class Given:
    """An ensemble whose margins are given by the number in the item's prompt."""

    def __init__(self, *margins):
        self.margins = margins

    def __len__(self):
        return len(self.margins)

    def __call__(self, items):
        numbers = [int(item.prompt.split()[1]) for item in items]
        return [torch.tensor([[one[number], 0.0] for one in self.margins]) for number in numbers]


class LongestSelector(Selector):
    def values(self, items, given):
        return [len(item.candidates[0].text) for item in items]


class BrokenSelector(Selector):
    def values(self, items, given):
        return [math.nan] * len(items)


def order_of(store, annotator="ann", count=4):
    return [int(label(store, annotator, LEFT)[0].item.prompt.split()[1]) for _ in range(count)]


def test_without_a_selector_items_keep_their_order(make_store):
    assert order_of(make_store(4)) == [0, 1, 2, 3]


def test_uncertainty_selector_puts_the_least_certain_first(make_store):
    store = make_store(4)
    store.rank(UncertaintySelector(Given([3.0, -1.0, 0.1, -2.0])))
    assert order_of(store) == [2, 1, 3, 0]


def test_disagreement_selector_puts_the_most_disputed_first(make_store):
    store = make_store(4)
    store.rank(DisagreementSelector(Given([1.0, 0.0, 2.0, 5.0], [1.0, 0.1, -2.0, 3.0])))
    assert order_of(store)[0] == 2


def test_random_selector_order_depends_on_the_seed(make_store):
    orders = set()
    for seed in (0, 0, 1):
        store = make_store(6, name=f"{len(orders)}{seed}.db")
        store.rank(RandomSelector(seed=seed))
        orders.add(tuple(order_of(store, count=6)))
        store.close()
    assert len(orders) == 2


def test_diversity_selector_puts_the_most_different_first():
    items = [pair(n) for n in (0, 1)] + [ranked_item(2)] + [pair(3)]
    values = DiversitySelector().values(items, [pair(7)])
    assert max(range(4), key=values.__getitem__) == 2, "all others ask almost what was asked"
    assert sorted(values) == [-3.0, -2.0, -1.0, 0.0]
    features = ngram_features(items)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert features[0] @ features[1] > 2 * features[0] @ features[2]


def test_items_already_assigned_are_completed_first(make_store):
    """Each item needs two annotators: the second annotator gets the first one's items, also after a restart."""
    store = make_store(4, annotators=2)
    store.rank(UncertaintySelector(Given([3.0, -1.0, 0.1, -2.0])))
    assert order_of(store, "ann", 2) == [2, 1]
    assert order_of(store, "bob", 3) == [1, 2, 3]
    store.close()
    again = make_store(0, annotators=2)
    again.rank(UncertaintySelector(Given([3.0, -1.0, 0.1, -2.0])))
    assert order_of(again, "ann", 2) == [3, 0]


def test_new_items_are_ranked_on_arrival(make_store):
    store = make_store(2)
    ahead = SamplingAhead(store, iter([[pair(2)], [pair(3, "the longest of all good")]]), 10, LongestSelector())
    with ahead:
        while ahead.state():
            pass
    assert ahead.failure is None and order_of(store)[0] == 3


@pytest.mark.parametrize(
    ("error", "plain"),
    [
        (StateError("no-answer", "the server is gone"), True),
        (OSError("the network is down"), True),
        (ZeroDivisionError("a bug"), False),
    ],
)
def test_sampling_errors_are_one_sentence_and_bugs_have_a_traceback(make_store, capsys, error, plain):
    def failing():
        yield [pair(2)]
        raise error

    with SamplingAhead(make_store(1), failing(), 10) as ahead:
        while ahead.failure is None:
            time.sleep(0.01)
    said = capsys.readouterr().err
    assert f"sampling has stopped: {error}" in said and str(error) in ahead.state()
    assert ("Traceback" not in said) == plain and ahead.left(3) == 3


def test_a_custom_selector_is_loaded_from_a_file(make_store, tmp_path, monkeypatch):
    (tmp_path / "my_selection.py").write_text(
        "from rlhf_lightning.people.selectors import Selector\n\n\nclass LatestSelector(Selector):\n"
        "    def values(self, items, given):\n        return [item.id for item in items]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    store = make_store(3)
    store.rank(load_selector("my_selection.LatestSelector", [], 0))
    assert order_of(store, count=3) == [2, 1, 0]


def brevity(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]


def test_scorers_form_an_ensemble_and_score_each_item_once(monkeypatch):
    asked = []
    monkeypatch.setattr(f"{__name__}.brevity", lambda p, c, **columns: asked.extend(c) or brevity_of(c))
    models = RewardModels([f"{__name__}.brevity"])
    items = [pair(0), ranked_item(1)]
    assert [scores.tolist() for scores in models(items)] == [[[-6.0, -6.0]], [[-8.0] * 4]]
    assert len(models) == 1 and len(models(items)) == 2 and len(asked) == 6


def brevity_of(completions):
    return [-float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--select", "uncertainty"], "--select uncertainty needs a reward model"),
        (["--select", "disagreement", "--ensemble", f"{__name__}.brevity"], "2 reward models or more"),
        (["--select", "uncertainy"], "did you mean uncertainty?"),
        (["--select", "best"], "there are disagreement, diversity, random, uncertainty"),
        (["--select", "math.sqrt"], "it must be a subclass of rlhf_lightning.people.selectors.Selector"),
        (["--select", "absent.Mine"], "cannot be imported"),
        (["--ensemble", "a", "b"], "--ensemble serves --select uncertainty or disagreement"),
    ],
)
def test_missing_flags_are_named(flags, sentence, capsys, tmp_path):
    assert rlhf(["annotate", "--store", str(tmp_path / "f.db"), "--port", "0", *flags]) == 1
    assert sentence in capsys.readouterr().err


def test_non_finite_selector_values_are_refused(make_store):
    with refused("not-finite", "BrokenSelector returned a value that is NaN or infinite"):
        make_store(2).rank(BrokenSelector())
