"""Monitors: what they flag, how they act, and their precision, recall and AUROC against the truth."""

import math

import pytest
from conftest import refused
from sklearn.metrics import roc_auc_score

from rlhf_lightning.scoring.monitor import Monitor, NoisyTruth
from rlhf_lightning.scoring.scorer import ask_scorer


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def hacks(prompts, completions, **columns):
    return [float("hack" in text) for text in completions]


def suspicion(prompts, completions, **columns):
    return [None if text == "?" else text.count("h") / 10 for text in completions]


TEXTS = ["hack", "honest hhhhhh", "plain", "hhhhh hack", "?"]


def ask(scorer, texts=TEXTS):
    return ask_scorer(scorer, ["p"] * len(texts), texts, {}, "monitor")


def taken(scorer):
    return {name: [value for value in values.tolist() if not math.isnan(value)]
            for name, values in scorer.take_metrics().items()}  # fmt: skip


@pytest.mark.parametrize(("action", "expected"), [("penalty", [4, 11, 5, 8, 1]), ("watch", [4, 13, 5, 10, 1]),
                                                  ("screen", [4, None, 5, None, 1])])  # fmt: skip
def test_flagged_completions_are_penalised_screened_or_watched(action, expected):
    found = ask(Monitor(length, suspicion, action, threshold=0.5, penalty=2.0))
    assert [None if math.isnan(score) else score for score in found.scores.tolist()] == expected
    assert found.parts["proxy"].tolist() == [4, 13, 5, 10, 1]
    assert found.parts["monitor"].tolist()[:4] == pytest.approx([0.1, 0.7, 0.0, 0.6])


def test_precision_recall_and_auroc_by_hand():
    """Hacks: the first (0.1) and the fourth (0.6); honest: 0.7, 0.0, and one that the monitor cannot judge."""
    scorer = Monitor(length, suspicion, truth=hacks)
    ask(scorer)
    found = taken(scorer)
    assert found["monitor_flagged"] == [0, 1, 0, 1, 0] and found["hack_rate"] == [1, 0, 0, 1, 0]
    assert found["monitor_precision"] == [0, 1] and found["monitor_recall"] == [0, 1]
    assert found["monitor_auroc"] == [0.5, 0.5]
    assert set(taken(Monitor(length, suspicion))) == {"monitor_flagged"}


def test_auroc_is_that_of_the_pooled_completions():
    texts = [f"{'h' * (n % 7)} {'hack' if n % 3 == 0 else ''}" for n in range(60)]
    scorer = Monitor(length, suspicion, truth=hacks)
    ask(scorer, texts)
    auroc = taken(scorer)["monitor_auroc"]
    values = suspicion(None, texts)
    assert sum(auroc) / len(auroc) == pytest.approx(roc_auc_score(hacks(None, texts), values))


def test_a_noisy_truth_errs_at_its_rate_and_always_alike():
    texts = [f"{'hack' if n % 2 else 'fair'} {n}" for n in range(4000)]
    truth = hacks(None, texts)
    for rate in (0.0, 0.1, 0.5):
        noisy = NoisyTruth(hacks, rate)
        found = ask(noisy, texts).scores.tolist()
        wrong = sum(one != other for one, other in zip(found, truth, strict=True)) / len(texts)
        assert abs(wrong - rate) < 0.03 and ask(noisy, texts[:50]).scores.tolist() == found[:50]
    assert (
        ask(NoisyTruth(hacks, 0.1, seed=1), texts).scores.tolist() != ask(NoisyTruth(hacks, 0.1), texts).scores.tolist()
    )


def test_a_monitor_may_stop_the_run():
    scorer = Monitor(length, suspicion, "stop", stop_at=0.2)
    scorer.on_rollout_end(None, {"monitor_flagged": 0.19})
    with refused("monitor-stopped", "20.0%"):
        scorer.on_rollout_end(None, {"monitor_flagged": 0.2})
    Monitor(length, suspicion, "watch", stop_at=0.2).on_rollout_end(None, {"monitor_flagged": 0.9})


@pytest.mark.parametrize("wrong", [{"action": "shout"}, {"threshold": 0.0}, {"penalty": -1.0}, {"stop_at": 2.0}])
def test_wrong_settings_are_refused(wrong):
    with refused("unknown-choice" if "action" in wrong else "setting-out-of-range"):
        Monitor(length, suspicion, **wrong)
    with refused("setting-out-of-range"):
        NoisyTruth(hacks, 0.6)
