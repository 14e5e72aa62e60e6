"""Each test runs where nothing is, as a user would in a fresh folder."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # Set by every run; setting it here puts it back for the tests that follow.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.delenv("RLHF_DEBUG", raising=False)
    return tmp_path
