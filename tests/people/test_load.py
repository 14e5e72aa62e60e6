"""Run experiments/feedback/load.py, shortened and in full: concurrent annotators on a real server that is killed."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "feedback"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import load

    yield load
    sys.modules.pop("load")


@pytest.mark.parametrize(
    ("labels", "kills"),
    [
        pytest.param(160, 2, marks=pytest.mark.drill),
        pytest.param(5000, 0, marks=pytest.mark.slow),
        pytest.param(5000, 5, marks=pytest.mark.slow),
    ],
)
def test_confirmed_labels_are_stored_exactly_once(load: Any, tmp_path: Path, labels: int, kills: int) -> None:
    found = load.run(tmp_path, load.Work(labels=labels), kills)
    assert found["labels"] == labels and found["kills"] == kills
    assert (found["lost"], found["doubled"]) == (0, 0)
    assert found["unconfirmed"] == 0, "who got no answer asked again under the same key"
