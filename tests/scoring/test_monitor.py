"""Monitors: what they flag, how they act, and their precision, recall and AUROC against the truth."""

import json
import math

import pytest
import torch
from conftest import refused
from sklearn.metrics import roc_auc_score

from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.scoring.monitor import LinearProbe, Monitor, NoisyTruth
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
def test_flagged_completions_are_penalised_dropped_or_only_logged(action, expected):
    found = ask(Monitor(length, suspicion, action, threshold=0.5, penalty=2.0))
    assert [None if math.isnan(score) else score for score in found.scores.tolist()] == expected
    assert found.parts["proxy"].tolist() == [4, 13, 5, 10, 1]
    assert found.parts["monitor"].tolist()[:4] == pytest.approx([0.1, 0.7, 0.0, 0.6])


def test_precision_recall_and_auroc_by_hand():
    """Hacks are the first (0.1) and the fourth (0.6); honest completions have 0.7, 0.0, and one without a monitor
    score.
    """
    scorer = Monitor(length, suspicion, truth=hacks)
    ask(scorer)
    found = taken(scorer)
    assert found["monitor_flagged"] == [0, 1, 0, 1, 0] and found["hack_rate"] == [1, 0, 0, 1, 0]
    assert found["monitor_precision"] == [0, 1] and found["monitor_recall"] == [0, 1]
    assert found["monitor_auroc"] == [0.5, 0.5]
    assert set(taken(Monitor(length, suspicion))) == {"monitor_flagged"}


def test_auroc_is_over_all_completions():
    texts = [f"{'h' * (n % 7)} {'hack' if n % 3 == 0 else ''}" for n in range(60)]
    scorer = Monitor(length, suspicion, truth=hacks)
    ask(scorer, texts)
    auroc = taken(scorer)["monitor_auroc"]
    values = suspicion(None, texts)
    assert sum(auroc) / len(auroc) == pytest.approx(roc_auc_score(hacks(None, texts), values))


def test_noisy_truth_errs_at_its_rate_deterministically():
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


def test_a_monitor_can_stop_the_run():
    scorer = Monitor(length, suspicion, "stop", stop_at=0.2)
    scorer.on_rollout_end(None, {"monitor_flagged": 0.19})
    with refused("monitor-stopped", "20.0%"):
        scorer.on_rollout_end(None, {"monitor_flagged": 0.2})
    Monitor(length, suspicion, "watch", stop_at=0.2).on_rollout_end(None, {"monitor_flagged": 0.9})


@pytest.mark.parametrize("wrong", [{"action": "shout"}, {"threshold": 0.0}, {"penalty": -1.0}, {"stop_at": 2.0}])
def test_invalid_settings_are_refused(wrong):
    with refused("unknown-choice" if "action" in wrong else "setting-out-of-range"):
        Monitor(length, suspicion, **wrong)
    with refused("setting-out-of-range"):
        NoisyTruth(hacks, 0.6)


@pytest.fixture
def labelled(tmp_path):
    rows = [
        {"prompt": "p", "completion": "w10 w11" if n % 2 else "w20 w21 w22", "label": bool(n % 2)} for n in range(40)
    ]
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_probe_separates_labels_and_follows_the_policy(policy_folder, labelled):
    policy = load_policy(str(policy_folder), LoadSettings())
    probe = LinearProbe(str(labelled), every=2)
    probe.load_beside(policy, LoadSettings())
    policy.train()
    told = ask(probe, ["w10 w11", "w20 w21 w22", "w10"]).scores
    assert policy.training and told[0] > 0.9 and told[1] < 0.1 and told[2] > 0.5
    features = probe.features(["w7", "w8 w9"], ["w10 w11 w12", "w13"])
    assert torch.allclose(features[1], probe.features(["w8 w9"], ["w13"])[0], atol=1e-5), (
        "padding leaks into the features"
    )
    first = probe.state_dict()["weights"]
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    probe.on_rollout_end(None, {})
    ask(probe, ["w10 w11"])
    assert torch.equal(probe.state_dict()["weights"], first)
    probe.on_rollout_end(None, {})
    moved = ask(probe, ["w10 w11"]).scores
    assert not torch.equal(probe.state_dict()["weights"], first)
    other = LinearProbe(str(labelled), every=2)
    other.load_beside(policy, LoadSettings())
    other.load_state_dict(probe.state_dict())
    assert other.rollouts == 2 and torch.equal(ask(other, ["w10 w11"]).scores, moved)
    assert len(ask(probe, []).scores) == 0


def test_a_probe_needs_labels_and_a_policy(labelled, tmp_path):
    with refused("setting-out-of-range"):
        LinearProbe(str(labelled), every=0)
    with refused("probe-without-policy", "sharded"):
        LinearProbe(str(labelled)).load_beside(None, LoadSettings())
    with refused("probe-without-policy"):
        ask(LinearProbe(str(labelled)), ["a"])
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "p", "completion": "c", "label": true}\n')
    with refused("one-label"):
        LinearProbe(str(one))
    one.write_text('{"prompt": "p", "label": true}\n')
    with refused("missing-columns", "completion"):
        LinearProbe(str(one))
