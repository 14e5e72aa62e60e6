"""Test simulated annotators: their errors, their use of the page, and identical judgements after a kill."""

import math
import os
import signal
from statistics import mean

import pytest
from conftest import refused

from rlhf_lightning.data.feedback.database import judgements_of
from rlhf_lightning.data.feedback.records import Candidate, Item
from rlhf_lightning.people.labeller import Page, PageError, SimulatedAnnotator, SimulatedAnnotators, strength_of

from .conftest import pair, ranked_item

GOLD = f"{__name__}.gold"


def no_more():
    """There are no further items."""
    return False


def gold(prompt, completion):
    """Good completions score 0.1 more."""
    return 0.6 if completion.startswith("good") else 0.5


def item(assignment, left="good", right="poor"):
    return {"assignment": assignment, "prompt": [{"role": "user", "text": "q"}],
            "candidates": [{"raw": left}, {"raw": right}]}  # fmt: skip


def share_left(count=4000, left="good", right="poor", **settings):
    annotator = SimulatedAnnotator("ann", gold, **settings)
    return mean(annotator.answer(item(n, left, right))["ranks"][0] == 0 for n in range(count))


def test_choices_follow_bradley_terry():
    """Four standard errors of 4,000 choices are 0.03."""
    assert share_left(temperature=0.1) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
    assert share_left(temperature=0.1, left="poor", right="good") == pytest.approx(1 / (1 + math.exp(1)), abs=0.03)
    assert share_left(temperature=0.1, position_bias=1.0) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.03)
    assert share_left(temperature=0.1, careless=True) == pytest.approx(0.5, abs=0.03)
    assert share_left(400, temperature=1e-6) == 1.0
    assert share_left(400, temperature=0.1, seed=1) != share_left(400, temperature=0.1, seed=2)


def test_strengths_depend_on_the_reward_difference():
    assert [strength_of(x) for x in (0.5, 1.5, 3.0, 9.0)] == [1, 2, 3, 4]


def kept(store):
    with store.reading() as connection:
        return [(one.id, one.annotator, one.item, one.repeat, one.shown, one.ranks, one.strength)
                for one in judgements_of(connection)]  # fmt: skip


def test_simulated_annotators_label_through_the_page(make_store):
    store = make_store([*(pair(n) for n in range(30)), ranked_item(30)], repeats=0.2, distance=2)
    SimulatedAnnotators(GOLD, annotators=3, temperature=1e-3).label(store, 31, no_more)
    made = kept(store)
    assert store.labels() == 31 and len(made) > 31, "hidden repeats are no labels"
    assert {name for _, name, *_ in made} == {"simulated-0", "simulated-1", "simulated-2"}
    assert all(ranks[0] == 0 for _, _, _, _, _, ranks, _ in made if len(ranks) == 2), "the good one, wherever it was"
    SimulatedAnnotators(GOLD).label(store, 40, lambda: store.add(pair(n) for n in range(31, 36)) > 0)
    assert store.labels() == 36, "further items were judged, and when there were none it was the end"


def test_a_killed_simulation_resumes_with_the_same_labels(make_store, tmp_path):
    """Killed after each of several judgements, at any moment, and continued in another process."""
    items = [pair(n) for n in range(24)]
    settings = {"repeats": 0.2, "distance": 2, "annotators": 2, "lease": math.inf, "salt": ""}
    whole = make_store(items, **settings)
    people = SimulatedAnnotators(GOLD, annotators=3, temperature=0.1)
    people.label(whole, 40, no_more)
    make_store(items, name="cut.db", **settings).close()
    for count in (5, 11, 12, 26):
        child = os.fork()
        if child == 0:
            store = make_store(0, name="cut.db", **settings)
            judge, left = store.judge, [count]

            def killed(*args, judge=judge, left=left, **kwargs):
                number = judge(*args, **kwargs)
                if number >= left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return number

            store.judge = killed
            people.label(store, 40, no_more)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    cut = make_store(0, name="cut.db", **settings)
    assert len(kept(cut)) >= 26
    people.label(cut, 40, no_more)
    assert kept(cut) == kept(whole)


def test_a_missing_web_server_is_refused_at_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else name)
    with refused("missing-package", "the page needs uvicorn: pip install 'rlhf-lightning[annotate]'"):
        SimulatedAnnotators(GOLD)


def test_invalid_settings_are_refused():
    with refused("setting-out-of-range", "temperature is 0"):
        SimulatedAnnotators(GOLD, temperature=0)
    with refused("setting-out-of-range", "careless 2"):
        SimulatedAnnotators(GOLD, careless=2)
    with refused("not-importable", "gold_reward 'absent.gold'"):
        SimulatedAnnotators("absent.gold")
    with pytest.raises(PageError, match="no answer|refused") as caught:
        Page("http://127.0.0.1:9", patience=0).enter("ann")
    assert caught.value.code == "request-refused"


def test_a_fraction_of_annotators_is_careless():
    people = SimulatedAnnotators(GOLD, annotators=4, careless=0.5).annotators
    assert [one.careless for one in people] == [True, True, False, False]


def test_gold_reward_gets_conversations_and_plain_prompts(make_store):
    asked = []
    annotator = SimulatedAnnotator("ann", lambda prompt, completion: asked.append(prompt) or 0.0)
    for prompt in ("plain", [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]):
        store = make_store([Item(prompt, (Candidate("a"), Candidate("b")))], name=f"{len(asked)}.db")
        people = SimulatedAnnotators(GOLD, annotators=1)
        people.annotators[0].gold_reward = annotator.gold_reward
        people.label(store, 1, no_more)
        assert asked[-1] == prompt
