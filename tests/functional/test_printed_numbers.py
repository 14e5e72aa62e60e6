"""Every worked number behind the formulas of this project is asserted and counted.

``printed_numbers.json`` lists them by topic, under the test module and the worked number that asserts them. Numbers
that no function of this folder computes are computed here by the responsible code.
"""

import importlib
import json
import math
from collections.abc import Iterator
from os.path import commonprefix
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BC, make_tiny_tokenizer, spell
from tiny_models import quiet_trainer, sequences

from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.modules import RewardModule, SFTModule
from rlhf_lightning.training.meter import Meter

from .worked import Worked, check, each

PRINTED = json.loads((Path(__file__).parent / "printed_numbers.json").read_text())
COUNTS = {
    "1 tokenisation": 26,
    "2 supervised fine-tuning": 13,
    "3 reward model": 17,
    "4 PPO": 52,
    "5 critic-free policy gradients": 49,
    "6 preference losses": 52,
    "6 values at the reference": 20,
    "7 best-of-n": 14,
    "8 AI feedback": 6,
    "9 evaluation": 14,
    "10 distillation": 7,
    "12 options of 2025-26": 27,
}
"""Printed numbers, by section."""


def laid_out():
    """Return a prompt and a completion of three tokens each, in a batch with a longer row."""
    return padded_layout(sequences([([5, 6, 7], [8, 9, 2]), ([5, 6, 7, 8], [8, 9, 9, 2])]))


def labels(t):
    layout = laid_out()
    found = torch.full((layout.input_ids.numel(),), -100.0)
    found[layout.predictors + 1] = layout.targets.float()
    return t(found.view(2, -1)[0].tolist())


def real_tokens(t):
    layout = laid_out()
    return t((torch.arange(8) <= layout.last[0]).tolist())


def boundary(t):
    """Return where the encoding of the prompt and the joint encoding of prompt and completion diverge."""
    tokenizer = make_tiny_tokenizer()
    prompt, both = (tokenizer.encode(text, add_special_tokens=False) for text in ("ab", "abc"))
    assert (prompt, both) == (spell("ab"), [*spell("a"), BC])
    return t(len(commonprefix([prompt, both])))


def bias_of_demonstrations(t):
    module: Any = RewardModule(init_from="nowhere")
    module.trainer = quiet_trainer()
    module.reward_model = SimpleNamespace(bias=0.0)
    module._best_scores = Meter()
    module._best_scores.add("score", t([1.5, 2.5, 0.5]))
    module.on_train_epoch_end()
    return t(module.reward_model.bias)


def token_accuracy(t):
    """Return the sums of SFT's evaluation over three tokens."""
    with torch.no_grad():
        asked = SFTModule(init_from="nowhere").statistics_asked(laid_out())
        assert asked is not None
        found = asked.function(t([[2, 1, 0], [0, 1, 0], [1, 0, -1]]), torch.tensor([0, 1, 2]))
    return t(found["matches"].double().mean().item())


WORKED = [
    Worked("accuracy", token_accuracy, 2 / 3),
    Worked("input ids", lambda t: t(laid_out().input_ids[0].tolist()), [5, 6, 7, 8, 9, 2, 0, 0]),
    Worked("real tokens", real_tokens, [1, 1, 1, 1, 1, 1, 0, 0]),
    Worked("labels", labels, [-100, -100, -100, 8, 9, 2, -100, -100]),
    Worked("supervised tokens", lambda t: laid_out().completion_mask.sum(-1)[0], 3),
    Worked("boundary of a joint encoding", boundary, 1),
    Worked("bias of demonstrations", bias_of_demonstrations, 1.5),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


def asserted() -> Iterator[tuple[str, list[float]]]:
    """Return every worked number of this folder under its test module and name, with the expected values."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for case in getattr(importlib.import_module(f".{path.stem}", __package__), "WORKED", []):
            values = torch.tensor(case.expected, dtype=torch.float64).flatten().tolist()
            yield f"{path.stem.removeprefix('test_')}: {case.name}", values


ASSERTED = dict(asserted())


@pytest.mark.parametrize("section", PRINTED)
def test_every_printed_number_is_asserted(section):
    missing = PRINTED[section].keys() - ASSERTED.keys()
    assert not missing, f"no test module lists these worked numbers: {sorted(missing)}"
    for name, printed in PRINTED[section].items():
        values = ASSERTED[name]
        alike = [math.isclose(a, b, rel_tol=1e-12, abs_tol=5.1e-9) for a, b in zip(printed, values, strict=True)]
        assert all(alike), f"{name}: printed {printed}, asserted {values}"


def test_the_number_of_printed_numbers_is_unchanged():
    counts = {section: sum(map(len, entries.values())) for section, entries in PRINTED.items()}
    assert counts == COUNTS
