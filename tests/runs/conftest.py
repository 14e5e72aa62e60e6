"""Run each test in an empty folder, as a user would."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Every run sets this; setting it here restores it for the following tests.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.delenv("RLHF_DEBUG", raising=False)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]  # a test's own objective must not replace another test's objective of the same name
