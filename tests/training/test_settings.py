"""Ranges of settings: every objective states them, and values outside are refused before any model is read."""

import inspect
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import refused

from rlhf_lightning import modules
from rlhf_lightning.training.module import AlignmentModule

OBJECTIVES = [kind for kind in vars(modules).values() if inspect.isclass(kind) and issubclass(kind, AlignmentModule)]


def numeric_settings(kind: type) -> Iterator[str]:
    """Return the numeric settings of a class and its bases."""
    for base in kind.__mro__:
        if issubclass(base, AlignmentModule) and "__init__" in vars(base):
            for name, parameter in inspect.signature(base.__init__).parameters.items():
                words = set(str(parameter.annotation).replace("[", " ").replace(",", " ").replace("]", " ").split())
                if words & {"int", "float"}:
                    yield name


def needed(kind: type) -> set[str]:
    """Return the settings without a default of a class and of its bases."""
    parameters = (
        p
        for base in kind.__mro__
        if issubclass(base, AlignmentModule) and "__init__" in vars(base)
        for p in inspect.signature(base.__init__).parameters.values()
    )
    return {p.name for p in parameters if p.default is p.empty and p.name not in ("self", "kwargs")}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_numeric_setting_has_a_range(kind: type) -> None:
    ranges = {name for base in kind.__mro__ for name in vars(base).get("ranges", {})}
    assert {"learning_rate", "betas", "max_grad_norm"} <= set(numeric_settings(kind))
    assert not set(numeric_settings(kind)) - ranges


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_defaults_are_in_range_and_learning_rate_0_is_not(kind: Any) -> None:
    required = {name: "nowhere" for name in ("init_from", "scorer", "teacher") if name in needed(kind)}
    kind(**required)
    with refused("setting-out-of-range", f"learning_rate of {kind.__name__} is 0.0", "(0, inf)"):
        kind(**required, learning_rate=0.0)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("SFTModule", "learning_rate", -1.0),
        ("SFTModule", "betas", [0.9, 1.0]),
        ("SFTModule", "betas", [-0.1, 0.9]),
        ("SFTModule", "weight_decay", -1.0),
        ("SFTModule", "adam_eps", math.nan),
        ("DPOModule", "max_grad_norm", 0.0),
        ("DPOModule", "max_grad_norm", math.inf),
        ("RewardModule", "centering", -1.0),
        ("DavidsonModule", "tie_share", 1.0),
        ("KTOModule", "beta", -1.0),
        ("KTOModule", "undesirable_weight", -1.0),
        ("GKDModule", "on_policy_fraction", 1.5),
        ("IterativeDPOModule", "rollouts_per_round", 0),
    ],
)
def test_numbers_outside_their_range_are_refused(name: str, setting: str, value: Any) -> None:
    kind = getattr(modules, name)
    required = dict.fromkeys(needed(kind) & {"init_from", "scorer", "teacher"}, "nowhere")
    with refused("setting-out-of-range", f"{setting} of {name} is {value}"):
        kind(**required, **{setting: value})


@pytest.mark.parametrize(("setting", "value"), [("r", 0), ("alpha", -1), ("dropout", 1.0)])
def test_lora_settings_have_ranges(setting: str, value: float) -> None:
    with refused("setting-out-of-range", f"{setting} of LoraSettings is {value}"):
        modules.DPOModule(init_from="nowhere", lora={setting: value})


def test_out_of_range_flags_are_refused_in_one_sentence(tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "rlhf_lightning.cli", "fit", "--config", "recipe:dpo", "--model.beta", "-1"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "rlhf: beta of DPOModule is -1.0: it must lie in (0, inf)"
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.name == "dpo"]


def test_a_duplicate_config_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("model:\n  class_path: DPOModule\n  init_args:\n    beta: 1\n    beta: 2\n")
    asked = [sys.executable, "-m", "rlhf_lightning.cli", "fit", "--config", "twice.yaml"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the key 'beta' stands twice in the mapping at line 4" in done.stderr.splitlines()[-1]
